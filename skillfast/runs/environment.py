"""What a run ran on: versions, device, backends."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import numpy as np
import torch

from skillfast import __version__, backends
from skillfast.results.environment import Environment


def environment(model: torch.nn.Module, device: torch.device) -> Environment:
    """The versions of what decides how skillfast and the model behave, and where they run."""
    import sklearn

    return Environment(
        skillfast=__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),
        numpy=np.__version__,
        libraries=_libraries(model),
        scikit_learn=sklearn.__version__,
        platform=f"{platform.system()} {platform.machine()}",
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        threads=torch.get_num_threads(),
        backends=backends.status(),
    )


def _libraries(model: torch.nn.Module) -> dict[str, str]:
    """Versions of the packages whose modules the model is made of, but for torch and skillfast."""
    roots = sorted({type(module).__module__.partition(".")[0] for module in model.modules()} - {"torch", "skillfast"})
    versions = {root: getattr(sys.modules.get(root), "__version__", None) for root in roots}
    return {root: str(version) for root, version in versions.items() if version is not None}


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} threads"
