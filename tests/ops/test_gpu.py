"""What needs a CUDA device; skipped with a reason where there is none."""

from __future__ import annotations

import pytest
import torch

import skillfast
from skillfast import backends, ops

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 197, 1000), (5, 3, 1024), (2, 3, 5, 33)], ids=str)
def test_neuron_scale_on_cuda(backend, dtype, shape):
    if backend == "native" and not backends.native_has_cuda():
        pytest.skip("the extension was built without nvcc")
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape, generator=generator).to(dtype)
    scale = torch.randn(4, shape[-1], generator=generator, dtype=wide)
    scale[:, ::3] = 0
    shift = torch.randn(4, shape[-1], generator=generator, dtype=wide)
    condition = torch.randint(0, 4, shape[:1], generator=generator)
    with backends.use_backend("reference"):
        want = ops.neuron_scale(x.double(), scale.double(), shift.double(), condition)
    backends.calls.clear()
    with backends.use_backend(backend):
        got = ops.neuron_scale(x.cuda(), scale.cuda(), shift.cuda(), condition.cuda())
    assert backends.calls == {("neuron_scale", backend): 1}
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-6)
    torch.testing.assert_close(got.double().cpu(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("n", "width", "columns"), [(1, 1, 1), (63, 65, 3), (512, 1000, 12), (1000, 300, 101)])
def test_comoments_update_on_cuda(backend, n, width, columns):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, width, generator=generator), torch.randn(n, columns, generator=generator)
    shift = torch.randn(width, generator=generator)
    states = {}
    for name, device in (("reference", "cpu"), (backend, "cuda")):
        states[device] = [
            torch.zeros(s, dtype=torch.float64, device=device) for s in ((width,), (width,), (columns, width))
        ]
        with backends.use_backend(name):
            ops.comoments_update(x.to(device), y.to(device), shift.to(device), *states[device])
    for got, want in zip(states["cuda"], states["cpu"], strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5 * n)


def test_a_trace_and_a_sweep_on_cuda(vit, batches):
    scores = skillfast.trace(vit, batches)
    skills = skillfast.select(scores, metric="label")
    conditions = [skillfast.Condition(skill) for skill in skills.values()]
    want = skillfast.sweep(vit, batches, conditions)
    on_cuda = skillfast.trace(vit.cuda(), batches)
    torch.testing.assert_close(torch.from_numpy(on_cuda.pearson), torch.from_numpy(scores.pearson), rtol=0, atol=1e-3)
    got = skillfast.sweep(vit, batches, conditions)
    assert abs(got.per_class_accuracy - want.per_class_accuracy).max() <= 0.2  # at most a sample of a class on a tie
