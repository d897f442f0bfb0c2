"""A class removed by its neurons, beside the usual ways to unlearn it, on the same model and the same test images.

`python examples/unlearning/unlearning.py` does so for a digit and the default model, in some minutes on two cores;
`--quick` trains and tunes less. `--dataset cifar10 --data DIR --checkpoint FILE` takes a folder of CIFAR-10's images
and the weights of a vision transformer for it; `--retrain-epochs 0` leaves out what takes longest, a model that never
saw the class. `--json FILE` is written after every row; rows that it has already are not made again, so that a run that
ended goes on, and `--only` makes some of the rows. `--table FILE` prints a file as README.md beside this script has it.

Every row is a plain checkpoint: of a removal the model with the neurons' output weights set to 0.

| column | what it is |
| --- | --- |
| retained, forgotten | accuracy on the test images of the other classes, and on those of the class, in percent |
| readout lost | what the model's own classifier no longer tells the class apart by, of the intact one's, in percent |
| information lost | what a linear probe that is fitted anew on the embeddings does not, either |
| relearned in | steps of tuning all weights until nine tenths of what was right of the class is right again |
| membership | AUC of the loss that tells the class's training images from its test images; 50 is chance |
| seconds | of processor time, for what is learned or trained |
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional

import skillfast
from skillfast import BenchConfig
from skillfast.data import loader
from skillfast.data.splits import of_class
from skillfast.evaluation.probes import Reader, retained, share_lost
from skillfast.models.sites import find_sites
from skillfast.runs.images import train_anew
from skillfast.runs.never_seen import read_model
from skillfast.runs.session import open_session
from skillfast.skills.learned_mask import ERASE
from skillfast.skills.select import skill_size

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from skillfast import Skill
    from skillfast.runs.subject import Subject

SHARE = 0.03
BATCH = 64
MOST_STEPS = 120  # of relearning
WAYS = (
    "intact", "removal, learned mask", "removal, erasing mask", "selective pruning", "fine-tuning on the rest",
    "NegGrad+", "retrained without it",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What is left of a class in a model; see the columns above."""

    name: str
    retained: float
    forgotten: float
    readout_lost: float
    information_lost: float
    relearned_in: int | None
    membership: float
    seconds: float


def exported(model: torch.nn.Module, skill: Skill) -> torch.nn.Module:
    """A copy of the model whose weights no longer read a skill's neurons."""
    made = copy.deepcopy(model)
    paths = {site.name: site.path for site in find_sites(made)}
    with torch.no_grad():
        for name, index in skill.neurons.items():
            made.get_submodule(paths[name]).weight[:, index] = 0
    return made


def tuned(
    model: torch.nn.Module,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    steps: int,
    rate: float,
    stop: Callable[[torch.nn.Module, int], bool] = lambda *_: False,
) -> torch.nn.Module:
    """A copy of the model after some steps of Adam on all its weights; `stop` is asked after each."""
    made = copy.deepcopy(model)
    adam = torch.optim.Adam(made.parameters(), lr=rate)
    for step in range(1, steps + 1):
        images, labels = next(batches)
        adam.zero_grad()
        loss_of(made(images).float(), labels).backward()
        adam.step()
        if stop(made, step):
            break
    return made


