"""Routed experts of every family that is built from a small configuration, on every implementation."""

from __future__ import annotations

import copy
import dataclasses
import re
from functools import cache, partial

import numpy as np
import pytest
import torch
from conftest import one_line
from packaging.version import Version
from torch import nn

import skillfast
from skillfast import Condition, Continuous, Skill
from skillfast.ablation.interventions import Interventions
from skillfast.errors import ArgumentError, ModelError
from skillfast.models import shrink
from skillfast.models.activations import RoutedActivations
from skillfast.models.columns import written
from skillfast.models.coverage import randomise
from skillfast.models.sites import find_sites, router_of
from skillfast.skills.attribution import log_odds

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.filterwarnings("ignore:some scores are not defined")

# configuration -> class of the model, and settings that have no default or leave too little to be routed
FAMILIES = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {"num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {}),
    "gpt_oss": ("GptOssForCausalLM", {}),  # biases, transposed, interleaved
    "glm4_moe": ("Glm4MoeForCausalLM", {}),
    "olmoe": ("OlmoeForCausalLM", {}),
    "phimoe": ("PhimoeForCausalLM", {}),
    "granitemoe": ("GraniteMoeForCausalLM", {}),
    "minimax": ("MiniMaxForCausalLM", {}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {}),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {}),
    "nemotron_h": ("NemotronHForCausalLM", {}),  # no gate in the experts
    "dots1": ("Dots1ForCausalLM", {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}),
    "flex_olmo": ("FlexOlmoForCausalLM", {}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {"head_dim": 16, "num_experts": 4, "moe_topk": 2}),
    "lfm2_moe": ("Lfm2MoeForCausalLM", {"layer_types": ["full_attention"] * 4, "num_hidden_layers": 4}),
    "longcat_flash": ("LongcatFlashForCausalLM", {}),  # experts that compute nothing
    "llama4_text": ("Llama4ForCausalLM", {}),  # code of its own, gates on the inputs
    "dbrx": (  # code of its own, weights in two dimensions
        "DbrxForCausalLM",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "vocab_size": 256,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
}
# of their own code, too: experts of attention beside those of the MLP; of encoders and decoders
FAMILIES |= {
    "jetmoe": ("JetMoeForCausalLM", {}),
    "nllb-moe": ("NllbMoeForConditionalGeneration", {"num_experts": 2}),
    "switch_transformers": ("SwitchTransformersForConditionalGeneration", {}),
}
FAMILIES |= {
    family: (f"{name}ForCausalLM", {})
    for family, name in {
        "afmoe": "Afmoe", "aria_text": "AriaText", "axk1": "AXK1", "axk2": "AXK2", "beam": "Beam",
        "cohere2_moe": "Cohere2Moe", "deepseek_v32": "DeepseekV32", "deepseek_v4": "DeepseekV4",
        "exaone_moe": "ExaoneMoe", "flint": "Flint", "glm4_moe_lite": "Glm4MoeLite", "glm_moe_dsa": "GlmMoeDsa",
        "granitemoe_swa": "GraniteMoeSWA", "granitemoehybrid": "GraniteMoeHybrid",
        "granitemoeshared": "GraniteMoeShared", "hy_v3": "HYV3", "hy_v4": "HYV4", "jamba": "Jamba",
        "kolibri1": "Kolibri1", "laguna": "Laguna", "lara_mini": "LaraMini", "mellum": "Mellum",
        "mimo_v2_flash": "MiMoV2Flash", "minimax_m3_vl_text": "MiniMaxM3VL", "qwen3_5_moe_text": "Qwen3_5Moe",
        "qwen3_next": "Qwen3Next", "sarvam_mla": "DeepseekV3", "sarvam_moe": "Glm4Moe", "solar_open": "SolarOpen",
        "zaya": "Zaya",
    }.items()
}  # fmt: skip
SHORT = {  # Inkling's layers of either type
    "layer_types": ["hybrid_sliding", "hybrid"], "num_hidden_layers": 2, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "swa_head_dim": 16, "vocab_size": 256, "unpadded_vocab_size": 256,
}  # fmt: skip
FAMILIES |= {
    "inkling_text": ("InklingForCausalLM", SHORT | {"mlp_layer_types": ["sparse"] * 2}),
    "inkling2_text": ("Inkling2ForCausalLM", SHORT | {"n_layers_per_attn_res_block": 1}),
}
TWO = {"num_hidden_layers": 2, "mlp_layer_types": ["sparse"] * 2}
LINEAR = TWO | {"layer_types": ["linear_attention", "full_attention"]}
FAMILIES |= {
    "kimi_linear": ("KimiLinearForCausalLM", LINEAR),
    "bailing_hybrid": ("BailingHybridForCausalLM", LINEAR | {"layer_group_size": 2}),
    "dots3_note_text": (
        "Dots3NoteForCausalLM", TWO | {"layer_types": ["indexed_attention"] * 2, "per_layer_config": {}},
    ),
}  # fmt: skip
# what the certificate names of a family that is not whole
NOT_WHOLE = {
    **dict.fromkeys(("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4"), r"\.self_attn\.indexer\."),
    "deepseek_v4": r"\.(?:attn_hc|ffn_hc)\.fn$|\.self_attn\.compressor\.",
    "inkling_text": r"\.mlp\.(?:shared_experts\.\w+|gate)$|\.mlp_sconv\.",
    "phimoe": r"\.mlp\.router$",  # its gates are 1
}
BACKENDS = ("eager", "grouped_mm", "batched_mm")
OWN_CODE = ("longcat_flash", "dbrx", "llama4_text", "jetmoe", "nllb-moe", "switch_transformers")
if Version(transformers.__version__) < Version("5.24"):
    OWN_CODE += ("granitemoe", "granitemoehybrid", "granitemoeshared")
CASES = [
    pytest.param(family, backend, id=f"{family}-{backend}")
    for family in FAMILIES
    for backend in (BACKENDS if family not in OWN_CODE else ("eager",))
]
_MADE: dict[str, tuple[nn.Module, dict[str, torch.Tensor]]] = {}


