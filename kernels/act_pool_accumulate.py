"""`act_pool_accumulate` in Triton: a program takes BLOCK_D neurons through some samples, then adds its sums.

Sums are kept in registers over the samples and meet the state once, by float64 atomics; the order of those is the
GPU's, so the last bits of the sums vary from run to run. The bins are integers and do not.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from skillfast.backends.capture import as_tokens, empty_capture, has_observations
from skillfast.kernels.activation import flowing

PROGRAMS = 1024  # what a large GPU keeps busy
TILE = {"BLOCK_T": 16, "BLOCK_D": 32, "BLOCK_M": 16}
OPTIONS = {"num_warps": 4, "maxnreg": 255}  # else, or with wider tiles, ptxas spills registers for occupancy


@triton.jit
def count_bins(
    values, kept, first, number, edges, channels, hats, table, d, bins, metrics, counts, weights,
    LEVELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds values [BLOCK_N, BLOCK_D] to the table; observation `first + i` has row i of channels and hats."""
    neuron = d.to(tl.int64)[None, :]
    bin_ = tl.zeros((BLOCK_N, BLOCK_D), tl.int32)
    for level in tl.static_range(LEVELS):
        reach = bin_ + (1 << (LEVELS - 1 - level))
        there = kept & (reach < bins)
        edge = tl.load(edges + neuron * (bins - 1) + reach - 1, mask=there, other=0.0)
        bin_ = tl.where(there & (values >= edge), reach, bin_)
    own = table + neuron * (bins * (counts + weights))
    row = first + tl.arange(0, BLOCK_N)
    in_row = tl.arange(0, BLOCK_N) < number
    for k in range(metrics):
        channel = tl.load(channels + row * metrics + k, mask=in_row, other=-1).to(tl.int32)[:, None]
        tl.atomic_add(own + bin_ * counts + channel, 1, mask=kept & (channel >= 0), sem="relaxed")
    sums = own + bins * counts
    for lane in range(weights):
        weight = tl.load(hats + row * weights + lane, mask=in_row, other=0).to(tl.int32)[:, None]
        added = tl.broadcast_to(weight, (BLOCK_N, BLOCK_D))
        tl.atomic_add(sums + bin_ * weights + lane, added, mask=kept & (weight != 0), sem="relaxed")


