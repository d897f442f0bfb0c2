"""Reads the result files of an output folder, checks what the page relies on, writes the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillfast.errors import DataError
from skillfast.files import check_schema, read_json, replacing

if TYPE_CHECKING:
    from pathlib import Path

RESULTS_SCHEMA = "skillfast.bench/1"
SKILLS_SCHEMA = "skillfast.skills/1"
RESULTS_KEYS = (
    "environment", "config", "model", "dataset", "baseline", "removal_matrix", "selectivity", "oracle",
    "random_control", "cost",
)  # fmt: skip
REMEDY = "run `skillfast bench` into that folder"


def _check_keys(what: str, found: Any, schema: str, keys: tuple[str, ...]) -> None:
    check_schema(what, found.get("schema") if isinstance(found, dict) else type(found).__name__, schema, REMEDY)
    missing = [key for key in keys if key not in found]
    if missing:
        raise DataError(f"{what}: expected the keys {', '.join(keys)}, got none named {', '.join(missing)}; {REMEDY}")


def check(results: Any, skills: Any) -> None:
    """Check that two dicts are results and skills of one run.

    Raises:
        DataError: another schema, a missing part, or skills of another model.
    """
    _check_keys("results.json", results, RESULTS_SCHEMA, RESULTS_KEYS)
    _check_keys("skills.json", skills, SKILLS_SCHEMA, ("fingerprint", "skills"))
    ours, theirs = results["model"]["fingerprint"], skills["fingerprint"]
    if ours != theirs:
        raise DataError(
            f"skills.json: expected the skills of the model {ours!r} of results.json, got {theirs!r}; "
            "take both files from one run"
        )
    sites = {site["name"] for site in results["model"]["sites"]}
    unknown = sorted({site for skill in skills["skills"] for site in skill["neurons"]} - sites)
    if unknown or not skills["skills"]:
        got = ", ".join(unknown) or "no skill at all"
        raise DataError(f"skills.json: expected skills on the sites of results.json, got {got}; {REMEDY}")


def read_results(directory: Path) -> dict[str, Any]:
    """Read a folder's `results.json`, checked for the keys that the tables and the page use."""
    results = read_json(directory / "results.json", RESULTS_SCHEMA, REMEDY)
    _check_keys(str(directory / "results.json"), results, RESULTS_SCHEMA, RESULTS_KEYS)
    return results


def write_report(directory: Path) -> Path:
    """Write `report.html` from the two files in a folder; see `skillfast.report.write_report`."""
    from skillfast.report import page

    text = page.render(read_results(directory), read_json(directory / "skills.json", SKILLS_SCHEMA, REMEDY))
    path = directory / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