def made(family: str, backend: str | None = None) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small model and inputs, made once; a copy where its experts are computed otherwise."""
    if family not in _MADE:
        model_class, settings = FAMILIES[family]
        if family not in transformers.CONFIG_MAPPING or not hasattr(transformers, model_class):
            pytest.skip(f"this transformers has no {family}, {model_class}")
        older = Version(transformers.__version__) < Version("5.24")
        if family == "dbrx" and older:
            pytest.skip("DBRX's experts multiply by the transposed weights, as published, in later versions only")
        if family == "aria_text" and older:
            pytest.skip("Aria's experts have code of their own in earlier versions, of which skillfast knows nothing")
        with torch.device("meta"):
            whole = getattr(transformers, model_class)(transformers.AutoConfig.for_model(family, **settings))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shrink, "LAYERS", 2)
            patch.setattr(shrink, "TOKENS", 10)
            model, inputs = shrink.shrunk(whole)
        randomise(model, seed=3 if family == "switch_transformers" else 0)  # so that every expert is reached
        for name, table in model.named_buffers():
            if name.endswith("tid2eid"):  # DeepSeek V4's experts of each token, 0 unless they are loaded
                table.copy_((torch.arange(len(table))[:, None] + torch.arange(table.shape[1])) % 4)
        for site in find_sites(model):
            if site.kind == "expert":
                for weight in model.get_submodule(site.path).parameters():
                    large = weight.dim() > (1 if family in ("nllb-moe", "switch_transformers") else 2)
                    weight.data.mul_((64 if "output" in site.path else 8) if large else 1)  # so that experts matter
        _MADE[family] = model.requires_grad_(False), inputs
    model, inputs = _MADE[family]
    if family not in OWN_CODE:
        model.set_experts_implementation(backend or "grouped_mm")
    return model, inputs


def plain_inputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Path of the experts -> hidden states, experts and gates that a plain forward gives them.

    Where inputs are scaled by the gates, hidden states are those of all experts of a token beside each other. Behind
    a path and a colon is what the router says where the experts that compute are others; JetMoe's attention gives what
    its experts project instead of hidden states.
    """
    seen = {}

    def sort(router: nn.Module, args: tuple[torch.Tensor, ...], output: tuple, path: str) -> None:
        orders[path], _, sorted_gates, sizes, _ = output
        back = orders[path].argsort()
        experts = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        seen[path] = (args[0], *(rows[back].view(-1, router.top_k) for rows in (experts, sorted_gates)))

    def project(last: nn.Module, args: tuple[torch.Tensor, ...], path: str) -> None:
        rows = args[0][orders[path].argsort()]  # slots of a token beside each other
        seen[path] = (rows.view(*seen[path][1].shape, -1), *seen[path][1:])

    def keep(experts: nn.Module, args: tuple[torch.Tensor, ...], path: str) -> None:
        if len(args) == 1:
            given = args[0].view(experts.num_experts, -1, args[0].shape[-1]).transpose(0, 1)  # [tokens, experts, H]
            k = model.config.num_experts_per_tok
            index = given.abs().sum(-1).topk(k, -1).indices
            assert int((given != 0).any(-1).sum()) == index.numel()
            args = (given.flatten(1), index, torch.ones(index.shape))
        elif isinstance(experts, nn.ModuleDict):
            hidden, chosen, gates = args
            n = experts.num_experts
            if chosen.dim() == 3:  # Switch Transformers: one-hot
                args = (hidden, torch.where(chosen.sum(-1) > 0, chosen.argmax(-1), n), gates)
            else:  # NLLB-MoE, which takes the mask of a token's first expert for numbers of experts
                seen[f"{path}:"] = (hidden, torch.arange(n).expand_as(gates).masked_fill(gates == 0, n), gates)
                args = (hidden, chosen.masked_fill(gates == 0, n), gates)
        seen[path] = args

    orders: dict[str, torch.Tensor] = {}
    handles = []
    for path in [site.path for site in find_sites(model) if site.kind == "expert"]:
        module = model.get_submodule(path)
        if not path.endswith("output_linear"):
            handles.append(module.register_forward_pre_hook(lambda m, args, path=path: keep(m, args, path)))
            continue
        router = model.get_submodule(path.rpartition(".")[0]).router
        handles.append(router.register_forward_hook(lambda m, args, out, path=path: sort(m, args, out, path)))
        if "attention" in path:
            handles.append(module.register_forward_pre_hook(lambda m, args, path=path: project(m, args, path)))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def transposed(experts: nn.Module) -> bool:
    """Whether weights of experts are [experts, in, out]."""
    return getattr(experts, "is_transposed", type(experts).__name__ == "Llama4TextExperts")


def down_projections(experts: nn.Module) -> list[torch.Tensor]:
    """[hidden, units] of each expert, views of the weights."""
    if hasattr(experts, "mlp"):  # DBRX
        return list(experts.mlp.w2.data.view(experts.num_experts, -1, experts.hidden_size).transpose(1, 2))
    if isinstance(experts, nn.ModuleDict):
        each = [experts[f"expert_{expert}"] for expert in range(experts.num_experts)]
        return [(expert.fc2 if hasattr(expert, "fc2") else expert.wo).weight.data for expert in each]
    if hasattr(experts, "output_size"):  # JetMoe
        return list(experts.weight.data)
    weights = experts.down_proj.data
    return list(weights.transpose(1, 2) if transposed(experts) else weights)


