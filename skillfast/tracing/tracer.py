"""`Tracer`: reads the neurons of each forward into an accumulator."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from msgspec import Meta

from skillfast.errors import ArgumentError, ModelError
from skillfast.memory.state import state_bytes, warn_of_state
from skillfast.metrics import to_json
from skillfast.models.digests import sampled_digest
from skillfast.models.shards import shards_of
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
from skillfast.results.records import Document, Positive, Record
from skillfast.statistics import distributed, persistence
from skillfast.statistics.accumulator import NeuronStatistics
from skillfast.statistics.bins.edges import exact_rows
from skillfast.statistics.bootstrap import adjusted
from skillfast.statistics.persistence import DAMAGED
from skillfast.statistics.routed import RoutedStatistics
from skillfast.statistics.scores import OF_NEURONS
from skillfast.statistics.scoring import warn_of_reasons
from skillfast.statistics.state import needs_bins, refuse_other
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
    from skillfast.statistics.bootstrap import Replicates
    from skillfast.statistics.scores import NeuronScores


Rows = PooledRows | TokenRows | RoutedTokens
Statistics = NeuronStatistics | TokenStatistics | RoutedStatistics
FILE = "tracer.safetensors"
SCHEMA = "skillfast.tracer/1"


@dataclass(frozen=True)
class _Counting:
    """What a tracer counts of its sites, and how; its arguments."""

    metrics: dict[str, Metric]
    pool: Pool
    statistics: tuple[str, ...]
    bins: int
    n_bootstrap: int | None
    seed: int
    buffer_rows: int | None

    def accumulator(self, members: Sequence[Site], device: torch.device) -> Statistics:
        """An accumulator of some sites' neurons that has counted nothing."""
        width, experts = _width(members, self.pool), members[0].experts
        settings: dict[str, Any] = {
            "bins": self.bins, "n_bootstrap": self.n_bootstrap, "seed": self.seed, "device": device,
            "buffer_rows": BUFFER_ROWS if self.buffer_rows is None else self.buffer_rows,
        }  # fmt: skip
        if self.pool == "none" and experts is not None:
            return RoutedStatistics(experts, width // experts, self.metrics, self.statistics, **settings)
        if self.pool == "none":
            return TokenStatistics(width, self.metrics, self.statistics, **settings)
        if self.buffer_rows is None and device.type == "cuda" and needs_bins(self.statistics):
            settings["buffer_rows"] = exact_rows(self.bins)
        return NeuronStatistics(width, self.metrics, self.statistics, **settings)


def _width(members: Sequence[Site], pool: Pool) -> int:
    """Neurons of some sites, and unless tokens are observations the share of an example's tokens at each expert."""
    shares = 0 if pool == "none" else sum(site.experts or 0 for site in members if site.kind == "expert")
    return sum(site.width for site in members) + shares


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
        self._begin(
            model, sites, _Counting(dict(metrics), pool, tuple(statistics), bins, n_bootstrap, seed, buffer_rows)
        )
        by_group: dict[tuple[torch.device, str], list[Site]] = {}
        for site in self._counted:
            device = module_device(self._model.get_submodule(site.path))
            # A classifier may see one row of an example whose blocks see many tokens, an expert some of the tokens.
            apart = "" if pool != "none" or not (site.kind == "head" or site.experts) else site.name
            by_group.setdefault((device, apart), []).append(site)
        for (device, _), members in by_group.items():
            width = _width(members, pool)
            warn_of_state(device, width, state_bytes(width, metrics, statistics, bins, n_bootstrap))
            self._take(members, self._counting.accumulator(members, device))

    def _begin(self, model: torch.nn.Module, sites: Sequence[str] | None, counting: _Counting) -> None:
        """Everything but accumulators; raises where model, sites and settings do not fit."""
        self._prepared = prepared(model)
        if self._prepared is None:
            refuse_compiled(model)
        model = unwrap_compiled(model)
        reserved = {"self", "valid", "groups", "mask"} & set(counting.metrics)
        if reserved:
            raise ArgumentError(
                f"metrics: expected other names than step() has of its own, got {', '.join(sorted(reserved))}; "
                "rename them"
            )
        pool = counting.pool
        if pool not in POOLS:
            raise ArgumentError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")
        self._model = model
        self._counting = counting
        self.sites = choose_sites(model, sites) if self._prepared is None else self._prepared.chosen(model, sites, pool)
        self._shards = None if self._prepared is not None else shards_of(model, self.sites)
        self._counted = self.sites if self._shards is None else self._shards.counted(self.sites)
        self._forwards: dict[str, tuple[int, int, int, int]] = {}  # of a prepared model, those that were counted
        self._seen: set[str] = set()
        self._stack = ExitStack()
        self._expected = Expected()
        self._rows: dict[str, Rows] = {}  # site -> the group that it is in

    def _take(self, members: Sequence[Site], statistics: Statistics) -> None:
        """Let an accumulator count what some sites see."""
        rows: Rows
        if isinstance(statistics, RoutedStatistics):
            rows = RoutedTokens(members[0], self._expected, statistics)
        elif isinstance(statistics, TokenStatistics):
            rows = TokenRows(members, self._expected, statistics)
        else:
            rows = PooledRows(members, self._expected, statistics, self._counting.pool)
        self._rows |= {site.name: rows for site in members}

    def _groups(self) -> list[Rows]:
        return list(dict.fromkeys(self._rows.values()))

    def __enter__(self) -> Tracer:
        if self._prepared is not None:
            self._forwards = self._prepared.forwards(self._model)
            return self
        with ExitStack() as stack:  # undoes what was done where a later site fails
            stack.callback(on_samples(self._model, self._expected.begin).remove)
            for site in self._counted:
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
    def ranks(self) -> bool:
        """Whether any statistic comes from ranks, whose bins need edges."""
        return needs_bins(self._counting.statistics)

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
        if self._counting.pool != "none":
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
        metrics = self._counting.metrics
        unknown = [name for name in values if name not in metrics]
        if unknown or (self._counting.pool == "none" and values and len(values) < len(metrics)):
            wanted = "all" if self._counting.pool == "none" else "some"
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
        """Sum over the processes of a `torch.distributed` group; see `NeuronStatistics.all_reduce`.

        Of a model whose weights are spread over processes (`tp_plan`) those that hold the same neurons add theirs up,
        by default those along the other dimension of the model's device mesh.
        """
        self._require_step("all_reduce")
        if self._shards is not None and group is None:
            group = self._shards.alike
            if group is None:
                raise ArgumentError(
                    "all_reduce: expected the group of processes that hold the same neurons, got none, and a model "
                    "whose mesh has no dimension of them; give group="
                )
        for rows in self._groups():
            rows.statistics.all_reduce(group)
        self._seen = set().union(*distributed.gather(self._seen, group))

    def like(self) -> Tracer:
        """An empty tracer of the same model, sites and settings, with this one's shifts and bin edges: a shard.

        Shards that are made by it can be merged, whatever their data: all count into the same bins, and observations
        of no two share the weights of a bootstrap. `calibrate` this one first where statistics of ranks are wanted.
        """
        self._require_step("like")
        made = Tracer.__new__(Tracer)
        made._begin(self._model, [site.name for site in self.sites], self._counting)
        for group in self._groups():
            made._take(group.sites, group.statistics.like())
        return made

    def _told(self) -> dict[str, Any]:
        """What another tracer must have in common with this one to be merged, by name."""
        counting = self._counting
        return {
            "a model of architecture": fingerprint(self._model),
            "weights of digest": sampled_digest(self._model),
            "sites": [site.name for site in self.sites],
            "sites by device": [[site.name for site in group.sites] for group in self._groups()],
            "metrics": counting.metrics,
            "pool": counting.pool,
            "statistics": counting.statistics,
            "bins": counting.bins,
            "n_bootstrap": counting.n_bootstrap,
            "seed": counting.seed,
        }

    def merge(self, other: Tracer) -> None:
        """Add what another tracer has counted, here or in another process (`save`, `load`); the other stays as it is.

        The scores are then those of one pass over the data of both, but for rounding. Statistics of ranks need shards
        of one `like`, or no more than 16 observations per bin in all of them but one.

        Args:
            other: A tracer of the same model, sites, metrics and settings.

        Raises:
            ArgumentError: Something differs, or the other counts into other bins; nothing is merged then.
            ModelError: A forward of either waits for its step.
        """
        if other is self:
            raise ArgumentError("merge: expected another tracer, got this one itself; its data would count twice")
        self._require_step("merge")
        other._require_step("merge")
        refuse_other(self._told(), other._told(), "trace every part with one model, sites and settings")
        pairs: list[tuple[Any, Any]] = [
            (ours.statistics, theirs.statistics)
            for ours, theirs in zip(self._groups(), other._groups(), strict=True)
        ]  # fmt: skip
        for mine, its in pairs:
            mine.check_merge(its)
        for mine, its in pairs:
            mine.merge(its)
        self._seen |= other._seen

    def state_dict(self) -> dict[str, Any]:
        """All that was counted: plain values and tensors, for `from_state_dict` here or in another process.

        Raises:
            ModelError: A forward waits for its step.
        """
        self._require_step("state_dict")
        return {
            "schema": SCHEMA,
            "architecture": fingerprint(self._model),
            "weights": sampled_digest(self._model),
            **asdict(self._counting),
            "metrics": to_json(self._counting.metrics),
            "statistics": list(self._counting.statistics),
            "seen": sorted(self._seen),
            "groups": {
                str(i): {"sites": [site.name for site in group.sites], "state": group.statistics.state_dict()}
                for i, group in enumerate(self._groups())
            },
        }

    @staticmethod
    def from_state_dict(state: Mapping[str, Any], model: torch.nn.Module) -> Tracer:
        """A tracer that goes on where `state_dict` was taken; its state lies where the model's sites lie.

        Args:
            state: What `state_dict` gave.
            model: The model that was traced, with the weights that it had.

        Raises:
            ArgumentError: Another model, another schema version, or a state that does not fit its settings.
        """
        saved = persistence.record(_Saved, state)
        bare = unwrap_compiled(model)
        refuse_other(
            {"a model of architecture": saved.architecture, "weights of digest": saved.weights},
            {"a model of architecture": fingerprint(bare), "weights of digest": sampled_digest(bare)},
            "give the model that was traced",
            "load",
        )
        groups = [saved.groups[str(i)] for i in range(len(saved.groups))]
        names = [name for group in groups for name in group.sites]
        metrics, statistics = persistence.metrics_of(saved.metrics), tuple(saved.statistics)
        counting = _Counting(
            metrics, saved.pool, statistics, saved.bins, saved.n_bootstrap, saved.seed, saved.buffer_rows
        )
        made = Tracer.__new__(Tracer)
        made._begin(model, names, counting)
        by_name = {site.name: site for site in made.sites}
        if sorted(names) != sorted(by_name) or not set(saved.seen) <= set(names):
            raise ArgumentError(f"state_dict: expected each of {len(by_name)} sites once, got {len(names)}; {DAMAGED}")
        for group in groups:
            members = [by_name[name] for name in group.sites]
            devices = {module_device(made._model.get_submodule(site.path)) for site in members}
            if len(devices) != 1:
                raise ArgumentError(
                    f"load: expected {members[0].name} to {members[-1].name} on one device, as they were traced, got "
                    f"{', '.join(map(str, devices))}; load the model as there, or onto one device"
                )
            empty = counting.accumulator(members, torch.device("meta"))
            counted = type(empty).from_state_dict(group.state, devices.pop())
            if counted.told() != empty.told():
                raise ArgumentError(f"state_dict: expected a state of the tracer's settings, got another; {DAMAGED}")
            made._take(members, counted)
        made._seen = set(saved.seen)
        return made

    def save(self, directory: str | Path) -> Path:
        """Write all that was counted as `tracer.safetensors` into the folder; returns its path.

        Raises:
            ModelError: A forward waits for its step.
        """
        return persistence.write(self.state_dict(), directory, FILE)

    @staticmethod
    def load(directory: str | Path, model: torch.nn.Module) -> Tracer:
        """Go on from what `save` wrote.

        Args:
            directory: The folder.
            model: The model that was traced, with the weights that it had.

        Raises:
            DataError: The file is missing, broken or of another version or model, or does not fit its settings.
        """
        remedy = "write it with Tracer.save"
        return persistence.read(Path(directory) / FILE, SCHEMA, remedy, lambda s: Tracer.from_state_dict(s, model))

    def replicated(self) -> dict[str, tuple[Replicates, slice]]:
        """Site -> replicates of all counted so far, and where in them its neurons stand.

        Raises:
            ModelError: A forward waits for its step, or there are no replicates of pooled rows (`n_bootstrap`).
        """
        self._require_step("replicated")
        found: dict[str, tuple[Replicates, slice]] = {}
        for group in self._groups():
            replicates = group.statistics.replicates if isinstance(group, PooledRows) else None
            if replicates is None:
                raise ModelError("replicated: expected a tracer of pooled rows with n_bootstrap, got another")
            found |= {site.name: (replicates, group.columns[site.name]) for site in group.sites}
        return found

    def compute(self) -> NeuronScores:
        """The scores of everything counted; warns once about neurons or metrics that have none.

        Raises:
            ArgumentError: Nothing was counted.
        """
        self._require_step("compute")
        computed = {id(group): group.scores() for group in self._groups()}
        by_site: Mapping[str, NeuronScores] = {site.name: self._site_scores(site, computed) for site in self._counted}
        seen = self._seen
        if self._shards is not None:
            whole = _whole(self.sites, self._shards.gather(_Part(by_site, self._shards.held, seen)))
            by_site, seen = whole.scores, whole.seen
        parts = [by_site[site.name] for site in self.sites]
        silent = tuple(site.name for site in self.sites if site.name not in seen)
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
            pool=self._counting.pool,
            fingerprint=fingerprint(self._model),
        )

    def _site_scores(self, site: Site, computed: Mapping[int, NeuronScores]) -> NeuronScores:
        group = self._rows[site.name]
        return replace(computed[id(group)], sites=group.sites)[site.name]


