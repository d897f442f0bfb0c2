"""Views and outputs of activations that every backend makes alike."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which activations of a dtype are scaled and pooled."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_capture(x: torch.Tensor, pool: str, write: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised outputs of `act_mask_pool`: the activated tensor (empty without `write`) and its pooled rows."""
    y = torch.empty(x.shape if write else 0, dtype=x.dtype, device=x.device)
    rows = (x.shape[0], x.shape[-1])
    shape = {"none": (0,), "moments": (2, *rows)}.get(pool, rows)
    return y, torch.empty(shape, dtype=accumulation_dtype(x.dtype), device=x.device)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself where the kernels can read its last dimension, else a contiguous copy."""
    return x.contiguous() if x.stride(-1) != 1 and x.shape[-1] > 1 else x


def as_tokens(x: torch.Tensor) -> torch.Tensor:
    """Activations [batch, ..., D] as [batch, tokens, D]."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
