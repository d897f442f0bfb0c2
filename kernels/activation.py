"""What flows out of an activation: shared by the capture kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def flowing(values, factor, offset, ACTIVATION: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """act(values) * factor + offset in the type of `values`, float32 or float64; factor 0 removes even a NaN."""
    if ACTIVATION == "gelu":
        values = 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865475244))
    elif ACTIVATION == "gelu_tanh":
        values = values * tl.sigmoid(1.5957691216057307118 * (values + 0.044715 * values * values * values))
    elif ACTIVATION == "relu":
        values = tl.where(values < 0, 0.0, values)
    elif ACTIVATION == "silu":
        values = values * tl.sigmoid(values)
    if HAS_SCALE:
        values = tl.where(factor == 0, 0.0, values * factor)
    if HAS_SHIFT:
        values += offset
    return values
