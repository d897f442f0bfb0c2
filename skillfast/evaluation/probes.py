"""Gone or hidden: what a refitted probe and a few steps of tuning read from embeddings after a removal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import softmax

from skillfast.evaluation.jackknife import GROUPS, deal, jackknife_interval
from skillfast.results.bench import ClassInformation, Information, InformationIntervals, NeverSeen
from skillfast.skills.discriminant import linear_discriminant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FOLDS = 3  # of the examples: what reads one is fitted on the others
SHOTS = 5  # examples of a class that it is relearned from
OTHERS = 45  # of other classes beside them, at most
DRAWS = 5  # of these examples
STEPS = 30

Head = tuple[np.ndarray, np.ndarray]
"""Weights [K, E] and biases [K] of a linear classifier."""


@dataclass(frozen=True)
class Readings:
    """What is predicted of the test examples from embeddings under removals.

    Attributes:
        intact: int64 [n], by a probe that is fitted on the intact model's embeddings of other examples.
        refitted: int64 [removals, n], by one that is fitted on those under the removal.
        relearned: int64 [removals, draws, n], by the model's classifier after some steps on a few examples of the
            target and of others; no draws for a classifier that is not linear.
        without: int64 [removals, draws, n], after as many steps on the others alone.
        n_fitted: Examples that a probe is fitted on, at least.
    """

    intact: np.ndarray
    refitted: np.ndarray
    relearned: np.ndarray
    without: np.ndarray
    n_fitted: int


@dataclass(frozen=True)
class OtherModel:
    """What is predicted of the test examples by another model, one that never saw a class.

    Attributes:
        predicted: int64 [n], by its classifier.
        probed: int64 [n], by a probe that is fitted on its embeddings of other examples.
        n_train: Examples that it was trained on.
    """

    predicted: np.ndarray
    probed: np.ndarray
    n_train: int


@dataclass(frozen=True)
class Reader:
    """Reads classes from embeddings: by a probe, and by the model's own classifier after a few steps.

    Each third of the examples is read by what was fitted on the other two, so that nothing but the embeddings of the
    examples themselves is needed.

    Attributes:
        labels: int64 [n], classes of the examples.
        n_classes: K.
        head: The model's classifier; None where it is not linear.
        seed: Seed of the draws of a few examples.
    """

    labels: np.ndarray
    n_classes: int
    head: Head | None
    seed: int = 0

    @property
    def n_fitted(self) -> int:
        """Examples that a probe is fitted on, at least."""
        return min(int(fitted.sum()) for fitted in self._folds())

    def probe(self, embeddings: np.ndarray) -> np.ndarray:
        """Predictions int64 [n] of a linear probe, from embeddings [n, E] of the examples."""
        found = np.empty(len(self.labels), np.int64)
        for fitted in self._folds():
            found[~fitted] = probe_predictions(embeddings[fitted], self.labels[fitted], embeddings[~fitted])
        return found

    def tuned(self, embeddings: np.ndarray, target: int) -> tuple[np.ndarray, np.ndarray]:
        """Predictions of the model's classifier after a few steps, with examples of a class and without.

        Args:
            embeddings: [n, E], of the examples, under the removal of the class's skill.
            target: The class.

        Returns:
            int64 [draws, n] each; no draws for a classifier that is not linear, or a class without examples.
        """
        if self.head is None or not (self.labels == target).any():
            return np.empty((0, len(self.labels)), np.int64), np.empty((0, len(self.labels)), np.int64)
        relearned, without = np.empty((2, DRAWS, len(self.labels)), np.int64)
        rng = np.random.default_rng([self.seed, target])
        for fitted in self._folds():
            for draw in range(DRAWS):
                own, others = self._few(np.flatnonzero(fitted), target, rng)
                for rows, found in ((np.concatenate([own, others]), relearned), (others, without)):
                    few = embeddings[rows], self.labels[rows]
                    found[draw, ~fitted] = tuned_predictions(self.head, *few, embeddings[~fitted])
        return relearned, without

    def _folds(self) -> list[np.ndarray]:
        """Bool [n] for each fold: the examples that are not in it."""
        dealt = deal(self.labels, FOLDS)
        return [dealt != fold for fold in range(int(dealt.max()) + 1)]

    def _few(self, rows: np.ndarray, target: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A few rows of the target among the rows given, and as many of each of some other classes."""
        labels = self.labels[rows]
        others = rng.permutation(np.setdiff1d(labels, target))[: OTHERS // SHOTS]
        own, *rest = (rng.permutation(rows[labels == label])[:SHOTS] for label in (target, *others.tolist()))
        return own, np.concatenate([np.empty(0, np.int64), *rest])


def probe_predictions(fitted: np.ndarray, labels: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """Predictions of a linear probe, `linear_discriminant`.

    Args:
        fitted: [m, E], embeddings that the probe is fitted on.
        labels: int64 [m].
        embeddings: [n, E], embeddings to classify.

    Returns:
        int64 [n].
    """
    present, weights, biases = linear_discriminant(fitted, labels)
    return present[(embeddings.astype(np.float64) @ weights.T + biases).argmax(1)]


def tuned_predictions(
    head: Head, few: np.ndarray, labels: np.ndarray, embeddings: np.ndarray, steps: int = STEPS
) -> np.ndarray:
    """Predictions of a classifier after some steps on a few examples.

    Accelerated gradient descent (Nesterov) on the cross-entropy, with the largest step that is sure to go down.

    Args:
        head: Weights [K, E] and biases [K] to begin with.
        few: [m, E], embeddings to tune on.
        labels: int64 [m].
        embeddings: [n, E], embeddings to classify.
        steps: How many.

    Returns:
        int64 [n].
    """
    weights = np.concatenate([head[0], head[1][:, None]], 1).astype(np.float64)  # [K, E + 1]
    rows = np.concatenate([few, np.ones((len(few), 1))], 1).astype(np.float64)
    wanted = np.eye(len(weights))[labels]
    size = 2 * len(rows) / max(np.linalg.norm(rows, 2) ** 2, np.finfo(np.float64).tiny)  # 1 / Lipschitz constant
    ahead, momentum = weights, 1.0
    for _ in range(steps):
        gradient = (softmax(rows @ ahead.T, 1) - wanted).T @ rows / len(rows)
        before, weights = weights, ahead - size * gradient
        momentum, last = (1 + np.sqrt(1 + 4 * momentum**2)) / 2, momentum
        ahead = weights + (last - 1) / momentum * (weights - before)
    return (embeddings.astype(np.float64) @ weights[:, :-1].T + weights[:, -1]).argmax(1)


def told_apart(predictions: np.ndarray, labels: np.ndarray, target: int, dealt: np.ndarray) -> np.ndarray:
    """How much more often a class is predicted of its own examples than of any other class's.

    Recall minus the largest share of another class that is taken for it (Youden's J against the class that it is
    confused with most), 0 at least. A class that merges with another has 0, whichever of the two is predicted; recall
    alone would be anything.

    Args:
        predictions: int64 [n].
        labels: int64 [n].
        target: The class.
        dealt: int64 [n], groups of examples.

    Returns:
        float64 [1 + groups], of all examples, then without each group; NaN where the class has no examples.
    """
    n_classes, groups = max(int(labels.max()), target) + 1, int(dealt.max()) + 1
    examples, taken = np.zeros((2, groups, n_classes))
    np.add.at(examples, (dealt, labels), 1)
    np.add.at(taken, (dealt, labels), predictions == target)
    examples, taken = (np.concatenate([x.sum(0)[None], x.sum(0) - x]) for x in (examples, taken))
    with np.errstate(invalid="ignore"):
        shares = taken / examples  # [1 + groups, K]
    others = np.nan_to_num(np.delete(shares, target, 1)).max(1, initial=0)
    return np.where(np.isnan(shares[:, target]), np.nan, np.maximum(shares[:, target] - others, 0))


def share_lost(before: np.ndarray, after: np.ndarray, labels: np.ndarray, target: int) -> float:
    """How much less a class is told apart than before: 0 for as well as before, 1 for not at all.

    Of the classifier's predictions it is the readout that is lost, of refitted probes' the information; with a model
    that never saw the class as `after`, what an unlearned class could reach.

    Args:
        before: int64 [n], predictions of the intact model, or of a probe on its embeddings.
        after: int64 [n], those of another model.
        labels: int64 [n].
        target: The class.

    Returns:
        The share; NaN for a class that was not told apart before.
    """
    all_alike = np.zeros(len(labels), np.int64)
    told = [told_apart(predictions, labels, target, all_alike)[0] for predictions in (after, before)]
    return float(1 - told[0] / told[1]) if told[1] > 0 else float("nan")


def retained(predictions: np.ndarray, labels: np.ndarray, target: int) -> float:
    """Accuracy on the other classes, their mean: of predictions int64 [n] for labels int64 [n]."""
    others = np.setdiff1d(labels, target)
    return float(np.mean([(predictions[labels == label] == label).mean() for label in others]))


def information(
    readings: Readings,
    predictions: np.ndarray,
    baseline: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    never_seen: Mapping[int, OtherModel] | None = None,
) -> Information:
    """What each removal takes from the classifier's reading of its class, and what from the embeddings.

    Args:
        readings: What is read after the removal of each class's skill, K of them.
        predictions: int64 [K, n], of the model under these removals.
        baseline: int64 [n], of the intact model.
        labels: int64 [n].
        classes: Class names.
        never_seen: Models that never saw a class, by its index.

    Returns:
        Shares of what the intact model, or a probe on it, tells apart; None for a class without examples and for one
        that is not told apart in the first place.
    """
    k, n = len(classes), len(labels)
    dealt = deal(labels, GROUPS)

    def told(rows: np.ndarray) -> np.ndarray:
        """For predictions [K, draws, n] how far each row's class is told apart: [1 + groups, K], the mean of draws."""
        if not rows.shape[1]:
            return np.full((2 + int(dealt.max()), k), np.nan)
        return np.stack([np.mean([told_apart(row, labels, i, dealt) for row in rows[i]], 0) for i in range(k)], 1)

    whole = np.broadcast_to(baseline, (k, 1, n))
    intact, removed = told(whole), told(predictions[:, None])
    probe, refitted = told(np.broadcast_to(readings.intact, (k, 1, n))), told(readings.refitted[:, None])
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = {
            "readout_lost": 1 - removed / intact,
            "information_lost": 1 - refitted / probe,
            "relearned": told(readings.relearned) / intact,
            "relearned_without": told(readings.without) / intact,
        }
    shares = {name: np.where(np.isfinite(rows), rows, np.nan) for name, rows in shares.items()}

    def recall(rows: np.ndarray, i: int) -> float | None:
        own = labels == i
        return float((rows[own] == i).mean()) if own.any() else None

    def beside(i: int, other: OtherModel) -> NeverSeen:
        lost = share_lost(readings.intact, other.probed, labels, i)
        return NeverSeen(
            information_lost=None if np.isnan(lost) else lost,
            recall=recall(other.predicted, i),
            recall_refitted=recall(other.probed, i),
            retained=retained(other.predicted, labels, i),
            retained_removed=retained(predictions[i], labels, i),
            n_train=other.n_train,
        )

    references = {i: beside(i, other) for i, other in (never_seen or {}).items()}
    means: dict[str, Any] = {}
    ends: dict[str, list[float] | None] = {}
    for name, rows in shares.items():
        defined = ~np.isnan(rows[0])
        means[name] = float(rows[0, defined].mean()) if defined.any() else None
        left_out = rows[1:, defined].mean(1) if defined.any() else rows[1:, 0]
        ends[name] = jackknife_interval(means[name], left_out, -np.inf, np.inf)
    return Information(
        **means,
        ci95=InformationIntervals(**ends),
        per_class={
            label: ClassInformation(
                **{name: None if np.isnan(rows[0, i]) else float(rows[0, i]) for name, rows in shares.items()},
                recall=recall(baseline, i),
                recall_removed=recall(predictions[i], i),
                recall_refitted=recall(readings.refitted[i], i),
                never_seen=references.get(i),
            )
            for i, label in enumerate(classes)
        },
        n_fitted=readings.n_fitted,
        shots=SHOTS,
        steps=STEPS,
    )
