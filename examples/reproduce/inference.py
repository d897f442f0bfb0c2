"""Does a model infer, or does it count words? Pairs in the manner of HANS, and a shortcut that the data invite.

`python examples/reproduce/inference.py` trains small decoders on premises and hypotheses of which overlap nearly
always tells the label, says which neurons follow the overlap and which the label, and removes them, in some minutes
on one core; `--quick` does so at a size of seconds. `--json FILE` keeps the figures, `--table FILE` prints those of
such a file as README.md beside this script has them.

**Pairs** come from templates of our own after those of HANS (McCoy et al. 2019), of 16 nouns and 14 verbs. Each of
its three heuristics has templates that it is right about and others that it is wrong about: *lexical overlap* ("the
judge was thanked by the doctor" entails "the doctor thanked the judge" and not "the judge thanked the doctor"),
*subsequence* ("the judge and the doctor slept" entails "the doctor slept", "the judge near the doctor slept" does
not), *constituent* ("because the judge slept the doctor ran" entails "the judge slept", "if ..." does not). In other
pairs the hypothesis has a word that the premise lacks: another noun, or "someone", which may be entailed.

**The heuristic** says entailed where every word of the hypothesis is in the premise. In training it is right in 97 of
100 pairs. Parts for choosing and for testing have as many pairs of each of the four kinds (overlap or not, entailed
or not), so that in half of them it is wrong. Two first nouns of a test pair are never the first two of another
part's.

**What is asked** is `skillfast.evaluate(..., shortcut="column:heuristic")`. The size of the sets is the one that
leaves most right answers on conflicts of the validation part; the test part is looked at once. Beside it stand the
neurons whose attribution pushes most towards the heuristic's wrong answers on the select part. Confidence is a metric
beside: r of the ten neurons that are best on the select part, with and without what the label explains, and F1
without its neurons.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from figures import options, run
from torch.nn import functional
from transformers import LlamaConfig, LlamaForSequenceClassification

import skillfast
from skillfast.evaluation.measures import random_draws
from skillfast.evaluation.shortcuts import ConflictMeasures
from skillfast.markdown import table as markdown_table
from skillfast.models.sites import find_sites
from skillfast.skills.skill import random_skills

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from skillfast import NeuronRanking, NeuronScores, Skill
    from skillfast.runs.evaluate import Evaluation

PUBLISHED = {"top_r": 0.64, "f1_change": -0.22}
"""Read at second hand: orientation, from another model and other data, nothing that is compared by a test."""
NOUNS = (
    "judge", "doctor", "lawyer", "artist", "actor", "baker", "author", "banker", "farmer", "pilot", "nurse", "student",
    "singer", "tailor", "writer", "soldier",
)  # fmt: skip
VERBS = ("thanked", "helped", "called", "pushed", "praised", "watched", "followed", "paid")
ACTS = ("slept", "danced", "ran", "left", "waited", "laughed")
WORDS = (
    "<pad>", "<sep>", "<end>", "the", "was", "by", "who", "and", "or", "near", "because", "if", "someone", *NOUNS,
    *VERBS, *ACTS,
)  # fmt: skip
INDEX = {word: i for i, word in enumerate(WORDS)}
LENGTH = 20  # tokens of a pair, padded on the left
CLASSES = ("not entailed", "entailed")
NAMES = {
    "shortcut": "those that follow the heuristic",
    "label": "those that follow the label",
    "attribution": "those that push to its wrong answers",
}
HEURISTICS = ("lexical overlap", "subsequence", "constituent")
# heuristic, premise, hypothesis, whether it is entailed, and whether it is with "someone" instead of its first noun
TEMPLATES = (
    (0, "the a was v by the b", "the b v the a", True, True),
    (0, "the a was v by the b", "the a v the b", False, False),
    (0, "the a who the b v i", "the b v the a", True, True),
    (0, "the a who the b v i", "the a v the b", False, False),
    (0, "the a v the b", "the b v the a", False, False),
    (1, "the a and the b i", "the b i", True, True),
    (1, "the a near the b i", "the b i", False, True),
    (1, "the a v the b and the c", "the a v the b", True, True),
    (1, "the a who v the b i", "the b i", False, True),
    (2, "because the a i the b j", "the a i", True, True),
    (2, "if the a i the b j", "the a i", False, False),
    (2, "the a i and the b j", "the b j", True, True),
    (2, "the a i or the b j", "the b j", False, False),
)


@dataclass(frozen=True)
class Settings:
    """Sizes of everything; `agreement` is how often overlap tells the label in training."""

    width: int = 64
    inner: int = 192
    layers: int = 2
    agreement: float = 0.97
    steps: int = 600
    rate: float = 2e-3
    batch: int = 64
    select: int = 3000
    tested: int = 2000
    shares: tuple[float, ...] = (0.01, 0.03, 0.1, 0.2)
    draws: int = 20
    models: int = 3


QUICK = Settings(
    width=24, inner=48, layers=1, steps=60, batch=32, select=300, tested=120, shares=(0.05, 0.2), draws=2, models=1
)  # fmt: skip


@dataclass(frozen=True)
class Pairs:
    """Pairs as the model reads them: tokens [n, LENGTH], labels [n], heuristic [n], and which of `HEURISTICS` [n]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    heuristic: torch.Tensor
    kinds: torch.Tensor

    def batches(self, size: int = 500) -> list[dict[str, torch.Tensor]]:
        """As `evaluate` takes them."""
        mask = (self.tokens != 0).long()
        return [
            {
                "input_ids": self.tokens[i],
                "attention_mask": mask[i],
                "labels": self.labels[i],
                "heuristic": self.heuristic[i],
            }
            for i in torch.arange(len(self.labels)).split(size)
        ]


