"""Markdown of text that users named: escaped, in code spans, in tables."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_MARKS = re.compile(r"([\\`*_{}\[\]#|!~])")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})  # not every renderer escapes these by backslashes


def escaped(text: str) -> str:
    """Text that Markdown and HTML show letter by letter, in one line."""
    return _MARKS.sub(r"\\\1", " ".join(text.split()).translate(_ENTITIES))


def code(text: str) -> str:
    """Text in a code span, in one line; a backtick becomes an apostrophe and a table's bar a slash."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', '/')}`"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def escaped_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text, which is escaped."""
    return table([*map(escaped, head)], ([*map(escaped, row)] for row in rows))
