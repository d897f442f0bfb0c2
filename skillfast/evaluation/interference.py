"""How skills interfere: classes that turn, compete or hang together when another class's skill is removed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binom, false_discovery_control

from skillfast.evaluation.jackknife import jackknife_interval, variance_of_mean
from skillfast.results.bench import (
    AngleDifference,
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

LEVEL = 0.05
"""Share of false discoveries among the pairs that are called significant."""


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
    q = false_discovery_control(p.ravel()).reshape(p.shape)
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
    control: tuple[np.ndarray, np.ndarray] | None = None,
) -> Interference:
    """How skills interfere: angles, pairs of classes and overlaps.

    Args:
        turns: Angles float64 [K, K], of `directions.angles`, a row per removal, NaN where there is none; and without
            each group of images [K, groups, K]. None for a model without embeddings.
        predictions: int64 [K, n], with skill i removed.
        oracle: int64 [K, n], with class i's logit removed.
        baseline: int64 [n], of the intact model.
        labels: int64 [n].
        overlap: float64 [K, K], Jaccard index of the skills' neurons.
        classes: Class names.
        control: Angles with as many neurons removed at random, [draws, K, K], and without each group of images
            [draws, K, groups, K]; None where not measured.

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
        random_control=None if control is None else AngleMeans(**_own_and_other(control[0])),
        difference=None if control is None or turns is None else _difference(turns, control),
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


def _turned(angles: np.ndarray, left_out: np.ndarray) -> dict[str, Any]:
    """The angles, their means over the diagonal and the rest, and intervals, by field of `Interference`."""
    means, without = _own_and_other(angles), _left_out(angles, left_out)
    return {
        "angles_deg": [[None if np.isnan(v) else float(v) for v in row] for row in angles],
        **means,
        "ci95": AngleIntervals(
            angles_deg=[
                [jackknife_interval(angles[i, j], left_out[i, :, j], 0.0, 180.0) for j in range(len(angles))]
                for i in range(len(angles))
            ],
            **{key: jackknife_interval(means[key], without[key], 0.0, 180.0) for key in means},
        ),
    }


def _difference(turns: tuple[np.ndarray, np.ndarray], control: tuple[np.ndarray, np.ndarray]) -> AngleDifference:
    """The skills' means minus the random control's; intervals hold the spread of images and of draws."""
    found, random = _own_and_other(turns[0]), _own_and_other(control[0])
    without, random_without = _left_out(*turns), _left_out(*control)
    values: dict[str, float | None] = {}
    ends: dict[Any, list[float] | None] = {}
    for key, value in found.items():
        drawn = random[key]
        values[key] = None if value is None or drawn is None else value - drawn
        each = np.array([[_own_and_other(row, i)[key] for i, row in enumerate(draw)] for draw in control[0]], float)
        left_out = without[key] - random_without[key]
        ends[key] = jackknife_interval(values[key], left_out, -180.0, 180.0, variance_of_mean(each))
    return AngleDifference(own_angle_deg=values["own_angle_deg"], other_angle_deg=values["other_angle_deg"], ci95=ends,
                           draws=len(control[0]))  # fmt: skip


def _own_and_other(angles: np.ndarray, removed: int | None = None) -> dict[str, float | None]:
    """Means of the angles [..., K, K] over the diagonal and the rest; of one row [K], that of the class removed."""
    own = np.broadcast_to(np.eye(angles.shape[-1], dtype=bool), angles.shape) if removed is None else (
        np.arange(len(angles)) == removed
    )  # fmt: skip
    return {"own_angle_deg": _mean(angles[own]), "other_angle_deg": _mean(angles[~own])}


def _left_out(angles: np.ndarray, left_out: np.ndarray) -> dict[str, np.ndarray]:
    """Mean angles without each group of images: angles [..., K, K] and left_out [..., K, groups, K] -> [groups]."""
    own = np.broadcast_to(np.eye(angles.shape[-1], dtype=bool), angles.shape)
    rows = np.moveaxis(left_out, -2, -1)  # [..., K, K, groups]
    defined = ~np.isnan(angles)
    return {
        "own_angle_deg": _mean_of(rows[own & defined]),
        "other_angle_deg": _mean_of(rows[~own & defined]),
    }


def _mean(values: np.ndarray) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None


def _mean_of(rows: np.ndarray) -> np.ndarray:
    """Mean over rows [m, groups]; NaN without rows."""
    return rows.mean(0) if len(rows) else np.full(rows.shape[1], np.nan)


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
