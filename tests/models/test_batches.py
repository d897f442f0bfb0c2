"""Batches and outputs as people have them: mappings, outputs with logits, classes from a configuration."""

from __future__ import annotations

import warnings
from contextlib import suppress

import numpy as np
import pytest
import torch
from conftest import make_vit, one_line
from torch import nn
from torch.utils.data import DataLoader

import skillfast
from skillfast.errors import ArgumentError, ModelError
from skillfast.models import coverage
from skillfast.models.batches import classes_of, read_batch
from skillfast.models.sites import declare_sites, find_sites

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


def skill_of(model: nn.Module, sites: int | None = None) -> skillfast.Skill:
    """Every third neuron of some sites."""
    neurons = {site.name: torch.arange(0, site.width, 3) for site in find_sites(model)[:sites]}
    return skillfast.Skill("third", neurons)


def by_loop(model: nn.Module, batches: list[dict[str, torch.Tensor]], neurons, scale: float = 0.0) -> torch.Tensor:
    """Logits of a plain loop of hooks, of mappings with their mask."""

    def scaled(_, args, index):
        x = args[0].clone()
        x[..., index] *= scale
        return (x, *args[1:])

    paths = {site.name: site.path for site in find_sites(model)}
    handles = [
        model.get_submodule(paths[name]).register_forward_pre_hook(lambda m, a, index=index: scaled(m, a, index))
        for name, index in neurons.items()
    ]
    with torch.no_grad():
        logits = [
            model(**{k: v for k, v in batch.items() if k not in ("labels", "label", "y")}).logits for batch in batches
        ]
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("key", ["labels", "y"])
def test_a_sweep_of_mappings_equals_a_loop(key):
    model, batches = bert(), texts(key)
    first = {name: torch.arange(0, 24, 2) for name in ("blocks.0.attn", "blocks.1.attn", "head")}
    skills = [
        skillfast.Skill("all", skill_of(model).neurons),
        *(skillfast.Skill(name, {name: index}) for name, index in first.items()),
        skillfast.Skill("late", {"blocks.1.mlp": torch.arange(20)}),
    ]
    conditions = [skillfast.Condition(skill, scale=scale) for skill in skills for scale in (0.0, 3.0)]
    found = skillfast.sweep(
        model, batches, conditions, label_key=None if key == "labels" else key, keep_predictions=True, keep_margins=True
    )
    assert found.classes == tuple(NAMES.values())
    np.testing.assert_array_equal(found.labels, torch.cat([batch[key] for batch in batches]))
    np.testing.assert_allclose(found.baseline_logits, torch.cat(by_loop(model, batches, {})), atol=1e-5)
    for i, condition in enumerate(conditions):
        want = torch.cat(by_loop(model, batches, condition.skill.neurons, condition.scale))
        labels = torch.from_numpy(found.labels)[:, None]
        others = want.scatter(1, labels, -torch.inf).amax(1)
        np.testing.assert_allclose(found.margins[i], want.gather(1, labels)[:, 0] - others, atol=1e-5)
    assert np.abs(found.margins - found.margins[0]).max() > 1e-3


def test_a_sweep_of_mappings_starts_in_the_middle():
    """A text without padding beside padded ones, in a model that makes no mask for the former."""
    from skillfast.ablation.interventions import Interventions
    from skillfast.ablation.sweep import BatchRunner

    model, batches = bert(), texts()
    condition = skillfast.Condition(skillfast.Skill("late", {"blocks.1.attn": [0, 1]}))
    with torch.inference_mode():
        runner = BatchRunner(model, Interventions(model, [condition]), None)
        for batch in batches:
            runner.run(read_batch(batch), keep_embeddings=True, keep_logits=False)
    (route,) = runner.reuse.routes.values()
    assert route.point.block == 1
    assert not route.whole_stem


def test_masks_are_learned_from_mappings_as_from_packed_texts():
    """Texts are kept padded to the longest of them all, which changes no logit."""
    model, batches = bert(), texts()
    attributions = skillfast.attribute(model, batches)
    settings = {"steps": 3, "batch_size": 8, "share": 0.2}
    found = skillfast.learn_masks(model, batches, attributions, **settings)
    width = max(batch["input_ids"].shape[1] for batch in batches)
    padded = [
        {k: v if k == "labels" else nn.functional.pad(v, (0, width - v.shape[1])) for k, v in batch.items()}
        for batch in batches
    ]
    want = skillfast.learn_masks(model, padded, attributions, **settings)
    np.testing.assert_allclose(found.values, want.values, atol=1e-4)
    assert np.isfinite(found.values).all()
    assert not np.allclose(found.values, attributions.values)


