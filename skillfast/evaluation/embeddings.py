"""Cosine similarity, kNN accuracy and CKA before and after ablation, beside what the ablation costs the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import mode, rankdata
from sklearn import config_context
from sklearn.neighbors import NearestNeighbors

from skillfast.evaluation.resampling import interval, jackknife_interval
from skillfast.results.bench import (
    EmbeddingControl,
    EmbeddingIntervals,
    EmbeddingReasons,
    EmbeddingRemoval,
    StandardMetrics,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skillfast.evaluation.resampling import Bootstrap

N_NEIGHBOURS = 5
MAX_ANCHORS = 1000
ROWS = 256  # of similarities at a time
WORKING_MIB = 128  # of distances at a time; scikit-learn takes 1,024 unless told
GROUPS = 40  # of images, each left out once for the standard error of CKA
PER_IMAGE = ("cosine", "rank_preservation", "knn_accuracy_change")


@dataclass(frozen=True)
class Comparison:
    """Embeddings after a removal beside those before.

    Attributes:
        cosine: float64 [n], similarity of each image's embedding before and after; NaN where one has no direction.
        rank_preservation: float64 [n], Spearman's rho of each image's row of similarities before and after; NaN besides
            where the image is no anchor, or all of a row are equal.
        knn_accuracy_change: float64 [n], right after minus right before; NaN besides where the class has no second
            image, or too few images are left.
        cka: Linear CKA; NaN for constant embeddings.
        cka_left_out: float64 [groups], likewise without each group of images in turn.
        undefined: int64, the images whose embedding is zero or not finite before or after; left out everywhere.
    """

    cosine: np.ndarray
    rank_preservation: np.ndarray
    knn_accuracy_change: np.ndarray
    cka: float
    cka_left_out: np.ndarray
    undefined: np.ndarray


class EmbeddingMetrics:
    """The usual metrics of embeddings, relative to the intact model's.

    Neighbours are other test images, the image itself left out: before and after alike they are embedded by the model
    that is judged, and no image that chose the skill is among them.

    Memory: about 3 float64 copies of [n, E], and 2 of [anchors, n]: 0.5 GB for n = 10,000 and E = 768.

    Args:
        embeddings: [n, E], of the intact model.
        labels: int64 [n].
        n_neighbours: Neighbours that vote.
        max_anchors: Images whose neighbours are ranked, at most; a random choice of them beyond.
        seed: Seed of the choice of images.
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        labels: np.ndarray,
        *,
        n_neighbours: int = N_NEIGHBOURS,
        max_anchors: int = MAX_ANCHORS,
        seed: int = 0,
    ) -> None:
        self.embeddings = embeddings
        self.labels = labels
        self.settings = {"n_neighbours": n_neighbours, "max_anchors": max_anchors, "seed": seed}
        self.has_direction = _has_direction(embeddings)
        if not self.has_direction.all():
            return  # compare() takes what is left
        n = len(labels)
        self.anchors = np.sort(np.random.default_rng(seed).permutation(n)[:max_anchors])
        self.unit = _unit(embeddings)
        self.ranks = _standard_ranks(self.unit, self.anchors)
        self.right = self._right(embeddings)
        self.cka = Alignment(embeddings, labels)

    def compare(self, embeddings: np.ndarray) -> Comparison:
        """The metrics of the same images' embeddings [n, E] after a removal."""
        kept = self.has_direction & _has_direction(embeddings)
        if not kept.all():
            return self._compare_kept(embeddings, kept)
        unit = _unit(embeddings)
        rho = np.full(len(unit), np.nan)
        rho[self.anchors] = (self.ranks * _standard_ranks(unit, self.anchors)).sum(1)
        cka, left_out = self.cka.compare(embeddings)
        return Comparison(
            cosine=(self.unit * unit).sum(1),
            rank_preservation=rho,
            knn_accuracy_change=self._right(embeddings) - self.right,
            cka=cka,
            cka_left_out=left_out,
            undefined=np.empty(0, np.int64),
        )

    def _compare_kept(self, embeddings: np.ndarray, kept: np.ndarray) -> Comparison:
        """The metrics of the images that have a direction before and after."""
        rows = {name: np.full(len(kept), np.nan) for name in PER_IMAGE}
        cka, left_out = np.nan, np.full(GROUPS, np.nan)
        if kept.any():
            whole = EmbeddingMetrics(self.embeddings[kept], self.labels[kept], **self.settings)
            found = whole.compare(embeddings[kept])
            cka, left_out = found.cka, found.cka_left_out
            for name, row in rows.items():
                row[kept] = getattr(found, name)
        return Comparison(**rows, cka=cka, cka_left_out=left_out, undefined=np.flatnonzero(~kept))

    def knn_accuracy(self) -> float | None:
        """Accuracy of the intact model's nearest neighbours over the images that can be judged; None where none can."""
        kept = self.has_direction
        if not kept.any():
            return None
        whole = self if kept.all() else EmbeddingMetrics(self.embeddings[kept], self.labels[kept], **self.settings)
        return _mean(whole.right)

    def _right(self, embeddings: np.ndarray) -> np.ndarray:
        """Whether each image's neighbours vote for its class: 1.0, 0.0, or NaN where they cannot."""
        n_neighbours = self.settings["n_neighbours"]
        if len(self.labels) <= n_neighbours:
            return np.full(len(self.labels), np.nan)
        index = NearestNeighbors(n_neighbors=n_neighbours, metric="cosine").fit(embeddings)
        with config_context(working_memory=WORKING_MIB):
            votes = self.labels[index.kneighbors(return_distance=False)]  # [n, n_neighbours], without the image itself
        # as in KNeighborsClassifier, the first of equally many votes wins
        right = (mode(votes, axis=1).mode == self.labels).astype(np.float64)
        right[np.bincount(self.labels)[self.labels] == 1] = np.nan  # no neighbour could be of its class
        return right


