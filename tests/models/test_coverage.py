"""The certificate: it holds where sites hold everything, and names what acts past them."""

from __future__ import annotations

import pytest
import torch
from conftest import make_vit, one_line
from torch import nn

import skillfast
from skillfast.errors import ArgumentError, ModelError
from skillfast.models import shrink
from skillfast.models.sites import DECLARED, declare_sites, find_sites

transformers = pytest.importorskip("transformers", reason="needs transformers")
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_vision_transformer_is_covered_and_stays_as_it_is():
    model = make_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for found in (skillfast.coverage(model), skillfast.coverage(model, IMAGES)):
        assert found.complete
        assert found.share == 1
        assert found.parameters == sum(p.numel() for n, p in model.named_parameters() if "blocks" in n and p.dim() > 1)
        assert str(found) == "sites cover 100 % of the blocks' weights"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_hidden_site_is_named():
    model = make_vit()
    declare_sites(model, {s.name: s.path for s in find_sites(model) if s.name != "blocks.1.mlp"})
    found = skillfast.coverage(model)
    mlp = model.blocks[1].mlp
    assert not found.complete
    assert set(found.missing) == {"blocks.*.mlp.fc1", "blocks.*.mlp.fc2"}
    assert not found.unexercised
    assert found.share == pytest.approx(1 - (mlp.fc1.weight.numel() + mlp.fc2.weight.numel()) / found.parameters)
    assert "past them act blocks.*.mlp.fc" in str(found)


class SecondPath(nn.Module):
    """An attention layer with a linear shortcut beside its output projection."""

    def __init__(self, attn: nn.Module, width: int) -> None:
        super().__init__()
        self.attn = attn
        self.shortcut = nn.Linear(width, width)

    def forward(self, x, **more):
        return self.attn(x, **more) + self.shortcut(x)


def test_a_second_path_is_named():
    model = make_vit()
    paths = {s.name: s.path for s in find_sites(model)}
    model.blocks[2].attn = SecondPath(model.blocks[2].attn, 24)
    declare_sites(model, {**paths, "blocks.2.attn": "blocks.2.attn.attn.proj"})
    found = skillfast.coverage(model, IMAGES)
    assert list(found.missing) == ["blocks.*.attn.shortcut"]
    assert found.share == pytest.approx(1 - 24 * 24 / found.parameters)


def test_what_had_no_effect_is_neither_covered_nor_missing():
    model = make_vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.zero_()
    found = skillfast.coverage(model, IMAGES)
    assert set(found.unexercised) == {"blocks.*.mlp.fc1"}  # what feeds a matrix of zeros cannot act
    assert not found.missing
    assert not found.complete
    assert "without effect were blocks.*.mlp.fc1" in str(found)
    assert skillfast.coverage(model).complete  # random weights are no zeros


def config_of(model_type: str, **sizes: object):
    return transformers.AutoConfig.for_model(model_type, **sizes)


@pytest.mark.parametrize(
    ("model_class", "model_type", "missing"),
    [
        ("LlamaForCausalLM", "llama", ()),
        ("GPT2LMHeadModel", "gpt2", ()),
        ("BertForSequenceClassification", "bert", ()),
        ("ViTForImageClassification", "vit", ()),
        ("Qwen3MoeForCausalLM", "qwen3_moe", ()),
        ("DeepseekV3ForCausalLM", "deepseek_v3", ()),
        ("GptOssForCausalLM", "gpt_oss", ()),
        ("T5ForConditionalGeneration", "t5", ()),
    ],
)
def test_published_sizes_are_certified_on_a_small_copy(model_class, model_type, missing):
    with torch.device("meta"):  # DeepSeek-V3 has 671 billion weights
        model = getattr(transformers, model_class)(config_of(model_type))
    found = skillfast.coverage(model)
    assert found.complete == (not missing)
    assert all(any(name.endswith(end) for name in found.missing) for end in missing)
    assert not found.unexercised
    assert found.parameters < shrink.MOST_WEIGHTS
    assert all(p.device.type == "meta" for p in model.parameters())


