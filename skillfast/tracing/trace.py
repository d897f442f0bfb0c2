"""Tracing: one streaming pass that correlates every neuron with every metric."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from skillfast.errors import ArgumentError
from skillfast.metrics import (
    FUNCTIONS,
    Binary,
    Categorical,
    Continuous,
    classification,
    classification_values,
    token_classification,
    token_classification_values,
)
from skillfast.models.batches import classes_of, fed_batches, predicts_words, read_batch
from skillfast.models.coverage import warn_incomplete
from skillfast.models.inputs import call
from skillfast.models.sites import choose_sites, module_device, refuse_training
from skillfast.progress import length_of, track
from skillfast.statistics.accumulator import NeuronStatistics
from skillfast.statistics.bins.edges import calibration_rows, exact_rows
from skillfast.statistics.inputs import as_tensor
from skillfast.tracing import sampling
from skillfast.tracing.prepared import to_run
from skillfast.tracing.tracer import Tracer
from skillfast.vocabulary import BINS, METRICS, STATISTICS, Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import ArrayLike

    from skillfast.metrics import Metric
    from skillfast.models.batches import Batch
    from skillfast.statistics.scores import NeuronScores

    Forward = Callable[[torch.nn.Module, Any], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]

TOKENS = 8  # that an example has at least, or about; so many fewer examples set the bins' edges where each counts
MOST_CLASSES = 1000  # integers beyond are numbers, not classes, unless the caller says so


class ClassificationForward:
    """The `forward` of `trace` for batches with labels, of examples or of tokens.

    Args:
        names: Metrics to give, of `metrics.FUNCTIONS`; None for those of `"classification"`. The label alone needs no
            logits, so that a model without a head has it, too.
        each: Whether each token is an observation.
        label_key: Key of the labels in a batch that is a mapping.

    Raises:
        ArgumentError: Another metric.
    """

    def __init__(self, names: Iterable[str] | None, *, each: bool, label_key: str | None) -> None:
        self.names = tuple(METRICS if names is None else names)
        unknown = [name for name in self.names if name not in FUNCTIONS]
        if unknown:
            raise ArgumentError(
                f"metric {unknown[0]!r}: expected one of {', '.join(FUNCTIONS)}, which logits and labels give, got "
                "another; pass forward=, which gives its values"
            )
        self.each = each
        self.label_key = label_key

    def read(self, batch: Any) -> Batch:
        """The batch as it was given."""
        return read_batch(batch, self.label_key, tokens=True)

    def mask(self, model: torch.nn.Module, batch: Any) -> torch.Tensor | None:
        """The mask that a batch brings; where each token counts, without those that have no label."""
        found = self.read(batch)
        if not (self.each and found.per_token):
            return found.mask
        labelled = found.targets(model) >= 0
        return labelled if found.mask is None else labelled & (found.mask != 0)

    def __call__(self, model: torch.nn.Module, batch: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        """The model's output, and values [batch] or [batch, tokens] of each metric."""
        found = self.read(batch).inputs_to(module_device(model))  # labels are checked where they are
        if self.names == ("label",) and not found.per_token:
            return call(model, found.inputs), {"label": found.labels}
        logits = found.logits(model)
        if found.per_token:
            targets = found.targets(model)
            return logits, token_classification_values(logits, targets, self.names, each=self.each)
        return logits, classification_values(logits, found.labels, self.names)