class Alignment:
    """Linear centred kernel alignment (CKA; Kornblith et al., 2019) of embeddings with those of the intact model.

    Its standard error is that of a jackknife: images are dealt out to groups, each class's evenly, and each group is
    left out in turn, which takes products of a few rows; a bootstrap would take products of all of them each time.

    Args:
        embeddings: [n, E], of the intact model.
        labels: int64 [n].
        groups: How many, at most n.
    """

    def __init__(self, embeddings: np.ndarray, labels: np.ndarray, groups: int = GROUPS) -> None:
        self.before = _centred(embeddings)
        dealt = np.empty(len(labels), np.int64)
        dealt[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % groups
        self.groups = [np.flatnonzero(dealt == group) for group in range(groups)]
        self.own = None if self.before is None else self._products(self.before, self.before)

    def compare(self, embeddings: np.ndarray) -> tuple[float, np.ndarray]:
        """CKA with embeddings [n, F], and float64 [groups] without each group; NaN for constant embeddings."""
        after = _centred(embeddings)
        if self.before is None or self.own is None or after is None:
            return np.nan, np.full(len(self.groups), np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            cka = self._products(self.before, after) / np.sqrt(self.own * self._products(after, after))
        return float(cka[0]), cka[1:]

    def _products(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Squared Frobenius norms of the cross-covariance (times n): of all images, then without each group."""
        whole = x.T @ y
        norms = [np.square(whole).sum()]
        for rows in self.groups:
            left = len(x) - len(rows)
            # centred on the mean of those that are left, whose sum is minus that of the group
            shift = np.outer(x[rows].sum(0), y[rows].sum(0)) / max(1, left)
            norms.append(np.square(whole - x[rows].T @ y[rows] - shift).sum())
        return np.array(norms)


def linear_cka(before: np.ndarray, after: np.ndarray) -> float:
    """Linear CKA of [n, E] and [n, F]; NaN for constant embeddings."""
    return Alignment(before, np.zeros(len(before), np.int64), groups=1).compare(after)[0]


def _has_direction(embeddings: np.ndarray) -> np.ndarray:
    """Whether each embedding is finite and not zero, bool [n]."""
    return np.isfinite(embeddings).all(1) & (embeddings != 0).any(1)


def _unit(embeddings: np.ndarray) -> np.ndarray:
    wide = embeddings.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def _standard_ranks(unit: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Ranks of each anchor's similarities to the other images, centred, of length 1: float64 [anchors, n - 1].

    The similarity to itself is always 1 and left out. NaN where all similarities are equal.
    """
    n = len(unit)
    if n < 3:  # one other image has no order
        return np.full((len(anchors), 1), np.nan)
    ranks = np.empty((len(anchors), n - 1))
    for start in range(0, len(anchors), ROWS):
        rows = anchors[start : start + ROWS]
        others = np.arange(n) != rows[:, None]  # [rows, n]
        # rounding that makes equal similarities differ in the last digits is not an order
        similarities = np.round(unit[rows] @ unit.T, 12)[others].reshape(len(rows), n - 1)
        ranks[start : start + ROWS] = rankdata(similarities, axis=1)
    ranks -= n / 2  # the mean of 1 to n - 1
    length = np.linalg.norm(ranks, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        ranks /= length
    return ranks


def _centred(embeddings: np.ndarray) -> np.ndarray | None:
    """float64 [n, E] without its mean; None where float32's rounding alone is left."""
    wide = embeddings.astype(np.float64)
    centred = wide - wide.mean(0)
    return centred if np.linalg.norm(centred) > np.finfo(np.float32).eps * np.linalg.norm(wide) else None


def _mean(values: np.ndarray) -> float | None:
    """Mean of what is defined; None where nothing is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None


def standard_metrics(
    metrics: EmbeddingMetrics,
    comparisons: Sequence[Comparison],
    drops: np.ndarray,
    classes: Sequence[str],
    bootstrap: Bootstrap,
    controls: Sequence[Comparison] = (),
) -> StandardMetrics:
    """Means of the embedding metrics over the removals, and each removal's own.

    Args:
        metrics: metrics of the intact model's embeddings.
        comparisons: After the removal of each class's skill, K of them.
        drops: float64 [K], loss in accuracy of each class when its own skill is removed.
        classes: Class names.
        bootstrap: Resamples of the n images.
        controls: After the removal of as many neurons at random for each class, K of them, or none.

    Returns:
        Means over the removals with intervals, and each removal's own values; `reasons` names what was left out.
    """
    labels = metrics.labels
    per_class = {
        name: _one_removal(found, i, labels, drops[i], len(classes))
        for i, (name, found) in enumerate(zip(classes, comparisons, strict=True))
    }

    def mean(key: str) -> float | None:
        return _mean(np.array([getattr(row, key) for row in per_class.values()], dtype=np.float64))

    weights = np.zeros((len(labels), bootstrap.replicates))
    for member, drawn in zip(bootstrap.members, bootstrap.weights, strict=True):
        weights[member] = drawn * len(member)
    rows = {key: np.stack([getattr(found, key) for found in comparisons]) for key in PER_IMAGE}
    own = np.where(labels == np.arange(len(classes))[:, None], rows["knn_accuracy_change"], np.nan)
    return StandardMetrics(
        **{key: mean(key) for key in (*PER_IMAGE, "cka", "target_knn_accuracy_change")},
        knn_accuracy=metrics.knn_accuracy(),
        target_drop=_mean(drops),
        n_neighbours=metrics.settings["n_neighbours"],
        n_ranked=min(len(labels), metrics.settings["max_anchors"]),
        ci95=EmbeddingIntervals(
            **{key: interval(_resampled(values, weights)) for key, values in rows.items()},
            cka=_cka_interval(comparisons),
            target_knn_accuracy_change=interval(_resampled(own, weights)),
        ),
        random_control=_control(controls, labels, len(classes)) if controls else None,
        per_class=per_class,
        reasons=_reasons(comparisons, labels, classes),
    )


def _cka_interval(comparisons: Sequence[Comparison]) -> list[float] | None:
    """Interval of the mean CKA over the removals that have one."""
    defined = [found for found in comparisons if np.isfinite(found.cka)]
    if not defined:
        return None
    mean = float(np.mean([found.cka for found in defined]))
    return jackknife_interval(mean, np.mean([found.cka_left_out for found in defined], axis=0), 0.0, 1.0)


def _control(controls: Sequence[Comparison], labels: np.ndarray, n_classes: int) -> EmbeddingControl:
    """What the random control does to the same metrics: means over the removals."""
    rows = [_one_removal(found, i, labels, np.nan, n_classes) for i, found in enumerate(controls)]
    keys = (*PER_IMAGE, "cka", "target_knn_accuracy_change")
    return EmbeddingControl(
        **{key: _mean(np.array([getattr(row, key) for row in rows], dtype=np.float64)) for key in keys}
    )


def _one_removal(found: Comparison, target: int, labels: np.ndarray, drop: float, n_classes: int) -> EmbeddingRemoval:
    knn = [_mean(found.knn_accuracy_change[labels == j]) for j in range(n_classes)]
    return EmbeddingRemoval(
        **{key: _mean(getattr(found, key)) for key in PER_IMAGE},
        cka=None if np.isnan(found.cka) else found.cka,
        target_drop=None if np.isnan(drop) else float(drop),
        target_knn_accuracy_change=knn[target],
        knn_accuracy_change_per_class=knn,
    )


def _resampled(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means over images, then over removals: values [K, n], weights [n, replicates] -> [replicates]."""
    defined = ~np.isnan(values)
    some = defined.any(1)
    with np.errstate(invalid="ignore"):
        means = np.where(defined, values, 0)[some] @ weights / (defined[some].astype(np.float64) @ weights)
    return means.mean(0) if len(means) else np.full(weights.shape[1], np.nan)


def _reasons(comparisons: Sequence[Comparison], labels: np.ndarray, classes: Sequence[str]) -> EmbeddingReasons | None:
    """Why images or values are missing, and of which classes or removals."""
    counts = np.bincount(labels, minlength=len(classes))
    pairs = list(zip(classes, comparisons, strict=True))
    reasons: dict[str, Any] = {
        "one_image": [name for name, count in zip(classes, counts, strict=True) if count == 1],
        "no_images": [name for name, count in zip(classes, counts, strict=True) if count == 0],
        "zero_or_not_finite": {name: len(found.undefined) for name, found in pairs if len(found.undefined)},
        "constant_embeddings": [
            name for name, found in pairs if np.isnan(found.cka) and len(found.undefined) < len(labels)
        ],
    }
    named = {reason: where for reason, where in reasons.items() if where}
    return EmbeddingReasons(**named) if named else None
