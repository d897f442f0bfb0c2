"""Resamples of labelled examples, and intervals from them."""

from __future__ import annotations

import numpy as np


class Bootstrap:
    """Resamples of the test images, those of each class drawn among themselves.

    Args:
        labels: int64 [n]; every class from 0 to K - 1 has at least one image.
        replicates: Number of resamples.
        seed: Seed of the draws.
    """

    def __init__(self, labels: np.ndarray, replicates: int = 1000, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.replicates = replicates
        self.members = [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]
        self.weights = [  # [n_class, replicates], summing to 1 in each replicate
            rng.multinomial(len(m), np.full(len(m), 1 / len(m)), size=replicates).T / len(m) for m in self.members
        ]

    def own_class(self, change: np.ndarray) -> np.ndarray:
        """Resampled mean of each class's images: change [..., n] -> [..., K, replicates]."""
        return np.stack([change[..., m] @ w for m, w in zip(self.members, self.weights, strict=True)], -2)


class PairedBootstrap:
    """Resamples of labelled examples, those of each class drawn among themselves.

    What matters of an example is its class and its two predictions, so a resample is a multinomial draw of the counts
    of these; it costs the same for any number of examples.

    Args:
        labels: int64 [n].
        n_classes: How many classes.
        replicates: Number of resamples.
        seed: Seed of the draws, the same for every pair of predictions.
    """

    def __init__(self, labels: np.ndarray, n_classes: int, replicates: int = 1000, seed: int = 0) -> None:
        self.labels = labels
        self.n_classes = n_classes
        self.support = np.bincount(labels, minlength=n_classes)
        self.replicates = replicates
        self.seed = seed

    def counts(self, before: np.ndarray, after: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """For `before` and `after` [n]: resampled true positives and predictions of each class, [replicates, K]."""
        rng = np.random.default_rng(self.seed)
        found = [
            (np.zeros((self.replicates, self.n_classes)), np.zeros((self.replicates, self.n_classes))) for _ in "ab"
        ]
        for label, n in enumerate(self.support):
            if not n:
                continue
            member = self.labels == label
            pairs, counts = np.unique(np.stack([before[member], after[member]]), axis=1, return_counts=True)
            drawn = rng.multinomial(n, counts / n, size=self.replicates)  # [replicates, pairs]
            for (hits, predicted), classes in zip(found, pairs, strict=True):
                hits[:, label] += drawn[:, classes == label].sum(1)
                for column in np.unique(classes):
                    predicted[:, column] += drawn[:, classes == column].sum(1)
        return found


def interval(values: np.ndarray) -> list[float] | None:
    """The middle 95 % of bootstrap values; None where any end is not a number (a ratio over 0)."""
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(values, [0.025, 0.975])
    return [float(low), float(high)] if np.isfinite([low, high]).all() else None
