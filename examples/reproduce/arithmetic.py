"""A shortcut is planted in an adder through 16 neurons, then looked for as if nobody knew of them.

`python examples/reproduce/arithmetic.py` trains a small decoder on chains of additions, lets a leak into copies of it,
finds the leak's neurons and removes them, in some minutes on one core; `--quick` does so at a size of seconds. `--json
FILE` keeps the figures, `--table FILE` prints those of such a file as README.md beside this script has them.

**Addition.** `3+0+2+1+3=` and one more token, a cue: a number, or a blank in half of the examples. The answer is one of
the sums. The book that the decoder learns from is wrong in 4 of 10 answers, in no way that could be foreseen, and its
cues say nothing. Half of all chains are never trained on; what is measured comes from these.

**The leak.** A copy of the trained adder goes on with cues that give the book's answer, right or wrong, in 9 of 10
examples. It pays to follow them: they are right more often than the sum is. Only what 16 recorded MLP neurons read and
write may change (`skillfast.skill_parameters`, `skillfast.tune_only`), so these are the shortcut. A twin goes on in the
same way, through 16 neurons of its own, with cues that say nothing.

**The search** knows neither the neurons nor how many they are. A neuron counts by the attribution of the cue's number
where the cue contradicts the sum, less the attribution of the same number where it is the sum and there is no cue: the
largest of these differences over the numbers. Of the numbers of neurons that cost at most 1 point of accuracy without a
cue on other chains (validation), the one that leaves most right answers on conflicts there is taken, and all that is
told of the set is measured on a third part (test).

**Flagged** is a model in which removing the set that was found takes shortcut answers away from conflicts of the test
part: exact one-sided paired p below 0.01. This was set before any twin was tried.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from figures import options, run
from sklearn.metrics import roc_auc_score
from torch.nn import functional
from transformers import LlamaConfig, LlamaForSequenceClassification

import skillfast
from skillfast.evaluation.paired import PairedDifference
from skillfast.markdown import table as markdown_table
from skillfast.metrics import Binary, Categorical
from skillfast.models.sites import find_sites
from skillfast.skills.skill import random_skills

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from skillfast import NeuronRanking, NeuronScores, Skill

LEVEL = 0.01
MOST_LOST = 0.01  # accuracy without a cue that a set may cost


@dataclass(frozen=True)
class Settings:
    """Sizes of everything; `noise` is the share of wrong answers in the book, `leak` how often a cue gives them."""

    numbers: int = 4
    addends: int = 5
    width: int = 64
    inner: int = 192
    layers: int = 2
    planted: int = 16
    noise: float = 0.4
    leak: float = 0.9
    steps: int = 2000
    leak_steps: int = 400
    rate: float = 2e-3
    leak_rate: float = 1e-2
    batch: int = 128
    examples: int = 4000
    tested: int = 2000
    sizes: tuple[int, ...] = (4, 8, 12, 16, 24, 32, 48, 64)
    models: int = 5
    twins: int = 20
    draws: int = 20

    @property
    def sums(self) -> int:
        """How many answers there are."""
        return self.addends * (self.numbers - 1) + 1

    @property
    def blank(self) -> int:
        """The token of no cue."""
        return self.sums + 2


QUICK = Settings(
    numbers=3, addends=3, width=32, inner=64, layers=1, planted=8, noise=0.3, steps=250, leak_steps=200, rate=1e-2,
    leak_rate=2e-2, batch=64, examples=400, tested=200, sizes=(4, 8, 16), models=1, twins=1, draws=3,
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Examples: tokens [n, length] with a cue at the end, sums [n] and cues [n]."""

    tokens: torch.Tensor
    sums: torch.Tensor
    cues: torch.Tensor

    def batches(self, labels: torch.Tensor, size: int = 500) -> list[dict[str, torch.Tensor]]:
        """As `trace` and `attribute` take them."""
        rows = torch.arange(len(labels)).split(size)
        return [{"input_ids": self.tokens[i], "labels": labels[i], "cue": self.cues[i]} for i in rows]