def plain_reading(
    experts: nn.Module, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor, mixture: nn.Module | None = None
) -> np.ndarray:
    """gate x activation [tokens, experts, units] of each expert's down projection, row by row.

    `mixture` is the module around the down projections.
    """
    n = len(down_projections(experts))
    found = np.zeros((len(index), n, down_projections(experts)[0].shape[1]))
    if isinstance(experts, nn.ModuleDict) or hasattr(experts, "output_size"):
        for token, slots in enumerate(index.tolist()):
            for slot, expert in enumerate(slots):
                if expert < n:
                    if hasattr(mixture, "activation"):
                        gate, up = (hidden[token] @ mixture.input_linear.weight[expert].T).chunk(2)
                        x = mixture.activation(gate) * up
                    elif hasattr(experts, "output_size"):  # of attention
                        x = hidden[token].view(len(slots), -1)[slot]
                    else:
                        one = experts[f"expert_{expert}"]
                        x = one.act(one.fc1(hidden[token]) if hasattr(one, "fc1") else one.wi(hidden[token]))
                    found[token, expert] += (gates[token, slot] * x).numpy()
        return found
    if hasattr(experts, "mlp"):  # DBRX
        parts = [weight.view(n, -1, hidden.shape[-1]) for weight in (experts.mlp.w1, experts.mlp.v1)]
        first, act = torch.cat(parts, 1), experts.mlp.activation_fn
    else:
        first = experts.gate_up_proj if hasattr(experts, "gate_up_proj") else experts.up_proj
        act = getattr(experts, "act_fn", None)
    for expert in range(n):
        token, slot = (index == expert).nonzero(as_tuple=True)
        weight = first[expert] if transposed(experts) else first[expert].T
        given = hidden if hidden.shape[1] == len(weight) else hidden.view(len(hidden), n, -1)[:, expert]
        x = given[token] @ weight
        if getattr(experts, "has_bias", False):
            x = x + experts.gate_up_proj_bias[expert]
        if hasattr(experts, "_apply_gate") and getattr(experts, "has_gate", True):
            x = experts._apply_gate(x)
        elif hasattr(experts, "up_proj"):
            x = act(x)
        else:
            gate, up = x.chunk(2, -1)
            x = act(gate) * up
        found[token, expert] = (gates[token, slot, None] * x).numpy()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sites_of_experts_hold_all_that_they_do(family):
    model, inputs = made(family)
    kinds = {site.kind for site in find_sites(model)}
    assert ({"expert", "router"} if family != "llama4_text" else {"expert"}) <= kinds
    found = skillfast.coverage(model, inputs)
    named = [*found.missing, *found.unexercised]
    assert bool(named) == (family in NOT_WHOLE), found
    assert all(re.search(NOT_WHOLE[family], name) for name in named), found


def check_share(found: skillfast.NeuronScores, index: torch.Tensor, mask: torch.Tensor, y: torch.Tensor) -> None:
    """The share of each example's tokens at each expert, against the choices of a plain forward."""
    here = torch.stack([(index == expert).any(1) for expert in range(found.n_neurons)], 1).view(*mask.shape, -1)
    share = ((here & mask[:, :, None]).sum(1) / mask.sum(1)[:, None]).double().numpy()
    np.testing.assert_allclose(found.mean, share.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.std, share.std(0), atol=1e-6)
    for expert in np.flatnonzero(share.std(0) > 1e-3):
        assert found.pearson[expert, 0] == pytest.approx(np.corrcoef(share[:, expert], y.numpy())[0, 1], abs=1e-5)


def test_shares_of_tokens_at_experts_are_of_what_is_pooled_and_are_kept(tmp_path):
    """Of the last real token's experts with `pool="last"`; a skill of them is of the routers' neurons."""
    model, inputs = made("qwen3_moe", "grouped_mm")
    seen = plain_inputs(model, inputs)
    mask = torch.ones(inputs["input_ids"].shape, dtype=torch.bool)
    mask[1, 5:] = False
    scores = {}
    for pool, y in (("last", torch.tensor([0.3, -1.0, 2.0, 0.5])), ("max", torch.tensor([1.0, 2.0, 4.0, 3.0]))):
        with torch.no_grad(), skillfast.Tracer(model, {"y": Continuous()}, sites=["expert"], pool=pool) as tracer:
            tracer.expect(mask)
            model(**inputs)
            tracer.step(y=y)
        scores = tracer.compute()
        assert {site.kind for site in scores.sites} == {"expert"}
        last = mask & (mask.cumsum(1) == mask.sum(1)[:, None])
        for site in scores.sites:
            index = seen[site.path][1]
            check_share(scores.routed[f"blocks.{site.block}.router"], index, last if pool == "last" else mask, y)
    scores.save(tmp_path)
    loaded = skillfast.NeuronScores.load(tmp_path)
    assert loaded.routed.sites == scores.routed.sites
    for name, array in scores.routed.arrays().items():
        np.testing.assert_array_equal(loaded.routed.arrays()[name], array)
    assert loaded.arrays().keys() == scores.arrays().keys()
    skill = skillfast.select(loaded.routed, method="pearson", share=0.25)["y"]
    assert set(skill.neurons) <= {site.name for site in find_sites(model) if site.kind == "router"}
    with skillfast.ablate(model, skill), torch.no_grad():
        model(**inputs)


