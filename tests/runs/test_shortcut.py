"""`evaluate --shortcut`: planted cues are found and nothing else, numbers against plain loops, page, command line."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import numpy as np
import planted
import pytest
import torch
from click.testing import CliRunner

import skillfast
from skillfast import Grid
from skillfast.cli import main
from skillfast.errors import ArgumentError, DataError
from skillfast.evaluation.shortcuts import ConflictMeasures, following, of_classes
from skillfast.metrics import Categorical
from skillfast.report import write_evaluation
from skillfast.results import records
from skillfast.results.evaluation import EvaluationResults
from skillfast.runs.evaluate import Evaluation
from skillfast.runs.session import open_session
from skillfast.runs.shortcut import heuristic_answers, trace_answers

GRID = Grid(shares=(0.4, 0.2), layers=("all",), scales=(0.0,), draws=5, replicates=10, max_site_share=1.0)
PARTS = {"select": 0, "validate": 1, "test": 2}


def loaders(n=270, change=lambda batch: batch):
    return {name: [change(planted.cues(n, seed))] for name, seed in PARTS.items()}


def evaluated(model, loader, grid=GRID, **options):
    return skillfast.evaluate(None, grid, model=model, loader=loader, shortcut="column:cue", **options)


@pytest.fixture(scope="module")
def found():
    return evaluated(planted.TwoWays(), loaders())


def test_the_cues_neurons_are_found_and_nothing_else(found):
    shortcut = found.results.shortcut
    assert (shortcut.column, shortcut.conflicts, shortcut.agreeing) == ("cue", 90, 180)
    assert shortcut.agreement == pytest.approx(2 / 3)
    assert {(one.site, one.neuron) for one in shortcut.follow_shortcut.best} == {("blocks.0.mlp", i) for i in (3, 4, 5)}
    assert {one.neuron for one in shortcut.follow_label.best} == {0, 1, 2}
    assert (shortcut.follow_shortcut.neurons, shortcut.follow_label.neurons) == (3, 3)
    assert all(one.heuristic > 0.9 > 0.2 > one.label for one in shortcut.follow_shortcut.best)
    assert shortcut.intact.values == {"shortcut_answers": 1, "right_answers": 0, "agreeing_accuracy": 1}
    sizes = [(one.follows, one.share, one.neurons) for one in shortcut.removals]
    assert sizes == [("shortcut", 0.2, 1), ("label", 0.2, 1), ("shortcut", 0.4, 3), ("label", 0.4, 3)]
    *_, without_cue, without_label = shortcut.removals
    assert without_cue.values["right_answers"] > 0.95
    assert without_cue.change["shortcut_answers"] < -0.95
    assert without_cue.change_ci95["shortcut_answers"][1] < -0.9
    assert without_cue.p["shortcut_answers"] < 1e-20
    assert without_cue.values["agreeing_accuracy"] > 0.95
    assert without_cue.random.draws == 5
    assert without_cue.random.change["shortcut_answers"].low == 0
    assert without_label.values["shortcut_answers"] == 1
    assert without_label.p["shortcut_answers"] == 1
    kept = {skill.name: {site: index.tolist() for site, index in skill.neurons.items()} for skill in found.skills}
    assert kept["follows cue"] == {"blocks.0.mlp": [3, 4, 5]}
    assert kept["follows label"] == {"blocks.0.mlp": [0, 1, 2]}
    assert {"0", "1", "2"} < kept.keys()  # the label's skills


def test_a_model_without_the_cue_has_no_such_neurons():
    shortcut = evaluated(planted.TwoWays(cued=False), loaders()).results.shortcut
    assert shortcut.follow_shortcut.neurons == 0
    assert shortcut.follow_shortcut.best == shortcut.moved == []
    assert {one.neuron for one in shortcut.follow_label.best} == {0, 1, 2}
    assert [one.follows for one in shortcut.removals] == ["label", "label"]
    assert shortcut.intact.values["shortcut_answers"] < 0.05


def test_where_nothing_follows_nothing_is_removed(tmp_path):
    model = planted.TwoWays(cued=False)
    with torch.no_grad():
        model.read.weight[:3] = model.read.weight[6:]
    result = evaluated(model, loaders(), skills=hand_made(tmp_path))
    shortcut = result.results.shortcut
    assert shortcut.removals == shortcut.follow_label.best == shortcut.moved == []
    result.save(tmp_path)
    page = write_evaluation(tmp_path).read_text(encoding="utf-8")
    assert "Beyond chance 0 neurons follow the heuristic more" in page
    assert "The examples that move most" not in page


def hand_made(folder):
    skillfast.save_skills(folder / "skills", [skillfast.Skill("some", {"blocks.0.mlp": torch.tensor([0])})])
    return folder / "skills"


def test_examples_that_move_most_are_those_of_a_plain_loop(found):
    moved, model, batch = found.results.shortcut.moved, planted.TwoWays(), planted.cues(270, PARTS["test"])
    skill = skillfast.Skill("cue", {"blocks.0.mlp": torch.tensor([3, 4, 5])})
    with torch.no_grad():
        before = model(batch["x"])
        with skillfast.ablate(model, skill):
            after = model(batch["x"])

    def margins(logits):
        own = logits.gather(1, batch["labels"][:, None])
        return (own - logits.scatter(1, batch["labels"][:, None], -torch.inf).amax(1, keepdim=True))[:, 0]

    size = (margins(after) - margins(before)).abs()
    size[batch["labels"] == batch["cue"]] = -1
    assert [one.example for one in moved] == size.argsort(descending=True, stable=True)[:20].tolist()
    for one in moved:
        i = one.example
        assert (one.text, one.pair) == (None, None)
        assert (one.label, one.heuristic) == (str(int(batch["labels"][i])), str(int(batch["cue"][i])))
        assert (one.before, one.after) == (str(int(before[i].argmax())), str(int(after[i].argmax())))
        assert one.margin_before == pytest.approx(float(margins(before)[i]), abs=1e-5)
        assert one.margin_after == pytest.approx(float(margins(after)[i]), abs=1e-5)


def test_one_loader_is_divided_and_names_of_classes_are_read(found):
    """The cue goes with its example into the parts; words name classes as numbers do."""

    def named(batch):
        return {**batch, "cue": [f"{int(value)}" for value in batch["cue"]]}

    again = evaluated(planted.TwoWays(), loaders(change=named)).results.shortcut
    assert again == found.results.shortcut
    batches = [{name: values[i : i + 50] for name, values in planted.cues(405).items()} for i in range(0, 405, 50)]
    shortcut = evaluated(planted.TwoWays(), batches).results.shortcut
    assert {one.neuron for one in shortcut.follow_shortcut.best} == {3, 4, 5}
    assert shortcut.intact.values == {"shortcut_answers": 1, "right_answers": 0, "agreeing_accuracy": 1}
    assert shortcut.conflicts + shortcut.agreeing == 135


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda b: b | {"cue": b["labels"]}, DataError, "column 'cue': expected select examples on which it is not"),
        (lambda b: b | {"cue": b["cue"] + 1}, DataError, "select part, example 2: expected one of 0, 1, 2 in column"),
        (lambda b: b | {"cue": b["cue"][None]}, ArgumentError, "expected a value for each of 270 examples, got shape"),
        (lambda b: (b["x"], b["labels"]), ArgumentError, "column 'cue': expected batches that are mappings with it"),
    ],
)
def test_data_that_tell_no_heuristic_are_refused(change, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(")):
        evaluated(planted.TwoWays(), loaders(change=change))


def test_names_that_are_no_column_and_images_are_refused():
    with pytest.raises(ArgumentError, match="shortcut: expected column:NAME"):
        skillfast.evaluate(shortcut="cue")
    config = skillfast.BenchConfig.of(model="hf:x", dataset="text", data_file="x.tsv")
    with pytest.raises(ArgumentError, match="expected a classifier, which a heuristic can answer for"):
        skillfast.evaluate(config, metrics=("token_log_probability",), shortcut="column:cue")
    with pytest.raises(ArgumentError, match="shortcut: expected text, or batches of a loader with a value 'cue'"):
        skillfast.evaluate(skillfast.BenchConfig.of(pretrained=False), shortcut="column:cue")


def test_following_by_partial_correlations_of_residuals():
    """Neurons of noise follow neither; of two that carry both, each follows what it carries more of."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 3000)
    cue = np.where(rng.random(3000) < 0.7, label, rng.integers(0, 3, 3000))
    noise = rng.normal(size=(3000, 43))
    noise[:, 0] += (cue == 1) + 0.3 * (label == 1)
    noise[:, 1] += 0.3 * (cue == 1) + (label == 1)
    noise[:, 2] -= cue == 2
    kinds = {"label": Categorical(3), "heuristic": Categorical(3)}
    scores = skillfast.correlate(noise, {"label": label, "heuristic": cue}, kinds, statistics=("pearson",))
    found = following(scores)
    assert np.flatnonzero(~np.isnan(found.shortcut)).tolist() == [0, 2]
    assert np.flatnonzero(~np.isnan(found.inference)).tolist() == [1]
    one_hot = np.eye(3)[label]
    residuals = [v - one_hot @ np.linalg.lstsq(one_hot, v, rcond=None)[0] for v in (noise, np.eye(3)[cue])]
    expected = np.abs(np.corrcoef(residuals[0][:, 0], residuals[1].T)[0, 1:]).max()
    assert found.heuristic[0] == pytest.approx(expected, abs=1e-4)
    noisy = skillfast.correlate(noise[:, 3:], {"label": label, "heuristic": cue}, kinds, statistics=("pearson",))
    assert np.isnan(following(noisy).shortcut).all()