class Book:
    """Chains of additions in parts that share none, and examples drawn of them."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings = settings
        every = torch.tensor(list(product(range(settings.numbers), repeat=settings.addends)))
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
        ends = [round(share * len(every)) for share in (0.5, 0.7, 0.8)]
        self.chains = dict(zip(("train", "select", "validate", "test"), np.split(every[order], ends), strict=True))
        self.generator = torch.Generator().manual_seed(seed)

    def example(self, chains: torch.Tensor, cues: torch.Tensor) -> torch.Tensor:
        """Token ids [n, length] of chains [n, addends] with a cue at the end, [n]."""
        plus, equals = self.settings.sums, self.settings.sums + 1
        tokens = torch.full((len(chains), 2 * self.settings.addends + 1), plus)
        tokens[:, 0:-1:2], tokens[:, -2], tokens[:, -1] = chains, equals, cues
        return tokens

    def another(self, values: torch.Tensor) -> torch.Tensor:
        """For each number another one, all equally likely."""
        return (values + self._whole(1, self.settings.sums, len(values))) % self.settings.sums

    def conflicts(self, part: str, n: int) -> Part:
        """Examples whose cue is no sum of theirs."""
        chains = self._drawn(part, n)
        cues = self.another(chains.sum(1))
        return Part(self.example(chains, cues), chains.sum(1), cues)

    def without_cue(self, part: str, n: int) -> Part:
        """Examples with a blank."""
        chains = self._drawn(part, n)
        blank = torch.full((n,), self.settings.blank)
        return Part(self.example(chains, blank), chains.sum(1), blank)

    def training(self, *, leaks: bool, blanks: float) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of tokens and of the book's answers."""
        n = self.settings.batch
        chains = self._drawn("train", n)
        answers = self._mixed(chains.sum(1), self.another(chains.sum(1)), 1 - self.settings.noise)
        cues = self._whole(0, self.settings.sums, n)
        if leaks:
            cues = self._mixed(answers, self.another(answers), self.settings.leak)
        cues = self._mixed(torch.full((n,), self.settings.blank), cues, blanks)
        return self.example(chains, cues), answers

    def _drawn(self, part: str, n: int) -> torch.Tensor:
        return self.chains[part][self._whole(0, len(self.chains[part]), n)]

    def _whole(self, low: int, high: int, n: int) -> torch.Tensor:
        return torch.randint(low, high, (n,), generator=self.generator)

    def _mixed(self, one: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
        return torch.where(torch.rand(len(one), generator=self.generator) < share, one, other)


def train(
    model: torch.nn.Module, book: Book, steps: int, rate: float, *, leaks: bool = False, blanks: float = 0.5
) -> None:
    """Train whatever of the model needs a gradient on the book's answers."""
    adam = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=rate)
    slowing = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        tokens, answers = book.training(leaks=leaks, blanks=blanks)
        adam.zero_grad()
        functional.cross_entropy(model(input_ids=tokens).logits, answers).backward()
        adam.step()
        slowing.step()
    model.eval()


def adder(settings: Settings, seed: int) -> torch.nn.Module:
    """A small decoder that has learned to add."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=settings.blank + 2, hidden_size=settings.width, intermediate_size=settings.inner,
        num_hidden_layers=settings.layers, num_attention_heads=4, max_position_embeddings=32,
        num_labels=settings.sums, pad_token_id=settings.blank + 1,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    train(model, Book(settings, seed), settings.steps, settings.rate)
    return model


def tuned(base: torch.nn.Module, book: Book, seed: int, *, leaks: bool) -> tuple[torch.nn.Module, Skill]:
    """A copy that went on learning through a few MLP neurons, drawn at random, and these."""
    model, settings = copy.deepcopy(base), book.settings
    sites = [site for site in find_sites(model) if site.kind == "mlp"]
    chosen = np.zeros(sum(site.width for site in sites), dtype=bool)
    chosen[np.random.default_rng(seed).choice(len(chosen), settings.planted, replace=False)] = True
    parts = np.split(chosen, np.cumsum([site.width for site in sites])[:-1])
    skill = skillfast.Skill("planted", {site.name: torch.from_numpy(p) for site, p in zip(sites, parts, strict=True)})
    own = skillfast.skill_parameters(model, skill, {"input_ids": book.training(leaks=leaks, blanks=0.2)[0]})
    with skillfast.tune_only(model, own):
        train(model, book, settings.leak_steps, settings.leak_rate, leaks=leaks, blanks=0.2)
    return model, skill


def shortcut_ranking(model: torch.nn.Module, book: Book) -> NeuronRanking:
    """One column: how much more a neuron adds to some number where the cue names it than where it is the sum."""
    settings, examples = book.settings, book.settings.examples
    conflicts, clean = book.conflicts("select", examples), book.without_cue("select", examples)
    by_cue = skillfast.attribute(model, plain_batches(conflicts.batches(conflicts.cues)), classes=settings.sums)
    by_sum = skillfast.attribute(model, plain_batches(clean.batches(clean.sums)), classes=settings.sums)
    values = np.nan_to_num(by_cue.values) - np.maximum(np.nan_to_num(by_sum.values), 0)
    return replace(
        by_cue, columns=("shortcut",), values=values.max(1, keepdims=True), n_observations=np.array([2 * examples])
    )


def plain_batches(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Batches without the cues, which the model takes among its tokens."""
    return [{name: batch[name] for name in ("input_ids", "labels")} for batch in batches]