@cache
def plain_rows(family: str) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    """Site -> gate x activation [tokens, neurons], the gates of a router; site -> the experts of each token."""
    model, inputs = made(family)
    seen = plain_inputs(model, inputs)
    rows, experts = {}, {}
    for site in find_sites(model):
        if site.kind == "expert":
            hidden, index, gates = seen[site.path]
            index = index.masked_fill(gates == 0, site.experts)  # a token that skips Zaya's experts has the first one
            module, mixture = (model.get_submodule(path) for path in (site.path, site.path.rpartition(".")[0]))
            rows[site.name] = plain_reading(module, hidden.reshape(len(index), -1), index, gates, mixture)
            experts[site.name] = index
        elif site.kind == "router":
            _, index, gates = seen.get(f"{site.path}:", seen[site.path])
            rows[site.name] = np.zeros((len(index), site.width))
            for slot in range(index.shape[1]):
                own = index[:, slot].numpy()
                real = own < site.width
                rows[site.name][np.flatnonzero(real), own[real]] += gates[:, slot].numpy()[real]
    return rows, experts


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_traced_values_equal_a_plain_reading(family, backend):
    """Means, deviations and correlations of all experts' units and of the gates, padding left out."""
    rows, experts = plain_rows(family)
    model, inputs = made(family, backend)
    batch, tokens = inputs["input_ids"].shape
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[1, 5:] = False
    y = torch.tensor([0.3, -1.0, 2.0, 0.5])
    with torch.no_grad():
        intact = model(**inputs).logits
        with skillfast.Tracer(model, {"y": Continuous()}, sites=[*rows], statistics=["pearson"]) as tracer:
            tracer.expect(mask)
            traced = model(**inputs).logits
            tracer.step(y=y)
    assert torch.equal(intact, traced)
    scores = tracer.compute()
    assert {site.name for site in scores.sites} == {*rows}
    for site in scores.sites:
        if site.kind == "expert":
            check_share(scores.routed[router_of(site).name], experts[site.name], mask, y)
        each = rows[site.name].reshape(batch, tokens, -1) * mask.numpy()[:, :, None]
        want = each.sum(1) / mask.sum(1).numpy()[:, None]
        found = scores[site.name]
        scale = np.abs(want).max()
        np.testing.assert_allclose(found.mean, want.mean(0), atol=1e-5 * scale)
        np.testing.assert_allclose(found.std, want.std(0), atol=1e-5 * scale)
        known = want.std(0) > 1e-3 * scale
        centred = want[:, known] - want[:, known].mean(0)
        covariance = centred.T @ (y - y.mean()).double().numpy() / batch
        expected = covariance / (want[:, known].std(0) * y.double().numpy().std())
        np.testing.assert_allclose(found.pearson[known, 0], expected, atol=2e-3)


@pytest.mark.parametrize("statistics", [("pearson",), ("pearson", "spearman")])
@pytest.mark.parametrize("known", ["before", "after"])
def test_tokens_are_observations_of_their_experts(known, statistics):
    """Each expert has its own tokens: r, mean and number of them against the rows, padding and few tokens left out."""
    model, inputs = made("qwen3_moe", "eager" if known == "before" else "grouped_mm")
    batch, tokens = inputs["input_ids"].shape
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[2, 3:] = False
    seen = plain_inputs(model, inputs)
    y = torch.randn(batch, tokens, generator=torch.Generator().manual_seed(5))
    y = y if known == "before" else y[:, :1].expand(-1, tokens)
    tracer = skillfast.Tracer(model, {"y": Continuous()}, pool="none", statistics=statistics)
    with torch.no_grad(), tracer:
        if known == "before":
            tracer.expect(mask, y=y)
            model(**inputs)
            tracer.step()
        else:
            tracer.expect(mask)
            model(**inputs)
            tracer.step(y=y[:, 0], valid=torch.arange(batch) != 3)
            mask[3] = False
    scores = tracer.compute()
    real, few = mask.flatten().numpy(), 0
    for site in scores.sites:
        found = scores[site.name]
        if site.kind != "expert":
            assert site.experts or found.n_routed.tolist() == [int(mask.sum())] * site.width
            continue
        hidden, index, gates = seen[site.path]
        each = plain_reading(model.get_submodule(site.path), hidden.reshape(len(index), -1), index, gates)
        for expert in range(site.experts):
            own = real & (index == expert).any(1).numpy()
            at = slice(expert * each.shape[2], (expert + 1) * each.shape[2])
            assert set(found.n_routed[at]) == {own.sum()}
            if own.sum() < 10:
                few += 1
                assert np.isnan(found.pearson[at]).all()
                assert found.spearman is None or np.isnan(found.spearman[at]).all()
                assert set(range(at.start, at.stop)) <= set(found.reasons["too_few_tokens"])
                continue
            x, values = each[own, expert], y.flatten().numpy()[own]
            np.testing.assert_allclose(found.mean[at], x.mean(0), atol=1e-5 * np.abs(x).max())
            unit = int(x.std(0).argmax())
            assert found.pearson[at][unit, 0] == pytest.approx(np.corrcoef(x[:, unit], values)[0, 1], abs=1e-3)
    assert few == 0 or "too_few_tokens" in scores.reasons


def chosen(model: nn.Module, kind: str = "expert") -> Skill:
    """Every third neuron of the sites of a kind."""
    return Skill("s", {site.name: range(0, site.width, 3) for site in find_sites(model) if site.kind == kind})


def edited(model: nn.Module, skill: Skill, scale: float) -> nn.Module:
    """A copy whose down projections hold the removal: what a unit feeds is scaled."""
    model = copy.deepcopy(model)
    for site in find_sites(model):
        if site.kind != "expert" or site.name not in skill.neurons:
            continue
        experts = model.get_submodule(site.path)
        units = site.width // site.experts
        for neuron in skill.neurons[site.name].tolist():
            expert, unit = divmod(neuron, units)
            down_projections(experts)[expert][:, unit].mul_(scale)
    return model


@cache
def edited_logits(family: str, scale: float) -> torch.Tensor:
    """Of a copy whose weights hold the change of `chosen`."""
    model, inputs = made(family)
    with torch.no_grad():
        return edited(model, chosen(model), scale)(**inputs).logits


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_removing_and_scaling_units_equal_edited_weights(family, backend):
    scales = (0.0, 1.5) if family in SWEPT else (0.0,)
    wanted = [edited_logits(family, scale) for scale in scales]
    model, inputs = made(family, backend)
    with torch.no_grad():
        intact = model(**inputs).logits
        for scale, want in zip(scales, wanted, strict=True):
            with skillfast.ablate(model, chosen(model), scale=scale):
                found = model(**inputs).logits
            assert float((found - want).abs().max()) < 1e-4 * float(want.abs().max())
            assert float((found - intact).abs().max()) > 5e-4 * float(want.abs().max())
        assert torch.equal(model(**inputs).logits, intact)


class LastToken(nn.Module):
    """A language model as a classifier: its logits of a few words after the last token."""

    num_classes = 5

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        decoder = {"decoder_input_ids": ids.flip(1)} if self.model.config.is_encoder_decoder else {}
        return self.model(input_ids=ids, use_cache=False, **decoder).logits[:, -1, : self.num_classes]


