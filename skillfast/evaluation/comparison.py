"""What became of each skill between two models: verdicts from paired tests over the same examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.stats import false_discovery_control, norm

from skillfast.evaluation.intervals import share_limits
from skillfast.evaluation.paired import LEVEL, PairedDifference, discoveries, shared_by_chance
from skillfast.evaluation.power import smallest_visible
from skillfast.results.comparison import Carried, NewInterference, Overlap, PairedChange, Place, Shift, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MARGIN = 0.05
"""Largest change of accuracy that does not matter, unless told otherwise; of a drop, two accuracies, twice as much."""
HALF = 0.5
"""Share of what BASE had that NEW has at most of a class that is lost, or of a set of neurons that a skill has left."""
CHOICE = 0.5
"""How much less another choice of neurons may take of a class by itself; a drop that was measured with other neurons
has to fall by more to count. Masks of other seeds showed up to 0.49 (`bench/compare_seeds.py`)."""
PLACED = 0.25
"""Share of a skill's effect that has to lie elsewhere for a skill that moved to have moved between blocks or kinds."""
GRAVEST = ("lost", "merged", "weakened", "moved", "gained", "strengthened")


@dataclass(frozen=True)
class Measured:
    """Decisions of one model on the examples of both.

    Attributes:
        intact: int64 [n], the intact model's.
        removed: int64 [K, n], with class i's skill removed.
        other: int64 [K, n], with the other run's skill of class i removed; None where that was not measured.
    """

    intact: np.ndarray
    removed: np.ndarray
    other: np.ndarray | None


class ClassPair:
    """What both models decide on the examples of one class.

    Args:
        base: Decisions of BASE.
        new: Decisions of NEW.
        label: The class.
        member: bool [n], its examples.

    Attributes:
        n: How many there are.
        accuracy: Change of the intact models' accuracy.
        drop: Change of what each model's own skill takes.
        base_skill: Change of what BASE's skill takes, or None.
        new_skill: Change of what NEW's skill takes, or None.
        in_base: In BASE, what NEW's skill takes beyond what BASE's takes, or None.
        in_new: In NEW, what NEW's skill takes beyond what BASE's takes, or None.
        taken: What each set takes of each model, by (model, set), as far as it was measured.
    """

    def __init__(self, base: Measured, new: Measured, label: int, member: np.ndarray) -> None:
        def right(decided: np.ndarray) -> np.ndarray:
            return (decided[member] == label).astype(np.int64)

        b, w = right(base.intact), right(new.intact)
        without_b, without_w = right(base.removed[label]), right(new.removed[label])
        self.n = int(member.sum())
        self.values = {"accuracy": (b, w), "drop": (b - without_b, w - without_w)}
        self.accuracy = PairedDifference(w - b)
        self.drop = PairedDifference(w - b, without_w - without_b)
        self.taken = {
            ("base", "base"): PairedDifference(b - without_b),
            ("new", "new"): PairedDifference(w - without_w),
        }
        self.base_skill: PairedDifference | None = None
        self.new_skill: PairedDifference | None = None
        self.in_base: PairedDifference | None = None
        self.in_new: PairedDifference | None = None
        if new.other is not None:
            without = right(new.other[label])
            self.values |= {"base_skill": (b - without_b, w - without), "in_new": (w - without, w - without_w)}
            self.base_skill = PairedDifference(w - b, without - without_b)
            self.in_new = PairedDifference(without - without_w)
            self.taken["new", "base"] = PairedDifference(w - without)
        if base.other is not None:
            without = right(base.other[label])
            self.values |= {"new_skill": (b - without, w - without_w), "in_base": (b - without_b, b - without)}
            self.new_skill = PairedDifference(w - b, without_w - without)
            self.in_base = PairedDifference(without_b - without)
            self.taken["base", "new"] = PairedDifference(b - without)

    def of(self, name: str) -> PairedDifference | None:
        """One of the differences by its name."""
        found: PairedDifference | None = getattr(self, name)
        return found


CHANGES = ("accuracy", "drop", "base_skill", "new_skill", "in_base", "in_new")


def changes_of(pairs: Sequence[ClassPair], name: str, margin: float) -> list[PairedChange | None]:
    """One of the `CHANGES` of every class, corrected over the classes that have it; None of a class without examples.

    Args:
        pairs: By class.
        name: Which.
        margin: Largest change that does not matter.
    """
    found = [pair.of(name) if pair.n else None for pair in pairs]
    there = [difference for difference in found if difference is not None]
    q = iter(discoveries(np.array([d.p for d in there]), np.array([d.least_p for d in there])))
    equivalent = iter(adjusted([d.equivalence_p(margin) for d in there]))
    made: list[PairedChange | None] = []
    for pair, difference in zip(pairs, found, strict=True):
        if difference is None:
            made.append(None)
            continue
        base, new = (float(values.mean()) for values in pair.values[name])
        made.append(paired_change(difference, base, new, float(next(q)), float(next(equivalent))))
    return made


