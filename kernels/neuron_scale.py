"""`neuron_scale` in Triton: one program scales BLOCK neurons of one (sample, token) row."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl


@triton.jit
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


def launch(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None = None, condition: torch.Tensor | None = None
) -> torch.Tensor:
    """Runs the kernel over x [batch, ..., D]; the arguments are those of `skillfast.ops.neuron_scale`, checked."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)  # [batch, tokens, D]
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    width = x.shape[-1]
    block = min(1024, triton.next_power_of_2(width))
    grid = (rows.shape[0] * rows.shape[1], triton.cdiv(width, block))
    scale = scale.contiguous()
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        neuron_scale_kernel[grid](
            rows, scale, scale if shift is None else shift.contiguous(), scale if condition is None else condition,
            out, rows.stride(0), rows.stride(1), rows.shape[1], width,
            HAS_SHIFT=shift is not None, HAS_CONDITION=condition is not None, BLOCK=block,
        )  # fmt: skip
    return out
