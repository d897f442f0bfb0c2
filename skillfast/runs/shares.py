"""What parts of each skill cost its own class: every example runs under the parts of its own class's skill alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from skillfast import files
from skillfast.ablation.sweep import sweep
from skillfast.data.splits import part_of
from skillfast.progress import Forecast, telling
from skillfast.runs.kept import Kept

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch.utils.data import DataLoader

    from skillfast.ablation.donors import DonorBank
    from skillfast.ablation.interventions import Condition

SCHEMA, FILE = "skillfast.own_predictions/1", "own_predictions.safetensors"


def own_predictions(
    model: torch.nn.Module,
    loader: DataLoader[Any],
    labels: np.ndarray,
    conditions: Sequence[Sequence[Condition]],
    *,
    classes: Sequence[str],
    donors: DonorBank | None = None,
    quiet: bool = True,
) -> np.ndarray:
    """Predict every example while a part of its own class's skill is removed.

    Shares of a skill are shares of what its own class loses, so no other class's examples are run: the cost is that of
    `len(conditions)` forwards of the data, however many classes there are.

    Args:
        model: In evaluation mode.
        loader: Batches of (images, labels), not shuffled.
        labels: int64 [n], the classes of the loader's examples, in their order.
        conditions: [parts][K], a part of each class's skill.
        classes: Class names.
        donors: For conditions with `mode="resample"`.
        quiet: Show no progress bars.

    Returns:
        int64 [parts, n].
    """
    found = np.empty((len(conditions), len(labels)), np.int64)
    forecast = Forecast(
        f"{len(conditions)} parts of each skill on its own class's examples: {found.size:,} forwards", len(labels)
    )
    for c in range(len(classes)):
        rows = np.flatnonzero(labels == c)
        if not len(rows) or not len(conditions):
            continue
        own = part_of(loader, rows.tolist())
        parts = [row[c] for row in conditions]
        with telling(None):
            swept = sweep(model, own, parts, donors=donors, classes=classes, keep_predictions=True, quiet=quiet)
        found[:, rows] = swept.predictions_of(part.name for part in parts)
        forecast.ran(len(rows))
    return found


def _save(predictions: np.ndarray, folder: Path) -> None:
    files.write_arrays(folder / FILE, {"predictions": predictions}, {"schema": SCHEMA})


def _load(folder: Path) -> np.ndarray:
    return files.read_arrays(folder / FILE, SCHEMA, "run again with --no-resume")[0]["predictions"]


OWN_PREDICTIONS = Kept(_save, _load)
"""How they are kept for resuming."""
