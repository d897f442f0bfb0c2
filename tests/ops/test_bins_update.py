"""`bins_update`: bitwise against NumPy and among the backends."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from itertools import product

import pytest
import torch
from conftest import ROOT
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


# Runs the threads of each phase of a block of the CUDA kernel one after the other, forwards or backwards, in memory
# that holds something before and is followed by words that nobody may write.
ON_HOST = """
#include "cuda/bins_block.h"
#include <vector>
using namespace skillfast;
using namespace skillfast::bins_block;
struct Plain { static void add(int32_t* at, int32_t value) { *at += value; } };

template <bool kShared>
bool run(const BinsArgs& args, const Shape& shape, bool backwards) {
  const auto read = [&](int64_t at) { return static_cast<const float*>(args.x)[at]; };
  for (int64_t first = 0; first < args.width; first += shape.neurons) {
    std::vector<int32_t> memory(shape.bytes / 4 + 64, -77);
    Block<Plain, kShared> block{args, shape, first, memory.data()};
    std::vector<float> value(shape.threads);
    const auto all = [&](auto phase) {
      for (int i = 0; i < shape.threads; ++i) phase(backwards ? shape.threads - 1 - i : i);
    };
    all([&](int t) { block.begin(t), block.read_payload(t, 0), value[t] = block.value_of(t, 0, read); });
    for (int64_t tile = 0; tile * shape.rows < args.n; ++tile) {
      all([&](int t) {
        const float next = block.value_of(t, tile + 1, read);
        block.read_payload(t, tile + 1);
        block.count(t, tile, value[t]);
        value[t] = next;
      });
    }
    all([&](int t) { block.end(t); });
    for (std::size_t i = shape.bytes / 4; i < memory.size(); ++i) {
      if (memory[i] != -77) return false;
    }
  }
  return true;
}

extern "C" int bins_on_host(const void* x, int64_t stride, int64_t n, int64_t width, int64_t bins, int64_t metrics,
                            int64_t counts, int64_t weights, const float* edges, const int16_t* channels,
                            const int16_t* hats, int32_t* table, int64_t shared_bytes, int backwards) {
  const BinsArgs args{x,       stride, n,        width, bins,  metrics,       counts,
                      weights, edges,  channels, hats,  table, DType::float32};
  const Shape shape = shape_of(args, shared_bytes);
  if (shape.threads > 1024 || (shape.shared && shape.bytes > shared_bytes)) return -1;
  const bool kept = shape.shared ? run<true>(args, shape, backwards) : run<false>(args, shape, backwards);
  return kept ? (shape.shared ? shape.neurons : 0) : -2;
}
"""


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("bins")
    (folder / "bins.cpp").write_text(ON_HOST)
    library = folder / "bins.so"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, "-o", str(library), str(folder / "bins.cpp")], check=True)
    run = ctypes.CDLL(str(library)).bins_on_host
    run.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 7, *[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int]
    return run


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("shared", "neurons", "sizes"),
    [
        (232_448, 8, (600, 37, 128, 2, 12, 16)),  # an H100's, and what a run traces
        (232_448, 16, (300, 33, 100, 3, 7, 0)),
        (232_448, 4, (40, 9, 256, 1, 20, 24)),
        (232_448, 1, (20, 3, 256, 1, 150, 8)),
        (232_448, 0, (20, 11, 256, 1, 1000, 8)),  # no table fits
        (49_152, 2, (300, 5, 128, 1, 10, 16)),
        (232_448, 16, (1, 1, 2, 1, 1, 0)),
    ],
)
def test_the_cuda_block_counts_as_the_reference_on_the_host(on_host, shared, neurons, sizes, backwards):
    """The kernel's own source, but for its barriers and atomics."""
    n, width, n_bins, metrics, counts, hats = sizes
    x, edges, channels, weights, table = bins_case(n, width, n_bins, metrics=metrics, counts=counts, hats=hats)
    weights[:, ::3] = 0
    got = table.clone()
    at = [tensor.data_ptr() for tensor in (edges, channels, weights, got)]
    found = on_host(x.data_ptr(), x.stride(0), n, width, n_bins, metrics, counts, hats, *at, shared, backwards)
    assert found == neurons
    assert torch.equal(got, run_bins("reference", x, edges, channels, weights, table))
