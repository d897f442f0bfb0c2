"""`results.json`: what a bench run found. Accuracies and their changes are fractions, not percent."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType, field

from skillfast.results.coverage import ModelCoverage
from skillfast.results.environment import Environment
from skillfast.results.provenance import DataDigests, UsedPrompt, Weights
from skillfast.results.records import (
    Change,
    Count,
    Document,
    Fraction,
    Interval,
    Name,
    Positive,
    Record,
    Share,
    along,
    among,
    check_open,
)
from skillfast.vocabulary import Finetune, Kind

Correlation = Annotated[float, Meta(ge=-1.000001, le=1.000001)] | None
Angle = Annotated[float, Meta(ge=0, le=180, description="degrees")] | None
PER_CLASS, OF_CLASSES, OF_SITES = along("classes"), among("classes"), among("sites")
Class = Annotated[str, OF_CLASSES]
Changes = Annotated[list[Annotated[list[Change], Meta(min_length=2), PER_CLASS]], Meta(min_length=2), PER_CLASS]
TwoNames = Annotated[list[str], Meta(min_length=2, max_length=2), OF_CLASSES]
TwoChanges = Annotated[list[Change], Meta(min_length=2, max_length=2)]
TwoNumbers = Annotated[list[float], Meta(min_length=2, max_length=2)]
Names = Annotated[list[str], Meta(min_length=1), OF_CLASSES]
FILE = "results.json"
REMEDY = "run `skillfast bench` into that folder"  # where a file of a run is missing or broken
Seconds = Annotated[float, Meta(ge=0)]


class Config(Record, frozen=True, forbid_unknown_fields=False):
    """The settings that every run has; others stand beside them."""

    model: str | None
    model_kwargs: dict[str, Any]
    checkpoint: str | None
    pretrained: bool
    finetune: Finetune | None
    dataset: Name
    data_dir: str | None
    train_per_class: Positive | None
    test_per_class: Positive | None
    mean: Annotated[list[float], Meta(min_length=1)] | None
    std: Annotated[list[float], Meta(min_length=1)] | None
    crop_pct: Annotated[float, Meta(gt=0)] | None
    device: Name | None
    dtype: Name
    batch_size: Positive
    seed: int
    sites: Annotated[list[str], Meta(min_length=1)]
    pool: Name
    method: Name
    share: Share
    max_site_share: Share
    scale: float
    backend: Name
    contrastive: bool = False


class SiteSize(Record, frozen=True):
    """A site: where neurons are; `block` is null for the head."""

    name: Name
    kind: Kind
    block: Count | None
    heads: Positive | None
    width: Positive


class Trained(Record, frozen=True):
    """Where the weights came from and what was trained."""

    source: Literal["scratch", "checkpoint", "pretrained", "given"] = field(name="from")
    finetune: Finetune | None = None
    epochs: Count | None = None
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    n_train: Count | None = None
    validation_accuracy: Fraction | None = None


class Model(Record, frozen=True):
    """The model whose skills were removed."""

    name: Name
    parameters: Positive
    embed_dim: Positive
    fingerprint: Name
    neurons: Positive
    sites: Annotated[list[SiteSize], Meta(min_length=1)]
    weights: Weights
    trained: Trained
    coverage: ModelCoverage | None = None
    """None: nobody could say what the model takes, so that it was not certified."""
    soft_prompt: UsedPrompt | None = None


class Dataset(Record, frozen=True):
    """The data: examples that skills were chosen on, that settings were chosen on, and that were measured on."""

    name: Name
    classes: Annotated[list[str], Meta(min_length=2, extra_json_schema={"uniqueItems": True})]
    n_select: Positive
    n_validate: Count
    n_test: Positive
    digests: DataDigests

    def __post_init__(self) -> None:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("expected classes with different names at dataset.classes, got one twice")


class Baseline(Record, frozen=True):
    """Accuracy of the intact model: the mean over classes, and each class's."""

    accuracy: Fraction
    per_class: Annotated[list[Fraction], Meta(min_length=2), PER_CLASS]
    n_test_per_class: Annotated[list[Count], Meta(min_length=2), PER_CLASS]


