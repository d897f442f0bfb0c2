"""Batches and outputs as people have them: mappings, outputs with logits, classes from a configuration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_vit, one_line
from torch import nn
from torch.utils.data import DataLoader

import skillfast
from skillfast.errors import ArgumentError, ModelError
from skillfast.models.batches import classes_of, read_batch

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.filterwarnings("ignore:some scores are not defined")

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
NAMES = {0: "bad", 1: "good", 2: "odd"}


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, vocab_size=99, max_position_embeddings=16, id2label=NAMES)
    return transformers.BertForSequenceClassification(config).eval()


def texts(key: str = "labels") -> list[dict[str, torch.Tensor]]:
    """30 texts of 3 to 9 tokens, padded, in batches as a collator of the transformers library makes them."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for lengths in torch.randint(3, 10, (30,), generator=generator).split(8):
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = torch.randint(3, 99, mask.shape, generator=generator) * mask
        batches.append({"input_ids": ids, "attention_mask": mask, key: torch.arange(len(lengths)) % 3})
    return batches


def by_hand(model: nn.Module, batches: list[dict[str, torch.Tensor]], key: str) -> skillfast.NeuronScores:
    def forward(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        label = batch[key]
        chosen = logits.softmax(1).gather(1, logits.argmax(1, keepdim=True))[:, 0]
        loss = nn.functional.cross_entropy(logits, label, reduction="none")
        return logits, {"label": label, "correct": logits.argmax(1) == label, "confidence": chosen, "loss": loss}

    return skillfast.trace(
        model, batches, forward=forward, mask=lambda batch: batch["attention_mask"], classes=list(NAMES.values())
    )


@pytest.mark.parametrize("key", ["labels", "label"])
def test_a_loader_of_mappings_is_traced_with_its_mask_and_its_classes(key):
    model, batches = bert(), texts(key)
    found = skillfast.trace(model, batches)
    want = by_hand(model, batches, key)
    assert found.columns == want.columns
    assert found.columns[:3] == ("label:bad", "label:good", "label:odd")
    for site in want.sites:
        np.testing.assert_allclose(found[site.name].pearson, want[site.name].pearson, atol=1e-12)
        np.testing.assert_array_equal(found[site.name].spearman, want[site.name].spearman)


def test_padding_does_not_count():
    model = bert()
    short, long = texts(), []
    for batch in short:
        pad = torch.zeros(len(batch["labels"]), 4, dtype=torch.int64)
        wider = {name: torch.cat([value, pad], 1) for name, value in batch.items() if name != "labels"}
        long.append({**wider, "labels": batch["labels"]})
    found, want = skillfast.trace(model, long), skillfast.trace(model, short)
    np.testing.assert_allclose(found["blocks.1.mlp"].pearson, want["blocks.1.mlp"].pearson, atol=1e-5)


def test_a_batch_encoding_with_labels_beside_it_is_attributed():
    model = bert()
    pairs = []
    for batch in texts():
        encoding = transformers.BatchEncoding({k: v for k, v in batch.items() if k != "labels"})
        pairs.append((encoding, batch["labels"]))
    found, want = skillfast.attribute(model, pairs), skillfast.attribute(model, texts())
    np.testing.assert_allclose(found.values, want.values, rtol=1e-6, atol=1e-12)
    assert found.columns == ("label:bad", "label:good", "label:odd")
    assert {site.kind for site in found.sites} == {"mlp", "attn", "head"}


def test_an_image_model_whose_output_holds_logits():
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=5)
    model = transformers.ViTForImageClassification(config).eval()
    images, labels = torch.randn(20, 3, 8, 8), torch.arange(20) % 5
    data = torch.utils.data.TensorDataset(images, labels)
    found = skillfast.trace(model, DataLoader(data, batch_size=7))
    assert found.columns[:5] == tuple(f"label:LABEL_{i}" for i in range(5))
    assert found.n_observations == 20
    swept = skillfast.sweep(model, DataLoader(data, batch_size=7), [], classes=5)
    with torch.no_grad():
        right = model(images).logits.argmax(1) == labels
    np.testing.assert_allclose(swept.baseline.mean(), float(right.double().mean()))


def test_every_kind_that_a_model_has():
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=99)).eval()  # no head
    with skillfast.Tracer(model, {"x": skillfast.Continuous()}) as tracer:
        model(torch.randint(3, 99, (4, 5)))
        tracer.step(x=torch.arange(4.0))
    assert {site.kind for site in tracer.compute().sites} == {"mlp", "attn"}


def test_names_of_the_datasets_library():
    class Label:
        names = ("no", "yes")

    class Rows(list):
        def __init__(self) -> None:
            super().__init__()
            self.features = {"label": Label(), "text": None}

    assert classes_of(DataLoader(Rows()), bert()) == ["no", "yes"]


IDS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"input_ids": IDS}, "expected a mapping with labels or label, got {input_ids: int64 [2, 5]}"),
        ({"input_ids": IDS, "labels": IDS}, "expected one class index per example, got int64 [2, 5]"),
        ({"input_ids": IDS, "labels": torch.zeros(2)}, "expected one class index per example, got float32 [2]"),
        ((IDS, IDS[:, 0], IDS), "expected (images, labels) or a mapping with labels, got 3 parts"),
        ("text", "got str"),
    ],
)
def test_what_cannot_be_understood_is_shown(batch, words):
    told = one_line(ArgumentError, read_batch, batch)
    assert words in told
    assert "forward=" in told


def test_a_model_that_answers_for_every_token_is_refused():
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, vocab_size=99)).eval()
    told = one_line(ModelError, skillfast.trace, model, texts(), classes=3)
    assert "expected logits [batch, classes], got shape [8, " in told


def test_a_sweep_says_that_it_takes_one_tensor():
    told = one_line(ArgumentError, skillfast.sweep, bert(), texts(), [], classes=3)
    assert "expected (inputs, labels) of one tensor each, got {input_ids: int64 [8, " in told


def test_nobody_knows_the_classes():
    model = make_vit()
    del model.num_classes
    told = one_line(ArgumentError, skillfast.trace, model, [])
    assert "model.config.id2label" in told
