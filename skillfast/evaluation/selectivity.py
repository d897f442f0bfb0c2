"""What removing each skill does: the removal matrix, selectivity, its oracle and its random control."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast.ablation.interventions import Condition
from skillfast.ablation.sweep import per_class_accuracy
from skillfast.skills.skill import Skill

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skillfast.models.sites import Site

TERMS = ("target_drop", "other_change", "other_abs_change", "other_harm")
ROUNDING = 1e-12  # what is left of a mean whose terms cancel
RATIOS = {"ratio": "other_change", "strict_ratio": "other_abs_change", "harm_ratio": "other_harm"}


def removal_matrix(predictions: np.ndarray, baseline: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Change in each class's accuracy under each removal.

    Args:
        predictions: int64 [K, n], with skill i removed.
        baseline: int64 [n], of the intact model.
        labels: int64 [n].

    Returns:
        float64 [K, K]: row = removed skill, column = class.
    """
    k = len(predictions)
    return per_class_accuracy(predictions, labels, k) - per_class_accuracy(baseline, labels, k)


def oracle_predictions(top2: np.ndarray, n_classes: int) -> np.ndarray:
    """int64 [K, n]: predictions with class i's logit removed, from the two best classes of each sample [n, 2]."""
    return np.where(top2[:, 0] == np.arange(n_classes)[:, None], top2[:, 1], top2[:, 0])


def selectivity_terms(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """The four averages over a removal matrix [..., K, K], each [...]."""
    k = matrix.shape[-1]
    rest = matrix[..., ~np.eye(k, dtype=bool)]  # [..., K * (K - 1)]
    return {
        "target_drop": -np.diagonal(matrix, axis1=-2, axis2=-1).mean(-1),
        "other_change": rest.mean(-1),
        "other_abs_change": np.abs(rest).mean(-1),
        "other_harm": np.maximum(0, -rest).mean(-1),
    }


class Bootstrap:
    """Resamples of the test images, those of each class drawn among themselves.

    Args:
        labels: int64 [n]; every class from 0 to K - 1 has at least one image.
        replicates: Number of resamples.
        seed: Seed of the draws.
    """

    def __init__(self, labels: np.ndarray, replicates: int = 1000, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.replicates = replicates
        self.members = [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]
        self.weights = [  # [n_class, replicates], summing to 1 in each replicate
            rng.multinomial(len(m), np.full(len(m), 1 / len(m)), size=replicates).T / len(m) for m in self.members
        ]

    def terms(self, change: np.ndarray) -> dict[str, np.ndarray]:
        """The averages over resampled removal matrices, averaged over draws: each [replicates].

        Args:
            change: float64 [draws, K, n], correct after the removal minus correct before, per image.
        """
        draws, k, _ = change.shape
        step = max(1, (1 << 22) // (draws * k * k))  # replicates at once: 32 MB
        parts = []
        for start in range(0, self.replicates, step):
            columns = [
                change[..., m] @ w[:, start : start + step] for m, w in zip(self.members, self.weights, strict=True)
            ]
            matrices = np.moveaxis(np.stack(columns, -1), 2, 0)  # [step, draws, K, K]
            parts.append({name: term.mean(-1) for name, term in selectivity_terms(matrices).items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in TERMS}

    def own_class(self, change: np.ndarray) -> np.ndarray:
        """Resampled change of class i's accuracy in row i: change [..., K, n] -> [..., K, replicates]."""
        rows = [change[..., i, m] @ w for i, (m, w) in enumerate(zip(self.members, self.weights, strict=True))]
        return np.stack(rows, -2)


def own_drops(
    predictions: np.ndarray, baseline: np.ndarray, labels: np.ndarray, bootstrap: Bootstrap
) -> tuple[np.ndarray, np.ndarray]:
    """What class i loses under conditions that take parts of skill i.

    Args:
        predictions: int64 [conditions, K, n].
        baseline: int64 [n], of the intact model.
        labels: int64 [n].
        bootstrap: Resamples of the n images.

    Returns:
        float64 [conditions, K], and resampled [conditions, K, replicates].
    """
    drops = -np.stack([np.diagonal(removal_matrix(part, baseline, labels)) for part in predictions])
    return drops, -bootstrap.own_class((predictions == labels).astype(np.float64) - (baseline == labels))


def interval(values: np.ndarray) -> list[float] | None:
    """The middle 95 % of bootstrap values; None where any end is not a number (a ratio over 0)."""
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(values, [0.025, 0.975])
    return [float(low), float(high)] if np.isfinite([low, high]).all() else None


def selectivity(
    predictions: np.ndarray, baseline: np.ndarray, labels: np.ndarray, bootstrap: Bootstrap
) -> dict[str, Any]:
    """The selectivity object of results.json, averaged over draws.

    Args:
        predictions: int64 [draws, K, n].
        baseline: int64 [n], of the intact model.
        labels: int64 [n].
        bootstrap: Resamples of the n images.
    """
    matrices = np.stack([removal_matrix(drawn, baseline, labels) for drawn in predictions])
    values = {name: float(term.mean()) for name, term in selectivity_terms(matrices).items()}
    spread = bootstrap.terms((predictions == labels).astype(np.float64) - (baseline == labels))
    ci95 = {name: interval(spread[name]) for name in TERMS}
    ratios: dict[str, float | None] = {}
    for name, below in RATIOS.items():
        denominator = abs(values[below])
        ratios[name] = values["target_drop"] / denominator if denominator > ROUNDING else None
        with np.errstate(divide="ignore", invalid="ignore"):
            ci95[name] = interval(spread["target_drop"] / np.abs(spread[below]))
    return {**values, **ratios, "ci95": ci95}


def random_skills(skill: Skill, sites: Sequence[Site], draws: int, rng: np.random.Generator) -> list[Skill]:
    """As many neurons of each site as the skill has there, drawn at random, `draws` times."""
    widths = {site.name: site.width for site in sites}
    return [
        Skill(
            name=f"random {i} for {skill.name}",
            neurons={
                name: torch.from_numpy(rng.choice(widths[name], size=len(index), replace=False))
                for name, index in skill.neurons.items()
            },
        )
        for i in range(draws)
    ]


def control_conditions(
    skills: Sequence[Skill], sites: Sequence[Site], draws: int, scale: float, seed: int
) -> list[Condition]:
    """`draws` random controls for each skill: conditions [draws, K], row by row."""
    rng = np.random.default_rng(seed)
    per_skill = [random_skills(skill, sites, draws, rng) for skill in skills]
    return [Condition(drawn[i], scale=scale) for i in range(draws) for drawn in per_skill]
