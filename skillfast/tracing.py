"""Tracing: one streaming pass that correlates every neuron with every metric."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from skillfast import metrics as auxiliary
from skillfast import sampling
from skillfast.errors import ArgumentError, ModelError
from skillfast.models.sites import Site, choose_sites, fingerprint, refuse_compiled, unwrap_compiled
from skillfast.progress import track
from skillfast.statistics import distributed
from skillfast.statistics.cells import exact_rows
from skillfast.statistics.edges import calibration_rows
from skillfast.statistics.neuron_statistics import NeuronStatistics, as_tensor
from skillfast.statistics.planning import state_bytes
from skillfast.statistics.scoring import warn_of_reasons
from skillfast.vocabulary import POOLS, STATISTICS, Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import ArrayLike

    from skillfast.metrics import Metric
    from skillfast.statistics.neuron_scores import NeuronScores

    Forward = Callable[[torch.nn.Module, Any], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]


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
            if keep.shape != (n,) or keep.dtype != torch.bool:
                raise ArgumentError(f"valid: expected {n} booleans, got shape {list(keep.shape)} of {keep.dtype}")
            kept = self.rows[keep]
            self.rows[: len(kept)] = kept
            values = {name: torch.as_tensor(v, device=keep.device)[keep] for name, v in values.items()}
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

    def discard(self) -> None:
        """Forget the last forward instead of counting it."""
        for group in self._groups():
            group.discard()

    def calibrate(self) -> None:
        """Let the observations so far, random ones, set the cell edges, and forget them; count from zero.

        Raises:
            ArgumentError: None so far, or too many (16 per cell).
        """
        for group in self._groups():
            group.statistics.calibrate_on_counted()

    def all_reduce(self, group: Any = None) -> None:
        """Sum over the processes of a `torch.distributed` group; see `NeuronStatistics.all_reduce`."""
        for rows in self._groups():
            rows.statistics.all_reduce(group)
        self._seen = set().union(*distributed.gather(self._seen, group))

    def compute(self) -> NeuronScores:
        """The scores of everything counted; warns once about neurons or metrics that have none.

        Raises:
            ArgumentError: Nothing was counted.
        """
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
            for name in ("constant_neuron", "non_finite_activation", "stale_edges")
        }
        reasons["constant_metric"] = parts[0].reasons.get("constant_metric", ())
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
        return torch.cuda.mem_get_info(device)[0]
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


def classes_of(loader: Iterable[Any], model: torch.nn.Module) -> list[str]:
    """Class names from the loader's dataset, or as many numbers as the model has outputs."""
    names = getattr(getattr(loader, "dataset", None), "classes", None)
    if names is not None:
        return [str(name) for name in names]
    count = getattr(model, "num_classes", None)
    if not isinstance(count, int) or count < 2:
        raise ArgumentError(
            f"classes: expected loader.dataset.classes or model.num_classes, got neither from "
            f"{type(loader).__name__} and {type(model).__name__}; pass classes="
        )
    return [str(i) for i in range(count)]


