"""What conditions do to activations, against NumPy, and what is no condition."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import one_line

import skillfast
from skillfast import Condition, Skill
from skillfast.ablation import interventions
from skillfast.ablation.interventions import Interventions, ablate
from skillfast.errors import ArgumentError, ModelError
from skillfast.models.activations import Activations
from skillfast.models.sites import find_sites

SKILL = Skill("deer", {"blocks.0.mlp": [2, 5], "head": [1]})


def test_a_condition_is_named_by_what_is_not_usual():
    constants = {"blocks.0.mlp": [1.0, 2.0], "head": [0.5]}
    for settings, name in (
        ({}, "deer"),
        ({"components": ("head", "router", "expert", "ssm", "attn", "mlp")}, "deer"),
        ({"components": ("mlp", "attn"), "scale": 2.0}, "deer (mlp+attn, x 2.0)"),
        ({"scale": -1}, "deer (x -1)"),
        ({"mode": "mean"}, "deer (mean)"),
        ({"mode": "constant", "constants": constants, "scale": 0.5}, "deer (x 0.5, constant)"),
        ({"mode": "mean", "name": "mine"}, "mine"),
    ):
        assert Condition(SKILL, **settings).name == name
    site = SimpleNamespace(name="head", kind="head")
    assert Condition(SKILL).neurons_at(site).tolist() == [1]
    assert Condition(SKILL, components=("mlp",)).neurons_at(site) is None


def test_what_is_no_condition():
    for scale in (np.inf, -np.inf, np.nan, 3.5e38, -3.5e38, "1", None, torch.tensor(1.0)):
        assert f"scale: expected a finite number, got {scale}" in one_line_of(scale=scale)
    text = "constants: expected some with mode 'constant' alone, got "
    constants = {"blocks.0.mlp": [1.0, 2.0], "head": [0.5]}
    assert f"{text}none; change the mode" in one_line_of(mode="constant")
    assert f"{text}some with mode 'mean'" in one_line_of(mode="mean", constants=constants)
    for wrong in ({"blocks.0.mlp": [1.0, 2.0]}, {**constants, "head": [0.5, 1.0]}):
        text = one_line_of(mode="constant", constants=wrong)
        assert "constants: expected 1 values for head, one per neuron of skill 'deer'" in text
    assert "components: expected some of mlp, attn, ssm, expert, router, head, got nose, ear" in one_line_of(
        components=("nose", "mlp", "ear")
    )


def one_line_of(**settings):
    with pytest.raises(ArgumentError) as caught:
        Condition(SKILL, **settings)
    return str(caught.value)


def scores_of(pool, mean):
    """Scores of which the pool and every site's mean alone are read."""
    return type("Scores", (), {"pool": pool, "__getitem__": lambda *_: SimpleNamespace(mean=mean)})()


@pytest.fixture
def many(vit, batches):
    """A condition of every mode at one site and none at another, and the bank of donors."""
    skill = Skill("s", {"blocks.0.mlp": [2, 5, 90]})
    bank = skillfast.donors(vit, batches, [skill], n_donors=6)
    mean = np.random.default_rng(0).normal(size=96)
    reference = scores_of("mean", mean)
    constants = {"blocks.0.mlp": torch.tensor([3.0, -1.0, 2.0])}
    conditions = [
        Condition(Skill("other", {"blocks.1.attn": [0]})),
        Condition(skill, scale=0.25),
        Condition(skill, scale=0.25, mode="mean"),
        Condition(skill, scale=-2.0, mode="constant", constants=constants),
        Condition(skill, scale=0.5, mode="resample"),
        Condition(skill, components=("attn",)),
    ]
    made = Interventions(vit, conditions, reference, bank)
    site = next(site for site in find_sites(vit) if site.name == "blocks.0.mlp")
    index = torch.tensor([2, 5, 90])
    given = bank.activations["blocks.0.mlp"]

    def changed(x, i, rows=None):
        """What condition i leaves of x [batch, tokens, 96], in float64."""
        x = x.double().clone()
        own = x[..., index]
        other = {
            2: torch.from_numpy(mean)[index],
            3: constants["blocks.0.mlp"],
            4: None if rows is None else given[rows],
        }
        if i in (1, 2, 3, 4):
            other = other.get(i, torch.zeros(3)).double()
            x[..., index] = other + conditions[i].scale * (own - other)
        return x

    return made, site, changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_are_changed_as_the_conditions_say(many, dtype):
    made, site, changed = many
    assert [site.name for site in made.sites] == ["blocks.0.mlp", "blocks.1.attn"]
    x = torch.randn(3, 17, 96, dtype=dtype, generator=torch.Generator().manual_seed(0))
    rows, tolerance = torch.tensor([4, 0, 5]), 1e-6 if dtype == torch.float32 else 1e-12
    for conditions in ([0], [5, 0], [1], [4], [0, 1, 2, 3, 4, 5], [4, 3, 4, 0]):
        stacked = x.repeat(len(conditions), 1, 1)
        before = stacked.clone()
        got = made.apply(site, Activations(stacked), conditions, rows)
        want = torch.cat([changed(x, i, rows) for i in conditions])
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(stacked, before, rtol=0, atol=0)
    first = made.apply(site, Activations(x[:, :1]), [4], rows)  # the first token alone passes the last block
    torch.testing.assert_close(first.double(), changed(x, 4, rows)[:, :1], rtol=tolerance, atol=tolerance)
    for wrong in (None, rows[:0], rows[:2]):
        text = one_line(ModelError, made.apply, site, Activations(x), [4], wrong)
        assert f"got 3 rows where {'none' if wrong is None else len(wrong)} went in; call the model itself" in text