class OverallRemoval(Record, frozen=True):
    """Accuracy over all test examples without one skill.

    Attributes:
        skill: Class of the removed skill.
        neurons: How many it has.
        share: How many as a share of all neurons of the traced sites.
        accuracy: Without it.
        change: Against the intact model.
        ci95: Interval of the change.
        random_changes: With as many neurons of each site drawn at random: one per draw.
    """

    skill: Class
    neurons: Count
    share: Fraction
    accuracy: Fraction
    change: Change
    ci95: Interval
    random_changes: Annotated[list[Change], Meta(min_length=1)]


class Overall(Record, frozen=True):
    """Accuracy over all test examples, whatever their class.

    Attributes:
        accuracy: Accuracy of the intact model.
        n_test: How many examples.
        removals: One per skill.
        random_change: Mean over skills and draws of the random controls' changes.
    """

    accuracy: Fraction
    n_test: Positive
    removals: Annotated[list[OverallRemoval], Meta(min_length=2), PER_CLASS]
    random_change: Change


class BothParts(Record, frozen=True):
    """Mean |r| of the best neurons on either part; null where no neuron has an r."""

    select: Fraction | None
    test: Fraction | None


class BestNeuron(Record, frozen=True):
    """A neuron, the column that it follows best, and its r on either part."""

    site: Annotated[str, OF_SITES]
    unit: Count
    column: str
    select: Correlation
    test: Correlation


class MetricCorrelations(Record, frozen=True):
    """How closely the best neurons follow one metric.

    Attributes:
        select: Mean |r| of the best neurons of all sites on the select part.
        test: Mean |r| of the same neurons on the test part.
        sites: Site -> the same of its own best neurons.
        last_block: Mean |r| of the best neurons of all sites of the last block; null without blocks.
        neurons: The best over all columns of the metric.
    """

    select: Fraction | None
    test: Fraction | None
    sites: Annotated[dict[str, BothParts], OF_SITES]
    last_block: BothParts | None
    neurons: list[BestNeuron]


class Correlations(Record, frozen=True):
    """How closely the best neurons follow each metric; they are ranked on the select part.

    Attributes:
        statistic: What they are ranked by.
        top: How many neurons count as the best.
        chance: Mean |r| on the test part of neurons that do not follow a metric there; null of fewer than 3 examples.
        metrics: By metric.
    """

    statistic: Literal["pearson"]
    top: Positive
    chance: Fraction | None
    metrics: Annotated[dict[str, MetricCorrelations], Meta(min_length=1)]

    def __post_init__(self) -> None:
        first, *others = self.metrics.values()
        if any(set(metric.sites) != set(first.sites) for metric in others):
            raise ValueError("expected the same sites of each metric at correlations.metrics, got others")


class Harm(Record, frozen=True):
    """What other classes lose net in the long run, between two estimates; a gain counts as 0.

    Attributes:
        plug_in: The net losses that are seen: more than the harm on average, for chance makes every second class lose.
        cross_fitted: Losses in one half of the changed examples where the other half loses: at most the harm on
            average, and 0 where there is none.
        noise_floor: What `plug_in` would be at this number of examples if each change were a gain or a loss by chance.
        ci95: Interval of the harm (Imbens and Manski).
    """

    plug_in: Fraction
    cross_fitted: Change
    noise_floor: Fraction
    ci95: Interval


class EffectIntervals(Record, frozen=True):
    """95 % intervals of an effect; null where a value is known without any data."""

    target_drop: Interval
    regret: Interval
    agreement: Interval
    gross_loss: Interval
    other_change: Interval


class RatioLimits(Record, frozen=True):
    """Lower 95 % limits of the ratios: the drop's lower end over the denominator's upper end; null without a drop."""

    ratio: float | None
    strict_ratio: float | None
    harm_ratio: float | None


