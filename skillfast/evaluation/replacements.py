"""What a class loses by what takes the place of its skill's neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from skillfast.results.bench import Replaced, Replacements

if TYPE_CHECKING:
    from collections.abc import Sequence

MARKED = 0.05  # difference of zero and mean beyond which a class is marked


def replacements(
    predictions: np.ndarray, intact: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> Replacements:
    """Drops under zeros, means, donors and optimal constants, by class and on average.

    Args:
        predictions: int64 [4, n], each example with its own class's skill replaced, in that order.
        intact: int64 [n], of the intact model.
        labels: int64 [n]; every class has examples.
        classes: Class names.
    """
    lost = (intact == labels).astype(np.float64) - (predictions == labels)
    drops = np.stack([lost[:, labels == c].mean(1) for c in range(len(classes))])  # [K, 4]

    def row(values: np.ndarray) -> Replaced:
        zero, mean, resample, constant = map(float, values)
        return Replaced(zero=zero, mean=mean, resample=resample, constant=constant, marked=abs(zero - mean) > MARKED)

    return Replacements(average=row(drops.mean(0)), per_class=dict(zip(classes, map(row, drops), strict=True)))
