"""`act_mask_pool` in Triton: one program takes BLOCK_D neurons of one sample through all its tokens."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from skillfast.backends.capture import as_tokens, empty_capture
from skillfast.kernels.activation import flowing

TILE = {"BLOCK_T": 16, "BLOCK_D": 64}  # wider tiles spill registers
OPTIONS = {"num_warps": 4}


@triton.jit
def act_mask_pool_kernel(
    x, scale, shift, condition, mask, center, out, pooled, stride_batch, stride_token, batch, tokens, width,
    ACTIVATION: tl.constexpr, POOL: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_CONDITION: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CENTER: tl.constexpr, WRITE: tl.constexpr,
    DOUBLE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Reads each activation once, writes what flows on, and pools it as written (rounded)."""
    dtype = tl.float64 if DOUBLE else tl.float32
    sample = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < width
    chosen = tl.load(condition + sample) if HAS_CONDITION else tl.zeros((), tl.int64)
    factor = tl.load(scale + chosen * width + d, mask=in_d, other=1.0)[None, :] if HAS_SCALE else 1.0
    offset = tl.load(shift + chosen * width + d, mask=in_d, other=0.0)[None, :] if HAS_SHIFT else 0.0
    about = tl.load(center + d, mask=in_d, other=0.0)[None, :] if HAS_CENTER else 0.0
    total = tl.zeros((BLOCK_D,), dtype)
    squares = tl.zeros((BLOCK_D,), dtype)
    if POOL == "max":
        total += -float("inf")
    has_nan = tl.zeros((BLOCK_D,), tl.int32)
    counted = tl.zeros((), tl.int32)
    for start in range(0, tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        here = t < tokens
        inside = here[:, None] & in_d[None, :]
        at = sample * stride_batch + t.to(tl.int64)[:, None] * stride_token + d[None, :]
        values = tl.load(x + at, mask=inside, other=0.0)
        y = flowing(values.to(dtype), factor, offset, ACTIVATION, HAS_SCALE, HAS_SHIFT).to(values.dtype)
        if WRITE:
            tl.store(out + (sample * tokens + t.to(tl.int64)[:, None]) * width + d[None, :], y, mask=inside)
        if HAS_MASK:
            here = here & (tl.load(mask + sample * tokens + t, mask=here, other=0) != 0)
        kept = here[:, None] & in_d[None, :]
        y = y.to(dtype)
        if POOL == "mean":
            total += tl.sum(tl.where(kept, y, 0.0), axis=0)
        elif POOL == "moments":
            y = tl.where(kept, y - about, 0.0)
            total += tl.sum(y, axis=0)
            squares += tl.sum(y * y, axis=0)
        elif POOL == "max":
            total = tl.maximum(total, tl.max(tl.where(kept, y, -float("inf")), axis=0))
            has_nan += tl.sum((kept & (y != y)).to(tl.int32), axis=0)
        elif POOL == "cls":
            order = counted + tl.cumsum(here.to(tl.int32), axis=0)
            total += tl.sum(tl.where(kept & (order == 1)[:, None], y, 0.0), axis=0)
        elif POOL == "last":
            order = tl.cumsum(here.to(tl.int32), axis=0)
            some = tl.sum(here.to(tl.int32), axis=0)
            latest = tl.sum(tl.where(kept & (order == some)[:, None], y, 0.0), axis=0)
            total = tl.where(some > 0, latest, total)
        counted += tl.sum(here.to(tl.int32), axis=0)
    row = pooled + sample * width + d
    if POOL == "moments":
        tl.store(row, total, mask=in_d)
        tl.store(pooled + (batch + sample) * width + d, squares, mask=in_d)
    elif POOL != "none":
        if POOL == "mean":
            total = total / counted.to(dtype)
        if POOL == "max":
            total = tl.where(has_nan > 0, float("nan"), total)
        tl.store(row, tl.where(counted > 0, total, float("nan")), mask=in_d)


def launch(
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
    """Runs the kernel; the arguments are those of `skillfast.ops.act_mask_pool`, checked."""
    y, pooled = empty_capture(x, pool, write)
    if x.numel() == 0:
        return y, pooled.fill_(0.0 if pool == "moments" else torch.nan)
    rows = as_tokens(x)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    batch, tokens, width = rows.shape
    given = [x if t is None else t.contiguous() for t in (scale, shift, condition, mask, center)]
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        act_mask_pool_kernel[batch, triton.cdiv(width, TILE["BLOCK_D"])](
            rows, *given, y, pooled, rows.stride(0), rows.stride(1), batch, tokens, width,
            ACTIVATION=activation, POOL=pool, HAS_SCALE=scale is not None, HAS_SHIFT=shift is not None,
            HAS_CONDITION=condition is not None, HAS_MASK=mask is not None, HAS_CENTER=center is not None, WRITE=write,
            DOUBLE=x.dtype == torch.float64, **TILE, **OPTIONS,
        )  # fmt: skip
    return y, pooled
