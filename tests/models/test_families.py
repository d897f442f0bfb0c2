"""Every family on a tiny random configuration: sites, traced values and an ablation against plain hooks."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from conftest import make_vit, one_line
from packaging.version import Version
from timm_models import TIMM, made

import skillfast
from skillfast import Continuous, Skill
from skillfast.errors import ArgumentError, ModelError
from skillfast.models import families, shrink
from skillfast.models.families import Family
from skillfast.models.sites import Site, choose_sites, declare_sites, find_sites, fingerprint, module_device

transformers = pytest.importorskip("transformers", reason="needs transformers")
auto = pytest.importorskip("transformers.models.auto.modeling_auto")
pytestmark = pytest.mark.filterwarnings("ignore:some scores are not defined")

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
TEXT = {**SIZES, "vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}  # attention as wide as 4 query heads of 8, not as the model
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 5}
GPT = {"vocab_size": 99, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
SEQ2SEQ = {"vocab_size": 99, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": 99, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip

# (model class, configuration class, its settings, widths of mlp, attn and head, query heads, blocks)
CASES = {
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, (40, 24, 24), 4, 2),
    "bert-lm": ("BertForMaskedLM", "BertConfig", TEXT, (40, 24, 24), 4, 2),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", TEXT, (40, 24, 24), 4, 2),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", TEXT, (40, 24, 24), 4, 2),
    "deberta": ("DebertaV2ForSequenceClassification", "DebertaV2Config", TEXT, (40, 24, 24), 4, 2),
    "distilbert": (
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": 99, "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 40}, (40, 24, 24), 4, 2,
    ),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", TEXT, (40, 24, 24), 4, 2),
    "modernbert": (
        "ModernBertForSequenceClassification", "ModernBertConfig",
        {**TEXT, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}, (40, 24, 24), 4, 2,
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT, (96, 24, 24), 4, 2),
    "gpt2-score": ("GPT2ForSequenceClassification", "GPT2Config", GPT, (96, 24, 24), 4, 2),
    "gpt-neo": (
        "GPTNeoForCausalLM", "GPTNeoConfig",
        {"vocab_size": 99, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "intermediate_size": 40,
         "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}, (40, 24, 24), 4, 2,
    ),
    "gpt-j": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}, (96, 24, 24), 4, 2),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, (40, 24, 24), 4, 2),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**GPT, "hidden_size": 24}, (96, 24, 24), 4, 2),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**TEXT, "ffn_hidden_size": 40}, (40, 24, 24), 4, 2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, (40, 32, 24), 4, 2),
    "llama-score": ("LlamaForSequenceClassification", "LlamaConfig", GROUPED, (40, 32, 24), 4, 2),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED, (40, 32, 24), 4, 2),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**TEXT, "num_key_value_heads": 2}, (40, 24, 24), 4, 2),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED, (40, 32, 24), 4, 2),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED, (40, 32, 24), 4, 2),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED, (40, 32, 24), 4, 2),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED, (40, 32, 24), 4, 2),
    "phi": ("PhiForCausalLM", "PhiConfig", {**TEXT, "hidden_size": 32}, (40, 32, 32), 4, 2),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", TEXT, (40, 24, 24), 4, 2),
    "mpt": (
        "MptForCausalLM", "MptConfig",
        {"vocab_size": 99, "d_model": 24, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        (96, 24, 24), 4, 2,
    ),
    "jamba": (
        "JambaForCausalLM", "JambaConfig",
        {**TEXT, "num_key_value_heads": 2, "attn_layer_period": 1, "attn_layer_offset": 0, "num_experts": 1,
         "use_mamba_kernels": False, "use_cache": False}, (40, 24, 24), 4, 2,
    ),
    "lfm2": (
        "Lfm2ForCausalLM", "Lfm2Config",
        {**TEXT, "num_key_value_heads": 2, "block_auto_adjust_ff_dim": False,
         "layer_types": ["full_attention", "full_attention"]}, (40, 24, 24), 4, 2,
    ),
    "qwen3.5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {**GROUPED, **LINEAR}, (40, 32, 24), 4, 2),
    "olmo-hybrid": ("OlmoHybridForCausalLM", "OlmoHybridConfig", {**GROUPED, **LINEAR}, (40, 32, 24), 4, 2),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {**TEXT, "moe_intermediate_size": 40, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
         "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 12, "qk_rope_head_dim": 4,
         "qk_nope_head_dim": 4, "v_head_dim": 6, "num_key_value_heads": 4}, (40, 24, 24), 4, 2,
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", SEQ2SEQ, (40, 32, 24), 4, 4),
    "t5-gated": (
        "T5ForConditionalGeneration", "T5Config", {**SEQ2SEQ, "feed_forward_proj": "gated-gelu"}, (40, 32, 24), 4, 4,
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART, (40, 24, 24), 4, 4),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE, (40, 24, 24), 4, 2),
    "deit": ("DeiTForImageClassification", "DeiTConfig", IMAGE, (40, 24, 24), 4, 2),
    "beit": ("BeitForImageClassification", "BeitConfig", IMAGE, (40, 24, 24), 4, 2),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", IMAGE, (96, 24, 48), 4, 2),
}  # fmt: skip


CROSS = {"t5", "t5-gated", "bart"}
OTHERS = (
    "mamba", "zamba", "granitemoehybrid", "nemotron_h", "recurrent_gemma", "rwkv", "xlstm", "lfm3", "ctrl", "cpmant",
    "moshi", "gemma4_text", "whisper", "prophetnet", "blip_2_vision_model", "pvt_v2", "pvt", "swiftformer", "focalnet",
    "seamless_m4t_v2", "nllb-moe", "switch_transformers", "longcat_flash", "neomme", "deepseek_v4", "gemma3n_text",
    "sam_vision_model", "xmod",
)  # fmt: skip
TABLE = {
    **auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "blip_2_vision_model": "Blip2VisionModel", "seamless_m4t_v2": "SeamlessM4Tv2Model",
    "nllb-moe": "NllbMoeForConditionalGeneration",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
    "neomme": "NeoMMEForMaskedLM",
    "sam_vision_model": "SamVisionModel", "xmod": "XmodForMaskedLM",
}  # fmt: skip
"""Other families of `transformers` that rows are for: type of the configuration -> class of the model."""


def make(case: str) -> torch.nn.Module:
    """A model with weights large enough that neurons differ."""
    model_class, config_class, settings = CASES[case][:3]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.eval()


def inputs_of(case: str) -> list[dict[str, torch.Tensor]]:
    """21 examples without padding, in uneven batches."""
    generator = torch.Generator().manual_seed(1)
    if CASES[case][2] is IMAGE:
        return [{"pixel_values": x} for x in torch.randn(21, 3, 8, 8, generator=generator).split(8)]
    ids = torch.randint(3, 99, (21, 7), generator=generator)
    extra = torch.randint(3, 99, (21, 5), generator=generator)
    batches = []
    for x, y in zip(ids.split(8), extra.split(8), strict=True):
        batch = {"input_ids": x, "attention_mask": torch.ones_like(x)}
        batches.append(batch | ({"decoder_input_ids": y} if case in ("t5", "t5-gated", "bart") else {}))
    return batches


def dense_sites(model: torch.nn.Module) -> list[Site]:
    """The sites whose neurons every token has; experts have tests of their own."""
    return [site for site in find_sites(model) if site.experts is None]


@pytest.mark.skipif(Version(timm.__version__) < Version("1.0.31"), reason="older versions of timm lack some of these")
def test_the_table_has_every_family():
    """Each row's patterns fit modules of a model of the three tables."""
    paths = [site.path for case in CASES for site in find_sites(make(case))]
    of_timm = [made(name)[0] for name in TIMM]
    with torch.device("meta"):
        for family in OTHERS:
            config = transformers.CONFIG_MAPPING[family]()
            paths += dict(getattr(transformers, TABLE[family])(shrink._small(config, narrow=True)).named_modules())
        tower = transformers.Qwen3VLVisionModel
        paths += dict(tower(shrink._small(tower.config_class(), narrow=True)).named_modules())
        paths += dict(transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(num_hidden_layers=1)).named_modules())
        paths += dict(torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(8, 2), 1).named_modules())
        paths += ["encoder.layers.encoder_layer_0.self_attention.out_proj", "encoder.layers.encoder_layer_0.mlp.3"]
        paths += ["bert.encoder.layer.0.crossattention.output.dense"]
    paths += [path for model in of_timm for path, _ in model.named_modules()]
    patterns = [(row.name, role, pattern) for row in families.FAMILIES for role, _, pattern in row.patterns()]
    unused = [(name, role) for name, role, pattern in patterns if not any(map(pattern.fullmatch, paths))]
    assert unused == []


