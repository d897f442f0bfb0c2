"""What a class loses by what takes the place of its skill's neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from skillfast.evaluation.intervals import Strata, difference_limits
from skillfast.results.bench import Replaced, ReplacedIntervals, Replacements

if TYPE_CHECKING:
    from collections.abc import Sequence

MARKED = 0.05  # difference of zero from mean or constants beyond which a drop is marked


def replacements(
    predictions: np.ndarray, intact: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> Replacements:
    """Drops under zeros, means, donors and optimal constants, by class and on average, with 95 % intervals.

    Args:
        predictions: int64 [4, n], each example with its own class's skill replaced, in that order.
        intact: int64 [n], of the intact model.
        labels: int64 [n]; every class has examples.
        classes: Class names.
    """
    before, after = intact == labels, predictions == labels
    changes = np.stack([before & ~after, ~before & after], 1).astype(np.float64)  # [4, 2, n], lost and gained

    def row(member: np.ndarray) -> Replaced:
        strata = Strata(labels[member])
        drops, ends = [], []
        for values in changes[..., member]:
            lost, gained = np.clip(strata.mean(values), 0, 1).tolist()  # sums of weights may miss 1 by an ulp
            drops.append(lost - gained)
            ends.append(list(difference_limits(lost, gained, strata.covariance(values), strata.effective)))
        zero, mean, resample, constant = drops
        return Replaced(
            zero=zero,
            mean=mean,
            resample=resample,
            constant=constant,
            marked=max(abs(zero - mean), abs(zero - constant)) > MARKED,
            ci95=ReplacedIntervals(*ends),
        )

    return Replacements(
        average=row(np.ones(len(labels), bool)),
        per_class={name: row(labels == c) for c, name in enumerate(classes)},
    )
