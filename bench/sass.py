"""What the Triton kernels become on a Hopper GPU, counted in their machine code on a machine without one.

    python bench/sass.py bench/results/sass-sm90.json

Each kernel is compiled for sm_90 with the attributes that Triton gives it where widths and addresses are multiples of
16, as in every usual model. Counted are the instructions of its innermost loop over activations, per 8 of them (16
bytes of bfloat16), registers, spills, shared memory, the widest load, and how many blocks a multiprocessor holds.
`bins_update` is left out: its time is that of its atomics, and on a GPU the CUDA source runs (`tests/ops/test_csrc.py`
holds its limits).

Beside each stands what a roofline makes of it, the share of a copy's bandwidth that the loop reaches where memory and
the four schedulers of a multiprocessor are the only limits: bytes moved over bandwidth against instructions over issue
slots. It is a prediction for the first run on a GPU to test, no measurement.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default, said aloud: else Triton 3.9 warns

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCH = 90
# One H100 SXM: multiprocessors, schedulers of each, clock in Hz, bytes per second that a copy reaches.
MULTIPROCESSORS, SCHEDULERS, CLOCK, COPY = 132, 4, 1.7e9, 3.0e12
REGISTERS, THREADS, SHARED, BLOCKS = 65_536, 2_048, 233_472, 32  # of a multiprocessor
SIZES = {"stride_batch": "i64", "stride_token": "i64", "stride_row": "i64"}
ALIGNED = ("width", *SIZES)
STATE = {
    "sum_x": "*fp64", "sum_xx": "*fp64", "sum_xy": "*fp64", "shift": "*fp32", "center": "*fp32", "y": "*fp32",
    "pooled": "*fp32", "scale": "*fp32", "condition": "*i64", "mask": "*i1", "edges": "*fp32", "channels": "*i16",
    "hats": "*i16", "table": "*i32",
}  # fmt: skip

# name: op, activations' type, constants, bytes read and written per activation
CAPTURE = {"HAS_MASK": False, "WRITE": True, "DOUBLE": False}
PROGRAMS = {
    "act_mask_pool gelu mean": ("act_mask_pool", "bf16", {**CAPTURE, "ACTIVATION": "gelu", "POOL": "mean",
                                                          "HAS_CENTER": False}, 4),
    "act_mask_pool gelu mean, masked": ("act_mask_pool", "bf16", {**CAPTURE, "ACTIVATION": "gelu", "POOL": "mean",
                                                                  "HAS_CENTER": False, "HAS_MASK": True}, 4),
    "act_mask_pool gelu moments": ("act_mask_pool", "bf16", {**CAPTURE, "ACTIVATION": "gelu", "POOL": "moments",
                                                             "HAS_CENTER": True}, 4),
    "act_mask_pool identity mean, unwritten": ("act_mask_pool", "bf16", {**CAPTURE, "ACTIVATION": "identity",
                                                                         "POOL": "mean", "HAS_CENTER": False,
                                                                         "WRITE": False}, 2),
    "act_pool_accumulate gelu, per token": ("act_pool_accumulate", "bf16", {
        "ACTIVATION": "gelu", "HAS_MASK": False, "WRITE": True, "Y_PER_TOKEN": True}, 4),
    "act_pool_accumulate gelu, per sample": ("act_pool_accumulate", "bf16", {
        "ACTIVATION": "gelu", "HAS_MASK": False, "WRITE": True, "Y_PER_TOKEN": False}, 4),
    "comoments_update": ("comoments_update", "bf16", {}, 2),
    "neuron_scale": ("neuron_scale", "bf16", {"HAS_SHIFT": False, "HAS_CONDITION": True, "BLOCK": 1024}, 4),
}  # fmt: skip


def compiled(op: str, dtype: str, constants: dict, arch: int = ARCH):
    """The kernel as its launcher runs it on aligned data, and how many activations one program's tile holds."""
    module = __import__(f"skillfast.kernels.{op}", fromlist=["launch"])
    kernel = getattr(module, f"{op}_kernel")
    constants = {**constants, **getattr(module, "TILE", {})}
    types = {**STATE, "x": f"*{dtype}", "out": f"*{dtype}", **SIZES}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name in ALIGNED and name not in constants)
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = getattr(module, "OPTIONS", {})
    program = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    rows = constants.get("BLOCK_T", constants.get("BLOCK_N", 1))
    return program, rows * constants.get("BLOCK_D", constants.get("BLOCK", 1))


def instructions(sass: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Opcode and operands of each instruction, and where each label points."""
    found: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, sass.splitlines()):
        if label := re.match(r"(\.?L\w+):", line):
            labels[label[1]] = len(found)
        elif code := re.match(r"[0-9a-f-]{2}:\S+\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)\s*(.*);", line):
            found.append((code[1], code[2]))
    return found, labels


def main_loop(sass: str) -> list[str]:
    """Opcodes of the shortest loop that reads from global memory; of the whole kernel where there is none."""
    found, labels = instructions(sass)
    loops = []
    for i, (opcode, operands) in enumerate(found):
        target = re.search(r"(\.?L[A-Za-z0-9_]*\d)\s*$", operands) if opcode.startswith("BRA") else None
        if target and labels.get(target[1], i) < i:
            body = [name for name, _ in found[labels[target[1]] : i + 1]]
            if any(name.startswith("LDG") for name in body):
                loops.append(body)
    return min(loops, key=len) if loops else [name for name, _ in found if name != "NOP"]


def measure(op: str, dtype: str, constants: dict, moved: int) -> dict[str, float]:
    """Counts of one program, and the roofline's share of a copy."""
    program, tile = compiled(op, dtype, constants)
    sass = program.asm["sass"]
    loop = main_loop(sass)
    registers = 1 + max(int(name) for name in re.findall(r"\bR(\d+)\b", sass))
    threads = 32 * program.metadata.num_warps
    reads = sum(name.startswith(("LDG", "LDGSTS")) and name.endswith(".128") for name in loop)
    each = max(1, tile // threads)
    if op == "act_mask_pool":  # the compiler may walk several tiles in one turn of the loop
        each *= max(1, 8 * reads // each)
    per_8 = 8 * len(loop) / each
    held = -(-registers // 8) * 8 * threads
    blocks = min(REGISTERS // held, THREADS // threads, SHARED // max(1, program.metadata.shared + 1024), BLOCKS)
    issue = per_8 / 8 / 32 / (MULTIPROCESSORS * SCHEDULERS * CLOCK)
    return {
        "instructions_per_8": round(per_8, 1),
        "registers": registers,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared_bytes": program.metadata.shared,
        "loads_of_16_bytes": reads,
        "barriers_in_loop": sum(name.startswith("BAR") for name in loop),
        "blocks_per_multiprocessor": blocks,
        "warps_per_multiprocessor": blocks * threads // 32,
        "predicted_share_of_copy": round(min(1.0, (moved / COPY) / issue), 3),
    }


def main(path: str) -> None:
    found = {name: measure(*program) for name, program in PROGRAMS.items()}
    Path(path).write_text(json.dumps({"arch": ARCH, "triton": triton.__version__, "programs": found}, indent=1) + "\n")
    for name, values in found.items():
        print(f"{name:40} " + "  ".join(f"{key} {value:g}" for key, value in values.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
