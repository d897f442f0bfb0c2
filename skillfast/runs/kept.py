"""How a stage's result is written into a folder of its own, and read again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from skillfast import files
from skillfast.models.loading import load_trained, save_trained

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

WEIGHTS, MODEL = "model.safetensors", "model"  # of timm's models, and the folder of a language model
SCHEMA = "skillfast.unfinished/1"
REMEDY = "run again with --no-resume"
_VALUE = "value.json"

T = TypeVar("T")


class _Saved(Protocol):
    def save(self, directory: str | Path) -> Path: ...


S = TypeVar("S", bound=_Saved)


@dataclass(frozen=True)
class Kept(Generic[T]):
    """How a result is written into a folder of its own, and read again.

    Attributes:
        save: Writes the result into the folder.
        load: Reads it; raises DataError where it is not whole.
    """

    save: Callable[[T, Path], object]
    load: Callable[[Path], T]

    @staticmethod
    def by(load: Callable[[Path], S]) -> Kept[S]:
        """For a class with `save(directory)` and this `load(directory)`."""
        return Kept(lambda value, folder: value.save(folder), load)

    @staticmethod
    def optional(load: Callable[[Path], S]) -> Kept[S | None]:
        """For a class with `save(directory)` and this `load(directory)`, or None, which leaves its folder empty."""
        return Kept(
            lambda value, folder: value and value.save(folder),
            lambda folder: load(folder) if any(folder.iterdir()) else None,
        )


JSON: Kept[Any] = Kept(
    lambda value, folder: files.write_json(folder / _VALUE, {"schema": SCHEMA, "value": value}),
    lambda folder: files.read_json(folder / _VALUE, SCHEMA, REMEDY)["value"],
)
"""For a value that JSON holds."""


def weights_of(model: torch.nn.Module) -> Kept[dict[str, Any]]:
    """For a training, whose result says how the model was trained; its weights lie beside it and are loaded back."""
    return Kept(
        lambda trained, folder: save_trained(model, trained, folder / WEIGHTS),
        lambda folder: load_trained(model, folder / WEIGHTS),
    )