class Pages:
    """Pairs drawn at random; nouns of the test part's pairs are never together elsewhere."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def draw(self, n: int, agreement: float, *, test: bool = False) -> Pairs:
        """Pairs, as many entailed as not, of which overlap tells the label in this share."""
        rows = []
        for _ in range(n):
            entailed, agrees = self.rng.random() < 0.5, self.rng.random() < agreement
            rows.append(self._pair(entailed, entailed == agrees, test=test))
        tokens = torch.zeros(n, LENGTH, dtype=torch.long)
        for row, (premise, hypothesis, *_) in zip(tokens, rows, strict=True):
            words = [*premise, "<sep>", *hypothesis, "<end>"]
            row[LENGTH - len(words) :] = torch.tensor([INDEX[word] for word in words])
        told = torch.tensor([[int(entailed), int(set(h) <= set(p)), kind] for p, h, entailed, kind in rows])
        return Pairs(tokens, *told.unbind(1))

    def _pair(self, entailed: bool, overlap: bool, *, test: bool) -> tuple[list[str], list[str], bool, int]:
        while True:
            kind, premise, hypothesis, entails, someone = TEMPLATES[self.rng.integers(len(TEMPLATES))]
            names = self._nouns(test)
            slots = dict(zip("abc", names, strict=True)) | dict(
                zip("ij", self.rng.choice(ACTS, 2, replace=False), strict=True)
            )
            slots["v"] = self.rng.choice(VERBS)
            first, second = ([slots.get(word, word) for word in text.split()] for text in (premise, hypothesis))
            if not overlap:
                if entailed or self.rng.random() < 0.5:
                    second, entails = ["someone", *second[2:]], someone
                else:
                    second[1] = next(noun for noun in self.rng.permutation(NOUNS) if noun not in first)
                    entails = False
            if entails == entailed:
                return first, second, entailed, kind

    def _nouns(self, test: bool) -> list[str]:
        """Three nouns; the first two add up to a multiple of 4 for the test part alone."""
        while True:
            chosen = self.rng.choice(len(NOUNS), 3, replace=False)
            if (int(chosen[:2].sum()) % 4 == 0) == test:
                return [NOUNS[i] for i in chosen]


def trained(settings: Settings, seed: int) -> torch.nn.Module:
    """A small decoder that reads pairs of which overlap nearly always tells the label."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=settings.width, intermediate_size=settings.inner,
        num_hidden_layers=settings.layers, num_attention_heads=4, max_position_embeddings=LENGTH, pad_token_id=0,
        id2label=dict(enumerate(CLASSES)), label2id={name: i for i, name in enumerate(CLASSES)},
    )  # fmt: skip
    model, pages = LlamaForSequenceClassification(config), Pages(seed)
    adam = torch.optim.Adam(model.parameters(), lr=settings.rate)
    slowing = torch.optim.lr_scheduler.OneCycleLR(adam, settings.rate, total_steps=settings.steps)
    model.train()
    for _ in range(settings.steps):
        pairs = pages.draw(settings.batch, settings.agreement)
        adam.zero_grad()
        logits = model(input_ids=pairs.tokens, attention_mask=(pairs.tokens != 0).long()).logits
        functional.cross_entropy(logits, pairs.labels).backward()
        adam.step()
        slowing.step()
    return model.eval()


