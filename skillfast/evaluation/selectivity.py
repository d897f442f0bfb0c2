"""What removing each skill does: the removal matrix, selectivity and its oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from skillfast.evaluation.resampling import Bootstrap, interval
from skillfast.metrics import per_class_accuracy
from skillfast.results.bench import Effect, EffectIntervals, Selectivity

if TYPE_CHECKING:
    from collections.abc import Mapping

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


def resampled_terms(change: np.ndarray, bootstrap: Bootstrap) -> dict[str, np.ndarray]:
    """The averages over resampled removal matrices, averaged over draws.

    Args:
        change: float64 [draws, K, n], correct after the removal minus correct before, per image.
        bootstrap: Resamples of the n images.

    Returns:
        Term -> float64 [replicates].
    """
    draws, k, _ = change.shape
    step = max(1, (1 << 22) // (draws * k * k))  # replicates at once: 32 MB
    parts = []
    for start in range(0, bootstrap.replicates, step):
        columns = [
            change[..., m] @ w[:, start : start + step]
            for m, w in zip(bootstrap.members, bootstrap.weights, strict=True)
        ]
        matrices = np.moveaxis(np.stack(columns, -1), 2, 0)  # [step, draws, K, K]
        parts.append({name: term.mean(-1) for name, term in selectivity_terms(matrices).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in TERMS}


def own_drops(
    predictions: np.ndarray, baseline: np.ndarray, labels: np.ndarray, bootstrap: Bootstrap
) -> tuple[np.ndarray, np.ndarray]:
    """What each class loses when parts of its own skill go.

    Args:
        predictions: int64 [parts, n], of every image with a part of its own class's skill removed.
        baseline: int64 [n], of the intact model.
        labels: int64 [n].
        bootstrap: Resamples of the n images.

    Returns:
        float64 [parts, K], and resampled [parts, K, replicates].
    """
    lost = (baseline == labels).astype(np.float64) - (predictions == labels)
    return np.stack([lost[:, m].mean(1) for m in bootstrap.members], 1), bootstrap.own_class(lost)


def selectivity(predictions: np.ndarray, baseline: np.ndarray, labels: np.ndarray, bootstrap: Bootstrap) -> Selectivity:
    """Terms and ratios of selectivity with their 95 % intervals, averaged over draws.

    Args:
        predictions: int64 [draws, K, n].
        baseline: int64 [n], of the intact model.
        labels: int64 [n].
        bootstrap: Resamples of the n images.
    """
    matrices = np.stack([removal_matrix(drawn, baseline, labels) for drawn in predictions])
    values = {name: float(term.mean()) for name, term in selectivity_terms(matrices).items()}
    spread = resampled_terms((predictions == labels).astype(np.float64) - (baseline == labels), bootstrap)
    ci95 = {name: interval(spread[name]) for name in TERMS}
    for name, below in RATIOS.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            ci95[name] = interval(spread["target_drop"] / np.abs(spread[below]))
    return Selectivity(**_effect_values(values), ci95=EffectIntervals(**ci95))


def _effect_values(terms: Mapping[str, float]) -> dict[str, Any]:
    """The terms, and the target's drop over each other term; None where that is 0."""
    below = {name: abs(terms[term]) for name, term in RATIOS.items()}
    return {**terms, **{name: terms["target_drop"] / size if size > ROUNDING else None for name, size in below.items()}}


def effect(predictions: np.ndarray, intact: np.ndarray, labels: np.ndarray) -> Effect:
    """Terms and ratios of selectivity, without intervals; classes without images do not count.

    Args:
        predictions: int64 [K, n], with skill i removed.
        intact: int64 [n], of the intact model.
        labels: int64 [n].
    """
    shown = np.isin(np.arange(len(predictions)), labels)
    matrix = removal_matrix(predictions, intact, labels)[np.ix_(shown, shown)]
    values = {name: float(term) for name, term in selectivity_terms(matrix).items()}
    return Effect(**_effect_values(values))
