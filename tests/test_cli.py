from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import click
import jsonschema
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, SAFELY, changed, make_pictures

import skillfast
from skillfast import Skill, load_skills
from skillfast.cli import main
from skillfast.options import Command, Numbers, _given_once
from skillfast.results import records
from skillfast.results.bench import BenchResults

SKILLFAST = Path(sys.executable).with_name("skillfast")
TINY = [
    "--model", "vit_tiny_patch16_224", "--model-kwarg", "img_size=16", "--model-kwarg", "patch_size=8",
    "--model-kwarg", "depth=2", "--model-kwarg", "embed_dim=24", "--quiet",
]  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="session")
def bench_output(pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    result = run("bench", *TINY, "--dataset", "imagefolder", "--data-dir", pictures, "--epochs", 8, "--output", output)
    assert result.exit_code == 0, result.output
    return output


def test_bench_on_pictures_of_ones_own(bench_output):
    results = json.loads((bench_output / "results.json").read_text())
    assert results["dataset"]["classes"] == ["blue", "green", "red"]
    assert results["dataset"]["n_test"] == 24
    assert results["model"]["trained"]["from"] == "scratch"
    assert results["model"]["trained"]["epochs"] == 8
    assert results["baseline"]["accuracy"] > 0.9
    jsonschema.validate(results, records.schema(BenchResults))
    found = results["selection"]
    chosen = [found["candidates"][i] for i in found["chosen"]]
    assert len(found["candidates"]) == 12
    assert results["config"]["method"] == "auto"
    skills = json.loads((bench_output / "skills.json").read_text())["skills"]
    assert [(s["method"], s["settings"]["share"]) for s in skills] == [(c["method"], c["share"]) for c in chosen]
    for key, gap in found["gap"].items():  # the same removals, measured twice
        ends = [of["harm"]["cross_fitted"] if key == "harm" else of[key]
                for of in (found["validation"], results["selectivity"])]  # fmt: skip
        assert ends[0] + gap == pytest.approx(ends[1])
    assert not list(bench_output.glob(".*"))


def test_report_makes_the_page_again(bench_output):
    page = bench_output / "report.html"
    before = page.read_text()
    page.unlink()
    result = run("report", bench_output)
    assert result.exit_code == 0
    assert result.output.strip() == f"report: {page}"
    assert page.read_text() == before


def test_compare_shows_runs_side_by_side(bench_output, tmp_path):
    result = run("compare", bench_output, bench_output, bench_output, "--output", tmp_path)
    assert result.exit_code == 0
    assert "baseline accuracy" in result.output
    for arguments in ([bench_output], [bench_output] * 3 + ["--gate", "gates.toml"]):
        result = run("compare", *arguments)
        assert result.exit_code == 2
        assert "runs: expected two, BASE and NEW, got" in result.output


def test_trace_and_ablate(pictures, bench_output, tmp_path):
    data = ["--dataset", "imagefolder", "--data-dir", pictures, "--epochs", 8]
    result = run("trace", *[a for a in TINY if a != "--quiet"], *data, "--output", tmp_path, "--sites", "mlp,head")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "scores.safetensors").is_file()
    assert "label:red" in result.output
    result = run("ablate", *TINY, *data, "--skills", bench_output, "--skill", "red", "--components", "mlp,attn")
    assert result.exit_code == 0, result.output
    assert "skill red" in result.output
    loud = [option for option in TINY if option != "--quiet"]
    result = run("ablate", *loud, *data, "--skills", bench_output, "--skill", "red", "--mode", "resample")
    assert result.exit_code == 0, result.output
    assert re.search(r"(\d+) donors drawn from \1 examples to select on", result.output)
    result = run("ablate", *TINY, *data, "--skills", bench_output, "--mode", "constant")
    assert result.exit_code == 2
    result = run("ablate", *TINY, *data, "--skills", bench_output, "--skill", "pink")
    assert result.exit_code == 2
    assert "Error: skill: expected some of blue, green, red, got pink" in result.output


