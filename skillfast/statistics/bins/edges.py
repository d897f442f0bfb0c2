"""Frozen bin edges per neuron, from calibration rows.

Equi-depth bins, so that no bin holds much of the mass; a value that repeats gets a bin of its own, which is
*atomic*: [v, next value of the dtype), so ties in it are exact; a few geometric bins lie beyond either end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_SLICE = 1 << 20  # values sorted at once: 4 MB of float32, and a few times that of temporaries
_HEAVY = 1.5  # a value that fills this many bins' share of the rows gets a bin of its own


def calibration_rows(bins: int) -> int:
    """How many random rows set the edges: 8 per bin."""
    return 8 * bins


def exact_rows(bins: int) -> int:
    """Up to how many rows it is better to keep them all and be exact: 16 per bin."""
    return 16 * bins


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype whose neighbouring values tell an atomic bin: float64 activations are counted as float32."""
    return dtype if dtype in _BITS else torch.float32


def next_value(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The smallest value of `dtype` above each of `values`.

    Args:
        values: float32, each exactly a value of `dtype`.
        dtype: float32, bfloat16 or float16.

    Returns:
        float32, of the same shape; infinity stays infinity.
    """
    bits = (values + 0.0).to(dtype).view(_BITS[dtype])  # + 0.0: the zero without a sign
    up = torch.where(values >= 0, bits + 1, bits - 1).view(dtype).float()
    return torch.where(values == torch.inf, values, up)


def atomic_bins(edges: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Which bins can hold one value of `dtype` only, so that all that falls into them is tied.

    Args:
        edges: float32 [D, C - 1], ascending.
        dtype: The activations' dtype.

    Returns:
        bool [D, C]; the first bin never is, the last only where its edge is infinity.
    """
    dtype = stored_dtype(dtype)
    low = edges.to(dtype).float()
    low = torch.where(low < edges, next_value(low, dtype), low)  # the smallest value of dtype in the bin
    above = next_value(low, dtype)
    first = torch.zeros_like(edges[:, :1], dtype=torch.bool)
    return torch.cat([first, above[:, :-1] >= edges[:, 1:], edges[:, -1:] == torch.inf], 1)


def build_edges(rows: torch.Tensor, bins: int) -> torch.Tensor:
    """Edges of every neuron's bins.

    Values that are not finite are left out; a neuron with no finite value gets edges at infinity.

    Args:
        rows: Random activations [n0, D] of any dtype, at least one, about `calibration_rows(bins)`.
        bins: C, from 2 to 256.

    Returns:
        float32 [D, C - 1], ascending, contiguous, on the device of `rows`. Infinity where fewer edges are needed.
    """
    n, width = rows.shape
    edges = torch.empty(width, bins - 1, dtype=torch.float32, device=rows.device)
    step = max(1, _SLICE // n)
    for start in range(0, width, step):
        part = slice(start, start + step)
        edges[part] = _slice_edges(rows[:, part], bins, stored_dtype(rows.dtype))
    return edges


def _slice_edges(rows: torch.Tensor, bins: int, dtype: torch.dtype) -> torch.Tensor:
    values, finite = _sorted(rows)
    tails = 0 if bins < 8 else max(1, bins // 32)
    depth = bins - 1 - 2 * tails  # edges inside the range of the rows
    edges = _with_tails(_even_edges(values, finite, depth), values, finite, tails)
    repeats = _may_repeat(values, _threshold(finite, bins)).any(1)
    if bool(repeats.any()):
        some, count = values[repeats], finite[repeats]
        edges[repeats] = _with_tails(_edges_with_repeats(some, count, depth, bins, dtype), some, count, tails)
    return torch.where(finite[:, None] > 0, edges, torch.inf)


def _sorted(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of [n, d] as ascending rows [d, n], what is not finite as infinity at the end; how many are finite."""
    values = rows.contiguous().float().T.contiguous()  # contiguous first: torch then turns it block by block
    finite = torch.full_like(values[:, 0], values.shape[1], dtype=torch.int64)
    if not bool(values.sum(1).isfinite().all()):  # far cheaper than to look at each value
        usable = values.isfinite()
        finite, values = usable.sum(1), torch.where(usable, values, torch.inf)
    if values.device.type != "cpu":
        return values.sort(1).values, finite
    # NumPy sorts float32 with vector instructions, several times faster than torch.
    return torch.from_numpy(np.sort(values.numpy(), axis=1)), finite


def _threshold(finite: torch.Tensor, bins: int) -> torch.Tensor:
    """How often a value must repeat among the finite rows to get a bin of its own."""
    return (_HEAVY * finite / bins).ceil().clamp_min(2).long()


def _even_edges(values: torch.Tensor, finite: torch.Tensor, depth: int) -> torch.Tensor:
    n = values.shape[1]
    if not bool((finite == n).all()):
        none = torch.zeros_like(finite)[:, None]
        return _cuts(values, finite, depth, _Runs(torch.full_like(values[:, :1], torch.inf), none, none))
    at = torch.arange(1, depth + 1, device=values.device) * n // (depth + 1)
    return values[:, at]


@dataclass(frozen=True)
class _Runs:
    """The most repeated values of each neuron, ascending; infinity where there are fewer.

    Attributes:
        value: [d, R].
        start: [d, R], where the run begins among the sorted rows.
        length: [d, R]; 0 where there is none.
    """

    value: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor


def _may_repeat(values: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Marks [d, S - 1] the first two equal neighbours of each run among every few sorted values.

    Every run as long as the threshold spans two of them.
    """
    sample = values[:, :: max(1, int(threshold.min()) // 2)]
    same = sample[:, 1:] == sample[:, :-1]
    first = same.clone()
    first[:, 1:] &= ~same[:, :-1]
    return first


def _runs(values: torch.Tensor, finite: torch.Tensor, bins: int, most: int) -> _Runs:
    threshold = _threshold(finite, bins)
    first = _may_repeat(values, threshold)
    step = max(1, int(threshold.min()) // 2)
    place = torch.arange(first.shape[1], 0, -1, device=values.device, dtype=torch.int32)
    found = torch.where(first, place, 0).topk(max(1, int(first.sum(1).max())), dim=1)  # in order of place
    value = torch.where(found.values > 0, values[:, ::step].gather(1, found.indices), torch.inf)
    start = torch.searchsorted(values, value)
    length = torch.searchsorted(values, value, right=True) - start
    length = torch.where((length >= threshold[:, None]) & (value < torch.inf), length, 0)
    kept = length.topk(min(most, length.shape[1]), dim=1).indices.sort(1).values
    length = length.gather(1, kept)
    return _Runs(torch.where(length > 0, value.gather(1, kept), torch.inf), start.gather(1, kept), length)


def _cuts(values: torch.Tensor, finite: torch.Tensor, depth: int, runs: _Runs) -> torch.Tensor:
    """Edges that divide what lies outside the runs evenly: `depth` less two per run, then infinity."""
    free = (depth - 2 * runs.length.gt(0).sum(1)).clamp_min(0)[:, None]
    count = (finite - runs.length.sum(1))[:, None]
    k = torch.arange(1, depth + 1, device=values.device)
    outside = k * count // (free + 1)  # place among the values outside the runs
    skipped = torch.cat([torch.zeros_like(free), runs.length.cumsum(1)], 1)
    before = runs.start - skipped[:, :-1]  # values outside that lie below each run
    at = outside + skipped.gather(1, torch.searchsorted(before, outside, right=True))
    cut = values.gather(1, at.clamp_max(values.shape[1] - 1))
    return torch.where((k <= free) & (outside < count), cut, torch.inf)


def _with_tails(inside: torch.Tensor, values: torch.Tensor, finite: torch.Tensor, tails: int) -> torch.Tensor:
    """Adds `tails` edges beyond either end, each four times as far out as the one before."""
    low, high = values[:, :1], values.gather(1, (finite[:, None] - 1).clamp_min(0))
    spread = high - low
    spread = torch.where(spread > 0, spread, torch.where(low != 0, low.abs(), 1.0))
    far = spread * 4.0 ** torch.arange(-2, tails - 2, device=values.device)
    above = high + far
    if not bool((inside[:, -1:] <= above[:, :1]).all()):  # infinities inside go to the end
        return torch.cat([low - far, inside, above], 1).sort(1).values
    return torch.cat([(low - far).flip(1), inside, above], 1)


def _edges_with_repeats(
    values: torch.Tensor, finite: torch.Tensor, depth: int, bins: int, dtype: torch.dtype
) -> torch.Tensor:
    """Two edges around each of the most repeated values, the rest divides what remains evenly."""
    runs = _runs(values, finite, bins, max(1, 3 * depth // 8))
    cuts = _cuts(values, finite, depth, runs)
    return torch.cat([runs.value, next_value(runs.value, dtype), cuts], 1).sort(1).values[:, :depth]
