"""Where a skill lives: Shapley values of its parts in MLPs, attention and the head."""

from __future__ import annotations

from itertools import combinations
from math import factorial
from typing import TYPE_CHECKING, Any

import numpy as np

from skillfast.ablation import Condition
from skillfast.benchmark.removal import interval
from skillfast.vocabulary import KINDS, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skillfast.skills import Skill

SUBSETS: tuple[tuple[Kind, ...], ...] = tuple(
    subset for size in range(len(KINDS), 0, -1) for subset in combinations(KINDS, size)
)
"""All seven sets of components, the whole first."""


def component_conditions(skills: Sequence[Skill], scale: float) -> list[Condition]:
    """Each skill with only its neurons in each subset: conditions [len(SUBSETS), K], row by row."""
    return [Condition(skill, components=subset, scale=scale) for subset in SUBSETS for skill in skills]


def shapley(values: np.ndarray) -> np.ndarray:
    """Shapley value of each of `KINDS`: values [len(SUBSETS), ...] -> [len(KINDS), ...]; the empty set is worth 0."""
    worth = dict(zip(map(frozenset, SUBSETS), values, strict=True))
    worth[frozenset()] = np.zeros_like(values[0])
    n = len(KINDS)
    result = []
    for kind in KINDS:
        share = np.zeros_like(values[0])
        for subset in worth:
            if kind not in subset:
                weight = factorial(len(subset)) * factorial(n - len(subset) - 1) / factorial(n)
                share = share + weight * (worth[subset | {kind}] - worth[subset])
        result.append(share)
    return np.stack(result)


def layer_contribution(drops: np.ndarray, resampled: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """The layer_contribution object of results.json.

    Args:
        drops: float64 [len(SUBSETS), K], drop of each class's accuracy when its skill's neurons in a subset go.
        resampled: float64 [len(SUBSETS), K, replicates].
        classes: Class names.
    """
    total = drops.mean(1)  # [len(SUBSETS)]
    spread = resampled.mean(1)  # [len(SUBSETS), replicates]
    with np.errstate(divide="ignore", invalid="ignore"):
        spread_shares = shapley(spread) / spread[0]
        spread_rest = 1 - _alone(spread) / spread[0]
    shares = _shares(total)
    per_class = {name: _shares(drops[:, i]) for i, name in enumerate(classes)}
    ci95 = {kind: interval(spread_shares[i]) for i, kind in enumerate(KINDS)}
    return {
        **shares,
        "non_additivity": float(1 - _alone(total) / total[0]) if total[0] > 0 else None,
        "per_class": per_class,
        "ci95": {**ci95, "non_additivity": interval(spread_rest)},
    }


def _alone(values: np.ndarray) -> np.ndarray:
    """Sum of what each component is worth alone."""
    return sum((values[SUBSETS.index((kind,))] for kind in KINDS), np.zeros_like(values[0]))


def _shares(values: np.ndarray) -> dict[str, float | None]:
    """Share of each component in the drop of the whole skill; None where nothing dropped."""
    if values[0] <= 0:
        return dict.fromkeys(KINDS)
    return dict(zip(KINDS, (shapley(values) / values[0]).tolist(), strict=True))
