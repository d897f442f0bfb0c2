"""Which neurons of a pretrained decoder follow whether its sum is right: chains of additions, asked by examples.

`python examples/reproduce/sums.py` asks Gemma 3 270M (`pip install 'skillfast[llm,pretrained]'`) for sums of two to
five digits after five worked ones; `--quick` takes few chains. What it finds goes to `--json`, `--table FILE` prints
such a file as README.md beside this script has it.

Half of all chains of a sum are for choosing, the others are looked at once. Neurons are ranked by |r| with each metric;
of correctness, confidence and loss r is given the sum, too, which alone tells much of how well a chain goes. Those that
follow correctness best are removed, beside as many others of the same sites at random.
"""

from __future__ import annotations

import csv
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from figures import GEMMA, decoder_options, run
from layers import beside_random, best

import skillfast
from skillfast import BenchConfig, NeuronRanking
from skillfast.evaluation.correlations import top_correlations
from skillfast.markdown import table as markdown_table
from skillfast.runs.session import open_session

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

SUMS = tuple(map(str, range(3, 10)))
PROMPT = "2+1=3\n1+4+3=8\n3+3=6\n2+1+1+1=5\n4+3+2=9\n{text}="
WORKED = {"2+1", "1+4+3", "3+3", "2+1+1+1", "4+3+2"}
METRICS = ("label", "correct", "confidence", "loss")


@dataclass(frozen=True)
class Sizes:
    """How many examples and draws.

    Attributes:
        train: Chains per sum to choose on.
        test: Chains per sum that are looked at once.
        draws: Random sets of as many neurons.
        shares: Sizes of the sets that are removed, as shares of all neurons.
    """

    train: int = 30
    test: int = 30
    draws: int = 3
    shares: tuple[float, ...] = (0.001, 0.01)


QUICK = Sizes(train=10, test=6, draws=2, shares=(0.01,))


def chains(seed: int = 0) -> dict[str, list[str]]:
    """Sum -> chains of two to five digits that have it, in a random order; those of the prompt left out."""
    found: dict[str, list[str]] = {each: [] for each in SUMS}
    for length in range(2, 6):
        for digits in product(range(10), repeat=length):
            text = "+".join(map(str, digits))
            if (total := str(sum(digits))) in found and text not in WORKED:
                found[total].append(text)
    rng = np.random.default_rng(seed)
    return {total: [texts[i] for i in rng.permutation(len(texts))] for total, texts in found.items()}


def write(path: Path, drawn: dict[str, list[str]]) -> None:
    """A file of texts and their sums."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([text, total] for total, texts in drawn.items() for text in texts)


def following(scores: skillfast.NeuronScores, share: float) -> skillfast.Skill:
    """The neurons that follow correctness best."""
    value = np.abs(scores.statistic("pearson")[:, scores.columns.index("correct")])
    ranking = NeuronRanking(
        method="pearson", columns=("correct",), values=value[:, None], sites=scores.sites,
        n_observations=np.array([scores.n_observations]), fingerprint=scores.fingerprint,
    )  # fmt: skip
    return best(ranking, share, f"correct, {share:.1%}")


def reproduce(sizes: Sizes, say: Callable[[str], None] = print, **more: Any) -> dict[str, Any]:
    """Measure; further settings are those of `BenchConfig.of`."""
    drawn = chains()
    with tempfile.TemporaryDirectory() as made:
        write(Path(made) / "train.csv", {total: texts[::2] for total, texts in drawn.items()})
        write(Path(made) / "test.csv", {total: texts[1::2] for total, texts in drawn.items()})
        settings: dict[str, Any] = {
            "model": GEMMA, "dataset": "text", "data_file": f"{made}/train.csv", "test_file": f"{made}/test.csv",
            "class_names": SUMS, "label_words": SUMS, "prompt": PROMPT, "metrics": METRICS, "statistics": ("pearson",),
            "pool": "last", "train_per_class": sizes.train, "test_per_class": sizes.test, "dtype": "bfloat16",
            "batch_size": 32, **more,
        }  # fmt: skip
        with open_session(BenchConfig.of(**settings), say=say) as session:
            chosen, held_out = session.trace("select"), session.trace("test")
            plain = top_correlations(chosen, held_out)
            given = top_correlations(chosen.given("label"), held_out.given("label"))
            skills = [following(chosen, share) for share in sizes.shares]
            subject = session.subject
            overall = beside_random(
                subject.model, subject.loader("test"), skills, chosen.sites, sizes.draws, classes=SUMS
            )
    return {
        "model": settings["model"],
        "sizes": asdict(sizes),
        "neurons": chosen.n_neurons,
        "accuracy": overall["accuracy"],
        "n_test": overall["n_test"],
        "chance": plain.chance,
        "top_r": {name: {"select": one.select, "test": one.test} for name, one in plain.metrics.items()},
        "top_r_given_sum": {name: {"select": one.select, "test": one.test} for name, one in given.metrics.items()},
        "removals": msgspec.to_builtins(overall["removals"]),
    }


def table(found: dict[str, Any]) -> str:
    """Figures as tables in Markdown."""

    def of(values: dict[str, float | None] | None) -> str:
        if values is None or values["test"] is None:  # the sum itself, or a metric that is always the same
            return ""
        return f"{values['test']:.2f} ({values['select']:.2f})"

    def removal(one: dict[str, Any]) -> list[str]:
        low, high = one["ci95"]
        drawn = [100 * value for value in one["random_changes"]]
        return [
            f"{one['neurons']} ({one['share']:.2%})",
            f"{100 * one['change']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
            f"{np.mean(drawn):+.1f} ({min(drawn):+.1f} to {max(drawn):+.1f})",
        ]

    rows = [[name, of(values), of(found["top_r_given_sum"].get(name))] for name, values in found["top_r"].items()]
    right, chance = 100 * found["accuracy"], found["chance"]
    return "\n\n".join(
        [
            f"{found['n_test']} sums, {right:.1f} % right; neurons that follow nothing: {chance:.2f}.",
            markdown_table(["ten best neurons, mean size of r with", "held out (where chosen)", "given the sum"], rows),
            markdown_table(["removed", "accuracy, points", "at random, points"], list(map(removal, found["removals"]))),
        ]
    )


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for."""
    words = tuple(given.label_words.split(","))
    return reproduce(QUICK if given.quick else Sizes(), model=given.model, dtype=given.dtype, label_words=words)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write, or print tables."""
    run(decoder_options(__doc__, SUMS), measure, table, arguments)


if __name__ == "__main__":
    main()
