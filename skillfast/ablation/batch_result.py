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
        """The rows [..., n, D] that are wanted, of values [..., batch, D] or [..., batch, tokens, D]."""
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


@dataclass(frozen=True)
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
    def joined(parts: Sequence[BatchResult]) -> BatchResult:
        """The outcome of all parts, one after the other."""

        def cat(name: str, axis: int) -> Any:
            arrays = [getattr(part, name) for part in parts]
            return None if arrays[0] is None else np.concatenate(arrays, axis)

        axes = {"labels": 0, "logits": 0, "second": 0, "predictions": 1, "margins": 1, "embeddings": 1, "donors": 0}
        routes = np.sum([part.routes for part in parts], axis=0)
        return BatchResult(**{name: cat(name, axis) for name, axis in axes.items()}, routes=routes)


class BatchRecorder:
    """One batch's outcome as it comes, on the device; the host waits for it once, in `result`.

    Every condition is as the intact model until `set` tells what it does.

    Args:
        observed: The observations.
        logits: The intact model's, [batch, ..., classes].
        embedding: The intact model's, [batch, ..., E], or None to keep none.
        conditions: How many conditions there are.
        keep_logits: Whether to keep the intact model's logits.
        donors: int64 [batch], rows of the bank, or None.
        routed: How many choices of experts the intact model made.
    """

    def __init__(
        self,
        observed: Observed,
        logits: torch.Tensor,
        embedding: torch.Tensor | None,
        conditions: int,
        *,
        keep_logits: bool,
        donors: torch.Tensor | None = None,
        routed: int = 0,
    ) -> None:
        self.observed = observed
        self.n_conditions = conditions
        self.keep_logits = keep_logits
        self.donors = donors
        self.routed = routed
        self.logits = observed.rows(logits)
        self.embedding = None if embedding is None else observed.rows(embedding).float()
        self.told: list[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self.rerouted: list[tuple[list[int], torch.Tensor]] = []

    def set(
        self,
        conditions: Sequence[int],
        logits: torch.Tensor,
        embeddings: torch.Tensor | None,
        rerouted: torch.Tensor | None = None,
    ) -> None:
        """What some conditions do.

        Args:
            conditions: Positions of the conditions.
            logits: [len(conditions), batch, ..., classes].
            embeddings: [len(conditions), batch, ..., E], or None.
            rerouted: int64 [len(conditions)], tokens that experts were chosen for otherwise, or None.
        """
        at = [1 + i for i in conditions]
        if rerouted is not None:
            self.rerouted.append((at, rerouted))
        rows = self.observed.rows(logits)
        kept = None
        if embeddings is not None and self.embedding is not None:
            kept = self.observed.rows(embeddings).float().contiguous()  # a view would keep all tokens of the stack
        self.told.append((at, rows.argmax(-1), margin(rows, self.observed.labels), kept))

    def result(self) -> BatchResult:
        """The outcome on the host."""
        labels = self.observed.labels
        shape = (1 + self.n_conditions, len(labels))
        first, second = self.logits.topk(2, dim=1).indices.cpu().numpy().T
        predictions = np.broadcast_to(first, shape).copy()
        margins = np.broadcast_to(margin(self.logits, labels).cpu().numpy(), shape).copy()
        embeddings = None
        if self.embedding is not None:
            embeddings = np.broadcast_to(self.embedding.cpu().numpy(), (*shape, self.embedding.shape[-1])).copy()
        if self.told:
            at = [row for rows, *_ in self.told for row in rows]
            predictions[at] = torch.cat([part for _, part, *_ in self.told]).cpu().numpy()
            margins[at] = torch.cat([part for _, _, part, _ in self.told]).cpu().numpy()
        for rows, *_, kept in self.told:
            if embeddings is not None and kept is not None:
                embeddings[rows] = kept.cpu().numpy()
        routes = np.zeros(shape[0], np.int64)
        routes[0] = self.routed
        for rows, count in self.rerouted:
            routes[rows] = count.cpu().numpy()
        return BatchResult(
            labels=labels.cpu().numpy(),
            logits=self.logits.float().cpu().numpy() if self.keep_logits else None,
            second=second,
            predictions=predictions,
            margins=margins,
            embeddings=embeddings,
            donors=None if self.donors is None else self.donors[self.observed.example].numpy(),
            routes=routes,
        )