def classification_forward(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The default `forward`: a batch is (images, labels); gives the logits and label, correct, confidence, loss."""
    device = next(model.parameters()).device
    images, label = batch
    label = label.to(device)
    logits = model(images.to(device))
    return logits, auxiliary.classification_values(logits, label)


def refuse_training(model: torch.nn.Module, what: str) -> None:
    """Raises ModelError for a model in training mode, whose dropout would be traced or ablated too."""
    if model.training:
        raise ModelError(f"{what}: expected a model in evaluation mode, got one in training mode; call model.eval()")


def trace(
    model: torch.nn.Module,
    loader: Iterable[Any],
    metrics: Mapping[str, Metric] | Literal["classification"] = "classification",
    *,
    sites: Sequence[str] = ("mlp", "attn", "head"),
    pool: Pool = "mean",
    statistics: Sequence[str] = STATISTICS,
    cells: int = 128,
    confidence: int | None = None,
    classes: Sequence[str] | int | None = None,
    forward: Forward | None = None,
    quiet: bool = True,
) -> NeuronScores:
    """One pass over a loader: a loop over `Tracer`.

    The cells' edges come from random rows: the first ones of a loader that shuffles, else those of random items that
    run through the model once more before the pass. Under `torch.distributed` with a DistributedSampler every process
    gets the scores of all processes' data, each sample counted once.

    Args:
        model: In evaluation mode, on the device where it shall run.
        loader: Batches; (images, labels) unless `forward` says otherwise.
        metrics: The metrics, or `"classification"`: label, correct, confidence and loss.
        sites: Kinds or names of sites.
        pool: `"mean"`, `"cls"`, `"max"` or `"last"` over the tokens of an example.
        statistics: Which statistics to compute: `"pearson"`, `"spearman"`, `"auroc"`, `"mutual_info"`.
        cells: Cells per neuron for all but Pearson's r; 2 to 256.
        confidence: Replicates of a bootstrap for intervals of Pearson's r, 64 say; None for none.
        classes: Class names for `"classification"`; from the loader's dataset or the model by default.
        forward: `forward(model, batch) -> (output, {metric: values [batch]})` for anything unusual.
        quiet: Show no progress bar.

    Returns:
        The scores of every neuron of the sites with every metric column.

    Raises:
        ArgumentError: An unknown site, pool, statistic or metric.
        ModelError: A model in training mode or without known sites.
    """
    model = unwrap_compiled(model)
    refuse_training(model, "trace")
    choose_sites(model, sites)  # a model without sites is told so before its classes are asked for
    if isinstance(metrics, str):
        if metrics != "classification":
            raise ArgumentError(f"metrics: expected 'classification' or a mapping of metrics, got {metrics!r}")
        metrics = auxiliary.classification(classes if classes is not None else classes_of(loader, model))
    run = forward or classification_forward
    tracer = Tracer(model, metrics, sites=sites, pool=pool, statistics=statistics, cells=cells, confidence=confidence)
    order = sampling.plan(loader, calibration_rows(cells), exact_rows(cells))
    valid = sampling.ValidRows(loader)
    with tracer, torch.inference_mode():
        if set(statistics) != {"pearson"}:
            _calibrate(tracer, model, order.calibration, run)
        for batch in track(order.batches, "trace", total=_length(loader), quiet=quiet):
            _, values = run(model, batch)
            rows = valid.next(len(next(iter(values.values()))))
            tracer.step(valid=rows.own, groups=rows.place, **values)
    if order.distributed:
        tracer.all_reduce()
    return tracer.compute()


def _calibrate(tracer: Tracer, model: torch.nn.Module, batches: Iterable[Any], run: Forward) -> None:
    for batch in batches:
        _, values = run(model, batch)
        tracer.step(**values)
    if tracer.n_observations:
        tracer.calibrate()


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # a stream
        return None


def correlate(
    activations: ArrayLike | torch.Tensor,
    metrics_values: Mapping[str, ArrayLike | torch.Tensor],
    metrics: Mapping[str, Metric] | None = None,
    *,
    statistics: Sequence[str] = STATISTICS,
    cells: int = 128,
) -> NeuronScores:
    """Scores of activations that already exist, in any order.

    Args:
        activations: [n, D], anything array-like.
        metrics_values: Name -> [n] values.
        metrics: Name -> kind of metric. By default integers are `Categorical`, booleans `Binary`, others `Continuous`.
        statistics: Which statistics to compute: `"pearson"`, `"spearman"`, `"auroc"`, `"mutual_info"`.
        cells: Cells per neuron for all but Pearson's r; 2 to 256.

    Raises:
        ArgumentError: Shapes that do not fit, or an unknown statistic.
    """
    x = as_tensor(activations)
    if x.dim() != 2:
        raise ArgumentError(f"activations: expected [n, D], got shape {list(x.shape)}")
    values = {name: as_tensor(v) for name, v in metrics_values.items()}
    chosen = metrics or {name: _kind_of(v) for name, v in values.items()}
    accumulator = NeuronStatistics(x.shape[1], chosen, statistics, cells=cells, device=x.device)
    if len(x) > exact_rows(cells):
        sample = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: calibration_rows(cells)]
        accumulator.calibrate(x[sample.to(x.device)], {name: v[sample.to(v.device)] for name, v in values.items()})
    accumulator.update(x, values)
    return accumulator.compute()


def _kind_of(values: torch.Tensor) -> Metric:
    if values.dtype == torch.bool:
        return auxiliary.Binary()
    if values.is_floating_point():
        return auxiliary.Continuous()
    return auxiliary.Categorical(int(values.max()) + 1)
