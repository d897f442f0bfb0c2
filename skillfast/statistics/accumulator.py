"""`NeuronStatistics`: the accumulator, in the manner of torchmetrics (update, merge, all_reduce, compute)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ArgumentError
from skillfast.statistics import distributed, inputs, persistence, scoring
from skillfast.statistics.bins.edges import exact_rows
from skillfast.statistics.bins.table import BinTable
from skillfast.statistics.state import AccumulatorSettings, RowBuffer, State, refuse_other
from skillfast.vocabulary import BINS, BUFFER_ROWS, STATISTICS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike

    from skillfast.metrics import Metric
    from skillfast.statistics.bootstrap import Replicates
    from skillfast.statistics.scores import NeuronScores


class NeuronStatistics(persistence.Kept):
    """Correlates every neuron with every metric in one pass; what it keeps does not grow with the observations.

    The first 16 rows per bin are kept, and up to there all scores are exact; then they set the edges of the bins,
    unless `calibrate` has, and every later row is counted, as float32, and forgotten. Rows that come in an order
    (sorted by class, drifting) make poor edges: calibrate on random rows first.

    Args:
        n_neurons: Number of neurons, D.
        metrics: Name -> `Categorical`, `Binary` or `Continuous`.
        statistics: Which statistics to compute: `"pearson"`, `"spearman"`, `"auroc"`, `"mutual_info"`.
        bins: Bins per neuron, C, from 2 to 256: more are more exact and take more memory.
        n_bootstrap: Replicates of a Poisson bootstrap for intervals of Pearson's r, 64 say; None for none. Each takes
            8 bytes per neuron and column.
        seed: Seed of the bootstrap's replicates.
        buffer_rows: Observations collected before one update of the state.
        device: Where the state lives.

    Raises:
        ArgumentError: No neurons, no metrics, or an unknown statistic.
    """

    FILE = "statistics.safetensors"
    SCHEMA = persistence.SCHEMA

    def __init__(
        self,
        n_neurons: int,
        metrics: Mapping[str, Metric],
        statistics: Sequence[str] = STATISTICS,
        *,
        bins: int = BINS,
        n_bootstrap: int | None = None,
        seed: int = 0,
        buffer_rows: int = BUFFER_ROWS,
        device: torch.device | str = "cpu",
    ) -> None:
        settings = AccumulatorSettings(
            n_neurons, dict(metrics), tuple(statistics), bins, n_bootstrap, seed, buffer_rows
        )
        self.state = State.empty(settings, torch.device(device))

    @property
    def settings(self) -> AccumulatorSettings:
        """What is correlated, and how."""
        return self.state.settings

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the metric columns."""
        return self.settings.columns

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self.state.device

    @property
    def n_observations(self) -> int:
        """Rows counted so far."""
        return self.state.n_observations

    @property
    def state_bytes(self) -> int:
        """Size of the state and the buffer, in bytes."""
        return self.state.nbytes

    @property
    def replicates(self) -> Replicates | None:
        """Replicates of all rows so far; None without `n_bootstrap`."""
        self._settle()
        return self.state.replicates

    def check(self, metrics: Mapping[str, ArrayLike | torch.Tensor], n: int) -> torch.Tensor:
        """The metrics' values for n observations, checked: float64 [n, metrics] on the state's device."""
        return inputs.check_values(self.settings.metrics, metrics, n, self.device, self.state.faults)

    def _activations(self, activations: ArrayLike | torch.Tensor) -> torch.Tensor:
        x = inputs.check_activations(activations, self.settings.n_neurons, self.device)
        self.state.wide |= x.dtype == torch.float64
        return x

    def _with_groups(self, checked: torch.Tensor, groups: ArrayLike | torch.Tensor | None) -> torch.Tensor:
        given = None if groups is None else inputs.check_groups(groups, len(checked), self.device)
        return self.state.with_groups(checked, given)

    def calibrate(self, activations: ArrayLike | torch.Tensor, metrics: Mapping[str, ArrayLike | torch.Tensor]) -> None:
        """Set the bin edges from rows drawn at random, which are not counted; 8 rows per bin are enough.

        Args:
            activations: [n0, n_neurons].
            metrics: Name -> [n0] values.

        Raises:
            ArgumentError: Something was counted already, or shapes that do not fit.
        """
        if self.n_observations or self.state.table is not None:
            raise ArgumentError("calibrate: expected to be called once and before anything is counted, got it later")
        x = self._activations(activations)
        if x.shape[0] < 1:
            raise ArgumentError("calibrate: expected at least one row, got none")
        with torch.inference_mode(False):
            checked = self.check(metrics, x.shape[0])
            self._calibrate(x.clone() if x.is_inference() else x, torch.cat([checked, checked[:, :1]], 1))

    @property
    def keeping(self) -> bool:
        """Whether rows are still kept, to be exact or to set the edges."""
        return self.state.keeping

    def keep_rows(self, keep: torch.Tensor) -> None:
        """Forget those of the rows that are still kept for which keep, bool [rows], is False."""
        buffer = self.state.buffer
        rows, values = (kept[keep.to(self.device)] for kept in buffer.contents)
        buffer.filled, buffer.summed = len(rows), 0
        for target, kept in zip(buffer.contents, (rows, values), strict=True):
            target.copy_(kept)
        self.state.moments.clear()  # they are summed anew, the shift stays

    def calibrated_table(self, other: NeuronStatistics | None = None) -> BinTable:
        """An empty table whose edges are those of the rows so far, and of those that another still keeps.

        Raises:
            ArgumentError: Nothing was counted.
        """
        state = self.state
        if state.table is not None:
            return state.table.like(self.device)
        if not state.buffer.filled:
            raise ArgumentError("calibrate: expected at least one row counted before, got none")
        rows, values = state.buffer.contents
        if other is not None:
            theirs = (tensor.to(self.device) for tensor in other.state.buffer.contents)
            rows, values = (torch.cat(pair) for pair in zip((rows, values), theirs, strict=True))
        with torch.inference_mode(False):
            return BinTable.calibrated(self.settings.metrics, self.settings.bins, rows, self.settings.named(values))

    def count_in(self, table: BinTable) -> None:
        """Count the rows that are kept, and all later ones, in an empty table."""
        self._sum_buffered()
        rows, values = self.state.buffer.contents
        self.state.table = table
        with torch.inference_mode(False):
            self.state.buffer = RowBuffer.empty(self.settings, 0, rows.dtype, self.device)
        step = self.settings.buffer_rows
        for part, checked in zip(rows.split(step), values.split(step), strict=True):
            self._count_in_bins(part, checked)

    def calibrate_on_counted(self) -> None:
        """Let the rows counted so far set the bin edges as `calibrate` does, and forget them.

        Raises:
            ArgumentError: Nothing was counted, or more than can be kept.
        """
        state = self.state
        if state.table is not None or not state.buffer.filled or int(state.moments.count):
            raise ArgumentError(
                f"calibrate: expected 1 to {exact_rows(self.settings.bins)} rows counted before, got "
                f"{self.n_observations}"
            )
        with torch.inference_mode(False):
            self._calibrate(*state.buffer.contents)
            state.buffer = RowBuffer.empty(self.settings, 0, state.buffer.rows.dtype, self.device)

    def _calibrate(self, x: torch.Tensor, values: torch.Tensor) -> None:
        state = self.state
        if not state.shifted:
            state.moments.choose_shift(x, self.settings.expand(values))
            state.shifted = True
        if state.keeping:
            settings = self.settings
            state.table = BinTable.calibrated(settings.metrics, settings.bins, x, settings.named(values))

    def update(
        self,
        activations: ArrayLike | torch.Tensor,
        metrics: Mapping[str, ArrayLike | torch.Tensor],
        groups: ArrayLike | torch.Tensor | None = None,
    ) -> None:
        """Count n observations.

        Args:
            activations: [n, n_neurons], anything array-like: float32, bfloat16, float16 or float64.
            metrics: Name -> [n] values, for every metric.
            groups: [n] whole numbers; observations of one group (the tokens of an example) are resampled together.

        Raises:
            ArgumentError: Shapes that do not fit, a class out of range, a continuous value that is not finite.
        """
        x = self._activations(activations)
        self._update(x, self._with_groups(self.check(metrics, x.shape[0]), groups))

    def update_checked(self, x: torch.Tensor, checked: torch.Tensor, groups: torch.Tensor) -> None:
        """Count rows [n, n_neurons] with values as made by `check`, of groups float64 [n] that were checked, too."""
        self._update(x, self.state.with_groups(checked, groups))

    def _update(self, x: torch.Tensor, values: torch.Tensor) -> None:
        step = self.settings.buffer_rows
        for rows, checked in zip(x.split(step), values.split(step), strict=True):
            if rows.shape[0] == step and not self.state.keeping:
                self._drain()
                self.state.sum_rows(rows, checked)
                self._count_in_bins(rows, checked)
            else:
                self.reserve(rows.shape[0], rows.dtype).copy_(rows)
                self._commit(checked)

    def reserve(self, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A view [n, n_neurons] of the buffer to write activations into before `commit`: saves a copy of the rows."""
        buffer, keeping = self.state.buffer, self.state.keeping
        if buffer.filled + n > len(buffer.rows) or (buffer.rows.dtype != dtype and not keeping):
            self._make_room(n, dtype)
            buffer = self.state.buffer
        elif buffer.rows.dtype != dtype:
            buffer.rows = buffer.rows.float()  # kept rows of two dtypes
        return buffer.rows[buffer.filled : buffer.filled + n]

    def _make_room(self, n: int, dtype: torch.dtype) -> None:
        if self.state.buffer.filled:
            self._drain()
        settings, buffer = self.settings, self.state.buffer
        capacity = max(n, exact_rows(settings.bins) if self.state.keeping else settings.buffer_rows)
        if len(buffer.rows) != capacity or buffer.rows.dtype != dtype:
            with torch.inference_mode(False):
                self.state.buffer = RowBuffer.empty(settings, capacity, dtype, self.device)

    def commit(self, checked: torch.Tensor, groups: ArrayLike | torch.Tensor | None = None) -> None:
        """Count the rows written to the last `reserve`, with their values as made by `check`."""
        self._commit(self._with_groups(checked, groups))

    def _commit(self, values: torch.Tensor) -> None:
        buffer = self.state.buffer
        buffer.values[buffer.filled : buffer.filled + len(values)] = values
        buffer.filled += len(values)
        if buffer.filled == len(buffer.rows) and not self.state.keeping:
            self._drain()

    def _sum_buffered(self) -> None:
        """Bring the co-moments up to all rows of the buffer."""
        buffer = self.state.buffer
        while buffer.summed < buffer.filled:
            part = slice(buffer.summed, min(buffer.summed + self.settings.buffer_rows, buffer.filled))
            buffer.summed = part.stop
            self.state.sum_rows(buffer.rows[part], buffer.values[part])

    def _drain(self) -> None:
        """Count the buffer's rows into the state and empty it; kept rows set the edges first."""
        state, step = self.state, self.settings.buffer_rows
        if not state.buffer.filled:
            return
        self._sum_buffered()
        rows, values = state.buffer.contents
        if state.keeping:
            with torch.inference_mode(False):
                self._calibrate(rows[::2], values)  # 8 rows per bin are enough; of scalars more are better
                # The table may take the place of the kept rows: the buffer is made anew, and smaller.
                state.buffer = RowBuffer.empty(self.settings, 0, rows.dtype, self.device)
        state.buffer.filled = state.buffer.summed = 0
        for part, checked in zip(rows.split(step), values.split(step), strict=True):
            self._count_in_bins(part, checked)

    def _count_in_bins(self, x: torch.Tensor, values: torch.Tensor) -> None:
        if self.state.table is not None:
            self.state.table.add(x, self.settings.named(values))

    def like(self) -> NeuronStatistics:
        """An empty accumulator of the same neurons, metrics, shift and bin edges: a shard to `merge` later."""
        return NeuronStatistics.of_state(self.state.like(self.device))

    @staticmethod
    def of_state(state: State) -> NeuronStatistics:
        """An accumulator that goes on from a state, which it owns from then on."""
        made = NeuronStatistics.__new__(NeuronStatistics)
        made.state = state
        return made

    def told(self) -> dict[str, Any]:
        """What another accumulator must have in common with this one to be merged, by name."""
        return self.settings.told()

    def check_merge(self, other: NeuronStatistics) -> None:
        """Raise what `merge` would, and change nothing."""
        ours, theirs = self.state, other.state
        refuse_other(self.told(), other.told(), "count both with the same settings")
        for state in (ours, theirs):
            state.refuse_faults()
        if ours.replicates is not None:
            ours.numbering.check(theirs.numbering)
        if ours.table is not None and theirs.table is not None:
            ours.table.check_merge(theirs.table)

    def merge(self, other: NeuronStatistics) -> None:
        """Add another accumulator's observations to this one; the other is left as it is.

        Raises:
            ArgumentError: The other has other neurons, metrics or statistics, or counts into other bins.
        """
        self.check_merge(other)
        ours, theirs = self.state, other.state
        if ours.replicates is not None:
            ours.numbering.merge(theirs.numbering)
        ours.wide |= theirs.wide
        if theirs.keeping:  # it still has all its rows
            if ours.keeping and ours.buffer.filled + theirs.buffer.filled > exact_rows(self.settings.bins):
                self.count_in(self.calibrated_table(other))  # edges that know both
            self.add_kept(other)
            return
        if ours.keeping:
            kept = [tensor.clone() for tensor in ours.buffer.contents]
            self._start_again(theirs.like(self.device))
            self._update(kept[0], kept[1])
        self._drain()
        other._drain()
        if self.state.table is not None and theirs.table is not None:
            self.state.table.merge(theirs.table)
        self.state.merge_sums(theirs)

    def add_kept(self, other: NeuronStatistics, keep: torch.Tensor | None = None) -> None:
        """Count rows that another accumulator still keeps: all, or those for which keep, bool [rows], is True."""
        self.state.wide |= other.state.wide
        contents = other.state.buffer.contents
        rows, values = (tensor.clone() if keep is None else tensor[keep.to(other.device)] for tensor in contents)
        self._update(rows.to(self.device), values.to(self.device))

    def _start_again(self, empty: State) -> None:
        """Go on with an empty state's shift and edges; numbers that were given out stay given out."""
        empty.settings, empty.numbering, empty.wide = self.settings, self.state.numbering, self.state.wide
        empty.faults |= self.state.faults
        self.state = empty

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Sum over the processes of a `torch.distributed` group; every process then holds all observations.

        Raises:
            ArgumentError: The processes count into other bins; `calibrate` each with the same rows.
        """
        self.state.wide = any(distributed.gather(self.state.wide, group))
        distributed.share_faults(self.state, group)
        if all(distributed.gather(self.state.keeping, group)):
            parts = distributed.gather(self.state.buffer.contents, group)
            self._start_again(self.state.like(self.device))
            for rows, values in parts:
                self._update(rows.to(self.device), values.to(self.device))
            return
        distributed.check_same_edges(self.state, group)
        self._drain()
        distributed.reduce(self.state, group)

    def state_dict(self) -> dict[str, Any]:
        """The whole state: plain values and tensors, for `from_state_dict` here or in another process."""
        self._settle()
        return persistence.to_dict(self.state)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device | str = "cpu") -> NeuronStatistics:
        """An accumulator that goes on where `state_dict` was taken.

        Raises:
            ArgumentError: Another schema version, or tensors that do not fit the settings or each other.
        """
        return cls.of_state(persistence.from_dict(state, torch.device(device)))

    def compute(self) -> NeuronScores:
        """The scores of everything counted so far; counting may go on. Warns once of whatever has no score.

        Raises:
            ArgumentError: Nothing was counted.
        """
        result = self.scores()
        scoring.warn_of_reasons(result)
        return result

    def scores(self, rate: float = 1.0) -> NeuronScores:
        """`compute` without the warning.

        Args:
            rate: With which probability each observation of a larger set was counted here; the bounds are then how far
                the statistics can be from those of the whole set, at `SAMPLING_CONFIDENCE`.
        """
        if self.n_observations == 0:
            raise ArgumentError("compute: expected at least one observation, got none; call update first")
        self._settle()
        return scoring.scores(self.state, rate)

    def _settle(self) -> None:
        """Count whatever waits in the buffer; rows that are kept stay."""
        if not self.state.keeping:
            self._drain()
        self._sum_buffered()
