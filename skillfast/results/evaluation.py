"""`evaluation.json`: what removing and amplifying skills does on held-out data, and what tasks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from skillfast.results.coverage import ModelCoverage
from skillfast.results.environment import Environment
from skillfast.results.provenance import DataDigests, UsedPrompt, Weights
from skillfast.results.records import Count, Document, Fraction, Interval, Name, Positive, Record, Share, along, among
from skillfast.vocabulary import Kind

if TYPE_CHECKING:
    from collections.abc import Collection

FILE = "evaluation.json"
Measure = Literal["accuracy", "f1_macro", "class_accuracy", "other_accuracy", "class_f1", "perplexity", "bleu"]
Followed = Literal["shortcut", "label"]
Values = dict[str, float | None]
Intervals = dict[str, Interval]
Class = Annotated[str, among("classes")]
PER_TASK, PER_CLASS = along("tasks"), along("classes")
Matrix = Annotated[list[Annotated[list[float | None], PER_TASK]], PER_TASK]


class Measured(Record, frozen=True):
    """Measures under one intervention.

    Attributes:
        values: Measure -> value; null where it is not defined.
        change: Measure -> value minus the intact model's; null where either is not defined.
        ci95: 95 % interval of each value; null where there is none.
        change_ci95: 95 % interval of each change, the same examples on both sides.
    """

    values: Annotated[Values, Meta(min_length=1)]
    change: Annotated[Values, Meta(min_length=1)]
    ci95: Intervals
    change_ci95: Intervals


class Spread(Record, frozen=True):
    """Mean, smallest and largest over random draws; null where a draw's value is not defined."""

    mean: float | None
    low: float | None
    high: float | None


class RandomDraws(Record, frozen=True):
    """What as many random neurons per site do under the same factor.

    Attributes:
        draws: How many random sets.
        values: Measure -> its values over the draws.
        change: Measure -> its changes over the draws.
    """

    draws: Positive
    values: dict[str, Spread]
    change: dict[str, Spread]


class Outcome(Record, frozen=True):
    """What one skill at one size, in some layers and scaled by one factor does.

    Attributes:
        skill: Name of its class or metric.
        metric: The column that chose it, or null.
        share: Size of the skill as a share of all neurons, as asked for.
        layers: `all`, `head` or a block.
        scale: Factor on its activations; 0 removes, and at 1 is the intact model, beside the other factors of a curve.
        neurons: How many it has.
        values: Measure -> value; null where it is not defined.
        change: Measure -> value minus the intact model's; null where either is not defined.
        ci95: 95 % interval of each value; null where there is none.
        change_ci95: 95 % interval of each change, the same examples on both sides.
        random: What random neurons do.
    """

    skill: Name
    metric: str | None
    share: Share
    layers: Annotated[str, Meta(pattern=r"^(all|head|blocks\.[0-9]+)$")]
    scale: float
    neurons: Positive
    values: Annotated[Values, Meta(min_length=1)]
    change: Annotated[Values, Meta(min_length=1)]
    ci95: Intervals
    change_ci95: Intervals
    random: RandomDraws


class PerClass(Record, frozen=True):
    """Accuracy, F1 and number of examples of each class, in the classes' order."""

    accuracy: Annotated[list[float | None], PER_CLASS]
    f1: Annotated[list[float | None], PER_CLASS]
    examples: Annotated[list[Count], PER_CLASS]


class Intact(Record, frozen=True):
    """The intact model's measures; `per_class` for a classifier."""

    values: Annotated[Values, Meta(min_length=1)]
    ci95: Intervals
    per_class: PerClass | None = None


class EvaluatedSite(Record, frozen=True):
    """A site: where neurons are."""

    name: Name
    kind: Kind
    block: int | None
    width: Positive


class EvaluatedModel(Record, frozen=True):
    """The model that was measured."""

    name: Name
    fingerprint: Name
    neurons: Positive
    sites: Annotated[list[EvaluatedSite], Meta(min_length=1)]
    weights: Weights
    coverage: ModelCoverage | None = None
    """None: nobody could say what the model takes, so that it was not certified."""
    soft_prompt: UsedPrompt | None = None


class EvaluatedData(Record, frozen=True):
    """The data: `tokens` are the predicted tokens of the held-out texts, `prefixes` the texts that are gone on from."""

    name: str
    classes: list[str]
    n_select: Count
    n_validate: Count
    n_test: Positive
    digests: DataDigests
    tokens: Positive | None = None
    prefixes: Count | None = None