def batches(inputs: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(inputs["input_ids"], torch.tensor([0, 3, 1, 3]))]


SWEPT = ("qwen3_moe", "gpt_oss", "deepseek_v3", "longcat_flash", "jetmoe", "nllb-moe", "switch_transformers")


@pytest.mark.filterwarnings("ignore:sweep. . of . conditions run the whole forward")  # T5's blocks share a bias
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_equals_a_loop(family):
    classifier = LastToken(made(family)[0]).eval()
    loader = batches(made(family)[1])
    sites = [site for site in find_sites(classifier) if site.kind in ("expert", "router")]
    conditions = [
        Condition(Skill(site.name, {site.name: range(0, site.width, 2)}), scale=scale)
        for site in ((*sites[:2], *sites[3:]) if family in SWEPT else (sites[0], sites[-1]))
        for scale in ((0.0, 3.0) if family in SWEPT else (0.0,))
    ]
    result = skillfast.sweep(classifier, loader, conditions, keep_margins=True)
    images, labels = loader[0]
    for condition in conditions:
        with torch.no_grad(), skillfast.ablate(classifier, condition.skill, scale=condition.scale):
            logits = classifier(images)
        margins = skillfast.metrics.margin(logits, labels).numpy()
        np.testing.assert_allclose(
            result.margins_of([condition.name])[0], margins, atol=2e-4 * float(logits.abs().max())
        )
    assert len({tuple(row) for row in result.margins.round(5).tolist()}) == len(conditions)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attributions_equal_those_of_the_weights(backend):
    """A unit's gradient x activation is that of the weights it feeds, summed."""
    classifier = LastToken(made("gpt_oss", backend)[0]).eval()
    ids, labels = batches(made("gpt_oss", backend)[1])[0]
    found = skillfast.attribute(classifier, [(ids, labels)], sites=["expert", "router"])
    try:
        classifier.requires_grad_(True)
        for label in labels.unique().tolist():
            own = labels == label
            weights = {s.name: classifier.get_submodule(s.path).down_proj for s in found.sites if s.kind == "expert"}
            value = log_odds(classifier(ids[own]), labels[own]).mean()
            gradients = torch.autograd.grad(value, list(weights.values()))
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                want = (weight.detach() * gradient).sum(2).flatten()  # transposed: [experts, units, hidden]
                rows = found.values[found.site_slices()[name], label]
                np.testing.assert_allclose(rows, want.numpy(), atol=1e-5 * float(want.abs().max()))
    finally:
        classifier.requires_grad_(False)


def choice(family: str, gate: nn.Module, hidden: torch.Tensor, masked: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and gates of each token where some experts' logits are -inf, written out for a router of each sort."""
    logits = hidden @ gate.weight.T + (gate.bias if family == "gpt_oss" else 0)
    logits[:, masked] = -torch.inf
    if family in ("gpt_oss", "jetmoe"):
        values, index = logits.topk(gate.top_k, -1)
        return index, values.softmax(-1)
    if family == "nllb-moe":
        gates = logits.softmax(-1)
        gates = torch.where(gates >= gates.topk(2, -1).values[:, 1:], gates, 0)
        return torch.arange(4).expand_as(gates).masked_fill(gates == 0, 4), gates / gates.sum(-1, keepdim=True)
    if family == "switch_transformers":
        values, index = logits.softmax(-1).max(-1, keepdim=True)
        return index, values
    if family == "deepseek_v3":
        scores = logits.sigmoid()
        index = (
            (scores + gate.e_score_correction_bias).masked_fill(logits == -torch.inf, -torch.inf).topk(2, -1).indices
        )
        gates = scores.gather(1, index)
        return index, gates / gates.sum(-1, keepdim=True) * 2.5
    values, index = logits.softmax(-1).topk(gate.top_k, -1)
    return index, values / values.sum(-1, keepdim=True) if family == "mixtral" else values


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral", "jetmoe", "nllb-moe", "switch_transformers"]
)
def test_tokens_of_masked_experts_are_routed_anew(family):
    model, inputs = made(family) if family != "nllb-moe" else nllb_of_four()
    sites = [site for site in find_sites(model) if site.kind == "router" and "attn" not in site.name]
    skill = Skill("s", {site.name: [1, 2] for site in sites})
    with skillfast.ablate(model, skill, mode="reroute"):
        seen = plain_inputs(model, inputs)
    for site in sites:
        hidden, index, gates = seen.get(f"{site.path}:", seen[site.path])
        block = model.get_submodule(site.path.rpartition(".")[0])
        router = block.router if hasattr(block, "router") else block.gate
        router = next((getattr(router, name) for name in ("classifier", "layer") if hasattr(router, name)), router)
        if family == "jetmoe":
            router.top_k = block.router.top_k
        index_wanted, gates_wanted = choice(family, router, hidden.reshape(len(index), -1), [1, 2])
        assert torch.equal(index.sort(-1).values, index_wanted.sort(-1).values)
        torch.testing.assert_close(gates.sort(-1).values, gates_wanted.sort(-1).values)
    seen = plain_inputs(model, inputs)
    assert all((seen[site.path][1] == 1).any() for site in sites)


def nllb_of_four() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model of the NLLB-MoE family with four experts, of which transformers' code calls two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "nllb-moe", (FAMILIES["nllb-moe"][0], {"num_experts": 4}))
        patch.setattr(f"{__name__}._MADE", {})
        return made("nllb-moe")


def test_other_weights_are_tried_where_tokens_reach_no_expert(monkeypatch):
    with torch.device("meta"):
        model = transformers.SwitchTransformersForConditionalGeneration(transformers.SwitchTransformersConfig())
    assert skillfast.coverage(model).complete
    monkeypatch.setattr("skillfast.models.coverage._DRAWS", ())
    assert any(".experts." in name for name in skillfast.coverage(model).unexercised)


