"""Docstrings can be read alone: none refers to the line above it, and no entry lacks its description."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for folder in ("skillfast", "kernels")
    for path in (ROOT / folder).rglob("*.py")
    if "kernels" not in path.relative_to(ROOT).parts[1:]  # a link to kernels/, where it is installed
)
# What can only be read with something that stands before it.
LEANING = re.compile(
    r"(of|likewise|ditto|as (above|before)|(the )?same|also|theirs?|its|his|them|those|these|this|that|it|they|and|but"
    r"|or|else|otherwise|whose)\b",
    re.IGNORECASE,
)
SECTIONS = ("Args:", "Attributes:", "Returns:", "Yields:", "Raises:")
ENTRY = re.compile(r"    (\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?:(?: (.*))?$")


def entries(docstring: str) -> list[tuple[str, str]]:
    """Name and description of every entry under Args, Attributes and Raises."""
    found: list[tuple[str, str]] = []
    section = ""
    for line in docstring.splitlines():
        if line and not line.startswith(" "):
            section = line if line in SECTIONS else ""
        elif section in ("Args:", "Attributes:", "Raises:") and (entry := ENTRY.match(line)):
            found.append((entry[1], (entry[2] or "").strip()))
    return found


def complaints(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        name = getattr(node, "name", "module")
        if text is None:
            continue
        if len(text.split()) < 2 or LEANING.match(text):
            found.append(f"{path.relative_to(ROOT)}:{node.body[0].lineno} {name}: {text.splitlines()[0]}")
        for entry, description in entries(text):
            if not description or LEANING.match(description):
                found.append(f"{path.relative_to(ROOT)}:{node.body[0].lineno} {name}: {entry}: {description}")
    return found


@pytest.mark.parametrize("text", ["Of all sites.", "Likewise, to test on.", "of the choice", "Its name.", "As above."])
def test_what_leans_is_found(text: str) -> None:
    assert LEANING.match(text)
    assert entries(f"Do it.\n\nArgs:\n    seed: {text}\n") == [("seed", text)]


def test_what_stands_alone_is_not() -> None:
    assert not LEANING.match("Number of neurons.")
    text = "Do it.\n\nArgs:\n    x: [n, D]: rows.\n        more: of it\n    y:\n"
    assert entries(text) == [("x", "[n, D]: rows."), ("y", "")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_stand_alone(path: Path) -> None:
    assert complaints(path) == []
