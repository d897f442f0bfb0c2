"""Where the name of a language model leads: a folder, a name on the hub, a GGUF file, or an installed package."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillfast.errors import ModelError
from skillfast.models.embedded import package_of
from skillfast.vocabulary import EMBEDDED, HUGGINGFACE

if TYPE_CHECKING:
    from collections.abc import Callable

GGUF = ".gguf"
_READERS = ("gguf", "accelerate")  # what transformers reads such files with


@dataclass(frozen=True)
class Source:
    """What `from_pretrained` is asked for.

    Attributes:
        place: A folder or a name on the hub.
        gguf: The GGUF file there that holds configuration, tokenizer and weights; None where they are files of their
            own. Of a folder the whole path, since transformers looks into the working directory first.
    """

    place: str
    gguf: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine."""
        return Path(self.place).is_dir()

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` beside the place."""
        return {} if self.gguf is None else {"gguf_file": self.gguf}


def source_of(name: str, unpack: Callable[[Path, Path], None]) -> Source:
    """Find out where a model's name leads.

    Args:
        name: A name on the hub, a folder, or a GGUF file in either; with or without the prefix `hf:`. `embedded:` and
            a name: what an installed package brings.
        unpack: Function of a GGUF file that a package brings and of a folder for its model and tokenizer.

    Raises:
        ModelError: Nothing there, several GGUF files in a folder without a configuration, or libraries or packages that
            are not installed.
    """
    name = name.removeprefix(HUGGINGFACE)
    if name.startswith(EMBEDDED):
        return Source(str(package_of(name).folder(unpack)))
    path = Path(name)
    if path.is_dir():
        return _in_folder(name, path)
    local = name.startswith((".", "/", "~"))
    if is_gguf(name):
        if path.is_file():
            return _with_readers(name, str(path.parent), str(path.absolute()))
        if not local and name.count("/") > 1:
            owner, repository, file = name.split("/", 2)
            return _with_readers(name, f"{owner}/{repository}", file)
        raise ModelError(
            f"model '{HUGGINGFACE}{name}': expected a GGUF file, got no such file; check the path, or name one on the "
            f"hub as {HUGGINGFACE}OWNER/NAME/FILE{GGUF}"
        )
    if local or name.count("/") > 1:
        raise ModelError(
            f"model '{HUGGINGFACE}{name}': expected a folder or a name on the hub, got no such folder; check the path"
        )
    return Source(name)


def is_gguf(name: str) -> bool:
    """Whether a path is that of a GGUF file, by its ending."""
    return name.lower().endswith(GGUF)


def _in_folder(name: str, folder: Path) -> Source:
    """A folder with a configuration is opened as it is; one without, by its only GGUF file."""
    files = sorted(file for file in folder.iterdir() if is_gguf(file.name))
    if (folder / "config.json").is_file() or not files:
        return Source(name)
    if len(files) > 1:
        raise ModelError(
            f"model '{HUGGINGFACE}{name}': expected one GGUF file in a folder without config.json, got {len(files)} "
            f"({', '.join(file.name for file in files[:3])}); name one of them"
        )
    return _with_readers(name, name, str(files[0].absolute()))


def _with_readers(name: str, place: str, file: str) -> Source:
    missing = [library for library in _READERS if importlib.util.find_spec(library) is None]
    if missing:
        raise ModelError(
            f"model '{HUGGINGFACE}{name}': expected the libraries {' and '.join(_READERS)} for a GGUF file, got no "
            f"{missing[0]}; pip install {' '.join(missing)}"
        )
    return Source(place, file)
