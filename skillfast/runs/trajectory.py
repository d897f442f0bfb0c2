"""`skillfast.trajectory`: each skill over the checkpoints of a training: when it appears, and where it moves."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from skillfast import __version__, files
from skillfast.errors import ArgumentError
from skillfast.evaluation.comparison import MARGIN
from skillfast.evaluation.intervals import share_limits
from skillfast.evaluation.paired import PairedDifference
from skillfast.results import records
from skillfast.results.trajectory import FILE, Estimate, SkillAt, SkillTrajectory, Trajectory
from skillfast.runs.compare import Run, accuracy_of, compared, paired, run_folders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import torch

    from skillfast.results.comparison import SkillChange

HEAD = "head"


def trajectory(
    *runs: str | Path | torch.nn.Module,
    output: str | Path | None = None,
    loader: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
    quiet: bool = True,
    say: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> Trajectory:
    """Follow each skill over several runs of `bench`, or models, on the test examples that all of them have.

    A skill appears in the first run in which the whole interval of what its class loses by it is above 5 points. It
    moved since the run before where `compare` says so of both, and is there in both.

    Args:
        *runs: Folders of runs in the order of the training, or models as `compare` takes them; models are measured like
            the first one.
        output: Folder for `trajectory.json` and `trajectory.html`, and for the runs of models, `1`, `2` and so on; None
            writes nothing.
        loader: Labelled examples for modules, as `bench` takes them.
        quiet: Show no progress bars while models are measured.
        say: Called with each line worth reading meanwhile.
        **settings: Flat settings as of `BenchConfig.of`, for a model as the first.

    Returns:
        The trajectory; runs of other classes or examples are followed as far as they go, with `.reasons`.

    Raises:
        ArgumentError: Fewer than two runs, or models without `output`.
        DataError: A folder without readable results, skills and decisions.
        SkillfastError: What stops the run of a model.
    """
    if len(runs) < 2:
        raise ArgumentError(f"runs: expected two or more, got {len(runs)}; name the folder of each checkpoint's run")
    read = [Run.read(folder) for folder in run_folders(runs, output, settings, loader=loader, quiet=quiet, say=say)]
    found = _followed(read)
    if output is not None:
        from skillfast.report import write_trajectory

        records.write(found, files.output_folder(output) / FILE)
        write_trajectory(output)
    return found


def _followed(runs: Sequence[Run]) -> Trajectory:
    first = runs[0]
    shared = [name for name in first.classes if all(name in run.classes for run in runs)]
    rows = paired([run.decisions for run in runs])
    labels = np.array([shared.index(first.classes[label]) for label in first.decisions.labels[rows[0]]], dtype=np.int64)
    steps = [compared(*pair, None, MARGIN) for pair in pairwise(runs)]
    sides = [run.measured(own, shared, None) for run, own in zip(runs, rows, strict=True)]
    skills = {}
    for label, name in enumerate(shared):
        member = labels == label
        changes = [step.skills[name] for step in steps if name in step.skills]
        if not member.any() or len(changes) < len(steps):
            continue
        right = [
            ((side.intact[member] == label).astype(np.int64), (side.removed[label, member] == label).astype(np.int64))
            for side in sides
        ]
        skills[name] = _skill(right, changes)
    return Trajectory(
        skillfast=__version__,
        runs=[
            run.described(accuracy_of(side.intact, labels)) for run, side in zip(runs, sides, strict=True)
        ],
        reasons=list(dict.fromkeys(
            f"{new.base.directory} and {new.new.directory}: {reason}" for new in steps for reason in new.reasons
        )),
        n=len(labels),
        margin=MARGIN,
        skills=skills,
    )  # fmt: skip


def _skill(right: Sequence[tuple[np.ndarray, np.ndarray]], changes: Sequence[SkillChange]) -> SkillTrajectory:
    """A class over the runs.

    Args:
        right: For each run whether the model is right, intact and without the skill: int64 [n] each.
        changes: What `compare` says of each run and the next.
    """
    drops = [PairedDifference(intact - without) for intact, without in right]
    there = [drop.limits()[0] > MARGIN for drop in drops]
    found = []
    for i, ((intact, _), drop) in enumerate(zip(right, drops, strict=True)):
        change = changes[max(i - 1, 0)]
        kinds, blocks = (
            None if shares is None else {place: share.new if i else share.base for place, share in shares.items()}
            for shares in (change.kinds, change.blocks)
        )
        mean = float(intact.mean())
        found.append(
            SkillAt(
                accuracy=Estimate(mean, list(share_limits(mean, 0.0, len(intact)))),
                drop=Estimate(drop.change, list(drop.limits())),
                kinds=kinds,
                blocks=blocks,
                depth=_depth(blocks),
                overlap=change.overlap if i else None,
                verdicts=change.verdicts if i else [],
                moved=change.moved if i and there[i - 1] and there[i] else [],
            )
        )
    return SkillTrajectory(
        appears=there.index(True) if any(there) else None,
        moves=[i for i, at in enumerate(found) if at.moved],
        runs=found,
    )


def _depth(blocks: Mapping[str, float] | None) -> float | None:
    """Mean block, weighted by the shares above 0; the head lies behind the last block."""
    weights = {place: max(share, 0.0) for place, share in (blocks or {}).items()}
    if not sum(weights.values()):
        return None
    last = max((int(place) for place in weights if place != HEAD), default=-1)
    place_of = {place: last + 1 if place == HEAD else int(place) for place in weights}
    return float(np.average([place_of[place] for place in weights], weights=list(weights.values())))


__all__ = ["Trajectory", "trajectory"]
