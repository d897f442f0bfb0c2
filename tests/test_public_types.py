"""What type checkers of users see: the marker `py.typed`, and annotations of every public name.

That they say the right thing is checked by `make lint`, over `tests/public_types.py`.
"""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import pytest

import skillfast

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = sorted(set(skillfast.__all__) - {"__version__"})


def test_the_marker_is_installed() -> None:
    assert resources.files("skillfast").joinpath("py.typed").is_file()


def untyped(function: Any, name: str) -> Iterator[str]:
    """What of the function's signature is not annotated, or is nothing but Any."""
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        untold = parameter.annotation is inspect.Parameter.empty
        # settings by name (`**settings: Any`) are checked when they are given
        anything = parameter.annotation == "Any" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        if parameter.name not in ("self", "cls") and (untold or anything):
            yield f"{name}({parameter.name})"
    if signature.return_annotation in (inspect.Signature.empty, "Any"):
        yield f"{name} -> "


def members(kind: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(kind).items():
        if isinstance(member, property):
            member = member.fget
        elif isinstance(member, staticmethod | classmethod):
            member = member.__func__
        if inspect.isfunction(member) and member.__module__ == kind.__module__ and not name.startswith("_"):
            yield name, member


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_typed(name: str) -> None:
    value = getattr(skillfast, name)
    if not inspect.isclass(value):
        assert list(untyped(value, name)) == []
        return
    found = [what for member, function in members(value) for what in untyped(function, f"{name}.{member}")]
    if is_dataclass(value):
        found += [f"{name}.{field.name}" for field in fields(value) if field.type in (Any, "Any")]
    elif "__init__" in vars(value):
        found += [what for what in untyped(value.__init__, name) if not what.endswith("-> ")]
    assert found == []
