"""Result files: safetensors for arrays, JSON for the rest, each under its final name only when it is whole."""

from __future__ import annotations

import json
import math
import os
import tempfile
import zlib
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillfast.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy as np


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends well, and is removed when it does not."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~umask())  # mkstemp's 0600 would hide the result from everyone else
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def umask() -> int:
    """The process's mask of permissions, which only setting it tells."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def output_folder(directory: str | Path) -> Path:
    """The folder, made if it is missing; raises ArgumentError where nothing can be written in it."""
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ArgumentError(
            f"output folder {str(path)!r}: expected one that can be written, got {error.strerror or error}; "
            "choose another with --output"
        ) from error
    return path


def cache_dir() -> Path:
    """Find the folder for default models, trained or unpacked: `$SKILLFAST_CACHE`, or the user's cache folder."""
    if folder := os.environ.get("SKILLFAST_CACHE"):
        return Path(folder)
    import platformdirs

    return Path(platformdirs.user_cache_dir("skillfast"))


def check_output(directory: str | Path) -> None:
    """Raises ArgumentError where a file stands in the way of an output folder; makes nothing."""
    path = Path(directory)
    there = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not there.is_dir():
        raise ArgumentError(
            f"output folder {str(path)!r}: expected one that can be written, got the file {str(there)!r}; "
            "choose another with --output"
        )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file; NaN and infinity are refused, they are not JSON."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, schema: str, remedy: str) -> dict[str, Any]:
    """Read a JSON file that carries this schema name; raises DataError in one line where it is not that."""
    value = read_any_json(path, remedy)
    check_schema(str(path), value.get("schema") if isinstance(value, dict) else type(value).__name__, schema, remedy)
    return value


def read_any_json(path: Path, remedy: str) -> Any:
    """Read a JSON file, whatever it says; raises DataError in one line where it is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable(path, error, remedy) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected JSON, got bytes that are not UTF-8; {remedy}") from error
    return _parsed(text, path, remedy)


def _parsed(text: str, path: Path, remedy: str) -> Any:
    """What JSON says; raises DataError where it is none, or says what no result file holds."""
    try:
        # Python writes NaN, which is not JSON: read as not defined, like null
        value = json.loads(text, parse_constant=lambda _: None, parse_float=_number, parse_int=_integer)
        if "\\ud" in text.lower():  # half a character, which nothing can be written with
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise DataError(f"{path}: expected JSON, got brackets that are nested too deeply; {remedy}") from error
    except ValueError as error:
        raise DataError(f"{path}: expected JSON, got {error}; {remedy}") from error
    return value


def _number(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {short(text)}, which float64 cannot hold")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= (value := int(text)) < 1 << 63:
        raise ValueError(f"the number {short(text)}, which int64 cannot hold")
    return value


def short(text: str, most: int = 40) -> str:
    """A text in one line, cut off where it is longer, for messages."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def check_schema(what: str, found: object, schema: str, remedy: str) -> None:
    """Raises DataError where a file is of another schema or another version of it."""
    if found == schema:
        return
    (name, version), (other, theirs) = schema.rsplit("/", 1), str(found).rpartition("/")[::2]
    newer = other == name and theirs.isascii() and theirs.isdigit() and len(theirs) < 10 and int(theirs) > int(version)
    mended = "read it with the newer version of skillfast" if newer else f"{remedy} with this version of skillfast"
    raise DataError(f"{what}: expected schema {schema!r}, got {short(repr(found), 80)}; {mended}")


def _unreadable(path: Path, error: OSError, remedy: str) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: expected a file, got none; {remedy}")
    return DataError(f"{path}: expected a readable file, got {error.strerror or error}; check it and its folder")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Write a safetensors file; in its metadata are a JSON header and checksums of the arrays."""
    from safetensors.numpy import save_file

    sums = {name: checksum(array) for name, array in arrays.items()}
    with replacing(path) as temporary:
        in_order = {name: value.copy("C") for name, value in arrays.items()}  # safetensors writes memory as it lies
        save_file(in_order, temporary, metadata=metadata(header, sums))


def write_nested(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts of tensors and JSON values as one safetensors file; the JSON is in its metadata."""
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}

    def split(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: split(item, f"{name}/{key}" if name else key) for key, item in value.items()}
        if hasattr(value, "data_ptr"):
            tensors[name] = value.contiguous().cpu()
            return {"tensor": name}
        return value

    header = split(dict(state), "")
    sums = {name: checksum(tensor) for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata(header, sums))


