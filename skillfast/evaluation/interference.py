"""How skills interfere: classes that turn, compete or hang together when another class's skill is removed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import norm, t

from skillfast.evaluation.jackknife import jackknife_interval, variance_of_mean
from skillfast.evaluation.power import POWER
from skillfast.metrics import per_class_accuracy, per_class_mean
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
    VisiblePair,
    VisiblePairs,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

LEVEL = 0.05
"""Share of false discoveries among the pairs that are called significant."""
RELEVANT = 0.01
"""Smallest shift of a margin that counts, of the root mean square margin: 0.3 points where 90 % are right."""


@dataclass(frozen=True)
class Margins:
    """Every image's margin, the true logit minus the best other one, under what is compared.

    Attributes:
        removed: [K, n], with skill i removed.
        random: [draws, K, n], with as many random neurons removed.
        oracle: [K, n], with class i's logit removed.
        intact: [n].
    """

    removed: np.ndarray
    random: np.ndarray
    oracle: np.ndarray
    intact: np.ndarray

    @classmethod
    def of(cls, removed: np.ndarray, random: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> Margins:
        """From the margins without skills and random neurons, and the intact model's logits.

        Args:
            removed: [K, n].
            random: [draws, K, n].
            logits: [n, K].
            labels: int64 [n]; an image of class i keeps its own logit in row i of the oracle's margins, which of two
                classes are infinite.
        """
        n, k = logits.shape
        rest = np.array(logits, dtype=np.float64)
        true = rest[np.arange(n), labels].copy()
        rest[np.arange(n), labels] = -np.inf
        order = np.argsort(-rest, axis=1)
        first, second = (np.take_along_axis(rest, order[:, i : i + 1], 1)[:, 0] for i in (0, 1))
        oracle = true - np.where(order[:, 0] == np.arange(k)[:, None], second, first)
        return cls(removed, random, oracle, true - first)


@dataclass(frozen=True)
class Effects:
    """What each removal does to each class: row = removed, column = class; NaN for one without images.

    A class is helped, or hurt, where its images' mean margin rises, or falls, by more than hardly changes a decision,
    against the intact model and against the random draws. Margins tell more than decisions, of which few change.

    Attributes:
        change: float64 [K, K], the removal matrix.
        beyond_oracle: float64 [K, K], accuracy under the removal minus that under the oracle's.
        shift: float64 [K, K], mean margin under the removal minus that under the random draws.
        shift_beyond_oracle: float64 [K, K], mean margin under the removal minus that under the oracle's.
        p_gain: float64 [K, K], that the class is helped: the larger p of two one-sided paired t tests.
        p_loss: float64 [K, K], that the class is hurt, by the same tests.
        p_beyond: float64 [K, K], that the class is helped, and more than by the oracle.
        visible_gain: float64 [2, K, K], the smallest shift of the mean margin that is found to help the class, and more
            than by the oracle, in both directions in `POWER` of the cases: that beyond the random draws', and what it
            raises the class's accuracy by. Not finite where no shift is found.
        visible_loss: float64 [2, K, K], the same that is found to hurt the class, downwards.
    """

    change: np.ndarray
    beyond_oracle: np.ndarray
    shift: np.ndarray
    shift_beyond_oracle: np.ndarray
    p_gain: np.ndarray
    p_loss: np.ndarray
    p_beyond: np.ndarray
    visible_gain: np.ndarray
    visible_loss: np.ndarray

    @classmethod
    def of(
        cls, predictions: np.ndarray, oracle: np.ndarray, baseline: np.ndarray, labels: np.ndarray, margins: Margins
    ) -> Effects:
        """Compare removals with the intact model, the oracle and random draws.

        Args:
            predictions: int64 [K, n], with skill i removed.
            oracle: int64 [K, n], with class i's logit removed.
            baseline: int64 [n], of the intact model.
            labels: int64 [n].
            margins: Margins of the n images.
        """
        k = len(predictions)
        accuracy = per_class_accuracy(predictions, labels, k)
        with np.errstate(invalid="ignore"):  # the oracle of two classes is infinite
            intact, beyond = (_paired(margins.removed - other, labels, k) for other in (margins.intact, margins.oracle))
        random = _against_draws(margins, labels, k)
        least = RELEVANT * np.sqrt(per_class_mean(np.square(margins.intact, dtype=np.float64), labels, k))  # [K]
        gain = random.p_above(least)
        helped, hurt = (
            np.maximum(gain, beyond.p_above(least)),
            np.maximum(random.p_below(least), intact.p_below(least)),
        )
        level = _level_of_one_more(np.stack([helped, hurt]))
        drawn = intact.mean - random.mean  # [K, K], mean shift by the draws, against the intact model
        above, below = (
            np.maximum.reduce([test.reach(least, level) + start for test, start in tests])
            for tests in (
                ((intact, 0.0), (random, drawn), (beyond, intact.mean - beyond.mean)),
                ((intact, 0.0), (random, -drawn)),
            )
        )
        return cls(
            change=accuracy - per_class_accuracy(baseline, labels, k),
            beyond_oracle=accuracy - per_class_accuracy(oracle, labels, k),
            shift=random.mean,
            shift_beyond_oracle=beyond.mean,
            p_gain=np.maximum(gain, intact.p_above(least)),
            p_loss=hurt,
            p_beyond=helped,
            visible_gain=np.stack([above - drawn, _turned_right(above, margins.intact, labels)]),
            visible_loss=np.stack([below + drawn, -_turned_right(-below, margins.intact, labels)]),
        )


def _level_of_one_more(p: np.ndarray) -> float:
    """The largest p of both directions by which one more pair would be found: p [kinds, K, K] of those that there are.

    By `replicated_q` that is `LEVEL` over one more than how many claims have a smaller p below it.
    """
    i, j = np.triu_indices(p.shape[-1], 1)
    either = np.sort(np.minimum(p[:, i, j], p[:, j, i]), axis=None)
    levels = LEVEL / (1 + np.arange(len(either) + 1))
    return float(levels[np.searchsorted(either, levels, side="right") <= np.arange(len(levels))].max())


def _turned_right(shift: np.ndarray, margins: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What a shift [K, K] of all margins [n] of a class changes its accuracy by: [K, K]."""
    change = np.full(shift.shape, np.nan)
    for j in np.unique(labels):
        own = np.sort(margins[labels == j])
        # those above 0 after the shift; NaN is sorted last
        right = len(own) - np.searchsorted(own, np.append(-shift[:, j], 0.0), side="right")
        change[:, j] = (right[:-1] - right[-1]) / len(own)
    return np.where(np.isfinite(shift), change, np.nan)


