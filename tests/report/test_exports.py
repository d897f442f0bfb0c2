import html
import json
import re
import shutil
import sys

import pytest
import report_sample as sample
from click.testing import CliRunner

from skillfast.cli import main
from skillfast.report import bom, exports, write_card, write_figures
from skillfast.report.bench import page, words
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
    for known in (
        results.model.fingerprint,
        f"SHA-256 {sample.WEIGHTS['sha256']}; from random weights of seed 0; trained (all) in 60 epochs",
        f"| to choose skills | 898 | `{'0e' * 32}` | `{'0f' * 32}` |",
        f"| to choose a method | 449 | `{'1e' * 32}` | `{'1f' * 32}` |",
        f"| to measure | 200 | `{'2e' * 32}` | `{'2f' * 32}` |",
        f"skillfast 0.1.0, Python 3.11.7, torch {results.environment.torch}, NumPy 2.4.6, timm 1.0.31",
        "cpu (CPU), threads used: 2, Linux x86\\_64",
        "seed 0; skills chosen by this rule: the best on the validation part",
        "It was not certified that the traced neurons hold",
        "\n```\nskillfast bench --no-pretrained --finetune all --dataset digits",
    ):
        assert known in text, known


def test_a_card_of_weights_that_are_measured_as_they_are():
    results = sample.sample_results(2, optional=False)
    results["model"]["trained"] = {"from": "pretrained", "finetune": "none"}
    results["model"]["weights"] |= {"origin": "timm/x_y", "revision": "abc"}
    text = exports.card(records.from_json(BenchResults, results, "", ""))
    assert f"- **Weights**: SHA-256 {sample.WEIGHTS['sha256']}; from timm/x\\_y, revision abc\n" in text
    assert "Soft prompt" not in text
    results["model"]["soft_prompt"] = {"tokens": 16, "sha256": "ab" * 32, "origin": "tuned"}
    text = exports.card(records.from_json(BenchResults, results, "", ""))
    assert f"- **Soft prompt**: 16 virtual tokens, SHA-256 {'ab' * 32}; tuned\n" in text


def test_the_bom_is_valid_and_names_what_the_results_name(run):
    pytest.importorskip("cyclonedx", reason="needs cyclonedx-python-lib")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    folder, results, _ = run
    done = CliRunner().invoke(main, ["report", str(folder), "--format", "cyclonedx"])
    assert done.output == f"ML-BOM: {folder / 'ml-bom.cdx.json'}\n"
    text = (folder / "ml-bom.cdx.json").read_text()
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    found = json.loads(text)
    assert validator.validate_str(json.dumps(found | {"serialNumber": "urn:uuid:none"})) is not None
    model = found["metadata"]["component"]
    assert model["hashes"] == [{"alg": "SHA-256", "content": sample.WEIGHTS["sha256"]}]
    properties = {each["name"]: each["value"] for each in model["properties"]}
    assert properties["skillfast:setting:seed"] == "0"
    assert properties["skillfast:setting:sites"] == '["mlp", "attn", "head"]'
    assert properties["skillfast:origin"] == "random weights of seed 0"
    parts = [each for each in found["components"] if each["type"] == "data"]
    assert [each["bom-ref"] for each in parts] == ["data/select", "data/validate", "data/test"]
    assert [each["hashes"][0]["content"] for each in parts] == [f"{i}e" * 32 for i in range(3)]
    assert [each["description"].split(" examples")[0] for each in parts] == ["898", "449", "200"]
    labels = [
        each["value"] for part in parts for each in part["properties"] if each["name"] == "skillfast:labels-sha256"
    ]
    assert labels == [f"{i}f" * 32 for i in range(3)]
    assert found["dependencies"][0]["dependsOn"][:3] == [each["bom-ref"] for each in parts]
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    sliced = {(each["type"], each.get("slice")): each for each in metrics}
    assert len(sliced) == len(metrics)
    lost, name = "accuracy lost by a class without its skill", results.dataset.classes[1]
    ends = results.selectivity.ci95.target_drop
    assert sliced[lost, None] == {
        "type": lost, "value": f"{results.selectivity.target_drop:.6g}",
        "confidenceInterval": {"lowerBound": f"{ends[0]:.6g}", "upperBound": f"{ends[1]:.6g}"},
    }  # fmt: skip
    assert sliced[lost, f"class {name}"]["value"] == f"{-results.removal_matrix[1][1]:.6g}"
    first = sliced[lost, f"class {results.dataset.classes[0]}"]  # whose verdict has an interval
    assert first["confidenceInterval"] == {"lowerBound": "0.8", "upperBound": "0.95"}
    assert sliced["accuracy", f"class {name}"]["value"] == f"{results.baseline.per_class[1]:.6g}"


def test_equal_results_have_one_serial_number():
    def serial(**changed):
        results = sample.sample_results(2, optional=False)
        results["model"]["weights"] = {**sample.WEIGHTS, **changed}
        return bom.bom(records.from_json(BenchResults, results, "", ""))["serialNumber"]

    assert serial() == serial() != serial(sha256="00" * 32)


def test_a_bom_says_what_is_known_and_no_more():
    results = sample.sample_results(2)
    results["environment"] |= {"libraries": {"acme": "2"}, "torch": "2.15.0+cpu"}
    results["dataset"]["name"] = "given"
    results["model"]["weights"] |= {"revision": "abc"}
    results["model"]["soft_prompt"] = {"tokens": 16, "sha256": "ab" * 32, "origin": "tuned", "steps": 9}
    results["model"]["coverage"] = {
        "share": 0.75, "complete": False, "missing": {"x": 0.25}, "unexercised": {}, "inputs": "y"
    }  # fmt: skip
    results["information"]["per_class"]["airplane"]["information_lost"] = None
    found = bom.bom(records.from_json(BenchResults, results, "", ""))
    libraries = {each["name"]: each.get("purl") for each in found["components"][3:]}
    assert libraries == {"numpy": "pkg:pypi/numpy@2.4.6", "torch": "pkg:pypi/torch@2.15.0%2Bcpu", "acme": None}
    model = found["metadata"]["component"]
    assert model["modelCard"]["modelParameters"]["outputs"] == [{"format": "logits of 2 classes"}]
    assert "inputs" not in model["modelCard"]["modelParameters"]
    assert {"name": "skillfast:revision", "value": "abc"} in model["properties"]
    assert {"name": "skillfast:soft-prompt:sha256", "value": "ab" * 32} in model["properties"]
    assert {"name": "skillfast:soft-prompt:steps", "value": "9"} in model["properties"]
    limits = model["modelCard"]["considerations"]["technicalLimitations"]
    assert limits[0] == "25.0\u00a0% of the weights of the model's blocks act past the traced neurons."
    results["model"]["coverage"] |= {"share": 1.0, "complete": True, "missing": {}}
    assert words.limits(records.from_json(BenchResults, results, "", "")) == limits[1:]
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert [each.get("slice") for each in metrics if "probe" in each["type"]] == [None, "class automobile"]


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
    assert names == {*page.make_figures(*found), "connections"} - {"removal-steps"}
    assert all(path.read_text().startswith("<svg") for path in paths)
    graph = (folder / "figures" / "connections.svg").read_text()
    assert "a removal harms" in graph
    assert "<i>" not in graph
    assert "<i>*c*</i>" in html.unescape(graph)
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
