"""Intervals of Pearson's r from the same pass: a Poisson bootstrap whose weights are hashed, not stored.

Replicate b gives every group of observations (by default every observation) a Poisson(1) weight that depends on the
seed, the group and b alone, so the replicates do not depend on order, batches or shards. Weighted sums are further
columns of the same co-moments (Chamandy et al., 2012, "Estimating uncertainty for massive data streams").
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from scipy import stats

from skillfast import ops
from skillfast.errors import ArgumentError
from skillfast.statistics.moments import ROUNDING
from skillfast.transfer import moved

LEVEL = 0.95
_POISSON = stats.poisson(1).cdf(np.arange(12))  # beyond 11 the rest is 1e-9
_SLICE = 1 << 20  # values of all replicates finished at once


def mix(*parts: np.ndarray | int) -> np.ndarray:
    """A 64-bit hash of integers, elementwise (the finaliser of SplitMix64 over a running sum)."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = state + np.asarray(part).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def weights(seed: int, groups: torch.Tensor, replicates: int) -> torch.Tensor:
    """Poisson(1) weights float32 [n, replicates] of groups int64 [n], on their device: by `mix`, bit for bit."""
    seeded = torch.full((), int(mix(seed).astype(np.int64)), device=groups.device)
    bits = _mixed(_mixed(seeded, groups[:, None]), torch.arange(replicates, device=groups.device))
    high, low = _shifted(bits, 32), bits & 0xFFFFFFFF
    uniform = (high.double() * 2.0**32 + low.double()) * 2.0**-64  # rounded once, as the whole number is
    return torch.bucketize(uniform, moved(torch.from_numpy(_POISSON), groups.device), right=True).float()


