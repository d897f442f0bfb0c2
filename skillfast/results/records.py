"""Records: JSON objects as frozen types. Their schema, their reader and their writer come from the annotations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import UNSET, Meta, inspect

from skillfast.errors import DataError
from skillfast.files import read_json, write_json

if TYPE_CHECKING:
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

    def axes(self) -> dict[str, list[str]]:
        """Names along each axis of the file, for values that are declared `along` or `among` it."""
        return {}


def along(axis: str) -> Meta:
    """Meta of a list with an item for each name of the axis, or of a dict with each name as a key."""
    return Meta(extra={"along": axis})


def among(axis: str) -> Meta:
    """Meta of text that is one of the axis's names, of a list of them, or of a dict with some of them as keys."""
    return Meta(extra={"among": axis})


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
        found = msgspec.convert(value, kind)
        if isinstance(found, Document):
            _check_axes(found)
        return found
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


def _check_axes(found: Document) -> None:
    if walk := _walk(type(found)):
        walk(found, found.axes(), "")


_Walk = Callable[[Any, Mapping[str, list[str]], str], None]


@cache
def _walk(kind: type[Record]) -> _Walk | None:
    """What raises ValidationError, as msgspec does of other faults, where a value does not go along its axis."""
    return _walk_of(inspect.type_info(kind))


def _walk_of(kind: inspect.Type) -> _Walk | None:
    """What checks the values of any type along their axes; None where no value below it is declared along one."""
    if isinstance(kind, inspect.Metadata):
        return _on_axis(kind.extra or {}, _walk_of(kind.type))
    if isinstance(kind, inspect.UnionType):  # with None, or with no value
        inner = next((walk for walk in map(_walk_of, kind.types) if walk is not None), None)
        return inner and (lambda value, axes, place: None if value in (None, UNSET) else inner(value, axes, place))
    if isinstance(kind, inspect.ListType) and (item := _walk_of(kind.item_type)):
        return partial(_each, item, lambda value: [(f"[{i}]", inner) for i, inner in enumerate(value)])
    if isinstance(kind, inspect.DictType) and (item := _walk_of(kind.value_type)):
        return partial(_each, item, lambda value: [(f".{key}", inner) for key, inner in value.items()])
    if isinstance(kind, inspect.StructType):
        fields = [(field, walk) for field in kind.fields if (walk := _walk_of(field.type))]

        def walked(value: Any, axes: Mapping[str, list[str]], place: str) -> None:
            for field, walk in fields:
                walk(getattr(value, field.name), axes, f"{place}.{field.encode_name}")

        return walked if fields else None
    return None


def _each(
    walk: _Walk, parts: Callable[[Any], list[tuple[str, Any]]], value: Any, axes: Mapping[str, list[str]], place: str
) -> None:
    for key, part in parts(value):
        walk(part, axes, place + key)


def _on_axis(declared: Mapping[str, str], inner: _Walk | None) -> _Walk | None:
    if not declared:
        return inner

    def walked(value: Any, axes: Mapping[str, list[str]], place: str) -> None:
        for how, axis in declared.items():
            names = axes[axis]
            if how == "among" or isinstance(value, dict):
                given = [value] if isinstance(value, str) else value
                if other := next((name for name in given if name not in names), None):
                    raise msgspec.ValidationError(f"Expected one of the {axis}, got {other!r} - at `${place}`")
            if how == "along" and len(value) != len(names):
                raise msgspec.ValidationError(f"Expected {len(names)} values, got {len(value)} - at `${place}`")
        if inner is not None:
            inner(value, axes, place)

    return walked


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
    if re.fullmatch("(Number|Integer value) out of range", message):
        return f"expected a number that float64 or int64 holds{at}, got {_shown(value, place)}"
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