def adjusted(p: Sequence[float]) -> list[float]:
    """Benjamini-Hochberg's q of all of them."""
    return [float(value) for value in false_discovery_control(p)]


def paired_change(
    difference: PairedDifference, base: float, new: float, q: float, equivalence_q: float
) -> PairedChange:
    """The record of a difference between two means."""
    return PairedChange(
        base=base,
        new=new,
        change=difference.change,
        ci95=list(difference.limits()),
        p=difference.p,
        q=q,
        equivalence_q=equivalence_q,
    )


def visible(pair: ClassPair, classes: int) -> tuple[float | None, float | None]:
    """Smallest change of accuracy that would have been found in 80 % of the cases: alone, and of all classes.

    Args:
        pair: The class's decisions; as many flip by chance as flipped against the larger direction.
        classes: How many classes are tested.
    """
    if not pair.n:
        return None, None
    change = np.subtract(*reversed(pair.values["accuracy"]))
    chance = min(int((change < 0).sum()), int((change > 0).sum())) / pair.n
    # two-sided, and the first of all in Benjamini and Hochberg's order
    alone, of_all = (smallest_visible(pair.n, chance, LEVEL / 2 / tests, mid=True) for tests in (1, classes))
    return alone, of_all


def _falls(change: PairedChange | None) -> bool:
    return change is not None and change.q <= LEVEL and change.change < 0


def _rises(change: PairedChange | None) -> bool:
    return change is not None and change.q <= LEVEL and change.change > 0


def verdicts(
    pair: ClassPair, found: Mapping[str, PairedChange | None], overlap: Overlap | None, merged: bool
) -> list[Verdict]:
    """What is found of a class's skill, the gravest first.

    Accuracy decides whether it is lost (half of it is left at most), weakened, strengthened or gained. Where accuracy
    says nothing, what its removal takes does: BASE's skill in both models and either's own have to agree; where NEW was
    not measured with BASE's skill, the own ones have to differ by more than another choice of neurons alone makes.
    Moved: BASE's skill takes half at most of what it took, and NEW's own takes more; without BASE's skill in NEW, where
    the skills share no more neurons than chance gives. Unchanged: the accuracy and what BASE's skill takes, or either's
    own where NEW was not measured with it, are within their margins (TOST).

    Args:
        pair: The class's decisions.
        found: The `CHANGES` by name.
        overlap: Neurons that the two skills share.
        merged: Whether it merged with another class.
    """
    accuracy, drop, base_skill = found["accuracy"], found["drop"], found["base_skill"]
    if accuracy is None or drop is None:
        return ["undecided"]
    made: set[Verdict] = {"merged"} if merged else set()
    if _falls(accuracy):
        most = share_limits(accuracy.new, 0.0, pair.n)[1]
        made.add("lost" if most <= HALF * accuracy.base else "weakened")
    elif _rises(accuracy):
        most = share_limits(accuracy.base, 0.0, pair.n)[1]
        made.add("gained" if most <= HALF * accuracy.new else "strengthened")
    if "lost" not in made and _moved(pair, found, overlap):
        made.add("moved")
    if not made & {"lost", "weakened", "gained", "strengthened"}:
        if base_skill is not None:
            less = _falls(drop) and _falls(base_skill) and "moved" not in made
            more = _rises(drop) and _rises(base_skill)
        else:
            less = _falls(drop) and drop.ci95[1] < -CHOICE
            more = _rises(drop) and drop.ci95[0] > CHOICE
        made |= {"weakened"} if less else {"strengthened"} if more else set()
    if made:
        return sorted(made, key=GRAVEST.index)
    taken = drop if base_skill is None else base_skill  # own drops differ by the choice of neurons, too
    same = accuracy.equivalence_q <= LEVEL and taken.equivalence_q <= LEVEL
    return ["unchanged"] if same else ["undecided"]


def _moved(pair: ClassPair, found: Mapping[str, PairedChange | None], overlap: Overlap | None) -> bool:
    """Whether other neurons carry what BASE's skill carried."""
    drop, base_skill = found["drop"], found["base_skill"]
    assert drop is not None
    if base_skill is not None:
        return _falls(base_skill) and base_skill.new <= HALF * base_skill.base and _rises(found["in_new"])
    takes = all(pair.taken[model, model].limits()[0] > 0 for model in ("base", "new"))
    return takes and overlap is not None and overlap.p > LEVEL


