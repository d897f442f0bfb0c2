"""`sweep`: the baseline and many conditions over a loader."""

from __future__ import annotations

import warnings
from collections.abc import Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast import files
from skillfast.ablation.forward_trace import trace_forward
from skillfast.ablation.interventions import Condition, Interventions, hooked
from skillfast.ablation.prefix_reuse import PrefixCache, PrefixReuse, ResumePoint
from skillfast.errors import ArgumentError
from skillfast.memory.budget import memory_limit, rows_that_fit
from skillfast.metrics import Categorical, margin, per_class_accuracy, per_class_mean
from skillfast.models.batches import classes_of, labelled_batch, logits_of
from skillfast.models.sites import module_device, refuse_training, unwrap_compiled
from skillfast.progress import Forecast, track

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from skillfast.ablation.donors import DonorBank
    from skillfast.statistics.scores import NeuronScores

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of logits, as a share of the largest
HALF_TOLERANCE = 3e-2
SCHEMA = "skillfast.sweep/1"
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
        if self.embeddings is None:
            raise ArgumentError("embeddings: expected a sweep that kept them, got none; pass keep_embeddings=True")
        return self.embeddings[[self._row(name) for name in names]]

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
        return replace(
            self,
            names=self.names + other.names,
            per_class_accuracy=np.concatenate([self.per_class_accuracy, other.per_class_accuracy]),
            per_class_margin=np.concatenate([self.per_class_margin, other.per_class_margin]),
            predictions=np.concatenate(both),
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
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        files.write_arrays(path, arrays, {"schema": SCHEMA, "classes": self.classes, "names": self.names})
        return path

    @staticmethod
    def load(directory: str | Path) -> SweepResult:
        """Read what `save` wrote; raises DataError where the file is missing, broken or of another version."""
        path, remedy = Path(directory) / FILE, "write it with SweepResult.save"
        arrays, header = files.read_arrays(path, SCHEMA, remedy)
        with files.whole(path, remedy):
            return SweepResult(classes=tuple(header["classes"]), names=tuple(header["names"]), **arrays)


def sweep(
    model: torch.nn.Module,
    loader: Iterable[Any],
    conditions: Iterable[Condition],
    *,
    reference: NeuronScores | None = None,
    donors: DonorBank | None = None,
    classes: Sequence[str] | int | None = None,
    keep_predictions: bool = False,
    keep_margins: bool = False,
    keep_embeddings: bool = False,
    memory_budget: int | None = None,
    quiet: bool = True,
) -> SweepResult:
    """Run the baseline and every condition over a loader; a condition's forward starts at the first site it touches.

    Predictions are those of a plain loop over the conditions, but for samples whose two best logits are closer than
    the dtype tells apart. Where a model does not allow to start in the middle, the whole forward is run, with a
    warning.

    Args:
        model: In evaluation mode.
        loader: Batches of (images, labels).
        conditions: In the order of the result's rows, each with another name.
        reference: Scores of this model, for conditions with `mode="mean"`.
        donors: For conditions with `mode="resample"`, from `skillfast.donors`.
        classes: Class names; from the loader's dataset or the model by default.
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
    model = unwrap_compiled(model)
    refuse_training(model, "sweep")
    conditions = list(conditions)
    for condition in conditions:
        if not isinstance(condition, Condition):
            raise ArgumentError(f"conditions: expected Condition(skill), got {type(condition).__name__}")
    names = tuple(condition.name for condition in conditions)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArgumentError(
            f"conditions: expected a different name for each, got {twice!r} {names.count(twice)} times; "
            "pass Condition(skill, name=...)"
        )
    class_names = Categorical(classes if classes is not None else classes_of(loader, model)).classes
    samples = getattr(loader, "dataset", None)
    runner = BatchRunner(
        model,
        Interventions(model, conditions, reference, donors),
        memory_budget,
        len(samples) if isinstance(samples, Sized) else None,
    )
    parts = []
    with torch.inference_mode():
        for batch in track(loader, f"sweep of {len(conditions)} conditions", quiet=quiet):
            images, labels = labelled_batch(batch)
            if not len(labels):
                continue
            if not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
                raise ArgumentError(
                    f"labels: expected class indices in [0, {len(class_names)}), got {int(labels.min())} to "
                    f"{int(labels.max())}"
                )
            parts.append(runner.run(images, labels, keep_embeddings))
    if not parts:
        raise ArgumentError("sweep: expected at least one batch, got an empty loader")
    return _result(
        parts, class_names, names, runner.interventions.donors, keep_predictions, keep_margins, keep_embeddings
    )


@dataclass
class _BatchResult:
    """One batch's outcome; row 0 of the first dimension is the intact model."""

    labels: np.ndarray  # [batch]
    logits: np.ndarray  # float32 [batch, classes], the intact model's
    second: np.ndarray  # [batch], the intact model's second best class
    predictions: np.ndarray  # [1 + conditions, batch]
    margins: np.ndarray  # float32 [1 + conditions, batch]
    embeddings: np.ndarray | None  # float32 [1 + conditions, batch, E]
    donors: np.ndarray | None  # [batch], rows of the bank


def _result(
    parts: Sequence[_BatchResult],
    classes: tuple[str, ...],
    names: tuple[str, ...],
    bank: DonorBank | None,
    keep_predictions: bool,
    keep_margins: bool,
    keep_embeddings: bool,
) -> SweepResult:
    labels = np.concatenate([part.labels for part in parts])
    predictions = np.concatenate([part.predictions for part in parts], 1)
    accuracy = per_class_accuracy(predictions, labels, len(classes))
    margins = np.concatenate([part.margins for part in parts], 1)
    per_class_margin = per_class_mean(margins, labels, len(classes))
    embeddings = (
        np.concatenate([part.embeddings for part in parts if part.embeddings is not None], 1)
        if keep_embeddings
        else None
    )
    rows = [part.donors for part in parts if part.donors is not None]
    of_bank = None if bank is None else np.concatenate(rows)
    return SweepResult(
        classes=classes,
        names=names,
        labels=labels,
        baseline=accuracy[0],
        per_class_accuracy=accuracy[1:],
        baseline_margin=per_class_margin[0],
        per_class_margin=per_class_margin[1:],
        top2=np.stack([predictions[0], np.concatenate([part.second for part in parts])], 1),
        donors=None if bank is None else bank.indices[of_bank],
        donor_labels=None if bank is None else bank.labels[of_bank],
        predictions=predictions[1:] if keep_predictions else None,
        baseline_logits=np.concatenate([part.logits for part in parts]) if keep_margins else None,
        margins=margins[1:] if keep_margins else None,
        baseline_embeddings=None if embeddings is None else embeddings[0],
        embeddings=None if embeddings is None else embeddings[1:],
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
        self._forecast: Forecast | None = None
        self._most_rows: int | None = None  # halved when memory ran out

    def run(self, images: torch.Tensor, labels: torch.Tensor, keep_embeddings: bool) -> _BatchResult:
        """Run one batch under the intact model and every condition."""
        images, labels = images.to(self.device), labels.to(self.device)
        reuse = self._prepared(images)
        samples, rows = self._sizes(images)
        chunks = [
            self._chunk(reuse, part, of_part, rows, keep_embeddings)
            for part, of_part in zip(images.split(samples), labels.split(samples), strict=True)
        ]
        return _BatchResult(
            labels=labels.cpu().numpy(),
            logits=np.concatenate([chunk.logits for chunk in chunks]),
            second=np.concatenate([chunk.second for chunk in chunks]),
            predictions=np.concatenate([chunk.predictions for chunk in chunks], 1),
            margins=np.concatenate([chunk.margins for chunk in chunks], 1),
            embeddings=(
                np.concatenate([chunk.embeddings for chunk in chunks if chunk.embeddings is not None], 1)
                if keep_embeddings
                else None
            ),
            donors=None
            if self.interventions.donors is None
            else np.concatenate([chunk.donors for chunk in chunks if chunk.donors is not None]),
        )

    def _prepared(self, images: torch.Tensor) -> PrefixReuse:
        """The order of the model's forward and the route from each resume point, found on the first batch."""
        if self.reuse is None:
            few = images[:2] if len(images) > 1 else images[:1].repeat(2, *(1,) * (images.dim() - 1))
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
            self.kept_bytes = cache.nbytes / len(few)
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

    def _plain(self, images: torch.Tensor, condition: int) -> torch.Tensor:
        bank = self.interventions.donors
        rows = None if bank is None else bank.rows_of(self.model, images)
        with hooked(self.model, self.interventions, self.interventions.sites, [condition], lambda: rows):
            return logits_of(self.model(images))

    def _sizes(self, images: torch.Tensor) -> tuple[int, int]:
        """Samples at a time, and stacked rows."""
        assert self.reuse is not None
        if self.memory_budget is None:
            self.memory_budget = memory_limit(self.device)
        known = self.reuse.trace
        return rows_that_fit(
            self.memory_budget, self.kept_bytes, known.running_bytes, known.tokens, len(images), self.device
        )

    def _chunk(
        self, reuse: PrefixReuse, images: torch.Tensor, labels: torch.Tensor, rows: int, keep_embeddings: bool
    ) -> _BatchResult:
        cache = reuse.fill_cache(images)
        self._ran(len(images))
        if keep_embeddings and cache.embedding is None:
            raise ArgumentError(
                f"embeddings: expected a model with a linear classifier, got {type(self.model).__name__} without one; "
                "leave out keep_embeddings"
            )
        n, shape = len(images), (1 + len(self.interventions.conditions), len(images))
        first, second = cache.logits.topk(2, dim=1).indices.cpu().numpy().T
        part = _BatchResult(
            labels=labels.cpu().numpy(),
            logits=cache.logits.float().cpu().numpy(),
            second=second,
            predictions=np.broadcast_to(first, shape).copy(),  # conditions that change nothing keep this
            margins=np.broadcast_to(margin(cache.logits, labels).cpu().numpy(), shape).copy(),
            embeddings=None,
            donors=None if cache.donors is None else cache.donors.numpy(),
        )
        if keep_embeddings:
            assert cache.embedding is not None
            part.embeddings = np.broadcast_to(
                cache.embedding.float().cpu().numpy(), (*shape, cache.embedding.shape[-1])
            ).copy()
        for point, conditions in reuse.conditions_from.items():
            if point is None:
                continue
            for some, logits, embeddings in self._stacks(reuse, cache, point, conditions, rows // n):
                self._ran(len(some) * n * reuse.work(point))
                at = [1 + i for i in some]
                part.predictions[at] = logits.argmax(-1).cpu().numpy()
                part.margins[at] = margin(logits, labels).cpu().numpy()
                if part.embeddings is not None and embeddings is not None:
                    part.embeddings[at] = embeddings.float().cpu().numpy()
        return part

    def _stacks(
        self, reuse: PrefixReuse, cache: PrefixCache, point: ResumePoint, conditions: Sequence[int], size: int
    ) -> Iterator[tuple[Sequence[int], torch.Tensor, torch.Tensor | None]]:
        """Run the conditions that begin at one point, `size` at a time; fewer once memory has run out."""
        done = 0
        while done < len(conditions):
            size = max(1, size if self._most_rows is None else min(size, self._most_rows // len(cache.inputs)))
            some = conditions[done : done + size]
            try:
                logits, embeddings = reuse.run(cache, point, some)
            except RuntimeError as error:
                if not _out_of_memory(error) or len(some) == 1:
                    raise
                self._most_rows = len(some) // 2 * len(cache.inputs)
                continue
            yield some, logits, embeddings
            done += len(some)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


__all__ = ["ConditionResult", "SweepResult", "sweep"]
