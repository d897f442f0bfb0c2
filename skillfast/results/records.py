"""Records: JSON objects as frozen types. Their schema, their reader and their writer come from the annotations."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import Meta

from skillfast.errors import DataError
from skillfast.files import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

R = TypeVar("R", bound="Record")

Name = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Share = Annotated[float, Meta(gt=0, le=1)]
Change = Annotated[float, Meta(ge=-1, le=1)]
Ends = Annotated[list[float], Meta(min_length=2, max_length=2, description="the ends of a 95 % interval")]
Interval = Ends | None


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A JSON object.

    A field without a default is a key that is always there, null where its value is not defined; a field whose default
    is None is a key that is left out. Values are checked when a file is read and when it is written.

    Attributes:
        json_schema: What the JSON Schema says beyond the fields.
    """

    json_schema: ClassVar[dict[str, Any]] = {}


class Document(Record, frozen=True):
    """The whole content of a file; a subclass gives the schema's name as its `tag`, which stands under `schema`."""

    @classmethod
    def schema_name(cls) -> str:
        """The name and version that the file carries, such as `skillfast.bench/1`."""
        return str(cls.__struct_config__.tag)


def to_json(record: Any) -> Any:
    """The record as dicts and lists, in the order of its fields."""
    return msgspec.to_builtins(record, enc_hook=_plain)


def _plain(value: Any) -> Any:
    """A number of NumPy, or a version that is a string, as Python's own."""
    return str(value) if isinstance(value, str) else value.item()


def from_json(kind: type[R], value: Any, what: str, remedy: str) -> R:
    """Make a record of dicts and lists.

    Args:
        kind: The record's type.
        value: What JSON gave, or a dict of records.
        what: The file, for the error.
        remedy: What to do about a wrong one, for the error.

    Raises:
        DataError: A key that is missing or not known, or a value of another type or out of its range.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise DataError(f"{what}: {_expected(str(error), value)}; {remedy}") from error


def made(kind: type[R], parts: Mapping[str, Any] | R) -> R:
    """Make a record of its parts, which are records, dicts and plain values; raises DataError as `from_json` does."""
    return from_json(kind, to_json(parts), kind.__name__, "write values that the file can hold")


def read(kind: type[R], path: Path, remedy: str) -> R:
    """Read a file that holds one `Document`; raises DataError where it is missing, broken or not as the type says."""
    assert issubclass(kind, Document)
    return from_json(kind, read_json(path, kind.schema_name(), remedy), str(path), remedy)


def write(document: Document, path: Path) -> None:
    """Write a document; raises DataError where a value is not as the type says."""
    write_json(path, to_json(made(type(document), document)))


def schema(kind: type[Document]) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a file."""
    made = msgspec.json.schema(kind)
    more = {record.__name__: record.json_schema for record in _records(Record)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": kind.schema_name(),
        "$ref": made["$ref"],
        "$defs": {name: {**found, **more[name]} for name, found in made["$defs"].items()},
    }


def _records(kind: type[Record]) -> Iterator[type[Record]]:
    """All types below one."""
    for below in kind.__subclasses__():
        yield below
        yield from _records(below)


def check_open(value: Mapping[str, Any], kind: type[Record], place: str) -> None:
    """Check the keys that a type has of an object that may have others; raises ValueError."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, inner = str(error).partition(" - at `$")
        raise ValueError(f"{message} - at `$.{place}{inner or '`'}") from error


def _expected(message: str, value: Any) -> str:
    """What msgspec says, as `expected ..., got ...`."""
    message, _, place = message.partition(" - at `")
    place = place.removesuffix("`").removeprefix("$").removeprefix(".")
    at = f" at {place}" if place else ""
    if found := re.fullmatch(r"Object missing required field `(.*)`", message):
        return f"expected the key {found[1]}{at}, got none named {found[1]}"
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", message):
        return f"expected keys that are known{at}, got {found[1]!r}"
    if found := re.fullmatch(r"Invalid (?:enum )?value (.*)", message):
        return f"expected a known value{at}, got {found[1]}"
    if found := re.fullmatch(r"Expected (.*), got (.*)", message):
        return f"expected {found[1]}{at}, got {found[2]}"
    if found := re.fullmatch(r"Expected (.*)", message):
        return f"expected {found[1]}{at}, got {_shown(value, place)}"
    return message


def _shown(value: Any, place: str) -> str:
    """The value at a place such as `model.sites[0].width`, short."""
    try:
        for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", place):
            value = value[int(index)] if index else value[key]
    except (KeyError, IndexError, TypeError):  # a key with a dot in it, or one that msgspec writes as [...]
        return "another"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
