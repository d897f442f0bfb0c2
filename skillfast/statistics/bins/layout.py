"""What a row adds to a neuron's table of bins, and where.

One integer table serves Spearman's rho, AUROC and mutual information. A neuron's part is [C, P] counts (a channel per
class of a categorical metric, one per binary metric) and then [C, 8 M] hat weights (8 per continuous metric).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from skillfast.metrics import Binary, Categorical, Continuous

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from skillfast.metrics import Metric

HATS = 8  # hat functions per continuous metric
UNIT = 256  # a row's hat weights sum to this


@dataclass(frozen=True)
class BinLayout:
    """Where each metric lives in a neuron's table.

    Attributes:
        bins: C.
        metrics: The metrics by name, in the order of their columns.
        first: The first count channel of each categorical or binary metric.
        hats: The place of each continuous metric among the hats.
        counts: P, count channels in all; the last is the rows themselves where no other metric tells them.
    """

    bins: int
    metrics: dict[str, Metric]
    first: dict[str, int]
    hats: dict[str, int]
    counts: int

    @staticmethod
    def of(metrics: Mapping[str, Metric], bins: int) -> BinLayout:
        """The layout for these metrics."""
        first: dict[str, int] = {}
        hats: dict[str, int] = {}
        counts = 0
        for name, metric in metrics.items():
            if isinstance(metric, Continuous):
                hats[name] = len(hats)
            else:
                first[name] = counts
                counts += len(metric.classes) if isinstance(metric, Categorical) else 1
        tells = hats or any(isinstance(metric, Categorical) for metric in metrics.values())
        return BinLayout(bins, dict(metrics), first, hats, counts if tells else counts + 1)

    @property
    def entries(self) -> int:
        """Integers per neuron."""
        return self.bins * (self.counts + HATS * len(self.hats))

    @property
    def counts_rows(self) -> bool:
        """Whether the last channel counts the rows themselves."""
        return not self.hats and not any(isinstance(metric, Categorical) for metric in self.metrics.values())

    def zeros(self, n_neurons: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """An empty table, int32 [D, entries]."""
        return torch.zeros(n_neurons, self.entries, dtype=torch.int32, device=device)

    def split(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A table [d, entries] as counts [d, C, P] and hat weights [d, C, M, 8]."""
        at = self.bins * self.counts
        counts = table[:, :at].view(table.shape[0], self.bins, self.counts)
        return counts, table[:, at:].view(table.shape[0], self.bins, len(self.hats), HATS)

    def payload(
        self, values: Mapping[str, torch.Tensor], references: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What each row adds to the bin it falls into.

        Args:
            values: Each metric's values [n], checked by the metric.
            references: The ascending calibration values of each continuous metric.

        Returns:
            channels int16 [n, metrics] and hats int16 [n, 8 M], for `ops.bins_update`.
        """
        channels, hats = [], []
        n = next(iter(values.values())).shape[0]
        device = next(iter(values.values())).device
        for name, metric in self.metrics.items():
            value = values[name]
            if isinstance(metric, Continuous):
                hats.append(hat_weights(hat_positions(value.double(), references[name].double())))
            elif isinstance(metric, Binary):
                channels.append(torch.where(value.bool(), self.first[name], -1))
            else:
                channels.append(value.long() + self.first[name])
        if self.counts_rows:
            channels.append(torch.full((n,), self.counts - 1, device=device))
        empty = torch.empty(n, 0, dtype=torch.int16, device=device)
        stacked = torch.stack(channels, 1).to(torch.int16) if channels else empty
        return stacked, torch.cat(hats, 1) if hats else empty

    def occupancy(self, counts: torch.Tensor, hats: torch.Tensor) -> torch.Tensor:
        """Rows per bin [d, C], of a table as `split` gives it."""
        if self.hats:
            return hats[:, :, 0].sum(2) / UNIT
        for name, metric in self.metrics.items():
            if isinstance(metric, Categorical):
                return counts[:, :, self.first[name] : self.first[name] + len(metric.classes)].sum(2)
        return counts[:, :, -1]

    def columns(self) -> Iterator[tuple[str, Metric, slice]]:
        """Each metric with its name and its columns of scores."""
        at = 0
        for name, metric in self.metrics.items():
            width = len(metric.columns(name))
            yield name, metric, slice(at, at + width)
            at += width


def hat_positions(values: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Where values fall among a metric's calibration values, as a fixed-point place on the 8 hats.

    Args:
        values: [n], finite.
        reference: [m], the calibration rows' values, ascending, of the same dtype.

    Returns:
        int64 [n], in [0, 7 * 256]: the provisional rank.
    """
    low = torch.searchsorted(reference, values)
    high = torch.searchsorted(reference, values, right=True)
    return ((low + high) * ((HATS - 1) * UNIT) + reference.shape[0]) // (2 * reference.shape[0])


def hat_weights(positions: torch.Tensor) -> torch.Tensor:
    """Integer hat functions int16 [n, 8] at these positions; a row sums to 256, two neighbours at most are not 0."""
    peaks = torch.arange(HATS, device=positions.device) * UNIT
    return (UNIT - (positions[:, None] - peaks).abs()).clamp_min(0).to(torch.int16)
