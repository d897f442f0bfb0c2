"""Scores of every neuron from its table of bins, or from the rows themselves while there are few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.stats import rankdata

from skillfast import ops
from skillfast.errors import ArgumentError
from skillfast.metrics import Continuous
from skillfast.statistics.bins import estimates
from skillfast.statistics.bins.edges import atomic_bins, build_edges
from skillfast.statistics.bins.layout import UNIT, hat_positions, hat_weights
from skillfast.statistics.bins.overflow import widened

if TYPE_CHECKING:
    from collections.abc import Mapping

    from skillfast.statistics.bins.layout import BinLayout
    from skillfast.statistics.bins.overflow import Overflow

_SLICE_VALUES = 1 << 22  # table entries finished at once: 32 MB of float64, and a few times that of temporaries


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
    def empty(n_neurons: int, n_columns: int, device: torch.device) -> BinScores:
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


def column_ranks(rows: torch.Tensor) -> torch.Tensor:
    """Centred ranks [N, d] within each column of finite rows [N, d], ties averaged, float64."""
    if rows.device.type == "cpu":  # scipy sorts faster there
        return torch.from_numpy(rankdata(rows.numpy(), axis=0)) - (len(rows) + 1) / 2
    return sorted_ranks(rows)


def sorted_ranks(rows: torch.Tensor) -> torch.Tensor:
    """`column_ranks` by one sort on the rows' own device."""
    ascending, order = rows.T.contiguous().sort(1)
    last = ascending.shape[1] - 1
    place = torch.arange(last + 1, device=rows.device)
    starts = torch.ones_like(ascending, dtype=torch.bool)  # of a run of equal values
    starts[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
    ends = starts.roll(-1, 1)
    first = torch.where(starts, place, 0).cummax(1).values
    final = torch.where(ends, place, last).flip(1).cummin(1).values.flip(1)
    centred = (first + final - last).double() / 2
    return torch.empty_like(centred).scatter_(1, order, centred).T


def fit_continuous(
    layout: BinLayout, values: Mapping[str, torch.Tensor], references: Mapping[str, torch.Tensor]
) -> dict[str, estimates.RankFit]:
    """Fits each continuous metric's exact ranks, from its values [N] of all rows, onto its hats."""
    return {
        name: estimates.fit_ranks(
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
    fits: Mapping[str, estimates.RankFit],
    overflow: Overflow | None = None,
    rate: float = 1.0,
) -> BinScores:
    """The scores of every neuron, a slice of neurons at a time.

    Args:
        layout: The table's layout.
        table: int32 [D, entries].
        edges: float32 [D, C - 1], those the table was filled with.
        dtype: Data type of the activations that filled the table: it tells which bins are atomic.
        fits: From `fit_continuous`.
        overflow: What `spill` moved out of the table.
        rate: With which probability each row of a larger set was counted; bounds refer to that set.
    """
    n_neurons = table.shape[0]
    n_columns = sum(len(metric.columns(name)) for name, metric in layout.metrics.items())
    scores = BinScores.empty(n_neurons, n_columns, table.device)
    step = max(1, _SLICE_VALUES // max(1, layout.entries))
    for start in range(0, n_neurons, step):
        part = slice(start, min(start + step, n_neurons))
        entries = widened(table, overflow, part)
        _finalise_slice(layout, entries, atomic_bins(edges[part], dtype), fits, scores, part)
        if rate < 1:
            _add_sampling(layout, entries, rate, scores, part)
    return scores


def _finalise_slice(
    layout: BinLayout,
    entries: torch.Tensor,
    atomic: torch.Tensor,
    fits: Mapping[str, estimates.RankFit],
    scores: BinScores,
    part: slice,
) -> None:
    counts, hats = layout.split(entries)
    occupancy = layout.occupancy(counts, hats)
    ranks = estimates.bin_ranks(occupancy, atomic)
    scores.stale[part] = estimates.is_stale(ranks.hidden, layout.bins)
    for name, metric, columns in layout.columns():
        if isinstance(metric, Continuous):
            sums, fit = hats[:, :, layout.hats[name]], fits[name]
            rho, bound = estimates.spearman_continuous(sums, occupancy, atomic, ranks, fit)
            scores.spearman[part, columns], scores.spearman_bound[part, columns] = rho[:, None], bound[:, None]
            scores.mutual_info[part, columns] = estimates.mutual_information(sums / UNIT, fit.freedom)[:, None]
            continue
        first = layout.first[name]
        positives = counts[:, :, first : first + columns.stop - columns.start]
        rho, bound, area, area_bound = estimates.label_scores(positives, occupancy, atomic, ranks)
        scores.spearman[part, columns], scores.spearman_bound[part, columns] = rho, bound
        scores.auroc[part, columns], scores.auroc_bound[part, columns] = area, area_bound
        scores.mutual_info[part, columns] = estimates.label_information(positives, occupancy)


def _add_sampling(layout: BinLayout, entries: torch.Tensor, rate: float, scores: BinScores, part: slice) -> None:
    """Add to the bounds what the rows are off as a sample."""
    counts, hats = layout.split(entries)
    occupancy = layout.occupancy(counts, hats)
    for name, metric, columns in layout.columns():
        if isinstance(metric, Continuous):
            reach = estimates.continuous_sampling(hats[:, :, layout.hats[name]], occupancy, rate)
            scores.spearman_bound[part, columns] += reach[:, None]
            continue
        first = layout.first[name]
        positives = counts[:, :, first : first + columns.stop - columns.start]
        of_rho, of_area = estimates.label_sampling(positives, occupancy, rate)
        scores.spearman_bound[part, columns] += of_rho
        scores.auroc_bound[part, columns] += of_area
    scores.spearman_bound[part] = torch.minimum(scores.spearman_bound[part], 1 + scores.spearman[part].abs())
    scores.auroc_bound[part].clamp_(max=1)


def exact(layout: BinLayout, rows: torch.Tensor, values: Mapping[str, torch.Tensor], rate: float = 1.0) -> BinScores:
    """The scores of few rows, from their exact ranks; the bounds are 0, but for what the rows are off as a sample.

    Mutual information comes from the table that edges from all the rows give.

    Args:
        layout: What to score.
        rows: Activations [N, D], finite.
        values: Each metric's values [N].
        rate: With which probability each row of a larger set is among these; bounds refer to that set.
    """
    n, width = rows.shape
    if n < 1:
        raise ArgumentError("exact scores: expected at least one row, got none")
    edges = build_edges(rows, layout.bins)
    references = {name: values[name].double().sort().values for name in layout.hats}
    fits = fit_continuous(layout, values, references)
    channels, hats = layout.payload(values, references)
    y = torch.cat([metric.expand(metric.check(name, values[name])) for name, metric in layout.metrics.items()], 1)
    labels = torch.cat(
        [torch.full((c.stop - c.start,), not isinstance(metric, Continuous)) for _, metric, c in layout.columns()]
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
        if rate < 1:
            _add_sampling(layout, widened(table, None, slice(None)), rate, scores, part)
    return scores


def _exact_slice(
    rows: torch.Tensor, y: torch.Tensor, ranked_y: torch.Tensor, labels: torch.Tensor, scores: BinScores, part: slice
) -> None:
    n = rows.shape[0]
    ranks = column_ranks(rows if rows.dtype == torch.float64 else rows.float())
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
