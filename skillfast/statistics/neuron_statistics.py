"""`NeuronStatistics`: the accumulator, in the manner of torchmetrics (update, merge, all_reduce, compute)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast import files
from skillfast.errors import ArgumentError
from skillfast.statistics import bootstrap, comoments, distributed, inputs, persistence, scoring
from skillfast.statistics.bins import table as bins
from skillfast.statistics.bins.state import BinState
from skillfast.statistics.bootstrap import Replicates
from skillfast.statistics.comoments import CoMoments
from skillfast.vocabulary import BINS, BUFFER_ROWS, STATISTICS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike

    from skillfast.metrics import Metric
    from skillfast.statistics.neuron_scores import NeuronScores

MOST_COLUMNS = 32_000  # a row's channel is an int16
FILE = "statistics.safetensors"


class NeuronStatistics:
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
        seed: Of the replicates.
        buffer_rows: Observations collected before one update of the state.
        device: Where the state lives.

    Raises:
        ArgumentError: No neurons, no metrics, or an unknown statistic.
    """

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
        if n_neurons < 1 or not metrics or buffer_rows < 1 or not 2 <= bins <= 256:
            raise ArgumentError(
                "NeuronStatistics: expected at least one neuron, metric and buffer row and 2 to 256 bins, got "
                f"{n_neurons} neurons, {len(metrics)} metrics, {buffer_rows} rows and {bins} bins"
            )
        unknown = [name for name in statistics if name not in STATISTICS]
        if unknown or not statistics:
            raise ArgumentError(f"statistics: expected some of {', '.join(STATISTICS)}, got {list(statistics)}")
        self.n_neurons = n_neurons
        if n_bootstrap is not None and n_bootstrap < 8:
            raise ArgumentError(f"n_bootstrap: expected at least 8 replicates, got {n_bootstrap}; 64 are usual")
        self.metrics = dict(metrics)
        self.statistics = tuple(statistics)
        self.n_bootstrap = n_bootstrap
        self.seed = seed
        self.n_bins = bins
        self.buffer_rows = buffer_rows
        self.device = torch.device(device)
        columns = [column for name, metric in self.metrics.items() for column in metric.columns(name)]
        if len(set(columns)) < len(columns) or any(":" in name for name in self.metrics):
            raise ArgumentError(f"metrics: expected names without ':' that give each column its own, got {columns[:5]}")
        if len(columns) > MOST_COLUMNS and set(self.statistics) != {"pearson"}:
            raise ArgumentError(
                f"metrics: expected at most {MOST_COLUMNS} columns for {', '.join(scoring.OF_BINS)}, got "
                f"{len(columns)}; ask for Pearson's r alone"
            )
        self.columns = tuple(columns)
        # Made outside inference mode, so that updates inside and outside of it may mutate it.
        with torch.inference_mode(False):
            self._moments = CoMoments.zeros(n_neurons, len(self.columns), self.device)
            self._buffer = torch.empty(0, n_neurons, device=self.device)
            self._values = torch.empty(0, len(self.metrics) + 1, dtype=torch.float64, device=self.device)
            self._replicates = (
                None
                if n_bootstrap is None
                else Replicates.zeros(seed, n_bootstrap, n_neurons, len(self.columns), self.device)
            )
        self._bins: BinState | None = None
        self._merged: set[int] = set()  # streams whose numbers others have used
        self._stream = distributed.stream()  # tells its observations from those of shards and other processes
        self._shards = 0
        self._numbered = 0  # observations that have a number of their own
        self._wide = False  # whether float64 rows came, which the float32 shift does not meet exactly
        self._shifted = False  # whether the co-moments have their shift
        self._filled = 0  # rows in the buffer
        self._summed = 0  # of these, how many the co-moments have already

    @property
    def _keeping(self) -> bool:
        """Whether rows are still kept, to be exact or to set the edges."""
        return self._bins is None and any(name in scoring.OF_BINS for name in self.statistics)

    @property
    def n_observations(self) -> int:
        """Rows counted so far."""
        return int(self._moments.count) + self._filled - self._summed

    @property
    def state_bytes(self) -> int:
        """Size of the state and the buffer, in bytes."""
        tensors = [*self._moments.state_dict().values(), self._buffer, self._values]
        counted = sum(state.nbytes for state in (self._bins, self._replicates) if state is not None)
        return counted + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def check(self, metrics: Mapping[str, ArrayLike | torch.Tensor], n: int) -> torch.Tensor:
        """The metrics' values for n observations, checked: float64 [n, metrics] on the state's device."""
        return inputs.check_values(self.metrics, metrics, n, self.device)

    def _activations(self, activations: ArrayLike | torch.Tensor) -> torch.Tensor:
        x = inputs.check_activations(activations, self.n_neurons, self.device)
        self._wide |= x.dtype == torch.float64
        return x

    def _named(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self.metrics, values.T.contiguous(), strict=False))  # the groups come last

    def _with_groups(self, checked: torch.Tensor, groups: ArrayLike | torch.Tensor | None) -> torch.Tensor:
        """Checked values with a last column of groups: their own, or a number that no other observation has."""
        n = checked.shape[0]
        if groups is None:
            first = (int(bootstrap.mix(self.seed, self._stream)) >> 13) if self._stream else 0  # exact in float64
            column = first + self._numbered + torch.arange(n, dtype=torch.float64, device=self.device)
            self._numbered += n
        else:
            column = inputs.check_groups(groups, n, self.device)
        return torch.cat([checked, column[:, None]], 1)

    def _expanded(self, values: torch.Tensor) -> torch.Tensor:
        named = self._named(values)
        return torch.cat([metric.expand(named[name]) for name, metric in self.metrics.items()], 1)

    def calibrate(self, activations: ArrayLike | torch.Tensor, metrics: Mapping[str, ArrayLike | torch.Tensor]) -> None:
        """Set the bin edges from rows drawn at random, which are not counted; 8 rows per bin are enough.

        Args:
            activations: [n0, n_neurons].
            metrics: Name -> [n0] values.

        Raises:
            ArgumentError: Something was counted already, or shapes that do not fit.
        """
        if self.n_observations or self._bins is not None:
            raise ArgumentError("calibrate: expected to be called once and before anything is counted, got it later")
        x = self._activations(activations)
        if x.shape[0] < 1:
            raise ArgumentError("calibrate: expected at least one row, got none")
        with torch.inference_mode(False):
            checked = self.check(metrics, x.shape[0])
            self._calibrate(x.clone() if x.is_inference() else x, torch.cat([checked, checked[:, :1]], 1))

    def calibrate_on_counted(self) -> None:
        """Let the rows counted so far set the bin edges as `calibrate` does, and forget them.

        Raises:
            ArgumentError: Nothing was counted, or more than can be kept.
        """
        if self._bins is not None or not self._filled or int(self._moments.count):
            raise ArgumentError(
                f"calibrate: expected 1 to {bins.exact_rows(self.n_bins)} rows counted before, got "
                f"{self.n_observations}"
            )
        with torch.inference_mode(False):
            self._calibrate(self._buffer[: self._filled], self._values[: self._filled])
            self._buffer, self._values = self._buffer[:0].clone(), self._values[:0].clone()
        self._filled = 0

    def _calibrate(self, x: torch.Tensor, values: torch.Tensor) -> None:
        if not self._shifted:
            comoments.choose_shift(self._moments, x, self._expanded(values))
            self._shifted = True
        if self._keeping:
            self._bins = BinState.calibrated(self.metrics, self.n_bins, x, self._named(values))

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

    def _update(self, x: torch.Tensor, values: torch.Tensor) -> None:
        for rows, checked in zip(x.split(self.buffer_rows), values.split(self.buffer_rows), strict=True):
            if rows.shape[0] == self.buffer_rows and not self._keeping:
                self._drain()
                self._add(rows, checked)
            else:
                self.reserve(rows.shape[0], rows.dtype).copy_(rows)
                self._commit(checked)

    def reserve(self, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A view [n, n_neurons] of the buffer to write activations into before `commit`: saves a copy of the rows."""
        if self._filled + n > len(self._buffer) or (self._buffer.dtype != dtype and not self._keeping):
            self._make_room(n, dtype)
        elif self._buffer.dtype != dtype:
            self._buffer = self._buffer.float()  # kept rows of two dtypes
        return self._buffer[self._filled : self._filled + n]

    def _make_room(self, n: int, dtype: torch.dtype) -> None:
        if self._filled:
            self._drain()
        rows = max(n, bins.exact_rows(self.n_bins) if self._keeping else self.buffer_rows)
        if len(self._buffer) != rows or self._buffer.dtype != dtype:
            with torch.inference_mode(False):
                self._buffer = torch.empty(rows, self.n_neurons, dtype=dtype, device=self.device)
                self._values = torch.empty(rows, len(self.metrics) + 1, dtype=torch.float64, device=self.device)

    def commit(self, checked: torch.Tensor, groups: ArrayLike | torch.Tensor | None = None) -> None:
        """Count the rows written to the last `reserve`, with their values as made by `check`."""
        self._commit(self._with_groups(checked, groups))

    def _commit(self, values: torch.Tensor) -> None:
        n = values.shape[0]
        self._values[self._filled : self._filled + n] = values
        self._filled += n
        if self._filled == len(self._buffer) and not self._keeping:
            self._drain()

    def _sum_buffered(self) -> None:
        """Bring the co-moments up to all rows of the buffer."""
        while self._summed < self._filled:
            part = slice(self._summed, min(self._summed + self.buffer_rows, self._filled))
            self._summed = part.stop
            self._sum(self._buffer[part], self._values[part])

    def _sum(self, x: torch.Tensor, values: torch.Tensor) -> None:
        columns = self._expanded(values)
        if not self._shifted:
            comoments.choose_shift(self._moments, x, columns)
            self._shifted = True
        comoments.update(self._moments, x, columns)
        if self._replicates is not None:
            shifted = columns - self._moments.shift_y
            self._replicates.add(x, shifted, self._moments.shift_x, values[:, -1].long())

    def _drain(self) -> None:
        """Count the buffer's rows into the state and empty it; kept rows set the edges first."""
        self._sum_buffered()
        rows, values = self._buffer[: self._filled], self._values[: self._filled]
        if self._keeping and self._filled:
            with torch.inference_mode(False):
                self._calibrate(rows[::2], values)  # 8 rows per bin are enough; of scalars more are better
                # The table may take the place of the kept rows: the buffer is made anew, and smaller.
                self._buffer, self._values = self._buffer[:0].clone(), self._values[:0].clone()
        self._filled = self._summed = 0
        if self._bins is not None:
            for part, checked in zip(rows.split(self.buffer_rows), values.split(self.buffer_rows), strict=True):
                self._bins.add(part, self._named(checked))

    def _add(self, x: torch.Tensor, values: torch.Tensor) -> None:
        self._sum(x, values)
        if self._bins is not None:
            self._bins.add(x, self._named(values))

    def like(self) -> NeuronStatistics:
        """An empty accumulator of the same neurons, metrics, shift and bin edges: a shard to `merge` later."""
        shard = NeuronStatistics(
            self.n_neurons,
            self.metrics,
            self.statistics,
            bins=self.n_bins,
            n_bootstrap=self.n_bootstrap,
            seed=self.seed,
            buffer_rows=self.buffer_rows,
            device=self.device,
        )
        self._shards += 1
        shard._stream = int(bootstrap.mix(self._stream, self._shards) >> np.uint64(1))
        shard._moments.shift_x.copy_(self._moments.shift_x)
        shard._moments.shift_y.copy_(self._moments.shift_y)
        shard._shifted = self._shifted
        shard._bins = None if self._bins is None else self._bins.like()
        return shard

    def merge(self, other: NeuronStatistics) -> None:
        """Add another accumulator's observations to this one; the other is left as it is.

        Raises:
            ArgumentError: The other has other neurons, metrics or statistics, or counts into other bins.
        """
        ours = (self.n_neurons, self.metrics, self.statistics, self.n_bins, self.n_bootstrap, self.seed)
        if (other.n_neurons, other.metrics, other.statistics, other.n_bins, other.n_bootstrap, other.seed) != ours:
            raise ArgumentError(
                f"merge: expected {self.n_neurons} neurons, {self.n_bins} bins, metrics {list(self.metrics)} and "
                f"statistics {list(self.statistics)}, got {other.n_neurons}, {other.n_bins}, {list(other.metrics)} "
                f"and {list(other.statistics)}"
            )
        self._take_streams(other)
        self._wide |= other._wide
        if other._keeping:  # it still has all its rows
            self._update(other._buffer[: other._filled].clone(), other._values[: other._filled].clone())
            return
        if self._keeping:
            rows, values = self._buffer[: self._filled].clone(), self._values[: self._filled].clone()
            self.__dict__.update(other.like().__dict__ | {"device": self.device})
            self._update(rows, values)
        self._drain()
        other._drain()
        if self._bins is not None and other._bins is not None:
            self._bins.merge(other._bins)
        tensors = {name: tensor.to(self.device) for name, tensor in other._moments.state_dict().items()}
        theirs = CoMoments(**tensors)
        comoments.merge(self._moments, theirs)
        if self._replicates is not None and other._replicates is not None:
            dx = theirs.shift_x.double() - self._moments.shift_x.double()
            moved = other._replicates.reshift(dx, theirs.shift_y - self._moments.shift_y)
            for name, tensor in self._replicates.tensors().items():
                tensor += getattr(moved, name).to(self.device)
        self._shifted = True

    def _take_streams(self, other: NeuronStatistics) -> None:
        """No two observations may share a number, or they would share their bootstrap weights."""
        if self.n_bootstrap is None:
            return
        ours, theirs = (acc._merged | ({acc._stream} if acc._numbered else set()) for acc in (self, other))
        if ours & theirs:
            raise ArgumentError(
                "merge: expected shards with weights of their own, got two of one stream; make each with like()"
            )
        self._merged |= theirs
        if self._stream in theirs:
            self._stream = int(bootstrap.mix(self._stream, len(self._merged), 1) >> np.uint64(1))

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Sum over the processes of a `torch.distributed` group; every process then holds all observations.

        Raises:
            ArgumentError: The processes count into other bins; `calibrate` each with the same rows.
        """
        if distributed.all_true(self._keeping, group):
            parts = distributed.gather((self._buffer[: self._filled], self._values[: self._filled]), group)
            self.__dict__.update(self.like().__dict__)
            for rows, values in parts:
                self._update(rows.to(self.device), values.to(self.device))
            return
        distributed.check_same_edges(None if self._bins is None else self._bins.edges, self._keeping, group)
        self._drain()
        before = self._moments
        self._moments = distributed.reduce_moments(before, group)
        if self._replicates is not None:
            dx = before.shift_x.double() - self._moments.shift_x.double()
            self._replicates = self._replicates.reshift(dx, before.shift_y - self._moments.shift_y)
            distributed.reduce_tensors(self._replicates.tensors(), group)
        if self._bins is not None:
            distributed.reduce_bins(self._bins, group)

    def state_dict(self) -> dict[str, Any]:
        """The whole state: plain values and tensors, for `from_state_dict` here or in another process."""
        self._settle()
        return persistence.state_of(self)

    @staticmethod
    def from_state_dict(state: Mapping[str, Any], device: torch.device | str = "cpu") -> NeuronStatistics:
        """An accumulator that goes on where `state_dict` was taken.

        Raises:
            ArgumentError: Another schema version, or tensors of another shape.
        """
        settings = persistence.settings_of(state)
        result = NeuronStatistics(**settings, device=device)
        persistence.restore(result, state)
        return result

    def save(self, directory: str | Path) -> Path:
        """Write the state as `statistics.safetensors` into the folder; returns its path."""
        path = files.output_folder(directory) / FILE
        files.write_nested(path, self.state_dict())
        return path

    @staticmethod
    def load(directory: str | Path, device: torch.device | str = "cpu") -> NeuronStatistics:
        """Go on from what `save` wrote.

        Raises:
            DataError: The file is missing, broken or of another version.
            ArgumentError: Its tensors do not fit what it says of itself.
        """
        path, remedy = Path(directory) / FILE, "write it with NeuronStatistics.save"
        state = files.read_nested(path, persistence.SCHEMA, remedy)
        with files.whole(path, remedy):
            return NeuronStatistics.from_state_dict(state, device)

    def compute(self) -> NeuronScores:
        """The scores of everything counted so far; counting may go on. Warns once of whatever has no score.

        Raises:
            ArgumentError: Nothing was counted.
        """
        result = self.scores()
        scoring.warn_of_reasons(result)
        return result

    def scores(self) -> NeuronScores:
        """`compute` without the warning."""
        if self.n_observations == 0:
            raise ArgumentError("compute: expected at least one observation, got none; call update first")
        self._settle()
        return scoring.scores(self)

    def _settle(self) -> None:
        """Count whatever waits in the buffer; rows that are kept stay."""
        if not self._keeping:
            self._drain()
        self._sum_buffered()
