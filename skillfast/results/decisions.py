"""`decisions.safetensors`: what a run decided on each test example, for comparing two runs on the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta

from skillfast import files
from skillfast.results import arrays
from skillfast.results.arrays import Array, indices
from skillfast.results.bench import REMEDY
from skillfast.results.records import Document

FILE = "decisions.safetensors"
_OPTIONAL = ("earlier", "in_earlier")  # arrays of a run like an earlier one


@dataclass(frozen=True)
class Decisions:
    """Decisions on the test examples, intact and without each skill.

    Attributes:
        classes: Class names.
        labels: int64 [n], the true class.
        digests: uint64 [n], of what the model reads of each example, padding left out.
        intact: int64 [n], the intact model's.
        removed: int64 [K, n], with class i's skill removed.
        log_probabilities: float16 [n, K], of the classes by the intact model.
        earlier: int64 [E, n], with each skill of an earlier run removed; None where none was given.
        earlier_classes: Classes of these skills.
        earlier_skills: Digest of these skills (`skills_digest`).
        in_earlier: int64 [K, n], of the earlier run's model, with each skill of this run removed; None where that was
            not measured.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    digests: np.ndarray
    intact: np.ndarray
    removed: np.ndarray
    log_probabilities: np.ndarray
    earlier: np.ndarray | None = None
    earlier_classes: tuple[str, ...] = ()
    earlier_skills: str | None = None
    in_earlier: np.ndarray | None = None

    def save(self, directory: str | Path) -> Path:
        """Write `decisions.safetensors` into the folder, class indices in as few bytes as hold them; its path."""
        path = files.output_folder(directory) / FILE
        small = np.min_scalar_type(len(self.classes) - 1)
        stored = {
            "labels": self.labels.astype(small),
            "digests": self.digests,
            "intact": self.intact.astype(small),
            "removed": self.removed.astype(small),
            "log_probabilities": self.log_probabilities,
        }
        for name in _OPTIONAL:
            if (decided := getattr(self, name)) is not None:
                stored[name] = decided.astype(small)
        arrays.write(path, _Header(list(self.classes), list(self.earlier_classes), self.earlier_skills), stored)
        return path

    @staticmethod
    def load(directory: str | Path) -> Decisions:
        """Read what `save` wrote; raises DataError where the file is missing, broken or of another version."""
        header, found = arrays.read(_Header, Path(directory) / FILE, _layout, REMEDY)
        wide = {name: found[name].astype(np.int64) for name in _DECIDED if name in found}
        return Decisions(
            classes=tuple(header.classes),
            earlier_classes=tuple(header.earlier_classes),
            earlier_skills=header.earlier_skills,
            **{**found, **wide},
        )


_DECIDED = ("labels", "intact", "removed", *_OPTIONAL)


class _Header(Document, frozen=True, tag="skillfast.decisions/1", tag_field="schema"):
    """The header of `decisions.safetensors`, attributes of `Decisions` of the same names."""

    classes: Annotated[list[str], Meta(min_length=2)]
    earlier_classes: list[str]
    earlier_skills: str | None

    def __post_init__(self) -> None:
        for name, values in (("classes", self.classes), ("earlier_classes", self.earlier_classes)):
            if len(set(values)) < len(values):
                raise ValueError(f"expected different {name}, got one twice")


def _layout(header: _Header) -> dict[str, Array]:
    k = len(header.classes)
    made = {
        "labels": indices("n", below=k),
        "digests": Array(("n",), ("uint64",)),
        "intact": indices("n", below=k),
        "removed": indices(k, "n", below=k),
        "log_probabilities": Array(("n", k), ("float16",), high=0, infinite=True),
    }
    made["in_earlier"] = indices(k, "n", below=k, optional=True)
    if header.earlier_classes:
        made["earlier"] = indices(len(header.earlier_classes), "n", below=k)
    return made