def metadata(header: Mapping[str, Any], sums: Mapping[str, int]) -> dict[str, str]:
    """What goes into a safetensors file beside its tensors, for `open_tensors`.

    Args:
        header: Values of JSON, with the schema.
        sums: `checksum` of each tensor, by name.
    """
    # one key: safetensors writes several in an order that differs between runs
    return {"skillfast": json.dumps({**header, "crc32": sums}, allow_nan=False)}


def checksum(array: Any) -> int:
    """CRC-32 of an array's or a CPU tensor's type, shape and bytes."""
    kind = f"{array.dtype} {list(array.shape)}".removeprefix("torch.")
    flat = array.reshape(-1)
    if hasattr(array, "data_ptr"):
        import torch

        if flat.numel():  # one without values may have no stride to view it by
            flat = flat.view(torch.uint8)
        return zlib.crc32(flat.numpy(), zlib.crc32(kind.encode()))
    return zlib.crc32(flat.view("uint8"), zlib.crc32(kind.encode()))


@dataclass(frozen=True)
class Tensors:
    """A safetensors file that is open; nothing of its tensors is read yet.

    Attributes:
        header: The JSON in its metadata.
        metadata: What else is in its metadata.
        kinds: Type and shape of each tensor, by name: `("F64", (3, 2))`.
        get: Reads a tensor; raises DataError where its bytes are not those that were written.
    """

    header: Any
    metadata: dict[str, str]
    kinds: dict[str, tuple[str, tuple[int, ...]]]
    get: Callable[[str], Any]


@contextmanager
def open_tensors(path: Path, schema: str, remedy: str, framework: str = "numpy") -> Iterator[Tensors]:
    """Open a file that `write_arrays` or `write_nested` wrote, and read its header alone.

    Args:
        path: The file.
        schema: Name and version that its header carries.
        remedy: What to do about a wrong file, for the error.
        framework: The library whose tensors are read: `numpy` or `pt`.

    Raises:
        DataError: A file that is missing, unreadable, broken or of another version.
    """
    with safetensors_file(path, remedy, framework) as file:
        beside = file.metadata() or {}
        header = _parsed(beside.pop("skillfast", "{}"), path, remedy)
        found = header.get("schema") if isinstance(header, dict) else type(header).__name__
        check_schema(str(path), found, schema, remedy)
        sums = header.pop("crc32", None)
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        kinds = {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in parts.items()}
        for name, (_, shape) in kinds.items():
            if math.prod(length or 1 for length in shape) >= 1 << 63:  # of a length of 0, too
                raise DataError(f"{path}: expected {short(name, 80)} of a size that can be, got {shape}; {remedy}")

        def get(name: str) -> Any:
            tensor = file.get_tensor(name)
            if not isinstance(sums, dict) or checksum(tensor) != sums.get(name):
                raise DataError(f"{path}: expected {name} as it was written, got other bytes; {remedy}")
            return tensor

        yield Tensors(header, beside, kinds, get)


@contextmanager
def safetensors_file(path: Path, remedy: str, framework: str) -> Iterator[Any]:
    """A safetensors file that is open; raises DataError where it is missing, unreadable or broken."""
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        try:
            with path.open("rb"):  # says what is wrong, where safetensors does not
                pass
            # checks that the header fits the file's size, before anything is read
            file = stack.enter_context(safe_open(path, framework=framework))
        except OSError as error:
            raise _unreadable(path, error, remedy) from error
        except SafetensorError as error:
            raise DataError(
                f"{path}: expected a safetensors file, got one that is broken ({short(str(error), 160)}); {remedy}"
            ) from error
        yield file


def read_nested(path: Path, schema: str, remedy: str) -> dict[str, Any]:
    """The inverse of `write_nested`; raises DataError where the file is missing, broken or of another version."""
    with open_tensors(path, schema, remedy, "pt") as file:

        def join(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            name = value.get("tensor")
            if len(value) == 1 and isinstance(name, str):
                if name not in file.kinds:
                    raise DataError(f"{path}: expected the tensor {short(name, 80)}, got none of this name; {remedy}")
                return file.get(name)
            return {key: join(item) for key, item in value.items()}

        return {key: join(value) for key, value in file.header.items()}
