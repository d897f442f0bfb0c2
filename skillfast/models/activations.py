"""The activations of a site in one forward: of all tokens, or of those that were routed to an expert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from skillfast import ops
from skillfast.backends.capture import accumulation_dtype, as_tokens
from skillfast.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skillfast.vocabulary import Pool


@dataclass(frozen=True)
class Activations:
    """The neurons of a site in one forward, where every token has all of them.

    Attributes:
        values: [batch, ..., D].
    """

    values: torch.Tensor

    @property
    def batch(self) -> int:
        """Number of examples."""
        return self.values.shape[0]

    @staticmethod
    def joined(parts: Sequence[Activations]) -> Activations:
        """What flowed in all calls of one forward, one after the other along the tokens."""
        return parts[0] if len(parts) == 1 else Activations(torch.cat([as_tokens(part.values) for part in parts], 1))

    def scaled(
        self, scale: torch.Tensor, shift: torch.Tensor | None = None, condition: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values, each example's scaled by its condition's factors.

        Args:
            scale: [conditions, D], as `ops.neuron_scale` takes it.
            shift: [conditions, D], added afterwards.
            condition: int64 [batch], or one for all windows of an example; None for the first one.
        """
        if condition is not None and len(condition) != self.batch:
            condition = condition.repeat_interleave(self.batch // len(condition))
        return ops.neuron_scale(self.values, scale, shift, condition)

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over an example's tokens, float64 [batch, D], of something that is shaped like `values`."""
        return values.reshape(self.batch, -1, values.shape[-1]).sum(1, dtype=torch.float64)


def by_sample(x: torch.Tensor, samples: int | None, site: str) -> torch.Tensor:
    """Neurons with one row per sample [samples, ..., D]; those of windows that were folded into the batch unfolded.

    Args:
        x: [samples, ..., D], or [samples * windows, ..., D] with a sample's windows one after the other.
        samples: How many samples the forward has; None: as many as there are rows.
        site: Where, for people.

    Raises:
        ModelError: A number of rows that is no multiple of the samples.
    """
    if samples is None or x.shape[0] == samples:
        return x
    if samples == 0 or x.shape[0] % samples:
        raise ModelError(
            f"{site}: expected one row per sample ({samples}), or one per window of each, got activations of shape "
            f"{list(x.shape)}; leave the site out with sites="
        )
    return x.reshape(samples, -1, x.shape[-1])


@dataclass(frozen=True)
class RoutedActivations(Activations):
    """The neurons of a block's experts in one forward: a row for each token and expert that it was routed to.

    Neuron `expert * U + unit` of the site is a unit of an expert. Rows of no expert (of a token that passes them by, or
    of another process's experts) count nowhere.

    Attributes:
        values: [rows, U].
        expert: int64 [rows]; `n_experts` and above for no expert.
        token: int64 [rows], place among the tokens of the batch, example after example.
        gate: [rows], the factor on the expert's output.
        n_experts: Number of experts.
        shape: Examples of the batch, and tokens of each.
    """

    expert: torch.Tensor
    token: torch.Tensor
    gate: torch.Tensor
    n_experts: int
    shape: tuple[int, int]

    @property
    def batch(self) -> int:
        """Number of examples."""
        return self.shape[0]

    def within(self, mask: torch.Tensor) -> RoutedActivations:
        """All rows, but of no expert where a mask, bool [batch, tokens], leaves a row's token out."""
        inside = mask.to(self.token.device).flatten()[self.token]
        return replace(self, expert=torch.where(inside, self.expert, self.n_experts))

    @property
    def example(self) -> torch.Tensor:
        """int64 [rows], the example that each row is of."""
        return self.token // self.shape[1]

    @staticmethod
    def joined(parts: Sequence[Activations]) -> RoutedActivations:
        """The rows of several parts of one forward."""
        first = parts[0]
        assert isinstance(first, RoutedActivations)
        if len(parts) == 1:
            return first

        def every(name: str) -> torch.Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        return replace(first, values=every("values"), expert=every("expert"), token=every("token"), gate=every("gate"))

    def scaled(
        self, scale: torch.Tensor, shift: torch.Tensor | None = None, condition: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values, each row's scaled by the factors of its example's condition and its expert."""
        row = self.expert.clamp(max=self.n_experts - 1)
        if condition is not None:
            row = row + condition.to(row.device)[self.example] * self.n_experts
        units = self.values.shape[-1]
        shifts = None if shift is None else shift.reshape(-1, units)
        scaled = ops.neuron_scale(self.values, scale.reshape(-1, units), shifts, row)
        return scaled if shift is None else torch.where((self.expert < self.n_experts)[:, None], scaled, self.values)

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over an example's tokens, float64 [batch, D], of something that is shaped like `values`."""
        units = values.shape[-1]
        shape = (self.batch * self.n_experts + 1, units)  # the last one for rows of no expert
        sums = values.new_zeros(shape)
        place = torch.where(self.expert < self.n_experts, self.example * self.n_experts + self.expert, len(sums) - 1)
        return sums.index_add_(0, place, values)[:-1].view(self.batch, -1).double()

    def pooled(self, pool: Pool, mask: torch.Tensor | None) -> torch.Tensor:
        """One row per example [batch, D] of gate x activation, which is 0 where a token was not routed.

        Args:
            pool: `"mean"` over all tokens of the example, `"cls"`, `"last"` or `"max"`.
            mask: bool [batch, tokens], False for padding; None without.
        """
        dtype = accumulation_dtype(self.values.dtype)
        x = self.values.to(dtype) * self.gate.to(dtype)[:, None]
        tokens = self.shape[1]
        here = torch.ones(self.shape, dtype=torch.bool, device=x.device) if mask is None else mask
        if pool == "max":
            row = self._largest(x, here)
        else:
            if pool != "mean":
                order = torch.arange(tokens, device=x.device)
                at = (
                    torch.where(here, order, tokens).amin(1) if pool == "cls" else torch.where(here, order, -1).amax(1)
                )  # [batch]
                here = here & (order == at[:, None])
            counted = x if mask is None and pool == "mean" else torch.where(here.flatten()[self.token][:, None], x, 0)
            row = self.summed(counted) / here.sum(1)[:, None]
        return torch.where(here.any(1)[:, None], row, torch.nan)

    def routed_share(self, pool: Pool, mask: torch.Tensor | None) -> torch.Tensor:
        """Share of each example's tokens that were routed to each expert [batch, experts].

        Args:
            pool: Which tokens count: with `"cls"` or `"last"` that one, else all.
            mask: bool [batch, tokens], False for padding; None without.
        """
        one = torch.ones(len(self.token), dtype=torch.float32, device=self.token.device)
        return replace(self, values=one[:, None], gate=one).pooled("mean" if pool == "max" else pool, mask)

    def _largest(self, x: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        """Largest row of each example and expert [batch, D]; 0 counts where a token was not routed to it."""
        real = here.flatten()[self.token] & (self.expert < self.n_experts)
        segments = self.batch * self.n_experts
        place = torch.where(real, self.example * self.n_experts + self.expert, segments)  # the last one: of no expert
        largest = x.new_full((segments + 1, x.shape[-1]), -torch.inf)
        largest.scatter_reduce_(0, place[:, None].expand_as(x), x, "amax")
        routed = here.new_zeros(segments + 1, dtype=torch.int64).index_add_(0, place, torch.ones_like(place))[:-1]
        passed = (routed.view(self.batch, -1) < here.sum(1)[:, None]).flatten()[:, None]  # [batch * experts, 1]
        return torch.where(passed, largest[:-1].clamp(min=0), largest[:-1]).view(self.batch, -1)
