"""The command line over text, with tiny models from folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import changed
from tiny_models import WORDS, save_model

import skillfast
from skillfast.cli import main
from skillfast.runs.config import BenchConfig
from skillfast.runs.text import with_default_model

pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def data(tmp_path):
    """90 texts whose class is told by a word, and their number of words."""
    g = np.random.default_rng(0)
    rows = []
    for i in range(90):
        words = list(g.choice(WORDS, size=3 + i % 5))
        words[int(g.integers(len(words)))] = ("bad", "good")[i % 2]
        rows.append(f"{' '.join(words)}\t{('neg', 'pos')[i % 2]}\t{len(words)}")
    path = tmp_path / "x.tsv"
    path.write_text("\n".join(["sentence\tclass\twords", *rows]) + "\n", encoding="utf-8")
    return path


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, [str(argument) for argument in arguments])


def text_options(data, folder, output):
    return [
        "--model", f"hf:{folder}", "--dataset", "text", "--data-file", data, "--text-column", "sentence",
        "--label-column", "class", "--batch-size", "16", "--output", output,
    ]  # fmt: skip


def test_trace_of_an_encoder_whose_head_is_new(data, tmp_path):
    folder = save_model(tmp_path / "model", "BertForMaskedLM")
    metrics = "label,loss,entropy,column:words"
    options = text_options(data, folder, tmp_path / "out")
    text = run("trace", *options, "--pool", "cls", "--metrics", metrics, "--given", "margin").output
    assert "given: expected some of label, loss, entropy, words and not all, with the statistic pearson, got" in text
    given = ("--given", "label,column:words")
    result = run("trace", *options, "--pool", "cls", "--metrics", metrics, "--epochs", 1, *given)
    assert result.exit_code == 0, result.output
    assert "pearson given label, words" in " ".join(result.output.split())
    assert "(all) on 48 texts" in result.output
    scores = skillfast.NeuronScores.load(tmp_path / "out")
    assert scores.columns == ("label:neg", "label:pos", "loss", "entropy", "words")
    assert scores.n_observations == 48
    assert scores.pool == "cls"


def test_bench_and_ablation_of_a_decoder_with_a_prompt(data, tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model", "LlamaForCausalLM")
    prompt = ["--prompt", "{sentence} it is", "--label-words", "bad,good"]
    result = run("bench", *text_options(data, folder, tmp_path / "out"), "--pool", "last", *prompt)
    assert result.exit_code == 2
    assert "prompt: expected {text} in the template, got {sentence}" in result.output
    prompt[1] = "{text} it is"
    pytest.importorskip("peft", reason="needs peft")
    monkeypatch.setenv("SKILLFAST_CACHE", str(tmp_path / "cache"))
    prompt += ["--soft-prompt", 3, "--epochs", 1]
    options = [*text_options(data, folder, tmp_path / "out"), *prompt, "--share", "0.05"]
    result = run("bench", *options, "--pool", "last", "--control-draws", 1, "--method", "pearson")
    assert result.exit_code == 0, result.output
    again = run("bench", "--replay", tmp_path / "out", "--output", tmp_path / "again", "--quiet")
    assert again.exit_code == 0, again.output
    assert f"replay of {tmp_path / 'out'}: all " in again.output
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    told = found["model"]["soft_prompt"]
    assert (told["tokens"], told["origin"], told["steps"]) == (3, "tuned", 3)
    assert skillfast.SoftPrompt.load(tmp_path / "out" / "soft_prompt").sha256 == told["sha256"]
    digests = found["dataset"].pop("digests")
    assert len({each["examples"] for each in digests.values()}) == len(digests) == 3
    assert found["dataset"] == {
        "name": "text", "classes": ["neg", "pos"], "n_select": 48, "n_validate": 12, "n_test": 30,
    }  # fmt: skip
    assert found["model"]["trained"]["finetune"] == "none"
    assert found["model"]["neurons"] == 2 * (40 + 24) + 24
    ablate = [option for option in options if option not in ("--output", tmp_path / "out", "--share", "0.05")]
    result = run("ablate", *ablate, "--skills", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "skill pos" in result.output
    result = run("export", "--skills", tmp_path / "out", "--skill", "pos", "--output", tmp_path / "made")
    assert result.exit_code == 0, result.output
    transformers = pytest.importorskip("transformers")
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made").state_dict()
    source = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    differ = {name for name in source if not torch.equal(made[name], source[name])}
    skill = skillfast.load_skills(tmp_path / "out")["pos"]
    assert len(differ) == len(skill.neurons) > 0
    for name in differ:
        assert int((made[name] != source[name]).any(0).sum()) in {len(index) for index in skill.neurons.values()}
    assert (tmp_path / "made" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_bench_and_ablation_of_a_mixture_of_experts(data, tmp_path):
    """Every command knows experts and routers: shares over the kinds that the model has, and routes that change."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    folder = save_model(tmp_path / "model", "Qwen3MoeForCausalLM", **sizes, head_dim=8)
    options = text_options(data, folder, tmp_path / "out")
    options += ["--prompt", "{text} it is", "--label-words", "bad,good"]
    small = ["--share", "0.1", "--control-draws", 1, "--method", "attribution", "--pool", "last"]
    result = run("bench", *options, *small)
    assert result.exit_code == 0, result.output
    assert "check the weights, and --prompt, --label-words (" in result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [site["kind"] for site in found["model"]["sites"]] == ["attn", "router", "expert", "head"]
    assert found["model"]["neurons"] == 32 + 4 + 4 * 8 + 24
    shares = {kind: found["layer_contribution"].get(kind) for kind in ("mlp", "attn", "expert", "router", "head")}
    assert shares.pop("mlp") is None
    assert all(value is None for value in shares.values()) or sum(shares.values()) == pytest.approx(1)
    ablate = [option for option in options if option not in ("--output", tmp_path / "out")]
    result = run("ablate", *ablate, "--skills", tmp_path / "out", "--mode", "reroute")
    assert result.exit_code == 0, result.output
    assert "skill pos" in result.output


