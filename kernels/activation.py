"""What the capture kernels share: a tile of one sample's tokens is read, activated, written and masked."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reciprocal(x):
    """1 / x of a positive float32 x from the hardware's reciprocal square root, within 4e-7 of it; 0 at infinity."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def normal_cdf(x):
    """The standard normal distribution function of float32 x without a branch: within 1.3e-6, x times it within 5e-7.

    By the rational approximation 7.1.26 of Abramowitz and Stegun's Handbook of Mathematical Functions.
    """
    z = tl.abs(x) * 0.7071067811865475244
    t = reciprocal(1.0 + 0.3275911 * z)
    p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * p * tl.exp2(-1.4426950408889634 * z * z)
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of float32 x without a division."""
    return reciprocal(1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def activated(values, ACTIVATION: tl.constexpr):
    """act(values) in the type of `values`, float32 or float64."""
    double: tl.constexpr = values.dtype == tl.float64
    if ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(values * 0.7071067811865475244)) if double else normal_cdf(values)
        values = values * below
    elif ACTIVATION == "gelu_tanh":
        bent = 1.5957691216057307118 * (values + 0.044715 * values * values * values)
        values = values * (tl.sigmoid(bent) if double else sigmoid(bent))
    elif ACTIVATION == "relu":
        values = tl.where(values < 0, 0.0, values)
    elif ACTIVATION == "silu":
        values = values * (tl.sigmoid(values) if double else sigmoid(values))
    return values


@triton.jit
def flow_tile(
    x, mask, out, sample, start, d, written, stride_batch, stride_token, tokens, width,
    ACTIVATION: tl.constexpr, HAS_MASK: tl.constexpr, WRITE: tl.constexpr, DTYPE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens from `start`: y [BLOCK_T, D] as it is written (rounded) in DTYPE, and which tokens count.

    Writes y where `written` [D] says so. What lies beyond the tokens or the width is 0.
    """
    # The tile's first address is the program's alone; what differs between threads is made once, before the loop.
    t = tl.arange(0, BLOCK_T)
    here = t < tokens - start
    inside = here[:, None] & (d < width)[None, :]
    begin = tl.cast(start, tl.int64)
    token = t.to(tl.int64)[:, None]
    tile = x + (sample * stride_batch + begin * stride_token)
    values = tl.load(tile + (token * stride_token + d[None, :]), mask=inside, other=0.0)
    y = activated(values.to(DTYPE), ACTIVATION).to(values.dtype)
    if WRITE:
        tile = out + (sample * tokens + begin) * width
        tl.store(tile + (token * width + d[None, :]), y, mask=inside & written[None, :])
    if HAS_MASK:
        here = here & (tl.load(mask + sample * tokens + start + t, mask=here, other=0) != 0)
    return y.to(DTYPE), here
