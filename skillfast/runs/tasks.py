"""Chooses several tasks' neurons on one model, and measures every task without each."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from skillfast.ablation.interventions import ablate
from skillfast.errors import ArgumentError
from skillfast.evaluation.measures import finite, random_draws
from skillfast.evaluation.tasks import Outputs, TaskMeasures, overlaps
from skillfast.metrics import COLUMN, TOKEN_LOG_PROBABILITY, check_metric_names, parse_metrics
from skillfast.models.batches import read_batch
from skillfast.models.sites import find_sites, module_device
from skillfast.models.text_classifier import TextClassifier, last_real
from skillfast.results.evaluation import Measured, TaskRemoval, Tasks
from skillfast.skills.ranking import NeuronRanking
from skillfast.skills.select import select
from skillfast.skills.skill import Skill, random_skills
from skillfast.vocabulary import MAX_SITE_SHARE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skillfast.models.inputs import Inputs
    from skillfast.runs.subject import Subject
    from skillfast.statistics.scores import NeuronScores


def task_skills(
    scores: NeuronScores, tasks: Sequence[str], method: str, share: float, max_site_share: float = MAX_SITE_SHARE
) -> list[Skill]:
    """Each task's neurons, as many for all: those with the largest statistic by size, over all classes of the task.

    Args:
        scores: Scores of one trace with every task's metric.
        tasks: Names of metrics.
        method: A statistic.
        share: Share of all neurons.
        max_site_share: Largest share of one site's neurons.

    Raises:
        ArgumentError: A task that was not traced, or of which this statistic says nothing.
    """
    values = scores.statistic(method)
    sizes = []
    for task in tasks:
        columns = [i for i, column in enumerate(scores.columns) if task in (column, column.partition(":")[0])]
        found = np.abs(values[:, columns] - 0.5) + 0.5 if method == "auroc" else np.abs(values[:, columns])
        known = np.isfinite(found).any(1)
        if not known.any():
            raise ArgumentError(
                f"task {task!r}: expected a metric with {method} among {', '.join(scores.columns)}, got none; name "
                "another --method or leave it out"
            )
        sizes.append(np.where(known, np.nan_to_num(found, nan=-1).max(1), np.nan))
    ranking = NeuronRanking(
        method=method,
        columns=tuple(tasks),
        values=np.stack(sizes, 1),
        sites=scores.sites,
        n_observations=np.full(len(tasks), scores.n_observations),
        fingerprint=scores.fingerprint,
    )
    return list(select(ranking, method, share=share, max_site_share=max_site_share).values())


def outputs(subject: Subject, part: str, skill: Skill | None = None, scale: float = 0.0) -> Outputs:
    """Logits, labels and embeddings of a part, in the data's order, intact or with a skill scaled."""
    head = next((site for site in find_sites(subject.model) if site.kind == "head"), None)
    if head is None:
        raise ArgumentError(
            f"tasks: expected a model with a linear classifier, got {type(subject.model).__name__} without one; leave "
            "--tasks out"
        )
    logits, labels, embeddings = [], [], []
    device = module_device(subject.model)

    def keep(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        embeddings.append(args[0].float())

    with torch.inference_mode(), nullcontext() if skill is None else ablate(subject.model, skill, scale=scale):
        hook = subject.model.get_submodule(head.path).register_forward_pre_hook(keep)  # after what changes neurons
        try:
            for batch in subject.loader(part):
                found = read_batch(batch)
                logits.append(found.to(device).logits(subject.model).float().cpu())
                labels.append(found.labels)
                embeddings[-1] = _one_row(embeddings[-1], subject.model, found.inputs).cpu()
        finally:
            hook.remove()
    return Outputs(torch.cat(logits), torch.cat(labels), torch.cat(embeddings).numpy())


def _one_row(hidden: torch.Tensor, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    """[batch, E]; of a head that runs on every token the row of the last real one, whose logits count."""
    if hidden.dim() == 2:
        return hidden
    if not isinstance(model, TextClassifier) or not isinstance(inputs, torch.Tensor):
        raise ArgumentError(
            f"tasks: expected a classifier that reads one row per example, got {list(hidden.shape)} in "
            f"{type(model).__name__}; leave --tasks out"
        )
    last = last_real(TextClassifier.token_mask(inputs).to(hidden.device))
    return hidden[torch.arange(len(last), device=hidden.device), last]


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises ArgumentError for tasks that cannot be compared."""
    if len(tasks) < 2 or len(set(tasks)) < len(tasks):
        raise ArgumentError(
            f"tasks: expected two different ones or more, got {', '.join(tasks) or 'none'}; for example "
            "--tasks label,confidence"
        )
    if TOKEN_LOG_PROBABILITY in tasks:
        raise ArgumentError(f"tasks: expected metrics of a classifier, got {TOKEN_LOG_PROBABILITY}; leave it out")
    check_metric_names(tasks)


def compare_tasks(
    subject: Subject,
    scores: NeuronScores,
    tasks: Sequence[str],
    *,
    method: str = "pearson",
    share: float = 0.01,
    max_site_share: float = MAX_SITE_SHARE,
    draws: int = 3,
    seed: int = 0,
) -> Tasks:
    """Choose each task's neurons at one size, compare the sets, and measure every task without each.

    Args:
        subject: A classifier and its data.
        scores: Scores of one trace of the select part with every task's metric.
        tasks: Metrics: `"label"`, one that the logits give, such as `"confidence"`, or `"column:NAME"`.
        method: A statistic.
        share: Share of all neurons for each task.
        max_site_share: Largest share of one site's neurons.
        draws: Random controls per task.
        seed: Seed of the controls.

    Returns:
        Shared neurons beside chance, and every task's measures without each task's neurons.

    Raises:
        ArgumentError: Fewer than two tasks, one that was not traced, or a model without a classifier.
    """
    check_tasks(tasks)
    names = [task.removeprefix(COLUMN) for task in tasks]
    skills = task_skills(scores, names, method, share, max_site_share)
    measures = _measures(subject, tasks)
    intact = measures.values(measures.intact)
    rng = np.random.default_rng(seed)

    def measured(skill: Skill) -> Measured:
        values = measures.values(outputs(subject, "test", skill))
        return Measured(finite(values), finite({name: v - intact[name] for name, v in values.items()}), {}, {})

    removals = []
    for skill in skills:
        own = measured(skill)
        controls = [measured(drawn) for drawn in random_skills(skill, scores.sites, draws, rng)]
        removals.append(
            TaskRemoval(task=skill.name, values=own.values, change=own.change, random=random_draws(controls))
        )
    return Tasks(
        **msgspec.structs.asdict(overlaps(skills, scores.sites)),
        share=share,
        names=names,
        measured=measures.words,
        intact=finite(intact),
        removals=removals,
    )


def _measures(subject: Subject, tasks: Sequence[str]) -> TaskMeasures:
    """What is measured of each task; the intact model runs over the test part, and for columns over the select part."""
    splits: Any = subject.splits
    chosen = parse_metrics(tasks, splits.classes, getattr(splits.select, "metrics", None))
    intact = outputs(subject, "test")
    columns = [name for name, metric in chosen.items() if metric.column is not None]
    return TaskMeasures(
        chosen,
        intact,
        truth={name: splits.test.table.columns[name] for name in columns},
        fitted={name: splits.select.table.columns[name] for name in columns},
        rows=outputs(subject, "select").embeddings if columns else None,
    )
