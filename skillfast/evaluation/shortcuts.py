"""Shortcuts: neurons that follow a heuristic and not the label, and what models do where the two disagree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import false_discovery_control, norm

from skillfast.evaluation.intervals import share_limits
from skillfast.evaluation.measures import finite
from skillfast.evaluation.paired import PairedDifference
from skillfast.results.evaluation import Measured

if TYPE_CHECKING:
    from collections.abc import Mapping

    from skillfast.statistics.scores import NeuronScores

LABEL, HEURISTIC = "label", "heuristic"
LEVEL = 0.05
MEASURES = {
    "shortcut_answers": "share of the conflicts that are answered as the heuristic says",
    "right_answers": "share of the conflicts that are answered right",
    "agreeing_accuracy": "accuracy on the examples where heuristic and label are the same",
}


@dataclass(frozen=True)
class Following:
    """What each neuron follows.

    Attributes:
        heuristic: float64 [n_neurons], largest |r| with an answer of the heuristic given the label; NaN where it is not
            defined.
        label: float64 [n_neurons], largest |r| with a class given the heuristic.
        q_heuristic: float64 [n_neurons], p of no partial correlation with any answer of the heuristic, adjusted over
            all neurons (Benjamini and Hochberg); 1 where it is not defined.
        q_label: float64 [n_neurons], p of no partial correlation with any class, adjusted and defined as `q_heuristic`.
    """

    heuristic: np.ndarray
    label: np.ndarray
    q_heuristic: np.ndarray
    q_label: np.ndarray

    @property
    def shortcut(self) -> np.ndarray:
        """`heuristic` of the neurons that follow it, more than they follow the label; NaN of all others."""
        return np.where((self.q_heuristic < LEVEL) & ~(self.label >= self.heuristic), self.heuristic, np.nan)

    @property
    def inference(self) -> np.ndarray:
        """`label` of the neurons that follow it, more than they follow the heuristic; NaN of all others."""
        return np.where((self.q_label < LEVEL) & ~(self.heuristic >= self.label), self.label, np.nan)


def following(scores: NeuronScores) -> Following:
    """What each neuron follows, by partial correlations.

    Args:
        scores: What a trace of the categorical metrics `"label"` and `"heuristic"` gives.
    """
    heuristic, q_heuristic = _given(scores, LABEL)
    label, q_label = _given(scores, HEURISTIC)
    return Following(heuristic, label, q_heuristic, q_label)


def _given(scores: NeuronScores, fixed: str) -> tuple[np.ndarray, np.ndarray]:
    """Largest |r| over the other metric's columns and its adjusted p, both [n_neurons]."""
    found = scores.given(fixed)
    assert found.pearson is not None
    columns = len(scores.columns) - len(found.columns)
    size = np.abs(found.pearson)
    known = np.isfinite(size)
    largest = np.where(known.any(1), np.where(known, size, -1.0).max(1), np.nan)
    degrees = max(scores.n_observations - columns - 3, 1)
    z = np.arctanh(np.clip(largest, 0, 1 - 1e-12)) * np.sqrt(degrees)  # Fisher's, of a partial correlation
    p = np.minimum(2 * norm.sf(z) * np.maximum(known.sum(1), 1), 1.0)  # Bonferroni over the columns
    return largest, false_discovery_control(np.where(np.isnan(p), 1.0, p))


class ConflictMeasures:
    """What predictions on held-out examples are worth, where a heuristic and the label disagree and elsewhere.

    Args:
        intact: int64 [n], predictions of the intact model.
        labels: int64 [n].
        heuristic: int64 [n], what the heuristic answers.
    """

    def __init__(self, intact: np.ndarray, labels: np.ndarray, heuristic: np.ndarray) -> None:
        self.labels = labels
        self.heuristic = heuristic
        self.conflict = labels != heuristic
        self._intact = self._hits(intact)

    def _hits(self, predictions: np.ndarray) -> dict[str, np.ndarray]:
        """Measure -> bool, of the examples that it counts."""
        there, right = self.conflict, predictions == self.labels
        rows = ((predictions == self.heuristic)[there], right[there], right[~there])
        return dict(zip(MEASURES, rows, strict=True))

    def measure(self, predictions: np.ndarray) -> Measured:
        """The measures of predictions [n] and their change from the intact model's, with 95 % limits.

        Limits of values are Wilson's, of changes Newcombe's for paired shares.
        """
        hits = self._hits(predictions)
        changes = {name: self._change(name, rows) for name, rows in hits.items()}
        return Measured(
            values=finite({name: float(rows.mean()) if len(rows) else np.nan for name, rows in hits.items()}),
            change=finite({name: change.change for name, change in changes.items()}),
            ci95={name: _limits(rows) for name, rows in hits.items()},
            change_ci95={name: list(change.limits()) if change.n else None for name, change in changes.items()},
        )

    def p(self, predictions: np.ndarray) -> dict[str, float]:
        """Measure -> two-sided mid-p (McNemar's) that predictions [n] are no other than the intact model's."""
        return {name: self._change(name, rows).p for name, rows in self._hits(predictions).items()}

    def _change(self, name: str, hits: np.ndarray) -> PairedDifference:
        return PairedDifference(hits.astype(np.int8) - self._intact[name].astype(np.int8))


def _limits(hits: np.ndarray) -> list[float] | None:
    return list(share_limits(float(hits.mean()), 0.0, len(hits))) if len(hits) else None


def of_classes(values: np.ndarray, classes: Mapping[str, int]) -> tuple[np.ndarray, int | None]:
    """Classes that a column names, int64 [n], and where the first value is that names none.

    Args:
        values: Names of classes, as text or numbers, [n]; indices of classes where all values are such and not all are
            names, as labels are.
        classes: Name -> index.
    """
    words = [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in values.tolist()]
    if not set(words) <= classes.keys() and set(words) <= {str(i) for i in classes.values()}:
        return np.array(words, dtype=np.int64), None
    found = np.array([classes.get(word, -1) for word in words], dtype=np.int64)
    missing = np.flatnonzero(found < 0)
    return found, int(missing[0]) if len(missing) else None
