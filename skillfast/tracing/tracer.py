"""`Tracer`: reads the neurons of each forward into an accumulator."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast.errors import ArgumentError, ModelError
from skillfast.memory.state import state_bytes, warn_of_state
from skillfast.models.sites import (
    Site,
    choose_sites,
    fingerprint,
    module_device,
    refuse_compiled,
    router_of,
    unwrap_compiled,
)
from skillfast.models.watching import on_samples
from skillfast.statistics import distributed
from skillfast.statistics.accumulator import NeuronStatistics
from skillfast.statistics.bins.edges import exact_rows
from skillfast.statistics.bootstrap import adjusted
from skillfast.statistics.routed import RoutedStatistics
from skillfast.statistics.scores import OF_NEURONS
from skillfast.statistics.scoring import warn_of_reasons
from skillfast.statistics.state import needs_bins
from skillfast.statistics.tokens import TokenMask, TokenStatistics
from skillfast.tracing.capture import reading, reading_routed
from skillfast.tracing.gates import RoutedGate
from skillfast.tracing.observations import Expected, PooledRows, RoutedTokens, TokenRows
from skillfast.tracing.prepared import prepared
from skillfast.vocabulary import BINS, BUFFER_ROWS, POOLS, STATISTICS, Pool

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike

    from skillfast.metrics import Metric
    from skillfast.statistics.scores import NeuronScores


Rows = PooledRows | TokenRows | RoutedTokens


class Tracer:
    """Correlates neurons with metrics inside a loop of your own.

    Each forward of the model inside the context is followed by one `step` with the metrics' values. Nothing is kept
    per sample but one buffer of rows.

    Args:
        model: The model whose `forward` runs inside the context.
        metrics: Name -> `Categorical`, `Binary` or `Continuous`.
        sites: Kinds (`"mlp"`, `"attn"`, `"head"`) or names (`"blocks.3.mlp"`).
        pool: How the tokens of an example become one observation: `"mean"`, `"cls"` (first token), `"max"`, `"last"`;
            `"none"`: each token is an observation.
        statistics: Which statistics to compute: `"pearson"`, `"spearman"`, `"auroc"`, `"mutual_info"`. With tokens as
            observations Pearson's r counts every token, the others a sample in which each token is with the same
            probability: all up to 16 per bin, in long runs a 32nd.
        bins: Bins per neuron for all but Pearson's r; 2 to 256.
        n_bootstrap: Replicates of a bootstrap for intervals of Pearson's r, 64 say; None for none.
        seed: Seed of the bootstrap's replicates.
        buffer_rows: Observations collected before one update of the state; by default 512, on a GPU as many pooled rows
            as are kept before the bins have edges (16 per bin), so that tables are read and written rarely.

    Raises:
        ArgumentError: An unknown site, pool or statistic.
        ModelError: A model without known sites, or one wrapped by `torch.compile` that was not prepared (`prepare`).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        metrics: Mapping[str, Metric],
        *,
        sites: Sequence[str] | None = None,
        pool: Pool = "mean",
        statistics: Sequence[str] = STATISTICS,
        bins: int = BINS,
        n_bootstrap: int | None = None,
        seed: int = 0,
        buffer_rows: int | None = None,
    ) -> None:
        self._prepared = prepared(model)
        if self._prepared is None:
            refuse_compiled(model)
        model = unwrap_compiled(model)
        reserved = {"self", "valid", "groups", "mask"} & set(metrics)
        if reserved:
            raise ArgumentError(
                f"metrics: expected other names than step() has of its own, got {', '.join(sorted(reserved))}"
            )
        if pool not in POOLS:
            raise ArgumentError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")
        self._model = model
        self._pool = pool
        self._metrics = tuple(metrics)
        self.sites = choose_sites(model, sites) if self._prepared is None else self._prepared.chosen(model, sites, pool)
        self._forwards: dict[str, tuple[int, int, int, int]] = {}  # of a prepared model, those that were counted
        self._seen: set[str] = set()
        self._stack = ExitStack()
        self._expected = Expected()
        by_group: dict[tuple[torch.device, str], list[Site]] = {}
        for site in self.sites:
            device = module_device(model.get_submodule(site.path))
            # A classifier may see one row of an example whose blocks see many tokens, an expert some of the tokens.
            apart = "" if pool != "none" or not (site.kind == "head" or site.experts) else site.name
            by_group.setdefault((device, apart), []).append(site)
        self._rows: dict[str, Rows] = {}  # site -> the group that it is in
        for (device, _), members in by_group.items():
            width = sum(site.width for site in members)
            if pool != "none":  # and the share of an example's tokens at each expert
                width += sum(site.experts or 0 for site in members if site.kind == "expert")
            warn_of_state(device, width, state_bytes(width, metrics, statistics, bins, n_bootstrap))
            settings: dict[str, Any] = {
                "bins": bins, "n_bootstrap": n_bootstrap, "seed": seed, "device": device,
                "buffer_rows": BUFFER_ROWS if buffer_rows is None else buffer_rows,
            }  # fmt: skip
            rows: Rows
            if pool == "none" and (experts := members[0].experts) is not None:
                routed = RoutedStatistics(experts, width // experts, metrics, statistics, **settings)
                rows = RoutedTokens(members[0], self._expected, routed)
            elif pool == "none":
                tokens = TokenStatistics(width, metrics, statistics, **settings)
                rows = TokenRows(members, self._expected, tokens)
            else:
                if buffer_rows is None and device.type == "cuda" and needs_bins(statistics):
                    settings["buffer_rows"] = exact_rows(bins)
                pooled = NeuronStatistics(width, metrics, statistics, **settings)
                rows = PooledRows(members, self._expected, pooled, pool)
            self._rows |= {site.name: rows for site in members}

    def _groups(self) -> list[Rows]:
        return list(dict.fromkeys(self._rows.values()))

    def __enter__(self) -> Tracer:
        if self._prepared is not None:
            self._forwards = self._prepared.forwards(self._model)
            return self
        with ExitStack() as stack:  # undoes what was done where a later site fails
            stack.callback(on_samples(self._model, self._expected.begin).remove)
            for site in self.sites:
                rows = self._rows[site.name]
                if site.experts is not None:
                    assert not isinstance(rows, TokenRows)
                    stack.enter_context(reading_routed(self._model, site, partial(rows.read_routed, site)))
                else:
                    assert not isinstance(rows, RoutedTokens)
                    stack.enter_context(reading(self._model, site, partial(rows.read, site)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.discard()

    @property
    def n_observations(self) -> int:
        """Observations counted so far."""
        return self._groups()[0].statistics.n_observations

    @property
    def state_bytes(self) -> int:
        """Size of all state and buffers, in bytes."""
        return sum(group.statistics.state_bytes for group in self._groups())

    def step(
        self,
        *,
        valid: torch.Tensor | None = None,
        groups: ArrayLike | torch.Tensor | None = None,
        **values: ArrayLike | torch.Tensor,
    ) -> None:
        """Count the observations of the last forward.

        Args:
            valid: bool [batch]; rows that are False are left out (padding of a last batch, repeated samples).
            groups: [batch] whole numbers; observations of one group are resampled together for `n_bootstrap`. The
                tokens of an example are a group by themselves.
            **values: One [batch] array per metric; those that `expect` was told are left out.

        Raises:
            ArgumentError: Values that do not fit the metrics or the batch.
            ModelError: No site saw a forward since the last step.
        """
        self._fetch()
        fired = set().union(*(group.fired for group in self._groups()))
        if not fired:
            larger = "" if self._prepared is None else f"; it is prepared for batches of up to {self._prepared.most}"
            raise ModelError(f"step: expected a forward of the traced model since the last step, got none{larger}")
        self._seen |= fired
        if self._pool != "none":
            values = {**self._expected.values, **values}
        for group in self._groups():
            group.count(values, valid, groups)
        self._expect_nothing()

    def _fetch(self) -> None:
        """Read what a forward of a prepared model left in its buffers."""
        if self._prepared is None:
            return
        before, self._forwards = self._forwards, self._prepared.forwards(self._model)
        for site in self.sites:
            times, n, tokens, routed = self._forwards[site.name]
            times -= before[site.name][0]
            if times > 1:
                raise ModelError(
                    f"{site.name}: expected one forward per step, got {times}; call tracer.step() after each forward, "
                    "or tracer.discard() to leave one out"
                )
            if times:
                mask = self._expected.mask
                if mask is not None and mask.shape[1] != tokens > 1:
                    raise ArgumentError(
                        f"mask: expected one for the {n} x {tokens} tokens of {site.name}, got shape "
                        f"{list(mask.shape)}; give the mask of what runs through the blocks"
                    )
                gate, group = self._prepared.gate(self._model, site), self._rows[site.name]
                if isinstance(gate, RoutedGate):
                    assert not isinstance(group, TokenRows)
                    group.read_routed(site, gate.last(n, tokens, routed))
                else:
                    assert not isinstance(group, RoutedTokens)
                    group.read(site, gate.last(n, tokens, None if mask is None else mask.shape[1]), "identity", False)

    def expect(self, mask: ArrayLike | torch.Tensor | None = None, **values: ArrayLike | torch.Tensor) -> None:
        """Tell what is known of the next forward before it runs.

        Args:
            mask: [batch, tokens], true or 1 for real tokens: padding is left out of every observation.
            **values: Metrics that are known already; `step` is then called without them. With tokens as observations
                either every metric or none, [batch] or [batch, tokens]; they are accumulated inside the layers.

        Raises:
            ArgumentError: An unknown metric, or a mask that is not [batch, tokens].
            ModelError: A forward waits for its step.
        """
        self._require_step("expect")
        metrics = self._metrics
        unknown = [name for name in values if name not in metrics]
        if unknown or (self._pool == "none" and values and len(values) < len(metrics)):
            wanted = "all" if self._pool == "none" else "some"
            raise ArgumentError(
                f"expect: expected {wanted} of the metrics {', '.join(metrics)}, got {', '.join(values)}; the others "
                "may be told to step() where each has one value per example"
            )
        self._expect_nothing()
        if mask is not None:
            tensor = torch.as_tensor(mask)
            if tensor.dim() != 2:
                raise ArgumentError(
                    f"mask: expected [batch, tokens], got shape {list(tensor.shape)}; 1 for real tokens"
                )
            self._expected.mask = TokenMask(tensor != 0)
        if self._prepared is not None:
            self._prepared.expect(self._model, self._expected.mask)
        self._expected.values = {name: torch.as_tensor(value) for name, value in values.items()}

    def _expect_nothing(self) -> None:
        self._expected.mask, self._expected.values, self._expected.samples = None, {}, None

    def _require_step(self, what: str) -> None:
        """Rows of an open forward lie in the accumulator's buffer, which must not be emptied under them."""
        if any(group.open for group in self._groups()):
            raise ModelError(
                f"{what}: expected step() or discard() after the last forward, got neither; call one first"
            )

    def discard(self) -> None:
        """Forget the last forward instead of counting it."""
        for group in self._groups():
            group.discard()
        if self._prepared is not None:
            self._forwards = self._prepared.forwards(self._model)
        self._expect_nothing()

    def calibrate(self) -> None:
        """Let the observations so far, random ones, set the bin edges, and forget them; count from zero.

        Raises:
            ArgumentError: None so far, or too many (16 per bin).
        """
        self._require_step("calibrate")
        for group in self._groups():
            group.calibrate()

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Sum over the processes of a `torch.distributed` group; see `NeuronStatistics.all_reduce`."""
        self._require_step("all_reduce")
        for rows in self._groups():
            rows.statistics.all_reduce(group)
        self._seen = set().union(*distributed.gather(self._seen, group))

    def compute(self) -> NeuronScores:
        """The scores of everything counted; warns once about neurons or metrics that have none.

        Raises:
            ArgumentError: Nothing was counted.
        """
        self._require_step("compute")
        computed = {id(group): group.scores() for group in self._groups()}
        parts = [self._site_scores(site, computed) for site in self.sites]
        silent = tuple(site.name for site in self.sites if site.name not in self._seen)
        routed = [part for group in self._groups() if (part := _routed(group, computed[id(group)])) is not None]
        scores = replace(self._joined(parts, silent), routed=self._joined(routed, ()) if routed else None)
        warn_of_reasons(scores)
        return scores

    def _joined(self, parts: Sequence[NeuronScores], silent: tuple[str, ...]) -> NeuronScores:
        """Scores of several sites; of those that never fired no neuron has a reason of its own."""
        starts = np.cumsum([0, *(part.n_neurons for part in parts)]).tolist()
        reasons = {
            name: tuple(
                i + start
                for part, start in zip(parts, starts, strict=False)
                if not {site.name for site in part.sites} & set(silent)
                for i in part.reasons.get(name, ())
            )
            for name in OF_NEURONS
        }
        for name in ("constant_metric", "metric_beyond_float32"):
            reasons[name] = parts[0].reasons.get(name, ())
        reasons["hook_never_fired"] = silent
        if any(part.n_routed is not None for part in parts):
            parts = [
                replace(part, n_routed=np.full(part.n_neurons, part.n_observations)) if part.n_routed is None else part
                for part in parts
            ]
        arrays: dict[str, Any] = {
            name: np.concatenate([part.arrays()[name] for part in parts]) for name in parts[0].arrays()
        }
        if "pearson_p" in arrays:  # over all neurons, on however many devices they are
            arrays["pearson_q"] = adjusted(arrays["pearson_p"])
        return replace(
            parts[0],
            **arrays,
            sites=tuple(site for part in parts for site in part.sites),
            reasons={name: where for name, where in reasons.items() if where},
            between=next((part.between for part in parts if part.between is not None), None),
            pool=self._pool,
            fingerprint=fingerprint(self._model),
        )

    def _site_scores(self, site: Site, computed: Mapping[int, NeuronScores]) -> NeuronScores:
        group = self._rows[site.name]
        return replace(computed[id(group)], sites=group.sites)[site.name]


def _routed(group: Rows, scores: NeuronScores) -> NeuronScores | None:
    """Scores of the shares of tokens at the experts of a group, by the sites of their routers; None without experts."""
    if not isinstance(group, PooledRows) or group.routed.start == group.routed.stop:
        return None
    return scores.taken(group.routed, tuple(router_of(site) for site in group.sites if site.kind == "expert"))
