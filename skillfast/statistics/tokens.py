"""`TokenStatistics`: an accumulator whose observations are tokens, of which no row is kept.

Pearson's r counts every token, from sums over each example's tokens. Ranks need rows: they come from a sample of the
tokens, in an accumulator of its own. Every token of the run is in it with the same probability, long text or short.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from msgspec import Meta

from skillfast.errors import ArgumentError
from skillfast.results.records import Document, Record
from skillfast.statistics import distributed, inputs, persistence, scoring
from skillfast.statistics.accumulator import NeuronStatistics
from skillfast.statistics.bins.edges import exact_rows
from skillfast.statistics.bootstrap import Numbering, mix
from skillfast.statistics.state import AccumulatorSettings, State, refuse_other
from skillfast.transfer import moved

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from skillfast.metrics import Metric
    from skillfast.statistics.bins.table import BinTable
    from skillfast.statistics.scores import NeuronScores

SCHEMA = "skillfast.tokens/1"
MOST_HALVINGS = 5  # of the share of tokens in the sample: once rows are counted in bins, it is 1 / 32


def on_device(index: np.ndarray, device: torch.device) -> torch.Tensor:
    """A host's array on a device, without waiting for it."""
    return moved(torch.from_numpy(index), device)


class TokenMask:
    """Which tokens of a batch are real, on the host, which plans by it, and once on every device that computes.

    Args:
        real: bool [batch, tokens], False for padding; on a GPU, its copy to the host is waited for where it is needed.
    """

    def __init__(self, real: torch.Tensor) -> None:
        self.shape = tuple(real.shape)
        self._on = {real.device: real}
        self._index: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        """The mask on a device."""
        if device not in self._on:
            self._on[device] = moved(next(iter(self._on.values())), device)
        return self._on[device]

    @property
    def real(self) -> torch.Tensor:
        """The mask on the host."""
        return self.on(torch.device("cpu"))

    @property
    def n_real(self) -> int:
        """How many tokens are real."""
        return int(self.real.sum())

    def index(self, device: torch.device) -> torch.Tensor:
        """int64 [n_real] on a device: which of the batch * tokens are real."""
        if device not in self._index:
            self._index[device] = moved(self.real.flatten().nonzero()[:, 0], device)
        return self._index[device]


@dataclass
class TokenSample:
    """Which tokens the ranks see: those whose hash lies below a limit, which is halved whenever they become too many.

    The hash is of the example's number and of the token's place among the real ones, so the sample depends neither on
    batches nor on padding, and all tokens of the run are in it with one probability, the earlier ones too.

    Attributes:
        seed: Seed of the hash.
        capacity: How many rows can be kept.
        stream: Tells this process's examples from those of others.
        halvings: How often the limit was halved; the share of tokens in the sample is 2 ** -halvings.
        examples: How many examples were counted.
        kept: uint64, hashes of the rows that are kept, in their order.
    """

    seed: int
    capacity: int
    stream: int = field(default_factory=lambda: Numbering.of_process().stream)
    halvings: int = 0
    examples: int = 0
    kept: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    @property
    def rate(self) -> float:
        """Share of the tokens that are in the sample."""
        return 2.0**-self.halvings

    def hashes(self, mask: np.ndarray) -> np.ndarray:
        """uint64 [batch, tokens] of the next examples' tokens; mask bool [batch, tokens] tells the real ones."""
        example = self.examples + np.arange(len(mask))[:, None]
        return mix(self.seed, self.stream, example, np.cumsum(mask, 1))

    def below(self, hashes: np.ndarray) -> np.ndarray:
        """Whether tokens of these hashes are in the sample."""
        return (hashes >> np.uint64(64 - self.halvings)) == 0 if self.halvings else np.ones(hashes.shape, dtype=bool)

    def make_room(self, coming: np.ndarray) -> np.ndarray:
        """Halve the limit until the rows that are kept and those to come are few enough; which of the former stay."""
        while (
            self.halvings < MOST_HALVINGS
            and self.below(self.kept).sum() + self.below(coming).sum() > self.capacity
        ):  # fmt: skip
            self.halvings += 1
        return self.below(self.kept)


