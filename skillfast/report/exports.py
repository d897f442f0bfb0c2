"""A run's results for other documents: a section for a model card, and the figures as files."""

from __future__ import annotations

import re
from importlib import resources
from typing import TYPE_CHECKING, Any

from skillfast.errors import ArgumentError
from skillfast.markdown import code, escaped, escaped_table, table
from skillfast.report import files
from skillfast.report.formatting import data_name, model_name, percent, points, term_interval, term_value
from skillfast.results import bench, records, skills
from skillfast.vocabulary import NO_TRAINING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from skillfast.results.bench import BenchResults, Selectivity

CARD, FIGURES = "model-card.md", "figures"
HEADLINE = (
    ("target_drop", "the removed class loses"),
    ("regret", "the others stay behind the oracle"),
    ("gross_loss", "the others' decisions that turn wrong"),
    ("harm", "harm to each other class, a low and a high estimate"),
)
SIZES = {"heatmap": (760, 760), "selectivity": (460, 190), "connections": (700, 700), "other": (900, 420)}  # pixels
MOST_TICKS = 40


def write_card(directory: Path) -> Path:
    """Write `model-card.md`; see `skillfast.report.write_card`."""
    return files.write(directory / CARD, card(files.read_results(directory)))


def card(results: BenchResults) -> str:
    """A section of a model card, in Markdown: what was removed, what that did, on what, and how to repeat it."""
    from skillfast.report.bench import words

    named: list[tuple[str, Selectivity]] = [
        ("skills", results.selectivity), ("oracle", results.oracle), ("random neurons", results.random_control),
    ]  # fmt: skip
    terms = [
        [said, *(f"{term_value(values, key)} {term_interval(values, key)}".rstrip() for _, values in named)]
        for key, said in HEADLINE
    ]
    parts = [
        "## Skills",
        " ".join(words.summary(results)),
        escaped_table(["points of accuracy, 95 % intervals", *(name for name, _ in named)], terms),
        "### By class",
        _classes(results),
        "### What this does not say",
        "\n".join(f"- {escaped(sentence)}" for sentence in words.limits(results)),
        "### How it was measured",
        "\n".join(f"- **{name}**: {escaped(text)}" for name, text in _provenance(results).items()),
        _data(results),
        "`skillfast bench --replay FOLDER` runs it again from its folder and says what differs. By its settings:",
        f"```\n{words.command(results)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _classes(results: BenchResults) -> str:
    """A row per class: accuracy before, and what its removal does to it and to the others."""
    from skillfast.report.bench import words

    names, matrix = results.dataset.classes, results.removal_matrix
    before = [
        [name, percent(right), str(n)]
        for name, right, n in zip(names, results.baseline.per_class, results.baseline.n_test_per_class, strict=True)
    ]
    head = ["class", "right before", "test examples", "its own removal takes, points"]
    if results.verdicts is None:
        return escaped_table(head, [[*row, points(-matrix[i][i])] for i, row in enumerate(before)])
    known = ((row[1], row[5], row[-1]) for row in words.verdict_rows(results))
    return escaped_table(
        [*head, "no other class loses more than", "verdict"],
        [[*row, *more] for row, more in zip(before, known, strict=True)],
    )


def _provenance(results: BenchResults) -> Mapping[str, str]:
    model, ran = results.model, results.environment
    weights, trained, prompt = model.weights, model.trained, model.soft_prompt
    tuned = trained.finetune not in (None, NO_TRAINING)
    skipped = "not certified" if model.coverage is None else f"{percent(model.coverage.share)} of the blocks' weights"
    return {
        "Model": f"{model_name(results)}, {model.parameters:,} parameters, architecture {model.fingerprint}",
        "Weights": f"SHA-256 {weights.sha256}; from {weights.origin}"
        + (f", revision {weights.revision}" if weights.revision else "")
        + (f"; trained ({trained.finetune}) in {trained.epochs} epochs" if tuned else ""),
        **(
            {"Soft prompt": f"{prompt.tokens} virtual tokens, SHA-256 {prompt.sha256}; {prompt.origin}"}
            if prompt
            else {}
        ),
        "Data": f"{data_name(results)}, {len(results.dataset.classes)} classes",
        "Neurons": f"{model.neurons:,} at {len(model.sites)} places; what acts through them: {skipped}",
        "Method": f"seed {results.config.get('seed')}; skills chosen by this rule: {results.selection.rule}"
        if results.selection
        else f"seed {results.config.get('seed')}",
        "Software": f"skillfast {ran.skillfast}, Python {ran.python}, torch {ran.torch}, NumPy {ran.numpy}"
        + "".join(f", {name} {version}" for name, version in ran.libraries.items()),
        "Device": f"{ran.device} ({ran.device_name}), threads used: {ran.threads}, {ran.platform}",
    }


def _data(results: BenchResults) -> str:
    """A row per part of the data: examples and digests."""
    data = results.dataset
    rows = [
        [use, f"{n:,}", code(digests.examples), code(digests.labels)]
        for use, n, digests in (
            ("to choose skills", data.n_select, data.digests.select),
            ("to choose a method", data.n_validate, data.digests.validate),
            ("to measure", data.n_test, data.digests.test),
        )
    ]
    return table(["data", "examples", "SHA-256 of the examples", "SHA-256 of the labels"], rows)


def write_figures(directory: Path, kind: str) -> list[Path]:
    """Write every figure as a file; see `skillfast.report.write_figures`."""
    try:
        import kaleido
    except ImportError as error:
        raise ArgumentError(
            f"format: expected html, markdown or cyclonedx without kaleido, got {kind!r}; "
            "pip install 'skillfast[figures]'"
        ) from error
    from skillfast.report.bench import connections, page

    found = records.read(skills.Skills, directory / skills.FILE, bench.REMEDY)
    results = records.read(bench.BenchResults, directory / bench.FILE, bench.REMEDY)
    skills.check_of_run(found, results)
    made = {**page.make_figures(results, found), "connections": connections.figure(results)}
    figures = {name: figure for name, figure in made.items() if figure is not None and _drawn(figure)}
    folder = directory / FIGURES
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.{kind}" for name in figures]
    asked = [
        {"fig": _as_shown(figure), "path": path, "opts": {"format": kind, **_size(name, figure)}}
        for (name, figure), path in zip(figures.items(), paths, strict=True)
    ]
    script = resources.files("skillfast.report").joinpath("plotly.min.js")
    with resources.as_file(script) as plotly:
        try:
            kaleido.write_fig_from_object_sync(asked, kopts={"plotlyjs": str(plotly)})
        except Exception as error:
            if "chrome" not in type(error).__name__.lower():
                raise
            raise ArgumentError(
                f"format: expected html, markdown or cyclonedx without a browser, got {kind!r}; install Chromium or "
                "Chrome"
            ) from error
    return paths


def _drawn(figure: Mapping[str, Any]) -> bool:
    """Whether there is something in it before someone steps through it."""
    return any(value is not None for trace in figure["data"] for value in trace.get("z") or trace.get("y") or ())


def _size(name: str, figure: Mapping[str, Any]) -> dict[str, int]:
    kind = "heatmap" if figure["data"][0]["type"] == "heatmap" else name.partition("-")[0]
    width, height = SIZES.get(kind, SIZES["other"])
    return {"width": width, "height": height}


def _as_shown(figure: Mapping[str, Any]) -> dict[str, Any]:
    """A figure with the page's light colours in place of their names, on white, with as many ticks as fit."""
    style = resources.files("skillfast.report").joinpath("page.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"(--[\w-]+): (#\w+);", style.partition("}")[0]))

    def themed(value: Any) -> Any:
        if isinstance(value, str):
            return light[value[4:-1]] if value.startswith("var(") else value
        if isinstance(value, dict):
            return {key: themed(item) for key, item in value.items()}
        return [themed(item) for item in value] if isinstance(value, list | tuple) else value

    still = {"paper_bgcolor": "var(--panel)", "shapes": [], "margin": {"l": 20, "r": 8, "t": 8, "b": 8}}
    layout = themed({**figure["layout"], **still})
    for axis in ("xaxis", "yaxis"):
        ticks = layout[axis].get("tickvals") or []
        every = -(-len(ticks) // MOST_TICKS) or 1
        layout[axis] |= {key: layout[axis][key][::every] for key in ("tickvals", "ticktext") if ticks}
    return {"data": themed(figure["data"]), "layout": layout}
