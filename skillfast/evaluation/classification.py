"""Accuracy and F1 of predictions, with paired bootstrap intervals, and the outcomes of a classifier's sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.metrics import f1_score

from skillfast.ablation.interventions import Condition
from skillfast.ablation.sweep import per_class_accuracy, sweep
from skillfast.evaluation.selectivity import interval
from skillfast.runs.results import Measured, Outcome, finite

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from skillfast.evaluation.grid import Case

MEASURES = ("accuracy", "f1_macro", "class_accuracy", "class_f1")


def scores_of_counts(
    true_positives: np.ndarray, predicted: np.ndarray, support: np.ndarray, own: int | None
) -> dict[str, np.ndarray]:
    """The measures from counts; F1 is 0 for a class that is neither there nor predicted, as in scikit-learn.

    Args:
        true_positives: [..., K], examples of each class that are predicted as it.
        predicted: [..., K], examples that are predicted as each class.
        support: [K], examples of each class.
        own: The class of `class_accuracy` and `class_f1`, which are NaN without one.
    """
    f1 = 2 * true_positives / np.maximum(predicted + support, 1)
    undefined = np.full(true_positives.shape[:-1], np.nan)
    recall = undefined if own is None or not support[own] else true_positives[..., own] / support[own]
    return {
        "accuracy": true_positives.sum(-1) / support.sum(),
        "f1_macro": f1.mean(-1),
        "class_accuracy": recall,
        "class_f1": undefined if own is None else f1[..., own],
    }


class PairedBootstrap:
    """Resamples of labelled examples, those of each class drawn among themselves.

    What matters of an example is its class and its two predictions, so a resample is a multinomial draw of the counts
    of these; it costs the same for any number of examples.

    Args:
        labels: int64 [n].
        n_classes: How many classes.
        replicates: Number of resamples.
        seed: Seed of the draws, the same for every pair of predictions.
    """

    def __init__(self, labels: np.ndarray, n_classes: int, replicates: int = 1000, seed: int = 0) -> None:
        self.labels = labels
        self.n_classes = n_classes
        self.support = np.bincount(labels, minlength=n_classes)
        self.replicates = replicates
        self.seed = seed

    def counts(self, before: np.ndarray, after: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """For `before` and `after` [n]: resampled true positives and predictions of each class, [replicates, K]."""
        rng = np.random.default_rng(self.seed)
        found = [
            (np.zeros((self.replicates, self.n_classes)), np.zeros((self.replicates, self.n_classes))) for _ in "ab"
        ]
        for label, n in enumerate(self.support):
            if not n:
                continue
            member = self.labels == label
            pairs, counts = np.unique(np.stack([before[member], after[member]]), axis=1, return_counts=True)
            drawn = rng.multinomial(n, counts / n, size=self.replicates)  # [replicates, pairs]
            for (hits, predicted), classes in zip(found, pairs, strict=True):
                hits[:, label] += drawn[:, classes == label].sum(1)
                for column in np.unique(classes):
                    predicted[:, column] += drawn[:, classes == column].sum(1)
        return found

    def measure(self, intact: np.ndarray, predictions: np.ndarray, own: int | None) -> Measured:
        """The measures of `predictions` [n], and their change from those of `intact` [n]."""
        before, after = (self.values(p, own) for p in (intact, predictions))
        spread_before, spread_after = (
            scores_of_counts(hits, predicted, self.support, own) for hits, predicted in self.counts(intact, predictions)
        )
        none = [name for name, value in after.items() if value is None]
        change = {name: None if name in none else after[name] - before[name] for name in after}  # type: ignore[operator]
        return Measured(
            values=after,
            change=change,
            ci95={name: interval(spread) for name, spread in spread_after.items()},
            change_ci95={name: interval(spread - spread_before[name]) for name, spread in spread_after.items()},
        )

    def values(self, predictions: np.ndarray, own: int | None) -> dict[str, float | None]:
        """The measures of predictions [n]; None for those of a class where there is none, or no example of it."""
        classes = np.arange(self.n_classes)
        f1 = f1_score(self.labels, predictions, labels=classes, average=None, zero_division=0)
        per_class = per_class_accuracy(predictions, self.labels, self.n_classes)
        return finite(
            {
                "accuracy": (predictions == self.labels).mean(),
                "f1_macro": f1.mean(),
                "class_accuracy": np.nan if own is None else per_class[own],
                "class_f1": np.nan if own is None else f1[own],
            }
        )


def intact_json(bootstrap: PairedBootstrap, intact: np.ndarray) -> dict[str, Any]:
    """The intact model's measures, over all classes and per class."""
    found = bootstrap.measure(intact, intact, None)
    per_class = [bootstrap.values(intact, own) for own in range(bootstrap.n_classes)]
    kept = ("accuracy", "f1_macro")
    return {
        "values": {name: found.values[name] for name in kept},
        "ci95": {name: found.ci95[name] for name in kept},
        "per_class": {
            "accuracy": [values["class_accuracy"] for values in per_class],
            "f1": [values["class_f1"] for values in per_class],
            "examples": bootstrap.support.tolist(),
        },
    }


def class_outcomes(
    model: torch.nn.Module,
    loader: Iterable[Any],
    cases: Sequence[Case],
    classes: Sequence[str],
    *,
    replicates: int = 1000,
    seed: int = 0,
    quiet: bool = True,
) -> tuple[dict[str, Any], list[Outcome]]:
    """Every case's measures on held-out data, in one sweep.

    Args:
        model: In evaluation mode.
        loader: Batches of (inputs, labels) that chose nothing.
        cases: From `grid`.
        classes: Class names; a skill named in its metric as `label:NAME` has NAME as its own class.
        replicates: Number of bootstrap replicates.
        seed: Seed of the bootstrap.
        quiet: Show no progress bar.

    Returns:
        The intact model's measures, and an outcome per case and factor, in their order.
    """
    rows = [(case, scale) for case in cases for scale in case.scales]
    conditions = [
        Condition(skill, scale=scale, name=f"{i}: {skill.name}")
        for i, (case, scale) in enumerate(rows)
        for skill in (case.skill, *case.controls)
    ]
    swept = sweep(model, loader, conditions, classes=classes, keep_predictions=True, quiet=quiet)
    assert swept.predictions is not None
    intact, bootstrap = swept.top2[:, 0], PairedBootstrap(swept.labels, len(classes), replicates, seed)
    found, remaining = [], iter(swept.predictions)
    for case, scale in rows:
        own = own_class(case.skill.metric, classes)
        measured = [bootstrap.measure(intact, next(remaining), own) for _ in (case.skill, *case.controls)]
        found.append(Outcome.of(case, scale, measured[0], measured[1:]))
    return intact_json(bootstrap, intact), found


def own_class(metric: str | None, classes: Sequence[str]) -> int | None:
    """Index of the class that a column such as `label:deer` is of; None for any other metric."""
    name = (metric or "").removeprefix("label:")
    return list(classes).index(name) if name != metric and name in classes else None