def endless(dataset: Any, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random batches of a dataset, again and again."""
    while True:
        yield from loader(dataset, min(BATCH, len(dataset)), shuffle=True, seed=seed, drop_last=True)
        seed += 1


def negative_gradient(target: int, weight: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """NegGrad+: the loss on other classes minus a share of the loss on the class."""

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        each, own = functional.cross_entropy(logits, labels, reduction="none"), labels == target
        return (each * ~own).sum() / (~own).sum().clamp(min=1) - weight * (each * own).sum() / own.sum().clamp(min=1)

    return loss


def selectively_pruned(subject: Subject, target: int) -> Skill:
    """The neurons that are most active on the class beside how active they are on others (arXiv 2403.01267).

    A neuron's importance is its mean absolute activation; the score is that on the class over that on the others.
    """
    sites = [site for site in find_sites(subject.model) if site.kind != "head"]
    rows: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    handles = []
    for site in sites:

        def keep(_: torch.nn.Module, args: tuple[Any, ...], name: str = site.name) -> None:
            rows[name].append(args[0].abs().mean(1))

        handles.append(subject.model.get_submodule(site.path).register_forward_pre_hook(keep))
    labels = []
    with torch.inference_mode():
        for images, of in subject.loader("select"):
            subject.model(images)
            labels.append(of)
    for handle in handles:
        handle.remove()
    own = torch.cat(labels) == target
    score = torch.cat([(x := torch.cat(rows[s.name]))[own].mean(0) / (x[~own].mean(0) + 1e-8) for s in sites])
    best = torch.zeros(len(score), dtype=torch.bool)
    best[score.topk(skill_size(SHARE, sum(site.width for site in find_sites(subject.model)))).indices] = True
    parts = best.split([site.width for site in sites])
    return skillfast.Skill("pruned", {s.name: part.nonzero()[:, 0] for s, part in zip(sites, parts, strict=True)})


class Judge:
    """Measures what models have left of a class."""

    def __init__(self, subject: Subject, target: int, seed: int) -> None:
        self.subject, self.target, self.seed = subject, target, seed
        self.labels = np.asarray(subject.splits.test.labels)
        self.reader = Reader(self.labels, len(subject.splits.classes), None, seed)
        self.intact = self._read(subject.model)

    def _read(self, model: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
        """Predictions of the test images: by the classifier, and by a probe that is fitted anew."""
        subject = self.subject
        return read_model(model, subject.loader("test"), subject.splits.classes, self.reader)

    def recall(self, model: torch.nn.Module) -> float:
        """Share of the class's test images that are right."""
        with torch.inference_mode():
            right = [model(x).argmax(1) == y for x, y in loader(of_class(self.subject.splits.test, self.target), 256)]
        return float(torch.cat(right).double().mean())

    def row(self, name: str, model: torch.nn.Module, seconds: float) -> Row:
        """Measure a model."""
        predicted, probed = self._read(model)
        lost = [
            share_lost(before, after, self.labels, self.target)
            for before, after in zip(self.intact, (predicted, probed), strict=True)
        ]
        return Row(
            name,
            retained=retained(predicted, self.labels, self.target),
            forgotten=float((predicted == self.target)[self.labels == self.target].mean()),
            readout_lost=lost[0],
            information_lost=lost[1],
            relearned_in=self._relearned_in(model),
            membership=self._membership(model),
            seconds=seconds,
        )

    def _relearned_in(self, model: torch.nn.Module) -> int | None:
        wanted, reached = 0.9 * self.recall(self.subject.model), None
        if self.recall(model) >= wanted:
            return 0

        def stop(made: torch.nn.Module, step: int) -> bool:
            nonlocal reached
            reached = step if self.recall(made) >= wanted else None
            return reached is not None

        batches = endless(self.subject.splits.select, self.seed)
        tuned(model, batches, functional.cross_entropy, MOST_STEPS, 1e-4, stop)
        return reached

    def _membership(self, model: torch.nn.Module) -> float:
        losses = []
        with torch.inference_mode():
            for part in (self.subject.splits.select, self.subject.splits.test):
                batches = loader(of_class(part, self.target), 256)
                losses.append(
                    torch.cat([functional.cross_entropy(model(x).float(), y, reduction="none") for x, y in batches])
                )
        member = np.repeat([1, 0], [len(part) for part in losses])
        return float(roc_auc_score(member, -torch.cat(losses).numpy()))


def compare(
    subject: Subject,
    target: int,
    *,
    tune: int,
    retrain_epochs: int | None,
    seed: int = 0,
    found: Callable[[Row], None],
    ways: Collection[str] = WAYS,
) -> list[Row]:
    """Unlearn a class in every way and measure what is left.

    Args:
        subject: Model and data.
        target: The class.
        tune: Steps of fine-tuning and of NegGrad+.
        retrain_epochs: Passes of training a model without the class; None for the default model's recipe, 0 for none.
        seed: Seed of masks, batches and training.
        found: Called with each row once it is measured.
        ways: Which of `WAYS`.
    """
    judge, rows = Judge(subject, target, seed), []
    model, select, name = subject.model, subject.splits.select, subject.splits.classes[target]
    others = subject.splits.without(target)
    rest = others.select

    def add(how: str, make: Callable[[], torch.nn.Module]) -> None:
        if how not in ways:
            return
        start = time.process_time()
        made = make()
        row = judge.row(how, made, time.process_time() - start)
        rows.append(row)
        found(row)

    def learned(erase: float) -> torch.nn.Module:
        ranking = skillfast.attribute(model, subject.loader("select"), classes=subject.splits.classes)
        values = ranking.values.copy()
        values[:, np.arange(len(ranking.columns)) != target] = np.nan  # the other classes' masks are not learned
        masks = skillfast.learn_masks(
            model, subject.loader("select"), replace(ranking, values=values), share=SHARE, keep=5.0, erase=erase,
            batch_size=32, seed=seed,
        )  # fmt: skip
        skill = skillfast.select(masks, metric=f"label:{name}", share=SHARE)[name]
        made = exported(model, skill)
        hooked = skillfast.sweep(model, subject.loader("test"), [skillfast.Condition(skill)], keep_predictions=True)
        assert (hooked.predictions[0] == judge._read(made)[0]).mean() > 0.99  # the weights do what the removal does
        return made

    def retrained() -> torch.nn.Module:
        settings = subject.config.replaced(epochs=retrain_epochs, seed=seed)
        return train_anew(settings, replace(others, train=None), subject.device)[0]  # on what the other ways tune on

    add("intact", lambda: model)
    add("removal, learned mask", lambda: learned(0.0))
    add("removal, erasing mask", lambda: learned(ERASE))
    add("selective pruning", lambda: exported(model, selectively_pruned(subject, target)))
    add("fine-tuning on the rest", lambda: tuned(model, endless(rest, seed), functional.cross_entropy, tune, 3e-4))
    add("NegGrad+", lambda: tuned(model, endless(select, seed), negative_gradient(target, 0.1), tune // 4, 3e-4))
    if retrain_epochs != 0:
        add("retrained without it", retrained)
    return rows


def kept(path: Path | None, settings: dict[str, Any]) -> list[Row]:
    """The rows that a file has; a file of other settings ends the run."""
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    rows = [Row(**row) for row in found.pop("rows")]
    if other := sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key)):
        raise SystemExit(f"{path}: expected rows of the same settings, got another {', '.join(other)}; name a new file")
    return rows


def line(row: Row) -> str:
    """A row as text."""
    steps = "-" if row.relearned_in is None else str(row.relearned_in)
    shares = (row.retained, row.forgotten, row.readout_lost, row.information_lost)
    return f"{row.name:24}" + "".join(f"{100 * share:9.1f}" for share in shares) + (
        f"{steps:>7}{100 * row.membership:9.1f}{row.seconds:9.1f}"
    )  # fmt: skip


def table(path: Path) -> str:
    """A file of rows as a table in Markdown."""
    found = json.loads(path.read_text())
    rows = [Row(**row) for row in found["rows"]]
    head = ("", "retained", "forgotten", "readout lost", "information lost", "relearned in", "membership", "seconds")
    cells = [head, ("---",) * len(head)]
    for row in rows:
        shares = (row.retained, row.forgotten, row.readout_lost, row.information_lost)
        steps = f"more than {MOST_STEPS}" if row.relearned_in is None else str(row.relearned_in)
        written = (
            *(f"{100 * share:.1f}" for share in shares),
            steps,
            f"{100 * row.membership:.1f}",
            f"{row.seconds:.0f}",
        )
        cells.append((row.name, *written))
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in cells)


