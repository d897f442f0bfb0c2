"""The same text alone and in a padded batch gives the same observation, whichever side the padding is on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import WORDS, save_model

import skillfast
from skillfast import Continuous

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.filterwarnings("ignore:some scores are not defined")

MODELS = [
    "BertForSequenceClassification", "RobertaForSequenceClassification", "DistilBertForSequenceClassification",
    "GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM",
]  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A classifier and its examples, by model class, made once."""
    from skillfast.data.text import read_text
    from skillfast.models.huggingface import load_language_model
    from skillfast.models.text_classifier import TextClassifier
    from skillfast.models.text_inputs import Prompt, TokenExamples

    folder = tmp_path_factory.mktemp("text")
    g = np.random.default_rng(0)
    rows = [f"{' '.join(g.choice(WORDS, size=1 + 3 * (i % 6)))}\t{i % 2}" for i in range(18)]
    (folder / "x.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    table = read_text(folder / "x.tsv")
    made = {}

    def get(model_class):
        if model_class not in made:
            causal = "ForSequence" not in model_class
            where = save_model(folder / model_class, model_class)
            loaded = load_language_model(str(where), "causal" if causal else "classification", classes=table.classes)
            prompt = Prompt("{text} is", ("bad", "good")) if causal else None
            words = prompt.ids(loaded.tokenizer, table.classes) if prompt else None
            made[model_class] = TextClassifier(loaded, 2, words), TokenExamples(table, loaded, prompt)
        return made[model_class]

    return get


def scores_of(classifier, examples, pool, batch_size, side, sites):
    """Scores against the number of tokens, from batches of that size and side of padding."""
    from skillfast.models.text_inputs import batches

    tracer = skillfast.Tracer(classifier, {"n": Continuous()}, pool=pool, statistics=("pearson",), sites=sites)
    with tracer, torch.no_grad():
        for batch in batches(examples, batch_size, side=side):
            tracer.expect(mask=batch["attention_mask"].bool())
            classifier.logits(batch)
            tracer.step(n=batch["attention_mask"].sum(1).double())
    return tracer.compute()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pool", ["mean", "max", "last"])
@pytest.mark.parametrize("model_class", MODELS)
def test_padding_is_never_counted(parts, model_class, pool, side):
    classifier, examples = parts(model_class)
    sites = ("mlp", "attn", "head") if classifier.words is not None else ("mlp", "attn")  # a head pools by itself
    alone = scores_of(classifier, examples, pool, 1, side, sites)
    padded = scores_of(classifier, examples, pool, 6, side, sites)
    assert alone.n_observations == padded.n_observations == 18
    np.testing.assert_allclose(padded.mean, alone.mean, atol=1e-4)
    np.testing.assert_allclose(padded.std, alone.std, atol=1e-4)
    moves = alone.std > 1e-3  # the last token of a prompt is the same in all, and so is what sees it alone
    assert moves.mean() > 0.5
    np.testing.assert_allclose(padded.pearson[moves], alone.pearson[moves], atol=1e-3)
