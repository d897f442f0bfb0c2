"""`NeuronStatistics`: the accumulator, in the manner of torchmetrics (update, merge, all_reduce, compute)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ArgumentError
from skillfast.metrics import Metric, from_json, to_json
from skillfast.statistics import comoments
from skillfast.statistics.comoments import CoMoments
from skillfast.statistics.neuron_scores import NeuronScores
from skillfast.vocabulary import STATISTICS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike

SCHEMA = "skillfast.statistics/1"
ROUNDING = 1e-12  # a variance below this share of the mean square is what float64 sums leave of a constant


class NeuronStatistics:
    """Correlates every neuron with every metric in one pass; what it keeps does not grow with the observations.

    Args:
        n_neurons: Number of neurons, D.
        metrics: Name -> `Categorical`, `Binary` or `Continuous`.
        statistics: Which statistics to compute; `"pearson"`.
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
        buffer_rows: int = 512,
        device: torch.device | str = "cpu",
    ) -> None:
        if n_neurons < 1 or not metrics or buffer_rows < 1:
            raise ArgumentError(
                f"NeuronStatistics: expected at least one neuron, metric and buffer row, got {n_neurons} neurons, "
                f"{len(metrics)} metrics and {buffer_rows} rows"
            )
        unknown = [name for name in statistics if name not in STATISTICS]
        if unknown or not statistics:
            raise ArgumentError(f"statistics: expected some of {', '.join(STATISTICS)}, got {list(statistics)}")
        self.n_neurons = n_neurons
        self.metrics = dict(metrics)
        self.statistics = tuple(statistics)
        self.buffer_rows = buffer_rows
        self.device = torch.device(device)
        self.columns = tuple(column for name, metric in self.metrics.items() for column in metric.columns(name))
        # Made outside inference mode, so that updates inside and outside of it may mutate it.
        with torch.inference_mode(False):
            self._state = CoMoments.zeros(n_neurons, len(self.columns), self.device)
            self._buffer = torch.empty(0, n_neurons, device=self.device)
            self._values = torch.empty(0, len(self.columns), dtype=torch.float64, device=self.device)
        self._filled = 0

    @property
    def n_observations(self) -> int:
        """Rows counted so far."""
        return int(self._state.count) + self._filled

    @property
    def state_bytes(self) -> int:
        """Size of the state and the buffer, in bytes."""
        tensors = [*self._state.state_dict().values(), self._buffer, self._values]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def encode(self, metrics: Mapping[str, ArrayLike | torch.Tensor], n: int) -> torch.Tensor:
        """The metrics' values for n observations as columns: float64 [n, n_columns] on the state's device."""
        if set(metrics) != set(self.metrics):
            raise ArgumentError(f"metrics: expected values for {sorted(self.metrics)}, got {sorted(metrics)}")
        parts = []
        for name, metric in self.metrics.items():
            values = torch.as_tensor(metrics[name], device=self.device).detach()
            if values.shape != (n,):
                raise ArgumentError(f"metric {name!r}: expected {n} values, got shape {list(values.shape)}")
            parts.append(metric.encode(name, values))
        return torch.cat(parts, 1)

    def update(self, activations: ArrayLike | torch.Tensor, metrics: Mapping[str, ArrayLike | torch.Tensor]) -> None:
        """Count n observations.

        Args:
            activations: [n, n_neurons], anything array-like: float32, bfloat16, float16 or float64.
            metrics: Name -> [n] values, for every metric.

        Raises:
            ArgumentError: Shapes that do not fit, a class out of range, a continuous value that is not finite.
        """
        x = torch.as_tensor(activations, device=self.device).detach()
        if x.dim() != 2 or x.shape[1] != self.n_neurons:
            raise ArgumentError(f"activations: expected [n, {self.n_neurons}], got shape {list(x.shape)}")
        if not x.is_floating_point():
            x = x.float()
        y = self.encode(metrics, x.shape[0])
        if x.shape[0] >= self.buffer_rows:
            self._flush()
            for rows, columns in zip(x.split(self.buffer_rows), y.split(self.buffer_rows), strict=True):
                self._add(rows, columns)
            return
        self.reserve(x.shape[0], x.dtype).copy_(x)
        self.commit(y)

    def reserve(self, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A view [n, n_neurons] of the buffer to write activations into before `commit`: saves a copy of the rows."""
        if self._buffer.dtype != dtype or self._filled + n > self._buffer.shape[0]:
            self._flush()
        if self._buffer.dtype != dtype or n > self._buffer.shape[0]:
            with torch.inference_mode(False):
                rows = max(n, self.buffer_rows)
                self._buffer = torch.empty(rows, self.n_neurons, dtype=dtype, device=self.device)
                self._values = torch.empty(rows, len(self.columns), dtype=torch.float64, device=self.device)
        return self._buffer[self._filled : self._filled + n]

    def commit(self, encoded: torch.Tensor) -> None:
        """Count the rows written to the last `reserve`, with their columns as made by `encode`."""
        n = encoded.shape[0]
        self._values[self._filled : self._filled + n] = encoded
        self._filled += n
        if self._filled == self._buffer.shape[0]:
            self._flush()

    def _flush(self) -> None:
        if self._filled:
            rows = slice(0, self._filled)
            self._filled = 0
            self._add(self._buffer[rows], self._values[rows])

    def _add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        if x.shape[0] == 0:
            return
        if int(self._state.count) == 0:
            comoments.choose_shift(self._state, x, y)
        comoments.update(self._state, x, y)

    def like(self) -> NeuronStatistics:
        """An empty accumulator of the same neurons and metrics: a shard to `merge` later."""
        return NeuronStatistics(
            self.n_neurons, self.metrics, self.statistics, buffer_rows=self.buffer_rows, device=self.device
        )

    def merge(self, other: NeuronStatistics) -> None:
        """Add another accumulator's observations to this one; the other is left as it is.

        Raises:
            ArgumentError: The other has other neurons or metrics.
        """
        if (other.n_neurons, other.metrics) != (self.n_neurons, self.metrics):
            raise ArgumentError(
                f"merge: expected {self.n_neurons} neurons and metrics {list(self.metrics)}, "
                f"got {other.n_neurons} and {list(other.metrics)}"
            )
        self._flush()
        other._flush()
        tensors = {name: tensor.to(self.device) for name, tensor in other._state.state_dict().items()}
        comoments.merge(self._state, CoMoments(**tensors))

    def all_reduce(self, group: Any = None) -> None:
        """Sum over the processes of a `torch.distributed` group; every process then holds all observations."""
        import torch.distributed as dist

        self._flush()
        total = self._state.count.clone()
        dist.all_reduce(total, group=group)
        # The processes' mean shift, weighted by their rows: one that lies within everybody's data.
        weight = self._state.count.double() / total.clamp_min(1).double()
        shift_x, shift_y = self._state.shift_x.double() * weight, self._state.shift_y * weight
        dist.all_reduce(shift_x, group=group)
        dist.all_reduce(shift_y, group=group)
        moved = comoments.reshift(self._state, shift_x.float(), shift_y)
        for name in ("count", "sum_x", "sum_xx", "sum_y", "sum_yy", "sum_xy"):
            dist.all_reduce(getattr(moved, name), group=group)
        self._state = moved

    def state_dict(self) -> dict[str, Any]:
        """The whole state: plain values and tensors, for `from_state_dict` here or in another process."""
        self._flush()
        return {
            "schema": SCHEMA,
            "n_neurons": self.n_neurons,
            "metrics": to_json(self.metrics),
            "statistics": list(self.statistics),
            "buffer_rows": self.buffer_rows,
            "comoments": {name: tensor.clone() for name, tensor in self._state.state_dict().items()},
        }

    @staticmethod
    def from_state_dict(state: Mapping[str, Any], device: torch.device | str = "cpu") -> NeuronStatistics:
        """An accumulator that goes on where `state_dict` was taken.

        Raises:
            ArgumentError: Another schema version, or tensors of another shape.
        """
        if state.get("schema") != SCHEMA:
            raise ArgumentError(f"state_dict: expected schema {SCHEMA!r}, got {state.get('schema')!r}")
        result = NeuronStatistics(
            state["n_neurons"],
            from_json(state["metrics"]),
            state["statistics"],
            buffer_rows=state["buffer_rows"],
            device=device,
        )
        for name, tensor in result._state.state_dict().items():
            stored = state["comoments"].get(name)
            if stored is None or stored.shape != tensor.shape:
                shape = None if stored is None else list(stored.shape)
                raise ArgumentError(f"state_dict {name}: expected shape {list(tensor.shape)}, got {shape}")
            tensor.copy_(stored)
        return result

    def compute(self) -> NeuronScores:
        """The scores of everything counted so far; counting may go on.

        Raises:
            ArgumentError: Nothing was counted.
        """
        self._flush()
        if int(self._state.count) == 0:
            raise ArgumentError("compute: expected at least one observation, got none; call update first")
        state = self._state
        mean, variance, _, variance_y = comoments.mean_and_variance(state)
        n = state.count.double()
        non_finite = ~torch.isfinite(mean + variance)
        constant_x = ~non_finite & (variance <= ROUNDING * state.sum_xx / n)
        constant_y = variance_y <= ROUNDING * state.sum_yy / n
        reasons = {
            "constant_neuron": tuple(constant_x.nonzero()[:, 0].tolist()),
            "non_finite_activation": tuple(non_finite.nonzero()[:, 0].tolist()),
            "constant_metric": tuple(c for c, flat in zip(self.columns, constant_y.tolist(), strict=True) if flat),
        }
        return NeuronScores(
            columns=self.columns,
            mean=mean.cpu().numpy(),
            std=variance.sqrt().cpu().numpy(),
            n_observations=int(state.count),
            pearson=comoments.pearson(state, constant_x, constant_y).cpu().numpy(),
            reasons={name: where for name, where in reasons.items() if where},
        )
