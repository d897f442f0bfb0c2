"""Accuracy over all test examples, whatever their class: intact, and after each removal and its random controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from skillfast.evaluation.resampling import Bootstrap, interval
from skillfast.results.bench import Overall, OverallRemoval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skillfast.skills.skill import Skill


def overall_accuracy(
    predictions: np.ndarray,
    controls: np.ndarray,
    intact: np.ndarray,
    labels: np.ndarray,
    skills: Sequence[Skill],
    n_neurons: int,
    bootstrap: Bootstrap,
) -> Overall:
    """Accuracy over all examples, intact and without each skill; changes are fractions of all examples.

    Args:
        predictions: int64 [K, n], with skill i removed.
        controls: int64 [draws, K, n], with as many neurons drawn at random removed.
        intact: int64 [n], of the intact model.
        labels: int64 [n].
        skills: The K skills.
        n_neurons: Number of neurons in the model's sites.
        bootstrap: Resamples of the n examples.
    """
    right = labels == intact
    change = (predictions == labels).astype(np.float64) - right
    drawn = ((controls == labels).astype(np.float64) - right).mean(-1)  # [draws, K]
    spread = _resampled(change, labels, bootstrap)
    removals = [
        OverallRemoval(
            skill=skill.name,
            neurons=len(skill),
            share=len(skill) / n_neurons,
            accuracy=float((predictions[i] == labels).mean()),
            change=float(change[i].mean()),
            ci95=interval(spread[i]),
            random_changes=drawn[:, i].tolist(),
        )
        for i, skill in enumerate(skills)
    ]
    return Overall(
        accuracy=float(right.mean()), n_test=len(labels), removals=removals, random_change=float(drawn.mean())
    )


def _resampled(change: np.ndarray, labels: np.ndarray, bootstrap: Bootstrap) -> np.ndarray:
    """Resampled mean of each row over all examples: change [K, n] -> [K, replicates]."""
    parts = [
        len(members) / len(labels) * (change[:, members] @ weights)
        for members, weights in zip(bootstrap.members, bootstrap.weights, strict=True)
    ]
    return np.sum(parts, axis=0)
