"""`compare.json`: what became of each skill between two runs. Accuracies and their changes are fractions."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from skillfast.results.provenance import PartDigests, Weights
from skillfast.results.records import Change, Count, Document, Fraction, Name, Positive, Record, among

FILE = "compare.json"
OF_CLASSES = among("classes")
Difference = Annotated[float, Meta(ge=-2, le=2)]
Limits = Annotated[list[float], Meta(min_length=2, max_length=2, description="the ends of a 95 % interval")]
Place = Literal["blocks", "kinds", "neurons"]
Verdict = Literal["lost", "gained", "weakened", "strengthened", "moved", "merged", "unchanged", "undecided"]
Outcome = Literal["passed", "failed", "undecided", "undefined"]


class ComparedRun(Record, frozen=True):
    """One of the two runs.

    Attributes:
        directory: Where its files are.
        model: Name of the model.
        weights: Digest and origin of the weights.
        fingerprint: Digest of its architecture.
        dataset: Name of the data.
        data: Digests of the test examples and their labels.
        accuracy: Accuracy of the intact model on the compared examples; null where there are none.
        n_test: Number of test examples.
    """

    directory: str
    model: Name
    weights: Weights
    fingerprint: Name
    dataset: Name
    data: PartDigests
    accuracy: Fraction | None
    n_test: Positive


class PairedChange(Record, frozen=True):
    """A quantity of both models on the same examples.

    Attributes:
        base: Value of BASE.
        new: Value of NEW.
        change: NEW's minus BASE's.
        ci95: Interval of the change.
        p: Two-sided mid-p of no change: McNemar's test of decisions, else of the signs of the differences.
        q: After Benjamini and Hochberg's correction over the skills whose tests could be significant at all.
        equivalence_q: Corrected p of a change beyond the margin, by two one-sided tests (TOST).
    """

    base: Change
    new: Change
    change: Difference
    ci95: Limits
    p: Fraction
    q: Fraction
    equivalence_q: Fraction


class Overlap(Record, frozen=True):
    """Neurons that both skills have.

    Attributes:
        shared: How many.
        jaccard: Jaccard index.
        chance: Jaccard index that random sets of these sizes per site have on average.
        p: Probability of at least so many by chance.
    """

    shared: Count
    jaccard: Fraction
    chance: Fraction
    p: Fraction


class Carried(Record, frozen=True):
    """What the other run's skill takes of a class in a model, beside the model's own.

    Attributes:
        takes: Accuracy that the class loses by the other run's skill.
        ci95: Interval of that.
        own: What it loses by the model's own skill.
        carries: Yes: the interval is not below half of what the own one takes. No: it is not above. Undecided: it holds
            the half, or the own one is not shown to take anything.
    """

    takes: Change
    ci95: Limits
    own: Change
    carries: Literal["yes", "no", "undecided"]


class Shift(Record, frozen=True):
    """A share of a skill's effect in either model."""

    base: float
    new: float


class SkillChange(Record, frozen=True, kw_only=True):
    """What became of a class's skill.

    Attributes:
        verdicts: What was found, the gravest first; else unchanged or undecided alone.
        n: Examples of the class.
        accuracy: Accuracy of the intact models on the class.
        visible_alone: Smallest change of accuracy that a test of this class alone finds in 80 % of the cases; null
            where none is.
        visible_of_all: The smallest that is found so often as the only one of all classes.
        drop: What the class loses by each model's own skill.
        base_skill: What it loses by BASE's skill in either model; null where NEW was not measured with it.
        new_skill: What it loses by NEW's skill in either model; null where BASE was not measured with it.
        in_base: In BASE, what it loses by BASE's skill (`base`) and by NEW's (`new`); null as `new_skill`.
        in_new: In NEW, what it loses by BASE's skill (`base`) and by NEW's (`new`); null as `base_skill`.
        base_set: Whether BASE's skill carries the class in NEW; null as `base_skill`.
        new_set: Whether NEW's skill carries the class in BASE; null as `new_skill`.
        harm: What other classes lose net, on average, by each model's own skill, as it is seen.
        overlap: Neurons that both skills have; null for models of different architectures.
        kinds: Kind -> share of the drop; null where it is not known.
        blocks: Block, as text, or head -> share of the drop; null where it is not known.
        moved: What a skill that moved is in now that it was not in.
        merged_with: Classes with which it merged.
        kept: Site -> neurons of both skills.
        left: Site -> neurons of BASE's alone.
        taken: Site -> neurons of NEW's alone.
    """

    verdicts: Annotated[list[Verdict], Meta(min_length=1)]
    n: Count
    accuracy: PairedChange | None
    visible_alone: Fraction | None
    visible_of_all: Fraction | None
    drop: PairedChange | None
    base_skill: PairedChange | None
    new_skill: PairedChange | None
    in_base: PairedChange | None
    in_new: PairedChange | None
    base_set: Carried | None
    new_set: Carried | None
    harm: Shift | None
    overlap: Overlap | None
    kinds: dict[str, Shift] | None
    blocks: dict[str, Shift] | None
    moved: list[Place]
    merged_with: Annotated[list[str], OF_CLASSES]
    kept: dict[Name, list[Count]] | None
    left: dict[Name, list[Count]] | None
    taken: dict[Name, list[Count]] | None


