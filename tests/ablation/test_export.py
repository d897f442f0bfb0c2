"""Exported checkpoints, opened by timm, transformers and torch alone, are what `ablate` makes of the model."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import planted
import pytest
import timm
import torch
from conftest import make_vit, one_line
from safetensors.torch import load_file
from torch import nn

import skillfast
from skillfast import Skill
from skillfast.errors import ArgumentError, ModelError
from skillfast.files import umask
from skillfast.models.coverage import randomise
from skillfast.models.sites import find_sites
from skillfast.models.text_classifier import TextClassifier

if TYPE_CHECKING:
    from pathlib import Path

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}


def skill_of(model: nn.Module, share: float = 0.2, name: str = "deer", seed: int = 0) -> Skill:
    """Neurons of every site, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return Skill(
        name,
        {
            site.name: torch.randperm(site.width, generator=generator)[: max(1, round(share * site.width))]
            for site in find_sites(model)
        },
    )


def opened(folder: Path) -> nn.Module:
    """The model of a folder; timm 1.0.20 takes its safetensors for a pickle, so that there the weights are loaded."""
    if timm.__version__ != "1.0.20":
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    model = timm.create_model(f"local-dir:{folder}")
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def outputs(model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(*args, **kwargs)
    return getattr(found, "logits", found)


def check_equal(model: nn.Module, skill: Skill, again: nn.Module, scale: float, *args: Any, **kwargs: Any) -> None:
    """Within rounding what the ablated model gives, which is far from what the model gives."""
    intact = outputs(model, *args, **kwargs)
    with skillfast.ablate(model, skill, scale=scale):
        expected = outputs(model, *args, **kwargs)
    np.testing.assert_allclose(
        outputs(again, *args, **kwargs), expected, rtol=1e-4, atol=2e-5 * float(intact.abs().max())
    )
    assert (expected - intact).abs().max() > 0.02 * intact.abs().max()


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, -0.7])
def test_timm_opens_the_folder(tmp_path: Path, scale: float) -> None:
    model = make_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    skill, x = skill_of(model), torch.randn(4, 3, 16, 16)
    folder = skillfast.export(model, skill, tmp_path / "made", scale=scale, model_kwargs=VIT)
    again = opened(folder)
    check_equal(model, skill, again, scale, x)
    paths = {site.name: site.path for site in find_sites(model)}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])  # the model stays as it is
        site = next((site for site, path in paths.items() if name == f"{path}.weight"), None)
        if site is None:
            assert torch.equal(again.state_dict()[name], tensor)
        else:
            other = np.setdiff1d(np.arange(tensor.shape[1]), skill.neurons[site])
            assert torch.equal(again.state_dict()[name][:, other], tensor[:, other])
            expected = tensor[:, skill.neurons[site]].double() * scale
            assert torch.equal(again.state_dict()[name][:, skill.neurons[site]], expected.float())


