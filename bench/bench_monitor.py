"""What `Monitor` costs of the forward of a ViT-S/16: CPU time inside its hooks over all other CPU time, in one run.

OMP_NUM_THREADS=1 python bench/bench_monitor.py --forwards 200 --batch 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch

from skillfast import Monitor, Skill
from skillfast.models.sites import find_sites

if TYPE_CHECKING:
    from collections.abc import Callable

SKILLS, SHARE = 10, 0.03  # skills, and of all neurons in each


def timed(hook: Callable[..., Any], inside: list[float]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        before, start = time.process_time(), time.process_time()
        try:
            return hook(*args)
        finally:
            inside.append(time.process_time() - start - (start - before))  # without what reading the clock takes

    return call


def time_hooks(model: torch.nn.Module, inside: list[float]) -> None:
    """Note the seconds of each call of each hook; torch's own way to them is not in it."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in hooks.items():
                hooks[key] = timed(hook, inside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forwards", type=int, default=200, help="by default; a quarter of them are all read")
    parser.add_argument("--batch", type=int, default=2)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = timm.create_model("vit_small_patch16_224").eval()
    sites = find_sites(model)
    drawn = [{s.name: torch.randperm(s.width)[: round(SHARE * s.width)] for s in sites} for _ in range(SKILLS)]
    skills = [Skill(str(k), neurons) for k, neurons in enumerate(drawn)]
    x = torch.randn(given.batch, 3, 224, 224)
    found = {}
    cases: dict[str, tuple[int, dict[str, Any]]] = {
        "by default": (given.forwards, {}),
        "every forward is read": (given.forwards // 4, {"share": 1.0}),
    }
    with torch.inference_mode():
        model(x)
        for name, (forwards, settings) in cases.items():
            inside: list[float] = []
            with tempfile.TemporaryDirectory() as folder:
                with Monitor(model, skills, output=folder, reference=8, **settings):
                    time_hooks(model, inside)
                    start = time.process_time()
                    for _ in range(forwards):
                        model(x)
                    whole = time.process_time() - start
                lines = (Path(folder) / "monitor.jsonl").read_text().splitlines()
            read = sum(json.loads(line)["examples"] for line in lines) // given.batch
            found[name] = {"hooks / forward": sum(inside) / (whole - sum(inside)), "forwards": forwards, "read": read}
    print(json.dumps({**found, "every": 100, "batch": given.batch, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
