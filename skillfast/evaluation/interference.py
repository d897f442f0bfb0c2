"""How skills interfere: classes that turn, compete or hang together when another class's skill is removed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binom, false_discovery_control

from skillfast.evaluation.resampling import interval
from skillfast.results.bench import (
    AngleIntervals,
    AngleMeans,
    Interference,
    InterferenceReasons,
    Pair,
    Strongest,
    StrongestAngle,
    StrongestOverlap,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skillfast.evaluation.resampling import Bootstrap

LEVEL = 0.05
"""Share of false discoveries among the pairs that are called significant."""


def class_means(embeddings: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Mean embedding of each class: [n, E] and int64 [n] -> float64 [K, E]; NaN for a class without images."""
    means = np.full((n_classes, embeddings.shape[1]), np.nan)
    with np.errstate(invalid="ignore"):  # embeddings that overflowed
        for label in np.unique(labels):
            means[label] = embeddings[labels == label].mean(0, dtype=np.float64)
    return means


@dataclass(frozen=True)
class Directions:
    """Where the intact model's classes lie, seen from the mean of all its embeddings.

    Attributes:
        labels: int64 [n].
        centre: float64 [E], the mean embedding.
        means: float64 [K, E], of the classes, centred.
        smallest: A class mean this near the centre has no direction: float32's rounding of the embeddings decides it.
    """

    labels: np.ndarray
    centre: np.ndarray
    means: np.ndarray
    smallest: float

    @classmethod
    def of(cls, embeddings: np.ndarray, labels: np.ndarray, n_classes: int) -> Directions:
        """From the intact model's embeddings [n, E]."""
        with np.errstate(invalid="ignore"):
            centre = embeddings.mean(0, dtype=np.float64)
        size = float(np.sqrt(np.square(embeddings, dtype=np.float64).sum(1).mean()))
        means = class_means(embeddings, labels, n_classes) - centre
        return cls(labels, centre, means, size * float(np.finfo(np.float32).eps))

    def angles(self, embeddings: np.ndarray) -> np.ndarray:
        """Angle between each class's mean before and after, in degrees.

        Args:
            embeddings: [n, E], of the same images after a removal.

        Returns:
            float64 [K]; NaN for a class without images, or whose mean is the centre before or after.
        """
        after = class_means(embeddings, self.labels, len(self.means)) - self.centre
        return _angles(self.means, after, self.smallest)

    def resampled_angles(self, before: np.ndarray, after: np.ndarray, bootstrap: Bootstrap) -> np.ndarray:
        """`angles` in resamples of the images; the centre stays.

        Args:
            before: [n, E], of the intact model.
            after: [n, E], of the same images after a removal.
            bootstrap: Resamples of the n images.

        Returns:
            float64 [K, replicates].
        """
        rows = np.full((len(self.means), bootstrap.replicates), np.nan)
        for label, (member, weights) in enumerate(zip(bootstrap.members, bootstrap.weights, strict=True)):
            if len(member):
                with np.errstate(invalid="ignore"):
                    means = [weights.T @ (x[member].astype(np.float64) - self.centre) for x in (before, after)]
                rows[label] = _angles(means[0], means[1], self.smallest)
        return rows


def _angles(one: np.ndarray, other: np.ndarray, smallest: float) -> np.ndarray:
    """Angles in degrees between the rows of [m, E], float64 [m]; NaN where either is no longer than `smallest`."""
    lengths = np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        u, v = (x / length[:, None] for x, length in zip((one, other), lengths, strict=True))
        # the arc cosine of u v loses half the digits of a small angle; this loses none (Kahan)
        degrees = np.degrees(2 * np.arctan2(np.linalg.norm(u - v, axis=1), np.linalg.norm(u + v, axis=1)))
        return np.where(np.minimum(*lengths) > smallest, degrees, np.nan)


