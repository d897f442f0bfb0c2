"""Controls of how skills are chosen: other groups, other halves, other neurons."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from skillfast.ablation.assigned import predict_assigned
from skillfast.ablation.interventions import Condition
from skillfast.data.splits import few_per_class, part_of
from skillfast.evaluation.identifiability import drops, identifiability
from skillfast.evaluation.tasks import overlaps
from skillfast.skills.attribution import attribute_groups
from skillfast.skills.learned_mask import learn_masks
from skillfast.skills.select import select

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch.utils.data import DataLoader

    from skillfast.results.bench import Identifiability
    from skillfast.skills.ranking import NeuronRanking
    from skillfast.skills.skill import Skill

PER_CLASS, MOST = 40, 2000  # examples that sets are chosen on
GROUPS = 3  # arbitrary groups for each class: what one loses is noisy
HALVES, CLASS = ("first half", "second half"), "class"
RELEARNED = 3  # classes whose masks are learned once more, from another seed: all would take a whole run of masks


def identify(
    model: torch.nn.Module,
    select_on: DataLoader[Any],
    test: DataLoader[Any],
    intact: np.ndarray,
    skills: Mapping[str, Skill],
    *,
    sites: Sequence[str],
    share: float,
    max_site_share: float,
    masks: tuple[NeuronRanking, NeuronRanking] | None = None,
    contrastive: bool = False,
    scale: float = 0.0,
    seed: int = 0,
    quiet: bool = True,
) -> Identifiability:
    """Choose neurons by attribution for classes, halves of classes and arbitrary groups, and compare what they do.

    All of it takes one pass of attributions over some examples of the select part, nine forwards of these and one of
    the test part, however many classes there are: each example runs under one removal at a time. Learned masks would
    take a training each, so that attribution stands in for them; those of three classes are learned from a second seed.

    Args:
        model: In evaluation mode.
        select_on: Batches of the select part, of a dataset with `labels`, not shuffled.
        test: Batches of the test part, likewise.
        intact: int64 [n], the intact model's predictions of the test part.
        skills: Class name -> the skill that was chosen, in the order of the labels.
        sites: Names of the sites that skills are chosen from.
        share: Size of the sets, as a share of all neurons.
        max_site_share: Largest share of one site's neurons.
        masks: Learned masks and the attributions that they started from; None: no mask is learned again.
        contrastive: Whether sets are chosen by the attribution minus the other columns' best.
        scale: Factor on the activations of removed neurons.
        seed: Seed of the choice of examples, halves and groups.
        quiet: Show no progress bars.
    """
    classes, k = list(skills), len(skills)
    rng = np.random.default_rng(seed)
    labels = np.asarray(select_on.dataset.labels)  # type: ignore[attr-defined]
    rows = few_per_class(labels, seed, PER_CLASS, MOST)
    few, labels = part_of(select_on, rows), labels[rows]
    groups = [rng.permutation(labels) for _ in range(GROUPS)]  # as large as the classes, and of all of them
    ranking = _ranking(model, few, labels, groups, _halves(labels, rng), classes, sites, quiet)

    def chosen(metric: str, of: NeuronRanking = ranking, size: float = share) -> list[Skill]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no neuron was chosen")  # an empty set does nothing, and is said so
            return list(
                select(of, metric=metric, share=size, max_site_share=max_site_share, contrastive=contrastive).values()
            )

    def under(data: DataLoader[Any], sets: Sequence[Skill], assigned: np.ndarray) -> np.ndarray:
        conditions = [Condition(skill, scale=scale) for skill in sets]
        return predict_assigned(model, data, [conditions], assigned, quiet=quiet)[0]

    def beyond(sets: Sequence[Skill], own: np.ndarray) -> np.ndarray:
        """What each group loses by its set, minus what others lose by it, [K]."""
        other = (own + rng.integers(1, k, len(own))) % k
        under_own, under_other = (under(few, sets, assigned) == labels for assigned in (own, other))
        return drops(right, under_own, own, k) - drops(right, under_other, other, k)

    right = under(few, [], np.full(len(labels), -1)) == labels
    second = [
        chosen(f"{CLASS}:{name}", _without(ranking, skill), len(skill) / ranking.n_neurons)[0] if len(skill) else skill
        for name, skill in skills.items()
    ]
    on_test = np.asarray(test.dataset.labels)  # type: ignore[attr-defined]
    without_second = under(test, second, on_test) == on_test
    pairs = [overlaps(pair, ranking.sites) for pair in zip(*(chosen(half) for half in HALVES), strict=True)]
    halved = np.bincount(labels, minlength=k) > 1
    return identifiability(
        beyond(chosen(CLASS), labels),
        np.mean([beyond(chosen(f"group {i}"), group) for i, group in enumerate(groups)], 0),
        np.where(halved, np.array([pair.jaccard[0][1] for pair in pairs], float), np.nan),
        np.where(halved, np.array([pair.expected_jaccard[0][1] for pair in pairs], float), np.nan),
        drops(intact == on_test, without_second, on_test, k),
        classes,
        seeds=None if masks is None else seed_overlaps(model, select_on, *masks, rng, quiet=quiet),
        share=share,
        groups=GROUPS,
        n_examples=len(labels),
    )


def seed_overlaps(
    model: torch.nn.Module,
    loader: DataLoader[Any],
    masks: NeuronRanking,
    attributions: NeuronRanking,
    rng: np.random.Generator,
    *,
    quiet: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Learn the masks of a few classes again from another seed, and see how many neurons both choose.

    Each class has as many rows per step as in the first run, so that three of ten classes cost three tenths of it.

    Args:
        model: In evaluation mode.
        loader: Batches of the images that the masks were learned from.
        masks: Learned masks that started from the attributions.
        attributions: What they started from.
        rng: Draws the classes.
        quiet: Show no progress bar.

    Returns:
        Jaccard index of both sets, and what random sets of their sizes per site have on average: float64 [K] each, NaN
        for the other classes.
    """
    known = np.flatnonzero(~np.isnan(masks.values).all(0))
    drawn = np.sort(rng.permutation(known)[:RELEARNED])
    values = np.full_like(attributions.values, np.nan)
    values[:, drawn] = attributions.values[:, drawn]
    made = masks.settings
    again = learn_masks(
        model,
        loader,
        replace(attributions, values=values),
        share=made["learned_share"],
        max_site_share=made["learned_max_site_share"],
        scale=made["learned_scale"],
        steps=made["steps"],
        batch_size=max(2, round(made["batch_size"] * len(drawn) / max(1, len(known)))),
        keep=made["keep"],
        erase=made.get("erase", 0.0),
        seed=made["seed"] + 1,
        quiet=quiet,
    )
    found = np.full((2, len(masks.columns)), np.nan)
    for c in drawn:
        sizes = {"share": made["learned_share"], "max_site_share": made["learned_max_site_share"]}
        pair = [next(iter(select(of, metric=masks.columns[c], **sizes).values())) for of in (masks, again)]
        shared = overlaps(pair, masks.sites)
        found[:, c] = shared.jaccard[0][1], shared.expected_jaccard[0][1]
    return found[0], found[1]


