"""The Triton kernels of `skillfast.kernels`: CUDA devices, or the CPU under TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


@cache
def _kernel(op: str) -> Callable:
    launch: Callable = importlib.import_module(f"skillfast.kernels.{op}").launch
    return launch


def _launcher(op: str) -> Callable:
    def launch(x: torch.Tensor, *rest: object) -> object:
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return _kernel(op)(x, *rest)
        with torch.cuda.device(x.device):  # Triton launches on the current device
            return _kernel(op)(x, *rest)

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
