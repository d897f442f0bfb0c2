"""Sums over the processes of a `torch.distributed` group."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from skillfast.errors import ArgumentError
from skillfast.statistics import bootstrap, comoments
from skillfast.statistics.bins.table import Overflow

if TYPE_CHECKING:
    from collections.abc import Mapping

    from skillfast.statistics.bins.state import BinState
    from skillfast.statistics.comoments import CoMoments

_SLICE = 1 << 22  # table entries summed at once in int64: 32 MB


def stream() -> int:
    """A number for this process's own bootstrap weights: 0 in the first process, and where there is no other."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return int(bootstrap.mix(rank) >> np.uint64(1)) if rank else 0


def gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every process's value, in the order of their ranks."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def all_true(value: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether it holds in every process."""
    return all(gather(value, group))


def check_same_edges(edges: torch.Tensor | None, keeping: bool, group: dist.ProcessGroup | None) -> None:
    """Raises ArgumentError in every process where they do not count into the same bins."""
    digest = None if edges is None else hashlib.sha256(edges.cpu().numpy().tobytes()).hexdigest()
    if len(set(gather((digest, keeping), group))) > 1:
        raise ArgumentError(
            "all_reduce: expected the same bin edges in every process, got different ones; calibrate() each with the "
            "same random rows before it counts"
        )


def reduce_moments(state: CoMoments, group: dist.ProcessGroup | None) -> CoMoments:
    """The sum of all processes' co-moments."""
    total = state.count.clone()
    dist.all_reduce(total, group=group)
    # The processes' mean shift, weighted by their rows: one that lies within everybody's data.
    weight = state.count.double() / total.clamp_min(1).double()
    shift_x, shift_y = state.shift_x.double() * weight, state.shift_y * weight
    dist.all_reduce(shift_x, group=group)
    dist.all_reduce(shift_y, group=group)
    moved = comoments.reshift(state, shift_x.float(), shift_y)
    names = ("count", "sum_x", "sum_xx", "sum_y", "sum_yy", "sum_xy")
    reduce_tensors({name: getattr(moved, name) for name in names}, group)
    return moved


def reduce_tensors(tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum each tensor over the processes, in place."""
    for tensor in tensors.values():
        dist.all_reduce(tensor, group=group)


def reduce_bins(state: BinState, group: dist.ProcessGroup | None) -> None:
    """Sum all processes' tables in place; their edges are the same."""
    state.spill()
    flat = state.table.view(-1)
    overflow = Overflow.empty(flat.device)
    for start in range(0, flat.numel(), _SLICE):
        part = flat[start : start + _SLICE]
        total = part.long()  # int32 may overflow with more than two processes
        dist.all_reduce(total, group=group)
        units = total >> 30
        part.copy_(total - (units << 30))
        at = units.nonzero()[:, 0]
        if at.numel():
            overflow = overflow.add(at + start, units[at])
    for theirs in gather((state.overflow.where.cpu(), state.overflow.units.cpu()), group):
        overflow = overflow.add(*(tensor.to(flat.device) for tensor in theirs))
    state.overflow = overflow
    everybodys = gather({name: values.cpu() for name, values in state.values().items()}, group)
    state.scalars = {name: [part[name].to(flat.device) for part in everybodys] for name in state.scalars}
    if len(set(gather(state.dtype, group))) > 1:
        state.dtype = torch.float32
