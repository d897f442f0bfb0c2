"""Harm: what a class loses for good, which lies between two estimates, since chance flips decisions either way.

Of n examples of a class a removal turns some from right to wrong, the losses, and some from wrong to right, the gains.
The class's harm is what it loses net in the long run, 0 for one that gains. `plug_in` takes the net loss that is seen:
too much, for chance alone makes half of the classes lose a little. `cross_fitted` judges on one half of the changed
examples whether the class loses, and counts the net loss on the other half: at most the harm on average, 0 if there is
none, however many examples flip either way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import bdtr

from skillfast.evaluation.intervals import bracket_limits

if TYPE_CHECKING:
    from collections.abc import Callable

    Estimate = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def plug_in(losses: np.ndarray, gains: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Net loss per example, gains beyond the losses counting as 0: counts [...] and examples [...] -> [...]."""
    return np.maximum(losses - gains, 0) / n


def cross_fitted(losses: np.ndarray, gains: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Net loss per example in one half of those that changed, where the other half loses; half of it where that ties.

    The mean over all ways in which each changed example falls into either half, exact: the net gain of the first half
    is X - losses for X ~ Bin(losses + gains, 1/2), a gain that falls into it or a loss that does not.

    Args:
        losses: [...], examples from right to wrong.
        gains: [...], examples from wrong to right.
        n: [...], examples.

    Returns:
        float64 [...]; below 0 where what loses in one half gains in the other.
    """
    changed = losses + gains
    # E[X; X < losses] is changed / 2 times the same of X - 1, which is one toss less
    kept = changed / 2 * _below(losses - 1, np.maximum(changed - 1, 0)) - gains * _below(losses, changed)
    return 2 * kept / n


def _below(count: np.ndarray, tosses: np.ndarray) -> np.ndarray:
    """P(X < count) + P(X = count) / 2 for X ~ Bin(tosses, 1/2); count at most tosses."""
    return (_up_to(count, tosses) + _up_to(count - 1, tosses)) / 2


def _up_to(count: np.ndarray, tosses: np.ndarray) -> np.ndarray:
    """P(X <= count) for X ~ Bin(tosses, 1/2)."""
    return np.where(count < 0, 0.0, bdtr(np.maximum(count, 0), tosses, 0.5))


def noise_floor(losses: np.ndarray, gains: np.ndarray, n: np.ndarray) -> np.ndarray:
    """What `plug_in` would be on average if each changed example were as likely a gain as a loss: [...] -> [...]."""
    changed = losses + gains
    half, less = changed // 2, np.maximum(changed - 1, 0)
    return changed / 2 * (_up_to(half, less) - _up_to(half - 1, less)) / n


def size(bound: Estimate) -> Estimate:
    """An estimate of the size of the net change, whichever its direction: that of the net loss and of the net gain."""
    return lambda losses, gains, n: bound(losses, gains, n) + bound(gains, losses, n)


def per_example(estimate: Estimate, change: np.ndarray) -> np.ndarray:
    """What each example adds to an estimate: values that vary as the jackknife's do, and whose mean is the estimate.

    Args:
        estimate: One of the functions above.
        change: int8 [..., n], 1 for a gain, -1 for a loss, 0 else.

    Returns:
        float64 [..., n].
    """
    n = change.shape[-1]
    losses, gains = (change < 0).sum(-1), (change > 0).sum(-1)
    whole = estimate(losses, gains, np.array(n))[..., None]
    if n < 2:
        return np.broadcast_to(whole, change.shape)
    without = [
        estimate(np.maximum(losses - lost, 0), np.maximum(gains - gained, 0), np.array(n - 1))[..., None]
        for lost, gained in ((1, 0), (0, 1), (0, 0))
    ]
    left_out = np.select([change < 0, change > 0], without[:2], without[2])
    return whole - (n - 1) * (left_out - left_out.mean(-1, keepdims=True))


def bracket(low: float, high: float, low_variance: float, high_variance: float) -> tuple[float, float, list[float]]:
    """The two estimates, and the 95 % interval in [0, 1] of the harm, or size of a change, that lies between them.

    Args:
        low: The estimate `cross_fitted`.
        high: The estimate `plug_in`, which is no less than 0; a sum of weights may miss that by an ulp.
        low_variance: Variance of `low`; infinite, as that of `high`, for one example, which says nothing of others.
        high_variance: Variance of `high`.
    """
    high = max(high, 0.0)
    if not np.isfinite([low_variance, high_variance]).all():
        return low, high, [0.0, 1.0]
    ends = bracket_limits(low, high, low_variance, high_variance)
    return low, high, [min(max(end, 0.0), 1.0) for end in ends]