def test_donors_of_mappings_do_not_depend_on_padding():
    model, batches = bert(), texts()
    skill = skill_of(model, 2)
    bank = skillfast.donors(model, batches, [skill], n_donors=7)
    assert {tuple(x.shape) for x in bank.activations.values()} == {(7, 1, 8), (7, 1, 14)}
    one = [{k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(len(batch["labels"]))]
    shorter = [{k: v if k == "labels" else v[:, : int(x["attention_mask"].sum())] for k, v in x.items()} for x in one]
    other = skillfast.donors(model, shorter, [skill], n_donors=7)
    np.testing.assert_array_equal(bank.digests, other.digests)
    for name, x in bank.activations.items():
        torch.testing.assert_close(x, other.activations[name])
    condition = skillfast.Condition(skill, mode="resample")
    swept = skillfast.sweep(model, batches, [condition], donors=bank, keep_margins=True, keep_predictions=True)
    with skillfast.ablate(model, skill, mode="resample", donors=bank), torch.no_grad():
        logits = torch.cat([model(**{k: v for k, v in b.items() if k != "labels"}).logits for b in batches])
        inner = torch.cat([model(**b).logits for b in batches])  # labels tell nobody apart
    torch.testing.assert_close(logits, inner)
    np.testing.assert_array_equal(swept.predictions[0], logits.argmax(1))


def causal(tokens: int = 12) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """A decoder, and texts whose labels are their own tokens, as a collator for language models makes them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, vocab_size=31, num_key_value_heads=2, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    batches = []
    for n in (5, 4):
        length = torch.arange(4, 4 + n)
        mask = (torch.arange(tokens) < length[:, None]).long()
        ids = torch.randint(3, 31, (n, tokens)) * mask
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return model, batches


def next_tokens(model, batches, logits):
    """Logits [n, words] and next tokens [n] of all tokens that have one, in order."""
    rows, labels = [], []
    for batch, scores in zip(batches, logits, strict=True):
        for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], scores, strict=True):
            n = int(mask.sum())
            rows.append(row[: n - 1])
            labels.append(ids[1:n])
    return torch.cat(rows), torch.cat(labels)


def test_a_causal_model_with_labels_per_token_is_traced():
    model, batches = causal()
    scores = skillfast.trace(model, batches, pool="none", statistics=("pearson",))
    assert scores.columns == ("correct", "confidence", "loss")
    logits, labels = next_tokens(model, batches, by_loop(model, batches, {}))
    assert scores.n_observations == len(labels)
    x = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: x.append(args[0]))
    by_loop(model, batches, {})
    handle.remove()
    rows, _ = next_tokens(model, batches, x)
    loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    want = np.corrcoef(rows.double().T, loss.double()[None])[:-1, -1]
    np.testing.assert_allclose(scores["blocks.1.mlp"].pearson[:, 2], want, atol=1e-5)
    pooled = skillfast.trace(model, batches, statistics=("pearson",))
    assert pooled.columns == ("correct", "confidence", "loss")
    assert pooled.n_observations == 9
    each = [row.mean() for row in loss.split([int(m.sum()) - 1 for b in batches for m in b["attention_mask"]])]
    pairs = list(zip(batches, x, strict=True))
    means = [row[: int(m.sum())].mean(0) for b, r in pairs for m, row in zip(b["attention_mask"], r, strict=True)]
    want = np.corrcoef(torch.stack(means).double().T, torch.stack(each).double()[None])[:-1, -1]
    np.testing.assert_allclose(pooled["blocks.1.mlp"].pearson[:, 2], want, atol=1e-5)


def test_a_sweep_of_labels_per_token_counts_tokens():
    model, batches = causal()
    skill = skill_of(model, 3)
    found = skillfast.sweep(model, batches, [skillfast.Condition(skill)], keep_predictions=True, keep_embeddings=True)
    assert len(found.classes) == 31
    logits, labels = next_tokens(model, batches, by_loop(model, batches, {}))
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.top2[:, 0], logits.argmax(1))
    changed, _ = next_tokens(model, batches, by_loop(model, batches, skill.neurons))
    np.testing.assert_array_equal(found.predictions[0], changed.argmax(1))
    assert (found.predictions[0] != found.top2[:, 0]).any()
    torch.testing.assert_close(model.lm_head(torch.from_numpy(found.embeddings[0])), changed, rtol=1e-3, atol=1e-4)


def test_labels_of_tokens_that_are_classes():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, vocab_size=99, id2label=NAMES)
    model = transformers.BertForTokenClassification(config).eval()
    batches = texts()
    for batch in batches:
        batch["labels"] = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    scores = skillfast.trace(model, batches, pool="none", statistics=("pearson",))
    assert scores.columns == ("label:bad", "label:good", "label:odd", "correct", "confidence", "loss")
    assert scores.n_observations == sum(int(batch["attention_mask"].sum()) for batch in batches)
    told = one_line(ArgumentError, skillfast.bench, model=model, loader=batches)
    assert "expected one class index per example, got int64 [8, " in told
    assert "use trace, attribute, learn_masks and sweep" in told


def tagged() -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """A model of three classes of tokens, and texts."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, vocab_size=99, id2label=NAMES)
    model = transformers.BertForTokenClassification(config).eval()
    batches = texts()[:2]
    for batch in batches:
        batch["labels"] = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    return model, batches


@pytest.mark.parametrize("kind", [tagged, causal])
def test_attributions_of_labels_per_token_are_averages_over_a_class_s_tokens(kind):
    """Against a backward pass from each token by itself."""
    model, batches = kind()
    found = skillfast.attribute(model, batches, sites=["blocks.0.mlp", "blocks.1.attn"])
    want, counts = np.zeros_like(found.values), np.zeros(found.values.shape[1], int)
    for batch in batches:
        x: list[torch.Tensor] = []
        handles = [
            model.get_submodule(site.path).register_forward_pre_hook(lambda _, args, x=x: x.append(args[0]))
            for site in found.sites
        ]
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        for handle in handles:
            handle.remove()
        for text, (row, labels) in enumerate(zip(logits, batch["labels"], strict=True)):
            shift = 1 if kind is causal else 0
            for token, label in enumerate(labels[shift:].tolist()):
                if label < 0:
                    continue
                others = torch.arange(row.shape[-1]) != label
                value = row[token, label] - row[token, others].logsumexp(0)
                parts = torch.autograd.grad(value, x, retain_graph=True)
                effect = [(part * each.detach())[text].sum(0) for part, each in zip(parts, x, strict=True)]
                want[:, label] += torch.cat(effect).numpy()
                counts[label] += 1
    assert found.n_observations.tolist() == counts.tolist()
    with np.errstate(invalid="ignore"):
        want = want / np.where(counts, counts, np.nan)
    np.testing.assert_allclose(found.values, want, atol=2e-6 * np.nanmax(np.abs(want)) + 1e-7)


def test_more_attributions_than_fit_are_refused(monkeypatch):
    model, batches = tagged()
    monkeypatch.setattr("skillfast.skills.attribution.free_bytes", lambda device: 1000)
    assert "expected 3 classes of " in one_line(ArgumentError, skillfast.attribute, model, batches)


def test_a_tower_without_a_head_has_what_needs_no_logits():
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)
    model = transformers.CLIPVisionModel(config).eval()
    images, labels = torch.randn(20, 3, 8, 8), torch.arange(20) % 2
    batches = [{"pixel_values": x, "labels": y} for x, y in zip(images.split(8), labels.split(8), strict=True)]
    scores = skillfast.trace(model, batches, {"label": skillfast.Categorical(2)}, statistics=("pearson",))
    assert {site.kind for site in scores.sites} == {"mlp", "attn"}
    x = []
    site = scores.sites[0]
    handle = model.get_submodule(site.path).register_forward_pre_hook(lambda _, args: x.append(args[0].mean(1)))
    with torch.no_grad():
        before = model(pixel_values=images).pooler_output
    handle.remove()
    want = np.corrcoef(x[0].double().T, labels.double()[None])[:-1, -1]
    np.testing.assert_allclose(scores[site.name].pearson[:, 1], want, atol=1e-5)
    skill = skillfast.select(scores, "pearson", metric="label", share=0.1)["1"]
    bank = skillfast.donors(model, batches, [skill])
    for settings in ({}, {"mode": "resample", "donors": bank}):
        with skillfast.ablate(model, skill, **settings), torch.no_grad():
            assert not torch.allclose(model(pixel_values=images).pooler_output, before, atol=1e-4)
    assert skillfast.coverage(model, batches[0]).complete
    for refused in (skillfast.trace, lambda *a, **k: skillfast.sweep(*a, [], **k)):
        told = one_line(ModelError, refused, model, batches, classes=2)
        assert "CLIPVisionModel: expected logits or an output with .logits, got {last_hidden_state: float32 [" in told
        assert 'metrics={"label": Categorical(classes)}' in told


