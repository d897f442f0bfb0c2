"""Which method and size: every candidate on the validation part, one choice, and what the test part says of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from skillfast.ablation.interventions import Condition
from skillfast.ablation.sweep import sweep
from skillfast.errors import ArgumentError
from skillfast.evaluation.resampling import Bootstrap
from skillfast.evaluation.selectivity import effect, oracle_predictions, selectivity
from skillfast.results.records import to_json
from skillfast.runs.kept import Kept
from skillfast.skills.attribution import attribute
from skillfast.skills.learned_mask import KEEP, learn_masks
from skillfast.skills.ranking import NeuronRanking
from skillfast.skills.select import select
from skillfast.vocabulary import MAX_SITE_SHARE, STATISTICS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from skillfast.runs.session import Session
    from skillfast.skills.skill import Skill
    from skillfast.statistics.scores import NeuronScores

Effects = dict[str, Any]

SIZES = (1 / 3, 1)  # of the share: 1 % and 3 % by default
KEEPS = (1.0, 5.0, 20.0)  # weights of the other classes when a mask is learned: from more drop to less harm
WANTED_DROP, WANTED_RATIO = 0.5, 40.0
WANTED_STRICT, OF_ORACLE = 20.0, 0.8
PUBLISHED_DROP, PUBLISHED_RATIO = 0.094, 56.4  # of the published page, which gives no harm beside them
HARM_WEIGHT = 20.0
RULE = (
    f"on the validation part, the largest target_drop - {HARM_WEIGHT:g} x other_harm among those with target_drop at "
    f"least {WANTED_DROP:g}, harm_ratio at least {WANTED_RATIO:g} and strict_ratio at least {WANTED_STRICT:g} or "
    f"{OF_ORACLE:g} of the oracle's, whichever is less; where none has all three, among those with the first two; "
    "where none has these, among all"
)


@dataclass(frozen=True)
class Candidate:
    """A way to choose skills.

    Attributes:
        method: A statistic, `"attribution"` or `"mask"`.
        contrastive: Whether by the score minus the other classes' best.
        share: Share of all neurons.
        keep: Weight of the other classes in a learned mask; None for other methods.
    """

    method: str
    contrastive: bool
    share: float
    keep: float | None = None

    @property
    def ranking(self) -> str:
        """Name of what it ranks by: candidates of one ranking differ in size alone."""
        return self.method if self.keep is None else f"{self.method} keep {self.keep:g}"

    def __str__(self) -> str:
        return f"{'contrastive ' * self.contrastive}{self.ranking}, {self.share:.2g} of all neurons"

    def to_json(self) -> dict[str, Any]:
        """What results.json says of it besides its effect."""
        return {"method": self.method, "contrastive": self.contrastive, "share": self.share, "keep": self.keep}


@dataclass(frozen=True)
class Selection:
    """What was tried and what was chosen.

    Attributes:
        candidates: In the order tried.
        skills: One mapping of class name -> skill per candidate.
        validation: The terms and ratios of selectivity of each on the validation part.
        oracle: Terms of the oracle on that part.
        chosen: Index of the best by `RULE`.
    """

    candidates: tuple[Candidate, ...]
    skills: tuple[Mapping[str, Skill], ...]
    validation: tuple[dict[str, float | None], ...]
    oracle: dict[str, float | None]
    chosen: int

    @property
    def candidate(self) -> Candidate:
        """The one that was chosen."""
        return self.candidates[self.chosen]

    def to_json(self, test: Sequence[dict[str, float | None]]) -> dict[str, Any]:
        """The selection object of results.json.

        Args:
            test: The terms and ratios of each candidate on the test part, in order.
        """
        found = zip(self.candidates, self.validation, test, strict=True)
        before, after = self.validation[self.chosen], test[self.chosen]
        return {
            "rule": RULE,
            "chosen": self.chosen,
            "published": published(self.validation),
            "candidates": [{**c.to_json(), "validation": v, "test": t} for c, v, t in found],
            "gap": {name: _difference(after[name], before[name]) for name in before},
            "oracle": {"validation": self.oracle},
        }


def check_traced(method: str, statistics: Sequence[str]) -> None:
    """Raises ArgumentError for a statistic that is not among the traced ones; other methods need none."""
    if method in STATISTICS and method not in statistics:
        raise ArgumentError(
            f"method: expected one of the statistics that are traced, {', '.join(statistics)}, got {method!r}; add it "
            "to --statistics"
        )


def candidates(
    method: str, share: float, *, contrastive: bool = False, statistics: Sequence[str] = STATISTICS
) -> tuple[Candidate, ...]:
    """What a method's name stands for: itself at the share given, or with `"auto"` all methods at all sizes.

    Args:
        method: `"auto"`, a statistic, `"attribution"` or `"mask"`.
        share: The largest share of all neurons.
        contrastive: Applies only to a named method.
        statistics: The statistics that were traced; `"auto"` takes Pearson's r, or else the first of them.
    """
    if method != "auto":
        return (Candidate(method, contrastive, share, KEEP if method == "mask" else None),)
    correlation = "pearson" if "pearson" in statistics else statistics[0]
    ways = [(name, minus, None) for name in (correlation, "attribution") for minus in (False, True)]
    masks = [("mask", False, keep) for keep in KEEPS]
    return tuple(Candidate(name, minus, size * share, keep) for name, minus, keep in ways + masks for size in SIZES)


def rank(
    session: Session, scores: NeuronScores, tried: Sequence[Candidate], *, max_site_share: float, scale: float = 0.0
) -> dict[str, NeuronScores | NeuronRanking]:
    """What the candidates rank by, by `Candidate.ranking`, made from the select part alone.

    Attributions and each learned mask are stages of their own, since masks take the longest of all. Masks of the
    middle weight start from the attributions, those of other weights from these masks.

    Args:
        session: The run.
        scores: Scores of a trace of the select part.
        tried: The candidates.
        max_site_share: Largest share of one site's neurons.
        scale: Factor on the activations of removed neurons.
    """
    subject, quiet = session.subject, session.quiet
    model, loader, kept = subject.model, subject.loader("select"), Kept.by(NeuronRanking.load)
    found: dict[str, NeuronScores | NeuronRanking] = {c.method: scores for c in tried if c.method in STATISTICS}
    if all(candidate.method in found for candidate in tried):
        return found
    sites = [site.name for site in scores.sites]
    attributions = session.stage(
        "select",
        lambda: attribute(model, loader, sites=sites, classes=subject.splits.classes, quiet=quiet),
        kept,
        part="attribution",
    )
    found["attribution"] = attributions
    weights = sorted({(c.keep, c.ranking) for c in tried if c.keep is not None})
    middle = len(weights) // 2
    masks: NeuronRanking | None = None  # of the middle weight, which comes first
    for weight, name in (*weights[middle : middle + 1], *weights[:middle], *weights[middle + 1 :]):
        learn = partial(
            learn_masks,
            model,
            subject.varied_loader("select"),
            attributions,
            share=max(candidate.share for candidate in tried if candidate.ranking == name),
            max_site_share=max_site_share,
            scale=scale,
            keep=weight,
            start=masks,
            seed=session.config.run.seed,
            quiet=quiet,
        )
        found[name] = made = session.stage("select", learn, kept, part=name)
        masks = masks or made
    return found


def cut(
    ranked: Mapping[str, NeuronScores | NeuronRanking],
    tried: Sequence[Candidate],
    *,
    max_site_share: float = MAX_SITE_SHARE,
) -> tuple[dict[str, Skill], ...]:
    """Every candidate's skills, class name -> skill.

    Args:
        ranked: What the candidates rank by, from `rank`.
        tried: The candidates.
        max_site_share: Largest share of one site's neurons.

    Raises:
        ArgumentError: No candidate.
    """
    if not tried:
        raise ArgumentError("candidates: expected at least one, got none; candidates('auto', 0.03) makes all")
    return tuple(
        select(
            ranked[candidate.ranking], candidate.method, metric="label", share=candidate.share,
            max_site_share=max_site_share, contrastive=candidate.contrastive,
        )
        for candidate in tried
    )  # fmt: skip


def choose(tried: Sequence[Candidate], skills: Sequence[Mapping[str, Skill]], validation: Effects) -> Selection:
    """The best candidate by `RULE`.

    Args:
        tried: The candidates.
        skills: Skills of each candidate, from `cut`.
        validation: `effects` on the validation part.
    """
    found = validation["candidates"]
    return Selection(tuple(tried), tuple(skills), tuple(found), validation["oracle"], best(found, validation["oracle"]))


def effects(
    model: torch.nn.Module,
    loader: Iterable[Any],
    skills: Sequence[Mapping[str, Skill]],
    *,
    scale: float = 0.0,
    classes: Sequence[str] | None = None,
    intervals: int | None = None,
    quiet: bool = True,
) -> Effects:
    """What every candidate's skills do to a part when they are removed; what they do to the test part chooses nothing.

    Args:
        model: In evaluation mode.
        loader: Batches of (images, labels).
        skills: The candidates', from `cut`.
        scale: Factor on the activations of removed neurons.
        classes: Class names; from the loader's dataset or the model by default.
        intervals: Seed of the resamples of the images that 95 % intervals come from; None for no intervals. Every
            class must have images.
        quiet: Show no progress bar.

    Returns:
        As JSON: under `candidates` the terms and ratios of selectivity of each, under `oracle` those of the oracle.
    """
    conditions = [
        [Condition(skill, scale=scale, name=f"{i}: {skill.name}") for skill in made.values()]
        for i, made in enumerate(skills)
    ]
    swept = sweep(model, loader, [*chain(*conditions)], classes=classes, keep_predictions=True, quiet=quiet)
    k, intact = len(swept.classes), swept.top2[:, 0]
    parts = [swept.predictions_of(condition.name for condition in row) for row in conditions]  # each [K, n]
    if intervals is None:
        found = [to_json(effect(part, intact, swept.labels)) for part in parts]
    else:
        bootstrap = Bootstrap(swept.labels, seed=intervals)
        found = [to_json(selectivity(part[None], intact, swept.labels, bootstrap)) for part in parts]
    oracle = effect(oracle_predictions(swept.top2, k), intact, swept.labels)
    return {"candidates": found, "oracle": to_json(oracle)}


def best(found: Sequence[Mapping[str, Any]], oracle: Mapping[str, Any]) -> int:
    """Index of the best effect by `RULE`; the first of equals."""
    strict = min(WANTED_STRICT, OF_ORACLE * (oracle["strict_ratio"] or WANTED_STRICT / OF_ORACLE))

    def selective(terms: Mapping[str, Any]) -> bool:
        return terms["target_drop"] >= max(WANTED_DROP, WANTED_RATIO * terms["other_harm"])

    two = [i for i, terms in enumerate(found) if selective(terms)]
    three = [i for i in two if found[i]["target_drop"] >= strict * found[i]["other_abs_change"]]
    return max(
        three or two or range(len(found)),
        key=lambda i: found[i]["target_drop"] - HARM_WEIGHT * found[i]["other_harm"],
    )


def published(found: Sequence[Mapping[str, Any]]) -> int | None:
    """Index of the effect with the published drop and ratio that does the least harm for its drop; None where none has.

    That ratio's denominator is a mean in which harm to one class cancels gains of another.
    """
    reached = [
        i
        for i, terms in enumerate(found)
        if terms["target_drop"] >= max(PUBLISHED_DROP, PUBLISHED_RATIO * abs(terms["other_change"]))
    ]
    return min(reached, key=lambda i: found[i]["other_harm"] / found[i]["target_drop"]) if reached else None


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before