def test_the_level_holds_where_no_neuron_follows():
    """Of 200 data sets of noise at most about 5 % have a neuron that follows, though 40 neurons are looked at."""
    rng, false = np.random.default_rng(1), 0
    kinds = {"label": Categorical(3), "heuristic": Categorical(3)}
    for _ in range(200):
        label = rng.integers(0, 3, 150)
        cue = np.where(rng.random(150) < 0.7, label, rng.integers(0, 3, 150))
        noise = rng.normal(size=(150, 40)).astype(np.float32)
        scores = skillfast.correlate(noise, {"label": label, "heuristic": cue}, kinds, statistics=("pearson",))
        false += not np.isnan(following(scores).shortcut).all()
    assert false <= 18  # 5 % and three standard errors


def test_measures_of_conflicts_by_hand():
    labels, heuristic = np.array([0, 0, 1, 1, 2, 2]), np.array([1, 1, 0, 1, 2, 0])
    intact, after = np.array([1, 1, 0, 1, 2, 1]), np.array([0, 1, 1, 1, 0, 2])
    measures = ConflictMeasures(intact, labels, heuristic)
    assert measures.conflict.tolist() == [True, True, True, False, False, True]
    measured = measures.measure(after)
    assert measured.values == {"shortcut_answers": 0.25, "right_answers": 0.75, "agreeing_accuracy": 0.5}
    assert measured.change == {"shortcut_answers": -0.5, "right_answers": 0.75, "agreeing_accuracy": -0.5}
    # mid-p of 2, 3 and 1 examples that all changed to one side: 2 x 2^-n, what was seen counted half
    assert measures.p(after) == {"shortcut_answers": 0.25, "right_answers": 0.125, "agreeing_accuracy": 0.5}
    low, high = measured.ci95["right_answers"]
    assert (low, high) == (pytest.approx(0.3006, abs=1e-4), pytest.approx(0.9544, abs=1e-4))  # Wilson, 3 of 4
    none = ConflictMeasures(intact, labels, (labels + 1) % 3).measure(after)
    assert none.values["agreeing_accuracy"] is none.change["agreeing_accuracy"] is None
    assert none.ci95["agreeing_accuracy"] is none.change_ci95["agreeing_accuracy"] is None


