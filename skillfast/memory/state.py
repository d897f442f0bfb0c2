"""How much memory an accumulator will take, before it is made."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from skillfast.memory.usage import free_bytes
from skillfast.metrics import Categorical
from skillfast.statistics.bins.layout import BinLayout
from skillfast.statistics.state import needs_bins
from skillfast.vocabulary import BINS, STATISTICS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from skillfast.metrics import Metric


def state_bytes(
    n_neurons: int,
    metrics: Mapping[str, Metric],
    statistics: Sequence[str] = STATISTICS,
    bins: int = BINS,
    n_bootstrap: int | None = None,
) -> int:
    """Bytes of an accumulator's state, without its buffer of rows and what it keeps of the metrics alone.

    Args:
        n_neurons: Number of neurons.
        metrics: Name -> kind of metric.
        statistics: Which statistics it computes.
        bins: Bins per neuron.
        n_bootstrap: Replicates of the bootstrap; None for none.
    """
    sizes = [(metric, len(metric.columns(name))) for name, metric in metrics.items()]
    columns = sum(size for _, size in sizes)
    per_neuron = 8 * (2 + columns) + 4  # sums of x, x^2 and each x y; the shift
    if needs_bins(statistics):
        per_neuron += 4 * (BinLayout.of(metrics, bins).entries + bins - 1)  # the table and its edges
    if n_bootstrap is not None:
        per_neuron += 8 * n_bootstrap * (2 + columns)
    of_label = max((size for metric, size in sizes if isinstance(metric, Categorical)), default=0)
    between = 8 * (columns - of_label) * columns  # products of the columns with each other
    return n_neurons * per_neuron + between


def warn_of_state(device: torch.device, n_neurons: int, needed: int) -> None:
    """Warns where a state of so many bytes is more than what is free on the device, and says what to turn down."""
    free = free_bytes(device)
    if free is not None and needed > free:
        warnings.warn(
            f"the state of {n_neurons:,} neurons takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free "
            f"on {device}: trace Pearson's r alone, with fewer bins, or some of the sites at a time",
            RuntimeWarning,
            stacklevel=3,
        )
