"""Two runs compared: what a run keeps for it, other data, the gate's exit codes, the page, and `--like`."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import msgspec
import numpy as np
import pytest
import report_sample as sample
import torch
import yaml
from browsing import barriers, draw_all, unheard
from click.testing import CliRunner
from compared import planted, wrong
from conftest import ROOT, one_line

import skillfast
from skillfast import BenchConfig
from skillfast.cli import main
from skillfast.errors import ArgumentError, DataError, ModelError, NotComparableError
from skillfast.evaluation.comparison import Measured
from skillfast.files import checksum, metadata
from skillfast.report import comparison_text, replay_text, write_comparison
from skillfast.report.comparison import words as comparison_words
from skillfast.report.comparison.page import _tiles
from skillfast.results import records
from skillfast.results.comparison import Comparison
from skillfast.results.decisions import Decisions
from skillfast.results.skills import Skills, skills_digest
from skillfast.runs import measure
from skillfast.runs.compare import compare
from skillfast.runs.measure import settings_of
from skillfast.runs.replay import Earlier
from skillfast.testing import assert_no_regression

CLASSES = tuple(sample.class_names(10))


def write(folder, labels, measured, *, classes=CLASSES, digests=None, base=None, seed=0, in_earlier=None, **changed):
    """A run's folder with these decisions; `base` is the folder whose skills were removed, too."""
    folder.mkdir(parents=True)
    results = sample.sample_results(len(classes))
    skills = sample.sample_skills(results)
    old = results["dataset"]["classes"]
    text = json.dumps(results)
    for name, new in zip(old, classes, strict=True):
        text = text.replace(json.dumps(name), json.dumps(new))
    results = json.loads(text)
    for skill, name in zip(skills["skills"], classes, strict=True):
        skill["name"] = name
    if seed:
        skills["skills"][0]["neurons"] = {"blocks.0.mlp": [seed]}
    results["config"] |= changed
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "skills.json").write_text(json.dumps(skills))
    theirs = None if base is None else records.read(Skills, base / "skills.json", "again")
    probabilities = np.full((len(labels), len(classes)), np.log(0.1 / (len(classes) - 1)))
    probabilities[np.arange(len(labels)), measured.intact] = np.log(0.9)
    Decisions(
        classes=tuple(classes),
        labels=labels,
        digests=np.arange(len(labels), dtype=np.uint64) if digests is None else digests,
        intact=measured.intact,
        removed=measured.removed,
        log_probabilities=probabilities.astype(np.float16),
        earlier=None if theirs is None else measured.removed,
        earlier_classes=() if theirs is None else tuple(classes),
        earlier_skills=None if theirs is None else skills_digest(theirs),
        in_earlier=in_earlier,
    ).save(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """BASE, and NEW that lost most of deer, measured without BASE's skills."""
    folder = tmp_path_factory.mktemp("runs")
    labels, base, _ = planted(np.random.default_rng(3), n=100)
    deer = CLASSES.index("deer")
    lost = (labels == deer) & (np.arange(1000) % 10 > 0)
    intact = np.where(lost, wrong(labels, 10), base.intact)
    new = Measured(intact, np.where(lost, intact, base.removed), None)
    one = write(folder / "base", labels, base)
    return one, write(folder / "new", labels, new, base=one), labels, base


def gates(folder, text):
    path = folder / "gates.toml"
    path.write_text(text)
    return path


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


EVERY = '[skill."*"]\nmax_weakening = 0.05\n'


def test_a_lost_class_is_named_and_nothing_else(runs, tmp_path):
    base, new, _, _ = runs
    found = compare(base, new, output=tmp_path)
    assert {name: skill.verdicts for name, skill in found.skills.items()} == {
        name: ["lost"] if name == "deer" else ["unchanged"] for name in CLASSES
    }
    assert found.skills["deer"].accuracy.change < -0.8
    assert found.skills["deer"].base_skill.new < 0.2
    assert found.reasons == []
    assert found.overall.kl.mean > 0.05
    written = json.loads((tmp_path / "compare.json").read_text())
    jsonschema.validate(written, records.schema(Comparison))
    assert records.read(Comparison, tmp_path / "compare.json", "again") == found
    for one in (found.base, found.new):
        assert (one.weights.sha256, one.weights.origin) == (sample.WEIGHTS["sha256"], "random weights of seed 0")
        assert (one.data.examples, one.data.labels) == ("2e" * 32, "2f" * 32)  # of the test part
    page = (tmp_path / "compare.html").read_text()
    assert [page.count(each) for each in (sample.WEIGHTS["sha256"], "2e" * 32, "2f" * 32)] == [2, 2, 2]
    both = msgspec.structs.replace(found.skills["deer"], verdicts=["weakened", "moved"], moved=["blocks"])
    said = comparison_words.sentences(msgspec.structs.replace(found, skills=found.skills | {"deer": both}))
    assert said[:2] == ["Weakened: deer.", "Moved: deer."]
    assert comparison_words.verdict(both) == "weakened, moved (to other blocks)"
    quiet = msgspec.structs.replace(found.skills["cat"], verdicts=["weakened"])  # its accuracy holds
    assert comparison_words.verdict(quiet) == "weakened in its neurons"
    for skills, below in ((found.skills, "of 10 classes"), (found.skills | {"cat": quiet}, "of 10 classes; 1 more in")):
        tile = _tiles(msgspec.structs.replace(found, skills=skills))[1]
        assert tile[:2] == ("lost, weakened or merged", "1")
        assert tile[2].startswith(below)


def test_a_run_against_itself_is_unchanged(runs):
    base, _, _, _ = runs
    found = compare(base, base, gate={"skill": {"*": {"max_weakening": 0.05}}, "overall": {"max_kl": 0.0}})
    assert {skill.verdicts[0] for skill in found.skills.values()} == {"unchanged"}
    assert found.interference == []
    assert found.passed
    assert all(skill.overlap.jaccard == 1 and not skill.left and not skill.taken for skill in found.skills.values())


def test_neurons_are_named(runs, tmp_path):
    base, _, labels, measured = runs
    other = write(tmp_path / "other", labels, measured, seed=7)
    skill = compare(base, other).skills[CLASSES[0]]
    assert (skill.taken, skill.kept) == ({"blocks.0.mlp": [7]}, {})
    before = {entry["name"]: entry["neurons"] for entry in json.loads((base / "skills.json").read_text())["skills"]}
    assert skill.left == before[CLASSES[0]]
    assert skill.overlap.shared == 0
    assert skill.base_skill is None  # whoever was not measured without BASE's skills


def test_skills_are_exchanged_between_the_models(runs, tmp_path):
    """NEW's skill of cat takes all of cat in BASE, that of deer nothing, that of dog what was not shown."""
    base, _, labels, measured = runs
    cat, deer = CLASSES.index("cat"), CLASSES.index("deer")
    in_earlier = measured.removed.copy()
    in_earlier[cat, labels == cat] = wrong(cat, 10)
    in_earlier[deer] = measured.intact
    order = np.random.default_rng(1).permutation(1000)  # of NEW's examples
    new = write(
        tmp_path / "new", labels[order], Measured(measured.intact[order], measured.removed[:, order], None),
        digests=order.astype(np.uint64), base=base, in_earlier=in_earlier[:, order],
    )  # fmt: skip
    found = compare(base, new, output=tmp_path / "out")
    right, own = (measured.intact == labels)[labels == cat], measured.removed[cat, labels == cat] != cat
    skill = found.skills["cat"]
    assert skill.new_set.takes == pytest.approx(right.mean())
    assert skill.new_set.own == pytest.approx(right.mean() - 1 + own.mean())
    assert skill.new_set.ci95[0] < skill.new_set.takes < skill.new_set.ci95[1]
    assert (skill.new_skill.base, skill.in_base.new) == (skill.new_set.takes, skill.new_set.takes)
    assert (skill.in_base.base, skill.new_skill.new) == (skill.new_set.own, skill.drop.new)
    assert skill.new_skill.change == pytest.approx(skill.drop.new - skill.new_set.takes)
    assert skill.in_base.ci95[0] < skill.in_base.change < skill.in_base.ci95[1]
    assert skill.verdicts == ["unchanged"]  # what NEW's neurons do in BASE changes no verdict
    lost = found.skills["deer"]
    assert (lost.new_set.carries, lost.new_set.takes, lost.base_set.carries) == ("no", 0, "yes")
    assert lost.in_base.q < 0.05
    others = [name for name in CLASSES if name != "deer"]
    text = comparison_text(found, "text")
    assert f"NEW's neurons carried the class in BASE, too: {', '.join(others)}." in text
    assert "NEW's neurons did not carry the class in BASE: deer." in text
    told = comparison_text(found, "markdown")
    assert "### Skills removed from the other run's model" in told
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "carried the class" in page
    shown = run("compare", base, new, "--output", tmp_path / "out")
    assert "removed from the other run's model" in shown.output
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown.output  # 80 columns cut nothing off
    without = compare(base, write(tmp_path / "without", labels, measured, base=base))
    assert without.skills["cat"].new_set is without.skills["cat"].new_skill is without.skills["cat"].in_base is None
    assert without.skills["cat"].base_set.carries == "yes"
    assert "not measured" in comparison_text(without, "markdown")


def test_examples_are_paired_by_what_they_are(runs, tmp_path):
    """In another order, with some twice, and without some."""
    base, _, labels, measured = runs
    order = np.random.default_rng(0).permutation(1000)
    shuffled = Measured(measured.intact[order], measured.removed[:, order], None)
    other = write(tmp_path / "order", labels[order], shuffled, digests=order.astype(np.uint64))
    found = compare(base, other)
    assert (found.n, found.reasons) == (1000, [])
    assert found.overall.accuracy.p == 1
    assert all(skill.accuracy.ci95[1] < 0.05 for skill in found.skills.values())
    some = order[:700]
    part = Measured(measured.intact[some], measured.removed[:, some], None)
    fewer = write(tmp_path / "fewer", labels[some], part, digests=some.astype(np.uint64))
    found = compare(base, fewer, gate={"overall": {"max_weakening": 0.5}})
    assert (found.n, found.n_only_base, found.n_only_new) == (700, 300, 0)
    assert found.reasons == ["300 of 1,000 test examples are BASE's alone"]
    assert found.gate.decision == "not comparable"
    twice = write(tmp_path / "twice", labels, measured, digests=np.arange(1000, dtype=np.uint64) // 2)
    assert compare(twice, twice).n == 1000


def test_other_data_and_other_classes_pass_no_gate(runs, tmp_path):
    base, _, labels, measured = runs
    other = write(tmp_path / "other", labels, measured, digests=np.arange(5000, 6000, dtype=np.uint64))
    gate = gates(tmp_path, EVERY)
    result = run("compare", base, other, "--gate", gate, "--output", tmp_path / "out")
    assert result.exit_code == 4, result.output
    assert "No common example" in result.output
    assert "not comparable (other data or classes)" in result.output
    assert run("compare", base, other, "--output", tmp_path / "out").exit_code == 4
    names = [name if name != "frog" else "toad" for name in CLASSES]
    renamed = write(tmp_path / "renamed", labels, measured, classes=names)
    found = compare(base, renamed, gate=gate, output=tmp_path / "renamed_out")
    assert (found.only_base, found.only_new, found.n) == (["frog"], ["toad"], 900)
    assert "NEW lacks the classes frog" in found.reasons
    assert found.gate.decision == "not comparable"
    assert {c.outcome for c in found.gate.checks if c.skill in ("frog", "toad")} == {"undefined"}
    assert found.exit_code == 4
    assert "frog" in (tmp_path / "renamed_out" / "compare.html").read_text()
    scaled = write(tmp_path / "scaled", labels, measured, scale=0.5)
    assert compare(base, scaled).reasons == ["the setting scale differs: 0.0 and 0.5"]


@pytest.mark.parametrize("form", ["text", "json", "junit", "markdown"])
def test_exit_codes_are_the_same_in_every_format(runs, tmp_path, form):
    base, new, labels, measured = runs
    gate = gates(tmp_path, EVERY)
    few = np.arange(1000) % 100 < 15
    small = write(tmp_path / "small", labels[few], Measured(measured.intact[few], measured.removed[:, few], None))
    for pair, code in (((base, base), 0), ((base, new), 3), ((small, small), 4)):
        result = run("compare", *pair, "--gate", gate, "--format", form, "--output", tmp_path / "out")
        assert result.exit_code == code, result.output
        if form == "json":
            assert json.loads(result.output)["gate"]["decision"] == {0: "passed", 3: "regression"}.get(
                code, "not comparable"
            )
        elif form == "junit":
            root = ElementTree.fromstring(result.output)
            failing = {(c.get("classname"), c.find("failure").get("type")) for c in root.iter("testcase") if len(c)}
            assert (
                failing
                == {
                    0: set(),
                    3: {("skillfast.deer", "failed")},
                    4: {(f"skillfast.{name}", "undecided") for name in CLASSES},
                }[code]
            )
            assert len(list(root.iter("testcase"))) == 11
            assert root[0].get("failures") == str(len(failing))
    wrong_gate = gates(tmp_path, "[skill.dear]\nmin_drop = 0.1\n")
    result = run("compare", base, base, "--gate", wrong_gate, "--format", form, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "got 'dear'" in result.output
    assert run("compare", base, tmp_path / "none", "--format", form).exit_code == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[skill", "expected TOML"),
        ('[skill."*"]\nmax_weakning = 0.05', "[skill.*]: expected keys that are known, got 'max_weakning'"),
        ("[overal]\nmax_harm = 1", "expected keys that are known, got 'overal'"),
        ("", "at least one threshold"),
    ],
)
def test_a_gate_that_says_nothing_is_one_line(runs, tmp_path, text, words):
    base, _, _, _ = runs
    message = one_line(ArgumentError, compare, base, base, gate=gates(tmp_path, text))
    assert words in message
    assert "expected a file that can be read" in one_line(ArgumentError, compare, base, base, gate=tmp_path / "none")


def test_names_from_users_are_escaped(runs, tmp_path):
    _, _, labels, measured = runs
    names = ["<b>|x", "a&b\x0c", *CLASSES[2:]]
    odd = write(tmp_path / "a|<evil>", labels, measured, classes=names)
    found = compare(odd, odd, gate={"skill": {"*": {"max_weakening": 0.05}}}, output=tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "<b>|x" not in page
    assert "&lt;b&gt;|x" in page
    assert "<evil>" not in page
    markdown = comparison_text(found, "markdown")
    assert "<b>" not in markdown
    assert "&lt;b&gt;\\|x" in markdown
    cases = ElementTree.fromstring(comparison_text(found, "junit")).iter("testcase")
    assert "skillfast.<b>|x" in {case.get("classname") for case in cases}


def test_the_page_shuts_nobody_out(browser, runs, tmp_path):
    _, _, labels, measured = runs
    odd = write(tmp_path / "odd", labels, measured, classes=["<b id=hostile>", *CLASSES[1:]])
    compare(odd, odd, gate={"skill": {"*": {"max_weakening": 0.05}}}, output=tmp_path)

    def use(page):
        drawn = draw_all(page)
        found = barriers(page) + unheard(page)
        page.emulate_media(color_scheme="dark")
        return drawn, found + barriers(page, "color-contrast")

    assert browser.visit(tmp_path / "compare.html", use, width=390) == (2, [])


def test_the_page_is_made_again(runs, tmp_path):
    base, new, _, _ = runs
    compare(base, new, gate={"skill": {"deer": {"min_accuracy": 0.5}}}, output=tmp_path)
    before = (tmp_path / "compare.html").read_text()
    assert 'id="drop"' in before
    assert "Lost: deer." in before
    (tmp_path / "compare.html").unlink()
    assert run("report", tmp_path).output.strip() == f"report: {tmp_path / 'compare.html'}"
    assert (tmp_path / "compare.html").read_text() == before
    (tmp_path / "compare.json").write_text("{")
    assert "expected JSON" in one_line(DataError, write_comparison, tmp_path)


def test_an_assertion_for_a_test_suite(runs):
    base, new, _, _ = runs
    limits = {"skill": {"*": {"max_weakening": 0.05}}}
    assert assert_no_regression(base, base, limits).passed
    with pytest.raises(AssertionError, match=r"(?s)Lost: deer.*deer: accuracy lost, at most: 5.0.*failed"):
        assert_no_regression(base, new, limits)


def test_decisions_come_back_as_they_were(runs, tmp_path):
    base, new, _, _ = runs
    found = Decisions.load(new)
    found.save(tmp_path)
    again = Decisions.load(tmp_path)
    for name, value in vars(found).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    assert again.labels.dtype == np.int64
    assert Decisions.load(base).earlier is None
    assert (base / "decisions.safetensors").stat().st_size < 60_000  # a byte per decision
    (tmp_path / "decisions.safetensors").write_bytes(b"x" * 40)
    assert "broken" in one_line(DataError, Decisions.load, tmp_path)
    assert "expected a file, got none" in one_line(DataError, Decisions.load, tmp_path / "nowhere")
    short = vars(found) | {"digests": found.digests[:5]}
    Decisions(**short).save(tmp_path)
    assert "expected digests of uint64 [1000], got uint64 [5]" in one_line(DataError, Decisions.load, tmp_path)


# --like


@pytest.fixture(scope="module")
def audited(pictures, tmp_path_factory):
    """A run of seconds, and another checkpoint of its model measured like it."""
    folder = tmp_path_factory.mktemp("audited")
    config = BenchConfig.of(
        dataset="imagefolder", data_dir=str(pictures), model="vit_tiny_patch16_224", epochs=2, statistics=("pearson",),
        model_kwargs={"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}, seed=3,
        method="attribution", control_draws=1, share=0.05, output=str(folder / "base"),
    )  # fmt: skip
    base = skillfast.bench(config)
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "base" / "model.safetensors")
    with safe_open(folder / "base" / "model.safetensors", "pt") as file:
        header = json.loads(file.metadata()["skillfast"])
    weights["head.bias"] = weights["head.bias"] + torch.tensor([0.0, 0.0, -30.0])  # red is gone
    told = metadata(header, {name: checksum(tensor) for name, tensor in weights.items()})
    save_file(weights, folder / "other.safetensors", metadata=told)  # as if the run had left it
    save_file(weights, folder / "tuned.safetensors")
    like = ["--like", folder / "base", "--checkpoint", folder / "tuned.safetensors"]
    result = run("bench", *like, "--output", folder / "new", "--quiet")
    assert result.exit_code == 0, result.output
    return folder, base


def test_another_checkpoint_is_measured_like_an_earlier_run(audited):
    folder, base = audited
    new = records.read(type(base.results), folder / "new" / "results.json", "again")
    same = ("dataset", "data_dir", "model", "model_kwargs", "seed", "method", "share", "control_draws", "statistics")
    assert {name: new.config[name] for name in same} == {name: base.results.config[name] for name in same}
    assert new.model.trained.source == "checkpoint"
    assert new.model.trained.finetune == "none"
    assert new.cost.seconds.like is not None
    decided, before = Decisions.load(folder / "new"), Decisions.load(folder / "base")
    np.testing.assert_array_equal(decided.digests, before.digests)
    assert decided.earlier_classes == ("blue", "green", "red")
    conditions = [skillfast.Condition(skill) for skill in skillfast.load_skills(folder / "base").values()]
    import timm
    from safetensors.torch import load_model

    from skillfast.data import loader
    from skillfast.runs.session import choose_device, load_subject

    subject = load_subject(
        BenchConfig.of(like=str(folder / "base"), checkpoint=str(folder / "tuned.safetensors")),
        choose_device("cpu"), quiet=True, say=print,
    )  # fmt: skip
    assert isinstance(subject.model, timm.models.VisionTransformer)
    load_model(subject.model, folder / "tuned.safetensors")
    swept = skillfast.sweep(subject.model, loader(subject.splits.test, 256), conditions, keep_predictions=True)
    np.testing.assert_array_equal(decided.earlier, swept.predictions)
    np.testing.assert_array_equal(decided.intact, swept.top2[:, 0])
    load_model(subject.model, folder / "base" / "model.safetensors")
    theirs = [skillfast.Condition(skill) for skill in skillfast.load_skills(folder / "new").values()]
    back = skillfast.sweep(subject.model, loader(subject.splits.test, 256), theirs, keep_predictions=True)
    np.testing.assert_array_equal(decided.in_earlier, back.predictions)
    assert (decided.in_earlier != decided.removed).any()  # the models differ


def test_the_audit_names_what_the_checkpoint_lost(audited):
    folder, base = audited
    found = compare(folder / "base", folder / "new", gate={"skill": {"red": {"min_accuracy": 0.5}}})
    assert found.reasons == []
    assert found.n == base.results.dataset.n_test
    assert found.skills["red"].accuracy.new == 0
    assert found.skills["red"].base_skill is not None
    assert found.skills["red"].new_set is not None
    assert (found.gate.decision, found.exit_code) == ("regression", 3)


SMALL = {"method": "attribution", "statistics": ("pearson",), "control_draws": 1, "share": 0.05, "quiet": True}


def rounded(weights):
    """Matrices in 8 bits, a scale for each row, as quantisation of the weights alone leaves them."""
    scales = {name: w.abs().amax(1, keepdim=True) / 127 for name, w in weights.items() if w.dim() == 2}
    return {name: (w / scales[name]).round() * scales[name] if name in scales else w for name, w in weights.items()}


def test_checkpoints_are_measured_and_compared(audited, pictures, tmp_path):
    """Two files of weights, float32 and 8 bits: each is measured as it is, the second like the first."""
    from safetensors.torch import load_file, save_file

    folder, base = audited
    files = folder / "base" / "model.safetensors", tmp_path / "int8.safetensors"
    save_file(rounded(load_file(files[0])), files[1])
    settings = {name: base.results.config[name] for name in ("model", "model_kwargs", "dataset", "data_dir", "seed")}
    found = compare(*files, output=tmp_path / "out", gate={"skill": {"*": {"max_weakening": 0.9}}}, **SMALL, **settings)
    one, other = (
        records.read(type(base.results), tmp_path / "out" / name / "results.json", "again") for name in ("base", "new")
    )
    assert (one.config["checkpoint"], other.config["checkpoint"]) == tuple(map(str, files))
    assert {results.model.trained.finetune for results in (one, other)} == {"none"}
    assert (one.config["like"], other.config["like"]) == (None, str(tmp_path / "out" / "base"))
    assert one.config["method"] == other.config["method"] == "attribution"
    assert one.baseline.accuracy == base.results.baseline.accuracy  # the weights of that run
    assert found.reasons == []
    assert all(skill.new_set is not None and skill.base_set is not None for skill in found.skills.values())
    assert not {"lost", "gained", "weakened", "strengthened"} & {v for s in found.skills.values() for v in s.verdicts}
    assert found.overall.kl.mean < 0.05


def test_the_command_compares_two_checkpoints(audited, pictures, monkeypatch, tmp_path):
    """As typed; `bench` itself is tested elsewhere, and here leaves what it left of these checkpoints before."""
    folder, base = audited
    asked = []

    def bench(config, **_):
        asked.append(config)
        shutil.copytree(folder / Path(config.run.output).name, config.run.output, dirs_exist_ok=True)

    monkeypatch.setattr(measure, "bench", bench)
    files = folder / "base" / "model.safetensors", folder / "tuned.safetensors"
    sizes = [f"--model-kwarg={name}={value}" for name, value in base.results.config["model_kwargs"].items()]
    of = ["--model", base.results.config["model"], *sizes, "--dataset", "imagefolder", "--data-dir", pictures]
    result = run("compare", *files, *of, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert [config.model.checkpoint for config in asked] == [str(file) for file in files]
    assert [config.run.like for config in asked] == [None, str(tmp_path / "base")]
    assert {(config.model.finetune, str(config.data.data_dir)) for config in asked} == {("none", str(pictures))}
    said = result.output.splitlines()
    assert said[0] == f"base: {files[0]}"
    assert f"new: {files[1]}" in said
    assert said[-1] == f"report: {tmp_path / 'compare.html'}"
    assert "red" in next(line for line in said if line.startswith(("Lost: ", "Weakened: ")))


def test_modules_are_measured_and_compared(audited, tmp_path):
    """Before and after LoRA, whose merged weights take red away."""
    from skillfast.data import loader
    from skillfast.runs.session import choose_device, load_subject

    config = BenchConfig.of(like=str(audited[0] / "base"), checkpoint=str(audited[0] / "base" / "model.safetensors"))
    subject = load_subject(config, choose_device("cpu"), quiet=True, say=print)
    tuned = copy.deepcopy(subject.model)
    with torch.no_grad():  # W + B A, of rank 1
        tuned.head.weight += torch.tensor([[0.0], [0.0], [-5.0]]) @ tuned.head.weight[2:].sign()
    parts = {part: loader(getattr(subject.splits, part), 64) for part in ("select", "validate", "test")}
    found = compare(
        subject.model, tuned, loader=parts, output=tmp_path, gate={"skill": {"red": {"min_accuracy": 0.5}}}, **SMALL
    )
    assert found.reasons == []
    assert found.skills["red"].accuracy.new == 0 < found.skills["red"].accuracy.base
    assert found.gate.decision == "regression"
    for skill in found.skills.values():  # BASE's model was given, and so was measured again
        assert skill.new_set is not None
    with pytest.raises(ArgumentError, match="model and loader were given in Python"):
        skillfast.bench(BenchConfig.of(like=str(tmp_path / "base"), output=str(tmp_path / "again")))


def test_packed_integers_are_refused_before_anything_is_measured(tmp_path):
    from torch.ao.nn.quantized.dynamic import Linear

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of their end
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), Linear(4, 4)).eval()
    message = one_line(ModelError, skillfast.bench, BenchConfig.of(output=str(tmp_path)), model=model, loader=[])
    assert "got a quantised Linear at 1; give the weights rounded" in message


def test_what_models_to_compare_have_to_be_told(audited, tmp_path):
    base = audited[0] / "base"
    assert "output: expected a folder" in one_line(ArgumentError, compare, base, audited[0] / "tuned.safetensors")
    assert "seed: expected with a model to measure" in one_line(ArgumentError, compare, base, base, seed=3)
    result = run("compare", base, base, "--dataset", "cifar10", "--output", tmp_path)
    assert (result.exit_code, "dataset: expected with a model" in result.output) == (2, True)
    result = run("compare", base, audited[0] / "tuned.safetensors", "--dataset", "digits", "--output", tmp_path)
    assert (result.exit_code, "dataset: expected with a run of its own" in result.output) == (2, True)
    result = run("compare", base, "vit_tiny_patch16_225", "--output", tmp_path)
    assert (result.exit_code, "vit_tiny_patch16_225" in result.output) == (1, True)
    assert settings_of("vit_tiny_patch16_224") == {"model": "vit_tiny_patch16_224", "pretrained": True}
    assert settings_of("hf:gpt2") == {"model": "hf:gpt2"}
    assert settings_of(tmp_path / "vit.pt") == {"checkpoint": str(tmp_path / "vit.pt")}
    assert settings_of(base) is settings_of("runs/none") is None


@pytest.mark.parametrize("case", ["gone", "other"])
def test_an_earlier_model_that_is_not_there_is_said(audited, tmp_path, case):
    """Its weights are gone, or others lie in their place."""
    from safetensors.torch import load_file, save_file

    from skillfast.runs.decisions import remove_from_earlier
    from skillfast.runs.removals import Removals
    from skillfast.runs.session import open_session

    folder, _ = audited
    base, said = tmp_path / "base", []
    shutil.copytree(folder / "base", base)
    (base / "model.safetensors").unlink()
    if case == "other":
        weights = load_file(folder / "base" / "model.safetensors")
        weights["head.weight"] = -weights["head.weight"]
        save_file(weights, base / "model.safetensors")
    config = BenchConfig.of(like=str(base), checkpoint=str(folder / "tuned.safetensors"))
    with open_session(config, say=said.append) as session:
        skills = list(skillfast.load_skills(folder / "new").values())
        removals = Removals.of(session.subject, skills, session.trace("select"))
        assert remove_from_earlier(session, base, removals) is None
    words = {"gone": "expected the weights that the run trained, got none", "other": "what is loaded is another model"}
    assert f"the skills are not removed from the model of {base}: " in said[-1]
    assert words[case] in said[-1]


def test_the_recipe_for_github_runs_as_a_script(audited, tmp_path):
    """Each step of docs/gate.md in bash, as a runner calls it: a regression; then another NEW and other limits."""
    folder, _ = audited
    page = (ROOT / "docs" / "gate.md").read_text(encoding="utf-8")
    (recipe,) = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(jobs:.*?)```", page, re.DOTALL)]
    steps = [step["run"] for step in recipe["jobs"]["audit"]["steps"] if "run" in step]
    assert steps.pop(0) == "pip install skillfast"
    shim = tmp_path / "bin" / "skillfast"
    shim.parent.mkdir()
    shim.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from skillfast.cli import main; main()' \"$@\"\n")
    shim.chmod(0o755)
    shutil.copytree(folder / "base", tmp_path / "runs" / "base")
    shutil.copy(folder / "tuned.safetensors", tmp_path / "tuned.safetensors")
    summary = tmp_path / "summary.md"
    environment = os.environ | {
        "PATH": f"{shim.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "GITHUB_STEP_SUMMARY": str(summary),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def code(run_steps, limits):
        """Exit code of the first step that fails, else of the last."""
        gates(tmp_path, f"[skill.red]\n{limits}\n")
        for step in run_steps:
            done = subprocess.run(
                ["bash", "-e", "-c", step], cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            if done.returncode:
                break
        return done.returncode

    assert code(steps, "min_accuracy = 0.5") == 3
    assert "| red | accuracy, at least |" in summary.read_text()
    shutil.rmtree(tmp_path / "runs" / "new")
    shutil.copytree(folder / "base", tmp_path / "runs" / "new")
    for limits, exit_code, said in (
        ("min_accuracy = 0.01", 0, "Gate: passed"),
        ("max_weakening = 0.001", 4, "Gate: not comparable (too few examples"),
    ):
        summary.unlink()
        assert code(steps[1:], limits) == exit_code
        assert said in summary.read_text()
    (upload,) = [step for step in recipe["jobs"]["audit"]["steps"] if "upload-artifact" in step.get("uses", "")]
    assert (tmp_path / upload["with"]["path"] / "compare.html").is_file()


def test_what_a_like_run_takes_no_option_of(audited, tmp_path):
    folder, _ = audited
    base = str(folder / "base")
    weights = {"checkpoint": str(folder / "tuned.safetensors")}
    for settings, words in (
        ({"share": 0.1, **weights}, "share: expected with a run of its own"),
        ({"seed": 1, **weights}, "seed: expected"),
        ({}, "like: expected --checkpoint or --model with it, got neither"),
        ({"bits": 8}, "like: expected --checkpoint or --model with it, got bits"),
    ):
        assert words in one_line(ArgumentError, BenchConfig.of, like=base, **settings)
    assert "expected a file, got none" in one_line(DataError, BenchConfig.of, like=str(tmp_path), **weights)
    other = BenchConfig.of(like=base, model="vit_small_patch16_224")
    assert (other.model.kwargs, other.model.finetune) == ({}, "none")
    text = json.loads((folder / "base" / "results.json").read_text())
    text["config"]["dataset"] = "given"
    (tmp_path / "results.json").write_text(json.dumps(text))
    message = one_line(ArgumentError, BenchConfig.of, like=str(tmp_path), **weights)
    assert "model and loader were given in Python" in message
    shutil.rmtree(tmp_path)


# --replay


@pytest.fixture(scope="module")
def replayed_run(audited):
    """A copy of the run in which two values were changed by hand, replayed."""
    folder, _ = audited
    hand = folder / "hand"
    shutil.copytree(folder / "base", hand)
    text = json.loads((hand / "results.json").read_text())
    text["selectivity"]["ci95"]["target_drop"][1] -= 0.002
    text["cost"]["forward_s"] += 100
    text["environment"]["torch"] = "1.0"
    (hand / "results.json").write_text(json.dumps(text))
    skills = json.loads((hand / "skills.json").read_text())
    next(iter(skills["skills"][0]["neurons"].values())).pop()
    (hand / "skills.json").write_text(json.dumps(skills))
    return run("bench", "--replay", hand, "--output", folder / "again", "--quiet"), hand, folder


def test_a_replay_names_what_was_changed_and_nothing_else(replayed_run, audited):
    done, hand, folder = replayed_run
    assert done.exit_code == 3, done.output
    first, *lines = done.output.splitlines()[1:]
    assert first.startswith(f"replay of {hand}: 2 of ")
    assert lines[0].startswith("  skills.json: blue: ")
    assert lines[0].endswith(" of these and 1 others")
    high = audited[1].results.selectivity.ci95.target_drop[1]
    assert lines[1] == f"  results.json: selectivity.ci95.target_drop[1]: {high - 0.002}, now {high} (0.002 apart)"
    assert lines[2:] == [f"  ran on: torch: 1.0, now {torch.__version__}"]
    again = records.read(type(audited[1].results), folder / "again" / "results.json", "again")
    assert again.config == audited[1].results.config
    assert again.model.weights == audited[1].results.model.weights
    assert again.model.trained == audited[1].results.model.trained
    assert (folder / "again" / "model.safetensors").is_file()  # the run's own, and not trained again
    found = Earlier.read(folder / "base").compared(again, Earlier.read(folder / "again").skills)
    assert (found.differences, found.environment, found.exit_code) == ((), (), 0)
    assert found.n > 500
    assert replay_text(found) == (
        f"replay of {folder / 'base'}: all {found.n:,} values are equal; numbers are equal within 1e-06 + 0.0001 of "
        "their size"
    )


def test_a_replay_of_other_data_or_weights_is_refused(audited, pictures, tmp_path):
    folder, base = audited
    data, copy = tmp_path / "data", tmp_path / "copy"
    shutil.copytree(pictures, data)
    shutil.copytree(folder / "base", copy)
    text = json.loads((copy / "results.json").read_text())
    text["config"]["data_dir"] = str(data)
    (copy / "results.json").write_text(json.dumps(text))
    with (data / "test" / "red" / "3.png").open("ab") as file:
        file.write(b"x")  # decodes to the same pixels
    again = ["bench", "--replay", copy, "--output", tmp_path / "again", "--quiet"]
    done = run(*again)
    assert (done.exit_code, done.output) == (4, (
        f"Error: data: expected those of {copy}, got other test examples; replay it on the data that it read\n"
    ))  # fmt: skip
    text["config"]["data_dir"] = str(pictures)
    (copy / "results.json").write_text(json.dumps(text))
    shutil.copy(folder / "other.safetensors", copy / "model.safetensors")
    done = run(*again)
    assert done.exit_code == 4
    assert f"weights: expected SHA-256 {base.results.model.weights.sha256}, as in {copy}, got " in done.output
    assert not (tmp_path / "again" / "results.json").exists()


def test_what_a_replay_takes_no_option_of(audited):
    base = str(audited[0] / "base")
    for settings, words in (
        ({"share": 0.1}, "share: expected with a run of its own, got it with --replay"),
        ({"like": base}, "like: expected with a run of its own, got it with --replay"),
        ({"output": f"{base}/../base"}, "output: expected another folder than that of --replay"),
    ):
        assert words in one_line(ArgumentError, BenchConfig.of, replay=base, **settings)
    assert "output: expected another folder than that of --like" in one_line(
        ArgumentError, BenchConfig.of, like=base, checkpoint=str(audited[0] / "tuned.safetensors"), output=base
    )
    done = run("bench", "--replay", base, "--model-kwarg", "depth=3", "--output", audited[0] / "never")
    assert (done.exit_code, "model_kwargs: expected with a run of its own" in done.output) == (2, True)
    elsewhere = audited[0] / "elsewhere"
    shutil.copytree(base, elsewhere)
    text = json.loads((elsewhere / "results.json").read_text())
    text["config"]["device"] = "cuda:99"  # that of another machine
    (elsewhere / "results.json").write_text(json.dumps(text))
    done = run("bench", "--replay", elsewhere, "--output", audited[0] / "never")
    assert done.exit_code == 2
    assert re.fullmatch(r"Error: device 'cuda:99': expected one that is there, got .*; use --device cpu\n", done.output)
    config = BenchConfig.of(replay=base, device="cpu", output="elsewhere")
    assert config.to_json() == {**audited[1].results.config, "device": "cpu"}
    other = config.replaced(share=0.1)
    assert "share: expected 0.05, as in" in one_line(
        NotComparableError, Earlier.read(base).check, other, audited[1].results.dataset.digests
    )


def test_the_command_of_a_card_repeats_a_run_like_another(audited):
    from skillfast import cli
    from skillfast.report.bench.words import command

    folder, base = audited
    for results in (base.results, records.read(type(base.results), folder / "new" / "results.json", "again")):
        typed = shlex.split(command(results))
        assert typed[:2] == ["skillfast", "bench"]
        with main.commands["bench"].make_context("bench", typed[2:]) as context:
            given = {name: value for name, value in context.params.items() if name != "quiet"}
            assert cli._config(given).to_json() == results.config