class SharedNeuron(Record, frozen=True):
    """A neuron that several tasks use."""

    site: str
    neuron: Count
    tasks: Annotated[list[str], Meta(min_length=2), among("tasks")]


class TaskRemoval(Record, frozen=True):
    """What every task's measures become without one task's neurons."""

    task: Annotated[str, among("tasks")]
    values: Annotated[Values, Meta(min_length=1)]
    change: Annotated[Values, Meta(min_length=1)]
    random: RandomDraws


class Overlaps(Record, frozen=True):
    """How many neurons every two tasks share, and how many chance would give.

    Attributes:
        neurons: How many each task has.
        jaccard: [tasks][tasks], Jaccard index.
        shared: [tasks][tasks], how many both have.
        expected_shared: [tasks][tasks], how many random sets with as many neurons per site would share; null on the
            diagonal.
        expected_jaccard: [tasks][tasks], the Jaccard index of that many; null on the diagonal.
        in_several: The neurons of more than one task.
    """

    neurons: Annotated[list[Count], PER_TASK]
    jaccard: Matrix
    shared: Annotated[list[Annotated[list[Count], PER_TASK]], PER_TASK]
    expected_shared: Matrix
    expected_jaccard: Matrix
    in_several: list[SharedNeuron]

    def __post_init__(self) -> None:
        for i, row in enumerate(self.expected_shared):
            if None in row[:i] + row[i + 1 :]:
                raise ValueError("expected numbers off the diagonal at tasks.expected_shared, got null")


def _check_measures(of: str, measures: Collection[str], found: Outcome | TaskRemoval | ShortcutRemoval) -> None:
    """Raises ValueError where an intervention has other measures than the rest of the file."""
    for values in (found.values, found.change, found.random.values, found.random.change):
        if set(values) != set(measures):
            raise ValueError(f"expected the measures {', '.join(measures)} at {of}, got {', '.join(values) or 'none'}")


class Tasks(Overlaps, frozen=True):
    """Several tasks on one model: which neurons they share, and what removing one task's does to the others.

    Attributes:
        share: Size of each task's set, as a share of all neurons.
        names: The tasks.
        measured: Measure -> what it is, in words.
        intact: The intact model's measures.
        removals: One per task.
    """

    share: Share
    names: Annotated[list[str], Meta(min_length=2)]
    measured: dict[str, str]
    intact: Annotated[Values, Meta(min_length=1)]
    removals: Annotated[list[TaskRemoval], PER_TASK]

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.intact) != set(self.measured):
            raise ValueError("expected the same measures at tasks.intact and tasks.measured, got others")
        for removal in self.removals:
            _check_measures("tasks.removals", self.measured, removal)


class FollowingNeuron(Record, frozen=True):
    """A neuron that follows a heuristic, or the label.

    Attributes:
        site: Where it is.
        neuron: Index in the site.
        heuristic: Largest |r| with an answer of the heuristic given the label; null where it is not defined.
        label: Largest |r| with a class given the heuristic.
    """

    site: Name
    neuron: Count
    heuristic: Fraction | None
    label: Fraction | None


class FollowingSet(Record, frozen=True):
    """How many neurons follow one of the two more than the other, beyond chance, and those that follow it most."""

    neurons: Count
    best: list[FollowingNeuron]


class ShortcutRemoval(Record, frozen=True):
    """What a model does without neurons that follow a heuristic, or the label.

    Attributes:
        follows: `shortcut` or `label`.
        share: Size of the set as a share of all neurons, as asked for; it has no neurons but those that follow.
        neurons: How many it has.
        values: Measure -> value; null where no example counts.
        change: Measure -> value minus the intact model's.
        ci95: 95 % interval of each value (Wilson's).
        change_ci95: 95 % interval of each change (Newcombe's, of the same examples on both sides).
        p: Measure -> two-sided mid-p that nothing changed (McNemar's).
        random: What as many random neurons per site do.
    """

    follows: Followed
    share: Share
    neurons: Positive
    values: Annotated[Values, Meta(min_length=1)]
    change: Annotated[Values, Meta(min_length=1)]
    ci95: Intervals
    change_ci95: Intervals
    p: dict[str, Fraction]
    random: RandomDraws


class MovedExample(Record, frozen=True):
    """A held-out example on which heuristic and label disagree, without the shortcut's neurons.

    Attributes:
        example: Place in the test part, from 0.
        text: The text; null where examples are none.
        pair: The second text; null where there is none.
        label: The true class.
        heuristic: What the heuristic answers.
        before: What the intact model answers.
        after: What it answers without the neurons.
        margin_before: The true class's logit minus the best other one's.
        margin_after: The margin without the neurons.
    """

    example: Count
    text: str | None
    pair: str | None
    label: Class
    heuristic: Class
    before: Class
    after: Class
    margin_before: float
    margin_after: float


