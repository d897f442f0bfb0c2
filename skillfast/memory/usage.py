"""What the machine says of its memory: bytes that are free on a device, and the most that this process has taken."""

from __future__ import annotations

import resource
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device, in bytes; None where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def peak_memory() -> dict[str, int | None]:
    """Peak memory of the process, and of its CUDA devices together, in bytes; None without one."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return {
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
        "peak_device_bytes": sum(map(torch.cuda.max_memory_allocated, devices)) if devices else None,
    }
