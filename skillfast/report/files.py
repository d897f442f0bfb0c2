"""Reads the result files of an output folder, checks what the page relies on, writes the page."""

from __future__ import annotations

import json
import os
import tempfile
from typing import TYPE_CHECKING, Any

from skillfast.errors import DataError

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
    got = found.get("schema") if isinstance(found, dict) else type(found).__name__
    if got != schema:
        raise DataError(f"{what}: expected schema {schema!r}, got {got!r}; {REMEDY} with this version of skillfast")
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


def _read(path: Path) -> Any:
    try:
        # Python writes NaN, which is not JSON: shown as not defined, like null
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        raise DataError(f"{path}: expected a file, got none; {REMEDY}") from None
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got {error.strerror}; check it and its folder") from error
    except ValueError as error:
        raise DataError(f"{path}: expected JSON, got {error}; {REMEDY}") from error


def _write_whole(path: Path, text: str) -> None:
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise DataError(f"{path.parent}: expected a writable folder, got {error.strerror}; choose another") from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            # mkstemp makes a private file; a report is for showing around
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
        os.replace(name, path)  # noqa: PTH105
    except BaseException:
        os.unlink(name)  # noqa: PTH108
        raise


def write_report(directory: Path) -> Path:
    """Write `report.html` from the two files in a folder; see `skillfast.report.write_report`."""
    from skillfast.report import page

    results, skills = _read(directory / "results.json"), _read(directory / "skills.json")
    path = directory / "report.html"
    _write_whole(path, page.render(results, skills))
    return path
