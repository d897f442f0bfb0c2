"""Sums over the processes of a `torch.distributed` group."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from skillfast.errors import ArgumentError
from skillfast.statistics.bins.overflow import UNIT_BITS, Overflow

if TYPE_CHECKING:
    from collections.abc import Mapping

    from skillfast.statistics.bins.table import BinTable
    from skillfast.statistics.moments import CoMoments
    from skillfast.statistics.state import State

_SLICE = 1 << 22  # table entries summed at once in int64: 32 MB


def gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every process's value, in the order of their ranks."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def check_same_edges(state: State, group: dist.ProcessGroup | None) -> None:
    """Raises ArgumentError in every process where they do not count into the same bins."""
    table = state.table
    digest = None if table is None else hashlib.sha256(table.edges.cpu().numpy().tobytes()).hexdigest()
    if len(set(gather((digest, state.keeping), group))) > 1:
        raise ArgumentError(
            "all_reduce: expected the same bin edges in every process, got different ones; calibrate() each with the "
            "same random rows before it counts"
        )


def share_faults(state: State, group: dist.ProcessGroup | None) -> None:
    """Note in every process which metrics had values that do not fit them in any: all refuse them then, or none."""
    for faults in gather(state.faults.tolist(), group):
        state.faults |= torch.tensor(faults, device=state.faults.device)


def reduce(state: State, group: dist.ProcessGroup | None) -> None:
    """Sum all processes' states in place; their buffers are empty and their edges the same."""
    before = state.moments
    state.moments = reduce_moments(before, group)
    state.shifted |= int(state.moments.count.sum()) > 0
    if state.replicates is not None:
        dx = before.shift_x.double() - state.moments.shift_x.double()
        state.replicates = state.replicates.reshift(dx, before.shift_y - state.moments.shift_y)
        reduce_tensors(state.replicates.tensors(), group)
    if state.table is not None:
        reduce_table(state.table, group)


def reduce_moments(state: CoMoments, group: dist.ProcessGroup | None) -> CoMoments:
    """The sum of all processes' co-moments."""
    total = state.count.clone()
    dist.all_reduce(total, group=group)
    # The processes' mean shift, weighted by their rows: one that lies within everybody's data.
    weight = state.count.double() / total.clamp_min(1)
    shift_x = state.shift_x.double() * weight[..., None]
    shift_y = state.shift_y * (state.count.sum().double() / total.sum().clamp_min(1))
    dist.all_reduce(shift_x, group=group)
    dist.all_reduce(shift_y, group=group)
    moved = state.reshift(shift_x.float(), shift_y)
    reduce_tensors(moved.sums(), group)
    return moved


def reduce_tensors(tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum each tensor over the processes, in place."""
    for tensor in tensors.values():
        if tensor.numel():  # what stacked experts do not hold is empty
            dist.all_reduce(tensor, group=group)


def reduce_table(table: BinTable, group: dist.ProcessGroup | None) -> None:
    """Sum all processes' tables in place, over the same edges."""
    table.spill()
    flat = table.table.view(-1)
    overflow = Overflow.empty(flat.device)
    for start in range(0, flat.numel(), _SLICE):
        part = flat[start : start + _SLICE]
        total = part.long()  # int32 may overflow with more than two processes
        dist.all_reduce(total, group=group)
        units = total >> UNIT_BITS
        part.copy_(total - (units << UNIT_BITS))
        at = units.nonzero()[:, 0]
        if at.numel():
            overflow = overflow.add(at + start, units[at])
    for theirs in gather((table.overflow.where.cpu(), table.overflow.units.cpu()), group):
        overflow = overflow.add(*(tensor.to(flat.device) for tensor in theirs))
    table.overflow = overflow
    everybodys = gather({name: values.cpu() for name, values in table.values().items()}, group)
    table.scalars = {name: [part[name].to(flat.device) for part in everybodys] for name in table.scalars}
    if len(set(gather(table.dtype, group))) > 1:
        table.dtype = torch.float32