def _halves(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """0 or 1 for each example [n], so that each class is halved at random."""
    half = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        half[own] = np.arange(len(own)) % 2
    return half


def _ranking(
    model: torch.nn.Module,
    loader: DataLoader[Any],
    labels: np.ndarray,
    groups: Sequence[np.ndarray],
    half: np.ndarray,
    classes: Sequence[str],
    sites: Sequence[str],
    quiet: bool,
) -> NeuronRanking:
    """Attributions of both halves of each class, each arbitrary group and each class."""
    each = np.arange(len(classes))
    members = {
        **{name: (labels == each[:, None]) & (half == i) for i, name in enumerate(HALVES)},
        **{f"group {i}": group == each[:, None] for i, group in enumerate(groups)},
        CLASS: labels == each[:, None],
    }
    columns = [f"{metric}:{name}" for metric in members for name in classes]
    return attribute_groups(
        model, loader, np.concatenate([*members.values()]).T.copy(), columns, sites=sites, n_classes=len(classes),
        quiet=quiet,
    )  # fmt: skip


def _without(ranking: NeuronRanking, skill: Skill) -> NeuronRanking:
    """The ranking in which a skill's neurons are never chosen."""
    values, slices = ranking.values.copy(), ranking.site_slices()
    for site, index in skill.neurons.items():
        values[slices[site].start + index.numpy()] = np.nan
    return replace(ranking, values=values)
