from __future__ import annotations

import dataclasses

import numpy as np
import planted
import pytest
import torch
from conftest import make_vit, one_line
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import skillfast
from skillfast import data
from skillfast.errors import ArgumentError, ModelError
from skillfast.evaluation.probes import Reader, share_lost
from skillfast.models.adam import Adam
from skillfast.models.sites import find_sites
from skillfast.skills import learned_mask
from skillfast.skills.learned_mask import kept_loss, soft_top, target_loss

THREE = 0.0032  # of the planted model's 960 neurons


@pytest.fixture(scope="module")
def setting():
    model, (images, labels) = planted.model(), planted.images(120)
    loader = DataLoader(TensorDataset(images, labels), batch_size=50)
    return model, loader, skillfast.attribute(model, loader, sites=("mlp", "attn"))


def learned(model, loader, attributions, **more):
    return skillfast.learn_masks(model, loader, attributions, **{"share": THREE, "steps": 10, "batch_size": 48, **more})


def test_planted_classes_go_and_others_stay(setting):
    model, loader, attributions = setting
    masks = learned(*setting)
    skills = skillfast.select(masks, share=THREE)
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
    skills = skillfast.select(learned(model, loader, blind, steps=40), metric="label:0", share=THREE)
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


def test_an_erasing_mask_takes_what_a_refitted_probe_reads():
    """Each class is written into the embedding twice, and the head reads one copy: a mask takes that, erasing both."""
    model, classes = planted.Copies(), tuple("abcd-")
    select, test = (
        data.loader(data.TensorImages(*planted.evidence(n, seed), classes=classes), 64)
        for n, seed in ((300, 1), (1000, 2))
    )
    attributions = skillfast.attribute(model, select, sites=["blocks.0.mlp"], classes=classes)
    sizes = {"share": 2 / 12, "max_site_share": 1.0}
    found = {}
    for erase in (0.0, learned_mask.ERASE):
        masks = skillfast.learn_masks(model, select, attributions, batch_size=60, steps=40, erase=erase, **sizes)
        assert masks.method == ("erase" if erase else "mask")
        skills = skillfast.select(masks, metric="label", **sizes)
        removals = [skillfast.Condition(skill) for skill in skills.values()]
        swept = skillfast.sweep(model, test, removals, classes=classes, keep_predictions=True, keep_embeddings=True)
        labels, intact = swept.labels, swept.top2[:, 0]
        reader = Reader(labels, len(classes), None)
        probed = [reader.probe(rows) for rows in (swept.baseline_embeddings, *swept.embeddings)]
        found[erase] = [
            [share_lost(intact, swept.predictions[k], labels, k), share_lost(probed[0], probed[1 + k], labels, k)]
            for k in range(4)
        ]
        if erase:
            assert [skills[name].neurons["blocks.0.mlp"].tolist() for name in "abcd"] == [[k, 4 + k] for k in range(4)]
    (readout, information), (erased_readout, erased) = (np.array(found[erase]).T for erase in found)
    assert readout.min() > 0.9
    assert erased_readout.min() > 0.9
    assert np.median(information) < 0.1  # one class's copy may be chosen by chance
    assert erased.mean() > 0.9  # what is left is chance: 200 images of each class


def test_probes_read_what_the_classifier_does(setting):
    """A probe's lead on embeddings of its class is that of the closed form; rivals are the most similar classes."""
    model, images, attributions = setting
    learner = learned_mask._Learner(model, images, attributions, 0.01, 1.0, None)
    gates = torch.ones(1, attributions.n_neurons)
    (probe,) = learner._probes(gates, torch.tensor([2]), torch.Generator().manual_seed(0))
    assert probe.weights.shape == (6, 64)
    rows = (learner.labels == 2).nonzero()[:, 0]
    _, embeddings = learner._gated(gates, torch.zeros_like(rows), rows)
    with torch.no_grad():
        torch.testing.assert_close(model.head(embeddings), model(learner.images[rows]))
        scores = embeddings @ probe.weights.T + probe.biases
        assert (scores.argmax(1) == probe.own).all()
        rest = torch.cat([scores[:, : probe.own], scores[:, probe.own + 1 :]], 1)
        leads = scores[:, probe.own] - rest.amax(1)
        torch.testing.assert_close(probe.read(embeddings), leads)
        assert probe.lead == pytest.approx(float(leads.mean()), rel=0.2)  # some images of the class


