"""`act_mask_pool` in Triton: one program takes BLOCK_D neurons of one sample through all its tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skillfast.backends.capture import as_tokens, empty_capture, unit_stride
from skillfast.kernels.activation import activated, flow_tile

TILE = {"BLOCK_T": 16, "BLOCK_D": 64}  # of bfloat16, 16 bytes a thread: as many as it loads at a time
OPTIONS = {"num_warps": 4}


@triton.jit
def first_or_last(mask, tokens, POOL: tl.constexpr, HAS_MASK: tl.constexpr):
    """Index of the sample's first or last token that counts, int64; -1 where none does."""
    if not HAS_MASK:
        at = tokens * 0 if POOL == "cls" else tokens - 1
    else:
        at = tokens * 0 - 1
        for start in range(0, tokens, 128):
            t = start + tl.arange(0, 128)
            real = tl.load(mask + t, mask=t < tokens, other=0) != 0
            if POOL == "last":
                at = tl.maximum(at, tl.max(tl.where(real, t, -1), axis=0))
            else:
                first = tl.min(tl.where(real, t, tokens), axis=0)
                at = tl.where((at < 0) & (first < tokens), first, at)
    return tl.cast(at, tl.int64)


@triton.jit(do_not_specialize=["batch", "tokens"])  # one program for batches of any size
def act_mask_pool_kernel(
    x, mask, center, out, pooled, stride_batch, stride_token, batch, tokens, width,
    ACTIVATION: tl.constexpr, POOL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CENTER: tl.constexpr,
    WRITE: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Reads each activation once, writes what flows on, and pools it as written (rounded).

    A tile [BLOCK_T, BLOCK_D] of partial results stays in registers and is reduced once, after the last token.
    """
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    one_token: tl.constexpr = POOL == "cls" or POOL == "last"
    sample = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < width
    about = tl.load(center + d, mask=in_d, other=0.0)[None, :] if HAS_CENTER else 0.0
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype)
    squares = tl.zeros((BLOCK_T, BLOCK_D), dtype)
    if POOL == "max":
        total += -float("inf")
    counted = tl.zeros((BLOCK_T,), tl.int32)
    if WRITE or not one_token:
        for start in range(0, tokens, BLOCK_T):
            y, here = flow_tile(
                x, mask, out, sample, start, d, in_d, stride_batch, stride_token, tokens, width,
                ACTIVATION, HAS_MASK and not one_token, WRITE, dtype, BLOCK_T,
            )  # fmt: skip
            if POOL == "mean":
                total += tl.where(here[:, None], y, 0.0)
            elif POOL == "moments":
                y = tl.where(here[:, None], y - about, 0.0)
                total += y
                squares += y * y
            elif POOL == "max":
                y = tl.where(here[:, None], y, -float("inf"))
                total = tl.maximum(total, y, propagate_nan=tl.PropagateNan.ALL)
            counted += here.to(tl.int32)
    row = pooled + sample * width + d
    if POOL == "moments":
        tl.store(row, tl.sum(total, axis=0), mask=in_d)
        tl.store(pooled + (batch + sample) * width + d, tl.sum(squares, axis=0), mask=in_d)
    elif one_token:
        at = first_or_last(mask + sample * tokens, tokens, POOL, HAS_MASK)
        values = tl.load(x + sample * stride_batch + tl.maximum(at, 0) * stride_token + d, mask=in_d, other=0.0)
        value = activated(values.to(dtype), ACTIVATION).to(values.dtype).to(dtype)
        tl.store(row, tl.where(at >= 0, value, float("nan")), mask=in_d)
    elif POOL != "none":
        n = tl.sum(counted, axis=0)
        if POOL == "mean":
            value = tl.sum(total, axis=0) / n.to(dtype)
        else:
            value = tl.max(total, axis=0)
            value = tl.where(tl.sum((total != total).to(tl.int32), axis=0) > 0, float("nan"), value)
        tl.store(row, tl.where(n > 0, value, float("nan")), mask=in_d)


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