class Selectivity(Record, frozen=True):
    """What the removals do to their own classes and to the others.

    Attributes:
        target_drop: What a class loses when its own skill is removed, the mean over classes.
        regret: How far the accuracy on the other classes stays behind the oracle's; below 0 where it is better.
        agreement: Share of decisions on other classes' examples that are the oracle's.
        gross_loss: Share of other classes' examples that were right and become wrong, gains not counted against them.
        harm: Net losses of the other classes.
        other_change: Mean change of the other classes.
        ratio: target_drop over |other_change|; null where that is 0.
        other_abs_change: Mean |change| of the other classes, of which part is chance, as of `harm.plug_in`.
        strict_ratio: target_drop over other_abs_change; null where that is 0.
        harm_ratio: target_drop over harm.plug_in; null where that is 0.
        ci95: Intervals.
        at_least: Limits of the ratios.
    """

    target_drop: Change
    regret: Change
    agreement: Fraction
    gross_loss: Fraction
    harm: Harm
    other_change: Change
    other_abs_change: Fraction
    ratio: float | None
    strict_ratio: float | None
    harm_ratio: float | None
    ci95: EffectIntervals
    at_least: RatioLimits


class Verdict(Record, frozen=True):
    """What is known of one removal.

    Attributes:
        target_drop: What its class loses.
        ci95: Interval of target_drop.
        harm: What the other classes lose net, on average.
        others_lose_at_most: No other class loses more: a bound for all of them at once, with 95 % confidence.
        visible_alone: Smallest loss of a class that a test of it alone finds in 80 % of the cases; null where none is.
        visible_of_all: The smallest that is found so often as the first of all pairs of classes.
        harmed: Classes of which a test finds that they lose, at 5 % over all others.
        verdict: Harmful; else not above the bound, if that is no larger than what would have been seen; else undecided.
    """

    target_drop: Change
    ci95: Interval
    harm: Harm
    others_lose_at_most: Change
    visible_alone: Fraction | None
    visible_of_all: Fraction | None
    harmed: Annotated[list[str], OF_CLASSES]
    verdict: Literal["harmful", "not above", "undecided"]


class Oracle(Selectivity, frozen=True):
    """The effect of removing each class's logit, and its removal matrix: a reference without regret or harm."""

    removal_matrix: Changes


class OwnControl(Record, frozen=True, kw_only=True):
    """What draws of neurons cost the class that they were drawn for.

    Attributes:
        draws: How many there are for each class.
        n_examples: Test examples that they were run on.
        target_drop: What a class loses, the mean over classes and draws.
        per_class: The mean over draws, by class.
        spread: Standard deviation of what a class loses between its draws, the mean over classes.
        ci95: Interval of target_drop, for other images and other draws.
    """

    draws: Positive
    n_examples: Positive
    target_drop: Change
    per_class: Annotated[list[Change], Meta(min_length=2), PER_CLASS]
    spread: Annotated[float, Meta(ge=0)] | None = None
    ci95: Interval


class ReplacedIntervals(Record, frozen=True):
    """95 % intervals of what a class loses, by what takes the place of its skill's neurons; for other test examples."""

    zero: Interval
    mean: Interval
    resample: Interval
    constant: Interval


class Replaced(Record, frozen=True):
    """What a class loses where something takes the place of its skill's neurons.

    Attributes:
        zero: Where it is 0.
        mean: Where it is each neuron's mean.
        resample: Where it is the activations of another example.
        constant: Where it is the constants that cost the model least (optimal ablation, arXiv 2409.09951).
        marked: Whether zero differs from mean or constants by more than 5 points: part of the drop is the value, not
            the information.
        ci95: Intervals of the four; the constants stay as they were fitted.
    """

    zero: Change
    mean: Change
    resample: Change
    constant: Change
    marked: bool
    ci95: ReplacedIntervals


class Replacements(Record, frozen=True):
    """Drops by what takes the place of a skill's neurons, the mean over classes and by class."""

    average: Replaced
    per_class: Annotated[dict[str, Replaced], PER_CLASS]


class RandomControl(Selectivity, frozen=True, kw_only=True):
    """The effect of removing as many other neurons of each site, drawn at random, averaged over draws.

    Attributes:
        draws: Draws that were run on the examples of all classes.
        own: More draws, run on each class's own examples alone.
    """

    draws: Positive
    own: OwnControl


