"""The comparison of ways to unlearn a class, on the digits, with few steps."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

import skillfast
from skillfast.runs.session import open_session


@pytest.fixture(scope="module")
def unlearning():
    path = ROOT / "examples" / "unlearning" / "unlearning.py"
    spec = importlib.util.spec_from_file_location("unlearning", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["unlearning"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no neuron was chosen")
def test_every_way_leaves_what_it_should(unlearning, trained_digits, monkeypatch):
    said = []
    monkeypatch.setattr(unlearning, "MOST_STEPS", 10)
    monkeypatch.setattr(skillfast, "learn_masks", functools.partial(skillfast.learn_masks, steps=60))
    with open_session(skillfast.BenchConfig.of()) as session:
        rows = unlearning.compare(session.subject, 3, tune=24, retrain_epochs=4, found=said.append)
    found = {row.name: row for row in rows}
    assert said == rows
    intact, mask, erased, retrained = (
        found[name] for name in ("intact", "removal, learned mask", "removal, erasing mask", "retrained without it")
    )
    assert (intact.readout_lost, intact.information_lost, intact.relearned_in) == (0, 0, 0)
    assert intact.forgotten > 0.8
    assert max(mask.forgotten, erased.forgotten) < 0.5
    assert min(mask.retained, erased.retained) > intact.retained - 0.05
    assert mask.information_lost < 0.5 * mask.readout_lost  # hidden more than gone
    assert retrained.forgotten == 0
    assert retrained.readout_lost == 1
    assert retrained.information_lost < 0.9  # a probe reads a class that the model never saw
    assert retrained.relearned_in != 0
    assert found["NegGrad+"].forgotten < intact.forgotten
    assert min(row.seconds for row in rows[1:]) > 0


def test_a_file_of_rows_is_gone_on_with(unlearning, monkeypatch, tmp_path, capsys):
    """Rows that are there are not made again; those of other settings end the run."""
    path, made = tmp_path / "rows.json", []

    def compare(_, target, *, found, ways, **settings):
        assert target == 3
        for name in sorted(ways):  # in any order
            made.append(name)
            found(unlearning.Row(name, 0.9, 0.1, 0.5, 0.25, None, 0.5, 2.0))

    monkeypatch.setattr(unlearning, "compare", compare)
    monkeypatch.setattr(unlearning, "open_session", lambda _: contextlib.nullcontext(stand_in()))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["unlearning.py", "--json", str(path), *arguments])
        unlearning.main()

    run("--only", "NegGrad+", "--only", "intact")
    assert made == ["NegGrad+", "intact"]
    run()
    assert sorted(made) == sorted(unlearning.WAYS)
    found = json.loads(path.read_text())
    assert [row["name"] for row in found["rows"]] == list(unlearning.WAYS)
    assert (found["class"], found["tuning_steps"], found["examples"]) == ("three", 240, {"select": 3, "test": 2})
    assert "0.2 minutes of processor time" in capsys.readouterr().out
    run("--table", str(path))
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [
        "| | retained | forgotten | readout lost | information lost | relearned in | membership | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    assert printed[2] == "| intact | 90.0 | 10.0 | 50.0 | 25.0 | more than 120 | 50.0 | 2 |"
    before = path.read_text()
    with pytest.raises(
        SystemExit, match="expected rows of the same settings, got another retrain_epochs, seed, tuning_steps"
    ):
        run("--quick", "--retrain-epochs", "0", "--seed", "1")
    assert path.read_text() == before


def test_the_page_has_what_the_files_say(unlearning):
    """Tables are those that `--table` prints of the committed files, of which each has a place."""
    folder = ROOT / "examples" / "unlearning"
    page, files = (folder / "README.md").read_text(), sorted((folder / "results").glob("*.json"))
    assert files
    for path in files:
        assert unlearning.table(path) in page
        assert f"results/{path.name}" in page


def stand_in():
    """A session with as much as a run reads of it."""
    splits = SimpleNamespace(classes=["zero", "one", "two", "three"], select=range(3), test=range(2))
    return SimpleNamespace(subject=SimpleNamespace(splits=splits))
