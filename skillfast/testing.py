"""Assertions for a test suite of a model's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillfast.evaluation.comparison import MARGIN
from skillfast.report import comparison_text
from skillfast.runs.compare import compare

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from skillfast.results.comparison import Comparison


def assert_no_regression(
    base: str | Path,
    new: str | Path,
    gates: str | Path | Mapping[str, Any],
    *,
    margin: float = MARGIN,
    output: str | Path | None = None,
) -> Comparison:
    """Assert that a run passes a gate beside an earlier run.

    Args:
        base: Folder of the earlier run of `bench`.
        new: Folder of the later run.
        gates: A `gates.toml`, or what one holds: `{"skill": {"*": {"max_weakening": 0.05}}}`.
        margin: Largest change of accuracy that does not matter to a verdict.
        output: Folder for `compare.json` and `compare.html`; None writes nothing.

    Returns:
        The comparison.

    Raises:
        AssertionError: A check that failed, or that these examples cannot decide; the message says which.
        SkillfastError: A folder that cannot be read, or a gate with unknown skills or keys.
    """
    __tracebackhide__ = True  # pytest shows the line of the test
    found = compare(base, new, gate=gates, margin=margin, output=output)
    if not found.passed:
        raise AssertionError(comparison_text(found, "text"))
    return found


__all__ = ["assert_no_regression"]
