"""Where neurons are read, and that the model is as before on every way out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from conftest import make_vit, one_line

import skillfast
from skillfast import Categorical, Continuous, Skill, Tracer, backends
from skillfast.errors import ArgumentError, ModelError
from skillfast.models.sites import Site, find_sites
from skillfast.tracing.capture import FusedActivation, activation_name, plain_mlp

LABEL = {"label": Categorical(5)}


def mlp_sites(model):
    return [site for site in find_sites(model) if site.kind == "mlp"]


def counted(tracer, model, batches):
    with tracer, torch.no_grad():
        for x, y in batches:
            model(x)
            tracer.step(label=y)
    return tracer.compute()


def test_plain_mlps_are_read_inside_their_activation(vit, batches):
    activations = [block.mlp.act for block in vit.blocks]
    tracer = Tracer(vit, LABEL)
    backends.calls.clear()
    with tracer, torch.no_grad():
        assert all(type(block.mlp.act) is FusedActivation for block in vit.blocks)
        vit(batches[0][0])
        tracer.discard()
    # three activations and three attentions; the classifier's input has no tokens to pool
    assert backends.calls["act_mask_pool", "native"] == 6
    assert [block.mlp.act for block in vit.blocks] == activations
    assert not any(module._forward_pre_hooks for module in vit.modules())


@pytest.mark.filterwarnings("ignore:some scores are not defined")  # a ReLU leaves neurons that never fire
@pytest.mark.parametrize("act", [torch.nn.GELU, torch.nn.ReLU, torch.nn.SiLU, torch.nn.Identity])
def test_fused_equals_the_hook(batches, act):
    model, hooked = make_vit(act_layer=act), make_vit(act_layer=act)
    got = counted(Tracer(model, LABEL), model, batches)
    for block in hooked.blocks:  # a hook of one's own at the activation: then the site is read behind it
        block.mlp.act.register_forward_hook(lambda *_: None)
    assert all(plain_mlp(hooked, site) is None for site in mlp_sites(hooked))
    want = counted(Tracer(hooked, LABEL), hooked, batches)
    np.testing.assert_allclose(got.mean, want.mean, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(got.std, want.std, atol=1e-5, rtol=1e-5)
    steady = want.std > 1e-2
    np.testing.assert_allclose(got.pearson[steady], want.pearson[steady], atol=1e-4)


def test_only_what_follows_the_activation_is_read_in_it(vit):
    first, second = (Site("blocks.0.mlp", "mlp", 0, f"blocks.0.mlp.{name}", 24) for name in ("fc1", "fc2"))
    assert plain_mlp(vit, first) is None
    assert plain_mlp(vit, second) is vit.blocks[0].mlp


def test_names_of_activations():
    assert activation_name(torch.nn.GELU()) == "gelu"
    assert activation_name(torch.nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert activation_name(timm.layers.GELUTanh()) == "gelu_tanh"
    assert activation_name(timm.layers.QuickGELU()) is None
    assert activation_name(torch.nn.LeakyReLU()) is None


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("eva02_tiny_patch14_224", {"img_size": 28, "patch_size": 7, "depth": 2}),  # gated
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 16, "depth": 2, "proj_drop_rate": 0.5}),  # trained
    ],
)
def test_other_mlps_are_read_by_a_hook(name, settings):
    model = timm.create_model(name, **settings)
    model.train()
    assert all(plain_mlp(model, site) is None for site in mlp_sites(model))
    model.eval()
    assert (plain_mlp(model, mlp_sites(model)[0]) is None) == name.startswith("eva02")


def test_dropout_that_becomes_active_is_told(batches):
    model = make_vit(proj_drop_rate=0.5)
    with Tracer(model, LABEL):
        model.train()
        text = one_line(ModelError, model, batches[0][0])
    assert "dropout after an activation" in text
    model(batches[0][0])  # as before


def test_everything_is_back_after_an_exception(vit, batches):
    before = [block.mlp.act for block in vit.blocks]
    with pytest.raises(RuntimeError, match="mine"), Tracer(vit, LABEL):
        raise RuntimeError("mine")
    with pytest.raises(TypeError), Tracer(vit, LABEL):
        vit.forward_head(vit.blocks(torch.randn(2, 17, 24)), "no such argument", 3)
    assert [block.mlp.act for block in vit.blocks] == before
    assert not any(module._forward_pre_hooks for module in vit.modules())


def test_a_context_that_cannot_be_entered_leaves_nothing(vit, monkeypatch):
    tracer = Tracer(vit, LABEL)
    before = [block.mlp.act for block in vit.blocks]
    monkeypatch.delattr(vit.blocks[2], "mlp")
    with pytest.raises(AttributeError), tracer:
        pass
    assert [block.mlp.act for block in vit.blocks[:2]] == before[:2]
    assert not any(module._forward_pre_hooks for module in vit.modules())


def test_an_ablation_around_a_trace_is_traced_and_one_inside_is_not(vit, batches):
    skill = Skill("s", {"blocks.1.mlp": [4]})
    with skillfast.ablate(vit, skill), pytest.warns(RuntimeWarning, match="constant_neuron"):
        around = counted(Tracer(vit, LABEL), vit, batches)
    tracer = Tracer(vit, LABEL)
    with tracer, skillfast.ablate(vit, skill), torch.no_grad():
        for x, y in batches:
            vit(x)
            tracer.step(label=y)
    inside = tracer.compute()
    assert around["blocks.1.mlp"].mean[4] == 0
    assert inside["blocks.1.mlp"].mean[4] != 0


def test_a_copy_of_a_traced_model_is_not_traced(vit, batches):
    before = [block.mlp.act for block in vit.blocks]
    with Tracer(vit, LABEL, sites=("mlp",)) as tracer, torch.no_grad():
        copied = copy.deepcopy(vit)
        assert [type(block.mlp.act) for block in copied.blocks] == [type(act) for act in before]
        wanted = vit(batches[0][0])
        tracer.discard()
        torch.testing.assert_close(copied(batches[0][0]), wanted)


def test_gradients_pass_a_traced_model(vit, batches):
    images = batches[0][0].clone().requires_grad_()
    vit(images).sum().backward()
    want, images.grad = images.grad, None
    with Tracer(vit, LABEL) as tracer:
        vit(images).sum().backward()
        tracer.discard()
    torch.testing.assert_close(images.grad, want)


def test_models_compiled_in_place_are_refused(vit):
    vit.blocks[1].compile()
    text = one_line(ModelError, Tracer, vit, LABEL)
    assert "got blocks.1 compiled by its .compile()" in text


@pytest.mark.parametrize("pool", ["mean", "max", "cls", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(vit, batches, pool, side):
    """An example alone, and the same one beside padding whose activations are poisoned."""
    images, labels = batches[0]
    tokens = vit.pos_embed.shape[1]
    mask = torch.ones(len(images), tokens + 3, dtype=torch.bool)
    padded = slice(0, 3) if side == "left" else slice(tokens, tokens + 3)
    mask[:, padded] = False

    class Padded(torch.nn.Module):
        """The model with three more tokens in its blocks' MLPs, on one side."""

        def __init__(self, blocks):
            super().__init__()
            self.blocks = blocks

        def forward(self, x):
            for block in self.blocks:
                block.mlp(x)
            return x

    rows = torch.randn(len(images), tokens, 24)
    filled = torch.full((len(images), tokens + 3, 24), 50.0)
    filled[mask] = rows.flatten(0, 1)
    model = Padded(vit.blocks).eval()
    scores = []
    for x, known in ((rows, None), (filled, mask)):
        tracer = Tracer(model, LABEL, sites=("mlp",), pool=pool)
        with tracer, torch.no_grad():
            tracer.expect(known)
            model(x)
            tracer.step(label=labels)
        scores.append(tracer.compute())
    np.testing.assert_allclose(scores[1].mean, scores[0].mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scores[1].std, scores[0].std, rtol=1e-4, atol=1e-6)


def test_expect_refuses(vit, batches):
    tracer = Tracer(vit, {**LABEL, "loss": Continuous()})
    images, labels = batches[0]
    with tracer, torch.no_grad():
        assert "got depth" in one_line(ArgumentError, tracer.expect, depth=labels)
        assert "expected [batch, tokens], got shape [5]" in one_line(ArgumentError, tracer.expect, torch.ones(5))
        tracer.expect(torch.ones(len(images), 3))
        assert "give the mask of what runs through the blocks" in one_line(ArgumentError, vit, images)
        tracer.discard()
        tracer.expect(label=labels)
        vit(images)
        with pytest.raises(ModelError, match="expect: expected step"):
            tracer.expect(label=labels)
        tracer.step(loss=torch.rand(len(images)))
    assert tracer.n_observations == len(images)