def test_a_copy_has_every_type_of_layer():
    config = config_of("qwen3_next")
    small = shrink._small(config, narrow=True)
    assert set(small.layer_types) == set(config.layer_types)
    assert small.num_hidden_layers == len(small.layer_types) < config.num_hidden_layers
    assert config.hidden_size > small.hidden_size  # the model's own stays


def test_certifying_leaves_the_random_state():
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config_of("llama"))
    skillfast.coverage(model)
    assert torch.equal(torch.random.get_rng_state(), state)


class Plain(nn.Module):
    """A model of no library: two blocks of two layers, and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(2))
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def test_a_model_of_no_library_needs_a_batch():
    torch.manual_seed(0)
    model = Plain()
    declare_sites(model, {"blocks.0.mlp": "blocks.0.2", "blocks.1.mlp": "blocks.1.2", "head": "out"})
    told = one_line(ArgumentError, skillfast.coverage, model)
    assert "pass batch=" in told
    assert skillfast.coverage(model, torch.randn(5, 6)).complete
    assert "expected a forward on the inputs" in one_line(ModelError, skillfast.coverage, model, torch.randn(5, 7))
    setattr(model, DECLARED, {"blocks.0.mlp": "blocks.0.2"})
    assert set(skillfast.coverage(model, torch.randn(5, 6)).missing) == {"blocks.*.*"}


class Asked(nn.Module):
    """A classifier made of a language model, as `TextClassifier` is."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model


def test_a_language_model_inside_a_classifier_is_certified():
    model = transformers.BertForSequenceClassification(shrink._small(config_of("bert"), narrow=True))
    found = skillfast.coverage(Asked(model))
    assert found.complete
    assert found.inputs == "random inputs, on a small copy with random weights"


def test_texts_are_no_longer_than_a_model_takes():
    config = config_of("bert", hidden_size=24, num_attention_heads=4, max_position_embeddings=9)
    assert skillfast.coverage(transformers.BertForSequenceClassification(config)).complete


def test_a_run_says_what_its_sites_miss(tmp_path):
    """The certificate of a session, as every command has it: a line where sites are incomplete."""
    from skillfast.runs.session import _certify

    said: list[str] = []
    model = transformers.MixtralForCausalLM(shrink._small(config_of("mixtral"), narrow=True))
    assert _certify(model, said.append).complete
    assert not said
    partly = make_vit()
    declare_sites(partly, {s.name: s.path for s in find_sites(partly) if s.name != "blocks.1.mlp"})
    found = _certify(partly, said.append)
    assert not found.complete
    (line,) = said
    assert line.startswith("warning: sites cover ")
    assert "blocks.*.mlp.fc1" in line
    assert _certify(make_vit(), said.append).complete
    assert len(said) == 1
    declare_sites(plain := Plain(), {"blocks.0.mlp": "blocks.0.2"})
    assert _certify(plain, said.append) is None
    assert said[1].startswith("warning: not certified that the sites hold all that the blocks do: batch: expected")


def test_a_list_of_the_layers_themselves_keeps_few_of_them():
    """Llama 4's `moe_layers` has a number for each layer, of which none is a type of its own."""
    config = transformers.Llama4TextConfig()
    assert config.moe_layers == list(range(48))
    assert shrink._small(config, narrow=True).num_hidden_layers <= 2 * shrink.LAYERS


@pytest.mark.parametrize("side", [32, 2048])
def test_an_image_takes_the_places_of_as_many_tokens_as_its_features(side):
    """Unless it is large: its tokens would attend to one another by the gigabyte."""
    config = transformers.Gemma3Config()
    small = shrink._small(config, narrow=True)
    small.vision_config.image_size = side
    model = transformers.Gemma3ForConditionalGeneration(small).eval()
    inputs = shrink.random_inputs(model)
    places = (inputs["input_ids"] == small.image_token_id).sum(1).tolist()
    assert places == [1 if side == 32 else 0] * 4
    assert ("pixel_values" in inputs) == (side == 32)
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape
