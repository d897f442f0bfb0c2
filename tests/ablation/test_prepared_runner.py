"""A sweep of a prepared model against one of the model as it was."""

from __future__ import annotations

import numpy as np
import timm
import torch
from conftest import make_vit, one_line

import skillfast
from skillfast import Condition, Skill
from skillfast.ablation.interventions import Interventions
from skillfast.ablation.prepared_runner import PreparedRunner
from skillfast.errors import ArgumentError

SKILLS = [Skill("first", {"blocks.0.mlp": range(40), "head": [1]}), Skill("other", {"blocks.1.attn": [0, 3]})]
CONDITIONS = [Condition(SKILLS[0]), Condition(SKILLS[1], scale=2.5), Condition(SKILLS[0], ("mlp",), scale=-1.0)]


def test_results_are_those_of_the_model_as_it_was(vit, batches):
    plain = skillfast.sweep(vit, batches, CONDITIONS, keep_predictions=True, keep_margins=True, keep_embeddings=True)
    model = skillfast.prepare(make_vit(), rows=10)
    found = skillfast.sweep(model, batches, CONDITIONS, keep_predictions=True, keep_margins=True, keep_embeddings=True)
    for name in ("labels", "top2", "predictions", "baseline", "per_class_accuracy"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
    for name in ("baseline_logits", "margins", "baseline_embeddings", "embeddings", "per_class_margin"):
        np.testing.assert_allclose(getattr(found, name), getattr(plain, name), rtol=1e-3, atol=1e-3)
    assert np.abs(np.diff(plain.embeddings, axis=0)).max(axis=(1, 2)).min() > 0.1
    bare = skillfast.sweep(model, batches, CONDITIONS)
    assert bare.embeddings is bare.baseline_embeddings is bare.margins is bare.predictions is None
    np.testing.assert_array_equal(bare.per_class_accuracy, plain.per_class_accuracy)
    larger = [(torch.cat([x for x, _ in batches])[:11], torch.cat([y for _, y in batches])[:11])]
    text = one_line(ArgumentError, skillfast.sweep, model, larger, CONDITIONS, keep_embeddings=True)
    assert "expected batches of up to 10, which the model is prepared for, got 11; prepare(model, rows=11)" in text
    assert skillfast.sweep(model, larger, CONDITIONS).per_class_accuracy.shape == (3, 5)


def test_without_a_classifier_there_is_no_embedding(batches):
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2, num_classes=0).eval()
    runner = PreparedRunner(skillfast.prepare(model), Interventions(model, []))
    assert runner.head is None
    text = one_line(ArgumentError, skillfast.sweep, model, batches, [], classes=192, keep_embeddings=True)
    assert "without one; leave out keep_embeddings" in text
    assert skillfast.sweep(model, batches, [], classes=192).per_class_accuracy.shape == (0, 192)
