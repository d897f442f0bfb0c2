from __future__ import annotations

import dataclasses

import numpy as np
import planted
import pytest
import torch
from conftest import make_vit, one_line
from torch.utils.data import DataLoader, TensorDataset

import skillfast
from skillfast.errors import ArgumentError, ModelError
from skillfast.models.sites import find_sites
from skillfast.skills import learned_mask
from skillfast.skills.learned_mask import kept_loss, soft_top, target_loss


@pytest.fixture(scope="module")
def setting():
    model, (images, labels) = planted.model(), planted.images(120)
    loader = DataLoader(TensorDataset(images, labels), batch_size=50)
    return model, loader, skillfast.attribute(model, loader, sites=("mlp", "attn"))


def learned(model, loader, attributions, **more):
    return skillfast.learn_masks(model, loader, attributions, **{"share": 0.003, "steps": 10, "batch_size": 48, **more})


def test_planted_classes_go_and_others_stay(setting):
    model, loader, attributions = setting
    masks = learned(*setting)
    skills = skillfast.select(masks, share=0.003)
    assert {skill.method for skill in skills.values()} == {"mask"}
    result = skillfast.sweep(model, loader, [skillfast.Condition(skills[str(c)]) for c in planted.PLANTED])
    want = [[0.0 if j == i else 1.0 for j in range(planted.CLASSES)] for i in planted.PLANTED]
    assert result.per_class_accuracy.tolist() == want
    for label, sites in planted.PLANTED.items():
        found = {(s, int(i)) for s, index in skills[str(label)].neurons.items() for i in index}
        assert {(s, i) for s, neurons in sites.items() for i in neurons} <= found
    assert masks.n_observations.sum() == 120
    assert attributions.columns == masks.columns


def test_learning_repairs_a_wrong_start(setting):
    """Attributions of shuffled neurons say nothing; gradients find the planted ones all the same."""
    model, loader, attributions = setting
    rng = np.random.default_rng(0)
    values = rng.uniform(1, 1.2, attributions.values.shape)
    values[:, 1:] = np.nan  # only the first class is learned
    blind = dataclasses.replace(attributions, values=values)
    skills = skillfast.select(learned(model, loader, blind, steps=40), metric="label:0", share=0.003)
    want = {("blocks.1.mlp", i) for i in planted.PLANTED[0]["blocks.1.mlp"]}
    assert want <= {(s, int(i)) for s, index in skills["0"].neurons.items() for i in index}


def test_other_classes_are_spared_though_attributions_would_not():
    """The neurons with the largest attribution to class 0 carry class 1, too; the mask takes the others."""
    model, labels = planted.Shared(), torch.arange(60) % 3
    loader = [(torch.eye(3)[labels], labels)]
    attributions = skillfast.attribute(model, loader, sites=("mlp",), classes=3)
    shares = {"share": 2 / 8, "max_site_share": 0.5}
    removed = skillfast.select(attributions, metric="label:0", **shares)["0"]
    assert removed.neurons["blocks.0.mlp"].tolist() == [0, 1]
    result = skillfast.sweep(model, loader, [skillfast.Condition(removed)], classes=3)
    assert result.per_class_accuracy.tolist() == [[0, 0, 1]]
    values = attributions.values.copy()
    values[:, 1:] = np.nan  # only the first class is learned
    attributions = dataclasses.replace(attributions, values=values)
    masks = skillfast.learn_masks(model, loader, attributions, steps=10, batch_size=24, **shares)
    learned = skillfast.select(masks, metric="label:0", **shares)["0"]
    assert learned.neurons["blocks.0.mlp"].tolist() == [2, 3]
    result = skillfast.sweep(model, loader, [skillfast.Condition(learned)], classes=3)
    assert result.per_class_accuracy.tolist() == [[0, 1, 1]]
    for more in ({"keep": 0.0}, {"scale": 1.0}):  # nothing speaks for the others; nothing changes what the model says
        masks = skillfast.learn_masks(model, loader, attributions, steps=10, batch_size=24, **shares, **more)
        learned = skillfast.select(masks, metric="label:0", **shares)["0"]
        assert learned.neurons["blocks.0.mlp"].tolist() == [0, 1]