def test_what_a_model_does_not_take_is_told_in_one_line():
    batches = [{**batch, "row": torch.arange(len(batch["labels"]))[:, None]} for batch in texts()]
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=5)
    vit = transformers.ViTForImageClassification(config).eval()
    for refused in (skillfast.trace, skillfast.attribute, lambda *a: skillfast.sweep(*a, [])):
        told = one_line(ModelError, refused, vit, batches)
        assert "ViTForImageClassification: expected inputs that its forward takes, got {input_ids: int64 [" in told
        assert "label_key=" in told
    ragged = {"input_ids": torch.zeros(4, 3).long(), "pixels": torch.zeros(6, 2), "labels": torch.zeros(4).long()}
    told = one_line(ArgumentError, skillfast.sweep, bert(), [ragged], [])
    assert "expected tensors with a row per example, got {input_ids: int64 [4, 3], pixels: float32 [6, 2]}" in told


def test_sites_that_are_incomplete_are_told_once(monkeypatch):
    monkeypatch.setattr(coverage, "_told", {})
    model = make_vit()
    declare_sites(model, {site.name: site.path for site in find_sites(model) if site.name != "blocks.1.mlp"})
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 5
    skill = skillfast.Skill("s", {"blocks.0.mlp": [0]})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with skillfast.ablate(model, skill), skillfast.ablate(model, skill):
            skillfast.trace(model, [(images, labels)], statistics=("pearson",))
        skillfast.sweep(model, [(images, labels)], [])
        skillfast.trace(make_vit(), [(images, labels)], statistics=("pearson",))  # complete
    (line,) = [str(warning.message) for warning in told if "sites cover" in str(warning.message)]
    assert "past them act blocks.*.mlp.fc1" in line
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("batch", [None, torch.randn(6, 3, 16, 16)])
def test_what_somebody_has_been_told_is_not_certified_again(monkeypatch, batch):
    monkeypatch.setattr(coverage, "_told", {})
    model = make_vit()
    declare_sites(model, {site.name: site.path for site in find_sites(model) if site.name != "blocks.1.mlp"})
    assert not skillfast.coverage(model, batch).complete
    monkeypatch.setattr(coverage, "coverage", lambda _: pytest.fail("certified"))
    coverage.warn_incomplete(model)
    with pytest.raises(pytest.fail.Exception):
        coverage.warn_incomplete(make_vit(depth=2))


