"""Log-probabilities of tokens as a metric: numpy on stored activations, either side of padding, ragged lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import changed, one_line
from tiny_models import WORDS, make_tokenizer, save_model

import skillfast
from skillfast.cli import main
from skillfast.errors import ArgumentError, DataError, ModelError
from skillfast.metrics import TOKEN_LOG_PROBABILITY, parse_metrics

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.filterwarnings("ignore:some scores are not defined")

MODELS = ["GPT2LMHeadModel", "LlamaForCausalLM"]
METRIC = TOKEN_LOG_PROBABILITY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models by class, and 24 texts of 2 to 14 words without a label."""
    path = tmp_path_factory.mktemp("causal")
    for model_class in MODELS:
        save_model(path / model_class, model_class, make_tokenizer(special=False))
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=2 + i % 13)) for i in range(24)]
    (path / "x.tsv").write_text(
        "\n".join(["text\twords", *(f"{text}\t{len(text.split())}" for text in texts)]) + "\n", encoding="utf-8"
    )
    return path


def parts(folder, model_class):
    from skillfast.data.text import read_text
    from skillfast.models.causal import CausalModel
    from skillfast.models.huggingface import load_language_model
    from skillfast.models.text_inputs import TokenExamples

    loaded = load_language_model(str(folder / model_class), "causal")
    table = read_text(folder / "x.tsv", label_column=None, columns=["words"])
    return CausalModel(loaded), TokenExamples(table, loaded)


def stored(model, examples):
    """Per text, alone and without padding: float64 activations [tokens, neurons], and log p of each successor."""
    from skillfast.models.sites import find_sites

    sites, found = find_sites(model), []
    double = model.language_model.double()
    for ids in examples.encoded["input_ids"]:
        kept = {}
        handles = [
            model.get_submodule(site.path).register_forward_pre_hook(
                lambda _, args, n=site.name, kept=kept: kept.__setitem__(n, args[0].detach()[0])
            )
            for site in sites
        ]
        with torch.no_grad():
            logits = double(torch.tensor([ids])).logits[0].numpy()
        for handle in handles:
            handle.remove()
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        own = log_p[np.arange(len(ids) - 1), ids[1:]]
        found.append((torch.cat([kept[site.name] for site in sites], -1).numpy(), own))
    model.language_model.float()
    return found


def traced(model, examples, metrics, pool, side, batch_size=7, **more):
    from skillfast.models.causal import CausalForward
    from skillfast.models.text_inputs import batches

    chosen = parse_metrics(metrics, examples.classes, examples.metrics)
    forward = CausalForward(chosen, tokens=pool == "none")
    loader = batches(examples, batch_size, side=side)
    return skillfast.trace(
        model,
        loader,
        forward.kinds,
        pool=pool,
        forward=forward,
        mask=forward.mask,
        **{"statistics": ("pearson",), **more},
    )


def pearson(rows, values):
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(rows.T, values)[:-1, -1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_class", MODELS)
def test_every_token_against_stored_activations(folder, model_class, side):
    model, examples = parts(folder, model_class)
    scores = traced(model, examples, [METRIC, "column:words"], "none", side)
    kept = stored(model, examples)
    assert scores.columns == (METRIC, "words")
    assert scores.n_observations == sum(len(own) for _, own in kept)  # neither padding nor last tokens
    rows = np.concatenate([x[:-1] for x, _ in kept])
    own = np.concatenate([own for _, own in kept])
    words = np.concatenate([np.full(len(own), len(own) + 1) for _, own in kept])
    steady = rows.std(0) > 1e-3
    assert steady.mean() > 0.9
    np.testing.assert_allclose(scores.pearson[steady, 0], pearson(rows[:, steady], own), atol=2e-5)
    np.testing.assert_allclose(scores.pearson[steady, 1], pearson(rows[:, steady], words), atol=2e-5)
    np.testing.assert_allclose(scores.mean, rows.mean(0), atol=1e-5)
    # a position off, or with the last tokens, it would be another number
    assert (
        np.abs(pearson(np.concatenate([x[1:] for x, _ in kept])[:, steady], own) - scores.pearson[steady, 0]).max()
        > 0.05
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("model_class", MODELS)
def test_mean_of_a_text_against_stored_activations(folder, model_class, pool, side):
    model, examples = parts(folder, model_class)
    scores = traced(model, examples, [METRIC], pool, side)
    kept = stored(model, examples)
    rows = np.stack([x.mean(0) if pool == "mean" else x[-1] for x, _ in kept])
    assert scores.n_observations == 24
    steady = rows.std(0) > 1e-3
    want = pearson(rows[:, steady], np.array([own.mean() for _, own in kept]))
    np.testing.assert_allclose(scores.pearson[steady, 0], want, atol=2e-5)


def test_ranks_of_tokens(folder, tmp_path):
    """Each text has one token that counts, so every draw of sampled tokens takes that one."""
    from scipy import stats

    from skillfast.data.text import read_text
    from skillfast.models.text_inputs import TokenExamples

    model, examples = parts(folder, "GPT2LMHeadModel")
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, size=2)) for _ in range(60)]
    (tmp_path / "x.tsv").write_text("\n".join(["text", *texts]), encoding="utf-8")
    examples = TokenExamples(read_text(tmp_path / "x.tsv", label_column=None), examples.language_model)
    scores = traced(model, examples, [METRIC], "none", "left", statistics=("pearson", "spearman"))
    kept = stored(model, examples)
    rows, own = np.concatenate([x[:-1] for x, _ in kept]), np.concatenate([own for _, own in kept])
    want = np.array([stats.spearmanr(rows[:, i], own).statistic for i in range(rows.shape[1])])
    np.testing.assert_allclose(scores.spearman[:, 0], want, atol=1e-2)  # float32 ties among equal texts
    np.testing.assert_allclose(scores.pearson[:, 0], pearson(rows, own), atol=2e-5)