def evaluated(
    model: torch.nn.Module, select: Pairs, validate: Pairs, test: Pairs, shares: tuple[float, ...], draws: int
) -> Evaluation:
    """Neurons of overlap, label and confidence, chosen on one part and removed on another."""
    grid = skillfast.Grid(shares=shares, layers=("all",), scales=(0.0,), draws=draws, max_site_share=1.0)
    parts = {"select": select.batches(), "validate": validate.batches(), "test": test.batches()}
    config = skillfast.BenchConfig.of(pool="last", statistics=("pearson",))
    return skillfast.evaluate(
        config, grid, model=model, loader=parts, metrics=("confidence",), shortcut="column:heuristic"
    )


def without_heuristic(pairs: Pairs) -> list[dict[str, torch.Tensor]]:
    """Batches without the column, which the model does not take."""
    return [{name: value for name, value in batch.items() if name != "heuristic"} for batch in pairs.batches()]


def confidence_r(model: torch.nn.Module, select: Pairs, test: Pairs) -> dict[str, float]:
    """Mean |r| with confidence on the test part of the ten neurons with the largest on the select part."""

    def sizes(scores: NeuronScores) -> np.ndarray:
        assert scores.pearson is not None
        return np.abs(np.nan_to_num(scores.pearson[:, scores.columns.index("confidence")]))

    parts = [
        skillfast.trace(model, without_heuristic(pairs), pool="last", statistics=("pearson",))
        for pairs in (select, test)
    ]
    found = {}
    for name, (chosen, measured) in {
        "plain": [sizes(scores) for scores in parts],
        "given label": [sizes(scores.given("label")) for scores in parts],
    }.items():
        found[name] = float(measured[chosen.argsort()[-10:]].mean())
    return found


def by_kind(model: torch.nn.Module, found: Evaluation, test: Pairs) -> dict[str, list[float]]:
    """Right answers on conflicts about each of the three heuristics, intact and without the shortcut's neurons."""
    skill = next(skill for skill in found.skills if skill.name == "follows heuristic")
    swept = skillfast.sweep(
        model, without_heuristic(test), [skillfast.Condition(skill)], classes=CLASSES, keep_predictions=True
    )
    assert swept.predictions is not None
    right = np.stack([swept.top2[:, 0], swept.predictions[0]]) == test.labels.numpy()
    conflict = (test.labels != test.heuristic).numpy()
    return {
        name: right[:, conflict & (test.kinds.numpy() == kind)].mean(1).tolist() for kind, name in enumerate(HEURISTICS)
    }


def measured(settings: Settings, seed: int) -> dict[str, Any]:
    """Train a model, choose on its parts, and look at the test part once."""
    model, pages = trained(settings, seed), Pages(1000 + seed)
    select, validate = pages.draw(settings.select, 0.5), pages.draw(settings.tested, 0.5)
    test = pages.draw(settings.tested, 0.5, test=True)
    tried = evaluated(model, select, validate, validate, settings.shares, 1).results.shortcut
    assert tried is not None
    ways = [removal for removal in tried.removals if removal.follows == "shortcut"]
    best = max(ways, key=lambda removal: removal.values["right_answers"] or 0.0)
    final = evaluated(model, select, validate, test, (best.share,), settings.draws)
    told = final.results.shortcut
    assert told is not None
    confidence = next(outcome for outcome in final.results.outcomes if outcome.skill == "confidence")
    return {
        "seed": seed,
        "neurons": final.results.model.neurons,
        "share": best.share,
        "follow": {"shortcut": told.follow_shortcut.neurons, "label": told.follow_label.neurons},
        "intact": told.intact.values,
        "without": {removal.follows: _removal(removal) for removal in told.removals}
        | {"attribution": by_attribution(model, select, validate, test, settings, seed)},
        "kinds": by_kind(model, final, test),
        "confidence_r": confidence_r(model, select, test),
        "f1": {
            "neurons": confidence.neurons,
            "intact": final.results.intact.values["f1_macro"],
            "change": confidence.change["f1_macro"],
            "ci95": confidence.change_ci95["f1_macro"],
            "random": asdict_of(confidence.random.change["f1_macro"]),
        },
    }


def pushing(model: torch.nn.Module, select: Pairs) -> NeuronRanking:
    """One column: how much each neuron adds to the heuristic's answer where that is wrong, by attribution."""
    batches = []
    for batch in select.batches():
        conflict = batch["labels"] != batch["heuristic"]
        batches.append(
            {name: batch[name][conflict] for name in ("input_ids", "attention_mask")}
            | {"labels": batch["heuristic"][conflict]}
        )
    found = skillfast.attribute(model, batches, classes=CLASSES)
    n = np.array([int(found.n_observations.sum())])
    return replace(found, columns=("attribution",), values=found.values.mean(1, keepdims=True), n_observations=n)


