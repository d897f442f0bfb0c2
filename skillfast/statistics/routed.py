"""`RoutedStatistics`: units of a block's experts over the tokens that were routed to each."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast import ops
from skillfast.backends.capture import accumulation_dtype
from skillfast.errors import ArgumentError
from skillfast.results.records import Document, Positive
from skillfast.statistics import distributed, inputs, persistence, scoring
from skillfast.statistics.accumulator import NeuronStatistics
from skillfast.statistics.moments import CoMoments
from skillfast.statistics.state import AccumulatorSettings, State, refuse_other
from skillfast.statistics.tokens import values_of_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from skillfast.metrics import Metric
    from skillfast.statistics.scores import NeuronScores
    from skillfast.statistics.tokens import TokenMask

SCHEMA = "skillfast.routed/1"
LEAST = 10  # tokens of an expert, below which its units have no scores
_AT_ONCE = 1 << 19  # elements of rows that the CPU works on at once: they stay in its cache


@dataclass(frozen=True)
class RoutedRows:
    """Rows of tokens at the experts that they were routed to.

    Attributes:
        x: [rows, U], activations.
        gate: [rows], the factor on each.
        expert: int64 [rows]; the number of experts for rows that count nowhere.
        token: int64 [rows], place among the tokens of the batch, example after example.
        shape: Examples of the batch, and tokens of each.
    """

    x: torch.Tensor
    gate: torch.Tensor
    expert: torch.Tensor
    token: torch.Tensor
    shape: tuple[int, int]

    @property
    def example(self) -> torch.Tensor:
        """int64 [rows], the example that each row is of."""
        return self.token // self.shape[1]

    def gated(self) -> torch.Tensor:
        """Gate x activation [rows, U], in the dtype that sums are taken in."""
        dtype = accumulation_dtype(self.x.dtype)
        return self.x.to(dtype) * self.gate.to(dtype)[:, None]

    def parts(self) -> list[RoutedRows]:
        """The rows, as many at a time as the device works on at once."""
        n = len(self.x)
        step = max(1, _AT_ONCE // self.x.shape[1]) if self.x.device.type == "cpu" else max(1, n)
        return [self.at(slice(start, start + step)) for start in range(0, n, step)]

    def at(self, rows: slice | torch.Tensor) -> RoutedRows:
        """Some of the rows."""

        def taken(values: torch.Tensor) -> torch.Tensor:
            return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)

        return replace(self, x=taken(self.x), gate=taken(self.gate), expert=taken(self.expert), token=taken(self.token))


class RoutedStatistics(persistence.Kept):
    """Correlates the units of a block's experts with every metric; each expert has its own number of observations.

    Pearson's r of all experts comes from one set of stacked sums, and no row is kept. Ranks and the bootstrap need an
    accumulator for each expert; rows of all of them wait in one place, until there are `buffer_rows` for each.

    Args:
        n_experts: Number of experts.
        units: Neurons of each, U.
        metrics: Name -> kind of metric.
        statistics: Which statistics to compute.
        bins: Bins per neuron.
        n_bootstrap: Replicates of the bootstrap; None for none.
        seed: Seed of the replicates.
        buffer_rows: Rows of an expert collected before one update of its accumulator.
        device: Where the state lives.
    """

    FILE = "routed.safetensors"
    SCHEMA = SCHEMA

    def __init__(
        self,
        n_experts: int,
        units: int,
        metrics: Mapping[str, Metric],
        statistics: Sequence[str],
        *,
        bins: int,
        n_bootstrap: int | None,
        seed: int,
        buffer_rows: int,
        device: torch.device,
    ) -> None:
        settings = AccumulatorSettings(units, dict(metrics), ("pearson",), bins, None, seed, buffer_rows)
        self._sums = State.empty(settings, device)  # no row of it ever waits in its buffer
        self.n_experts = n_experts
        self.units = units
        self.statistics = tuple(statistics)
        self.n_bootstrap = n_bootstrap
        self._made = partial(
            NeuronStatistics, units, metrics, statistics, bins=bins, n_bootstrap=n_bootstrap, seed=seed,
            buffer_rows=buffer_rows, device=device,
        )  # fmt: skip
        self.keeps_rows = n_bootstrap is not None or set(statistics) != {"pearson"}
        self.experts = [self._made() for _ in range(n_experts)] if self.keeps_rows else []
        self._waiting: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        if not self.keeps_rows:
            self._sums.stack(n_experts)

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self._sums.device

    @property
    def n_observations(self) -> int:
        """Pairs of a token and an expert counted so far."""
        return sum(self.counts())

    @property
    def state_bytes(self) -> int:
        """Size of all state and buffers, in bytes."""
        waiting = sum(t.numel() * t.element_size() for rows in self._waiting for t in rows)
        return self._sums.nbytes + waiting + sum(expert.state_bytes for expert in self.experts)

    def counts(self) -> list[int]:
        """Tokens of each expert counted so far."""
        self._drain()
        if self.keeps_rows:
            return [expert.n_observations for expert in self.experts]
        return self._sums.moments.count.tolist()

    def check(self, values: Mapping[str, torch.Tensor], n: int) -> torch.Tensor:
        """The metrics' values of n examples, checked: float64 [n, metrics]."""
        return inputs.check_values(self._sums.settings.metrics, values, n, self.device, self._sums.faults)

    def check_tokens(
        self, values: Mapping[str, torch.Tensor], batch: int, tokens: int, mask: TokenMask | None
    ) -> torch.Tensor:
        """Metrics of every token, checked: float64 [batch, tokens, metrics]; 0 where the mask leaves a token out."""
        return values_of_tokens(self._sums, values, batch, tokens, mask)

    def center(self, rows: RoutedRows) -> None:
        """Let one of its rows be the shift of each expert that has counted none."""
        n = len(rows.x)
        if not n:
            return
        moments = self._sums.moments
        first = rows.expert.new_full((self.n_experts + 1,), n)
        first.scatter_reduce_(0, rows.expert, torch.arange(n, device=first.device), "amin")
        x = rows.at(first[:-1].clamp(max=n - 1)).gated().float()
        chosen = (moments.count == 0) & (first[:-1] < n)
        moments.shift_x.copy_(torch.where(chosen[:, None] & x.isfinite(), x, moments.shift_x))

    def summed(self, rows: RoutedRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of each example's rows at each expert, about the shift.

        Returns:
            [2, examples, experts, U], sums and sums of squares, and int64 [examples, experts], how many rows.
        """
        examples, n = rows.shape[0], self.n_experts
        segments = examples * (n + 1)  # one more for rows of no expert
        place = rows.example * (n + 1) + rows.expert
        counts = torch.zeros_like(place[:1]).expand(segments).clone()
        counts.index_add_(0, place, torch.ones_like(place))
        dtype = accumulation_dtype(rows.x.dtype)
        sums = torch.zeros(2, segments, self.units, dtype=dtype, device=self.device)
        for part in rows.parts():
            x = self._shifted(part)
            at = part.example * (n + 1) + part.expert
            sums[0].index_add_(0, at, x)
            sums[1].index_add_(0, at, x.square_())
        return sums.view(2, examples, n + 1, -1)[:, :, :n], counts.view(examples, n + 1)[:, :n]

    def _shifted(self, rows: RoutedRows) -> torch.Tensor:
        """Gate x activation about the shifts, in memory of its own."""
        x = rows.gated()
        shift = self._sums.moments.shift_x.to(x.dtype)
        return x.sub_(shift.index_select(0, rows.expert.clamp(max=self.n_experts - 1)))

    def add_sums(self, sums: torch.Tensor, counts: torch.Tensor, checked: torch.Tensor) -> None:
        """Count examples by the sums over their rows.

        Args:
            sums: [2, n, experts, U], as `summed` gives them.
            counts: int64 [n, experts].
            checked: float64 [n, metrics].
        """
        if not len(checked):
            return
        state = self._sums
        columns = state.settings.expand(checked)
        if not state.shifted:
            state.moments.shift_y.copy_(columns.mean(0))
            state.shifted = True
        state.moments.update_sums(sums, counts, columns - state.moments.shift_y)

    def accumulated(self, rows: RoutedRows, checked: torch.Tensor) -> CoMoments:
        """Sums of rows about the shifts, with values of their tokens; they are not counted yet.

        Args:
            rows: The rows.
            checked: float64 [examples, tokens, metrics], as `check_tokens` gives them.
        """
        moments = self._sums.moments
        columns = self._sums.settings.expand(checked.flatten(0, 1)) - moments.shift_y  # [tokens of all examples, M]
        y = columns[rows.token]
        found = CoMoments.zeros(self.units, y.shape[1], self.device, experts=self.n_experts)
        found.shift_x, found.shift_y = moments.shift_x, moments.shift_y

        def each(values: torch.Tensor) -> torch.Tensor:
            """Sums over the rows of each expert."""
            whole = values.new_zeros((self.n_experts + 1, *values.shape[1:]))
            return whole.index_add_(0, rows.expert, values)[:-1]

        found.count = each(torch.ones_like(rows.expert))
        found.sum_y = each(y)
        found.sum_yy = each(y.square())
        (self._add_sorted if self.device.type == "cpu" else self._add_products)(found, rows, y.float())
        return found

    def _add_sorted(self, found: CoMoments, rows: RoutedRows, y: torch.Tensor) -> None:
        """Add an expert's rows at a time, which the host knows the number of."""
        order = rows.expert.argsort(stable=True)
        start = 0
        for expert, n in enumerate(found.count.tolist()):
            at = order[start : start + n]
            start += n
            if n:
                x = rows.at(at).gated().float()
                sums = (found.sum_x[expert], found.sum_xx[expert], found.sum_xy[expert])
                ops.comoments_update(x, y[at], found.shift_x[expert], *sums)

    def _add_products(self, found: CoMoments, rows: RoutedRows, y: torch.Tensor) -> None:
        """Add all rows in one product with columns that are 0 but for a row's own expert: nothing is waited for."""
        n, columns = self.n_experts + 1, y.shape[1]
        x = self._shifted(rows).float()
        own = y.new_zeros(len(y), n, columns)
        own.scatter_(1, rows.expert[:, None, None].expand(-1, 1, columns), y[:, None])
        finite = torch.where(x.isfinite(), x, 0)  # or a row would spoil other experts' products
        found.sum_xy += (own.flatten(1).T @ finite).view(n, columns, -1)[:-1]
        for target, values in ((found.sum_x, x), (found.sum_xx, x.square())):
            target += x.new_zeros(n, self.units).index_add_(0, rows.expert, values)[:-1]

    def add_accumulated(self, found: CoMoments) -> None:
        """Count what `accumulated` gave."""
        counted = self._sums.moments.sums()
        for name, tensor in found.sums().items():
            counted[name] += tensor

    def add(self, rows: RoutedRows, checked: torch.Tensor, groups: torch.Tensor) -> None:
        """Count rows, where they are kept until there are enough for every expert.

        Args:
            rows: The rows.
            checked: float64 [rows, metrics].
            groups: int64 [rows], the group of each.
        """
        gated = rows.gated().to(rows.x.dtype)
        self._waiting.append((gated, rows.expert, checked, inputs.check_groups(groups, len(checked), self.device)))
        if sum(len(x) for x, *_ in self._waiting) >= self._sums.settings.buffer_rows * self.n_experts:
            self._drain()

    def _drain(self) -> None:
        """Hand the rows that wait to their experts; their numbers are waited for."""
        if not self._waiting:
            return
        x, expert, checked, groups = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        order = expert.argsort(stable=True)
        numbers = expert.bincount(minlength=self.n_experts + 1).tolist()[:-1]
        start = 0
        for statistics, n in zip(self.experts, numbers, strict=True):
            at = order[start : start + n]
            start += n
            if n:
                statistics.update_checked(x[at], checked[at], groups[at])

    def forget(self) -> None:
        """Forget all that was counted."""
        self._sums.moments.clear()
        self._waiting = []
        self.experts = [self._made() for _ in self.experts]

    def merge(self, other: RoutedStatistics) -> None:
        """Add what another accumulator of the same experts has counted; the other is left as it is.

        Raises:
            ArgumentError: The other has other experts, metrics or statistics, or counts into other bins.
        """
        self.check_merge(other)
        if self.n_bootstrap is not None:
            self._sums.numbering.merge(other._sums.numbering)
        self._drain()
        other._drain()
        if not self.keeps_rows:
            self._sums.merge_sums(other._sums)
        for ours, theirs in zip(self.experts, other.experts, strict=True):
            ours.merge(theirs)

    def told(self) -> dict[str, Any]:
        """What another accumulator must have in common with this one to be merged, by name."""
        own = {"statistics": self.statistics, "replicates": self.n_bootstrap}
        return {"experts": self.n_experts, **self._sums.settings.told(), **own}

    def check_merge(self, other: RoutedStatistics) -> None:
        """Raise what `merge` would, and change nothing."""
        refuse_other(self.told(), other.told(), "count both with the same settings")
        for state in (self._sums, other._sums):
            state.refuse_faults()
        if self.n_bootstrap is not None:
            self._sums.numbering.check(other._sums.numbering)
        self._drain()
        other._drain()
        for ours, theirs in zip(self.experts, other.experts, strict=True):
            ours.check_merge(theirs)

    def like(self) -> RoutedStatistics:
        """An empty accumulator of the same experts, metrics, shifts and bin edges: a shard to `merge` later."""
        return self._of(self._sums.like(self.device), [expert.like() for expert in self.experts])

    def _of(self, sums: State, experts: list[NeuronStatistics]) -> RoutedStatistics:
        """An accumulator of the same settings with another state."""
        made = copy.copy(self)
        made._sums, made.experts, made._waiting = sums, experts, []
        return made

    def numbers(self, n: int) -> torch.Tensor:
        """Numbers of the next n examples, float64 [n], which no other shard or process gives out."""
        return self._sums.numbering.take(n, self._sums.settings.seed, self.device)

    def state_dict(self) -> dict[str, Any]:
        """The whole state: plain values and tensors, for `from_state_dict` here or in another process."""
        self._drain()
        return {
            "schema": SCHEMA,
            "n_experts": self.n_experts,
            "statistics": list(self.statistics),
            "n_bootstrap": self.n_bootstrap,
            "sums": persistence.to_dict(self._sums),
            "experts": {str(e): expert.state_dict() for e, expert in enumerate(self.experts)},
        }

    @classmethod
    def from_state_dict(cls, stored: Mapping[str, Any], device: torch.device | str = "cpu") -> RoutedStatistics:
        """An accumulator that goes on where `state_dict` was taken.

        Raises:
            ArgumentError: Another schema version, or tensors that do not fit the settings or each other.
        """
        saved = persistence.record(_Saved, stored)
        device, n = torch.device(device), saved.n_experts
        kept = [saved.experts[name] for name in sorted(saved.experts, key=int)]
        sums = persistence.from_dict(saved.sums, device, None if kept else n)
        settings = sums.settings
        made = RoutedStatistics(
            n, settings.n_neurons, settings.metrics, saved.statistics, bins=settings.bins,
            n_bootstrap=saved.n_bootstrap, seed=settings.seed, buffer_rows=settings.buffer_rows, device=device,
        )  # fmt: skip
        if len(made.experts) != len(kept):
            raise ArgumentError(
                f"state_dict: expected the states of {len(made.experts)} experts, got {len(kept)}; it is damaged"
            )
        experts = [NeuronStatistics.from_state_dict(each, device) for each in kept]
        for empty, expert in zip(made.experts, experts, strict=True):
            refuse_other(empty.told(), expert.told(), "it is damaged", "state_dict of an expert")
        return made._of(sums, experts)

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Sum over the processes of a `torch.distributed` group."""
        distributed.share_faults(self._sums, group)
        if not self.keeps_rows:
            distributed.reduce(self._sums, group)
        self._drain()
        for expert in self.experts:
            expert.all_reduce(group)

    def _scores_of(self, expert: int) -> NeuronScores:
        if self.keeps_rows:
            return self.experts[expert].scores()
        return scoring.scores(replace(self._sums, moments=self._sums.moments.of_expert(expert)))

    def scores(self) -> NeuronScores:
        """Scores of all units, expert after expert; NaN for those of experts with too few tokens.

        Raises:
            ArgumentError: No expert had enough.
        """
        self._sums.refuse_faults()
        counts = self.counts()
        found = {e: self._scores_of(e) for e, n in enumerate(counts) if n >= LEAST}
        if not found:
            raise ArgumentError(
                f"pool 'none': expected at least {LEAST} tokens that were routed to one expert, got fewer; trace more "
                "data, or pool='mean'"
            )
        known = next(iter(found.values()))
        arrays = {
            name: np.concatenate(
                [found[e].arrays()[name] if e in found else np.full_like(like, np.nan) for e in range(self.n_experts)]
            )
            for name, like in known.arrays().items()
        }
        reasons: dict[str, list[int]] = {}
        for e in range(self.n_experts):
            own = range(e * self.units, (e + 1) * self.units)
            if e not in found:
                reasons.setdefault("too_few_tokens", []).extend(own)
                continue
            for name, where in found[e].reasons.items():
                if name in ("constant_metric", "metric_beyond_float32"):
                    reasons.setdefault("constant_where_routed", []).extend(own)
                else:
                    reasons.setdefault(name, []).extend(e * self.units + i for i in where)
        return replace(
            known,
            **arrays,  # type: ignore[arg-type]  # each is one of its arrays
            n_observations=sum(counts),
            n_ranked=None if known.n_ranked is None else sum(counts),
            n_routed=np.repeat(counts, self.units),
            between=None,  # each expert has tokens of its own
            reasons={name: tuple(where) for name, where in reasons.items()},
        )


class _Saved(Document, frozen=True, tag=SCHEMA, tag_field="schema"):
    """What `state_dict` gives; the states inside are checked as those of accumulators are."""

    n_experts: Positive
    statistics: list[str]
    n_bootstrap: Positive | None
    sums: dict[str, Any]
    experts: dict[str, dict[str, Any]]

    def __post_init__(self) -> None:
        if self.experts and set(self.experts) != {str(expert) for expert in range(min(self.n_experts, 1 << 20))}:
            raise ValueError(f"expected the states of experts 0 to {self.n_experts - 1} at experts, got others")
