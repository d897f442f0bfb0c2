"""Peak memory of the accumulator beyond its inputs, at growing numbers of rows: `python bench/memory.py`.

Each size runs in a process of its own; rows come in batches that are made anew, so the inputs are one batch.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

SIZES = (8_192, 32_768, 262_144)
NEURONS, BATCH = 46_080, 64


def run(n: int, neurons: int) -> dict[str, float]:
    """Count n rows and say by how much the peak grew after one batch was there, in MiB."""
    import torch

    from skillfast import Categorical, Continuous, NeuronStatistics

    metrics = {"label": Categorical(10), "confidence": Continuous(), "loss": Continuous()}
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(BATCH, neurons).normal_(generator=generator)
    warm = NeuronStatistics(8, metrics, bins=8)
    for _ in range(4):  # whatever is loaded on first use
        warm.update(
            torch.randn(64, 8), {"label": torch.arange(64) % 10, "confidence": torch.rand(64), "loss": torch.rand(64)}
        )
    warm.compute()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    acc = NeuronStatistics(neurons, metrics)
    for _ in range(n // BATCH):
        x.normal_(generator=generator)
        acc.update(
            x,
            {
                "label": torch.randint(0, 10, (BATCH,), generator=generator),
                "confidence": torch.rand(BATCH, generator=generator),
                "loss": torch.randn(BATCH, generator=generator).exp(),
            },
        )
    counted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    acc.compute()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"n": n, "counting_mib": (counted - before) / 1024, "with_scores_mib": (after - before) / 1024,
            "state_mib": acc.state_bytes / 2**20}  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
    else:
        for size in SIZES:
            subprocess.run([sys.executable, __file__, str(size), str(NEURONS)], check=True)
