"""Learned masks: processor time and quality beside those of another revision, which may learn a class at a time.

`python bench/bench_masks.py digits --before CHECKOUT --json FILE` learns the masks of all weights that `auto` tries,
with this checkout and with another one (built, `git worktree add`), each in a process of its own on one thread, and
removes both on the test part. `python bench/bench_masks.py cifar10 --data DIR --checkpoint FILE ...` does so for the
half-trained vision transformer; `--before-classes 4` learns the masks of so many classes only with the other revision,
whose time is that of a loop over the classes, and multiplies; `--before-weights 1` likewise.
`python bench/bench_masks.py classes --json FILE` compares 100 and 1,000 classes with 10, on as many images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import skillfast
from skillfast import BenchConfig, Condition
from skillfast.models.sites import find_sites, fingerprint
from skillfast.runs.selection import KEEPS
from skillfast.runs.session import open_session
from skillfast.skills.ranking import NeuronRanking

ROOT = Path(__file__).parents[1]
SHARE = 0.03


def config(arguments: argparse.Namespace) -> BenchConfig:
    """The default run, or CIFAR-10 with the half-trained vision transformer (200 and 100 images of each class)."""
    if arguments.setting == "digits":
        return BenchConfig.of()
    return BenchConfig.of(
        model="vit_tiny_patch16_224",
        model_kwargs={"img_size": 32, "patch_size": 4, "depth": 6},
        checkpoint=arguments.checkpoint,
        dataset="imagefolder",
        data_dir=arguments.data,
        train_per_class=200,
        test_per_class=100,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.247, 0.2435, 0.2616),
        crop_pct=1.0,
    )


def learn(arguments: argparse.Namespace) -> None:
    """Attributions and masks of every weight, as the revision on the path ranks candidates; what each took."""
    seconds = {}

    def timed(name, make):
        start = time.process_time()
        made = make()
        seconds[name] = time.process_time() - start
        return made

    with open_session(config(arguments)) as session:
        subject = session.subject
        model, loader, classes = subject.model, subject.loader("select"), subject.splits.classes
        model.load_state_dict(torch.load(arguments.state, weights_only=True))  # other revisions train another default
        attributions = timed("attribution", lambda: skillfast.attribute(model, loader, classes=classes))
        values = attributions.values.copy()
        values[:, arguments.classes :] = np.nan
        attributions = dataclasses.replace(attributions, values=values)
        start = {}
        middle, *others = sorted(KEEPS, key=lambda keep: keep != sorted(KEEPS)[len(KEEPS) // 2])
        for keep in (middle, *others)[: arguments.weights]:
            masks = timed(
                f"keep {keep:g}",
                partial(skillfast.learn_masks, model, loader, attributions, share=SHARE, keep=keep, **start),
            )
            names = [site.name for site in masks.sites]  # as plain arrays, which any revision reads
            np.savez(Path(arguments.learn) / f"{keep:g}.npz", values=masks.values, sites=names)
            if arguments.warm and not start:
                start = {"start": masks}
    (Path(arguments.learn) / "seconds.json").write_text(json.dumps(seconds))


def run(
    arguments: argparse.Namespace, checkout: Path, folder: Path, state: Path, *, classes: int, weights: int, warm: bool
) -> dict:
    """Learn with a checkout in a process of its own, unless the folder has it all; seconds of each part."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "seconds.json").exists():
        return json.loads((folder / "seconds.json").read_text())
    command = [sys.executable, __file__, arguments.setting, "--learn", str(folder), "--state", str(state)]
    command += ["--classes", str(classes), "--weights", str(weights), *(["--warm"] if warm else [])]
    if arguments.data:
        paths = (str(Path(path).absolute()) for path in (arguments.data, arguments.checkpoint))
        command += [part for pair in zip(("--data", "--checkpoint"), paths, strict=True) for part in pair]
    path = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env={**os.environ, **path}, cwd=folder)
    return json.loads((folder / "seconds.json").read_text())


def revision(checkout: Path) -> str:
    """The commit that a checkout is at."""
    said = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True
    )
    return said.stdout.strip()


def ranking(session, path: Path) -> NeuronRanking:
    """The masks of a file as the ranking that skills are cut from."""
    model, learned = session.subject.model, np.load(path)
    sites = {site.name: site for site in find_sites(model)}
    columns = tuple(f"label:{name}" for name in session.subject.splits.classes)
    counts = np.full(len(columns), len(session.subject.splits.select))
    ordered = tuple(sites[name] for name in learned["sites"])
    return NeuronRanking("mask", columns, learned["values"], ordered, counts, fingerprint(model))