def test_columns_of_numbers_and_of_words_name_classes():
    assert of_classes(np.array([1.0, 0.0]), {"0": 0, "1": 1})[0].tolist() == [1, 0]
    assert of_classes(np.array(["no", "yes"]), {"yes": 0, "no": 1}) == (pytest.approx(np.array([1, 0])), None)
    assert of_classes(np.array([1.0, 0.5]), {"0": 0, "1": 1})[1] == 1
    indices, wrong = of_classes(np.array([1, 0, 1]), {"no": 0, "yes": 1})
    assert (indices.tolist(), wrong) == ([1, 0, 1], None)
    assert of_classes(np.array([1, 2]), {"no": 0, "yes": 1})[1] == 0
    assert of_classes(np.array([1.0, 0.0]), {"1": 0, "0": 1})[0].tolist() == [0, 1]  # names before indices


def test_the_page_tells_and_escapes(found, tmp_path):
    hostile = "</script><b id=hostile>"
    shortcut = found.results.shortcut
    moved = [replace_record(one, text=hostile, pair=hostile) for one in shortcut.moved]
    changed = replace_record(found.results, shortcut=replace_record(shortcut, column=hostile, moved=moved))
    replace(found, results=changed).save(tmp_path)
    told = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    jsonschema.validate(told, records.schema(EvaluationResults))
    assert records.to_json(Evaluation.load(tmp_path).results) == told
    page = write_evaluation(tmp_path).read_text(encoding="utf-8")
    assert "<b id=hostile>" not in page
    assert "The examples that move most" in page
    assert page.count("&lt;b id=hostile&gt; / ") == 20
    assert "blocks.0.mlp, neuron 4" in page
    assert "Without 3 of the first" in page