class CandidateEffect(Record, frozen=True):
    """A way to choose skills, and its effect on the validation and the test part.

    Attributes:
        method: A statistic, attribution or a mask.
        contrastive: Whether by the score minus the other classes' best.
        share: Size as a share of all neurons.
        keep: Weight of the other classes in a mask.
        drop: What it takes from its own classes on the part that chooses.
        limit: Largest upper end of the regret at which it is taken; null where there is no other candidate.
        validation: Effect on the part that chooses; null where it takes too little for its cost to others to matter.
        test: Effect on the part that chooses nothing; null where it was not found to be within its limit.
    """

    method: Name
    contrastive: bool
    share: Share
    keep: float | None
    drop: Change
    limit: float | None
    validation: Selectivity | None
    test: Selectivity | None


class SizeControl(Record, frozen=True):
    """The effect of as many random neurons as candidates of a size have on the validation part."""

    share: Share
    validation: Selectivity


class SelectionOracle(Record, frozen=True):
    """The oracle's effect on the validation part."""

    validation: Selectivity


class SelectionGap(Record, frozen=True):
    """Effect on the test part minus that on the validation part; of harm the estimate that no size of them biases."""

    target_drop: float
    regret: float
    agreement: float
    gross_loss: float
    other_change: float
    harm: float


class SelectionResult(Record, frozen=True):
    """Which candidates were chosen, and what each does.

    Attributes:
        rule: By which they were chosen.
        margin: Regret beyond the random control's that a choice may risk.
        chosen: Place of each class's one among the candidates, in the classes' order.
        candidates: All that were tried.
        controls: Random neurons that the limits come from, by size.
        validation: Effect of the chosen ones on the validation part.
        gap: How far the effect of the chosen ones on the test part is from that.
        oracle: The reference.
    """

    rule: Name
    margin: Share
    chosen: Annotated[list[Count], Meta(min_length=2), PER_CLASS]
    candidates: Annotated[list[CandidateEffect], Meta(min_length=1)]
    controls: list[SizeControl]
    validation: Selectivity
    gap: SelectionGap
    oracle: SelectionOracle

    def __post_init__(self) -> None:
        if max(self.chosen) >= len(self.candidates):
            raise ValueError(
                f"expected places among {len(self.candidates)} candidates at selection.chosen, got {max(self.chosen)}"
            )


class Shares(Record, frozen=True, kw_only=True):
    """Shapley value of each kind as a share of what the whole skill costs.

    null where nothing dropped, or where the model has none; mixers, experts and routers are left out then.
    """

    mlp: float | None
    attn: float | None
    ssm: float | None = None
    expert: float | None = None
    router: float | None = None
    head: float | None


class ShareIntervals(Record, frozen=True, kw_only=True):
    """95 % bootstrap intervals of the shares."""

    mlp: Interval
    attn: Interval
    ssm: Interval = None
    expert: Interval = None
    router: Interval = None
    head: Interval
    non_additivity: Interval = None


class BlockShare(Record, frozen=True):
    """What a block adds to the loss, as a share.

    Attributes:
        block: null for the head.
        share: Shapley value over the order of the blocks and its reverse; the blocks' add up to 1.
        ci95: Interval of the share.
        bottom_up: What the block adds when the blocks before it are removed.
        top_down: What it adds when the blocks after it are removed.
        per_class: The share in each class's own drop.
    """

    block: Count | None
    share: float | None
    ci95: Interval
    bottom_up: float | None
    top_down: float | None
    per_class: Annotated[dict[str, float | None], PER_CLASS]


class LayerContribution(Shares, frozen=True):
    """Where the skills live.

    Attributes:
        non_additivity: 1 - (sum of what each kind costs alone) / (what the whole skill costs).
        per_class: Class -> the shares in its own drop.
        ci95: Intervals of the shares.
        per_block: In the order of the forward.
        n_by_block: Test examples that these come from; the other shares come from all.
    """

    non_additivity: float | None
    per_class: Annotated[dict[str, Shares], PER_CLASS]
    ci95: ShareIntervals
    per_block: list[BlockShare] | None = None
    n_by_block: Positive | None = None


class EmbeddingIntervals(Record, frozen=True):
    """95 % intervals, by a jackknife over groups of examples."""

    cosine: Interval
    rank_preservation: Interval
    knn_accuracy_change: Interval
    cka: Interval
    target_knn_accuracy_change: Interval


class EmbeddingControl(Record, frozen=True):
    """Means over the removals of as many neurons at random."""

    cosine: Correlation
    rank_preservation: Correlation
    knn_accuracy_change: Change | None
    cka: Correlation
    target_knn_accuracy_change: Change | None


