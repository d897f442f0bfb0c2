"""Finds the neurons that follow a heuristic and not the label, and measures the model without them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast.ablation.interventions import Condition
from skillfast.ablation.sweep import sweep
from skillfast.errors import ArgumentError, DataError
from skillfast.evaluation.measures import random_draws
from skillfast.evaluation.shortcuts import HEURISTIC, LABEL, MEASURES, ConflictMeasures, following, of_classes
from skillfast.files import short
from skillfast.metrics import COLUMN, Categorical, margin
from skillfast.models.batches import read_batch
from skillfast.models.sites import module_device
from skillfast.models.text_classifier import TextClassifier
from skillfast.results.evaluation import (
    Followed,
    FollowingNeuron,
    FollowingSet,
    Intact,
    MovedExample,
    Shortcut,
    ShortcutRemoval,
)
from skillfast.runs.text import TextSubject
from skillfast.skills.ranking import NeuronRanking
from skillfast.skills.select import select
from skillfast.skills.skill import Skill, random_skills
from skillfast.tracing.tracer import Tracer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from skillfast.ablation.sweep import SweepResult
    from skillfast.evaluation.shortcuts import Following
    from skillfast.runs.config import Grid
    from skillfast.runs.subject import Subject
    from skillfast.statistics.scores import NeuronScores

BEST, MOVED = 20, 20  # neurons and examples that are listed
LONGEST = 500  # characters of a listed text


def check_shortcut(shortcut: str) -> None:
    """Raises ArgumentError for what is no `column:NAME`."""
    if not shortcut.startswith(COLUMN) or shortcut == COLUMN:
        raise ArgumentError(
            f"shortcut: expected column:NAME, the column that says what the heuristic answers, got {shortcut!r}; name "
            "one of the data's"
        )


def heuristic_answers(subject: Subject, part: str, column: str) -> np.ndarray:
    """What a heuristic answers to each example of a part, in the data's order: int64 [n], classes.

    Raises:
        ArgumentError: Data without such columns.
        DataError: A value that is no class.
    """
    examples: Any = getattr(subject.splits, part)
    if isinstance(subject, TextSubject):
        values, where = examples.table.columns[column], f"{examples.table.name}, {{}}"
        places = examples.table.places
    elif (values := getattr(examples, "columns", {}).get(column)) is not None:
        where, places = f"{part} part, example {{}}", tuple(range(len(values)))
    else:
        raise ArgumentError(
            f"shortcut: expected text, or batches of a loader with a value {column!r} for each example, got "
            f"{subject.splits.name} data; leave --shortcut out"
        )
    classes = subject.splits.classes
    found, missing = of_classes(values, {name: i for i, name in enumerate(classes)})
    if missing is not None:
        raise DataError(
            f"{where.format(places[missing])}: expected one of {', '.join(classes[:5])}"
            f"{', ...' if len(classes) > 5 else ''} in column '{column}', what the heuristic answers, got "
            f"{short(repr(values[missing].item()), 160)}; correct it"
        )
    return found


def disagreements(subject: Subject, shortcut: str) -> dict[str, np.ndarray]:
    """What a heuristic answers in the select and the test part, in each on some examples something else than the label.

    Raises:
        ArgumentError: Data without such a column.
        DataError: A value that is no class, or a part on whose examples heuristic and label never disagree.
    """
    column, found = shortcut.removeprefix(COLUMN), {}
    for part in ("select", "test"):
        found[part] = heuristic_answers(subject, part, column)
        labels = np.asarray(getattr(subject.splits, part).labels)
        if (found[part] == labels).all():
            raise DataError(
                f"column '{column}': expected {part} examples on which it is not the label, got none among "
                f"{len(labels):,}; add some, which tell the two apart"
            )
    return found


def trace_answers(subject: Subject, part: str, answers: np.ndarray) -> NeuronScores:
    """Pearson's r of a part's neurons with the labels and with what a heuristic answers, int64 [n], in one pass."""
    classes, device = Categorical(subject.splits.classes), module_device(subject.model)
    settings, done = subject.config.trace, 0
    tracer = Tracer(
        subject.model,
        {LABEL: classes, HEURISTIC: classes},
        sites=settings.sites,
        pool=settings.pool,  # type: ignore[arg-type]  # one of the settings' choices
        statistics=("pearson",),
    )
    with tracer, torch.inference_mode():
        for given in subject.loader(part):
            batch = read_batch(given)
            text = isinstance(subject.model, TextClassifier)
            tracer.expect(subject.model.observed(batch.inputs) if text else batch.mask)  # type: ignore[operator]
            batch.to(device).logits(subject.model)
            some = torch.from_numpy(answers[done : done + len(batch)])
            tracer.step(**{LABEL: batch.labels, HEURISTIC: some})
            done += len(batch)
    with warnings.catch_warnings():  # a heuristic may never answer some class
        warnings.filterwarnings("ignore", "some scores are not defined", RuntimeWarning)
        return tracer.compute()


def shortcut_outcome(
    subject: Subject, shortcut: str, answers: Mapping[str, np.ndarray], grid: Grid, *, quiet: bool = True
) -> tuple[Shortcut, tuple[Skill, ...]]:
    """Choose the neurons that follow a heuristic, and those that follow the label, and remove each set.

    Neurons are chosen on the select part by their partial correlations, each metric's given the other; the test part,
    on which everything is measured, chooses nothing.

    Args:
        subject: A classifier and its data.
        shortcut: `column:NAME`, the column that says what the heuristic answers.
        answers: What it answers, by part (see `disagreements`).
        grid: Sizes, largest share of a site, random draws and their seed.
        quiet: Show no progress bar.

    Returns:
        What was found, and the largest set that follows each of the two, `follows NAME` and `follows label`.
    """
    column = shortcut.removeprefix(COLUMN)
    agreement = float((answers["select"] == np.asarray(subject.splits.select.labels)).mean())
    scores = trace_answers(subject, "select", answers["select"])
    found = following(scores)
    sets = _sets(scores, found, grid)
    rng = np.random.default_rng(grid.seed)
    controls = [random_skills(skill, scores.sites, grid.draws, rng) for _, _, skill in sets]
    conditions = [
        Condition(one, name=f"{i}: {one.name}")
        for i, ((_, _, skill), drawn) in enumerate(zip(sets, controls, strict=True))
        for one in (skill, *drawn)
    ]
    swept = sweep(
        subject.model,
        subject.loader("test"),
        conditions,
        classes=subject.splits.classes,
        keep_predictions=True,
        keep_margins=True,
        quiet=quiet,
    )
    assert swept.predictions is not None
    measures = ConflictMeasures(swept.top2[:, 0], swept.labels, answers["test"])
    removals, rows = [], iter(swept.predictions)
    for (follows, share, skill), drawn in zip(sets, controls, strict=True):
        own = next(rows)
        measured, random = measures.measure(own), [measures.measure(next(rows)) for _ in drawn]
        removals.append(
            ShortcutRemoval(
                follows=follows,
                share=share,
                neurons=len(skill),
                values=measured.values,
                change=measured.change,
                ci95=measured.ci95,
                change_ci95=measured.change_ci95,
                p=measures.p(own),
                random=random_draws(random),
            )
        )
    intact = measures.measure(swept.top2[:, 0])
    largest = max((i for i, (follows, _, _) in enumerate(sets) if follows == "shortcut"), default=None)
    moved = [] if largest is None else _moved(subject, swept, largest * (1 + grid.draws), measures)
    largest_sets = {follows: skill for follows, _, skill in sets}  # the last one is the largest
    names = {"shortcut": f"follows {column}", "label": "follows label"}
    found_skills = tuple(replace(skill, name=names[follows]) for follows, skill in largest_sets.items())
    told = Shortcut(
        column=column,
        agreement=agreement,
        conflicts=int(measures.conflict.sum()),
        agreeing=int((~measures.conflict).sum()),
        measured=dict(MEASURES),
        intact=Intact(values=intact.values, ci95=intact.ci95),
        follow_shortcut=_best(scores, found, found.shortcut),
        follow_label=_best(scores, found, found.inference),
        removals=removals,
        moved=moved,
    )
    return told, found_skills


def _sets(scores: NeuronScores, found: Following, grid: Grid) -> list[tuple[Followed, float, Skill]]:
    """What each set follows, its size as a share, and its neurons, smallest first; none without neurons."""
    both: tuple[Followed, Followed] = ("shortcut", "label")
    ranking = NeuronRanking(
        method="pearson",
        columns=both,
        values=np.stack([found.shortcut, found.inference], 1),
        sites=scores.sites,
        n_observations=np.full(2, scores.n_observations),
        fingerprint=scores.fingerprint,
    )
    made = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no neuron was chosen", RuntimeWarning)  # the results say how many follow
        for share in sorted(grid.shares):
            skills = select(ranking, share=share, max_site_share=grid.max_site_share)
            made += [(follows, share, skills[follows]) for follows in both if len(skills[follows])]
    return made


def _best(scores: NeuronScores, found: Following, values: np.ndarray) -> FollowingSet:
    """How many neurons have a value, and those with the largest."""
    order = np.argsort(np.where(np.isnan(values), -1.0, values))[::-1][: min(BEST, int((~np.isnan(values)).sum()))]
    names = [(site, rows) for site, rows in scores.site_slices().items()]
    best = []
    for i in order.tolist():
        site, rows = next((name, rows) for name, rows in names if rows.start <= i < rows.stop)
        best.append(
            FollowingNeuron(
                site=site, neuron=i - rows.start, heuristic=_number(found.heuristic[i]), label=_number(found.label[i])
            )
        )
    return FollowingSet(neurons=int((~np.isnan(values)).sum()), best=best)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _moved(subject: Subject, swept: SweepResult, row: int, measures: ConflictMeasures) -> list[MovedExample]:
    """The conflicts whose margin one condition changes most, largest change first."""
    assert swept.predictions is not None
    assert swept.margins is not None
    assert swept.baseline_logits is not None
    before = margin(torch.from_numpy(swept.baseline_logits), torch.from_numpy(measures.labels)).numpy()
    after, table = swept.margins[row], getattr(subject.splits.test, "table", None)
    size = np.where(measures.conflict, np.abs(after - before), -1.0)
    classes = subject.splits.classes
    return [
        MovedExample(
            example=i,
            text=None if table is None else short(table.texts[i], LONGEST),
            pair=None if table is None or table.pairs is None else short(table.pairs[i], LONGEST),
            label=classes[measures.labels[i]],
            heuristic=classes[measures.heuristic[i]],
            before=classes[swept.top2[i, 0]],
            after=classes[swept.predictions[row, i]],
            margin_before=float(before[i]),
            margin_after=float(after[i]),
        )
        for i in np.argsort(-size, kind="stable")[: min(MOVED, int(measures.conflict.sum()))].tolist()
    ]
