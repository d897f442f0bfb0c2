"""How many neurons two sets share by chance: random sets with as many neurons of each site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class SharedByChance:
    """The number of neurons that two random sets share: a sum of hypergeometric numbers, one of each site.

    Attributes:
        mean: Expected number, the sum of a b / width.
        low: Lower end of the central 95 %.
        high: Upper end.
        probabilities: float64 [most + 1], of 0, 1, ... shared neurons.
    """

    mean: float
    low: int
    high: int
    probabilities: np.ndarray

    def p_of(self, shared: int) -> float:
        """How probable as many or more are."""
        return float(min(1.0, self.probabilities[shared:].sum()))


def shared_by_chance(one: Sequence[int], other: Sequence[int], widths: Sequence[int]) -> SharedByChance:
    """What random sets share that have as many neurons of each site.

    Args:
        one: Neurons of one set, per site.
        other: Neurons of the other set, per site.
        widths: Neurons of each site.
    """
    total = np.ones(1)
    for a, b, width in zip(one, other, widths, strict=True):
        total = np.convolve(total, stats.hypergeom(width, a, b).pmf(np.arange(min(a, b) + 1)))
    below = np.cumsum(total)
    low, high = (int(np.searchsorted(below, level)) for level in (0.025, 0.975))
    return SharedByChance(float(total @ np.arange(len(total))), low, min(high, len(total) - 1), total)
