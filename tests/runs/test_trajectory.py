"""Several runs in their order: when each skill appears, where it moves, the page, and the command."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
import report_sample as sample
from click.testing import CliRunner
from compared import planted, wrong
from conftest import one_line

import skillfast
from skillfast.cli import main
from skillfast.errors import ArgumentError
from skillfast.evaluation.comparison import Measured
from skillfast.results import records
from skillfast.results.decisions import Decisions
from skillfast.results.trajectory import Trajectory

CLASSES = tuple(sample.class_names(10))
DEER, CAT = CLASSES.index("deer"), CLASSES.index("cat")


def write(folder, labels, measured, order, *, cat_moved=False):
    """A run's folder with these decisions, its examples in an order of its own.

    Cat may have moved to other neurons, of the first block; dog's effect lies there, too, but its neurons stay.
    """
    folder.mkdir(parents=True)
    results = sample.sample_results(10)
    text = json.dumps(results)
    for name, new in zip(results["dataset"]["classes"], CLASSES, strict=True):
        text = text.replace(json.dumps(name), json.dumps(new))
    results = json.loads(text)
    if cat_moved:
        for block in results["layer_contribution"]["per_block"]:
            block["per_class"] |= dict.fromkeys(("cat", "dog"), float(block["block"] == 0))
    (folder / "results.json").write_text(json.dumps(results))
    skills = sample.sample_skills(results)
    for skill, name in zip(skills["skills"], CLASSES, strict=True):
        skill["name"] = name
        if cat_moved and name == "cat":
            widths = {site["name"]: site["width"] for site in results["model"]["sites"]}
            skill["neurons"] = {
                site: sorted({*range(widths[site])} - {*index})[: len(index)]
                for site, index in skill["neurons"].items()
            }
    (folder / "skills.json").write_text(json.dumps(skills))
    Decisions(
        classes=CLASSES,
        labels=labels[order],
        digests=order.astype(np.uint64),
        intact=measured.intact[order],
        removed=measured.removed[:, order],
        log_probabilities=np.zeros((len(order), 10), np.float16),
    ).save(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs: of the first deer is not known yet; in the last cat's effect lies in the first block."""
    folder, rng = tmp_path_factory.mktemp("training"), np.random.default_rng(5)
    labels, base, _ = planted(rng, n=100)
    early = np.where(labels == DEER, wrong(labels, 10), base.intact)
    removed = np.where(labels == DEER, early, base.removed)
    orders = [rng.permutation(1000) for _ in range(3)]
    return [
        write(folder / "1000", labels, Measured(early, removed, None), orders[0]),
        write(folder / "2000", labels, base, orders[1]),
        write(folder / "3000", labels, base, orders[2], cat_moved=True),
    ], labels, base  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_skills_are_followed(runs, tmp_path):
    folders, labels, base = runs
    found = skillfast.trajectory(*folders, output=tmp_path)
    assert (found.n, found.reasons, list(found.skills)) == (1000, [], list(CLASSES))
    deer, cat = found.skills["deer"], found.skills["cat"]
    assert {name: skill.appears for name, skill in found.skills.items()} == {
        name: 1 if name == "deer" else 0 for name in CLASSES
    }
    assert {name: skill.moves for name, skill in found.skills.items()} == {
        name: [2] if name == "cat" else [] for name in CLASSES
    }
    assert [at.verdicts for at in deer.runs] == [[], ["gained"], ["unchanged"]]
    assert [at.moved for at in cat.runs] == [[], [], ["blocks"]]
    assert cat.runs[2].verdicts == skillfast.compare(*folders[1:]).skills["cat"].verdicts == ["moved"]
    assert cat.runs[0].overlap is None
    assert cat.runs[1].overlap.jaccard == 1
    right = base.intact[labels == DEER] == DEER
    without = base.removed[DEER, labels == DEER] == DEER
    assert [at.accuracy.value for at in deer.runs] == pytest.approx([0, right.mean(), right.mean()])
    assert [at.drop.value for at in deer.runs] == pytest.approx([0, *[right.mean() - without.mean()] * 2])
    for at in deer.runs:
        for estimate in (at.accuracy, at.drop):
            assert estimate.ci95[0] <= estimate.value <= estimate.ci95[1]
            assert estimate.ci95[1] - estimate.ci95[0] > 0.02
    before = {place: max(share, 0) for place, share in cat.runs[0].blocks.items()}
    last = max(int(place) for place in before if place != "head") + 1
    depth = sum(share * (last if place == "head" else int(place)) for place, share in before.items())
    assert [at.depth for at in cat.runs] == pytest.approx([depth / sum(before.values())] * 2 + [0])
    assert [run.accuracy for run in found.runs] == pytest.approx([np.mean(base.intact == labels) - right.mean() / 10,
                                                                 *[np.mean(base.intact == labels)] * 2])  # fmt: skip
    written = json.loads((tmp_path / "trajectory.json").read_text())
    jsonschema.validate(written, records.schema(Trajectory))
    assert records.read(Trajectory, tmp_path / "trajectory.json", "again") == found
    page = (tmp_path / "trajectory.html").read_text()
    for words in ("In 2000 appears deer.", "Moved later: cat.", 'id="depth"', "3000 (to other blocks)"):
        assert words in page
    (tmp_path / "trajectory.html").unlink()
    assert run("report", tmp_path).output.strip() == f"report: {tmp_path / 'trajectory.html'}"
    assert (tmp_path / "trajectory.html").read_text() == page


def test_the_command_shows_them(runs, tmp_path):
    folders, labels, base = runs
    result = run("compare", *folders, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "In 1000 appear airplane, automobile" in result.output
    assert "Moved later: cat." in result.output
    assert "baseline accuracy" in result.output
    shown = run("compare", *folders, "--output", tmp_path, "--format", "json")
    assert json.loads(shown.output) == json.loads((tmp_path / "trajectory.json").read_text())
    still = run("compare", folders[1], folders[1], folders[1], "--output", tmp_path, "--quiet")
    assert still.output == f"report: {tmp_path / 'trajectory.html'}\n"
    assert not [s for s in skillfast.trajectory(*[folders[1]] * 3).skills.values() if s.moves or s.appears != 0]
    others = write(tmp_path / "others", labels, base, np.arange(1000))
    found = Decisions.load(others)
    Decisions(**vars(found) | {"digests": found.digests + np.uint64(5000)}).save(others)
    none = run("compare", folders[0], folders[1], others, "--output", tmp_path)
    assert (none.exit_code, "nothing can be said" in none.output) == (4, True)
    assert "expected two or more, got 1" in one_line(ArgumentError, skillfast.trajectory, folders[0])