def test_shares_are_kept(batches):
    model = make_vit()
    attributions = skillfast.attribute(model, batches, classes=5)
    masks = learned(model, batches, attributions, share=0.2, max_site_share=0.25, steps=3)
    for skill in skillfast.select(masks, share=0.2, max_site_share=0.25).values():
        assert len(skill) == int(0.2 * masks.n_neurons)
        assert all(len(skill.neurons.get(s.name, ())) <= 0.25 * s.width for s in masks.sites)


def test_under_autocast_and_without_some_classes(batches):
    model = make_vit(num_classes=6)
    attributions = skillfast.attribute(model, batches, classes=6)
    with torch.autocast("cpu", torch.bfloat16):
        masks = learned(model, batches, attributions, steps=2)
    assert np.isnan(masks.values[:, 5]).all()
    assert np.isfinite(masks.values[:, :5]).all()
    assert masks.n_observations.tolist()[5] == 0
    nothing = dataclasses.replace(attributions, values=np.full_like(attributions.values, np.nan))
    assert np.isnan(learned(model, batches, nothing, steps=2).values).all()


def test_no_more_images_are_kept_than_asked_for(batches):
    model = make_vit()
    attributions = skillfast.attribute(model, batches, classes=5)
    masks = learned(model, batches, attributions, steps=1, images_per_class=3)
    assert masks.n_observations.tolist() == [3] * 5
    assert masks.settings == {
        "learned_share": THREE, "learned_max_site_share": 0.25, "learned_scale": 0.0, "steps": 1, "batch_size": 48,
        "keep": 10.0, "start_keep": None,
        "seed": 0,
    }  # fmt: skip


def test_what_is_not_told_is_usual(batches):
    model = make_vit()
    attributions = skillfast.attribute(model, batches, classes=5)
    usual = {
        "learned_share": 0.03, "learned_max_site_share": 0.25, "learned_scale": 0.0, "batch_size": 96, "keep": 10.0,
        "start_keep": None, "seed": 0,
    }  # fmt: skip
    found = skillfast.learn_masks(model, batches, attributions, steps=1)
    assert found.settings == usual | {"steps": 1}
    assert (found.sites, found.fingerprint) == (attributions.sites, attributions.fingerprint)


def test_temperatures_fall_geometrically_and_rates_linearly(setting, monkeypatch):
    temperatures, rates, step = [], [], Adam.step

    def recorded_set(strength, widths, most, count, temperature):
        temperatures.append(temperature)
        return soft_top(strength, widths, most, count, temperature)

    def recorded_step(adam, gradients, rate):
        rates.append(rate)
        return step(adam, gradients, rate)

    monkeypatch.setattr(learned_mask, "soft_top", recorded_set)
    monkeypatch.setattr(Adam, "step", recorded_step)
    learned(*setting, steps=5)
    np.testing.assert_allclose(temperatures[1:], np.geomspace(1, 0.05, 5))  # the first tells the start
    np.testing.assert_allclose(rates, np.linspace(0.4, 0.12, 5))


def test_a_small_batch_is_one_pass(setting, monkeypatch):
    """And does what passes of its parts do."""
    passes = []
    handle = setting[0].register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    together = learned(*setting, steps=3, batch_size=20)
    assert passes[-3:] == [20] * 3
    monkeypatch.setattr(learned_mask, "ROWS_AT_ONCE", 8)
    apart = learned(*setting, steps=3, batch_size=20)
    handle.remove()
    assert passes[-12:] == [8, 2, 8, 2] * 3
    np.testing.assert_allclose(apart.values, together.values, rtol=1e-4, atol=1e-4)


def test_own_images_and_others_weigh_as_keep_says(setting, monkeypatch):
    """With losses of 1 the others' images count as `keep` times the class's own, however many there are of either."""
    totals, of = {"own": 0.0, "others": 0.0}, []
    backward = torch.Tensor.backward

    def one(whose):
        def loss(logits, *_):
            of[:] = [whose]
            return 0 * logits.sum(1) + 1

        return loss

    def recorded(tensor, *args):
        if not args:
            totals[of[0]] += float(tensor.detach())
        return backward(tensor, *args)

    monkeypatch.setattr(learned_mask, "target_loss", one("own"))
    monkeypatch.setattr(learned_mask, "kept_loss", one("others"))
    monkeypatch.setattr(learned_mask, "OWN_SHARE", 0.25)
    monkeypatch.setattr(learned_mask, "ROWS_AT_ONCE", 15)  # own images and others in passes of their own
    monkeypatch.setattr(torch.Tensor, "backward", recorded)
    learned(*setting, steps=1, keep=3.0, batch_size=16)
    assert totals["others"] == pytest.approx(3 * totals["own"])
    assert totals["own"] > 0


