"""What removing each skill does: the removal matrix, selectivity, and the oracle beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from msgspec import structs

from skillfast.evaluation.harm import bracket, cross_fitted, noise_floor, per_example, plug_in, size
from skillfast.evaluation.intervals import Strata, difference_limits, share_limits
from skillfast.metrics import per_class_accuracy
from skillfast.results.bench import EffectIntervals, Harm, RatioLimits, Selectivity

if TYPE_CHECKING:
    from skillfast.evaluation.resampling import Bootstrap

ROUNDING = 1e-12  # what is left of a mean whose terms cancel


def removal_matrix(predictions: np.ndarray, baseline: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Change in each class's accuracy under each removal.

    Args:
        predictions: int64 [K, n], with skill i removed.
        baseline: int64 [n], of the intact model.
        labels: int64 [n].

    Returns:
        float64 [K, K]: row = removed skill, column = class.
    """
    k = len(predictions)
    return per_class_accuracy(predictions, labels, k) - per_class_accuracy(baseline, labels, k)


def oracle_predictions(top2: np.ndarray, n_classes: int) -> np.ndarray:
    """int64 [K, n]: predictions with class i's logit removed, from the two best classes of each sample [n, 2]."""
    return np.where(top2[:, 0] == np.arange(n_classes)[:, None], top2[:, 1], top2[:, 0])


def own_drops(
    predictions: np.ndarray, baseline: np.ndarray, labels: np.ndarray, bootstrap: Bootstrap
) -> tuple[np.ndarray, np.ndarray]:
    """What each class loses when parts of its own skill go.

    Args:
        predictions: int64 [parts, n], of every image with a part of its own class's skill removed.
        baseline: int64 [n], of the intact model.
        labels: int64 [n].
        bootstrap: Resamples of the n images.

    Returns:
        float64 [parts, K], and resampled [parts, K, replicates].
    """
    lost = (baseline == labels).astype(np.float64) - (predictions == labels)
    return np.stack([lost[:, m].mean(1) for m in bootstrap.members], 1), bootstrap.own_class(lost)


