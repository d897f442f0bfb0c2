"""Keeps an int32 table from overflowing: whole units of 2^30 are moved out of its few large entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SPILL_ROWS = 1 << 22  # rows between spills: they add at most 2^22 * 256 = 2^30 to an entry
UNIT_BITS = 30
_SLICE = 1 << 24  # entries compared at once


@dataclass
class Overflow:
    """What was moved out of an int32 table before it could overflow, in units of 2^30: a few entries.

    Attributes:
        where: int64 [m], ascending places in the flattened table.
        units: int64 [m].
    """

    where: torch.Tensor
    units: torch.Tensor

    @staticmethod
    def empty(device: torch.device) -> Overflow:
        """Nothing moved yet."""
        return Overflow(*(torch.empty(0, dtype=torch.int64, device=device) for _ in range(2)))

    def add(self, where: torch.Tensor, units: torch.Tensor) -> Overflow:
        """The sum of these units and those of `where` int64 [n] and `units` int64 [n]."""
        places, index = torch.unique(torch.cat([self.where, where]), return_inverse=True)
        total = torch.zeros_like(places).index_add_(0, index, torch.cat([self.units, units]))
        return Overflow(places, total)


def spill(table: torch.Tensor, overflow: Overflow) -> Overflow:
    """Move whole units of 2^30 out of a table, in place: its entries are then below 2^30.

    Call it before `SPILL_ROWS` more rows would have been added since the last time; call it once more before two
    tables are compared or merged, so that equal contents have one form.
    """
    flat = table.view(-1)
    for start in range(0, flat.numel(), _SLICE):  # slices bound the comparison's memory
        part = flat[start : start + _SLICE]
        if part.numel() and int(part.max()) >= (1 << UNIT_BITS):
            at = (part >= (1 << UNIT_BITS)).nonzero()[:, 0]
            units = part[at] >> UNIT_BITS
            part[at] -= units << UNIT_BITS
            overflow = overflow.add(at + start, units.long())
    return overflow


def merge(table: torch.Tensor, overflow: Overflow, other: torch.Tensor, other_overflow: Overflow) -> Overflow:
    """Add another table over the same edges, in place; both must have been spilled just before."""
    table += other
    return spill(table, overflow.add(other_overflow.where, other_overflow.units))


def widened(table: torch.Tensor, overflow: Overflow | None, part: slice) -> torch.Tensor:
    """The true entries of a slice of neurons, float64 (exact up to 2^53): the table and what was moved out of it."""
    entries = table[part].double()
    if overflow is not None and overflow.where.numel():
        low, high = part.start * table.shape[1], part.stop * table.shape[1]
        here = (overflow.where >= low) & (overflow.where < high)
        entries.view(-1).index_add_(0, overflow.where[here] - low, overflow.units[here].double() * (1 << UNIT_BITS))
    return entries