def test_classes_that_the_model_names_are_in_its_order(data, tmp_path):
    names = {"id2label": {0: "pos", 1: "neg"}, "label2id": {"pos": 0, "neg": 1}}
    folder = save_model(tmp_path / "model", **names)
    result = run("trace", *text_options(data, folder, tmp_path / "out"), "--pool", "cls", "--statistics", "pearson")
    assert result.exit_code == 0, result.output
    assert skillfast.NeuronScores.load(tmp_path / "out").columns[:2] == ("label:pos", "label:neg")
    other = save_model(tmp_path / "other", id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1})
    result = run("trace", *text_options(data, other, tmp_path / "out"), "--pool", "cls")
    assert result.exit_code == 1
    assert "line 2: expected one of good, bad in column 'class', got 'neg'" in result.output


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (["--prompt", "{text} is"], 2, "prompt: expected --prompt and --label-words together, got one"),
        (["--dataset", "digits"], 2, "dataset: expected text with hf:"),
        (["--model", "vit_tiny_patch16_224"], 2, "model: expected hf:NAME with --dataset text"),
        (["--metrics", "column:size"], 1, "expected a column 'size', got sentence, class, words"),
        (["--metrics", "nothing"], 2, "metric 'nothing': expected one of label"),
        (["--text-column", "text"], 1, "line 2: expected a column 'text', got sentence, class, words"),
        (["--data-file", "none.tsv"], 1, "data file 'none.tsv': expected a file, got no such file"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(data, tmp_path, change, code, words):
    folder = save_model(tmp_path / "model")
    options = changed([*text_options(data, folder, tmp_path / "out"), "--pool", "cls"], change)
    result = run("trace", *options)
    assert result.exit_code == code, result.output
    assert words in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_info_lists_the_sites_of_a_language_model(tmp_path):
    folder = save_model(tmp_path / "model", "LlamaForCausalLM")
    result = run("info", "--model", f"hf:{folder}")
    assert result.exit_code == 0, result.output
    assert "152 neurons in 5 sites" in " ".join(result.output.split())
    assert "model.layers.1.mlp.down_proj" in result.output


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "embedded:all-minilm-l6-v2"),
        ({"prompt": "{text} is", "label_words": (" bad", " good")}, "embedded:gemma-3-270m"),
        ({"metrics": ("token_log_probability",)}, "embedded:gemma-3-270m"),
        ({"model": "hf:mine"}, "hf:mine"),
    ],
)
def test_text_has_a_default_model_that_needs_no_hub(settings, name):
    config = BenchConfig.of(dataset="text", data_file="train.tsv", **settings)
    assert with_default_model(config).model.name == name


