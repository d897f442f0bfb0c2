"""Runs of a model and a loader of one's own: mappings, images, a loader for each part."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import make_vit, one_line
from torch.utils.data import DataLoader, TensorDataset

import skillfast
from skillfast import BenchConfig
from skillfast.errors import ArgumentError, DataError, ModelError
from skillfast.runs.config import Grid
from skillfast.runs.given import Examples, Given, divided

transformers = pytest.importorskip("transformers", reason="needs transformers")
NAMES = {0: "bad", 1: "good", 2: "odd"}


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, vocab_size=99,
        max_position_embeddings=16, id2label=NAMES,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def texts(n=60):
    """Rows as a data set of the datasets library has them, and a collator that pads."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 10, (n,), generator=generator).tolist()
    rows = [
        {"input_ids": torch.randint(3, 99, (length,), generator=generator), "y": i % 3}
        for i, length in enumerate(lengths)
    ]

    def collate(items):
        width = max(len(item["input_ids"]) for item in items)
        padded = [torch.nn.functional.pad(item["input_ids"], (0, width - len(item["input_ids"]))) for item in items]
        ids = torch.stack(padded)
        labels = torch.tensor([item["y"] for item in items])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "y": labels}

    return DataLoader(rows, batch_size=16, shuffle=True, collate_fn=collate)


def batch_of(loader, rows):
    return loader.collate_fn([loader.dataset[i] for i in rows])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a model that knows nothing
def test_a_benchmark_of_mappings(tmp_path):
    model, loader, said = bert(), texts(36), []
    config = BenchConfig.of(method="pearson", control_draws=1, output=str(tmp_path / "out"), share=0.05, batch_size=16)
    report = skillfast.bench(config, model=model, loader=loader, label_key="y", say=said.append)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["config"]["model"] == results["model"]["name"] == "BertForSequenceClassification"
    assert results["config"]["dataset"] == results["dataset"]["name"] == "given"
    assert results["dataset"]["classes"] == list(NAMES.values())
    assert results["model"]["trained"] == {"from": "given", "finetune": "none"}
    assert results["model"]["coverage"]["complete"]
    parts = [results["dataset"][f"n_{part}"] for part in ("select", "validate", "test")]
    assert parts == [21, 3, 12]
    assert "skillfast.bench(model=..., loader=...)" in (tmp_path / "out" / "report.html").read_text()

    rows = divided(Examples(loader, list(NAMES.values()), "y", 0), 0)["test"]
    batch = batch_of(loader, rows)
    labels = batch.pop("y")
    with torch.no_grad():
        intact = model(**batch).logits.argmax(1)
        for i, name in enumerate(NAMES.values()):
            with skillfast.ablate(model, report.skills[name]):
                predicted = model(**batch).logits.argmax(1)
            for j in range(3):
                own = labels == j
                change = (predicted == j)[own].double().mean() - (intact == j)[own].double().mean()
                assert results["removal_matrix"][i][j] == pytest.approx(float(change))
    assert any("21 examples to select on" in line for line in said)


@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_of_images_with_a_loader_for_each_part():
    model = make_vit()
    images, labels = torch.randn(60, 3, 16, 16), torch.arange(60) % 5
    loaders = {
        name: DataLoader(TensorDataset(images[rows], labels[rows]), batch_size=7)
        for name, rows in {"select": slice(30), "validate": slice(30, 40), "test": slice(40, 60)}.items()
    }
    found = skillfast.evaluate(
        grid=Grid(shares=(0.05,), layers=("all",), scales=(0.0,), draws=1, replicates=10), model=model, loader=loaders
    )
    assert found.results.model.name == "VisionTransformer"
    with torch.no_grad():
        right = model(images[40:]).argmax(1) == labels[40:]
    assert found.results.intact.values["accuracy"] == pytest.approx(float(right.double().mean()))
    assert found.results.config["batch_size"] == 7


def test_examples_are_those_of_the_loader():
    loader = texts(12)
    made = Examples(loader, list(NAMES.values()), "y", 0)
    np.testing.assert_array_equal(made.labels, np.arange(12) % 3)
    batch = made.collate([made[i] for i in (5, 2)])
    want = batch_of(loader, (5, 2))
    assert batch.labels.tolist() == want.pop("y").tolist() == [2, 2]
    assert {name: x.tolist() for name, x in batch.inputs.items()} == {name: x.tolist() for name, x in want.items()}
    batches = [batch_of(loader, range(start, start + 4)) for start in range(0, 12, 4)]
    kept = Examples(batches, list(NAMES.values()), "y", 0)
    again = kept.collate([kept[i] for i in (5, 2)])
    width = want["input_ids"].shape[1]
    for name, x in again.inputs.items():
        np.testing.assert_array_equal(x[:, :width], want[name])
        assert not x[:, width:].any()


def test_parts_share_no_example_and_have_all_classes():
    parts = divided(Examples(texts(31), list(NAMES.values()), "y", 0), 3)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(31))
    for rows in parts.values():
        assert set(rows % 3) == {0, 1, 2}
    assert [len(parts[name]) for name in ("select", "validate", "test")] == [19, 3, 9]


def test_what_cannot_be_run_is_refused_in_one_line():
    model, loader = bert(), texts()
    assert "loader: expected model= and loader= together" in one_line(ArgumentError, skillfast.bench, model=model)
    assert "model: expected model= and loader= together" in one_line(ArgumentError, skillfast.evaluate, loader=loader)
    told = one_line(
        ArgumentError,
        skillfast.bench,
        BenchConfig.of(model="vit_tiny_patch16_224", dataset="cifar10"),
        model=model,
        loader=loader,
    )
    assert "expected no settings of model and data beside model=" in told
    run = {"model": model, "loader": loader}
    assert "got {input_ids: int64 [16, " in one_line(ArgumentError, skillfast.bench, **run)
    told = one_line(DataError, skillfast.bench, model=model, loader=texts(9), label_key="y")
    assert "class 'bad': expected at least 4 examples, to be in all three parts, got 3" in told
    told = one_line(ArgumentError, skillfast.bench, model=model, loader={"test": loader}, label_key="y")
    assert "one for each of select, validate, test, got test" in told
    told = one_line(ModelError, skillfast.bench, model=bert().train(), loader=loader, label_key="y")
    assert "training mode" in told
    assert Given.of(None, None, None) is None