@dataclass(frozen=True)
class Effects:
    """What each removal does to each class's accuracy: row = removed, column = class; NaN for one without images.

    Attributes:
        change: float64 [K, K], the removal matrix.
        beyond_oracle: float64 [K, K], accuracy under the removal minus that under the oracle's.
        p_gain: float64 [K, K], that the class is helped, and more than by the oracle: the larger p of two exact
            one-sided McNemar tests over its images, against the intact model and against the oracle.
        p_loss: float64 [K, K], that the class is hurt, and more than by the oracle, by the same tests.
    """

    change: np.ndarray
    beyond_oracle: np.ndarray
    p_gain: np.ndarray
    p_loss: np.ndarray

    @classmethod
    def of(cls, predictions: np.ndarray, oracle: np.ndarray, baseline: np.ndarray, labels: np.ndarray) -> Effects:
        """From predictions int64 [K, n] under each removal and under the oracle's, intact ones [n] and labels [n]."""
        member = (labels[:, None] == np.arange(len(predictions))).astype(np.float64)  # [n, K]
        right = predictions == labels
        found = []
        for reference in (baseline == labels, oracle == labels):
            gains, losses = (right & ~reference) @ member, (reference & ~right) @ member  # [K, K] images
            with np.errstate(invalid="ignore"):
                change = (gains - losses) / member.sum(0)
            # images right in both or wrong in both say nothing; of the others half are gains if nothing is to be found
            found.append((change, *(binom.sf(count - 1, gains + losses, 0.5) for count in (gains, losses))))
        (change, *p_intact), (beyond, *p_oracle) = found
        return cls(change, beyond, *map(np.maximum, p_intact, p_oracle))


def find_pairs(effects: Effects, classes: Sequence[str]) -> dict[str, list[Pair]]:
    """Pairs that compete (each removal helps the other class) or are linked (each hurts it), beyond the oracle.

    Both directions must hold, so a pair's p is the larger one (intersection-union test); Benjamini-Hochberg runs over
    all pairs and both kinds together.

    Args:
        effects: Effects of the removals.
        classes: Class names.

    Returns:
        For `"competition"` and `"linkage"` every pair of that kind: `classes` [a, b], `change` and `beyond_oracle` in
        accuracy (of b without a, of a without b), `p`, `q` and `significant`. Significant ones first, then by the
        weakest of these effects, largest first.
    """
    defined = np.flatnonzero(~np.isnan(np.diagonal(effects.change)))
    if len(defined) < 2:
        return {"competition": [], "linkage": []}
    i, j = np.array(list(combinations(defined, 2))).T  # [pairs] each
    p = np.stack([np.maximum(test[i, j], test[j, i]) for test in (effects.p_gain, effects.p_loss)])  # [2, pairs]
    q = false_discovery_control(p.ravel(), method="bh").reshape(p.shape)
    found = {}
    for row, (kind, sign) in enumerate((("competition", 1), ("linkage", -1))):
        both = np.minimum(sign * effects.change, sign * effects.beyond_oracle)  # [K, K]
        weakest = np.minimum(both[i, j], both[j, i])  # [pairs]
        order = np.lexsort((-weakest, q[row] > LEVEL))
        found[kind] = [
            _pair(int(i[c]), int(j[c]), effects, classes, float(p[row, c]), float(q[row, c]))
            for c in order[weakest[order] > 0]
        ]
    return found


def _pair(a: int, b: int, effects: Effects, classes: Sequence[str], p: float, q: float) -> Pair:
    return Pair(
        classes=[classes[a], classes[b]],
        change=[float(effects.change[a, b]), float(effects.change[b, a])],
        beyond_oracle=[float(effects.beyond_oracle[a, b]), float(effects.beyond_oracle[b, a])],
        p=p,
        q=q,
        significant=q <= LEVEL,
    )


