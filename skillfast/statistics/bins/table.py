"""The table of bins: its layout, what a row adds to it, and the scores that come out of it.

One integer table serves Spearman's rho, AUROC and mutual information. A neuron's part is [C, P] counts (a channel per
class of a categorical metric, one per binary metric) and then [C, 8 M] hat weights (8 per continuous metric).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.stats import rankdata

from skillfast import ops
from skillfast.errors import ArgumentError
from skillfast.metrics import Binary, Categorical, Continuous
from skillfast.statistics.bins import scores as bin_scores
from skillfast.statistics.bins.edges import atomic_bins, build_edges
from skillfast.statistics.bins.scores import HATS, UNIT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from skillfast.metrics import Metric

SPILL_ROWS = 1 << 22  # rows between spills: they add at most 2^22 * 256 = 2^30 to an entry
_SPILLED = 1 << 30
_SLICE_VALUES = 1 << 22  # table entries finished at once: 32 MB of float64, and a few times that of temporaries


def exact_rows(bins: int) -> int:
    """Up to this many rows it is better to keep them all and be exact."""
    return 16 * bins


@dataclass(frozen=True)
class BinLayout:
    """Where each metric lives in a neuron's table.

    Attributes:
        bins: C.
        metrics: The metrics by name, in the order of their columns.
        first: The first count channel of each categorical or binary metric.
        hats: The place of each continuous metric among the hats.
        counts: P, count channels in all; the last is the rows themselves where no other metric tells them.
    """

    bins: int
    metrics: dict[str, Metric]
    first: dict[str, int]
    hats: dict[str, int]
    counts: int

    @staticmethod
    def of(metrics: Mapping[str, Metric], bins: int) -> BinLayout:
        """The layout for these metrics."""
        first: dict[str, int] = {}
        hats: dict[str, int] = {}
        counts = 0
        for name, metric in metrics.items():
            if isinstance(metric, Continuous):
                hats[name] = len(hats)
            else:
                first[name] = counts
                counts += len(metric.classes) if isinstance(metric, Categorical) else 1
        tells = hats or any(isinstance(metric, Categorical) for metric in metrics.values())
        return BinLayout(bins, dict(metrics), first, hats, counts if tells else counts + 1)

    @property
    def entries(self) -> int:
        """Integers per neuron."""
        return self.bins * (self.counts + HATS * len(self.hats))

    @property
    def counts_rows(self) -> bool:
        """Whether the last channel counts the rows themselves."""
        return not self.hats and not any(isinstance(metric, Categorical) for metric in self.metrics.values())

    def zeros(self, n_neurons: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """An empty table, int32 [D, entries]."""
        return torch.zeros(n_neurons, self.entries, dtype=torch.int32, device=device)

    def split(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A table [d, entries] as counts [d, C, P] and hat weights [d, C, M, 8]."""
        at = self.bins * self.counts
        counts = table[:, :at].view(table.shape[0], self.bins, self.counts)
        return counts, table[:, at:].view(table.shape[0], self.bins, len(self.hats), HATS)


