"""Language models that are offloaded, spread over devices, sharded over processes or quantised."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import one_line
from tiny_models import WORDS, save_model

import skillfast
from skillfast import Condition, Skill
from skillfast.cli import main
from skillfast.data import loader
from skillfast.data.text import read_text
from skillfast.errors import ArgumentError, ModelError
from skillfast.metrics import parse_metrics
from skillfast.models import huggingface
from skillfast.models.digests import weights_digest
from skillfast.models.huggingface import load_language_model, quantization
from skillfast.models.text_classifier import TextClassifier
from skillfast.models.text_inputs import Prompt, TextForward, TokenExamples, batches
from skillfast.runs.config import BenchConfig

pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SKILL = Skill("s", {"blocks.0.mlp": [0, 5, 7], "blocks.1.attn": [1, 2], "blocks.2.mlp": [3], "head": [1]})
CONDITIONS = [Condition(SKILL), Condition(SKILL, ("attn",), scale=2.0), Condition(SKILL, ("head",))]
PROMPT = Prompt("{text} it is", ("bad", "good"))
# the first blocks in memory, the rest on disk: their weights are there during a forward only
PLACES = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
    "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """47 texts of 2 to 9 words, which do not divide by two."""
    g = np.random.default_rng(0)
    rows = [f"{' '.join(g.choice(WORDS, size=2 + i % 8))}\t{i % 2}" for i in range(47)]
    path = tmp_path / "x.tsv"
    path.write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    return path


def outcome(folder, data, **placed):
    """Scores, predictions of a sweep, and logits inside `ablate`, of a Llama that is asked through a prompt."""
    loaded = load_language_model(str(folder), "causal", **placed)
    table = read_text(data)
    model = TextClassifier(loaded, 2, PROMPT.ids(loaded.tokenizer, table.classes))
    examples = TokenExamples(table, loaded, PROMPT)
    forward = TextForward(parse_metrics(("label", "confidence", "loss"), table.classes))
    scores = skillfast.trace(
        model, batches(examples, 8), forward.kinds, forward=forward, mask=lambda batch: batch["attention_mask"]
    )
    swept = skillfast.sweep(model, loader(examples, 8), CONDITIONS, classes=2, keep_predictions=True)
    with skillfast.ablate(model, SKILL), torch.no_grad():
        logits = torch.cat([model(packed) for packed, _ in loader(examples, 8)])
    return model, scores, swept, logits.float().cpu()


def test_a_model_partly_on_disk_traces_and_ablates_as_the_plain_one(tmp_path, data):
    pytest.importorskip("accelerate")
    folder = save_model(tmp_path / "model", "LlamaForCausalLM", num_hidden_layers=3)
    whole, scores, swept, logits = outcome(folder, data)
    model, got, again, same = outcome(folder, data, device_map=PLACES)
    assert model.language_model.get_submodule("model.layers.1.mlp.down_proj").weight.device.type == "meta"
    assert weights_digest(model) == weights_digest(whole)  # of the values on disk, too
    np.testing.assert_allclose(got.mean, scores.mean, atol=1e-6)
    np.testing.assert_allclose(got.pearson, scores.pearson, atol=1e-5)
    np.testing.assert_array_equal(again.predictions, swept.predictions)
    torch.testing.assert_close(same, logits)
    assert (again.predictions[0] != again.top2[:, 0]).any()  # the removal did something
    rows = loader(TokenExamples(read_text(data), load_language_model(str(folder), "causal"), PROMPT), 8)
    wanted, attributed = (skillfast.attribute(each, rows, classes=2) for each in (whole, model))
    np.testing.assert_allclose(attributed.values, wanted.values, atol=1e-6)
    wanted, learned = (
        skillfast.learn_masks(each, rows, attributed, share=0.1, steps=3).values for each in (whole, model)
    )
    np.testing.assert_allclose(learned, wanted, atol=1e-5)


def cli_options(folder, data, output):
    return [
        "--model", f"hf:{folder}", "--dataset", "text", "--data-file", str(data), "--prompt", PROMPT.template,
        "--label-words", ",".join(PROMPT.words), "--batch-size", "16", "--pool", "last", "--output", str(output),
    ]  # fmt: skip


def test_the_command_line_spreads_a_model(tmp_path, data):
    pytest.importorskip("accelerate")
    folder = save_model(tmp_path / "model", "LlamaForCausalLM")
    for output, more in (("plain", []), ("spread", ["--device-map", "auto"])):
        result = CliRunner().invoke(main, ["trace", *cli_options(folder, data, tmp_path / output), *more])
        assert result.exit_code == 0, result.output
    plain, spread = (skillfast.NeuronScores.load(tmp_path / name) for name in ("plain", "spread"))
    np.testing.assert_allclose(spread.pearson, plain.pearson, atol=1e-2 if torch.cuda.is_available() else 1e-6)


def test_a_spread_model_is_not_trained(tmp_path, data):
    pytest.importorskip("accelerate")
    folder = save_model(tmp_path / "model", "BertForMaskedLM")
    options = [o for o in cli_options(folder, data, tmp_path) if o not in ("--prompt", "--label-words")]
    options = [o for o in options if o not in (PROMPT.template, ",".join(PROMPT.words))]
    result = CliRunner().invoke(main, ["trace", *options, "--device-map", "auto"])
    assert result.exit_code == 1
    assert "expected weights with a head for 0, 1 with --device-map or --bits, got none" in result.output


def test_what_does_not_go_together_is_refused(monkeypatch):
    text = {"model": "hf:x", "dataset": "text", "data_file": "x.tsv"}
    assert "--finetune: expected none with --device-map, got 'all'" in one_line(
        ArgumentError, BenchConfig.of, **text, device_map="auto", finetune="all"
    )
    assert "device: expected --device or --device-map, got both (cpu, auto)" in one_line(
        ArgumentError, BenchConfig.of, **text, device_map="auto", device="cpu"
    )
    assert "bits: expected one of 4, 8, got 3" in one_line(ArgumentError, BenchConfig.of, **text, bits=3)
    assert "device_map: expected one of auto, balanced" in one_line(
        ArgumentError, BenchConfig.of, **text, device_map="everywhere"
    )
    assert "--bits: expected a language model with it, got None" in one_line(ArgumentError, BenchConfig.of, bits=4)
    monkeypatch.setattr(huggingface.importlib.util, "find_spec", lambda name: None)
    assert "pip install bitsandbytes" in one_line(ModelError, quantization, 4, torch.float16)
    assert quantization(None, torch.float16) is None


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
import skillfast
from skillfast.metrics import parse_metrics
from skillfast.data.text import read_text
from skillfast.models.text_inputs import Collate, TextForward, TokenExamples
from skillfast.models.huggingface import load_language_model
from skillfast.models.text_classifier import TextClassifier

model_folder, data, folder, rank = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=2)
loaded = load_language_model(model_folder, "classification", classes=["0", "1"])
examples = TokenExamples(read_text(data), loaded)
forward = TextForward(parse_metrics(("label", "confidence", "loss"), examples.classes))
sampler = DistributedSampler(examples, shuffle=False)
scores = skillfast.trace(
    TextClassifier(loaded, 2), DataLoader(examples, 8, sampler=sampler, collate_fn=Collate(loaded)), forward.kinds,
    forward=forward, mask=lambda batch: batch["attention_mask"],
)
scores.save(f"{folder}/{rank}")
dist.destroy_process_group()
"""


