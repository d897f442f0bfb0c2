"""Every op in plain torch: what the other backends are tested against. Runs on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def neuron_scale(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None = None, condition: torch.Tensor | None = None
) -> torch.Tensor:
    """See `skillfast.ops.neuron_scale`."""
    if condition is None:
        condition = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    rows = (x.shape[0],) + (1,) * (x.dim() - 2) + (x.shape[-1],)
    factor = scale[condition].view(rows)  # [batch, 1..., D]
    value = torch.where(factor == 0, torch.zeros((), dtype=scale.dtype, device=x.device), x.to(scale.dtype) * factor)
    if shift is not None:
        value = value + shift[condition].view(rows)
    return value.to(x.dtype)


def comoments_update(
    x: torch.Tensor,
    y: torch.Tensor,
    shift: torch.Tensor,
    sum_x: torch.Tensor,
    sum_xx: torch.Tensor,
    sum_xy: torch.Tensor,
) -> None:
    """See `skillfast.ops.comoments_update`; everything in float64, a slice of the neurons at a time."""
    step = max(1, (1 << 22) // max(1, x.shape[0]))  # at most 32 MB of float64 at once
    for start in range(0, x.shape[1], step):
        part = slice(start, start + step)
        shifted = x[:, part].double() - shift[part].double()  # [n, step]
        sum_x[part] += shifted.sum(0)
        sum_xx[part] += shifted.square().sum(0)
        sum_xy[:, part] += y.double().T @ shifted


def cells_update(
    x: torch.Tensor, edges: torch.Tensor, channels: torch.Tensor, hats: torch.Tensor, table: torch.Tensor
) -> None:
    """See `skillfast.ops.cells_update`; one `index_add_` per metric, a slice of the neurons at a time."""
    n, cells, weights = x.shape[0], edges.shape[1] + 1, hats.shape[1]
    counts = table.shape[1] // cells - weights
    step = max(1, (1 << 22) // max(1, n * max(1, weights)))  # at most 16 MB of int32 payload at once
    for start in range(0, x.shape[1], step):
        part = slice(start, start + step)
        values = x[:, part].float().T.contiguous()  # [step, n]
        cell = torch.searchsorted(edges[part], values, right=True)
        cell = torch.where(values.isnan(), 0, cell)
        neuron = torch.arange(values.shape[0], device=x.device)[:, None] * (cells * (counts + weights))
        view = table[part].view(-1)
        for channel in channels.long().T:  # [n]
            at = neuron + cell * counts + channel.clamp_min(0)
            view.index_add_(0, at.flatten(), (channel >= 0).to(torch.int32).expand_as(at).flatten())
        if weights:
            lanes = torch.arange(weights, device=x.device)
            at = (neuron + cells * counts + cell * weights)[:, :, None] + lanes  # [step, n, weights]
            view.index_add_(0, at.flatten(), hats.to(torch.int32).expand_as(at).flatten())


IMPLEMENTATIONS: dict[str, Callable] = {
    "neuron_scale": neuron_scale,
    "comoments_update": comoments_update,
    "cells_update": cells_update,
}


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:  # noqa: ARG001
    """None: torch runs everywhere; or why `op` is missing here."""
    return None if op in IMPLEMENTATIONS else f"it has no {op}"


def describe() -> str:
    """One line for `skillfast info`."""
    return f"torch {torch.__version__}"
