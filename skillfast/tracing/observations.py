"""What the sites of one device saw in a forward, until its metrics are known: pooled rows, or sums over tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from skillfast import ops
from skillfast.backends.capture import as_tokens
from skillfast.errors import ArgumentError, ModelError
from skillfast.models.activations import by_sample
from skillfast.models.sites import router_of
from skillfast.statistics.inputs import as_tensor
from skillfast.statistics.routed import RoutedRows
from skillfast.statistics.tokens import on_device

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from skillfast.models.activations import RoutedActivations
    from skillfast.models.sites import Site
    from skillfast.statistics.accumulator import NeuronStatistics
    from skillfast.statistics.moments import CoMoments
    from skillfast.statistics.routed import RoutedStatistics
    from skillfast.statistics.scores import NeuronScores
    from skillfast.statistics.tokens import TokenMask, TokenStatistics
    from skillfast.vocabulary import Activation, Pool


@dataclass
class Expected:
    """What is known of a forward before it runs.

    Attributes:
        mask: Which of the [batch, tokens] tokens are real; or None.
        values: Metrics, each [batch] or, with tokens as observations, [batch, tokens].
        samples: How many the forward has; None where that was not seen.
    """

    mask: TokenMask | None = None
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    samples: int | None = None

    def begin(self, samples: int) -> None:
        """A forward of this many samples begins."""
        self.samples = samples

    def mask_for(self, site: Site, x: torch.Tensor) -> torch.Tensor | None:
        """The mask on the activations' device; None for activations without tokens."""
        if x.dim() == 2:
            return None
        batch, tokens, _ = as_tokens(x).shape
        return self._checked(site, (batch, tokens), x.device)

    def mask_of_rows(self, site: Site, found: RoutedActivations) -> torch.Tensor | None:
        """The mask on the rows' device; None without."""
        return self._checked(site, found.shape, found.token.device)

    def _checked(self, site: Site, shape: tuple[int, int], device: torch.device) -> torch.Tensor | None:
        if self.mask is None:
            return None
        if self.mask.shape != shape:
            raise ArgumentError(
                f"mask: expected one for the {shape[0]} x {shape[1]} tokens of {site.name}, got shape "
                f"{list(self.mask.shape)}; give the mask of what runs through the blocks"
            )
        return self.mask.on(device)


