"""Cosine similarity, kNN accuracy and CKA before and after ablation, beside what the ablation costs the target."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import mode, rankdata
from sklearn import config_context
from sklearn.neighbors import NearestNeighbors

from skillfast.evaluation.jackknife import GROUPS, deal, jackknife_interval, means_without, variance_of_mean
from skillfast.results.bench import (
    EmbeddingControl,
    EmbeddingDifference,
    EmbeddingIntervals,
    EmbeddingReasons,
    EmbeddingRemoval,
    StandardMetrics,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

N_NEIGHBOURS = 5
MAX_ANCHORS = 1000
ROWS = 256  # of similarities at a time
WORKING_MIB = 128  # of distances at a time; scikit-learn takes 1,024 unless told
PER_IMAGE = ("cosine", "rank_preservation", "knn_accuracy_change")
KEYS = (*PER_IMAGE, "cka", "target_knn_accuracy_change")


@dataclass(frozen=True)
class Comparison:
    """Embeddings after a removal beside those before, without the coordinates that the removal itself writes.

    Attributes:
        cosine: float64 [n], similarity of each image's embedding before and after; NaN where one has no direction.
        rank_preservation: float64 [n], Spearman's rho of each image's row of similarities before and after; NaN besides
            where the image is no anchor, or all of a row are equal.
        rank_influence: float64 [n], what each image adds to the mean of `rank_preservation`, as an anchor and as a
            neighbour of all others; it sums to 0.
        knn_accuracy_change: float64 [n], right after minus right before; NaN besides where the class has no second
            image, or too few images are left.
        cka: Debiased linear CKA; NaN for constant embeddings.
        cka_left_out: float64 [groups], likewise without each group of images in turn.
        undefined: int64, the images whose embedding is zero or not finite before or after; left out everywhere.
        n_written: Coordinates that the removal itself writes.
    """

    cosine: np.ndarray
    rank_preservation: np.ndarray
    rank_influence: np.ndarray
    knn_accuracy_change: np.ndarray
    cka: float
    cka_left_out: np.ndarray
    undefined: np.ndarray
    n_written: int


class EmbeddingMetrics:
    """The usual metrics of embeddings, relative to the intact model's.

    Neighbours are other test images, the image itself left out: before and after alike they are embedded by the model
    that is judged, and no image that chose the skill is among them.

    Memory: about 3 float64 copies of [n, E], and a few of [256, n].

    Args:
        embeddings: [n, E], of the intact model.
        labels: int64 [n].
        n_neighbours: Neighbours that vote.
        max_anchors: Images whose neighbours are ranked, at most; a random choice of them beyond.
        seed: Seed of the choice of images.
        dealt: int64 [n], groups of images that are left out in turn; by default `deal(labels)`.
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        labels: np.ndarray,
        *,
        n_neighbours: int = N_NEIGHBOURS,
        max_anchors: int = MAX_ANCHORS,
        seed: int = 0,
        dealt: np.ndarray | None = None,
    ) -> None:
        self.embeddings = embeddings
        self.labels = labels
        self.settings = {"n_neighbours": n_neighbours, "max_anchors": max_anchors, "seed": seed}
        self.dealt = deal(labels, GROUPS) if dealt is None else dealt
        self.has_direction = _has_direction(embeddings)

    def compare(self, embeddings: np.ndarray, written: np.ndarray | Sequence[int] = ()) -> Comparison:
        """Compare with the same images' embeddings after a removal.

        Args:
            embeddings: [n, E].
            written: Coordinates that the removal itself writes, such as the neurons of the head that it sets to 0. What
                it does to them says nothing of the model, so they are left out, before and after.
        """
        if not len(written):
            return self._compare(embeddings, 0)
        kept = np.delete(np.arange(embeddings.shape[1]), written)
        part = EmbeddingMetrics(self.embeddings[:, kept], self.labels, **self.settings, dealt=self.dealt)
        return part._compare(embeddings[:, kept], len(written))

    def _compare(self, embeddings: np.ndarray, n_written: int) -> Comparison:
        """The metrics over all coordinates."""
        kept = self.has_direction & _has_direction(embeddings)
        n, groups = len(kept), int(self.dealt.max()) + 1
        rows = {name: np.full(n, np.nan) for name in (*PER_IMAGE, "rank_influence")}
        cka, left_out = np.nan, np.full(groups, np.nan)
        if kept.any():
            part = self if kept.all() else self._rows(kept)
            after = embeddings[kept]
            unit = _unit(after)
            rows["cosine"][kept] = (part._unit * unit).sum(1)
            rows["rank_preservation"][kept], rows["rank_influence"][kept] = order_kept(part._unit, unit, part._anchors)
            rows["knn_accuracy_change"][kept] = part._right_of(after) - part._right
            cka, left_out = Alignment(part.embeddings, part.dealt, groups).compare(after)
        return Comparison(**rows, cka=cka, cka_left_out=left_out, undefined=np.flatnonzero(~kept), n_written=n_written)

    def knn_accuracy(self) -> float | None:
        """Accuracy of the intact model's nearest neighbours over the images that can be judged; None where none can."""
        kept = self.has_direction
        return _mean((self if kept.all() else self._rows(kept))._right)

    def _rows(self, kept: np.ndarray) -> EmbeddingMetrics:
        """The metrics of some of the images alone."""
        return EmbeddingMetrics(self.embeddings[kept], self.labels[kept], **self.settings, dealt=self.dealt[kept])

    @cached_property
    def _anchors(self) -> np.ndarray:
        drawn = np.random.default_rng(self.settings["seed"]).permutation(len(self.labels))
        return np.sort(drawn[: self.settings["max_anchors"]])

    @cached_property
    def _unit(self) -> np.ndarray:
        return _unit(self.embeddings)

    @cached_property
    def _right(self) -> np.ndarray:
        return self._right_of(self.embeddings)

    def _right_of(self, embeddings: np.ndarray) -> np.ndarray:
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
    """Debiased linear centred kernel alignment (CKA) of embeddings with those of the intact model.

    CKA from few images is near 1 whatever the embeddings, since each image's product with itself counts. The unbiased
    estimate of the Hilbert-Schmidt independence criterion leaves those out (Song et al., "Feature selection via
    dependence maximization", 2012; for CKA Nguyen et al., "Do wide and deep networks learn the same things?", 2021).
    With a linear kernel it needs no matrix over the images.

    Args:
        embeddings: [n, E], of the intact model.
        dealt: int64 [n], the group of each image.
        groups: How many groups, each left out in turn.
    """

    def __init__(self, embeddings: np.ndarray, dealt: np.ndarray, groups: int) -> None:
        self.before = _centred(embeddings)
        self.groups = [np.flatnonzero(dealt == group) for group in range(groups)]
        self.own = None if self.before is None else self._dependence(self.before, self.before)

    def compare(self, embeddings: np.ndarray) -> tuple[float, np.ndarray]:
        """CKA with embeddings [n, F], and float64 [groups] without each group; NaN for constant embeddings."""
        after = _centred(embeddings)
        if self.before is None or self.own is None or after is None:
            return np.nan, np.full(len(self.groups), np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            cka = self._dependence(self.before, after) / np.sqrt(self.own * self._dependence(after, after))
        return float(cka[0]), cka[1:]

    def _dependence(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The unbiased criterion: of all images, then without each group."""
        whole = _Sums.of(x, y)
        return np.array([whole.dependence()] + [(whole - _Sums.of(x[g], y[g])).dependence() for g in self.groups])


@dataclass(frozen=True)
class _Sums:
    """Sums over images that the unbiased criterion of two linear kernels is made of."""

    n: int
    product: np.ndarray  # x^T y
    x: np.ndarray  # sum of the rows
    y: np.ndarray
    x_size: float  # sum of the rows' squared lengths
    y_size: float
    x_by_y_size: np.ndarray  # sum of the rows of x, each times the squared length of y's
    y_by_x_size: np.ndarray
    sizes: float  # sum of the products of both squared lengths

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> _Sums:
        a, b = np.square(x).sum(1), np.square(y).sum(1)
        return cls(len(x), x.T @ y, x.sum(0), y.sum(0), a.sum(), b.sum(), b @ x, a @ y, a @ b)

    def __sub__(self, other: _Sums) -> _Sums:
        return _Sums(**{name: value - getattr(other, name) for name, value in vars(self).items()})

    def dependence(self) -> float:
        """Equation 4 of Song et al.; NaN for fewer than 4 images."""
        n = self.n
        if n < 4:
            return np.nan
        trace = np.square(self.product).sum() - self.sizes
        totals = (self.x @ self.x - self.x_size) * (self.y @ self.y - self.y_size)
        rows = self.x @ self.product @ self.y - self.x @ self.x_by_y_size - self.y @ self.y_by_x_size + self.sizes
        return float((trace + totals / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3)))


def order_kept(before: np.ndarray, after: np.ndarray, anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the order of each anchor's similarities to all other images is kept, and what each image adds to that.

    Args:
        before: float64 [n, E], embeddings of length 1.
        after: float64 [n, F], of the same images.
        anchors: int64 [anchors], images whose rows are ranked.

    Returns:
        Spearman's rho of each row, float64 [n], NaN for an image that is no anchor and where all of a row are equal.
        And the influence of each image on the mean rho, float64 [n]: the derivative of that mean by the image's weight
        (the infinitesimal jackknife), as an anchor and as an image that others are ranked by. Without a group of
        images the mean changes by minus the sum of theirs over the number of those left, up to terms of order 1 / n.
    """
    n, others = len(before), len(before) - 1
    rho, influence = np.full(n, np.nan), np.zeros(n)
    if n < 3:  # one other image has no order
        return rho, np.full(n, np.nan)
    for start in range(0, len(anchors), ROWS):
        rows = anchors[start : start + ROWS]
        (u, order_u, length_u), (w, order_w, length_w) = (_ranks(unit, rows) for unit in (before, after))
        with np.errstate(invalid="ignore", divide="ignore"):
            found = (u * w).sum(1)
            # a neighbour's own product of ranks, and the ranks of all that stand above it, which its weight moves
            moved = u * w + _above(w, order_u) / length_u[:, None] + _above(u, order_w) / length_w[:, None]
        added = others * moved - 3 * found[:, None]
        added[np.arange(len(rows)), rows] = 0
        rho[rows] = found
        influence += added[~np.isnan(found)].sum(0)
    defined = ~np.isnan(rho)
    if not defined.any():
        return rho, np.full(n, np.nan)
    influence[defined] += n * (rho[defined] - rho[defined].mean())
    return rho, influence / defined.sum()


def _ranks(unit: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks of some images' similarities to all others, centred, of length 1: [rows, n], 0 for the image itself.

    And the order of each row, the image itself first, and the length of its centred ranks [rows], 0 for a row of equal
    similarities, whose ranks are NaN.
    """
    n, own = len(unit), (np.arange(len(rows)), rows)
    # rounding that makes equal similarities differ in the last digits is not an order
    similarities = np.round(unit[rows] @ unit.T, 12)
    similarities[own] = -np.inf
    order = np.argsort(similarities, axis=1)
    in_order = np.take_along_axis(similarities, order, 1)
    if (in_order[:, 1:] == in_order[:, :-1]).any():
        ranks = rankdata(similarities, axis=1) - 1
    else:
        ranks = np.empty(similarities.shape)
        np.put_along_axis(ranks, order, np.arange(n, dtype=np.float64)[None], 1)
    ranks -= n / 2  # the mean of 1 to n - 1
    ranks[own] = 0
    length = np.linalg.norm(ranks, axis=1)
    with np.errstate(invalid="ignore"):
        ranks /= length[:, None]
    return ranks, order, length


def _above(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """For each column the sum of a row's values that come later in its order, and half its own: [rows, n]."""
    in_order = np.take_along_axis(values, order, 1)
    later = np.cumsum(in_order[:, ::-1], 1)[:, ::-1] - in_order / 2
    out = np.empty_like(later)
    np.put_along_axis(out, order, later, 1)
    return out


def _has_direction(embeddings: np.ndarray) -> np.ndarray:
    """Whether each embedding is finite and not zero, bool [n]."""
    return np.isfinite(embeddings).all(1) & (embeddings != 0).any(1)


def _unit(embeddings: np.ndarray) -> np.ndarray:
    wide = embeddings.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


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
    controls: Sequence[Comparison] = (),
) -> StandardMetrics:
    """Means of the embedding metrics over the removals, each removal's own, and what random neurons do.

    Args:
        metrics: Metrics of the intact model's embeddings.
        comparisons: After the removal of each class's skill, K of them.
        drops: float64 [K], loss in accuracy of each class when its own skill is removed.
        classes: Class names.
        controls: After the removal of as many neurons at random, any number of draws of K, draw by draw; or none.

    Returns:
        Means over the removals with intervals, and each removal's own values; `reasons` names what was left out.
    """
    labels, k = metrics.labels, len(classes)
    skills = _Estimates.of(comparisons, metrics, k)
    drawn = _Estimates.of(controls, metrics, k) if controls else None
    per_class = {
        name: EmbeddingRemoval(
            **{key: _number(skills.values[key][0, i]) for key in KEYS},
            target_drop=_number(drops[i]),
            knn_accuracy_change_per_class=[_mean(found.knn_accuracy_change[labels == j]) for j in range(k)],
            coordinates_left_out=found.n_written,
        )
        for i, (name, found) in enumerate(zip(classes, comparisons, strict=True))
    }
    return StandardMetrics(
        **{key: skills.mean(key) for key in KEYS},
        knn_accuracy=metrics.knn_accuracy(),
        target_drop=_mean(drops),
        n_neighbours=metrics.settings["n_neighbours"],
        n_ranked=min(len(labels), metrics.settings["max_anchors"]),
        ci95=EmbeddingIntervals(
            **{key: jackknife_interval(skills.mean(key), skills.mean_left_out(key), -1.0, 1.0) for key in KEYS}
        ),
        random_control=None if drawn is None else EmbeddingControl(**{key: drawn.mean(key) for key in KEYS}),
        difference=None if drawn is None else _difference(skills, drawn),
        per_class=per_class,
        reasons=_reasons(comparisons, labels, classes),
    )


@dataclass(frozen=True)
class _Estimates:
    """Each metric of some removals.

    Attributes:
        values: By metric, float64 [draws, K]; NaN where not defined.
        left_out: By metric, float64 [draws, K, groups], without each group of images.
    """

    values: dict[str, np.ndarray]
    left_out: dict[str, np.ndarray]

    @staticmethod
    def of(comparisons: Sequence[Comparison], metrics: EmbeddingMetrics, n_classes: int) -> _Estimates:
        """Estimate from removals in rounds of one per class."""
        groups = int(metrics.dealt.max()) + 1
        rows = {key: np.stack([getattr(found, key) for found in comparisons]) for key in PER_IMAGE}  # [removals, n]
        target = np.arange(len(comparisons)) % n_classes
        rows["target_knn_accuracy_change"] = np.where(
            metrics.labels == target[:, None], rows["knn_accuracy_change"], np.nan
        )
        values = {key: _row_means(row) for key, row in rows.items()}
        influence = {key: row - values[key][:, None] for key, row in rows.items()}
        influence["rank_preservation"] = np.stack([found.rank_influence for found in comparisons])
        left_out = {
            key: values[key][:, None] + means_without(row, metrics.dealt, groups) for key, row in influence.items()
        }
        values["cka"] = np.array([found.cka for found in comparisons])
        left_out["cka"] = np.stack([found.cka_left_out for found in comparisons])
        return _Estimates(
            {key: values[key].reshape(-1, n_classes) for key in KEYS},
            {key: left_out[key].reshape(-1, n_classes, groups) for key in KEYS},
        )

    def mean(self, key: str) -> float | None:
        """Mean over the removals that have a value."""
        return _mean(self.values[key])

    def mean_left_out(self, key: str) -> np.ndarray:
        """Mean without each group of images, float64 [groups]."""
        defined = ~np.isnan(self.values[key])
        rows = self.left_out[key][defined]
        return rows.mean(0) if len(rows) else np.full(rows.shape[1], np.nan)


def _difference(skills: _Estimates, drawn: _Estimates) -> EmbeddingDifference:
    """The skills' means minus the random control's; intervals hold the spread of examples and of draws."""
    values, ends = {}, {}
    for key in KEYS:
        one, other, variance = skills.mean(key), drawn.mean(key), variance_of_mean(drawn.values[key])
        values[key] = None if one is None or other is None else one - other
        without = skills.mean_left_out(key) - drawn.mean_left_out(key)
        ends[key] = jackknife_interval(values[key], without, -2.0, 2.0, variance)
    return EmbeddingDifference(**values, ci95=EmbeddingIntervals(**ends), draws=len(drawn.values["cka"]))


def _row_means(rows: np.ndarray) -> np.ndarray:
    """Mean of what is defined in each row [m, n]: [m], NaN where nothing is."""
    defined = ~np.isnan(rows)
    with np.errstate(invalid="ignore"):
        return np.where(defined, rows, 0).sum(1) / defined.sum(1)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


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
