"""Frozen cell edges per neuron, from calibration rows.

Equi-depth cells, so that no cell holds much of the mass; a value that repeats gets a cell of its own, which is
*atomic*: [v, next value of the dtype), so ties in it are exact; a few geometric cells lie beyond either end.
"""

from __future__ import annotations

import numpy as np
import torch

from skillfast.errors import ArgumentError
from skillfast.ops import MAX_CELLS

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_SLICE = 1 << 20  # values sorted at once: 4 MB of float32, and a few times that of temporaries
_HEAVY = 1.5  # a value that fills this many cells' share of the rows gets a cell of its own


def calibration_rows(cells: int) -> int:
    """How many random rows set the edges: 8 per cell."""
    return 8 * cells


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype whose neighbouring values tell an atomic cell: float64 activations are counted as float32."""
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


def atomic_cells(edges: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Which cells can hold one value of `dtype` only, so that all that falls into them is tied.

    Args:
        edges: float32 [D, C - 1], ascending.
        dtype: The activations' dtype.

    Returns:
        bool [D, C]; the first cell never is, the last only where its edge is infinity.
    """
    dtype = stored_dtype(dtype)
    low = edges.to(dtype).float()
    low = torch.where(low < edges, next_value(low, dtype), low)  # the smallest value of dtype in the cell
    above = next_value(low, dtype)
    first = torch.zeros_like(edges[:, :1], dtype=torch.bool)
    return torch.cat([first, above[:, :-1] >= edges[:, 1:], edges[:, -1:] == torch.inf], 1)


def build_edges(rows: torch.Tensor, cells: int = 128) -> torch.Tensor:
    """Edges of every neuron's cells.

    Values that are not finite are left out; a neuron with no finite value gets edges at infinity.

    Args:
        rows: Random activations [n0, D] of any dtype, n0 about `calibration_rows(cells)`.
        cells: C, from 2 to 256.

    Returns:
        float32 [D, C - 1], ascending, contiguous, on the device of `rows`. Infinity where fewer edges are needed.

    Raises:
        ArgumentError: No rows, or a number of cells out of range.
    """
    if rows.dim() != 2 or rows.shape[0] < 1:
        raise ArgumentError(f"build_edges rows: expected [n0, D] with n0 >= 1, got shape {list(rows.shape)}")
    if not 2 <= cells <= MAX_CELLS:
        raise ArgumentError(f"build_edges cells: expected 2 to {MAX_CELLS}, got {cells}")
    n, width = rows.shape
    edges = torch.empty(width, cells - 1, dtype=torch.float32, device=rows.device)
    step = max(1, _SLICE // n)
    for start in range(0, width, step):
        part = slice(start, start + step)
        edges[part] = _slice_edges(rows[:, part], cells, stored_dtype(rows.dtype))
    return edges


def _slice_edges(rows: torch.Tensor, cells: int, dtype: torch.dtype) -> torch.Tensor:
    values, finite = _sorted(rows)
    tails = 0 if cells < 8 else max(1, cells // 32)
    depth = cells - 1 - 2 * tails  # edges inside the range of the rows
    heavy = _repeats(values, finite, cells)
    edges = _with_tails(_cuts(values, finite, depth, None), values, finite, tails)
    if heavy.any():
        inside = _edges_with_repeats(values[heavy], finite[heavy], depth, cells, dtype)
        edges[heavy] = _with_tails(inside, values[heavy], finite[heavy], tails)
    return torch.where(finite[:, None] > 0, edges, torch.inf)


def _sorted(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of [n, d] as ascending rows [d, n], what is not finite as infinity at the end; how many are finite."""
    values = rows.float().T.contiguous()
    usable = values.isfinite()
    finite = usable.sum(1)
    if not bool((finite == values.shape[1]).all()):
        values = torch.where(usable, values, torch.inf)
    if values.device.type == "cpu":
        array = values.numpy()
        array.sort(axis=1)  # NumPy sorts float32 with vector instructions, several times faster than torch
        return torch.from_numpy(np.ascontiguousarray(array)), finite
    return values.sort(1).values, finite


def _threshold(finite: torch.Tensor, cells: int) -> torch.Tensor:
    return (_HEAVY * finite / cells).ceil().clamp_min(2).long()


def _repeats(values: torch.Tensor, finite: torch.Tensor, cells: int) -> torch.Tensor:
    """Whether [d] some value repeats often enough to get a cell of its own."""
    span = int(_threshold(finite, cells).min()) - 1
    if values.shape[1] <= span:
        return torch.zeros_like(finite, dtype=torch.bool)
    return ((values[:, span:] == values[:, :-span]) & values[:, span:].isfinite()).any(1)


def _cuts(values: torch.Tensor, count: torch.Tensor, slots: int, used: torch.Tensor | None) -> torch.Tensor:
    """Edges that divide the first `count` values of each row evenly: `slots - used` of them, then infinity."""
    free = torch.full_like(count, slots) if used is None else slots - used
    k = torch.arange(1, slots + 1, device=values.device)
    at = k * count[:, None] // (free[:, None] + 1)
    cut = values.gather(1, at.clamp_max(values.shape[1] - 1))
    return torch.where((k <= free[:, None]) & (at < count[:, None]), cut, torch.inf)


def _with_tails(inside: torch.Tensor, values: torch.Tensor, finite: torch.Tensor, tails: int) -> torch.Tensor:
    """Adds `tails` edges beyond either end, each four times as far out as the one before; no edge twice."""
    low, high = values[:, :1], values.gather(1, (finite[:, None] - 1).clamp_min(0))
    spread = high - low
    spread = torch.where(spread > 0, spread, torch.where(low != 0, low.abs(), 1.0))
    far = spread * 4.0 ** torch.arange(-2, tails - 2, device=values.device)
    edges = torch.cat([low - far, inside, high + far], 1).sort(1).values
    twice = edges[:, 1:] == edges[:, :-1]
    if not bool(twice.any()):
        return edges
    edges[:, 1:].masked_fill_(twice, torch.inf)
    return edges.sort(1).values


def _edges_with_repeats(
    values: torch.Tensor, finite: torch.Tensor, depth: int, cells: int, dtype: torch.dtype
) -> torch.Tensor:
    """Two edges around each of the most repeated values, the rest divides what remains evenly."""
    n = values.shape[1]
    new = torch.ones_like(values, dtype=torch.bool)
    new[:, 1:] = values[:, 1:] != values[:, :-1]
    run = new.cumsum(1) - 1  # [d, n]: which run of equal values each belongs to
    length = torch.zeros_like(run).scatter_add_(1, run, values.isfinite().long())
    start = torch.zeros_like(run).scatter_reduce_(
        1, run, torch.arange(n, device=values.device).expand_as(run), "amin", include_self=False
    )
    longest, which = length.topk(min(n, max(1, 3 * depth // 8)), dim=1)
    chosen = longest >= _threshold(finite, cells)[:, None]
    value = torch.where(chosen, values.gather(1, start.gather(1, which)), torch.inf)
    in_chosen = torch.zeros_like(new).scatter_(1, which, chosen).gather(1, run)
    rest = torch.where(in_chosen, torch.inf, values).sort(1).values
    cuts = _cuts(rest, rest.isfinite().sum(1), depth, 2 * chosen.sum(1))
    above = next_value(value, dtype)
    return torch.cat([value, above, cuts], 1).sort(1).values[:, :depth]
