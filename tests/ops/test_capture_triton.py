"""The Triton kernels of the capture ops: interpreted on the CPU against the reference, compiled with no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from capture_cases import ACTIVATION, accumulate_case, capture_case, run_accumulate, run_capture, wide

from skillfast import backends, ops

triton = pytest.importorskip("triton")

FOLDERS = [str(Path(__file__).parents[1] / name) for name in (".", "ops", "statistics")]
INTERPRETED = """
import sys
sys.path[:0] = {folders!r}
import torch
from test_capture_triton import check_accumulate, check_capture

empty = torch.empty
def poisoned(*args, **kwargs):
    out = empty(*args, **kwargs)
    return out.fill_(torch.nan) if out.is_floating_point() else out
torch.empty = poisoned

check_capture("cpu", [(1, 1), (3, 7), (2, 1, 33), (1, 19, 130), (3, 2, 17, 5)])
check_accumulate("cpu", [(1, 1), (19, 7), (2, 1, 33), (3, 17, 65), (1, 2, 9, 5)])
print("equal")
"""
POOLS = ("mean", "cls", "max", "last", "none", "moments")
PARTS = ("scale", "shift", "condition", "mask", "center")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-13}


def close(got, want, tolerance):
    torch.testing.assert_close(got.double().cpu(), want.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(moved(v, device) for v in value) if isinstance(value, tuple) else value


def check_capture(device, shapes):
    """Triton against the reference on what it wrote itself: a rounding of y must not hide in what is pooled."""
    for case, (shape, pool) in enumerate(product(shapes, POOLS)):
        dtype, activation = DTYPES[case % 4], list(ACTIVATION)[case % 5]
        x, more = capture_case(shape, dtype, (PARTS, ("scale", "mask"), ())[(case + case // 6) % 3], seed=case)
        on_device = {name: t.to(device) for name, t in more.items()}
        y, pooled = run_capture("triton", x.to(device), activation, pool, **on_device)
        close(y, run_capture("reference", x, activation, pool, **more)[0], TOLERANCE[dtype])
        assert y.dtype == dtype
        about = {name: t for name, t in more.items() if name in ("mask", "center")}
        want = run_capture("reference", y.cpu(), "identity", pool, **about)[1]
        close(pooled, want, TOLERANCE[wide(dtype)])
        empty, again = run_capture("triton", x.to(device), activation, pool, **on_device, write=False)
        assert empty.numel() == 0
        close(again, pooled.cpu(), 0)
    x, more = capture_case((4, 9, 40), torch.float32, ("scale",))
    more = {name: t.to(device) for name, t in more.items()}
    for view in (x[:, ::2], x[:, 1:, 3:20], x.transpose(1, 2), x[:1].expand(5, -1, -1), x[..., :1]):
        scale = more["scale"][:, :1].expand(-1, view.shape[-1])
        want = run_capture("reference", view, "gelu", "mean", scale=scale.cpu())
        got = run_capture("triton", view.to(device), "gelu", "mean", scale=scale)
        close(got[0], want[0], 3e-6)
        close(got[1], want[1], 3e-6)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e20, -1e20, -0.0, 30.0, -30.0]).to(device)
    special = special[None, :, None].expand(1, -1, 3)
    for activation, function in ACTIVATION.items():
        y, pooled = run_capture("triton", special, activation, "max")
        close(y, function(special.double().cpu()), 1e-5)
        assert pooled.isnan().all()
        removed = run_capture("triton", special, activation, "mean", scale=torch.zeros(1, 3, device=device))
        assert not any(t.any() for t in removed)


def check_accumulate(device, shapes):
    """Triton against the reference; the table, of integers, is the same bit by bit where the rows are."""
    pools = (*((pool, False) for pool in POOLS[:5]), ("none", True))
    for case, (shape, (pool, per_token)) in enumerate(product(shapes, pools)):
        parts = ((*PARTS, "bins"), ("mask", "bins"), ())[(case + case // 6) % 3]
        columns = (3, 0, 17, 6)[case % 4]
        x, y, center, sums, more = accumulate_case(shape, DTYPES[case % 3], pool, per_token, parts, columns)
        options = {name: moved(value, device) for name, value in more.items()}
        state = [moved(t, device) for t in (x, y, center, sums)]
        out, got, table = run_accumulate("triton", *state, list(ACTIVATION)[case % 5], pool, **options)
        about = {name: value for name, value in more.items() if name in ("mask", "bins")}
        _, want, want_table = run_accumulate("reference", out.cpu(), y, center, sums, "identity", pool, **about)
        for a, b in zip(got, want, strict=True):
            close(a, b, 3e-5)
        if pool != "mean" and table is not None:  # a mean's last bit may be another
            assert torch.equal(table.cpu(), want_table)
    x, y, center, sums, _ = accumulate_case((3, 4, 9), torch.float32, "none", False)
    y[1] = torch.nan  # a sample without tokens
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    state = [moved(t, device) for t in (x, y, center, sums)]
    _, got, _ = run_accumulate("triton", *state, "gelu", "none", mask=mask.to(device), write=False)
    assert all(t.isfinite().all() for t in got)


def test_interpreted_equals_reference(triton_interpreter):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            INTERPRETED.format(folders=FOLDERS),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        cwd="/",  # from the checkout, its own skillfast would come before the installed one
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.gpu
def test_on_a_gpu():
    check_capture("cuda", [(1, 1), (3, 7), (2, 197, 1030), (1, 1000, 130), (3, 2, 17, 5)])
    check_accumulate("cuda", [(1, 1), (19, 7), (2, 197, 1030), (130, 17, 65), (1, 2, 9, 5)])
    assert backends.calls["act_mask_pool", "triton"]
    x = torch.randn(4096, 5, device="cuda")
    with backends.use_backend("triton"):
        torch.testing.assert_close(ops.act_mask_pool(x)[1], x, rtol=0, atol=0)


def compiled(module, kernel, types, constants, arch):
    """The kernel as its launcher runs it; arguments that are 1 are constants there, too."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**constants, **module.TILE}
    types = {name: kind for name, kind in types.items() if name not in constants}
    source = ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=module.OPTIONS)


