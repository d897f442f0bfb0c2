"""`neuron_scale` in Triton: one program scales BLOCK neurons of one (sample, token) row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skillfast.backends.capture import as_tokens, unit_stride


@triton.jit(do_not_specialize=["tokens"])  # one program for batches of any size
def neuron_scale_kernel(
    x, scale, shift, condition, out, stride_batch, stride_token, tokens, width,
    HAS_SHIFT: tl.constexpr, HAS_CONDITION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes one row of `out`; scale 0 removes even a non-finite value."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // tokens
    token = row % tokens
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    chosen = tl.zeros((), tl.int64)
    if HAS_CONDITION:
        chosen = tl.load(condition + sample)
    factor = tl.load(scale + chosen * width + columns, mask=inside, other=0.0)
    values = tl.load(x + sample * stride_batch + token * stride_token + columns, mask=inside, other=0.0)
    result = tl.where(factor == 0, 0.0, values.to(factor.dtype) * factor)
    if HAS_SHIFT:
        result += tl.load(shift + chosen * width + columns, mask=inside, other=0.0)
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), mask=inside)


def launch(x: Tensor, scale: Tensor, shift: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
    """Runs the kernel over x [batch, ..., D]; the arguments are those of `skillfast.ops.neuron_scale`, checked."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = unit_stride(as_tokens(x))
    width = x.shape[-1]
    block = min(1024, triton.next_power_of_2(width))
    grid = (rows.shape[0] * rows.shape[1], triton.cdiv(width, block))
    given = [x if t is None else t.contiguous() for t in (scale, shift, condition)]
    neuron_scale_kernel[grid](
        rows, *given, out, rows.stride(0), rows.stride(1), rows.shape[1], width,
        HAS_SHIFT=shift is not None, HAS_CONDITION=condition is not None, BLOCK=block,
    )  # fmt: skip
    return out