class EmbeddingDifference(Record, frozen=True):
    """The skills' means minus those of as many random neurons.

    Attributes:
        ci95: Intervals, which hold the spread of the draws.
        draws: Random draws per skill.
    """

    cosine: float | None
    rank_preservation: float | None
    knn_accuracy_change: float | None
    cka: float | None
    target_knn_accuracy_change: float | None
    ci95: EmbeddingIntervals
    draws: Positive


class EmbeddingRemoval(EmbeddingControl, frozen=True):
    """The metrics after one skill's removal, beside what it costs the class.

    Attributes:
        target_drop: What the class loses.
        knn_accuracy_change_per_class: Change of kNN accuracy on each class.
        coordinates_left_out: Coordinates of the embedding that the removal itself writes; no metric counts them.
    """

    target_drop: Change | None
    knn_accuracy_change_per_class: Annotated[list[Change | None], PER_CLASS]
    coordinates_left_out: Count


class EmbeddingReasons(Record, frozen=True):
    """Why values are missing: the classes, or how many examples were left out per removal."""

    one_image: Names | None = None
    no_images: Names | None = None
    zero_or_not_finite: Annotated[dict[str, Positive], OF_CLASSES] | None = None
    constant_embeddings: Names | None = None


class StandardMetrics(EmbeddingControl, frozen=True, kw_only=True):
    """Metrics of embeddings before and after: means over the removals.

    Coordinates that a removal itself writes (the neurons of the head that it sets to 0) are left out, before and after.

    Attributes:
        knn_accuracy: kNN accuracy of the intact model, leaving one out; neighbours are the other test examples.
        target_drop: What a class loses when its own skill is removed.
        n_neighbours: How many vote.
        n_ranked: Examples whose neighbours are ranked.
        ci95: Intervals of the means.
        random_control: Means with as many neurons removed at random.
        difference: The skills' means minus the random control's.
        per_class: By the class whose skill is removed.
        reasons: Why values are missing.
    """

    knn_accuracy: Fraction | None
    target_drop: Change | None
    n_neighbours: Positive
    n_ranked: Positive
    ci95: EmbeddingIntervals
    random_control: EmbeddingControl | None = None
    difference: EmbeddingDifference | None = None
    per_class: Annotated[dict[str, EmbeddingRemoval], PER_CLASS]
    reasons: EmbeddingReasons | None = None


class NeverSeen(Record, frozen=True):
    """A model of the same architecture, trained by the same recipe from the same seed on no example of a class.

    Attributes:
        information_lost: What a linear probe on its embeddings tells the class apart by, less than one on the measured
            model's, as a share of that: the reference for what a removal takes. Null where nothing is told apart.
        recall: Recall of the class by the classifier of the model that never saw it.
        recall_refitted: Recall of the class by the probe.
        retained: Mean accuracy on the other classes of the model that never saw the class.
        retained_removed: Mean accuracy on the other classes of the measured model without the class's skill.
        n_train: Examples that it was trained on.
    """

    information_lost: float | None
    recall: Fraction | None
    recall_refitted: Fraction | None
    retained: Fraction
    retained_removed: Fraction
    n_train: Positive


class ClassInformation(Record, frozen=True):
    """What the removal of a class's skill takes, as shares of what is told apart before it; null where nothing is.

    Told apart: how much more often a class is predicted of its own examples than of any other class's.

    Attributes:
        readout_lost: By the model's own classifier.
        information_lost: By a linear probe that is fitted anew on the embeddings.
        relearned: What the classifier tells apart after some steps on a few examples of the class and of others.
        relearned_without: What it tells apart after as many steps on the others alone.
        recall: The intact model's recall of the class.
        recall_removed: The model's recall after the removal.
        recall_refitted: The refitted probe's recall after the removal.
        never_seen: What a model that never saw the class knows of it; absent where none was trained.
    """

    readout_lost: float | None
    information_lost: float | None
    relearned: float | None
    relearned_without: float | None
    recall: Fraction | None
    recall_removed: Fraction | None
    recall_refitted: Fraction | None
    never_seen: NeverSeen | None = None