def check_compiled(program):
    assert program.metadata.shared <= 48 * 1024  # what every device has without asking
    assert not re.search(r"\b(STL|LDL)\b", program.asm["sass"])  # no register spills


VARIANTS = [("bf16", "gelu", "mean"), ("fp32", "gelu_tanh", "max"), ("fp16", "silu", "last"), ("bf16", "relu", "cls"),
            ("fp32", "identity", "none")]  # fmt: skip
CONVERTED = ("HAS_SCALE", "HAS_SHIFT", "HAS_CONDITION", "HAS_MASK", "WRITE")


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("dtype", "activation", "pool"), [*VARIANTS, ("bf16", "gelu", "moments"), ("fp64", "gelu", "moments")]
)
def test_act_mask_pool_compiles_without_a_gpu(arch, dtype, activation, pool, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # the default, said aloud: else Triton 3.9 warns
    from skillfast.kernels import act_mask_pool

    of_scale = "*fp64" if dtype == "fp64" else "*fp32"
    types = {
        "x": f"*{dtype}", "scale": of_scale, "shift": of_scale, "condition": "*i64", "mask": "*i1", "center": of_scale,
        "out": f"*{dtype}", "pooled": of_scale, "stride_batch": "i64",
        **dict.fromkeys(("stride_token", "batch", "tokens", "width"), "i32"),
    }  # fmt: skip
    constants = {"ACTIVATION": activation, "POOL": pool, "DOUBLE": dtype == "fp64", "HAS_CENTER": True}
    constants |= dict.fromkeys(CONVERTED, True)
    for more in ({}, {"batch": 1, "tokens": 1, "width": 1}):
        kernel = act_mask_pool.act_mask_pool_kernel
        check_compiled(compiled(act_mask_pool, kernel, types, {**constants, **more}, arch))


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("dtype", "activation", "pool", "per_token", "levels"),
    [*((*variant, False, 7 * (i % 2)) for i, variant in enumerate(VARIANTS)), ("bf16", "gelu", "none", True, 7),
     ("fp32", "identity", "none", True, 0)],
)  # fmt: skip
def test_act_pool_accumulate_compiles_without_a_gpu(arch, dtype, activation, pool, per_token, levels, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # the default, said aloud: else Triton 3.9 warns
    from skillfast.kernels import act_pool_accumulate

    sizes = ("batch", "tokens", "width", "columns", "samples", "bins", "metrics", "counts", "weights")
    types = {
        "x": f"*{dtype}", "scale": "*fp32", "shift": "*fp32", "condition": "*i64", "mask": "*i1", "out": f"*{dtype}",
        "y": "*fp32", "center": "*fp32", "sum_x": "*fp64", "sum_xx": "*fp64", "sum_xy": "*fp64", "edges": "*fp32",
        "channels": "*i16", "hats": "*i16", "table": "*i32", "stride_batch": "i64",
        **dict.fromkeys(("stride_token", *sizes), "i32"),
    }  # fmt: skip
    constants = {"ACTIVATION": activation, "POOL": pool, "Y_PER_TOKEN": per_token, "LEVELS": levels}
    constants |= dict.fromkeys(CONVERTED, True)
    for more in ({}, dict.fromkeys(("batch", "tokens", "width", "columns", "samples", "metrics", "counts"), 1)):
        kernel = act_pool_accumulate.act_pool_accumulate_kernel
        program = compiled(act_pool_accumulate, kernel, types, {**constants, **more}, arch)
        check_compiled(program)
        assert "red." in program.asm["ptx"] or "atom." in program.asm["ptx"]
