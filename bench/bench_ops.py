"""The C++ ops against plain torch, in one run: `pytest bench/bench_ops.py --benchmark-only`.

No case is timed before it passed against the float64 reference. Read the medians as ratios within one run.
"""

from __future__ import annotations

import pytest
import torch

from skillfast import backends, ops

N, NEURONS, COLUMNS = 512, 46_080, 12  # a buffer of ViT-B/16's neurons, ten classes and two continuous metrics
BATCH, TOKENS, WIDTH = 16, 197, 3072  # the input of one fc2 of ViT-B/16


@pytest.fixture(scope="module")
def comoments():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, NEURONS, generator=generator), torch.randn(N, COLUMNS, generator=generator)
    return x, y, torch.zeros(NEURONS)


def _state():
    return [torch.zeros(s, dtype=torch.float64) for s in ((NEURONS,), (NEURONS,), (COLUMNS, NEURONS))]


@pytest.mark.benchmark(group=f"co-moments of {N} rows, {NEURONS} neurons, {COLUMNS} columns")
@pytest.mark.parametrize("how", ["gemm and sums (the floor)", "native", "reference"])
def test_comoments_update(benchmark, comoments, how):
    x, y, shift = comoments
    if how.startswith("gemm"):
        benchmark(lambda: (y.T @ x, x.sum(0), x.square().sum(0)))
        return
    want = [x.double().sum(0), x.double().square().sum(0), y.double().T @ x.double()]
    state = _state()
    with backends.use_backend(how):
        ops.comoments_update(x, y, shift, *state)
        for got, expected in zip(state, want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)
        benchmark(ops.comoments_update, x, y, shift, *state)


@pytest.mark.benchmark(group=f"neuron_scale of [{BATCH}, {TOKENS}, {WIDTH}], a condition per sample")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["native", "reference", "x * mask"])
def test_neuron_scale(benchmark, dtype, how):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=generator).to(dtype)
    scale = (torch.rand(40, WIDTH, generator=generator) > 0.03).float()
    condition = torch.arange(BATCH) % 40
    want = x.double() * scale[condition][:, None].double()

    def masked():
        return x * scale[condition][:, None].to(dtype)

    if how == "x * mask":
        torch.testing.assert_close(masked().double(), want)
        benchmark(masked)
        return
    with backends.use_backend(how):
        torch.testing.assert_close(ops.neuron_scale(x, scale, None, condition).double(), want)
        benchmark(ops.neuron_scale, x, scale, None, condition)


@pytest.mark.benchmark(group=f"activation and mean over tokens of [{BATCH}, {TOKENS}, {WIDTH}]")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["native", "torch: gelu, then mean", "torch: gelu alone"])
def test_act_mask_pool(benchmark, dtype, how):
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = torch.nn.functional.gelu(x.double())
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}

    def separate():
        y = torch.nn.functional.gelu(x)
        return y, y.mean(1, dtype=torch.float32)

    if how.startswith("torch"):
        torch.testing.assert_close(separate()[1].double(), want.mean(1), **tolerance)
        benchmark(separate if "mean" in how else lambda: torch.nn.functional.gelu(x))
        return
    with backends.use_backend(how):
        y, pooled = ops.act_mask_pool(x, "gelu", "mean")
        torch.testing.assert_close(y.double(), want, **tolerance)
        torch.testing.assert_close(pooled.double(), want.mean(1), **tolerance)
        benchmark(ops.act_mask_pool, x, "gelu", "mean")


@pytest.mark.benchmark(group=f"Pearson of every token of [{BATCH}, {TOKENS}, {WIDTH}], {COLUMNS} columns per token")
@pytest.mark.parametrize("how", ["native", "torch: gelu, shift, GEMM"])
def test_act_pool_accumulate(benchmark, how):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)
    y = torch.randn(BATCH, TOKENS, COLUMNS, generator=generator)
    center = torch.zeros(WIDTH)

    def zeros():
        shapes = ((WIDTH,), (WIDTH,), (COLUMNS, WIDTH))
        return tuple(torch.zeros(shape, dtype=torch.float64) for shape in shapes)

    def separate():
        rows = (torch.nn.functional.gelu(x) - center).flatten(0, 1)
        return rows.sum(0), rows.square().sum(0), y.flatten(0, 1).T @ rows

    state = zeros()
    with backends.use_backend("native"):
        ops.act_pool_accumulate(x, y, center, state, "gelu")
        for got, want in zip(state, separate(), strict=True):
            torch.testing.assert_close(got, want.double(), rtol=1e-4, atol=1e-2)
        benchmark(separate if how.startswith("torch") else lambda: ops.act_pool_accumulate(x, y, center, state, "gelu"))
