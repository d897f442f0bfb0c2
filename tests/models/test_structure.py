"""Output projections found by structure: the residual stream, what writes to it, and what does not certify."""

from __future__ import annotations

import pytest
import torch
from conftest import make_vit, one_line
from torch import nn

import skillfast
from skillfast.errors import ModelError
from skillfast.models.coverage import graph_of, randomise
from skillfast.models.sites import DECLARED, find_sites
from skillfast.models.structure import stream_of


class Block(nn.Module):
    """Attention, a gated MLP whose gate multiplies what is written, and a convolution that writes, too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.look = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "back": nn.Linear(width, width)})
        self.wide = nn.ModuleDict({"a": nn.Linear(width, 20), "b": nn.Linear(20, width, bias=False)})
        self.gate = nn.Linear(width, width)
        self.local = nn.Conv1d(width, width, 3, padding=1, groups=width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.look["qkv"](x).chunk(3, -1)
        x = x + self.look["back"](nn.functional.scaled_dot_product_attention(q, k, v))
        x = x + self.gate(x).sigmoid() * self.wide["b"](self.wide["a"](x).relu())
        return x + self.local(x.transpose(1, 2)).transpose(1, 2)


class Unknown(nn.Module):
    """Two stages of blocks of no family, with a wider stream after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.first = nn.ModuleList(Block(8) for _ in range(2))
        self.widen = nn.Linear(8, 12)
        self.second = nn.ModuleList(Block(12) for _ in range(2))
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.first:
            x = block(x)
        x = self.widen(x)
        for block in self.second:
            x = block(x)
        return self.head(x.mean(1))


def unknown() -> tuple[nn.Module, torch.Tensor]:
    model = Unknown().eval()
    randomise(model)
    return model, torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0))


def test_what_writes_to_the_stream_is_found_and_declared():
    model, x = unknown()
    assert "skillfast.discover(model, batch)" in one_line(ModelError, find_sites, model)
    sites = skillfast.discover(model, x)
    kinds = {("look.back", "attn"), ("wide.b", "mlp"), ("local", "mlp")}
    want = {(f"{stage}.{i}.{path}", kind) for stage in ("first", "second") for i in range(2) for path, kind in kinds}
    assert {(site.path, site.kind) for site in sites} == want | {("head", "head")}  # the gate is none
    assert [site.name for site in sites][:4] == ["blocks.0.attn", "blocks.0.mlp", "blocks.0.mlp_2", "blocks.1.attn"]
    assert find_sites(model) == sites
    assert skillfast.coverage(model, x).complete


def test_the_stream_is_the_way_through_the_fewest_matrices():
    model, x = unknown()
    with graph_of(model, x) as (outputs, source):
        assert stream_of(model, outputs, source) == {"stem.weight", "widen.weight", "head.weight"}


def test_what_is_found_in_a_known_family_is_what_is_known():
    model = make_vit()
    known = find_sites(model)
    assert skillfast.discover(model) == known


class Hidden(Unknown):
    """A matrix that is no module's writes to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.second[0].register_parameter("past", nn.Parameter(torch.zeros(12, 12)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.first:
            x = block(x)
        x = self.widen(x)
        x = x + x @ self.second[0].past
        for block in self.second:
            x = block(x)
        return self.head(x.mean(1))


def test_what_does_not_certify_is_shown_and_not_taken():
    model = Hidden().eval()
    randomise(model)
    text = one_line(ModelError, skillfast.discover, model, torch.randn(5, 7, 6))
    assert "first.*.look.back" in text
    assert "past them act second.*.past" in text
    assert not hasattr(model, DECLARED)


def test_models_whose_stream_is_cut_do_not_certify():
    """Two heads that are added: with the inputs of both at 0 nothing acts, which says nothing of the blocks."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.heads[0](self.a(x)) * self.heads[1](self.b(x).relu())

    model = Heads().eval()
    randomise(model)
    with pytest.raises(ModelError):
        skillfast.discover(model, torch.randn(4, 6))


def test_a_small_copys_sites_are_those_of_the_whole_model():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    with torch.device("meta"):
        model = transformers.XLMWithLMHeadModel(transformers.XLMConfig(n_layers=7))
    sites = skillfast.discover(model)
    assert sum(site.kind == "attn" for site in sites) == 7
    assert sum(site.kind == "mlp" for site in sites) == 7
