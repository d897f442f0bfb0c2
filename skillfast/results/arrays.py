"""Arrays of safetensors files: what each must be is declared, and checked by the header before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from skillfast import files
from skillfast.errors import DataError
from skillfast.results.records import Document, from_json, made, to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

H = TypeVar("H", bound=Document)

_KINDS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BOOL": "bool", "U8": "uint8", "U16": "uint16",
    "U32": "uint32", "U64": "uint64", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip
INTEGERS = ("int64", "int32", "int16", "int8", "uint32", "uint16", "uint8")


@dataclass(frozen=True)
class Array:
    """What an array of a file must be.

    Attributes:
        shape: Length of each dimension; a name stands for a length that arrays of the file share.
        kinds: Types that it may have.
        low: Smallest value; of numbers that may be NaN, of the others.
        high: Largest value.
        below: A length, or the name of one: all values are smaller.
        nan: Whether a value may be NaN, which means that it is not defined.
        infinite: Whether a value may be infinite.
        optional: Whether it may be left out.
    """

    shape: tuple[int | str, ...]
    kinds: tuple[str, ...] = ("float64",)
    low: float | None = None
    high: float | None = None
    below: int | str | None = None
    nan: bool = False
    infinite: bool = False
    optional: bool = False


def indices(*shape: int | str, below: int | str | None, optional: bool = False) -> Array:
    """An array of whole numbers from 0 to below a length, or to anything."""
    return Array(shape, INTEGERS, low=0, below=below, optional=optional)


def read(
    kind: type[H], path: Path, layout: Callable[[H], Mapping[str, Array]], remedy: str
) -> tuple[H, dict[str, np.ndarray]]:
    """Read a file that `write` wrote.

    Args:
        kind: Type of its header.
        path: The file.
        layout: What the arrays must be, by the header.
        remedy: What to do about a wrong file, for the error.

    Raises:
        DataError: A file that is missing, unreadable, broken, of another version, or with other keys, types, shapes or
            values than are declared.
    """
    with files.open_tensors(path, kind.schema_name(), remedy) as file:
        header = from_json(kind, file.header, str(path), remedy)
        wanted = layout(header)
        try:
            lengths = _fitted(wanted, file.kinds)
            arrays = {name: file.get(name) for name in file.kinds}
            for name, array in arrays.items():
                _check_values(name, array, wanted[name], lengths)
        except _Unfit as error:
            raise DataError(f"{path}: {error}; {remedy}") from error
    return header, arrays


def write(path: Path, header: H, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays with a header; raises DataError where the header is not as its type says."""
    files.write_arrays(path, arrays, to_json(made(type(header), header)))


class _Unfit(Exception):  # noqa: N818 (it is the middle of an error's line)
    """What was expected and what came."""


def _fitted(wanted: Mapping[str, Array], found: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    """Lengths by name; raises _Unfit where names, types or shapes are others."""
    if missing := [name for name, array in wanted.items() if name not in found and not array.optional]:
        raise _Unfit(f"expected the array {missing[0]}, got none named {missing[0]}")
    if more := sorted(set(found) - set(wanted)):
        raise _Unfit(f"expected arrays that are known, got {more[0]!r}")
    lengths: dict[str, int] = {}
    for name, array in wanted.items():
        if name not in found:
            continue
        kind, shape = _KINDS.get(found[name][0], found[name][0]), found[name][1]
        for length, size in zip(array.shape, shape, strict=False):
            if isinstance(length, str):
                lengths.setdefault(length, size)
        expected = tuple(lengths.get(length, length) if isinstance(length, str) else length for length in array.shape)
        if shape != expected or kind not in array.kinds:
            raise _Unfit(f"expected {name} of {' or '.join(array.kinds)} {_list(expected)}, got {kind} {_list(shape)}")
    return lengths


def _list(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _check_values(name: str, array: np.ndarray, wanted: Array, lengths: Mapping[str, int]) -> None:
    """Raises _Unfit where a value is out of range."""
    if not array.size:
        return
    floats = array.dtype.kind == "f"
    if floats and not wanted.nan and np.isnan(array).any():
        raise _Unfit(f"expected numbers in {name}, got NaN")
    if floats and not wanted.infinite and np.isinf(array).any():
        raise _Unfit(f"expected finite numbers in {name}, got infinity")
    if wanted.low is wanted.high is wanted.below is None or (floats and np.isnan(array).all()):
        return
    low, high = (np.nanmin(array), np.nanmax(array)) if floats else (array.min(), array.max())
    below = lengths[wanted.below] if isinstance(wanted.below, str) else wanted.below
    if wanted.low is not None and low < wanted.low:
        raise _Unfit(f"expected values of at least {wanted.low} in {name}, got {low}")
    if wanted.high is not None and high > wanted.high:
        raise _Unfit(f"expected values of at most {wanted.high} in {name}, got {high}")
    if below is not None and high >= below:
        raise _Unfit(f"expected values below {below} in {name}, got {high}")
