"""What bfloat16 on a CPU changes of a run: the time of a forward, the decisions under its removals, what they say.

`python bench/bench_dtypes.py RUN --checkpoint FILE --json FILE` takes the data, the settings and the skills of a folder
that `skillfast bench` wrote, and removes them from the checkpoint in float32 and under autocast to bfloat16, on the
test part. Seconds are of one thread's processor time: medians over batches that run in both dtypes one after the other.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

import skillfast
from skillfast import BenchConfig, Condition
from skillfast.evaluation.selectivity import oracle_predictions, selectivity
from skillfast.runs.session import open_session
from skillfast.skills.skill import load_skills

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def in_dtype(dtype: torch.dtype) -> torch.autocast:
    """As a run's `--dtype` does."""
    return torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)


def measured(run: Path, checkpoint: str, batch: int) -> dict:
    """The figures of both dtypes.

    Args:
        run: Folder of a run.
        checkpoint: The weights that it was made with.
        batch: Images of a batch that is timed.
    """
    with open_session(BenchConfig.of(like=str(run), checkpoint=checkpoint, device="cpu")) as session:
        subject = session.subject
        skills, classes = load_skills(run), subject.splits.classes
        conditions = [Condition(skills[name]) for name in classes]
        seconds: dict[str, list[float]] = {name: [] for name in DTYPES}
        with torch.inference_mode():
            for images, _ in skillfast.data.loader(subject.splits.test, batch):
                for name, dtype in DTYPES.items():
                    with in_dtype(dtype):
                        start = time.process_time()
                        subject.model(images)
                        seconds[name].append((time.process_time() - start) / len(images))
        swept = {}
        for name, dtype in DTYPES.items():
            with in_dtype(dtype):
                swept[name] = skillfast.sweep(
                    subject.model, subject.loader("test"), conditions, classes=classes, keep_predictions=True
                )
    k, one, other = len(classes), *swept.values()
    assert np.array_equal(one.labels, other.labels)
    effects = {}
    for name, of in swept.items():
        found = selectivity(of.predictions[None], oracle_predictions(of.top2, k), of.top2[:, 0], of.labels)
        effects[name] = {"target_drop": found.target_drop, "regret": found.regret}
    times = {name: median(each) for name, each in seconds.items()}
    return {
        "forward_ms_per_image": {name: 1e3 * each for name, each in times.items()},
        "forward_ratio": times["bfloat16"] / times["float32"],
        "decisions_alike": {
            "intact": float((one.top2[:, 0] == other.top2[:, 0]).mean()),
            "under_removals": float((one.predictions == other.predictions).mean()),
        },
        "effects": effects,
        "model": subject.name,
        "n_test": len(one.labels),
        "neurons_per_skill": sorted({len(skill) for skill in skills.values()}),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    """Parse the options, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="Folder of a run of skillfast bench.")
    parser.add_argument("--checkpoint", required=True, help="The weights that it was made with.")
    parser.add_argument("--batch", type=int, default=10, help="Images of a batch that is timed.")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    text = json.dumps(measured(given.run, given.checkpoint, given.batch), indent=2)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