def values_of_tokens(
    state: State, values: Mapping[str, torch.Tensor], batch: int, tokens: int, mask: TokenMask | None
) -> torch.Tensor:
    """Metrics of every token, checked: float64 [batch, tokens, metrics]; 0 where the mask leaves a token out.

    The first of them set the columns' shift.
    """
    flat = {}
    for name, value in values.items():
        tensor = inputs.check_token_values(name, value, batch, tokens)
        wide = (tensor if tensor.dim() == 2 else tensor[:, None].expand(-1, tokens)).flatten()
        flat[name] = wide if mask is None else wide.index_select(0, mask.index(wide.device))
    n = batch * tokens if mask is None else mask.n_real
    real = inputs.check_values(state.settings.metrics, flat, n, state.device, state.faults)
    checked = real
    if mask is not None:
        checked = real.new_zeros(batch * tokens, real.shape[1]).index_copy_(0, mask.index(state.device), real)
    if not state.shifted:
        state.moments.shift_y.copy_(state.settings.expand(real).mean(0))
        state.shifted = True
    return checked.view(batch, tokens, -1)


class TokenStatistics(persistence.Kept):
    """Correlates every neuron with every metric over tokens.

    Args:
        n_neurons: Number of neurons, D.
        metrics: Name -> kind of metric.
        statistics: Which statistics to compute; all but Pearson's r from a sample of the tokens: all of them up to 16
            per bin, then so many of an even share of all, then a 32nd of all.
        bins: Bins per neuron.
        n_bootstrap: Replicates of the bootstrap, in which the tokens of an example stay together; None for none.
        seed: Seed of the sample, and of the replicates.
        buffer_rows: Sampled tokens collected before one update of their accumulator.
        device: Where the state lives.
    """

    FILE = "tokens.safetensors"
    SCHEMA = SCHEMA

    def __init__(
        self,
        n_neurons: int,
        metrics: Mapping[str, Metric],
        statistics: Sequence[str],
        *,
        bins: int,
        n_bootstrap: int | None,
        seed: int,
        buffer_rows: int,
        device: torch.device,
    ) -> None:
        settings = AccumulatorSettings(n_neurons, dict(metrics), ("pearson",), bins, n_bootstrap, seed, buffer_rows)
        self._sums = State.empty(settings, device)  # no row of it ever waits in its buffer
        ranked = tuple(name for name in statistics if name != "pearson")
        self._sampled: NeuronStatistics | None = None
        if ranked:
            self._sampled = NeuronStatistics(
                n_neurons, metrics, ranked, bins=bins, seed=seed, buffer_rows=buffer_rows, device=device
            )
        self.counted = False  # whether any token was; known without asking the device
        self.has_pearson = "pearson" in statistics
        self._sample = TokenSample(seed, exact_rows(bins))
        self._coming = self._sample.kept  # hashes of the tokens that were picked and wait to be counted
        self._empty_table: BinTable | None = None  # with edges from calibration, for when rows are no longer kept

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self._sums.device

    @property
    def n_neurons(self) -> int:
        """Number of neurons."""
        return self._sums.settings.n_neurons

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the metric columns."""
        return self._sums.settings.columns

    @property
    def center(self) -> torch.Tensor:
        """Shift of the activations float32 [D], about which every sum is taken; set it before anything is counted."""
        return self._sums.moments.shift_x

    @property
    def n_observations(self) -> int:
        """Tokens counted so far."""
        return int(self._sums.moments.count)

    @property
    def state_bytes(self) -> int:
        """Size of the state and the buffers, in bytes."""
        return self._sums.nbytes + (0 if self._sampled is None else self._sampled.state_bytes)

    def check(self, values: Mapping[str, torch.Tensor], n: int) -> torch.Tensor:
        """The metrics' values of n observations, checked: float64 [n, metrics]."""
        return inputs.check_values(self._sums.settings.metrics, values, n, self.device, self._sums.faults)

    def check_tokens(
        self, values: Mapping[str, torch.Tensor], batch: int, tokens: int, mask: TokenMask | None
    ) -> torch.Tensor:
        """Metrics of every token, checked: float64 [batch, tokens, metrics]; 0 where the mask leaves a token out."""
        if self._sums.replicates is not None:
            raise ArgumentError(
                "n_bootstrap: expected metrics with one value per example, got values told before the forward; leave "
                "out n_bootstrap, or give them to step()"
            )
        return values_of_tokens(self._sums, values, batch, tokens, mask)

    def shifted_columns(self, checked: torch.Tensor) -> torch.Tensor:
        """Metric columns about their shift: float32 [batch, tokens, M]."""
        batch, tokens, _ = checked.shape
        columns = self._sums.settings.expand(checked.flatten(0, 1)) - self._sums.moments.shift_y
        return columns.float().view(batch, tokens, -1)

    def add_accumulated(
        self, checked: torch.Tensor, mask: TokenMask | None, added: Sequence[tuple[slice, tuple[torch.Tensor, ...]]]
    ) -> None:
        """Count tokens whose sums with the metrics exist already, by the neurons' columns."""
        values = checked.flatten(0, 1)
        if mask is not None:
            values = values.index_select(0, mask.index(self.device))
        self.counted = True
        moments = self._sums.moments
        shifted = self._sums.settings.expand(values) - moments.shift_y
        moments.count_columns(shifted)
        for columns, (sum_x, sum_xx, sum_xy) in added:
            moments.sum_x[columns] += sum_x
            moments.sum_xx[columns] += sum_xx
            moments.sum_xy[:, columns] += sum_xy

    def add_sums(
        self, sums: torch.Tensor, counts: torch.Tensor, checked: torch.Tensor, groups: torch.Tensor | None
    ) -> None:
        """Count examples by the sums over their tokens.

        Args:
            sums: [2, n, D], sums of the activations about `center` and of their squares.
            counts: int64 [n], tokens of each example.
            checked: float64 [n, metrics].
            groups: int64 [n], or None.
        """
        if not len(counts):
            return
        self.counted = True
        state = self._sums
        values = state.with_groups(
            checked, None if groups is None else inputs.check_groups(groups, len(checked), self.device)
        )
        columns = state.settings.expand(values)
        if not state.shifted:
            state.moments.shift_y.copy_((columns * counts[:, None]).sum(0) / counts.sum())
            state.shifted = True
        shifted = columns - state.moments.shift_y
        state.moments.update_sums(sums, counts, shifted)
        if state.replicates is not None:
            state.replicates.add_sums(sums, counts, shifted, values[:, -1].long())

    def pick(self, batch: int, tokens: int, mask: TokenMask | None) -> np.ndarray | None:
        """int64, which of the batch * tokens tokens the ranks see; None without ranks."""
        if self._sampled is None:
            return None
        real = np.ones((batch, tokens), dtype=bool) if mask is None else mask.real.numpy()
        hashes = self._sample.hashes(real)
        if self._sampled.keeping:
            self._thin(hashes[real])
        chosen = real & self._sample.below(hashes)
        self._coming = hashes[chosen]
        if self._sampled.keeping and self._too_many(self._coming):
            self._start_counting()
        return np.flatnonzero(chosen)

    def _thin(self, coming: np.ndarray) -> None:
        """Keep fewer rows where those to come would be too many."""
        assert self._sampled is not None
        sample = self._sample
        stay = sample.make_room(coming)
        if not stay.all():
            self._sampled.keep_rows(torch.from_numpy(stay))
            sample.kept = sample.kept[stay]

    def _too_many(self, coming: np.ndarray) -> bool:
        """Whether rows to come, of which those that are not in the sample do not count, are too many to be kept."""
        sample = self._sample
        return len(sample.kept) + int(sample.below(coming).sum()) > sample.capacity

    def _start_counting(self) -> None:
        """Count the rows that are kept, and all later ones, in bins whose edges calibration has set, if it has."""
        assert self._sampled is not None
        if self._empty_table is not None:
            self._sampled.count_in(self._empty_table)
            self._empty_table = None

    def reserve(self, n: int) -> torch.Tensor:
        """Room for n sampled rows; see `NeuronStatistics.reserve`."""
        assert self._sampled is not None
        return self._sampled.reserve(n)

    def commit(self, rows: torch.Tensor, picked: np.ndarray, checked: torch.Tensor, keep: np.ndarray | None) -> None:
        """Count the rows of tokens that were picked.

        Args:
            rows: [n, D], as they were reserved.
            picked: int64 [n], from `pick`.
            checked: float64 [batch, tokens, metrics].
            keep: bool [batch], which examples count; None for all.
        """
        assert self._sampled is not None
        batch, tokens, _ = checked.shape
        if keep is not None:
            of_row = keep[picked // tokens]
            kept = rows.index_select(0, on_device(np.flatnonzero(of_row), self.device))
            rows[: len(kept)] = kept
            picked, self._coming = picked[of_row], self._coming[of_row]
        example, place = (on_device(index, self.device) for index in (picked // tokens, picked % tokens))
        self._sampled.commit(checked[example, place])
        self._sample.examples += batch
        if self._sampled.keeping:
            self._sample.kept = np.concatenate([self._sample.kept, self._coming])

    def calibrate_on_counted(self) -> None:
        """Let the sampled tokens so far set the bins' edges, and forget all that was counted."""
        if self._sampled is not None:
            self._empty_table = self._sampled.calibrated_table()
            state = self._sampled.state
            self._sampled = NeuronStatistics.of_state(State.empty(state.settings, state.device))
            self._sample = TokenSample(self._sample.seed, self._sample.capacity)
        self._sums.moments.clear()
        if self._sums.replicates is not None:
            self._sums.replicates.clear()

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Sum over the processes of a `torch.distributed` group."""
        self.counted = True
        distributed.share_faults(self._sums, group)
        distributed.reduce(self._sums, group)
        if self._sampled is None:
            return
        sample = self._sample
        told = distributed.gather((sample.halvings, self._sampled.keeping, sample.kept), group)
        sample.halvings = max(halvings for halvings, *_ in told)
        everybodys = np.concatenate([kept for *_, kept in told])
        if self._sampled.keeping:
            own, sample.kept = sample.kept, sample.kept[:0]
            sample.make_room(everybodys)  # as in every process
            sample.kept = own
            self._thin(own[:0])
            if not all(keeping for _, keeping, _ in told) or sample.below(everybodys).sum() > sample.capacity:
                self._start_counting()
        sample.kept = everybodys[sample.below(everybodys)]
        self._sampled.all_reduce(group)

    def told(self) -> dict[str, Any]:
        """What another accumulator must have in common with this one to be merged, by name."""
        ranked = () if self._sampled is None else self._sampled.settings.statistics
        return self._sums.settings.told() | {"statistics": (*(["pearson"] * self.has_pearson), *ranked)}

    def check_merge(self, other: TokenStatistics) -> None:
        """Raise what `merge` would, and change nothing."""
        refuse_other(self.told(), other.told(), "count both with the same settings")
        for state in (self._sums, other._sums):
            state.refuse_faults()
        if self._sums.replicates is not None:
            self._sums.numbering.check(other._sums.numbering)
        if self._sampled is not None and other._sampled is not None:
            self._sampled.check_merge(other._sampled)

    def merge(self, other: TokenStatistics) -> None:
        """Add another accumulator's tokens to this one; the other is left as it is.

        Both samples become one in which every token of both is with one probability: the smaller one of the two, or
        less where they are too many together.

        Raises:
            ArgumentError: The other has other neurons, metrics or statistics, or counts into other bins.
        """
        self.check_merge(other)
        if self._sums.replicates is not None:
            self._sums.numbering.merge(other._sums.numbering)
        self._sums.merge_sums(other._sums)
        self.counted |= other.n_observations > 0
        ours, theirs = self._sampled, other._sampled
        if ours is None or theirs is None:
            return
        sample, coming = self._sample, other._sample.kept if theirs.keeping else other._sample.kept[:0]
        sample.halvings = max(sample.halvings, other._sample.halvings)
        if ours.keeping:
            self._thin(coming)
        if not theirs.keeping:
            ours.merge(theirs)
            return
        keep = sample.below(coming)
        if ours.keeping and self._too_many(coming):
            given = self._empty_table or other._empty_table
            self._empty_table = ours.calibrated_table(theirs) if given is None else given.like(self.device)
            self._start_counting()
        ours.add_kept(theirs, torch.from_numpy(keep))
        if ours.keeping:
            sample.kept = np.concatenate([sample.kept, coming[keep]])

    def like(self) -> TokenStatistics:
        """An empty accumulator of the same neurons, metrics, shifts and bin edges: a shard to `merge` later."""
        sums, sampled = self._sums.like(self.device), None if self._sampled is None else self._sampled.like()
        halvings = 0 if sampled is None or sampled.keeping else self._sample.halvings
        made = self._of(
            sums, sampled, replace(self._sample, stream=sums.numbering.stream, halvings=halvings, examples=0)
        )
        made._empty_table = None if self._empty_table is None else self._empty_table.like(self.device)
        return made

    def _of(self, sums: State, sampled: NeuronStatistics | None, sample: TokenSample) -> TokenStatistics:
        """An accumulator of the same settings with another state, which keeps no row of the sample."""
        made = copy.copy(self)
        made._sums, made._sampled, made._sample = sums, sampled, replace(sample, kept=np.empty(0, np.uint64))
        made._coming, made._empty_table = made._sample.kept, None
        return made

    def state_dict(self) -> dict[str, Any]:
        """The whole state: plain values and tensors, for `from_state_dict` here or in another process."""
        sample, sampled = self._sample, self._sampled
        edges = None
        if sampled is not None and self._empty_table is not None:
            empty = State.empty(sampled.settings, self.device)
            empty.table = self._empty_table
            edges = persistence.to_dict(empty)
        kept = sample.kept if sampled is not None and sampled.keeping else sample.kept[:0]
        return {
            "schema": SCHEMA,
            "pearson": self.has_pearson,
            "counted": self.counted,
            "sums": persistence.to_dict(self._sums),
            "sampled": None if sampled is None else sampled.state_dict(),
            "edges": edges,
            "sample": {
                "stream": sample.stream,
                "halvings": sample.halvings,
                "examples": sample.examples,
                "kept": torch.from_numpy(kept.view(np.int64).copy()),
            },
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device | str = "cpu") -> TokenStatistics:
        """An accumulator that goes on where `state_dict` was taken.

        Raises:
            ArgumentError: Another schema version, or tensors that do not fit the settings or each other.
        """
        saved, device = persistence.record(_Saved, state), torch.device(device)
        sums = persistence.from_dict(saved.sums, device)
        settings = sums.settings
        sampled, edges = (
            None if stored is None else NeuronStatistics.from_state_dict(stored, device)
            for stored in (saved.sampled, saved.edges)
        )
        ranked = () if sampled is None else sampled.settings.statistics
        if not saved.pearson and not ranked:
            raise ArgumentError("state_dict: expected at least one statistic, got none; it is damaged, start again")
        made = cls(
            settings.n_neurons, settings.metrics, (*(["pearson"] * saved.pearson), *ranked), bins=settings.bins,
            n_bootstrap=settings.n_bootstrap, seed=settings.seed, buffer_rows=settings.buffer_rows, device=device,
        )  # fmt: skip
        for part, mine in ((sampled, made._sampled), (edges, made._sampled)):
            if part is not None and (mine is None or part.told() != mine.told()):
                raise ArgumentError("state_dict: expected a sample of the same settings, got others; it is damaged")
        kept = saved.sample.kept
        if sampled is not None and not sampled.keeping and saved.sample.halvings < MOST_HALVINGS:
            raise ArgumentError(
                f"state_dict sample.halvings: expected {MOST_HALVINGS} where rows are in bins, got "
                f"{saved.sample.halvings}; it is damaged"
            )
        rows = len(sampled.state.buffer.contents[0]) if sampled is not None and sampled.keeping else 0
        if kept.dtype != torch.int64 or kept.shape != (rows,):
            raise ArgumentError(
                f"state_dict sample.kept: expected int64 [{rows}], got {kept.dtype} {list(kept.shape)}; it is damaged"
            )
        made._sums, made._sampled, made.counted = sums, sampled, saved.counted
        made._empty_table = None if edges is None else edges.state.table
        told = saved.sample
        made._sample = replace(made._sample, stream=told.stream, halvings=told.halvings, examples=told.examples)
        made._sample.kept = kept.cpu().numpy().view(np.uint64)
        return made

    def scores(self) -> NeuronScores:
        """Pearson's r, mean and deviation of all tokens; ranks of those that were sampled."""
        if self.n_observations == 0:
            raise ArgumentError("compute: expected at least one observation, got none; call update first")
        found = scoring.scores(self._sums)
        if not self.has_pearson:
            found = replace(found, pearson=None, between=None)
        if self._sampled is None:
            return found
        ranked = self._sampled.scores(self._sample.rate)
        names = ("spearman", "spearman_bound", "auroc", "auroc_bound", "mutual_info")
        reasons = {**found.reasons}
        if "stale_edges" in ranked.reasons:
            reasons["stale_edges"] = ranked.reasons["stale_edges"]
        arrays = {name: getattr(ranked, name) for name in names}
        return replace(found, n_ranked=ranked.n_observations, reasons=reasons, **arrays)


class _SavedSample(Record, frozen=True):
    """A `TokenSample`; hashes as int64."""

    stream: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    halvings: Annotated[int, Meta(ge=0, le=MOST_HALVINGS)]
    examples: Annotated[int, Meta(ge=0, lt=1 << 53)]
    kept: torch.Tensor


class _Saved(Document, frozen=True, tag=SCHEMA, tag_field="schema"):
    """What `state_dict` gives; the states inside are checked as those of accumulators are."""

    pearson: bool
    counted: bool
    sums: dict[str, Any]
    sampled: dict[str, Any] | None
    edges: dict[str, Any] | None
    sample: _SavedSample