@triton.jit
def act_pool_accumulate_kernel(
    x, scale, shift, condition, mask, out, y, center, sum_x, sum_xx, sum_xy, edges, channels, hats, table,
    stride_batch, stride_token, batch, tokens, width, columns, samples, bins, metrics, counts, weights,
    ACTIVATION: tl.constexpr, POOL: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_CONDITION: tl.constexpr, HAS_MASK: tl.constexpr, WRITE: tl.constexpr, Y_PER_TOKEN: tl.constexpr,
    LEVELS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (i, j, k): neurons i, samples j * samples and on, columns k of y; the first k writes and counts."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_d = d < width
    in_m = m < columns
    leads = in_d & (tl.zeros((BLOCK_D,), tl.int32) + tl.program_id(2) == 0)
    about = tl.load(center + d, mask=in_d, other=0.0)
    total = tl.zeros((BLOCK_D,), tl.float64)
    squares = tl.zeros((BLOCK_D,), tl.float64)
    products = tl.zeros((BLOCK_M, BLOCK_D), tl.float64)
    begin = tl.program_id(1).to(tl.int64) * samples
    for step in range(tl.minimum(samples, batch - begin)):
        wide = begin + step
        chosen = tl.load(condition + wide) if HAS_CONDITION else tl.zeros((), tl.int64)
        factor = tl.load(scale + chosen * width + d, mask=in_d, other=1.0)[None, :] if HAS_SCALE else 1.0
        offset = tl.load(shift + chosen * width + d, mask=in_d, other=0.0)[None, :] if HAS_SHIFT else 0.0
        row = tl.zeros((BLOCK_D,), tl.float32)  # of a pooled sample, or the sum over its tokens
        if POOL == "max":
            row += -float("inf")
        has_nan = tl.zeros((BLOCK_D,), tl.int32)
        counted = tl.zeros((), tl.int32)
        for start in range(0, tokens, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            here = t < tokens
            inside = here[:, None] & in_d[None, :]
            at = wide * stride_batch + t.to(tl.int64)[:, None] * stride_token + d[None, :]
            values = tl.load(x + at, mask=inside, other=0.0)
            flow = flowing(values.to(tl.float32), factor, offset, ACTIVATION, HAS_SCALE, HAS_SHIFT).to(values.dtype)
            if WRITE:
                tl.store(
                    out + (wide * tokens + t.to(tl.int64)[:, None]) * width + d[None, :],
                    flow,
                    mask=inside & leads[None, :],
                )
            if HAS_MASK:
                here = here & (tl.load(mask + wide * tokens + t, mask=here, other=0) != 0)
            kept = here[:, None] & in_d[None, :]
            flow = flow.to(tl.float32)
            if POOL == "none":
                shifted = tl.where(kept, flow - about[None, :], 0.0)
                squares += tl.sum(shifted * shifted, axis=0).to(tl.float64)
                if Y_PER_TOKEN:
                    total += tl.sum(shifted, axis=0).to(tl.float64)
                    of_token = y + (wide * tokens + t.to(tl.int64)[None, :]) * columns + m[:, None]
                    labels = tl.load(of_token, mask=here[None, :] & in_m[:, None], other=0.0)
                    products += tl.dot(labels, shifted, input_precision="ieee").to(tl.float64)
                else:
                    row += tl.sum(shifted, axis=0)
                if LEVELS > 0:
                    count_bins(
                        flow, kept & leads[None, :], wide * tokens + start, tl.minimum(tokens - start, BLOCK_T), edges,
                        channels, hats, table, d, bins, metrics, counts, weights, LEVELS, BLOCK_T, BLOCK_D,
                    )  # fmt: skip
            elif POOL == "mean":
                row += tl.sum(tl.where(kept, flow, 0.0), axis=0)
            elif POOL == "max":
                row = tl.maximum(row, tl.max(tl.where(kept, flow, -float("inf")), axis=0))
                has_nan += tl.sum((kept & (flow != flow)).to(tl.int32), axis=0)
            elif POOL == "cls":
                order = counted + tl.cumsum(here.to(tl.int32), axis=0)
                row += tl.sum(tl.where(kept & (order == 1)[:, None], flow, 0.0), axis=0)
            elif POOL == "last":
                order = tl.cumsum(here.to(tl.int32), axis=0)
                some = tl.sum(here.to(tl.int32), axis=0)
                latest = tl.sum(tl.where(kept & (order == some)[:, None], flow, 0.0), axis=0)
                row = tl.where(some > 0, latest, row)
            counted += tl.sum(here.to(tl.int32), axis=0)
        if POOL != "none":
            if POOL == "mean":
                row = row / counted.to(tl.float32)
            if POOL == "max":
                row = tl.where(has_nan > 0, float("nan"), row)
            row = tl.where(counted > 0, row, float("nan"))
            if LEVELS > 0:
                count_bins(
                    row[None, :], leads[None, :], wide, 1, edges, channels, hats, table, d, bins, metrics, counts,
                    weights, LEVELS, 1, BLOCK_D,
                )  # fmt: skip
            row = tl.where(in_d, row - about, 0.0)
            squares += (row * row).to(tl.float64)
        if not Y_PER_TOKEN:
            total += row.to(tl.float64)
            label = tl.load(y + wide * columns + m, mask=in_m, other=0.0).to(tl.float64)
            label = tl.where(counted > 0, label, 0.0)
            products += label[:, None] * row.to(tl.float64)[None, :]
    tl.atomic_add(sum_x + d, total, mask=leads, sem="relaxed")
    tl.atomic_add(sum_xx + d, squares, mask=leads, sem="relaxed")
    state = sum_xy + tl.program_id(2).to(tl.int64) * BLOCK_M * width
    state += tl.arange(0, BLOCK_M)[:, None] * width + d[None, :]  # 32 bits: fewer registers through the loops
    tl.atomic_add(state, products, mask=in_m[:, None] & in_d[None, :], sem="relaxed")


def launch(
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
    """Runs the kernel; the arguments are those of `skillfast.ops.act_pool_accumulate`, checked."""
    out, _ = empty_capture(x, "none", write)
    if not has_observations(x, pool):
        return out
    rows = as_tokens(x)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    batch, tokens, width = rows.shape
    y = y.contiguous()
    columns = y.shape[-1]
    bins = metrics = counts = weights = levels = 0
    if edges is not None and channels is not None and hats is not None and table is not None:
        bins, metrics, weights = edges.shape[1] + 1, channels.shape[-1], hats.shape[-1]
        counts, levels = table.shape[1] // bins - weights, (bins - 1).bit_length()
    blocks = triton.cdiv(width, TILE["BLOCK_D"]), max(1, triton.cdiv(columns, TILE["BLOCK_M"]))
    samples = triton.cdiv(batch, min(batch, max(1, PROGRAMS // (blocks[0] * blocks[1]))))
    given = [x if t is None else t.contiguous() for t in (scale, shift, condition, mask)]
    of_bins = [x if t is None else t.contiguous() for t in (edges, channels, hats, table)]
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        act_pool_accumulate_kernel[blocks[0], triton.cdiv(batch, samples), blocks[1]](
            rows, *given, out, y, center, sum_x, sum_xx, sum_xy, *of_bins,
            rows.stride(0), rows.stride(1), batch, tokens, width, columns, samples, bins, metrics, counts, weights,
            ACTIVATION=activation, POOL=pool, HAS_SCALE=scale is not None, HAS_SHIFT=shift is not None,
            HAS_CONDITION=condition is not None, HAS_MASK=mask is not None, WRITE=write, Y_PER_TOKEN=y.dim() == 3,
            LEVELS=levels, **TILE, **OPTIONS,
        )  # fmt: skip
    return out
