from __future__ import annotations

import numpy as np
import planted
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import skillfast

# The planted model is always right, so "correct" is a metric with one value.
pytestmark = pytest.mark.filterwarnings("ignore:some scores are not defined")


@pytest.fixture(scope="module")
def setting():
    images, labels = planted.images(600)
    loader = DataLoader(TensorDataset(images, labels), batch_size=100)
    model = planted.model()
    return model, loader, skillfast.trace(model, loader, sites=("mlp", "attn"))


@pytest.mark.parametrize("label", planted.PLANTED)
def test_the_planted_neurons_rank_first_and_carry_the_class(setting, label):
    model, loader, scores = setting
    want = {(site, i) for site, neurons in planted.PLANTED[label].items() for i in neurons}
    column = scores.columns.index(f"label:{label}")
    names = [(site.name, i) for site in scores.sites for i in range(site.width)]
    ranked = np.argsort(-np.nan_to_num(scores.pearson[:, column], nan=-1), kind="stable")
    assert {names[i] for i in ranked[: len(want)]} == want
    assert scores.pearson[ranked[len(want) - 1], column] > 0.9
    assert scores.pearson[ranked[len(want)], column] < 0.5

    skills = skillfast.select(scores, metric="label", share=len(want) / scores.n_neurons)
    skill = skills[str(label)]
    assert {(site, int(i)) for site, index in skill.neurons.items() for i in index} == want
    result = skillfast.sweep(model, loader, [skillfast.Condition(skill)])
    assert result.baseline.tolist() == [1.0] * planted.CLASSES
    assert result.per_class_accuracy[0].tolist() == [0.0 if c == label else 1.0 for c in range(planted.CLASSES)]


def test_a_part_of_the_skill_is_not_enough(setting):
    model, loader, _ = setting
    skill = skillfast.Skill("3", planted.PLANTED[3])
    for components in (("mlp",), ("attn",)):
        result = skillfast.sweep(model, loader, [skillfast.Condition(skill, components=components)])
        assert result.per_class_accuracy[0].tolist() == [1.0] * planted.CLASSES


def test_other_neurons_carry_nothing(setting):
    model, loader, _ = setting
    carrying = {(site, i) for sites in planted.PLANTED.values() for site, index in sites.items() for i in index}
    others = {
        site.name: [i for i in range(site.width) if (site.name, i) not in carrying]
        for site in skillfast.trace(model, loader, sites=("mlp", "attn")).sites
    }
    with skillfast.ablate(model, skillfast.Skill("the rest", others)), torch.inference_mode():
        for images, labels in loader:
            assert torch.equal(model(images).argmax(1), labels)
