"""`sweep`: the baseline and many conditions over a loader."""

from __future__ import annotations

import warnings
from collections.abc import Sized
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from msgspec import Meta

from skillfast import files
from skillfast.ablation.batch_result import BatchRecorder, BatchResult, Observed, embedding_of
from skillfast.ablation.forward_trace import trace_forward
from skillfast.ablation.interventions import Condition, Interventions, hooked
from skillfast.ablation.prefix_reuse import HALF_TOLERANCE, TOLERANCE, PrefixCache, PrefixReuse, ResumePoint
from skillfast.ablation.prepared_runner import PreparedRunner
from skillfast.errors import ArgumentError
from skillfast.memory.budget import memory_limit, rows_that_fit
from skillfast.metrics import Categorical, per_class_accuracy, per_class_mean
from skillfast.models.batches import Batch, classes_of, fed_batches, logits_of, read_batch
from skillfast.models.coverage import warn_incomplete
from skillfast.models.inputs import Inputs, call, examples_in, out_of_memory, repeated, taken
from skillfast.models.sites import module_device, refuse_training
from skillfast.progress import Forecast, length_of, track
from skillfast.results import arrays
from skillfast.results.arrays import Array, indices
from skillfast.results.records import Document
from skillfast.tracing.prepared import prepared, to_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from skillfast.ablation.donors import DonorBank
    from skillfast.statistics.scores import NeuronScores

FILE = "sweep.safetensors"


@dataclass(frozen=True)
class ConditionResult:
    """What the model does under one condition.

    Attributes:
        name: The condition's.
        accuracy: float64 [n_classes], accuracy per class; NaN for a class without samples.
        margin: float64 [n_classes], mean of the true class's logit minus the best other one's.
        predictions: int64 [n], or None where they were not kept.
        embeddings: float32 [n, E], the classifier's input, or None where they were not kept.
    """

    name: str
    accuracy: np.ndarray
    margin: np.ndarray
    predictions: np.ndarray | None
    embeddings: np.ndarray | None


