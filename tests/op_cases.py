"""What the tests of ops share: dtypes, instruction sets, and outputs poisoned with NaN."""

from __future__ import annotations

import pytest
import torch

from skillfast import _core

ISAS = [isa for isa in ("baseline", "avx2", "avx512") if _core.set_cpu_isa(isa)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=ISAS)
def isa(request):
    widest = _core.cpu_isa()
    assert _core.set_cpu_isa(request.param)
    yield request.param
    assert _core.set_cpu_isa(widest)


def poisoned_empty(monkeypatch):
    """torch.empty filled with NaN, so that an element that a kernel does not write is seen."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