def replace_record(record, **changes):
    return type(record)(**{name: getattr(record, name) for name in record.__struct_fields__} | changes)


@pytest.mark.filterwarnings("ignore")
def test_the_command_on_text(tmp_path):
    """A column of words, which each text shows; a wrong one is told with its line."""
    pytest.importorskip("transformers", reason="needs transformers")
    from tiny_models import WORDS, save_model

    save_model(tmp_path / "model", id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1})
    rng, names, words = np.random.default_rng(0), ("neg", "pos"), ("bad", "good")
    rows = []
    for i in range(90):
        said = (i + (i % 5 == 0)) % 2
        text = " ".join([words[said]] * 4 + rng.choice(WORDS, size=3 + i % 4).tolist())
        rows.append(f"{text} </b>\t{names[i % 2]}\t{names[said]}")
    file = tmp_path / "x.tsv"
    file.write_text("\n".join(["text\tlabel\tshort", *rows]) + "\n", encoding="utf-8")
    command = [
        "evaluate", "--model", f"hf:{tmp_path / 'model'}", "--dataset", "text", "--data-file", file, "--shares", "0.1",
        "--layers", "all", "--scales", "0", "--control-draws", 2, "--statistics", "pearson", "--shortcut",
        "column:short", "--output", tmp_path / "out",
    ]  # fmt: skip
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main, [str(argument) for argument in command])
    assert result.exit_code == 0, result.output
    shortcut = Evaluation.load(tmp_path / "out").results.shortcut
    assert f"The column short is the label on {100 * shortcut.agreement:.1f}" in result.output
    assert "accuracy where both agree" in result.output
    assert shortcut.conflicts + shortcut.agreeing == 30
    assert len(shortcut.moved) == shortcut.conflicts > 0
    settings = {"dataset": "text", "data_file": str(file), "metrics": ("label", "column:short"), "batch_size": 7}
    with open_session(skillfast.BenchConfig.of(model=f"hf:{tmp_path / 'model'}", **settings)) as session:
        plain = session.trace("select", statistics=("pearson",))  # texts of several lengths: padding is no token
        traced = trace_answers(session.subject, "select", heuristic_answers(session.subject, "select", "short"))
    assert plain.columns[:2] == traced.columns[:2] == ("label:neg", "label:pos")
    np.testing.assert_allclose(traced.pearson, plain.pearson, atol=1e-5)
    widths = {site.name: site.width for site in Evaluation.load(tmp_path / "out").results.model.sites}
    assert len({one.site for one in shortcut.follow_shortcut.best}) > 1
    assert all(one.neuron < widths[one.site] for one in shortcut.follow_shortcut.best)
    for one in shortcut.moved:
        assert one.text.endswith("</b>")
        assert one.text.startswith({"neg": "bad", "pos": "good"}[one.heuristic])
        assert one.label != one.heuristic
    file.write_text(file.read_text(encoding="utf-8").replace("neg\tpos", "neg\tnone", 1), encoding="utf-8")
    result = CliRunner().invoke(main, [str(argument) for argument in command])
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if "column 'short'" in line]
    assert "line 2: expected one of neg, pos in column 'short', what the heuristic answers, got 'none'" in line
