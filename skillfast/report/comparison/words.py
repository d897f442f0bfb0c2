"""The words and rows of a comparison, for the page and the terminal alike."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

from skillfast.report.formatting import UNDEFINED, interval, number_of, percent, points

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from skillfast.results.comparison import Carried, Check, ComparedRun, Comparison, PairedChange, Shift, SkillChange

LEVEL = 0.05
ARROW = "\N{RIGHTWARDS ARROW}"
HEADS = {
    "lost": "Lost",
    "merged": "Merged",
    "weakened": "Weakened",
    "moved": "Moved",
    "weakened in its neurons": "Weakened in its neurons, the accuracy holds",
    "gained": "Gained",
    "strengthened": "Strengthened",
    "strengthened in its neurons": "Strengthened in its neurons, the accuracy holds",
    "unchanged": "Unchanged",
    "undecided": "Undecided",
}
MEANINGS = (
    ("lost", "NEW has at most half of the accuracy that BASE had on the class; gained is the other way round."),
    (
        "weakened",
        (
            "The class's accuracy fell. In its neurons: no change of accuracy is shown, and the class loses less by "
            "its skill than it did, so that less of it hangs on these neurons. Strengthened is the other way round."
        ),
    ),
    ("moved", "BASE's neurons take half at most of what they took, and other ones carry the class."),
    ("merged", "Either of two removals takes at least half of the other's class, and more than it did."),
    (
        "unchanged",
        (
            "Shown by two one-sided tests: accuracy within the margin, and within twice the margin what BASE's skill "
            "takes, or each model's own where NEW was not measured with BASE's."
        ),
    ),
    ("undecided", "Neither a change nor its absence is shown by so few examples."),
)
CHECKS = {
    "min_accuracy": "accuracy, at least",
    "max_weakening": "accuracy lost, at most",
    "max_relative_weakening": "accuracy lost as a share of BASE's, at most",
    "min_drop": "drop by its skill, at least",
    "max_drop_loss": "loss of drop, at most",
    "max_harm": "harm to other classes, at most",
    "max_kl": "divergence of probabilities, at most",
}
COLUMNS = ("skill", "verdict", "accuracy", "change", "q", "drop by its own skill", "by BASE's skill", "by NEW's skill",
           "neurons shared")  # fmt: skip
EXCHANGED = ("skill", "BASE's takes in NEW", "NEW's own", "carries the class", "NEW's takes in BASE", "BASE's own",
             "carried the class")  # fmt: skip


def run_name(run: ComparedRun) -> str:
    """The folder's last part."""
    return PurePath(run.directory).name or run.directory


def verdict(found: SkillChange) -> str:
    """The verdicts on a skill in words."""
    words = []
    for each in found.verdicts:
        more = ""
        if each == "moved":
            more = f" (to other {', '.join(found.moved)})"
        elif each == "merged":
            more = f" with {', '.join(found.merged_with)}"
        words.append(f"{_head(each, found)}{more}")
    return ", ".join(words)


def _head(each: str, found: SkillChange) -> str:
    """A verdict, which of `HEADS` it is."""
    neurons = each in ("weakened", "strengthened") and by_neurons(found)
    return f"{each} in its neurons" if neurons else each


def by_neurons(found: SkillChange) -> bool:
    """Whether a skill became weaker or stronger by what its removal takes alone: the accuracy says nothing."""
    return found.accuracy is not None and found.accuracy.q > LEVEL


def from_to(pair: PairedChange | Shift | None, write=percent) -> str:  # type: ignore[no-untyped-def]  # one of formatting's
    """BASE's value and NEW's."""
    return UNDEFINED if pair is None else f"{write(pair.base)} {ARROW} {write(pair.new)}"


def signed(fraction: float | None) -> str:
    """A change in points with its sign."""
    return points(fraction, signed=True)


def change(found: PairedChange | None) -> str:
    """A change in points with its interval."""
    return "" if found is None else f"{signed(found.change)} {interval(found.ci95, signed)}".rstrip()


def p_value(p: float) -> str:
    """A p or q, short."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def row(name: str, found: SkillChange) -> list[str]:
    """One skill, under `COLUMNS`."""
    overlap = found.overlap
    return [
        name,
        verdict(found),
        from_to(found.accuracy),
        change(found.accuracy),
        "" if found.accuracy is None else p_value(found.accuracy.q),
        from_to(found.drop, points),
        *("not measured" if pair is None else from_to(pair, points) for pair in (found.base_skill, found.new_skill)),
        "other architecture" if overlap is None else f"{percent(overlap.jaccard)} (chance {percent(overlap.chance)})",
    ]


def rows(found: Comparison) -> list[list[str]]:
    """Every skill, in BASE's order."""
    return [row(name, skill) for name, skill in found.skills.items()]


