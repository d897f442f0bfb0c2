"""What needs a CUDA device; skipped with a reason where there is none."""

from __future__ import annotations

import pytest
import torch
from op_cases import DTYPES, bins_case, comoments_case, expected_scale, run_bins, run_op, scale_case

import skillfast
from skillfast import backends

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 197, 1000), (5, 3, 1024), (2, 3, 5, 33)], ids=str)
def test_neuron_scale_on_cuda(backend, dtype, shape):
    if backend == "native" and not backends.native_has_cuda():
        pytest.skip("the extension was built without nvcc")
    case = scale_case(shape, dtype, True, True)
    got = run_op("neuron_scale", backend, *(t.cuda() for t in case))
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-6)
    torch.testing.assert_close(got.double().cpu(), expected_scale(*case), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "width", "n_bins", "counts", "hats"),
    [(1, 1, 2, 2, 0), (63, 7, 100, 7, 16), (2100, 1000, 128, 12, 16), (300, 37, 256, 1000, 8)],
)
def test_bins_update_in_cuda(n, width, n_bins, counts, hats, dtype):
    """The tables of the last case fit no shared memory."""
    if not backends.native_has_cuda():
        pytest.skip("the extension was built without nvcc")
    case = bins_case(n, width, n_bins, dtype, counts=counts, hats=hats)
    got = run_bins("native", *(t.cuda() for t in case))
    assert torch.equal(got.cpu(), run_bins("reference", *case))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("n", "width", "columns"), [(1, 1, 1), (63, 65, 3), (512, 1000, 12), (1000, 300, 101)])
def test_comoments_update_on_cuda(backend, n, width, columns):
    *rows, state = comoments_case(n, width, columns, torch.float32)
    on_cuda = [t.cuda() for t in state]
    run_op("comoments_update", "reference", *rows, *state)
    run_op("comoments_update", backend, *(t.cuda() for t in rows), *on_cuda)
    for got, want in zip(on_cuda, state, strict=True):
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
