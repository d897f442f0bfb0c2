from __future__ import annotations

import numpy as np
import pytest
import torch

import skillfast
from skillfast import Condition, Skill
from skillfast.evaluation.embeddings import EmbeddingMetrics
from skillfast.evaluation.interference import Directions
from skillfast.runs.embedding_sweep import compare_embeddings

CLASSES = tuple("abcde")


@pytest.fixture
def conditions():
    skills = [
        Skill("early", {"blocks.0.mlp": range(40)}),
        Skill("late", {"blocks.2.attn": range(12), "head": [0]}),
        Skill("none", {}),
        Skill("head", {"head": range(5, 20)}),
    ]
    return [Condition(skill) for skill in skills]


def with_plain_hooks(model, batches, skill):
    """The classifier's input, of every image, with a skill removed."""
    rows = []

    def keep(_, args):
        rows.append(args[0].numpy().copy())

    with torch.inference_mode(), skillfast.ablate(model, skill):
        handle = model.head.register_forward_pre_hook(keep)  # after the ablation's own hook
        for images, _ in batches:
            model(images)
        handle.remove()
    return np.concatenate(rows)


def test_changes_equal_those_of_plain_hooks(vit, batches, conditions):
    found = compare_embeddings(vit, batches, conditions, classes=CLASSES)
    labels = torch.cat([y for _, y in batches]).numpy()
    before = with_plain_hooks(vit, batches, Skill("nothing", {}))
    metrics, directions = EmbeddingMetrics(before, labels), Directions.of(before, labels, 5)
    for i, condition in enumerate(conditions):
        after = with_plain_hooks(vit, batches, condition.skill)
        want = metrics.compare(after)
        np.testing.assert_allclose(found.comparisons[i].cosine, want.cosine, atol=1e-5)
        np.testing.assert_allclose(found.comparisons[i].rank_preservation, want.rank_preservation, atol=0.01)
        assert found.comparisons[i].cka == pytest.approx(want.cka, abs=1e-5)
        np.testing.assert_allclose(found.angles[i], directions.angles(after), atol=0.01)
    assert not found.angles[2].any()
    assert found.angles[[0, 1, 3]].min() > 0.1


def test_a_model_without_a_classifier_has_no_embeddings(vit, batches):
    vit.head = torch.nn.Identity()
    assert compare_embeddings(vit, batches, [], classes=24) is None


def test_one_removal_at_a_time_gives_the_same(vit, batches, conditions):
    together = compare_embeddings(vit, batches, conditions, classes=CLASSES)
    singly = compare_embeddings(vit, batches, conditions, classes=CLASSES, bytes_at_once=1)
    np.testing.assert_allclose(singly.angles, together.angles, atol=1e-3)
    np.testing.assert_allclose(singly.resampled_angles, together.resampled_angles, atol=1e-3)
    for one, other in zip(singly.comparisons, together.comparisons, strict=True):
        np.testing.assert_allclose(one.cosine, other.cosine, atol=1e-6)