def _mixed(state: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A step of `mix` in int64, whose sums and products wrap around to the same bits."""
    state = state + part + _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    return (bits >> by) & ((1 << (64 - by)) - 1)  # without copies of the sign


def _signed(bits: int) -> int:
    return bits - (1 << 64)  # of a number from 2^63 on


@dataclass
class Numbering:
    """Numbers for observations without a group, so that no two, of shards and processes too, share their weights.

    Attributes:
        stream: Tells this accumulator's numbers from those of shards and other processes.
        shards: How many shards were made of it.
        used: How many numbers were given out.
        merged: Streams whose numbers others have used, and whose observations are counted here.
    """

    stream: int = 0
    shards: int = 0
    used: int = 0
    merged: set[int] = field(default_factory=set)

    @staticmethod
    def of_process() -> Numbering:
        """A numbering of this process's own: stream 0 in the first process, and where there is no other."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return Numbering(_halved(mix(rank)) if rank else 0)

    def take(self, n: int, seed: int, device: torch.device) -> torch.Tensor:
        """The next n numbers, whole ones in float64 [n]."""
        first = (int(mix(seed, self.stream)) >> 13) if self.stream else 0  # exact in float64
        numbers = first + self.used + torch.arange(n, dtype=torch.float64, device=device)
        self.used += n
        return numbers

    def shard(self) -> Numbering:
        """The numbering of a new shard."""
        self.shards += 1
        return Numbering(_halved(mix(self.stream, self.shards)))

    def _counted(self) -> set[int]:
        """Streams whose numbers were given out to observations that are counted here."""
        return self.merged | ({self.stream} if self.used else set())

    def check(self, other: Numbering) -> None:
        """Raise ArgumentError where both count observations of one stream, which share their numbers."""
        if self._counted() & other._counted():
            raise ArgumentError(
                "merge: expected shards with weights of their own, got two of one stream; make each with like()"
            )

    def merge(self, other: Numbering) -> None:
        """Note that the other's observations are counted here, too.

        Raises:
            ArgumentError: Both count observations of one stream, which share their numbers.
        """
        self.check(other)
        theirs = other._counted()
        self.merged |= theirs
        if self.stream in theirs:
            self.stream = _halved(mix(self.stream, len(self.merged), 1))


def _halved(bits: np.ndarray) -> int:
    return int(bits >> np.uint64(1))  # what an int64 can hold


@dataclass
class Replicates:
    """Weighted sums of B replicates about the shift of the co-moments.

    Attributes:
        seed: Seed of the weights.
        count: float64 [B], sum of the weights.
        sum_y: float64 [B, M].
        sum_yy: float64 [B, M].
        sum_x: float64 [B, D].
        sum_xx: float64 [B, D].
        sum_xy: float64 [B * M, D].
        leaves_out: Whether replicate b leaves out every B-th group, as a jackknife does, instead of being a resample.
    """

    seed: int
    count: torch.Tensor
    sum_y: torch.Tensor
    sum_yy: torch.Tensor
    sum_x: torch.Tensor
    sum_xx: torch.Tensor
    sum_xy: torch.Tensor
    leaves_out: bool = False

    NAMES = ("count", "sum_y", "sum_yy", "sum_x", "sum_xx", "sum_xy")

    @staticmethod
    def zeros(seed: int, replicates: int, n_neurons: int, n_columns: int, device: torch.device) -> Replicates:
        """Sums of B replicates that have counted nothing."""
        shapes = (
            (replicates,), (replicates, n_columns), (replicates, n_columns), (replicates, n_neurons),
            (replicates, n_neurons), (replicates * n_columns, n_neurons),
        )  # fmt: skip
        zeros = {
            name: torch.zeros(shape, dtype=torch.float64, device=device)
            for name, shape in zip(Replicates.NAMES, shapes, strict=True)
        }
        return Replicates(seed, **zeros, leaves_out=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The sums by name."""
        return {name: getattr(self, name) for name in self.NAMES}

    def to(self, device: torch.device) -> Replicates:
        """The sums on a device; tensors that lie there already are shared."""
        there = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return Replicates(self.seed, **there, leaves_out=self.leaves_out)

    def clear(self) -> None:
        """Forget all rows."""
        for tensor in self.tensors().values():
            tensor.zero_()

    def _weights(self, groups: torch.Tensor) -> torch.Tensor:
        """How often each replicate has observations of groups int64 [n]: float32 [n, B]."""
        b = len(self.count)
        if self.leaves_out:
            return (groups[:, None] % b != torch.arange(b, device=groups.device)).float()
        return weights(self.seed, groups, b)

    def squared_error(self, squares: torch.Tensor, n: torch.Tensor | int) -> torch.Tensor:
        """The variance of an estimate from the sum of n replicates' squared deviations from their mean."""
        return squares * (n - 1) / n if self.leaves_out else squares / (n - 1)

    def add(self, x: torch.Tensor, y: torch.Tensor, shift: torch.Tensor, groups: torch.Tensor) -> None:
        """Count rows x [n, D] of groups int64 [n], with columns y float64 [n, M] that are shifted already."""
        w = self._weights(groups)  # [n, B]
        wide = w.double()
        self.count += wide.sum(0)
        self.sum_y += wide.T @ y
        self.sum_yy += wide.T @ y.square()
        unused = torch.zeros_like(shift, dtype=torch.float64), torch.zeros_like(shift, dtype=torch.float64)
        products = (w[:, :, None] * y[:, None, :].float()).flatten(1)  # [n, B * M]
        ops.comoments_update(x, products, shift, *unused, self.sum_xy)
        ops.comoments_update(x, w, shift, *unused, self.sum_x)
        squares = (x.float() - shift).square()
        ops.comoments_update(squares, w, torch.zeros_like(shift), *unused, self.sum_xx)

    def add_sums(self, sums: torch.Tensor, counts: torch.Tensor, y: torch.Tensor, groups: torch.Tensor) -> None:
        """Count examples whose rows were summed already.

        Args:
            sums: [2, n, D], sums of the rows about the shift, and of their squares.
            counts: int64 [n], rows of each example.
            y: float64 [n, M], columns about the shift.
            groups: int64 [n].
        """
        w = self._weights(groups).double()
        x, squares = sums.double()
        many = w * counts[:, None]  # [n, B]
        self.count += many.sum(0)
        self.sum_y += many.T @ y
        self.sum_yy += many.T @ y.square()
        self.sum_x += w.T @ x
        self.sum_xx += w.T @ squares
        self.sum_xy += (w[:, :, None] * y[:, None, :]).flatten(1).T @ x

    def merge(self, other: Replicates, dx: torch.Tensor, dy: torch.Tensor) -> None:
        """Add another state's rows, whose shift is larger by dx [D] and dy [M]; both on one device."""
        moved = other.reshift(dx, dy).tensors()
        for name, tensor in self.tensors().items():
            tensor += moved[name]

    def reshift(self, dx: torch.Tensor, dy: torch.Tensor) -> Replicates:
        """The sums of the rows about a shift that is smaller by dx float64 [D] and dy float64 [M]."""
        b, m = self.sum_y.shape
        count, sum_x = self.count[:, None], self.sum_x
        xy = self.sum_xy.view(b, m, -1)
        xy = xy + dy[:, None] * sum_x[:, None] + self.sum_y[:, :, None] * dx + count[:, :, None] * dy[:, None] * dx
        return replace(
            self,
            sum_y=self.sum_y + count * dy,
            sum_yy=self.sum_yy + 2 * dy * self.sum_y + count * dy.square(),
            sum_x=sum_x + count * dx,
            sum_xx=self.sum_xx + 2 * dx * sum_x + count * dx.square(),
            sum_xy=xy.reshape(b * m, -1),
        )

    def pearson(self, part: slice) -> torch.Tensor:
        """Pearson's r in every replicate for a slice of the neurons: float64 [B, d, M]; NaN where one is constant."""
        b, m = self.sum_y.shape
        n = self.count[:, None]
        mean_x, mean_y = self.sum_x[:, part] / n, self.sum_y / n

        def variance(square: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
            found = square - mean.square()
            return found.masked_fill(found <= ROUNDING * square, torch.nan)

        var_x = variance(self.sum_xx[:, part] / n, mean_x)  # [B, d]
        var_y = variance(self.sum_yy / n, mean_y)  # [B, M]
        xy = self.sum_xy.view(b, m, -1)[:, :, part] / n[:, :, None]  # [B, M, d]
        covariance = xy - mean_y[:, :, None] * mean_x[:, None]
        r = covariance / (var_y.sqrt()[:, :, None] * var_x.sqrt()[:, None])
        return r.transpose(1, 2)


def fisher_z(r: torch.Tensor) -> torch.Tensor:
    """Fisher's z of correlations, finite where these are."""
    return torch.atanh(r.clamp(-1 + 1e-15, 1 - 1e-15))


def summarise(replicates: Replicates, r: torch.Tensor) -> dict[str, torch.Tensor]:
    """Interval, p and adjusted p of each r float64 [D, M].

    The standard error is that of Fisher's z over the replicates; interval and p are Student's with B - 1 degrees of
    freedom; p is adjusted over all neurons and columns (Benjamini and Hochberg).

    Returns:
        pearson_low, pearson_high, pearson_p and pearson_q, float64 [D, M]; NaN where r is, or where fewer than half of
        the replicates have an r (a label so rare that resamples miss it).
    """
    b = len(replicates.count)
    z = fisher_z(r)
    error = torch.empty_like(r)
    step = max(1, _SLICE // (b * r.shape[1]))
    for start in range(0, r.shape[0], step):
        part = slice(start, min(start + step, r.shape[0]))
        found = fisher_z(replicates.pearson(part))
        finite = torch.isfinite(found)
        count = finite.sum(0)
        values = torch.where(finite, found, 0.0)
        mean = values.sum(0) / count
        squares = torch.where(finite, (found - mean).square(), 0.0).sum(0)
        error[part] = torch.where(count >= max(2, b // 2), replicates.squared_error(squares, count).sqrt(), torch.nan)
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, b - 1))
    p = 2 * stats.t.sf(np.abs((z / error).cpu().numpy()), b - 1)
    return {
        "pearson_low": torch.tanh(z - quantile * error),
        "pearson_high": torch.tanh(z + quantile * error),
        "pearson_p": torch.from_numpy(p),
        "pearson_q": torch.from_numpy(adjusted(p)),
    }


def adjusted(p: np.ndarray) -> np.ndarray:
    """P adjusted over all that are known (Benjamini and Hochberg); NaN where p is."""
    q = np.full_like(p, np.nan)
    known = np.isfinite(p)
    if known.any():
        q[known] = stats.false_discovery_control(p[known])
    return q
