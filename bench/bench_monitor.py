"""What `Monitor` costs beside the plain forward of a ViT-S/16: CPU time, plain and watched in turn, in one run.

OMP_NUM_THREADS=1 python bench/bench_monitor.py --forwards 96 --batch 4
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time

import timm
import torch

from skillfast import Monitor, Skill
from skillfast.models.sites import find_sites

SKILLS, SHARE = 10, 0.03  # skills, and of all neurons in each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forwards", type=int, default=96)
    parser.add_argument("--batch", type=int, default=4)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = timm.create_model("vit_small_patch16_224").eval()
    sites = find_sites(model)
    drawn = [{s.name: torch.randperm(s.width)[: round(SHARE * s.width)] for s in sites} for _ in range(SKILLS)]
    skills = [Skill(str(k), neurons) for k, neurons in enumerate(drawn)]
    x = torch.randn(given.batch, 3, 224, 224)
    found = {}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for name, share in (("every forward is read", 1.0), ("by default", 1 / 16)):
            monitor = Monitor(model, skills, every=16, output=folder, share=share, reference=32)
            plain = watched = 0.0
            model(x)
            for _ in range(given.forwards // 16):
                start = time.process_time()
                for _ in range(16):
                    model(x)
                between = time.process_time()
                with monitor:  # its hooks come and go outside of what is timed in a server
                    for _ in range(16):
                        model(x)
                watched += time.process_time() - between
                plain += between - start
            found[name] = watched / plain
    print(json.dumps({"watched / plain": found, **vars(given), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