@dataclass(frozen=True)
class SweepResult:
    """What the model does without and with each condition.

    Attributes:
        classes: Class names.
        names: The conditions' names, in the order the conditions were given; `result[name]` is what one of them does.
        labels: int64 [n], the true class of every sample.
        baseline: float64 [n_classes], accuracy per class of the intact model; NaN for a class without samples.
        per_class_accuracy: float64 [n_conditions, n_classes], in the order the conditions were given.
        baseline_margin: float64 [n_classes], mean of the true class's logit minus the best other one's.
        per_class_margin: float64 [n_conditions, n_classes].
        top2: int64 [n, 2], the intact model's two best classes per sample.
        donors: int64 [n], each sample's donor in conditions with `mode="resample"`, by its place in the data that the
            donors were drawn from; None without such a condition.
        donor_labels: int64 [n], the donors' classes, or None.
        predictions: int64 [n_conditions, n], or None where they were not asked for.
        baseline_logits: float32 [n, n_classes], or None where margins were not asked for.
        margins: float32 [n_conditions, n], each sample's true logit minus the best other one's, or None where they were
            not asked for.
        baseline_embeddings: float32 [n, E], the classifier's input, or None where they were not asked for.
        embeddings: float32 [n_conditions, n, E], or None where they were not asked for.
        rerouted: float64 [n_conditions], share of the choices of experts (of each token in each block) that are others
            than the intact model's; None for a model without routers.
    """

    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: np.ndarray
    baseline: np.ndarray
    per_class_accuracy: np.ndarray
    baseline_margin: np.ndarray
    per_class_margin: np.ndarray
    top2: np.ndarray
    donors: np.ndarray | None = None
    donor_labels: np.ndarray | None = None
    predictions: np.ndarray | None = None
    baseline_logits: np.ndarray | None = None
    margins: np.ndarray | None = None
    baseline_embeddings: np.ndarray | None = None
    embeddings: np.ndarray | None = None
    rerouted: np.ndarray | None = None

    def __getitem__(self, name: str) -> ConditionResult:
        """What the model does under the condition of this name; raises ArgumentError for an unknown one."""
        i = self._row(name)
        return ConditionResult(
            name=name,
            accuracy=self.per_class_accuracy[i],
            margin=self.per_class_margin[i],
            predictions=None if self.predictions is None else self.predictions[i],
            embeddings=None if self.embeddings is None else self.embeddings[i],
        )

    def predictions_of(self, names: Iterable[str]) -> np.ndarray:
        """Predictions under the conditions of these names, in their order.

        Args:
            names: Names of conditions.

        Returns:
            int64 [len(names), n].

        Raises:
            ArgumentError: An unknown name, or a sweep that did not keep predictions.
        """
        return self._of("predictions", names)

    def margins_of(self, names: Iterable[str]) -> np.ndarray:
        """Every sample's margin under the conditions of these names, in their order.

        Args:
            names: Names of conditions.

        Returns:
            float32 [len(names), n].

        Raises:
            ArgumentError: An unknown name, or a sweep that did not keep margins.
        """
        return self._of("margins", names)

    def _of(self, kept: str, names: Iterable[str]) -> np.ndarray:
        rows: np.ndarray | None = getattr(self, kept)
        if rows is None:
            raise ArgumentError(f"{kept}: expected a sweep that kept them, got none; pass keep_{kept}=True")
        return rows[[self._row(name) for name in names]]

    def embeddings_of(self, names: Iterable[str]) -> np.ndarray:
        """Embeddings under the conditions of these names, in their order.

        Args:
            names: Names of conditions.

        Returns:
            float32 [len(names), n, E].

        Raises:
            ArgumentError: An unknown name, or a sweep that did not keep embeddings.
        """
        return self._of("embeddings", names)

    def renamed(self, names: Mapping[str, str]) -> SweepResult:
        """The result of some of the conditions alone, under other names; without embeddings.

        Args:
            names: Name of a condition here -> its name there, in the order wanted.

        Raises:
            ArgumentError: An unknown name.
        """
        rows = [self._row(name) for name in names]
        return replace(
            self,
            names=tuple(names.values()),
            per_class_accuracy=self.per_class_accuracy[rows],
            per_class_margin=self.per_class_margin[rows],
            predictions=None if self.predictions is None else self.predictions[rows],
            margins=None if self.margins is None else self.margins[rows],
            rerouted=None if self.rerouted is None else self.rerouted[rows],
            baseline_embeddings=None,
            embeddings=None,
        )

    def joined(self, other: SweepResult) -> SweepResult:
        """The conditions of both results, these first; without margins and embeddings.

        Args:
            other: Other conditions on the same examples.

        Raises:
            ArgumentError: Other examples, or predictions that one of them did not keep.
        """
        if not np.array_equal(self.labels, other.labels):
            raise ArgumentError(
                f"sweeps: expected the same examples in both, got {len(self.labels)} and {len(other.labels)} of other "
                "classes; sweep the same loader"
            )
        both = (self.predictions_of(self.names), other.predictions_of(other.names))
        routed = [part.rerouted for part in (self, other) if part.rerouted is not None]
        return replace(
            self,
            names=self.names + other.names,
            per_class_accuracy=np.concatenate([self.per_class_accuracy, other.per_class_accuracy]),
            per_class_margin=np.concatenate([self.per_class_margin, other.per_class_margin]),
            predictions=np.concatenate(both),
            rerouted=np.concatenate(routed) if len(routed) == 2 else None,
            baseline_logits=None,
            margins=None,
            baseline_embeddings=None,
            embeddings=None,
        )

    def _row(self, name: str) -> int:
        try:
            return self.names.index(name)
        except ValueError:
            known = ", ".join(map(repr, self.names[:5])) + (", ..." if len(self.names) > 5 else "")
            raise ArgumentError(f"condition: expected one of {known}, got {name!r}; see .names") from None

    def save(self, directory: str | Path) -> Path:
        """Write `sweep.safetensors` into the folder; returns its path."""
        path = files.output_folder(directory) / FILE
        found = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        arrays.write(path, SweepHeader(list(self.classes), list(self.names)), found)
        return path

    @staticmethod
    def load(directory: str | Path) -> SweepResult:
        """Read what `save` wrote; raises DataError where the file is missing, broken or of another version."""
        header, found = arrays.read(SweepHeader, Path(directory) / FILE, _layout, "write it with SweepResult.save")
        return SweepResult(classes=tuple(header.classes), names=tuple(header.names), **found)