def test_a_soft_prompt_is_tuned_kept_and_opened(data, tmp_path, monkeypatch):
    """`--soft-prompt 3` tunes once, then takes the cache; `--soft-prompt DIR` opens what it left."""
    pytest.importorskip("peft", reason="needs peft")
    monkeypatch.setenv("SKILLFAST_CACHE", str(tmp_path / "cache"))
    folder = save_model(tmp_path / "model", "LlamaForCausalLM")
    made = ["--prompt", "{text} it is", "--label-words", "bad,good", "--pool", "last", "--soft-prompt"]
    pearson = ["--statistics", "pearson"]
    options = [*text_options(data, folder, tmp_path / "out"), *pearson, *made]
    result = run("trace", *options, 3, "--epochs", 1)
    assert result.exit_code == 0, result.output
    assert f"soft prompt of 3 tokens for hf:{folder}, on 48 texts" in result.output
    assert "soft prompt, step 3 of 3: loss" in result.output
    (cached,) = (tmp_path / "cache").glob("soft-prompt-*")
    scores = skillfast.NeuronScores.load(tmp_path / "out")
    result = run("trace", *options, 3, "--epochs", 1)
    assert "taken from the cache" in result.output
    assert "step 3 of 3" not in result.output
    assert "step 3 of 3" in run("trace", *options, 3, "--epochs", 1, "--seed", 1).output  # other settings
    for file in cached.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    result = run("trace", *options, 3, "--epochs", 1)
    assert "cannot be read" in result.output
    assert "step 3 of 3" in result.output

    opened = [*text_options(data, folder, tmp_path / "again"), *pearson, *made, cached]
    result = run("evaluate", *opened, "--shares", "0.05", "--layers", "all", "--scales", "0")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "again" / "evaluation.json").read_text(encoding="utf-8"))["model"]["soft_prompt"]
    prompt = skillfast.SoftPrompt.load(cached)
    assert told == {
        "tokens": 3, "origin": str(cached), "sha256": prompt.sha256,
        **{name: value for name, value in prompt.tuned.items() if name != "seed"},
    }  # fmt: skip
    assert (told["steps"], told["n_train"]) == (3, 48)
    assert run("trace", *opened).exit_code == 0
    again = skillfast.NeuronScores.load(tmp_path / "again")
    np.testing.assert_array_equal(again.pearson, scores.pearson)


def test_soft_prompts_that_do_not_fit_are_told_in_one_line(data, tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    folder = save_model(tmp_path / "model", "LlamaForCausalLM")
    narrow = skillfast.SoftPrompt(torch.ones(3, 7)).save(tmp_path / "narrow")
    words = ["--prompt", "{text} it is", "--label-words", "bad,good"]
    for given, told in (
        ([*words, "--soft-prompt", narrow], "soft prompt: expected embeddings of 24 numbers for"),
        ([*words, "--soft-prompt", tmp_path / "none"], "expected a folder that peft saved, got no such folder"),
        ([*words, "--soft-prompt", 0], "soft prompt: expected at least 1 token or a folder, got 0"),
        ([*words, "--soft-prompt", "-2"], "soft prompt: expected at least 1 token or a folder, got -2"),
        ([*words, "--soft-prompt", 40], "expected a prompt of at most 32 tokens"),
        ([*words, "--soft-prompt", 3, "--finetune", "all"], "expected --finetune none with it, got 'all'"),
        ([*words, "--soft-prompt", 3, "--device-map", "auto"], "expected a folder with --device-map, got 3"),
        (["--soft-prompt", 3], "soft prompt: expected --prompt and --label-words with it, got none"),
    ):
        result = run("bench", *text_options(data, folder, tmp_path / "bad"), *given)
        assert result.exit_code in (1, 2)
        assert told in result.output
        assert len(result.output.strip().splitlines()) == 1, result.output
        assert not (tmp_path / "bad").exists()
