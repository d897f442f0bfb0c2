"""Soft prompts against peft's own model and plain torch, on tiny decoders."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import one_line
from tiny_models import SPECIAL, WORDS, make_tokenizer, save_model

import skillfast
from skillfast.ablation.donors import donors
from skillfast.data.text import TextTable
from skillfast.errors import ArgumentError, DataError, ModelError
from skillfast.metrics import parse_metrics
from skillfast.models.huggingface import load_language_model
from skillfast.models.sites import choose_sites
from skillfast.models.soft_prompt import WEIGHTS, SoftPrompt
from skillfast.models.text_classifier import TextClassifier
from skillfast.models.text_inputs import Prompt, TextForward, TokenExamples, batches
from skillfast.models.watching import watched
from skillfast.progress import telling

transformers = pytest.importorskip("transformers", reason="needs transformers")
peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS, PROMPT = 3, Prompt("{text} it is", ("bad", "good"))
TEXTS = (
    "good film",
    "this plot was bad and slow",
    "the story",
    "a warm fun movie with a short plot",
    "dull",
    "fine fun",
)


def table(texts=TEXTS):
    labels = np.array([i % 2 for i in range(len(texts))])
    places = tuple(f"line {i}" for i in range(len(texts)))
    return TextTable("made", tuple(texts), None, labels, ("neg", "pos"), {}, places)


def saved_by_peft(loaded, folder, tokens=TOKENS, seed=0, **more):
    """A prompt as peft saves one, and peft's own model with it."""
    torch.manual_seed(seed)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens, **more)
    made = peft.get_peft_model(loaded.model, config)
    with torch.no_grad():
        made.prompt_encoder["default"].embedding.weight.normal_(0, 0.5)
    made.save_pretrained(folder)
    return made.eval()


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def prompted(request, tmp_path_factory):
    """A classifier with a prompt that peft saved, its examples, and peft's own model."""
    folder = tmp_path_factory.mktemp(request.param)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    save_model(folder / "model", request.param, **(experts if "Moe" in request.param else {}))
    loaded = load_language_model(str(folder / "model"), "causal")
    theirs = saved_by_peft(loaded, folder / "prompt")
    model = TextClassifier(loaded, 2, PROMPT.ids(loaded.tokenizer, ("neg", "pos"))).eval()
    model.set_soft_prompt(SoftPrompt.load(folder / "prompt"))
    return SimpleNamespace(
        loaded=loaded, model=model, theirs=theirs, folder=folder / "prompt",
        examples=TokenExamples(table(), loaded, PROMPT, virtual=TOKENS),
        plain=TokenExamples(table(), loaded, PROMPT),
    )  # fmt: skip


def of_peft(prompted):
    """Peft's logits at each text's last token, and the MLP's and head's neurons there [text][tokens, width]."""
    seen = {"mlp": [], "head": []}
    language = prompted.loaded.model
    paths = {"head": language.lm_head}
    if hasattr(language.model.layers[1].mlp, "down_proj"):
        paths["mlp"] = language.model.layers[1].mlp.down_proj
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0]))
        for name, module in paths.items()
    ]
    with torch.inference_mode():
        texts = [torch.tensor([ids]) for ids in prompted.plain.encoded["input_ids"]]
        logits = [prompted.theirs(input_ids=ids).logits[0, -1] for ids in texts]
    for hook in hooks:
        hook.remove()
    return torch.stack(logits), seen


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_that_peft_saved_gives_the_logits_of_pefts_model(prompted, side):
    theirs, _ = of_peft(prompted)
    with torch.inference_mode():
        ours = torch.cat([prompted.model.logits(batch) for batch in batches(prompted.examples, 4, side=side)])
    torch.testing.assert_close(ours, theirs[:, prompted.model.words], rtol=1e-4, atol=1e-5)
    assert (ours - theirs[:, :2]).abs().max() > 0.1  # other tokens' logits are others