def main() -> None:
    """Parse the options, compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--data", help="CIFAR-10 as a folder of images.")
    parser.add_argument("--checkpoint", help="Weights of a 6-block ViT-Ti/4 for it.")
    parser.add_argument("--train-per-class", type=int, default=200, help="CIFAR-10's images to use; a fifth validates.")
    parser.add_argument("--test-per-class", type=int, default=100, help="CIFAR-10's images to measure on.")
    parser.add_argument("--target", type=int, default=3, help="Index of the class.")
    parser.add_argument("--quick", action="store_true", help="Fewer steps and epochs.")
    parser.add_argument("--retrain-epochs", type=int, help="0 leaves retraining out.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", type=Path, help="File for the rows and what made them; one that is there is gone on with."
    )
    parser.add_argument("--only", action="append", choices=WAYS, help="Make this row; may be given again.")
    parser.add_argument("--table", type=Path, help="Print this file's rows and end.")
    given = parser.parse_args()
    if given.table is not None:
        print(table(given.table))
        return
    config = BenchConfig.of(seed=given.seed)
    if given.dataset == "cifar10":
        config = BenchConfig.of(
            model="vit_tiny_patch16_224",
            model_kwargs={"img_size": 32, "patch_size": 4, "depth": 6},
            checkpoint=given.checkpoint,
            dataset="imagefolder",
            data_dir=given.data,
            train_per_class=given.train_per_class,
            test_per_class=given.test_per_class,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.247, 0.2435, 0.2616),
            crop_pct=1.0,
            seed=given.seed,
        )
    epochs = given.retrain_epochs if given.retrain_epochs is not None or not given.quick else 16
    tune = 60 if given.quick else 240
    print(f"{'':24} retained forgotten readout  info lost  steps  member  seconds")
    with open_session(config) as session:
        splits = session.subject.splits
        made = {
            "dataset": given.dataset,
            "class": splits.classes[given.target],
            "examples": {"select": len(splits.select), "test": len(splits.test)},
            "tuning_steps": tune,
            "retrain_epochs": epochs,
            "seed": given.seed,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        rows = kept(given.json, made)
        for row in rows:
            print(line(row))

        def keep(row: Row) -> None:
            rows.append(row)
            rows.sort(key=lambda each: WAYS.index(each.name))
            print(line(row), flush=True)
            if given.json is not None:
                given.json.parent.mkdir(parents=True, exist_ok=True)
                given.json.write_text(json.dumps({**made, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")

        ways = set(given.only or WAYS) - {row.name for row in rows}
        compare(session.subject, given.target, tune=tune, retrain_epochs=epochs, seed=given.seed, found=keep, ways=ways)
    print(f"{sum(row.seconds for row in rows) / 60:.1f} minutes of processor time to make them")


if __name__ == "__main__":
    main()
