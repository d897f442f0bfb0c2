"""`bins_update`: bitwise against NumPy and among the backends."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from op_cases import DTYPES, ISAS, bins_case, expected_bins, isa, run_bins  # noqa: F401
from torch.library import opcheck

from skillfast import ops
from skillfast.errors import ArgumentError

BINS = 128


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_equals_numpy(dtype):
    for n, width, n_bins in ((1, 1, 2), (63, 7, 100), (20, 33, 256)):
        case = bins_case(n, width, n_bins, dtype)
        assert torch.equal(run_bins("reference", *case), expected_bins(*case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_equals_reference(isa, dtype):
    for n, width in ((1, 1), (63, 7), (512, 63), (1000, 197), (63, 1000), (2100, 33)):
        case = bins_case(n, width, BINS, dtype)
        assert torch.equal(run_bins("native", *case), run_bins("reference", *case))


def test_any_number_of_bins_and_metrics(isa):
    sizes = (1, 2, 0), (0, 0, 8), (3, 40, 24), (1, 1, 32)
    for n_bins, (metrics, counts, hats) in product((2, 3, 16, 100, 129, 256), sizes):
        case = bins_case(130, 37, n_bins, metrics=metrics, counts=counts, hats=hats)
        assert torch.equal(run_bins("native", *case), run_bins("reference", *case))


@pytest.mark.parametrize("layout", ["row stride", "column stride", "transposed", "one row repeated"])
def test_strides(layout):
    x, *rest = bins_case(100, 50, BINS)
    wide = torch.full((200, 107), torch.nan)
    if layout == "one row repeated":
        strided = x[:1].expand(100, 50)
        x = strided.contiguous()
    else:
        views = {
            "row stride": wide[::2, 3:53],
            "column stride": wide[:100, :100:2],
            "transposed": torch.full((50, 100), torch.nan).T,
        }
        strided = views[layout].copy_(x)
    assert torch.equal(run_bins("native", strided, *rest), run_bins("reference", x, *rest))


def test_only_the_neurons_given_are_written():
    x, edges, channels, weights, table = bins_case(100, 40, 64)
    poison = torch.full((3, *table.shape), 123_456_789, dtype=torch.int32)
    poison[1] = table
    ops.bins_update(x, edges, channels, weights, poison[1])
    assert (poison[0] == 123_456_789).all()
    assert (poison[2] == 123_456_789).all()
    assert torch.equal(poison[1], run_bins("reference", x, edges, channels, weights, table))


def test_threads_change_nothing():
    case = bins_case(700, 1000, BINS)
    threads = torch.get_num_threads()
    tables = []
    try:
        for n_threads in (1, 2, 3, 8):
            torch.set_num_threads(n_threads)
            tables.append(run_bins("native", *case))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(tables[0], table) for table in tables)


def test_the_op_keeps_its_contract():
    opcheck(torch.ops.skillfast.bins_update, bins_case(20, 5, 16))


def test_nothing_to_add():
    x, edges, channels, weights, table = bins_case(4, 5, 16)
    for backend in ("native", "reference"):
        assert torch.equal(run_bins(backend, x[:0], edges, channels[:0], weights[:0], table), table)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("x", lambda x: x[0], "x: expected"),
        ("edges", lambda e: e.double(), "edges' dtype"),
        ("edges", lambda e: e[:3].contiguous(), "edges: expected"),
        ("edges", lambda e: e.T.contiguous().T, "edges: expected a contiguous tensor"),
        ("channels", lambda c: c + 1, "channels: expected indices"),
        ("channels", lambda c: c - 1, "channels: expected indices"),
        ("channels", lambda c: c[1:], "channels: expected"),
        ("hats", lambda h: h[:, :7], "modulo 8"),
        ("table", lambda t: t[:, 1:], "table: expected"),
        ("table", lambda t: t[0, 0], "table: expected"),
        ("table", lambda t: t.T.contiguous().T, "contiguous"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name, change, said):
    arguments = dict(zip(("x", "edges", "channels", "hats", "table"), bins_case(40, 6, 16), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(ArgumentError, match=said):
        ops.bins_update(**arguments)
