"""The Triton kernels against the reference: interpreted, on a GPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from capture_cases import ACTIVATION, POOLS, accumulate_case, capture_case, run_accumulate, run_capture
from op_cases import DTYPES, bins_case, comoments_case, poison, run_bins, run_op, scale_case, wide

from skillfast import ops

triton = pytest.importorskip("triton")

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-13}


def close(got, want, tolerance):
    torch.testing.assert_close(got.double().cpu(), want.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def moved(values, device):
    return [t.to(device) if isinstance(t, torch.Tensor) else t for t in values]


def check_neuron_scale(device):
    shapes = [(1, 1), (3, 63), (2, 7, 33), (2, 3, 1000), (1, 19, 5)]
    for shape, dtype, with_shift, with_condition in product(shapes, DTYPES, (False, True), (False, True)):
        case = scale_case(shape, dtype, with_shift, with_condition)
        got = run_op("neuron_scale", "triton", *moved(case, device))
        assert got.isfinite().all()
        close(got, run_op("neuron_scale", "reference", *case), TOLERANCE[dtype])
    x = torch.randn(4, 9, 40)
    for view in (x[:, ::2], x[:, 1:, 3:20], x.transpose(1, 2), x[:1].expand(5, -1, -1)):
        scale = torch.rand(2, 2 * view.shape[-1])[:, ::2]
        condition = torch.arange(2 * len(view))[::2] // 2 % 2
        got = run_op("neuron_scale", "triton", *moved((view, scale, None, condition), device))
        close(got, run_op("neuron_scale", "reference", view, scale, None, condition), 1e-6)


def check_comoments_update(device):
    for (n, width, columns), dtype in product([(1, 1, 1), (33, 65, 3), (70, 130, 17), (5, 9, 0)], DTYPES):
        x, y, shift, state = comoments_case(n, width, columns, dtype)
        got = [t.clone() for t in moved(state, device)]
        run_op("comoments_update", "triton", *moved((x, y, shift), device), *got)
        run_op("comoments_update", "reference", x, y, shift, *state)
        for a, b in zip(got, state, strict=True):
            close(a, b, 2e-5)


def check_bins_update(device):
    calls = [((1, 1, 2), {}), ((63, 7, 128), {"dtype": torch.bfloat16}), ((130, 65, 100), {"dtype": torch.float16}),
             ((33, 197, 256), {}), ((40, 20, 16), {"metrics": 1, "counts": 2, "hats": 0}),
             ((40, 20, 16), {"metrics": 0, "counts": 0, "hats": 8}),
             ((40, 20, 16), {"metrics": 3, "counts": 40, "hats": 24})]  # fmt: skip
    for sizes, more in calls:
        case = bins_case(*sizes, **more)
        assert torch.equal(run_bins("triton", *moved(case, device)).cpu(), run_bins("reference", *case)), (sizes, more)
    x, *rest = bins_case(40, 20, 64)
    strided = torch.full((80, 50), torch.nan)[::2, 5:25].copy_(x)
    assert torch.equal(run_bins("triton", *moved((strided, *rest), device)).cpu(), run_bins("reference", x, *rest))


def check_act_mask_pool(device):
    """Against the reference on what the kernel wrote itself: a rounding of y must not hide in what is pooled."""
    shapes = [(1, 1), (3, 7), (2, 1, 33), (1, 19, 130), (3, 2, 17, 5)]
    for case, (shape, pool) in enumerate(product(shapes, POOLS)):
        dtype, activation = DTYPES[case % 4], list(ACTIVATION)[case % 5]
        parts = (("mask", "center"), ("mask",), ())[(case + case // 6) % 3]
        x, more = capture_case(shape, dtype, parts, seed=case)
        on_device = {name: t.to(device) for name, t in more.items()}
        y, pooled = run_capture("triton", x.to(device), activation, pool, **on_device)
        close(y, run_capture("reference", x, activation, pool)[0], TOLERANCE[dtype])
        assert y.dtype == dtype
        close(pooled, run_capture("reference", y.cpu(), "identity", pool, **more)[1], TOLERANCE[wide(dtype)])
        empty, again = run_capture("triton", x.to(device), activation, pool, **on_device, write=False)
        assert empty.numel() == 0
        close(again, pooled.cpu(), 0)
    x, _ = capture_case((4, 9, 40), torch.float32)
    for view in (x[:, ::2], x[:, 1:, 3:20], x.transpose(1, 2), x[:1].expand(5, -1, -1), x[..., :1]):
        got = run_capture("triton", view.to(device), "gelu", "mean")
        for a, b in zip(got, run_capture("reference", view, "gelu", "mean"), strict=True):
            close(a, b, 3e-6)
    x = torch.linspace(-12, 12, 4001)[None, :, None]
    y = run_capture("triton", x.to(device), "gelu", "none")[0]
    assert float((y.double().cpu() - ACTIVATION["gelu"](x.double())).abs().max()) < 1e-6  # kernels/activation.py: 5e-7
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e20, -1e20, -0.0, 30.0, -30.0]).to(device)
    special = special[None, :, None].expand(1, -1, 3)
    for activation, function in ACTIVATION.items():
        y, pooled = run_capture("triton", special, activation, "max")
        close(y, function(special.double().cpu()), 1e-5)
        assert pooled.isnan().all()
        assert run_capture("triton", special.roll(3, 1), activation, "max")[1].isnan().all()


def check_act_pool_accumulate(device):
    shapes = [(1, 1), (19, 7), (2, 1, 33), (3, 17, 65), (1, 2, 9, 5)]
    for case, (shape, per_token, masked) in enumerate(product(shapes, (False, True), (False, True))):
        columns, dtype, activation = (3, 0, 17, 6, 1)[case % 5], DTYPES[case % 3], list(ACTIVATION)[case // 4]
        x, y, center, sums, more = accumulate_case(shape, dtype, per_token, masked, columns)
        on_device = {name: t.to(device) for name, t in more.items()}
        state = moved((x, y, center), device)
        out, got = run_accumulate("triton", *state, moved(sums, device), activation, **on_device)
        close(out, run_capture("reference", x, activation, "none")[0], TOLERANCE[dtype])
        want = run_accumulate("reference", out.cpu(), y, center, sums, "identity", **more)[1]
        for a, b in zip(got, want, strict=True):
            close(a, b, 3e-5)
    from skillfast.kernels import act_pool_accumulate

    programs, act_pool_accumulate.PROGRAMS = act_pool_accumulate.PROGRAMS, 2  # so that a program takes many samples
    for per_token in (False, True):
        *case, _ = accumulate_case((7, 5, 9), torch.float32, per_token)
        got = run_accumulate("triton", *moved(case[:3], device), moved(case[3], device), "gelu")[1]
        for a, b in zip(got, run_accumulate("reference", *case, "gelu")[1], strict=True):
            close(a, b, 3e-5)
    act_pool_accumulate.PROGRAMS = programs
    x, y, center, sums, _ = accumulate_case((3, 4, 9), torch.float32, False)
    y[1] = torch.nan  # a sample without tokens
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    state = moved((x, y, center), device)
    _, got = run_accumulate("triton", *state, moved(sums, device), "gelu", mask=mask.to(device), write=False)
    assert all(t.isfinite().all() for t in got)


CHECKS = {
    "neuron_scale": check_neuron_scale,
    "comoments_update": check_comoments_update,
    "bins_update": check_bins_update,
    "act_mask_pool": check_act_mask_pool,
    "act_pool_accumulate": check_act_pool_accumulate,
}

INTERPRETED = """
import sys, traceback
sys.path[:0] = {folders!r}
import torch
from test_triton import CHECKS, poison
torch.empty = poison(torch.empty)
for op, check in CHECKS.items():
    try:
        check("cpu")
    except Exception:
        traceback.print_exc()
    else:
        print(op)
