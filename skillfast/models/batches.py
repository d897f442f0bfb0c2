"""Batches as loaders give them, and the names of their classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable


def classes_of(loader: Iterable[Any], model: torch.nn.Module) -> list[str]:
    """Class names from the loader's dataset, or as many numbers as the model has outputs."""
    names = getattr(getattr(loader, "dataset", None), "classes", None)
    if names is not None:
        return [str(name) for name in names]
    count = getattr(model, "num_classes", None)
    if not isinstance(count, int) or count < 2:
        raise ArgumentError(
            f"classes: expected loader.dataset.classes or model.num_classes, got neither from "
            f"{type(loader).__name__} and {type(model).__name__}; pass classes="
        )
    return [str(i) for i in range(count)]


def labelled_batch(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch as inputs, images or token ids, and labels; raises ArgumentError where it is something else."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], torch.Tensor):
        kind = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ArgumentError(f"batch: expected (images, labels), got {kind}; pass forward= for anything else")
    return batch[0], torch.as_tensor(batch[1])