@pytest.mark.parametrize(
    "first",
    [
        skillfast.prepare,
        lambda model: skillfast.trace(model, [], classes=2),
        lambda model: skillfast.sweep(model, [], []),
    ],
)
def test_whatever_reads_a_model_first_says_what_it_misses(monkeypatch, first):
    monkeypatch.setattr(coverage, "_told", {})
    model = make_vit(depth=2)
    declare_sites(model, {site.name: site.path for site in find_sites(model) if site.name != "blocks.1.mlp"})
    with pytest.warns(RuntimeWarning, match="sites cover"), suppress(ArgumentError):  # there is no data to trace
        first(model)


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
def test_a_model_that_is_watched_is_not_copied(monkeypatch, register):
    """What hooks on a copy would do, nobody knows."""
    monkeypatch.setattr(coverage, "_told", {})
    monkeypatch.setattr(coverage, "coverage", lambda _: pytest.fail("certified"))
    model = make_vit()
    getattr(model.blocks[0], register)(lambda *_: None)
    coverage.warn_incomplete(model)


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
    assert "expected logits [batch, classes] for labels [8], got shape [8, 9, 99] of BertForMaskedLM" in told


def test_nobody_knows_the_classes():
    model = make_vit()
    del model.num_classes
    told = one_line(ArgumentError, skillfast.trace, model, [])
    assert "model.config.id2label" in told
