"""Phases of a run: each one's result is kept until the run is done, so that an interrupted run goes on from there."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch

from skillfast import files
from skillfast.errors import DataError
from skillfast.memory.usage import peak_memory
from skillfast.models.loading import load_trained, save_trained

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from skillfast.data.splits import LabelledDataset, Splits
    from skillfast.runs.cost import Clock

FOLDER = ".unfinished"
WEIGHTS, MODEL = "model.safetensors", "model"  # of timm's models, and the folder of a language model
SCHEMA = "skillfast.unfinished/1"
_RUN, _VALUE, _COST = "run.json", "value.json", "cost.json"
_REMEDY = "run again with --no-resume"
_SAMPLED = 1024  # values of a tensor that its digest is made of
_LOOKED_AT = 32  # examples of a data set's part, likewise

T = TypeVar("T")


class _Saved(Protocol):
    def save(self, directory: str | Path) -> Path: ...


S = TypeVar("S", bound=_Saved)


@dataclass(frozen=True)
class Kept(Generic[T]):
    """How a phase's result is written into a folder of its own and read again."""

    save: Callable[[T, Path], object]
    load: Callable[[Path], T]

    @staticmethod
    def by(load: Callable[[Path], S]) -> Kept[S]:
        """A result of a class with `save(directory)`, read by this `load(directory)`."""
        return Kept(lambda value, folder: value.save(folder), load)

    @staticmethod
    def optional(load: Callable[[Path], S]) -> Kept[S | None]:
        """A result of a class with `save(directory)`, or None, which leaves its folder empty."""
        return Kept(
            lambda value, folder: value and value.save(folder),
            lambda folder: load(folder) if any(path.name != _COST for path in folder.iterdir()) else None,
        )


def weights_of(model: torch.nn.Module) -> Kept[dict[str, Any]]:
    """A training's result: how the model was trained; its weights are kept beside it and loaded into the model."""
    return Kept(
        lambda trained, folder: save_trained(model, trained, folder / WEIGHTS),
        lambda folder: load_trained(model, folder / WEIGHTS),
    )


JSON: Kept[Any] = Kept(
    lambda value, folder: files.write_json(folder / _VALUE, {"schema": SCHEMA, "value": value}),
    lambda folder: files.read_json(folder / _VALUE, SCHEMA, _REMEDY)["value"],
)