@dataclass(frozen=True)
class _Shift:
    """Mean shifts [K, K] with their variances and degrees of freedom.

    `sampling` is what of the variance other images and other draws to compare with would change.
    """

    mean: np.ndarray
    variance: np.ndarray
    freedom: np.ndarray
    sampling: np.ndarray

    def p_above(self, least: np.ndarray) -> np.ndarray:
        """One-sided p that the mean is above `least` [K]; 1 where the mean is not finite."""
        with np.errstate(divide="ignore", invalid="ignore"):
            p = t.sf((self.mean - least) / np.sqrt(self.variance), self.freedom)
        return np.where(np.isfinite(p), p, 1.0)

    def reach(self, least: np.ndarray, level: float) -> np.ndarray:
        """Mean [K, K] whose p is below `level` in the root of `POWER` of the cases, for one of two directions.

        By normal approximation, in which the estimate of the variance varies, too.
        """
        needed = t.isf(level, self.freedom)
        with np.errstate(invalid="ignore"):
            varies = self.sampling + self.variance * needed**2 / (2 * self.freedom)
            return least + needed * np.sqrt(self.variance) + norm.ppf(POWER**0.5) * np.sqrt(varies)

    def p_below(self, least: np.ndarray) -> np.ndarray:
        """One-sided p that the mean is below minus `least` [K]; 1 where the mean is not finite."""
        return replace(self, mean=-self.mean).p_above(least)


