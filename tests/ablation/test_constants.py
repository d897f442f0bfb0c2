"""Constants in place of neurons: what a condition leaves, and those that cost the model least."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import one_line
from torch.nn.functional import cross_entropy

import skillfast
from skillfast import Condition, Skill
from skillfast.ablation.constants import _Learned, mean_constants, optimal_constants
from skillfast.errors import ArgumentError
from skillfast.evaluation.controls import own_control
from skillfast.evaluation.replacements import replacements
from skillfast.models.sites import Site, declare_sites

SKILL = Skill("mine", {"blocks.0.mlp": [0, 5, 95], "blocks.1.attn": [3, 4]})


def test_a_condition_leaves_its_constants(vit, batches):
    values = {"blocks.0.mlp": torch.tensor([1.0, -2.0, 0.5]), "blocks.1.attn": torch.tensor([0.25, 3.0])}
    conditions = [
        Condition(SKILL, mode="constant", constants=values),
        Condition(SKILL, mode="constant", constants=values, components=("attn",), scale=0.5, name="half"),
    ]
    got = skillfast.sweep(vit, batches, conditions, keep_embeddings=True)
    for i, condition in enumerate(conditions):
        handles = []
        for site, path in (("blocks.0.mlp", vit.blocks[0].mlp.fc2), ("blocks.1.attn", vit.blocks[1].attn.proj)):
            if site.split(".")[-1] in condition.components:

                def hook(_, args, site=site, scale=condition.scale):
                    x = args[0].clone()
                    index = SKILL.neurons[site]
                    x[..., index] = values[site] + scale * (x[..., index] - values[site])
                    return (x,)

                handles.append(path.register_forward_pre_hook(hook))
        with torch.no_grad():
            want = torch.cat([vit(x) for x, _ in batches])
        for handle in handles:
            handle.remove()
        logits = vit.head(torch.from_numpy(got.embeddings[i])).detach()
        torch.testing.assert_close(logits, want, rtol=1e-3, atol=1e-2)


def test_constants_that_do_not_fit_are_refused():
    few = {"blocks.0.mlp": torch.zeros(2), "blocks.1.attn": torch.zeros(2)}
    text = one_line(ArgumentError, Condition, SKILL, mode="constant", constants=few)
    assert "expected 3 values for blocks.0.mlp, one per neuron of skill 'mine', got another number" in text
    assert "expected some with mode 'constant' alone, got none" in one_line(
        ArgumentError, Condition, SKILL, mode="constant"
    )
    text = one_line(ArgumentError, Condition, SKILL, mode="mean", constants=few)
    assert "got some with mode 'mean'" in text


class Sum(torch.nn.Module):
    """Two classes told apart by neuron 0; neuron 1 is mostly 0 and seldom 20, and adds to one class's logit."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.proj.weight.copy_(torch.tensor([[1.0, 0.5, 0.0], [-1.0, 0.0, 0.3]]))
        declare_sites(self, {"blocks.0.mlp": "proj"})

    def forward(self, x):
        return self.proj(x)


def test_optimal_constants_cost_the_least():
    """Of a neuron with outliers the mean is a bad value; of one that never varies it is the only good one."""
    rng = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (2000,), generator=rng)
    seldom = 20.0 * (torch.rand(2000, generator=rng) < 0.2)
    x = torch.stack([(1 - 2.0 * y) + torch.randn(2000, generator=rng) / 2, seldom, torch.full((2000,), 7.0)], 1)
    x[:, 0] += 1.05 - seldom / 4 * 0.9  # what neuron 2 adds is what the data are centred for
    model, data = Sum().eval(), list(zip(x.split(250), y.split(250), strict=True))
    skills = [Skill("seldom", {"blocks.0.mlp": [1]}), Skill("steady", {"blocks.0.mlp": [2]})]
    bank = skillfast.donors(model, data, skills, n_donors=512)
    means = [mean_constants(skill, bank) for skill in skills]
    assert means[1]["blocks.0.mlp"].tolist() == [7.0]
    found = optimal_constants(model, data, skills, bank, steps=60)

    def loss(k, constants):
        changed = x.clone()
        changed[:, 1 + k] = constants["blocks.0.mlp"]
        return float(cross_entropy(model(changed).detach(), y))

    grid = [loss(0, {"blocks.0.mlp": torch.tensor([value])}) for value in np.linspace(-20, 20, 161)]
    assert loss(0, found[0]) < min(grid) + 0.008
    assert loss(0, means[0]) > min(grid) + 0.025
    assert loss(1, found[1]) == loss(1, means[1])
    again = optimal_constants(model, data, skills, bank, steps=60)
    torch.testing.assert_close(again, found)


def test_every_window_of_an_example_gets_its_skills_constants():
    """Windows of an example lie in the batch one after the other."""
    x = torch.randn(6, 4, 5)  # two windows of each of three examples
    site = Site("blocks.0.attn", "attn", 0, "blocks.0.attn.proj", 5, heads=1)
    skills = [Skill("a", {site.name: [1]}), Skill("b", {site.name: [0, 3]})]
    activations = {site.name: torch.randn(7, 4, 3)}  # of neurons 0, 1 and 3, of seven donors
    bank = SimpleNamespace(activations=activations, places=lambda _, index: torch.tensor([0, 1, 9, 2])[index])
    learned = _Learned(site, skills, bank)
    learned.without = torch.tensor([1, 0, 1])
    got, values = learned.replace(SimpleNamespace(values=x)), learned.constants.detach()
    for i, k in enumerate((1, 1, 0, 0, 1, 1)):
        want = x[i].clone()
        want[:, skills[k].neurons[site.name]] = values[learned.skill == k]
        torch.testing.assert_close(got[i], want)


