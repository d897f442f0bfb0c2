"""From the sums and the table of an accumulator to its scores."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from skillfast.statistics import bootstrap, comoments
from skillfast.statistics.bins import table as bins
from skillfast.statistics.neuron_scores import NeuronScores
from skillfast.vocabulary import STATISTICS

if TYPE_CHECKING:
    from skillfast.statistics.neuron_statistics import NeuronStatistics

ROUNDING = 1e-12  # a variance below this share of the mean square is what float64 sums leave of a constant
LEAST_SQUARE = 1e-30  # mean squares of a neuron below this underflow in float32
LEAST_VARIANCE, MOST_VARIANCE = 1e-60, 1e50  # of a metric, likewise
OF_BINS = tuple(name for name in STATISTICS if name != "pearson")


def scores(statistics: NeuronStatistics) -> NeuronScores:
    """Everything that was asked for, and what has no score by reason."""
    state = statistics._moments
    mean, variance, _, variance_y = comoments.mean_and_variance(state)
    n = state.count.double()
    non_finite = ~torch.isfinite(mean)
    square = state.sum_xx / n
    # Rows are squared and multiplied in float32: what leaves its range there has no r, though it has ranks.
    beyond_x = ~non_finite & (~torch.isfinite(square) | ((square < LEAST_SQUARE) & (state.sum_x != 0)))
    beyond_y = ((variance_y < LEAST_VARIANCE) & (variance_y > 0)) | (variance_y > MOST_VARIANCE)
    rounding = ROUNDING * square + (torch.finfo(torch.float32).eps / 2 * mean).square() * statistics._wide
    constant_x = ~non_finite & ~beyond_x & (variance <= rounding)
    constant_y = (variance_y <= ROUNDING * state.sum_yy / n) & ~beyond_y
    arrays: dict[str, torch.Tensor] = {}
    if "pearson" in statistics.statistics:
        arrays["pearson"] = comoments.pearson(state, constant_x | beyond_x, constant_y | beyond_y)
    stale = torch.zeros_like(constant_x)
    counted = _bin_scores(statistics, non_finite)
    if counted is not None:
        stale = counted.stale & ~non_finite & ~constant_x
        for name in OF_BINS:
            if name in statistics.statistics:
                arrays |= {key: getattr(counted, key) for key in (name, f"{name}_bound") if hasattr(counted, key)}
        for name, array in arrays.items():
            array[non_finite] = torch.nan
            array[constant_x] = 0.0 if name == "mutual_info" else torch.nan
            array[:, constant_y] = 0.0 if name == "mutual_info" else torch.nan
        if "mutual_info" in arrays:
            arrays["mutual_info"][non_finite] = torch.nan
    if statistics._replicates is not None and "pearson" in arrays:
        arrays |= bootstrap.summarise(statistics._replicates, arrays["pearson"])
    reasons = {
        "constant_neuron": tuple(constant_x.nonzero()[:, 0].tolist()),
        "non_finite_activation": tuple(non_finite.nonzero()[:, 0].tolist()),
        "stale_edges": tuple(stale.nonzero()[:, 0].tolist()),
        "beyond_float32": tuple(beyond_x.nonzero()[:, 0].tolist()),
        "constant_metric": tuple(c for c, flat in zip(statistics.columns, constant_y.tolist(), strict=True) if flat),
        "metric_beyond_float32": tuple(c for c, far in zip(statistics.columns, beyond_y.tolist(), strict=True) if far),
    }
    return NeuronScores(
        columns=statistics.columns,
        mean=mean.cpu().numpy(),
        std=variance.sqrt().cpu().numpy(),
        n_observations=int(state.count),
        reasons={name: where for name, where in reasons.items() if where},
        **{name: array.cpu().numpy() for name, array in arrays.items()},  # type: ignore[arg-type]
    )


def _bin_scores(statistics: NeuronStatistics, non_finite: torch.Tensor) -> bins.BinScores | None:
    """Exact scores while all rows are there, then those of the table."""
    if statistics._bins is not None:
        return statistics._bins.scores()
    if not statistics._keeping:
        return None
    rows = statistics._buffer[: statistics._filled]
    if bool(non_finite.any()):
        rows = torch.where(torch.isfinite(rows), rows, torch.zeros((), dtype=rows.dtype, device=rows.device))
    layout = bins.BinLayout.of(statistics.metrics, statistics.n_bins)
    return bins.exact(layout, rows, statistics._named(statistics._values[: statistics._filled]))


def warn_of_reasons(scores: NeuronScores) -> None:
    """One warning that names whatever has no score, or edges that are stale."""
    if not scores.reasons:
        return
    parts = [
        f"{name} ({len(where)} neurons)" if isinstance(where[0], int) else f"{name} ({', '.join(map(str, where))})"
        for name, where in scores.reasons.items()
    ]
    warnings.warn(f"some scores are not defined: {'; '.join(parts)}", RuntimeWarning, stacklevel=3)