class Phases:
    """The phases of one run and what each left in `.unfinished/` of the output folder.

    Args:
        directory: The run's output folder.
        settings: Everything that the results depend on, as JSON; what other settings left there is thrown away.
        clock: Gets each phase's seconds, those of an earlier process too.
        resume: Use what an interrupted run left.
        say: Called with each line worth reading.

    Attributes:
        resumed: The phases that were not run again.
        kept: All phases that will not be run again.
        earlier: Seconds that they took.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        clock: Clock,
        *,
        resume: bool = True,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder = directory / FOLDER
        self.clock = clock
        self.say = say
        self.resumed: list[str] = []
        self.kept: list[str] = []
        self.earlier = 0.0
        self._peaks: dict[str, int] = {}
        self._run = {"settings": json.loads(json.dumps(settings)), "digests": {}}  # as it will be read
        if self.folder.exists():
            self._run["digests"] = self._continued() if resume else None
        if self._run["digests"] is None:
            self._start_anew()
        self._write()

    def __enter__(self) -> Phases:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.kept:
            self.say(f"stopped after phase {self.kept[-1]}: the same command goes on from there")

    def _continued(self) -> dict[str, str] | None:
        """The digests of an unfinished run of the same settings; None where there is none."""
        try:
            found = files.read_json(self.folder / _RUN, SCHEMA, _REMEDY)
        except DataError:
            return None
        theirs, ours = found.get("settings", {}), self._run["settings"]
        names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
        if names:
            self.say(f"the unfinished run in {self.folder.parent} had another {', '.join(names)}: starting anew")
        return None if names else found.get("digests", {})

    def _start_anew(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._run["digests"] = {}
        self.resumed.clear()
        self.kept.clear()

    def _write(self) -> None:
        self.folder.mkdir(exist_ok=True)
        files.write_json(self.folder / _RUN, {"schema": SCHEMA, **self._run})

    def check(self, what: str, digest: str) -> None:
        """Throw away what is kept where an unfinished run had other data or weights than this one."""
        if self._run["digests"].setdefault(what, digest) != digest:
            self.say(f"the unfinished run in {self.folder.parent} had other {what}: starting anew")
            self._start_anew()
            self._run["digests"][what] = digest
        self._write()

    def run(self, name: str, make: Callable[[], T], kept: Kept[T], *, part: str = "") -> T:
        """A phase's result: what an interrupted run left of it, or made now and kept.

        Args:
            name: The phase, as in `cost.seconds`.
            make: Makes the result.
            kept: How it is kept.
            part: Which of several results of the phase this is.
        """
        what = f"{name}: {part}" if part else name
        folder = self.folder / "".join(letter if letter.isalnum() else "-" for letter in what)
        if folder.is_dir():
            try:
                value = kept.load(folder)
                cost = files.read_json(folder / _COST, SCHEMA, _REMEDY)
            except DataError as error:
                self.say(f"phase {what} is made anew: {error}")
                shutil.rmtree(folder)
            else:
                self.resumed.append(what)
                self.kept.append(what)
                self.earlier += cost["seconds"]
                self.clock.seconds[name] = self.clock.seconds.get(name, 0.0) + cost["seconds"]
                self._peaks = {key: max(peak, self._peaks.get(key, 0)) for key, peak in cost["peaks"].items()}
                return value
        before = self.clock.seconds.get(name, 0.0)
        with self.clock.phase(name):
            value = make()
        if self._keep(value, kept, folder, self.clock.seconds[name] - before):
            self.kept.append(what)
        return value

    def _keep(self, value: T, kept: Kept[T], folder: Path, seconds: float) -> bool:
        """Write a result beside its final name, then rename it, so that what is there is whole; whether it is there."""
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix="."))
        try:
            kept.save(value, temporary)
            cost = {"seconds": seconds, "peaks": {k: v for k, v in peak_memory().items() if v is not None}}
            files.write_json(temporary / _COST, {"schema": SCHEMA, **cost})
            temporary.rename(folder)
            return True
        except OSError as error:  # a full disk costs the way back, not the run
            shutil.rmtree(temporary, ignore_errors=True)
            self.say(
                f"warning: phase {folder.name} cannot be kept ({error.strerror or error}): an interrupted run will "
                "repeat it"
            )
            return False

    def peak_memory(self) -> dict[str, int | None]:
        """The largest peaks of the processes that the phases ran in."""
        return {
            key: None if peak is None else max(peak, self._peaks.get(key, 0)) for key, peak in peak_memory().items()
        }

    def end(self, directory: Path) -> None:
        """Move a trained model into the run's folder, and remove everything else that is kept."""
        for name in (WEIGHTS, MODEL):
            if (trained := self.folder / "train" / name).exists():
                shutil.rmtree(directory / name, ignore_errors=True)  # a folder cannot be replaced
                trained.replace(directory / name)
        shutil.rmtree(self.folder, ignore_errors=True)


def run_training(
    model: torch.nn.Module,
    splits: Splits,
    train: Callable[[], dict[str, Any]],
    mode: str,
    clock: Clock,
    phases: Phases | None,
    kept: Kept[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train, or take the weights that an unfinished run left; says how they came about."""
    if phases is None:
        with clock.phase("train"):
            return train()
    phases.check("data", data_digest({part: getattr(splits, part) for part in ("select", "validate", "test")}))
    phases.check("weights", weights_digest(model))
    if mode == "none":  # nothing to keep
        with clock.phase("train"):
            return train()
    return phases.run("train", train, kept or weights_of(model))


def weights_digest(model: torch.nn.Module) -> str:
    """Tells a model's weights from others: of some values of every tensor, spread over it."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if tensor.is_meta:  # offloaded: nothing to look at
            continue
        flat = tensor.detach().flatten()
        digest.update(flat[:: max(1, flat.numel() // _SAMPLED)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def data_digest(parts: Mapping[str, LabelledDataset]) -> str:
    """Tells data from other data: of all labels, and of some examples of every part."""
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(f"{name} {part.classes}".encode())
        digest.update(part.labels.numpy().tobytes())
        for index in range(0, len(part), max(1, len(part) // _LOOKED_AT)):
            example = part[index]
            image = example[0] if isinstance(example, tuple) else example
            digest.update(image.numpy().tobytes() if isinstance(image, torch.Tensor) else repr(image).encode())
    return digest.hexdigest()
