"""The conditions of a bench run: parts of each skill, and random controls beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from skillfast.ablation.interventions import Condition
from skillfast.evaluation.shapley import kinds_of, occupied_blocks, subsets
from skillfast.models.sites import choose_sites
from skillfast.skills.skill import matched_skills, random_skills

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skillfast.models.sites import Site
    from skillfast.runs.subject import Subject
    from skillfast.skills.skill import Skill
    from skillfast.statistics.scores import NeuronScores

ON_ALL = 2  # random draws per skill that run on the examples of all classes


def component_conditions(skills: Sequence[Skill], sites: Sequence[Site], scale: float) -> list[list[Condition]]:
    """Each skill with only its neurons in each subset of the sites' kinds, but for all of them: [sets - 1][K]."""
    parts = subsets(kinds_of(sites))[1:]
    return [[Condition(skill, components=part, scale=scale) for skill in skills] for part in parts]


def block_conditions(skills: Sequence[Skill], sites: Sequence[Site], scale: float) -> list[list[Condition]]:
    """Each skill with only its neurons in the first 1, 2, ... blocks, then in the last 1, 2, ... blocks.

    Returns:
        Conditions [2 (blocks - 1)][K] over the `occupied_blocks`; all blocks are the whole skill.
    """
    blocks = occupied_blocks(skills, sites)
    where = {site.name: site.block for site in sites}

    def within(skill: Skill, kept: Sequence[int | None]) -> Skill:
        return replace(skill, neurons={name: index for name, index in skill.neurons.items() if where[name] in kept})

    first = [("first", blocks[:size]) for size in range(1, len(blocks))]
    last = [("last", blocks[-size:]) for size in range(1, len(blocks))]
    return [
        [
            Condition(within(skill, kept), scale=scale, name=f"{skill.name} ({end} {len(kept)} blocks)")
            for skill in skills
        ]
        for end, kept in first + last
    ]


def control_conditions(
    skills: Sequence[Skill], sites: Sequence[Site], draws: int, scale: float, seed: int
) -> list[list[Condition]]:
    """`draws` random controls for each skill: conditions [draws][K]."""
    rng = np.random.default_rng(seed)
    per_skill = [random_skills(skill, sites, draws, rng) for skill in skills]
    return [[Condition(drawn[i], scale=scale) for drawn in per_skill] for i in range(draws)]


def matched_conditions(
    skills: Sequence[Skill], scores: NeuronScores, draws: int, scale: float, seed: int
) -> list[list[Condition]]:
    """`draws` controls for each skill of neurons that are about as active as its own: conditions [draws][K]."""
    rng = np.random.default_rng([seed, 1])
    means = {name: scores.mean[rows] for name, rows in scores.site_slices().items()}
    per_skill = [matched_skills(skill, means, draws, rng) for skill in skills]
    return [[Condition(drawn[i], scale=scale) for drawn in per_skill] for i in range(draws)]


@dataclass(frozen=True)
class Removals:
    """What a bench run removes; a sweep is asked for the conditions and answers by their names.

    Attributes:
        skills: One skill per class.
        whole: Each skill, all of it.
        components: Each skill with only its neurons in some of the kinds, a row per subset.
        blocks: Each skill with only its neurons in some blocks, a row per choice of blocks.
        controls: The first of the random controls of each skill, for all examples.
        own_controls: The others, for each class's own examples, a row per draw.
        matched_controls: As many controls of neurons that are about as active, a row per draw.
    """

    skills: Sequence[Skill]
    whole: Sequence[Condition]
    components: Sequence[Sequence[Condition]]
    blocks: Sequence[Sequence[Condition]]
    controls: Sequence[Condition]
    own_controls: Sequence[Sequence[Condition]]
    matched_controls: Sequence[Sequence[Condition]]

    @staticmethod
    def of(subject: Subject, skills: Sequence[Skill], scores: NeuronScores) -> Removals:
        """The conditions for these skills of a subject's classes, in its settings' manner.

        Args:
            subject: The model and the settings.
            skills: One per class.
            scores: Scores of the model, with every neuron's mean activation.
        """
        settings, seed = subject.config.ablate, subject.config.run.seed
        sites = choose_sites(subject.model, subject.config.trace.sites)
        controls = control_conditions(skills, sites, settings.control_draws, settings.scale, seed)
        matched = matched_conditions(skills, scores, settings.control_draws, settings.scale, seed)
        return Removals(
            skills,
            whole=[Condition(skill, scale=settings.scale) for skill in skills],
            components=component_conditions(skills, sites, settings.scale),
            blocks=block_conditions(skills, sites, settings.scale),
            controls=[condition for row in controls[:ON_ALL] for condition in row],
            own_controls=controls[ON_ALL:],
            matched_controls=matched,
        )
