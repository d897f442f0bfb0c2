"""A gate's checks, decided on the ends of intervals: what too few examples leave open is no pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from skillfast.evaluation.comparison import one_sided
from skillfast.evaluation.intervals import Strata, Z, share_limits
from skillfast.evaluation.paired import LEVEL, PairedDifference, mean_limits
from skillfast.results.comparison import Check, GateResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from skillfast.evaluation.comparison import Measured
    from skillfast.results.bench import Harm
    from skillfast.results.comparison import Outcome

    Limits = Callable[[float], tuple[float, float]]


@dataclass(frozen=True)
class Quantity:
    """A value and its limits at any reach in standard errors."""

    value: float
    limits: Limits


class Quantities:
    """What a gate can ask of two models on some examples: one class's, or all with each class's mean counting once.

    Args:
        base: Decisions of BASE.
        new: Decisions of NEW.
        labels: int64 [n].
        rows: int64 [m], the examples.
        harm: What NEW's removals cost other classes, or None.
        kl: float64 [m], divergence of each example, or None.
    """

    def __init__(
        self,
        base: Measured,
        new: Measured,
        labels: np.ndarray,
        rows: np.ndarray,
        harm: Harm | None,
        kl: np.ndarray | None,
    ) -> None:
        self.rows, self.labels, self._harm, self._kl = rows, labels[rows], harm, kl
        self._base, self._new = ((side.intact[rows] == self.labels).astype(np.int64) for side in (base, new))
        own = self.labels, rows
        self._without = [(side.removed[own] == self.labels).astype(np.int64) for side in (base, new)]

    def of(self, check: str) -> Quantity | None:
        """What a check of this name is about; None where there is no such value."""
        if len(self.rows) < 2:
            return None
        found: Quantity | None = getattr(self, f"_{check}")()
        return found

    def _share(self, right: np.ndarray) -> Quantity:
        strata = Strata(self.labels)
        share = float(strata.mean(right))
        variance = float(strata.covariance(right[None])[0, 0])
        return Quantity(share, lambda z: share_limits(share, variance, strata.effective, z))

    def _min_accuracy(self) -> Quantity:
        return self._share(self._new)

    def _max_weakening(self) -> Quantity:
        return _turned(PairedDifference(self._new - self._base, labels=self.labels))

    def _max_relative_weakening(self) -> Quantity | None:
        fall, base = self._max_weakening(), self._share(self._base)
        if base.value == 0:
            return None

        def limits(z: float) -> tuple[float, float]:
            (low, high), (least, most) = fall.limits(z), base.limits(z)
            # the end of BASE's accuracy that makes either end farther: wider than need be, never too narrow
            return low / (most if low > 0 else least or math.nan), high / (least if high > 0 else most)

        return Quantity(fall.value / base.value, limits)

    def _min_drop(self) -> Quantity:
        difference = PairedDifference(self._new - self._without[1], labels=self.labels)
        return Quantity(difference.change, difference.limits)

    def _max_drop_loss(self) -> Quantity:
        before, after = self._without
        return _turned(PairedDifference(self._new - self._base, after - before, labels=self.labels))

    def _max_harm(self) -> Quantity | None:
        harm = self._harm
        if harm is None or harm.ci95 is None:
            return None
        low, high = harm.ci95

        def limits(z: float) -> tuple[float, float]:
            # its ends reach normal errors from two estimates; the upper one stays at 95 %, more than a pass needs
            return harm.cross_fitted - (harm.cross_fitted - low) * max(z / Z, 1.0), high

        return Quantity(harm.plug_in, limits)

    def _max_kl(self) -> Quantity | None:
        values = self._kl
        return None if values is None else Quantity(float(values.mean()), lambda z: mean_limits(values, z))


def _turned(difference: PairedDifference) -> Quantity:
    """A fall, of a change."""

    def limits(z: float) -> tuple[float, float]:
        low, high = difference.limits(z)
        return -high, -low

    return Quantity(-difference.change, limits)


def decide(
    thresholds: Sequence[tuple[str | None, str, float]],
    found: Mapping[str | None, Quantities],
    *,
    comparable: bool = True,
) -> GateResult:
    """Decide every check of a gate.

    A check passes where the end of a one-sided 95 % interval is within its limit: all have to, so that none is
    corrected for. One fails where the other end is beyond it, at 5 % over all checks together (Bonferroni), so that of
    equal models at most so many fail by chance.

    Args:
        thresholds: Class or None, name and limit of each check.
        found: Class or None -> what is measured.
        comparable: Whether both runs are of the same classes and examples; else no check decides anything.
    """
    passing, failing = one_sided(LEVEL), one_sided(LEVEL / len(thresholds))
    checks = [_check(skill, name, limit, found.get(skill), passing, failing) for skill, name, limit in thresholds]
    decision = "not comparable"
    if comparable and any(check.outcome == "failed" for check in checks):
        decision = "regression"
    elif comparable and all(check.outcome == "passed" for check in checks):
        decision = "passed"
    return GateResult(decision=decision, level=LEVEL, checks=checks)  # type: ignore[arg-type]  # one of the three


def _check(
    skill: str | None, name: str, limit: float, found: Quantities | None, passing: float, failing: float
) -> Check:
    quantity = None if found is None else found.of(name)
    if quantity is None:
        return Check(skill, name, limit, None, None, None, "undefined")
    least = name.startswith("min_")
    low = quantity.limits(passing if least else failing)[0]
    high = quantity.limits(failing if least else passing)[1]
    outcome: Outcome = "undecided"
    if not math.isfinite(low) or not math.isfinite(high):
        return Check(skill, name, limit, quantity.value, None, None, "undefined")
    if low >= limit if least else high <= limit:
        outcome = "passed"
    elif high < limit if least else low > limit:
        outcome = "failed"
    return Check(skill, name, limit, quantity.value, low, high, outcome)
