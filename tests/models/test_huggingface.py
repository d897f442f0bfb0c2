"""Language models from folders and by name, and what is wrong with them in one line."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest
import torch
from conftest import one_line
from tiny_models import make_tokenizer, save_model

from skillfast.errors import ArgumentError, ModelError
from skillfast.models import huggingface
from skillfast.models.huggingface import check_ids, encode, load_config, load_language_model, load_tokenizer, skeleton
from skillfast.models.sites import find_sites
from skillfast.models.sizes import check_counts, no_more_than

transformers = pytest.importorskip("transformers", reason="needs transformers")

CLASSES = ["negative", "positive"]


def test_a_folder_with_a_head_keeps_it(tmp_path):
    folder = save_model(tmp_path, num_labels=2)
    loaded = load_language_model(f"hf:{folder}", "classification", classes=CLASSES)
    assert not loaded.head_replaced
    assert not loaded.model.training
    assert loaded.context == 32
    assert loaded.name == str(folder)
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), saved.parameters(), strict=True))
    own = load_language_model(str(folder))
    assert type(own.model).__name__ == "BertForSequenceClassification"
    half = load_language_model(str(folder), "classification", classes=CLASSES, dtype=torch.bfloat16)
    assert next(half.model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(("model_class", "labels"), [("BertForMaskedLM", 2), ("BertForSequenceClassification", 5)])
def test_a_head_that_is_missing_or_of_another_size_is_new_and_depends_on_the_seed(tmp_path, model_class, labels):
    folder = save_model(tmp_path, model_class, num_labels=labels)
    state = torch.random.get_rng_state()
    first, again, other = (
        load_language_model(str(folder), "classification", classes=CLASSES, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.head_replaced
    assert first.model.classifier.out_features == 2
    assert torch.equal(first.model.classifier.weight, again.model.classifier.weight)
    assert not torch.equal(first.model.classifier.weight, other.model.classifier.weight)


def test_the_context_is_the_smaller_of_the_models_and_the_tokenizers(tmp_path):
    folder = save_model(tmp_path, "GPT2LMHeadModel", make_tokenizer(model_max_length=9))
    assert load_language_model(str(folder), "causal").context == 9
    assert load_language_model(str(save_model(tmp_path / "t5", "T5ForConditionalGeneration"))).context == 10**6
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for wrong, said in (([9], "'[9]'"), (0, "'0'"), (math.nan, "'nan'")):
        path.write_text(json.dumps({**settings, "model_max_length": wrong}))
        told = one_line(ModelError, load_language_model, str(folder), "causal")
        assert told.endswith(f"expected a number of tokens as model_max_length, got {said}; check the folder")


def damage(folder, what):
    if what == "config":
        (folder / "config.json").write_text("{", encoding="utf-8")
    elif what == "type":
        (folder / "config.json").write_text('{"model_type": "nobody"}', encoding="utf-8")
    elif what == "weights":
        (folder / "model.safetensors").write_bytes(b"xx")
    elif what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif what in ("layers", "architectures"):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["num_hidden_layers"] = 3
        config["architectures"] = [5] if what == "architectures" else config["architectures"]
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    elif what == "vocabulary":
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["more", "words", "than", "embeddings"])
        tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("config", "expected its configuration, got none: "),
        ("type", "expected its configuration, got none: "),
        ("weights", "expected its weights, got none: "),
        ("no weights", "expected its weights, got none: "),
        ("no tokenizer", "expected "),
        ("architectures", "expected "),  # its configuration, for older versions of the library
        ("layers", "expected all weights of BertForSequenceClassification, got 16 missing (bert.encoder.layer.2"),
        ("vocabulary", "expected a tokenizer for its 33 embeddings, got one of 37 tokens"),
    ],
)
def test_folders_that_cannot_be_loaded(tmp_path, what, words):
    folder = save_model(tmp_path)
    damage(folder, what)
    text = one_line(ModelError, load_language_model, str(folder), "classification", classes=CLASSES)
    assert words in text
    assert str(folder) in text
    assert ("tokenizer" in text) == ("tokenizer" in what or what == "vocabulary")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"num_hidden_layers": 10**9}, "expected at most 10,000 as num_hidden_layers, got 1000000000; check its"),
        ({"num_labels": 10**9}, "expected at most 1,000,000 as num_labels, got 1000000000; check its config.json"),
        ({"text_config": {"depths": [2, 10**400]}}, "expected at most 10,000 as depths, got 1000000"),
        ({"num_hidden_layers": -1}, "expected at least 0 as num_hidden_layers, got -1; check its config.json"),
        ({"hidden_size": 24 * 10**5}, "bytes of weights, got one of more than "),
        ({"vocab_size": 10**9}, "bytes of weights, got one of more than "),
        ({"intermediate_size": 2**40}, "bytes of weights, got one of more than "),
    ],
)
def test_sizes_that_the_weights_cannot_have_are_refused_before_they_are_allocated(tmp_path, monkeypatch, sizes, words):
    folder = save_model(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **sizes}), encoding="utf-8")
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)
    told = one_line(ModelError, load_language_model, str(folder), "classification", classes=CLASSES)
    assert f"model 'hf:{folder}': expected" in told
    assert words in told


def test_as_many_layers_as_there_may_be_are_let_pass():
    check_counts("x", {"num_hidden_layers": 10_000, "of": {"num_labels": 1_000_000, "depths": []}, "vocab_size": 10**9})


def test_packed_weights_may_be_eight_in_a_byte(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(2_000_000))
    with no_more_than("x", weights, packed=True):
        torch.nn.Linear(26_000_000 // 4, 4, bias=False, device="meta")
    with no_more_than("x", tmp_path, packed=False):
        torch.nn.Linear(3_500_000, 4, device="meta", bias=False)
        with pytest.raises(ModelError, match="its 2,000,000 bytes of weights, got one of more than 14,000,000 param"):
            torch.nn.Linear(1, 1, bias=False, device="meta")
    torch.nn.Linear(10**9, 1, device="meta")  # elsewhere nothing is counted


def test_a_classification_head_needs_classes(tmp_path):
    folder = save_model(tmp_path)
    assert "expected at least two" in one_line(ArgumentError, load_language_model, str(folder), "classification")


@pytest.mark.parametrize("name", ["./none", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    assert "expected a folder or a name on the hub, got no such folder" in one_line(ModelError, load_config, name)


def test_a_name_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface, "probe", lambda endpoint: "no route to host")
    for call in (load_config, load_tokenizer, load_language_model):
        text = one_line(ModelError, call, "hf:nobody/nothing-of-this-name")
        assert "it is not in the local cache, and" in text
        assert "cannot be reached (no route to host); pass --model hf:FOLDER" in text


def test_the_library_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'skillfast[llm]'" in one_line(ModelError, load_config, "hf:gpt2")


def test_a_skeleton_has_the_sites_and_no_memory(tmp_path):
    folder = save_model(tmp_path)
    config = load_config(str(folder))
    made = skeleton(config, "classification")
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}
    real = load_language_model(str(folder), "classification", classes=CLASSES)
    assert find_sites(made) == find_sites(real.model)
    by_file = load_config(str(folder / "config.json"))
    assert by_file.to_dict()["hidden_size"] == 24
    (tmp_path / "x.json").write_text('{"hidden_size": 24}', encoding="utf-8")
    assert "expected a config.json with a known model_type" in one_line(
        ModelError, load_config, str(tmp_path / "x.json")
    )
    (tmp_path / "x.json").write_text('{"model_type": "llama", "num_attention_heads": 0}', encoding="utf-8")
    assert "by zero; check the file" in one_line(ModelError, load_config, str(tmp_path / "x.json"))
    config.num_attention_heads = 5
    assert "check the configuration" in one_line(ModelError, skeleton, config)


def test_a_tokenizer_that_panics_is_told_in_a_line(tmp_path, capfd):
    """Its library's Rust code writes a backtrace to stderr, and raises what is no Exception."""
    make_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    values = json.loads(file.read_text())
    del values["post_processor"]["special_tokens"]["[SEP]"]
    file.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"^model 'hf:.*': expected its tokenizer, got none: .*; check the folder$"):
        load_tokenizer(f"hf:{tmp_path}")
    assert capfd.readouterr().err == ""


