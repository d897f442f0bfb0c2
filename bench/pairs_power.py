"""How often competition and linkage are found on real margins: random draws stand for skills, and shifts are planted.

`python bench/pairs_power.py --json FILE` removes random neurons from the default digits model, as many per site as
skills by attribution take. One draw of each class stands for its skill, four others are the random draws it is compared
with. For every pair of classes both directions get a shift of all margins that makes the class's accuracy 4 points
higher (competition) or lower (linkage) than the intact model's; a class without room for it has none, as most of the
default's (`--epochs` trains one that leaves more). What is counted is how often the planted pair is found, the share of
other pairs among those that are found, and how often anything is found where nothing is planted.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

import skillfast
from skillfast.data import load_digits, loader
from skillfast.evaluation.interference import Effects, Margins, find_pairs
from skillfast.evaluation.selectivity import oracle_predictions
from skillfast.models.digits import digits_model, load_or_train_digits, train_digits
from skillfast.models.sites import choose_sites
from skillfast.runs.removals import control_conditions

DRAWS, COMPARED, STAND = 8, 4, 4  # draws in all, compared with, and that stand for skills
KINDS = {"competition": 0.04, "linkage": -0.04}


def measured(seed: int, epochs: int | None) -> tuple[np.ndarray, skillfast.SweepResult]:
    """Margins float32 [draws, K, n] without random neurons, and the sweep that has the rest."""
    splits, model = load_digits(seed), digits_model(seed).model
    if epochs is None:
        model = load_or_train_digits(splits, seed, quiet=True)[0].model
    else:
        train_digits(model, splits, seed, epochs=epochs, quiet=True)
    classes = splits.classes
    ranking = skillfast.attribute(model, loader(splits.select, 256), classes=classes)
    skills = list(skillfast.select(ranking).values())
    rows = control_conditions(skills, choose_sites(model, None), DRAWS, 0.0, seed)
    conditions = [condition for row in rows for condition in row]
    swept = skillfast.sweep(model, loader(splits.test, 256), conditions, classes=classes, keep_margins=True)
    margins = swept.margins_of(condition.name for condition in conditions)
    return margins.reshape(DRAWS, len(classes), -1), swept


def worth(margins: np.ndarray, points: float) -> float | None:
    """The smallest shift of margins [n] that changes the share above 0 by so much; None where there is no room."""
    wanted = round(((margins > 0).mean() + points) * len(margins))
    return None if not 0 < wanted <= len(margins) else 1e-3 - float(np.sort(margins)[len(margins) - wanted])


def run(draws: np.ndarray, swept: skillfast.SweepResult, per_class: int | None, seed: int) -> dict:
    """Shares of planted pairs that are found, of false ones among the found, and of nulls with any.

    Args:
        draws: Margins float32 [draws, K, n].
        swept: The rest, of `measured`.
        per_class: Examples of each class, drawn with replacement; None for those that there are.
        seed: Of the choice of examples and of draws.
    """
    labels, logits, top2, k = swept.labels, swept.baseline_logits, swept.top2, len(swept.classes)
    rng = np.random.default_rng(seed)
    if per_class is not None:
        rows = np.concatenate([rng.choice(np.flatnonzero(labels == c), per_class) for c in range(k)])
        draws, labels, logits, top2 = draws[..., rows], labels[rows], logits[rows], top2[rows]
    base = Margins.of(draws[0], draws[1:], logits, labels)
    oracle, names = oracle_predictions(top2, k), [str(c) for c in range(k)]

    def found(removed: np.ndarray, random: np.ndarray) -> set[tuple[str, str, str]]:
        margins = Margins(removed, random, base.oracle, base.intact)
        predictions, intact = (np.where(of > 0, labels, (labels + 1) % k) for of in (removed, base.intact))
        pairs = find_pairs(Effects.of(predictions, oracle, intact, labels, margins), names)
        return {(kind, *pair.classes) for kind in KINDS for pair in pairs[kind] if pair.significant}

    hits: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    false, nulls = [], []
    for stands in range(STAND):
        others = rng.permutation(np.delete(np.arange(DRAWS), stands))[:COMPARED]
        random = draws[others]
        nulls.append(len(found(draws[stands], random)) > 0)
        for (kind, points), (a, b) in ((kind, pair) for kind in KINDS.items() for pair in combinations(range(k), 2)):
            removed = draws[stands].copy()
            shifts = [worth(base.intact[labels == j], points) for j in (b, a)]
            if None in shifts:
                continue
            for i, j, shift in zip((a, b), (b, a), shifts, strict=True):
                own = labels == j
                # what this draw does beyond the average one stays, so that it is a skill like any other
                removed[i, own] += shift - (draws[:, :, own].mean() - base.intact[own].mean())
            seen, planted = found(removed, random), (kind, names[a], names[b])
            hits[kind].append(planted in seen)
            false.append(len(seen - {planted}) / max(1, len(seen)))
    return {
        "accuracy": float(swept.baseline.mean()),
        "examples_per_class": per_class or float(np.bincount(labels).mean()),
        "power": {kind: float(np.mean(rows)) if rows else None for kind, rows in hits.items()},
        "planted": {kind: len(rows) for kind, rows in hits.items()},
        "false_discoveries": float(np.mean(false)),
        "nulls_with_any": float(np.mean(nulls)),
    }


def main() -> None:
    """Parse the options, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="train a model anew in so many passes; the default's are 25")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(given.seed, given.epochs)
    text = json.dumps([run(*found, per_class, given.seed) for per_class in (None, 100)], indent=2)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
