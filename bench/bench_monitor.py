"""What `Monitor` costs of the forward of a ViT-S/16: CPU time inside its hooks over all other CPU time, in one run.

OMP_NUM_THREADS=1 python bench/bench_monitor.py --forwards 64 --batch 4
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import TYPE_CHECKING, Any

import timm
import torch

from skillfast import Monitor, Skill
from skillfast.models.sites import find_sites

if TYPE_CHECKING:
    from collections.abc import Callable

SKILLS, SHARE = 10, 0.03  # skills, and of all neurons in each
inside: list[float] = []  # seconds of each call of a hook


def timed(hook: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        start = time.process_time()
        try:
            return hook(*args)
        finally:
            inside.append(time.process_time() - start)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forwards", type=int, default=96)
    parser.add_argument("--batch", type=int, default=4)
    given = parser.parse_args()
    for name in ("_begin", "_see", "_end"):
        setattr(Monitor, name, timed(getattr(Monitor, name)))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = timm.create_model("vit_small_patch16_224").eval()
    sites = find_sites(model)
    drawn = [{s.name: torch.randperm(s.width)[: round(SHARE * s.width)] for s in sites} for _ in range(SKILLS)]
    skills = [Skill(str(k), neurons) for k, neurons in enumerate(drawn)]
    x = torch.randn(given.batch, 3, 224, 224)
    found = {}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        model(x)
        for name, share in (("every forward is read", 1.0), ("by default", 1 / 16)):
            inside.clear()
            with Monitor(model, skills, every=16, output=folder, share=share, reference=32):
                start = time.process_time()
                for _ in range(given.forwards):
                    model(x)
                whole = time.process_time() - start
            found[name] = sum(inside) / (whole - sum(inside))
    print(json.dumps({"hooks / forward": found, **vars(given), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
