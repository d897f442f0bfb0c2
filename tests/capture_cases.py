"""Cases for the capture ops, and what they should give: plain float64, one sample at a time."""

from __future__ import annotations

import torch
from op_cases import run_op, wide
from torch.nn import functional

ACTIVATION = {
    "identity": lambda x: x,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}
POOLS = ("mean", "cls", "max", "last", "none", "moments")
VIEWS = {
    "contiguous": lambda x: x,
    "batch": lambda x: x.repeat_interleave(2, 0)[::2],
    "tokens": lambda x: x.repeat_interleave(3, 1)[:, 1::3],
    "neurons": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "padded": lambda x: functional.pad(x, (3, 5), value=torch.nan)[..., 3 : 3 + x.shape[-1]],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "turned": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "expanded": lambda x: x[:1].expand(x.shape),
}


def tokens_of(x):
    return x.reshape(x.shape[0], int(torch.tensor(x.shape[1:-1]).prod()), x.shape[-1])


def capture_case(shape, dtype, parts=(), seed=0):
    """x, and the keywords named in `parts`: mask, center."""
    g = torch.Generator().manual_seed(seed)
    batch, tokens, width = shape[0], int(torch.tensor(shape[1:-1]).prod()), shape[-1]
    x = (2 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)
    more = {}
    if "mask" in parts:
        more["mask"] = torch.rand(batch, tokens, generator=g) < 0.6
        more["mask"][::3] &= torch.rand(batch, 1, generator=g)[::3] < 0.5  # samples without tokens
    if "center" in parts:
        more["center"] = torch.randn(width, generator=g, dtype=wide(dtype))
    return x, more


def expected_pool(y, pool, mask=None, center=None):
    """What `pool` makes of y [batch, ..., D] as it is, in float64."""
    rows = tokens_of(y).double()
    out = []
    for i, sample in enumerate(rows):
        kept = sample if mask is None else sample[mask[i]]
        if pool == "moments":
            kept = kept if center is None else kept - center.double()
            out.append(torch.stack([kept.sum(0), kept.square().sum(0)]))
        elif len(kept) == 0:
            out.append(torch.full((y.shape[-1],), torch.nan, dtype=torch.float64))
        else:
            out.append({"mean": kept.mean(0), "max": kept.amax(0), "cls": kept[0], "last": kept[-1]}[pool])
    if not out:
        return torch.zeros((2, 0, y.shape[-1]) if pool == "moments" else (0, y.shape[-1]), dtype=torch.float64)
    return torch.stack(out, dim=1 if pool == "moments" else 0)


def run_capture(backend, x, activation, pool, **more):
    return run_op("act_mask_pool", backend, x, activation, pool, **more)


def accumulate_case(shape, dtype, per_token, masked=False, columns=3, seed=0):
    """Arguments of act_pool_accumulate: x, y, center, sums that are not 0, keywords."""
    x, more = capture_case(shape, dtype, ("mask",) if masked else (), seed)
    g = torch.Generator().manual_seed(seed + 1)
    batch, tokens, width = tokens_of(x).shape
    y = torch.randn(*((batch, tokens) if per_token else (batch,)), columns, generator=g)
    center = torch.randn(width, generator=g)
    sums = tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in ((width,), (width,), (columns, width)))
    return x, y, center, sums, more


def run_accumulate(backend, x, y, center, sums, activation, **more):
    """The activated tensor and the state, which is a copy."""
    sums = tuple(t.clone() for t in sums)
    return run_op("act_pool_accumulate", backend, x, y, center, sums, activation, **more), sums


def expected_state(flow, y, center, sums, mask=None):
    """The sums in float64, from what was activated, and how large their terms are."""
    rows = tokens_of(flow)
    here = torch.ones(rows.shape[:2], dtype=torch.bool) if mask is None else mask
    y = (y if y.dim() == 3 else y[:, None].expand(-1, rows.shape[1], -1))[here].double()
    shifted = rows[here].double() - center.double()
    want = (sums[0] + shifted.sum(0), sums[1] + shifted.square().sum(0), sums[2] + y.T @ shifted)
    return want, (shifted.abs().sum(0), shifted.square().sum(0), y.abs().T @ shifted.abs())
