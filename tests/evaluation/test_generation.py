"""Perplexity and BLEU without skills: numpy on float64 logits, a plain greedy loop, sacrebleu."""

from __future__ import annotations

import json
import sys

import jsonschema
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import changed, one_line
from tiny_models import WORDS, make_tokenizer, save_model

import skillfast
from skillfast import BenchConfig, Skill
from skillfast.cli import main
from skillfast.errors import ArgumentError, DataError, ModelError
from skillfast.evaluation.generation import corpus_bleu, perplexity, text_measures
from skillfast.metrics import TOKEN_LOG_PROBABILITY
from skillfast.results import records
from skillfast.results.evaluation import EvaluationResults
from skillfast.results.records import to_json
from skillfast.runs.config import Generation, Grid
from skillfast.runs.generation import causal_outcomes, generate, log_probabilities, prefixes
from skillfast.runs.grid import cases_of_skills
from skillfast.runs.text import causal_subject

transformers = pytest.importorskip("transformers", reason="needs transformers")
sacrebleu = pytest.importorskip("sacrebleu", reason="needs sacrebleu")
MODELS = ["GPT2LMHeadModel", "LlamaForCausalLM"]
SKILL = Skill("some", {"blocks.0.mlp": torch.arange(0, 40, 2), "blocks.1.attn": torch.arange(10)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models by class, and 30 texts of 6 to 14 words."""
    path = tmp_path_factory.mktemp("generation")
    for model_class in MODELS:
        # an ending token that is never likely: 33 words, and nothing ends early
        save_model(path / model_class, model_class, make_tokenizer(special=False), eos_token_id=None)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=6 + i % 9)) for i in range(30)]
    (path / "x.tsv").write_text("\n".join(["text", *texts]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def subject(folder):
    made = {}

    def get(model_class):
        if model_class not in made:
            config = BenchConfig.of(
                model=f"hf:{folder / model_class}", dataset="text", data_file=str(folder / "x.tsv"), batch_size=4,
                metrics=(TOKEN_LOG_PROBABILITY,),
            )  # fmt: skip
            made[model_class] = causal_subject(config, torch.device("cpu"))
        return made[model_class]

    return get


def greedy(subject, ids, steps):
    """The most likely token after the whole text so far, again and again, without cache, padding or batch."""
    ids, start = list(ids), len(ids)
    with torch.no_grad():
        for _ in range(steps):
            best = int(subject.loaded.model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(best)
            if best == subject.loaded.tokenizer.eos_token_id:
                break
    return subject.loaded.tokenizer.decode(ids[start:], skip_special_tokens=True)


def numpy_perplexity(subject):
    total, count = 0.0, 0
    model = subject.loaded.model.double()
    for ids in subject.splits.test.encoded["input_ids"]:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total += log_p[np.arange(len(ids) - 1), ids[1:]].sum()
        count += len(ids) - 1
    model.float()
    return np.exp(-total / count)


@pytest.mark.parametrize("model_class", MODELS)
def test_generations_are_those_of_a_plain_loop(subject, model_class):
    found = subject(model_class)
    starts = [list(ids[: 2 + i % 4]) for i, ids in enumerate(found.splits.test.encoded["input_ids"])]
    want = [greedy(found, ids, 9) for ids in starts]
    assert generate(found, starts, 9, batch_size=4) == want
    assert len(set(want)) > 3
    with skillfast.ablate(found.model, SKILL):
        removed = generate(found, starts, 9, batch_size=4)
        assert removed == [greedy(found, ids, 9) for ids in starts]
    assert removed != want


@pytest.mark.parametrize("model_class", MODELS)
def test_outcomes_are_those_of_numpy_and_sacrebleu(subject, model_class):
    found = subject(model_class)
    settings = Generation(prefix_tokens=4, max_new_tokens=8, texts=6)
    cases = cases_of_skills([SKILL], found_sites(found), Grid(layers=("all", "each"), scales=(2.0,), draws=2))
    intact, outcomes, counts = causal_outcomes(found, cases, settings, replicates=200, seed=3)
    assert counts == {"tokens": sum(len(i) - 1 for i in found.splits.test.encoded["input_ids"]), "prefixes": 6}
    assert intact.values["perplexity"] == pytest.approx(numpy_perplexity(found), rel=1e-4)
    assert intact.values["bleu"] == pytest.approx(100)
    assert [(o.layers, o.scale) for o in outcomes] == [
        ("all", 0.0), ("all", 1.0), ("all", 2.0), ("blocks.0", 0.0), ("blocks.1", 0.0),
    ]  # fmt: skip
    starts = prefixes(found.splits.test, settings, seed=3)
    references = [greedy(found, ids, 8) for ids in starts]
    lows = []
    whole = outcomes[1]
    assert (whole.values, whole.ci95) == (intact.values, intact.ci95)
    assert set(whole.change.values()) == {0}
    assert whole.change_ci95 == {"perplexity": [0, 0], "bleu": None}
    assert to_json(whole.random.change["perplexity"]) == {"mean": 0, "low": 0, "high": 0}
    for case, outcome in zip([cases[0], *cases], outcomes[:1] + outcomes[2:], strict=True):
        values = []
        for skill in (case.skill, *case.controls):
            with skillfast.ablate(found.model, skill, scale=outcome.scale):
                texts = [greedy(found, ids, 8) for ids in starts]
                values.append((numpy_perplexity(found), sacrebleu.corpus_bleu(texts, [references]).score))
        assert outcome.values["perplexity"] == pytest.approx(values[0][0], rel=1e-4)
        assert outcome.values["bleu"] == pytest.approx(values[0][1])
        assert outcome.change["bleu"] == pytest.approx(values[0][1] - 100)
        grown = outcome.values["perplexity"] - intact.values["perplexity"]
        assert outcome.change["perplexity"] == pytest.approx(grown)
        drawn = np.array(values[1:])
        assert to_json(outcome.random.values["bleu"]) == pytest.approx(
            {"mean": drawn[:, 1].mean(), "low": drawn[:, 1].min(), "high": drawn[:, 1].max()}
        )
        assert outcome.random.values["perplexity"].mean == pytest.approx(drawn[:, 0].mean(), rel=1e-4)
        low, high = outcome.ci95["perplexity"]
        assert low < outcome.values["perplexity"] < high
        lows.append(values[0][1])
    assert min(lows) < 90


def found_sites(subject):
    from skillfast.models.sites import find_sites

    return find_sites(subject.model)


def test_perplexity_resamples_whole_texts(subject):
    found = subject("GPT2LMHeadModel")
    with torch.inference_mode():
        sums, counts = log_probabilities(found)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(sums), (50, len(sums)))
    weights = np.stack([np.bincount(row, minlength=len(sums)) for row in rows])
    want = [np.exp(-sums[row].sum() / counts[row].sum()) for row in rows]
    np.testing.assert_allclose(perplexity(sums, counts, weights), want)


def test_what_cannot_be_generated(subject, monkeypatch):
    found = subject("GPT2LMHeadModel")
    message = one_line(DataError, prefixes, found.splits.test, Generation(prefix_tokens=10, max_new_tokens=8), 0)
    assert "expected a text of more than 10 tokens, the prefix to go on from, got " in message
    assert "line " in message
    message = one_line(ArgumentError, prefixes, found.splits.test, Generation(prefix_tokens=8, max_new_tokens=30), 0)
    assert "expected at most 32 tokens with the prefix, the model's context, got 8 + 30" in message
    assert "prefix_tokens: expected at least 1, got 0" in one_line(ArgumentError, Generation, prefix_tokens=0)
    cases = cases_of_skills([SKILL], found_sites(found), Grid(layers=("all",), scales=(0.0,), draws=1, replicates=10))
    short = Generation(prefix_tokens=4, max_new_tokens=2, texts=4)
    assert "expected intact generations of four words or more" in one_line(
        DataError, causal_outcomes, found, cases, short
    )
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert "expected the sacrebleu library, got none" in one_line(ModelError, corpus_bleu, ["a"], ["a"])
    assert "expected the sacrebleu library" in one_line(
        ModelError, causal_outcomes, found, cases, Generation(prefix_tokens=4, max_new_tokens=8)
    )
    _, outcomes, _ = causal_outcomes(found, cases, Generation(max_new_tokens=0), replicates=10)  # needs none
    assert list(outcomes[0].values) == ["perplexity"]


def lines(folder):
    return (folder / "x.tsv").read_text(encoding="utf-8").splitlines()


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, [str(argument) for argument in arguments])


@pytest.mark.filterwarnings("ignore")
def test_the_command(folder, tmp_path):
    options = [
        "evaluate", "--model", f"hf:{folder / 'LlamaForCausalLM'}", "--dataset", "text", "--data-file",
        folder / "x.tsv", "--metrics", TOKEN_LOG_PROBABILITY, "--batch-size", 8, "--control-draws", 1,
        "--statistics", "pearson", "--max-new-tokens", 8, "--prefix-tokens", 4, "--shares", "0.05,0.2",
    ]  # fmt: skip
    result = run(*options, "--pool", "none", "--layers", "all,last", "--scales", "0,2", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "BLEU against the intact model's text" in result.output
    found = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    jsonschema.validate(found, records.schema(EvaluationResults))
    assert found["task"] == "causal"
    assert len(found["outcomes"]) == 2 * (3 + 1)
    assert {o["skill"] for o in found["outcomes"]} == {TOKEN_LOG_PROBABILITY}
    assert found["config"]["generation"] == {"prefix_tokens": 4, "max_new_tokens": 8, "texts": 64}
    assert found["data"]["n_test"] == found["data"]["prefixes"] == 10
    page = (tmp_path / "evaluation.html").read_text(encoding="utf-8")
    for place in ("size-perplexity", "size-bleu", "layer-bleu", "scale-perplexity"):
        assert f'id="{place}"' in page
    # neurons that a prompt's confidence chose are the same neurons
    (tmp_path / "y.tsv").write_text(
        "".join(f"{line}\t{('label', 'no', 'yes')[min(i, 1 + i % 2)]}\n" for i, line in enumerate(lines(folder))),
        encoding="utf-8",
    )
    prompted = [
        "evaluate", "--model", f"hf:{folder / 'LlamaForCausalLM'}", "--dataset", "text", "--data-file",
        tmp_path / "y.tsv", "--prompt", "{text} is", "--label-words", "bad,good", "--pool", "last", "--metrics",
        "confidence", "--shares", "0.1", "--layers", "all", "--scales", "0", "--control-draws", 1, "--quiet",
        "--statistics", "pearson", "--output", tmp_path / "prompted",
    ]  # fmt: skip
    result = run(*prompted)
    assert result.exit_code == 0, result.output
    moved = [*options, "--skills", tmp_path / "prompted", "--layers", "all", "--scales", "0", "--quiet"]
    result = run(*moved, "--output", tmp_path / "moved")
    assert result.exit_code == 0, result.output
    assert [o.skill for o in skillfast.Evaluation.load(tmp_path / "moved").results.outcomes] == ["confidence"]
    for change, code, words in [
        (["--method", "mask"], 2, "which ranks neurons for classes alone"),
        (["--prefix-tokens", 14], 1, "expected a text of more than 14 tokens"),
        (["--max-new-tokens", 40], 2, "expected at most 32 tokens with the prefix"),
    ]:
        command, *given = [*options, "--pool", "mean", "--output", tmp_path / "bad"]
        result = run(command, *changed(given, change), "--quiet")
        assert result.exit_code == code, result.output
        assert words in result.output
        assert len(result.output.strip().splitlines()) == 1


@pytest.mark.filterwarnings("error")
def test_measures_of_texts_equal_plain_sums():
    rng = np.random.default_rng(0)
    counts, rows = rng.integers(1, 9, 12), rng.integers(0, 12, (200, 12))
    intact, sums = -rng.gamma(2, size=(2, 12)) * counts
    weights = np.stack([np.bincount(row, minlength=12) for row in rows])
    texts = ["a good film and a story", "one bad story about nothing"]
    found = text_measures(sums, intact, counts, weights, texts, [*texts[:1], "one bad story about a film"])
    drawn, before = (np.array([np.exp(-s[row].sum() / counts[row].sum()) for row in rows]) for s in (sums, intact))
    whole, was = (np.exp(-s.sum() / counts.sum()) for s in (sums, intact))
    bleu = sacrebleu.corpus_bleu(texts, [[texts[0], "one bad story about a film"]]).score
    assert found.values == pytest.approx({"perplexity": whole, "bleu": bleu})
    assert found.change == pytest.approx({"perplexity": whole - was, "bleu": bleu - 100})
    for ends, values in ((found.ci95, drawn), (found.change_ci95, drawn - before)):
        assert ends["perplexity"] == pytest.approx(np.quantile(values, [0.025, 0.975]))
        assert ends["bleu"] is None
    endless = text_measures(sums * 1e4, intact * 1e4, counts, weights, [], [])
    assert endless.values == endless.change == endless.ci95 == endless.change_ci95 == {"perplexity": None}
