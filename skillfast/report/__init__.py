"""The report: one HTML page and terminal tables from `results.json` and `skills.json`. It computes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["comparison_table", "render", "summary_table", "write_report"]


def render(results: dict[str, Any], skills: dict[str, Any]) -> str:
    """Make the report's HTML.

    Args:
        results: what `results.json` holds (schema `skillfast.bench/1`).
        skills: what `skills.json` holds (schema `skillfast.skills/1`).

    Returns:
        One self-contained page: scripts and styles are inside, and it asks the network for nothing.

    Raises:
        DataError: a dict of another schema, without a key that the page needs, or of another model than the other.
    """
    from skillfast.report import page

    return page.render(results, skills)


def write_report(directory: str | Path) -> Path:
    """Write `report.html` from the `results.json` and `skills.json` of an output folder.

    Args:
        directory: the folder; `report.html` appears in it whole or not at all.

    Returns:
        The path of the report.

    Raises:
        DataError: a file that is missing, is not JSON, or is not of the schema that this version reads.
    """
    from skillfast.report import files

    return files.write_report(Path(directory))


def summary_table(results: dict[str, Any]) -> Table:
    """Make the table that `skillfast bench` prints at its end.

    Args:
        results: what `results.json` holds.

    Returns:
        A rich table: selectivity with 95 % intervals beside oracle and random control, and shares where they are known.
    """
    from skillfast.report import tables

    return tables.summary_table(results)


def comparison_table(named: dict[str, dict[str, Any]]) -> Table:
    """Make the table that `skillfast compare` prints.

    Args:
        named: results per name of a run, in the order of the columns.

    Returns:
        A rich table with one column per run.
    """
    from skillfast.report import tables

    return tables.comparison_table(named)
