"""How closely the best neurons follow each auxiliary metric: mean |Pearson's r| of the ten best, here and held out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import beta

from skillfast.results.bench import BestNeuron, BothParts, Correlations, MetricCorrelations

if TYPE_CHECKING:
    from skillfast.statistics.scores import NeuronScores

TOP = 10


def top_correlations(select: NeuronScores, test: NeuronScores, top: int = TOP) -> Correlations:
    """Mean |r| of the best neurons of every metric.

    Neurons are ranked on the select part, on which the model may have been trained; what they are worth is their r on
    the test part. A categorical metric with several columns counts each column's own best neurons and takes the mean.

    Args:
        select: Scores with Pearson's r on the select part.
        test: Scores of the same neurons and columns on the test part.
        top: How many neurons count as the best.
    """
    metrics: dict[str, list[int]] = {}
    for index, column in enumerate(select.columns):
        metrics.setdefault(column.partition(":")[0], []).append(index)
    r, held_out = select.statistic("pearson"), test.statistic("pearson")
    last = max((site.block for site in select.sites if site.block is not None), default=None)
    of_last = np.repeat([site.block == last for site in select.sites], [site.width for site in select.sites])
    found = {}
    for name, columns in metrics.items():
        sites = {
            site: BothParts(**_best_means(r[rows][:, columns], held_out[rows][:, columns], top))
            for site, rows in select.site_slices().items()
        }
        found[name] = MetricCorrelations(
            **_best_means(r[:, columns], held_out[:, columns], top),
            sites=sites,
            last_block=None
            if last is None
            else BothParts(**_best_means(r[of_last][:, columns], held_out[of_last][:, columns], top)),
            neurons=_best_neurons(select, r, held_out, columns, top),
        )
    return Correlations(statistic="pearson", top=top, chance=_by_chance(test.n_observations), metrics=found)


def _by_chance(n: int) -> float | None:
    """Mean |r| of n observations of two variables that have nothing to do with each other; None for fewer than 3."""
    return float(2 / ((n - 2) * beta(0.5, (n - 2) / 2))) if n > 2 else None


def _best_means(r: np.ndarray, held_out: np.ndarray, top: int) -> dict[str, float | None]:
    """Mean |r| of each column's best neurons on either part, then over columns: [neurons, columns] each."""
    parts: dict[str, list[float]] = {"select": [], "test": []}
    for own, other in zip(np.abs(r).T, np.abs(held_out).T, strict=True):
        best = _order(own)[:top]
        parts["select"].append(_mean(own[best]))
        parts["test"].append(_mean(other[best]))
    return {name: _number(_mean(np.array(values))) for name, values in parts.items()}


def _best_neurons(
    scores: NeuronScores, r: np.ndarray, held_out: np.ndarray, columns: list[int], top: int
) -> list[BestNeuron]:
    """The best neurons by their largest |r| over the columns."""
    size = np.where(np.isfinite(r[:, columns]), np.abs(r[:, columns]), -1.0)
    column_of = np.array(columns)[size.argmax(1)]
    largest = np.where(size.max(1) < 0, np.nan, size.max(1))
    place = [(site.name, unit) for site in scores.sites for unit in range(site.width)]
    return [
        BestNeuron(
            site=place[i][0],
            unit=place[i][1],
            column=scores.columns[column_of[i]],
            select=_number(r[i, column_of[i]]),
            test=_number(held_out[i, column_of[i]]),
        )
        for i in _order(largest)[:top]
    ]


def _order(values: np.ndarray) -> np.ndarray:
    """Indices of values that are numbers, largest first."""
    finite = np.flatnonzero(np.isfinite(values))
    return finite[np.argsort(-values[finite], kind="stable")]


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