@pytest.mark.parametrize("pool", ["mean", "max", "last"])
def test_statistics_are_of_the_texts_own_tokens(prompted, pool):
    """The virtual tokens are the same before every text: they act, and are no part of what is pooled."""
    forward = TextForward(parse_metrics(["label", "loss"], ("neg", "pos"), {}))
    scores = skillfast.trace(
        prompted.model, batches(prompted.examples, 4), forward.kinds, pool=pool, statistics=["pearson"],
        forward=forward, mask=prompted.model.observed,
    )  # fmt: skip
    logits, seen = of_peft(prompted)
    words = prompted.model.words
    loss = torch.nn.functional.cross_entropy(logits[:, words], prompted.plain.labels, reduction="none").numpy()
    own = [x[TOKENS:] for x in seen["mlp"]]
    rows = {"head": torch.stack([x[-1] for x in seen["head"]])}
    if own:
        pooled = {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0), "last": lambda x: x[-1]}[pool]
        rows["blocks.1.mlp"] = torch.stack([pooled(x) for x in own])
    for site, x in rows.items():
        expected = [np.corrcoef(x[:, unit].numpy(), loss)[0, 1] for unit in range(x.shape[1])]
        np.testing.assert_allclose(scores[site].pearson[:, -1], expected, atol=1e-4)
    if own and pool == "mean":
        with_virtual = np.corrcoef(torch.stack([x.mean(0) for x in seen["mlp"]])[:, 0], loss)[0, 1]
        assert abs(with_virtual - scores["blocks.1.mlp"].pearson[0, -1]) > 1e-2


def test_removal_acts_on_virtual_tokens_and_texts_alike(prompted):
    skill = skillfast.Skill("few", {"blocks.0.attn": [1, 5], "head": [2]})
    loader = [prompted.examples.collate([prompted.examples[i] for i in part]) for part in ((0, 1, 2), (3, 4, 5))]
    swept = skillfast.sweep(prompted.model, loader, [skillfast.Condition(skill)], classes=("neg", "pos"))
    layer = prompted.loaded.model.model.layers[0].self_attn.o_proj

    def without(_, args):
        x = args[0].clone()
        x[..., [1, 5]] = 0
        return (x,)

    def without_head(_, args):
        x = args[0].clone()
        x[..., 2] = 0
        return (x,)

    hooks = [layer.register_forward_pre_hook(without)]
    hooks.append(prompted.loaded.model.lm_head.register_forward_pre_hook(without_head))
    changed, _ = of_peft(prompted)
    for hook in hooks:
        hook.remove()
    chosen = changed[:, prompted.model.words].argmax(1)
    right = [float((chosen == label)[prompted.plain.labels == label].double().mean()) for label in (0, 1)]
    np.testing.assert_allclose(swept.per_class_accuracy[0], right)
    with torch.inference_mode(), skillfast.ablate(prompted.model, skill):
        ours = prompted.model(loader[0][0])
    torch.testing.assert_close(ours, changed[:3, prompted.model.words], rtol=1e-4, atol=1e-5)
    found = skillfast.coverage(prompted.model, loader[0][0])
    assert found.complete or "router" in str(found)


