"""What one batch gives under the intact model and every condition, and which observations it is of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast.errors import ArgumentError
from skillfast.metrics import margin
from skillfast.models.inputs import described

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skillfast.models.batches import Batch


@dataclass(frozen=True)
class Observed:
    """The observations of a batch: its examples, or those of its tokens that have a label.

    Attributes:
        labels: int64 [n].
        example: int64 [n] on the CPU, the example of each.
        labelled: bool [batch, tokens], which tokens; None: the examples.
    """

    labels: torch.Tensor
    example: torch.Tensor
    labelled: torch.Tensor | None

    @staticmethod
    def of(batch: Batch, logits: torch.Tensor, model: torch.nn.Module) -> Observed:
        """The observations whose logits these are, [batch, classes] or [batch, tokens, classes]."""
        batch.check_logits(logits, model)
        targets = batch.targets(model)
        if not batch.per_token:
            return Observed(targets, torch.arange(len(batch)), None)
        labelled = targets >= 0
        return Observed(targets[labelled], labelled.nonzero()[:, 0].cpu(), labelled)

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Their rows [..., n, D], of values [..., batch, D] or [..., batch, tokens, D]."""
        return values if self.labelled is None else values[..., self.labelled.to(values.device), :]


def embedding_of(batch: Batch, embedding: torch.Tensor | None, model: torch.nn.Module) -> torch.Tensor:
    """The classifier's input, a row per label; raises ArgumentError for a model without."""
    if embedding is not None and embedding.dim() == 1 + batch.labels.dim():
        return embedding
    got = "without one" if embedding is None else f"that reads {described(embedding)}"
    raise ArgumentError(
        f"embeddings: expected a model with a linear classifier of one row per label, got {type(model).__name__} "
        f"{got}; leave out keep_embeddings"
    )


@dataclass
class BatchResult:
    """One batch's outcome; row 0 of the first dimension is the intact model.

    Attributes:
        labels: [n].
        logits: float32 [n, classes], the intact model's, or None.
        second: [n], the intact model's second best class.
        predictions: [1 + conditions, n].
        margins: float32 [1 + conditions, n].
        embeddings: float32 [1 + conditions, n, E], or None.
        donors: [n], rows of the bank, or None.
        routes: int64 [1 + conditions], how many choices of experts the intact model makes, of each token in each block,
            then how many are others under each condition; zeros without routers.
    """

    labels: np.ndarray
    logits: np.ndarray | None
    second: np.ndarray
    predictions: np.ndarray
    margins: np.ndarray
    embeddings: np.ndarray | None
    donors: np.ndarray | None
    routes: np.ndarray

    @staticmethod
    def intact(
        observed: Observed,
        logits: torch.Tensor,
        embedding: torch.Tensor | None,
        conditions: int,
        *,
        keep_logits: bool,
        donors: torch.Tensor | None = None,
    ) -> BatchResult:
        """Every condition as the intact model, until `set` tells what it does."""
        labels, logits = observed.labels, observed.rows(logits)
        shape = (1 + conditions, len(labels))
        first, second = logits.topk(2, dim=1).indices.cpu().numpy().T
        kept = None if embedding is None else observed.rows(embedding).float().cpu().numpy()
        return BatchResult(
            labels=labels.cpu().numpy(),
            logits=logits.float().cpu().numpy() if keep_logits else None,
            second=second,
            predictions=np.broadcast_to(first, shape).copy(),
            margins=np.broadcast_to(margin(logits, labels).cpu().numpy(), shape).copy(),
            embeddings=None if kept is None else np.broadcast_to(kept, (*shape, kept.shape[-1])).copy(),
            donors=None if donors is None else donors[observed.example].numpy(),
            routes=np.zeros(1 + conditions, np.int64),
        )

    def set(
        self, observed: Observed, conditions: Sequence[int], logits: torch.Tensor, embeddings: torch.Tensor | None
    ) -> None:
        """What some conditions do.

        Args:
            observed: The observations.
            conditions: Positions of the conditions.
            logits: [len(conditions), batch, ..., classes].
            embeddings: [len(conditions), batch, ..., E], or None.
        """
        at, logits = [1 + i for i in conditions], observed.rows(logits)
        self.predictions[at] = logits.argmax(-1).cpu().numpy()
        self.margins[at] = margin(logits, observed.labels).cpu().numpy()
        if self.embeddings is not None and embeddings is not None:
            self.embeddings[at] = observed.rows(embeddings).float().cpu().numpy()

    @staticmethod
    def joined(parts: Sequence[BatchResult]) -> BatchResult:
        """The outcome of all parts, one after the other."""

        def cat(name: str, axis: int) -> Any:
            arrays = [getattr(part, name) for part in parts]
            return None if arrays[0] is None else np.concatenate(arrays, axis)

        axes = {"labels": 0, "logits": 0, "second": 0, "predictions": 1, "margins": 1, "embeddings": 1, "donors": 0}
        routes = np.sum([part.routes for part in parts], axis=0)
        return BatchResult(**{name: cat(name, axis) for name, axis in axes.items()}, routes=routes)
