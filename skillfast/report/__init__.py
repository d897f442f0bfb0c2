"""The report: one HTML page and terminal tables from `results.json` and `skills.json`. It computes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from rich.table import Table

    from skillfast.memory.plan import Plan
    from skillfast.models.sites import Site
    from skillfast.results.bench import BenchResults
    from skillfast.results.comparison import Comparison
    from skillfast.results.evaluation import EvaluationResults, Shortcut
    from skillfast.results.replay import Replay
    from skillfast.results.skills import Skills
    from skillfast.results.trajectory import Trajectory
    from skillfast.statistics.scores import NeuronScores

__all__ = [
    "accuracy_table",
    "audit_tables",
    "comparison_table",
    "comparison_text",
    "dose_table",
    "evaluation_table",
    "plan_table",
    "read_results",
    "render",
    "replay_text",
    "shortcut_summary",
    "shortcut_table",
    "sites_table",
    "summary_table",
    "top_neurons_table",
    "trajectory_table",
    "trajectory_text",
    "write_bom",
    "write_card",
    "write_comparison",
    "write_evaluation",
    "write_figures",
    "write_report",
    "write_trajectory",
]


def render(results: BenchResults, skills: Skills) -> str:
    """Make the report's HTML.

    Args:
        results: what `results.json` holds.
        skills: what `skills.json` holds.

    Returns:
        One self-contained page: scripts and styles are inside, and it asks the network for nothing.

    Raises:
        DataError: results and skills of different models.
    """
    from skillfast.report.bench import page

    return page.render(results, skills)


def write_report(directory: str | Path) -> Path:
    """Write `report.html` from the `results.json` and `skills.json` of an output folder.

    Args:
        directory: the folder; `report.html` appears in it whole or not at all.

    Returns:
        The path of the report.

    Raises:
        DataError: a file that is missing, is not JSON, or has a key or a value that its type does not know.
    """
    from skillfast.report import files

    return files.write_report(Path(directory))


def write_bom(directory: str | Path) -> Path:
    """Write `ml-bom.cdx.json`, an ML-BOM (CycloneDX 1.6), from the `results.json` of an output folder.

    Args:
        directory: the folder; the file appears in it whole or not at all.

    Returns:
        The path of the file. It holds the model with its card and hash, the data with theirs and the libraries; of
        equal results it is the same file with the same serial number.

    Raises:
        DataError: a file that is missing, is not JSON, or has a key or a value that its type does not know.
    """
    from skillfast.report import bom

    return bom.write_bom(Path(directory))


def write_card(directory: str | Path) -> Path:
    """Write `model-card.md`, a section for a model card, from the `results.json` of an output folder.

    Args:
        directory: the folder; the file appears in it whole or not at all.

    Returns:
        The path of the file.

    Raises:
        DataError: a file that is missing, is not JSON, or has a key or a value that its type does not know.
    """
    from skillfast.report import exports

    return exports.write_card(Path(directory))


def write_figures(directory: str | Path, kind: str) -> list[Path]:
    """Write the report's figures to `figures/` of an output folder, for papers.

    Args:
        directory: the folder, with `results.json` and `skills.json`.
        kind: `"png"`, `"svg"` or `"pdf"`.

    Returns:
        The path of each figure. What a page steps through has its first state; the bars of single removals, which have
        none, are left out.

    Raises:
        ArgumentError: kaleido is not installed, or no Chromium or Chrome is.
        DataError: a file that is missing, is not JSON, or has a key or a value that its type does not know.
    """
    from skillfast.report import exports

    return exports.write_figures(Path(directory), kind)


def read_results(directory: str | Path) -> BenchResults:
    """Read the `results.json` of an output folder.

    Raises:
        DataError: a file that is missing, is not JSON, or has a key or a value that its type does not know.
    """
    from skillfast.report import files

    return files.read_results(Path(directory))


def summary_table(results: BenchResults) -> Table:
    """Make the table that `skillfast bench` prints at its end.

    Args:
        results: what `results.json` holds.

    Returns:
        A rich table: selectivity with 95 % intervals beside oracle and random control, and shares where they are known.
    """
    from skillfast.report import tables

    return tables.summary_table(results)


def replay_text(found: Replay) -> str:
    """What `skillfast bench --replay` prints: a line per value that differs, what is no number first, then by size.

    Args:
        found: what the replay gave again and what not.
    """
    from skillfast.report import replay

    return replay.text(found)


def comparison_table(named: Mapping[str, BenchResults]) -> Table:
    """Make the table that `skillfast compare` prints of more than two runs.

    Args:
        named: results per name of a run, in the order of the columns.

    Returns:
        A rich table with one column per run.
    """
    from skillfast.report import tables

    return tables.comparison_table(named)


def audit_tables(found: Comparison) -> list[Table]:
    """Make the tables that `skillfast compare BASE NEW` prints, a row per skill: verdicts, and exchanged skills.

    Args:
        found: what `compare.json` holds.
    """
    from skillfast.report.comparison import texts

    return texts.tables(found)


def comparison_text(found: Comparison, form: str) -> str:
    """A comparison as text.

    Args:
        found: what `compare.json` holds.
        form: `"text"` (sentences and the gate's checks), `"json"`, `"junit"` (XML) or `"markdown"`.
    """
    from skillfast.report.comparison import texts

    return texts.FORMATS[form](found)


def write_comparison(directory: str | Path) -> Path:
    """Write `compare.html` from the `compare.json` of a folder.

    Args:
        directory: the folder; `compare.html`, one self-contained file, appears in it whole or not at all.

    Returns:
        The path of the page.

    Raises:
        DataError: `compare.json` is missing, is not JSON, or has a key or a value that its type does not know.
    """
    from skillfast.report import files

    return files.write_comparison(Path(directory))


def write_trajectory(directory: str | Path) -> Path:
    """Write `trajectory.html` from the `trajectory.json` of a folder.

    Args:
        directory: the folder; `trajectory.html`, one self-contained file, appears in it whole or not at all.

    Returns:
        The path of the page.

    Raises:
        DataError: `trajectory.json` is missing, is not JSON, or has a key or a value that its type does not know.
    """
    from skillfast.report import files

    return files.write_trajectory(Path(directory))


def trajectory_table(found: Trajectory) -> Table:
    """Make the table that `skillfast compare RUN RUN RUN` prints: a row per skill.

    Args:
        found: what `trajectory.json` holds.
    """
    from skillfast.report import tables

    return tables.trajectory_table(found)


def trajectory_text(found: Trajectory) -> str:
    """When skills appear and which of them moved, a sentence in each line.

    Args:
        found: what `trajectory.json` holds.
    """
    from skillfast.report.trajectory import words

    return "\n".join(words.sentences(found))


def top_neurons_table(scores: NeuronScores, top: int) -> Table:
    """Make the table that `skillfast trace` prints: the neurons with the largest scores of each column."""
    from skillfast.report import tables

    return tables.top_neurons_table(scores, top)


def accuracy_table(classes: Sequence[str], baseline: np.ndarray, rows: Mapping[str, np.ndarray]) -> Table:
    """Make the table that `skillfast ablate` prints: each class's accuracy before and after.

    Args:
        classes: names of the classes.
        baseline: float64 [n_classes], of the intact model.
        rows: name of a condition -> float64 [n_classes].
    """
    from skillfast.report import tables

    return tables.accuracy_table(classes, baseline, rows)


def sites_table(name: str, sites: Sequence[Site], read_in: Mapping[str, str]) -> Table:
    """Make the table that `skillfast info --model` prints.

    Args:
        name: Name of the model.
        sites: In the table's order.
        read_in: Site -> `"activation"` (fused) or `"hook"`.
    """
    from skillfast.report import tables

    return tables.sites_table(name, sites, read_in)


def plan_table(plan: Plan) -> Table:
    """Show what tracing a model takes, device by device.

    Args:
        plan: as `skillfast.memory.plan.plan` made it.

    Returns:
        A table for the terminal.
    """
    from skillfast.report import tables

    return tables.plan_table(plan)


def write_evaluation(directory: str | Path) -> Path:
    """Write `evaluation.html` from the `evaluation.json` of an output folder.

    Args:
        directory: the folder; `evaluation.html`, one self-contained file, appears in it whole or not at all.

    Returns:
        The path of the page.

    Raises:
        DataError: `evaluation.json` is missing, is not JSON, or has a key or a value that its type does not know.
    """
    from skillfast.report import files

    return files.write_evaluation(Path(directory))


def dose_table(results: EvaluationResults) -> Table:
    """Make the table that `skillfast evaluate` prints of factors: what each skill's measures do as it is turned.

    Args:
        results: what `evaluation.json` holds.
    """
    from skillfast.report import tables

    return tables.dose_table(results)


def evaluation_table(results: EvaluationResults) -> Table:
    """Make the table that `skillfast evaluate` prints: skills removed from all layers, by size.

    Args:
        results: what `evaluation.json` holds.
    """
    from skillfast.report import tables

    return tables.evaluation_table(results)


def shortcut_table(shortcut: Shortcut) -> Table:
    """Make the table that `skillfast evaluate --shortcut` prints: a shortcut's neurons removed, by size.

    Args:
        shortcut: what `evaluation.json` holds of it.
    """
    from skillfast.report import tables

    return tables.shortcut_table(shortcut)


def shortcut_summary(shortcut: Shortcut) -> list[str]:
    """Say in sentences what was found of a shortcut.

    Args:
        shortcut: what `evaluation.json` holds of it.
    """
    from skillfast.report.evaluation import shortcut as words

    return words.summary(shortcut)