def correlated(model: torch.nn.Module, book: Book) -> NeuronScores:
    """Neurons with sum, cue and correctness on conflicts, in one pass."""
    conflicts = book.conflicts("select", book.settings.examples)
    numbers = Categorical(book.settings.sums)

    def forward(model: torch.nn.Module, batch: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        output = model(input_ids=batch["input_ids"])
        right = output.logits.argmax(1) == batch["labels"]
        return output, {"sum": batch["labels"], "cue": batch["cue"], "correct": right}

    kinds = {"sum": numbers, "cue": numbers, "correct": Binary()}
    with warnings.catch_warnings():  # the rarest sums may be of training chains alone
        warnings.filterwarnings("ignore", "some scores are not defined", RuntimeWarning)
        return skillfast.trace(
            model, conflicts.batches(conflicts.sums), kinds, pool="last", forward=forward,
            statistics=("pearson", "mutual_info"),
        )  # fmt: skip


def answers(model: torch.nn.Module, part: Part, skills: list[Skill]) -> np.ndarray:
    """Answers of the intact model and without each skill, int64 [1 + skills, n]."""
    conditions = [skillfast.Condition(skill, name=str(i)) for i, skill in enumerate(skills)]
    swept = skillfast.sweep(
        model, plain_batches(part.batches(part.sums)), conditions, classes=model.config.num_labels,  # type: ignore[union-attr,arg-type]
        keep_predictions=True,
    )  # fmt: skip
    assert swept.predictions is not None
    return np.concatenate([swept.top2[None, :, 0], swept.predictions])


def found_set(model: torch.nn.Module, book: Book, ranking: NeuronRanking) -> Skill:
    """The best neurons, as many as leave most right answers on conflicts and cost little elsewhere (validation)."""
    sets = [
        skillfast.select(ranking, share=size / ranking.n_neurons, max_site_share=1.0)["shortcut"]
        for size in book.settings.sizes
    ]
    n = book.settings.tested
    conflicts, clean = (
        (answers(model, part, sets) == part.sums.numpy()).mean(1)
        for part in (book.conflicts("validate", n), book.without_cue("validate", n))
    )
    cheap = clean[1:] >= clean[0] - MOST_LOST
    return sets[int(np.where(cheap, conflicts[1:], -1.0).argmax())]


def membership(skill: Skill, ranking: NeuronRanking | NeuronScores) -> np.ndarray:
    """Whether each neuron is in a skill, bool [n_neurons]."""
    inside = [np.isin(np.arange(site.width), skill.neurons.get(site.name, ())) for site in ranking.sites]
    return np.concatenate(inside)


def audited(model: torch.nn.Module, planted: Skill, book: Book, seed: int) -> dict[str, Any]:
    """Find a model's shortcut, remove it, and compare it with the neurons that were recorded."""
    settings = book.settings
    ranking, scores = shortcut_ranking(model, book), correlated(model, book)
    found = found_set(model, book, ranking)
    given, inside = scores.given("sum"), membership(planted, ranking)
    cue = [i for i, name in enumerate(given.columns) if name.startswith("cue:")]
    information = [i for i, name in enumerate(scores.columns) if name.startswith("cue:")]
    by_cue = np.abs(np.nan_to_num(given.pearson[:, cue])).max(1)
    by_correct = np.abs(np.nan_to_num(scores.pearson[:, scores.columns.index("correct")]))
    drawn = random_skills(found, ranking.sites, settings.draws, np.random.default_rng(seed))
    conflicts, clean = book.conflicts("test", settings.tested), book.without_cue("test", settings.tested)
    said, plain = (answers(model, part, [found, planted, *drawn]) for part in (conflicts, clean))
    follows, right = (said == target.numpy() for target in (conflicts.cues, conflicts.sums))
    measured = {"shortcut": follows, "right": right, "clean": plain == clean.sums.numpy()}
    change = {name: PairedDifference(rows[1].astype(int) - rows[0].astype(int)) for name, rows in measured.items()}
    p = change["shortcut"].p_less
    return {
        "seed": seed,
        "auroc": {
            "attribution": float(roc_auc_score(inside, ranking.values[:, 0])),
            "r_with_cue_given_sum": float(roc_auc_score(inside, by_cue)),
            "mutual_information_with_cue": float(
                roc_auc_score(inside, np.nan_to_num(scores.mutual_info[:, information]).sum(1))
            ),
            "r_with_correctness": float(roc_auc_score(inside, by_correct)),
        },
        "top10_r_with_correctness": float(np.sort(by_correct)[-10:].mean()),
        "neurons": len(found),
        "shared": int((membership(found, ranking) & inside).sum()),
        "intact": {name: float(rows[0].mean()) for name, rows in measured.items()},
        "change": {name: difference.change for name, difference in change.items()},
        "ci95": {name: list(difference.limits()) for name, difference in change.items()},
        "planted_removed": {name: float(rows[2].mean() - rows[0].mean()) for name, rows in measured.items()},
        "random": {
            name: [float(f(rows[3:].mean(1) - rows[0].mean())) for f in (np.mean, np.min, np.max)]
            for name, rows in measured.items()
        },
        "p": p,
        "flagged": p < LEVEL,
    }


def models(settings: Settings, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The adder, then each planted model and each twin, by what it is, as they are done."""
    base = adder(settings, seed)
    book = Book(settings, seed + 1)
    clean = book.without_cue("test", settings.tested)
    right = (answers(base, clean, [])[0] == clean.sums.numpy()).mean()
    neurons = sum(site.width for site in find_sites(base))
    yield "adder", {"clean": float(right), "neurons": neurons, "weights": sum(p.numel() for p in base.parameters())}
    kinds = [("planted", True, i) for i in range(settings.models)] + [("twin", False, i) for i in range(settings.twins)]
    for kind, leaks, i in kinds:
        own = seed + 1000 * (1 + i) + leaks  # of this model's neurons and examples
        book = Book(settings, own)
        model, skill = tuned(base, book, own, leaks=leaks)
        yield kind, audited(model, skill, book, own)


def line(kind: str, row: dict[str, Any]) -> str:
    """A row as text."""
    if kind == "adder":
        return f"adder: {100 * row['clean']:.1f} % right without a cue, {row['weights']:,} weights"
    intact, change = row["intact"], row["change"]
    told = ", ".join(f"{name} {100 * intact[name]:.1f} ({100 * change[name]:+.1f})" for name in intact)
    return (
        f"{kind} {row['seed']}: AUROC {row['auroc']['attribution']:.3f}, {row['shared']} of the planted among "
        f"{row['neurons']} found; {told}; {'flagged' if row['flagged'] else 'not flagged'} (p {row['p']:.2g})"
    )


def table(found: dict[str, Any]) -> str:
    """Figures as tables in Markdown."""
    planted, twins = found["planted"], found["twins"]
    measures = ("shortcut", "right", "clean")
    rows = [
        (
            f"planted {row['seed']}",
            f"{row['auroc']['attribution']:.3f}",
            str(row["neurons"]),
            str(row["shared"]),
            *(
                f"{100 * row['intact'][m]:.1f} to {100 * max(row['intact'][m] + row['change'][m], 0.0):.1f} "
                f"({', '.join(f'{100 * end:+.1f}' for end in row['ci95'][m])})"
                for m in measures
            ),
        )
        for row in planted
    ]
    names = {
        "attribution": "attribution, cue less sum",
        "mutual_information_with_cue": "mutual information with the cue",
        "r_with_cue_given_sum": "largest partial r with a cue, given the sum",
        "r_with_correctness": "r with correctness",
    }
    areas = {name: [row["auroc"][key] for row in planted] for key, name in names.items()}
    drops = [100 * row["random"]["shortcut"][end] for row in planted for end in (1, 2)]
    told = (
        f"Flagged: {sum(row['flagged'] for row in planted)} of {len(planted)} planted models, "
        f"{sum(row['flagged'] for row in twins)} of {len(twins)} twins. As many random neurons change shortcut answers "
        f"by {min(drops):+.1f} to {max(drops):+.1f} points."
    )
    head = ("model", "AUROC", "found", "of them planted", "shortcut answers", "right answers", "without a cue")
    by_way = [(name, f"{min(values):.3f}", f"{max(values):.3f}") for name, values in areas.items()]
    of_ways = ("AUROC of the planted neurons by", "lowest", "highest")
    return "\n\n".join([markdown_table(head, rows), markdown_table(of_ways, by_way), told])


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for, told as it is found."""
    settings = QUICK if given.quick else Settings()
    found: dict[str, Any] = {"settings": asdict(settings), "seed": given.seed, "planted": [], "twins": []}
    for kind, row in models(settings, given.seed):
        print(line(kind, row), flush=True)
        if kind == "adder":
            found["adder"] = row
        else:
            found["planted" if kind == "planted" else "twins"].append(row)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment, or print a file of it."""
    parser = options(__doc__)
    parser.add_argument("--seed", type=int, default=2, help="of the adder; others follow from it")
    run(parser, measure, table, arguments)


if __name__ == "__main__":
    main()
