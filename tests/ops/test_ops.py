from __future__ import annotations

import warnings
from itertools import product

import pytest
import torch
from op_cases import (
    DTYPES,
    ISAS,
    bins_case,
    comoments_case,
    expected_scale,
    isa,  # noqa: F401
    poisoned_empty,
    run_bins,
    run_op,
    scale_case,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from skillfast import _core, backends, ops
from skillfast.backends import reference
from skillfast.errors import ArgumentError, BackendError

SHAPES = [(1, 1), (1, 7), (3, 63), (2, 197, 64), (5, 3, 1000), (1, 1, 1), (4, 63, 17), (2, 3, 5, 33), (130, 1024)]
# One rounding of the result; the inputs are the rounded values.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-14}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neuron_scale(isa, monkeypatch, dtype):
    """A factor of 0 removes even what is not finite: there x holds an infinity and a NaN."""
    poisoned_empty(monkeypatch)
    for shape, with_shift, with_condition in product(SHAPES, (False, True), (False, True)):
        case = scale_case(shape, dtype, with_shift, with_condition)
        want = expected_scale(*case)
        assert want.isfinite().all()
        for backend in ("native", "reference")[: 2 if isa == ISAS[0] else 1]:
            got = run_op("neuron_scale", backend, *case)
            assert got.dtype == dtype
            assert got.is_contiguous()
            torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_operands_of_neuron_scale_may_be_strided(isa):
    x, *operands = scale_case((4, 9, 33), torch.float32, True, True)
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in operands]
    assert not any(t.is_contiguous() for t in strided)
    for backend in ("native", "reference"):
        assert torch.equal(run_op("neuron_scale", backend, x, *strided), run_op("neuron_scale", backend, x, *operands))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[::2],
        lambda x: x[..., ::2],
        lambda x: x.transpose(1, 2),
        lambda x: x[:, 1:, 3:-2],
        lambda x: x[:1].expand(5, -1, -1),
        lambda x: x[:, 0],
    ],
)
def test_neuron_scale_of_strided_views(isa, view):
    x = view(torch.randn(6, 9, 40))
    scale, condition = torch.rand(3, x.shape[-1]), torch.arange(len(x)) % 3
    got = ops.neuron_scale(x, scale, None, condition)
    torch.testing.assert_close(got.double(), expected_scale(x, scale, None, condition), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (2, 3, 0)])
def test_neuron_scale_of_nothing(shape):
    assert ops.neuron_scale(torch.empty(shape), torch.ones(1, shape[-1])).shape == shape


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(isa):
    x = torch.tensor([[1.00390625, 1.01171875, torch.nan, torch.inf, 3.3895314e38, -1e-40]]).to(torch.bfloat16)
    scale = torch.full((1, 6), 1.00390625)
    want = (x.float() * 1.00390625).to(torch.bfloat16)
    torch.testing.assert_close(ops.neuron_scale(x, scale), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_neuron_scale_is_registered_soundly():
    x, scale, shift, condition = scale_case((3, 5, 7), torch.float32, True, True)
    x = x.nan_to_num(1.0, 2.0)  # opcheck finds NaN unlike itself
    x.requires_grad_(), scale.requires_grad_(), shift.requires_grad_()
    opcheck(torch.ops.skillfast.neuron_scale, (x, scale, shift, condition))
    opcheck(torch.ops.skillfast.neuron_scale, (x.detach(), scale.detach()))


@pytest.mark.parametrize("with_condition", [False, True])
@pytest.mark.parametrize("with_shift", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4)])
def test_gradients(shape, with_shift, with_condition):
    x, scale, shift, condition = scale_case(shape, torch.float64, with_shift, with_condition)
    x = x.nan_to_num(1.0, 2.0)
    scale[scale == 0] = 0.5  # at 0 the op is a constant by definition
    inputs = tuple(t if t is None else t.requires_grad_() for t in (x, scale, shift))
    assert torch.autograd.gradcheck(lambda *t: ops.neuron_scale(*t, condition), inputs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(3), torch.ones(1, 3)), r"expected \[batch, ..., D\]"),
        ((torch.ones(2, 3), torch.ones(1, 4)), r"expected \[conditions, 3\]"),
        ((torch.ones(2, 3), torch.ones(3)), r"expected \[conditions, 3\]"),
        ((torch.ones(2, 3), torch.ones(1, 3).double()), "expected torch.float32, got torch.float64"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.ones(1, 3)), r"shift's shape: expected \[2, 3\]"),
        ((torch.ones(2, 3), torch.ones(2, 3), None, torch.tensor([0, 2])), r"indices in \[0, 2\), got 0 to 2"),
        ((torch.ones(2, 3), torch.ones(2, 3), None, torch.tensor([-1, 0])), "got -1 to 0"),
        ((torch.ones(2, 3), torch.ones(2, 3), None, torch.tensor([0])), r"condition's shape: expected \[2\]"),
        ((torch.ones(2, 3), torch.ones(2, 3), None, torch.zeros(2)), "expected torch.int64"),
        ((torch.ones(2, 3), torch.ones(0, 3)), "at least one row"),
    ],
)
def test_neuron_scale_refuses(arguments, words):
    with pytest.raises(ArgumentError, match=words):
        ops.neuron_scale(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "width"), [(1, 1), (63, 7), (64, 256), (65, 257), (512, 63), (1000, 300)])
