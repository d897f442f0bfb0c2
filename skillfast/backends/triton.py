"""The Triton kernels of `skillfast.kernels`: CUDA devices, or the CPU under TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def neuron_scale(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, condition: torch.Tensor | None
) -> torch.Tensor:
    """See `skillfast.ops.neuron_scale`."""
    from skillfast.kernels import neuron_scale as kernel

    return kernel.launch(x, scale, shift, condition)


def comoments_update(
    x: torch.Tensor,
    y: torch.Tensor,
    shift: torch.Tensor,
    sum_x: torch.Tensor,
    sum_xx: torch.Tensor,
    sum_xy: torch.Tensor,
) -> None:
    """See `skillfast.ops.comoments_update`."""
    from skillfast.kernels import comoments_update as kernel

    kernel.launch(x, y, shift, sum_x, sum_xx, sum_xy)


def cells_update(
    x: torch.Tensor, edges: torch.Tensor, channels: torch.Tensor, hats: torch.Tensor, table: torch.Tensor
) -> None:
    """See `skillfast.ops.cells_update`."""
    from skillfast.kernels import cells_update as kernel

    kernel.launch(x, edges, channels, hats, table)


IMPLEMENTATIONS: dict[str, Callable] = {
    "neuron_scale": neuron_scale,
    "comoments_update": comoments_update,
    "cells_update": cells_update,
}


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


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
