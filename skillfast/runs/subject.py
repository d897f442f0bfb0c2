"""What a run measures: a model, its data in three parts, and how it came about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from skillfast import data
from skillfast.tracing.trace import trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch.utils.data import DataLoader

    from skillfast.runs.config import BenchConfig
    from skillfast.runs.kept import Kept
    from skillfast.statistics.scores import NeuronScores


@dataclass(frozen=True)
class Training:
    """How a subject's weights come about before anything is measured.

    Attributes:
        run: Trains the subject's model in place, and says how.
        line: What is said before; empty for nothing.
        kept: How the trained weights are kept for resuming; None where there is nothing to keep.
    """

    run: Callable[[], dict[str, Any]]
    line: str = ""
    kept: Kept[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode on its device, and its data; this class is for images.

    Attributes:
        config: The settings that made it, the dtype among them.
        model: The model.
        name: Name of the model.
        splits: Examples to select, validate and test on.
        device: Where it runs.
        source: Where its weights are from.
        described: How examples are read, in words.
        training: What is done before anything is measured.
        trained: How its weights came about, once that is done.
    """

    config: BenchConfig
    model: torch.nn.Module
    name: str
    splits: data.Splits
    device: torch.device
    source: str
    described: str
    training: Training
    trained: dict[str, Any] = field(default_factory=dict)

    def loader(self, part: str) -> DataLoader[Any]:
        """Batches of `"select"`, `"validate"` or `"test"`, in the data's order."""
        return data.loader(getattr(self.splits, part), self.config.run.batch_size)

    def varied_loader(self, part: str) -> DataLoader[Any]:
        """Batches of a part of which the first ones hold examples of all lengths."""
        return self.loader(part)

    def precision(self) -> AbstractContextManager[Any]:
        """The context in which the model runs in the dtype that was asked for."""
        dtype = getattr(torch, self.config.run.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def trace(self, part: str, *, statistics: Sequence[str] | None = None, quiet: bool = True) -> NeuronScores:
        """Trace a part of the data with the settings, and with other statistics where they are given."""
        settings = self.config.trace
        return trace(
            self.model,
            self.loader(part),
            sites=settings.sites,
            pool=settings.pool,  # type: ignore[arg-type]  # one of the settings' choices
            statistics=statistics or settings.statistics,
            bins=settings.bins,
            classes=self.splits.classes,
            quiet=quiet,
        )

    def dataset_json(self) -> dict[str, Any]:
        """The dataset object of results.json."""
        return {
            "name": self.splits.name,
            "classes": list(self.splits.classes),
            "n_select": len(self.splits.select),
            "n_validate": len(self.splits.validate),
            "n_test": len(self.splits.test),
        }