def test_what_a_tokenizer_writes_to_stderr_while_it_loads_is_kept(tmp_path, capfd, monkeypatch):
    load = transformers.AutoTokenizer.from_pretrained

    def saying(*given, **options):
        os.write(2, b"said\n")
        return load(*given, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", saying)
    make_tokenizer().save_pretrained(tmp_path)
    load_tokenizer(f"hf:{tmp_path}")
    assert capfd.readouterr().err == "said\n"


def test_texts_that_a_tokenizer_cannot_read_are_told_in_a_line(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["unk_token"] = "[NONE]"
    file.write_text(json.dumps(values))
    tokenizer = load_tokenizer(f"hf:{tmp_path}")
    assert encode(tokenizer, "a good film", add_special_tokens=False)["input_ids"] == [4, 15, 12]
    message = r"^tokenizer: expected one that reads the texts, got WordLevel error.*; check the model's tokenizer.json$"
    with pytest.raises(ModelError, match=message):
        encode(tokenizer, ["a good film", "an unknown word"])

    save_model(tmp_path / "model", "LlamaForCausalLM")
    loaded = load_language_model(str(tmp_path / "model"), "causal")
    check_ids(loaded, [[0], [32, 4]])
    for ids, got in (([33, 1], "33"), ([5, -1], "5"), ([], "a text without any")):
        told = one_line(ModelError, check_ids, loaded, [[1], ids])
        assert f"expected tokens from 0 to 32, which the model has embeddings of, got {got}; check" in told

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(interrupted, ["a"])
