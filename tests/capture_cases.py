"""Cases for the capture ops, and what they should give: plain float64, one sample at a time."""

from __future__ import annotations

import torch
from torch.nn import functional

from skillfast import backends, ops

ACTIVATION = {
    "identity": lambda x: x,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}
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


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def tokens_of(x):
    return x.reshape(x.shape[0], int(torch.tensor(x.shape[1:-1]).prod()), x.shape[-1])


def capture_case(shape, dtype, parts=(), seed=0):
    """x and the keywords named in `parts`: scale, shift, condition, mask, center."""
    g = torch.Generator().manual_seed(seed)
    batch, width = shape[0], shape[-1]
    tokens = int(torch.tensor(shape[1:-1]).prod())
    x = (2 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)
    more = {}
    conditions = 3 if "condition" in parts else 1
    if {"scale", "shift", "condition"} & set(parts):
        more["scale"] = torch.randn(conditions, width, generator=g, dtype=wide(dtype))
        more["scale"][:, ::3] = 0
        more["scale"][:, 1::3] = 1
    if "shift" in parts:
        more["shift"] = torch.randn(conditions, width, generator=g, dtype=wide(dtype))
    if "condition" in parts:
        more["condition"] = torch.randint(0, conditions, (batch,), generator=g)
    if "mask" in parts:
        more["mask"] = torch.rand(batch, tokens, generator=g) < 0.6
        more["mask"][::3] &= torch.rand(batch, 1, generator=g)[::3] < 0.5  # samples without tokens
    if "center" in parts:
        more["center"] = torch.randn(width, generator=g, dtype=wide(dtype))
    return x, more


def expected_flow(x, activation, scale=None, shift=None, condition=None, **_):
    """act(x) * scale + shift in float64, and how large its terms are: what an error is measured against."""
    value = ACTIVATION[activation](x.double())
    size = x.double().abs()
    if scale is not None:
        rows = torch.zeros(x.shape[0], dtype=torch.int64) if condition is None else condition
        view = (x.shape[0],) + (1,) * (x.dim() - 2) + (x.shape[-1],)
        factor = scale.double()[rows].view(view)
        value = torch.where(factor == 0, 0.0, value * factor)
        size = torch.where(factor == 0, 0.0, size * factor.abs())
        if shift is not None:
            value = value + shift.double()[rows].view(view)
            size = size + shift.double()[rows].view(view).abs()
    return value, size


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
    before = backends.calls["act_mask_pool", backend]
    with backends.use_backend(backend):
        got = ops.act_mask_pool(x, activation, pool, **more)
    assert backends.calls["act_mask_pool", backend] == before + 1
    return got


def accumulate_case(shape, dtype, pool, per_token, parts=(), columns=3, seed=0):
    """Arguments of act_pool_accumulate: x, y, center, sums that are not 0, keywords; bins where `parts` says so."""
    x, more = capture_case(shape, dtype, set(parts) - {"center", "bins"}, seed)
    g = torch.Generator().manual_seed(seed + 1)
    batch, tokens, width = tokens_of(x).shape
    y = torch.randn(*((batch, tokens) if per_token else (batch,)), columns, generator=g)
    center = torch.randn(width, generator=g)
    sums = tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in ((width,), (width,), (columns, width)))
    if "bins" in parts:
        n, bins = batch * tokens if pool == "none" else batch, 19
        edges = torch.randn(width, bins - 1, generator=g).sort(1).values.contiguous()
        edges[:, 7:9] = 0.0
        channels = torch.randint(-1, 4, (n, 2), generator=g).to(torch.int16)
        hats = torch.randint(0, 257, (n, 8), generator=g).to(torch.int16)
        edges = edges.sort(1).values.contiguous()
        more["bins"] = (edges, channels, hats, torch.randint(0, 99, (width, bins * 12), generator=g).to(torch.int32))
    return x, y, center, sums, more


def run_accumulate(backend, x, y, center, sums, activation, pool, bins=None, **more):
    """What flows on, and the state, which is a copy."""
    sums = tuple(t.clone() for t in sums)
    bins = None if bins is None else (*bins[:3], bins[3].clone())
    before = backends.calls["act_pool_accumulate", backend]
    with backends.use_backend(backend):
        out = ops.act_pool_accumulate(x, y, center, sums, activation, pool, bins=bins, **more)
    assert backends.calls["act_pool_accumulate", backend] == before + 1
    return out, sums, None if bins is None else bins[3]


def observations(flow, pool, pooled, mask=None):
    """Rows [n, D] that the statistics see, and which of all observations they are."""
    if pool != "none":
        return pooled, torch.ones(len(pooled), dtype=torch.bool)
    rows = tokens_of(flow).float().flatten(0, 1)
    here = torch.ones(len(rows), dtype=torch.bool) if mask is None else mask.flatten()
    return rows[here], here


def expected_state(flow, pooled, y, center, sums, pool, bins=None, mask=None, **_):
    """The sums in float64 and the table by bins_update, from what act_mask_pool gave."""
    rows, here = observations(flow, pool, pooled, mask)
    if pool == "none" and y.dim() == 2:
        y = y[:, None].expand(-1, tokens_of(flow).shape[1], -1)
    y = y.flatten(0, -2)[here].double()
    shifted = rows.double() - center.double()
    want = (sums[0] + shifted.sum(0), sums[1] + shifted.square().sum(0), sums[2] + y.T @ shifted)
    size = (shifted.abs().sum(0), shifted.square().sum(0), y.abs().T @ shifted.abs())
    table = None
    if bins is not None:
        edges, channels, hats, table = bins
        table = table.clone()
        with backends.use_backend("reference"):
            ops.bins_update(rows, edges, channels[here], hats[here], table)
    return want, size, table