def exchanged(found: Comparison) -> list[list[str]]:
    """What each run's skill takes from the other run's model, under `EXCHANGED`; empty where nothing was measured."""
    if all(skill.base_set is None and skill.new_set is None for skill in found.skills.values()):
        return []
    return [[name, *_carried(skill.base_set), *_carried(skill.new_set)] for name, skill in found.skills.items()]


def _carried(found: Carried | None) -> list[str]:
    if found is None:
        return ["not measured", "", ""]
    return [f"{points(found.takes)} {interval(found.ci95, points)}", points(found.own), found.carries]


def title(found: Comparison) -> str:
    """What is compared."""
    return f"{run_name(found.base)} {ARROW} {run_name(found.new)}: {number_of(found.n)} common test examples"


def sentences(found: Comparison) -> list[str]:
    """What was found, the gravest first."""
    said = [f"Not comparable: {reason}." for reason in found.reasons]
    if not found.skills:
        return [*said, "No common example: nothing can be said."]
    of: dict[str, list[str]] = {}
    for name, skill in found.skills.items():
        for each in skill.verdicts:
            of.setdefault(_head(each, skill), []).append(name)
    said += [f"{head}: {', '.join(of[verdict])}." for verdict, head in HEADS.items() if verdict in of]
    overall = found.overall
    if overall is not None:
        say = f"Accuracy of all classes {from_to(overall.accuracy)}, {change(overall.accuracy)} points"
        if overall.kl is not None:
            say += f"; divergence of probabilities {overall.kl.mean:.3f} nats"
        said.append(f"{say}.")
    said += [
        f"Without the skill of {each.removed}, {each.harmed} loses {points(-each.new)} points in NEW "
        f"({points(-each.base)} in BASE)."
        for each in found.interference[:5]
    ]
    if len(found.interference) > 5:
        said.append(f"{len(found.interference) - 5} more such removals are in compare.json.")
    for answer, say in (("yes", "carried the class in BASE, too"), ("no", "did not carry the class in BASE")):
        if names := [name for name, s in found.skills.items() if s.new_set is not None and s.new_set.carries == answer]:
            said.append(f"NEW's neurons {say}: {', '.join(names)}.")
    if (seen := visible(found.skills)) is not None:
        said.append(f"What could be seen: {seen}.")
    if any(skill.base_skill is None for skill in found.skills.values()):
        said.append(
            "NEW was not measured without BASE's skills, so that another choice of neurons is hard to tell from a "
            "move; `skillfast bench --like BASE` does that."
        )
    return said


def visible(skills: Mapping[str, SkillChange]) -> str | None:
    """The smallest changes that so many examples would have shown."""
    alone = [s.visible_alone for s in skills.values() if s.visible_alone is not None]
    of_all = [s.visible_of_all for s in skills.values() if s.visible_of_all is not None]
    if not alone or not of_all:
        return None
    return (
        f"a class's change of {_range(alone)} points in 80 % of the cases where it is tested alone, of "
        f"{_range(of_all)} as the only one of all"
    )


def _range(values: Sequence[float]) -> str:
    low, high = points(min(values)), points(max(values))
    return low if low == high else f"{low} to {high}"


def check_row(check: Check) -> list[str]:
    """One check of a gate: skill, what, limit, value with its interval, outcome."""
    write = (lambda value: f"{value:.4f}") if check.check == "max_kl" else percent
    value = UNDEFINED
    if check.value is not None:
        value = f"{write(check.value)} {interval([check.low, check.high], write)}".rstrip()
    return [
        check.skill or "all classes",
        CHECKS.get(check.check, check.check),
        write(check.limit),
        value,
        check.outcome,
    ]


def gate_says(found: Comparison) -> str:
    """The gate's decision in a sentence."""
    gate = found.gate
    assert gate is not None
    count = {
        name: sum(check.outcome == name for check in gate.checks)
        for name in ("passed", "failed", "undecided", "undefined")
    }
    parts = ", ".join(f"{number} {name}" for name, number in count.items() if number)
    why = ""
    if gate.decision == "not comparable":
        why = " (other data or classes)" if found.reasons else " (too few examples to tell)"
    return f"Gate: {gate.decision}{why}; of {number_of(len(gate.checks))} checks {parts}."
