"""A skill's own parameters: what they are in each family, and that an optimiser changes nothing else."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import make_vit, one_line
from torch import nn

import skillfast
from skillfast import Skill
from skillfast.errors import ArgumentError, ModelError
from skillfast.models.activations import Activations
from skillfast.models.sites import find_sites
from skillfast.skills.tuning import _cut, _note


def true_in(mask: torch.Tensor) -> list[list[int]]:
    """For a matrix that is True in whole rows and whole columns: these rows, and these columns."""
    rows, columns = mask.all(1), mask.all(0)
    assert torch.equal(mask, rows[:, None] | columns)
    return [rows.nonzero()[:, 0].tolist(), columns.nonzero()[:, 0].tolist()]


def test_rows_and_columns_of_a_vision_transformer() -> None:
    model = make_vit()  # 3 heads of 8
    skill = Skill("deer", {"blocks.0.mlp": [5, 90], "blocks.1.attn": [3, *range(8, 16)], "head": [2]})
    masks = skillfast.skill_parameters(model, skill)
    first, last = "blocks.0.mlp.", "blocks.1.attn."
    assert true_in(masks[first + "fc1.weight"]) == [[5, 90], []]
    assert masks[first + "fc1.bias"].nonzero()[:, 0].tolist() == [5, 90]
    assert true_in(masks[first + "fc2.weight"]) == [[], [5, 90]]
    assert true_in(masks[last + "proj.weight"]) == [[], [3, *range(8, 16)]]
    # Values of each neuron; queries and keys of the head that is whole in the skill.
    made = [*range(8, 16), *range(24 + 8, 24 + 16), 48 + 3, *range(48 + 8, 48 + 16)]
    assert true_in(masks[last + "qkv.weight"]) == [made, []]
    assert true_in(masks["head.weight"]) == [[], [2]]
    assert masks["norm.weight"].nonzero()[:, 0].tolist() == [2]
    assert masks[last + "qkv.bias"].nonzero()[:, 0].tolist() == made
    of_block = [last + "qkv.weight", last + "qkv.bias", last + "proj.weight"]
    rest = ["norm.weight", "norm.bias", "head.weight"]
    assert masks.keys() == {first + "fc1.weight", first + "fc1.bias", first + "fc2.weight", *of_block, *rest}
    assert skillfast.skill_parameters(model, skill, components=("head",)).keys() == {
        "norm.weight", "norm.bias", "head.weight",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:sites cover")
@pytest.mark.parametrize(
    "model_class", ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM"]
)
def test_language_models(model_class: str) -> None:
    transformers = pytest.importorskip("transformers")
    from tiny_models import GPT, SIZES

    sizes = GPT if model_class.startswith("GPT2") else {**SIZES, "num_local_experts": 4, "num_experts": 4}
    sizes = {**sizes, "num_experts_per_tok": 2, "moe_intermediate_size": 8} if "num_experts" in sizes else sizes
    made = getattr(transformers, model_class)
    torch.manual_seed(0)
    model = made(made.config_class(**sizes)).eval()
    sites = {site.name: site for site in find_sites(model)}
    ids = {"input_ids": torch.randint(4, 30, (6, 9), generator=torch.Generator().manual_seed(0))}
    if model_class.startswith("GPT2"):
        skill = Skill("deer", {"blocks.1.mlp": [5, 7], "blocks.0.attn": [2]})
        masks = skillfast.skill_parameters(model, skill, ids)
        inner = "transformer.h.1.mlp."  # [in, out]
        assert true_in(masks[inner + "c_fc.weight"]) == [[], [5, 7]]
        assert masks[inner + "c_fc.bias"].nonzero()[:, 0].tolist() == [5, 7]
        assert true_in(masks[inner + "c_proj.weight"]) == [[5, 7], []]
        assert true_in(masks["transformer.h.0.attn.c_attn.weight"]) == [[], [48 + 2]]
        shared = one_line(ModelError, skillfast.skill_parameters, model, Skill("deer", {"head": [1]}), ids)
        assert "lm_head.weight shared with transformer.wte.weight" in shared
    elif model_class.startswith("Llama"):
        # 4 query heads of 6, 2 of keys and values: neurons 1 and 7 are made by one row of the values.
        masks = skillfast.skill_parameters(model, Skill("deer", {"blocks.0.mlp": [3], "blocks.1.attn": [1, 7, 2]}), ids)
        inner = "model.layers.0.mlp."
        assert true_in(masks[inner + "gate_proj.weight"]) == true_in(masks[inner + "up_proj.weight"]) == [[3], []]
        assert true_in(masks[inner + "down_proj.weight"]) == [[], [3]]
        assert true_in(masks["model.layers.1.self_attn.v_proj.weight"]) == [[1], []]
        assert "model.layers.1.self_attn.q_proj.weight" not in masks
    else:
        site = next(site for site in sites.values() if site.kind == "expert")
        units = site.width // site.experts
        masks = skillfast.skill_parameters(model, Skill("deer", {site.name: [units + 2, 3 * units + 5]}), ids)
        inner = f"{site.path}."
        first, second = masks[inner + "gate_up_proj"], masks[inner + "down_proj"]
        if model_class.startswith("GptOss"):  # [in, out], gate and up in turn
            first, second = first.transpose(1, 2), second.transpose(1, 2)
            places = [[], [4, 5], [], [10, 11]]
        else:
            places = [[], [2, units + 2], [], [5, units + 5]]
        assert [true_in(each) for each in first] == [[rows, []] for rows in places]
        assert [true_in(each) for each in second] == [[[], c] for c in ([], [2], [], [5])]
        assert masks.keys() <= {inner + name for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj")}


class Convolutions(nn.Module):
    """Each kind of convolution makes neurons and reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.third = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.head = nn.Linear(4, 3)
        self.skillfast_sites = {"blocks.0.mlp": "second", "blocks.1.mlp": "third", "head": "head"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.third(self.second(self.first(x).tanh()).tanh()).tanh()
        return self.head(x.mean((2, 3)))


@pytest.mark.filterwarnings("ignore:sites cover")
def test_every_entry_is_what_changing_it_does() -> None:
    """A row is the skill's own if the output hears of its entries, and does not while the neurons are held."""
    torch.manual_seed(0)
    model, x = Convolutions().eval(), torch.randn(2, 3, 4, 4)
    x[:, 1] = 0  # entries that read it do nothing; they are of their rows all the same
    skill = Skill("deer", {"blocks.0.mlp": [1], "blocks.1.mlp": [0, 4], "head": [2]})
    before = torch.get_rng_state()
    masks = skillfast.skill_parameters(model, skill, x)
    assert torch.equal(torch.get_rng_state(), before)  # it draws, but not from what others draw from
    model, x, paths = model.double(), x.double(), {site.name: site.path for site in find_sites(model)}
    seen: dict[str, torch.Tensor] = {}

    def note(_: nn.Module, args: tuple[torch.Tensor, ...], name: str) -> None:
        seen[name] = args[0].clone()

    def held(_: nn.Module, args: tuple[torch.Tensor, ...], name: str) -> torch.Tensor:
        values = args[0].clone()
        values[:, skill.neurons[name]] = seen[name][:, skill.neurons[name]]
        return values

    def hook(called: Any) -> list[Any]:
        return [
            model.get_submodule(paths[name]).register_forward_pre_hook(lambda m, args, name=name: called(m, args, name))
            for name in skill.neurons
        ]

    def entries_heard() -> dict[str, torch.Tensor]:
        found, before = {}, model(x)
        for name, parameter in model.named_parameters():
            heard = torch.zeros(parameter.numel(), dtype=torch.bool)
            for i in range(parameter.numel()):
                parameter.view(-1)[i] += 0.5
                heard[i] = (model(x) - before).abs().max() > 1e-9
                parameter.view(-1)[i] -= 0.5
            found[name] = heard.view_as(parameter)
        return found

    with torch.no_grad():
        handles = hook(note)
        model(x)
        for handle in handles:
            handle.remove()
        acting = entries_heard()
        hook(held)
        past = entries_heard()
    inputs = {"first": (1, 2, 3), "second": (1, 2, 3), "third": (0, 2, 3), "head": (1,)}
    expected = {}
    for name, parameter in model.named_parameters():
        own, other = acting[name], past[name]
        if name.endswith("weight"):
            along = inputs[name.partition(".")[0]]
            own, other = (each.any(along, keepdim=True).expand_as(parameter) for each in (own, other))
        expected[name] = own & ~other
    expected["second.weight"][:3, 1] = True  # the neurons' columns; 1 is in the first of two groups
    expected["third.weight"][[0, 4]] = expected["head.weight"][:, 2] = True
    assert masks.keys() == {name for name, mask in expected.items() if mask.any()}
    for name, mask in masks.items():
        assert torch.equal(mask, expected[name]), name


def test_neurons_that_are_silent_are_counted() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    model.skillfast_sites = {"blocks.0.mlp": "2"}
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.copy_(torch.tensor([1.0, 1.0, -100.0, 1.0]))
    skill = Skill("deer", {"blocks.0.mlp": [1, 2]})
    with pytest.warns(RuntimeWarning, match="1 of the 2 neurons of skill 'deer' are 0 on this batch"):
        masks = skillfast.skill_parameters(model, skill, torch.rand(5, 3))
    assert true_in(masks["0.weight"]) == [[1], []]
    assert true_in(masks["2.weight"]) == [[], [1, 2]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = skillfast.skill_parameters(model, skill, 1000 * torch.rand(5, 3))
    assert true_in(masks["0.weight"]) == [[1, 2], []]
    (site,), zero = [site for site in find_sites(model) if site.name == "blocks.0.mlp"], {}
    for seen in ([[0.0, 0, 1, 0]], [[0.0, 2, 0, 0]]):  # of two calls in one forward
        _note(zero, site, Activations(torch.tensor(seen)))
    assert zero[site.name].tolist() == [True, False, False, True]
    values = torch.randn(2, 4, requires_grad=True)
    cut = _cut(site, torch.tensor([1, 2]), Activations(values))
    assert torch.equal(cut, values)
    cut.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1, 0, 0, 1]] * 2