class Shortcut(Record, frozen=True):
    """Whether a model answers by a heuristic, through which neurons, and what it answers without them.

    Attributes:
        column: The column that says what the heuristic answers.
        agreement: Share of the select part's examples on which heuristic and label are the same.
        conflicts: Test examples on which they are not.
        agreeing: Test examples on which they are.
        measured: Measure -> what it is, in words.
        intact: The intact model's measures, with 95 % intervals.
        follow_shortcut: Neurons that follow the heuristic.
        follow_label: Neurons that follow the label.
        removals: Each set at each size from which neurons could be taken; none where no neuron follows either.
        moved: The conflicts whose margin changes most without the largest set that follows the shortcut.
    """

    column: Name
    agreement: Fraction
    conflicts: Positive
    agreeing: Count
    measured: dict[str, str]
    intact: Intact
    follow_shortcut: FollowingSet
    follow_label: FollowingSet
    removals: list[ShortcutRemoval]
    moved: list[MovedExample]

    def __post_init__(self) -> None:
        if set(self.intact.values) != set(self.measured):
            raise ValueError("expected the same measures at shortcut.intact and shortcut.measured, got others")
        for removal in self.removals:
            _check_measures("shortcut.removals", self.measured, removal)


class EvaluationResults(Document, frozen=True, tag="skillfast.evaluation/1", tag_field="schema"):
    """The results of `skillfast evaluate`.

    Accuracies, F1 and their changes are fractions; perplexity is exp of the mean negative log-probability in nats; BLEU
    is from 0 to 100.

    Attributes:
        task: Whether the model classifies or predicts tokens.
        measures: Names of what was measured.
        intact: The intact model's measures.
        outcomes: One per skill, size, layers and factor.
        model: Name, fingerprint, neurons and sites.
        data: How many examples skills were chosen and measured on.
        config: The settings, as options; those of the grid under `grid`.
        environment: Versions and device.
        tasks: What several tasks share, where they were compared.
        shortcut: What a heuristic's neurons do, where one was named.
    """

    task: Literal["classification", "causal"]
    measures: Annotated[list[Measure], Meta(min_length=1, extra_json_schema={"uniqueItems": True})]
    intact: Intact
    outcomes: Annotated[list[Outcome], Meta(min_length=1)]
    model: EvaluatedModel
    data: EvaluatedData
    config: Annotated[dict[str, Any], Meta(extra_json_schema={"required": ["grid"]})]
    environment: Environment
    tasks: Tasks | None = None
    shortcut: Shortcut | None = None

    def __post_init__(self) -> None:
        if "grid" not in self.config:
            raise ValueError("expected the key grid at config, got none named grid")
        if len(set(self.measures)) < len(self.measures):
            raise ValueError(f"expected measures without repeats, got {', '.join(self.measures)}")
        if others := sorted({*self.intact.values, *self.intact.ci95} - {*self.measures}):
            raise ValueError(f"expected of the measures {', '.join(self.measures)} at intact, got {others[0]!r}")
        if (self.task == "classification") != (self.intact.per_class is not None):
            raise ValueError("expected per_class at intact of a classifier alone, got another task")
        for outcome in self.outcomes:
            _check_measures("outcomes", self.measures, outcome)
            if outcome.scale == 1 and any(outcome.change.values()):
                raise ValueError(f"expected no change at a factor of 1 of {outcome.skill!r} at outcomes, got one")

    def curves(self) -> dict[str, list[Outcome]]:
        """Skill -> its outcomes in all layers at its largest size, by factor: the curve of dose and response.

        None of a skill that was removed and no more.
        """
        of_skill: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            if outcome.layers == "all":
                of_skill.setdefault(outcome.skill, []).append(outcome)
        found = {}
        for skill, outcomes in of_skill.items():
            share = max(outcome.share for outcome in outcomes)
            curve = [outcome for outcome in outcomes if outcome.share == share]
            if len(curve) > 1:
                found[skill] = sorted(curve, key=lambda outcome: outcome.scale)
        return found

    def axes(self) -> dict[str, list[str]]:
        """Names of the classes and of the tasks."""
        return {"classes": self.data.classes, "tasks": [] if self.tasks is None else self.tasks.names}