def test_the_seed_determines_it_and_the_model_is_as_before(setting):
    model = setting[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        first, again, other = (learned(*setting, seed=seed).values for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(model.get_submodule(site.path)._forward_pre_hooks for site in find_sites(model))


def test_shares_are_kept(batches):
    model = make_vit()
    attributions = skillfast.attribute(model, batches, classes=5)
    masks = learned(model, batches, attributions, share=0.2, max_site_share=0.25, steps=3)
    for skill in skillfast.select(masks, share=0.2, max_site_share=0.25).values():
        assert len(skill) == round(0.2 * masks.n_neurons)
        assert all(len(skill.neurons.get(s.name, ())) <= 0.25 * s.width for s in masks.sites)


def test_under_autocast_and_without_some_classes(batches):
    model = make_vit(num_classes=6)
    attributions = skillfast.attribute(model, batches, classes=6)
    with torch.autocast("cpu", torch.bfloat16):
        masks = learned(model, batches, attributions, steps=2)
    assert np.isnan(masks.values[:, 5]).all()
    assert np.isfinite(masks.values[:, :5]).all()
    assert masks.n_observations.tolist()[5] == 0


def test_no_more_images_are_kept_than_asked_for(batches):
    model = make_vit()
    attributions = skillfast.attribute(model, batches, classes=5)
    masks = learned(model, batches, attributions, steps=1, images_per_class=3)
    assert masks.n_observations.tolist() == [3] * 5
    assert masks.settings == {
        "learned_share": 0.003, "learned_scale": 0.0, "steps": 1, "batch_size": 48, "keep": 10.0, "seed": 0,
    }  # fmt: skip


def test_temperatures_fall_geometrically_and_rates_linearly(setting, monkeypatch):
    model, loader, attributions = setting
    values = attributions.values.copy()
    values[:, 1:] = np.nan  # one class
    temperatures, rates, sizes, step = [], [], [], torch.optim.Adam.step

    def recorded_set(strength, site_of, most, count, temperature):
        temperatures.append(temperature)
        return soft_top(strength, site_of, most, count, temperature)

    def recorded_step(adam, *args, **kwargs):
        rates.append(adam.param_groups[0]["lr"])
        return step(adam, *args, **kwargs)

    def recorded_loss(logits, intact, c):
        sizes.append(len(logits))
        return kept_loss(logits, intact, c)

    monkeypatch.setattr(learned_mask, "soft_top", recorded_set)
    monkeypatch.setattr(learned_mask, "kept_loss", recorded_loss)
    monkeypatch.setattr(torch.optim.Adam, "step", recorded_step)
    learned(model, loader, dataclasses.replace(attributions, values=values), steps=5)
    np.testing.assert_allclose(temperatures[1:], np.geomspace(1, 0.05, 5))  # the first tells the start
    np.testing.assert_allclose(rates, np.linspace(0.4, 0.12, 5))
    assert sizes == [36] * 5  # three quarters of 48 show other classes


def test_strengths_start_in_units_of_the_weakest_that_is_removed(setting):
    model, loader, attributions = setting
    learner = learned_mask._Learner(model, loader, attributions, 0.01, 1.0, None)
    values = torch.linspace(-1, 0.5, attributions.n_neurons)
    weakest = values[-round(0.01 * len(values))]
    torch.testing.assert_close(learner._initial(values), (values / weakest).clamp(-1, 2))
    strong = values.clone()
    strong[-1] = 100
    assert float(learner._initial(strong)[-1]) == 2
    torch.testing.assert_close(learner._initial(-1 - values.abs()), (-1 - values.abs()) / 2)  # nothing to remove
    assert not learner._initial(torch.zeros_like(values)).any()


def test_batches_show_a_member_once_before_any_again():
    members = torch.arange(20) % 2 == 0
    batches = learned_mask._cycle(members, 4, torch.Generator().manual_seed(0))
    cycles = [torch.cat([next(batches), next(batches)]).tolist() for _ in range(20)]
    assert all(len(set(cycle)) == 8 and all(i % 2 == 0 for i in cycle) for cycle in cycles)
    assert {i for cycle in cycles for i in cycle} == set(range(0, 20, 2))
    assert cycles[0] != cycles[1]
    whole = learned_mask._cycle(members, 99, torch.Generator().manual_seed(0))
    assert sorted(next(whole).tolist()) == sorted(next(whole).tolist()) == list(range(0, 20, 2))
    even = learned_mask._cycle(members, 5, torch.Generator().manual_seed(0))
    assert sorted(torch.cat([next(even), next(even)]).tolist()) == list(range(0, 20, 2))


def test_the_first_images_of_each_class_are_kept(monkeypatch):
    images, labels = torch.arange(120.0)[:, None].expand(-1, 3).contiguous(), torch.arange(120) % 2
    loader = list(zip(images.split(50), labels.split(50), strict=True))

    def kept(per_class=None):
        found, of = learned_mask._first_images(loader, 2, per_class)
        assert torch.equal(found[:, 0].long() % 2, of)
        return sorted(found[:, 0].long().tolist())

    assert kept(7) == list(range(14))
    assert kept(30) == list(range(60))  # over two batches
    assert kept() == list(range(120))
    monkeypatch.setattr(learned_mask, "IMAGES", 40)
    assert kept() == list(range(40))
    monkeypatch.setattr(learned_mask, "IMAGES_PER_CLASS", 15)
    assert kept() == list(range(30))
    monkeypatch.setattr(learned_mask, "IMAGE_BYTES", 12 * 24)  # an image takes 12 bytes
    assert kept() == list(range(24))
    monkeypatch.setattr(learned_mask, "IMAGE_BYTES", 12)
    assert kept() == list(range(16))  # never fewer than 8 of a class


SITE_OF = torch.arange(3).repeat_interleave(torch.tensor([10, 20, 30]))


def test_a_soft_set_sums_to_its_count_within_sites():
    strength = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    strength[:10] += 3  # the first site wants more than it may have
    for temperature in (1.0, 0.1, 1e-4):
        p = soft_top(strength, SITE_OF, torch.tensor([2.0, 5.0, 7.0], dtype=torch.float64), 9, temperature)
        assert float(p.sum()) == pytest.approx(9, abs=1e-3)
        assert float(p[:10].sum()) == pytest.approx(2, abs=1e-3)
        assert ((p >= 0) & (p <= 1)).all()
    hard = soft_top(strength, SITE_OF, torch.tensor([2.0, 5.0, 7.0], dtype=torch.float64), 9, 1e-6)
    assert set(hard[:10].topk(2).indices.tolist()) == set(strength[:10].topk(2).indices.tolist())
    assert ((hard < 1e-3) | (hard > 1 - 1e-3)).all()


def test_its_gradient_is_that_of_finite_differences():
    strength = torch.randn(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    strength[:10] += 3
    most, weights = torch.tensor([2.0, 5.0, 7.0], dtype=torch.float64), torch.linspace(-1, 1, 60, dtype=torch.float64)

    def value(s):
        return (soft_top(s, SITE_OF, most, 9, 0.5) * weights).sum()

    found = torch.autograd.grad(value(strength.requires_grad_()), strength)[0]
    with torch.no_grad():
        for i in range(0, 60, 7):
            step = torch.zeros(60, dtype=torch.float64)
            step[i] = 1e-4
            want = (value(strength + step) - value(strength - step)) / 2e-4
            assert float(found[i]) == pytest.approx(float(want), abs=1e-5)


def test_losses_of_logits_that_are_known():
    gone = torch.tensor([[0.0, 9, -9], [0, 9, 4]])
    assert float(target_loss(gone, 0)) == 0
    assert float(target_loss(gone, 1)) == pytest.approx((9 + 1 + 5 + 1) / 2)
    intact = torch.tensor([[5.0, 4, 0], [9, 1, 3]])
    for c in (0, 1, 2):
        shifted = intact + 7
        shifted[:, c] -= 20  # without the class, everything else as it was
        assert float(kept_loss(shifted, intact, c)) == pytest.approx(0, abs=1e-6)
    turned = torch.tensor([[-20.0, 0, 4], [-20, 1, 3]])
    want = 2 + 4  # a lead of 4, of which 2 would do, becomes one of -4; the second, of 2, keeps what it needs, 1
    log = torch.log_softmax(torch.tensor([4.0, 0.0]), 0)
    divergence = (log.exp() * (log - log.flip(0))).sum()
    assert float(kept_loss(turned, intact, 0)) == pytest.approx((want + float(divergence)) / 2, rel=1e-5)


def test_what_cannot_be_is_refused(batches):
    model = make_vit()
    attributions = skillfast.attribute(model, batches, classes=5)

    def told(error, model, loader=batches, **more):
        return one_line(error, skillfast.learn_masks, model, loader, attributions, **more)

    learned_mask._check(model, attributions, share=1.0, max_site_share=1.0, steps=1, batch_size=1)  # the ends are taken
    assert "share: expected a share in (0, 1], got 0" in told(ArgumentError, model, share=0)
    assert "steps: expected at least 1, got 0" in told(ArgumentError, model, steps=0)
    assert "expected at least one image" in told(ArgumentError, model, loader=[])
    assert "expected those of the model's architecture" in told(ArgumentError, make_vit(depth=2))
    assert "evaluation mode" in told(ModelError, make_vit().train())
    masks = learned(model, batches, attributions, steps=1)
    assert "contrastive: expected False" in one_line(ArgumentError, skillfast.select, masks, contrastive=True)