@pytest.mark.parametrize("case", CASES)
def test_sites_widths_and_query_heads(case):
    widths, heads, blocks = CASES[case][3:]
    sites = dense_sites(make(case))
    want = [f"blocks.{i}.{kind}" for i in range(blocks) for kind in ("attn", "mlp")]
    want += [f"blocks.{i}.cross_attn" for i in range(blocks // 2, blocks) if case in CROSS]
    assert sorted(site.name for site in sites) == sorted([*want, "head"])
    assert sites[-1].name == "head"
    for site in sites:
        assert site.width == dict(zip(("mlp", "attn", "head"), widths, strict=True))[site.kind], site
        assert site.heads == (heads if site.kind == "attn" else None), site


@pytest.mark.parametrize("case", CASES)
def test_sites_are_certified(case):
    found = skillfast.coverage(make(case), inputs_of(case)[0])
    assert found.complete, str(found)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_traced_values_equal_plain_hooks(case, pool):
    model, batches = make(case), inputs_of(case)
    sites = dense_sites(model)
    y = torch.randn(21, generator=torch.Generator().manual_seed(2)).double()
    stored: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    with skillfast.Tracer(model, {"y": Continuous()}, pool=pool, statistics=("pearson",)) as tracer, torch.no_grad():
        for batch, values in zip(batches, y.split(8), strict=True):
            model(**batch)
            tracer.step(y=values)
    handles = [
        model.get_submodule(site.path).register_forward_pre_hook(lambda _, x, n=site.name: stored[n].append(x[0]))
        for site in sites
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    scores = tracer.compute()
    assert scores.n_observations == 21
    for site in sites:
        x = torch.cat(stored[site.name]).double()
        assert x.shape[-1] == site.width
        if x.dim() == 3:
            x = x.mean(1) if pool == "mean" else x[:, -1]
        np.testing.assert_allclose(scores[site.name].mean, x.mean(0), atol=1e-5)
        with np.errstate(invalid="ignore"):  # DistilBERT's head comes after a ReLU, which may be silent: NaN in both
            want = np.corrcoef(x.T, y[None])[:-1, -1]
        np.testing.assert_allclose(scores[site.name].pearson[:, 0], want, atol=5e-5, err_msg=site.name)


@pytest.mark.parametrize("case", CASES)
def test_an_ablation_equals_a_plain_hook(case):
    model, batch = make(case), inputs_of(case)[0]
    sites = dense_sites(model)
    generator = torch.Generator().manual_seed(3)
    neurons = {site.name: torch.randperm(site.width, generator=generator)[:5].sort().values for site in sites}

    def zero(_, args, index):
        x = args[0].clone()
        x[..., index] = 0
        return (x, *args[1:])

    with torch.no_grad():
        intact = model(**batch).logits
        with skillfast.ablate(model, Skill("any", neurons)):
            ablated = model(**batch).logits
        for site in sites:
            model.get_submodule(site.path).register_forward_pre_hook(
                lambda m, args, index=neurons[site.name]: zero(m, args, index)
            )
        want = model(**batch).logits
    torch.testing.assert_close(ablated, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ablated, intact, atol=1e-3)


def test_sites_of_timm_models_are_what_they_were():
    assert fingerprint(make_vit()) == "58614de7fa52b776"


def test_an_encoder_without_a_head_has_none():
    model = transformers.BertModel(transformers.BertConfig(**TEXT)).eval()
    assert [site.name for site in find_sites(model)][-1] == "blocks.1.mlp"
    assert "expected one of mlp, attn or a name from" in one_line(ArgumentError, choose_sites, model, ("mlp", "head"))


def test_a_model_of_no_family_is_refused_by_class_with_the_remedy():
    model = transformers.AlbertModel(transformers.AlbertConfig(**TEXT, embedding_size=24))  # its blocks share weights
    text = one_line(ModelError, find_sites, model)
    assert text.startswith("AlbertModel: expected")
    assert 'sites={"blocks.0.mlp":' in text
    assert "register_family" in text


class Mine(torch.nn.Module):
    """Two blocks of a form that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.nn.ModuleList(
            torch.nn.ModuleDict({"up": torch.nn.Linear(6, 10), "down": torch.nn.Linear(10, 6)}) for _ in range(2)
        )
        self.out = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = x + step["down"](step["up"](x).relu())
        return self.out(x)


MINE = {"head": "out", "blocks.1.mlp": "steps.1.down", "blocks.0.mlp": "steps.0.down"}


def test_declared_sites_serve_trace_and_ablation():
    torch.manual_seed(0)
    model = Mine().eval()
    x, label = torch.randn(40, 6), torch.arange(40) % 3
    scores = skillfast.trace(model, [(x, label)], sites=MINE, classes=3, statistics=("pearson",))
    assert [(site.name, site.width) for site in scores.sites] == [
        ("blocks.0.mlp", 10), ("blocks.1.mlp", 10), ("head", 6),
    ]  # fmt: skip
    hidden = model.steps[0]["up"](x).relu().detach().double()
    np.testing.assert_allclose(scores["blocks.0.mlp"].mean, hidden.mean(0), atol=1e-6)
    skill = Skill("any", {"blocks.0.mlp": torch.arange(10)}, fingerprint=scores.fingerprint)
    with skillfast.ablate(model, skill), torch.no_grad():  # the model kept what was declared
        first = x + model.steps[0]["down"].bias
        want = model.out(first + model.steps[1]["down"](model.steps[1]["up"](first).relu()))
        torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ({"layer 0": "steps.0.down"}, "expected a name such as blocks.0.mlp"),
        ({"blocks.0.mlp": "steps.0.fc2"}, "got 'steps.0.fc2' (no such module)"),
        ({"blocks.0.mlp": "steps.0"}, "got 'steps.0' (ModuleDict)"),
        ({}, "expected at least one name and path, got none"),
    ],
)
def test_declarations_that_do_not_fit_are_refused(paths, words):
    assert words in one_line(ArgumentError, declare_sites, Mine(), paths)


def test_a_registered_family_is_known(monkeypatch):
    family = Family("mine", attn=r"none", mlp=r"down", block=r"\bsteps\.\d+", head="out")
    monkeypatch.setattr(families, "_registered", [])
    families.register_family(family)
    families.register_family(family)
    assert len(families._registered) == 1
    assert [site.name for site in find_sites(Mine())] == ["blocks.0.mlp", "blocks.1.mlp", "head"]
    families._registered.clear()
    assert "skillfast.discover(model, batch)" in one_line(ModelError, find_sites, Mine())


def test_modules_that_are_linear_layers_but_not_of_torch_are_sites():
    class Packed(torch.nn.Module):
        """As quantised layers are: features, and weights that are no parameters."""

        def __init__(self, layer: torch.nn.Linear) -> None:
            super().__init__()
            self.in_features, self.packed = layer.in_features, (layer.weight.detach(), layer.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, *self.packed)

    model = make("bert")
    before = find_sites(model)
    layer = model.bert.encoder.layer[0]
    layer.output.dense = Packed(layer.output.dense)
    assert find_sites(model) == before
    assert module_device(layer.output.dense) == torch.device("cpu")
    assert module_device(model.classifier) == torch.device("cpu")
    layer.output.dense.register_buffer("codes", torch.zeros(1, device="meta"))
    assert module_device(layer.output.dense) == torch.device("meta")


def test_an_offloaded_module_is_where_it_computes():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model = accelerate.cpu_offload(make("llama"), execution_device="cpu")
    module = model.model.layers[0].mlp.down_proj
    assert next(module.parameters()).device.type == "meta"
    assert module_device(module) == torch.device("cpu")
