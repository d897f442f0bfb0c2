"""`act_pool_accumulate` in Triton: a program takes BLOCK_D neurons through some samples, then adds its sums.

A tile of a sample's sums stays in float32 registers and is reduced after its last token; over the samples they are
summed in float64, and meet the state once, by atomics. The order of those is the GPU's, so the last bits of the sums
vary from run to run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from skillfast.backends.capture import as_tokens, empty_capture, unit_stride
from skillfast.kernels.activation import flow_tile

if TYPE_CHECKING:
    from torch import Tensor

PROGRAMS = 1024  # what a large GPU keeps busy
TILE = {"BLOCK_T": 16, "BLOCK_D": 64, "BLOCK_M": 16}
OPTIONS = {"num_warps": 4, "num_stages": 2, "maxnreg": 255}  # else ptxas spills registers for occupancy


@triton.jit(do_not_specialize=["batch", "tokens", "samples"])  # one program for batches of any size
def act_pool_accumulate_kernel(
    x, mask, out, y, center, sum_x, sum_xx, sum_xy, stride_batch, stride_token, batch, tokens, width, columns, samples,
    ACTIVATION: tl.constexpr, HAS_MASK: tl.constexpr, WRITE: tl.constexpr, Y_PER_TOKEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program (i, j, k): neurons i, samples j * samples and on, columns k of y; the first k writes, and sums x."""
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
        sample = begin + step
        of_sample = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        of_squares = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        of_products = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        counted = tl.zeros((BLOCK_T,), tl.int32)
        for start in range(0, tokens, BLOCK_T):
            flow, here = flow_tile(
                x, mask, out, sample, start, d, leads, stride_batch, stride_token, tokens, width,
                ACTIVATION, HAS_MASK, WRITE, tl.float32, BLOCK_T,
            )  # fmt: skip
            shifted = tl.where(here[:, None] & in_d[None, :], flow - about[None, :], 0.0)
            of_sample += shifted
            of_squares += shifted * shifted
            if Y_PER_TOKEN:
                t = start + tl.arange(0, BLOCK_T)
                of_token = y + (sample * tokens + t.to(tl.int64)[None, :]) * columns + m[:, None]
                labels = tl.load(of_token, mask=here[None, :] & in_m[:, None], other=0.0)
                of_products = tl.dot(labels, shifted, of_products, input_precision="tf32x3")
            else:
                counted += here.to(tl.int32)
        sums = tl.sum(of_sample, axis=0).to(tl.float64)
        total += sums
        squares += tl.sum(of_squares, axis=0).to(tl.float64)
        if Y_PER_TOKEN:
            products += of_products.to(tl.float64)
        else:
            label = tl.load(y + sample * columns + m, mask=in_m, other=0.0).to(tl.float64)
            label = tl.where(tl.sum(counted, axis=0) > 0, label, 0.0)  # that of a sample without tokens may be NaN
            products += label[:, None] * sums[None, :]
    tl.atomic_add(sum_x + d, total, mask=leads, sem="relaxed")
    tl.atomic_add(sum_xx + d, squares, mask=leads, sem="relaxed")
    state = sum_xy + tl.program_id(2).to(tl.int64) * BLOCK_M * width
    state += tl.arange(0, BLOCK_M)[:, None] * width + d[None, :]  # 32 bits: fewer registers through the loops
    tl.atomic_add(state, products, mask=in_m[:, None] & in_d[None, :], sem="relaxed")


def launch(
    x: Tensor, y: Tensor, center: Tensor, sum_x: Tensor, sum_xx: Tensor, sum_xy: Tensor, activation: str,
    mask: Tensor | None = None, write: bool = True,
) -> Tensor:  # fmt: skip
    """Runs the kernel; the arguments are those of `skillfast.ops.act_pool_accumulate`, checked."""
    out, _ = empty_capture(x, "none", write)
    if x.numel() == 0:
        return out
    rows = unit_stride(as_tokens(x))
    batch, tokens, width = rows.shape
    columns = y.shape[-1]
    blocks = triton.cdiv(width, TILE["BLOCK_D"]), max(1, triton.cdiv(columns, TILE["BLOCK_M"]))
    samples = triton.cdiv(batch, min(batch, max(1, PROGRAMS // (blocks[0] * blocks[1]))))
    act_pool_accumulate_kernel[blocks[0], triton.cdiv(batch, samples), blocks[1]](
        rows, x if mask is None else mask.contiguous(), out, y.contiguous(), center, sum_x, sum_xx, sum_xy,
        rows.stride(0), rows.stride(1), batch, tokens, width, columns, samples,
        ACTIVATION=activation, HAS_MASK=mask is not None, WRITE=write, Y_PER_TOKEN=y.dim() == 3, **TILE, **OPTIONS,
    )  # fmt: skip
    return out