def _paired(shift: np.ndarray, labels: np.ndarray, k: int) -> _Shift:
    """Mean shift of each class's images: shift [..., n] -> [..., K]; the variance of one image is infinite."""
    n = np.bincount(labels, minlength=k)
    mean = per_class_mean(shift, labels, k)
    squares = per_class_mean(np.square(shift - mean[..., labels]), labels, k)
    with np.errstate(invalid="ignore"):
        variance = np.where(n > 1, squares / (n - 1), np.inf)
    return _Shift(mean, variance, np.broadcast_to(np.maximum(n - 1.0, 1), mean.shape), variance)


def _against_draws(margins: Margins, labels: np.ndarray, k: int) -> _Shift:
    """Each removal's mean shift beyond the random draws', as if it were one more draw.

    A draw shifts all images of a class at once, so the draws vary beyond the images; that part is estimated over all
    rows of a class, and a removal is compared with the mean of the draws (Satterthwaite's degrees of freedom).
    """
    draws = len(margins.random)
    images = _paired(margins.removed - margins.random.mean(0, dtype=np.float64), labels, k)
    if draws == 1:
        return images
    one = _paired(margins.random - margins.random.mean(0, dtype=np.float64), labels, k)
    between = np.square(one.mean).sum((0, 1)) / (k * (draws - 1))  # [K], variance of a draw's mean shift
    within = one.variance.sum((0, 1)) / (k * (draws - 1))  # what of it the choice of images explains
    beyond = np.maximum(between - within, 0)
    more = beyond * (1 + 1 / draws)
    variance = images.variance + more
    with np.errstate(invalid="ignore"):
        freedom = variance**2 / (images.variance**2 / images.freedom + more**2 / (k * (draws - 1)))
    return _Shift(images.mean, variance, np.where(variance > 0, freedom, 1), images.variance + beyond / draws)


def find_pairs(effects: Effects, classes: Sequence[str]) -> dict[str, list[Pair]]:
    """Pairs that compete (each removal helps the other class) or are linked (each hurts it), beyond random draws.

    Both directions must hold, so a pair's p is the larger one (intersection-union test). False discoveries are
    controlled over all pairs and both kinds together by `replicated_q`. The oracle frees images of other classes, too,
    so a pair competes only where it does so beyond the oracle, by the same correction; the others are kept apart.

    Args:
        effects: Effects of the removals.
        classes: Class names.

    Returns:
        `"competition"`, `"linkage"` and `"oracle_explains"`: every pair of that kind, significant ones first, then by
        the weaker of the two shifts, largest first. `"oracle_explains"` has significant ones alone.
    """
    defined = np.flatnonzero(~np.isnan(np.diagonal(effects.change)))
    if len(defined) < 2:
        return {"competition": [], "linkage": [], "oracle_explains": []}
    i, j = np.array(list(combinations(defined, 2))).T  # [pairs] each
    (p, q), (strict_p, strict_q) = (
        _both_directions(np.stack([[test[i, j], test[j, i]] for test in (gain, effects.p_loss)], 1))
        for gain in (effects.p_gain, effects.p_beyond)
    )
    explained = (q[0] <= LEVEL) & (strict_q[0] > LEVEL)
    weakest = {
        kind: np.minimum(sign * shift[i, j], sign * shift[j, i])
        for kind, sign, shift in (
            ("competition", 1, np.minimum(effects.shift, effects.shift_beyond_oracle)),
            ("linkage", -1, effects.shift),
            ("oracle_explains", 1, effects.shift),
        )
    }

    def made(kind: str, ps: np.ndarray, qs: np.ndarray, kept: np.ndarray) -> list[Pair]:
        order = np.lexsort((-weakest[kind], qs > LEVEL))
        return [_pair(int(i[c]), int(j[c]), effects, classes, float(ps[c]), float(qs[c])) for c in order if kept[c]]

    return {
        "competition": made("competition", strict_p[0], strict_q[0], weakest["competition"] > 0),
        "linkage": made("linkage", strict_p[1], strict_q[1], weakest["linkage"] > 0),
        "oracle_explains": made("oracle_explains", p[0], q[0], explained),
    }


