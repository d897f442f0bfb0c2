"""The Triton kernel of `bins_update`: interpreted on the CPU against the reference, compiled with no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from skillfast import backends, ops

triton = pytest.importorskip("triton")

FOLDERS = [str(Path(__file__).parents[1] / name) for name in (".", "ops", "statistics")]
INTERPRETED = """
import sys
sys.path[:0] = {folders!r}
import torch
from test_bins import run, some_call

dtypes = {{"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}}
for n, width, n_bins, dtype in ((1, 1, 2, "float32"), (63, 7, 128, "bfloat16"), (130, 65, 100, "float16"),
                                 (33, 197, 256, "float32")):
    arguments = some_call(n, width, n_bins, dtypes[dtype])
    assert torch.equal(run("triton", *arguments), run("reference", *arguments)), (n, width, n_bins, dtype)
for metrics, counts, hats in ((1, 2, 0), (0, 0, 8), (3, 40, 24)):
    arguments = some_call(40, 20, 16, metrics=metrics, counts=counts, hats=hats)
    assert torch.equal(run("triton", *arguments), run("reference", *arguments)), (metrics, counts, hats)
x, *rest = some_call(40, 20, 64)
strided = torch.full((80, 50), torch.nan)[::2, 5:25].copy_(x)
assert torch.equal(run("triton", strided, *rest), run("reference", x, *rest))
print("equal")
"""


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


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_compiles_without_a_gpu(arch, dtype, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # the default, said aloud: else Triton 3.9 warns
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from skillfast.kernels.bins_update import bins_update_kernel

    signature = {
        "x": f"*{dtype}", "edges": "*fp32", "channels": "*i16", "hats": "*i16", "table": "*i32",
        **dict.fromkeys(("n", "width", "bins", "metrics", "counts", "weights"), "i32"), "stride_row": "i64",
        **dict.fromkeys(("LEVELS", "BLOCK_N", "BLOCK_D"), "constexpr"),
    }  # fmt: skip
    source = ASTSource(bins_update_kernel, signature, constexprs={"LEVELS": 7, "BLOCK_N": 16, "BLOCK_D": 64})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    assert compiled.metadata.shared <= 48 * 1024  # what every device has without asking
    assert "red." in compiled.asm["ptx"] or "atom." in compiled.asm["ptx"]
    assert not re.search(r"\b(STL|LDL)\b", compiled.asm["sass"])  # no register spills


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "width", "n_bins"), [(1, 1, 2), (63, 7, 128), (512, 1000, 128), (1000, 197, 256)])
def test_on_a_gpu(n, width, n_bins, dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=g).to(dtype)
    edges = torch.randn(width, n_bins - 1, generator=g).sort(1).values
    channels = torch.randint(-1, 7, (n, 2), generator=g).to(torch.int16)
    hats = torch.randint(0, 257, (n, 16), generator=g).to(torch.int16)
    expected = torch.zeros(width, n_bins * 23, dtype=torch.int32)
    with backends.use_backend("reference"):
        ops.bins_update(x, edges, channels, hats, expected)
    table = torch.zeros_like(expected, device="cuda")
    with backends.use_backend("triton"):
        ops.bins_update(x.cuda(), edges.cuda(), channels.cuda(), hats.cuda(), table)
    assert torch.equal(table.cpu(), expected)
