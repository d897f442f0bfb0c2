from __future__ import annotations

import numpy as np
import planted
import pytest
import torch
from conftest import make_vit, one_line
from torch.utils.data import DataLoader, TensorDataset

import skillfast
from skillfast.errors import ArgumentError, DataError, ModelError
from skillfast.models.sites import choose_sites, find_sites
from skillfast.skills.attribution import log_odds
from skillfast.skills.ranking import NeuronRanking


def in_double(batches):
    return [(images.double(), labels) for images, labels in batches]


def by_gates(model, batches, n_classes):
    """The same numbers from another side: the gradient of each class's mean margin by gates of 1 on the neurons."""
    sites = find_sites(model)
    gates = {site.name: torch.ones(site.width, dtype=torch.float64, requires_grad=True) for site in sites}
    hooks = [
        model.get_submodule(site.path).register_forward_pre_hook(lambda _, a, g=gates[site.name]: (a[0] * g,))
        for site in sites
    ]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits, columns = model(images), []
    for c in range(n_classes):
        rest = [i for i in range(n_classes) if i != c]
        own = logits[labels == c]
        margin = (own[:, c] - torch.log(own[:, rest].exp().sum(1))).mean()
        columns.append(torch.cat(torch.autograd.grad(margin, gates.values(), retain_graph=True)))
    for hook in hooks:
        hook.remove()
    return torch.stack(columns, 1).numpy()


def test_attribution_equals_the_gradient_by_gates(batches):
    model = make_vit().double()
    found = skillfast.attribute(model, in_double(batches), classes=5)
    want = by_gates(model, in_double(batches), 5)
    np.testing.assert_allclose(found.values, want, rtol=1e-9, atol=1e-12 * np.abs(want).max())
    assert found.values.dtype == np.float64
    assert found.n_neurons == len(want) == sum(site.width for site in found.sites)
    assert found.columns == tuple(f"label:{c}" for c in range(5))
    assert found.n_observations.sum() == 37


def test_other_batches_give_the_same(batches):
    model = make_vit().double()
    images, labels = (torch.cat(parts) for parts in zip(*in_double(batches), strict=True))
    whole = skillfast.attribute(model, [(images, labels)], classes=5).values
    parts = skillfast.attribute(model, in_double(batches), classes=5).values
    np.testing.assert_allclose(parts, whole, rtol=1e-9, atol=1e-12 * np.abs(whole).max())


def test_it_works_where_gradients_are_off_and_leaves_nothing_behind(batches):
    model = make_vit()
    want = skillfast.attribute(model, batches, classes=5).values
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.inference_mode():
        made_there = [(images.clone(), labels.clone()) for images, labels in batches]
        found = skillfast.attribute(model, made_there, classes=5).values
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())
    assert not any(model.get_submodule(site.path)._forward_pre_hooks for site in find_sites(model))


def test_under_autocast(batches):
    model = make_vit()
    want = skillfast.attribute(model, batches, classes=5).values
    with torch.autocast("cpu", torch.bfloat16):
        found = skillfast.attribute(model, batches, classes=5).values
    assert np.corrcoef(found.ravel(), want.ravel())[0, 1] > 0.99


def test_some_sites_and_a_class_without_images(batches):
    model = make_vit(num_classes=6)
    found = skillfast.attribute(model, batches, sites=("mlp",), classes=6)
    assert found.sites == choose_sites(model, ("mlp",))
    assert np.isnan(found.values[:, 5]).all()
    assert np.isfinite(found.values[:, :5]).all()


def test_log_odds():
    logits = torch.tensor([[2.0, 0.0, 0.0], [1.0, 5.0, 1.0]])
    want = [2 - np.log(2), 5 - (1 + np.log(2))]
    assert log_odds(logits, torch.tensor([0, 1])).tolist() == pytest.approx(want)


@pytest.mark.parametrize("label", planted.PLANTED)
def test_planted_neurons_rank_first(label):
    model, (images, labels) = planted.model(), planted.images(120)
    loader = DataLoader(TensorDataset(images, labels), batch_size=50)
    found = skillfast.attribute(model, loader, sites=("mlp", "attn"))
    want = {(site, i) for site, neurons in planted.PLANTED[label].items() for i in neurons}
    for contrastive in (False, True):
        skills = skillfast.select(found, share=len(want) / found.n_neurons, contrastive=contrastive)
        skill = skills[str(label)]
        assert {(site, int(i)) for site, index in skill.neurons.items() for i in index} == want
        assert (skill.method, skill.metric) == ("attribution", f"label:{label}")


def test_contrastive_attribution_is_less_the_largest_positive_one():
    sites = choose_sites(make_vit(), ("blocks.0.attn",))
    values = np.zeros((24, 3))
    values[0] = [5, 4.5, 0]  # 0.5 of its own
    values[1] = [1, -9, -9]  # 1: what speaks against others does not count
    values[2] = [0.8, 0, 0]
    ranking = NeuronRanking("attribution", ("label:a", "label:b", "label:c"), values, sites, np.ones(3, np.int64))
    two = skillfast.select(ranking, "attribution", metric="label:a", share=2 / 24, contrastive=True)["a"]
    assert two.neurons["blocks.0.attn"].tolist() == [1, 2]
    two = skillfast.select(ranking, metric="label:a", share=2 / 24)["a"]
    assert two.neurons["blocks.0.attn"].tolist() == [0, 1]


def test_shares_are_kept(batches):
    found = skillfast.attribute(make_vit(), batches, classes=5)
    for skill in skillfast.select(found, share=0.1, max_site_share=0.15).values():
        assert 0 < len(skill) <= 0.1 * found.n_neurons
        for site in found.sites:
            assert len(skill.neurons.get(site.name, ())) <= 0.15 * site.width


def test_what_cannot_be_is_refused(batches):
    model = make_vit()
    assert "labels: expected class indices in [0, 3)" in one_line(
        ArgumentError, skillfast.attribute, model, batches, classes=3
    )
    assert "expected at least one image" in one_line(ArgumentError, skillfast.attribute, model, [], classes=5)
    assert "attribute: expected a model in evaluation mode" in one_line(
        ModelError, skillfast.attribute, model.train(), batches, classes=5
    )
    found = skillfast.attribute(model.eval(), batches, classes=5)
    assert "expected attribution" in one_line(ArgumentError, skillfast.select, found, "pearson")


def test_a_ranking_is_saved_and_loaded(batches, tmp_path):
    found = skillfast.attribute(make_vit(depth=1), batches, classes=5)
    assert found.save(tmp_path / "new") == tmp_path / "new" / "ranking.safetensors"
    again = NeuronRanking.load(tmp_path / "new")
    np.testing.assert_array_equal(again.values, found.values)
    np.testing.assert_array_equal(again.n_observations, found.n_observations)
    for name in ("method", "columns", "sites", "fingerprint", "settings"):
        assert getattr(again, name) == getattr(found, name)
    with pytest.raises(DataError, match=r"got none; write it with NeuronRanking\.save$"):
        NeuronRanking.load(tmp_path)
    twice = tmp_path / "new" / "ranking.safetensors"
    stored = twice.read_bytes()
    assert stored.count(b"label:3") == 1
    twice.write_bytes(stored.replace(b"label:3", b"label:1"))
    with pytest.raises(DataError, match=r"expected columns with different names at columns, got one twice"):
        NeuronRanking.load(tmp_path / "new")
