"""The updates on a CUDA device.

    pytest bench/bench_gpu.py --benchmark-only -s --benchmark-json=bench/results/NAME.json

For each op the share of the measured copy bandwidth that its reads of the rows reach, and for both together their time
over a plain bfloat16 forward of ViT-B/16. Each case is checked against the reference first.
"""

from __future__ import annotations

import statistics

import pytest
import torch

from skillfast import Categorical, Continuous, backends, ops
from skillfast.statistics.bins.edges import build_edges, calibration_rows
from skillfast.statistics.bins.layout import BinLayout

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

WIDTH, ROWS, BINS = 46_080, 512, 128
METRICS = {"label": Categorical(10), "confidence": Continuous(), "loss": Continuous()}
seconds: dict[str, float] = {}  # per sample


def timed(benchmark, name, function, samples):
    def run():
        function()
        torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=30, iterations=1, warmup_rounds=5)
    seconds[name] = statistics.median(benchmark.stats.stats.data) / samples


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    copied = seconds.get("copy")
    print("\n| what | ns per sample | share of copy bandwidth | share of the forward |\n| --- | --- | --- | --- |")
    for name, value in seconds.items():
        # a copy reads and writes each row, an update reads it once
        bandwidth = f"{copied / 2 / value:.0%}" if copied and "update" in name else ""
        forward = f"{value / seconds['forward']:.1%}" if "forward" in seconds else ""
        print(f"| {name} | {1e9 * value:,.0f} | {bandwidth} | {forward} |")


@pytest.fixture(scope="module")
def rows():
    return torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.float32)


def test_forward(benchmark):
    import timm

    model = timm.create_model("vit_base_patch16_224", num_classes=10).cuda().eval()
    images = torch.randn(256, 3, 224, 224, device="cuda")

    def forward():
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            model(images)

    timed(benchmark, "forward", forward, 256)


def test_copy(benchmark, rows):
    out = torch.empty_like(rows)
    timed(benchmark, "copy", lambda: out.copy_(rows), ROWS)


def test_comoments_update(benchmark, rows):
    y, shift = torch.randn(ROWS, 12, device="cuda"), torch.zeros(WIDTH, device="cuda")
    states = {}
    for backend in ("triton", "reference"):
        states[backend] = [
            torch.zeros(s, dtype=torch.float64, device="cuda") for s in ((WIDTH,), (WIDTH,), (12, WIDTH))
        ]
        with backends.use_backend(backend):
            ops.comoments_update(rows, y, shift, *states[backend])
    for got, want in zip(*states.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-2)
    timed(benchmark, "comoments_update", lambda: ops.comoments_update(rows, y, shift, *states["triton"]), ROWS)


def test_bins_update(benchmark, rows):
    generator = torch.Generator().manual_seed(0)
    values = {
        "label": torch.randint(0, 10, (ROWS,), generator=generator),
        "confidence": torch.rand(ROWS, generator=generator),
        "loss": torch.randn(ROWS, generator=generator).exp(),
    }
    layout = BinLayout.of(METRICS, BINS)
    references = {name: values[name].double().sort().values for name in layout.hats}
    payload = [tensor.cuda() for tensor in layout.payload(values, references)]
    edges = build_edges(torch.randn(calibration_rows(BINS), WIDTH, device="cuda"), BINS)
    tables = {}
    for backend in ("triton", "reference"):
        tables[backend] = layout.zeros(WIDTH, "cuda")
        with backends.use_backend(backend):
            ops.bins_update(rows, edges, *payload, tables[backend])
    assert torch.equal(*tables.values())
    timed(benchmark, "bins_update", lambda: ops.bins_update(rows, edges, *payload, tables["triton"]), ROWS)
