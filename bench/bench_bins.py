"""`bins_update` against the bare GEMM it is measured by: X^T Y with the sums, on the same rows, in one run.

    pytest bench/bench_bins.py --benchmark-only --benchmark-disable-gc

The gate comes first: no figure is reported for a table that differs from the reference's.
"""

from __future__ import annotations

import time

import pytest
import torch

from skillfast import backends, ops
from skillfast.metrics import Categorical, Continuous
from skillfast.statistics.bins.edges import build_edges, calibration_rows
from skillfast.statistics.bins.layout import BinLayout
from skillfast.statistics.bins.scores import finalise, fit_continuous

WIDTH = 46_080  # ViT-B/16: mlp, attention and head sites
BINS = 128
BUFFER = 512
METRICS = {"label": Categorical(10), "confidence": Continuous(), "loss": Continuous()}
KINDS = {
    "normal": lambda x: x,
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
}


def rows(n: int, width: int, seed: int, kind: str = "normal") -> torch.Tensor:
    return KINDS[kind](torch.randn(n, width, generator=torch.Generator().manual_seed(seed)))


def payload_of(layout: BinLayout, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    values = {
        "label": torch.randint(0, 10, (n,), generator=g),
        "confidence": torch.rand(n, generator=g),
        "loss": torch.randn(n, generator=g).exp(),
    }
    references = {name: values[name].double().sort().values for name in layout.hats}
    return layout.payload(values, references)


def floor(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """X^T Y and the sum of x in one GEMM: y has a column of ones. Without x^2, so the strictest of floors."""
    return y.T @ x


def gate(kind: str) -> None:
    layout = BinLayout.of(METRICS, BINS)
    x = rows(BUFFER, 300, 1, kind)
    edges = build_edges(rows(calibration_rows(BINS), 300, 2, kind), BINS)
    tables = []
    for backend in ("native", "reference"):
        tables.append(layout.zeros(300))
        with backends.use_backend(backend):
            ops.bins_update(x, edges, *payload_of(layout, BUFFER), tables[-1])
    assert torch.equal(*tables), "bins_update differs from the reference: no figure is reported"


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bins_update(benchmark, kind, dtype):
    gate(kind)
    layout = BinLayout.of(METRICS, BINS)
    edges = build_edges(rows(calibration_rows(BINS), WIDTH, 2, kind).to(dtype), BINS)
    x = rows(BUFFER, WIDTH, 1, kind)
    y = torch.randn(BUFFER, 13).index_fill_(1, torch.tensor([12]), 1.0)
    buffer, payload, table = x.to(dtype), payload_of(layout, BUFFER), layout.zeros(WIDTH)
    ops.bins_update(buffer, edges, *payload, table)  # touches the table's pages
    floors = []

    def measure_floor():  # before each round, so that both see the same load
        start = time.perf_counter()
        floor(x, y)
        floors.append(time.perf_counter() - start)

    benchmark.pedantic(ops.bins_update, (buffer, edges, *payload, table), setup=measure_floor, rounds=15)
    floor_us = sorted(floors)[len(floors) // 2] / BUFFER * 1e6
    ours_us = benchmark.stats.stats.median / BUFFER * 1e6
    benchmark.extra_info.update(
        us_per_sample=ours_us, floor_us_per_sample=floor_us, ratio=ours_us / floor_us, threads=torch.get_num_threads()
    )
    print(f"\n{kind} {dtype}: {ours_us:.0f} us/sample, floor {floor_us:.0f}, ratio {ours_us / floor_us:.2f}")


@pytest.mark.parametrize("kind", list(KINDS))
def test_edges(benchmark, kind):
    x = rows(calibration_rows(BINS), WIDTH, 2, kind)
    benchmark.pedantic(build_edges, (x, BINS), rounds=3, warmup_rounds=1)


def test_finalise(benchmark):
    layout = BinLayout.of(METRICS, BINS)
    width, n = 4096, 8192
    x = rows(n, width, 1)
    edges, table, payload = build_edges(x[:1024], BINS), layout.zeros(width), payload_of(layout, n)
    ops.bins_update(x, edges, *payload, table)
    g = torch.Generator().manual_seed(0)
    values = {name: torch.rand(n, generator=g) for name in layout.hats}
    fits = fit_continuous(layout, values, {name: value.double().sort().values for name, value in values.items()})
    benchmark.pedantic(finalise, (layout, table, edges, x.dtype, fits), rounds=3, warmup_rounds=1)
