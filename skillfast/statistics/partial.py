"""Partial correlations from correlations: what is left of two variables after a regression on others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEFT = 1e-4  # share of a variance below which what is left is rounding: r comes from products of float32
_RANK = 1e-10  # of singular values: the classes of a label add up to 1


@dataclass(frozen=True)
class PartialCorrelations:
    """Correlations of residuals.

    Attributes:
        neurons: float64 [D, L], of the neurons with the L columns that are left.
        columns: float64 [L, L], of these columns with each other.
        explained_neurons: bool [D], neurons that follow from what is given.
        explained_columns: bool [L], columns that do.
    """

    neurons: np.ndarray
    columns: np.ndarray
    explained_neurons: np.ndarray
    explained_columns: np.ndarray


def partial_correlations(neurons: np.ndarray, between: np.ndarray, given: np.ndarray) -> PartialCorrelations:
    """Correlations after a linear regression on some of the columns.

    Args:
        neurons: float64 [D, M], r of every neuron with every column.
        between: float64 [M, M], r of the columns with each other.
        given: bool [M], the columns of the regression; those that are constant have no part in it.
    """
    fixed = np.flatnonzero(given & ~np.isnan(np.diagonal(between)))
    inverse = np.linalg.pinv(between[np.ix_(fixed, fixed)], rcond=_RANK, hermitian=True)
    x, y = neurons[:, fixed], between[np.ix_(~given, fixed)]
    slopes_x, slopes_y = x @ inverse, y @ inverse
    left_x, left_y = 1 - (slopes_x * x).sum(1), 1 - (slopes_y * y).sum(1)
    gone_x, gone_y = left_x < LEFT, left_y < LEFT
    with np.errstate(invalid="ignore"):
        spread_x, spread_y = (np.sqrt(np.where(left < LEFT, np.nan, left)) for left in (left_x, left_y))
    found = (neurons[:, ~given] - slopes_x @ y.T) / (spread_x[:, None] * spread_y)
    columns = (between[np.ix_(~given, ~given)] - slopes_y @ y.T) / (spread_y[:, None] * spread_y)
    return PartialCorrelations(np.clip(found, -1, 1), np.clip(columns, -1, 1), gone_x, gone_y)