def test_no_parameter_holds_the_down_projections_of_experts_that_are_modules():
    model, _ = made("switch_transformers")
    site = next(site for site in find_sites(model) if site.kind == "expert")
    assert "expected the down projections of all experts in one parameter" in one_line(ModelError, written, model, site)


def test_experts_that_are_never_called_are_told():
    """NLLB-MoE's code takes a mask for numbers of experts: it calls the first two, whatever the router says."""
    model, inputs = nllb_of_four()
    found = skillfast.coverage(model, inputs)
    assert {name.split("ffn.experts.")[1] for name in found.unexercised} == {
        f"expert_{expert}.{part}" for expert in (2, 3) for part in ("fc1", "fc2")
    }
    assert not found.missing
    with torch.no_grad(), skillfast.Tracer(model, {"y": Continuous()}, sites=["expert"], pool="none") as tracer:
        tracer.expect(y=torch.arange(float(inputs["input_ids"].numel())).view(inputs["input_ids"].shape))
        model(**inputs)
        tracer.step()
    scores = tracer.compute()
    tokens = inputs["input_ids"].numel()
    for site in scores.sites:  # a token's first expert is taken for the second one, its second for the first one
        assert scores[site.name].n_routed.reshape(4, -1)[:, 0].tolist() == [tokens, tokens, 0, 0]


def test_a_sweep_says_how_many_tokens_were_routed_otherwise():
    """Removing an expert's output leaves the routes of its own block, masking its logit changes them."""
    model, inputs = made("qwen3_moe")
    classifier, loader = LastToken(model).eval(), batches(inputs)
    sites = [site for site in find_sites(classifier) if site.kind == "router"]
    ids = {"input_ids": inputs["input_ids"]}
    intact = {path: args[1].sort(-1).values for path, args in plain_inputs(model, ids).items()}
    conditions = [
        Condition(Skill(f"{site.name} {mode}", {site.name: [0]}), mode=mode, name=f"{site.name} {mode}")
        for site in sites
        for mode in ("zero", "reroute")
    ]
    found = skillfast.sweep(classifier, loader, conditions).rerouted
    real = torch.arange(ids["input_ids"].shape[1]).expand_as(ids["input_ids"]) < torch.tensor([[9], [4], [7], [2]])
    classifier.token_mask = lambda x: real[: len(x)]  # the others are padding, which is not counted
    padded = skillfast.sweep(classifier, loader, conditions).rerouted
    for condition, *shares in zip(conditions, found, padded, strict=True):
        with skillfast.ablate(classifier, condition.skill, mode=condition.mode):
            now = {path: args[1].sort(-1).values for path, args in plain_inputs(model, ids).items()}
        changed = torch.stack([(now[path] != before).any(-1) for path, before in intact.items()])
        changed = changed.view(len(intact), *real.shape)
        assert shares == pytest.approx([float(changed.float().mean()), float(changed[:, real].float().mean())])
    assert found[2] == 0  # in the last block, whose routes nothing before it changed
    assert found[3] > 0.1
    assert skillfast.sweep(classifier, loader, conditions[:1]).renamed({conditions[0].name: "a"}).rerouted.shape == (1,)


def test_tokens_that_skip_all_experts_are_counted_at_none():
    """ZAYA's code hands them to the first expert with a gate of 0."""
    model = copy.deepcopy(made("zaya")[0])
    for name, biases in model.named_buffers():
        if name.endswith("balancing_biases"):
            biases[-1] = 1
    with torch.no_grad(), skillfast.Tracer(model, {"y": Continuous()}, sites=["expert"]) as tracer:
        model(**made("zaya")[1])
        tracer.step(y=torch.arange(4.0))
    scores = tracer.compute()
    assert all((scores.routed[f"blocks.{site.block}.router"].mean == 0).all() for site in scores.sites)


def test_a_router_with_no_other_experts_says_so():
    model, inputs = made("qwen3_moe")
    skill = Skill("s", {"blocks.0.router": range(3)})  # of 4, of which each token takes 2
    with torch.no_grad(), skillfast.ablate(model, skill, mode="reroute"):
        assert "got tokens at experts that are masked" in one_line(ModelError, model, **inputs)


EXPERT, UNIT, CLASS = 2, 11, 3


def planted_classifier() -> nn.Module:
    """A token's class is read from its embedding, but for one class, which a unit of an expert of block 1 carries."""
    model = copy.deepcopy(made("qwen3_moe")[0])
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    head.zero_()
    for c in range(LastToken.num_classes):
        embeddings[c, :8] = 0
        embeddings[c, c] = 4
        head[c, c if c != CLASS else 10] = 1
    head[0, CLASS] = 0.1  # what a token of the class is taken for without that unit
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.01)
        layer.mlp.experts.down_proj.mul_(0.01)
    mlp = model.model.layers[1].mlp
    mlp.gate.weight[:, :8] = 0
    mlp.gate.weight[EXPERT, CLASS] = 20
    units = mlp.experts.down_proj.shape[2]
    mlp.experts.gate_up_proj[EXPERT, [UNIT, units + UNIT]] = 0
    mlp.experts.gate_up_proj[EXPERT, [UNIT, units + UNIT], CLASS] = 4
    mlp.experts.down_proj[EXPERT, :, UNIT] = 0
    mlp.experts.down_proj[EXPERT, 10, UNIT] = 4
    return LastToken(model).eval()


