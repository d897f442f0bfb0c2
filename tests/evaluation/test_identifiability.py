"""Controls of how skills are chosen, on planted models."""

from __future__ import annotations

import dataclasses

import numpy as np
import planted
import pytest
import torch
from conftest import one_line

from skillfast import Condition, Skill, ablate, attribute, donors, learn_masks, sweep
from skillfast.ablation.assigned import predict_assigned
from skillfast.data import TensorImages, loader
from skillfast.errors import ArgumentError, ModelError
from skillfast.evaluation.identifiability import drops, identifiability
from skillfast.progress import telling
from skillfast.results.records import to_json
from skillfast.runs.identifiability import identify, seed_overlaps
from skillfast.skills.attribution import attribute_groups

CLASSES = tuple("abcd-")


@pytest.fixture(scope="module")
def parts():
    return [loader(TensorImages(*planted.evidence(n, seed), classes=CLASSES), 64) for n, seed in ((300, 1), (200, 2))]


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_each_example_runs_under_its_own_skill(vit, batches, scale):
    skills = [Skill("a", {"blocks.0.mlp": range(60)}), Skill("b", {"blocks.2.attn": range(12), "head": [3, 4]})]
    assigned = np.random.default_rng(0).integers(-1, 2, 37)
    images = torch.cat([x for x, _ in batches])
    with torch.inference_mode():
        want = vit(images).argmax(1).numpy()
        for i, skill in enumerate(skills):
            with ablate(vit, skill, scale=scale):
                want = np.where(assigned == i, vit(images).argmax(1).numpy(), want)
    rows = [[Condition(skill, scale=scale) for skill in some] for some in (skills, skills[::-1])]
    lines = []
    with telling(lines.append):
        found = predict_assigned(vit, batches, rows, assigned, what="candidates")
        told = len(lines)
        predict_assigned(vit, batches, rows, assigned)
    assert lines[0] == "2 candidates on 37 examples: 74 forwards"
    assert len(lines) == told  # of what has no name nothing is said
    np.testing.assert_array_equal(found[0], want)
    assert found.dtype == np.int64
    turned = np.where(assigned < 0, -1, 1 - assigned)
    np.testing.assert_array_equal(found[1], predict_assigned(vit, batches, rows[:1], turned)[0])
    assert predict_assigned(vit, batches, [], assigned).shape == (0, 37)
    for wrong in (assigned[:-1], np.append(assigned, 0)):
        assert "for each example" in one_line(ArgumentError, predict_assigned, vit, batches, rows, wrong)
    text = one_line(ModelError, predict_assigned, vit.train(), batches, rows, assigned)
    assert "predict_assigned: expected a model in evaluation mode" in text


def test_each_example_gets_its_own_donor(vit, batches):
    skills = [Skill("a", {"blocks.0.mlp": range(60)}), Skill("b", {"blocks.2.attn": range(12), "head": [3, 4]})]
    bank = donors(vit, batches, skills, n_donors=8)
    conditions = [Condition(skill, mode="resample") for skill in skills]
    swept = sweep(vit, batches, conditions, donors=bank, classes=5, keep_predictions=True)
    assigned = np.random.default_rng(0).integers(-1, 2, 37)
    want = np.where(assigned < 0, swept.top2[:, 0], swept.predictions[assigned, np.arange(37)])
    np.testing.assert_array_equal(predict_assigned(vit, batches, [conditions], assigned, donors=bank)[0], want)


def test_attributions_of_any_groups(vit, batches):
    """Of the classes those of `attribute`; a group of all images has the mean over them."""
    labels = torch.cat([y for _, y in batches]).numpy()
    members = np.concatenate([labels[:, None] == np.arange(5), np.ones((37, 1), bool), np.zeros((37, 1), bool)], 1)
    columns = [f"group:{i}" for i in range(7)]
    found = attribute_groups(vit, batches, members, columns, n_classes=5)
    want = attribute(vit, batches, classes=5)
    np.testing.assert_allclose(found.values[:, :5], want.values, rtol=1e-5)
    mean = want.values @ np.bincount(labels) / 37
    np.testing.assert_allclose(found.values[:, 5], mean, rtol=1e-4, atol=1e-6)
    assert np.isnan(found.values[:, 6]).all()
    message = one_line(ArgumentError, attribute_groups, vit, batches, members[:30], columns, n_classes=5)
    assert "for each image" in message


def controls(model, parts, skills, share):
    intact = predict_assigned(model, parts[1], [[]], np.full(200, -1))[0]
    return identify(model, *parts, intact, skills, sites=["blocks.0.mlp"], share=share, max_site_share=1.0)


def test_planted_skills_are_the_classes_own(parts):
    """One of 12 neurons: halves agree, arbitrary groups lose nothing beyond others, nothing stands beside the skill."""
    skills = {name: Skill(name, {"blocks.0.mlp": [k, 4 + k]} if k < 4 else {}) for k, name in enumerate(CLASSES)}
    found = controls(planted.Copies(), parts, skills, 1 / 12)
    for name in "abcd":
        values = found.per_class[name]
        assert values.drop > 0.95
        assert values.overlap == 1
        assert values.chance_overlap == pytest.approx((1 / 12) / (2 - 1 / 12))
        assert values.second_drop < 0.05
    assert found.n_examples == 200


