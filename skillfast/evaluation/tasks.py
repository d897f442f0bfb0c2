"""Several tasks on one model: do they share neurons, and does removing one task's spare the others?"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skillfast.ablation.interventions import ablate
from skillfast.errors import ArgumentError
from skillfast.evaluation.selectivity import random_skills
from skillfast.metrics import COLUMN, TOKEN_LOG_PROBABILITY, Continuous, check_metric_names, parse_metrics
from skillfast.models.sites import find_sites, module_device
from skillfast.models.text_classifier import TextClassifier
from skillfast.runs.results import Measured, finite, summary
from skillfast.skills.ranking import NeuronRanking
from skillfast.skills.select import select
from skillfast.skills.skill import Skill, overlap
from skillfast.tracing.trace import image_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skillfast.metrics import AuxiliaryMetric
    from skillfast.models.sites import Site
    from skillfast.runs.subject import Subject
    from skillfast.statistics.scores import NeuronScores

STEADY = 1e-9  # a deviation that rounding may leave, as a share of the largest value
RIDGE = tuple(np.logspace(-3, 3, 13))  # strengths that RidgeCV chooses from


@dataclass(frozen=True)
class Outputs:
    """What a classifier gives on one part of the data.

    Attributes:
        logits: float [n, classes].
        labels: int64 [n].
        embeddings: float32 [n, E], what enters the classifier.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    embeddings: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Bool [n]: whether the prediction is the label."""
        return (self.logits.argmax(1) == self.labels).numpy()


def task_skills(
    scores: NeuronScores, tasks: Sequence[str], method: str, share: float, max_site_share: float = 0.25
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


def expected_shared(one: Skill, other: Skill, sites: Sequence[Site]) -> float:
    """Neurons that random sets with as many per site would share: the sum of a b / width (hypergeometric mean)."""
    none = torch.empty(0)
    return sum(
        len(one.neurons.get(site.name, none)) * len(other.neurons.get(site.name, none)) / site.width for site in sites
    )


def overlaps(skills: Sequence[Skill], sites: Sequence[Site]) -> dict[str, Any]:
    """How many neurons every two skills share, how many chance would give, and which neurons are in several."""
    owners: dict[tuple[str, int], list[str]] = {}
    for skill in skills:
        for site in sites:
            for neuron in skill.neurons.get(site.name, torch.empty(0)).tolist():
                owners.setdefault((site.name, neuron), []).append(skill.name)
    sets = [{at for at, names in owners.items() if skill.name in names} for skill in skills]
    expected = [[None if a is b else expected_shared(a, b, sites) for b in skills] for a in skills]
    return {
        "neurons": [len(skill) for skill in skills],
        "jaccard": overlap(skills).tolist(),
        "shared": [[len(a & b) for b in sets] for a in sets],
        "expected_shared": expected,
        "expected_jaccard": [
            [None if e is None else e / max(len(a) + len(b) - e, 1e-12) for b, e in zip(skills, row, strict=True)]
            for a, row in zip(skills, expected, strict=True)
        ],
        "in_several": [
            {"site": site, "neuron": neuron, "tasks": names}
            for (site, neuron), names in owners.items()
            if len(names) > 1
        ],
    }


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
                inputs, target = image_batch(batch)
                logits.append(subject.model(inputs.to(device)).float().cpu())
                labels.append(target)
                embeddings[-1] = _one_row(embeddings[-1], subject.model, inputs).cpu()
        finally:
            hook.remove()
    return Outputs(torch.cat(logits), torch.cat(labels), torch.cat(embeddings).numpy())


def _one_row(hidden: torch.Tensor, model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """[batch, E]; of a head that runs on every token the row of the last real one, whose logits count."""
    if hidden.dim() == 2:
        return hidden
    if not isinstance(model, TextClassifier):
        raise ArgumentError(
            f"tasks: expected a classifier that reads one row per example, got {list(hidden.shape)} in "
            f"{type(model).__name__}; leave --tasks out"
        )
    mask = TextClassifier.token_mask(inputs).to(hidden.device)
    last = (torch.arange(mask.shape[1], device=hidden.device) * mask).argmax(1)
    return hidden[torch.arange(len(last), device=hidden.device), last]


class _Measures:
    """What is measured of each task, with linear probes of the data's columns fitted on the intact select part."""

    def __init__(self, subject: Subject, tasks: Sequence[str]) -> None:
        splits: Any = subject.splits
        self.chosen: dict[str, AuxiliaryMetric] = parse_metrics(
            tasks, splits.classes, getattr(splits.select, "metrics", None)
        )
        self.test = splits.test
        self.probes = {}
        self.intact = outputs(subject, "test")
        self.words: dict[str, str] = {}
        columns = [name for name, metric in self.chosen.items() if metric.column is not None]
        rows = outputs(subject, "select").embeddings if columns else None
        for name in columns:
            self.probes[name] = _probe(splits.select.table.columns[name]).fit(rows, splits.select.table.columns[name])

    def values(self, found: Outputs) -> dict[str, float]:
        """Measure -> value, NaN where it is not defined."""
        values: dict[str, float] = {}
        for name, metric in self.chosen.items():
            if metric.column is not None:
                self._column(name, found, values)
            elif name in ("label", "correct"):
                self._add(
                    values,
                    f"{name}: accuracy",
                    "share of held-out examples that are predicted right",
                    found.right.mean(),
                )
            else:
                self._output(name, metric, found, values)
        return values

    def _add(self, values: dict[str, float], measure: str, words: str, value: float) -> None:
        values[measure] = float(value)
        self.words[measure] = words

    def _column(self, name: str, found: Outputs, values: dict[str, float]) -> None:
        truth, probe = self.test.table.columns[name], self.probes[name]
        words = (
            f"the model does not give out {name}: {{}} of a linear probe of it, from the embeddings that enter the "
            "classifier, fitted on those of the intact model on other examples"
        )
        if truth.dtype.kind != "f":
            self._add(
                values, f"{name}: accuracy of a probe", words.format("accuracy"), probe.score(found.embeddings, truth)
            )
            return
        told = probe.predict(found.embeddings)
        squared = "R\N{SUPERSCRIPT TWO}"
        self._add(values, f"{name}: {squared} of a probe", words.format(squared), probe.score(found.embeddings, truth))
        what = "Pearson's r with the truth, which a mere shift of the embeddings leaves,"
        self._add(values, f"{name}: r of a probe", words.format(what), _pearson(told, truth))

    def _output(self, name: str, metric: AuxiliaryMetric, found: Outputs, values: dict[str, float]) -> None:
        now, before = (metric.values(o.logits, o.labels).double().numpy() for o in (found, self.intact))
        self._add(values, f"{name}: mean", f"mean {name} on held-out examples", now.mean())
        if not isinstance(metric.kind, Continuous):
            return
        words = f"Pearson's r of each example's {name} with the intact model's"
        self._add(values, f"{name}: r with intact", words, _pearson(now, before))
        if name == "confidence":
            right = found.right
            auroc = np.nan if right.all() or not right.any() else roc_auc_score(right, now)
            words = "AUROC: how well confidence tells right predictions from wrong ones"
            self._add(values, f"{name}: AUROC of right", words, auroc)


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's r; NaN where one is constant."""
    steady = min(one.std(), other.std()) < STEADY * max(np.abs(one).max(), np.abs(other).max())
    return np.nan if steady else float(np.corrcoef(one, other)[0, 1])