@pytest.mark.parametrize(
    ("zero", "mean", "constant", "marked"), [(4, 4, 4, False), (4, 3, 4, True), (2, 4, 2, True), (4, 4, 0, True)]
)
def test_classes_are_marked_where_zero_differs_from_mean_or_constants(zero, mean, constant, marked):
    labels = np.array([0] * 10 + [1] * 10)
    predictions = np.tile(labels, (4, 1))
    predictions[0, :zero], predictions[1, :mean], predictions[2, 10:13], predictions[3, :constant] = 1, 1, 0, 1
    found = replacements(predictions, labels, labels, ["a", "b"])
    own = found.per_class["a"]
    assert (own.zero, own.mean, own.resample, own.constant) == pytest.approx((zero / 10, mean / 10, 0.0, constant / 10))
    assert own.marked == marked
    assert found.per_class["b"].resample == pytest.approx(0.3)
    assert found.average.resample == pytest.approx(0.15)
    intact = labels.copy()
    intact[:4] = 1  # wrong before: two of them are right again, and one more is lost
    predictions[0, :10] = [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    found = replacements(predictions, intact, labels, ["a", "b"])
    assert found.per_class["a"].zero == pytest.approx(0.1 - 0.2)


def test_intervals_of_drops_cover():
    """Known chances of being right before and after: intervals of each class and of the mean hold the drop's truth."""
    rng = np.random.default_rng(0)
    labels = np.arange(4).repeat(50)
    before, after = np.array([0.95, 0.9, 1.0, 0.9]), np.array([[0.1, 0.5, 0.0, 0.9], [0.9, 0.9, 0.99, 0.9]])

    def drawn(recall):  # what is missed goes to the class behind the others
        return np.where(rng.random(200) < recall[labels], labels, 4)

    held = np.zeros((4, 5))
    truth = before - after
    for _ in range(200):
        found = replacements(np.stack([drawn(after[i // 2]) for i in range(4)]), drawn(before), labels, "abcd")
        for i, by in enumerate(("zero", "mean", "resample", "constant")):
            wanted = [*truth[i // 2], truth[i // 2].mean()]
            ends = [getattr(row.ci95, by) for row in (*found.per_class.values(), found.average)]
            held[i] += [low - 1e-9 <= want <= high + 1e-9 for want, (low, high) in zip(wanted, ends, strict=True)]
    assert (held[:, 4] >= 184).all()
    assert 0.92 <= held.mean() / 200 <= 0.985


def test_a_class_that_loses_everything_loses_no_more():
    """Sums of the examples' weights are off by rounding, on either side of 1."""
    for n in range(2, 60):
        labels = np.array([0] * n + [1] * 3)
        wrong = np.tile(1 - labels, (4, 1))
        found = replacements(wrong, labels, labels, ["a", "b"])
        assert max(found.average.zero, *(row.zero for row in found.per_class.values())) <= 1
        assert own_control(wrong, labels, labels).ci95[1] <= 1


def test_constants_are_those_of_adam_on_the_cross_entropy(vit, batches):
    """From the means, in units of each neuron's deviation, with plain hooks; examples that repeat the loader."""
    skills = [SKILL, Skill("other", {"blocks.0.mlp": [5, 7]})]
    bank = skillfast.donors(vit, batches, skills, n_donors=8)
    found = optimal_constants(vit, batches, skills, bank, steps=6, seed=3)
    sites = {"blocks.0.mlp": vit.blocks[0].mlp.fc2, "blocks.1.attn": vit.blocks[1].attn.proj}
    keys = [(k, name) for name in sites for k, skill in enumerate(skills) if name in skill.neurons]
    mean, deviation = {}, {}
    for k, name in keys:
        rows = bank.activations[name][..., torch.isin(bank.neurons[name], skills[k].neurons[name])].flatten(0, 1)
        mean[k, name], deviation[k, name] = rows.mean(0), rows.std(0, correction=0)
        np.testing.assert_allclose(mean_constants(skills[k], bank)[name], rows.mean(0), rtol=1e-5)
    moved = {key: torch.zeros_like(mean[key], requires_grad=True) for key in keys}
    adam, generator = torch.optim.Adam(moved.values(), lr=0.3), torch.Generator().manual_seed(3)
    for step in range(6):
        x, y = batches[step % len(batches)]
        without, handles = torch.randint(2, (len(x),), generator=generator), []
        for name, module in sites.items():

            def hook(_, args, name=name, without=without):
                rows = args[0].clone()
                for k in (k for k in (0, 1) if (k, name) in mean):
                    at = (without == k).nonzero()
                    rows[at[..., None], torch.arange(17)[:, None], skills[k].neurons[name]] = (
                        mean[k, name] + deviation[k, name] * moved[k, name]
                    )
                return (rows,)

            handles.append(module.register_forward_pre_hook(hook))
        adam.zero_grad()
        cross_entropy(vit(x), y).backward()
        adam.step()
        for handle in handles:
            handle.remove()
    for k, name in keys:
        want = mean[k, name] + deviation[k, name] * moved[k, name].detach()
        torch.testing.assert_close(found[k][name], want, rtol=1e-3, atol=1e-3)
        assert float((found[k][name] - mean[k, name]).abs().min()) > 0
    assert [list(constants) for constants in found] == [["blocks.0.mlp", "blocks.1.attn"], ["blocks.0.mlp"]]
    assert not any(module._forward_pre_hooks for module in vit.modules())
