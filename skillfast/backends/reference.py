"""Every op in plain torch: what the other backends are tested against. Runs on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from skillfast.backends.capture import accumulation_dtype, as_tokens, empty_capture

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


def bins_update(
    x: torch.Tensor, edges: torch.Tensor, channels: torch.Tensor, hats: torch.Tensor, table: torch.Tensor
) -> None:
    """See `skillfast.ops.bins_update`; one `index_add_` per metric, a slice of the neurons at a time."""
    n, bins, weights = x.shape[0], edges.shape[1] + 1, hats.shape[1]
    counts = table.shape[1] // bins - weights
    step = max(1, (1 << 22) // max(1, n * max(1, weights)))  # at most 16 MB of int32 payload at once
    for start in range(0, x.shape[1], step):
        part = slice(start, start + step)
        values = x[:, part].float().T.contiguous()  # [step, n]
        bin_ = torch.searchsorted(edges[part], values, right=True)
        bin_ = torch.where(values.isnan(), 0, bin_)
        neuron = torch.arange(values.shape[0], device=x.device)[:, None] * (bins * (counts + weights))
        view = table[part].view(-1)
        for channel in channels.long().T:  # [n]
            at = neuron + bin_ * counts + channel.clamp_min(0)
            view.index_add_(0, at.flatten(), (channel >= 0).to(torch.int32).expand_as(at).flatten())
        if weights:
            lanes = torch.arange(weights, device=x.device)
            at = (neuron + bins * counts + bin_ * weights)[:, :, None] + lanes  # [step, n, weights]
            view.index_add_(0, at.flatten(), hats.to(torch.int32).expand_as(at).flatten())


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}


def _flow(
    x: torch.Tensor,
    activation: str,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    condition: torch.Tensor | None,
) -> torch.Tensor:
    value = _ACTIVATIONS[activation](x.to(accumulation_dtype(x.dtype)))
    return (value if scale is None else neuron_scale(value, scale, shift, condition)).to(x.dtype)


def act_mask_pool(
    x: torch.Tensor,
    activation: str,
    pool: str,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    condition: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    center: torch.Tensor | None = None,
    write: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `skillfast.ops.act_mask_pool`."""
    out, pooled = empty_capture(x, pool, write)
    y = _flow(x, activation, scale, shift, condition)
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
    x: torch.Tensor,
    y: torch.Tensor,
    center: torch.Tensor,
    sum_x: torch.Tensor,
    sum_xx: torch.Tensor,
    sum_xy: torch.Tensor,
    activation: str,
    pool: str,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    condition: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    write: bool = True,
    edges: torch.Tensor | None = None,
    channels: torch.Tensor | None = None,
    hats: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `skillfast.ops.act_pool_accumulate`."""
    flow = _flow(x, activation, scale, shift, condition)
    out = flow if write else flow.new_empty(0)
    if pool == "none":
        rows = as_tokens(flow).float()
        y = (y if y.dim() == 3 else y[:, None].expand(-1, rows.shape[1], -1)).flatten(0, 1)
        rows, here = rows.flatten(0, 1), None if mask is None else mask.flatten()
    else:
        rows, here = act_mask_pool(flow, "identity", pool, mask=mask)[1], None
    if here is not None:
        rows, y = rows[here], y[here]
        channels, hats = (None if t is None else t[here] for t in (channels, hats))
    comoments_update(rows, y, center, sum_x, sum_xx, sum_xy)
    if edges is not None and channels is not None and hats is not None and table is not None:
        bins_update(rows, edges, channels, hats, table)
    return out


IMPLEMENTATIONS: dict[str, Callable] = {
    "neuron_scale": neuron_scale,
    "comoments_update": comoments_update,
    "bins_update": bins_update,
    "act_mask_pool": act_mask_pool,
    "act_pool_accumulate": act_pool_accumulate,
}


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:  # noqa: ARG001
    """None: torch runs everywhere; or why `op` is missing here."""
    return None if op in IMPLEMENTATIONS else f"it has no {op}"


def describe() -> str:
    """One line for `skillfast info`."""
    return f"torch {torch.__version__}"
