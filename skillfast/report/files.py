"""Reads the result files of an output folder, and writes the pages beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skillfast.files import replacing
from skillfast.results import bench, comparison, evaluation, records, skills, trajectory

if TYPE_CHECKING:
    from pathlib import Path


def read_results(directory: Path) -> bench.BenchResults:
    """Read a folder's `results.json`; see `skillfast.report.read_results`."""
    return records.read(bench.BenchResults, directory / bench.FILE, bench.REMEDY)


def write_report(directory: Path) -> Path:
    """Write `report.html`; see `skillfast.report.write_report`."""
    from skillfast.report.bench import page

    found = records.read(skills.Skills, directory / skills.FILE, bench.REMEDY)
    return write(directory / "report.html", page.render(read_results(directory), found))


def write_evaluation(directory: Path) -> Path:
    """Write `evaluation.html`; see `skillfast.report.write_evaluation`."""
    from skillfast.report.evaluation import page

    remedy = "run `skillfast evaluate` into that folder"
    results = records.read(evaluation.EvaluationResults, directory / evaluation.FILE, remedy)
    return write(directory / "evaluation.html", page.render(results))


def write_comparison(directory: Path) -> Path:
    """Write `compare.html`; see `skillfast.report.write_comparison`."""
    from skillfast.report.comparison import page

    remedy = "run `skillfast compare BASE NEW` into that folder"
    found = records.read(comparison.Comparison, directory / comparison.FILE, remedy)
    return write(directory / "compare.html", page.render(found))


def write_trajectory(directory: Path) -> Path:
    """Write `trajectory.html`; see `skillfast.report.write_trajectory`."""
    from skillfast.report.trajectory import page

    remedy = "run `skillfast compare RUN RUN RUN` into that folder"
    found = records.read(trajectory.Trajectory, directory / trajectory.FILE, remedy)
    return write(directory / "trajectory.html", page.render(found))


def write(path: Path, text: str) -> Path:
    """Write a text file, whole or not at all; returns its path."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