class InformationIntervals(Record, frozen=True):
    """95 % intervals of the means over classes, by a jackknife over groups of test examples; probes and draws stay."""

    readout_lost: Interval
    information_lost: Interval
    relearned: Interval
    relearned_without: Interval


class Information(Record, frozen=True):
    """Gone or hidden: means over the classes, and each class's.

    Attributes:
        readout_lost: Mean over the classes.
        information_lost: Mean over the classes.
        relearned: Mean over the classes; null for a classifier that is not linear.
        relearned_without: Mean over the classes.
        ci95: Intervals of the means.
        per_class: By the class whose skill is removed.
        n_fitted: Test examples that a probe is fitted on, at least: two thirds of them, which read the others.
        shots: Examples of the class that it is relearned from.
        steps: Gradient steps on them.
    """

    readout_lost: float | None
    information_lost: float | None
    relearned: float | None
    relearned_without: float | None
    ci95: InformationIntervals
    per_class: Annotated[dict[str, ClassInformation], PER_CLASS]
    n_fitted: Positive
    shots: Positive
    steps: Positive


class Pair(Record, frozen=True):
    """Two classes: what b gains when a is removed, then what a gains when b is removed.

    Attributes:
        classes: a and b.
        change: Change of accuracy.
        beyond_oracle: Change of accuracy minus the oracle's.
        margin: Mean shift of the margin (the true logit minus the best other one's) beyond random draws; decides.
        margin_beyond_oracle: Mean shift beyond the oracle's; null of two classes, where that is infinite.
        p: The larger of the two directions.
        q: After Benjamini-Hochberg's correction over all pairs and both kinds.
        significant: Whether q is at most 0.05.
    """

    classes: TwoNames
    change: TwoChanges
    beyond_oracle: TwoChanges
    margin: TwoNumbers
    margin_beyond_oracle: TwoNumbers | None
    p: Fraction
    q: Fraction
    significant: bool


class StrongestAngle(Record, frozen=True):
    """The class that turns most when another class's skill is removed."""

    removed: Class
    turned: Class = field(name="class")
    angle_deg: Angle


class StrongestOverlap(Record, frozen=True):
    """The two skills that share most."""

    one: Class
    other: Class
    jaccard: Fraction


class Strongest(Record, frozen=True):
    """The largest of each kind, significant or not; null where there is none."""

    angle: StrongestAngle | None
    overlap: StrongestOverlap | None
    competition: Pair | None
    linkage: Pair | None


class VisiblePair(Record, frozen=True):
    """The smallest effect by which a pair of classes is found in 80 % of the cases: the median over all pairs.

    Attributes:
        margin: Shift of a class's mean margin beyond random draws, the mean of both directions.
        change: What that changes the class's accuracy by, against the intact model.
    """

    margin: float
    change: Fraction


class VisiblePairs(Record, frozen=True):
    """What could have been found; null where no effect is, as competition of two classes."""

    competition: VisiblePair | None
    linkage: VisiblePair | None


class AngleMeans(Record, frozen=True):
    """Mean angle of each class without its own skill, and without another's."""

    own_angle_deg: Angle
    other_angle_deg: Angle


class AngleIntervals(Record, frozen=True):
    """95 % intervals of the angles and of their means, by a jackknife over groups of examples."""

    angles_deg: Annotated[list[Annotated[list[Interval], PER_CLASS]], PER_CLASS]
    own_angle_deg: Interval
    other_angle_deg: Interval


class AngleDifference(Record, frozen=True):
    """The skills' mean angles minus those of as many random neurons, in degrees.

    Attributes:
        own_angle_deg: Turn of each class without its own skill.
        other_angle_deg: Turn of each class without another's.
        ci95: Intervals of both, which hold the spread of the draws.
        draws: Random draws per skill.
    """

    own_angle_deg: float | None
    other_angle_deg: float | None
    ci95: dict[Literal["own_angle_deg", "other_angle_deg"], Interval]
    draws: Positive


class InterferenceReasons(Record, frozen=True):
    """Why values are missing, and of which classes."""

    no_images: Names | None = None
    one_image: Names | None = None
    no_direction: Names | None = None


TOGETHER = {
    "angles_deg": ["own_angle_deg", "other_angle_deg", "ci95", "strongest"],
    "strongest": ["competition", "linkage"],
}


