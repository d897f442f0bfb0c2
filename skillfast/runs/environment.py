"""What a run ran on: versions, device, backends."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import torch

from skillfast import __version__, backends
from skillfast.results.environment import Environment


def environment(device: torch.device) -> Environment:
    """The versions of what decides how skillfast behaves, and where it runs."""
    import sklearn
    import timm

    return Environment(
        skillfast=__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),
        timm=timm.__version__,
        numpy=np.__version__,
        scikit_learn=sklearn.__version__,
        platform=f"{platform.system()} {platform.machine()}",
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        threads=torch.get_num_threads(),
        backends=backends.status(),
    )


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} threads"
