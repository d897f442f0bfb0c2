import re
import shutil
import sys

import pytest
import report_sample as sample
from click.testing import CliRunner

from skillfast.cli import main
from skillfast.report import exports, write_card, write_figures
from skillfast.report.bench import page
from skillfast.results import records
from skillfast.results.bench import BenchResults
from skillfast.results.skills import Skills

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


@pytest.fixture
def run(tmp_path):
    """A folder as `bench` leaves it, with a class whose name is markup."""
    results = sample.sample_results(4, names={1: "a | b <i>*c*</i>"})
    found = (
        records.from_json(BenchResults, results, "", ""),
        records.from_json(Skills, sample.sample_skills(results), "", ""),
    )
    records.write(found[0], tmp_path / "results.json")
    records.write(found[1], tmp_path / "skills.json")
    return tmp_path, *found


def test_card_has_the_numbers_and_no_markup_of_names(run):
    folder, results, _ = run
    text = write_card(folder).read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines[:6]}) == 1
    of_class = next(line for line in lines if line.startswith("| a "))
    assert r"a \| b &lt;i&gt;\*c\*&lt;/i&gt;" in of_class
    assert f"{100 * results.selectivity.target_drop:.1f}" in lines[2]
    assert results.model.fingerprint in text
    assert f"torch {results.environment.torch}" in text
    assert text.count("skillfast bench --") == 1


def test_figures_have_the_light_colours_and_as_many_ticks_as_fit():
    results = sample.sample_results(100)
    typed = records.from_json(BenchResults, results, "", "")
    skills = records.from_json(Skills, sample.sample_skills(results), "", "")
    figures = page.make_figures(typed, skills)
    assert not exports._drawn(figures["removal-steps"])
    for name, figure in figures.items():
        assert exports._drawn(figure) == (name != "removal-steps")
        shown = exports._as_shown(figure)
        assert "var(--" not in str(shown)
        assert all(len(shown["layout"][axis].get("tickvals", [])) <= exports.MOST_TICKS for axis in ("xaxis", "yaxis"))
    matrix = exports._as_shown(figures["removal-matrix"])
    assert matrix["layout"]["xaxis"]["tickvals"][1] == figures["removal-matrix"]["data"][0]["x"][3]
    assert exports._size("removal-matrix", matrix) == {"width": 760, "height": 760}
    assert exports._size("selectivity-harm", figures["selectivity-harm"])["height"] < 200


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on PATH")
def test_figures_are_written(run):
    pytest.importorskip("kaleido")
    folder, *found = run
    paths = write_figures(folder, "svg")
    names = {path.stem for path in paths}
    assert names == set(page.make_figures(*found)) - {"removal-steps"}
    assert all(path.read_text().startswith("<svg") for path in paths)
    assert "change in accuracy, percentage points" in (folder / "figures" / "removal-matrix.svg").read_text()


def test_command_writes_what_it_is_asked_for(run, monkeypatch):
    folder, *_ = run
    done = CliRunner().invoke(main, ["report", str(folder), "--format", "markdown"])
    assert done.output == f"model card: {folder / 'model-card.md'}\n"
    monkeypatch.setitem(sys.modules, "kaleido", None)
    done = CliRunner().invoke(main, ["report", str(folder), "--format", "svg"])
    assert done.exit_code == 2
    assert "skillfast[figures]" in done.output
    assert not (folder / "figures").exists()
