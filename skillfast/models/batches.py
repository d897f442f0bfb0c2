"""Batches as loaders give them, what models answer to them, and the names of their classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ArgumentError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LABELS = ("labels", "label")
"""Keys of a batch's labels, as the transformers and datasets libraries name them."""
MASK = "attention_mask"


@dataclass(frozen=True)
class Batch:
    """Inputs and labels.

    Attributes:
        inputs: What the model is called with: a tensor [batch, ...], or its keyword arguments.
        labels: int64 [batch], class indices.
    """

    inputs: torch.Tensor | dict[str, Any]
    labels: torch.Tensor

    @property
    def mask(self) -> torch.Tensor | None:
        """True for real tokens [batch, tokens]: the inputs' `attention_mask`; None without one."""
        found = self.inputs.get(MASK) if isinstance(self.inputs, dict) else None
        return found if isinstance(found, torch.Tensor) and found.dim() == 2 else None

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The batch with every tensor of its inputs changed."""
        return Batch(_mapped(self.inputs, change), self.labels)

    def inputs_to(self, device: torch.device) -> Batch:
        """The batch with its inputs on a device, and its labels where they are."""
        return self.changed(lambda x: x.to(device, non_blocking=True))

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(self.inputs_to(device).inputs, self.labels.to(device, non_blocking=True))

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """What the model answers: [batch, classes].

        Raises:
            ModelError: A model without logits, or with logits of tokens.
        """
        inputs = self.inputs
        logits = logits_of(model(**inputs) if isinstance(inputs, dict) else model(inputs))
        if logits.dim() != 2:
            raise ModelError(
                f"model: expected logits [batch, classes], got shape {list(logits.shape)} of {type(model).__name__}; "
                "pass forward= for a model that answers for every token"
            )
        return logits


def read_batch(batch: Any) -> Batch:
    """A batch as people have it: (inputs, labels), or a mapping with `labels` or `label` and the model's arguments.

    Args:
        batch: (images, labels), (token ids, labels), a dict or transformers' `BatchEncoding`.

    Raises:
        ArgumentError: Anything else, or labels that are not one class index per example.
    """
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Mapping):
        key = next((key for key in LABELS if key in batch), None)
        if key is None:
            raise ArgumentError(
                f"batch: expected a mapping with {' or '.join(LABELS)}, got {described(batch)}; rename its labels, or "
                "pass forward="
            )
        inputs: Any = {name: value for name, value in batch.items() if name != key}
        labels = torch.as_tensor(batch[key])
    elif isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], torch.Tensor | Mapping):
        inputs = dict(batch[0]) if isinstance(batch[0], Mapping) else batch[0]
        labels = torch.as_tensor(batch[1])
    else:
        raise ArgumentError(
            f"batch: expected (images, labels) or a mapping with labels, got {described(batch)}; pass forward= for "
            "anything else"
        )
    if labels.dim() != 1 or labels.is_floating_point():
        raise ArgumentError(
            f"labels: expected one class index per example, got {described(labels)}; pass metrics= and forward= for "
            "other metrics"
        )
    return Batch(inputs, labels)


def labelled_batch(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch as one tensor and labels; raises ArgumentError where it is something else, a mapping for instance."""
    found = read_batch(batch)
    if not isinstance(found.inputs, torch.Tensor):
        raise ArgumentError(
            f"batch: expected (inputs, labels) of one tensor each, got {described(batch)}; wrap the model so that it "
            "takes one tensor"
        )
    return found.inputs, found.labels


def logits_of(output: Any) -> torch.Tensor:
    """The logits in a model's output: a tensor, an object with `.logits` or a mapping with `logits`.

    Raises:
        ModelError: None of these.
    """
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor):
        raise ModelError(f"model: expected logits or an output with .logits, got {type(output).__name__}; wrap it")
    return logits


def described(value: Any) -> str:
    """A batch in a few words: its keys and shapes."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {described(part)}" for key, part in value.items()) + "}"
    if isinstance(value, tuple | list):
        return f"{len(value)} parts"
    return type(value).__name__


def classes_of(loader: Iterable[Any], model: torch.nn.Module) -> list[str]:
    """Names of the classes.

    They are those of the loader's dataset (torchvision's `classes`, a label's names in the datasets library), or as
    many numbers as a timm model has outputs, or the names in a transformers model's configuration.

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
    count = getattr(model, "num_classes", None)
    if isinstance(count, int) and count >= 2:
        return [str(i) for i in range(count)]
    named = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(named, Mapping) and len(named) >= 2:
        return [str(named[i]) for i in sorted(named)]
    raise ArgumentError(
        f"classes: expected loader.dataset.classes, model.num_classes or model.config.id2label, got none of them from "
        f"{type(loader).__name__} and {type(model).__name__}; pass classes="
    )


def _mapped(inputs: Any, change: Any) -> Any:
    if isinstance(inputs, dict):
        return {name: _mapped(value, change) for name, value in inputs.items()}
    return change(inputs) if isinstance(inputs, torch.Tensor) else inputs
