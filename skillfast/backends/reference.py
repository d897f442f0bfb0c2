"""Every op in plain torch: what the other backends are tested against. Runs on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from skillfast.backends.capture import accumulation_dtype, as_tokens, empty_capture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def neuron_scale(x: Tensor, scale: Tensor, shift: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
    """See `skillfast.ops.neuron_scale`."""
    if condition is None:
        condition = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    rows = (x.shape[0],) + (1,) * (x.dim() - 2) + (x.shape[-1],)
    factor = scale[condition].view(rows)  # [batch, 1..., D]
    value = torch.where(factor == 0, torch.zeros((), dtype=scale.dtype, device=x.device), x.to(scale.dtype) * factor)
    if shift is not None:
        value = value + shift[condition].view(rows)
    return value.to(x.dtype)


_AT_ONCE = 1 << 22  # elements: at most 32 MB of float64


def _slices(width: int, per_neuron: int) -> Iterator[slice]:
    """Neurons, as many at a time as `_AT_ONCE` allows with `per_neuron` elements each."""
    step = max(1, _AT_ONCE // max(1, per_neuron))
    return (slice(start, start + step) for start in range(0, width, step))


def comoments_update(x: Tensor, y: Tensor, shift: Tensor, sum_x: Tensor, sum_xx: Tensor, sum_xy: Tensor) -> None:
    """See `skillfast.ops.comoments_update`; everything in float64, a slice of the neurons at a time."""
    for part in _slices(x.shape[1], x.shape[0]):
        shifted = x[:, part].double() - shift[part].double()  # [n, step]
        sum_x[part] += shifted.sum(0)
        sum_xx[part] += shifted.square().sum(0)
        sum_xy[:, part] += y.double().T @ shifted


def bins_update(x: Tensor, edges: Tensor, channels: Tensor, hats: Tensor, table: Tensor) -> None:
    """See `skillfast.ops.bins_update`; one `index_add_` per metric, a slice of the neurons at a time."""
    n, bins, weights = x.shape[0], edges.shape[1] + 1, hats.shape[1]
    counts = table.shape[1] // bins - weights
    for part in _slices(x.shape[1], n * max(1, weights)):
        values = x[:, part].float().T.contiguous()  # [step, n]
        index = torch.searchsorted(edges[part], values, right=True)
        index = torch.where(values.isnan(), 0, index)
        neuron = torch.arange(values.shape[0], device=x.device)[:, None] * (bins * (counts + weights))
        view = table[part].view(-1)
        for channel in channels.long().T:  # [n]
            at = neuron + index * counts + channel.clamp_min(0)
            view.index_add_(0, at.flatten(), (channel >= 0).to(torch.int32).expand_as(at).flatten())
        if weights:
            lanes = torch.arange(weights, device=x.device)
            at = (neuron + bins * counts + index * weights)[:, :, None] + lanes  # [step, n, weights]
            view.index_add_(0, at.flatten(), hats.to(torch.int32).expand_as(at).flatten())


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}


def _activated(x: Tensor, activation: str) -> Tensor:
    return _ACTIVATIONS[activation](x.to(accumulation_dtype(x.dtype))).to(x.dtype)


def act_mask_pool(
    x: Tensor, activation: str, pool: str, mask: Tensor | None = None, center: Tensor | None = None, write: bool = True
) -> tuple[Tensor, Tensor]:
    """See `skillfast.ops.act_mask_pool`."""
    out, pooled = empty_capture(x, pool, write)
    y = _activated(x, activation)
    if write:
        out.copy_(y)
    if pool == "none":
        return out, pooled
    rows = as_tokens(y).to(pooled.dtype)  # [batch, tokens, D]
    batch, tokens, _ = rows.shape
    if rows.numel() == 0:
        return out, pooled.fill_(0.0 if pool == "moments" else torch.nan)
    here = torch.ones(batch, tokens, dtype=torch.bool, device=x.device) if mask is None else mask
    some = here.any(1)[:, None]  # [batch, 1]
    left = here[:, :, None]
    if pool == "moments":
        shifted = torch.where(left, rows if center is None else rows - center, 0).double()
        pooled.copy_(torch.stack([shifted.sum(1), shifted.square().sum(1)]))
        return out, pooled
    if pool == "mean":
        row = torch.where(left, rows, 0).sum(1, dtype=torch.float64) / left.sum(1)
    elif pool == "max":
        row = rows.masked_fill(~left, -torch.inf).amax(1)
    else:
        order = torch.arange(tokens, device=x.device)
        at = torch.where(here, order, tokens).amin(1) if pool == "cls" else torch.where(here, order, -1).amax(1)
        row = rows[torch.arange(batch, device=x.device), at.clamp(0, tokens - 1)]
    return out, pooled.copy_(torch.where(some, row, torch.nan))


def act_pool_accumulate(
    x: Tensor, y: Tensor, center: Tensor, sum_x: Tensor, sum_xx: Tensor, sum_xy: Tensor, activation: str,
    mask: Tensor | None = None, write: bool = True,
) -> Tensor:  # fmt: skip
    """See `skillfast.ops.act_pool_accumulate`."""
    out = _activated(x, activation)
    rows = as_tokens(out).float()
    y = y if y.dim() == 3 else y[:, None].expand(-1, rows.shape[1], -1)
    rows, y = (t.flatten(0, 1) if mask is None else t[mask] for t in (rows, y))  # [observations, D], [observations, M]
    comoments_update(rows, y, center, sum_x, sum_xx, sum_xy)
    return out if write else out.new_empty(0)


IMPLEMENTATIONS: dict[str, Callable] = {
    "neuron_scale": neuron_scale,
    "comoments_update": comoments_update,
    "bins_update": bins_update,
    "act_mask_pool": act_mask_pool,
    "act_pool_accumulate": act_pool_accumulate,
}


def implements(op: str, device: torch.device) -> bool:  # noqa: ARG001
    """Whether there is code for `op` here: torch runs everywhere."""
    return op in IMPLEMENTATIONS


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:  # noqa: ARG001
    """None: torch runs everywhere; or why `op` is missing here."""
    return None if op in IMPLEMENTATIONS else f"it has no {op}"


def describe() -> str:
    """One line for `skillfast info`."""
    return f"torch {torch.__version__}"