def test_two_processes_over_shards_of_text_give_the_result_of_one(tmp_path, data):
    """Texts of different lengths: either process pads its batches otherwise than the single one."""
    folder = save_model(tmp_path / "model", num_labels=2)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, *map(str, (tmp_path / "script.py", folder, data, tmp_path))]
    running = [subprocess.Popen([*command, rank], stderr=subprocess.PIPE, text=True) for rank in "01"]
    for process in running:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors[-3000:]
    loaded = load_language_model(str(folder), "classification", classes=["0", "1"])
    examples = TokenExamples(read_text(data), loaded)
    assert len(set(examples.lengths)) > 4
    forward = TextForward(parse_metrics(("label", "confidence", "loss"), examples.classes))
    want = skillfast.trace(
        TextClassifier(loaded, 2), batches(examples, 8), forward.kinds, forward=forward,
        mask=lambda batch: batch["attention_mask"],
    )  # fmt: skip
    for rank in ("0", "1"):
        got = skillfast.NeuronScores.load(tmp_path / rank)
        assert got.n_observations == 47
        np.testing.assert_allclose(got.mean, want.mean, atol=1e-5)
        np.testing.assert_allclose(got.pearson, want.pearson, atol=1e-5)
        np.testing.assert_allclose(got.spearman, want.spearman, atol=1e-3)  # neighbours may round otherwise


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_traces_and_ablates(tmp_path, data, bits):
    pytest.importorskip("bitsandbytes")
    folder = save_model(
        tmp_path / "model", "LlamaForCausalLM", hidden_size=64, intermediate_size=128, num_hidden_layers=3
    )
    placed = {"device_map": {"": 0}, "dtype": torch.float16}
    _, plain, *_ = outcome(folder, data, **placed)
    model, scores, swept, logits = outcome(
        folder, data, **placed, quantization_config=quantization(bits, torch.float16)
    )
    assert "bitsandbytes" in type(model.language_model.get_submodule("model.layers.0.mlp.down_proj")).__module__
    assert np.isfinite(scores.mean).all()
    assert np.corrcoef(scores.mean, plain.mean)[0, 1] > 0.9  # rounded weights, the same neurons
    sure = (logits[:, 0] - logits[:, 1]).abs() > 0.05 * logits.abs().max()
    np.testing.assert_array_equal(swept.predictions[0][sure.numpy()], logits.argmax(1).numpy()[sure.numpy()])


@pytest.mark.gpu
@pytest.mark.parametrize("bits", ["4", "8"])
def test_the_command_line_quantises(tmp_path, data, bits):
    pytest.importorskip("bitsandbytes")
    folder = save_model(tmp_path / "model", "LlamaForCausalLM", hidden_size=64, intermediate_size=128)
    options = [*cli_options(folder, data, tmp_path / "out"), "--bits", bits, "--dtype", "float16", "--share", "0.02"]
    result = CliRunner().invoke(main, ["bench", *options, "--method", "pearson", "--control-draws", "1"])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert found["config"]["bits"] == int(bits)