class SweepHeader(Document, frozen=True, tag="skillfast.sweep/1", tag_field="schema"):
    """The header of `sweep.safetensors`, attributes of `SweepResult` of the same names."""

    classes: Annotated[list[str], Meta(min_length=1)]
    names: list[str]

    def __post_init__(self) -> None:
        for name, values in (("classes", self.classes), ("names", self.names)):
            if len(set(values)) < len(values):
                raise ValueError(f"expected different {name}, got one twice")


def _layout(header: SweepHeader) -> dict[str, Array]:
    """What each array must be; NaN is a class without samples."""
    k, rows = len(header.classes), len(header.names)
    accuracy: dict[str, Any] = {"low": 0, "high": 1, "nan": True}
    margin: dict[str, Any] = {"nan": True, "infinite": True}
    float32: dict[str, Any] = {**margin, "kinds": ("float32",), "optional": True}
    return {
        "labels": indices("n", below=k),
        "baseline": Array((k,), **accuracy),
        "per_class_accuracy": Array((rows, k), **accuracy),
        "baseline_margin": Array((k,), **margin),
        "per_class_margin": Array((rows, k), **margin),
        "top2": indices("n", 2, below=k),
        "donors": indices("n", below=None, optional=True),
        "donor_labels": indices("n", below=k, optional=True),
        "predictions": indices(rows, "n", below=k, optional=True),
        "baseline_logits": Array(("n", k), **float32),
        "margins": Array((rows, "n"), **float32),
        "baseline_embeddings": Array(("n", "width"), **float32),
        "embeddings": Array((rows, "n", "width"), **float32),
        "rerouted": Array((rows,), low=0, high=1, nan=True, optional=True),
    }


def sweep(
    model: torch.nn.Module,
    loader: Iterable[Any],
    conditions: Iterable[Condition],
    *,
    reference: NeuronScores | None = None,
    donors: DonorBank | None = None,
    classes: Sequence[str] | int | None = None,
    label_key: str | None = None,
    keep_predictions: bool = False,
    keep_margins: bool = False,
    keep_embeddings: bool = False,
    memory_budget: int | None = None,
    quiet: bool = True,
) -> SweepResult:
    """Run the baseline and every condition over a loader; a condition's forward starts at the first site it touches.

    Predictions are those of a plain loop over the conditions, but for samples whose two best logits are closer than
    the dtype tells apart. Where a model does not allow to start in the middle, the whole forward is run, with a
    warning; that of a prepared model (`prepare`) always is, one condition at a time.

    Args:
        model: In evaluation mode.
        loader: Batches of (inputs, labels), or mappings with labels and the model's arguments. Where tokens have
            labels, below 0 for none, each such token is a sample; a causal language model's are the next token's.
        conditions: In the order of the result's rows, each with another name.
        reference: Scores of this model, for conditions with `mode="mean"`.
        donors: For conditions with `mode="resample"`, from `skillfast.donors`.
        classes: Class names; from the loader's dataset or the model by default.
        label_key: Key of the labels in a batch that is a mapping; by default `labels` or `label`.
        keep_predictions: Keep every condition's prediction of every sample.
        keep_margins: Keep every condition's margin of every sample, and the intact model's logits.
        keep_embeddings: Keep the classifier's input, of every sample under every condition.
        memory_budget: Bytes that intermediate results may take beyond the model; by default what
            `limited_memory` says, or half of what is free.
        quiet: Show no progress bar.

    Raises:
        ArgumentError: A condition that does not fit the model or whose reference or donors are missing, two conditions
            of one name, or a budget too small for one sample.
        ModelError: A model in training mode.
    """
    model = to_run(model)
    refuse_training(model, "sweep")
    warn_incomplete(model)
    conditions = list(conditions)
    for condition in conditions:
        if not isinstance(condition, Condition):
            raise ArgumentError(
                f"conditions: expected Condition(skill), got {type(condition).__name__}; give one for each skill"
            )
    names = tuple(condition.name for condition in conditions)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArgumentError(
            f"conditions: expected a different name for each, got {twice!r} {names.count(twice)} times; "
            "pass Condition(skill, name=...)"
        )
    class_names = Categorical(classes if classes is not None else classes_of(loader, model)).classes
    samples = getattr(loader, "dataset", None)
    interventions = Interventions(model, conditions, reference, donors)
    runner: BatchRunner | PreparedRunner = (
        BatchRunner(model, interventions, memory_budget, len(samples) if isinstance(samples, Sized) else None)
        if prepared(model) is None
        else PreparedRunner(model, interventions)
    )
    with torch.inference_mode():
        read = partial(_read, n_classes=len(class_names), key=label_key)
        batches, length = fed_batches(loader, module_device(model), read), length_of(loader)
        parts = []
        for batch in track(batches, f"sweep of {len(conditions)} conditions", length, quiet):
            if batch.labels.numel():
                # no comprehension, which is a frame of its own to the warning's stacklevel before Python 3.12
                parts.append(runner.run(batch, keep_embeddings, keep_logits=keep_margins))  # noqa: PERF401
    if not parts:
        raise ArgumentError("sweep: expected at least one batch, got an empty loader; check its batches")
    whole = BatchResult.joined(parts)
    return _result(whole, class_names, names, runner.interventions.donors, keep_predictions, keep_margins)


