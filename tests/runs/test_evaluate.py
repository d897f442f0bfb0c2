"""Evaluation of skills on held-out data: numbers against scikit-learn and plain loops, files, page, command line."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import jsonschema
import msgspec
import numpy as np
import planted
import pytest
import readers
import report_sample as sample
import torch
from browsing import barriers, draw_all, unheard
from click.testing import CliRunner
from conftest import make_vit, one_line
from sklearn.metrics import accuracy_score, f1_score

import skillfast
from skillfast import Skill
from skillfast.cli import main
from skillfast.errors import ArgumentError, DataError
from skillfast.evaluation import classification as class_scores
from skillfast.evaluation.resampling import PairedBootstrap
from skillfast.models.sites import find_sites
from skillfast.results import records
from skillfast.results.evaluation import EvaluationResults
from skillfast.runs.class_outcomes import class_outcomes
from skillfast.runs.config import Grid
from skillfast.runs.environment import environment
from skillfast.runs.evaluate import Evaluation
from skillfast.runs.grid import Case, cases_of_scores, cases_of_skills, largest, layer_sites

CLASSES = ("ant", "bee", "cat", "dog", "eel")


def scores_of(vit, batches):
    return skillfast.trace(vit, batches, classes=CLASSES, statistics=("pearson",))


def schema():
    made = records.schema(EvaluationResults)
    jsonschema.Draft202012Validator.check_schema(made)
    return made


def random_predictions(n=300, k=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice(k, size=n, p=np.arange(1, k + 1) / (k * (k + 1) / 2))
    before = np.where(rng.random(n) < 0.8, labels, rng.integers(0, k, n))
    after = np.where(rng.random(n) < 0.7, before, rng.integers(0, k, n))  # pairs go together
    return labels, before, after


def test_values_are_scikit_learns():
    labels, before, after = random_predictions()
    found = class_scores.measure(PairedBootstrap(labels, 4, replicates=20), before, after, own=2)
    assert found.values["accuracy"] == accuracy_score(labels, after)
    assert found.values["f1_macro"] == pytest.approx(f1_score(labels, after, average="macro"))
    assert found.values["class_f1"] == pytest.approx(f1_score(labels, after, average=None)[2])
    assert found.values["class_accuracy"] == pytest.approx((after[labels == 2] == 2).mean())
    assert found.change["f1_macro"] == pytest.approx(
        f1_score(labels, after, average="macro") - f1_score(labels, before, average="macro")
    )
    more = class_scores.measure(PairedBootstrap(labels, 5, replicates=20), before, after, own=4)  # no example of it
    assert more.values["class_accuracy"] is None is more.change["class_accuracy"] is more.ci95["class_accuracy"]
    assert more.values["class_f1"] == 0
    none = class_scores.measure(PairedBootstrap(labels, 4, replicates=20), before, after, own=None)
    assert none.values["class_f1"] is None is none.change["class_f1"] is none.ci95["class_f1"]


def test_f1_of_counts_is_scikit_learns_even_for_a_class_that_is_not_there():
    labels, _, after = random_predictions()
    hits = np.array([((labels == c) & (after == c)).sum() for c in range(5)])
    predicted, support = (np.bincount(x, minlength=5) for x in (after, labels))
    found = class_scores.f1_of_counts(hits, predicted, support, own=1)
    f1 = f1_score(labels, after, labels=range(5), average=None, zero_division=0)
    assert f1[4] == 0
    assert found["f1_macro"] == pytest.approx(f1.mean())
    assert found["class_f1"] == pytest.approx(f1[1])


def test_the_bootstrap_is_that_of_resampled_examples():
    """Its intervals against those of a plain loop that draws examples and asks scikit-learn."""
    labels, before, after = random_predictions(n=240)
    found = class_scores.measure(PairedBootstrap(labels, 4, replicates=8000), before, after, own=0)
    rng, drawn = np.random.default_rng(5), []
    members = [np.flatnonzero(labels == c) for c in range(4)]

    def f1(rows, predictions):
        own, given = labels[rows] == 0, predictions[rows] == 0
        return 2 * (own & given).sum() / (own.sum() + given.sum())

    assert f1(slice(None), after) == pytest.approx(f1_score(labels, after, average=None)[0])
    for _ in range(3000):
        rows = np.concatenate([rng.choice(m, len(m)) for m in members])
        own = f1(rows, after)
        drawn.append((own, own - f1(rows, before)))
    want = np.quantile(drawn, [0.025, 0.975], axis=0)
    np.testing.assert_allclose(found.ci95["class_f1"], want[:, 0], atol=0.015)
    np.testing.assert_allclose(found.change_ci95["class_f1"], want[:, 1], atol=0.015)


def test_outcomes_are_those_of_a_plain_loop_of_ablations(vit, batches):
    labels = torch.cat([y for _, y in batches]).numpy()
    grid = Grid(shares=(0.05, 0.2), layers=("all", "each"), scales=(0.5, 4.0), draws=2, replicates=50)
    cases = cases_of_scores(scores_of(vit, batches), "pearson", ("label", "confidence"), grid)
    intact, found = class_outcomes(vit, batches, cases, CLASSES, replicates=50)

    def predicted(skill=None, scale=0.0):
        with torch.no_grad():
            if skill is None:
                return torch.cat([vit(x) for x, _ in batches]).argmax(1).numpy()
            with skillfast.ablate(vit, skill, scale=scale):
                return torch.cat([vit(x) for x, _ in batches]).argmax(1).numpy()

    assert intact.values["accuracy"] == accuracy_score(labels, predicted())
    rows = [(case, scale) for case in cases for scale in case.scales]
    assert len(rows) == len(found) == 2 * 6 * (4 + 3)  # sizes x skills x (factors in all layers + blocks)
    rng = np.random.default_rng(0)
    changed = 0
    for i in rng.choice(len(rows), 12, replace=False):
        (case, scale), outcome = rows[i], found[i]
        own = predicted(case.skill, scale)
        assert outcome.scale == scale
        assert outcome.neurons == len(case.skill)
        assert outcome.values["accuracy"] == accuracy_score(labels, own)
        want = f1_score(labels, own, labels=range(5), average=None, zero_division=0)
        assert outcome.values["f1_macro"] == pytest.approx(want.mean())
        if case.skill.metric == "confidence":
            assert outcome.values["class_f1"] is None
        else:
            assert outcome.values["class_f1"] == pytest.approx(want[CLASSES.index(case.skill.name)])
        drawn = [accuracy_score(labels, predicted(skill, scale)) for skill in case.controls]
        assert records.to_json(outcome.random.values["accuracy"]) == pytest.approx(
            {"mean": np.mean(drawn), "low": min(drawn), "high": max(drawn)}
        )
        changed += bool((own != predicted()).any())
    assert changed


@pytest.mark.filterwarnings("ignore:some scores are not defined")
def test_planted_skills_fall_where_they_are_and_random_neurons_do_not():
    """Chosen on some images, measured on others: the class goes, in the block that carries it and in no other."""
    model, classes = planted.model(), [str(i) for i in range(planted.CLASSES)]
    images, labels = planted.images(300)
    scores = skillfast.trace(model, [(images, labels)], classes=classes, sites=("mlp", "attn"), statistics=("pearson",))
    grid = Grid(shares=(3 / scores.n_neurons,), scales=(2.0,), replicates=200)
    cases = cases_of_scores(scores, "pearson", ("label",), grid)
    _, found = class_outcomes(model, [planted.images(120, seed=1)], cases, classes, replicates=200)
    at = {(o.skill, o.layers, o.scale): o for o in found}
    for label, sites in planted.PLANTED.items():
        if len(sites) > 1:
            continue  # its parts in two blocks can stand in for each other
        block = next(iter(sites)).rpartition(".")[0]
        for layers in ("all", "blocks.0", "blocks.1", "blocks.2"):
            outcome = at[str(label), layers, 0.0]
            gone = layers in ("all", block)
            assert outcome.values["class_f1"] == (0 if gone else 1)
            assert outcome.change["accuracy"] == pytest.approx(-1 / 6 if gone else 0)
            assert outcome.change_ci95["class_f1"] == ([-1, -1] if gone else [0, 0])
            assert outcome.random.change["class_f1"].mean == pytest.approx(0)
        assert at[str(label), "all", 2.0].change["accuracy"] == 0


class Dial(torch.nn.Module):
    """A classifier of two classes by neuron 0 of eight that its head reads: the logits are (1, that neuron)."""

    def __init__(self):
        super().__init__()
        self.head, self.num_classes = torch.nn.Linear(8, 2), 2
        self.skillfast_sites = {"head": "head"}
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.weight[1, 0] = 1
            self.head.bias.copy_(torch.tensor([1.0, 0.0]))
        self.eval()

    def forward(self, x):
        return self.head(x)


def test_a_curve_whose_doses_and_responses_are_known(tmp_path):
    """Class 1 is answered where the factor times the neuron is above 1, by any factor, and other neurons do nothing."""
    own, other = torch.tensor([0.3, 0.6, 1.2, 1.5, 2.4, 2.5]), torch.tensor([0.1, 0.4, 0.8, 0.9])
    x = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0], labels = torch.cat([own, other]), torch.tensor([1] * 6 + [0] * 4)
    model, parts = Dial(), {part: [(x, labels)] for part in ("select", "validate", "test")}
    skill = Skill("on", {"head": torch.tensor([0])}, metric="label:1")
    skillfast.save_skills(tmp_path, [skill])
    scales = (-1.0, 0.5, 1.0, 2.0, 4.0)
    grid = Grid(layers=("all",), scales=scales, draws=2, replicates=20)
    found = skillfast.evaluate(grid=grid, model=model, loader=parts, skills=tmp_path)
    (curve,) = found.results.curves().values()
    assert [row.scale for row in curve] == [-1, 0, 0.5, 1, 2, 4]
    for row in curve:
        answered = [(row.scale * values > 1).double().mean().item() for values in (own, other)]
        assert row.values["class_accuracy"] == pytest.approx(answered[0])
        assert row.values["other_accuracy"] == pytest.approx(1 - answered[1])
        assert row.change["class_accuracy"] == pytest.approx(answered[0] - 4 / 6)
        assert row.change["other_accuracy"] == pytest.approx(-answered[1])
        for name, value in row.values.items():
            assert row.ci95[name][0] <= value <= row.ci95[name][1]
            assert row.change_ci95[name][0] <= row.change[name] <= row.change_ci95[name][1]
            assert records.to_json(row.random.change[name]) == {"mean": 0, "low": 0, "high": 0}
    assert [row.values["class_accuracy"] for row in curve] == pytest.approx([0, 0, 1 / 3, 2 / 3, 5 / 6, 1])
    at_one = curve[3]
    assert {at_one.values[name] for name in ("accuracy", "f1_macro")} == set(found.results.intact.values.values())
    assert at_one.ci95["accuracy"] == found.results.intact.ci95["accuracy"]
    assert set(map(tuple, at_one.change_ci95.values())) == {(0, 0)}
    assert found.results.config["grid"]["scales"] == list(scales)
    # and the logits, as exactly as they are computed; a factor of 1 that is run changes no bit
    conditions = [skillfast.Condition(skill, scale=scale, name=str(scale)) for scale in scales]
    swept = skillfast.sweep(model, [(x, labels)], conditions, keep_margins=True, keep_predictions=True)
    sign = 2 * labels.numpy() - 1
    for scale in scales:
        (margins,) = swept.margins_of([str(scale)])
        assert margins == pytest.approx(sign * (scale * x[:, 0].numpy() - 1), abs=1e-6)
    intact = swept.baseline_logits
    assert (swept.margins_of(["1.0"])[0] == sign * (intact[:, 1] - intact[:, 0])).all()
    assert (swept.predictions_of(["1.0"])[0] == swept.top2[:, 0]).all()


def test_a_curve_is_of_the_largest_size_and_through_the_intact_model(tmp_path):
    from skillfast.report.evaluation.page import by_scale, by_size, dose_table, make_figures

    kind = readers.KINDS["evaluation.json"]
    kind.make(tmp_path)
    results = Evaluation.load(tmp_path).results
    curves = results.curves()
    assert list(curves) == list(dict.fromkeys(row.skill for row in results.outcomes))
    first = next(iter(curves.values()))
    assert [row.scale for row in first] == [0, 1, 2]
    columns, rows = dose_table(results)
    assert columns == ["skill", "measure", *(f"\N{MULTIPLICATION SIGN}{scale}" for scale in (0, 1, 2))]
    of_class = [row for row in rows if row[1] == "accuracy on the skill's class"]
    assert len(of_class) == sum(first.values["class_accuracy"] is not None for first, *_ in curves.values())
    assert "; random " in rows[0][2]
    assert rows[0][3].startswith(f"{100 * first[1].values['class_accuracy']:.1f}")
    figure = by_scale(results, "other_accuracy")
    assert figure["data"][0]["x"] == [0, 1, 2]
    assert figure["data"][0]["y"] == pytest.approx([100 * row.values["other_accuracy"] for row in first])
    assert figure["data"][0]["text"][1] == "intact"
    assert figure["data"][1]["y"] == pytest.approx([100 * row.random.values["other_accuracy"].mean for row in first])
    # a second size of one skill alone, and a skill that was removed and no more
    smaller = msgspec.structs.replace(first[0], share=first[0].share / 2)
    once = msgspec.structs.replace(first[0], skill="once")
    more = msgspec.structs.replace(results, outcomes=[*results.outcomes, smaller, once])
    assert more.curves() == curves
    sizes = {line["name"]: line["x"] for line in by_size(more, "accuracy")["data"]}
    assert len(sizes[first[0].skill]) == 2
    assert len(sizes["once"]) == 1  # nothing is drawn where nothing was measured
    alone = msgspec.structs.replace(results, outcomes=[row for row in results.outcomes if row.scale == 0])
    assert alone.curves() == {}
    assert not [name for name in make_figures(alone) if name.startswith("scale-")]
    written = records.to_json(results)
    written["outcomes"][1]["change"]["accuracy"] = 0.5  # by a factor of 1
    with pytest.raises(DataError, match="expected no change at a factor of 1 of "):
        records.made(EvaluationResults, written)


def test_sizes_layers_and_controls_of_a_grid(vit, batches):
    scores = scores_of(vit, batches)
    cases = cases_of_scores(
        scores, "pearson", ("loss",), Grid(shares=(0.02, 0.1), layers=("all", "last", "blocks.0", "head"))
    )
    assert [case.layers for case in cases[::2]] == ["all", "blocks.2", "blocks.0", "head"]
    widths = {site.name: site.width for site in scores.sites}
    for case in cases:
        want = int(case.share * scores.n_neurons)
        room = sum(int(0.25 * width) for site, width in widths.items() if case.layers in ("all", site, site[:8]))
        assert len(case.skill) == min(want, room)
        for control in case.controls:
            assert {s: len(i) for s, i in control.neurons.items()} == {s: len(i) for s, i in case.skill.neurons.items()}
    # the size of r counts, unless its sign is asked for
    values = scores.pearson[:, scores.columns.index("loss")]
    slices = scores.site_slices()
    chosen = np.concatenate([np.abs(values[slices[s]][i.numpy()]) for s, i in cases[0].skill.neurons.items()])
    np.testing.assert_allclose(np.sort(chosen), np.sort(np.abs(values))[-len(chosen) :])
    signed = cases_of_scores(scores, "pearson", ("loss",), Grid(shares=(0.02,), layers=("all",), signed=True))
    chosen = np.concatenate([values[slices[s]][i.numpy()] for s, i in signed[0].skill.neurons.items()])
    np.testing.assert_allclose(np.sort(chosen), np.sort(values)[-len(chosen) :])


def test_loaded_skills_keep_their_neurons(vit):
    sites = find_sites(vit)
    skill = Skill("a", {"blocks.0.mlp": torch.arange(5), "blocks.2.attn": torch.tensor([1]), "head": torch.tensor([3])})
    cases = cases_of_skills([skill], sites, Grid(layers=("all", "each", "head")))
    assert [(case.layers, len(case.skill)) for case in cases] == [
        ("all", 7),
        ("blocks.0", 5),
        ("blocks.2", 1),
        ("head", 1),
    ]
    assert cases[0].scales == (0.0, 0.5, 1.0, 2.0, 4.0)
    assert cases[1].scales == (0.0,)
    assert [Grid(scales=scales).scales_at("all") for scales in ((0.0,), (1.0,), (1.0, -1.0, 0.5))] == [
        (0.0,), (0.0,), (-1.0, 0.0, 0.5, 1.0),
    ]  # fmt: skip
    assert isinstance(cases[0], Case)


def test_skills_of_one_name_go_by_their_columns(vit, batches):
    scores = scores_of(vit, batches)
    twice = replace(scores, columns=tuple("genre:ant" if column == "loss" else column for column in scores.columns))
    cases = cases_of_scores(twice, "pearson", ("label", "genre"), Grid(layers=("all",), shares=(0.05, 0.1)))
    assert [case.skill.name for case in cases[:6]] == ["label:ant", *CLASSES[1:], "genre:ant"]
    kept = largest(cases)
    assert {skill.name: len(skill) for skill in kept} == {case.skill.name: len(case.skill) for case in cases[6:]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shares": (0.0,)}, "shares: expected a number in (0, 1], got 0.0"),
        ({"shares": ()}, "shares: expected at least one, got none"),
        ({"scales": (float("nan"),)}, "scales: expected a finite number, got nan"),
        ({"draws": 0}, "draws: expected at least 1, got 0"),
    ],
)
def test_a_grid_that_cannot_be(change, words):
    assert words in one_line(ArgumentError, Grid, **change)


def test_layers_and_metrics_that_are_not_there(vit, batches):
    assert "got 'blocks.9'" in one_line(ArgumentError, layer_sites, find_sites(vit), ["blocks.9"])
    with pytest.raises(ArgumentError, match=r"metric: expected one of .* got 'nothing'"):
        cases_of_scores(scores_of(vit, batches), "pearson", ("nothing",), Grid())
    empty = Skill("a", {"blocks.0.mlp": torch.arange(5)})
    assert "expected some with neurons" in one_line(
        ArgumentError, cases_of_skills, [empty], find_sites(make_vit()), Grid(layers=("head",))
    )


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A tiny classifier of texts, and 90 texts in two classes, as options of the command line."""
    pytest.importorskip("transformers", reason="needs transformers")
    from tiny_models import WORDS, save_model

    folder = tmp_path_factory.mktemp("texts")
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    save_model(folder / "model", **names)
    rng = np.random.default_rng(0)
    rows = [f"{' '.join(rng.choice(WORDS, size=3 + i % 5))}\t{('neg', 'pos')[i % 2]}\t{3 + i % 5}" for i in range(90)]
    (folder / "x.tsv").write_text("\n".join(["text\tlabel\tlength", *rows]) + "\n", encoding="utf-8")
    return [
        "evaluate", "--model", f"hf:{folder / 'model'}", "--dataset", "text", "--data-file", folder / "x.tsv",
        "--pool", "cls", "--batch-size", 32,
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_the_command(texts, tmp_path):
    options = [*texts, "--shares", "0.02", "0.2", "--layers", "all,last", "--scales", "0,2", "--control-draws", 2]
    output = ["--statistics", "pearson", "--metrics", "label,column:length", "--output", tmp_path]
    result = run(*options, *output)
    assert result.exit_code == 0, result.output
    assert "F1, mean of the classes" in result.output
    found = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    jsonschema.validate(found, schema())
    assert found["data"]["n_test"] == 30
    assert len(found["outcomes"]) == 3 * 2 * (3 + 1)
    assert "\n18 interventions on 30 examples" in f"\n{result.output}"
    assert {"\N{MULTIPLICATION SIGN}0", "\N{MULTIPLICATION SIGN}1", "\N{MULTIPLICATION SIGN}2"} <= set(
        re.findall(r"\S+", result.output)
    )
    assert {(o["skill"], o["metric"]) for o in found["outcomes"]} == {
        ("neg", "label:neg"), ("pos", "label:pos"), ("length", "length"),
    }  # fmt: skip
    assert any(o["change"]["accuracy"] for o in found["outcomes"])
    assert records.to_json(Evaluation.load(tmp_path).results) == found
    page = (tmp_path / "evaluation.html").read_text(encoding="utf-8")
    for place in ("size-class_f1", "layer-accuracy", "layer-random-accuracy", "scale-f1_macro"):
        assert f'id="{place}"' in page
        assert f'"{place}":' in page
    chosen = skillfast.load_skills(tmp_path)
    assert {name: len(skill) for name, skill in chosen.items()} == {
        o["skill"]: o["neurons"] for o in found["outcomes"] if o["layers"] == "all" and o["share"] == 0.2
    }
    (tmp_path / "evaluation.html").unlink()
    result = run("report", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "evaluation.html").read_text(encoding="utf-8") == page
    # another run's skills
    skillfast.save_skills(tmp_path / "skills", [Skill("mine", {"blocks.0.mlp": torch.arange(4)}, metric="label:pos")])
    result = run(*options, "--skills", tmp_path / "skills", "--output", tmp_path / "again", "--quiet")
    assert result.exit_code == 0, result.output
    loaded = Evaluation.load(tmp_path / "again").results
    assert [(o.skill, o.layers, o.scale, o.neurons) for o in loaded.outcomes] == [
        ("mine", "all", 0.0, 4), ("mine", "all", 1.0, 4), ("mine", "all", 2.0, 4),
    ]  # fmt: skip
    assert loaded.outcomes[0].values["class_f1"] is not None


@pytest.mark.parametrize("method", ["attribution", "mask"])
def test_the_command_with_other_rankings(texts, tmp_path, method):
    options = ["--shares", "0.1", "--layers", "all", "--scales", "0", "--statistics", "pearson", "--quiet"]
    result = run(*texts, *options, "--method", method, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert [o.skill for o in Evaluation.load(tmp_path).results.outcomes] == ["neg", "pos"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (["--metrics", "nothing"], 2, "metric 'nothing': expected one of"),
        (["--layers", "blocks.77"], 2, "layers: expected all, each, last or some of blocks.0, blocks.1, head"),
        (["--method", "mask", "--metrics", "label,loss"], 2, "which ranks neurons for classes alone"),
        (["--method", "mask", "--contrastive"], 2, "contrastive: expected with a statistic or attribution"),
        (["--method", "auroc", "--statistics", "pearson"], 2, "got 'auroc'"),
        (["--shares", "2"], 2, "shares: expected a number in (0, 1], got 2.0"),
        (["--skills", "/nowhere"], 1, "expected a file, got none"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(texts, tmp_path, change, code, words):
    result = run(*texts, "--quiet", "--output", tmp_path, *change)
    assert result.exit_code == code, result.output
    assert words in result.output
    assert len(result.output.strip().splitlines()) == 1
    with pytest.raises(DataError, match="expected a file, got none"):
        Evaluation.load(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_command_on_the_digits(trained_digits, tmp_path):
    options = ["--shares", "0.03", "--layers", "all", "--scales", "0", "--control-draws", 2, "--quiet"]
    result = run("evaluate", *options, "--statistics", "pearson", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    jsonschema.validate(found, schema())
    own = [o["change"]["class_accuracy"] for o in found["outcomes"]]
    drawn = [o["random"]["change"]["class_accuracy"]["mean"] for o in found["outcomes"]]
    assert len(own) == 10
    assert np.mean(own) < -0.05 < np.mean(drawn)


def test_metrics_of_images_are_fixed(tmp_path):
    result = run("evaluate", "--quiet", "--output", tmp_path, "--metrics", "entropy")
    assert result.exit_code == 2
    assert "metrics: expected some of label, correct, confidence, loss for images, got 'entropy'" in result.output


def hostile_page(folder, vit, batches):
    from skillfast.report import write_evaluation

    hostile = "</script><b id=hostile>"
    classes = (hostile, *CLASSES[1:])
    scores = skillfast.trace(vit, batches, classes=classes, statistics=("pearson",))
    cases = cases_of_scores(scores, "pearson", ("label",), Grid(shares=(0.05,), draws=1))
    intact, outcomes = class_outcomes(vit, batches, cases, classes, replicates=10)
    model = {
        "name": hostile,
        "fingerprint": "x",
        "neurons": 10,
        "sites": [{"name": "head", "kind": "head", "block": None, "width": 10}],
        "weights": sample.WEIGHTS,
    }
    data = {"name": "x", "classes": list(classes), "n_select": 1, "n_validate": 0, "n_test": 37}
    data["digests"] = sample.DIGESTS
    results = {
        "task": "classification", "measures": class_scores.MEASURES, "intact": intact, "outcomes": outcomes,
        "model": model, "data": data, "config": {"grid": {}},
        "environment": environment(vit, torch.device("cpu")),
    }  # fmt: skip
    Evaluation(records.made(EvaluationResults, results)).save(folder)
    jsonschema.validate(json.loads((folder / "evaluation.json").read_text()), schema())
    page = write_evaluation(folder).read_text(encoding="utf-8")
    assert "<b id=hostile>" not in page
    return folder / "evaluation.html"


def test_names_on_the_page_are_text(tmp_path, vit, batches):
    hostile_page(tmp_path, vit, batches)


def test_the_page_draws_its_figures_and_shuts_nobody_out(browser, tmp_path, vit, batches):
    def use(page):
        found = barriers(page) + unheard(page)
        page.emulate_media(color_scheme="dark")
        return draw_all(page), found + barriers(page, "color-contrast")

    drawn, found = browser.visit(hostile_page(tmp_path, vit, batches), use)
    assert drawn == 5 * 4  # measures x (size, factor, layers, their control)
    assert found == []
