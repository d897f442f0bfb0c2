"""Accuracy and F1 of predictions, with paired bootstrap intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from sklearn.metrics import f1_score

from skillfast.evaluation.measures import finite
from skillfast.evaluation.resampling import interval
from skillfast.metrics import per_class_accuracy
from skillfast.results.evaluation import Intact, Measured, PerClass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skillfast.evaluation.resampling import PairedBootstrap
    from skillfast.results.evaluation import Measure, Values

MEASURES: tuple[Measure, ...] = ("accuracy", "f1_macro", "class_accuracy", "class_f1")


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


def measure(bootstrap: PairedBootstrap, intact: np.ndarray, predictions: np.ndarray, own: int | None) -> Measured:
    """The measures of predictions, and their change from the intact model's.

    Args:
        bootstrap: Resamples of the n examples.
        intact: int64 [n], predictions of the intact model.
        predictions: int64 [n].
        own: The class of `class_accuracy` and `class_f1`, which are None without one.
    """
    before, after = (values(bootstrap, p, own) for p in (intact, predictions))
    spread_before, spread_after = (
        scores_of_counts(hits, predicted, bootstrap.support, own)
        for hits, predicted in bootstrap.counts(intact, predictions)
    )
    none = [name for name, value in after.items() if value is None]
    change = {name: None if name in none else after[name] - before[name] for name in after}  # type: ignore[operator]
    return Measured(
        values=after,
        change=change,
        ci95={name: interval(spread) for name, spread in spread_after.items()},
        change_ci95={name: interval(spread - spread_before[name]) for name, spread in spread_after.items()},
    )


def values(bootstrap: PairedBootstrap, predictions: np.ndarray, own: int | None) -> Values:
    """The measures of predictions [n]; None for those of a class where there is none, or no example of it."""
    labels = bootstrap.labels
    f1 = f1_score(labels, predictions, labels=np.arange(bootstrap.n_classes), average=None, zero_division=0)
    per_class = per_class_accuracy(predictions, labels, bootstrap.n_classes)
    return finite(
        {
            "accuracy": (predictions == labels).mean(),
            "f1_macro": f1.mean(),
            "class_accuracy": np.nan if own is None else per_class[own],
            "class_f1": np.nan if own is None else f1[own],
        }
    )


def intact_measures(bootstrap: PairedBootstrap, intact: np.ndarray) -> Intact:
    """The measures of the intact model's predictions [n], over all classes and per class."""
    found = measure(bootstrap, intact, intact, None)
    per_class = [values(bootstrap, intact, own) for own in range(bootstrap.n_classes)]
    kept = ("accuracy", "f1_macro")
    return Intact(
        values={name: found.values[name] for name in kept},
        ci95={name: found.ci95[name] for name in kept},
        per_class=PerClass(
            accuracy=[one["class_accuracy"] for one in per_class],
            f1=[one["class_f1"] for one in per_class],
            examples=bootstrap.support.tolist(),
        ),
    )


def own_class(metric: str | None, classes: Sequence[str]) -> int | None:
    """Index of the class that a column such as `label:deer` is of; None for any other metric."""
    name = (metric or "").removeprefix("label:")
    return list(classes).index(name) if name != metric and name in classes else None
