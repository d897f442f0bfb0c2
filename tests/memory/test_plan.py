"""Plans from configurations: exact where they say so, and near what is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import one_line

import skillfast
from skillfast.cli import main
from skillfast.errors import ArgumentError, ModelError
from skillfast.memory import footprint
from skillfast.memory.config import PlanConfig
from skillfast.memory.plan import kinds_of, parse_bytes, plan

transformers = pytest.importorskip("transformers", reason="needs transformers")

DATA = Path(__file__).parents[1] / "configurations"
LARGE = {"llama-3-70b": (70_553_706_496, 80, 28672, 8192), "llama-3.1-405b": (405_853_388_800, 126, 53248, 16384)}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 56, "vocab_size": 70}


def config_file(folder, model_type="llama", architecture="LlamaForCausalLM", **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": model_type, "architectures": [architecture], **SIZES, **settings}))
    return str(path)


@pytest.mark.parametrize("name", LARGE)
def test_published_models_are_planned_without_memory(name):
    parameters, layers, mlp, hidden = LARGE[name]
    found = plan(str(DATA / f"{name}.json"), PlanConfig(devices=8, tokens=64), device_memory=parse_bytes("80GiB"))
    assert found.parameters == parameters
    assert len(found.sites) == 2 * layers + 1
    assert found.neurons == layers * (mlp + hidden) + hidden
    assert found.sites[0].heads == hidden // 128
    assert sum(device.weights for device in found.devices) == 2 * parameters
    assert sum(device.neurons for device in found.devices) == found.neurons
    assert found.fits == (name == "llama-3-70b")
    assert found.devices[0].parts[0] == footprint.FIRST
    assert found.devices[-1].parts[1] == footprint.LAST
    largest = max(device.peak for device in found.devices)
    assert largest < 1.25 * min(device.peak for device in found.devices)


def test_remedies_are_settings_that_fit(tmp_path):
    """An eighth of the blocks of the largest model on an eighth of its devices: 103 GiB."""
    settings = PlanConfig(devices=1, tokens=64)
    large = json.loads((DATA / "llama-3.1-405b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**large, "num_hidden_layers": 16}))
    name, memory = str(tmp_path / "config.json"), parse_bytes("80GiB")
    found = plan(name, settings, device_memory=memory)
    said = dict(found.remedies)
    assert {"--bits 8", "--devices 2"} <= said.keys()
    for change, words in (({"bits": 8}, "--bits 8"), ({"devices": 2}, "--devices 2")):
        again = plan(name, replace(settings, **change), device_memory=memory)
        assert again.fits
        assert max(device.peak for device in again.devices) == said[words]
    assert "does not fit: largest peak" in found.verdict()
    assert "--bits 8: " in found.verdict()


def test_where_weights_alone_do_not_fit_no_batch_is_tried(tmp_path, monkeypatch):
    forwards = []
    monkeypatch.setattr(footprint, "forward_peaks", lambda model, batch, tokens: forwards.append(batch) or {})
    hopeless = plan(config_file(tmp_path), PlanConfig(batch_size=8, tokens=4), device_memory=1 << 10)
    assert not hopeless.remedies
    assert "no single setting" in hopeless.verdict()
    assert forwards == [8]


def test_a_smaller_batch_is_a_remedy_that_fits(tmp_path):
    name, settings = config_file(tmp_path), PlanConfig(statistics=("pearson",), batch_size=64, tokens=64)
    (device,) = plan(name, settings, device_memory=1 << 40).devices
    found = plan(name, settings, device_memory=device.peak - 1)
    (less,) = plan(name, replace(settings, batch_size=32), device_memory=1 << 40).devices
    assert dict(found.remedies)["--batch-size 32"] == less.peak < device.peak


def test_where_nothing_alone_fits_the_strongest_together_do(tmp_path):
    name, settings = config_file(tmp_path), PlanConfig(batch_size=64, tokens=64)
    together = replace(settings, statistics=("pearson",), batch_size=1, bits=4)
    (device,) = plan(name, together, device_memory=1 << 40).devices
    found = plan(name, settings, device_memory=device.peak)
    assert found.remedies == (("--statistics pearson --batch-size 1 --bits 4", device.peak),)
    assert not plan(name, settings, device_memory=device.peak - 1).remedies


@pytest.mark.parametrize("statistics", [("pearson",), ("pearson", "spearman"), skillfast.vocabulary.STATISTICS])
@pytest.mark.parametrize("n_bootstrap", [None, 8])
@pytest.mark.parametrize(
    ("model_type", "architecture", "sites"),
    [("llama", "LlamaForCausalLM", ("mlp", "attn")), ("bert", "BertForMaskedLM", ("mlp", "attn", "head"))],
)
def test_the_state_is_exact(tmp_path, statistics, n_bootstrap, model_type, architecture, sites):
    name = config_file(tmp_path, model_type, architecture)
    settings = PlanConfig(
        statistics=statistics, n_bootstrap=n_bootstrap, bins=8, sites=sites, classes=3, dtype="float32", tokens=4
    )
    found = plan(name, settings, device_memory=1 << 40)
    model = getattr(transformers, architecture)(transformers.AutoConfig.for_model(**json.loads(Path(name).read_text())))
    tracer = skillfast.Tracer(
        model.eval(),
        kinds_of(settings),
        sites=sites,
        statistics=statistics,
        bins=8,
        n_bootstrap=n_bootstrap,
        pool="last",
    )
    g = torch.Generator().manual_seed(0)
    n = 0
    with tracer, torch.no_grad():
        while n < 8 * 16 + 64:  # more than are kept to be exact
            ids = torch.randint(0, 70, (32, 4), generator=g)
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
            noise = torch.rand(32, generator=g)
            tracer.step(label=(3 * noise).long(), correct=noise > 0.5, confidence=noise, loss=noise.square())
            n += 32
    state = tracer._groups()[0].statistics.state
    tensors = [*state.moments.tensors().values()]  # of those of the metrics only their products count
    tensors += [] if state.table is None else [state.table.edges, state.table.table]
    tensors += [] if state.replicates is None else state.replicates.tensors().values()
    between = state.moments.sum_between.nbytes
    assert found.state == between + sum(tensor.nbytes for tensor in tensors if found.neurons in tensor.shape)


def test_weights_and_parts_add_up():
    from skillfast.models.huggingface import load_config, skeleton

    model = skeleton(load_config(str(DATA / "llama-3-70b.json")))
    parts = footprint.parts_of(model)
    assert parts[:2] == (footprint.FIRST, "model.layers.0")
    assert parts[-2:] == ("model.layers.79", footprint.LAST)
    full, four, eight = (footprint.weights_by_part(model, 2, bits) for bits in (None, 4, 8))
    assert sum(full.values()) == 2 * 70_553_706_496
    assert full[footprint.FIRST] == full[footprint.LAST] - 2 * 8192 == 2 * 128256 * 8192
    assert four[footprint.FIRST] == full[footprint.FIRST]
    block = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    assert eight["model.layers.3"] == block + 2 * 2 * 8192
    assert four["model.layers.3"] == block * 9 // 16 + 2 * 2 * 8192


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"statistics": ("pearson",), "batch_size": 8, "tokens": 256, "examples": 16}, {}),
        ({"bins": 64, "batch_size": 64, "tokens": 4, "examples": 1536}, {"vocab_size": 1000}),
    ],
    ids=["forward", "state"],
)
def test_the_predicted_peak_is_within_a_fifth_of_the_measured(tmp_path, settings, sizes):
    wide = {
        "hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8, "intermediate_size": 2048,
        "vocab_size": 16000, **sizes,
    }  # fmt: skip
    name = config_file(tmp_path, **wide)
    settings = {**settings, "dtype": "float32"}
    found = plan(name, PlanConfig(**settings), device_memory=1 << 40)
    command = [sys.executable, str(Path(__file__).parents[1] / "plan_measured.py"), name, json.dumps(settings)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    measured = json.loads(done.stdout)
    predicted = found.devices[0].peak
    assert 0.8 < predicted / measured["peak"] < 1.2, (found.devices[0], measured)


def test_plan_on_the_command_line(tmp_path):
    name = config_file(tmp_path)
    run = CliRunner().invoke
    result = run(main, ["plan", "--model", f"hf:{name}", "--tokens", "16", "--device-memory", "1GiB"])
    assert result.exit_code == 0, result.output
    assert "fits: largest peak" in result.output
    result = run(
        main, ["plan", "--model", name, "--tokens", "16", "--device-memory", "1MiB", "--json", "--devices", "2"]
    )
    assert result.exit_code == 1
    said = json.loads(result.output)
    assert said["fits"] is False
    assert said["neurons"] == 3 * (56 + 32) + 32
    assert len(said["devices"]) == 2
    result = run(main, ["plan", "--model", name, "--device-memory", "much"])
    assert result.exit_code == 2
    assert "memory: expected a size such as 80GiB, got 'much'" in result.output


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 << 30), ("1.5g", 3 << 29), ("640 MiB", 640 << 20), ("1000", 1000), ("2TB", 2 << 40)]
)
def test_sizes_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"bits": 3}, "bits: expected one of 4, 8, got 3"),
        ({"dtype": "int8"}, "dtype: expected one of float32"),
        ({"statistics": ("mean",)}, "statistics: expected one of pearson"),
    ],
)
def test_settings_that_cannot_be_used(change, words):
    assert words in one_line(ArgumentError, PlanConfig, **change)


def test_a_model_of_images_is_planned_by_the_size_that_its_configuration_tells(tmp_path):
    images = {"image_size": 16, "patch_size": 4, "num_channels": 3}
    name = config_file(tmp_path, "vit", "ViTForImageClassification", **images)
    one, four = (plan(name, PlanConfig(batch_size=n, dtype="float32")) for n in (2, 8))
    assert {site.kind for site in one.sites} == {"mlp", "attn", "head"}
    assert one.coverage.complete
    assert four.devices[0].forward == 4 * one.devices[0].forward
    tokens, widths = 17, 32 + 3 * 32 + 56  # of each token in a block: what comes in, queries, keys, values, neurons
    assert 4 * 2 * tokens * widths * 0.5 < one.devices[0].forward < 4 * 2 * tokens * widths * 2


def test_experts_of_any_width_are_planned(tmp_path):
    """torch's product of experts' rows wants them to be whole multiples of 16 bytes, without memory, too."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    transformers.Qwen3MoeConfig(
        hidden_size=24, intermediate_size=40, moe_intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, vocab_size=99,
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    found = plan(str(tmp_path))
    assert sum(site.width for site in found.sites if site.kind == "expert") == 2 * 4 * 12
    assert found.devices[0].forward > 0


def test_a_model_of_no_family_cannot_be_planned(tmp_path):
    name = config_file(tmp_path, "albert", "AlbertForMaskedLM")
    assert "skillfast.discover(model, batch)" in one_line(ModelError, plan, name)
