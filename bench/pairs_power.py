"""How often competition and linkage are found on real margins: random draws stand for skills, and shifts are planted.

`python bench/pairs_power.py --json FILE` removes random neurons from the default digits model, as many per site as
skills by attribution take. One draw of each class stands for its skill, four others are the random draws it is compared
with. For every pair of classes the margins under both removals get a shift, so that their mean lies above that of the
intact model and of the random draws (competition), or below both (linkage), by what is worth 4 points of the class's
accuracy; a class without room to gain them has none, as most of the default's (`--epochs` trains one that leaves more).

What is counted: how often the planted pair is found (`power`); the same of those pairs of which the run itself says
that it finds as large an effect in 80 % of the cases (`power_of_visible`); the share of other pairs among those that
are found; and how often anything is found where nothing is planted.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import norm

import skillfast
from skillfast.data import load_digits, loader
from skillfast.evaluation.interference import Effects, Margins, find_pairs
from skillfast.evaluation.selectivity import oracle_predictions
from skillfast.models.digits import digits_model, load_or_train_digits, train_digits
from skillfast.models.sites import choose_sites
from skillfast.runs.removals import control_conditions

if TYPE_CHECKING:
    from collections.abc import Iterable

DRAWS, COMPARED, STAND = 8, 4, 4  # draws in all, compared with, and that stand for skills
PER_CLASS = (None, 100, 400)  # examples, None for those that there are
KINDS = {"competition": 0.04, "linkage": -0.04}


def measured(seed: int, epochs: int) -> tuple[np.ndarray, skillfast.SweepResult]:
    """Margins float32 [draws, K, n] without random neurons, and the sweep that has the rest."""
    splits, model = load_digits(seed), digits_model(seed).model
    if epochs == 0:
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
    """The shift of margins [n] that changes the share above 0 by so much; None where there is no room.

    The margins are smoothed by a normal kernel: the next image's own margin would be the shift by chance.
    """
    width = 1.06 * margins.std() * len(margins) ** -0.2

    def right(shift: float) -> float:
        return float(norm.cdf((margins + shift) / width).mean())

    wanted, most = right(0) + points, 100 * float(np.abs(margins).max())
    return float(brentq(lambda shift: right(shift) - wanted, -most, most)) if 0 < wanted < 0.999 else None


def run(draws: np.ndarray, swept: skillfast.SweepResult, per_class: int | None, seed: int) -> dict:
    """Shares of planted pairs that are found, of false ones among the found, and of nulls with any.

    Args:
        draws: Margins float32 [draws, K, n].
        swept: The rest, of `measured`.
        per_class: Examples of each class, drawn with replacement; None for those that there are.
        seed: Of the choice of examples and of draws.
    """
    labels, k = swept.labels, len(swept.classes)
    rng = np.random.default_rng(seed)
    base = Margins.of(draws[0], draws[1:], swept.baseline_logits, labels)
    oracle, names = oracle_predictions(swept.top2, k), [str(c) for c in range(k)]
    rows = np.arange(len(labels))
    if per_class is not None:
        rows = np.concatenate([rng.choice(np.flatnonzero(labels == c), per_class) for c in range(k)])

    def means(margins: np.ndarray) -> np.ndarray:  # [..., n] -> [..., K], shifts of each class's mean
        return np.stack([(margins - base.intact)[..., labels == c].mean(-1) for c in range(k)], -1)

    def effects(removed: np.ndarray, random: np.ndarray) -> Effects:
        margins = Margins(removed[:, rows], random[..., rows], base.oracle[:, rows], base.intact[rows])
        own = labels[rows]
        predictions, intact = (np.where(of > 0, own, (own + 1) % k) for of in (margins.removed, margins.intact))
        return Effects.of(predictions, oracle[:, rows], intact, own, margins)

    def found(removed: np.ndarray, random: np.ndarray) -> set[tuple[str, str, str]]:
        pairs = find_pairs(effects(removed, random), names)
        return {(kind, *pair.classes) for kind in KINDS for pair in pairs[kind] if pair.significant}

    shifts: dict[str, list[float | None]] = {}  # of the mean margin against the intact model, for each class
    for kind, points in KINDS.items():
        sign = np.sign(points)
        beside = [sign * max(0.0, sign * by) for by in means(draws).mean((0, 1))]
        added = [worth(base.intact[labels == j] + by, points) for j, by in enumerate(beside)]
        shifts[kind] = [None if more is None else by + more for by, more in zip(beside, added, strict=True)]
    hits: dict[str, list[tuple[bool, bool]]] = {kind: [] for kind in KINDS}  # said to be visible, and found
    of_pairs: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    false, nulls = [], []
    for stands in range(STAND):
        others = rng.permutation(np.delete(np.arange(DRAWS), stands))[:COMPARED]
        random, drawn, own = draws[others], means(draws[others]).mean(0), means(draws[stands])
        nulls.append(len(found(draws[stands], random)) > 0)
        seen = effects(draws[stands], random)
        for kind, (a, b) in ((kind, pair) for kind in KINDS for pair in combinations(range(k), 2)):
            if shifts[kind][a] is None or shifts[kind][b] is None:
                continue
            sign, least = (1, seen.visible_gain[0]) if kind == "competition" else (-1, seen.visible_loss[0])
            removed, visible = draws[stands].copy(), True
            for i, j in ((a, b), (b, a)):
                removed[i, labels == j] += shifts[kind][j] - own[i, j]
                visible &= bool(sign * (shifts[kind][j] - drawn[i, j]) >= least[i, j])
            pairs, planted = found(removed, random), (kind, names[a], names[b])
            hits[kind].append((visible, planted in pairs))
            of_pairs[kind].setdefault(f"{a} {b}", 0)
            of_pairs[kind][f"{a} {b}"] += planted in pairs
            false.append(len(pairs - {planted}) / max(1, len(pairs)))
    return {
        "accuracy": float(swept.baseline.mean()),
        "examples_per_class": per_class or float(np.bincount(labels).mean()),
        "shift_of_draws": {
            "mean": means(draws).mean((0, 1)).tolist(),
            "deviation": means(draws).std((0, 1), ddof=1).tolist(),
        },
        "planted_shift": shifts,
        "planted": {kind: len(all_) for kind, all_ in hits.items()},
        "power": {kind: _share(found for _, found in all_) for kind, all_ in hits.items()},
        "visible": {kind: sum(visible for visible, _ in all_) for kind, all_ in hits.items()},
        "power_of_visible": {kind: _share(found for seen, found in all_ if seen) for kind, all_ in hits.items()},
        "found_of_pairs": {kind: {"of": STAND, **found} for kind, found in of_pairs.items()},
        "false_discoveries": float(np.mean(false)),
        "nulls_with_any": float(np.mean(nulls)),
    }


def _share(found: Iterable[bool]) -> float | None:
    each = list(found)
    return float(np.mean(each)) if each else None


def main() -> None:
    """Parse the options, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--epochs",
        type=int,
        nargs="+",
        default=[0],
        help="train a model in so many passes each; 0 is the default model",
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for epochs in given.epochs:
        found = measured(given.seed, epochs)
        for per_class in PER_CLASS:
            rows.append({"epochs": epochs or "default", **run(*found, per_class, given.seed)})
            print(json.dumps(rows[-1]), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