def test_each_example_can_have_a_condition_of_its_own(many):
    made, site, changed = many
    x = torch.randn(7, 17, 96, generator=torch.Generator().manual_seed(0))
    own = torch.tensor([3, 0, 2, 6, 1, 5, 1])
    want = torch.stack([changed(row, i) for row, i in zip(x, own.tolist(), strict=True)])
    got = made.apply_each(site, Activations(x), own)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    for i in (0, 1, 2, 3, 5):
        found = {at.name: factors for at, factors in made.factors(i).items()}
        assert list(found) == (["blocks.1.attn"] if i == 0 else [] if i == 5 else ["blocks.0.mlp"])
        for scale, shift in found.values():
            assert scale.shape == shift.shape
            assert scale.dtype == shift.dtype == torch.float64
        if i in (1, 2, 3):
            scale, shift = found["blocks.0.mlp"]
            torch.testing.assert_close(x.double() * scale[0] + shift[0], changed(x, i), rtol=1e-12, atol=1e-12)
    scale, shift = made.factors(4)[site]  # and what its donors give beside
    ((neurons, given),) = made.given(4, rows := torch.tensor([1, 0, 2, 2, 1, 0, 1])).values()
    got = x.double() * scale[0] + shift[0]
    got[..., neurons] += given.double()
    torch.testing.assert_close(got, changed(x, 4, rows), rtol=1e-6, atol=1e-6)
    assert made.given(3, rows) == {}


def test_tables_are_kept_for_the_next_batch_within_a_limit(many, monkeypatch):
    made, site, _ = many
    x = torch.zeros(2, 17, 96)
    first = made._tables(site, x, (1, 2))
    assert made._tables(site, x, (1, 2)) is first
    assert first.nbytes == 2 * 2 * 96 * 4
    assert made._tables(site, x, (1,)).nbytes == 96 * 4  # no shift
    assert made._tables(site, x.double(), (1,)).nbytes == 96 * 8
    assert made._tables(site, x.half(), (1,)) is made._tables(site, x, (1,))
    monkeypatch.setattr(interventions, "MOST_TABLE_BYTES", 2 * 2 * 96 * 4 + 96 * 12)
    made._tables(site, x, (3,))  # what is kept is as much as may be
    assert made._tables(site, x, (1, 2)) is first
    made._tables(site, x, (2,))
    assert [key[1] for key in made._kept] == [(2,)]
    assert made._tables(site, x, (1, 2)) is not first


def test_experts_that_are_masked_are_those_of_the_conditions_that_reroute(vit):
    site = next(site for site in find_sites(vit) if site.name == "blocks.0.mlp")
    skills = [Skill(str(i), {"blocks.0.mlp": [i, 7]}) for i in range(3)]
    made = Interventions(vit, [Condition(skill) for skill in skills])
    assert made.masks(site, [0, 1], 4) is None
    changes = made._changes["blocks.0.mlp"]
    changes[1] = interventions.SiteChange(changes[1].neurons, 1.0, masked=True)
    assert made.masks(site, [0, 2, 9], 6) is None
    masked = made.masks(site, [0, 1, 9], 6)
    assert masked.shape == (6, 96)
    assert masked.nonzero().tolist() == [[2, 1], [2, 7], [3, 1], [3, 7]]


def test_an_ablation_takes_the_reference_of_its_own_pool(vit, batches):
    scores = skillfast.trace(vit, batches, pool="cls")
    head = Skill("h", {"head": [1, 2]})
    with ablate(vit, head, mode="mean", reference=scores), torch.no_grad():  # pooled already: any pool's mean is right
        found = vit(batches[0][0])
    kept = []
    vit.head.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    with torch.no_grad():
        vit(batches[0][0])
        kept[0][:, [1, 2]] = torch.from_numpy(scores["head"].mean[[1, 2]]).float()
        torch.testing.assert_close(found, torch.nn.functional.linear(kept[0], vit.head.weight, vit.head.bias))
    text = one_line(ArgumentError, Interventions, vit, [Condition(SKILL, mode="mean")], scores)
    assert "expected reference scores pooled by 'mean', got 'cls'" in text
    for pool in ("mean", "none"):
        condition = Condition(SKILL, ("mlp",), mode="mean")
        assert len(Interventions(vit, [condition], scores_of(pool, np.zeros(96))).sites) == 1


def test_windows_of_an_example_take_its_donors(many):
    """Donors hold an example's tokens unfolded; a forward may have them as windows one after the other."""
    made, site, changed = many
    x = torch.randn(3, 16, 96, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([4, 0, 5])
    given = made._changes[site.name][4].donors[:, :16]
    made._changes[site.name][4] = dataclasses.replace(made._changes[site.name][4], donors=given)
    whole = made.apply(site, Activations(x), [4], rows)
    windows = made.apply(site, Activations(x.view(12, 4, 96)), [4], rows)
    torch.testing.assert_close(windows.view(3, 16, 96), whole)
    x17 = torch.cat([x, x[:, :1]], 1)
    torch.testing.assert_close(whole.double(), changed(x17, 4, rows)[:, :16], rtol=1e-6, atol=1e-6)
    text = one_line(ArgumentError, made.apply, site, Activations(x[:, :8]), [4], rows)
    assert "donors: expected activations [3, 8, 3] at blocks.0.mlp, got [3, 16, 3] of examples of another size" in text
