"""The paper's table beside what was measured here, from the files in `results/`.

`python examples/reproduce/summary.py` prints it as docs/reproduction.md has it, `--minutes` how long each script took.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillfast.markdown import table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

RESULTS = Path(__file__).parent / "results"
NONE = ""


def found(name: str) -> dict[str, Any]:
    """The figures of a script."""
    kept: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return kept


def ends(values: Iterable[float], form: str) -> str:
    """The smallest and the largest."""
    every = sorted(values)
    return f"{every[0]:{form}} to {every[-1]:{form}}"


def points(values: Iterable[float]) -> str:
    """The smallest and the largest change, in points."""
    return ends((100 * value for value in values), "+.1f")


def rows() -> list[tuple[str, str, str, str]]:
    """What was measured, the published figure, ours, and that of random neurons."""
    return [*sentiment(), *inference(), *generation(), *arithmetic()]


def sentiment() -> list[tuple[str, str, str, str]]:
    """SST-2 on Gemma 3 270M, asked by words and with a tuned prompt."""
    told = found("sentiment")
    published, made = told["published_second_hand"], []
    for way in told["found"]:
        name, (low, high) = f"sentiment, {way['way']}", (100 * end for end in way["ci95"])
        change = f"{100 * way['accuracy_change']:+.1f} ({low:+.1f} to {high:+.1f}), {way['share']:.2%} of the neurons"
        made += [
            (f"{name}: r with the label", f"{published['top_r']:.2f}", f"{way['top_r']['label']['test']:.2f}", NONE),
            (
                f"{name}: accuracy without them, points",
                f"{100 * published['accuracy_change']:+.0f}",
                change,
                points(way["random_changes"]),
            ),
        ]
    return made


def inference() -> list[tuple[str, str, str, str]]:
    """Pairs after HANS on small decoders."""
    told = found("inference")
    published, models = told["published_second_hand"], told["models"]
    heuristic = [model["without"]["shortcut"] for model in models]
    r = [model["confidence_r"]["plain"] for model in models]
    given = [model["confidence_r"]["given label"] for model in models]
    return [
        (
            "inference: r with confidence",
            f"{published['top_r']:.2f}",
            f"{ends(r, '.2f')}; given the label {ends(given, '.2f')}",
            NONE,
        ),
        (
            "inference: F1 without them, points",
            f"{100 * published['f1_change']:+.0f} %",
            points(model["f1"]["change"] for model in models),
            points(end for model in models for end in model["f1"]["random"][1:]),
        ),
        (
            "inference: right answers on conflicts without the overlap's neurons, points",
            NONE,
            points(removal["change"]["right_answers"] for removal in heuristic),
            points(end for removal in heuristic for end in removal["random"]["right_answers"][1:]),
        ),
    ]


def generation() -> list[tuple[str, str, str, str]]:
    """Next tokens of SST-2's sentences on Gemma 3 270M."""
    told = found("generation")
    removed = next(outcome for outcome in told["outcomes"] if outcome["scale"] == 0)
    drawn = removed["random"]["values"]["perplexity"]
    r = told["top_r"]["test"], told["top_r_given"]["test"]
    published = f"{told['published_second_hand']['top_r']:.2f}"
    intact = told["intact"]["values"]["perplexity"]
    return [
        (
            "generation: r with the next token's log-probability",
            published,
            f"{r[0]:.2f}; given its frequency and the place {r[1]:.2f}",
            NONE,
        ),
        (
            f"generation: perplexity without {told['neurons']} neurons, {intact:.0f} with them",
            NONE,
            f"{removed['values']['perplexity']:.0f}",
            f"{drawn['low']:.0f} to {drawn['high']:.0f}",
        ),
    ]


def arithmetic() -> list[tuple[str, str, str, str]]:
    """A leak planted in small adders."""
    planted = found("arithmetic")["planted"]
    change = {name: points(row["change"][name] for row in planted) for name in ("shortcut", "right", "clean")}
    drawn = {name: points(end for row in planted for end in row["random"][name][1:]) for name in change}
    areas = ends((row["auroc"]["attribution"] for row in planted), ".2f")
    of = "of conflicts without the set found, points"
    return [
        ("arithmetic: AUROC of the 16 planted neurons", NONE, areas, NONE),
        (f"arithmetic: shortcut answers {of}", NONE, change["shortcut"], drawn["shortcut"]),
        (f"arithmetic: right answers {of}", NONE, change["right"], drawn["right"]),
        ("arithmetic: right answers without a cue, points", NONE, change["clean"], drawn["clean"]),
    ]


def summary() -> str:
    """The table in Markdown."""
    return table(["ten best neurons, or what is left without a skill", "published", "here", "random neurons"], rows())


def minutes() -> str:
    """Minutes of processor time of each script, in Markdown; of two without loading the model and tuning a prompt."""
    spent = {name: found(name)["cpu_minutes"] for name in ("inference", "arithmetic")}
    of_gemma = {
        "sentiment": sum(way["seconds"] for way in found("sentiment")["found"]),
        "generation": found("generation")["seconds"],
    }
    every = {name: seconds / 60 for name, seconds in of_gemma.items()} | spent
    return table(
        ["command", "minutes of one processor"],
        [(f"`python examples/reproduce/{name}.py`", f"{spent:.1f}") for name, spent in every.items()],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", action="store_true", help="how long each script took, instead")
    print(minutes() if parser.parse_args(arguments).minutes else summary())


if __name__ == "__main__":
    main()
