"""The machine code of the kernels for a Hopper GPU stays within what a copy's bandwidth allows."""

from __future__ import annotations

import importlib.util
import json

import pytest
import triton
from conftest import ROOT
from packaging.version import Version

# instructions of the main loop per 8 activations, registers, barriers in the loop; 210 and 32 bytes hide behind memory
LIMITS = {
    "act_mask_pool gelu mean": (215, 40, 0),
    "act_mask_pool gelu mean, masked": (230, 40, 0),
    "act_mask_pool gelu moments": (230, 56, 0),
    "act_mask_pool identity mean, unwritten": (60, 40, 0),
    "act_pool_accumulate gelu, per token": (430, 184, 2),
    "act_pool_accumulate gelu, per sample": (240, 140, 0),
    "comoments_update": (235, 224, 2),
    "neuron_scale": (140, 32, 0),
}


@pytest.fixture(scope="module")
def sass():
    spec = importlib.util.spec_from_file_location("sass", ROOT / "bench" / "sass.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kept():
    return json.loads((ROOT / "bench" / "results" / "sass-sm90.json").read_text())


@pytest.mark.parametrize("name", LIMITS)
def test_a_kernel_keeps_its_limits(sass, kept, name):
    if Version(triton.__version__).release[:2] != Version(kept["triton"]).release[:2]:
        pytest.skip(f"the limits are those of Triton {kept['triton']}'s compiler, this is {triton.__version__}")
    found = sass.measure(*sass.PROGRAMS[name])
    per_8, registers, barriers = LIMITS[name]
    assert found["spills"] == 0
    assert found["instructions_per_8"] <= per_8
    assert found["registers"] <= registers
    assert found["barriers_in_loop"] <= barriers
    assert found["loads_of_16_bytes"] >= 1


def test_the_figures_that_are_kept_are_of_these_programs(sass, kept):
    assert list(kept["programs"]) == list(sass.PROGRAMS) == list(LIMITS)


def test_a_loop_is_found_and_counted(sass):
    """On a listing written by hand: the shortest loop that reads memory, by the label of its branch."""
    lines = ["MOV R1, R2;", "LDG.E.128 R4, [R2.64];", "FADD R4, R4, R5;", "@P0 BRA LBB0;", "EXIT;"]
    code = [f"--:-:0:-:1\t{line}" for line in lines]
    listing = "\n".join([code[0], "LBB0:", *code[1:]])
    assert sass.main_loop(listing) == ["LDG.E.128", "FADD", "BRA"]
    assert sass.main_loop("\n".join(code[:3])) == ["MOV", "LDG.E.128", "FADD"]
