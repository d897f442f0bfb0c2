"""Whether a skill is the class's own: arbitrary groups instead of classes, halves of the data, a second set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from skillfast.results.bench import ClassIdentifiability, Identifiability

if TYPE_CHECKING:
    from collections.abc import Sequence

CONTROL, OVERLAP = 0.1, 0.3
"""Most that a control may lose, and least that the sets of two halves or seeds must share; else a class is flagged."""


def drops(right: np.ndarray, removed: np.ndarray, assigned: np.ndarray, n_groups: int) -> np.ndarray:
    """Accuracy that each group of examples loses.

    Args:
        right: bool [n], right by the intact model.
        removed: bool [n], right under the removal that is assigned to the example.
        assigned: int64 [n], the removal.
        n_groups: How many removals there are.

    Returns:
        float64 [n_groups]; NaN for one that no example is assigned to.
    """
    change = np.bincount(assigned, right.astype(np.float64) - removed, minlength=n_groups)
    with np.errstate(invalid="ignore"):
        return change / np.bincount(assigned, minlength=n_groups)


def identifiability(
    drop: np.ndarray,
    control: np.ndarray,
    overlap: np.ndarray,
    chance: np.ndarray,
    second_drop: np.ndarray,
    classes: Sequence[str],
    *,
    seeds: tuple[np.ndarray, np.ndarray] | None = None,
    share: float,
    groups: int,
    n_examples: int,
) -> Identifiability:
    """Put together what each class's skill is beside its controls.

    Args:
        drop: float64 [K], accuracy that a class loses by the set that is chosen for it, beyond what others lose.
        control: float64 [K], the same of arbitrary groups of as many examples, the mean of some of them.
        overlap: float64 [K], Jaccard index of the sets chosen on two halves of the class's examples.
        chance: float64 [K], Jaccard index that random sets of these sizes per site have on average.
        second_drop: float64 [K], accuracy that a class loses by a second set as large as its skill, disjoint from it.
        classes: Class names.
        seeds: float64 [K] each, Jaccard index of masks learned from two seeds, and what random sets have; NaN for a
            class whose mask is learned once. None where no masks are.
        share: Size of the chosen sets, as a share of all neurons.
        groups: Arbitrary groups for each class.
        n_examples: Examples that they are chosen on.

    Returns:
        The object; NaN is None, and a class is flagged whose control is above the limit or one of whose overlaps is
        below.
    """
    seed, seed_chance = seeds or np.full((2, len(classes)), np.nan)
    columns = {
        "drop": drop,
        "control": control,
        "overlap": overlap,
        "chance_overlap": chance,
        "second_drop": second_drop,
        "seed_overlap": seed,
        "chance_seed_overlap": seed_chance,
    }
    means = {name: float(np.nanmean(row)) if (~np.isnan(row)).any() else None for name, row in columns.items()}
    return Identifiability(
        **means,
        per_class={
            label: ClassIdentifiability(
                **{name: None if np.isnan(row[i]) else float(row[i]) for name, row in columns.items()},
                flagged=bool(control[i] > CONTROL or overlap[i] < OVERLAP or seed[i] < OVERLAP),
            )
            for i, label in enumerate(classes)
        },
        method="attribution",
        share=share,
        groups=groups,
        n_examples=n_examples,
        control_limit=CONTROL,
        overlap_limit=OVERLAP,
    )
