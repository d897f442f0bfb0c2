"""How far classes turn: the angle between a class's mean embedding before and after a removal."""

from __future__ import annotations

import numpy as np

from skillfast.evaluation.jackknife import GROUPS, deal

SMALLEST = 1e-14
"""1 - cosine below which float32's rounding of the embeddings decides: an angle of 0.00001 degrees."""


def angles(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, n_classes: int, groups: int = GROUPS
) -> tuple[np.ndarray, np.ndarray]:
    """Angle between each class's mean embedding before and after, both seen from the mean of all before.

    Means of few examples are noisy, and a product of two noisy means of the same examples holds their noise. So every
    product is one of means over disjoint halves of each class's examples (one half's mean before with the other's
    after, and so on), averaged over all splits into halves; it is unbiased, where whole means of few examples seem to
    turn by noise alone. The average has a closed form: the product of the whole means minus what each example's product
    with itself adds. An angle whose cosine comes out above 1 is 0.

    Args:
        before: [n, E], of the intact model.
        after: [n, E], of the same examples after a removal.
        labels: int64 [n].
        n_classes: K.
        groups: Groups of examples that are left out in turn, at most n.

    Returns:
        The angles in degrees, float64 [K], and without each group, float64 [groups, K]. NaN for a class with fewer than
        two examples, or whose mean lies no farther from the centre, before or after, than its noise.
    """
    groups = max(1, min(groups, len(labels)))
    dealt = deal(labels, groups)
    with np.errstate(invalid="ignore", over="ignore"):  # embeddings that overflowed
        centre = before.mean(0, dtype=np.float64)  # shifts both alike, so that squares do not cancel
        rows = [x.astype(np.float64) - centre for x in (before, after)]
        squares = [(x * y).sum(1) for x, y in ((rows[0], rows[0]), (rows[0], rows[1]), (rows[1], rows[1]))]
        found = np.empty((1 + groups, n_classes))
        whole = _sums(rows, squares, labels, n_classes)
        smallest = _rounding(before)
        weights = whole[0] / len(labels)  # of the classes in the centre; those of the data, whatever is left out
        found[0] = _degrees(whole, weights, smallest)
        for group in range(groups):
            out = dealt == group
            own = _sums([x[out] for x in rows], [x[out] for x in squares], labels[out], n_classes)
            left = whole[0] - own[0], whole[1] - own[1], whole[2] - own[2]
            found[1 + group] = _degrees(left, weights, smallest)
    return found[0], found[1:]


def _rounding(embeddings: np.ndarray) -> float:
    """Squared length that float32's rounding of the embeddings can make of nothing."""
    size = np.square(embeddings, dtype=np.float64).sum(1).mean()
    return float(size * np.finfo(np.float32).eps ** 2)


def _sums(
    rows: list[np.ndarray], squares: list[np.ndarray], labels: np.ndarray, n_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per class the number of examples [K], the sums of rows [2, K, E] and of products of a row with itself [3, K]."""
    order = np.argsort(labels)
    present, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    n, sums, own = np.zeros(n_classes), np.zeros((2, n_classes, rows[0].shape[1])), np.zeros((3, n_classes))
    n[present] = counts
    sums[:, present] = [np.add.reduceat(x[order], starts) for x in rows]
    own[:, present] = [np.add.reduceat(x[order], starts) for x in squares]
    return n, sums, own


def _degrees(totals: tuple[np.ndarray, np.ndarray, np.ndarray], weights: np.ndarray, smallest: float) -> np.ndarray:
    """Angles [K] from what `_sums` gives and the weights of the classes in the centre [K]."""
    n, sums, own = totals
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(n[:, None] > 0, sums / n[:, None], 0)  # [2, K, E]
        products = np.stack([(means[i] * means[j]).sum(1) for i, j in ((0, 0), (0, 1), (1, 1))])  # [3, K]
        noise = np.where(n > 1, (own / n - products) / (n - 1), 0)  # of a product of two means, [3, K]
        centre = weights @ means[0]
        shared = (weights**2 * noise[0]).sum()  # the centre's own noise
        u, v = means - centre
        before = (u * u).sum(1) - (shared + (1 - 2 * weights) * noise[0])
        across = (u * v).sum(1) - (shared + (1 - weights) * noise[1] - weights * noise[0])
        later = (v * v).sum(1) - (shared + noise[2] - 2 * weights * noise[1])
        away = 1 - across / np.sqrt(before * later)
        degrees = np.degrees(np.arccos(np.clip(1 - np.where(away < SMALLEST, 0, away), -1, 1)))
        return np.where((n > 1) & (np.minimum(before, later) > smallest), degrees, np.nan)
