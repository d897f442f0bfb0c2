"""What an unfinished run keeps of its stages' results, so that the same command goes on from there."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

from msgspec import Meta

from skillfast.errors import DataError
from skillfast.results import records
from skillfast.results.records import Count, Document
from skillfast.runs.kept import MODEL, PROMPT, REMEDY, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from skillfast.runs.kept import Kept

FOLDER = ".unfinished"
TRAIN = "train"  # the stage whose weights a finished run leaves
_RUN, _COST, _RESULT = "run.json", "cost.json", "result"

T = TypeVar("T")


class _Run(Document, frozen=True, tag="skillfast.unfinished/1", tag_field="schema"):
    """Which run left the folder."""

    identity: dict[str, Any]


class _Cost(Document, frozen=True, tag="skillfast.unfinished/1", tag_field="schema"):
    """What a stage took, as `Found` says."""

    seconds: Annotated[float, Meta(ge=0)]
    peaks: dict[str, Count]


@dataclass(frozen=True)
class Found(Generic[T]):
    """A result that an interrupted run left.

    Attributes:
        value: The result.
        seconds: What it took.
        peaks: Peak memory of the process that made it, in bytes by kind.
    """

    value: T
    seconds: float
    peaks: dict[str, int]


class Checkpoints:
    """Results of a run's stages in `.unfinished/` of its output folder, each in a folder of its own.

    Args:
        directory: The run's output folder; it exists.
        identity: Everything that the results depend on, as JSON by name; results of a run with another are removed.
        resume: Use what an interrupted run left.
        say: Called with each line worth reading.
    """

    def __init__(
        self,
        directory: Path,
        identity: Mapping[str, Any],
        *,
        resume: bool = True,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.directory = directory
        self.folder = directory / FOLDER
        self.say = say
        ours = json.loads(json.dumps(identity))  # as it will be read
        if not (resume and self._left_by(ours)):
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        records.write(_Run(ours), self.folder / _RUN)

    def _left_by(self, ours: dict[str, Any]) -> bool:
        """Whether the folder holds results of a run with this identity."""
        path = self.folder / _RUN
        if not path.exists():
            return False
        try:
            theirs = records.read(_Run, path, REMEDY).identity
        except DataError as error:
            self.say(f"the unfinished run in {self.directory} is begun anew: {error}")
            return False
        names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
        if names:
            self.say(f"the unfinished run in {self.directory} had another {', '.join(names)}: starting anew")
        return not names

    def load(self, name: str, kept: Kept[T]) -> Found[T] | None:
        """The result of that name; None where there is none, or none that is whole."""
        folder = self._folder(name)
        if not folder.is_dir():
            return None
        try:
            value = kept.load(folder / _RESULT)
            cost = records.read(_Cost, folder / _COST, REMEDY)
        except DataError as error:
            self.say(f"stage {name} is made anew: {error}")
            shutil.rmtree(folder)
            return None
        return Found(value, cost.seconds, cost.peaks)

    def save(self, name: str, value: T, kept: Kept[T], seconds: float, peaks: Mapping[str, int | None]) -> bool:
        """Keep a result under its name, whole or not at all; whether it is kept."""
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix="."))
        try:
            (temporary / _RESULT).mkdir()
            kept.save(value, temporary / _RESULT)
            known = {kind: peak for kind, peak in peaks.items() if peak is not None}
            records.write(_Cost(seconds, known), temporary / _COST)
            temporary.rename(self._folder(name))
        except OSError as error:  # a full disk costs the way back, not the run
            shutil.rmtree(temporary, ignore_errors=True)
            self.say(
                f"warning: stage {name} cannot be kept ({error.strerror or error}): an interrupted run will repeat it"
            )
            return False
        return True

    def end(self) -> None:
        """Move a trained model or prompt into the run's folder, and remove everything else that is kept."""
        for name in (WEIGHTS, MODEL, PROMPT):
            if (trained := self._folder(TRAIN) / _RESULT / name).exists():
                shutil.rmtree(self.directory / name, ignore_errors=True)  # a folder cannot be replaced
                trained.replace(self.directory / name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _folder(self, name: str) -> Path:
        return self.folder / "".join(letter if letter.isalnum() else "-" for letter in name)