def _read(given: Any, n_classes: int, key: str | None) -> Batch:
    """A batch whose labels are class indices, or those of tokens, below 0 for none; raises ArgumentError for others."""
    found = read_batch(given, key, tokens=True)
    if found.labels.numel():
        least, most = int(found.labels.min()), int(found.labels.max())
        if (least < 0 and not found.per_token) or most >= n_classes:
            raise ArgumentError(
                f"labels: expected class indices in [0, {n_classes}), got {least} to {most}; check classes="
            )
    return found


def _result(
    whole: BatchResult,
    classes: tuple[str, ...],
    names: tuple[str, ...],
    bank: DonorBank | None,
    keep_predictions: bool,
    keep_margins: bool,
) -> SweepResult:
    accuracy = per_class_accuracy(whole.predictions, whole.labels, len(classes))
    per_class_margin = per_class_mean(whole.margins, whole.labels, len(classes))
    embeddings = whole.embeddings
    return SweepResult(
        classes=classes,
        names=names,
        labels=whole.labels,
        baseline=accuracy[0],
        per_class_accuracy=accuracy[1:],
        baseline_margin=per_class_margin[0],
        per_class_margin=per_class_margin[1:],
        top2=np.stack([whole.predictions[0], whole.second], 1),
        donors=None if bank is None else bank.indices[whole.donors],
        donor_labels=None if bank is None else bank.labels[whole.donors],
        predictions=whole.predictions[1:] if keep_predictions else None,
        baseline_logits=whole.logits,
        margins=whole.margins[1:] if keep_margins else None,
        baseline_embeddings=None if embeddings is None else embeddings[0],
        embeddings=None if embeddings is None else embeddings[1:],
        rerouted=whole.routes[1:] / whole.routes[0] if whole.routes[0] else None,
    )