def hat_positions(values: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Where values fall among a metric's calibration values, as a fixed-point place on the 8 hats.

    Args:
        values: [n], finite.
        reference: [m], the calibration rows' values, ascending, of the same dtype.

    Returns:
        int64 [n], in [0, 7 * 256]: the provisional rank.
    """
    low = torch.searchsorted(reference, values)
    high = torch.searchsorted(reference, values, right=True)
    return ((low + high) * ((HATS - 1) * UNIT) + reference.shape[0]) // (2 * reference.shape[0])


def hat_weights(positions: torch.Tensor) -> torch.Tensor:
    """Integer hat functions int16 [n, 8] at these positions; a row sums to 256, two neighbours at most are not 0."""
    peaks = torch.arange(HATS, device=positions.device) * UNIT
    return (UNIT - (positions[:, None] - peaks).abs()).clamp_min(0).to(torch.int16)


def payload(
    layout: BinLayout, values: Mapping[str, torch.Tensor], references: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each row adds to the bin it falls into.

    Args:
        layout: The table's layout.
        values: Each metric's values [n], checked by the metric's `encode`.
        references: The ascending calibration values of each continuous metric.

    Returns:
        channels int16 [n, metrics] and hats int16 [n, 8 M], for `ops.bins_update`.
    """
    channels, hats = [], []
    n = next(iter(values.values())).shape[0]
    device = next(iter(values.values())).device
    for name, metric in layout.metrics.items():
        value = values[name]
        if isinstance(metric, Continuous):
            hats.append(hat_weights(hat_positions(value.double(), references[name].double())))
        elif isinstance(metric, Binary):
            channels.append(torch.where(value.bool(), layout.first[name], -1))
        else:
            channels.append(value.long() + layout.first[name])
    if layout.counts_rows:
        channels.append(torch.full((n,), layout.counts - 1, device=device))
    return (
        torch.stack(channels, 1).to(torch.int16) if channels else torch.empty(n, 0, dtype=torch.int16, device=device),
        torch.cat(hats, 1) if hats else torch.empty(n, 0, dtype=torch.int16, device=device),
    )


@dataclass
class Overflow:
    """What was moved out of an int32 table before it could overflow, in units of 2^30: a few entries.

    Attributes:
        where: int64 [m], ascending places in the flattened table.
        units: int64 [m].
    """

    where: torch.Tensor
    units: torch.Tensor

    @staticmethod
    def empty(device: torch.device | str = "cpu") -> Overflow:
        """Nothing moved yet."""
        return Overflow(*(torch.empty(0, dtype=torch.int64, device=device) for _ in range(2)))

    def add(self, where: torch.Tensor, units: torch.Tensor) -> Overflow:
        """These units added."""
        places, index = torch.unique(torch.cat([self.where, where]), return_inverse=True)
        total = torch.zeros_like(places).index_add_(0, index, torch.cat([self.units, units]))
        return Overflow(places, total)


def spill(table: torch.Tensor, overflow: Overflow) -> Overflow:
    """Moves whole units of 2^30 out of a table, in place: its entries are then below 2^30.

    Call it before `SPILL_ROWS` more rows would have been added since the last time; call it once more before two
    tables are compared or merged, so that equal contents have one form.
    """
    flat = table.view(-1)
    for start in range(0, flat.numel(), 1 << 24):  # slices bound the comparison's memory
        part = flat[start : start + (1 << 24)]
        if part.numel() and int(part.max()) >= _SPILLED:
            at = (part >= _SPILLED).nonzero()[:, 0]
            units = part[at] >> 30
            part[at] -= units << 30
            overflow = overflow.add(at + start, units.long())
    return overflow


def merge(table: torch.Tensor, overflow: Overflow, other: torch.Tensor, other_overflow: Overflow) -> Overflow:
    """Adds another table over the same edges, in place; both must have been spilled just before."""
    table += other
    return spill(table, overflow.add(other_overflow.where, other_overflow.units))


@dataclass
class BinScores:
    """Scores of D neurons in every column, float64 [D, columns], on the table's device.

    Attributes:
        spearman: Spearman's rho.
        spearman_bound: How far from the true rho it can be.
        auroc: Area under the ROC curve; NaN in columns of continuous metrics.
        auroc_bound: How far off it can be.
        mutual_info: Nats; of a class or a binary metric with one against the rest, of a continuous metric with its 8
            soft levels (at most the mutual information with the metric itself).
        stale: bool [D], the frozen edges no longer divide the rows.
    """

    spearman: torch.Tensor
    spearman_bound: torch.Tensor
    auroc: torch.Tensor
    auroc_bound: torch.Tensor
    mutual_info: torch.Tensor
    stale: torch.Tensor

    @staticmethod
    def empty(n_neurons: int, n_columns: int, device: torch.device | str = "cpu") -> BinScores:
        """Scores that are all NaN."""

        def nan() -> torch.Tensor:
            return torch.full((n_neurons, n_columns), torch.nan, dtype=torch.float64, device=device)

        stale = torch.zeros(n_neurons, dtype=torch.bool, device=device)
        return BinScores(nan(), nan(), nan(), nan(), nan(), stale)


def average_ranks(values: torch.Tensor) -> torch.Tensor:
    """Centred ranks [N], ties averaged, float64."""
    _, index, times = torch.unique(values, return_inverse=True, return_counts=True)
    rank = times.cumsum(0) - (times + 1) / 2.0  # before + (times + 1) / 2, minus 1
    return (rank[index] - (values.shape[0] - 1) / 2.0).double()


def fit_continuous(
    layout: BinLayout, values: Mapping[str, torch.Tensor], references: Mapping[str, torch.Tensor]
) -> dict[str, bin_scores.RankFit]:
    """Fits each continuous metric's exact ranks, from its values [N] of all rows, onto its hats."""
    return {
        name: bin_scores.fit_ranks(
            average_ranks(values[name].double()),
            hat_weights(hat_positions(values[name].double(), references[name].double())),
        )
        for name in layout.hats
    }


def finalise(
    layout: BinLayout,
    table: torch.Tensor,
    edges: torch.Tensor,
    dtype: torch.dtype,
    fits: Mapping[str, bin_scores.RankFit],
    overflow: Overflow | None = None,
) -> BinScores:
    """The scores of every neuron, a slice of neurons at a time.

    Args:
        layout: The table's layout.
        table: int32 [D, entries].
        edges: float32 [D, C - 1], those the table was filled with.
        dtype: Of the activations that filled it: it tells which bins are atomic.
        fits: From `fit_continuous`.
        overflow: What `spill` moved out of the table.
    """
    n_neurons = table.shape[0]
    n_columns = sum(len(metric.columns(name)) for name, metric in layout.metrics.items())
    scores = BinScores.empty(n_neurons, n_columns, table.device)
    step = max(1, _SLICE_VALUES // max(1, layout.entries))
    for start in range(0, n_neurons, step):
        part = slice(start, min(start + step, n_neurons))
        entries = widened(table, overflow, part)
        _finalise_slice(layout, entries, atomic_bins(edges[part], dtype), fits, scores, part)
    return scores


def widened(table: torch.Tensor, overflow: Overflow | None, part: slice) -> torch.Tensor:
    """The true entries of a slice of neurons, float64 (exact up to 2^53): the table and what was moved out of it."""
    entries = table[part].double()
    if overflow is not None and overflow.where.numel():
        low, high = part.start * table.shape[1], part.stop * table.shape[1]
        here = (overflow.where >= low) & (overflow.where < high)
        entries.view(-1).index_add_(0, overflow.where[here] - low, overflow.units[here].double() * _SPILLED)
    return entries


def occupancy_of(layout: BinLayout, counts: torch.Tensor, hats: torch.Tensor) -> torch.Tensor:
    """Rows per bin [d, C]: from the hats, a categorical metric, or the channel kept for it."""
    if layout.hats:
        return hats[:, :, 0].sum(2) / UNIT
    for name, metric in layout.metrics.items():
        if isinstance(metric, Categorical):
            return counts[:, :, layout.first[name] : layout.first[name] + len(metric.classes)].sum(2)
    return counts[:, :, -1]


def _columns(layout: BinLayout) -> Iterator[tuple[str, Metric, slice]]:
    at = 0
    for name, metric in layout.metrics.items():
        width = len(metric.columns(name))
        yield name, metric, slice(at, at + width)
        at += width


def _finalise_slice(
    layout: BinLayout,
    entries: torch.Tensor,
    atomic: torch.Tensor,
    fits: Mapping[str, bin_scores.RankFit],
    scores: BinScores,
    part: slice,
) -> None:
    counts, hats = layout.split(entries)
    occupancy = occupancy_of(layout, counts, hats)
    ranks = bin_scores.bin_ranks(occupancy, atomic)
    scores.stale[part] = bin_scores.is_stale(ranks.hidden, layout.bins)
    for name, metric, columns in _columns(layout):
        if isinstance(metric, Continuous):
            sums, fit = hats[:, :, layout.hats[name]], fits[name]
            rho, bound = bin_scores.spearman_continuous(sums, occupancy, atomic, ranks, fit)
            scores.spearman[part, columns], scores.spearman_bound[part, columns] = rho[:, None], bound[:, None]
            scores.mutual_info[part, columns] = bin_scores.mutual_information(sums / UNIT, fit.freedom)[:, None]
            continue
        first = layout.first[name]
        positives = counts[:, :, first : first + columns.stop - columns.start]
        rho, bound, area, area_bound = bin_scores.label_scores(positives, occupancy, atomic, ranks)
        scores.spearman[part, columns], scores.spearman_bound[part, columns] = rho, bound
        scores.auroc[part, columns], scores.auroc_bound[part, columns] = area, area_bound
        scores.mutual_info[part, columns] = bin_scores.label_information(positives, occupancy)


def exact(layout: BinLayout, rows: torch.Tensor, values: Mapping[str, torch.Tensor]) -> BinScores:
    """The scores of few rows, from their exact ranks; the bounds are 0.

    Mutual information comes from the table that edges from all the rows give.

    Args:
        layout: What to score.
        rows: Activations [N, D], finite.
        values: Each metric's values [N].
    """
    n, width = rows.shape
    if n < 1:
        raise ArgumentError("exact scores: expected at least one row, got none")
    edges = build_edges(rows, layout.bins)
    references = {name: values[name].double().sort().values for name in layout.hats}
    fits = fit_continuous(layout, values, references)
    channels, hats = payload(layout, values, references)
    y = torch.cat([metric.expand(metric.check(name, values[name])) for name, metric in layout.metrics.items()], 1)
    labels = torch.cat(
        [torch.full((c.stop - c.start,), not isinstance(metric, Continuous)) for _, metric, c in _columns(layout)]
    ).to(y.device)
    ranked_y = torch.stack([average_ranks(column) for column in y.T], 1)
    scores = BinScores.empty(width, y.shape[1], rows.device)
    step = max(1, _SLICE_VALUES // max(layout.entries, n))
    for start in range(0, width, step):
        part = slice(start, min(start + step, width))
        table = layout.zeros(part.stop - part.start, rows.device)
        ops.bins_update(rows[:, part], edges[part], channels, hats, table)
        sliced = finalise(layout, table, edges[part], rows.dtype, fits)
        scores.mutual_info[part] = sliced.mutual_info
        _exact_slice(rows[:, part], y, ranked_y, labels, scores, part)
    return scores


def _exact_slice(
    rows: torch.Tensor, y: torch.Tensor, ranked_y: torch.Tensor, labels: torch.Tensor, scores: BinScores, part: slice
) -> None:
    n = rows.shape[0]
    ranks = (
        torch.from_numpy(rankdata((rows if rows.dtype == torch.float64 else rows.float()).cpu().numpy(), axis=0)).to(
            rows.device
        )
        - (n + 1) / 2
    )  # [N, d]
    covariance = ranks.T @ ranked_y
    scale = ranks.square().sum(0).sqrt()[:, None] * ranked_y.square().sum(0).sqrt()
    scores.spearman[part] = torch.where(scale > 0, (covariance / scale).clamp(-1, 1), torch.nan)
    positives = y.sum(0)
    pairs = positives * (n - positives)
    area = 0.5 + (ranks.T @ y) / pairs
    constant = ranks.square().sum(0)[:, None] == 0
    undefined = constant | ~labels | (pairs <= 0)
    scores.auroc[part] = area.masked_fill(undefined, torch.nan)
    scores.spearman_bound[part] = torch.zeros_like(covariance).masked_fill(scores.spearman[part].isnan(), torch.nan)
    scores.auroc_bound[part] = torch.zeros_like(area).masked_fill(undefined, torch.nan)
