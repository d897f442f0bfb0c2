"""A model compared with itself, its masks learned from other seeds: how often `compare` finds anything.

OMP_NUM_THREADS=1 python bench/compare_seeds.py --json FILE

Nothing has changed but the choice of neurons, so every finding is a false one. Of each default model, one per seed of
training, skills are chosen as `bench` does, with masks of several seeds, and each pair of them is compared as two runs
are: with BASE's skills removed from NEW, as `bench --like` does, and without, where a drop has to change by more than
another choice of neurons alone makes (`CHOICE`), and a skill moved where it shares no more neurons than chance gives.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from itertools import combinations
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import skillfast
from skillfast.evaluation.comparison import CHANGES, MARGIN, ClassPair, Measured, changes_of, overlap_of, verdicts
from skillfast.evaluation.paired import LEVEL
from skillfast.models.digits import digits_model
from skillfast.models.sites import find_sites
from skillfast.runs.bench import choose_skills
from skillfast.runs.config import BenchConfig
from skillfast.runs.session import open_session

if TYPE_CHECKING:
    from collections.abc import Iterator

THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)  # of what another choice may take less


def measured(seed: int, masks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, skillfast.Skill]]]:
    """One model: labels [n], intact decisions [n], decisions [masks, K, n] without each skill, and the skills."""
    with open_session(BenchConfig.of(seed=seed)) as session:
        subject, sets = session.subject, []
        scores = session.trace("select")
        for k in range(masks):  # the same model and data, chosen as `bench` does
            other = replace(subject, config=subject.config.replaced(seed=seed + 100 * k))
            sets.append(choose_skills(replace(session, subject=other), scores)[0].removed)
        conditions = [
            skillfast.Condition(skill, name=f"{k} {name}")
            for k, skills in enumerate(sets)
            for name, skill in skills.items()
        ]
        swept = skillfast.sweep(
            subject.model, subject.loader("test"), conditions, classes=subject.splits.classes, keep_predictions=True
        )
    removed = swept.predictions.reshape(masks, len(subject.splits.classes), -1)
    return swept.labels, swept.top2[:, 0], removed, sets


def compared(
    labels: np.ndarray, intact: np.ndarray, removed: np.ndarray, sets: list[dict[str, skillfast.Skill]]
) -> Iterator[dict[str, Any]]:
    """Of each pair of masks and each class what is found: verdicts, the change of the drop, and the overlap."""
    widths = {site.name: site.width for site in find_sites(digits_model().model)}
    for a, b in combinations(range(len(sets)), 2):
        base, like = Measured(intact, removed[a], removed[b]), Measured(intact, removed[b], removed[a])
        found = {"like": (base, like), "alone": (base, replace(like, other=None))}
        pairs = {
            way: [ClassPair(*sides, label, labels == label) for label in range(len(sets[a]))]
            for way, sides in found.items()
        }
        changes = {
            way: {name: changes_of(of, name, MARGIN if name == "accuracy" else 2 * MARGIN) for name in CHANGES}
            for way, of in pairs.items()
        }
        for label, name in enumerate(sets[a]):
            overlap = overlap_of(_neurons(sets[a][name]), _neurons(sets[b][name]), widths)
            drop = changes["alone"]["drop"][label]
            assert drop is not None
            shown = max(drop.ci95[0], -drop.ci95[1]) if drop.q <= LEVEL else 0.0
            yield {
                "verdicts": {
                    way: verdicts(of[label], {key: rows[label] for key, rows in changes[way].items()}, overlap, False)
                    for way, of in pairs.items()
                },
                "change": drop.change,
                "shown": shown,  # beyond this threshold it would be a finding
                "jaccard": overlap.jaccard,
                "by chance": overlap.p > LEVEL,
            }


def _neurons(skill: skillfast.Skill) -> dict[str, set[int]]:
    return {site: set(index.tolist()) for site, index in skill.neurons.items()}


def summed(found: list[dict[str, Any]], pairs: int) -> dict[str, Any]:
    """Counts of false findings, over all pairs and classes."""
    changes = np.abs([each["change"] for each in found])
    return {
        "pairs": pairs,
        "classes compared": len(found),
        "verdicts": {
            way: dict(Counter(verdict for each in found for verdict in each["verdicts"][way]))
            for way in ("like", "alone")
        },
        "weakened or strengthened alone, by threshold": {
            str(limit): sum(each["shown"] > limit for each in found) for limit in THRESHOLDS
        },
        "largest threshold with a finding": max(each["shown"] for each in found),
        "change of the drop": {"median": float(np.median(changes)), "largest": float(changes.max())},
        "neurons shared": {
            "least Jaccard index": min(each["jaccard"] for each in found),
            "no more than by chance": sum(each["by chance"] for each in found),
        },
    }


def main() -> None:
    """Parse the options, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--masks", type=int, default=3, help="of each model")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = [each for seed in range(given.models) for each in compared(*measured(seed, given.masks))]
    text = json.dumps(summed(found, given.models * comb(given.masks, 2)), indent=2)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
