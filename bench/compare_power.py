"""How often `compare` finds a class that lost accuracy, and how often it finds anything in equal models.

python bench/compare_power.py --json FILE

Decisions of two models are drawn: ten classes with 100 examples each, of which a share turns from right to wrong by
chance and as many back; in one model a class loses 10 points more. Found: any verdict but unchanged and undecided. Its
gate is of that class alone, which may lose nothing (`max_weakening = 0`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from compared import judged, planted  # the decisions that the tests draw

from skillfast.evaluation.comparison import GRAVEST, ClassPair
from skillfast.evaluation.gate import Quantities, decide
from skillfast.evaluation.paired import LEVEL

FLIPS = (0.0, 0.005, 0.01, 0.02)  # share of the examples, each way


def power(seeds: int, flips: float, loss: float) -> dict[str, Any]:
    """Pairs in which the class is found: by tests of all, of it alone, by its gate; and in which another one is."""
    of_all, alone, failed, others = 0, 0, 0, 0
    for seed in range(seeds):
        labels, base, new = planted(np.random.default_rng(seed), accuracy=0.93, flips=flips, loss=loss)
        found = [bool({*GRAVEST} & {*names}) for names in judged(labels, base, new)[0]]
        of_all += found[0]
        others += any(found[1:])
        alone += ClassPair(base, new, 0, labels == 0).accuracy.p <= LEVEL
        asked = Quantities(base, new, labels, np.flatnonzero(labels == 0), None, None)
        failed += decide([("0", "max_weakening", 0.0)], {"0": asked}).decision == "regression"
    return {
        "flips each way": flips, "found": of_all, "tested alone": alone, "fails its gate": failed,
        "another class found": others,
    }  # fmt: skip


def main() -> None:
    """Parse the options, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = {
        "pairs": given.pairs,
        "a class loses 10 points": [power(given.pairs, flips, 0.1) for flips in FLIPS],
        "equal models": [power(given.pairs, flips, 0.0) for flips in (0.02, 0.06)],
    }
    text = json.dumps(found, indent=2)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
