"""Which method and size: every candidate on the validation part, one choice, and what the test part says of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from skillfast.ablation.assigned import predict_assigned
from skillfast.ablation.interventions import Condition
from skillfast.ablation.sweep import sweep
from skillfast.errors import ArgumentError
from skillfast.evaluation.identifiability import drops
from skillfast.evaluation.selectivity import class_terms, oracle_predictions, oracle_selectivity, selectivity
from skillfast.runs.kept import Kept
from skillfast.skills.attribution import attribute
from skillfast.skills.learned_mask import ERASE, KEEP, learn_masks
from skillfast.skills.ranking import NeuronRanking
from skillfast.skills.select import select
from skillfast.skills.skill import random_skills
from skillfast.vocabulary import LEARNED, MAX_SITE_SHARE, STATISTICS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from torch.utils.data import DataLoader

    from skillfast.ablation.sweep import SweepResult
    from skillfast.models.sites import Site
    from skillfast.results.bench import BenchResults, Selectivity
    from skillfast.runs.session import Session
    from skillfast.skills.skill import Skill
    from skillfast.statistics.scores import NeuronScores

SIZES = (1 / 3, 1)  # of the share: 1 % and 3 % by default
KEEPS = (1.0, 5.0)  # weights of the other classes when a mask is learned: from more drop to less harm
CONTROL_DRAWS = 2
MARGIN = 0.02
"""Regret beyond the random control's that a choice may risk, as a share of other classes' images."""
CERTAIN = 1.645  # standard errors by which choosing per class has to drop more: 5 % by chance
RUNNING = 0.5
"""Share of the largest drop that a candidate has to take for what it costs other classes to be measured first."""
RULE = (
    "on the validation part, the largest target_drop among the candidates whose regret's upper 95 % end is at most the "
    "regret of as many random neurons plus the margin, or the lowest such end where there is none; per class, where "
    "either half of that part, chosen on the other, drops significantly more that way within the same limit on average "
    "(one-sided McNemar test, 5 %); regret is "
    "measured of the candidates with at least half of the largest drop, and of the others where none of these is "
    "within its limit"
)


@dataclass(frozen=True)
class Candidate:
    """A way to choose skills.

    Attributes:
        method: A statistic, `"attribution"`, `"mask"` or `"erase"`.
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
        drops: What each takes from its own classes on the validation part.
        validation: The effect of each on the validation part, None where other classes were not looked at.
        limits: Largest upper end of the regret at which each is taken, None where that is not known or where there is
            nothing to choose from.
        controls: Share of all neurons -> the effect of as many random neurons on that part.
        oracle: The oracle's effect on that part.
        chosen: By `RULE`, the index of each class's candidate, in the classes' order.
        combined: The effect of the chosen ones on that part.
    """

    candidates: tuple[Candidate, ...]
    skills: tuple[Mapping[str, Skill], ...]
    drops: tuple[float, ...]
    validation: tuple[Selectivity | None, ...]
    limits: tuple[float | None, ...]
    controls: Mapping[float, Selectivity]
    oracle: Selectivity
    chosen: tuple[int, ...]
    combined: Selectivity

    @property
    def removed(self) -> dict[str, Skill]:
        """Class name -> the skill of its chosen candidate."""
        return {name: self.skills[i][name] for i, name in zip(self.chosen, self.skills[0], strict=True)}

    @property
    def tested(self) -> list[int]:
        """Positions of the candidates that are worth a test: those within their limit, and the chosen ones."""
        return sorted({*self.chosen, *(i for i in range(len(self.candidates)) if self._within(i))})

    @property
    def left(self) -> dict[str, dict[str, Skill]]:
        """The skills of these that were not chosen: a candidate's position, as text -> class name -> skill."""
        chosen = dict(zip(self.skills[0], self.chosen, strict=True))
        found = {
            str(i): {name: skill for name, skill in self.skills[i].items() if chosen[name] != i} for i in self.tested
        }
        return {key: made for key, made in found.items() if made}

    @property
    def within(self) -> bool:
        """Whether any candidate's regret is within its limit."""
        return any(self._within(i) for i in range(len(self.candidates)))

    def _within(self, i: int) -> bool:
        effect, most = self.validation[i], self.limits[i]
        return bool(effect and effect.ci95.regret and most is not None and effect.ci95.regret[1] <= most)

    def __str__(self) -> str:
        of = {i: [name for j, name in zip(self.chosen, self.skills[0], strict=True) if i == j] for i in self.chosen}
        if len(of) == 1:
            return str(self.candidates[self.chosen[0]])
        return "; ".join(f"{self.candidates[i]} for {', '.join(names)}" for i, names in of.items())

    def to_json(self, test: SweepResult) -> dict[str, Any]:
        """The selection object of results.json.

        Args:
            test: What `try_on` gives for the test part, of the `tested` candidates.
        """
        on_test = [
            _effect(test, predictions_of(test, self.skills, [i])[0]) if i in self.tested else None
            for i in range(len(self.candidates))
        ]
        own = [name_of(i, name) for i, name in zip(self.chosen, self.skills[0], strict=True)]
        combined = _effect(test, test.predictions_of(own))
        found = zip(self.candidates, self.drops, self.limits, self.validation, on_test, strict=True)
        return {
            "rule": RULE,
            "margin": MARGIN,
            "chosen": list(self.chosen),
            "candidates": [
                {**c.to_json(), "drop": drop, "limit": most, "validation": v, "test": t}
                for c, drop, most, v, t in found
            ],
            "controls": [{"share": share, "validation": effect} for share, effect in self.controls.items()],
            "validation": self.combined,
            "gap": _gap(combined, self.combined),
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
        method: `"auto"`, a statistic, `"attribution"`, `"mask"` or `"erase"`.
        share: The largest share of all neurons.
        contrastive: Applies only to a named method.
        statistics: The statistics that were traced; `"auto"` takes Pearson's r, or else the first of them.
    """
    if method != "auto":
        return (Candidate(method, contrastive, share, KEEP if method in LEARNED else None),)
    correlation = "pearson" if "pearson" in statistics else statistics[0]
    ways = [(name, minus, None) for name in (correlation, "attribution") for minus in (False, True)]
    masks = [("mask", False, keep) for keep in KEEPS]
    return tuple(Candidate(name, minus, size * share, keep) for name, minus, keep in ways + masks for size in SIZES)


def candidates_of(earlier: BenchResults) -> tuple[tuple[Candidate, ...], tuple[Candidate, ...]]:
    """The candidates that an earlier run chose, for a run to be compared with it, and what they are ranked with.

    Args:
        earlier: A run's results.

    Returns:
        The chosen ones, and with them the learned masks that a chosen mask may have started from.
    """
    assert earlier.selection is not None
    all_of_them = [Candidate(c.method, c.contrastive, c.share, c.keep) for c in earlier.selection.candidates]
    tried = tuple(all_of_them[i] for i in sorted(set(earlier.selection.chosen)))
    learned = any(candidate.method in LEARNED for candidate in tried)
    return tried, tuple(c for c in all_of_them if c in tried or (learned and c.method in LEARNED))


def rank(
    session: Session, scores: NeuronScores, tried: Sequence[Candidate], *, max_site_share: float, scale: float = 0.0
) -> dict[str, NeuronScores | NeuronRanking]:
    """What the candidates rank by, by `Candidate.ranking`, made from the select part alone.

    Attributions and each learned mask are stages of their own, since masks take the longest of all. Masks of the
    largest weight start from the attributions, those of other weights from these masks.

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
    masks: NeuronRanking | None = None  # of the largest weight, which comes first
    for weight, name in sorted({(c.keep, c.ranking) for c in tried if c.keep is not None}, reverse=True):
        learn = partial(
            learn_masks,
            model,
            subject.varied_loader("select"),
            attributions,
            share=max(candidate.share for candidate in tried if candidate.ranking == name),
            max_site_share=max_site_share,
            scale=scale,
            keep=weight,
            erase=ERASE if name.startswith("erase") else 0.0,
            start=masks,
            seed=session.config.run.seed,
            quiet=quiet,
        )
        found[name] = made = session.stage("select", learn, kept, part=name)
        masks = masks or made
    return found


def first_masks(ranked: Mapping[str, NeuronScores | NeuronRanking]) -> NeuronRanking | None:
    """The learned masks that started from the attributions, of what `rank` gives; None where none were learned."""
    learned = (found for found in ranked.values() if isinstance(found, NeuronRanking) and found.method in LEARNED)
    return next((found for found in learned if found.settings["start_keep"] is None), None)


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


def size_controls(
    tried: Sequence[Candidate], skills: Sequence[Mapping[str, Skill]], sites: Sequence[Site], seed: int
) -> dict[float, list[dict[str, Skill]]]:
    """Random skills to judge the candidates of each size by, with as many neurons per site as the last of that size.

    Args:
        tried: The candidates.
        skills: Skills of each, from `cut`.
        sites: The model's.
        seed: Seed of the draws.

    Returns:
        Share of all neurons -> draws of class name -> skill; empty for one candidate, which nothing is compared with.
    """
    if len(tried) == 1:
        return {}
    rng = np.random.default_rng(seed)
    found = {}
    for share, like in {candidate.share: made for candidate, made in zip(tried, skills, strict=True)}.items():
        drawn = {name: random_skills(skill, sites, CONTROL_DRAWS, rng) for name, skill in like.items()}
        found[share] = [{name: draws[d] for name, draws in drawn.items()} for d in range(CONTROL_DRAWS)]
    return found


def own_drops(
    model: torch.nn.Module,
    loader: DataLoader[Any],
    skills: Sequence[Mapping[str, Skill]],
    *,
    scale: float = 0.0,
    quiet: bool = True,
) -> list[float]:
    """What each candidate's skills take from their own classes, the mean over the classes.

    Every example runs under its own class's skill alone: a forward of the data for each candidate.

    Args:
        model: In evaluation mode.
        loader: Batches of (images, labels), of a dataset with `labels`, not shuffled.
        skills: The candidates', from `cut`.
        scale: Factor on the activations of removed neurons.
        quiet: Show no progress bars.
    """
    labels = np.asarray(loader.dataset.labels)  # type: ignore[attr-defined]
    none = np.full(len(labels), -1)
    right = predict_assigned(model, loader, [[]], none, quiet=quiet)[0] == labels
    conditions = [[Condition(skill, scale=scale) for skill in made.values()] for made in skills]
    after = predict_assigned(model, loader, conditions, labels, what="candidates of each class", quiet=quiet) == labels
    return [float(np.nanmean(drops(right, row, labels, len(made)))) for row, made in zip(after, skills, strict=True)]


def running(found: Sequence[float]) -> tuple[list[int], list[int]]:
    """Candidates to measure the cost of first, and others, which matter where none of the first is within its limit.

    A choice is the largest drop within a limit, so that one among the first is the best of all.

    Args:
        found: What each takes from its own classes, from `own_drops`.
    """
    least = RUNNING * max(0.0, *found)
    first = [i for i, drop in enumerate(found) if drop >= least] or [*range(len(found))]
    return first, [i for i in range(len(found)) if i not in first]


def sets_of(
    tried: Sequence[Candidate],
    skills: Sequence[Mapping[str, Skill]],
    controls: Mapping[float, Sequence[Mapping[str, Skill]]],
    which: Sequence[int],
    have: Sequence[int] = (),
) -> dict[str, Mapping[str, Skill]]:
    """Sets of skills for `try_on`: some candidates, by position, and the controls of their sizes.

    Args:
        tried: The candidates.
        skills: Skills of each, from `cut`.
        controls: From `size_controls`.
        which: Positions of candidates.
        have: Positions of candidates whose controls are had already.
    """
    sizes = {tried[i].share for i in which} - {tried[i].share for i in have}
    drawn = {_control(share, d): made for share in sizes for d, made in enumerate(controls.get(share, ()))}
    return {str(i): skills[i] for i in which} | dict(sorted(drawn.items()))


def _control(share: float, draw: int) -> str:
    """Key of the set that is a draw of a size's random skills."""
    return f"random {share:.6g}, draw {draw}"


def try_on(
    model: torch.nn.Module,
    loader: Iterable[Any],
    sets: Mapping[str, Mapping[str, Skill]],
    *,
    scale: float = 0.0,
    classes: Sequence[str] | None = None,
    quiet: bool = True,
) -> SweepResult:
    """Remove sets of skills on a part of the data, one skill at a time.

    Args:
        model: In evaluation mode.
        loader: Batches of (images, labels).
        sets: A name -> class name -> skill; of candidates the name is the position.
        scale: Factor on the activations of removed neurons.
        classes: Class names; from the loader's dataset or the model by default.
        quiet: Show no progress bar.

    Returns:
        Predictions of all; `effects` says what they mean.
    """
    conditions = [
        Condition(skill, scale=scale, name=name_of(key, name))
        for key, made in sets.items()
        for name, skill in made.items()
    ]
    return sweep(model, loader, conditions, classes=classes, keep_predictions=True, quiet=quiet)


def predictions_of(swept: SweepResult, skills: Sequence[Iterable[str]], which: Sequence[int]) -> np.ndarray:
    """int64 [len(which), K, n]: predictions of `try_on` under candidates by position, by their class names."""
    return np.stack([swept.predictions_of(name_of(i, name) for name in skills[i]) for i in which])


def name_of(key: str | int, name: str) -> str:
    """What `try_on` calls the condition of a set's skill: the set's name, and the class."""
    return f"{key}: {name}"


def effects(swept: SweepResult, skills: Sequence[Mapping[str, Skill]]) -> list[Selectivity]:
    """What each candidate's skills do; what they do to the test part chooses nothing.

    Args:
        swept: What `try_on` gives.
        skills: The candidates', from `cut`.
    """
    return [_effect(swept, part) for part in predictions_of(swept, skills, range(len(skills)))]


def _effect(swept: SweepResult, predictions: np.ndarray) -> Selectivity:
    """The effect of predictions [K, n], or of draws of them [draws, K, n]."""
    oracle = oracle_predictions(swept.top2, len(swept.classes))
    return selectivity(predictions.reshape(-1, *oracle.shape), oracle, swept.top2[:, 0], swept.labels)


def choose(
    tried: Sequence[Candidate],
    skills: Sequence[Mapping[str, Skill]],
    swept: SweepResult,
    found: Sequence[float] | None = None,
) -> Selection:
    """The best candidate by `RULE`, or the best of each class.

    Args:
        tried: The candidates.
        skills: Skills of each candidate, from `cut`.
        swept: What `try_on` gives for the validation part, of all candidates or of some.
        found: What each takes from its own classes, from `own_drops`; of those in `swept` that is seen there.
    """
    classes = list(skills[0])
    here = [i for i in range(len(tried)) if name_of(i, classes[0]) in swept.names]
    drawn = {
        share: np.stack([
            swept.predictions_of(name_of(_control(share, d), name) for name in classes) for d in range(CONTROL_DRAWS)
        ])
        for share in dict.fromkeys(candidate.share for candidate in tried)
        if name_of(_control(share, 0), classes[0]) in swept.names
    }  # fmt: skip
    trial = _Trial(
        tuple(tried[i].share for i in here),
        predictions_of(swept, skills, here),
        drawn,
        oracle_predictions(swept.top2, len(swept.classes)),
        swept.top2[:, 0],
        swept.labels,
    )
    judged, controls = dict(zip(here, trial.effects(), strict=True)), trial.control_effects()
    chosen = [0] * len(classes)
    limits: list[float | None] = [None] * len(tried)
    if drawn:
        for i in here:
            limits[i] = controls[tried[i].share].regret + MARGIN
        chosen = trial.per_class() if _pays(trial) else [trial.together()] * len(classes)
    return Selection(
        candidates=tuple(tried),
        skills=tuple(skills),
        drops=tuple(judged[i].target_drop if i in judged else (found or [])[i] for i in range(len(tried))),
        validation=tuple(judged.get(i) for i in range(len(tried))),
        limits=tuple(limits),
        controls=controls,
        oracle=oracle_selectivity(trial.oracle, trial.intact, trial.labels),
        chosen=tuple(here[i] for i in chosen),
        combined=trial.effect(chosen),
    )


@dataclass(frozen=True)
class _Trial:
    """Predictions on some examples without each candidate's skills.

    Attributes:
        shares: Size of each of the C candidates.
        predictions: int64 [C, K, n].
        controls: Size -> int64 [draws, K, n], with as many random neurons removed.
        oracle: int64 [K, n].
        intact: int64 [n].
        labels: int64 [n].
    """

    shares: tuple[float, ...]
    predictions: np.ndarray
    controls: Mapping[float, np.ndarray]
    oracle: np.ndarray
    intact: np.ndarray
    labels: np.ndarray

    def on(self, kept: np.ndarray) -> _Trial:
        """Predictions on some of the examples, bool [n]."""
        drawn = {share: draws[..., kept] for share, draws in self.controls.items()}
        examples = self.predictions[..., kept], self.oracle[..., kept], self.intact[kept], self.labels[kept]
        return _Trial(self.shares, examples[0], drawn, *examples[1:])

    def _judged(self, draws: np.ndarray) -> Selectivity:
        return selectivity(draws, self.oracle, self.intact, self.labels)

    def effects(self) -> list[Selectivity]:
        """The effect of each candidate."""
        return [self._judged(rows[None]) for rows in self.predictions]

    def effect(self, chosen: Sequence[int]) -> Selectivity:
        """The effect of one candidate per class."""
        return self._judged(self.predictions[chosen, np.arange(len(chosen))][None])

    def control_effects(self) -> dict[float, Selectivity]:
        """The effect of the random controls of each size."""
        return {share: self._judged(draws) for share, draws in self.controls.items()}

    def limits(self) -> np.ndarray:
        """Largest upper end of the regret at which each candidate is taken, float64 [C]."""
        controls = self.control_effects()
        return np.array([controls[share].regret + MARGIN for share in self.shares])

    def together(self) -> int:
        """The best candidate for all classes, the first of equals; a regret without interval is within no limit."""
        found = self.effects()
        highest = [math.inf if effect.ci95.regret is None else effect.ci95.regret[1] for effect in found]
        return best(np.array([effect.target_drop for effect in found]), np.array(highest), self.limits())

    def per_class(self) -> list[int]:
        """The best candidate of each class; that of all classes for a class without examples."""
        drops, _, highest = class_terms(self.predictions, self.oracle, self.intact, self.labels)  # [C, K]
        limits, default = self.limits(), self.together()
        none = np.isnan(drops[0])
        return [default if none[i] else best(drops[:, i], highest[:, i], limits) for i in range(drops.shape[1])]


def best(drops: np.ndarray, highest: np.ndarray, limits: np.ndarray) -> int:
    """Index of the largest drop whose regret is within its limit, else of the lowest regret.

    Args:
        drops: float64 [C].
        highest: float64 [C], upper ends of the regrets.
        limits: float64 [C], what these may be.

    Returns:
        Of equal drops the one of the lower regret, then the first.
    """
    within = highest <= limits
    kept = np.flatnonzero(within) if within.any() else np.flatnonzero(highest == highest.min())
    return int(kept[np.lexsort((highest[kept], -drops[kept]))[0]])


def _pays(trial: _Trial) -> bool:
    """Whether choosing per class drops more on the half of each class's examples that did not choose.

    By more than chance does between candidates that are alike: a one-sided McNemar test of the decisions on the own
    class, by the normal approximation.
    """
    counts = np.bincount(trial.labels)
    if counts[counts > 0].min() < 2:
        return False
    half = np.empty(len(trial.labels), dtype=np.int64)
    for label in np.flatnonzero(counts):
        half[trial.labels == label] = np.arange(counts[label]) % 2
    gained, excess = np.zeros(len(half)), []
    for of in (0, 1):
        here, there = trial.on(half == of), trial.on(half != of)
        each, one = here.per_class(), here.together()
        own, rows = there.labels, np.arange(len(there.labels))
        right = there.predictions[:, own, rows] == own  # [C, n]
        gained[half != of] = right[one].astype(np.float64) - right[np.array(each)[own], rows]
        excess.append(there.effect(each).regret - there.limits()[each].mean())
    return bool(gained.sum() > CERTAIN * np.sqrt(np.square(gained).sum())) and sum(excess) <= 0


def _gap(test: Selectivity, validation: Selectivity) -> dict[str, float]:
    """How far the test part differs; of harm the estimate that does not depend on the number of examples."""
    terms = ("target_drop", "regret", "agreement", "gross_loss", "other_change")
    found = {name: getattr(test, name) - getattr(validation, name) for name in terms}
    return {**found, "harm": test.harm.cross_fitted - validation.harm.cross_fitted}