def test_a_planted_unit_is_found_and_removed_alone():
    """One unit of one expert carries class 3: tracing ranks it first, and its removal costs that class alone."""
    classifier = planted_classifier()
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(LastToken.num_classes, (60,), generator=generator)
    ids = torch.cat([torch.randint(20, 250, (60, 5), generator=generator), labels[:, None]], 1)
    loader = list(zip(ids.split(20), labels.split(20), strict=True))
    for pool in ("mean", "last"):
        scores = skillfast.trace(classifier, loader, sites=["expert"], pool=pool, statistics=["pearson"])
        column = scores.pearson[:, scores.columns.index(f"label:{CLASS}")]
        skill = skillfast.select(scores, metric="label", share=1 / scores.n_neurons)[str(CLASS)]
        units = scores.sites[1].width // scores.sites[1].experts
        assert {name: index.tolist() for name, index in skill.neurons.items()} == {
            "blocks.1.experts": [EXPERT * units + UNIT]
        }
        assert np.nanmax(column) > 0.99
        best = scores.to_dataframe(metric=f"label:{CLASS}", top=1).iloc[0]
        assert (best["site"], best["expert"], best["unit"]) == ("blocks.1.experts", EXPERT, EXPERT * units + UNIT)
    attributions = skillfast.attribute(classifier, loader, sites=["expert"])
    share = 1 / scores.n_neurons
    learned = skillfast.learn_masks(classifier, loader, attributions, share=share, steps=4, batch_size=20)
    for found in (attributions, learned):
        assert skillfast.select(found, share=share)[str(CLASS)].neurons == skill.neurons
    result = skillfast.sweep(classifier, loader, [Condition(skill)])
    assert result.baseline.tolist() == [1] * LastToken.num_classes
    assert result.per_class_accuracy[0].tolist() == [float(c != CLASS) for c in range(LastToken.num_classes)]


def test_experts_that_show_nothing_are_refused():
    model, _ = made("qwen3_moe")
    model.config._experts_implementation = "deepgemm"
    try:
        said = one_line(ModelError, skillfast.ablate(model, chosen(model)).__enter__)
    finally:
        model.set_experts_implementation("grouped_mm")
    assert "set_experts_implementation('grouped_mm')" in said


def routed_reference(model: nn.Module, inputs: dict[str, torch.Tensor], pool: str, kinds: list[str]):
    """Scores of a few examples; gates and shares beside units."""
    with (
        torch.no_grad(),
        skillfast.Tracer(model, {"y": Continuous()}, sites=kinds, statistics=["pearson"], pool=pool) as tracer,
    ):
        model(**inputs)
        tracer.step(y=torch.arange(4.0))
    return tracer.compute()


@pytest.mark.parametrize("pool", ["mean", "none"])
@pytest.mark.parametrize("family", ["qwen3_moe", "jetmoe", "llama4_text"])
def test_means_of_units_and_gates_are_those_of_routed_tokens(family, pool):
    """What the first block's experts add, against each routed row with the mean in the place of its activation."""
    model, inputs = made(family)
    kinds = ["expert"] if family == "llama4_text" else ["expert", "router"]
    reference = routed_reference(model, inputs, pool, kinds)
    sites = {site.kind: site for site in find_sites(model) if site.name in ("blocks.0.experts", "blocks.0.router")}
    site = sites["expert"]
    experts, mixture = (model.get_submodule(path) for path in (site.path, site.path.rpartition(".")[0]))
    hidden, index, gates = plain_inputs(model, inputs)[site.path]
    each = torch.from_numpy(plain_reading(experts, hidden.reshape(len(index), -1), index, gates, mixture))
    weight = torch.stack(list(down_projections(experts))).double()  # [experts, hidden, units]
    gate = torch.zeros(len(index), site.experts, dtype=torch.float64).scatter_add(1, index, gates.double())
    routed = (gate != 0).double()
    outputs = []
    handle = (mixture if family == "jetmoe" else experts).register_forward_hook(lambda _, __, out: outputs.append(out))
    for kind in kinds:
        units = sites[kind].width // site.experts
        reached = routed.sum(0).repeat_interleave(units) >= 10
        skill = Skill("s", {sites[kind].name: reached.nonzero()[::3, 0]})
        with torch.no_grad():
            model(**inputs)
            with skillfast.ablate(model, skill, mode="mean", reference=reference):
                model(**inputs)
        intact, found = (out.reshape(-1, len(index), weight.shape[1]).sum(0).double() for out in outputs[-2:])
        chosen = torch.zeros(sites[kind].width, dtype=torch.bool)
        chosen[reached.nonzero()[::3, 0]] = True
        if kind == "expert":
            constant = each.sum(0) / gate.sum(0).clamp(min=1e-12)[:, None]
            change = (gate[:, :, None] * constant - each) * chosen.view(site.experts, -1)
        else:
            factor = gate.sum(0) / routed.sum(0).clamp(min=1) / gate.where(gate != 0, 1.0)
            change = each * ((factor - 1) * chosen)[:, :, None]
        want = intact + torch.einsum("teu,ehu->th", change, weight)
        changed = float((want - intact).abs().max())
        assert changed > 1e-5 * float(want.abs().max())
        assert float((found - want).abs().max()) < 1e-3 * changed + 1e-7 * float(want.abs().max())
    handle.remove()


def test_a_sweep_with_means_of_experts_equals_a_loop():
    model, inputs = made("qwen3_moe")
    classifier, (ids, labels) = LastToken(model).eval(), batches(inputs)[0]
    reference = routed_reference(model, inputs, "mean", ["expert", "router"])
    reference = dataclasses.replace(reference, fingerprint=None)
    skills = [chosen(classifier, kind) for kind in ("expert", "router")]
    conditions = [Condition(skill, mode="mean", scale=0.25, name=str(i)) for i, skill in enumerate(skills)]
    found = skillfast.sweep(classifier, [(ids, labels)], conditions, reference=reference, keep_margins=True)
    for condition in conditions:
        with (
            torch.no_grad(),
            skillfast.ablate(classifier, condition.skill, scale=0.25, mode="mean", reference=reference),
        ):
            margins = skillfast.metrics.margin(classifier(ids), labels)
        np.testing.assert_allclose(found.margins_of([condition.name])[0], margins, atol=1e-4)
    assert not np.allclose(found.margins[1], found.margins[0], atol=1e-3)