def carried(pair: ClassPair, model: str, of: str) -> Carried | None:
    """Whether one run's skill carries the class in the other run's model; None where that was not measured.

    Args:
        pair: The class's decisions.
        model: `"base"` or `"new"`, the model.
        of: The other of the two, whose skill is removed from it.
    """
    taken, own = pair.taken.get((model, of)), pair.taken[model, model]
    if taken is None or not pair.n:
        return None
    low, high = taken.limits()
    found: Literal["yes", "no", "undecided"] = "undecided"
    if own.limits()[0] > 0:  # what carries nothing has no half
        found = "yes" if low >= HALF * own.change else "no" if high <= HALF * own.change else found
    return Carried(takes=taken.change, ci95=[low, high], own=own.change, carries=found)


def moved_between(kinds: Mapping[str, Shift] | None, blocks: Mapping[str, Shift] | None) -> list[Place]:
    """What a skill that moved is in now that it was not in: other blocks, other kinds, or other neurons of them."""
    places: tuple[tuple[Place, Mapping[str, Shift] | None], ...] = (("blocks", blocks), ("kinds", kinds))
    found: list[Place] = [
        name
        for name, shares in places
        if shares and sum(abs(share.new - share.base) for share in shares.values()) / 2 >= PLACED
    ]
    return found or ["neurons"]


def overlap_of(base: Mapping[str, set[int]], new: Mapping[str, set[int]], widths: Mapping[str, int]) -> Overlap:
    """Neurons that two sets share, beside random sets with as many of each site.

    Args:
        base: Site -> neurons.
        new: Site -> neurons.
        widths: Site -> how many it has.
    """
    sizes = [sum(map(len, sets.values())) for sets in (base, new)]
    both = [site for site in base if site in new]
    shared = sum(len(base[site] & new[site]) for site in both)
    expected = sum(len(base[site]) * len(new[site]) / widths[site] for site in both)
    return Overlap(
        shared=shared,
        jaccard=shared / max(1, sum(sizes) - shared),
        chance=expected / max(1.0, sum(sizes) - expected),
        p=shared_by_chance(base, new, widths),
    )


def interferences(
    base: Measured, new: Measured, labels: np.ndarray, classes: Sequence[str]
) -> tuple[list[NewInterference], set[frozenset[str]]]:
    """Removals that take more from another class in NEW than in BASE, and pairs of classes that merged.

    Merged: each of the two removals takes more from the other class than it did, and half of what it had at least.

    Args:
        base: Decisions of BASE.
        new: Decisions of NEW.
        labels: int64 [n].
        classes: Class names.

    Returns:
        The removals, the largest difference first, and the pairs.
    """
    k = len(classes)
    members = [np.flatnonzero(labels == label) for label in range(k)]
    change = (new.intact == labels).astype(np.int64) - (base.intact == labels)
    less = (new.removed == labels).astype(np.int64) - (base.removed == labels)  # [K, n]
    tested = [(i, j) for i in range(k) for j in range(k) if i != j and len(members[j])]
    size = np.abs(less - change)
    few = {j: (size[:, m] > 0).sum(1) for j, m in enumerate(members)}
    p, least = np.ones(len(tested)), np.ones(len(tested))
    made: dict[int, PairedDifference] = {}
    for at, (i, j) in enumerate(tested):
        least[at] = min(1.0, 0.5 ** int(few[j][i]))
        if least[at] <= LEVEL:  # of most pairs too few examples differ for a test
            rows = members[j]
            made[at] = PairedDifference(less[i, rows], change[rows])
            p[at] = made[at].p_less
    q = discoveries(p, least)
    found: list[NewInterference] = []
    for at, difference in made.items():
        if q[at] > LEVEL:
            continue
        i, j = tested[at]
        base_change, new_change = (
            float((side.removed[i, members[j]] == j).mean() - (side.intact[members[j]] == j).mean())
            for side in (base, new)
        )
        if new_change >= 0:
            continue  # it helps the other class, if less than it did
        found.append(
            NewInterference(
                removed=classes[i], harmed=classes[j], base=base_change, new=new_change,
                ci95=list(difference.limits()), p=float(p[at]), q=float(q[at]),
            )
        )  # fmt: skip
    found.sort(key=lambda entry: entry.new - entry.base)
    accuracy = {
        name: float((new.intact[m] == j).mean())
        for j, (name, m) in enumerate(zip(classes, members, strict=True))
        if len(m)
    }
    takes = {(entry.removed, entry.harmed) for entry in found if -entry.new >= HALF * accuracy[entry.harmed]}
    return found, {frozenset(pair) for pair in takes if pair[::-1] in takes}


def one_sided(level: float) -> float:
    """Standard errors that one end of an interval at this level reaches."""
    return float(norm.isf(level))