@dataclass(frozen=True)
class _Part:
    """What one of the processes that hold a model together has counted.

    Attributes:
        scores: Site -> scores of the neurons that it counted there.
        held: Site -> these neurons' indices, int64; of a site that it holds whole is none.
        seen: Sites that fired there.
    """

    scores: Mapping[str, NeuronScores]
    held: Mapping[str, torch.Tensor]
    seen: set[str]


def _whole(sites: Sequence[Site], parts: Sequence[_Part]) -> _Part:
    """What all processes that hold a model together have counted: the scores of all neurons of each site."""
    counts = {scores.n_observations for part in parts for scores in part.scores.values() if scores.n_routed is None}
    if len(counts) > 1:
        raise ArgumentError(
            f"compute: expected the same batches in the {len(parts)} processes that hold a model together, got "
            f"{min(counts):,} to {max(counts):,} observations; give each of them all data in one order"
        )
    return _Part({site.name: _whole_site(site, parts) for site in sites}, {}, set().union(*(p.seen for p in parts)))


def _whole_site(site: Site, parts: Sequence[_Part]) -> NeuronScores:
    found = [(part.scores[site.name], part.held.get(site.name)) for part in parts if site.name in part.scores]
    first, held = found[0]
    if held is None:
        return first
    index = np.concatenate([at.numpy() for _, at in found if at is not None])
    order = np.argsort(index)
    reasons: dict[str, tuple[Any, ...]] = dict(first.reasons)
    for name in OF_NEURONS:
        where = [int(at[i]) for scores, at in found if at is not None for i in scores.reasons.get(name, ())]
        reasons[name] = tuple(sorted(where))
    arrays: dict[str, Any] = {
        name: np.concatenate([scores.arrays()[name] for scores, _ in found])[order] for name in first.arrays()
    }
    return replace(first, sites=(site,), reasons={k: v for k, v in reasons.items() if v}, **arrays)


def _routed(group: Rows, scores: NeuronScores) -> NeuronScores | None:
    """Scores of the shares of tokens at the experts of a group, by the sites of their routers; None without experts."""
    if not isinstance(group, PooledRows) or group.routed.start == group.routed.stop:
        return None
    return scores.taken(group.routed, tuple(router_of(site) for site in group.sites if site.kind == "expert"))


class _SavedGroup(Record, frozen=True):
    """Sites that share an accumulator, and its state, which is checked as that of others is."""

    sites: Annotated[list[str], Meta(min_length=1)]
    state: dict[str, Any]


class _Saved(Document, frozen=True, tag=SCHEMA, tag_field="schema"):
    """What `Tracer.state_dict` gives."""

    architecture: str
    weights: str
    metrics: dict[str, persistence.SavedMetric]
    pool: Pool
    statistics: list[str]
    bins: Positive
    n_bootstrap: Positive | None
    seed: int
    buffer_rows: Positive | None
    seen: list[str]
    groups: dict[str, _SavedGroup]

    def __post_init__(self) -> None:
        if not self.groups or set(self.groups) != {str(i) for i in range(len(self.groups))}:
            raise ValueError(f"expected groups 0, 1, ... at groups, got {', '.join(self.groups) or 'none'}")