def test_means_that_nothing_tells_are_refused():
    model, inputs = made("qwen3_moe")
    reference = routed_reference(model, inputs, "mean", ["expert"])
    ablate = partial(skillfast.ablate, model, chosen(model), mode="mean")
    said = one_line(ArgumentError, ablate(reference=reference).__enter__)
    assert "expected reference scores of blocks.0.router beside those of blocks.0.experts" in said
    reference = routed_reference(model, inputs, "mean", ["expert", "router"])
    unreached = reference.mean.copy()
    unreached[reference.site_slices()["blocks.0.router"].start + 2] = 0
    said = one_line(ArgumentError, ablate(reference=dataclasses.replace(reference, mean=unreached)).__enter__)
    assert "none or too few at expert 2" in said


@pytest.mark.parametrize(
    ("family", "backend"), [("qwen3_moe", "eager"), ("gpt_oss", "grouped_mm"), ("jetmoe", "eager")]
)
def test_donors_give_experts_their_mean_over_the_tokens_that_were_routed_there(family, backend):
    """What flows at the first block's experts is worked out row by row, from a plain reading of all examples."""
    model, given = made(family, backend)
    ids = (given["input_ids"].repeat(3, 1) + 7 * torch.arange(3 * len(given["input_ids"]))[:, None]) % 200
    data = [{"input_ids": part, "labels": torch.arange(len(part))} for part in ids.split(5)]
    site = next(site for site in find_sites(model) if site.kind == "expert" and "attention" not in site.path)
    units = site.width // site.experts
    path, parent = site.path, site.path.rpartition(".")[0]
    hidden, index, gates = plain_inputs(model, {"input_ids": ids})[path]
    mixture = model.get_submodule(parent)
    ones = plain_reading(model.get_submodule(path), hidden, index, torch.ones(index.shape), mixture)
    x = ones.reshape(*ids.shape, site.experts, units)  # 0 where a token was not routed
    here = np.zeros((index.shape[0], site.experts), bool)
    np.put_along_axis(here, index.numpy(), True, 1)
    here = here.reshape(*ids.shape, site.experts)
    busy = np.argsort(-here.any(1).mean(0))[:2]
    neurons = torch.from_numpy(np.sort(np.concatenate([busy * units + 1, busy[:1] * units + 5])))
    router = router_of(site).name
    skill = Skill("s", {site.name: neurons, router: torch.tensor([int(busy[1])])})
    bank = skillfast.donors(model, data, [skill], n_donors=6)
    with np.errstate(invalid="ignore"):
        means = x.sum(1) / here.sum(1)[..., None]  # [examples, experts, units]
        of_gates = np.zeros(here.shape[:2] + here.shape[2:])
        np.put_along_axis(of_gates.reshape(len(index), -1), index.numpy(), gates.float().numpy(), 1)
        gate_means = of_gates.sum(1) / here.sum(1)
    for kept, found in ((means.reshape(len(ids), -1)[:, neurons], bank.activations[site.name]),
                        (gate_means[:, [busy[1]]], bank.activations[router])):  # fmt: skip
        want = kept[bank.indices]
        want = np.where(np.isnan(want), np.nanmean(want, 0), want)
        np.testing.assert_allclose(found[:, 0], want, rtol=1e-4, atol=1e-6)
    only = Skill("units", {site.name: neurons})
    n, nowhere = site.experts, torch.tensor([int(busy[0]), site.experts, site.experts + 1])  # two rows of no expert
    found = RoutedActivations(torch.ones(3, units), nowhere, torch.arange(3), torch.ones(3), n, tuple(ids.shape))
    changed = Interventions(model, [Condition(only, mode="resample")], donors=bank).apply(
        site, found, [0], torch.zeros(len(ids), dtype=torch.int64)
    )
    assert (changed != 1).any(1).tolist() == [True, False, False]
    outputs = []
    hook = model.get_submodule(parent).register_forward_hook(
        lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(input_ids=ids)
        with skillfast.ablate(model, only, mode="resample", donors=bank, scale=0.25):
            model(input_ids=ids)
    hook.remove()
    rows = bank.rows_of(model, {"input_ids": ids}).numpy()
    change = np.zeros_like(ones)
    for example, row in enumerate(rows):
        other = bank.activations[site.name][row, 0].numpy()
        for neuron, value in zip(neurons.tolist(), other, strict=True):
            e, u = divmod(neuron, units)
            own = x[example, :, e, u]
            at = slice(example * ids.shape[1], (example + 1) * ids.shape[1])
            change[at, e, u] = of_gates[example, :, e] * here[example, :, e] * 0.75 * (value - own)
    down = np.stack(
        [weight.numpy() for weight in down_projections(model.get_submodule(path))]
    )  # [experts, hidden, units]
    want = np.einsum("teu,ehu->th", change, down)
    got = (outputs[1] - outputs[0]).reshape(len(want), -1).numpy()
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max() + 1e-6)
    classifier, labels = LastToken(model).eval(), torch.arange(len(ids)) % 5
    bank = skillfast.donors(classifier, [(ids, labels)], [skill], n_donors=6)
    conditions = [Condition(skill, mode="resample"), Condition(only, mode="resample", scale=0.25)]
    swept = skillfast.sweep(classifier, [(ids, labels)], conditions, donors=bank, keep_margins=True)
    for condition, got in zip(conditions, swept.margins, strict=True):
        change = {"mode": condition.mode, "scale": condition.scale, "donors": bank}
        with torch.no_grad(), skillfast.ablate(classifier, condition.skill, **change):
            logits = classifier(ids)
        want = skillfast.metrics.margin(logits, labels).numpy()
        np.testing.assert_allclose(got, want, atol=2e-4 * float(logits.abs().max()))


def test_an_expert_that_no_donor_passed_is_told():
    model, given = made("gpt_oss")
    site = next(site for site in find_sites(model) if site.kind == "expert")
    ids = given["input_ids"][:2, :1]  # two tokens, and more experts than they have
    skill = Skill("s", {site.name: range(site.width)})
    told = one_line(ArgumentError, skillfast.donors, model, [{"input_ids": ids, "labels": ids}], [skill])
    assert f"expected tokens of some donor at each expert of {site.name} that a skill has, got none at expert" in told
