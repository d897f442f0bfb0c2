"""What parts of each skill cost its own class: every example runs under the parts of its own class's skill alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skillfast import files
from skillfast.ablation.assigned import predict_assigned
from skillfast.data.splits import few_per_class, part_of
from skillfast.results import arrays
from skillfast.results.arrays import indices
from skillfast.results.records import Document
from skillfast.runs.kept import REMEDY

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader

    from skillfast.runs.removals import Removals

FILE = "own_predictions.safetensors"
FORWARDS_BY_BLOCK = 200  # of each class, however many blocks there are
LEAST_BY_BLOCK = 5  # examples of each class, where there are as many
CONTROLLED = 10  # examples of each class under each random control


@dataclass(frozen=True)
class OwnPredictions:
    """Predictions of test examples while parts of their own class's skill, or its controls, are removed.

    Attributes:
        components: int64 [subsets, n], with the skill's neurons in some kinds of sites removed, of all examples.
        blocks: int64 [2 (blocks - 1), m], with those in some blocks removed.
        block_rows: int64 [m], of which examples.
        controls: int64 [draws, c], of random controls.
        matched: int64 [draws, c], of controls that are about as active.
        control_rows: int64 [c], of which examples.
    """

    components: np.ndarray
    blocks: np.ndarray
    block_rows: np.ndarray
    controls: np.ndarray
    matched: np.ndarray
    control_rows: np.ndarray

    def save(self, directory: str | Path) -> Path:
        """Write `own_predictions.safetensors` into the folder; returns its path."""
        path = files.output_folder(directory) / FILE
        arrays.write(path, _Header(), dict(vars(self)))
        return path

    @staticmethod
    def load(directory: str | Path) -> OwnPredictions:
        """Read what `save` wrote; raises DataError where the file is missing, broken or of another version."""
        return OwnPredictions(**arrays.read(_Header, Path(directory) / FILE, lambda _: _LAYOUT, REMEDY)[1])


class _Header(Document, frozen=True, tag="skillfast.own_predictions/2", tag_field="schema"):
    """The header of `own_predictions.safetensors`."""


_LAYOUT = {
    "components": indices("subsets", "n", below=None),
    "blocks": indices("sets", "m", below=None),
    "block_rows": indices("m", below="n"),
    "controls": indices("draws", "c", below=None),
    "matched": indices("matched", "c", below=None),
    "control_rows": indices("c", below="n"),
}


def predict_parts(
    model: torch.nn.Module,
    loader: DataLoader[Any],
    labels: np.ndarray,
    removals: Removals,
    *,
    seed: int = 0,
    quiet: bool = True,
) -> OwnPredictions:
    """Predict examples while parts of their own class's skill are removed, and while its controls are.

    Subsets of the kinds run on all examples. Sets of blocks grow with the depth and draws are many, so that they run on
    some examples of each class, drawn at random: 200 forwards of each class by block, 10 examples for a draw.

    Args:
        model: In evaluation mode.
        loader: Batches of (images, labels), not shuffled.
        labels: int64 [n], the classes of the loader's examples, in their order.
        removals: What is removed.
        seed: Seed of the choice of examples.
        quiet: Show no progress bars.
    """
    some = max(LEAST_BY_BLOCK, FORWARDS_BY_BLOCK // max(1, len(removals.blocks)))
    every, by_block, controlled = (
        np.arange(len(labels)), *(np.array(few_per_class(labels, seed, most)) for most in (some, CONTROLLED))
    )  # fmt: skip
    draws = [*removals.own_controls, *removals.matched_controls]
    components, blocks, controls = (
        predict_assigned(model, part_of(loader, rows.tolist()), conditions, labels[rows], what=what, quiet=quiet)
        for conditions, rows, what in (
            (removals.components, every, "subsets of kinds"),
            (removals.blocks, by_block, "sets of blocks"),
            (draws, controlled, "draws"),
        )
    )
    own, matched = np.split(controls, [len(removals.own_controls)])
    return OwnPredictions(components, blocks, by_block, own, matched, controlled)
