"""The jackknife over groups of examples: what is left out in turn, and the interval that follows."""

from __future__ import annotations

import numpy as np
from scipy.stats import t

GROUPS = 40
"""Groups of examples, each left out once."""


def deal(labels: np.ndarray, groups: int = GROUPS) -> np.ndarray:
    """Deal examples out to groups, each class's evenly.

    Args:
        labels: int64 [n].
        groups: How many; at most n are used.

    Returns:
        int64 [n], the group of each example.
    """
    dealt = np.empty(len(labels), np.int64)
    dealt[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % max(1, min(groups, len(labels)))
    return dealt


def means_without(influence: np.ndarray, dealt: np.ndarray, groups: int) -> np.ndarray:
    """What a mean becomes without each group, minus the mean, from what each example adds to it.

    Args:
        influence: float64 [..., n]: of a plain mean each value minus the mean; NaN for what has no value.
        dealt: int64 [n], the group of each example.
        groups: How many.

    Returns:
        float64 [..., groups]; NaN where nothing is left.
    """
    member = (dealt[:, None] == np.arange(groups)).astype(np.float64)  # [n, groups]
    defined = ~np.isnan(influence)
    left = defined.sum(-1)[..., None] - defined.astype(np.float64) @ member
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(left > 0, -(np.where(defined, influence, 0) @ member) / left, np.nan)


def jackknife_interval(
    value: float | None, left_out: np.ndarray, low: float, high: float, variance: float = 0.0
) -> list[float] | None:
    """The 95 % interval of a value, from what it is without each group of examples.

    Args:
        value: The value; None where it is not defined.
        left_out: float64 [groups], the value without each group.
        low: The least that the value can be.
        high: The most.
        variance: Variance that has nothing to do with the examples, such as that of random draws; NaN: not known.

    Returns:
        The ends, within [low, high]; None where a value is not defined.
    """
    groups = len(left_out)
    if value is None or groups < 2 or not np.isfinite([value, variance, *left_out]).all():
        return None
    error = np.sqrt((groups - 1) / groups * np.square(left_out - left_out.mean()).sum() + variance)
    reach = float(t.ppf(0.975, groups - 1) * error)
    return [max(low, value - reach), min(high, value + reach)]


def variance_of_mean(values: np.ndarray) -> float:
    """Variance of a mean of random draws, from how they differ.

    Draws of several classes differ by the classes as well, so that it is rather too large.

    Args:
        values: Any shape; NaN for what is not defined.

    Returns:
        The variance; NaN for fewer than two values.
    """
    defined = values[~np.isnan(values)]
    return float(defined.var(ddof=1) / defined.size) if defined.size > 1 else np.nan
