"""torch's own attention, whose projection is never called as a module, in its encoders and in torchvision's ViT."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import skillfast
from skillfast import Condition, Continuous, Skill
from skillfast.models.coverage import randomise
from skillfast.models.sites import find_sites


class Encoded(nn.Module):
    """A classifier around torch's encoder, tokens first or the batch first."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.num_classes, self.batch_first = 5, batch_first
        layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.batch_first:
            return self.head(self.encoder(x).mean(1))
        return self.head(self.encoder(x.transpose(0, 1)).mean(0))


def made(*, batch_first: bool) -> tuple[nn.Module, torch.Tensor]:
    model = Encoded(batch_first=batch_first).eval()
    randomise(model)
    return model, torch.randn(6, 7, 24, generator=torch.Generator().manual_seed(0))


def heads_of(layer: nn.TransformerEncoderLayer, x: torch.Tensor) -> torch.Tensor:
    """What the projection multiplies, by its formula: [batch, tokens, 24] of x [batch, tokens, 24]."""
    attention = layer.self_attn
    parts = functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (4, 6)).transpose(1, 2) for part in parts)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_encoder(batch_first):
    model, x = made(batch_first=batch_first)
    sites = find_sites(model)
    assert [site.name for site in sites] == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp", "head"]
    assert sites[0].heads == 4
    assert skillfast.coverage(model, x).complete
    y = torch.randn(6, generator=torch.Generator().manual_seed(1)).double()
    with skillfast.Tracer(model, {"y": Continuous()}, statistics=("pearson",)) as tracer, torch.no_grad():
        traced = model(x)
        tracer.step(y=y)
    want = heads_of(model.encoder.layers[0], x).detach().double().mean(1)
    found = torch.from_numpy(tracer.compute()["blocks.0.attn"].mean)
    torch.testing.assert_close(found, want.mean(0), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(traced, model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_first", [True, False])
def test_removals_in_torchs_encoder_equal_columns_of_zeros(batch_first):
    """A removed neuron is a column of the projection's weight that is 0."""
    model, x = made(batch_first=batch_first)
    removed = {"blocks.0.attn": torch.tensor([1, 9]), "blocks.1.mlp": torch.tensor([0, 30])}
    labels = torch.arange(6) % 5
    conditions = [Condition(Skill(name, {name: index})) for name, index in removed.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of forwards that cannot start in the middle
        result = skillfast.sweep(model, [(x, labels)], conditions, keep_margins=True)
    for name, index in removed.items():
        changed, _ = made(batch_first=batch_first)
        site = next(site for site in find_sites(changed) if site.name == name)
        with torch.no_grad():
            changed.get_parameter(f"{site.path}.weight")[:, index] = 0
            want = changed(x)
            with skillfast.ablate(model, Skill(name, {name: index})):
                torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
            own = functional.one_hot(labels, 5).bool()
            margins = want[own] - want.masked_fill(own, -torch.inf).amax(1)
        torch.testing.assert_close(torch.from_numpy(result.margins_of([name])[0]), margins, rtol=1e-3, atol=1e-4)


def test_contexts_nest_and_leave_the_module_as_it_was():
    model, x = made(batch_first=True)
    attention = model.encoder.layers[0].self_attn
    projection, before = attention.out_proj, dict(vars(attention))
    skill = Skill("any", {"blocks.0.attn": torch.tensor([2])})
    with torch.no_grad():
        intact = model(x)
        with skillfast.ablate(model, skill, scale=2.0):
            with skillfast.ablate(model, skill, scale=0.5):
                torch.testing.assert_close(model(x), intact, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(model(x), intact, atol=1e-4)
    assert vars(attention).keys() == before.keys()
    assert attention.out_proj is projection
    assert not projection._forward_pre_hooks


def test_torchvisions_vit():
    torchvision = pytest.importorskip("torchvision", reason="needs torchvision")
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, 24, 40, num_classes=5).eval()
    randomise(model)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert {site.kind for site in find_sites(model)} == {"attn", "mlp", "head"}
    assert skillfast.coverage(model).complete
    with torch.no_grad():
        intact = model(x)
        index = torch.tensor([3, 5])
        with skillfast.ablate(model, Skill("any", {"blocks.1.attn": index})):
            got = model(x)
        model.encoder.layers[1].self_attention.out_proj.weight[:, index] = 0
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got, intact, atol=1e-5)
