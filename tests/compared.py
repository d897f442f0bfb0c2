"""Decisions of two models as simulations plant them, for the tests of comparisons."""

from __future__ import annotations

import numpy as np

from skillfast.evaluation.comparison import CHANGES, ClassPair, Measured, changes_of, verdicts


def wrong(labels, classes):
    return (labels + 1) % classes


def planted(rng, classes=10, n=100, accuracy=0.95, flips=0.0, loss=0.0, drop=0.85):
    """Labels, and BASE and NEW as decisions: of the same accuracy, but for class 0, of which NEW loses some.

    Args:
        rng: Draws.
        classes: How many.
        n: Examples of each.
        accuracy: Of both models.
        flips: Share of examples that turn from right to wrong by chance, and as many back.
        loss: Share of class 0's examples that NEW loses.
        drop: Share of a class's right decisions that its own removal takes.
    """
    labels = np.arange(classes).repeat(n)
    base = np.where(rng.random(len(labels)) < accuracy, labels, wrong(labels, classes))
    chance = rng.random(len(labels))
    right = base == labels
    turned = chance < np.where(right, flips / accuracy, flips / (1 - accuracy))
    new = np.where(turned, np.where(right, wrong(labels, classes), labels), base)
    new = np.where((labels == 0) & (rng.random(len(labels)) < loss / accuracy), 1, new)

    def removed(decided):
        rows = np.tile(decided, (classes, 1))
        for label in range(classes):
            goes = (labels == label) & (decided == labels) & (rng.random(len(labels)) < drop)
            rows[label, goes] = wrong(label, classes)
            harmed = (labels != label) & (rng.random(len(labels)) < 0.003)
            rows[label, harmed] = wrong(labels[harmed], classes)
        return rows

    return labels, Measured(base, removed(base), None), Measured(new, removed(new), None)


def judged(labels, base, new, overlaps=None, merged=(), margin=0.05):
    """The verdicts of every class, and the changes by name."""
    classes = len(base.removed)
    pairs = [ClassPair(base, new, label, labels == label) for label in range(classes)]
    changes = {name: changes_of(pairs, name, margin if name == "accuracy" else 2 * margin) for name in CHANGES}
    return [
        verdicts(
            pair,
            {name: rows[i] for name, rows in changes.items()},
            None if overlaps is None else overlaps[i],
            i in merged,
        )
        for i, pair in enumerate(pairs)
    ], changes
