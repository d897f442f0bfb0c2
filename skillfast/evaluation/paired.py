"""Two models on the same examples: paired tests, intervals from formulas, equivalence, and overlap beside chance."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, false_discovery_control, hypergeom, norm

from skillfast.evaluation.intervals import Strata, Z, difference_limits

if TYPE_CHECKING:
    from collections.abc import Mapping

LEVEL = 0.05
_FARTHEST = 40.0  # standard errors; no equivalence is looked for beyond


class PairedDifference:
    """How the mean of a quantity differs between two models, example by example.

    A model's accuracy is one part, right or wrong; what a removal takes is two, right before less right after.

    Args:
        parts: int8 [n] in {-1, 0, 1} each: the change of right from the first model to the second; of two parts the
            second is taken from the first.
        labels: int64 [n], classes whose means are averaged; None: one class.

    Attributes:
        n: How many examples.
        change: Mean of the differences; NaN without examples.
        sum: Sum of the differences.
        ones: Examples that differ by 1, either way.
        twos: Examples that differ by 2, either way.
    """

    def __init__(self, *parts: np.ndarray, labels: np.ndarray | None = None) -> None:
        rows = [np.asarray(part, dtype=np.int64) for part in parts]
        self.n = len(rows[0])
        total = rows[0] - sum(rows[1:], np.zeros(self.n, dtype=np.int64))
        size = np.abs(total)
        self.change = math.nan
        self.sum = int(total.sum())
        self.ones, self.twos = int((size == 1).sum()), int((size == 2).sum())
        self._shares: list[tuple[float, float]] = []
        self._covariances: list[np.ndarray] = []
        self._correlation = 0.0
        if not self.n:
            return
        strata = Strata(np.zeros(self.n, dtype=np.int64) if labels is None else labels)
        self.change, self._effective = float(strata.mean(total)), strata.effective
        if self.n < 2:
            return
        for row in rows:
            values = np.stack([row > 0, row < 0])
            gained, lost = strata.mean(values).tolist()
            self._shares.append((gained, lost))
            self._covariances.append(strata.covariance(values))
        if len(rows) == 2 and all(row.any() and np.ptp(row) for row in rows):
            self._correlation = float(np.corrcoef(rows[0], rows[1])[0, 1])

    def limits(self, z: float = Z) -> tuple[float, float]:
        """Limits of the mean difference: Newcombe's for paired shares, and of two parts Zou and Donner's combination.

        No bootstrap: where no example changed, its interval has no width, whatever the number of examples.

        Args:
            z: Reach in standard errors.
        """
        if self.n < 2:
            return -2.0, 2.0
        ends = [
            difference_limits(gained, lost, covariance, self._effective, z)
            for (gained, lost), covariance in zip(self._shares, self._covariances, strict=True)
        ]
        if len(ends) == 1:
            return ends[0]
        (low, high), (other_low, other_high) = ends
        one, other = (gained - lost for gained, lost in self._shares)

        def reach(a: float, b: float) -> float:
            return math.sqrt(max(a * a - 2 * self._correlation * a * b + b * b, 0.0))

        return (
            self.change - reach(one - low, other_high - other),
            self.change + reach(high - one, other - other_low),
        )

    @property
    def p(self) -> float:
        """Two-sided mid-p that the models are exchangeable on every example: McNemar's where differences are 1.

        The sum that was seen counts half (Fagerland, Lydersen and Laake 2013): an exact p rejects equal models far less
        often than it says where few examples differ, and so misses changes.
        """
        sums = abs(self.sum), abs(self.sum) + 1  # twice the mean of "at least" and "more than", of one side
        return min(1.0, sum(_tail(least, self.ones, self.twos) for least in sums))

    @property
    def p_less(self) -> float:
        """Exact one-sided p, for a mean difference below 0."""
        return _tail(-self.sum, self.ones, self.twos)

    @property
    def least_p(self) -> float:
        """Smallest two-sided p that these differences could have had, all of them one way."""
        return 2.0 ** -(self.ones + self.twos)

    def equivalence_p(self, margin: float) -> float:
        """P that the mean difference is not within the margin, by two one-sided tests (TOST) of `limits`; 1 beyond it.

        Args:
            margin: Largest difference that does not matter.
        """

        def beyond(z: float) -> float:
            low, high = self.limits(z)
            return max(high, -low) - margin

        if self.n < 2 or beyond(0.0) >= 0:
            return 1.0
        return float(norm.sf(brentq(beyond, 0.0, _FARTHEST)))


@functools.lru_cache(maxsize=4096)  # a few counts come again and again
def _tail(least: int, ones: int, twos: int) -> float:
    """P of a sum at least so large, of `ones` signs of 1 and `twos` of 2 that are fair coins."""
    heads = np.arange(twos + 1)
    needed = np.ceil((least - 2 * (2 * heads - twos) + ones) / 2)
    return float(binom.pmf(heads, twos, 0.5) @ binom.sf(needed - 1, ones, 0.5))


def discoveries(p: np.ndarray, least: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """Benjamini-Hochberg's q over the tests that could be significant at all (Tarone 1990, Gilbert 2005).

    Of a class in which four examples changed no p comes below 0.0625, so that it need not be corrected for.

    Args:
        p: float64 [m], p of tests of counts.
        least: float64 [m], the smallest p that each test could have had, whichever way its examples changed.
        level: False discovery rate that findings are held to.

    Returns:
        float64 [m]; 1 of a test that could not be significant.
    """
    found = np.ones(len(p))
    for most in range(1, len(p) + 1):
        kept = least <= level / most
        if kept.sum() <= most:
            if kept.any():
                found[kept] = false_discovery_control(p[kept])
            break
    return found


def shared_by_chance(one: Mapping[str, set[int]], other: Mapping[str, set[int]], widths: Mapping[str, int]) -> float:
    """P that random sets with as many neurons of each site share at least as many as these two.

    Args:
        one: Site -> neurons.
        other: Site -> neurons of the other set.
        widths: Site -> how many neurons it has.
    """
    shared, total = 0, np.ones(1)
    for site in one.keys() & other.keys():
        a, b = len(one[site]), len(other[site])
        shared += len(one[site] & other[site])
        total = np.convolve(total, hypergeom.pmf(np.arange(min(a, b) + 1), widths[site], a, b))
    return float(min(1.0, total[shared:].sum()))


def mean_limits(values: np.ndarray, z: float = Z) -> tuple[float, float]:
    """Limits of the mean of values [n] that are not bounded, by its standard error."""
    mean = float(values.mean())
    reach = z * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return mean - reach, mean + reach


def kl_divergence(base: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of each example's distribution from BASE's to NEW's, in nats, at least 0.

    Args:
        base: [n, K], log-probabilities.
        new: [n, K], log-probabilities.

    Returns:
        float64 [n].
    """
    p = base.astype(np.float64)
    with np.errstate(invalid="ignore"):  # a class that neither gives any probability
        gap = np.where(np.exp(p) > 0, p - new.astype(np.float64), 0.0)
    return np.maximum((np.exp(p) * gap).sum(1), 0.0)