def test_arbitrary_groups_are_told_from_classes(parts):
    """A set chosen for a group of all classes takes one class from the group and from others alike."""
    skills = {name: Skill(name, {"blocks.0.mlp": [k]} if k < 4 else {}) for k, name in enumerate(CLASSES)}
    found = controls(planted.Copies(), parts, skills, 1 / 12)
    values = [found.per_class[name] for name in CLASSES]
    assert abs(np.mean([value.control for value in values])) < 0.1
    assert np.mean([value.drop for value in values[:4]]) > 10 * abs(np.mean([value.control for value in values]))


def test_a_second_set_that_does_as_much_is_found(parts):
    """The head needs both copies: the skill is one of them, and the other costs the class as much."""
    model = planted.Copies()
    with torch.no_grad():
        model.head.weight[:, 4:8] = model.head.weight[:, :4]
        model.head.bias[4] = 3
    skills = {name: Skill(name, {"blocks.0.mlp": [k]} if k < 4 else {}) for k, name in enumerate(CLASSES)}
    found = controls(model, parts, skills, 1 / 12)
    assert min(found.per_class[name].second_drop for name in "abcd") > 0.9
    assert found.per_class["-"].second_drop == 0


def test_drops_and_flags():
    right, removed = np.array([1, 1, 0, 1, 1], bool), np.array([0, 1, 1, 1, 0], bool)
    found = drops(right, removed, np.array([0, 0, 0, 2, 2]), 4)
    np.testing.assert_allclose(found, [0, np.nan, 0.5, np.nan])
    control, overlap = np.array([0.1, 0.11, 0.0, np.nan]), np.array([0.3, 0.9, 0.29, np.nan])
    result = identifiability(
        np.ones(4), control, overlap, np.full(4, 0.02), np.zeros(4), "abcd", share=0.03, groups=3, n_examples=9
    )
    assert [result.per_class[name].flagged for name in "abcd"] == [False, True, True, False]
    assert result.control == pytest.approx(0.07)
    assert result.seed_overlap is None
    seeds = np.array([0.29, np.nan, 0.5, 0.3]), np.full(4, 0.02)
    result = identifiability(
        np.ones(4), control, overlap + 1, np.full(4, 0.02), np.zeros(4), "abcd", seeds=seeds, share=0.03, groups=3,
        n_examples=9,
    )  # fmt: skip
    assert [result.per_class[name].flagged for name in "abcd"] == [True, True, False, False]
    assert result.per_class["b"].seed_overlap is None
    assert result.seed_overlap == pytest.approx(1.09 / 3)
    assert result.per_class["d"].control is None


def test_masks_of_two_seeds(parts):
    """Planted neurons are found from any seed; neurons that are chosen by chance share what chance does.

    Only as many classes are learned again as are asked for, each from as many rows per step as before.
    """
    model = planted.Copies()
    with torch.no_grad():
        model.head.weight[:, 4:8] = model.head.weight[:, :4]  # both copies count, and are all that a mask can find
        model.head.bias[4] = 3
    attributions = attribute(model, parts[0], sites=["blocks.0.mlp"], classes=CLASSES)
    attributions = dataclasses.replace(attributions, values=np.where(np.isnan(attributions.values), np.nan, 0.0))
    sizes = {"share": 2 / 12, "max_site_share": 1.0, "batch_size": 60}
    masks = learn_masks(model, parts[0], attributions, steps=30, **sizes)
    rows = []
    handle = model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    found, chance = seed_overlaps(model, parts[0], masks, attributions, np.random.default_rng(0))
    handle.remove()
    assert sum(rows) == 300 + 30 * 36  # three of five classes
    assert np.isnan(found).sum() == np.isnan(chance).sum() == 2
    assert (found[:4][~np.isnan(found[:4])] == 1).all()
    np.testing.assert_allclose(chance[~np.isnan(chance)], [0.1] * 3, atol=0.02)
    random = np.random.default_rng(1).normal(size=masks.values.shape)
    other, _ = seed_overlaps(
        model, parts[0], dataclasses.replace(masks, values=random), attributions, np.random.default_rng(0)
    )
    assert np.nanmean(other) < 0.5


def test_the_record_of_a_class_and_of_all():
    rng = np.random.default_rng(0)
    names = ("drop", "control", "overlap", "chance_overlap", "second_drop", "seed_overlap", "chance_seed_overlap")
    rows = dict(zip(names, rng.random((7, 3)) / 10 + 0.3, strict=True))
    rows["control"] -= 0.3
    rows["drop"][1] = rows["seed_overlap"][2] = rows["chance_seed_overlap"][2] = np.nan
    found = identifiability(
        *(rows[name] for name in names[:5]), "abc", seeds=(rows[names[5]], rows[names[6]]), share=0.03, groups=4,
        n_examples=99,
    )  # fmt: skip
    assert to_json(found) == {
        **{name: pytest.approx(np.nanmean(row)) for name, row in rows.items()},
        "per_class": {
            label: {
                **{name: None if np.isnan(row[i]) else pytest.approx(row[i]) for name, row in rows.items()},
                "flagged": False,
            }
            for i, label in enumerate("abc")
        },
        "method": "attribution",
        "share": 0.03,
        "groups": 4,
        "n_examples": 99,
        "control_limit": 0.1,
        "overlap_limit": 0.3,
    }