def test_strengths_start_in_units_of_the_weakest_that_is_removed(setting):
    model, loader, attributions = setting
    learner = learned_mask._Learner(model, loader, attributions, 0.01, 1.0, None)
    values = torch.linspace(-1, 0.5, attributions.n_neurons)
    strong, weakest = values.clone(), values[-int(0.01 * len(values))]
    strong[-1] = 100
    rows = torch.stack([values, strong, -1 - values.abs(), torch.zeros_like(values)])
    learner.attributions[:4] = rows
    found = learner._initial(torch.arange(4), None)
    torch.testing.assert_close(found[0], (values / weakest).clamp(-1, 2))
    assert float(found[1, -1]) == 2
    torch.testing.assert_close(found[2], rows[2] / 2)  # nothing to remove
    assert not found[3].any()
    learner.attributions[4] = 0
    learner.attributions[4, 7] = 4.0  # the weakest of those that a cut removes is 0
    torch.testing.assert_close(learner._initial(torch.tensor([4]), None)[0], learner.attributions[4] / 4)


def test_neurons_that_tie_at_the_cut_are_the_weakest_that_it_removes(setting):
    """Though one of them has to stay; whatever the attributions' unit."""
    model, loader, attributions = setting
    learner = learned_mask._Learner(model, loader, attributions, 0.01, 1.0, None)
    row = torch.zeros(attributions.n_neurons)
    row[: learner.count + 1] = 1.0
    row[0] = 10.0
    for unit in (1e-6, 1.0, 1e6):
        learner.attributions[0] = unit * row
        torch.testing.assert_close(learner._initial(torch.tensor([0]), None)[0], row.clamp(max=2))


def test_images_move_where_they_take_a_quarter_of_what_is_free(setting, monkeypatch):
    learner = learned_mask._Learner(*setting, 0.01, 1.0, None)
    taken = learner.images.numel() * learner.images.element_size()
    for free, moves in ((None, False), (4 * taken - 1, False), (4 * taken, True)):
        monkeypatch.setattr(learned_mask, "free_bytes", lambda _, free=free: free)
        learner._move_images()
        assert learner.gathers is moves


def test_even_of_two_rows_one_speaks_for_the_others(setting):
    spared, alone = (learned(*setting, steps=4, batch_size=2, keep=keep).values for keep in (10.0, 0.0))
    assert not np.array_equal(spared, alone)


def test_masks_start_from_others(setting):
    model, loader, attributions = setting
    learner = learned_mask._Learner(model, loader, attributions, 0.01, 1.0, None)
    masks = learned(*setting, steps=2)
    masks.values[:, 1] = np.nan  # a class that had no mask starts from its attributions
    found = learner._initial(torch.tensor([0, 1]), masks)
    torch.testing.assert_close(found[0], torch.from_numpy(masks.values[:, 0]).float())
    torch.testing.assert_close(found[1], learner._initial(torch.tensor([1]), None)[0])
    again = learned(*setting, steps=2, start=masks)
    assert again.settings["start_keep"] == 10
    assert not np.allclose(again.values[:, 0], learned(*setting, steps=2).values[:, 0])


def test_a_factor_of_1_teaches_nothing(setting):
    """Gates that stay open have no gradient by the strengths, which stay as they began."""
    one, more = (learned(*setting, steps=steps, scale=1.0, batch_size=16) for steps in (1, 3))
    np.testing.assert_array_equal(one.values, more.values)


