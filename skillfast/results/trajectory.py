"""`trajectory.json`: each skill over several runs, such as the checkpoints of one training."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from skillfast.results.comparison import ComparedRun, Limits, Overlap, Place, Verdict
from skillfast.results.records import Change, Count, Document, Fraction, Name, Record

FILE = "trajectory.json"


class Estimate(Record, frozen=True):
    """A value and the ends of its 95 % interval."""

    value: Change
    ci95: Limits


class SkillAt(Record, frozen=True, kw_only=True):
    """A class's skill in one of the runs.

    Attributes:
        accuracy: Accuracy of the intact model on the class.
        drop: What the class loses by the skill.
        kinds: Kind -> share of the drop; null where it is not known.
        blocks: Block, as text, or head -> share of the drop; null where it is not known.
        depth: Mean block of the drop, weighted by the shares above 0; the head counts as the block after the last.
        overlap: Neurons shared with the skill of the run before; null of the first, and of another architecture.
        verdicts: What became of it since the run before, as of `skillfast compare`; empty of the first.
        moved: What it is in now that it was not in; empty where it did not move.
    """

    accuracy: Estimate
    drop: Estimate
    kinds: dict[str, float] | None
    blocks: dict[str, float] | None
    depth: float | None
    overlap: Overlap | None
    verdicts: list[Verdict]
    moved: list[Place]


class SkillTrajectory(Record, frozen=True):
    """A class's skill over the runs.

    Attributes:
        appears: The first run, from 0, in which the whole interval of the drop is above the margin; null where none is.
        moves: Runs since which it is elsewhere.
        runs: One for each.
    """

    appears: Count | None
    moves: list[Count]
    runs: Annotated[list[SkillAt], Meta(min_length=2)]


class Trajectory(Document, frozen=True, kw_only=True, tag="skillfast.trajectory/1", tag_field="schema"):
    """Each skill over several runs, on the test examples that all of them have.

    Attributes:
        skillfast: Version that compared.
        runs: The runs, in their order.
        reasons: Why they are not runs of the same classes, examples and settings; empty where they are.
        n: Examples that all have.
        margin: Drop that does not matter.
        skills: By class that all have; none without a common example.
    """

    skillfast: Name
    runs: Annotated[list[ComparedRun], Meta(min_length=2)]
    reasons: list[str]
    n: Count
    margin: Fraction
    skills: dict[str, SkillTrajectory]