def test_a_text_of_one_token_has_nothing_to_predict(folder, tmp_path):
    from skillfast.data.text import read_text
    from skillfast.models.text_inputs import TokenExamples

    model, examples = parts(folder, "GPT2LMHeadModel")
    (tmp_path / "x.tsv").write_text("text\nthe\nthe film was good\nbad plot\n", encoding="utf-8")
    examples = TokenExamples(read_text(tmp_path / "x.tsv", label_column=None), examples.language_model)
    assert traced(model, examples, [METRIC], "none", "left").n_observations == 3 + 1
    assert "expected at least two tokens each" in one_line(
        ArgumentError, traced, model, examples, [METRIC], "mean", "left"
    )


def test_text_without_labels(folder, tmp_path):
    from skillfast.data.text import read_text
    from skillfast.models.text_inputs import split_text

    table = read_text(folder / "x.tsv", label_column=None)
    assert table.classes == ()
    assert not table.labels.any()
    _, examples = parts(folder, "GPT2LMHeadModel")
    splits = split_text(table, examples.language_model)
    sizes = [len(part) for part in (splits.select, splits.validate, splits.test)]
    assert sizes == [13, 3, 8]
    texts = [text for part in (splits.select, splits.validate, splits.test) for text in part.table.texts]
    assert sorted(texts) == sorted(table.texts)
    message = one_line(DataError, split_text, table, examples.language_model, train_per_class=100)
    assert "expected at least 100 examples, got 16; lower --train-per-class" in message


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, [str(argument) for argument in arguments])


def options(folder, model, output):
    data = ["--dataset", "text", "--data-file", folder / "x.tsv", "--batch-size", 8, "--output", output]
    return ["trace", "--model", f"hf:{model}", *data, "--metrics", METRIC, "--quiet"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("pool", "observations"), [("none", None), ("mean", 13)])
def test_the_command(folder, tmp_path, pool, observations):
    result = run(*options(folder, folder / "LlamaForCausalLM", tmp_path), "--pool", pool)
    assert result.exit_code == 0, result.output
    scores = skillfast.NeuronScores.load(tmp_path)
    assert scores.columns == (METRIC,)
    assert scores.pool == pool
    assert scores.n_observations == observations or (pool == "none" and scores.n_observations > 50)
    assert np.isfinite(scores.pearson).mean() > 0.9


@pytest.mark.parametrize(
    ("model_class", "change", "code", "words"),
    [
        ("GPT2ForSequenceClassification", [], 2, "expected a causal language model, got GPT2ForSequenceClassification"),
        ("BertForMaskedLM", [], 1, "whose logits depend on earlier tokens alone, got BertLMHeadModel"),
        (
            "GPT2LMHeadModel",
            ["--prompt", "{text} is", "--label-words", "bad,good"],
            2,
            "without a prompt, got --prompt",
        ),
        (
            "GPT2LMHeadModel",
            ["--metrics", f"{METRIC},confidence"],
            2,
            "metric 'confidence': expected token_log_probability",
        ),
        ("GPT2LMHeadModel", ["--metrics", f"{METRIC},label"], 1, "expected a column 'label', got text, words"),
        ("GPT2LMHeadModel", ["--metrics", "token_log_prob"], 2, "metric 'token_log_prob': expected one of label"),
        ("GPT2LMHeadModel", ["--finetune", "all"], 2, "expected --finetune none, got all"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(folder, tmp_path, model_class, change, code, words):
    model = save_model(tmp_path / "model", model_class, make_tokenizer(special=False))
    command, *given = options(folder, model, tmp_path / "out")
    result = run(command, *changed([*given, "--pool", "none"], change))
    assert result.exit_code == code, result.output
    assert words in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_classifiers_logits_have_no_token_log_probability(folder):
    chosen = parse_metrics([METRIC], ["no", "yes"])[METRIC]
    assert "expected a causal language model" in one_line(
        ArgumentError, chosen.values, torch.zeros(2, 2), torch.zeros(2)
    )
    with pytest.raises(ArgumentError, match=r"metric 'nothing': expected one of .*token_log_probability"):
        parse_metrics(["nothing"], ["no", "yes"])


def test_a_model_that_reads_later_tokens_is_refused(tmp_path):
    from skillfast.models.causal import CausalModel
    from skillfast.models.huggingface import load_language_model

    loaded = load_language_model(str(save_model(tmp_path, "BertForMaskedLM")), "causal")
    assert "which reads later ones; use a decoder" in one_line(ModelError, CausalModel, loaded)