def test_the_card_says_what_was_changed(tmp_path: Path) -> None:
    model = make_vit()
    skills = [
        Skill("de|er`\n# x", {"blocks.0.mlp": [5, 3]}, metric="label:deer", method="mask"),
        Skill("cat", {"head": [1]}),
    ]
    folder = skillfast.export(model, skills, tmp_path / "made", scale=0.5, model_kwargs=VIT)
    card = (folder / "README.md").read_text()
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} float32 {list(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    sha = digest.hexdigest()
    wanted = f"""---
tags: ["skillfast"]
library_name: "timm"
---

# vit\\_tiny\\_patch16\\_224 with 2 skills scaled by 0.5

A copy of `vit_tiny_patch16_224` (VisionTransformer) whose weights were changed by skillfast {skillfast.__version__}.
It runs without skillfast:

    timm.create_model("local-dir:FOLDER", pretrained=True)

- Factor on each neuron below: 0.5, towards 0.
- Weights that differ: `blocks.0.mlp.fc2.weight`, `head.weight`. All others are those of the source.
- SHA-256 of the source's weights: `{sha}`, over its state dict in the order of the names: for each tensor a
  line with name, dtype and shape, then its bytes.

A neuron is an input of the projection named beside it: a column of that weight. That it was removed does not show that
the information is gone; a refitted probe may still read it.

## Skill `de/er' # x`: 2 neurons

Chosen by `mask` for `label:deer`.

| site | projection | neurons |
| --- | --- | --- |
| blocks.0.mlp | `blocks.0.mlp.fc2` | 3 5 |

## Skill `cat`: 1 neuron

| site | projection | neurons |
| --- | --- | --- |
| head | `head` | 1 |
"""
    assert card == wanted
    source = re.search(r"SHA-256 of the source's weights: `(\w{64})`", card)
    assert source is not None
    # The digest of other weights is another, that of the same ones is not.
    again = skillfast.export(model, skills[1], tmp_path / "again", model_kwargs=VIT)
    assert source[1] in (again / "README.md").read_text()
    with torch.no_grad():
        model.blocks[1].attn.qkv.bias[7] += 1e-6
    other = skillfast.export(model, skills[1], tmp_path / "other", model_kwargs=VIT)
    assert source[1] not in (other / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "made", "other"]


def test_skills_that_share_a_column_are_nested_ablations(tmp_path: Path) -> None:
    model, x = make_vit(), torch.randn(4, 3, 16, 16)
    one, other = skill_of(model, 0.6, "one"), skill_of(model, 0.6, "other", seed=1)
    folder = skillfast.export(model, [one, other], tmp_path / "made", scale=0.5, model_kwargs=VIT)
    with skillfast.ablate(model, one, scale=0.5), skillfast.ablate(model, other, scale=0.5):
        expected = outputs(model, x)
    again = opened(folder)
    np.testing.assert_allclose(outputs(again, x), expected, rtol=1e-4, atol=1e-5)


def test_means_go_into_the_bias(tmp_path: Path) -> None:
    model = make_vit()
    x, y = torch.randn(24, 3, 16, 16), torch.arange(24) % 5
    scores = skillfast.trace(model, [(x, y)], statistics=("pearson",), classes=5)
    one, other = skill_of(model, 0.4, "one"), skill_of(model, 0.4, "other", seed=1)
    for scale in (0.0, 0.25):
        settings = {"scale": scale, "mode": "mean", "reference": scores}
        folder = skillfast.export(model, [one, other], tmp_path / f"made{scale}", **settings, model_kwargs=VIT)
        with skillfast.ablate(model, one, **settings), skillfast.ablate(model, other, **settings):
            expected = outputs(model, x)
        again = opened(folder)
        np.testing.assert_allclose(outputs(again, x), expected, rtol=1e-3, atol=1e-4)
        card = (folder / "README.md").read_text()
        assert f"- Factor on each neuron below: {scale:g}, towards its mean, which the bias holds." in card


class Stack(nn.Module):
    """Projections of every kind that convolutions have, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.second = nn.Conv2d(8, 6, 1, bias=False)
        self.third = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.fourth = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 3)
        names = ("first", "second", "third", "fourth")
        self.skillfast_sites = {f"blocks.{i}.mlp": name for i, name in enumerate(names)} | {"head": "head"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in ("first", "second", "third", "fourth"):
            x = getattr(self, name)(x).tanh()
        return self.head(x.mean((2, 3)))


@pytest.mark.filterwarnings("ignore:sites cover")
def test_convolutions_and_a_model_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randn(5, 4, 6, 6)
    skill = skill_of(model, 0.5)
    folder = skillfast.export(model, skill, tmp_path / "made", scale=0.3)
    again = Stack()
    del again.skillfast_sites
    again.load_state_dict(load_file(folder / "model.safetensors"))
    check_equal(model, skill, again, 0.3, x)
    card = (folder / "README.md").read_text()
    assert card.startswith('---\ntags: ["skillfast"]\n---\n\n# Stack with 1 skill scaled by 0.3\n')
    assert '    model.load_state_dict(safetensors.torch.load_file("FOLDER/model.safetensors"))\n' in card
    scores = skillfast.trace(model, [(x, torch.arange(5) % 3)], statistics=("pearson",), classes=3)
    for block in range(4):
        one, fits = Skill("one", {f"blocks.{block}.mlp": [0, 2]}), block == 3
        settings = {"mode": "mean", "reference": scores}
        if not fits:  # a kernel with edges, no bias, a stride
            text = one_line(ArgumentError, skillfast.export, model, one, tmp_path / "no", **settings)
            assert text.startswith("mode 'mean': expected a bias at ")
            continue
        folder = skillfast.export(model, one, tmp_path / "mean", **settings)
        again.load_state_dict(load_file(folder / "model.safetensors"))
        with skillfast.ablate(model, one, **settings):
            expected = outputs(model, x)
        np.testing.assert_allclose(outputs(again, x), expected, rtol=1e-4, atol=1e-5)


def causal(folder: Path, model_class: str, **settings: object) -> Any:
    transformers = pytest.importorskip("transformers")
    from tiny_models import save_model

    save_model(folder, model_class, **settings)
    return getattr(transformers, model_class).from_pretrained(folder).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_class", "settings"),
    [
        ("BertForSequenceClassification", {}),
        ("GPT2LMHeadModel", {}),  # transposed, and a head that is the embeddings'
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("T5ForConditionalGeneration", {}),
    ],
)
def test_from_pretrained_opens_the_folder(tmp_path: Path, model_class: str, settings: dict[str, Any]) -> None:
    model = causal(tmp_path / "source", model_class, **settings)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "source")
    skill = skill_of(model)
    tied = model.config.tie_word_embeddings
    hub = not model_class.startswith("T5")  # else its folder's name is all that is told of it
    if hub:
        model.config._name_or_path = "some-one/a.model"
    folder = skillfast.export(model, skill, tmp_path / "made", scale=0.5, processor=tokenizer)
    assert model.config.tie_word_embeddings == tied
    again = type(model).from_pretrained(folder)
    ids = torch.randint(4, 30, (3, 7), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids} if model_class.startswith("T5") else {}
    check_equal(model, skill, again, 0.5, input_ids=ids, **more)
    assert transformers.AutoTokenizer.from_pretrained(folder)("good film") == tokenizer("good film")
    card = (folder / "README.md").read_text()
    base, name = ('base_model: "some-one/a.model"\n', "some-one/a.model") if hub else ("", "source")
    assert card.startswith(
        f'---\ntags: ["skillfast"]\nlibrary_name: "transformers"\n{base}---\n\n# {name} with 1 skill scaled by 0.5\n'
    )
    assert f'\n\n    transformers.{model_class}.from_pretrained("FOLDER")\n\n' in card
    if model_class in ("BertForSequenceClassification", "GPT2LMHeadModel"):  # as the classifier that runs wrap it in
        words = None if model_class.startswith("Bert") else torch.tensor([4, 5])
        wrapped = TextClassifier(SimpleNamespace(model=model, tokenizer=tokenizer), 2, words)
        of_wrapped = skillfast.export(wrapped, skill, tmp_path / "wrapped", scale=0.5)
        found, want = (load_file(each / "model.safetensors") for each in (of_wrapped, folder))
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in want.items())


EXPERTS = {
    "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8},
    "GptOssForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},  # biases, transposed
    "Llama4ForCausalLM": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "intermediate_size_mlp": 16,
    },
    "JetMoeForCausalLM": {  # experts of attention, too
        "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2,
        "num_attention_heads": 4,
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_class", EXPERTS)
def test_experts_and_their_gates(tmp_path: Path, model_class: str) -> None:
    model = causal(tmp_path / "source", model_class, **EXPERTS[model_class])
    randomise(model)
    with torch.no_grad():
        for site in find_sites(model):
            if site.kind == "expert":
                for weight in model.get_submodule(site.path).parameters():
                    weight.mul_(8 if weight.dim() > 2 else 1)  # so that experts matter
    ids = torch.randint(4, 30, (3, 7), generator=torch.Generator().manual_seed(0))
    kinds = sorted({site.kind for site in find_sites(model)} & {"expert", "router"})
    assert kinds == (["expert"] if model_class.startswith("Llama4") else ["expert", "router"])
    for kind in [*kinds, ""]:
        sites = [site for site in find_sites(model) if kind in ("", site.kind)]
        skill = Skill("deer", {site.name: torch.arange(0, site.width, 3) for site in sites})
        folder = skillfast.export(model, skill, tmp_path / f"made{kind}", scale=0.4)
        again = type(model).from_pretrained(folder)
        check_equal(model, skill, again, 0.4, input_ids=ids)


@pytest.mark.filterwarnings("ignore:sites cover")
def test_what_no_checkpoint_can_hold_is_refused(tmp_path: Path) -> None:
    model = make_vit()
    skill, folder = Skill("deer", {"blocks.0.mlp": [1]}), tmp_path / "made"

    def refused(error: type[Exception], model: nn.Module, skill: Any, **settings: Any) -> str:
        text = one_line(error, skillfast.export, model, skill, folder, **settings)
        assert not list(tmp_path.iterdir())  # nothing half written
        return text

    assert "which is not the same for every example" in refused(ArgumentError, model, skill, mode="resample")
    assert "expected reference=scores" in refused(ArgumentError, model, skill, mode="mean")
    assert "expected at least one, got none" in refused(ArgumentError, model, [])
    assert "expected sites that the model has" in refused(ArgumentError, model, Skill("deer", {"blocks.9.mlp": [1]}))
    wrong = refused(ModelError, model, skill, model_kwargs={**VIT, "depth": 2})
    assert wrong.startswith("export: expected model_kwargs that make this VisionTransformer again")

    tied = planted.Copies()
    tied.write.weight = nn.Parameter(torch.randn(12, 12))
    tied.again = nn.Linear(12, 12)
    tied.again.weight = tied.write.weight
    assert "write.weight shared with again.weight" in refused(ModelError, tied, skill)

    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model.blocks[0].mlp.fc2 = Adapted(96, 24)
    assert "expected a plain linear layer or convolution at blocks.0.mlp.fc2, got Adapted" in refused(
        ModelError, model, skill
    )
    model.blocks[0].mlp.fc2 = nn.Linear(96, 24)
    model.blocks[0].mlp.fc2.weight = nn.Parameter(torch.zeros(24, 96, dtype=torch.int8), requires_grad=False)
    assert "in floating point and in memory, got weights of torch.int8" in refused(ModelError, model, skill)
    model.blocks[0].mlp.fc2 = nn.Linear(96, 24, device="meta")
    assert "got weights that are offloaded" in refused(ModelError, model, skill)

    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    assert "expected a new one" in one_line(ArgumentError, skillfast.export, make_vit(), skill, folder)
    assert (folder / "mine.txt").read_text() == "kept"


def test_nothing_of_skillfast_runs_the_checkpoint(tmp_path: Path) -> None:
    model = planted.model()
    images, labels = planted.images(60)
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "class_token": False,
              "global_pool": "avg"}  # fmt: skip
    skill = Skill("2", planted.PLANTED[2])
    folder = skillfast.export(model, skill, tmp_path / "made", model_kwargs=kwargs)
    torch.save((images, labels), tmp_path / "data.pt")
    code = (
        "import sys, timm, torch\n"
        "from safetensors.torch import load_file\n"
        f"model = timm.create_model('local-dir:{folder}').eval()\n"
        f"model.load_state_dict(load_file('{folder}/model.safetensors'))\n"
        f"images, labels = torch.load('{tmp_path}/data.pt')\n"
        "right = model(images).argmax(1) == labels\n"
        "assert 'skillfast' not in sys.modules\n"
        "print([bool(right[labels == c].all()) for c in range(6)], bool(right[labels == 2].any()))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/")
    assert found.stdout.strip() == "[True, True, False, True, True, True] False"


@pytest.mark.filterwarnings("ignore:sites cover")
def test_wrapped_models_are_refused_and_an_empty_folder_is_taken(tmp_path: Path) -> None:
    model, skill, folder = make_vit(), Skill("deer", {"blocks.0.mlp": [1]}), tmp_path / "made"
    for flag, words in (
        ("hf_quantizer", "got a quantised one; load it without quantisation"),
        ("_hf_peft_config_loaded", "got one with adapters; merge them into the weights first"),
    ):
        setattr(model, flag, True)
        text = one_line(ModelError, skillfast.export, model, skill, folder)
        assert text == f"export: expected a model in plain floating point, {words}"
        delattr(model, flag)
    text = one_line(ModelError, skillfast.export, model, skill, folder, model_kwargs={**VIT, "colour": "red"})
    assert "got {'img_size': 16" in text
    assert "unexpected keyword argument 'colour'" in text
    folder.mkdir()
    assert skillfast.export(model, skill, folder, model_kwargs={**VIT, "num_classes": 5}) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask()
    card = (folder / "README.md").read_text()
    assert "# vit\\_tiny\\_patch16\\_224 with 1 skill removed" in card
