"""Sizes in a language model's configuration: what no model has, or its weights cannot fill, is refused unmade."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.nn.modules.module import register_module_parameter_registration_hook

from skillfast.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn

# numbers of parts: a configuration makes lists of such lengths, before any weights are looked at
_COUNTS = ((re.compile("layer|expert|depth|num_blocks"), 10_000), (re.compile("num_labels"), 1_000_000))
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_BESIDE = 10_000_000  # parameters that may not be in the files: a new head, positions that are computed


def check_counts(name: str, values: object) -> None:
    """Refuse a configuration of more layers, experts or labels than any model has, or of less than none.

    Args:
        name: The model's name, for the error.
        values: Content of `config.json`.

    Raises:
        ModelError: A number that is too large or negative, with its name.
    """
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        check_counts(name, value)
        numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
        most = next((most for names, most in _COUNTS if names.search(key)), None)
        if most is None or not numbers:
            continue
        if max(numbers) > most:
            expected, got = f"at most {most:,}", max(numbers)
        elif min(numbers) < 0 and re.match("n_|num_", key):  # others may count layers from the last
            expected, got = "at least 0", min(numbers)
        else:
            continue
        raise ModelError(f"model '{name}': expected {expected} as {key}, got {str(got)[:40]}; check its config.json")


@contextmanager
def no_more_than(name: str, weights: Path, *, packed: bool) -> Iterator[None]:
    """Refuse a model of more parameters than files of weights can hold, while it is made.

    Args:
        name: The model's name, for the error.
        weights: A file of weights, or a folder of such.
        packed: Whether several weights may share a byte, as in quantised models; else each has a byte at least.

    Raises:
        ModelError: More parameters are made than that.
    """
    files = [weights] if weights.is_file() else [file for file in weights.iterdir() if file.suffix in _WEIGHTS]
    held = sum(file.stat().st_size for file in files)
    most, found = _BESIDE + held * (8 if packed else 2), 0

    def count(_module: nn.Module, _key: str, parameter: nn.Parameter | None) -> None:
        nonlocal found
        found += 0 if parameter is None else parameter.numel()
        if found > most:
            raise ModelError(
                f"model '{name}': expected a configuration of the model of its {held:,} bytes of weights, got one of "
                f"more than {most:,} parameters; check its config.json"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
