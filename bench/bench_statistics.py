"""All statistics of ViT-B/16's neurons in one run, per sample, beside the bare GEMM and the field's tools.

    pytest bench/bench_statistics.py --benchmark-only -s

46,080 neurons, ten classes and two continuous metrics, 8,192 fresh rows in batches of 64; finalisation apart. Each case
is checked first. What would take minutes runs on a part of the neurons and says so: its figure is for all of them, in
proportion. The table at the end gives microseconds per sample and the ratio to the floor.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
import torch
from scipy import stats

from skillfast import Categorical, Continuous, NeuronStatistics

NEURONS, N, BATCH = 46_080, 8_192, 64
METRICS = {"label": Categorical(10), "confidence": Continuous(), "loss": Continuous()}
FOUR = ("pearson", "spearman", "auroc", "mutual_info")
medians: dict[str, float] = {}  # seconds per sample


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(N, NEURONS).normal_(generator=generator)
    values = {
        "label": torch.randint(0, 10, (N,), generator=generator),
        "confidence": torch.rand(N, generator=generator),
        "loss": torch.randn(N, generator=generator).exp(),
    }
    return x, values


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    floor = medians.get("floor: GEMM and sums")
    print("\n| what | microseconds per sample | of the floor |\n| --- | --- | --- |")
    for name, seconds in medians.items():
        print(f"| {name} | {1e6 * seconds:,.1f} | {seconds / floor:,.2f} |" if floor else f"| {name} | {seconds} | |")


def columns(values):
    one_hot = torch.nn.functional.one_hot(values["label"], 10).float()
    return torch.cat([one_hot, values["confidence"][:, None], values["loss"][:, None]], 1)


def timed(benchmark, name, function, samples, rounds=3, share=1.0):
    """Runs and notes the median, in proportion to all neurons."""
    benchmark.pedantic(function, rounds=rounds, iterations=1, warmup_rounds=1 if rounds > 1 else 0)
    medians[name] = statistics.median(benchmark.stats.stats.data) / samples / share


def accumulate(x, values, kinds):
    acc = NeuronStatistics(x.shape[1], METRICS, kinds)
    for start in range(0, len(x), BATCH):
        rows = slice(start, start + BATCH)
        acc.update(x[rows], {name: v[rows] for name, v in values.items()})
    acc._settle()
    return acc


def test_floor(benchmark, data):
    x, values = data
    y = torch.cat([columns(values), torch.ones(N, 1)], 1)  # the ones give the sums: the strictest of floors

    def floor():
        for start in range(0, N, 512):
            _ = y[start : start + 512].T @ x[start : start + 512]

    timed(benchmark, "floor: GEMM and sums", floor, N)


@pytest.mark.parametrize("kinds", [("pearson",), FOUR], ids=["Pearson", "all four"])
def test_skillfast(benchmark, data, kinds):
    x, values = data
    part = np.random.default_rng(0).choice(NEURONS, 12, replace=False)
    scores = accumulate(x[:, part], values, kinds).compute()
    y = columns(values).double().numpy()
    for d, neuron in enumerate(x[:, part].double().numpy().T):
        for m in range(12):
            assert abs(scores.pearson[d, m] - np.corrcoef(neuron, y[:, m])[0, 1]) < 1e-6
            if kinds == FOUR:
                rho = stats.spearmanr(neuron, y[:, m]).statistic
                assert abs(scores.spearman[d, m] - rho) <= scores.spearman_bound[d, m]
    timed(
        benchmark, f"skillfast, {'all four' if kinds == FOUR else 'Pearson'}", lambda: accumulate(x, values, kinds), N
    )
    if kinds == FOUR:
        acc = accumulate(x, values, kinds)
        start = time.perf_counter()
        acc.compute()
        print(f"\nfinalisation: {time.perf_counter() - start:.1f} s; state {acc.state_bytes / 2**20:,.0f} MiB")


def test_stored_and_scipy(benchmark, data):
    """Store, rank with scipy, correlate: Spearman only, on 1/64 of the neurons."""
    x, values = data
    part = x[:, : NEURONS // 64].numpy()
    y = stats.rankdata(columns(values).numpy(), axis=0)

    def ranked():
        ranks = stats.rankdata(part, axis=0)
        ranks -= ranks.mean(0)
        centred = y - y.mean(0)
        return centred.T @ ranks / np.outer(np.linalg.norm(centred, axis=0), np.linalg.norm(ranks, axis=0))

    assert abs(ranked()[10, 0] - stats.spearmanr(part[:, 0], values["confidence"]).statistic) < 1e-9
    timed(benchmark, "store, scipy.stats.rankdata, correlate (from 1/64)", ranked, N, 1, 1 / 64)


@pytest.mark.filterwarnings("ignore:Metric `Spearman")  # that it keeps all rows
@pytest.mark.parametrize("kind", ["Pearson", "Spearman"])
def test_torchmetrics(benchmark, data, kind):
    """One metric with an output per neuron, a column at a time; 1/64 of the neurons and 1,024 rows."""
    torchmetrics = pytest.importorskip("torchmetrics")
    x, values = data
    part, y = x[:1024, : NEURONS // 64], columns(values)[:1024]

    def run(columns_of_y=12):
        results = []
        for m in range(columns_of_y):
            name = {"Pearson": "PearsonCorrCoef", "Spearman": "SpearmanCorrCoef"}[kind]
            metric = getattr(torchmetrics, name)(num_outputs=part.shape[1])
            target = y[:, m, None].expand(-1, part.shape[1])
            for start in range(0, len(part), BATCH):
                metric.update(part[start : start + BATCH], target[start : start + BATCH])
            results.append(metric.compute())
        return results

    expected = (stats.pearsonr if kind == "Pearson" else stats.spearmanr)(part[:, 0], y[:, 0]).statistic
    assert abs(float(run(1)[0][0]) - expected) < 1e-3
    timed(benchmark, f"torchmetrics {kind} (from 1/64 of the neurons, 1,024 rows)", run, 1024, 1, 1 / 64)