"""


@pytest.mark.timeout(1600)
def test_interpreted_equals_reference(triton_interpreter):
    """All ops in one process of its own: Triton reads TRITON_INTERPRET when a kernel is declared."""
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED.format(folders=folders)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1500,  # seconds where nothing else runs, minutes where the cores are shared
        check=False,
        cwd="/",  # from the checkout, its own skillfast would come before the installed one
    )
    assert done.stdout.split() == list(CHECKS), done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.parametrize("op", CHECKS)
def test_on_a_gpu(op, monkeypatch):
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    CHECKS[op]("cuda")


@pytest.mark.gpu
def test_sizes_beyond_one_block_on_a_gpu():
    for n, width, n_bins in ((512, 1000, 128), (1000, 197, 256)):
        case = bins_case(n, width, n_bins)
        assert torch.equal(run_bins("triton", *moved(case, "cuda")).cpu(), run_bins("reference", *case))
    x = torch.randn(4096, 5, device="cuda")
    torch.testing.assert_close(run_op("act_mask_pool", "triton", x)[1], x, rtol=0, atol=0)
    for shape in ((2, 197, 1030), (1, 1000, 130), (130, 17, 65)):
        x, more = capture_case(shape, torch.float32, ("mask",))
        got = run_capture("triton", x.cuda(), "gelu", "mean", mask=more["mask"].cuda())
        for a, b in zip(got, run_capture("reference", x, "gelu", "mean", **more), strict=True):
            close(a, b, 3e-6)
        for per_token in (False, True):
            x, y, center, sums, more = accumulate_case(shape, torch.float32, per_token, True, columns=17)
            state = moved((x, y, center), "cuda")
            _, got = run_accumulate("triton", *state, moved(sums, "cuda"), "gelu", mask=more["mask"].cuda())
            for a, b in zip(got, run_accumulate("reference", x, y, center, sums, "gelu", **more)[1], strict=True):
                close(a, b, 3e-5)


def strides_and_sizes(*names):
    return {"stride_batch": "i64", "stride_row": "i64"} | dict.fromkeys(names, "i32")


def compiled(op, types, constants, arch, **options):
    """The kernel as its launcher runs it; arguments that are 1 are constants there, too."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = __import__(f"skillfast.kernels.{op}", fromlist=["launch"])
    kernel = getattr(module, f"{op}_kernel")
    constants = {**constants, **getattr(module, "TILE", {})}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    options = {**getattr(module, "OPTIONS", {}), **options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def spilled(program, folder):
    """Bytes of stack that a thread takes: these kernels have none but for registers that are spilled."""
    binary = folder / "program.cubin"
    binary.write_bytes(program.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary]
    (stack,) = re.findall(r" STACK:(\d+) ", subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return int(stack)


CAPTURED = [("bf16", "gelu", "mean"), ("fp32", "gelu_tanh", "max"), ("fp16", "silu", "last"), ("bf16", "relu", "cls"),
            ("fp32", "identity", "none"), ("bf16", "gelu", "moments"), ("fp64", "gelu", "moments")]  # fmt: skip
ACCUMULATED = [("bf16", "gelu", True), ("fp32", "identity", True), ("bf16", "gelu", False),
               ("fp32", "gelu_tanh", False),
               ("fp16", "silu", False), ("bf16", "relu", False)]  # fmt: skip


def programs():
    """Op, types and constants of every program that is compiled."""
    sizes = strides_and_sizes("stride_token", "batch", "tokens", "width", "columns", "samples", "n", "bins", "metrics",
                              "counts", "weights")  # fmt: skip
    state = {"sum_x": "*fp64", "sum_xx": "*fp64", "sum_xy": "*fp64", "shift": "*fp32", "center": "*fp32", "y": "*fp32"}
    types = {"x": "*bf16", "out": "*bf16", "scale": "*fp32", "condition": "*i64", "mask": "*i1", **state, **sizes}
    yield "neuron_scale", types, {"HAS_SHIFT": True, "HAS_CONDITION": True, "BLOCK": 1024}
    for dtype in ("fp32", "bf16", "fp16", "fp64"):
        yield "comoments_update", {**types, "x": f"*{dtype}"}, {}
    payload = {"edges": "*fp32", "channels": "*i16", "hats": "*i16", "table": "*i32"}
    for dtype in ("fp32", "bf16", "fp16"):
        yield "bins_update", {**types, **payload, "x": f"*{dtype}"}, {"LEVELS": 7}
    for dtype, activation, pool in CAPTURED:
        pooled = "*fp64" if dtype == "fp64" else "*fp32"
        own = {**types, "x": f"*{dtype}", "out": f"*{dtype}", "center": pooled, "pooled": pooled}
        options = {"ACTIVATION": activation, "POOL": pool, "DOUBLE": dtype == "fp64"}
        options |= dict.fromkeys(("HAS_MASK", "HAS_CENTER", "WRITE"), True)
        for ones in ((), ("batch", "tokens", "width")):
            yield "act_mask_pool", own, {**options, **dict.fromkeys(ones, 1)}
    for dtype, activation, per_token in ACCUMULATED:
        own = {**types, "x": f"*{dtype}", "out": f"*{dtype}"}
        options = {"ACTIVATION": activation, "Y_PER_TOKEN": per_token, "HAS_MASK": True, "WRITE": True}
        for ones in ((), ("batch", "tokens", "width", "columns", "samples")):
            yield "act_pool_accumulate", own, {**options, **dict.fromkeys(ones, 1)}


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("op", CHECKS)
def test_compiles_without_a_gpu(op, arch, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # the default, said aloud: else Triton 3.9 warns
    for name, types, constants in programs():
        if name != op or (arch != 90 and 1 in (constants.get("batch"), constants.get("samples"))):
            continue  # what is 1 leaves less to hold: where the whole fits, these do
        program = compiled(op, types, constants, arch)
        assert program.metadata.shared <= 48 * 1024, constants  # what every device has without asking
        assert spilled(program, tmp_path) == 0, constants
        if op in ("bins_update", "act_pool_accumulate"):
            assert "red." in program.asm["ptx"] or "atom." in program.asm["ptx"]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_spilled_registers_are_seen(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    program = next(program for program in programs() if program[0] == "act_mask_pool")
    assert spilled(compiled(*program, arch, maxnreg=32), tmp_path) > 0


def test_every_op_is_checked():
    from skillfast.backends.triton import IMPLEMENTATIONS

    assert set(CHECKS) == set(IMPLEMENTATIONS)
    assert {op for op, *_ in programs()} == set(CHECKS)
    assert all(hasattr(ops, op) for op in CHECKS)
