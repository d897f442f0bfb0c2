"""Co-moments of D neurons and M metric columns, streamed and merged: what Pearson's r is made of.

Experts have D neurons and a count each; their sums are stacked [experts, ...] and share the columns' shift.

Both variables are shifted by the mean of the first buffer, so that float32 rows with a large offset lose nothing;
sums live in float64; two states merge after one is re-shifted onto the other (Chan, Golub and LeVeque, 1979). Of the
products between columns those of a label's classes are known without a sum: a row has one class.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from skillfast import ops

ROUNDING = 1e-12  # a variance below this share of the mean square is what float64 sums leave of a constant


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
        sum_between: float64 [K, M], of the K columns that are no class of `label` with all; [0, 0] of stacked experts.
        label: Where the columns of one categorical metric stand, of which each row has one at 1 and the others at 0.
    """

    count: torch.Tensor
    shift_x: torch.Tensor
    shift_y: torch.Tensor
    sum_x: torch.Tensor
    sum_xx: torch.Tensor
    sum_y: torch.Tensor
    sum_yy: torch.Tensor
    sum_xy: torch.Tensor
    sum_between: torch.Tensor
    label: range = range(0)

    @staticmethod
    def zeros(
        n_neurons: int, n_columns: int, device: torch.device, label: range = range(0), experts: int | None = None
    ) -> CoMoments:
        """A state that has seen nothing and has no shift yet; with `experts` one of each, stacked."""
        stack = () if experts is None else (experts,)

        def sums(*shape: int) -> torch.Tensor:
            return torch.zeros((*stack, *shape), dtype=torch.float64, device=device)

        between = (n_columns - len(label), n_columns) if experts is None else (0, 0)
        return CoMoments(
            count=torch.zeros(stack, dtype=torch.int64, device=device),
            shift_x=torch.zeros((*stack, n_neurons), dtype=torch.float32, device=device),
            shift_y=torch.zeros(n_columns, dtype=torch.float64, device=device),
            sum_x=sums(n_neurons),
            sum_xx=sums(n_neurons),
            sum_y=sums(n_columns),
            sum_yy=sums(n_columns),
            sum_xy=sums(n_columns, n_neurons),
            sum_between=torch.zeros(between, dtype=torch.float64, device=device),
            label=label,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "label"}

    def of_expert(self, expert: int) -> CoMoments:
        """One expert's co-moments, as views."""
        shared = {"shift_y": self.shift_y, "sum_between": self.sum_between}
        own = {name: tensor[expert] for name, tensor in self.tensors().items() if name not in shared}
        return CoMoments(**own, **shared, label=self.label)

    def sums(self) -> dict[str, torch.Tensor]:
        """The count and the sums by name: everything but the shift, so that two states with one shift add up."""
        return {name: tensor for name, tensor in self.tensors().items() if not name.startswith("shift")}

    def to(self, device: torch.device) -> CoMoments:
        """The sums on a device; tensors that lie there already are shared."""
        return CoMoments(**{name: tensor.to(device) for name, tensor in self.tensors().items()}, label=self.label)

    def clear(self) -> None:
        """Forget all rows and keep the shift."""
        for tensor in self.sums().values():
            tensor.zero_()

    def choose_shift(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take the means of the rows x [n, D] and y float64 [n, M] as the shift, before anything is counted."""
        mean_x = x.double().mean(0).float()
        # A shift that is not finite would poison rows that are.
        self.shift_x.copy_(torch.where(torch.isfinite(mean_x), mean_x, torch.zeros_like(mean_x)))
        self.shift_y.copy_(y.mean(0))

    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Count n rows: x [n, D] in its own dtype, y float64 [n, M]."""
        shifted = y - self.shift_y
        self.count_columns(shifted)
        ops.comoments_update(x, shifted.float(), self.shift_x, self.sum_x, self.sum_xx, self.sum_xy)

    def count_columns(self, shifted: torch.Tensor) -> None:
        """Count the columns of n rows about their shift, float64 [n, M], whose activations are summed elsewhere."""
        self.count += len(shifted)
        self.sum_y += shifted.sum(0)
        self.sum_yy += shifted.square().sum(0)
        self.sum_between += self._others(shifted).T @ shifted

    def update_sums(self, sums: torch.Tensor, counts: torch.Tensor, shifted: torch.Tensor) -> None:
        """Count examples whose rows were summed already: each has one value per column and `counts` rows.

        Args:
            sums: [2, n, D], sums of the rows about the shift, and of their squares; of experts [2, n, experts, D].
            counts: int64 [n]; of experts [n, experts].
            shifted: float64 [n, M], columns about the shift.
        """
        x, squares = sums.double()
        weights = counts.double().movedim(0, -1)  # [..., n]
        self.count += counts.sum(0)
        self.sum_x += x.sum(0)
        self.sum_xx += squares.sum(0)
        self.sum_y += weights @ shifted
        self.sum_yy += weights @ shifted.square()
        self.sum_xy += shifted.T @ x.movedim(0, -2)
        if self.sum_between.numel():
            self.sum_between += (weights * self._others(shifted).T) @ shifted

    def _others(self, columns: torch.Tensor) -> torch.Tensor:
        """What of the columns [..., M] is no class of the label: [..., K]."""
        return torch.cat([columns[..., : self.label.start], columns[..., self.label.stop :]], -1)

    def reshift(self, shift_x: torch.Tensor, shift_y: torch.Tensor) -> CoMoments:
        """The rows summed about another shift (float32 [D], float64 [M]), in float64."""
        n = self.count.double()[..., None]
        dx = self.shift_x.double() - shift_x.double()  # [..., D]
        dy = self.shift_y - shift_y  # [M]
        between = self.sum_between
        if between.numel():
            mine, sum_mine = self._others(dy)[:, None], self._others(self.sum_y)[:, None]
            between = between + mine * self.sum_y + sum_mine * dy + n * mine * dy
        sum_xy = self.sum_xy + dy[:, None] * self.sum_x[..., None, :] + self.sum_y[..., None] * dx[..., None, :]
        return CoMoments(
            count=self.count.clone(),
            shift_x=shift_x.clone(),
            shift_y=shift_y.clone(),
            sum_x=self.sum_x + n * dx,
            sum_xx=self.sum_xx + 2 * dx * self.sum_x + n * dx.square(),
            sum_y=self.sum_y + n * dy,
            sum_yy=self.sum_yy + 2 * dy * self.sum_y + n * dy.square(),
            sum_xy=sum_xy + n[..., None] * dy[:, None] * dx[..., None, :],
            sum_between=between.clone(),
            label=self.label,
        )

    def merge(self, other: CoMoments) -> None:
        """Add the rows of another state on the same device; one that has no rows takes over the other's shift.

        So does each expert that has none.
        """
        taken = ((self.count == 0) & (other.count > 0))[..., None]
        self.shift_x.copy_(torch.where(taken, other.shift_x, self.shift_x))
        if int(self.count.sum()) == 0 and int(other.count.sum()) > 0:
            self.shift_y.copy_(other.shift_y)
        moved = other.reshift(self.shift_x, self.shift_y).sums()
        for name, tensor in self.sums().items():
            tensor.add_(moved[name])

    def mean_and_variance(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and population variance of the neurons [D], then of the columns [M], float64."""
        n = self.count.double()
        mean_x, mean_y = self.sum_x / n, self.sum_y / n
        var_x = (self.sum_xx / n - mean_x.square()).clamp_min(0)
        var_y = (self.sum_yy / n - mean_y.square()).clamp_min(0)
        return mean_x + self.shift_x.double(), var_x, mean_y + self.shift_y, var_y

    def pearson(self, constant_x: torch.Tensor, constant_y: torch.Tensor) -> torch.Tensor:
        """Pearson's r of every neuron with every column, float64 [D, M]; NaN where either is constant.

        Args:
            constant_x: bool [D], neurons with one value.
            constant_y: bool [M], columns with one value.
        """
        n = self.count.double()
        covariance = self.sum_xy / n - (self.sum_y / n)[:, None] * (self.sum_x / n)  # [M, D]
        _, var_x, _, var_y = self.mean_and_variance()
        r = (covariance / (var_y.sqrt()[:, None] * var_x.sqrt())).clamp(-1, 1)
        r[constant_y] = torch.nan
        r[:, constant_x] = torch.nan
        return r.T.contiguous()

    def between(self, constant_y: torch.Tensor) -> torch.Tensor:
        """Pearson's r of every column with every other, float64 [M, M]; NaN where either is constant (bool [M])."""
        n = self.count.double()
        mean = self.sum_y / n
        covariance = self.sum_between.new_empty(len(mean), len(mean))
        others = self._others(torch.arange(len(mean), device=mean.device))
        covariance[others] = self.sum_between / n - self._others(mean)[:, None] * mean
        covariance[:, others] = covariance[others].T
        own = slice(self.label.start, self.label.stop)
        share = (mean + self.shift_y)[own]  # of the rows that have each class
        covariance[own, own] = share.diag() - share[:, None] * share
        deviation = self.mean_and_variance()[3].sqrt()
        r = covariance / (deviation[:, None] * deviation)
        r[constant_y] = torch.nan
        r[:, constant_y] = torch.nan
        return r