def test_donors_are_means_over_the_texts_own_tokens(prompted):
    llama = "Llama" in type(prompted.loaded.model).__name__
    site = "blocks.1.mlp" if llama else "blocks.0.experts"
    batch = [prompted.examples.collate([prompted.examples[i] for i in range(6)])]
    bank = donors(prompted.model, batch, [skillfast.Skill("one", {site: [1, 4]})], n_donors=6)
    kept, rows = bank.activations[site][:, 0], torch.as_tensor(bank.indices)
    if llama:
        _, seen = of_peft(prompted)
        expected = torch.stack([x[TOKENS:, [1, 4]].mean(0) for x in seen["mlp"]])
        torch.testing.assert_close(kept, expected[rows], rtol=1e-4, atol=1e-5)
        return
    (experts,) = choose_sites(prompted.model, [site])
    expected, with_virtual = [], []
    for i in range(6):
        seen = []
        packed, _ = prompted.examples.collate([prompted.examples[i]])
        with torch.inference_mode(), watched(prompted.model, experts, seen.append):
            prompted.model(packed)
        (found,) = seen
        first = found.expert == 0  # which has units 1 and 4
        expected.append(found.values[first & (found.token >= TOKENS)][:, [1, 4]].mean(0))
        with_virtual.append(found.values[first][:, [1, 4]].mean(0))
    expected, with_virtual = torch.stack(expected)[rows], torch.stack(with_virtual)[rows]
    there = ~expected.isnan().any(1)
    assert there.sum() >= 3
    torch.testing.assert_close(kept[there], expected[there], rtol=1e-4, atol=1e-5)
    assert (kept[there] - with_virtual[there]).abs().max() > 1e-3


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A decoder that says "good" of every text: a bias hides what attention reads, unless a prompt takes it away.

    Residual coordinates: 0 what a word says (good 1, bad -1), 1 where attention writes the mean over all tokens of it,
    2 the bias, which "is" carries, 3 the same for all.
    """
    folder = tmp_path_factory.mktemp("planted")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    save_model(folder, "LlamaForCausalLM", make_tokenizer(special=False), num_key_value_heads=1, **sizes)
    loaded = load_language_model(str(folder), "causal")
    model, ids = loaded.model, {word: len(SPECIAL) + i for i, word in enumerate(WORDS)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float("norm" in name))
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 3] = 1
        embeddings[ids["good"], 0], embeddings[ids["bad"], 0], embeddings[ids["is"], 2] = 1, -1, 1
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight[0, 0], attention.o_proj.weight[1, 0] = 1, 2
        model.lm_head.weight[ids["good"], 1], model.lm_head.weight[ids["good"], 2] = 2, 5
        model.lm_head.weight[ids["bad"], 1] = -2
    return SimpleNamespace(loaded=loaded, words=[ids["bad"], ids["good"]])


def planted_batches(planted, n=32, seed=0, tokens=False):
    """Texts of four words, one of which is good or bad, and "is"; labels [batch], or of the last token alone."""
    g = np.random.default_rng(seed)
    found = []
    for start in range(0, n, 8):
        labels = torch.tensor([i % 2 for i in range(start, start + 8)])
        texts = []
        for label in labels.tolist():
            words = list(g.choice(["film", "plot", "story", "the"], 4))
            words[int(g.integers(4))] = ("bad", "good")[label]
            texts.append(" ".join([*words, "is"]))
        batch = planted.loaded.tokenizer(texts, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if tokens:  # the word that is to be said comes after "is"
            said = torch.tensor(planted.words)[labels][:, None]
            ids, mask = torch.cat([ids, said], 1), torch.cat([mask, torch.ones_like(said)], 1)
            labels = torch.cat([torch.full_like(ids[:, 1:], -100), said], 1)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


@pytest.mark.parametrize("tokens", [False, True])
def test_a_tuned_prompt_beats_the_plain_one_and_leaves_the_model_alone(planted, tmp_path, tokens):
    model, words = planted.loaded.model, planted.words
    model.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = planted_batches(planted, tokens=tokens)
    held_out = planted_batches(planted, seed=1, tokens=tokens)
    lines = []
    with telling(lines.append):
        prompt = skillfast.tune_prompt(
            model, loader, 4, words=None if tokens else words, held_out=held_out, steps=30, lr=0.1, dtype=torch.float32
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())

    def plain(batch):
        return model(batch["input_ids"]).logits[:, -1, words].argmax(1)

    shown = planted_batches(planted, seed=1)
    right = torch.cat([plain(batch) == batch["labels"] for batch in shown])
    assert float(right.double().mean()) == 0.5  # it says "good" of all
    assert prompt.tuned["validation_accuracy"] > 0.95
    assert prompt.tuned["loss"] < 0.5
    assert prompt.tuned["n_train"] == 30 * 8
    assert lines[0] == "30 steps, forward and backward"
    assert "step 10 of 30: loss" in lines[1]
    assert lines[-1].endswith(f"accuracy {prompt.tuned['validation_accuracy']:.1%} on held-out examples")

    path = prompt.save(tmp_path, model)
    again = SoftPrompt.load(path)
    assert torch.equal(again.embeddings, prompt.embeddings)
    assert dict(again.tuned) == dict(prompt.tuned)
    assert again.sha256 == prompt.sha256
    theirs = peft.PeftModel.from_pretrained(model, path)
    with torch.inference_mode():
        said = torch.cat([theirs(input_ids=batch["input_ids"]).logits[:, -1, words].argmax(1) for batch in shown])
    assert float((said == torch.cat([batch["labels"] for batch in shown])).double().mean()) > 0.95


def test_padding_on_either_side_tunes_the_same_prompt(planted):
    def padded(side):
        for batch in planted_batches(planted, 8):
            pads = {"left": (2, 0), "right": (0, 2), "neither": (0, 0)}[side]
            pad = torch.nn.functional.pad
            yield {name: pad(x, pads) if x.dim() == 2 else x for name, x in batch.items()}

    found = [
        skillfast.tune_prompt(
            planted.loaded.model, list(padded(side)), 2, words=planted.words, steps=3, dtype=torch.float32
        ).embeddings
        for side in ("left", "right", "neither")
    ]
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


def test_what_cannot_be_tuned_is_told_in_one_line(planted, tmp_path):
    model, words, loader = planted.loaded.model, planted.words, planted_batches(planted, 8)

    def tune(*args, **more):
        return skillfast.tune_prompt(*args, **{"words": words, "steps": 1, "dtype": torch.float32, **more})

    assert "tokens: expected a number above 0, got 0" in one_line(ArgumentError, tune, model, loader, 0)
    assert "lr: expected a number above 0, got nan" in one_line(ArgumentError, tune, model, loader, lr=float("nan"))
    assert "loader: expected batches in every pass" in one_line(ArgumentError, tune, model, [])
    assert "loader: expected batches in every pass" in one_line(ArgumentError, tune, model, iter(loader), steps=2)
    told = one_line(ArgumentError, tune, model, loader, words=None)
    assert "labels [batch, tokens], got {input_ids: int64 [8, 5]" in told
    broken = copy.deepcopy(model)
    assert "tune_prompt: expected a model in evaluation mode" in one_line(ModelError, tune, broken.train(), loader)
    broken.eval()
    with torch.no_grad():
        broken.get_input_embeddings().weight[loader[0]["input_ids"][0, 0]] = torch.nan
    told = one_line(ModelError, tune, broken, loader, lr=0.25)
    assert "expected a finite loss, got nan in step 1; lower the learning rate (it was 0.25)" in told
    save_model(tmp_path / "bert", "BertForMaskedLM")
    bert = load_language_model(str(tmp_path / "bert"), "causal").model
    told = one_line(ModelError, tune, bert, loader)
    assert "expected a causal language model, got BertLMHeadModel" in told
    assert "which reads later tokens" in told
    save_model(tmp_path / "t5", "T5ForConditionalGeneration")
    told = one_line(ModelError, tune, load_language_model(str(tmp_path / "t5")).model, loader)
    assert "of type T5ForConditionalGeneration, which takes none" in told


def test_folders_that_hold_no_prompt_are_refused(prompted, tmp_path):
    assert "no such folder" in one_line(DataError, SoftPrompt.load, tmp_path / "none")
    assert "a folder without adapter_config.json" in one_line(DataError, SoftPrompt.load, tmp_path)

    def changed(change=lambda config: None, weights=lambda data: data):
        config = json.loads((prompted.folder / "adapter_config.json").read_text())
        config = change(config) or config
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        (tmp_path / WEIGHTS).write_bytes(weights((prompted.folder / WEIGHTS).read_bytes()))
        return one_line(DataError, SoftPrompt.load, tmp_path)

    assert "of type PROMPT_TUNING, got LORA" in changed(lambda c: c.update(peft_type="LORA"))
    assert "of type PROMPT_TUNING, got list" in changed(lambda c: [1])
    assert "expected 3 virtual tokens for one decoder" in changed(lambda c: c.update(num_virtual_tokens=4))
    assert "for 2;" in changed(lambda c: c.update(num_transformer_submodules=2))
    assert "expected a safetensors file" in changed(weights=lambda data: data[:-4])
    assert "expected finite numbers" in changed(weights=lambda data: data[:-4] + np.float32("nan").tobytes())
    own = SoftPrompt(torch.ones(2, 24), {"steps": 1})
    path = own.save(tmp_path / "own")
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[:-4] + np.float32(2).tobytes())
    assert "as it was written, got other bytes" in one_line(DataError, SoftPrompt.load, path)
    narrow = SoftPrompt(torch.ones(2, 7))
    told = one_line(ArgumentError, narrow.check, prompted.loaded.model, "tiny")
    assert told.startswith("soft prompt: expected embeddings of 24 numbers for tiny, got 7;")