def test_comoments_update(isa, n, width, dtype):
    for columns in (0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 101):
        x, y, shift, state = comoments_case(n, width, columns, dtype, offset=3.0)
        centred = x.double() - shift.double()
        want = [state[0] + centred.sum(0), state[1] + centred.square().sum(0), state[2] + y.double().T @ centred]
        for backend, tolerance in (("native", 3e-6), ("reference", 1e-12))[: 2 if isa == ISAS[0] else 1]:
            got = [t.clone() for t in state]
            run_op("comoments_update", backend, x, y, shift, *got)
            size = centred.abs().amax() * max(1.0, float(y.abs().sum() and y.abs().amax())) * n
            for a, b in zip(got, want, strict=True):
                assert torch.isfinite(a).all()
                torch.testing.assert_close(a, b, rtol=tolerance, atol=float(tolerance * size))


def test_the_reference_takes_any_number_of_neurons_at_a_time(monkeypatch):
    comoments, bins = comoments_case(9, 31, 3, torch.float32), bins_case(9, 31, 16)
    results = []
    for at_once in (1 << 22, 40, 9 * 16 * 7, 1):
        monkeypatch.setattr(reference, "_AT_ONCE", at_once)
        state = [t.clone() for t in comoments[3]]
        run_op("comoments_update", "reference", *comoments[:3], *state)
        results.append([*state, run_bins("reference", *bins)])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_comoments_update_of_strided_rows(isa):
    x, y, shift, state = comoments_case(50, 40, 3, torch.float32)
    wide = torch.full((50, 100), torch.nan)
    wide[:, 30:70] = x
    for view in (wide[:, 30:70], x.T.contiguous().T):
        got, want = ([t.clone() for t in state] for _ in range(2))
        ops.comoments_update(view, y, shift, *got)
        ops.comoments_update(x, y, shift, *want)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_comoments_do_not_depend_on_the_number_of_threads():
    x, y, shift, state = comoments_case(500, 2000, 12, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([t.clone() for t in state])
            ops.comoments_update(x, y, shift, *results[-1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_comoments_update_is_registered_soundly():
    x, y, shift, state = comoments_case(9, 5, 3, torch.float32)
    opcheck(torch.ops.skillfast.comoments_update, (x, y, shift, *state))


def test_comoments_update_refuses():
    x, y, shift, state = comoments_case(9, 5, 3, torch.float32)
    for arguments, words in (
        ((x[0], y, shift, *state), r"expected \[n, D\]"),
        ((x, y[:4], shift, *state), r"expected \[9, M\]"),
        ((x, y.double(), shift, *state), "y's dtype: expected torch.float32"),
        ((x, y, shift[:2], *state), r"shift's shape: expected \[5\]"),
        ((x, y, shift, state[0].float(), *state[1:]), "sum_x's dtype"),
        ((x, y, shift, state[0], state[1], state[2].T.contiguous().T), "contiguous"),
    ):
        with pytest.raises(ArgumentError, match=words):
            ops.comoments_update(*arguments)


def test_an_explicit_backend_never_falls_back():
    x, scale = torch.ones(2, 3), torch.ones(1, 3)
    with backends.use_backend("triton"), pytest.raises(BackendError, match="'triton' was asked for, but"):
        ops.neuron_scale(x, scale)
    with (
        pytest.raises(ArgumentError, match="expected one of auto, reference, native, triton"),
        backends.use_backend("x"),
    ):
        pass


def test_the_automatic_choice_says_once_where_it_fell_back(monkeypatch):
    from skillfast.backends import native

    monkeypatch.setattr(native, "_core", None)
    monkeypatch.setattr(native, "_import_error", "not there", raising=False)
    monkeypatch.setattr(backends, "_told", set())
    monkeypatch.setattr(backends, "_choices", {})
    x, scale = torch.ones(2, 3), torch.ones(1, 3)
    with pytest.warns(RuntimeWarning, match="neuron_scale runs on backend 'reference': native: .* not built") as told:
        _ = [ops.neuron_scale(x, scale) for _ in range(2)]
    assert len(told) == 1


@pytest.mark.parametrize("built", [True, False])
def test_on_cuda_only_what_could_run_there_and_cannot_is_told(monkeypatch, built):
    """The extension has two ops for CUDA; that Triton runs the others is no loss to tell of."""
    from types import SimpleNamespace

    from skillfast.backends import native

    monkeypatch.setattr(native, "_core", SimpleNamespace(HAS_CUDA=built))
    monkeypatch.setattr(backends, "_told", set())
    monkeypatch.setattr(backends, "_choices", {})
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for op in ("comoments_update", "bins_update", "act_mask_pool", "act_pool_accumulate", "neuron_scale"):
            backends.implementation(op, x)
    lost = () if built else ("bins_update", "neuron_scale")
    want = [f"{op} runs on backend 'triton': native: the C++ extension was built without nvcc" for op in lost]
    assert [str(warning.message) for warning in told] == want


def test_the_dispatcher_is_left_out_where_it_has_nothing_to_do(monkeypatch):
    """And not where gradients, transforms or modes need it."""
    x, scale = torch.randn(2, 3, 4), torch.ones(1, 4)
    want = x * scale
    called = []
    real = ops._DISPATCHED["neuron_scale"]
    monkeypatch.setitem(ops._DISPATCHED, "neuron_scale", lambda *given: called.append(1) or real(*given))
    torch.testing.assert_close(ops.neuron_scale(x, scale), want)
    with torch.inference_mode():
        torch.testing.assert_close(ops.neuron_scale(x, torch.nn.Parameter(scale)), want)
    assert not called
    wanted = x.clone().requires_grad_()
    ops.neuron_scale(wanted, scale).sum().backward()
    torch.testing.assert_close(wanted.grad, torch.ones_like(x))
    with FlopCounterMode(display=False):
        ops.neuron_scale(x, scale)
    with FakeTensorMode() as mode:
        assert ops.neuron_scale(mode.from_tensor(x), mode.from_tensor(scale)).shape == x.shape
    assert len(called) == 3
    seen = make_fx(lambda a, b: ops.neuron_scale(a, b))(x, scale)
    assert any(node.target is torch.ops.skillfast.neuron_scale.default for node in seen.graph.nodes)


def test_the_environment_chooses_a_backend(monkeypatch):
    monkeypatch.setenv("SKILLFAST_BACKEND", "reference")
    backends.calls.clear()
    ops.neuron_scale(torch.ones(2, 3), torch.ones(1, 3))
    assert backends.calls == {("neuron_scale", "reference"): 1}


def test_the_extension_uses_torchs_threads():
    assert _core.cpu_threads_runtime() == "openmp"