@pytest.mark.parametrize("optimiser", ["AdamW", "SGD"])
def test_an_optimiser_changes_nothing_else(optimiser: str) -> None:
    model = make_vit()
    skill = Skill("deer", {"blocks.0.mlp": [5, 90], "blocks.1.attn": [3], "head": [2]})
    masks = skillfast.skill_parameters(model, skill)
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    settings: dict[str, Any] = {"momentum": 0.9} if optimiser == "SGD" else {}
    made = getattr(torch.optim, optimiser)(model.parameters(), lr=0.01, weight_decay=0.1, **settings)
    model.blocks[2].attn.qkv.bias.requires_grad_(False)

    def steps(count: int) -> None:
        for _ in range(count):
            made.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            made.step()

    steps(2)  # leaves momentum, and gradients
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with skillfast.tune_only(model, masks):
        for name, parameter in model.named_parameters():  # gradients of the last step, which made.step() takes again
            assert parameter.grad is None if name not in masks else not parameter.grad[~masks[name]].any()
        made.step()
        steps(3)
    for name, parameter in model.named_parameters():
        changed = parameter != before[name]
        mask = masks.get(name, torch.zeros_like(changed))
        assert not (changed & ~mask).any(), name
        if name in masks:
            assert (changed & mask).float().sum() >= 0.9 * mask.sum(), name
        assert parameter.requires_grad == (name != "blocks.2.attn.qkv.bias")
    steps(1)
    assert all(model.get_parameter(name).grad[~mask].any() for name, mask in masks.items() if not mask.all())
    assert all(
        (parameter != before[name]).any() for name, parameter in model.named_parameters() if parameter.requires_grad
    )


def test_what_does_not_fit_is_told_in_one_line() -> None:
    model = make_vit()
    masks = {"head.weight": torch.zeros(3, 3, dtype=torch.bool)}
    text = one_line(ArgumentError, lambda: skillfast.tune_only(model, masks).__enter__())
    assert "got torch.bool [3, 3] for 'head.weight'" in text
    for skill, words in (
        (Skill("deer", {"blocks.0.mlp": [96]}), "expected indices below 96 in blocks.0.mlp, got 96"),
        (Skill("deer", {"blocks.9.mlp": [0]}), "expected sites that the model has, got 'blocks.9.mlp'"),
        (Skill("deer", {"head": [0]}, fingerprint="another"), "got one of another"),
    ):
        assert words in one_line(ArgumentError, skillfast.skill_parameters, model, skill)
    skill = Skill("deer", {"head": [0]})
    assert "it is in head" in one_line(ArgumentError, skillfast.skill_parameters, model, skill, components=("mlp",))
