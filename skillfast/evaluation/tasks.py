"""Several tasks on one model: do they share neurons, and what becomes of each when outputs change?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skillfast.metrics import Continuous
from skillfast.results.evaluation import Overlaps, SharedNeuron
from skillfast.skills.skill import overlap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from skillfast.metrics import AuxiliaryMetric
    from skillfast.models.sites import Site
    from skillfast.skills.skill import Skill

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


def expected_shared(one: Skill, other: Skill, sites: Sequence[Site]) -> float:
    """Neurons that random sets with as many per site would share: the sum of a b / width (hypergeometric mean)."""
    none = torch.empty(0)
    return sum(
        len(one.neurons.get(site.name, none)) * len(other.neurons.get(site.name, none)) / site.width for site in sites
    )


def overlaps(skills: Sequence[Skill], sites: Sequence[Site]) -> Overlaps:
    """How many neurons every two skills share, how many chance would give, and which neurons are in several."""
    owners: dict[tuple[str, int], list[str]] = {}
    for skill in skills:
        for site in sites:
            for neuron in skill.neurons.get(site.name, torch.empty(0)).tolist():
                owners.setdefault((site.name, neuron), []).append(skill.name)
    sets = [{at for at, names in owners.items() if skill.name in names} for skill in skills]
    expected = [[None if a is b else expected_shared(a, b, sites) for b in skills] for a in skills]
    return Overlaps(
        neurons=[len(skill) for skill in skills],
        jaccard=overlap(skills).tolist(),
        shared=[[len(a & b) for b in sets] for a in sets],
        expected_shared=expected,
        expected_jaccard=[
            [None if e is None else e / max(len(a) + len(b) - e, 1e-12) for b, e in zip(skills, row, strict=True)]
            for a, row in zip(skills, expected, strict=True)
        ],
        in_several=[
            SharedNeuron(site=site, neuron=neuron, tasks=names)
            for (site, neuron), names in owners.items()
            if len(names) > 1
        ],
    )


class TaskMeasures:
    """What is measured of each task, with linear probes of the data's columns fitted on the intact select part.

    Args:
        tasks: Name -> metric.
        intact: Outputs of the intact model on the test part.
        truth: Column -> its values on the test part, [n].
        fitted: Column -> its values on the select part, [m].
        rows: float32 [m, E], embeddings of the select part by the intact model; None where no task is a column.

    Attributes:
        words: Measure -> what it is, once it has been measured.
    """

    def __init__(
        self,
        tasks: Mapping[str, AuxiliaryMetric],
        intact: Outputs,
        truth: Mapping[str, np.ndarray],
        fitted: Mapping[str, np.ndarray],
        rows: np.ndarray | None,
    ) -> None:
        self.chosen = tasks
        self.intact = intact
        self.truth = truth
        self.words: dict[str, str] = {}
        self.probes = {name: _probe(values).fit(rows, values) for name, values in fitted.items()}

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
        truth, probe = self.truth[name], self.probes[name]
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
