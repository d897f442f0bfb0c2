"""The Triton kernels: interpreted on the CPU against the reference, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

INTERPRETED = """
import itertools, torch
from skillfast import backends, ops

def check(got, want, tolerance):
    assert torch.isfinite(got.double()).all()
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)

empty = torch.empty
def poisoned(*args, **kwargs):
    out = empty(*args, **kwargs)
    return out.fill_(torch.nan) if out.is_floating_point() else out
torch.empty = poisoned

torch.manual_seed(0)
shapes = [(1, 1), (3, 63), (2, 7, 33), (2, 3, 1000), (1, 197, 5)]
for shape, dtype, shifted, conditioned in itertools.product(
    shapes, [torch.float32, torch.bfloat16, torch.float16, torch.float64], [False, True], [False, True]
):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape).to(dtype)
    scale = torch.randn(3 if conditioned else 1, shape[-1], dtype=wide)
    scale[:, ::3] = 0
    x[0, ..., 0] = torch.inf  # removed, so that nothing of it is left
    shift = torch.randn_like(scale) if shifted else None
    condition = torch.randint(0, 3, shape[:1]) if conditioned else None
    results = {}
    for backend in ("triton", "reference"):
        backends.calls.clear()
        with backends.use_backend(backend):
            results[backend] = ops.neuron_scale(x, scale, shift, condition)
        assert backends.calls == {("neuron_scale", backend): 1}
    check(results["triton"], results["reference"], {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-6))
wide = torch.randn(4, 9, 40)
for view in (wide[:, ::2], wide[:, 1:, 3:20], wide.transpose(1, 2), wide[:1].expand(5, -1, -1)):
    scale = torch.rand(1, view.shape[-1])
    with backends.use_backend("triton"):
        check(ops.neuron_scale(view, scale), view * scale[0], 1e-6)

for (n, width, columns), dtype in itertools.product(
    [(1, 1, 1), (33, 65, 3), (70, 130, 17)], [torch.float32, torch.bfloat16, torch.float16]
):
    x, y, shift = torch.randn(n, width).to(dtype), torch.randn(n, columns), torch.randn(width)
    start = [torch.randn(s, dtype=torch.float64) for s in ((width,), (width,), (columns, width))]
    results = {}
    for backend in ("triton", "reference"):
        state = [t.clone() for t in start]
        with backends.use_backend(backend):
            ops.comoments_update(x, y, shift, *state)
        results[backend] = state
    for got, want in zip(*results.values(), strict=True):
        check(got, want, 2e-5)
print("interpreted")
"""


def run(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True, cwd="/",
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_interpreted_kernels_equal_the_reference(triton_interpreter):
    assert run(INTERPRETED, TRITON_INTERPRET="1") == "interpreted"


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("op", ["neuron_scale", "comoments_update"])
def test_kernels_compile_without_a_gpu(arch, op, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # the default, said aloud: else Triton 3.9 warns
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from skillfast.kernels import comoments_update, neuron_scale

    kernel, types, constants = {
        "neuron_scale": (
            neuron_scale.neuron_scale_kernel,
            {"x": "*bf16", "scale": "*fp32", "shift": "*fp32", "condition": "*i64", "out": "*bf16",
             **dict.fromkeys(("stride_batch", "stride_token", "tokens", "width"), "i32")},
            {"HAS_SHIFT": True, "HAS_CONDITION": True, "BLOCK": 1024},
        ),
        "comoments_update": (
            comoments_update.comoments_update_kernel,
            {"x": "*bf16", "y": "*fp32", "shift": "*fp32", "sum_x": "*fp64", "sum_xx": "*fp64", "sum_xy": "*fp64",
             **dict.fromkeys(("n", "width", "columns", "stride_row"), "i32")},
            {"BLOCK_N": 32, "BLOCK_D": 64, "BLOCK_M": 16},
        ),
    }[op]  # fmt: skip
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    compiled = triton.compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", arch, 32))
    assert compiled.metadata.shared <= 48 * 1024  # what every device has without asking
    assert not re.search(r"\b(STL|LDL)\b", compiled.asm["sass"])  # no register spills
