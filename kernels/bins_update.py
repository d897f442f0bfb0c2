"""`bins_update` in Triton: a tile of rows and neurons finds its bins and adds its payload with integer atomics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from skillfast.backends.capture import unit_stride

if TYPE_CHECKING:
    from torch import Tensor


TILE = {"BLOCK_N": 16, "BLOCK_D": 64}


@triton.jit(do_not_specialize=["n"])  # one program for batches of any size
def bins_update_kernel(
    x, edges, channels, hats, table, n, width, bins, metrics, counts, weights, stride_row,
    LEVELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Integers, so that neither the order of the atomics nor the tiling changes the table."""
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (r < n)[:, None] & (d < width)[None, :]
    neuron = d.to(tl.int64)[None, :]
    values = tl.load(x + r.to(tl.int64)[:, None] * stride_row + neuron, mask=inside, other=0.0).to(tl.float32)
    index = tl.zeros((BLOCK_N, BLOCK_D), tl.int32)  # how many edges are at or below the value
    for level in tl.static_range(LEVELS):
        reach = index + (1 << (LEVELS - 1 - level))
        there = inside & (reach < bins)
        edge = tl.load(edges + neuron * (bins - 1) + reach - 1, mask=there, other=0.0)
        index = tl.where(there & (values >= edge), reach, index)
    own = table + neuron * (bins * (counts + weights))
    for k in range(metrics):
        channel = tl.load(channels + r * metrics + k, mask=r < n, other=-1).to(tl.int32)[:, None]
        tl.atomic_add(own + index * counts + channel, 1, mask=inside & (channel >= 0), sem="relaxed")
    sums = own + bins * counts
    for lane in range(weights):  # at most two of a metric's eight are not 0
        weight = tl.load(hats + r * weights + lane, mask=r < n, other=0).to(tl.int32)[:, None]
        added = tl.broadcast_to(weight, (BLOCK_N, BLOCK_D))
        tl.atomic_add(sums + index * weights + lane, added, mask=inside & (weight != 0), sem="relaxed")


def launch(x: Tensor, edges: Tensor, channels: Tensor, hats: Tensor, table: Tensor) -> None:
    """Runs the kernel; the arguments are those of `skillfast.ops.bins_update`, checked."""
    n, width = x.shape
    if n == 0 or width == 0:
        return
    x = unit_stride(x)
    bins, weights = edges.shape[1] + 1, hats.shape[1]
    # Rows on axis 0, which takes 2^31 blocks: programs that run together then meet in the tables of few neurons.
    grid = (triton.cdiv(n, TILE["BLOCK_N"]), triton.cdiv(width, TILE["BLOCK_D"]))
    bins_update_kernel[grid](
        x, edges, channels.contiguous(), hats.contiguous(), table, n, width, bins, channels.shape[1],
        table.shape[1] // bins - weights, weights, x.stride(0),
        LEVELS=(bins - 1).bit_length(), **TILE,
    )  # fmt: skip
