"""Commands on folders that are no runs, and on files that cannot be used: one line, and nothing is overwritten."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import readers
from click.testing import CliRunner
from conftest import one_line

from skillfast.cli import main
from skillfast.errors import DataError
from skillfast.results.bench import FILE

FILES = ("results.json", "skills.json", "decisions.safetensors", "scores.safetensors")
NOT_RUNS = {  # folder -> what is told of its first file
    "empty": "expected a file, got none; ",
    "missing": "expected a file, got none; ",
    "notes": "expected a file, got none; ",
    "file": " got ",  # a file in place of a folder is read where one is taken
    "newer": "/9'; read it with the newer version of skillfast",
    "loop": "expected a readable file, got Too many levels of symbolic links; check it and its folder",
    "closed": "expected a readable file, got Permission denied; check it and its folder",
    "folders": "expected a readable file, got Is a directory; check it and its folder",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    readers.run_folder(root / "good")
    for name in ("empty", "notes"):
        (root / name).mkdir()
    (root / "notes" / "readme.md").write_text("no run")
    (root / "file").write_text("no run")
    for name in ("newer", "loop", "closed", "folders"):
        folder = readers.run_folder(root / name)
        readers.scores().save(folder)
        for file in FILES:
            if name == "newer" and file.endswith(".json"):
                value = json.loads((folder / file).read_text())
                value["schema"] = value["schema"].replace("/1", "/9")
                (folder / file).write_text(json.dumps(value))
            elif name == "newer":
                path = folder / file
                path.write_bytes(path.read_bytes().replace(b"skillfast.scores/1", b"skillfast.scores/9"))
            elif name == "closed":
                (folder / file).chmod(0)
            else:
                (folder / file).unlink()
                (folder / file).mkdir() if name == "folders" else (folder / file).symlink_to(file)
    return root


def commands(folder, good, output):
    """Every command that reads a folder, and whether it writes another one."""
    return (
        ["report", folder],
        ["report", folder, "--format", "markdown"],
        ["compare", good, folder, "--output", output],
        ["compare", folder, good, "--output", output, "--format", "junit"],
        ["compare", good, folder, good],
        ["evaluate", "--skills", folder, "--output", output],
        ["ablate", "--skills", folder],
        ["ablate", "--skills", good, "--mode", "mean", "--reference", folder],
        ["export", "--skills", folder, "--output", output],
        ["bench", "--like", folder, "--checkpoint", good, "--output", output],
        ["bench", "--replay", folder, "--output", output],
    )


@pytest.mark.parametrize("name", NOT_RUNS)
def test_a_folder_that_is_no_run_is_told_and_nothing_is_overwritten(folders, tmp_path, name, monkeypatch):
    if name == "closed" and os.geteuid() == 0:  # who may read everything
        for method in ("read_text", "open"):
            monkeypatch.setattr(Path, method, denied(getattr(Path, method)))
    kept = {file: f"{file} of an earlier run" for file in (*FILES, "compare.json", "compare.html", "evaluation.json")}
    for file, text in kept.items():
        (tmp_path / file).write_text(text)
    before = {path: path.lstat().st_mtime_ns for path in (folders / name).rglob("*")}
    for command in commands(folders / name, folders / "good", tmp_path):
        done = CliRunner().invoke(main, [str(argument) for argument in command])
        assert (type(done.exception), done.exit_code) == (SystemExit, 1), command
        assert done.output.count("\n") == 1, done.output
        assert NOT_RUNS[name] in done.output
        assert done.output.startswith("Error: ")
        assert ": expected " in done.output
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == kept, command
    assert {path: path.lstat().st_mtime_ns for path in (folders / name).rglob("*")} == before


def denied(method):
    def refused(path, *arguments, **more):
        if path.parent.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return method(path, *arguments, **more)

    return refused


def test_a_page_that_cannot_be_written_is_told(tmp_path):
    folder = readers.run_folder(tmp_path)
    (folder / "report.html").mkdir()
    done = CliRunner().invoke(main, ["report", str(folder)])
    assert done.exit_code == 1
    assert done.output.count("\n") == 1
    assert ": expected a file that can be read or written, got Is a directory; check it" in done.output
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_not_a_number_is_undefined_where_a_value_may_be_and_else_refused(tmp_path):
    folder = readers.run_folder(tmp_path)
    text = json.loads((folder / FILE).read_text())
    ratio, accuracy = json.dumps(text), json.loads(json.dumps(text))
    undefined = json.loads(ratio)
    undefined["selectivity"]["ratio"] = float("nan")
    (folder / FILE).write_text(json.dumps(undefined))
    assert readers.read_results(folder).selectivity.ratio is None
    assert CliRunner().invoke(main, ["report", str(folder)]).exit_code == 0
    accuracy["baseline"]["accuracy"] = float("nan")
    (folder / FILE).write_text(json.dumps(accuracy))
    done = CliRunner().invoke(main, ["report", str(folder)])
    assert done.exit_code == 1
    assert "results.json: expected `float` at baseline.accuracy, got `null`; " in done.output


def test_measures_that_a_file_does_not_name_are_refused(tmp_path):
    kind = readers.KINDS["evaluation.json"]
    kind.make(tmp_path)
    path = tmp_path / kind.file
    results = json.loads(path.read_text())
    for part in ("values", "ci95"):
        other = json.loads(json.dumps(results))
        other["intact"][part]["speed"] = other["intact"][part]["accuracy"]
        path.write_text(json.dumps(other))
        told = one_line(DataError, kind.read, tmp_path)
        assert "expected of the measures accuracy, f1_macro, " in told
        assert " at intact, got 'speed'; " in told


def test_what_a_page_needs_of_a_file_is_asked_of_the_file(tmp_path):
    """Places that mutated files were found to lack, after which a page could not be made."""
    changes = {
        "evaluation.json": [
            (("intact", "per_class"), None, "expected per_class at intact of a classifier alone, got another task; "),
            (("task",), "causal", "expected per_class at intact of a classifier alone, got another task; "),
            (("tasks", "expected_shared", 0, 1), None, "expected numbers off the diagonal at tasks.expected_shared, "),
            (("tasks", "shared", 0, 0), None, "expected `int` at tasks.shared[0][0], got `null`; "),
        ],
        "results.json": [(("selection", "gap"), {"regret": 0.1}, "expected the key target_drop at selection.gap, ")],
    }
    for name, wrong in changes.items():
        kind = readers.KINDS[name]
        path = tmp_path / kind.file
        kind.make(tmp_path)
        raw = path.read_text()
        for place, value, words in wrong:
            results = at = json.loads(raw)
            for key in place[:-1]:
                at = at[key]
            at[place[-1]] = value
            path.write_text(json.dumps(results))
            assert words in one_line(DataError, kind.read, tmp_path)
