"""What an accumulator holds: its settings and everything that counting changes, as dataclasses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ArgumentError
from skillfast.files import short
from skillfast.metrics import Categorical
from skillfast.ops import MAX_BINS
from skillfast.statistics.bootstrap import Numbering, Replicates
from skillfast.statistics.moments import CoMoments
from skillfast.vocabulary import STATISTICS

if TYPE_CHECKING:
    from skillfast.metrics import Metric
    from skillfast.statistics.bins.table import BinTable

MOST_COLUMNS = 32_000  # a row's channel is an int16
OF_BINS = tuple(name for name in STATISTICS if name != "pearson")
LEAST_REPLICATES = 8
# beyond what a state of any use has, and still sizes that can be multiplied; files of states bring them, too
MOST = {"n_neurons": 1 << 40, "n_bootstrap": 1 << 16, "buffer_rows": 1 << 16}


def needs_bins(statistics: Sequence[str]) -> bool:
    """Whether any of these statistics comes from a table of bins."""
    return any(name in OF_BINS for name in statistics)


def refuse_other(ours: Mapping[str, Any], theirs: Mapping[str, Any], remedy: str, what: str = "merge") -> None:
    """Raise ArgumentError where what two have to have in common differs; names the first thing that does."""
    for name, expected in ours.items():
        if (found := theirs[name]) != expected:
            expected, found = _first_difference(expected, found)
            raise ArgumentError(f"{what}: expected {name} {_said(expected)}, got {_said(found)}; {remedy}")


def _first_difference(expected: Any, found: Any) -> tuple[Any, Any]:
    """The first items in which two sequences or mappings of one length differ; others as they are."""
    if isinstance(expected, Mapping):
        return _first_difference(list(expected.items()), list(found.items()))
    if isinstance(expected, Sequence) and not isinstance(expected, str) and len(expected) == len(found):
        return next((pair for pair in zip(expected, found, strict=True) if pair[0] != pair[1]), (expected, found))
    return expected, found


def _said(value: Any) -> str:
    return value if isinstance(value, str) else short(repr(value), 120)


@dataclass(frozen=True)
class AccumulatorSettings:
    """What an accumulator correlates, and how.

    Attributes:
        n_neurons: Number of neurons, D.
        metrics: Name -> kind of metric.
        statistics: Which statistics to compute.
        bins: Bins per neuron, C.
        n_bootstrap: Replicates of the bootstrap; None for none.
        seed: Seed of the replicates.
        buffer_rows: Observations collected before one update of the state.

    Raises:
        ArgumentError: No neurons, no metrics, an unknown statistic, or a number out of range.
    """

    n_neurons: int
    metrics: dict[str, Metric]
    statistics: tuple[str, ...]
    bins: int
    n_bootstrap: int | None
    seed: int
    buffer_rows: int

    def __post_init__(self) -> None:
        if self.n_neurons < 1 or not self.metrics or self.buffer_rows < 1 or not 2 <= self.bins <= MAX_BINS:
            raise ArgumentError(
                f"NeuronStatistics: expected at least one neuron, metric and buffer row and 2 to {MAX_BINS} bins, got "
                f"{self.n_neurons} neurons, {len(self.metrics)} metrics, {self.buffer_rows} rows and {self.bins} bins"
            )
        for name, most in MOST.items():
            if (found := getattr(self, name) or 0) > most:
                raise ArgumentError(f"{name}: expected at most {most:,}, got {found}; take fewer")
        if not self.statistics or not set(self.statistics) <= set(STATISTICS):
            raise ArgumentError(f"statistics: expected some of {', '.join(STATISTICS)}, got {list(self.statistics)}")
        if self.n_bootstrap is not None and self.n_bootstrap < LEAST_REPLICATES:
            raise ArgumentError(
                f"n_bootstrap: expected at least {LEAST_REPLICATES} replicates, got {self.n_bootstrap}; 64 are usual"
            )
        if len(set(self.columns)) < len(self.columns) or any(":" in name for name in self.metrics):
            raise ArgumentError(
                f"metrics: expected names without ':' that give each column its own, got {list(self.columns[:5])}"
            )
        if len(self.columns) > MOST_COLUMNS and needs_bins(self.statistics):
            raise ArgumentError(
                f"metrics: expected at most {MOST_COLUMNS} columns for {', '.join(OF_BINS)}, got "
                f"{len(self.columns)}; ask for Pearson's r alone"
            )

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the metric columns, M of them."""
        return tuple(column for name, metric in self.metrics.items() for column in metric.columns(name))

    def told(self) -> dict[str, Any]:
        """What two accumulators must have in common to be added up, by name; how rows are buffered is not of it."""
        return {
            "neurons": self.n_neurons,
            "metrics": self.metrics,
            "statistics": self.statistics,
            "bins": self.bins,
            "replicates": self.n_bootstrap,
            "seed": self.seed,
        }

    @cached_property
    def label(self) -> range:
        """Where the columns of the categorical metric with the most classes stand; none without one."""
        found, start = range(0), 0
        for name, metric in self.metrics.items():
            n = len(metric.columns(name))
            if isinstance(metric, Categorical) and n > len(found):
                found = range(start, start + n)
            start += n
        return found

    def named(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Checked values [n, metrics or more] by the metrics' names, each [n]."""
        return dict(zip(self.metrics, values.T.contiguous(), strict=False))  # the groups come last

    def expand(self, values: torch.Tensor) -> torch.Tensor:
        """Checked values [n, metrics or more] as metric columns float64 [n, M]."""
        named = self.named(values)
        return torch.cat([metric.expand(named[name]) for name, metric in self.metrics.items()], 1)


@dataclass
class RowBuffer:
    """Rows that wait to be counted, or are kept to be exact.

    Attributes:
        rows: [capacity, D], in the activations' dtype.
        values: float64 [capacity, metrics + 1], checked values and the group of each row.
        filled: How many rows there are.
        summed: How many of these the co-moments have already.
    """

    rows: torch.Tensor
    values: torch.Tensor
    filled: int = 0
    summed: int = 0

    @staticmethod
    def empty(settings: AccumulatorSettings, capacity: int, dtype: torch.dtype, device: torch.device) -> RowBuffer:
        """A buffer for `capacity` rows, with none in it."""
        return RowBuffer(
            torch.empty(capacity, settings.n_neurons, dtype=dtype, device=device),
            torch.empty(capacity, len(settings.metrics) + 1, dtype=torch.float64, device=device),
        )

    @property
    def contents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows [filled, D] and their values [filled, metrics + 1], as views."""
        return self.rows[: self.filled], self.values[: self.filled]


@dataclass
class State:
    """Everything that an accumulator has counted, on one device.

    Attributes:
        settings: What is counted, and how.
        device: Where the tensors lie.
        moments: Sums for Pearson's r.
        replicates: Weighted sums of the bootstrap; None without it.
        buffer: Rows that wait or are kept.
        numbering: Numbers of the observations that have no group.
        faults: bool [metrics], which had values that do not fit them; of those that were not waited for.
        table: Counts over frozen bin edges; None before the edges are set, and without statistics that need them.
        shifted: Whether the co-moments have their shift.
        wide: Whether float64 rows came, which the float32 shift does not meet exactly.
    """

    settings: AccumulatorSettings
    device: torch.device
    moments: CoMoments
    replicates: Replicates | None
    buffer: RowBuffer
    numbering: Numbering
    faults: torch.Tensor
    table: BinTable | None = None
    shifted: bool = False
    wide: bool = False

    @staticmethod
    def empty(settings: AccumulatorSettings, device: torch.device) -> State:
        """A state that has counted nothing."""
        n, m = settings.n_neurons, len(settings.columns)
        # Made outside inference mode, so that updates inside and outside of it may mutate it.
        with torch.inference_mode(False):
            replicates = None
            if settings.n_bootstrap is not None:
                replicates = Replicates.zeros(settings.seed, settings.n_bootstrap, n, m, device)
            return State(
                settings=settings,
                device=device,
                moments=CoMoments.zeros(n, m, device, settings.label),
                replicates=replicates,
                buffer=RowBuffer.empty(settings, 0, torch.float32, device),
                numbering=Numbering.of_process(),
                faults=torch.zeros(len(settings.metrics), dtype=torch.bool, device=device),
            )

    def stack(self, experts: int) -> None:
        """Hold the co-moments of many experts in place of one accumulator's, before anything is counted."""
        with torch.inference_mode(False):
            of_each = self.settings.n_neurons, len(self.settings.columns)
            self.moments = CoMoments.zeros(*of_each, self.device, experts=experts)

    def like(self, device: torch.device) -> State:
        """An empty state of the same settings, shift and bin edges on a device, with numbers of its own."""
        other = State.empty(self.settings, device)
        if self.moments.count.dim():
            other.stack(len(self.moments.count))
        other.numbering = self.numbering.shard()
        if self.replicates is not None and other.replicates is not None:
            other.replicates.leaves_out = self.replicates.leaves_out
        other.moments.shift_x.copy_(self.moments.shift_x)
        other.moments.shift_y.copy_(self.moments.shift_y)
        other.shifted = self.shifted
        other.table = None if self.table is None else self.table.like(device)
        return other

    @property
    def keeping(self) -> bool:
        """Whether rows are still kept, to be exact or to set the edges."""
        return self.table is None and needs_bins(self.settings.statistics)

    @property
    def n_observations(self) -> int:
        """Rows counted so far, those in the buffer included."""
        return int(self.moments.count.sum()) + self.buffer.filled - self.buffer.summed

    @property
    def nbytes(self) -> int:
        """Size of all tensors, in bytes."""
        tensors = [*self.moments.tensors().values(), self.buffer.rows, self.buffer.values]
        tensors += [] if self.replicates is None else self.replicates.tensors().values()
        tensors += [] if self.table is None else self.table.tensors()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def refuse_faults(self) -> None:
        """Raises ArgumentError where a value did not fit its metric; waits for the device."""
        if self.device.type == "cpu":
            return  # every value was checked as it came
        for (name, metric), wrong in zip(self.settings.metrics.items(), self.faults.tolist(), strict=True):
            if wrong:
                raise ArgumentError(
                    f"metric {name!r}: expected {metric.expected}, got others in a batch that came on {self.device}; "
                    "mend them and start again"
                )

    def with_groups(self, checked: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
        """Checked values with a last column of groups float64 [n]; without groups every row is one by itself."""
        if groups is None:
            groups = self.numbering.take(len(checked), self.settings.seed, self.device)
        return torch.cat([checked, groups[:, None]], 1)

    def sum_rows(self, x: torch.Tensor, values: torch.Tensor) -> None:
        """Add rows x [n, D] to the co-moments and replicates, with values as `with_groups` gives them."""
        columns = self.settings.expand(values)
        if not self.shifted:
            self.moments.choose_shift(x, columns)
            self.shifted = True
        self.moments.update(x, columns)
        if self.replicates is not None:
            shifted = columns - self.moments.shift_y
            self.replicates.add(x, shifted, self.moments.shift_x, values[:, -1].long())

    def merge_sums(self, other: State) -> None:
        """Add another state's co-moments and replicates, re-shifted onto this one's shift."""
        theirs = other.moments.to(self.device)
        self.moments.merge(theirs)
        self.shifted |= int(theirs.count.sum()) > 0  # the shift of a state without rows is not taken over
        if self.replicates is not None and other.replicates is not None:
            dx = theirs.shift_x.double() - self.moments.shift_x.double()
            self.replicates.merge(other.replicates.to(self.device), dx, theirs.shift_y - self.moments.shift_y)
