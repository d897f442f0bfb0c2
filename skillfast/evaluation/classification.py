"""Accuracy and F1 of predictions, and their change from the intact model's, with 95 % intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec import structs
from sklearn.metrics import f1_score

from skillfast.evaluation.intervals import share_limits
from skillfast.evaluation.measures import finite
from skillfast.evaluation.paired import PairedDifference
from skillfast.evaluation.resampling import interval
from skillfast.results.evaluation import Intact, Measured, PerClass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skillfast.evaluation.resampling import PairedBootstrap
    from skillfast.results.evaluation import Measure, Values
    from skillfast.results.records import Interval

MEASURES: tuple[Measure, ...] = ("accuracy", "f1_macro", "class_accuracy", "other_accuracy", "class_f1")


def f1_of_counts(
    true_positives: np.ndarray, predicted: np.ndarray, support: np.ndarray, own: int | None
) -> dict[str, np.ndarray]:
    """F1 from counts; 0 for a class that is neither there nor predicted, as in scikit-learn.

    Args:
        true_positives: [..., K], examples of each class that are predicted as it.
        predicted: [..., K], examples that are predicted as each class.
        support: [K], examples of each class.
        own: The class of `class_f1`, which is NaN without one.
    """
    f1 = 2 * true_positives / np.maximum(predicted + support, 1)
    undefined = np.full(true_positives.shape[:-1], np.nan)
    return {"f1_macro": f1.mean(-1), "class_f1": undefined if own is None else f1[..., own]}


def measure(bootstrap: PairedBootstrap, intact: np.ndarray, predictions: np.ndarray, own: int | None) -> Measured:
    """The measures of predictions, and their change from the intact model's, with 95 % intervals.

    Those of accuracies are Wilson's and of their changes Newcombe's for paired shares, which have a width where every
    example is right, too; those of F1 come from resamples.

    Args:
        bootstrap: Resamples of the n examples.
        intact: int64 [n], predictions of the intact model.
        predictions: int64 [n].
        own: The class of `class_accuracy` and `class_f1`, and that `other_accuracy` leaves out; they are None without
            one.
    """
    before, after = (values(bootstrap, p, own) for p in (intact, predictions))
    none = [name for name, value in after.items() if value is None]
    change = {name: None if name in none else after[name] - before[name] for name in after}  # type: ignore[operator]
    ci95, change_ci95 = _limits(bootstrap.labels, intact, predictions, own)
    spread_before, spread_after = (
        f1_of_counts(hits, predicted, bootstrap.support, own)
        for hits, predicted in bootstrap.counts(intact, predictions)
    )
    for name, spread in spread_after.items():
        ci95[name], change_ci95[name] = interval(spread), interval(spread - spread_before[name])
    return Measured(
        values=after,
        change=change,
        ci95={name: ci95[name] for name in MEASURES},
        change_ci95={name: change_ci95[name] for name in MEASURES},
    )


def unchanged(bootstrap: PairedBootstrap, intact: np.ndarray, own: int | None) -> Measured:
    """The measures of the intact model [n] under a factor of 1, which changes nothing in any other sample either."""
    found = measure(bootstrap, intact, intact, own)
    never = {name: None if value is None else [0.0, 0.0] for name, value in found.values.items()}
    return structs.replace(found, change_ci95=never)


def _limits(
    labels: np.ndarray, intact: np.ndarray, predictions: np.ndarray, own: int | None
) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """Limits of each accuracy, and of its change; None without an example, of a change without two."""
    right, was_right = predictions == labels, intact == labels
    limits: dict[str, Interval] = {}
    of_change: dict[str, Interval] = {}
    for name, counted in _counted(labels, own).items():
        hits, n = right[counted], int(counted.sum())
        limits[name] = list(share_limits(float(hits.mean()), 0.0, n)) if n else None
        change = PairedDifference(hits.astype(np.int8) - was_right[counted].astype(np.int8))
        of_change[name] = list(change.limits()) if n > 1 else None
    return limits, of_change


def _counted(labels: np.ndarray, own: int | None) -> dict[str, np.ndarray]:
    """Accuracy -> bool [n], the examples that it is over."""
    every = np.ones(len(labels), dtype=bool)
    of_class, of_others = (~every, ~every) if own is None else (labels == own, labels != own)
    return {"accuracy": every, "class_accuracy": of_class, "other_accuracy": of_others}


def values(bootstrap: PairedBootstrap, predictions: np.ndarray, own: int | None) -> Values:
    """The measures of predictions [n]; None for those of a class where there is none, or no example of it."""
    labels = bootstrap.labels
    f1 = f1_score(labels, predictions, labels=np.arange(bootstrap.n_classes), average=None, zero_division=0)
    right = predictions == labels
    shares = {
        name: right[counted].mean() if counted.any() else np.nan for name, counted in _counted(labels, own).items()
    }
    of_f1 = {"f1_macro": f1.mean(), "class_f1": np.nan if own is None else f1[own]}
    return finite({name: {**shares, **of_f1}[name] for name in MEASURES})


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