def interference(
    turns: tuple[np.ndarray, np.ndarray] | None,
    predictions: np.ndarray,
    oracle: np.ndarray,
    baseline: np.ndarray,
    labels: np.ndarray,
    overlap: np.ndarray,
    classes: Sequence[str],
    control: np.ndarray | None = None,
) -> Interference:
    """How skills interfere: angles, pairs of classes and overlaps.

    Args:
        turns: Angles float64 [K, K], of `Directions.angles`, a row per removal, NaN where there is none; and resampled
            [K, K, replicates]. None for a model without embeddings.
        predictions: int64 [K, n], with skill i removed.
        oracle: int64 [K, n], with class i's logit removed.
        baseline: int64 [n], of the intact model.
        labels: int64 [n].
        overlap: float64 [K, K], Jaccard index of the skills' neurons.
        classes: Class names.
        control: Angles float64 [K, K] with as many neurons removed at random for each class; None where not measured.

    Returns:
        The object; an angle or a pair that is not defined is None or left out, and `reasons` says why.
    """
    k = len(classes)
    pairs = find_pairs(Effects.of(predictions, oracle, baseline, labels), classes)
    other = ~np.eye(k, dtype=bool)
    angles = None if turns is None else turns[0]
    turned = {} if turns is None else _turned(*turns)
    return Interference(
        **turned,
        random_control=None if control is None else AngleMeans(**_own_and_other(control)),
        competition=[pair for pair in pairs["competition"] if pair.significant],
        linkage=[pair for pair in pairs["linkage"] if pair.significant],
        strongest=Strongest(
            angle=None if angles is None else _strongest_angle(np.where(other, angles, np.nan), classes),
            overlap=_strongest_overlap(np.where(other, overlap, np.nan), classes),
            **{kind: found[0] if found else None for kind, found in pairs.items()},
        ),
        overlap=overlap.tolist(),
        reasons=_reasons(angles, labels, classes),
    )


def _turned(angles: np.ndarray, resampled: np.ndarray) -> dict[str, Any]:
    """The angles, their means over the diagonal and the rest, and intervals, by field of `Interference`."""
    own = np.eye(len(angles), dtype=bool)
    return {
        "angles_deg": [[None if np.isnan(v) else float(v) for v in row] for row in angles],
        **_own_and_other(angles),
        "ci95": AngleIntervals(
            angles_deg=[[interval(cell) for cell in row] for row in resampled],
            own_angle_deg=interval(_mean_of_defined(resampled[own])),
            other_angle_deg=interval(_mean_of_defined(resampled[~own])),
        ),
    }


def _own_and_other(angles: np.ndarray) -> dict[str, float | None]:
    """Means of the angles [K, K] over the diagonal and the rest."""
    own = np.eye(len(angles), dtype=bool)
    return {"own_angle_deg": _mean(angles[own]), "other_angle_deg": _mean(angles[~own])}


def _mean(values: np.ndarray) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over rows [m, replicates] without those that are not defined: [replicates], NaN where none is."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0).sum(0) / defined.sum(0)


def _strongest_angle(angles: np.ndarray, classes: Sequence[str]) -> StrongestAngle | None:
    found = _largest(angles)
    return None if found is None else StrongestAngle(classes[found[0]], classes[found[1]], found[2])


def _strongest_overlap(overlap: np.ndarray, classes: Sequence[str]) -> StrongestOverlap | None:
    found = _largest(overlap)
    return None if found is None else StrongestOverlap(classes[found[0]], classes[found[1]], found[2])


def _largest(values: np.ndarray) -> tuple[int, int, float] | None:
    """Row, column and size of the largest value of a matrix; None where none is above 0."""
    if not (values > 0).any():
        return None
    i, j = divmod(int(np.nanargmax(values)), values.shape[1])
    return i, j, float(values[i, j])


def _reasons(angles: np.ndarray | None, labels: np.ndarray, classes: Sequence[str]) -> InterferenceReasons | None:
    """Why a value is missing, and of which classes."""
    counts = np.bincount(labels, minlength=len(classes))
    undirected = np.zeros(len(counts), dtype=bool) if angles is None else np.isnan(angles).any(0) & (counts > 0)
    reasons = {
        "no_images": [name for name, count in zip(classes, counts, strict=True) if count == 0],
        "one_image": [name for name, count in zip(classes, counts, strict=True) if count == 1],
        "no_direction": [name for name, missing in zip(classes, undirected, strict=True) if missing],
    }
    named = {reason: names for reason, names in reasons.items() if names}
    return InterferenceReasons(**named) if named else None
