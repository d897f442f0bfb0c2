"""The Triton kernels of `skillfast.kernels`: CUDA devices, or the CPU under TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib
import importlib.util
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def _launcher(op: str) -> Callable:
    def launch(x: torch.Tensor, *rest: object) -> object:
        kernel = importlib.import_module(f"skillfast.kernels.{op}")
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # Triton launches on the current device
            return kernel.launch(x, *rest)

    return launch


IMPLEMENTATIONS: dict[str, Callable] = {
    op: _launcher(op)
    for op in ("neuron_scale", "comoments_update", "bins_update", "act_mask_pool", "act_pool_accumulate")
}


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def implements(op: str, device: torch.device) -> bool:
    """Whether there is a kernel for `op` on that kind of device."""
    return op in IMPLEMENTATIONS and device.type == "cuda"


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot run `op` there, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if op not in IMPLEMENTATIONS:
        return f"there is no Triton kernel for {op}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return f"the Triton kernel has no {dtype}"
    if device.type == "cuda" or (device.type == "cpu" and _interpreted()):
        return None
    return f"Triton kernels do not run on {device.type}; set TRITON_INTERPRET=1 to interpret them, slowly"


def describe() -> str:
    """One line for `skillfast info`."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.is_available():
        return "Triton on CUDA"
    return "Triton interpreted on the CPU" if _interpreted() else "Triton, no CUDA device"