def pooled_row(
    x: torch.Tensor, activation: Activation, pool: Pool, mask: torch.Tensor | None, write: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the activated tensor and its pooled rows [batch, D], as `ops.act_mask_pool` does."""
    if not write and activation == "identity" and mask is None and (x.dim() == 2 or pool in ("cls", "last")):
        return x, x if x.dim() == 2 else as_tokens(x)[:, 0 if pool == "cls" else -1]  # nothing to reduce
    return ops.act_mask_pool(x, activation, pool, mask=mask, write=write)


def _columns(sites: Sequence[Site], start: int = 0) -> dict[str, slice]:
    """Name of each site -> columns of its neurons, from a first one on."""
    ends = (start + np.cumsum([site.width for site in sites])).tolist()
    return {site.name: slice(end - site.width, end) for site, end in zip(sites, ends, strict=True)}


class _Rows:
    """What both kinds have in common: columns of the sites, and which of them fired.

    Args:
        sites: Sites on one device.
        expected: Shared by all; the tracer fills it.
    """

    def __init__(self, sites: Sequence[Site], expected: Expected) -> None:
        self.sites = tuple(sites)
        self.columns = _columns(sites)
        self.expected = expected
        self.fired: set[str] = set()
        self.batch: int | None = None

    @property
    def open(self) -> bool:
        """Whether a forward waits to be counted."""
        return self.batch is not None

    def _enter(self, site: Site, batch: int) -> bool:
        """Checks a site's number of examples; whether they are the first of this forward."""
        if site.name in self.fired:
            raise ModelError(
                f"{site.name}: expected one forward per step, got a second; call tracer.step() after each forward, "
                "or tracer.discard() to leave one out"
            )
        first = self.batch is None
        if self.batch is None:
            self.batch = batch
        if batch != self.batch:
            raise ModelError(
                f"{site.name}: expected one row per sample ({self.batch}), got activations of {batch}; models that "
                "fold tokens into the batch are not supported"
            )
        self.fired.add(site.name)
        return first

    def discard(self) -> None:
        """Forget the forward that waits."""
        self.batch = None
        self.fired = set()


def _kept(valid: torch.Tensor | None, n: int) -> np.ndarray | None:
    """Which of n samples count, on the host, which must know how many they are; None for all."""
    if valid is None:
        return None
    keep = torch.as_tensor(valid)
    if keep.shape != (n,) or keep.dtype != torch.bool:
        raise ArgumentError(f"valid: expected {n} booleans, got shape {list(keep.shape)} of {keep.dtype}")
    return keep.cpu().numpy()


def _selected(value: Any, index: np.ndarray) -> torch.Tensor:
    """Rows of anything array-like, where it is."""
    tensor = as_tensor(value)
    return tensor.index_select(0, on_device(index, tensor.device))


def _values_of(values: Mapping[str, Any], n: int) -> dict[str, torch.Tensor]:
    tensors = {name: as_tensor(value) for name, value in values.items()}
    for name, value in tensors.items():
        if value.shape != (n,):
            raise ArgumentError(f"metric {name!r}: expected {n} values, got shape {list(value.shape)}")
    return tensors


class PooledRows(_Rows):
    """One row per sample in the accumulator's own buffer.

    Args:
        sites: Sites on one device.
        expected: Shared by all.
        statistics: Accumulator of these sites' neurons, and behind them of the shares of tokens at each expert.
        pool: How tokens become one row.
    """

    def __init__(self, sites: Sequence[Site], expected: Expected, statistics: NeuronStatistics, pool: Pool) -> None:
        super().__init__(sites, expected)
        self.statistics = statistics
        self.pool = pool
        self.routed = slice(sum(site.width for site in sites), statistics.settings.n_neurons)
        self._shares = _columns([router_of(site) for site in sites if site.kind == "expert"], self.routed.start)
        self._rows: torch.Tensor | None = None  # [batch, sum of widths]

    def read(self, site: Site, x: torch.Tensor, activation: Activation, write: bool) -> torch.Tensor:
        """Pool a site's activations into its columns; return the activated tensor."""
        shape, x = x.shape, by_sample(x, self.expected.samples, site.name)
        rows = self._reserved(site, x.shape[0])
        y, row = pooled_row(x, activation, self.pool, self.expected.mask_for(site, x), write)
        rows[:, self.columns[site.name]] = row
        return y.reshape(shape) if write else y

    def read_routed(self, site: Site, found: RoutedActivations) -> None:
        """Pool what was routed to each expert into the site's columns."""
        rows = self._reserved(site, found.batch)
        mask = self.expected.mask_of_rows(site, found)
        rows[:, self.columns[site.name]] = found.pooled(self.pool, mask).to(rows)
        if site.kind == "expert":
            rows[:, self._shares[router_of(site).name]] = found.routed_share(self.pool, mask)

    def _reserved(self, site: Site, batch: int) -> torch.Tensor:
        """Rows of the buffer for a forward's examples."""
        if self._enter(site, batch):
            self._rows = self.statistics.reserve(batch)
        assert self._rows is not None
        return self._rows

    def count(self, values: Mapping[str, Any], valid: torch.Tensor | None, groups: Any) -> None:
        """Count the forward's rows with their metrics."""
        if self._rows is None or self.batch is None:
            return
        for site in self.sites:
            if site.name not in self.fired:  # never a row of an earlier batch
                self._rows[:, self.columns[site.name]] = torch.nan
                if site.kind == "expert":
                    self._rows[:, self._shares[router_of(site).name]] = torch.nan
        n = self.batch
        keep = _kept(valid, n)
        if keep is not None:
            index = np.flatnonzero(keep)
            values = {name: _selected(value, index) for name, value in _values_of(values, n).items()}
            kept = _selected(self._rows, index)
            self._rows[: len(kept)] = kept
            groups = None if groups is None else _selected(groups, index)
            n = len(kept)
        self.statistics.commit(self.statistics.check(values, n), groups)
        self.discard()

    def discard(self) -> None:
        """Forget the forward that waits."""
        super().discard()
        self._rows = None

    def calibrate(self) -> None:
        """Let what was counted set the bins' edges, and forget it."""
        self.statistics.calibrate_on_counted()

    def scores(self) -> NeuronScores:
        """Scores of all neurons of these sites."""
        return self.statistics.scores()


class TokenRows(_Rows):
    """Each token an observation: sums over the tokens of an example, and a sample of the tokens for the ranks.

    Metrics with one value per sample need no more than each sample's sums, so they may be known after the forward.
    Metrics per token must be expected before it, and are accumulated while the activations are in registers.

    Args:
        sites: Sites on one device, with the same tokens.
        expected: Shared by all.
        statistics: Accumulator of these sites' neurons.
    """

    def __init__(self, sites: Sequence[Site], expected: Expected, statistics: TokenStatistics) -> None:
        super().__init__(sites, expected)
        self.statistics = statistics
        self._centered: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self._tokens: tuple[int, TokenMask | None] | None = None  # tokens per sample, mask
        self._sums: torch.Tensor | None = None  # [2, batch, sum of widths]: sums and sums of squares about the center
        self._added: dict[str, tuple[torch.Tensor, ...]] = {}  # site -> sum_x, sum_xx, sum_xy of this forward
        self._values: torch.Tensor | None = None  # float64 [batch, tokens, metrics], where they were expected
        # int64 [n] of batch * tokens, the same on the device, and [n, sum of widths], a view of the rows' buffer
        self._sample: tuple[np.ndarray, torch.Tensor, torch.Tensor] | None = None

    def read(self, site: Site, x: torch.Tensor, activation: Activation, write: bool) -> torch.Tensor:
        """Sum a site's activations over the tokens; return the activated tensor."""
        shape, x = x.shape, by_sample(x, self.expected.samples, site.name)
        first = self._enter(site, x.shape[0])
        mask = self.expected.mask_for(site, x)
        tokens = as_tokens(x).shape[1]
        if first:
            self._begin(x.shape[0], tokens, None if mask is None else self.expected.mask)
        if self._tokens is None or self._tokens[0] != tokens:
            raise ModelError(
                f"{site.name}: expected the {self._tokens and self._tokens[0]} tokens of the sites before it, got "
                f"{tokens}; trace sites of one resolution at a time"
            )
        columns = self.columns[site.name]
        center = self.statistics.center[columns]
        if site.name not in self._centered:
            self._centered.add(site.name)
            if not self.statistics.counted:
                mean = ops.act_mask_pool(x, activation, "mean", mask=mask, write=False)[1].nanmean(0).float()
                center.copy_(torch.where(mean.isfinite(), mean, 0))
        if self._values is not None:
            y = self._accumulate(site, x, activation, mask, center, write)
        else:
            assert self._sums is not None
            about = center.double() if x.dtype == torch.float64 else center
            y, sums = ops.act_mask_pool(x, activation, "moments", mask=mask, center=about, write=write)
            self._sums[:, :, columns] = sums.to(self._sums.dtype)
        if self._sample is not None:
            _, there, rows = self._sample
            flowing = as_tokens(y if write else x)  # only an identity is not written
            rows[:, columns] = flowing.flatten(0, 1).index_select(0, there)
        return y.reshape(shape) if write else y

    def _begin(self, batch: int, tokens: int, mask: TokenMask | None) -> None:
        """Room for a forward."""
        statistics = self.statistics
        self._tokens = (tokens, mask)
        if self.expected.values:
            self._values = statistics.check_tokens(self.expected.values, batch, tokens, mask)
        else:
            self._sums = torch.empty(2, batch, statistics.n_neurons, device=statistics.device)
        picked = statistics.pick(batch, tokens, mask)
        if picked is not None:
            self._sample = picked, on_device(picked, statistics.device), statistics.reserve(len(picked))

    def _accumulate(
        self,
        site: Site,
        x: torch.Tensor,
        activation: Activation,
        mask: torch.Tensor | None,
        center: torch.Tensor,
        write: bool,
    ) -> torch.Tensor:
        """Sums with the expected metrics, kept apart until the step."""
        assert self._values is not None
        y = self.statistics.shifted_columns(self._values)
        width, columns = x.shape[-1], y.shape[-1]
        shapes = ((width,), (width,), (columns, width))
        sums = tuple(torch.zeros(shape, dtype=torch.float64, device=x.device) for shape in shapes)
        self._added[site.name] = sums
        per_token = y if x.dim() > 2 else y[:, 0]
        return ops.act_pool_accumulate(
            x.float() if x.dtype == torch.float64 else x,
            per_token,
            center.contiguous(),
            sums,  # type: ignore[arg-type]
            activation,
            mask=mask,
            write=write,
        ).to(x.dtype)

    def count(self, values: Mapping[str, Any], valid: torch.Tensor | None, groups: Any) -> None:
        """Count the forward's tokens with their metrics."""
        if self.batch is None or self._tokens is None:
            return
        n, device = self.batch, self.statistics.device
        tokens, mask = self._tokens
        counts = np.full(n, tokens) if mask is None else mask.real.sum(1).numpy()
        missing = self.columns.keys() - self.fired
        if self._values is not None:
            if values or valid is not None:
                _refuse_after_expect(values)
            for name in missing:
                self._add_nothing(name, device)
            self.statistics.add_accumulated(
                self._values, mask, [(self.columns[name], sums) for name, sums in self._added.items()]
            )
            checked = self._values
        else:
            assert self._sums is not None
            for name in missing:
                self._sums[:, :, self.columns[name]] = torch.nan
            each = self.statistics.check(_per_sample(values, n), n)
            checked = each[:, None].expand(-1, tokens, -1)
            keep = _kept(valid, n)
            if keep is not None:
                counts = counts * keep
            sums = self._sums
            if not counts.all():
                here = np.flatnonzero(counts)
                sums = sums.index_select(1, on_device(here, device))
                each = _selected(each, here)
                groups = None if groups is None else _selected(groups, here)
            self.statistics.add_sums(sums, on_device(counts[counts > 0], device), each, groups)
        if self._sample is not None:
            picked, _, rows = self._sample
            for name in missing:
                rows[:, self.columns[name]] = torch.nan
            self.statistics.commit(rows, picked, checked, None if counts.all() else counts > 0)
        self.discard()

    def _add_nothing(self, name: str, device: torch.device) -> None:
        columns = self.columns[name]
        width, m = columns.stop - columns.start, len(self.statistics.columns)
        self._added[name] = tuple(
            torch.full(shape, torch.nan, dtype=torch.float64, device=device)
            for shape in ((width,), (width,), (m, width))
        )

    def discard(self) -> None:
        """Forget the forward that waits."""
        super().discard()
        self._forget()

    def calibrate(self) -> None:
        """Let what was counted set the bins' edges, and forget it."""
        self.statistics.calibrate_on_counted()

    def scores(self) -> NeuronScores:
        """Scores of all neurons of these sites."""
        return self.statistics.scores()


class RoutedTokens(_Rows):
    """Each token an observation of the experts that it was routed to.

    As of other tokens, each example's sums are enough for Pearson's r where metrics have a value per example, and
    metrics per token are expected before the forward. Rows of a forward are kept only where ranks need them.

    Args:
        site: A site of experts or of a router.
        expected: Shared by all.
        statistics: Accumulator of the site's experts.
    """

    def __init__(self, site: Site, expected: Expected, statistics: RoutedStatistics) -> None:
        super().__init__([site], expected)
        self.statistics = statistics
        self._forget()

    def _forget(self) -> None:
        self._rows: RoutedRows | None = None
        self._sums: tuple[torch.Tensor, torch.Tensor] | None = None  # of each example and expert, and their numbers
        self._added: CoMoments | None = None  # of this forward
        self._values: torch.Tensor | None = None  # float64 [batch, tokens, metrics], where they were expected

    def read_routed(self, site: Site, found: RoutedActivations) -> None:
        """Sum the rows of a forward, gate x activation each, or keep them."""
        self._enter(site, found.batch)
        expert = found.expert.clamp(max=found.n_experts)
        if (mask := self.expected.mask_of_rows(site, found)) is not None:
            expert = torch.where(mask.flatten()[found.token], expert, found.n_experts)
        rows = RoutedRows(found.values, found.gate, expert, found.token, found.shape)
        if self.expected.values:
            self._values = self.statistics.check_tokens(self.expected.values, *found.shape, self.expected.mask)
        if self.statistics.keeps_rows:
            self._rows = rows
            return
        self.statistics.center(rows)
        if self._values is None:
            self._sums = self.statistics.summed(rows)
        else:
            self._added = self.statistics.accumulated(rows, self._values)

    def count(self, values: Mapping[str, Any], valid: torch.Tensor | None, groups: Any) -> None:
        """Count the forward's rows with the metrics of their tokens."""
        if self.batch is None:
            return
        if self._values is not None and (values or valid is not None):
            _refuse_after_expect(values)
        if self._added is not None:
            self.statistics.add_accumulated(self._added)
        else:
            self._count_later(values, _kept(valid, self.batch), groups)
        self.discard()

    def _count_later(self, values: Mapping[str, Any], keep: np.ndarray | None, groups: Any) -> None:
        assert self.batch is not None
        n, statistics = self.batch, self.statistics
        checked = self._values
        if checked is None:
            checked = statistics.check(_per_sample(values, n), n)
        if self._sums is not None:
            sums, counts = self._sums
            if keep is not None:
                here = on_device(np.flatnonzero(keep), statistics.device)
                sums, counts, checked = sums[:, here], counts[here], checked[here]
            statistics.add_sums(sums, counts, checked)
            return
        assert self._rows is not None
        rows, example = self._rows, self._rows.example
        if keep is not None:
            of_row = on_device(keep, statistics.device)[example]
            rows = replace(rows, expert=torch.where(of_row, rows.expert, statistics.n_experts))
        numbers = statistics.numbers(n) if groups is None else as_tensor(groups)
        each = checked[example] if checked.dim() == 2 else checked.flatten(0, 1)[rows.token]
        statistics.add(rows, each, as_tensor(numbers, statistics.device)[example])

    def discard(self) -> None:
        """Forget the forward that waits."""
        super().discard()
        self._forget()

    def calibrate(self) -> None:
        """Forget what was counted: each expert's first tokens set its bins' edges."""
        self.statistics.forget()

    def scores(self) -> NeuronScores:
        """Scores of all neurons of the site."""
        return self.statistics.scores()


def _refuse_after_expect(values: Mapping[str, Any]) -> NoReturn:
    raise ArgumentError(
        f"step: expected no values after expect() told them, got {', '.join(values) or 'valid'}; tell everything to "
        "expect(), rows to leave out by its mask"
    )


def _per_sample(values: Mapping[str, Any], n: int) -> dict[str, torch.Tensor]:
    tensors = {name: as_tensor(value) for name, value in values.items()}
    per_token = [name for name, value in tensors.items() if value.dim() > 1]
    if per_token:
        raise ArgumentError(
            f"metric {per_token[0]!r}: expected {n} values, one per example, got shape "
            f"{list(tensors[per_token[0]].shape)}; tell values per token to tracer.expect() before the forward"
        )
    return _values_of(tensors, n)
