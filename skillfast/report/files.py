"""Reads the result files of an output folder, and writes the pages beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skillfast.files import replacing
from skillfast.results import records
from skillfast.results.bench import BenchResults
from skillfast.results.evaluation import EvaluationResults
from skillfast.results.skills import Skills

if TYPE_CHECKING:
    from pathlib import Path

REMEDY = "run `skillfast bench` into that folder"


def read_results(directory: Path) -> BenchResults:
    """Read a folder's `results.json`; see `skillfast.report.read_results`."""
    return records.read(BenchResults, directory / "results.json", REMEDY)


def write_report(directory: Path) -> Path:
    """Write `report.html`; see `skillfast.report.write_report`."""
    from skillfast.report.bench import page

    skills = records.read(Skills, directory / "skills.json", REMEDY)
    return _write(directory / "report.html", page.render(read_results(directory), skills))


def write_evaluation(directory: Path) -> Path:
    """Write `evaluation.html`; see `skillfast.report.write_evaluation`."""
    from skillfast.report.evaluation import page

    remedy = "run `skillfast evaluate` into that folder"
    results = records.read(EvaluationResults, directory / "evaluation.json", remedy)
    return _write(directory / "evaluation.html", page.render(results))


def _write(path: Path, text: str) -> Path:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
