"""What an evaluation tries: skills x sizes x layers x factors, with random neurons beside each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from skillfast.errors import ArgumentError
from skillfast.evaluation.measures import random_draws
from skillfast.results.evaluation import Outcome
from skillfast.runs.config import ALL, EACH, HEAD, LAST, Grid
from skillfast.skills.ranking import NeuronRanking, ranking_of
from skillfast.skills.select import select
from skillfast.skills.skill import Skill, random_skills

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from skillfast.models.sites import Site
    from skillfast.results.evaluation import Measured
    from skillfast.statistics.scores import NeuronScores


@dataclass(frozen=True)
class Case:
    """One skill at one size in some layers.

    Attributes:
        skill: The neurons; named after their class or metric.
        share: The size that was asked for, as a share of all neurons.
        layers: `"all"`, `"head"` or a block.
        scales: Factors to try.
        controls: Random sets with as many neurons per site.
    """

    skill: Skill
    share: float
    layers: str
    scales: tuple[float, ...]
    controls: tuple[Skill, ...]


def outcome(case: Case, scale: float, own: Measured, controls: Sequence[Measured]) -> Outcome:
    """What a case's skill does under one factor, beside its random controls."""
    return Outcome(
        skill=case.skill.name,
        metric=case.skill.metric,
        share=case.share,
        layers=case.layers,
        scale=scale,
        neurons=len(case.skill),
        values=own.values,
        change=own.change,
        ci95=own.ci95,
        change_ci95=own.change_ci95,
        random=random_draws(controls),
    )


def layer_sites(sites: Sequence[Site], layers: Sequence[str]) -> dict[str, frozenset[str]]:
    """Layers by name, each with the names of its sites.

    Args:
        sites: The model's.
        layers: As in `Grid.layers`.

    Raises:
        ArgumentError: A layer that the model lacks.
    """
    named: dict[str, set[str]] = {}
    for site in sites:
        named.setdefault(HEAD if site.block is None else f"blocks.{site.block}", set()).add(site.name)
    blocks = [name for name in named if name != HEAD]
    chosen: dict[str, frozenset[str]] = {}
    for word in layers:
        if word == ALL:
            chosen[ALL] = frozenset(site.name for site in sites)
            continue
        found = blocks if word == EACH else blocks[-1:] if word == LAST else [word]
        if not found or not set(found) <= named.keys():
            raise ArgumentError(
                f"layers: expected {ALL}, {EACH}, {LAST} or some of {', '.join(named)}, got {word!r}; check --layers"
            )
        chosen |= {name: frozenset(named[name]) for name in found}
    return chosen


def within(ranking: NeuronRanking, sites: Collection[str]) -> NeuronRanking:
    """A ranking in which only neurons of these sites can be chosen: the others have no value."""
    values = ranking.values.copy()
    for name, rows in ranking.site_slices().items():
        if name not in sites:
            values[rows] = np.nan
    return replace(ranking, values=values)


def cases_of_scores(
    scores: NeuronScores | NeuronRanking, method: str, metrics: Sequence[str], grid: Grid
) -> list[Case]:
    """Skills chosen anew for every size and layer.

    Args:
        scores: Made from the select part.
        method: What to rank by.
        metrics: Names of the metrics whose columns give cases.
        grid: The settings.

    Raises:
        ArgumentError: A metric or layer that is not there, or no neuron that can be chosen.
    """
    ranking, made = ranking_of(scores, method), []
    for layers, names in layer_sites(ranking.sites, grid.layers).items():
        part = within(ranking, names)
        for share in grid.shares:
            for metric in metrics:
                of_classes = any(column.startswith(f"{metric}:") for column in ranking.columns)
                skills = select(
                    part,
                    metric=metric,
                    share=share,
                    max_site_share=grid.max_site_share,
                    signed=of_classes or grid.signed,
                    contrastive=grid.contrastive and of_classes,
                )
                made += [(skill, share, layers) for skill in skills.values()]
    used = Counter(name for _, name in {(skill.metric, skill.name) for skill, _, _ in made})
    made = [
        (replace(skill, name=skill.metric or skill.name) if used[skill.name] > 1 else skill, share, layers)
        for skill, share, layers in made
    ]
    return _cases(made, ranking.sites, grid)


def largest(cases: Sequence[Case]) -> tuple[Skill, ...]:
    """Each skill of all layers at its largest size."""
    found = {}
    for case in sorted(cases, key=lambda case: case.share):
        if case.layers == ALL:
            found[case.skill.name] = case.skill
    return tuple(found.values())


def cases_of_skills(skills: Iterable[Skill], sites: Sequence[Site], grid: Grid) -> list[Case]:
    """Skills as they are, whole and what of them lies in single layers; the grid's shares say nothing here.

    Raises:
        ArgumentError: A layer that is not there, or no skill with neurons.
    """
    total = sum(site.width for site in sites)
    made = [
        (
            replace(skill, neurons={site: index for site, index in skill.neurons.items() if site in names}),
            len(skill) / total,
            layers,
        )
        for layers, names in layer_sites(sites, grid.layers).items()
        for skill in skills
    ]
    return _cases(made, sites, grid)


def _cases(made: Sequence[tuple[Skill, float, str]], sites: Sequence[Site], grid: Grid) -> list[Case]:
    """With their random controls; sets without neurons are left out."""
    rng = np.random.default_rng(grid.seed)
    cases = [
        Case(skill, share, layers, grid.scales_at(layers), tuple(random_skills(skill, sites, grid.draws, rng)))
        for skill, share, layers in made
        if len(skill)
    ]
    if not cases:
        raise ArgumentError(
            "skills: expected some with neurons in these layers, got none; choose other --layers or another --method"
        )
    return cases
