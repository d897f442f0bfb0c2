"""What the capture kernels share: a tile of one sample's tokens is read, activated, written and masked."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(values, ACTIVATION: tl.constexpr):
    """act(values) in the type of `values`, float32 or float64."""
    if ACTIVATION == "gelu":
        values = 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865475244))
    elif ACTIVATION == "gelu_tanh":
        values = values * tl.sigmoid(1.5957691216057307118 * (values + 0.044715 * values * values * values))
    elif ACTIVATION == "relu":
        values = tl.where(values < 0, 0.0, values)
    elif ACTIVATION == "silu":
        values = values * tl.sigmoid(values)
    return values


@triton.jit
def flow_tile(
    x, mask, out, sample, start, d, written, stride_batch, stride_token, tokens, width,
    ACTIVATION: tl.constexpr, HAS_MASK: tl.constexpr, WRITE: tl.constexpr, DTYPE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens from `start`: y [BLOCK_T, D] as it is written (rounded) in DTYPE, and which tokens count.

    Writes y where `written` [D] says so. What lies beyond the tokens or the width is 0.
    """
    t = start + tl.arange(0, BLOCK_T)
    here = t < tokens
    inside = here[:, None] & (d < width)[None, :]
    token = t.to(tl.int64)[:, None]
    values = tl.load(x + sample * stride_batch + token * stride_token + d[None, :], mask=inside, other=0.0)
    y = activated(values.to(DTYPE), ACTIVATION).to(values.dtype)
    if WRITE:
        tl.store(out + (sample * tokens + token) * width + d[None, :], y, mask=inside & written[None, :])
    if HAS_MASK:
        here = here & (tl.load(mask + sample * tokens + t, mask=here, other=0) != 0)
    return y.to(DTYPE), here
