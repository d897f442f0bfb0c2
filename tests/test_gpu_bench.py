"""The benchmark for GPUs, tried on the host: its cases run, its file grows with each, its tables say what is in it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time

import pytest
from conftest import ROOT

CASES = ["copy", "ops", "launches", "llama", "ranks"]  # the others take seconds


@pytest.fixture(scope="module")
def modules():
    found = []
    for name in ("gpu", "gpu_table"):
        spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
        found.append(importlib.util.module_from_spec(spec))
        sys.modules[spec.name] = found[-1]  # where its dataclasses look for their module
        spec.loader.exec_module(found[-1])
    return found


@pytest.fixture(scope="module")
def result(modules, tmp_path_factory):
    pytest.importorskip("transformers")
    gpu, _ = modules
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    said = []
    for line in gpu.run_cases(path, gpu.Bench("cpu", gpu.TINY), CASES, float("inf")):
        said.append(line)
        assert list(json.loads(path.read_text())["cases"]) == CASES[: len(said)]  # written as soon as it is done
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def predicted(modules):
    return json.loads(modules[1].PREDICTED.read_text())["programs"]


@pytest.mark.slow
def test_models_run_end_to_end(modules, tmp_path):
    gpu, _ = modules
    bench, path = gpu.Bench("cpu", gpu.TINY), tmp_path / "gpu.json"
    assert all(": done, " in line for line in gpu.run_cases(path, bench, ["vit_small", "skills"], float("inf")))
    found = json.loads(path.read_text())["cases"]["vit_small"]
    assert {f"pooled, all four, {where}" for where in gpu.LOADERS} <= found.keys()


def test_every_case_gives_figures_and_the_tables_are_made_of_them(modules, result, predicted):
    assert not [name for name, case in result["cases"].items() if "failed" in case]
    text = modules[1].tables(result, predicted)
    copied = result["cases"]["copy"]["bytes_per_second"]
    for name, case in result["cases"]["ops"].items():
        share = f"{case['bytes'] / case['seconds'] / copied:.0%}"
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        assert row.split(" | ")[2] == share
    assert f"| {result['cases']['llama']['every token, Pearson']['ratio']:.3f} |" in text
    assert "no figures" not in text


def test_predictions_stand_beside_the_ops_of_their_name(modules, predicted):
    """Each kernel that a roofline tells something of is measured."""
    gpu, _ = modules
    named = gpu.ops_alone(gpu.Bench("cpu", gpu.TINY))
    assert set(predicted) <= set(named) | {name.split(",")[0] for name in named}


def test_a_case_that_failed_or_died_is_told_and_not_tried_again(modules, tmp_path, monkeypatch, predicted):
    gpu, table = modules
    path = tmp_path / "gpu.json"
    bench = gpu.Bench("cpu", gpu.TINY)
    broken = {"copy": (1, lambda _: 1 / 0), "ops": (1, lambda _: {}), "ranks": (1, lambda _: {}), "sweep": (99, None)}
    monkeypatch.setattr(gpu, "CASES", broken)
    list(gpu.run_cases(path, bench, ["copy"], float("inf")))
    found = json.loads(path.read_text())
    found["cases"]["ops"] = {"begun": True}  # a process that died in it
    path.write_text(json.dumps(found))
    said = list(gpu.run_cases(path, bench, list(broken), time.time() + 50))
    assert [line.split(":")[0] for line in said] == ["ranks", "sweep"]
    assert "left for a run with 99 s more" in said[1]
    text = table.tables(json.loads(path.read_text()), predicted)
    assert "copy: no figures (ZeroDivisionError: division by zero)." in text
    assert "ops: no figures (the process ended in it)." in text


def test_tables_go_between_the_marks_of_a_page(modules, predicted):
    _, table = modules
    sample = {
        "machine": {
            "device": "a GPU", "date": "2026-01-01", "skillfast": "0", "torch": "2", "triton": "3", "python": "3",
        },
        "cases": {
            "copy": {"bytes_per_second": 3e12, "operations_per_second": 7e14},
            "ops": {"act_mask_pool gelu mean": {"seconds": 1e-4, "bytes": 2.7e8}},
            "vit_base": {
                "waits_per_step": 0.25,
                "pooled, all four, on the device": {
                    "ratio": 1.031, "least": 1.02, "most": 1.05, "seconds": 0.1031, "plain_seconds": 0.1,
                },
            },
            "sweep": {"conditions": 40, "in the last block": {"ratio": 20.04}, "in the last block: waits": 9},
            "bench": {"left_out": "expected a folder"},
        },
    }  # fmt: skip
    begin, end = table.MARKS
    text = table.written(f"before\n{begin}\nold\n{end}\nafter\n", table.tables(sample, predicted))
    assert text.startswith(f"before\n{begin}\na GPU, 2026-01-01: ")
    assert text.endswith(f"{end}\nafter\n")
    assert "\nold\n" not in text
    assert "| act_mask_pool gelu mean | 100.0 | 90% | 100% | 90% |" in text
    assert "| ViT-B/16 | pooled, all four, on the device | 1.031 | 1.020 to 1.050 | 103.1, 100.0 | 1.04 |" in text
    assert "| in the last block | 20.0 |" in text
    assert "| sweep, in the last block: waits in all | 9 |" in text
    assert "| ViT-B/16, pooled, all four: waits per step | 0.25 |" in text
    assert "bench: no figures (expected a folder)." in text
    with pytest.raises(ValueError, match="expected the marks"):
        table.written("a page", "text")


@pytest.mark.parametrize("name", ["gpu.sh", "gpu_carry.sh"])
def test_the_scripts_are_shell(name):
    subprocess.run(["bash", "-n", str(ROOT / "bench" / name)], check=True)