def test_what_a_dtype_changes_of_a_run(bench_output):
    """In float32 the run's own skills do to its model what the run says; bfloat16 is measured beside it."""
    spec = importlib.util.spec_from_file_location("bench_dtypes", ROOT / "bench" / "bench_dtypes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.measured(bench_output, str(bench_output / "model.safetensors"), 8)
    results = json.loads((bench_output / "results.json").read_text())
    for key in ("target_drop", "regret"):
        assert found["effects"]["float32"][key] == pytest.approx(results["selectivity"][key], abs=1e-6)
        assert found["effects"]["bfloat16"][key] == pytest.approx(results["selectivity"][key], abs=0.2)
    assert 0.7 < min(found["decisions_alike"].values()) <= 1
    times = found["forward_ms_per_image"]
    assert found["forward_ratio"] == pytest.approx(times["bfloat16"] / times["float32"])
    assert min(times.values()) > 0
    assert found["n_test"] == 24


def test_export_of_a_run(bench_output, tmp_path):
    """The run's own model, with the weights that it trained; no data is read."""
    import timm
    from safetensors.torch import load_file

    neurons = load_skills(bench_output)["red"].neurons
    result = run("export", "--skills", bench_output, "--skill", "red", "--output", tmp_path / "made", "--scale", 0.5)
    assert result.exit_code == 0, result.output
    assert result.output.strip().endswith(f"checkpoint: {tmp_path / 'made'}")
    again = timm.create_model(f"local-dir:{tmp_path / 'made'}", pretrained=True).state_dict()
    trained = load_file(bench_output / "model.safetensors")
    assert again.keys() == trained.keys()
    paths = {"attn": "attn.proj", "mlp": "mlp.fc2"}
    for site, index in neurons.items():
        block, _, kind = site.rpartition(".")
        name = f"{block}.{paths[kind]}.weight" if block else "head.weight"
        trained[name][:, index] *= 0.5
    assert all(torch.equal(again[name], trained[name]) for name in trained)
    named = [*TINY, "--checkpoint", bench_output / "model.safetensors", "--skills", bench_output, "--skill", "red"]
    result = run("export", *named, "--scale", 0.5, "--output", tmp_path / "named")
    assert result.exit_code == 0, result.output
    assert all(
        torch.equal(load_file(tmp_path / "named" / "model.safetensors")[name], trained[name]) for name in trained
    )
    dials = skillfast.save_skills(tmp_path / "dials", [replace(load_skills(bench_output)["red"], knob=0.5)])
    named[named.index("--skills") + 1] = dials
    result = run("export", *named, "--knobs", "--output", tmp_path / "turned")
    assert result.exit_code == 0, result.output
    assert all(
        torch.equal(load_file(tmp_path / "turned" / "model.safetensors")[name], trained[name]) for name in trained
    )
    for wrong, words in (
        (["--knobs", "--scale", "2"], "scale: expected it without --knobs, got both (2); leave one out"),
        (["--skill", "pink"], "skill: expected some of blue, green, red, got pink"),
        (["--output", tmp_path / "made"], "expected a new one, got files in it"),
        (["--mode", "mean"], "mode 'mean': expected reference=scores of a trace, got none"),
        ([*TINY, "--skill", "red"], "weights: expected --checkpoint or --pretrained with vit_tiny_patch16_224"),
    ):
        options = changed(["--skills", bench_output, "--output", tmp_path / "other"], wrong)
        result = run("export", *options)
        assert result.exit_code == 2, result.output
        assert words in result.output
    assert not (tmp_path / "other").exists()


def test_export_of_the_default_model(trained_digits, tmp_path):
    import timm

    skillfast.save_skills(tmp_path, [Skill("3", {"blocks.1.mlp": [4, 7], "head": [0]})])
    result = run("export", "--skills", tmp_path, "--output", tmp_path / "made")
    assert result.exit_code == 0, result.output
    again = timm.create_model(f"local-dir:{tmp_path / 'made'}", pretrained=True).state_dict()
    weights = trained_digits.state_dict()
    differ = {name: (again[name] != weights[name]).nonzero()[:, -1].unique().tolist() for name in weights}
    assert {name: columns for name, columns in differ.items() if columns} == {
        "blocks.1.mlp.fc2.weight": [4, 7], "head.weight": [0],
    }  # fmt: skip


@pytest.mark.parametrize("method", ["spearman", "auroc", "mutual_info", "attribution", "erase"])
def test_bench_by_a_method_that_is_named(pictures, tmp_path, method):
    result = run("bench", *TINY, "--dataset", "imagefolder", "--data-dir", pictures, "--epochs", 8, "--method", method,
                 "--bins", 64, "--output", tmp_path)  # fmt: skip
    assert result.exit_code == 0, result.output
    skills = json.loads((tmp_path / "skills.json").read_text())["skills"]
    assert {skill["method"] for skill in skills} == {method}
    assert method in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("model_type", "name", "code", "words"),
    [
        ("llama", "LlamaForCausalLM", 0, "sites cover 100 % of the blocks' weights (random inputs, on a small copy"),
        ("mixtral", "MixtralForCausalLM", 0, "sites cover 100 % of the blocks' weights (random inputs, on a small"),
        ("deepseek_v4", "DeepseekV4ForCausalLM", 1, "past them act model.layers.*.attn_hc.fn (0.79 %)"),
    ],
)
def test_info_certifies_sites(tmp_path, model_type, name, code, words):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.AutoConfig.for_model(model_type)
    config.architectures = [name]
    config.save_pretrained(tmp_path)
    result = run("info", "--model", f"hf:{tmp_path}", "--verify")
    assert result.exit_code == code, result.output
    assert words in result.output.replace("\n", " ")