def trace(
    model: torch.nn.Module,
    loader: Iterable[Any],
    metrics: Mapping[str, Metric] | Literal["classification"] = "classification",
    *,
    sites: Sequence[str] | None = None,
    pool: Pool = "mean",
    statistics: Sequence[str] = STATISTICS,
    bins: int = BINS,
    n_bootstrap: int | None = None,
    classes: Sequence[str] | int | None = None,
    label_key: str | None = None,
    forward: Forward | None = None,
    mask: Callable[[Any], torch.Tensor | None] | None = None,
    quiet: bool = True,
) -> NeuronScores:
    """One pass over a loader: a loop over `Tracer`.

    The bins' edges come from random rows: the first ones of a loader that shuffles, else those of random items that
    run through the model once more before the pass. Under `torch.distributed` with a DistributedSampler every process
    gets the scores of all processes' data, each sample counted once.

    Args:
        model: In evaluation mode, on the device where it shall run.
        loader: Batches: (inputs, labels), or mappings with `labels` or `label` and the model's arguments, as the
            transformers library has them; anything else where `forward` reads it.
        metrics: The metrics, or `"classification"`: label, correct, confidence and loss. Where tokens have labels these
            are means over an example's tokens, without the label, or with `pool="none"` each token's: a causal language
            model's are about the next token. `{"label": Categorical(classes)}` needs no logits.
        sites: Kinds or names of sites; None for every kind that the model has.
        pool: `"mean"`, `"cls"`, `"max"` or `"last"` over the tokens of an example; `"none"`: each token counts. A
            metric with a value per token ([batch, tokens]) then takes a second forward of each batch, in which it is
            known beforehand: nothing is stored per token.
        statistics: Which statistics to compute: `"pearson"`, `"spearman"`, `"auroc"`, `"mutual_info"`.
        bins: Bins per neuron for all but Pearson's r; 2 to 256.
        n_bootstrap: Replicates of a bootstrap for intervals of Pearson's r, 64 say; None for none.
        classes: Class names for `"classification"`; from the loader's dataset or the model by default, whose
            configuration may name them (`config.id2label`).
        label_key: Key of the labels in a batch that is a mapping; by default `labels` or `label`.
        forward: `forward(model, batch) -> (output, {metric: values [batch]})` for anything unusual.
        mask: `mask(batch) -> [batch, tokens]`, true for real tokens, of batches with padding; by default a
            mapping's `attention_mask`, where `forward` is the default one.
        quiet: Show no progress bar.

    Returns:
        The scores of every neuron of the sites with every metric column.

    Raises:
        ArgumentError: An unknown site, pool, statistic or metric.
        ModelError: A model in training mode or without known sites.
    """
    planned = Pass.of(
        model, loader, metrics, sites=sites, pool=pool, bins=bins, classes=classes, label_key=label_key,
        forward=forward, mask=mask,
    )  # fmt: skip
    tracer = Tracer(
        planned.model, planned.metrics, sites=sites, pool=pool, statistics=statistics, bins=bins,
        n_bootstrap=n_bootstrap,
    )  # fmt: skip
    planned.count([tracer], _BatchCounter(tracer, planned), quiet=quiet)
    return tracer.compute()


