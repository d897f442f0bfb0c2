"""Batches as loaders give them, what models answer to them, and the names of their classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ArgumentError, ModelError
from skillfast.models.inputs import Inputs, call, described, mapped, mask_of, taken
from skillfast.transfer import fed, moved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

LABELS = ("labels", "label")
"""Keys of a batch's labels, as the transformers and datasets libraries name them."""
IGNORED = -100
"""Label of a token that has none, as in the transformers library; everything below 0 is."""


@dataclass(frozen=True)
class Batch:
    """Inputs and labels.

    Attributes:
        inputs: What the model is called with: a tensor [batch, ...], or its keyword arguments.
        labels: int64 [batch], class indices; or [batch, tokens], below 0 for tokens without one.
        host_mask: The `attention_mask` of inputs that were moved, where they came from; else None.
    """

    inputs: Inputs
    labels: torch.Tensor
    host_mask: torch.Tensor | None = None

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def mask(self) -> torch.Tensor | None:
        """True for real tokens [batch, tokens]: `attention_mask`, on the host if it came from there; None without."""
        return mask_of(self.inputs) if self.host_mask is None else self.host_mask

    @property
    def per_token(self) -> bool:
        """Whether each token has a label."""
        return self.labels.dim() == 2

    def inputs_to(self, device: torch.device) -> Batch:
        """The batch with its inputs on a device, and its labels and mask where they are."""
        return self.with_inputs(lambda x: moved(x, device))

    def with_inputs(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The batch with every tensor of its inputs changed, and its labels and mask where they are."""
        return Batch(mapped(self.inputs, change), self.labels, self.mask)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(mapped(self.inputs, lambda x: moved(x, device)), moved(self.labels, device))

    def split(self, size: int) -> Iterator[Batch]:
        """The examples in their order, `size` at a time."""
        return (self.taken(slice(start, start + size)) for start in range(0, len(self), size))

    def taken(self, rows: slice | torch.Tensor) -> Batch:
        """Some examples, by a slice or by int64 [n]."""
        mask = None if self.host_mask is None else self.host_mask[rows]
        return Batch(taken(self.inputs, rows), self.labels[rows], mask)

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """What the model answers: [batch, classes], or [batch, tokens, classes] where tokens have labels.

        Raises:
            ModelError: A model without logits, or with logits of another shape.
        """
        logits = logits_of(call(model, self.inputs), model)
        self.check_logits(logits, model)
        return logits

    def check_logits(self, logits: torch.Tensor, model: torch.nn.Module) -> None:
        """Raises ModelError for logits but [batch, classes], or with labels of tokens [batch, tokens, classes]."""
        if logits.shape[:-1] == self.labels.shape:
            return
        wanted, other = "[batch, classes]", "give it labels [batch, tokens]"
        if self.per_token:
            wanted, other = "[batch, tokens, classes]", "give it a label per example"
        raise ModelError(
            f"model: expected logits {wanted} for labels {list(self.labels.shape)}, got shape {list(logits.shape)} of "
            f"{type(model).__name__}; {other}, or pass forward= to trace"
        )

    def targets(self, model: torch.nn.Module) -> torch.Tensor:
        """The labels that the logits are to give, below 0 for none: of a causal model's tokens the next token's."""
        if not self.per_token or not predicts_next(model):
            return self.labels
        last = torch.full_like(self.labels[:, :1], IGNORED)
        return torch.cat([self.labels[:, 1:], last], 1)


def read_batch(batch: Any, key: str | None = None, *, tokens: bool = False) -> Batch:
    """A batch as people have it: (inputs, labels), or a mapping with labels and the model's arguments.

    Args:
        batch: (images, labels), (token ids, labels), a dict or transformers' `BatchEncoding`.
        key: Key of the labels in a mapping; None for `labels` or `label`.
        tokens: Whether labels may be those of tokens.

    Raises:
        ArgumentError: Anything else, or labels that are no class indices.
    """
    if isinstance(batch, Batch):
        found = batch
    elif isinstance(batch, Mapping):
        key = key if key is not None else next((key for key in LABELS if key in batch), None)
        if key is None or key not in batch:
            raise ArgumentError(
                f"batch: expected a mapping with {' or '.join(LABELS) if key is None else key}, got "
                f"{described(batch)}; pass label_key=, the key of its labels, or forward= to trace"
            )
        inputs = {name: value for name, value in batch.items() if name != key}
        found = Batch(inputs, _labels(batch[key]))
    elif isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], torch.Tensor | Mapping):
        found = Batch(dict(batch[0]) if isinstance(batch[0], Mapping) else batch[0], _labels(batch[1]))
    else:
        raise ArgumentError(
            f"batch: expected (images, labels) or a mapping with labels, got {described(batch)}; pass forward= to "
            "trace for anything else, or let the loader give such"
        )
    labels = found.labels
    if labels.is_floating_point() or labels.dim() not in ((1, 2) if tokens else (1,)):
        told = f"{described(labels)} in {described(batch)}" if isinstance(batch, Mapping) else described(labels)
        raise ArgumentError(
            f"labels: expected one class index per example{' or token' if tokens else ''}, got {told}; pass "
            "label_key= for another key, or metrics= and forward= to trace other values"
        )
    return found


def fed_batches(
    loader: Iterable[Any], device: torch.device, read: Callable[[Any], Batch] = read_batch
) -> Iterator[Batch]:
    """Batches of a loader with their inputs on a device and their labels on the host, where they are checked.

    Args:
        loader: Batches as people have them.
        device: Where the model takes its inputs; for a GPU they are read and copied ahead (`transfer.fed`).
        read: What reads and checks one.
    """
    return fed(loader, device, read, Batch.with_inputs)


def inputs_of(batch: Any, key: str | None = None) -> Inputs:
    """What the model is called with, of a batch with labels or without."""
    if isinstance(batch, Mapping) and not any(name in batch for name in (LABELS if key is None else (key,))):
        return dict(batch)
    return batch if isinstance(batch, torch.Tensor) else read_batch(batch, key, tokens=True).inputs


def _labels(values: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"labels: expected class indices, got {described(values)}; let the loader give a tensor of them"
        ) from error


def logits_of(output: Any, model: torch.nn.Module | None = None) -> torch.Tensor:
    """The logits in a model's output: a tensor, an object with `.logits` or a mapping with `logits`.

    Raises:
        ModelError: None of these.
    """
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor):
        got = described(output) if isinstance(output, Mapping) else type(output).__name__
        raise ModelError(
            f"{'model' if model is None else type(model).__name__}: expected logits or an output with .logits, got "
            f'{got}; trace what needs none with metrics={{"label": Categorical(classes)}}, or pass forward='
        )
    return logits


def predicts_next(model: torch.nn.Module) -> bool:
    """Whether the logits at a token are about the next one: a causal language model of the transformers library."""
    generates = getattr(model, "can_generate", None)
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return callable(generates) and bool(generates()) and not encodes


def predicts_words(model: torch.nn.Module) -> bool:
    """Whether the classes of a model of the transformers library are the words of its vocabulary."""
    embeddings = getattr(model, "get_output_embeddings", None)
    return callable(embeddings) and embeddings() is not None


def classes_of(loader: Iterable[Any], model: torch.nn.Module) -> list[str]:
    """Names of the classes.

    They are those of the loader's dataset (torchvision's `classes`, a label's names in the datasets library), or as
    many numbers as a timm model has outputs or a language model has words, or the names in a transformers model's
    configuration.

    Raises:
        ArgumentError: Nobody knows them.
    """
    dataset = getattr(loader, "dataset", None)
    names = getattr(dataset, "classes", None)
    features = getattr(dataset, "features", None)
    if names is None and isinstance(features, Mapping):
        names = next((getattr(features[key], "names", None) for key in LABELS if key in features), None)
    if names is not None:
        return [str(name) for name in names]
    config = getattr(model, "config", None)
    count = getattr(model, "num_classes", None)
    if count is None and predicts_words(model):
        count = getattr(config, "vocab_size", None)
    if isinstance(count, int) and count >= 2:
        return [str(i) for i in range(count)]
    named = getattr(config, "id2label", None)
    if isinstance(named, Mapping) and len(named) >= 2:
        return [str(named[i]) for i in sorted(named)]
    raise ArgumentError(
        f"classes: expected loader.dataset.classes, model.num_classes or model.config.id2label, got none of them from "
        f"{type(loader).__name__} and {type(model).__name__}; pass classes="
    )
