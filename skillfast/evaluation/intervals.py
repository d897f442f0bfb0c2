"""Intervals of shares of labelled examples, from formulas: they hold where few examples change, and draw nothing."""

from __future__ import annotations

import math
import warnings

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

Z = float(norm.ppf(0.975))
"""Reach of a 95 % interval in standard errors."""


class Strata:
    """Means over labelled examples, each class a stratum of its own, and how far such means vary.

    Args:
        labels: int64 [n].
        weights: float64 [K], of each class's mean, summing to 1; equal for the classes with examples by default.

    Attributes:
        effective: How many examples of a single class would tell as much (Kish).

    Where no class has two examples nothing is known of how those of one class vary, which a warning says.
    """

    def __init__(self, labels: np.ndarray, weights: np.ndarray | None = None) -> None:
        counts = np.bincount(labels)
        shown = counts > 0
        weights = shown / shown.sum() if weights is None else weights
        self.labels = labels
        self.classes = np.flatnonzero(shown)
        self._weights = weights[labels] / counts[labels]  # [n], summing to 1
        self.effective = float(1 / np.square(self._weights).sum())
        several = counts[labels] > 1
        squares = np.square(self._weights)
        self._scale = np.zeros(len(labels))  # of a squared deviation from its class's mean
        self._scale[several] = squares[several] * (counts / np.maximum(counts - 1, 1))[labels][several]
        if several.any():  # a class of one example is taken to vary as the others do
            self._scale *= squares.sum() / squares[several].sum()
        else:
            self._scale[:] = np.nan
            if len(labels) > 1:
                warnings.warn(
                    "intervals: expected a class with two examples, to see how those of one class vary, got one of "
                    "each; they hold for as many examples of a single class, and those of harm are left open",
                    RuntimeWarning,
                    stacklevel=1,  # said once, whichever of the results it is about
                )

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean of values [..., n] -> float64 [...]."""
        return values @ self._weights

    def covariance(self, values: np.ndarray) -> np.ndarray:
        """Covariance of the means of values [q, n] -> float64 [q, q]; NaN where no class has two examples."""
        deviations = np.array(values, dtype=np.float64)
        for label in self.classes:
            member = self.labels == label
            deviations[:, member] -= deviations[:, member].mean(1, keepdims=True)
        return (deviations * self._scale) @ deviations.T

    def crossed_covariance(self, values: np.ndarray) -> np.ndarray:
        """Covariance of means over examples and over random draws, both of which another run would have others of.

        The sum of the components of examples and of draws in a two-way layout; their interaction, which both estimates
        hold, counts once.

        Args:
            values: [q, draws, n].

        Returns:
            float64 [q, q].
        """
        draws = values.shape[1]
        covariance = self.covariance(values.mean(1))
        if draws == 1:
            return covariance
        rest = values - values.mean(1, keepdims=True)
        interaction = sum(self.covariance(rest[:, d]) for d in range(draws)) / (draws * (draws - 1))
        of_draws = np.atleast_2d(np.cov(self.mean(values))) / draws - interaction
        varying = np.diagonal(of_draws) > 0
        return covariance + np.where(np.outer(varying, varying), of_draws, 0)


def share_limits(share: float, variance: float, effective: float, z: float = Z) -> tuple[float, float]:
    """Wilson's limits of a share at the number of independent examples that its variance stands for.

    Args:
        share: The estimate, in [0, 1].
        variance: Variance of the estimate; examples may be clustered. 0 for that of `effective` independent ones.
        effective: Number of examples to count where the variance is 0, for lack of events or of clusters, or is not
            known (NaN).
        z: Reach in standard errors.
    """
    share = min(max(share, 0.0), 1.0)  # a mean of ones may be 1 and a rounding
    n = share * (1 - share) / variance if variance > 0 and 0 < share < 1 else effective
    centre, reach = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = ((centre + sign * reach) / (1 + z * z / n) for sign in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def difference_limits(
    one: float, other: float, covariance: np.ndarray, effective: float, z: float = Z
) -> tuple[float, float]:
    """Limits of the difference of two shares of the same examples: Newcombe's square-and-add of Wilson's limits.

    Newcombe's method 10 for paired proportions, in the form for correlated estimates of Zou and Donner (2008).

    Args:
        one: A share, such as that of examples that are lost.
        other: The share that is taken from it, such as that of examples that are gained.
        covariance: [2, 2], of the two estimates; NaN, where it is not known, is taken as that of independent examples
            which have either or neither.
        effective: As for `share_limits`.
        z: Reach in standard errors.
    """
    if np.isnan(covariance).any():
        either = -one * other
        covariance = np.array([[one * (1 - one), either], [either, other * (1 - other)]]) / effective
    (low, high), (other_low, other_high) = (
        share_limits(share, float(covariance[i, i]), effective, z) for i, share in enumerate((one, other))
    )
    scale = math.sqrt(max(covariance[0, 0] * covariance[1, 1], 0.0))
    r = float(np.clip(covariance[0, 1] / scale, -1, 1)) if scale > 0 else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * r * a * b + b * b, 0.0))

    difference = one - other
    ends = difference - reach(one - low, other_high - other), difference + reach(high - one, other - other_low)
    return max(ends[0], -1.0), min(ends[1], 1.0)


def bracket_limits(low: float, high: float, low_variance: float, high_variance: float) -> tuple[float, float]:
    """The 95 % interval of a value that lies between the expectations of two estimates (Imbens and Manski 2004).

    It reaches 1.64 standard errors beyond either estimate where these are far apart, 1.96 where they are the same.

    Args:
        low: Estimate whose expectation is at most the value.
        high: Estimate whose expectation is at least the value.
        low_variance: Variance of `low`.
        high_variance: Variance of `high`.
    """
    errors = math.sqrt(low_variance), math.sqrt(high_variance)
    if max(errors) == 0:
        return low, high
    apart = max(high - low, 0.0) / max(errors)
    z = brentq(lambda reach: norm.cdf(reach + apart) - norm.cdf(-reach) - 0.95, 1.0, 3.0)
    return low - z * errors[0], high + z * errors[1]
