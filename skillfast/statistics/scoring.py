"""Makes the scores of an accumulator from its state."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from skillfast.statistics import bootstrap
from skillfast.statistics.bins.layout import BinLayout
from skillfast.statistics.bins.scores import exact
from skillfast.statistics.moments import ROUNDING
from skillfast.statistics.scores import MOST_BETWEEN, NeuronScores
from skillfast.statistics.state import OF_BINS

if TYPE_CHECKING:
    from skillfast.statistics.bins.scores import BinScores
    from skillfast.statistics.state import State

SINGLE = 2e-6  # a neuron's variance below this share of its mean square is what sums of float32 squares leave
LEAST_SQUARE = 1e-30  # mean squares of a neuron below this underflow in float32
LEAST_VARIANCE, MOST_VARIANCE = 1e-60, 1e50  # variances of a metric beyond these leave float32's range


def scores(state: State, rate: float = 1.0) -> NeuronScores:
    """The statistics that the settings ask for, and what has no score by reason.

    Args:
        state: At least one row is counted, and all rows of its buffer are in the co-moments.
        rate: With which probability each row of a larger set was counted, to which the bounds then refer.
    """
    state.refuse_faults()
    moments, statistics, columns = state.moments, state.settings.statistics, state.settings.columns
    mean, variance, _, variance_y = moments.mean_and_variance()
    n = moments.count.double()
    non_finite = ~torch.isfinite(mean)
    square = moments.sum_xx / n
    # Rows are squared and multiplied in float32: what leaves its range there has no r, though it has ranks.
    beyond_x = ~non_finite & (~torch.isfinite(square) | ((square < LEAST_SQUARE) & (moments.sum_x != 0)))
    beyond_y = ((variance_y < LEAST_VARIANCE) & (variance_y > 0)) | (variance_y > MOST_VARIANCE)
    rounding = SINGLE * square + (torch.finfo(torch.float32).eps / 2 * mean).square() * state.wide
    constant_x = ~non_finite & ~beyond_x & (variance <= rounding)
    constant_y = (variance_y <= ROUNDING * moments.sum_yy / n) & ~beyond_y
    arrays: dict[str, torch.Tensor] = {}
    if "pearson" in statistics:
        arrays["pearson"] = moments.pearson(constant_x | beyond_x, constant_y | beyond_y)
    between = None
    if "pearson" in statistics and 0 < moments.sum_between.shape[1] <= MOST_BETWEEN:
        between = moments.between(constant_y | beyond_y)
    stale = torch.zeros_like(constant_x)
    counted = _bin_scores(state, non_finite, rate)
    if counted is not None:
        stale = counted.stale & ~non_finite & ~constant_x
        for name in OF_BINS:
            if name in statistics:
                arrays |= {key: getattr(counted, key) for key in (name, f"{name}_bound") if hasattr(counted, key)}
        for name, array in arrays.items():
            array[non_finite] = torch.nan
            array[constant_x] = 0.0 if name == "mutual_info" else torch.nan
            array[:, constant_y] = 0.0 if name == "mutual_info" else torch.nan
        if "mutual_info" in arrays:
            arrays["mutual_info"][non_finite] = torch.nan
    if state.replicates is not None and "pearson" in arrays:
        arrays |= bootstrap.summarise(state.replicates, arrays["pearson"])
    reasons = {
        "constant_neuron": tuple(constant_x.nonzero()[:, 0].tolist()),
        "non_finite_activation": tuple(non_finite.nonzero()[:, 0].tolist()),
        "stale_edges": tuple(stale.nonzero()[:, 0].tolist()),
        "beyond_float32": tuple(beyond_x.nonzero()[:, 0].tolist()),
        "constant_metric": tuple(c for c, flat in zip(columns, constant_y.tolist(), strict=True) if flat),
        "metric_beyond_float32": tuple(c for c, far in zip(columns, beyond_y.tolist(), strict=True) if far),
    }
    return NeuronScores(
        columns=columns,
        mean=mean.cpu().numpy(),
        std=variance.sqrt().cpu().numpy(),
        n_observations=int(moments.count),
        n_ranked=None if counted is None else int(moments.count),
        reasons={name: where for name, where in reasons.items() if where},
        between=None if between is None else between.cpu().numpy(),
        **{name: array.cpu().numpy() for name, array in arrays.items()},  # type: ignore[arg-type]
    )


def _bin_scores(state: State, non_finite: torch.Tensor, rate: float) -> BinScores | None:
    """Exact scores while all rows are there, then those of the table; None without statistics that need either."""
    if state.table is not None:
        return state.table.scores(rate)
    if not state.keeping:
        return None
    rows, values = state.buffer.contents
    if bool(non_finite.any()):
        rows = torch.where(torch.isfinite(rows), rows, torch.zeros((), dtype=rows.dtype, device=rows.device))
    settings = state.settings
    return exact(BinLayout.of(settings.metrics, settings.bins), rows, settings.named(values), rate)


def undefined(scores: NeuronScores) -> list[str]:
    """Whatever has no score or stale edges, in words, by reason."""
    return [
        f"{name} ({len(where)} neurons)" if isinstance(where[0], int) else f"{name} ({', '.join(map(str, where))})"
        for name, where in scores.reasons.items()
    ]


def warn_of_reasons(scores: NeuronScores) -> None:
    """Warns once of whatever has no score or stale edges, by reason."""
    if parts := undefined(scores):
        warnings.warn(f"some scores are not defined: {'; '.join(parts)}", RuntimeWarning, stacklevel=3)
