"""`act_mask_pool` in Triton: one program takes BLOCK_D neurons of one sample through all its tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skillfast.backends.capture import as_tokens, empty_capture, unit_stride
from skillfast.kernels.activation import flow_tile

TILE = {"BLOCK_T": 16, "BLOCK_D": 64}  # wider tiles spill registers
OPTIONS = {"num_warps": 4}


@triton.jit
def act_mask_pool_kernel(
    x, mask, center, out, pooled, stride_batch, stride_token, batch, tokens, width,
    ACTIVATION: tl.constexpr, POOL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CENTER: tl.constexpr,
    WRITE: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Reads each activation once, writes what flows on, and pools it as written (rounded)."""
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    sample = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < width
    about = tl.load(center + d, mask=in_d, other=0.0)[None, :] if HAS_CENTER else 0.0
    total = tl.zeros((BLOCK_D,), dtype)
    squares = tl.zeros((BLOCK_D,), dtype)
    if POOL == "max":
        total += -float("inf")
    has_nan = tl.zeros((BLOCK_D,), tl.int32)
    counted = tl.zeros((), tl.int32)
    for start in range(0, tokens, BLOCK_T):
        y, here = flow_tile(
            x, mask, out, sample, start, d, in_d, stride_batch, stride_token, tokens, width,
            ACTIVATION, HAS_MASK, WRITE, dtype, BLOCK_T,
        )  # fmt: skip
        kept = here[:, None] & in_d[None, :]
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
            index = tl.arange(0, BLOCK_T)
            at = tl.max(tl.where(here, index, -1), axis=0)
            latest = tl.sum(tl.where(kept & (index == at)[:, None], y, 0.0), axis=0)
            total = tl.where(at >= 0, latest, total)
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
    x: Tensor, activation: str, pool: str, mask: Tensor | None = None, center: Tensor | None = None, write: bool = True
) -> tuple[Tensor, Tensor]:
    """Runs the kernel; the arguments are those of `skillfast.ops.act_mask_pool`, checked."""
    out, pooled = empty_capture(x, pool, write)
    if x.numel() == 0:
        return out, pooled.fill_(0.0 if pool == "moments" else torch.nan)
    rows = unit_stride(as_tokens(x))
    batch, tokens, width = rows.shape
    given = [x if t is None else t.contiguous() for t in (mask, center)]
    act_mask_pool_kernel[batch, triton.cdiv(width, TILE["BLOCK_D"])](
        rows, *given, out, pooled, rows.stride(0), rows.stride(1), batch, tokens, width,
        ACTIVATION=activation, POOL=pool, HAS_MASK=mask is not None, HAS_CENTER=center is not None, WRITE=write,
        DOUBLE=x.dtype == torch.float64, **TILE, **OPTIONS,
    )  # fmt: skip
    return out, pooled