def effects(session, rankings: list[NeuronRanking], classes: int) -> list[dict[str, float]]:
    """Drop, harm and regret against the oracle, in points, of each ranking's first classes on the test part."""
    names = session.subject.splits.classes[:classes]
    skills = [skillfast.select(ranking, metric="label", share=SHARE) for ranking in rankings]
    conditions = [[Condition(made[name], name=f"{i} {name}") for name in names] for i, made in enumerate(skills)]
    swept = skillfast.sweep(
        session.subject.model, session.subject.loader("test"), [c for row in conditions for c in row],
        classes=session.subject.splits.classes, keep_predictions=True,
    )  # fmt: skip
    own = np.arange(classes)
    change = swept.per_class_accuracy.reshape(len(rankings), classes, -1) - swept.baseline
    oracle = np.stack([np.where(swept.top2[:, 0] == c, swept.top2[:, 1], swept.top2[:, 0]) for c in own])
    perfect = skillfast.metrics.per_class_accuracy(oracle, swept.labels, len(swept.classes)) - swept.baseline
    rest = np.ones(perfect.shape, bool)
    rest[own, own] = False
    return [
        {
            "target_drop": -100 * float(row[own, own].mean()),
            "harm": 100 * float(np.maximum(0, -row[rest]).mean()),
            "regret": 100 * float((perfect - row)[rest].mean()),
        }
        for row in change
    ]


def compare(arguments: argparse.Namespace) -> dict:
    """Both revisions' seconds and quality."""
    with tempfile.TemporaryDirectory() as folder:
        after, before = (Path(arguments.learned or folder).absolute() / side for side in ("after", "before"))
        state = Path(folder) / "state.pt"
        with open_session(config(arguments)) as session:
            torch.save(session.subject.model.state_dict(), state)
        seconds = {"after": run(arguments, ROOT, after, state, classes=10, weights=len(KEEPS), warm=True)}
        learned, weights = arguments.before_classes, arguments.before_weights
        measured = run(arguments, Path(arguments.before), before, state, classes=learned, weights=weights, warm=False)
        masks = [value for name, value in measured.items() if name != "attribution"]
        seconds["before"] = measured
        total = {
            "after": sum(seconds["after"].values()),
            "before": measured["attribution"] + sum(masks) * (10 / learned) * (len(KEEPS) / weights),
        }
        with open_session(config(arguments)) as session:
            keeps = [name.removeprefix("keep ") for name in measured if name != "attribution"]
            pairs = [ranking(session, side / f"{keep}.npz") for keep in keeps for side in (before, after)]
            found = effects(session, pairs, learned)
            everything = effects(session, [ranking(session, after / f"{keep:g}.npz") for keep in KEEPS], 10)
    quality = {f"keep {keep}": {"before": found[2 * i], "after": found[2 * i + 1]} for i, keep in enumerate(keeps)}
    return {
        "before": revision(Path(arguments.before)),
        "after": revision(ROOT),
        "seconds": seconds,
        "total_seconds": total,
        "before_over_after": total["before"] / total["after"],
        "before_was_multiplied_by": (10 / learned) * (len(KEEPS) / weights),
        "test_points_of_classes": learned,
        "test_points": quality,
        "after_all_classes": dict(zip((f"keep {keep:g}" for keep in KEEPS), everything, strict=True)),
    }


def many_classes() -> dict:
    """The same model with 10, 100 and 1,000 classes, of untrained weights, over as many images."""
    from timm.models.vision_transformer import VisionTransformer

    seconds: dict[int, list[float]] = {10: [], 100: [], 1000: []}
    images = torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for classes in (*seconds, *seconds):
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=8, in_chans=1, patch_size=2, embed_dim=128, depth=4, num_heads=4, num_classes=classes
        ).eval()
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(images, torch.arange(1000) % classes), batch_size=256
        )
        attributions = skillfast.attribute(model, loader, classes=classes)
        start = time.process_time()
        masks = skillfast.learn_masks(model, loader, attributions, steps=30)
        seconds[classes].append(time.process_time() - start)
        assert np.isfinite(masks.values).all()
    return {
        "seconds": {str(classes): times for classes, times in seconds.items()},
        **{f"{classes}_over_10_classes": min(seconds[classes]) / min(seconds[10]) for classes in (100, 1000)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=["digits", "cifar10", "classes"])
    parser.add_argument("--before", help="Another revision's checkout, built.")
    parser.add_argument("--before-classes", type=int, default=10)
    parser.add_argument("--before-weights", type=int, default=len(KEEPS))
    parser.add_argument("--data", help="CIFAR-10 as a folder of images.")
    parser.add_argument("--checkpoint", help="The vision transformer's weights.")
    parser.add_argument("--learned", help="Folder for the masks; those that it has already are not learned again.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--learn", help=argparse.SUPPRESS)  # what the processes are told
    parser.add_argument("--state", help=argparse.SUPPRESS)
    parser.add_argument("--classes", type=int, default=10, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=int, default=len(KEEPS), help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.learn:
        learn(arguments)
        return
    found = many_classes() if arguments.setting == "classes" else compare(arguments)
    made = {
        "setting": arguments.setting,
        "threads": 1,
        "torch": torch.__version__,
        "machine": platform.machine(),
        **found,
    }
    text = json.dumps(made, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
