"""Co-moments of D neurons and M metric columns, streamed and merged: what Pearson's r is made of.

Both variables are shifted by the mean of the first buffer, so that float32 rows with a large offset lose nothing;
sums live in float64; two states merge after one is re-shifted onto the other (Chan, Golub and LeVeque, 1979).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from skillfast import ops


@dataclass
class CoMoments:
    """Sums over the rows seen so far, about a fixed shift.

    Attributes:
        count: int64 [], rows seen.
        shift_x: float32 [D], subtracted from every activation.
        shift_y: float64 [M], subtracted from every metric column.
        sum_x: float64 [D].
        sum_xx: float64 [D].
        sum_y: float64 [M].
        sum_yy: float64 [M].
        sum_xy: float64 [M, D].
    """

    count: torch.Tensor
    shift_x: torch.Tensor
    shift_y: torch.Tensor
    sum_x: torch.Tensor
    sum_xx: torch.Tensor
    sum_y: torch.Tensor
    sum_yy: torch.Tensor
    sum_xy: torch.Tensor

    @staticmethod
    def zeros(n_neurons: int, n_columns: int, device: torch.device) -> CoMoments:
        """A state that has seen nothing and has no shift yet."""

        def sums(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return CoMoments(
            count=torch.zeros((), dtype=torch.int64, device=device),
            shift_x=torch.zeros(n_neurons, dtype=torch.float32, device=device),
            shift_y=sums(n_columns),
            sum_x=sums(n_neurons),
            sum_xx=sums(n_neurons),
            sum_y=sums(n_columns),
            sum_yy=sums(n_columns),
            sum_xy=sums(n_columns, n_neurons),
        )

    def clone(self) -> CoMoments:
        """A state with tensors of its own."""
        return replace(self, **{field.name: getattr(self, field.name).clone() for field in fields(self)})

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def choose_shift(state: CoMoments, x: torch.Tensor, y: torch.Tensor) -> None:
    """Take the means of these rows, x [n, D] and y float64 [n, M], as the shift of a state that has seen nothing."""
    mean_x = x.double().mean(0).float()
    # A shift that is not finite would poison rows that are.
    state.shift_x.copy_(torch.where(torch.isfinite(mean_x), mean_x, torch.zeros_like(mean_x)))
    state.shift_y.copy_(y.mean(0))


def update(state: CoMoments, x: torch.Tensor, y: torch.Tensor) -> None:
    """Add n rows: x [n, D] in its own dtype, y float64 [n, M]."""
    shifted = y - state.shift_y
    state.count += x.shape[0]
    state.sum_y += shifted.sum(0)
    state.sum_yy += shifted.square().sum(0)
    ops.comoments_update(x, shifted.float(), state.shift_x, state.sum_x, state.sum_xx, state.sum_xy)


def update_sums(state: CoMoments, sums: torch.Tensor, counts: torch.Tensor, shifted: torch.Tensor) -> None:
    """Add examples whose rows were summed already: each has one value per column and `counts` rows.

    Args:
        state: Mutated.
        sums: [2, n, D], sums of the rows about the state's shift, and of their squares.
        counts: int64 [n].
        shifted: float64 [n, M], columns about the state's shift.
    """
    x, squares = sums.double()
    weighted = shifted * counts[:, None]
    state.count += counts.sum()
    state.sum_x += x.sum(0)
    state.sum_xx += squares.sum(0)
    state.sum_y += weighted.sum(0)
    state.sum_yy += (weighted * shifted).sum(0)
    state.sum_xy += shifted.T @ x


def reshift(state: CoMoments, shift_x: torch.Tensor, shift_y: torch.Tensor) -> CoMoments:
    """The same rows summed about another shift, in float64."""
    n = state.count.double()
    dx = state.shift_x.double() - shift_x.double()  # [D]
    dy = state.shift_y - shift_y  # [M]
    return CoMoments(
        count=state.count.clone(),
        shift_x=shift_x.clone(),
        shift_y=shift_y.clone(),
        sum_x=state.sum_x + n * dx,
        sum_xx=state.sum_xx + 2 * dx * state.sum_x + n * dx.square(),
        sum_y=state.sum_y + n * dy,
        sum_yy=state.sum_yy + 2 * dy * state.sum_y + n * dy.square(),
        sum_xy=state.sum_xy + dy[:, None] * state.sum_x + state.sum_y[:, None] * dx + n * dy[:, None] * dx,
    )


def merge(state: CoMoments, other: CoMoments) -> None:
    """Add the rows of another state to this one."""
    if int(state.count) == 0:
        state.shift_x.copy_(other.shift_x)
        state.shift_y.copy_(other.shift_y)
    moved = reshift(other, state.shift_x, state.shift_y)
    for name in ("count", "sum_x", "sum_xx", "sum_y", "sum_yy", "sum_xy"):
        getattr(state, name).add_(getattr(moved, name))


def mean_and_variance(
    state: CoMoments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and population variance of the neurons [D] and of the columns [M], float64."""
    n = state.count.double()
    mean_x, mean_y = state.sum_x / n, state.sum_y / n
    var_x = (state.sum_xx / n - mean_x.square()).clamp_min(0)
    var_y = (state.sum_yy / n - mean_y.square()).clamp_min(0)
    return mean_x + state.shift_x.double(), var_x, mean_y + state.shift_y, var_y


def pearson(state: CoMoments, constant_x: torch.Tensor, constant_y: torch.Tensor) -> torch.Tensor:
    """Pearson's r of every neuron with every column, float64 [D, M]; NaN where either is constant.

    Args:
        state: The sums.
        constant_x: bool [D], neurons with one value.
        constant_y: bool [M], columns with one value.
    """
    n = state.count.double()
    covariance = state.sum_xy / n - (state.sum_y / n)[:, None] * (state.sum_x / n)  # [M, D]
    _, var_x, _, var_y = mean_and_variance(state)
    r = (covariance / (var_y.sqrt()[:, None] * var_x.sqrt())).clamp(-1, 1)
    r[constant_y] = torch.nan
    r[:, constant_x] = torch.nan
    return r.T.contiguous()
