"""What the tests of ops share: dtypes, instruction sets, and outputs poisoned with NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from skillfast import _core, backends

ISAS = [isa for isa in ("baseline", "avx2", "avx512") if _core.set_cpu_isa(isa)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=ISAS)
def isa(request):
    widest = _core.cpu_isa()
    assert _core.set_cpu_isa(request.param)
    yield request.param
    assert _core.set_cpu_isa(widest)


def wide(dtype):
    """The type in which activations of a dtype are scaled and pooled."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def poison(empty):
    """A torch.empty filled with NaN, so that an element that a kernel does not write is seen."""

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    return poisoned


def poisoned_empty(monkeypatch):
    monkeypatch.setattr(torch, "empty", poison(torch.empty))


def run_op(op, backend, *arguments, **keywords):
    """Calls skillfast.ops.<op> on one backend, and asserts that this backend ran it, once."""
    from skillfast import ops

    before = backends.calls[op, backend]
    with backends.use_backend(backend):
        got = getattr(ops, op)(*arguments, **keywords)
    assert backends.calls[op, backend] == before + 1
    return got


def scale_case(shape, dtype, with_shift, with_condition, seed=0):
    """Arguments of neuron_scale: a third of the factors 0, a third 1, and a value there that is not finite."""
    g = torch.Generator().manual_seed(seed)
    conditions = 4 if with_condition else 1
    x = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    scale = torch.randn(conditions, shape[-1], generator=g, dtype=wide(dtype))
    scale[:, ::3] = 0
    scale[:, 1::3] = 1
    x[0, ..., 0] = torch.inf
    x[-1, ..., -1 - (shape[-1] - 1) % 3] = torch.nan
    shift = torch.randn(conditions, shape[-1], generator=g, dtype=wide(dtype)) if with_shift else None
    condition = torch.randint(0, conditions, (shape[0],), generator=g) if with_condition else None
    return x, scale, shift, condition


def expected_scale(x, scale, shift, condition):
    """neuron_scale in float64, one sample at a time."""
    rows = []
    for i, sample in enumerate(x.double()):
        row = 0 if condition is None else int(condition[i])
        factor = scale[row].double()
        value = torch.where(factor == 0, 0.0, sample * factor)
        rows.append(value if shift is None else value + shift[row].double())
    return torch.stack(rows)


def comoments_case(n, width, columns, dtype, offset=0.0, seed=0):
    """Arguments of comoments_update, with a state that is not 0."""
    g = torch.Generator().manual_seed(seed)
    x = (offset + torch.randn(n, width, generator=g, dtype=torch.float64)).to(dtype)
    y = torch.randn(n, columns, generator=g)
    shift = (offset + torch.randn(width, generator=g)).float()
    state = [torch.randn(s, generator=g, dtype=torch.float64) for s in ((width,), (width,), (columns, width))]
    return x, y, shift, state


def bins_case(n, width, n_bins, dtype=torch.float32, metrics=2, counts=7, hats=16, seed=0):
    """Arguments of bins_update with repeated edges, values on edges, and values that are not finite."""
    g = torch.Generator().manual_seed(seed)
    edges = torch.randn(width, n_bins - 1, generator=g).to(dtype).float().sort(1).values
    edges[:, n_bins // 2 : n_bins // 2 + 2] = edges[:, n_bins // 2 - 1 : n_bins // 2]
    edges[:, max(0, n_bins - 5) :] = torch.inf
    x = torch.randn(n, width, generator=g).to(dtype)
    nearest = edges[:, torch.randint(0, n_bins - 1, (n,), generator=g)].T.to(dtype)
    x = torch.where(torch.rand(n, width, generator=g) < 0.2, nearest, x)
    x[:, ::3] = x[:, ::3].relu()  # many rows share a bin
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf, 0.0, -0.0)):
        x.view(-1)[3 + i :: 17] = value
    channels = torch.randint(-1, counts, (n, metrics), generator=g).to(torch.int16)
    weights = torch.randint(0, 257, (n, hats), generator=g).to(torch.int16)
    table = torch.randint(0, 1000, (width, n_bins * (counts + hats)), generator=g).to(torch.int32)
    return x, edges.contiguous(), channels, weights, table


def run_bins(backend, x, edges, channels, weights, table):
    """The table after bins_update, which is a copy."""
    table = table.clone()
    run_op("bins_update", backend, x, edges, channels, weights, table)
    return table


def expected_bins(x, edges, channels, weights, table):
    """bins_update by NumPy, one neuron and row at a time."""
    table = table.numpy().copy()
    n_bins, hats = edges.shape[1] + 1, weights.shape[1]
    counts = table.shape[1] // n_bins - hats
    for d, (values, own) in enumerate(zip(x.float().T.numpy(), edges.numpy(), strict=True)):
        of_counts, of_sums = np.split(table[d], [n_bins * counts])
        for row, value in enumerate(values):
            index = int((own <= value).sum())
            for channel in channels[row].tolist():
                of_counts[index * counts + channel] += channel >= 0
            of_sums[index * hats : (index + 1) * hats] += weights[row].numpy()
    return torch.from_numpy(table)
