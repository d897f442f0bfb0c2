"""Accuracy over all test examples, whatever their class: intact, and after each removal and its random controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from skillfast.evaluation.intervals import Strata, difference_limits
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
) -> Overall:
    """Accuracy over all examples, intact and without each skill; changes are fractions of all examples.

    Args:
        predictions: int64 [K, n], with skill i removed.
        controls: int64 [draws, K, n], with as many neurons drawn at random removed.
        intact: int64 [n], of the intact model.
        labels: int64 [n].
        skills: The K skills.
        n_neurons: Number of neurons in the model's sites.
    """
    right = labels == intact
    change = (predictions == labels).astype(np.float64) - right
    drawn = ((controls == labels).astype(np.float64) - right).mean(-1)  # [draws, K]
    counts = np.bincount(labels)
    strata = Strata(labels, counts / counts.sum())
    removals = [
        OverallRemoval(
            skill=skill.name,
            neurons=len(skill),
            share=len(skill) / n_neurons,
            accuracy=float((predictions[i] == labels).mean()),
            change=float(change[i].mean()),
            ci95=_interval(change[i], strata),
            random_changes=drawn[:, i].tolist(),
        )
        for i, skill in enumerate(skills)
    ]
    return Overall(
        accuracy=float(right.mean()), n_test=len(labels), removals=removals, random_change=float(drawn.mean())
    )


def _interval(change: np.ndarray, strata: Strata) -> list[float]:
    """95 % interval of the mean of a change of -1, 0 or 1 per example [n]."""
    values = np.stack([change > 0, change < 0])
    gained, lost = np.clip(strata.mean(values), 0, 1).tolist()
    return list(difference_limits(gained, lost, strata.covariance(values), strata.effective))
