"""Settings as dataclasses: a field says its default, what it means and which values it takes, once for all users.

A class of settings is a frozen dataclass that derives from `Settings`; each field is made by `setting`. Values are
checked when an object is made, and the command line makes its options from the same fields.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import Field, field, fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from skillfast.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TYPES = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text", dict: "a dict"}


def setting(
    default: Any,
    help: str,  # noqa: A002 (click's word)
    *,
    choices: Sequence[Any] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    name: str | None = None,
    option: str | None = None,
    metavar: str | None = None,
    required: bool = False,
) -> Any:
    """Declare a field of a `Settings` class.

    Args:
        default: Value where nothing is given.
        help: What it means, in a sentence or two; the option's help.
        choices: The values that it takes, or of a tuple's items; any by default.
        low: Smallest number that it takes.
        above: Number that it must be larger than.
        high: Largest number that it takes.
        name: Name in flat settings; the field's own by default.
        option: Name on the command line; by default that of flat settings with dashes.
        metavar: What stands for the value in the command line's help.
        required: For a tuple, whether it must have an item.
    """
    metadata = {
        "help": help, "choices": tuple(choices), "low": low, "above": above, "high": high, "name": name,
        "option": option, "metavar": metavar, "required": required,
    }  # fmt: skip
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def name_of(declared: Field[Any]) -> str:
    """Name of a field in flat settings."""
    return declared.metadata["name"] or declared.name


def type_of(owner: type, declared: Field[Any]) -> tuple[type, type | None, bool]:
    """Type of a field, type of its items where it is a tuple, and whether it may be None."""
    hint, optional = _hints(owner)[declared.name], False
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
        optional = True
    if get_origin(hint) is Literal:
        return type(get_args(hint)[0]), None, optional
    if get_origin(hint) is tuple:
        return tuple, get_args(hint)[0], optional
    return get_origin(hint) or hint, None, optional


@functools.cache
def _hints(owner: type) -> Mapping[str, Any]:
    return get_type_hints(owner)


class Settings:
    """Base of frozen dataclasses whose values are checked when they are made.

    Raises:
        ArgumentError: A value of another type, out of its range or not among its choices; values that do not go
            together.
    """

    def __post_init__(self) -> None:
        for declared in fields(self):  # type: ignore[arg-type]  # those that derive from it are dataclasses
            object.__setattr__(self, declared.name, _checked(type(self), declared, getattr(self, declared.name)))
        self.check()

    def check(self) -> None:
        """Raise ArgumentError where values do not go together."""


def _checked(owner: type, declared: Field[Any], value: Any) -> Any:
    """The value as the field keeps it; raises ArgumentError where the field does not take it."""
    kind, item, optional = type_of(owner, declared)
    if value is None and optional:
        return None
    if isinstance(value, os.PathLike) and kind is str:
        value = os.fspath(value)
    if item is None:
        _check_one(declared, kind, value)
        return value
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise _wrong(declared, "several values", value)
    values = tuple(value)
    if declared.metadata["required"] and not values:
        raise _wrong(declared, "at least one", "none")
    for part in values:
        _check_one(declared, item, part)
    return values


def _check_one(declared: Field[Any], kind: type, value: Any) -> None:
    rules = declared.metadata
    if rules["choices"]:
        if value not in rules["choices"]:
            raise _wrong(declared, f"one of {', '.join(map(str, rules['choices']))}", value)
        return
    known: type = {int: Integral, float: Real}.get(kind, kind)
    if not isinstance(value, known) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(declared, _TYPES[kind], value)
    if kind in (int, float):
        number: Any = value
        within = (
            math.isfinite(number)
            and (rules["low"] is None or number >= rules["low"])
            and (rules["above"] is None or number > rules["above"])
            and (rules["high"] is None or number <= rules["high"])
        )
        if not within:
            raise _wrong(declared, range_of(declared) or _TYPES[kind], value)


def range_of(declared: Field[Any]) -> str:
    """The numbers that a field takes, in words; empty where it takes any."""
    low, above, high = (declared.metadata[name] for name in ("low", "above", "high"))
    if high is not None:
        return f"a number in {'(' if low is None else '['}{above if low is None else low:g}, {high:g}]"
    if low is not None:
        return f"at least {low:g}"
    return "" if above is None else f"more than {above:g}"


def _wrong(declared: Field[Any], expected: str, value: Any) -> ArgumentError:
    got = value if value == "none" else f"{value!r}"
    default = declared.default
    plain = isinstance(default, int | float | str) and not isinstance(default, bool)
    usual = default if plain else "the default"
    return ArgumentError(f"{name_of(declared)}: expected {expected}, got {got}; leave it out for {usual}")
