"""What each removal does to the embeddings, a few removals at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from msgspec import Meta, structs

from skillfast import files
from skillfast.ablation.sweep import SweepResult, sweep
from skillfast.errors import ArgumentError
from skillfast.evaluation.directions import angles
from skillfast.evaluation.embeddings import Comparison, EmbeddingMetrics
from skillfast.evaluation.probes import Head, Reader, Readings
from skillfast.models.sites import find_sites
from skillfast.results import arrays
from skillfast.results.arrays import Array, indices
from skillfast.results.records import Count, Document, Positive, Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from skillfast.ablation.interventions import Condition
    from skillfast.models.sites import Site

BYTES_AT_ONCE = 1 << 29
FILE = "embeddings.safetensors"
_PER_REMOVAL = (
    "cosine", "rank_preservation", "rank_influence", "knn_accuracy_change", "cka", "cka_left_out", "n_written",
)  # fmt: skip
_READINGS = ("intact", "refitted", "relearned", "without")


@dataclass(frozen=True)
class EmbeddingChanges:
    """Embeddings after each removal beside the intact model's.

    Attributes:
        names: The removals' names, in the order of the rows.
        metrics: Metrics of the intact model.
        comparisons: One per removal.
        angles: float64 [removals, K], of `directions.angles`.
        angles_left_out: float64 [removals, groups, K], without each group of images.
        readings: What the removals of the skills leave to be read, a row for each of the first K removals.
    """

    names: tuple[str, ...]
    metrics: EmbeddingMetrics
    comparisons: tuple[Comparison, ...]
    angles: np.ndarray
    angles_left_out: np.ndarray
    readings: Readings

    def of(self, names: Iterable[str]) -> EmbeddingChanges:
        """The changes under the removals of these names alone, in their order.

        Raises:
            ArgumentError: A name that no removal has.
        """
        wanted = list(names)
        unknown = [name for name in wanted if name not in self.names]
        if unknown:
            raise ArgumentError(
                f"removal: expected one of {', '.join(map(repr, self.names[:5]))}, got {unknown[0]!r}; see .names"
            )
        rows = [self.names.index(name) for name in wanted]
        return EmbeddingChanges(
            tuple(wanted),
            self.metrics,
            tuple(self.comparisons[row] for row in rows),
            self.angles[rows],
            self.angles_left_out[rows],
            self.readings,
        )

    def save(self, directory: str | Path) -> Path:
        """Write `embeddings.safetensors` into the folder; returns its path."""
        path = files.output_folder(directory) / FILE
        rows = {name: np.stack([getattr(found, name) for found in self.comparisons]) for name in _PER_REMOVAL}
        stored = {
            **rows,
            "embeddings": self.metrics.embeddings,
            "labels": self.metrics.labels,
            "angles": self.angles,
            "angles_left_out": self.angles_left_out,
            **{name: getattr(self.readings, name) for name in _READINGS},
        }
        undefined = [found.undefined.tolist() for found in self.comparisons]
        header = _Header(_Settings(**self.metrics.settings), list(self.names), undefined, self.readings.n_fitted)
        arrays.write(path, header, stored)
        return path

    @staticmethod
    def load(directory: str | Path) -> EmbeddingChanges:
        """Read what `save` wrote; raises DataError where the file is missing, broken or of another version."""
        header, found = arrays.read(_Header, Path(directory) / FILE, _layout, "write it with EmbeddingChanges.save")
        rows = zip(*(found[name] for name in _PER_REMOVAL), header.undefined, strict=True)
        comparisons = tuple(
            Comparison(cosine, rho, influence, knn, float(cka), left_out, np.array(undefined, np.int64), int(written))
            for cosine, rho, influence, knn, cka, left_out, written, undefined in rows
        )
        return EmbeddingChanges(
            tuple(header.names),
            EmbeddingMetrics(found["embeddings"], found["labels"], **structs.asdict(header.settings)),
            comparisons,
            found["angles"],
            found["angles_left_out"],
            Readings(**{name: found[name] for name in _READINGS}, n_fitted=header.n_fitted),
        )


class _Settings(Record, frozen=True):
    """The settings of an `EmbeddingMetrics`."""

    n_neighbours: Positive
    max_anchors: Positive
    seed: Count


class _Header(Document, frozen=True, tag="skillfast.embeddings/1", tag_field="schema"):
    """The header of `embeddings.safetensors`.

    Attributes:
        settings: The settings of the metrics.
        names: The removals' names.
        undefined: For each removal, the examples that are left out.
        n_fitted: Examples that a probe is fitted on, at least.
    """

    settings: _Settings
    names: Annotated[list[str], Meta(min_length=1)]
    undefined: list[list[Count]]
    n_fitted: Count

    def __post_init__(self) -> None:
        if len(self.undefined) != len(self.names):
            raise ValueError(f"expected {len(self.names)} lists at undefined, got {len(self.undefined)}")
        if len(set(self.names)) < len(self.names):
            raise ValueError("expected different names, got one twice")


def _layout(header: _Header) -> dict[str, Array]:
    """What each array must be; NaN is what is not defined."""
    rows = len(header.names)
    per_example = {name: Array((rows, "n"), nan=True) for name in _PER_REMOVAL[:4]}
    return {
        "embeddings": Array(("n", "width"), ("float32", "float64"), nan=True, infinite=True),
        "labels": indices("n", below="k"),
        **per_example,
        "cka": Array((rows,), nan=True),
        "cka_left_out": Array((rows, "groups"), nan=True),
        "n_written": indices(rows, below=None),
        "angles": Array((rows, "k"), low=0, high=180.001, nan=True),
        "angles_left_out": Array((rows, "groups", "k"), low=0, high=180.001, nan=True),
        "intact": indices("n", below="k"),
        "refitted": indices("read", "n", below="k"),
        "relearned": indices("read", "draws", "n", below="k"),
        "without": indices("read", "draws", "n", below="k"),
    }


def compare_embeddings(
    model: torch.nn.Module,
    loader: Iterable[Any],
    removals: Sequence[Condition],
    controls: Sequence[Condition],
    *,
    classes: Sequence[str],
    seed: int = 0,
    bytes_at_once: int = BYTES_AT_ONCE,
    swept: SweepResult | None = None,
    quiet: bool = True,
) -> EmbeddingChanges | None:
    """Sweep the conditions and keep what their embeddings say and what is still read from them, not the embeddings.

    Args:
        model: In evaluation mode.
        loader: Batches of (images, labels), the same in each pass.
        removals: The removal of each class's skill, K of them.
        controls: Other removals, of which nothing is read.
        classes: Class names.
        seed: Seed of the choice of anchors and of examples.
        bytes_at_once: Embeddings to hold, and as much again while they are put together; a pass over the loader for as
            many conditions as fit, one at least.
        swept: A sweep of this loader; if it kept the embeddings of these conditions, they are not run again.
        quiet: Show no progress bars.

    Returns:
        The changes; None for a model without one linear classifier, whose input would be the embedding.
    """
    head = next((site for site in find_sites(model) if site.kind == "head"), None)
    if head is None:
        return None

    def embedded(some: Sequence[Condition]) -> SweepResult:
        return sweep(model, loader, some, classes=classes, keep_embeddings=True, quiet=quiet)

    have = swept if swept is not None and swept.embeddings is not None else None
    intact = have or embedded([])
    before, labels = intact.baseline_embeddings, intact.labels
    assert before is not None
    metrics = EmbeddingMetrics(before, labels, seed=seed)
    reader = Reader(labels, len(classes), linear_head(model, head, len(classes)), seed)
    comparisons, turned, read = [], [], []
    conditions = [*removals, *controls]
    step = max(1, bytes_at_once // before.nbytes)
    for start in range(0, len(conditions), step):
        some = conditions[start : start + step]
        after = (have or embedded(some)).embeddings_of(condition.name for condition in some)
        for i, (condition, rows) in enumerate(zip(some, after, strict=True), start):
            written = written_by(condition, head)
            comparisons.append(metrics.compare(rows, written))
            kept = np.delete(np.arange(before.shape[1]), written)
            turned.append(angles(before[:, kept], rows[:, kept], labels, len(classes)))
            if i < len(removals):
                read.append((reader.probe(rows), *reader.tuned(rows, i)))
    names = tuple(condition.name for condition in conditions)
    found, left_out = (np.stack(rows) for rows in zip(*turned, strict=True))
    refitted, relearned, without = (np.stack(rows) for rows in zip(*read, strict=True))
    readings = Readings(
        intact=reader.probe(before),
        refitted=refitted,
        relearned=relearned,
        without=without,
        n_fitted=reader.n_fitted,
    )
    return EmbeddingChanges(names, metrics, tuple(comparisons), found, left_out, readings)


def fit_at_once(model: torch.nn.Module, conditions: int, examples: int) -> bool:
    """Whether the embeddings of so many conditions and the intact model's may be held together."""
    head = next((site for site in find_sites(model) if site.kind == "head"), None)
    return head is not None and 4 * (1 + conditions) * examples * head.width <= BYTES_AT_ONCE


def linear_head(model: torch.nn.Module, head: Site, n_classes: int) -> Head | None:
    """The classifier's weights and biases; None where it is no linear layer with a row per class."""
    module = model.get_submodule(head.path)
    if not isinstance(module, torch.nn.Linear) or module.out_features != n_classes:
        return None
    weight = module.weight.detach().float().cpu().numpy()
    return weight, np.zeros(n_classes) if module.bias is None else module.bias.detach().float().cpu().numpy()


def written_by(condition: Condition, head: Site) -> np.ndarray:
    """int64, the coordinates of the embedding that a condition writes itself: the head's neurons that it changes."""
    neurons = condition.neurons_at(head)
    return np.empty(0, np.int64) if neurons is None or condition.scale == 1 else neurons.numpy()
