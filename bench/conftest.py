from __future__ import annotations

import platform
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch


def pytest_benchmark_update_machine_info(machine_info):
    """What a figure needs beside it: device, versions, threads, instruction set."""
    import skillfast
    from skillfast import backends

    machine_info.pop("node", None)  # whose machine it was is nobody's business
    machine_info["skillfast"] = {
        "version": skillfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "backends": backends.status(),
    }


@dataclass(frozen=True)
class Ratio:
    """Medians over alternating pairs; the quartiles say how far the machine's noise reaches."""

    wall: float
    quartiles: tuple[float, float]
    processor: float
    seconds: tuple[float, float]  # of the two sides, per call


class Ratios:
    """The table at the end."""

    def __init__(self):
        self.rows = []

    def add(self, case, what, ratio, *, limit=""):
        self.rows.append((case, what, ratio, limit))

    def show(self):
        print("\n| case | ratio of | wall | quartiles | processor | seconds | wanted |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for case, what, r, limit in self.rows:
            low, high = r.quartiles
            a, b = r.seconds
            figures = f"{r.wall:.3f} | {low:.3f} to {high:.3f} | {r.processor:.3f} | {a:.3f}, {b:.3f}"
            print(f"| {case} | {what} | {figures} | {limit} |")


@pytest.fixture(scope="session")
def ratios():
    table = Ratios()
    yield table
    if table.rows:
        table.show()


def synchronised():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clocks(call):
    """(wall, processor) seconds of one call."""
    synchronised()
    wall, processor = time.perf_counter(), time.process_time()
    call()
    synchronised()
    return time.perf_counter() - wall, time.process_time() - processor


@pytest.fixture
def paired(benchmark):
    """Times a and b in turn (a b, b a, a b, ...) and gives a / b; the benchmark's own rows are those of b."""

    def measure(a, b, pairs):
        of_a, of_b = [], []
        clocks(a), clocks(b)

        def setup():
            done = len(of_b)
            of_a.extend(clocks(a) for _ in range(0 if done % 2 else 1 if done == 0 else 2))

        benchmark.pedantic(lambda: of_b.append(clocks(b)), setup=setup, rounds=pairs, iterations=1)
        while len(of_a) < pairs:
            of_a.append(clocks(a))
        walls = [x[0] / y[0] for x, y in zip(of_a, of_b, strict=True)]
        processors = [x[1] / y[1] for x, y in zip(of_a, of_b, strict=True)]
        low, middle, high = np.quantile(walls, [0.25, 0.5, 0.75])
        seconds = (float(np.median([x[0] for x in of_a])), float(np.median([y[0] for y in of_b])))
        ratio = Ratio(float(middle), (float(low), float(high)), float(np.median(processors)), seconds)
        benchmark.extra_info |= {"ratio": ratio.wall, "quartiles": ratio.quartiles, "processor": ratio.processor}
        return ratio

    return measure