class Interference(Record, frozen=True, kw_only=True):
    """How skills interfere.

    Attributes:
        angles_deg: [K][K], how far class j's mean embedding turns when skill i is removed, in the coordinates that the
            removal does not write itself, from products of means over disjoint halves; absent without embeddings.
        own_angle_deg: Mean of the diagonal.
        other_angle_deg: Mean of the rest.
        ci95: Intervals of the angles.
        random_control: The means with as many neurons removed at random.
        difference: The means minus the random control's.
        competition: Pairs of which each removal helps the other class beyond random draws and oracle, significantly.
        linkage: Pairs of which each removal hurts the other class beyond random draws, significantly.
        oracle_explains: Pairs of which each removal helps the other class beyond random draws, but not the oracle.
        visible: The smallest effects that these examples and draws could have shown.
        strongest: The largest of each kind.
        overlap: [K][K], Jaccard index of the skills' neurons.
        reasons: Why values are missing.
    """

    json_schema: ClassVar[dict[str, Any]] = {"dependentRequired": TOGETHER}

    angles_deg: (
        Annotated[list[Annotated[list[Angle], Meta(min_length=2), PER_CLASS]], Meta(min_length=2), PER_CLASS] | None
    ) = None
    own_angle_deg: Angle | UnsetType = UNSET
    other_angle_deg: Angle | UnsetType = UNSET
    ci95: AngleIntervals | None = None
    random_control: AngleMeans | None = None
    difference: AngleDifference | None = None
    competition: list[Pair] | None = None
    linkage: list[Pair] | None = None
    oracle_explains: list[Pair] | None = None
    visible: VisiblePairs | None = None
    strongest: Strongest | None = None
    overlap: Annotated[
        list[Annotated[list[Fraction | None], Meta(min_length=2), PER_CLASS]], Meta(min_length=2), PER_CLASS
    ]
    reasons: InterferenceReasons | None = None

    def __post_init__(self) -> None:
        for name, needed in TOGETHER.items():
            missing = [key for key in needed if getattr(self, key) is (UNSET if "angle" in key else None)]
            if getattr(self, name) is not None and missing:
                raise ValueError(f"expected the key {missing[0]} beside {name} at interference, got none")


class ClassIdentifiability(Record, frozen=True):
    """What is chosen for a class, beside what is chosen for no class, on other examples, and of other neurons.

    Attributes:
        drop: Accuracy that the class loses by the set that is chosen for it, beyond what other examples lose by it.
        control: What arbitrary groups of as many examples of all classes lose by sets that are chosen for them, beyond
            what other examples lose; the mean over a few groups.
        overlap: Jaccard index of the sets that are chosen on two halves of the class's examples.
        chance_overlap: Jaccard index that random sets of these sizes per site have on average.
        second_drop: What the class loses on the test part by a second set, as large as its skill and disjoint from it.
        seed_overlap: Jaccard index of the masks that are learned from two seeds; null where none were.
        chance_seed_overlap: Jaccard index that random sets of these sizes per site have on average.
        flagged: Whether the control is above its limit or an overlap below.
    """

    drop: float | None
    control: float | None
    overlap: Fraction | None
    chance_overlap: Fraction | None
    second_drop: Change | None
    seed_overlap: Fraction | None
    chance_seed_overlap: Fraction | None
    flagged: bool


class Identifiability(Record, frozen=True):
    """Whether skills are the classes' own: means over the classes, and each class's.

    Attributes:
        drop: Mean over the classes.
        control: Mean over the groups.
        overlap: Mean over the classes.
        chance_overlap: Mean over the classes.
        second_drop: Mean over the classes.
        seed_overlap: Mean over the few classes whose masks are learned from a second seed; null where none are.
        chance_seed_overlap: Mean over these.
        per_class: By class.
        method: How sets are chosen here, but for those of the seeds.
        share: Size of the sets, as a share of all neurons.
        groups: Arbitrary groups for each class.
        n_examples: Examples of the select part that they are chosen on.
        control_limit: A class is flagged whose control is above this.
        overlap_limit: A class is flagged whose halves or seeds overlap less than this.
    """

    drop: float | None
    control: float | None
    overlap: Fraction | None
    chance_overlap: Fraction | None
    second_drop: Change | None
    seed_overlap: Fraction | None
    chance_seed_overlap: Fraction | None
    per_class: Annotated[dict[str, ClassIdentifiability], PER_CLASS]
    method: Literal["attribution"]
    share: Share
    groups: Positive
    n_examples: Positive
    control_limit: Fraction
    overlap_limit: Fraction


