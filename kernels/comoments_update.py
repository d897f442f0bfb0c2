"""`comoments_update` in Triton: one program owns BLOCK_D neurons and walks over all rows of the buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from skillfast.backends.capture import unit_stride

if TYPE_CHECKING:
    from torch import Tensor


TILE = {"BLOCK_N": 32, "BLOCK_D": 64, "BLOCK_M": 16, "CHUNK": 256}
OPTIONS = {"num_warps": 4, "num_stages": 2, "maxnreg": 255}  # else ptxas spills registers for occupancy


@triton.jit(do_not_specialize=["n"])  # one program for batches of any size
def comoments_update_kernel(
    x, y, shift, sum_x, sum_xx, sum_xy, n, width, columns, stride_row,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums CHUNK rows in float32, on tensor cores by three products of TF32 each, then adds them to float64 sums."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_d = d < width
    in_m = m < columns
    offset = tl.load(shift + d, mask=in_d, other=0.0)
    total = tl.zeros((BLOCK_D,), tl.float64)
    squares = tl.zeros((BLOCK_D,), tl.float64)
    products = tl.zeros((BLOCK_M, BLOCK_D), tl.float64)
    for chunk in range(0, n, CHUNK):
        few_total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        few_squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        few_products = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(chunk, tl.minimum(chunk + CHUNK, n), BLOCK_N):
            r = start + tl.arange(0, BLOCK_N)
            in_r = r < n
            inside = in_r[:, None] & in_d[None, :]
            values = tl.load(x + r[:, None].to(tl.int64) * stride_row + d[None, :], mask=inside, other=0.0)
            values = tl.where(inside, values.to(offset.dtype) - offset[None, :], 0.0).to(tl.float32)
            labels = tl.load(y + r[None, :] * columns + m[:, None], mask=in_r[None, :] & in_m[:, None], other=0.0)
            few_total += values
            few_squares += values * values
            few_products = tl.dot(labels, values, few_products, input_precision="tf32x3")
        total += tl.sum(few_total, axis=0).to(tl.float64)
        squares += tl.sum(few_squares, axis=0).to(tl.float64)
        products += few_products.to(tl.float64)
    if tl.program_id(1) == 0:
        tl.store(sum_x + d, tl.load(sum_x + d, mask=in_d) + total, mask=in_d)
        tl.store(sum_xx + d, tl.load(sum_xx + d, mask=in_d) + squares, mask=in_d)
    state = sum_xy + m[:, None].to(tl.int64) * width + d[None, :]
    inside = in_m[:, None] & in_d[None, :]
    tl.store(state, tl.load(state, mask=inside) + products, mask=inside)


def launch(x: Tensor, y: Tensor, shift: Tensor, sum_x: Tensor, sum_xx: Tensor, sum_xy: Tensor) -> None:
    """Runs the kernel; the arguments are those of `skillfast.ops.comoments_update`, checked."""
    n, width = x.shape
    columns = y.shape[1]
    if n == 0 or width == 0:
        return
    x = unit_stride(x)
    grid = (triton.cdiv(width, TILE["BLOCK_D"]), max(1, triton.cdiv(columns, TILE["BLOCK_M"])))
    comoments_update_kernel[grid](
        x,
        y.contiguous(),
        shift,
        sum_x,
        sum_xx,
        sum_xy,
        n,
        width,
        columns,
        x.stride(0),
        **TILE,
        **OPTIONS,
    )
