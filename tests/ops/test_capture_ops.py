"""`act_mask_pool` and `act_pool_accumulate` against float64, on awkward shapes and poisoned outputs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from capture_cases import (
    ACTIVATION,
    POOLS,
    VIEWS,
    accumulate_case,
    capture_case,
    expected_pool,
    expected_state,
    run_accumulate,
    run_capture,
)
from conftest import one_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import DTYPES, ISAS, isa, poisoned_empty, wide  # noqa: F401

from skillfast import _core, ops
from skillfast.errors import ArgumentError

BACKENDS = ("native", "reference")
SMALL = [(1, 1), (3, 7), (1, 1, 1), (4, 5, 3), (2, 1, 33), (3, 2, 3, 7)]
PARTS = ("mask", "center")
# Against the size of the terms: one rounding of y, or the arithmetic of the activation.
TOLERANCE = {torch.float32: 6e-7, torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float64: 1e-15}
POOLED = {torch.float32: 4e-7, torch.float64: 2e-14}


def check_capture(backend, x, activation, pool, more):
    y, pooled = run_capture(backend, x, activation, pool, **more)
    want, size = ACTIVATION[activation](x.double()), x.double().abs()
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    tiny = torch.finfo(x.dtype).smallest_normal if x.dtype == torch.float16 else 1e-30
    assert ((y.double() - want).abs() <= TOLERANCE[x.dtype] * size + tiny).all()
    check_pooled(y, pooled, pool, more)
    empty, again = run_capture(backend, x, activation, pool, **more, write=False)
    assert empty.numel() == 0
    # Another loop may round its products otherwise.
    same = 1e-14 if x.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(again, pooled, rtol=same, atol=same, equal_nan=True)


def check_pooled(y, pooled, pool, more):
    assert pooled.dtype == wide(y.dtype)
    if pool == "none":
        assert pooled.numel() == 0
        return
    want = expected_pool(y, pool, more.get("mask"), more.get("center"))
    assert pooled.shape == want.shape
    if pool in ("cls", "max", "last"):
        assert torch.equal(pooled.isnan(), want.isnan())
        assert torch.equal(pooled.double().nan_to_num(7.0), want.nan_to_num(7.0))
        return
    absolute = y.double().abs() + (more["center"].double().abs() if pool == "moments" and "center" in more else 0.0)
    size = expected_pool(absolute, pool, more.get("mask"))
    near = (pooled.double() - want).abs() <= POOLED[pooled.dtype] * size + 1e-30
    assert (near | (pooled.isnan() & want.isnan())).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", POOLS)
def test_every_mask_of_three_tokens(backend, pool):
    x, _ = capture_case((8, 3, 5), torch.float32)
    mask = torch.tensor(list(product([False, True], repeat=3)))
    check_capture(backend, x, "identity", pool, {"mask": mask})
    check_capture(backend, -x.abs(), "identity", pool, {"mask": mask})


@pytest.mark.parametrize("activation", ACTIVATION)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_act_mask_pool_of_small_shapes(isa, monkeypatch, dtype, activation):
    poisoned_empty(monkeypatch)
    for shape, parts in product(SMALL, ((), ("mask",), PARTS)):
        x, more = capture_case(shape, dtype, parts)
        for pool, backend in product(POOLS, BACKENDS[: 2 if isa == ISAS[0] else 1]):
            check_capture(backend, x, activation, pool, more)


@st.composite
def some_shape(draw):
    batch, width = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 7, 33, 63, 513, 1030]))
    tokens = draw(st.sampled_from([(), (1,), (63,), (197,), (1000,), (7, 9), (1, 63), (3, 1)]))
    batch = batch if int(np.prod(tokens)) * width < 60_000 else 1
    return (batch, *tokens, width)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=some_shape(), dtype=st.sampled_from(DTYPES), activation=st.sampled_from(list(ACTIVATION)),
    pool=st.sampled_from(POOLS), parts=st.sampled_from([(), ("mask",), ("center",), PARTS]),
    view=st.sampled_from(list(VIEWS)),
    chosen=st.sampled_from(ISAS), backend=st.sampled_from(["native", "native", "reference"]),
)  # fmt: skip
def test_act_mask_pool_of_some_shapes(shape, dtype, activation, pool, parts, view, chosen, backend):
    x, more = capture_case(shape, dtype, parts)
    view = "contiguous" if x.dim() == 2 and view in ("tokens", "turned") else view
    before = _core.cpu_isa()
    _core.set_cpu_isa(chosen)
    try:
        check_capture(backend, VIEWS[view](x), activation, pool, more)
    finally:
        _core.set_cpu_isa(before)


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0), (2, 0, 4, 5)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_act_mask_pool_of_nothing(backend, shape):
    for pool, parts in product(POOLS, ((), PARTS)):
        x, more = capture_case(shape, torch.bfloat16, parts)
        y, pooled = run_capture(backend, x, "gelu", pool, **more)
        assert y.shape == shape
        check_pooled(y, pooled, pool, more)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_and_operands_may_be_strided(backend):
    x, more = capture_case((4, 9, 33), torch.float32, PARTS)
    strided = {name: t.repeat_interleave(2, -1)[..., ::2] for name, t in more.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    for pool in POOLS:
        check_capture(backend, x, "silu", pool, strided)


def test_a_neurons_place_changes_nothing(isa):
    """Vectors and what is left over of them round alike, so panels of any width give the same values."""
    for dtype, activation in product(DTYPES, ACTIVATION):
        x, _ = capture_case((2, 3, 4100), dtype)
        y, pooled = run_capture("native", x, activation, "mean")
        for part in (slice(0, 1), slice(3, 20), slice(509, 520), slice(4093, 4100)):
            some_y, some_pooled = run_capture("native", x[..., part], activation, "mean")
            assert torch.equal(some_y, y[..., part])
            assert torch.equal(some_pooled, pooled[..., part])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_and_moments_of_4096_tokens_far_from_zero(isa, dtype, backend):
    g = torch.Generator().manual_seed(0)
    x = (1e3 + 1e-2 * torch.randn(2, 4096, 37, generator=g, dtype=torch.float64)).to(dtype)
    _, mean = run_capture(backend, x, "identity", "mean")
    rounding = max(torch.finfo(mean.dtype).eps, 1e-14)
    assert ((mean.double() - x.double().mean(1)).abs() <= 1e3 * rounding).all()
    center = torch.full((37,), 1e3, dtype=wide(dtype))
    _, moments = run_capture(backend, x, "identity", "moments", center=center)
    shifted = x.double() - center.double()
    assert ((moments[0].double() - shifted.sum(1)).abs() <= 2 * rounding * shifted.abs().sum(1)).all()
    times = 0.5 if backend == "reference" and dtype != torch.float64 else 2  # summed in float64, rounded once
    assert ((moments[1].double() - shifted.square().sum(1)).abs() <= times * rounding * shifted.square().sum(1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_flows_as_in_torch(isa, dtype, backend):
    largest = torch.finfo(dtype).max
    values = [torch.nan, torch.inf, -torch.inf, largest, -largest, 0.0, -0.0, 1e-30, -1e-30, 30.0, -30.0]
    x = torch.tensor(values, dtype=torch.float64).to(dtype)[None, :, None].expand(1, -1, 21).contiguous()
    for activation, function in ACTIVATION.items():
        y, pooled = run_capture(backend, x, activation, "max")
        want = function(x.to(wide(dtype)) if backend == "reference" else x.double()).to(dtype)  # gelu(inf) differs
        torch.testing.assert_close(y, want, equal_nan=True, rtol=TOLERANCE[dtype], atol=1e-5)
        assert pooled.isnan().all()
        assert run_capture(backend, x.roll(3, 1), activation, "max")[1].isnan().all()  # not the first token's
        for pool in ("mean", "cls"):
            assert run_capture(backend, x, activation, pool)[1].isnan().all()
        assert run_capture(backend, x, activation, "last")[1].isfinite().all()
    mask = torch.ones(1, 11, dtype=torch.bool)
    mask[0, :3] = False  # what is left out does not reach the pooled row
    for pool in ("mean", "max", "cls", "last", "moments"):
        assert run_capture(backend, x / 4, "relu", pool, mask=mask)[1][0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_act_pool_accumulate(isa, monkeypatch, dtype):
    poisoned_empty(monkeypatch)
    shapes = [(1, 1), (70, 7), (1, 1, 1), (3, 63, 65), (130, 2, 33), (2, 3, 5, 130), (2, 9, 1030)]
    for i, (shape, per_token, masked) in enumerate(product(shapes, (False, True), (False, True))):
        case = accumulate_case(shape, dtype, per_token, masked, columns=(3, 14, 0)[i % 3])
        check_accumulate(*case[:4], [*ACTIVATION][i % 5], case[4], BACKENDS[: 2 if isa == ISAS[0] else 1])


def check_accumulate(x, y, center, sums, activation, more, on=BACKENDS):
    for backend in on:
        flow, _ = run_capture(backend, x, activation, "none")
        out, state = run_accumulate(backend, x, y, center, sums, activation, **more)
        assert torch.equal(out, flow)
        want, size = expected_state(flow, y, center, sums, **more)
        for got, expected, scale, start in zip(state, want, size, sums, strict=True):
            assert ((got - expected).abs() <= 1e-6 * scale + 1e-15 * start.abs() + 1e-30).all()
        empty, again = run_accumulate(backend, x, y, center, sums, activation, write=False, **more)
        assert empty.numel() == 0
        assert all(torch.equal(a, b) for a, b in zip(again, state, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=some_shape(), dtype=st.sampled_from(DTYPES[:3]), activation=st.sampled_from(list(ACTIVATION)),
    per_token=st.booleans(), masked=st.booleans(), view=st.sampled_from(list(VIEWS)),
    columns=st.sampled_from([0, 1, 6, 13]), chosen=st.sampled_from(ISAS),
)  # fmt: skip
def test_act_pool_accumulate_of_some_shapes(shape, dtype, activation, per_token, masked, view, columns, chosen):
    x, y, *operands, more = accumulate_case(shape, dtype, per_token, masked, columns)
    view = "contiguous" if x.dim() == 2 and view in ("tokens", "turned") else view
    y = y.repeat_interleave(2, -1)[..., ::2]
    more = {name: mask.repeat_interleave(2, -1)[..., ::2] for name, mask in more.items()}
    before = _core.cpu_isa()
    _core.set_cpu_isa(chosen)
    try:
        check_accumulate(VIEWS[view](x), y, *operands, activation, more)
    finally:
        _core.set_cpu_isa(before)


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 4, 5)], ids=str)
def test_act_pool_accumulate_of_nothing(shape):
    for per_token, masked in product((False, True), (False, True)):
        x, *operands, more = accumulate_case(shape, torch.float32, per_token, masked)
        check_accumulate(x, *operands, "gelu", more)


def test_metrics_of_a_sample_without_tokens_are_not_read(isa):
    x, y, center, sums, _ = accumulate_case((3, 4, 9), torch.float32, False)
    y[1] = torch.nan
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    check_state = run_accumulate("native", x, y, center, sums, "gelu", mask=mask)[1]
    kept = [0, 2]
    want, _ = expected_state(run_capture("native", x, "gelu", "none")[0][kept], y[kept], center, sums)
    for got, expected in zip(check_state, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_token", [False, True])
def test_pearson_far_from_zero(isa, per_token, backend):
    """Offset 1e3 with std 1e-2: r of the sums against r of the rows in float64."""
    x, y, _, sums, _ = accumulate_case((60, 200, 5), torch.float32, per_token, columns=2)
    x = (1e3 + 1e-2 * (x + y[..., :1] if per_token else x + y[:, None, :1])).float()
    center = x.flatten(0, 1)[:100].mean(0)
    sums = tuple(torch.zeros_like(t) for t in sums)
    state = run_accumulate(backend, x, y, center, sums, "identity")[1]
    rows = x.flatten(0, 1).double()
    labels = (y if per_token else y[:, None].expand(-1, 200, -1)).flatten(0, -2).double()
    n = len(rows)
    covariance = state[2] / n - labels.mean(0)[:, None] * (state[0] / n)
    deviation = (state[1] / n - (state[0] / n).square()).sqrt()
    pearson = covariance / deviation / labels.std(0, correction=0)[:, None]
    want = np.corrcoef(rows.T.numpy(), labels.T.numpy())[5:, :5]
    assert abs(want[0]).min() > 0.2
    np.testing.assert_allclose(pearson.numpy(), want, rtol=0, atol=1e-6)


def test_threads_change_nothing():
    x, *operands, more = accumulate_case((9, 40, 1030), torch.bfloat16, True, True, columns=7)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            result = [t for pool in POOLS for t in run_capture("native", x, "gelu", pool, **more)]
            out, state = run_accumulate("native", x, *operands, "gelu", **more)
            results.append([*result, out, *state])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("parts", [(), PARTS])
@pytest.mark.parametrize("pool", POOLS)
def test_act_mask_pool_is_registered_soundly(pool, parts):
    x, more = capture_case((3, 4, 5), torch.float32, parts)
    arguments = (x, "gelu", pool, *(more.get(name) for name in PARTS))
    for given_ in (arguments, (*arguments, False), arguments[:3]):
        if pool == "moments" or "mask" not in parts:  # opcheck finds NaN unlike itself
            torch.library.opcheck(torch.ops.skillfast.act_mask_pool, given_)


def test_act_pool_accumulate_is_registered_soundly():
    for masked in (False, True):
        x, y, center, sums, more = accumulate_case((3, 4, 5), torch.bfloat16, masked, masked)
        arguments = (x, y, center, *sums, "gelu", more.get("mask"), not masked)
        torch.library.opcheck(torch.ops.skillfast.act_pool_accumulate, arguments)
        torch.library.opcheck(torch.ops.skillfast.act_pool_accumulate, arguments[:7])


X = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (torch.ones(4), {}, "x: expected [batch, ..., D]"),
        (X.int(), {}, "x's dtype: expected one of torch.float32"),
        (X, {"activation": "tanh"}, "activation: expected one of identity, gelu, gelu_tanh, relu, silu, got 'tanh'"),
        (X, {"pool": "sum"}, "got 'sum'"),
        (X, {"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask's shape: expected [2, 3], got [2, 4]"),
        (X, {"mask": torch.ones(2, 3)}, "mask's dtype: expected torch.bool"),
        (X[:0], {"mask": torch.ones(0, 4, dtype=torch.bool)}, "mask's shape: expected [0, 3]"),
        (X, {"pool": "moments", "center": torch.ones(3)}, "center's shape: expected [4]"),
        (X, {"pool": "moments", "center": torch.ones(4).half()}, "center's dtype: expected torch.float32"),
    ],
)
def test_act_mask_pool_refuses(x, options, words):
    assert words in one_line(ArgumentError, ops.act_mask_pool, x, **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": X.double()}, "x: expected float32, bfloat16 or float16, got float64; use act_mask_pool"),
        ({"activation": "tanh"}, "activation: expected one of identity, gelu"),
        ({"y": torch.tensor(1.0)}, "y: expected [2, M] or [2, 3, M], got shape []"),
        ({"y": torch.ones(3, 2)}, "y: expected [2, M] or [2, 3, M], got shape [3, 2]"),
        ({"y": torch.ones(2, 4, 2)}, "y: expected [2, M] or [2, 3, M], got shape [2, 4, 2]"),
        ({"y": torch.ones(2, 2).double()}, "y's dtype: expected torch.float32"),
        ({"center": torch.ones(4).double()}, "center's dtype"),
        ({"center": torch.ones(8)[::2]}, "center: expected a contiguous tensor"),
        ({"sum_x": torch.zeros(4)}, "sum_x's dtype: expected torch.float64"),
        ({"sum_xy": torch.zeros(4, 2).double().T}, "sum_xy: expected a contiguous tensor"),
        ({"sum_xy": torch.zeros(3, 4).double()}, "sum_xy's shape: expected [2, 4]"),
        ({"mask": torch.ones(2, 3)}, "mask's dtype"),
    ],
)
def test_act_pool_accumulate_refuses(change, words):
    case = {
        "x": X, "y": torch.ones(2, 2), "center": torch.ones(4), "sum_x": torch.zeros(4).double(),
        "sum_xx": torch.zeros(4).double(), "sum_xy": torch.zeros(2, 4).double(), **change,
    }  # fmt: skip
    sums = tuple(case.pop(name) for name in ("sum_x", "sum_xx", "sum_xy"))
    positional = (case.pop("x"), case.pop("y"), case.pop("center"), sums)
    assert words in one_line(ArgumentError, ops.act_pool_accumulate, *positional, **case)
