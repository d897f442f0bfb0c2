"""Run by `test_plan`: traces a random model and prints what the process took at most, beyond what it had before."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def main(config: str, settings: dict) -> None:
    import torch

    import skillfast
    from skillfast.memory.config import PlanConfig
    from skillfast.memory.plan import kinds_of
    from skillfast.models.huggingface import load_config, skeleton

    chosen = PlanConfig(**settings)
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # large blocks go back to the system as soon as they are free
    made = skeleton(load_config(config), chosen.task)
    made.config.use_cache = False
    warm = torch.nn.Linear(64, 64)(torch.randn(2048, 64)).sum()  # libraries take their share once
    before = resident("VmRSS")
    model = made.to_empty(device="cpu").to(getattr(torch, chosen.dtype))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(0, 0.02) if tensor.is_floating_point() else tensor.zero_()
    generator = torch.Generator().manual_seed(int(warm.isnan()))
    tracer = skillfast.Tracer(model, kinds_of(chosen), statistics=chosen.statistics, bins=chosen.bins, pool="last")
    with tracer, torch.no_grad():
        for _ in range(settings["examples"] // chosen.batch_size):
            ids = torch.randint(0, 100, (chosen.batch_size, chosen.tokens), generator=generator)
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
            noise = torch.rand(chosen.batch_size, generator=generator)
            tracer.step(label=(noise > 0.5).long(), correct=noise > 0.3, confidence=noise, loss=noise**2)
        print(json.dumps({"peak": resident("VmHWM") - before, "state": tracer.state_bytes}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
