"""`RoutedStatistics`: units of experts over the tokens that were routed to each, an accumulator per expert."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from skillfast.errors import ArgumentError
from skillfast.statistics.accumulator import NeuronStatistics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from skillfast.metrics import Metric
    from skillfast.statistics.scores import NeuronScores

LEAST = 10  # tokens of an expert, below which its units have no scores


class RoutedStatistics:
    """Correlates the units of a block's experts with every metric; each expert has its own number of observations.

    Args:
        n_experts: Number of experts.
        units: Neurons of each.
        metrics: Name -> kind of metric.
        statistics: Which statistics to compute.
        **settings: What else `NeuronStatistics` takes, for each accumulator.
    """

    def __init__(
        self, n_experts: int, units: int, metrics: Mapping[str, Metric], statistics: Sequence[str], **settings: Any
    ) -> None:
        self._made = partial(NeuronStatistics, units, metrics, statistics, **settings)
        self.units = units
        self.experts = [self._made() for _ in range(n_experts)]

    @property
    def n_observations(self) -> int:
        """Pairs of a token and an expert counted so far."""
        return sum(expert.n_observations for expert in self.experts)

    @property
    def state_bytes(self) -> int:
        """Size of all state and buffers, in bytes."""
        return sum(expert.state_bytes for expert in self.experts)

    def add(
        self, expert: torch.Tensor, x: torch.Tensor, values: Mapping[str, torch.Tensor], groups: torch.Tensor
    ) -> None:
        """Count rows.

        Args:
            expert: int64 [rows].
            x: [rows, units].
            values: Metric -> [rows].
            groups: int64 [rows], the example of each.
        """
        order = expert.argsort(stable=True)
        start = 0
        for statistics, n in zip(self.experts, expert.bincount(minlength=len(self.experts)).tolist(), strict=True):
            at = order[start : start + n]
            start += n
            if n:
                own = {name: value.index_select(0, at) for name, value in values.items()}
                statistics.update(x.index_select(0, at), own, groups=groups.index_select(0, at))

    def forget(self) -> None:
        """Forget all that was counted."""
        self.experts = [self._made() for _ in self.experts]

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Sum over the processes of a `torch.distributed` group."""
        for expert in self.experts:
            expert.all_reduce(group)

    def scores(self) -> NeuronScores:
        """Scores of all units, expert after expert; NaN for those of experts with too few tokens.

        Raises:
            ArgumentError: No expert had enough.
        """
        found = {e: expert.scores() for e, expert in enumerate(self.experts) if expert.n_observations >= LEAST}
        if not found:
            raise ArgumentError(
                f"pool 'none': expected at least {LEAST} tokens that were routed to one expert, got fewer; trace more "
                "data, or pool='mean'"
            )
        known = next(iter(found.values()))
        arrays = {
            name: np.concatenate(
                [
                    found[e].arrays()[name] if e in found else np.full_like(like, np.nan)
                    for e in range(len(self.experts))
                ]
            )
            for name, like in known.arrays().items()
        }
        reasons: dict[str, list[int]] = {}
        for e in range(len(self.experts)):
            own = range(e * self.units, (e + 1) * self.units)
            if e not in found:
                reasons.setdefault("too_few_tokens", []).extend(own)
                continue
            for name, where in found[e].reasons.items():
                if name in ("constant_metric", "metric_beyond_float32"):
                    reasons.setdefault("constant_where_routed", []).extend(own)
                else:
                    reasons.setdefault(name, []).extend(e * self.units + i for i in where)
        return replace(
            known,
            **arrays,  # type: ignore[arg-type]  # each is one of its arrays
            n_observations=self.n_observations,
            n_ranked=None if known.n_ranked is None else self.n_observations,
            n_routed=np.repeat([expert.n_observations for expert in self.experts], self.units),
            reasons={name: tuple(where) for name, where in reasons.items()},
        )
