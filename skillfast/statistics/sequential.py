"""A two-sample test that holds at every look: whether what comes is still like a reference.

Each value gets its rank among the reference and all that came before it. Where the reference and the stream are
exchangeable these conformal p-values are independent and uniform, however small the reference is. A bettor stakes money
on their not being so; in a fair game it ever exceeds 1 / alpha with a probability of alpha at most (Ville). Part of the
money waits for later changes, so that a change after a long quiet is found as well.

Sources: Vovk, Nouretdinov and Gammerman, "Testing exchangeability on-line", ICML 2003, for p-values and martingale;
Shekhar and Ramdas, "Nonparametric two-sample testing by betting", arXiv 2112.09162, for tests by betting; Shin, Ramdas
and Rinaldo, "E-detectors", arXiv 2203.03532, for money that waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SLOPES = (0.1, 0.3, 0.9)  # of bets on a small, a middling and a large shift
_POWER = 0.3  # of bets on values beyond all others


def _bets() -> tuple[Callable[[np.ndarray], np.ndarray], ...]:
    """Densities on [0, 1], what each bet pays at a p-value: lower, higher, wider and narrower values."""
    shifts = [lambda p, s=sign * slope: 1 + s * (2 * p - 1) for slope in _SLOPES for sign in (-1, 1)]
    far = [lambda p: _POWER * p ** (_POWER - 1), lambda p: _POWER * (1 - p) ** (_POWER - 1)]
    return (*shifts, *far, lambda p: (far[0](p) + far[1](p)) / 2, lambda p: 6 * p * (1 - p))


class DriftTest:
    """Evidence that a stream is no longer like a reference.

    `evidence` may be looked at after every value, for ever: without a change it exceeds log(1 / alpha) at any time with
    a probability of at most alpha. It holds where values come in random order; a stream whose mix of inputs changes has
    changed. All values are kept, 8 bytes each.

    Args:
        reference: [n], values before anything has changed; 100 and more make early changes visible.
        seed: Seed of the order of equal values.
    """

    def __init__(self, reference: Sequence[float] | np.ndarray, seed: int = 0) -> None:
        self._seen = np.sort(np.asarray(reference, dtype=np.float64))
        self._rng = np.random.default_rng(seed)
        self._tested = 0
        self._staked = np.full(len(_BETS), -np.inf)  # logarithm of the money in each bet

    @property
    def evidence(self) -> float:
        """Logarithm of the bettor's money, which was 1: the larger, the surer it is that something has changed."""
        waiting = -np.log(np.log2(self._tested + 2))
        return float(np.logaddexp(waiting, np.logaddexp.reduce(self._staked) - np.log(len(_BETS))))

    def update(self, values: Sequence[float] | np.ndarray) -> float:
        """Look at values [n] in the order in which they came; returns the largest `evidence` on the way."""
        x = np.asarray(values, dtype=np.float64)
        if not len(x):
            return self.evidence
        p = self._p_values(x)
        times = self._tested + np.arange(len(x))
        # Money 1 / log2(t + 2) - 1 / log2(t + 3) of each bet goes to work at time t; all of it is 1.
        wages = np.log(1 / np.log2(times + 2) - 1 / np.log2(times + 3))
        grown = np.log(np.stack([bet(p) for bet in _BETS], 1)).cumsum(0)  # [n, bets]
        before = np.vstack([np.zeros(len(_BETS)), grown[:-1]])
        brought_in = np.logaddexp.accumulate(np.vstack([self._staked, wages[:, None] - before]), 0)[1:]
        money = brought_in + grown
        waiting = -np.log(np.log2(times + 3))
        evidence = np.logaddexp(waiting, np.logaddexp.reduce(money, 1) - np.log(len(_BETS)))
        self._staked, self._tested = money[-1], self._tested + len(x)
        self._seen = np.insert(self._seen, np.searchsorted(self._seen, np.sort(x)), np.sort(x))
        return float(evidence.max())

    def _p_values(self, x: np.ndarray) -> np.ndarray:
        """Rank of each value among all before it, and a random place among equal ones, in (0, 1)."""
        earlier = np.tri(len(x), k=-1, dtype=bool)  # [later, earlier]
        below = np.searchsorted(self._seen, x) + (earlier & (x[None] < x[:, None])).sum(1)
        equal = np.searchsorted(self._seen, x, side="right") - np.searchsorted(self._seen, x)
        equal = equal + (earlier & (x[None] == x[:, None])).sum(1) + 1
        place = np.clip(self._rng.random(len(x)), 1e-12, 1 - 1e-12)
        return (below + place * equal) / (len(self._seen) + np.arange(len(x)) + 1)


_BETS = _bets()
