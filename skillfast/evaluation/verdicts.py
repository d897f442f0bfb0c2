"""A row per removal for who signs the report: what the class loses, and what is known of harm to the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.stats import norm

from skillfast.evaluation.harm import bracket, cross_fitted, noise_floor, per_example, plug_in
from skillfast.evaluation.intervals import Strata, difference_limits
from skillfast.evaluation.power import loss_p, smallest_visible
from skillfast.results.bench import Harm, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

LEVEL = 0.05


def verdicts(
    predictions: np.ndarray, intact: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> dict[str, Verdict]:
    """The verdict on each removal, by the name of its class.

    Harmful: an exact McNemar test finds that another class loses, at 5 % over all others (Bonferroni). Else not above
    the bound that holds for all others at once with 95 % confidence, where that is no larger than the harm that these
    examples would have shown; else undecided.

    Args:
        predictions: int64 [K, n], with skill i removed.
        intact: int64 [n], of the intact model.
        labels: int64 [n], of every class at least two.
        classes: Class names.
    """
    change = (predictions == labels).astype(np.int8) - (intact == labels)
    return {name: _verdict(change[i], labels, i, classes) for i, name in enumerate(classes)}


def _verdict(change: np.ndarray, labels: np.ndarray, i: int, classes: Sequence[str]) -> Verdict:
    """The verdict on one removal, of its change [n] of each example."""
    others = [j for j in range(len(classes)) if j != i]
    parts = [change[labels == j] for j in others]
    losses, gains, n = (
        np.array([function(part) for part in parts])
        for function in (lambda x: (x < 0).sum(), lambda x: (x > 0).sum(), len)
    )
    p = loss_p(losses, gains)
    each = LEVEL / len(others)
    reach = float(norm.isf(each))  # one-sided, all others at once
    bounds = [_limits(part, reach)[1] for part in parts]
    chance = float(np.mean(np.minimum(losses, gains) / n))
    first = LEVEL / (len(classes) * len(others))
    visible = [smallest_visible(int(n.min()), chance, level) for level in (LEVEL, first)]
    harmed = [classes[j] for j, value in zip(others, p, strict=True) if value <= each]
    verdict: Literal["harmful", "not above", "undecided"] = "undecided"
    if harmed:
        verdict = "harmful"
    elif visible[1] is not None and max(bounds) <= visible[1]:
        verdict = "not above"
    low, high = _limits(change[labels == i])
    return Verdict(
        target_drop=-float(change[labels == i].mean()),
        ci95=[low, high],
        harm=_harm(change[labels != i], labels[labels != i], losses, gains, n),
        others_lose_at_most=max(bounds),
        visible_alone=visible[0],
        visible_of_all=visible[1],
        harmed=harmed,
        verdict=verdict,
    )


def _limits(change: np.ndarray, reach: float = float(norm.isf(0.025))) -> tuple[float, float]:
    """Limits of the net loss of one class's examples [n]."""
    values = np.stack([change < 0, change > 0])
    strata = Strata(np.zeros(len(change), dtype=np.int64))
    lost, gained = values.mean(1).tolist()
    return difference_limits(lost, gained, strata.covariance(values), strata.effective, reach)


def _harm(change: np.ndarray, labels: np.ndarray, losses: np.ndarray, gains: np.ndarray, n: np.ndarray) -> Harm:
    """The bracket of the harm to all others by one removal."""
    strata = Strata(np.unique(labels, return_inverse=True)[1])
    values = np.empty((2, len(change)))
    for label in np.unique(labels):
        for row, estimate in enumerate((cross_fitted, plug_in)):
            values[row, labels == label] = per_example(estimate, change[labels == label])
    low, high = (float(estimate(losses, gains, n).mean()) for estimate in (cross_fitted, plug_in))
    low, high, ends = bracket(low, high, *np.diagonal(strata.covariance(values)).tolist())
    return Harm(plug_in=high, cross_fitted=low, noise_floor=float(noise_floor(losses, gains, n).mean()), ci95=ends)