def test_info():
    result = run("info", "--model", "vit_tiny_patch16_224", "--model-kwarg", "depth=2")
    assert "  embedded:gemma-3-270m: decoder, " in result.output
    assert result.exit_code == 0
    assert re.search(r"blocks\.1\.mlp.*768", result.output)
    assert "native" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--nonsense"], 2, "No such option"),
        (["--dataset", "mnist"], 2, "Invalid value for '--dataset'"),
        (["--dataset", "imagefolder"], 2, "expected --data-dir with --dataset imagefolder"),
        (["--statistics", "pearson", "--method", "auroc"], 2, "expected one of the statistics that are traced"),
        (["--batch-size", "0"], 2, "batch_size: expected at least 1, got 0"),
        (["--mean", "a"], 2, "expected numbers such as"),
        (
            ["--model", "vit_tiny_patch16_224", "--dataset", "cifar10", "--mean", "0.5", "0.5"],
            2,
            "mean: expected 1 number, or 3 for RGB images, got 2",
        ),
        (["--mean", "0.5", "--mean", "0.4"], 2, "--mean: expected once, got twice; give all its numbers at once"),
        (["--mean", "0.5"], 2, "mean: expected with --dataset cifar10 or imagefolder, got it with digits"),
        (["--sites", "mlp", "--sites", "attn"], 2, "--sites: expected once, got twice; give all its names at once"),
        (["--seed=1", "--seed", "1"], 2, "--seed: expected once, got twice; leave one of them out"),
        (["--resume", "--no-resume"], 2, "--no-resume: expected once, got twice"),
        (["--std", "0"], 2, "std: expected more than 0, got 0.0"),
        (["--share", "3"], 2, "share: expected a number in (0, 1], got 3.0; leave it out for 0.03"),
        (["--max-site-share", "0"], 2, "max_site_share: expected a number in (0, 1], got 0.0"),
        (["--scale", "nan"], 2, "scale: expected a finite number, got nan"),
        (["--bins", "1"], 2, "bins: expected a number in [2, 256], got 1"),
        (["--crop-pct", "1.5"], 2, "crop_pct: expected a number in (0, 1], got 1.5"),
        (["--train-per-class", "-1"], 2, "train_per_class: expected at least 2, got -1"),
        (["--control-draws", "-2"], 2, "control_draws: expected at least 1, got -2"),
        (["--seed", "-1"], 2, "seed: expected at least 0, got -1"),
        (["--statistics", "pearson,spearmint"], 2, "statistics: expected one of pearson, spearman, auroc"),
        (["--dtype", "int8"], 2, "Invalid value for '--dtype'"),
        (["--device", "cuda:99"], 2, "device 'cuda:99': expected one that is there"),
        (["--device", "abacus"], 2, "device: expected cpu, cuda or cuda:<number>, got 'abacus'"),
        (["--model", "vit_tiny_patch16_223"], 2, "vit_tiny_patch16_224"),
        (["--model", "resnet18", "--epochs", "1"], 1, "ResNet: expected blocks named as in a known family"),
        (["--model", "vit_tiny_patch16_224"], 2, "expected one for the digits' [1, 8, 8] images, got one for [3, 224"),
        (["--model", "vit_tiny_patch16_224", "--checkpoint", "nowhere.safetensors"], 2, "nowhere.safetensors"),
        (["--model", "vit_tiny_patch16_224", "--model-kwarg", "depth"], 2, "expected key=value, got 'depth'"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, code, words, tmp_path):
    result = run("bench", *arguments, "--quiet", "--output", tmp_path / "out")
    assert result.exit_code == code, result.output
    assert words in result.output
    assert "Traceback" not in result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert not (tmp_path / "out" / "results.json").exists()


def test_what_cannot_be_is_told_before_the_default_model_is_trained(tmp_path, monkeypatch):
    from skillfast.models import digits

    monkeypatch.setattr(digits, "load_or_train_digits", lambda *_, **__: pytest.fail("trained for nothing"))
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (["--sites", "nose"], "site 'nose': expected one of mlp, attn, head"),
        (["--output", tmp_path / "file" / "out"], "expected one that can be written"),
    ):
        result = run("trace", "--quiet", *arguments)
        assert result.exit_code == 2, result.output
        assert words in result.output


def test_trace_shows_whatever_statistic_there_is(pictures, tmp_path):
    arguments = [a for a in TINY if a != "--quiet"]
    result = run("trace", *arguments, "--dataset", "imagefolder", "--data-dir", pictures, "--finetune", "none",
                 "--statistics", "spearman", "--output", tmp_path)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "spearman" in result.output


