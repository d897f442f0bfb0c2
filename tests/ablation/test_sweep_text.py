"""Sweeps over texts of different lengths: a mask that is there in some batches only, whichever row is the longest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import save_model

import skillfast
from skillfast import Condition, Skill
from skillfast.models.huggingface import load_language_model
from skillfast.models.text_classifier import TextClassifier
from skillfast.models.text_inputs import Collate

pytest.importorskip("transformers", reason="needs transformers")

SKILLS = [
    Skill("early", {"blocks.0.attn": [1, 2, 9], "blocks.1.mlp": [3, 4]}),
    Skill("middle", {"blocks.1.attn": [5, 6, 7], "head": [2]}),
    Skill("late", {"blocks.2.mlp": [0, 1, 2, 3]}),
]
LENGTHS = {
    "first batch without padding": [[5, 5, 5, 5], [3, 9, 4, 6], [9, 3, 4, 6]],
    "first rows longest": [[9, 9, 3, 4], [7, 7, 7, 7], [9, 2, 2, 3]],
    "first batch padded": [[2, 7, 4, 3], [5, 5, 5, 5], [9, 3, 9, 2]],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "LlamaForSequenceClassification", "DistilBertForSequenceClassification"]
)
def test_a_sweep_equals_one_forward_per_condition(tmp_path, name, lengths):
    sizes = {"n_layers": 3, "dim": 24, "n_heads": 4, "hidden_dim": 40} if name.startswith("Distil") else {}
    folder = save_model(tmp_path, name, num_hidden_layers=3, num_labels=3, **sizes)
    loaded = load_language_model(str(folder), "classification", classes=["a", "b", "c"])
    model = TextClassifier(loaded, 3)
    rng = np.random.default_rng(0)
    collate = Collate(loaded)
    batches = []
    for row in lengths:
        made = collate([{"input_ids": rng.integers(4, 33, n).tolist(), "label": 0, "columns": {}} for n in row])
        batches.append((TextClassifier.pack(made), made["labels"]))
    # As many conditions begin at the first site as a batch has texts: rows of a stack are no rows of the stem.
    conditions = [*map(Condition, SKILLS), *(Condition(SKILLS[0], scale=scale) for scale in (0.5, 2.0, 3.0))]
    swept = skillfast.sweep(model, batches, conditions, classes=3, keep_predictions=True)
    for i, condition in enumerate(conditions):
        with skillfast.ablate(model, condition.skill, scale=condition.scale), torch.no_grad():
            logits = torch.cat([model(packed) for packed, _ in batches])
        lead = logits[:, 0] - logits[:, 1:].amax(1)  # every label is 0
        np.testing.assert_allclose(swept.per_class_margin[i][0], lead.mean(), rtol=1e-3, atol=1e-3)
        gap = logits.topk(2).values.diff().abs()[:, 0]
        sure = (gap > 1e-4 * logits.abs().max()).numpy()
        assert sure.sum() >= 10
        np.testing.assert_array_equal(swept.predictions[i][sure], logits.argmax(1).numpy()[sure])


def test_a_decoder_that_keeps_keys_by_default_equals_one_forward_per_condition():
    """Conditions at experts begin at their block, which would find the keys of the intact forward before its own."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    settings = {"hidden_size": 32, "moe_intermediate_size": 16, "head_dim": 8, "vocab_size": 20}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, **settings)).eval()
    assert model.config.use_cache
    ids = torch.randint(0, 20, (9, 7), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part, "labels": part} for part in ids.split(5)]
    skills = [
        Skill(f"{site} {i}", {site: [i, i + 20]}) for i in range(3) for site in ("blocks.0.experts", "blocks.1.experts")
    ]
    swept = skillfast.sweep(model, batches, [*map(Condition, skills)], classes=20, keep_margins=True)
    for i, skill in enumerate(skills):
        with skillfast.ablate(model, skill), torch.no_grad():
            logits = model(ids).logits[:, :-1]
        own = torch.nn.functional.one_hot(ids[:, 1:], 20).bool()
        want = logits[own] - logits.masked_fill(own, -torch.inf).amax(-1).flatten()
        np.testing.assert_allclose(swept.margins[i], want, rtol=1e-4, atol=1e-5)
