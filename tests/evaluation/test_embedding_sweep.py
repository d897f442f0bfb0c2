from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import one_line

import skillfast
from skillfast import Condition, Skill
from skillfast.errors import ArgumentError
from skillfast.evaluation.directions import angles
from skillfast.evaluation.embeddings import EmbeddingMetrics
from skillfast.runs import embedding_sweep
from skillfast.runs.embedding_sweep import EmbeddingChanges, compare_embeddings, written_by

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
    found = compare_embeddings(vit, batches, conditions, [], classes=CLASSES)
    labels = torch.cat([y for _, y in batches]).numpy()
    before = with_plain_hooks(vit, batches, Skill("nothing", {}))
    metrics = EmbeddingMetrics(before, labels)
    for i, condition in enumerate(conditions):
        after = with_plain_hooks(vit, batches, condition.skill)
        written = condition.skill.neurons.get("head", ())
        want = metrics.compare(after, written)
        kept = np.setdiff1d(np.arange(24), written)
        np.testing.assert_allclose(found.comparisons[i].cosine, want.cosine, atol=1e-5)
        np.testing.assert_allclose(found.comparisons[i].rank_preservation, want.rank_preservation, atol=0.01)
        assert found.comparisons[i].cka == pytest.approx(want.cka, abs=1e-5)
        turned, left_out = angles(before[:, kept], after[:, kept], labels, 5)
        np.testing.assert_allclose(found.angles[i], turned, atol=0.01)
        np.testing.assert_allclose(found.angles_left_out[i], left_out, atol=0.01)
        assert found.comparisons[i].n_written == len(written)


def test_a_removal_in_the_head_alone_turns_nothing(vit, batches, conditions):
    """All that it changes are the coordinates that it deletes, which used to count as a turn."""
    found = compare_embeddings(vit, batches, conditions, [], classes=CLASSES)
    head = found.of(["head"])
    assert not np.nan_to_num(head.angles).any()
    np.testing.assert_allclose(head.comparisons[0].cosine, 1)
    assert head.comparisons[0].cka == pytest.approx(1)
    assert found.of(["none"]).comparisons[0].n_written == 0
    assert np.nanmax(found.of(["early"]).angles) > 1


def test_a_factor_writes_too(vit):
    head = next(site for site in skillfast.models.sites.find_sites(vit) if site.kind == "head")
    skill = Skill("both", {"head": [3, 1], "blocks.0.mlp": [0]})
    assert written_by(Condition(skill), head).tolist() == [1, 3]
    assert written_by(Condition(skill, scale=2.0), head).tolist() == [1, 3]
    assert written_by(Condition(skill, scale=1.0), head).tolist() == []
    assert written_by(Condition(skill, components=("mlp",)), head).tolist() == []


def test_saved_and_loaded(vit, batches, conditions, tmp_path):
    found = compare_embeddings(vit, batches, conditions, [], classes=CLASSES)
    found.save(tmp_path)
    again = EmbeddingChanges.load(tmp_path)
    assert again.names == found.names
    np.testing.assert_array_equal(again.angles_left_out, found.angles_left_out)
    for one, other in zip(again.comparisons, found.comparisons, strict=True):
        for name, value in vars(one).items():
            np.testing.assert_array_equal(value, getattr(other, name))


def test_a_model_without_a_classifier_has_no_embeddings(vit, batches):
    vit.head = torch.nn.Identity()
    assert compare_embeddings(vit, batches, [], [], classes=24) is None


def test_what_a_sweep_has_kept_is_not_run_again(vit, batches, conditions):
    forwards = []
    vit.register_forward_pre_hook(lambda _, args: forwards.append(len(args[0])))
    want = compare_embeddings(vit, batches, conditions[:2], conditions[2:], classes=CLASSES)
    alone = len(forwards)
    swept = skillfast.sweep(vit, batches, [*conditions[::-1], Condition(Skill("more", {"head": [1]}))],
                            classes=CLASSES, keep_embeddings=True)  # fmt: skip
    forwards.clear()
    found = compare_embeddings(vit, batches, conditions[:2], conditions[2:], classes=CLASSES, swept=swept)
    assert alone
    assert not forwards
    assert found.names == want.names
    np.testing.assert_allclose(found.angles, want.angles, atol=1e-3)
    for one, other in zip(found.comparisons, want.comparisons, strict=True):
        np.testing.assert_allclose(one.cosine, other.cosine, atol=1e-6)
    np.testing.assert_array_equal(found.readings.refitted, want.readings.refitted)
    without = skillfast.sweep(vit, batches, conditions, classes=CLASSES)
    assert "embeddings: expected a sweep that kept them" in one_line(ArgumentError, without.embeddings_of, ["late"])


def test_embeddings_are_held_together_where_they_fit(vit, monkeypatch):
    monkeypatch.setattr(embedding_sweep, "BYTES_AT_ONCE", 4 * 5 * 37 * 24)
    assert embedding_sweep.fit_at_once(vit, 4, 37)
    assert not embedding_sweep.fit_at_once(vit, 5, 37)
    vit.head = torch.nn.Identity()
    assert not embedding_sweep.fit_at_once(vit, 1, 1)


def test_one_removal_at_a_time_gives_the_same(vit, batches, conditions):
    together = compare_embeddings(vit, batches, conditions, [], classes=CLASSES)
    singly = compare_embeddings(vit, batches, conditions, [], classes=CLASSES, bytes_at_once=1)
    np.testing.assert_allclose(singly.angles, together.angles, atol=1e-3)
    np.testing.assert_allclose(singly.angles_left_out, together.angles_left_out, atol=1e-3)
    for one, other in zip(singly.comparisons, together.comparisons, strict=True):
        np.testing.assert_allclose(one.cosine, other.cosine, atol=1e-6)
