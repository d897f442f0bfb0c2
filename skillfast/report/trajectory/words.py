"""The words and rows of a trajectory, for the page and the terminal alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skillfast.report.comparison.words import ARROW, run_name
from skillfast.report.formatting import interval, number_of, points

if TYPE_CHECKING:
    from skillfast.results.trajectory import SkillTrajectory, Trajectory

NEVER = "in none"


def names(found: Trajectory) -> list[str]:
    """The last part of each run's folder, with its number where two are alike."""
    last = [run_name(run) for run in found.runs]
    return [name if last.count(name) == 1 else f"{i + 1} {name}" for i, name in enumerate(last)]


def title(found: Trajectory) -> str:
    """What is followed."""
    runs = names(found)
    return f"{runs[0]} {ARROW} {runs[-1]}: {number_of(len(runs))} runs, {number_of(found.n)} common test examples"


def columns(found: Trajectory) -> list[str]:
    """Heads of `rows`."""
    return ["skill", "appears", "moves", *names(found)]


def rows(found: Trajectory) -> list[list[str]]:
    """Each skill: where it appears and moves, and the points that its class loses in each run."""
    runs = names(found)
    return [
        [
            name,
            NEVER if skill.appears is None else runs[skill.appears],
            _moves(skill, runs),
            *(f"{points(at.drop.value)} {interval(at.drop.ci95, points)}" for at in skill.runs),
        ]
        for name, skill in found.skills.items()
    ]


def _moves(skill: SkillTrajectory, runs: list[str]) -> str:
    return ", ".join(f"{runs[i]} (to other {', '.join(skill.runs[i].moved)})" for i in skill.moves)


def places(found: Trajectory) -> list[list[str]]:
    """Skill, run, shares of kinds, shares of blocks, neurons shared with the run before, what became of it."""
    made = []
    for name, skill in found.skills.items():
        for run, at in zip(names(found), skill.runs, strict=True):
            shares = [
                ", ".join(f"{place} {points(share)}" for place, share in (of or {}).items())
                for of in (at.kinds, at.blocks)
            ]
            overlap = "" if at.overlap is None else points(at.overlap.jaccard)
            made.append([name, run, *shares, overlap, ", ".join(at.verdicts)])
    return made


def sentences(found: Trajectory) -> list[str]:
    """What was found."""
    said = [f"Not comparable: {reason}." for reason in found.reasons]
    if not found.skills:
        return [*said, "No common example: nothing can be said."]
    runs = names(found)
    of: dict[int | None, list[str]] = {}
    for name, skill in found.skills.items():
        of.setdefault(skill.appears, []).append(name)
    said += [f"In {runs[i]} {_appear(of[i])}." for i in range(len(runs)) if i in of]
    if None in of:
        said.append(f"In no run {_appear(of[None])}.")
    moved = [name for name, skill in found.skills.items() if skill.moves]
    return [*said, f"Moved later: {', '.join(moved)}." if moved else "None moved."]


def _appear(skills: list[str]) -> str:
    return f"{'appears' if len(skills) == 1 else 'appear'} {', '.join(skills)}"
