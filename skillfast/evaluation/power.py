"""What a test set can see: the power of the one-sided McNemar test, exact or mid-p, that a class loses."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom

POWER = 0.8


def loss_p(losses: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Exact one-sided p that a class loses, of examples from right to wrong and from wrong to right: [...] -> [...]."""
    return binom.sf(losses - 1, losses + gains, 0.5)


def power(n: int, chance: float, harm: float, level: float, *, mid: bool = False) -> float:
    """How often the test finds a harm.

    Args:
        n: Examples of the class.
        chance: Share of them that flips from right to wrong by chance, and as large a share from wrong to right.
        harm: Share that is lost beyond chance.
        level: Largest p that counts as a finding.
        mid: Whether the p is a mid-p, of which the losses that were seen count half.
    """
    changed = np.arange(n + 1)
    # fewest losses among the changed examples that are a finding; isf gives the last count that is not
    needed = binom.isf(level, changed, 0.5) + 1
    if mid:
        needed -= (loss_p(needed - 1, changed - needed + 1) + loss_p(needed, changed - needed)) / 2 <= level
    share = min(2 * chance + harm, 1.0)
    if share == 0:
        return 0.0
    found = binom.sf(needed - 1, changed, min((chance + harm) / share, 1.0))
    return float(binom.pmf(changed, n, share) @ found)


def smallest_visible(n: int, chance: float, level: float, *, mid: bool = False) -> float | None:
    """Smallest harm that the test finds in 80 % of the cases; None where it never finds one so often.

    Args:
        n: Examples of the class.
        chance: As for `power`.
        level: Largest p that counts as a finding.
        mid: As for `power`.
    """
    most = 1 - 2 * chance
    if most <= 0 or power(n, chance, most, level, mid=mid) < POWER:
        return None
    return float(brentq(lambda harm: power(n, chance, harm, level, mid=mid) - POWER, 0.0, most, xtol=1e-4))
