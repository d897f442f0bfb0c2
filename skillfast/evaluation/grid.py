"""What an evaluation tries: skills x sizes x layers x factors, with random neurons beside each."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from skillfast.errors import ArgumentError
from skillfast.evaluation.selectivity import random_skills
from skillfast.skills.attribution import NeuronRanking
from skillfast.skills.skill import Skill, select

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from skillfast.models.sites import Site
    from skillfast.statistics.neuron_scores import NeuronScores

ALL, EACH, LAST, HEAD = "all", "each", "last", "head"


@dataclass(frozen=True)
class Grid:
    """The settings of an evaluation.

    Attributes:
        shares: Sizes of a skill, as shares of all neurons. In one block it has as many, up to `max_site_share`.
        layers: Where neurons are chosen from: `"all"`, `"each"` (every block by itself), `"last"` (the last block),
            `"head"`, or a block such as `"blocks.3"`.
        scales: Factors on the activations of a skill of all layers; 0, which removes, is always among them.
        draws: Random controls beside each skill, with as many neurons per site.
        max_site_share: Largest share of one site's neurons.
        signed: Rank a continuous metric's neurons by the statistic itself, not by its size. Classes always are.
        contrastive: As for `select`, of classes.
        replicates: Of the bootstrap behind the 95 % intervals.
        seed: Of the random controls and the bootstrap.
    """

    shares: tuple[float, ...] = (0.001, 0.003, 0.01)
    layers: tuple[str, ...] = (ALL, EACH)
    scales: tuple[float, ...] = (0.0, 0.5, 2.0, 4.0)
    draws: int = 3
    max_site_share: float = 0.25
    signed: bool = False
    contrastive: bool = False
    replicates: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("shares", "layers", "scales"):
            if not getattr(self, name):
                raise ArgumentError(f"{name}: expected at least one, got none; leave the option out for the default")
        wrong = [share for share in self.shares if not 0 < share <= 1]
        if wrong:
            raise ArgumentError(f"shares: expected shares in (0, 1], got {wrong[0]}; 0.01 is 1 % of all neurons")
        wrong = [scale for scale in self.scales if not np.isfinite(scale)]
        if wrong:
            raise ArgumentError(f"scales: expected finite numbers, got {wrong[0]}; 0 removes, 2 doubles")
        for name in ("draws", "replicates"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {getattr(self, name)}; raise it")

    def scales_at(self, layers: str) -> tuple[float, ...]:
        """Factors to try: everywhere in turn, in single layers removal alone."""
        return tuple(sorted({0.0, *(self.scales if layers == ALL else ())} - {1.0}))  # 1 is the intact model

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


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


def within(ranking: NeuronScores | NeuronRanking, method: str, sites: Collection[str]) -> NeuronScores | NeuronRanking:
    """A ranking in which only neurons of these sites can be chosen: the others have no score."""
    values = ranking.statistic(method).copy()
    for name, rows in ranking.site_slices().items():
        if name not in sites:
            values[rows] = np.nan
    if isinstance(ranking, NeuronRanking):
        return replace(ranking, values=values)
    return replace(ranking, **{method: values})  # type: ignore[arg-type]  # a statistic's name


def cases_of_scores(
    ranking: NeuronScores | NeuronRanking, method: str, metrics: Sequence[str], grid: Grid
) -> list[Case]:
    """Skills chosen anew for every size and layer.

    Args:
        ranking: Made from the select part.
        method: What to rank by.
        metrics: Whose columns.
        grid: The settings.

    Raises:
        ArgumentError: A metric or layer that is not there, or no neuron that can be chosen.
    """
    made = []
    for layers, names in layer_sites(ranking.sites, grid.layers).items():
        part = within(ranking, method, names)
        for share in grid.shares:
            for metric in metrics:
                of_classes = any(column.startswith(f"{metric}:") for column in ranking.columns)
                skills = select(
                    part,
                    method,
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
