"""Result files: safetensors for arrays, JSON for the rest, each under its final name only when it is whole."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillfast.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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
    try:
        # Python writes NaN, which is not JSON: read as not defined, like null
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except ValueError as error:
        raise DataError(f"{path}: expected JSON, got {error}; {remedy}") from error
    except OSError as error:
        raise _unreadable(path, error, remedy) from error
    check_schema(str(path), value.get("schema") if isinstance(value, dict) else type(value).__name__, schema, remedy)
    return value


def check_schema(what: str, found: object, schema: str, remedy: str) -> None:
    """Raises DataError where a file is of another schema or another version of it."""
    if found != schema:
        raise DataError(f"{what}: expected schema {schema!r}, got {found!r}; {remedy} with this version of skillfast")


def _unreadable(path: Path, error: OSError, remedy: str) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: expected a file, got none; {remedy}")
    return DataError(f"{path}: expected a readable file, got {error.strerror}; check it and its folder")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Write a safetensors file with a JSON header in its metadata."""
    from safetensors.numpy import save_file

    with replacing(path) as temporary:
        in_order = {name: value.copy("C") for name, value in arrays.items()}  # safetensors writes memory as it lies
        save_file(in_order, temporary, metadata={"skillfast": json.dumps(header)})


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
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"skillfast": json.dumps(header)})


def read_nested(path: Path, schema: str, remedy: str) -> dict[str, Any]:
    """The inverse of `write_nested`; raises DataError where the file is missing, broken or of another version."""
    tensors, header = _read(path, schema, remedy, "pt")

    def join(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        name = value.get("tensor")
        return tensors[name] if len(value) == 1 and isinstance(name, str) else {k: join(v) for k, v in value.items()}

    with whole(path, remedy):
        return {key: join(value) for key, value in header.items()}


@contextmanager
def whole(path: Path, remedy: str) -> Iterator[None]:
    """Turns what a file with missing or other keys raises on the way back into a DataError of one line."""
    try:
        yield
    except ArgumentError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: expected a whole file, got one with other keys ({error!r}); {remedy}") from error


def read_arrays(path: Path, schema: str, remedy: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the header of a file that `write_arrays` wrote; raises DataError where it is not one."""
    return _read(path, schema, remedy, "numpy")


def _read(path: Path, schema: str, remedy: str, framework: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as file:
            header = json.loads((file.metadata() or {}).get("skillfast", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except OSError as error:
        raise _unreadable(path, error, remedy) from error
    except (SafetensorError, ValueError) as error:
        raise DataError(f"{path}: expected a safetensors file, got one that is broken ({error}); {remedy}") from error
    check_schema(str(path), header.get("schema") if isinstance(header, dict) else header, schema, remedy)
    return arrays, header
