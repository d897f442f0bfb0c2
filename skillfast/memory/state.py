"""What an accumulator will take, before it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skillfast.statistics.bins.table import BinLayout
from skillfast.statistics.scoring import OF_BINS
from skillfast.vocabulary import STATISTICS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from skillfast.metrics import Metric


def state_bytes(
    n_neurons: int,
    metrics: Mapping[str, Metric],
    statistics: Sequence[str] = STATISTICS,
    bins: int = 128,
    n_bootstrap: int | None = None,
) -> int:
    """How many bytes the state of such an accumulator takes, without its buffer and a continuous metric's scalars."""
    columns = sum(len(metric.columns(name)) for name, metric in metrics.items())
    per_neuron = 8 * (2 + columns) + 4  # sums of x, x^2 and each x y; the shift
    if any(name in OF_BINS for name in statistics):
        per_neuron += 4 * (BinLayout.of(metrics, bins).entries + bins - 1)  # the table and its edges
    if n_bootstrap is not None:
        per_neuron += 8 * n_bootstrap * (2 + columns)
    return n_neurons * per_neuron
