"""`evaluation.json`: what removing and amplifying skills does on held-out data, and what tasks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from skillfast.results.coverage import ModelCoverage
from skillfast.results.environment import Environment
from skillfast.results.provenance import DataDigests, UsedPrompt, Weights
from skillfast.results.records import Count, Document, Interval, Name, Positive, Record, Share, along, among
from skillfast.vocabulary import Kind

if TYPE_CHECKING:
    from collections.abc import Collection

FILE = "evaluation.json"
Measure = Literal["accuracy", "f1_macro", "class_accuracy", "class_f1", "perplexity", "bleu"]
Values = dict[str, float | None]
Intervals = dict[str, Interval]
PER_TASK, PER_CLASS = along("tasks"), along("classes")
Matrix = Annotated[list[Annotated[list[float | None], PER_TASK]], PER_TASK]


class Measured(Record, frozen=True):
    """Measures under one intervention.

    Attributes:
        values: Measure -> value; null where it is not defined.
        change: Measure -> value minus the intact model's; null where either is not defined.
        ci95: 95 % bootstrap interval of each value; null where there is none.
        change_ci95: 95 % bootstrap interval of each change, the same resampled examples on both sides.
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
        scale: Factor on its activations; 0 removes.
        neurons: How many it has.
        values: Measure -> value; null where it is not defined.
        change: Measure -> value minus the intact model's; null where either is not defined.
        ci95: 95 % bootstrap interval of each value; null where there is none.
        change_ci95: 95 % bootstrap interval of each change, the same resampled examples on both sides.
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


def _check_measures(of: str, measures: Collection[str], found: Outcome | TaskRemoval) -> None:
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

    def axes(self) -> dict[str, list[str]]:
        """Names of the classes and of the tasks."""
        return {"classes": self.data.classes, "tasks": [] if self.tasks is None else self.tasks.names}