def _probe(values: np.ndarray) -> Any:
    """Ridge regression of numbers, its strength chosen by leave-one-out; logistic regression of words."""
    model = RidgeCV(RIDGE) if values.dtype.kind == "f" else LogisticRegression(max_iter=1000)
    return make_pipeline(StandardScaler(), model)


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
    max_site_share: float = 0.25,
    draws: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
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
        The tasks object of evaluation.json.

    Raises:
        ArgumentError: Fewer than two tasks, one that was not traced, or a model without a classifier.
    """
    check_tasks(tasks)
    names = [task.removeprefix(COLUMN) for task in tasks]
    skills = task_skills(scores, names, method, share, max_site_share)
    measures = _Measures(subject, tasks)
    intact = measures.values(measures.intact)
    rng = np.random.default_rng(seed)

    def measured(skill: Skill) -> Measured:
        values = measures.values(outputs(subject, "test", skill))
        return Measured(finite(values), finite({name: v - intact[name] for name, v in values.items()}), {}, {})

    removals = []
    for skill in skills:
        own = measured(skill)
        controls = [measured(drawn) for drawn in random_skills(skill, scores.sites, draws, rng)]
        removals.append({"task": skill.name, "values": own.values, "change": own.change, "random": summary(controls)})
    return {
        "share": share,
        "names": names,
        "measured": measures.words,
        **overlaps(skills, scores.sites),
        "intact": finite(intact),
        "removals": removals,
    }