@dataclass(frozen=True)
class Pass:
    """How a loader's batches are run, read and counted.

    Attributes:
        model: What runs.
        loader: What was given.
        metrics: What each forward gives.
        forward: Runs a batch: its output and the values of the metrics.
        mask: Which tokens of a batch are real; None where nobody says so.
        order: How the loader is read.
        batches: What is counted.
        calibration: What sets the edges of bins before it.
    """

    model: torch.nn.Module
    loader: Iterable[Any]
    metrics: Mapping[str, Metric]
    forward: Forward
    mask: Callable[[Any], torch.Tensor | None] | None
    order: sampling.Order
    batches: Iterable[Any]
    calibration: Iterable[Any]

    @staticmethod
    def of(
        model: torch.nn.Module,
        loader: Iterable[Any],
        metrics: Mapping[str, Metric] | Literal["classification"],
        *,
        sites: Sequence[str] | None,
        pool: Pool,
        bins: int,
        classes: Sequence[str] | int | None,
        label_key: str | None,
        forward: Forward | None,
        mask: Callable[[Any], torch.Tensor | None] | None,
        windows: bool = False,
    ) -> Pass:
        """Plan what `trace` is asked for; `windows`: observations are windows of a text, each with values of its own.

        Raises:
            ArgumentError: An unknown site or metric.
            ModelError: A model in training mode or without known sites.
        """
        model = to_run(model)
        refuse_training(model, "trace")
        choose_sites(model, sites)  # a model without sites is told so before its classes are asked for
        warn_incomplete(model)
        each = pool == "none"
        per = TOKENS if each else 1
        most = None if each else exact_rows(bins)
        order = sampling.plan(loader, calibration_rows(bins) // per, exact_rows(bins) // per, most=most)
        batches: Iterable[Any] = order.batches
        if isinstance(metrics, str):
            if metrics != "classification":
                raise ArgumentError(f"metrics: expected 'classification' or a mapping of metrics, got {metrics!r}")
            per_token = False
            if forward is None:
                first, batches = _first(order)
                per_token = first is not None and read_batch(first, label_key, tokens=True).per_token
            named = each and (classes is not None or not predicts_words(model))
            if not per_token:
                metrics = classification(classes if classes is not None else classes_of(loader, model))
            else:
                metrics = token_classification(
                    (classes if classes is not None else classes_of(loader, model)) if named else None, each=each
                )
        calibration = order.calibration
        if forward is None:
            own = ClassificationForward(metrics, each=each or windows, label_key=label_key)
            if mask is None and not windows:  # else batches are read by someone else, too
                device = module_device(model)
                batches, calibration = (fed_batches(part, device, own.read) for part in (batches, calibration))
            forward, mask = own, mask or partial(own.mask, model)
        return Pass(model, loader, metrics, forward, mask, order, batches, calibration)

    def count(self, tracers: Sequence[Tracer], counter: Counter, *, quiet: bool) -> None:
        """Run and count everything, in this process and in others that share the data."""
        valid = sampling.ValidRows(self.loader)
        with ExitStack() as stack, torch.inference_mode():
            for tracer in tracers:
                stack.enter_context(tracer)
            if any(tracer.ranks for tracer in tracers):
                for batch in self.calibration:
                    counter.count(batch)
                for tracer in tracers:
                    if tracer.n_observations:
                        tracer.calibrate()
            for batch in track(self.batches, "trace", total=length_of(self.loader), quiet=quiet):
                counter.count(batch, valid)
        if self.order.distributed:
            for tracer in tracers:
                tracer.all_reduce()


def _first(order: sampling.Order) -> tuple[Any, Iterable[Any]]:
    """One batch of the data, None where there is none, and all that are to be counted."""
    if (drawn := next(iter(order.calibration), None)) is not None:
        return drawn, order.batches
    batches = iter(order.batches)
    if (first := next(batches, None)) is None:
        return None, ()
    return first, chain([first], batches)


class Counter(Protocol):
    """Runs and counts one batch at a time."""

    def count(self, batch: Any, valid: sampling.ValidRows | None = None) -> None:
        """Run and count one batch, of it the rows that are this process's own."""


def run(planned: Pass, batch: Any) -> Mapping[str, torch.Tensor]:
    """Run a batch; the values of its metrics."""
    _, values = planned.forward(planned.model, batch)
    if not values:
        raise ArgumentError("forward: expected (output, {metric: values}), got no metrics; return each one's values")
    return values


class _BatchCounter:
    """Counts batches: a forward, what it tells, and a second one where it tells something of each token."""

    def __init__(self, tracer: Tracer, planned: Pass) -> None:
        self.tracer = tracer
        self.planned = planned

    def count(self, batch: Any, valid: sampling.ValidRows | None = None) -> None:
        """Run and count one batch, of it the rows that are this process's own."""
        mask = None if self.planned.mask is None else self.planned.mask(batch)
        self.tracer.expect(mask)
        values = run(self.planned, batch)
        n = len(next(iter(values.values())))
        rows = None if valid is None else valid.next(n)
        if any(value.dim() > 1 for value in map(as_tensor, values.values())):
            self._count_per_token(batch, mask, values, None if rows is None else rows.own)
        elif rows is None:
            self.tracer.step(**values)
        else:
            self.tracer.step(valid=rows.own, groups=rows.place, **values)

    def _count_per_token(
        self, batch: Any, mask: torch.Tensor | None, values: Mapping[str, torch.Tensor], own: torch.Tensor | None
    ) -> None:
        self.tracer.discard()
        if own is not None:
            shape = next(value.shape for value in values.values() if value.dim() > 1)
            mask = (torch.ones(shape, dtype=torch.bool) if mask is None else mask.cpu() != 0) & own.cpu()[:, None]
        self.tracer.expect(mask, **values)
        run(self.planned, batch)
        self.tracer.step()


def correlate(
    activations: ArrayLike | torch.Tensor,
    metrics_values: Mapping[str, ArrayLike | torch.Tensor],
    metrics: Mapping[str, Metric] | None = None,
    *,
    statistics: Sequence[str] = STATISTICS,
    bins: int = BINS,
) -> NeuronScores:
    """Scores of activations that already exist, in any order.

    Args:
        activations: [n, D], anything array-like.
        metrics_values: Name -> [n] values.
        metrics: Name -> kind of metric. By default integers are `Categorical`, booleans `Binary`, others `Continuous`.
        statistics: Which statistics to compute: `"pearson"`, `"spearman"`, `"auroc"`, `"mutual_info"`.
        bins: Bins per neuron for all but Pearson's r; 2 to 256.

    Raises:
        ArgumentError: Shapes that do not fit, or an unknown statistic.
    """
    x = as_tensor(activations)
    if x.dim() != 2:
        raise ArgumentError(f"activations: expected [n, D], got shape {list(x.shape)}")
    values = {name: as_tensor(v) for name, v in metrics_values.items()}
    chosen = metrics or {name: _kind_of(name, v) for name, v in values.items()}
    accumulator = NeuronStatistics(x.shape[1], chosen, statistics, bins=bins, device=x.device)
    if len(x) > exact_rows(bins):
        sample = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: calibration_rows(bins)]
        accumulator.calibrate(x[sample.to(x.device)], {name: v[sample.to(v.device)] for name, v in values.items()})
    accumulator.update(x, values)
    return accumulator.compute()


def _kind_of(name: str, values: torch.Tensor) -> Metric:
    if values.dtype == torch.bool:
        return Binary()
    if values.is_floating_point():
        return Continuous()
    largest = int(values.long().max()) if values.numel() else 0
    if largest >= MOST_CLASSES:
        raise ArgumentError(
            f"metric {name!r}: expected class indices below {MOST_CLASSES}, got {largest}; say what it is with "
            f"metrics={{{name!r}: Continuous()}}"
        )
    return Categorical(max(2, largest + 1))