class NewInterference(Record, frozen=True):
    """A removal that takes more from another class than it did.

    Attributes:
        removed: Class whose skill is removed, each model's own.
        harmed: The class that loses.
        base: Change of its accuracy in BASE.
        new: Change of its accuracy in NEW.
        ci95: Interval of the difference.
        p: Exact one-sided p.
        q: After Benjamini and Hochberg's correction over all pairs whose tests could be significant at all.
    """

    removed: Annotated[str, OF_CLASSES]
    harmed: Annotated[str, OF_CLASSES]
    base: Change
    new: Change
    ci95: Limits
    p: Fraction
    q: Fraction


class Divergence(Record, frozen=True):
    """Mean Kullback-Leibler divergence from BASE's probabilities to NEW's, in nats, and its 95 % interval."""

    mean: Annotated[float, Meta(ge=0)]
    ci95: Limits


class OverallChange(Record, frozen=True):
    """All classes together.

    Attributes:
        accuracy: Mean over the classes; q is p, of one test.
        drop: Mean over the classes of what each loses by its own skill, in either model.
        harm: Net losses of other classes as they are seen, the mean over removals.
        kl: Divergence of the intact models' probabilities; null of runs of other classes.
    """

    accuracy: PairedChange
    drop: Shift
    harm: Shift
    kl: Divergence | None


class Check(Record, frozen=True):
    """One threshold of a gate, and what the examples say of it.

    Attributes:
        skill: The class; null of a check of the whole model.
        check: Name of the threshold.
        limit: Value of the threshold.
        value: What was measured; null where it is not defined.
        low: Lower end of its interval, at the level that a failure needs.
        high: Upper end, at the level that a pass needs; of a minimum the two change places.
        outcome: Passed: the whole interval is on the right side. Failed: it is on the wrong one. Undecided: it holds
            the limit, so that the examples are too few to tell. Undefined: there is no value.
    """

    skill: str | None
    check: Name
    limit: float
    value: float | None
    low: float | None
    high: float | None
    outcome: Outcome


class GateResult(Record, frozen=True):
    """What a gate decided.

    Attributes:
        decision: Passed: every check. Regression: one failed. Not comparable: else.
        level: Share of equal models that fail by chance, at most, over all checks.
        checks: In the gate's order.
    """

    decision: Literal["passed", "regression", "not comparable"]
    level: Fraction
    checks: list[Check]


class Comparison(Document, frozen=True, kw_only=True, tag="skillfast.compare/1", tag_field="schema"):
    """What became of each skill between two runs.

    Attributes:
        skillfast: Version that compared.
        base: The earlier run.
        new: The later run.
        reasons: Why they are not runs of the same classes and examples; empty where they are.
        only_base: Classes that NEW lacks.
        only_new: Classes that BASE lacks.
        n: Examples that both have.
        n_only_base: Test examples that NEW lacks.
        n_only_new: Test examples that BASE lacks.
        margin: Largest change of accuracy that does not matter; of a drop twice as much.
        level: False discovery rate of each family of tests.
        overall: All classes together; null without common examples.
        skills: By class that both have, in BASE's order.
        interference: Removals that take more from another class than they did, the largest first.
        gate: What the gate decided; absent without one.
    """

    skillfast: Name
    base: ComparedRun
    new: ComparedRun
    reasons: list[str]
    only_base: list[str]
    only_new: list[str]
    n: Count
    n_only_base: Count
    n_only_new: Count
    margin: Fraction
    level: Fraction
    overall: OverallChange | None
    skills: dict[str, SkillChange]
    interference: list[NewInterference]
    gate: GateResult | None = None

    def axes(self) -> dict[str, list[str]]:
        """Names of the classes that both have."""
        return {"classes": [*self.skills]}

    @property
    def comparable(self) -> bool:
        """Whether both runs are of the same classes and examples, under the same settings."""
        return not self.reasons

    @property
    def exit_code(self) -> int:
        """What the command exits with: 0, 3 of a regression, 4 where a gate or the data let nothing be said."""
        if self.gate is None:
            return 0 if self.skills else 4
        return {"passed": 0, "regression": 3, "not comparable": 4}[self.gate.decision]

    @property
    def passed(self) -> bool:
        """Whether a gate passed."""
        return self.gate is not None and self.gate.decision == "passed"
