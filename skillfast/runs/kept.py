"""How a stage's result is written into a folder of its own, and read again."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from skillfast.models.loading import load_trained, save_trained
from skillfast.results import records
from skillfast.results.records import Document

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

WEIGHTS, MODEL = "model.safetensors", "model"  # of timm's models, and the folder of a language model
PROMPT = "soft_prompt"  # the folder of a prompt, as peft keeps it
REMEDY = "run again with --no-resume"
_VALUE = "value.json"
_BLOCK = 1 << 20  # bytes of a file that are in memory at once

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


class _Value(Document, frozen=True, tag="skillfast.unfinished/1", tag_field="schema"):
    """A value, and the CRC-32 of its JSON: nothing else tells whether it is still what a stage gave."""

    value: Any
    crc32: int

    def __post_init__(self) -> None:
        if self.crc32 != _checksum(self.value):
            raise ValueError("expected the value as it was written at value, got another")


def _checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _save_value(value: Any, folder: Path) -> None:
    read_again = json.loads(json.dumps(value))  # tuples are lists, keys are text
    records.write(_Value(read_again, _checksum(read_again)), folder / _VALUE)


def files_digest(folder: Path) -> str:
    """SHA-256 of a folder's files but for a value's: of each its name and a line feed, then its bytes."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _VALUE):
        digest.update(f"{path.relative_to(folder)}\n".encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


JSON: Kept[Any] = Kept(_save_value, lambda folder: records.read(_Value, folder / _VALUE, REMEDY).value)
"""For a value that JSON holds."""


def weights_of(model: torch.nn.Module) -> Kept[dict[str, Any]]:
    """For a training, whose result says how the model was trained; its weights lie beside it and are loaded back."""
    return Kept(
        lambda trained, folder: save_trained(model, trained, folder / WEIGHTS),
        lambda folder: load_trained(model, folder / WEIGHTS),
    )