def test_masks_take_turns_and_so_do_their_images():
    labels = torch.arange(60) % 4  # class 3 has no mask
    generator = torch.Generator().manual_seed(0)
    for own in (True, False):
        rows, mask = learned_mask._draws(labels, torch.tensor([2, 0, 1]), 30, 8, generator, own=own)
        assert rows.shape == mask.shape == (30, 8)
        flat_rows, flat = rows.flatten(), mask.flatten()
        assert (flat[:240].view(-1, 3).sort(1).values == torch.arange(3)).all()  # each once before any again
        for i, c in enumerate((2, 0, 1)):
            drawn = flat_rows[flat == i]
            members = ((labels == c) == own).nonzero()[:, 0]
            assert sorted(drawn[: len(members)].tolist()) == members.tolist()
            assert not torch.equal(drawn[: len(members)], members)
    assert sorted(learned_mask._in_turn(torch.arange(5), 12, generator).bincount().tolist()) == [2, 2, 2, 3, 3]


def test_a_run_costs_the_same_however_many_classes_there_are(setting):
    """Rows through the model, counted: the classes share a run's batches."""
    model, loader, attributions = setting
    rows = []
    handle = model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    counts = {}
    for classes in (2, 6):
        values = attributions.values.copy()
        values[:, classes:] = np.nan
        rows.clear()
        learned(model, loader, dataclasses.replace(attributions, values=values), steps=4)
        counts[classes] = sum(rows)
    handle.remove()
    assert counts == {2: 120 + 4 * 48, 6: 120 + 4 * 48}  # the intact model sees each image once


def test_many_classes_are_learned_in_parts(setting, monkeypatch):
    """What is held for their strengths is bounded, and every class has its mask."""
    attributions, held = setting[2], []

    def recorded_set(strength, *rest):
        held.append(len(strength))
        return soft_top(strength, *rest)

    monkeypatch.setattr(learned_mask, "soft_top", recorded_set)
    for name, value in (("CLASSES_AT_ONCE", 4), ("STRENGTH_BYTES", 4 * 4 * attributions.n_neurons)):
        held.clear()
        with monkeypatch.context() as patch:
            patch.setattr(learned_mask, name, value)
            masks = learned(*setting, steps=10)
        assert held == 11 * [4] + 11 * [2]
        skills = skillfast.select(masks, share=THREE)
        for label, sites in planted.PLANTED.items():
            found = {(s, int(i)) for s, index in skills[str(label)].neurons.items() for i in index}
            assert {(s, i) for s, neurons in sites.items() for i in neurons} <= found