def test_a_wrong_site_is_told(pictures, tmp_path):
    result = run("trace", *TINY, "--dataset", "imagefolder", "--data-dir", pictures, "--finetune", "none",
                 "--sites", "mlp,nose", "--output", tmp_path)  # fmt: skip
    assert result.exit_code == 2
    assert "Error: site 'nose': expected one of mlp, attn, head or a name from" in result.output


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("bench", "--quiet", "--output", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert "expected one that can be written" in result.output


def test_a_baseline_near_chance_is_warned_of(tmp_path):
    noise = make_pictures(tmp_path / "noise", 5, 10, colour=0)
    arguments = [a for a in TINY if a != "--quiet"]
    result = run("bench", *arguments, "--dataset", "imagefolder", "--data-dir", noise, "--finetune", "none",
                 "--method", "pearson", "--output", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search(r"^baseline accuracy \d", result.output, re.MULTILINE)
    assert "near chance" in result.output
    assert "--mean, --std, --crop-pct" in result.output


def test_numbers_in_timms_spelling():
    params = [click.Option(["--mean"], type=Numbers()), click.Option(["--std"], type=Numbers())]
    assert list(_given_once(params, ["--mean", "0.5", "0.4", "-0.3", "--std", "1", "x"])) == [
        "--mean", "0.5,0.4,-0.3", "--std", "1", "x",
    ]  # fmt: skip


def test_what_looks_like_an_option_may_be_a_value():
    command = Command("c", params=[click.Option(["--prompt"]), click.Option(["--seed"]), click.Argument(["rest"])])
    parsed = command.make_context("c", ["--prompt", "--seed", "--seed", "2", "--", "--seed"]).params
    assert parsed == {"prompt": "--seed", "seed": "2", "rest": "--seed"}


@pytest.mark.parametrize("command", [[], ["bench"], ["trace"]])
def test_help_is_fast_and_imports_no_torch(command):
    code = (
        "import sys; from skillfast.cli import main\n"
        f"try: main({[*command, '--help']!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'numpy', 'scipy', 'rich', 'plotly'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "COVERAGE_PROCESS_START": ""}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment, cwd="/")
    times = []
    for _ in range(3):
        before = os.times()
        subprocess.run([SKILLFAST, *command, "--help"], check=True, capture_output=True)
        times.append(sum(os.times()[2:4]) - sum(before[2:4]))  # of CPU, which other processes take nothing from
    assert min(times) < 0.3


def test_an_interrupted_run_leaves_no_result(pictures, tmp_path):
    command = [SKILLFAST, "bench", *TINY, "--dataset", "imagefolder", "--data-dir", pictures, "--epochs", "100000"]
    process = subprocess.Popen(
        [*command, "--output", tmp_path],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
    )
    deadline = time.monotonic() + 60
    while not any(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline - 45:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Aborted!" in errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] in ([], [".unfinished"])  # no stage of it was finished
    assert not list(tmp_path.glob(".unfinished/*/"))


@pytest.mark.slow
def test_cifar10_with_a_half_trained_model(shared, tmp_path):
    """Real images and a real checkpoint, by the command line, in a process of its own; masks would take minutes."""
    checkpoint = shared / "models" / "vit_cifar10_half.safetensors"
    if not checkpoint.is_file():
        pytest.skip(f"no model at {checkpoint}")
    _unpack(shared / "data" / "cifar10.tar.gz", tmp_path / "cifar", {"train": 8, "test": 3})
    command = [
        SKILLFAST, "bench", "--dataset", "imagefolder", "--data-dir", tmp_path / "cifar",
        "--model", "vit_tiny_patch16_224", "--model-kwarg", "img_size=32", "--model-kwarg", "patch_size=4",
        "--model-kwarg", "depth=6", "--checkpoint", checkpoint, "--mean", "0.4914", "0.4822", "0.4465",
        "--std", "0.247", "0.2435", "0.2616", "--crop-pct", "1.0", "--control-draws", "2", "--method", "attribution",
        "--contrastive", "--output", tmp_path / "out",
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0.5 < results["baseline"]["accuracy"] < 0.75
    assert results["model"]["trained"] == {"from": "checkpoint", "finetune": "none", "epochs": 0, "n_train": 0}
    assert results["selectivity"]["target_drop"] > results["random_control"]["target_drop"]
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    assert "progress" not in done.stderr


def _unpack(archive, target, counts):
    """The first images of each class of each part."""
    with tarfile.open(archive) as tar:
        for member in tar:
            part, _, name = member.name.partition("/")
            if member.isfile() and int(Path(name).stem) < counts[part]:
                tar.extract(member, target, **SAFELY)