class PhaseSeconds(Record, frozen=True, kw_only=True):
    """Seconds per stage, in the order of the run; those of an interrupted run included."""

    data: Seconds
    train: Seconds
    baseline: Seconds
    trace: Seconds
    select: Seconds | None = None
    choose: Seconds | None = None
    sweep: Seconds
    like: Seconds | None = None
    shares: Seconds | None = None
    embeddings: Seconds | None = None
    never_seen: Seconds | None = None
    identifiability: Seconds | None = None
    trade_off: Seconds | None = None
    replace: Seconds | None = None
    trace_test: Seconds | None = None
    total: Seconds


class Cost(Record, frozen=True):
    """What the run took.

    Attributes:
        seconds: Per stage.
        samples_per_s: Examples traced per second.
        forward_s: Seconds of plain forwards over the measured batches.
        trace_over_forward: Time of traced forwards over that of plain ones.
        peak_rss_bytes: Peak memory of the process.
        peak_device_bytes: Peak memory of the CUDA devices together; null without one.
        state_bytes: Memory of the statistics.
        resumed: Phases that an interrupted run had finished.
    """

    seconds: PhaseSeconds
    samples_per_s: Seconds | None
    forward_s: Seconds | None
    trace_over_forward: Seconds | None
    peak_rss_bytes: Count
    peak_device_bytes: Count | None
    state_bytes: Count
    resumed: list[str] | None = None


CONFIG_SCHEMA = msgspec.json.schema_components([Config])[1]["Config"]


class BenchResults(Document, frozen=True, kw_only=True, tag="skillfast.bench/1", tag_field="schema"):
    """The results of `skillfast bench`. Accuracies and their changes are fractions, not percent.

    Attributes:
        environment: Versions, device and backends.
        config: The settings, as options; `Config` has those that are always there.
        model: The model and its sites.
        dataset: The data and its classes.
        baseline: Accuracy of the intact model.
        overall: Accuracy over all test examples.
        removal_matrix: [K][K], change in accuracy of class j when skill i is removed.
        selectivity: What the removals do to their own classes and to the others.
        verdicts: By class, what is known of its removal; absent where a class has fewer than two examples.
        oracle: The reference: each class's logit removed.
        random_control: What as many other neurons do, drawn at random.
        matched_control: What as many other neurons cost a class that are about as active as the skill's.
        replacements: What classes lose where something else than 0 takes the neurons' place; absent where neurons are
            scaled, or where donors did not fit the memory.
        layer_contribution: Where the skills live.
        standard_metrics: Metrics of embeddings before and after; absent without embeddings.
        information: Whether classes are gone or hidden; absent without embeddings.
        identifiability: Whether skills are the classes' own.
        interference: How the skills interfere.
        selection: Which candidate was chosen.
        correlations: How closely the best neurons follow each metric.
        cost: What the run took.
    """

    environment: Environment
    config: Annotated[dict[str, Any], Meta(extra_json_schema=CONFIG_SCHEMA)]
    model: Model
    dataset: Dataset
    baseline: Baseline
    overall: Overall | None = None
    removal_matrix: Changes
    selectivity: Selectivity
    verdicts: Annotated[dict[str, Verdict], PER_CLASS] | None = None
    oracle: Oracle
    random_control: RandomControl
    matched_control: OwnControl
    replacements: Replacements | None = None
    layer_contribution: LayerContribution | None = None
    standard_metrics: StandardMetrics | None = None
    information: Information | None = None
    identifiability: Identifiability | None = None
    interference: Interference | None = None
    selection: SelectionResult | None = None
    correlations: Correlations | None = None
    cost: Cost

    def __post_init__(self) -> None:
        check_open(self.config, Config, "config")

    def axes(self) -> dict[str, list[str]]:
        """Names of the classes and of the sites."""
        return {"classes": self.dataset.classes, "sites": [site.name for site in self.model.sites]}
