"""`BinTable`: the table of bins as it fills, with frozen edges and what the end needs of the metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from skillfast import ops
from skillfast.errors import ArgumentError
from skillfast.statistics.bins import overflow, scores
from skillfast.statistics.bins.edges import build_edges, stored_dtype
from skillfast.statistics.bins.layout import BinLayout
from skillfast.statistics.bins.overflow import Overflow

if TYPE_CHECKING:
    from collections.abc import Mapping

    from skillfast.metrics import Metric
    from skillfast.statistics.bins.scores import BinScores


class BinTable:
    """Counts of D neurons over frozen edges.

    Args:
        layout: What a neuron's table holds.
        edges: float32 [D, C - 1], ascending.
        references: Ascending calibration values of each continuous metric.
        dtype: The activations' dtype, which tells which bins are atomic.
    """

    def __init__(
        self, layout: BinLayout, edges: torch.Tensor, references: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> None:
        self.layout = layout
        self.edges = edges
        self.references = dict(references)
        self.dtype = dtype
        self.table = layout.zeros(edges.shape[0], edges.device)
        self.overflow = Overflow.empty(edges.device)
        # A continuous metric's global rank is known at the end only, so its scalars are kept.
        self.scalars: dict[str, list[torch.Tensor]] = {name: [] for name in layout.hats}
        self._since_spill = 0

    @staticmethod
    def calibrated(
        metrics: Mapping[str, Metric], bins: int, rows: torch.Tensor, values: Mapping[str, torch.Tensor]
    ) -> BinTable:
        """An empty table whose edges come from random rows [n0, D] and their metrics' checked values, each [n0]."""
        layout = BinLayout.of(metrics, bins)
        references = {name: values[name].sort().values for name in layout.hats}
        return BinTable(layout, build_edges(rows, bins), references, stored_dtype(rows.dtype))

    def like(self, device: torch.device) -> BinTable:
        """An empty table over the same edges, on a device."""
        references = {name: reference.to(device) for name, reference in self.references.items()}
        return BinTable(self.layout, self.edges.to(device), references, self.dtype)

    def add(self, rows: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """Count rows [n, D] with each metric's checked values [n]."""
        if stored_dtype(rows.dtype) != self.dtype:
            self.dtype = torch.float32  # with mixed dtypes only float32's neighbours tell ties
        channels, hats = self.layout.payload(values, self.references)
        self._since_spill += rows.shape[0]
        if self._since_spill > overflow.SPILL_ROWS:
            self.spill()
            self._since_spill = rows.shape[0]
        ops.bins_update(rows, self.edges, channels, hats, self.table)
        for name, kept in self.scalars.items():
            kept.append(values[name].clone())

    def spill(self) -> None:
        """Bring the table into the one form that its contents have."""
        self.overflow = overflow.spill(self.table, self.overflow)
        self._since_spill = 0

    def has_edges_of(self, other: BinTable) -> bool:
        """Whether both count into the same bins."""
        return torch.equal(self.edges, other.edges.to(self.edges.device)) and all(
            torch.equal(reference, other.references[name].to(reference.device))
            for name, reference in self.references.items()
        )

    def check_merge(self, other: BinTable) -> None:
        """Raise ArgumentError for a table with other edges."""
        if not self.has_edges_of(other):
            raise ArgumentError(
                "merge: expected the same bin edges, got others; make shards with like(), or calibrate() each with "
                "the same rows before it counts"
            )

    def merge(self, other: BinTable) -> None:
        """Add another table's counts.

        Raises:
            ArgumentError: A table with other edges.
        """
        self.check_merge(other)
        device = self.table.device
        self.spill()
        other.spill()
        theirs = Overflow(other.overflow.where.to(device), other.overflow.units.to(device))
        self.overflow = overflow.merge(self.table, self.overflow, other.table.to(device), theirs)
        if self.dtype != other.dtype:
            self.dtype = torch.float32
        for name, kept in self.scalars.items():
            kept.extend(part.to(device) for part in list(other.scalars[name]))

    def values(self) -> dict[str, torch.Tensor]:
        """All rows' values of each continuous metric, float64 [N]."""
        for kept in self.scalars.values():
            if len(kept) > 1:
                kept[:] = [torch.cat(kept)]
        return {name: kept[0] if kept else self.references[name][:0] for name, kept in self.scalars.items()}

    def scores(self, rate: float = 1.0) -> BinScores:
        """The scores of everything counted; `rate` as for `finalise`."""
        fits = scores.fit_continuous(self.layout, self.values(), self.references)
        return scores.finalise(self.layout, self.table, self.edges, self.dtype, fits, self.overflow, rate)

    def tensors(self) -> list[torch.Tensor]:
        """Edges, table and the kept scalars."""
        return [self.edges, self.table, *(part for parts in self.scalars.values() for part in parts)]

    def state_dict(self) -> dict[str, Any]:
        """Copies of all tensors by name, and the dtype; `from_state_dict` takes it."""
        self.spill()
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "edges": self.edges.clone(),
            "table": self.table.clone(),
            "overflow_where": self.overflow.where.clone(),
            "overflow_units": self.overflow.units.clone(),
            **{f"reference.{name}": tensor.clone() for name, tensor in self.references.items()},
            **{f"values.{name}": tensor.clone() for name, tensor in self.values().items()},
        }

    @staticmethod
    def from_state_dict(layout: BinLayout, state: Mapping[str, Any], device: torch.device) -> BinTable:
        """A table from what `state_dict` gave, on a device."""
        tensors = {name: value.to(device) for name, value in state.items() if name != "dtype"}
        references = {name: tensors[f"reference.{name}"] for name in layout.hats}
        result = BinTable(layout, tensors["edges"], references, getattr(torch, state["dtype"]))
        result.table.copy_(tensors["table"])
        result.overflow = Overflow(tensors["overflow_where"], tensors["overflow_units"])
        result.scalars = {name: [tensors[f"values.{name}"]] for name in layout.hats}
        return result
