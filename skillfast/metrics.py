"""Auxiliary metrics: scalars per observation that neurons are correlated with."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Categorical:
    """A class per observation, as an index; one column of scores per class.

    Attributes:
        classes: Their names, or how many there are.
    """

    classes: tuple[str, ...]

    def __init__(self, classes: Sequence[str] | int) -> None:
        if hasattr(classes, "__index__"):  # numpy's integers, too
            classes = [str(i) for i in range(operator.index(classes))]
        names = tuple(map(str, classes))
        if len(names) < 2 or len(set(names)) != len(names):
            raise ArgumentError(f"Categorical classes: expected at least two different names, got {list(names)[:5]}")
        object.__setattr__(self, "classes", names)

    def columns(self, name: str) -> list[str]:
        """The names of this metric's columns."""
        return [f"{name}:{label}" for label in self.classes]

    def check(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Indices [n] as float64 [n]; raises ArgumentError on an index out of range."""
        index = values.double()
        whole = bool((torch.isfinite(index) & (index == index.floor())).all())
        if index.numel() and not (whole and int(index.min()) >= 0 and int(index.max()) < len(self.classes)):
            raise ArgumentError(
                f"metric {name!r}: expected class indices in [0, {len(self.classes)}), got {index.min():g} to "
                f"{index.max():g}"
            )
        return index

    def expand(self, values: torch.Tensor) -> torch.Tensor:
        """Checked values [n] as one-hot float64 [n, classes]."""
        return torch.nn.functional.one_hot(values.long(), len(self.classes)).double()


@dataclass(frozen=True)
class Binary:
    """True or false per observation (bool, or 0 and 1)."""

    def columns(self, name: str) -> list[str]:
        """The names of this metric's columns."""
        return [name]

    def check(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Values [n] as float64 [n]; raises ArgumentError on anything but 0 and 1."""
        checked = values.double()
        if not bool(((checked == 0) | (checked == 1)).all()):
            raise ArgumentError(f"metric {name!r}: expected 0 and 1, got other values; use Continuous() for them")
        return checked

    def expand(self, values: torch.Tensor) -> torch.Tensor:
        """Checked values [n] as a column [n, 1]."""
        return values[:, None]


@dataclass(frozen=True)
class Continuous:
    """A real number per observation."""

    def columns(self, name: str) -> list[str]:
        """The names of this metric's columns."""
        return [name]

    def check(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Values [n] as float64 [n]; raises ArgumentError on a value that is not finite."""
        checked = values.double()
        if not bool(torch.isfinite(checked).all()):
            raise ArgumentError(f"metric {name!r}: expected finite values, got NaN or infinity; leave such rows out")
        return checked

    def expand(self, values: torch.Tensor) -> torch.Tensor:
        """Checked values [n] as a column [n, 1]."""
        return values[:, None]


Metric = Categorical | Binary | Continuous
_TYPES = {"categorical": Categorical, "binary": Binary, "continuous": Continuous}


def to_json(metrics: Mapping[str, Metric]) -> dict[str, dict[str, Any]]:
    """The metrics as plain JSON values."""
    return {name: {"type": type(metric).__name__.lower(), **asdict(metric)} for name, metric in metrics.items()}


def from_json(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Metric]:
    """The inverse of `to_json`."""
    return {
        name: _TYPES[value["type"]](**{key: item for key, item in value.items() if key != "type"})
        for name, value in metrics.items()
    }


def classification(classes: Sequence[str] | int) -> dict[str, Metric]:
    """What `metrics="classification"` means: label, correct, confidence and loss."""
    return {"label": Categorical(classes), "correct": Binary(), "confidence": Continuous(), "loss": Continuous()}


def classification_values(logits: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
    """The values of those metrics for one batch.

    Args:
        logits: [n, classes].
        label: int64 [n].

    Returns:
        label, correct (top-1 equals the label), confidence (largest softmax probability) and loss (cross entropy in
        nats), each [n].
    """
    logits = logits.float()
    if label.shape != logits.shape[:1] or (
        len(label) and not 0 <= int(label.min()) <= int(label.max()) < logits.shape[1]
    ):
        raise ArgumentError(
            f"labels: expected {len(logits)} class indices in [0, {logits.shape[1]}), the model's outputs, got shape "
            f"{list(label.shape)}" + (f" from {int(label.min())} to {int(label.max())}" if label.numel() else "")
        )
    return {
        "label": label,
        "correct": logits.argmax(1) == label,
        "confidence": logits.softmax(1).amax(1),
        "loss": torch.nn.functional.cross_entropy(logits, label, reduction="none"),
    }