def removed(model: torch.nn.Module, skill: Skill, test: Pairs, draws: int, seed: int) -> dict[str, Any]:
    """What a set's removal does, beside as many random neurons."""
    drawn = random_skills(skill, find_sites(model), draws, np.random.default_rng(seed))
    conditions = [skillfast.Condition(one, name=str(i)) for i, one in enumerate([skill, *drawn])]
    swept = skillfast.sweep(model, without_heuristic(test), conditions, classes=CLASSES, keep_predictions=True)
    assert swept.predictions is not None
    measures = ConflictMeasures(swept.top2[:, 0], swept.labels, test.heuristic.numpy())
    own, *others = (measures.measure(row) for row in swept.predictions)
    spread = random_draws(others).change
    return {
        "neurons": len(skill),
        "change": own.change,
        "ci95": own.change_ci95,
        "p": measures.p(swept.predictions[0]),
        "random": {name: asdict_of(spread[name]) for name in own.change},
    }


def by_attribution(
    model: torch.nn.Module, select: Pairs, validate: Pairs, test: Pairs, settings: Settings, seed: int
) -> dict[str, Any]:
    """The same for neurons that push towards the heuristic's wrong answers, at the size that is best on validation."""
    ranking = pushing(model, select)
    sets = [skillfast.select(ranking, share=share, max_site_share=1.0)["attribution"] for share in settings.shares]
    gains = [removed(model, skill, validate, 1, seed)["change"]["right_answers"] for skill in sets]
    return removed(model, sets[int(np.argmax(gains))], test, settings.draws, seed)


def _removal(removal: Any) -> dict[str, Any]:
    return {
        "neurons": removal.neurons,
        "change": removal.change,
        "ci95": removal.change_ci95,
        "p": removal.p,
        "random": {name: asdict_of(spread) for name, spread in removal.random.change.items()},
    }


def asdict_of(spread: Any) -> list[float | None]:
    """Mean, smallest and largest of random draws."""
    return [spread.mean, spread.low, spread.high]


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    text = f"model {row['seed']}: right on conflicts {100 * row['intact']['right_answers']:.1f}"
    for name, removal in row["without"].items():
        text += f", without {removal['neurons']} by {name} {100 * removal['change']['right_answers']:+.1f}"
    return text


def table(found: dict[str, Any]) -> str:
    """Figures as tables in Markdown."""
    removals, kinds = [], []
    for row in found["models"]:
        measures = ("shortcut_answers", "right_answers", "agreeing_accuracy")
        shortcut, right, agreeing = (f"{100 * row['intact'][measure]:.1f}" for measure in measures)
        removals.append((str(row["seed"]), "nothing", "0", shortcut, right, "", agreeing))
        for name, removal in row["without"].items():
            drawn = removal["random"]["right_answers"]
            removals.append(
                (
                    str(row["seed"]),
                    NAMES[name],
                    str(removal["neurons"]),
                    _change(removal, "shortcut_answers"),
                    _change(removal, "right_answers"),
                    f"{100 * drawn[0]:+.1f} ({100 * drawn[1]:+.1f} to {100 * drawn[2]:+.1f})",
                    _change(removal, "agreeing_accuracy"),
                )
            )
        f1 = row["f1"]
        kinds.append(
            (
                str(row["seed"]),
                *(f"{100 * before:.1f} to {100 * after:.1f}" for before, after in row["kinds"].values()),
                f"{row['confidence_r']['plain']:.2f}",
                f"{row['confidence_r']['given label']:.2f}",
                f"{100 * f1['intact']:.1f}",
                f"{100 * f1['change']:+.1f} ({', '.join(f'{100 * end:+.1f}' for end in f1['ci95'])})",
                f"{100 * f1['random'][0]:+.1f}",
            )
        )
    of_removals = (
        "model", "without", "neurons", "shortcut answers", "right answers", "random neurons", "where both agree",
    )  # fmt: skip
    of_kinds = ("model", *HEURISTICS, "r with confidence", "given the label", "F1", "without confidence's", "random")
    return "\n\n".join([markdown_table(of_removals, removals), markdown_table(of_kinds, kinds)])


def _change(removal: dict[str, Any], measure: str) -> str:
    ends = ", ".join(f"{100 * end:+.1f}" for end in removal["ci95"][measure])
    return f"{100 * removal['change'][measure]:+.1f} ({ends})"


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for, told as it is found."""
    settings, models = QUICK if given.quick else Settings(), []
    for seed in range(given.seed, given.seed + settings.models):
        models.append(measured(settings, seed))
        print(line(models[-1]), flush=True)
    return {"settings": asdict(settings), "published_second_hand": PUBLISHED, "models": models}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment, or print a file of it."""
    parser = options(__doc__)
    parser.add_argument("--seed", type=int, default=4, help="of the first model")
    run(parser, measure, table, arguments)


if __name__ == "__main__":
    main()