def visible_pairs(effects: Effects) -> VisiblePairs:
    """The smallest effects by which pairs of classes are found in `POWER` of the cases: the median over all pairs."""
    i, j = np.triu_indices(len(effects.change), 1)

    def median(effect: np.ndarray) -> VisiblePair | None:
        both = (effect[:, i, j] + effect[:, j, i]) / 2  # [2, pairs]
        both = both[:, np.isfinite(both).all(0)]
        return VisiblePair(*np.median(both, axis=1).tolist()) if both.size else None

    return VisiblePairs(competition=median(effects.visible_gain), linkage=median(effects.visible_loss))


def _both_directions(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The larger p of two directions [2, kinds, pairs], and its q: [kinds, pairs] each."""
    return p.max(0), replicated_q(p.reshape(2, -1)).reshape(p.shape[1:])


def replicated_q(p: np.ndarray) -> np.ndarray:
    """Share of false discoveries if claims that need two findings are made down to each claim's larger p.

    Benjamini and Hochberg's procedure counts every claim that could be false; a claim whose smaller p is large could
    hardly be made, so it is not counted (AdaFilter; Wang, Gui, Su, Sabatti and Owen, Annals of Statistics 2022).

    Args:
        p: float64 [2, claims], p of either finding.

    Returns:
        float64 [claims], at most 1.
    """
    either, both = p.min(0), p.max(0)
    order = np.argsort(both, kind="stable")
    tried = np.searchsorted(np.sort(either), both[order], side="right")
    made = np.searchsorted(both[order], both[order], side="right")
    q = np.empty(len(both))
    q[order] = np.minimum.accumulate((both[order] * tried / made)[::-1])[::-1]  # the last is its p: at most 1
    return q


def _pair(a: int, b: int, effects: Effects, classes: Sequence[str], p: float, q: float) -> Pair:
    def both(matrix: np.ndarray) -> list[float]:
        return [float(matrix[a, b]), float(matrix[b, a])]

    beyond = both(effects.shift_beyond_oracle)

    return Pair(
        classes=[classes[a], classes[b]],
        change=both(effects.change),
        beyond_oracle=both(effects.beyond_oracle),
        margin=both(effects.shift),
        margin_beyond_oracle=beyond if np.isfinite(beyond).all() else None,
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
    margins: Margins,
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
        margins: Margins of the n images.
        control: Angles with as many neurons removed at random, [draws, K, K], and without each group of images
            [draws, K, groups, K]; None where not measured.

    Returns:
        The object; an angle or a pair that is not defined is None or left out, and `reasons` says why.
    """
    k = len(classes)
    effects = Effects.of(predictions, oracle, baseline, labels, margins)
    pairs = find_pairs(effects, classes)
    other = ~np.eye(k, dtype=bool)
    angles = None if turns is None else turns[0]
    turned = {} if turns is None else _turned(*turns)
    return Interference(
        **turned,
        random_control=None if control is None else AngleMeans(**_own_and_other(control[0])),
        difference=None if control is None or turns is None else _difference(turns, control),
        competition=[pair for pair in pairs["competition"] if pair.significant],
        linkage=[pair for pair in pairs["linkage"] if pair.significant],
        oracle_explains=pairs["oracle_explains"],
        visible=visible_pairs(effects),
        strongest=Strongest(
            angle=None if angles is None else _strongest_angle(np.where(other, angles, np.nan), classes),
            overlap=_strongest_overlap(np.where(other, overlap, np.nan), classes),
            **{kind: next(iter(pairs[kind]), None) for kind in ("competition", "linkage")},
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