def test_gates_are_those_of_each_row(setting):
    """Against one plain forward per row with its mask's gates; scaled neurons where the scale is not 0."""
    model, loader, attributions = setting
    learner = learned_mask._Learner(model, loader, attributions, 0.01, 1.0, None)
    gates = torch.rand(3, attributions.n_neurons, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask, rows = torch.tensor([2, 0, 1, 1]), torch.tensor([5, 0, 7, 9])
    got = learner._gated_logits(gates, mask, rows)
    alone = [learner._gated_logits(gates[m : m + 1], torch.zeros(1, dtype=torch.int64), rows[i : i + 1])
             for i, m in enumerate(mask.tolist())]  # fmt: skip
    torch.testing.assert_close(got, torch.cat(alone))
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((got * weights).sum(), gates)
    (want,) = torch.autograd.grad((torch.cat(alone) * weights).sum(), gates)
    torch.testing.assert_close(found, want)
    with torch.no_grad():
        want = model(learner.images[rows])
        torch.testing.assert_close(learner._gated_logits(torch.ones_like(gates), mask, rows), want)
    assert not any(model.get_submodule(site.path)._forward_pre_hooks for site in attributions.sites)


def test_a_model_in_bfloat16_has_masks(batches):
    model = make_vit().bfloat16()
    loader = [(images.bfloat16(), labels) for images, labels in batches]
    attributions = skillfast.attribute(model, loader, classes=5)
    masks = learned(model, loader, attributions, steps=2)
    assert np.isfinite(masks.values).all()


def test_the_first_images_of_each_class_are_kept(monkeypatch):
    images, labels = torch.arange(120.0)[:, None].expand(-1, 3).contiguous(), torch.arange(120) % 2
    loader = list(zip(images.split(50), labels.split(50), strict=True))

    def kept(per_class=None):
        found, of = learned_mask._first_images(nn.Identity(), loader, 2, per_class, None, 0)
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


WIDTHS = [10, 20, 30]


def test_soft_sets_sum_to_their_count_within_sites():
    strength = torch.randn(2, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    strength[0, :10] += 3  # the first mask's first site wants more than it may have
    most = torch.tensor([2.0, 5.0, 7.0], dtype=torch.float64)
    for temperature in (1.0, 0.1, 1e-4):
        p = soft_top(strength, WIDTHS, most, 9, temperature)
        torch.testing.assert_close(p.sum(1), torch.full((2,), 9.0, dtype=torch.float64), atol=1e-3, rtol=0)
        assert float(p[0, :10].sum()) == pytest.approx(2, abs=1e-3)
        assert ((p >= 0) & (p <= 1)).all()
        alone = [soft_top(row[None], WIDTHS, most, 9, temperature) for row in strength]
        torch.testing.assert_close(p, torch.cat(alone), atol=1e-4, rtol=0)
        for shift in (-50.0, 50.0):  # only differences count
            torch.testing.assert_close(soft_top(strength + shift, WIDTHS, most, 9, temperature), p, atol=1e-4, rtol=0)
    hard = soft_top(strength, WIDTHS, most, 9, 1e-6)
    assert set(hard[0, :10].topk(2).indices.tolist()) == set(strength[0, :10].topk(2).indices.tolist())
    assert ((hard < 1e-3) | (hard > 1 - 1e-3)).all()
    each = soft_top(strength, WIDTHS, most, 9, torch.tensor([[1.0], [1e-6]]))
    torch.testing.assert_close(each[1], hard[1])


@pytest.mark.parametrize("temperature", [0.5, 0.02])
def test_its_gradient_is_that_of_finite_differences(monkeypatch, temperature):
    monkeypatch.setattr(learned_mask, "BISECTIONS", 50)  # float64
    strength = torch.randn(2, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    strength[0, :10] += 3
    most, weights = torch.tensor([2.0, 5.0, 7.0], dtype=torch.float64), torch.linspace(-1, 1, 60, dtype=torch.float64)

    def value(s):
        return (soft_top(s, WIDTHS, most, 9, temperature) * weights).sum()

    found = torch.autograd.grad(value(strength.requires_grad_()), strength)[0]
    with torch.no_grad():
        few = found.abs().argsort(1)[:, -3:].tolist()  # of a hard set few strengths matter
        for row, i in ((k, i) for k in (0, 1) for i in [*range(0, 60, 7), *few[k]]):
            step = torch.zeros(2, 60, dtype=torch.float64)
            step[row, i] = 1e-4 * temperature
            want = (value(strength + step) - value(strength - step)) / (2e-4 * temperature)
            assert float(found[row, i]) == pytest.approx(float(want), abs=1e-5, rel=1e-4)


def test_losses_of_logits_that_are_known():
    gone = torch.tensor([[0.0, 9, -9], [0, 9, 4], [0, 9, -9], [0, 9, 4]])
    assert target_loss(gone, torch.tensor([0, 0, 1, 1])).tolist() == [0, 0, 9 + 1, 5 + 1]
    intact = torch.tensor([[5.0, 4, 0], [9, 1, 3]])
    for c in (0, 1, 2):
        shifted = intact + 7
        shifted[:, c] -= 20  # without the class, everything else as it was
        assert kept_loss(shifted, intact, torch.tensor([c, c])).tolist() == pytest.approx([0, 0], abs=1e-6)
    turned = torch.tensor([[-20.0, 0, 4], [-20, 1, 3]], requires_grad=True)
    found = kept_loss(turned, intact, torch.tensor([0, 0]))
    want = 2 + 4  # a lead of 4, of which 2 would do, becomes one of -4; the second, of 2, keeps what it needs, 1
    log = torch.log_softmax(torch.tensor([4.0, 0.0]), 0)
    divergence = (log.exp() * (log - log.flip(0))).sum()
    assert found.tolist() == pytest.approx([want + float(divergence), 0], rel=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), turned)  # the class's own logit has no part in the divergence
    assert gradient.isfinite().all()
    assert gradient[:, 0].tolist() == [0, 0]


def test_what_cannot_be_is_refused(batches):
    model = make_vit()
    attributions = skillfast.attribute(model, batches, classes=5)

    def told(error, model, loader=batches, **more):
        return one_line(error, skillfast.learn_masks, model, loader, attributions, **more)

    learned_mask._check(model, attributions, share=1.0, max_site_share=1.0, steps=1, batch_size=2)  # the ends are taken
    assert "share: expected a share in (0, 1], got 0" in told(ArgumentError, model, share=0)
    assert "steps: expected at least 1, got 0" in told(ArgumentError, model, steps=0)
    assert "batch_size: expected at least 2, got 1" in told(ArgumentError, model, batch_size=1)
    assert "expected at least one image" in told(ArgumentError, model, loader=[])
    assert "expected those of the model's architecture" in told(ArgumentError, make_vit(depth=2))
    assert "learn_masks: expected a model in evaluation mode" in told(ModelError, make_vit().train())
    masks = learned(model, batches, attributions, steps=1)
    assert "start: expected learned masks, got attribution" in told(ArgumentError, model, start=attributions)
    others = dataclasses.replace(masks, columns=masks.columns[::-1])
    assert "start: expected masks with the attributions' columns" in told(ArgumentError, model, start=others)
    assert "contrastive: expected False" in one_line(ArgumentError, skillfast.select, masks, contrastive=True)
    assert "erase: expected a weight of at least 0, got -1" in told(ArgumentError, model, erase=-1)


@pytest.fixture
def small(monkeypatch):
    """Copies with weights of their own, whose 24 neurons are all gated; few rivals and often refitted probes."""
    model = planted.Copies()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    loader = [planted.evidence(150, 1)]
    for name, value in (("REFIT", 2), ("PROBED", 11), ("RIVALS", 2), ("OWN_SHARE", 0.4)):
        monkeypatch.setattr(learned_mask, name, value)
    return model, loader, skillfast.attribute(model, loader, classes=5)


@pytest.mark.parametrize("erase", [0.0, 0.7])
def test_strengths_are_those_of_adam_on_the_loss_written_out(small, erase):
    """Forwards with plain hooks, the loss as the docstring has it, autograd through the soft sets, torch's Adam."""
    model, loader, attributions = small
    settings = {"share": 0.2, "max_site_share": 0.3, "steps": 4, "batch_size": 23, "keep": 3.0, "scale": 0.25}
    masks = skillfast.learn_masks(model, loader, attributions, erase=erase, seed=5, **settings)
    (images, labels), generator = loader[0], torch.Generator().manual_seed(5)
    learner = learned_mask._Learner(model, loader, attributions, 0.2, 0.3, None)
    classes, intact, most = torch.arange(5), model(images).detach(), torch.tensor([3.0, 3.0])
    strength = learner._initial(classes, None).requires_grad_()
    adam = torch.optim.Adam([strength], betas=(0.9, 0.99))
    own, others = (learned_mask._draws(labels, classes, 4, n, generator, own=n == 9) for n in (9, 14))

    def probes(gates):
        return learner._probes(gates.detach(), classes, generator)

    units, fitted = [probe.lead for probe in probes(torch.ones(5, 24))] if erase else [], []
    for step, temperature in enumerate(np.geomspace(1, 0.05, 4)):
        gates = 1 - 0.75 * soft_top(strength, [12, 12], most, 4, temperature)
        if erase and step in (0, 2):
            fitted = probes(gates)
        losses = []
        for rows, of in (own[:, step], others[:, step]):
            read = (model.read(images[rows]).relu() * gates[of, :12]) @ model.write.weight.T + model.write.bias
            embeddings = read * gates[of, 12:]
            logits = embeddings @ model.head.weight.T + model.head.bias
            if len(rows) == 9:
                rest = logits.scatter(1, of[:, None], -torch.inf).amax(1)
                losses.append((logits[torch.arange(9), of] - rest + 1).relu().mean())
                for i, probe in enumerate(fitted):
                    if (of == i).any():
                        losses.append(erase * probe.read(embeddings[of == i]).sum() / units[i] / 9)
            else:
                losses.append(3 * kept_loss(logits, intact[rows], of).mean())
        adam.zero_grad()
        (5 * sum(losses)).backward()
        adam.param_groups[0]["lr"] = 0.4 * (1 - 0.7 * step / 3)
        adam.step()
    torch.testing.assert_close(torch.from_numpy(masks.values.T).float(), strength.detach(), rtol=1e-3, atol=1e-3)
    assert (masks.values != learner._initial(classes, None).numpy().T).mean() > 0.9
    assert masks.method == ("erase" if erase else "mask")
    assert masks.settings.get("erase") == (erase or None)


def test_probes_are_fitted_on_the_class_and_the_classes_most_like_it(small, monkeypatch):
    model, loader, attributions = small
    learner = learned_mask._Learner(model, loader, attributions, 0.2, 0.3, None)
    learner.labels = torch.where(learner.labels == 3, 1, learner.labels)  # a class without images is no rival
    seen = []
    monkeypatch.setattr(
        learned_mask._Probe, "of", lambda embeddings, labels, target, _: seen.append((embeddings, labels, target))
    )
    gates = torch.rand(2, 24, generator=torch.Generator().manual_seed(0))
    learner._probes(gates, torch.tensor([4, 1]), torch.Generator().manual_seed(0))
    for i, (embeddings, labels, target) in enumerate(seen):
        assert target == (4, 1)[i]
        said = learner.intact[learner.labels == target].mean(0)
        near = sorted((c for c in (0, 1, 2, 4) if c != target), key=lambda c: -float(said[c]))[:2]
        assert sorted(labels.tolist()) == sorted([c for c in (target, *near) for _ in range(11)])
        x = model.write(model.read(learner.images).relu() * gates[i, :12]) * gates[i, 12:]
        for row, label in zip(embeddings, labels, strict=True):  # under the class's own mask
            same = (x[learner.labels == label] - row).abs().amax(1).min()
            assert float(same.detach()) < 1e-4
        assert len(torch.unique(embeddings, dim=0)) == 33


def test_a_probes_lead_is_what_it_reads_of_its_class():
    rng = np.random.default_rng(0)
    labels = np.array([1] * 20 + [4] * 20 + [7] * 20)
    rows = torch.from_numpy(rng.normal(size=(60, 3)) + 2 * np.eye(3)[labels // 3]).float()
    probe = learned_mask._Probe.of(rows, torch.from_numpy(labels), 4, torch.device("cpu"))
    scores = rows @ probe.weights.T + probe.biases
    lead = (scores[:, 1] - torch.maximum(scores[:, 0], scores[:, 2])).clamp(min=0)
    assert probe.own == 1
    torch.testing.assert_close(probe.read(rows), lead)
    assert probe.lead == pytest.approx(float(lead[20:40].mean()))
    assert probe.weights.dtype == probe.biases.dtype == torch.float32
    flat = learned_mask._Probe.of(torch.zeros(60, 3), torch.from_numpy(labels), 4, torch.device("cpu"))
    assert flat.lead == torch.finfo(torch.float32).eps  # is divided by


class Tagger(nn.Module):
    """Says of each token which class its number is of; a class has two units, and two more are of no class."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.blocks = nn.ModuleList([nn.Sequential()])
        self.blocks[0].add_module("fc2", nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.embed.weight[:, 6:] = torch.rand(9, 2, generator=torch.Generator().manual_seed(0))
            for token in range(9):
                self.embed.weight[token, [token % 3, 3 + token % 3]] = 2.0
                self.embed.weight[token, 3 + (token + 1) % 3] = 0.1  # what it is taken for without these
            self.blocks[0].fc2.weight.copy_(torch.eye(8))
            self.head.weight[[0, 1, 2], [0, 1, 2]] = 2.0
            self.head.weight[[0, 1, 2], [3, 4, 5]] = 1.0
            self.head.weight[:, 6:] = 1.0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks[0](self.embed(input_ids)))


def tagged_texts() -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """Texts of several lengths, padded within their batch, with a label for most tokens."""
    model = Tagger().eval()
    skillfast.models.sites.declare_sites(model, {"blocks.0.mlp": "blocks.0.fc2", "head": "head"})
    generator = torch.Generator().manual_seed(1)
    batches = []
    for width in (5, 8, 6):
        mask = torch.arange(width) < torch.randint(2, width, (7, 1), generator=generator)
        ids = torch.randint(9, (7, width), generator=generator) * mask
        labels = (ids % 3).masked_fill(~mask | (torch.rand(ids.shape, generator=generator) < 0.2), -100)
        batches.append({"input_ids": ids, "attention_mask": mask.long(), "labels": labels})
    return model, batches


def test_masks_of_labels_per_token_take_their_class_s_tokens_alone():
    model, batches = tagged_texts()
    attributions = skillfast.attribute(model, batches, sites=["mlp"])
    share = 2 / 8
    masks = skillfast.learn_masks(model, batches, attributions, share=share, max_site_share=1.0, steps=30, batch_size=8)
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    assert masks.n_observations.tolist() == [int((labels == c).sum()) for c in range(3)]
    skills = skillfast.select(masks, share=share, max_site_share=1.0)
    assert {name: skill.neurons["blocks.0.mlp"].tolist() for name, skill in skills.items()} == {
        str(c): [c, c + 3] for c in range(3)
    }
    found = skillfast.sweep(model, batches, [skillfast.Condition(skill) for skill in skills.values()])
    np.testing.assert_array_equal(found.baseline, np.ones(3))
    np.testing.assert_array_equal(np.diagonal(found.per_class_accuracy) == 1, [False] * 3)
    assert (found.per_class_accuracy[~np.eye(3, dtype=bool)] == 1).all()
    assert "erase: expected a label per example" in one_line(
        ArgumentError, skillfast.learn_masks, model, batches, attributions, erase=1.0
    )


def test_losses_of_tokens_equal_a_loop_over_texts():
    model, batches = tagged_texts()
    attributions = skillfast.attribute(model, batches, sites=["mlp"])
    learner = learned_mask._Learner(model, batches, attributions, 0.25, 1.0, None)
    assert learner.labels.shape == (21, 8)
    gates = torch.rand(3, 8, generator=torch.Generator().manual_seed(2))
    rows, mask, n = torch.tensor([3, 12, 20, 5, 8]), torch.tensor([1, 0, 2, 2, 0]), 3
    of_mask = torch.arange(3)
    found = learner._of_tokens(gates, of_mask, mask, rows, n)
    texts = [
        (batch["input_ids"][i], batch["attention_mask"][i], batch["labels"][i]) for batch in batches for i in range(7)
    ]
    want = [0.0, 0.0]
    for i, (row, c) in enumerate(zip(rows.tolist(), mask.tolist(), strict=True)):
        ids, here, labels = texts[row]
        with torch.no_grad():
            intact = model(ids[None], here[None])[0]
            changed = model.head(model.blocks[0](model.embed(ids) * gates[c]))
        own, other = (labels == c).nonzero()[:, 0], ((labels >= 0) & (labels != c)).nonzero()[:, 0]
        if i < n and len(own):
            want[0] += float(target_loss(changed[own], torch.full((len(own),), c)).mean())
        if len(other):
            of = torch.full((len(other),), c)
            want[1] += float(kept_loss(changed[other], intact[other], of).mean())
    assert [loss.item() for loss in found] == pytest.approx(want, rel=1e-5)
    assert min(want) > 0.01


def test_strengths_by_labels_of_tokens_are_those_of_adam_on_the_loss_written_out(monkeypatch):
    """In parts of 4 texts what all at once give: own texts lose their class, and `keep` weighs what any text loses."""
    monkeypatch.setattr(learned_mask, "ROWS_AT_ONCE", 4)
    model, batches = tagged_texts()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    attributions = skillfast.attribute(model, batches, sites=["mlp"])
    settings = {"share": 0.25, "max_site_share": 1.0, "steps": 3, "batch_size": 11, "keep": 3.0}
    masks = skillfast.learn_masks(model, batches, attributions, seed=5, **settings)
    learner = learned_mask._Learner(model, batches, attributions, 0.25, 1.0, None)
    classes, generator = torch.arange(3), torch.Generator().manual_seed(5)
    strength = learner._initial(classes, None).requires_grad_()
    adam = torch.optim.Adam([strength], betas=(0.9, 0.99))
    own, others = (learned_mask._draws(learner.labels, classes, 3, n, generator, own=n == 6) for n in (6, 5))
    for step, temperature in enumerate(np.geomspace(1, 0.05, 3)):
        gates = 1 - soft_top(strength, [8], torch.tensor([8.0]), 2, temperature)
        rows, mask = torch.cat([own[:, step], others[:, step]], 1)
        taken_away, lost = learner._of_tokens(gates, classes, mask, rows, 6)
        adam.zero_grad()
        (taken_away / 6 + 3 * lost / 11).backward()
        adam.param_groups[0]["lr"] = 0.4 * (1 - 0.7 * step / 2)
        adam.step()
    torch.testing.assert_close(torch.from_numpy(masks.values.T).float(), strength.detach(), rtol=1e-3, atol=1e-3)