def class_terms(
    predictions: np.ndarray, oracle: np.ndarray, intact: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each single removal does, without intervals but for the end that a choice looks at.

    Args:
        predictions: int64 [..., K, n], with skill i removed.
        oracle: int64 [K, n], of `oracle_predictions`.
        intact: int64 [n], of the intact model.
        labels: int64 [n].

    Returns:
        float64 [..., K] each: drop of the own class (NaN for one without images), regret over the others, and the upper
        end of the regret's 95 % interval.
    """
    *shape, k, n = predictions.shape
    rows = predictions.reshape(-1, k, n)
    drops = np.stack([-np.diagonal(removal_matrix(row, intact, labels)) for row in rows])
    regrets, highest = np.empty((2, len(rows), k))
    for i in range(k):
        rest = labels != i
        strata = Strata(np.unique(labels[rest], return_inverse=True)[1])
        beyond = (rows[:, i, rest] == labels[rest]).astype(np.int8) - (oracle[i, rest] == labels[rest])
        for c, values in enumerate(np.stack([beyond < 0, beyond > 0], 1)):
            lost, gained = (float(share) for share in strata.mean(values))
            regrets[c, i] = lost - gained
            highest[c, i] = difference_limits(lost, gained, strata.covariance(values), strata.effective)[1]
    return drops.reshape(*shape, k), regrets.reshape(*shape, k), highest.reshape(*shape, k)


# what each image adds to: its own class lost and gained, other classes lost and gained against the intact model and
# against the oracle, decisions that differ from the oracle's, and bounds of harm and of the mean size of a change
_OWN, _OTHER, _ORACLE, _DIFFERS, _HARM, _SIZE = slice(0, 2), slice(2, 4), slice(4, 6), 6, slice(7, 9), slice(9, 11)


@dataclass(frozen=True)
class _Estimates:
    """Values of the statistics above [11] with their covariance [11, 11], and the noise floor of harm.

    `own` and `others` are how many decisions of the own class and of other classes count where none changes.
    """

    values: np.ndarray
    covariance: np.ndarray
    noise_floor: float
    own: float
    others: float

    def difference(self, which: slice) -> tuple[float, list[float]]:
        """The first of two shares minus the second, with its 95 % interval."""
        one, other = np.clip(self.values[which], 0, 1).tolist()  # sums of weights may miss 1 by an ulp
        effective = self.own if which is _OWN else self.others
        return one - other, list(difference_limits(one, other, self.covariance[which, which], effective))

    def share(self, which: int) -> tuple[float, list[float]]:
        """A share, with its 95 % interval."""
        share = float(np.clip(self.values[which], 0, 1))
        return share, list(share_limits(share, float(self.covariance[which, which]), self.others))

    def bracket(self, which: slice) -> tuple[float, float, list[float]]:
        """The lower and the upper estimate, with the 95 % interval of what lies between them; it is no less than 0."""
        low, high = self.values[which].tolist()
        return bracket(low, high, *np.diagonal(self.covariance)[which].tolist())


def selectivity(predictions: np.ndarray, oracle: np.ndarray, intact: np.ndarray, labels: np.ndarray) -> Selectivity:
    """What the removals do to their own classes and to the others, with 95 % intervals; a mean over draws.

    Intervals are for other images of the same classes and, where there are several draws, other draws. Classes without
    images do not count.

    Args:
        predictions: int64 [draws, K, n], with skill i removed.
        oracle: int64 [K, n], of `oracle_predictions`.
        intact: int64 [n], of the intact model.
        labels: int64 [n], of two classes at least.
    """
    found = _estimates(predictions, oracle, intact, labels)
    drop, drop_ends = found.difference(_OWN)
    lost, change_ends = found.difference(_OTHER)
    regret, regret_ends = found.difference(_ORACLE)
    gross_loss, gross_ends = found.share(_OTHER.start)
    differs, differs_ends = found.share(_DIFFERS)
    least, most, harm_ends = found.bracket(_HARM)
    _, whole, whole_ends = found.bracket(_SIZE)
    if gross_loss == 0:  # estimates without an event do not vary; harm is at most the gross loss
        harm_ends[1], whole_ends[1] = gross_ends[1], max(whole_ends[1], gross_ends[1])  # gains are changes, too
    change, change_ends = -lost, [-change_ends[1], -change_ends[0]]
    below = {"ratio": abs(change), "strict_ratio": whole, "harm_ratio": most}
    ends = {"ratio": max(map(abs, change_ends)), "strict_ratio": whole_ends[1], "harm_ratio": harm_ends[1]}
    return Selectivity(
        target_drop=drop,
        regret=regret,
        agreement=1 - differs,
        gross_loss=gross_loss,
        harm=Harm(plug_in=most, cross_fitted=least, noise_floor=found.noise_floor, ci95=harm_ends),
        other_change=change,
        other_abs_change=whole,
        **{name: drop / value if value > ROUNDING else None for name, value in below.items()},
        ci95=EffectIntervals(
            target_drop=drop_ends,
            regret=regret_ends,
            agreement=[1 - differs_ends[1], 1 - differs_ends[0]],
            gross_loss=gross_ends,
            other_change=change_ends,
        ),
        at_least=RatioLimits(
            **{name: drop_ends[0] / end if end > 0 and drop_ends[0] > 0 else None for name, end in ends.items()}
        ),
    )


def oracle_selectivity(oracle: np.ndarray, intact: np.ndarray, labels: np.ndarray) -> Selectivity:
    """The oracle's own effect: it has no regret and harms nobody, by what it is and not by estimate.

    Args:
        oracle: int64 [K, n], of `oracle_predictions`.
        intact: int64 [n], of the intact model.
        labels: int64 [n].
    """
    found = selectivity(oracle[None], oracle, intact, labels)
    ends = structs.replace(found.ci95, regret=None, agreement=None, gross_loss=None)
    return structs.replace(
        found,
        harm=Harm(plug_in=0.0, cross_fitted=0.0, noise_floor=0.0, ci95=None),
        ci95=ends,
        at_least=structs.replace(found.at_least, harm_ratio=None),
    )


def _estimates(predictions: np.ndarray, oracle: np.ndarray, intact: np.ndarray, labels: np.ndarray) -> _Estimates:
    """See `selectivity`."""
    shown = np.unique(labels)
    own = labels == shown[:, None]  # [rows, n]
    predictions, oracle, others = predictions[:, shown], oracle[shown], len(shown) - 1
    change = (predictions == labels).astype(np.int8) - (intact == labels)
    beyond = (predictions == labels).astype(np.int8) - (oracle == labels)
    draws, _, n = predictions.shape
    values = np.empty((11, draws, n))
    for i, which in enumerate((change < 0, change > 0)):
        values[_OWN][i] = (which & own).any(1)
    for i, which in enumerate((change < 0, change > 0, beyond < 0, beyond > 0, predictions != oracle)):
        values[_OTHER.start + i] = (which & ~own).sum(1) / others
    floor = 0.0
    for row in range(len(shown)):
        member, rest = own[row], np.arange(len(shown)) != row
        of_class = change[:, rest][..., member]  # [draws, rows - 1, images of the class]
        for i, bound in enumerate((cross_fitted, plug_in)):
            values[_HARM.start + i, :, member] = per_example(bound, of_class).mean(1).T
            values[_SIZE.start + i, :, member] = per_example(size(bound), of_class).mean(1).T
        losses, gains = (of_class < 0).sum(-1), (of_class > 0).sum(-1)
        floor += float(noise_floor(losses, gains, member.sum()).mean()) / len(shown)
    strata = Strata(np.searchsorted(shown, labels))
    return _Estimates(
        values=strata.mean(values).mean(-1),
        covariance=strata.crossed_covariance(values),
        noise_floor=floor,
        own=strata.effective,
        others=strata.effective * others,
    )