class BatchRunner:
    """Runs batches under the intact model and every condition.

    Args:
        model: In evaluation mode.
        interventions: What every condition does.
        memory_budget: Bytes that intermediate results may take; None: what `limited_memory` says.
        samples: How many samples there will be; None where that is not known.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        interventions: Interventions,
        memory_budget: int | None,
        samples: int | None = None,
    ) -> None:
        self.model = model
        self.device = module_device(model)
        self.interventions = interventions
        self.reuse: PrefixReuse | None = None
        self.kept_bytes = 0.0  # per sample, once the first batch has run
        self.memory_budget = memory_budget
        self.samples = samples
        self._fits: tuple[int, float, float] | None = None  # budget, bytes kept and running of a sample
        self._forecast: Forecast | None = None
        self._most_rows: int | None = None  # halved when memory ran out

    def run(self, batch: Batch, keep_embeddings: bool, *, keep_logits: bool) -> BatchResult:
        """Run one batch under the intact model and every condition."""
        batch = batch.to(self.device)
        reuse = self._prepared(batch.inputs)
        samples, rows = self._sizes(batch.inputs)
        chunks = [self._chunk(reuse, part, rows, keep_embeddings, keep_logits) for part in batch.split(samples)]
        return BatchResult.joined(chunks)

    def _prepared(self, inputs: Inputs) -> PrefixReuse:
        """The order of the model's forward and the route from each resume point, found on the first batch."""
        if self.reuse is None:
            few = taken(inputs, slice(2)) if examples_in(inputs) > 1 else repeated(inputs, 2)
            reuse = PrefixReuse(self.model, self.interventions, trace_forward(self.model, few))
            tolerance = TOLERANCE.get(reuse.trace.dtype, HALF_TOLERANCE)
            reuse.verify(few, lambda i: self._plain(few, i), tolerance)
            whole = sum(
                len(reuse.conditions_from[point]) for point, route in reuse.routes.items() if route.point is None
            )
            cache = reuse.fill_cache(few)
            if whole:
                why = "does not allow to start in the middle" if cache.finite else "gives logits that are not finite"
                warnings.warn(
                    f"sweep: {whole} of {len(self.interventions.conditions)} conditions run the whole forward of this "
                    f"{type(self.model).__name__}, which {why}",
                    RuntimeWarning,
                    stacklevel=4,
                )
            self.kept_bytes = cache.nbytes / examples_in(few)
            self.reuse = reuse
            self._forecast = self._foretold(reuse)
        return self.reuse

    def _foretold(self, reuse: PrefixReuse) -> Forecast | None:
        """What the sweep will run; None where it is the intact model alone."""
        n = len(self.interventions.conditions)
        if not n:
            return None
        whole = 1 + sum(reuse.work(p) * len(some) for p, some in reuse.conditions_from.items() if p is not None)
        if self.samples is None:
            return Forecast(f"{n} conditions, as long as {whole:.0f} forwards of every example", None)
        return Forecast(
            f"{n} conditions on {self.samples:,} examples: {n * self.samples:,} forwards, as long as "
            f"{whole * self.samples:,.0f} whole ones",
            whole * self.samples,
        )

    def _ran(self, forwards: float) -> None:
        if self._forecast is not None:
            self._forecast.ran(forwards)

    def _plain(self, inputs: Inputs, condition: int) -> torch.Tensor:
        bank = self.interventions.donors
        rows = None if bank is None else bank.rows_of(self.model, inputs)
        with hooked(self.model, self.interventions, self.interventions.sites, [condition], lambda: rows):
            return logits_of(call(self.model, inputs), self.model)

    def _sizes(self, inputs: Inputs) -> tuple[int, int]:
        """Samples at a time, and stacked rows."""
        assert self.reuse is not None
        known = self.reuse.trace
        if self._fits is None:
            fits = self.memory_budget or memory_limit(self.device), self.kept_bytes, known.running_bytes
            shards = self.interventions.shards
            if shards is not None:  # all run the same stacks, which fit in the one with the least memory
                budgets, *needs = zip(*shards.gather(fits), strict=True)
                fits = min(budgets), *map(max, needs)
            self._fits = fits
        return rows_that_fit(*self._fits, known.tokens, examples_in(inputs), self.device)

    def _chunk(
        self, reuse: PrefixReuse, batch: Batch, rows: int, keep_embeddings: bool, keep_logits: bool
    ) -> BatchResult:
        cache = reuse.fill_cache(batch.inputs)
        self._ran(len(batch))
        observed = Observed.of(batch, cache.logits, self.model)
        embedding = embedding_of(batch, cache.embedding, self.model) if keep_embeddings else None
        part = BatchRecorder(
            observed,
            cache.logits,
            embedding,
            len(self.interventions.conditions),
            keep_logits=keep_logits,
            donors=cache.donors,
            routed=cache.routed,
        )
        for point, conditions in reuse.conditions_from.items():
            if point is None:
                continue
            for some, changed, embeddings, rerouted in self._stacks(
                reuse, cache, point, conditions, rows // len(batch)
            ):
                self._ran(len(some) * len(batch) * reuse.work(point))
                part.set(some, changed, embeddings, rerouted)
        return part.result()

    def _stacks(
        self, reuse: PrefixReuse, cache: PrefixCache, point: ResumePoint, conditions: Sequence[int], size: int
    ) -> Iterator[tuple[Sequence[int], torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
        """Run the conditions that begin at one point, `size` at a time; fewer once memory has run out."""
        done = 0
        while done < len(conditions):
            size = max(1, size if self._most_rows is None else min(size, self._most_rows // examples_in(cache.inputs)))
            some = conditions[done : done + size]
            try:
                found = reuse.run(cache, point, some)
            except RuntimeError as error:
                if not out_of_memory(error) or len(some) == 1 or self.interventions.shards is not None:
                    raise  # where processes run a forward together the others wait for this one
                self._most_rows = len(some) // 2 * examples_in(cache.inputs)
                continue
            yield some, *found
            done += len(some)


__all__ = ["ConditionResult", "SweepResult", "sweep"]
