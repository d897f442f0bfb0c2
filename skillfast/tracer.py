"""`Tracer`: hooks that read the neurons of each forward into an accumulator."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast.errors import ArgumentError, ModelError
from skillfast.models.sites import Site, choose_sites, fingerprint, refuse_compiled
from skillfast.statistics import distributed
from skillfast.statistics.inputs import as_tensor
from skillfast.statistics.neuron_scores import OF_NEURONS
from skillfast.statistics.neuron_statistics import NeuronStatistics
from skillfast.statistics.planning import state_bytes
from skillfast.statistics.scoring import warn_of_reasons
from skillfast.vocabulary import POOLS, STATISTICS, Pool

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike

    from skillfast.metrics import Metric
    from skillfast.statistics.neuron_scores import NeuronScores


def pool_tokens(x: torch.Tensor, pool: Pool, out: torch.Tensor) -> None:
    """Write one row per sample: x [batch, tokens..., D] or [batch, D] into out [batch, D]."""
    if x.dim() == 2:
        out.copy_(x)
        return
    x = x.flatten(1, -2)  # [batch, tokens, D]
    if pool == "mean":
        torch.mean(x, 1, dtype=out.dtype, out=out)
    elif pool == "max":
        out.copy_(x.amax(1))
    else:
        out.copy_(x[:, 0 if pool == "cls" else -1])


class _DeviceRows:
    """The sites on one device: their accumulator, and the rows of the forward that runs."""

    def __init__(self, sites: Sequence[Site], statistics: NeuronStatistics) -> None:
        self.statistics = statistics
        ends = np.cumsum([site.width for site in sites]).tolist()
        self.columns = {site.name: slice(end - site.width, end) for site, end in zip(sites, ends, strict=True)}
        self.rows: torch.Tensor | None = None  # [batch, sum of widths], written by the hooks
        self.fired: set[str] = set()

    def write(self, site: Site, x: torch.Tensor, pool: Pool) -> None:
        if site.name in self.fired:
            raise ModelError(
                f"{site.name}: expected one forward per step, got a second; call tracer.step() after each forward, "
                "or tracer.discard() to leave one out"
            )
        if self.rows is None:
            self.rows = self.statistics.reserve(x.shape[0])
        if x.shape[0] != self.rows.shape[0]:
            raise ModelError(
                f"{site.name}: expected one row per sample ({self.rows.shape[0]}), got activations of shape "
                f"{list(x.shape)}; models that fold tokens into the batch are not supported"
            )
        self.fired.add(site.name)
        pool_tokens(x.detach(), pool, self.rows[:, self.columns[site.name]])

    def count(self, values: Mapping[str, Any], valid: torch.Tensor | None, groups: Any) -> None:
        if self.rows is None:
            return
        for name in self.columns.keys() - self.fired:
            self.rows[:, self.columns[name]] = torch.nan  # never a row of an earlier batch
        n = self.rows.shape[0]
        if valid is not None:
            keep = torch.as_tensor(valid, device=self.statistics.device)
            values = {name: as_tensor(v, keep.device) for name, v in values.items()}
            for name, value in values.items():
                if value.shape != (n,):
                    raise ArgumentError(f"metric {name!r}: expected {n} values, got shape {list(value.shape)}")
            if keep.shape != (n,) or keep.dtype != torch.bool:
                raise ArgumentError(f"valid: expected {n} booleans, got shape {list(keep.shape)} of {keep.dtype}")
            kept = self.rows[keep]
            self.rows[: len(kept)] = kept
            values = {name: value[keep] for name, value in values.items()}
            groups = None if groups is None else torch.as_tensor(groups, device=keep.device)[keep]
            n = len(kept)
        self.statistics.commit(self.statistics.check(values, n), groups)
        self.discard()

    def discard(self) -> None:
        self.rows = None
        self.fired = set()


class Tracer:
    """Correlates neurons with metrics inside a loop of your own.

    Each forward of the model inside the context is followed by one `step` with the metrics' values. Nothing is kept
    per sample but one buffer of rows.

    Args:
        model: The model whose `forward` runs inside the context.
        metrics: Name -> `Categorical`, `Binary` or `Continuous`.
        sites: Kinds (`"mlp"`, `"attn"`, `"head"`) or names (`"blocks.3.mlp"`).
        pool: How the tokens of an example become one observation: `"mean"`, `"cls"` (first token), `"max"`, `"last"`.
        statistics: Which statistics to compute: `"pearson"`, `"spearman"`, `"auroc"`, `"mutual_info"`.
        cells: Cells per neuron for all but Pearson's r; 2 to 256.
        confidence: Replicates of a bootstrap for intervals of Pearson's r, 64 say; None for none.
        seed: Of the replicates.
        buffer_rows: Observations collected before one update of the state.

    Raises:
        ArgumentError: An unknown site, pool or statistic.
        ModelError: A model without known sites, or one wrapped by `torch.compile`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        metrics: Mapping[str, Metric],
        *,
        sites: Sequence[str] = ("mlp", "attn", "head"),
        pool: Pool = "mean",
        statistics: Sequence[str] = STATISTICS,
        cells: int = 128,
        confidence: int | None = None,
        seed: int = 0,
        buffer_rows: int = 512,
    ) -> None:
        refuse_compiled(model)
        reserved = {"self", "valid", "groups"} & set(metrics)
        if reserved:
            raise ArgumentError(f"metrics: expected other names than step() has of its own, got {', '.join(reserved)}")
        if pool not in POOLS:
            raise ArgumentError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")
        self._model = model
        self._pool = pool
        self.sites = choose_sites(model, sites)
        self._seen: set[str] = set()
        self._handles: list[Any] = []
        by_device: dict[torch.device, list[Site]] = {}
        for site in self.sites:
            by_device.setdefault(next(model.get_submodule(site.path).parameters()).device, []).append(site)
        self._devices: dict[str, _DeviceRows] = {}
        for device, members in by_device.items():
            width = sum(site.width for site in members)
            _warn_of_size(device, width, state_bytes(width, metrics, statistics, cells, confidence))
            accumulator = NeuronStatistics(
                width,
                metrics,
                statistics,
                cells=cells,
                confidence=confidence,
                seed=seed,
                buffer_rows=buffer_rows,
                device=device,
            )
            rows = _DeviceRows(members, accumulator)
            self._devices |= {site.name: rows for site in members}

    def _groups(self) -> list[_DeviceRows]:
        return list(dict.fromkeys(self._devices.values()))

    def __enter__(self) -> Tracer:
        for site in self.sites:

            def read(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], site: Site = site) -> None:
                self._devices[site.name].write(site, args[0], self._pool)

            self._handles.append(self._model.get_submodule(site.path).register_forward_pre_hook(read))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
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
            groups: [batch] whole numbers; observations of one group are resampled together for `confidence`.
            **values: One [batch] array per metric.

        Raises:
            ArgumentError: Values that do not fit the metrics or the batch.
            ModelError: No site saw a forward since the last step.
        """
        fired = set().union(*(group.fired for group in self._groups()))
        if not fired:
            raise ModelError("step: expected a forward of the traced model since the last step, got none")
        self._seen |= fired
        for group in self._groups():
            group.count(values, valid, groups)

    def _require_step(self, what: str) -> None:
        """Rows of an open forward lie in the accumulator's buffer, which must not be emptied under them."""
        if any(group.rows is not None for group in self._groups()):
            raise ModelError(
                f"{what}: expected step() or discard() after the last forward, got neither; call one first"
            )

    def discard(self) -> None:
        """Forget the last forward instead of counting it."""
        for group in self._groups():
            group.discard()

    def calibrate(self) -> None:
        """Let the observations so far, random ones, set the cell edges, and forget them; count from zero.

        Raises:
            ArgumentError: None so far, or too many (16 per cell).
        """
        self._require_step("calibrate")
        for group in self._groups():
            group.statistics.calibrate_on_counted()

    def all_reduce(self, group: Any = None) -> None:
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
        computed = {id(group): group.statistics.scores() for group in self._groups()}
        parts = [self._site_scores(site, computed) for site in self.sites]
        starts = np.cumsum([0, *(site.width for site in self.sites)]).tolist()
        reasons = {
            name: tuple(
                i + start
                for site, part, start in zip(self.sites, parts, starts, strict=False)
                if site.name in self._seen
                for i in part.reasons.get(name, ())
            )
            for name in OF_NEURONS
        }
        for name in ("constant_metric", "metric_beyond_float32"):
            reasons[name] = parts[0].reasons.get(name, ())
        reasons["hook_never_fired"] = tuple(site.name for site in self.sites if site.name not in self._seen)
        arrays: dict[str, Any] = {
            name: np.concatenate([part.arrays()[name] for part in parts]) for name in parts[0].arrays()
        }
        scores = replace(
            parts[0],
            **arrays,
            sites=self.sites,
            reasons={name: where for name, where in reasons.items() if where},
            pool=self._pool,
            fingerprint=fingerprint(self._model),
        )
        warn_of_reasons(scores)
        return scores

    def _site_scores(self, site: Site, computed: Mapping[int, NeuronScores]) -> NeuronScores:
        group = self._devices[site.name]
        members = tuple(s for s in self.sites if self._devices[s.name] is group)
        return replace(computed[id(group)], sites=members)[site.name]


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device, in bytes; None where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _warn_of_size(device: torch.device, neurons: int, needed: int) -> None:
    """Says before the pass that its state will not fit, and what to turn down."""
    free = free_bytes(device)
    if free is not None and needed > free:
        warnings.warn(
            f"the state of {neurons:,} neurons takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on "
            f"{device}: trace Pearson's r alone, with fewer cells, or some of the sites at a time",
            RuntimeWarning,
            stacklevel=3,
        )
