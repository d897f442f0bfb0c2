"""What each removal does to the embeddings, a few removals at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skillfast import files
from skillfast.ablation.sweep import sweep
from skillfast.errors import ArgumentError
from skillfast.evaluation.directions import angles
from skillfast.evaluation.embeddings import Comparison, EmbeddingMetrics
from skillfast.models.sites import find_sites

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from skillfast.ablation.interventions import Condition
    from skillfast.models.sites import Site

BYTES_AT_ONCE = 1 << 29
SCHEMA = "skillfast.embeddings/1"
FILE = "embeddings.safetensors"
_PER_REMOVAL = (
    "cosine", "rank_preservation", "rank_influence", "knn_accuracy_change", "cka", "cka_left_out", "n_written",
)  # fmt: skip


@dataclass(frozen=True)
class EmbeddingChanges:
    """Embeddings after each removal beside the intact model's.

    Attributes:
        names: The removals' names, in the order of the rows.
        metrics: Metrics of the intact model.
        comparisons: One per removal.
        angles: float64 [removals, K], of `directions.angles`.
        angles_left_out: float64 [removals, groups, K], without each group of images.
    """

    names: tuple[str, ...]
    metrics: EmbeddingMetrics
    comparisons: tuple[Comparison, ...]
    angles: np.ndarray
    angles_left_out: np.ndarray

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
        )

    def save(self, directory: str | Path) -> Path:
        """Write `embeddings.safetensors` into the folder; returns its path."""
        path = files.output_folder(directory) / FILE
        rows = {name: np.stack([getattr(found, name) for found in self.comparisons]) for name in _PER_REMOVAL}
        arrays = {
            **rows,
            "embeddings": self.metrics.embeddings,
            "labels": self.metrics.labels,
            "angles": self.angles,
            "angles_left_out": self.angles_left_out,
        }
        undefined = [found.undefined.tolist() for found in self.comparisons]
        files.write_arrays(
            path,
            arrays,
            {"schema": SCHEMA, "settings": self.metrics.settings, "names": self.names, "undefined": undefined},
        )
        return path

    @staticmethod
    def load(directory: str | Path) -> EmbeddingChanges:
        """Read what `save` wrote; raises DataError where the file is missing, broken or of another version."""
        path, remedy = Path(directory) / FILE, "write it with EmbeddingChanges.save"
        arrays, header = files.read_arrays(path, SCHEMA, remedy)
        with files.whole(path, remedy):
            rows = zip(*(arrays[name] for name in _PER_REMOVAL), header["undefined"], strict=True)
            comparisons = tuple(
                Comparison(
                    cosine, rho, influence, knn, float(cka), left_out, np.array(undefined, np.int64), int(written)
                )
                for cosine, rho, influence, knn, cka, left_out, written, undefined in rows
            )
            metrics = EmbeddingMetrics(arrays["embeddings"], arrays["labels"], **header["settings"])
            return EmbeddingChanges(
                tuple(header["names"]), metrics, comparisons, arrays["angles"], arrays["angles_left_out"]
            )


def compare_embeddings(
    model: torch.nn.Module,
    loader: Iterable[Any],
    conditions: Sequence[Condition],
    *,
    classes: Sequence[str],
    seed: int = 0,
    bytes_at_once: int = BYTES_AT_ONCE,
    quiet: bool = True,
) -> EmbeddingChanges | None:
    """Sweep the conditions and keep what their embeddings say, not the embeddings.

    Args:
        model: In evaluation mode.
        loader: Batches of (images, labels), the same in each pass.
        conditions: The removals, one at least.
        classes: Class names.
        seed: Seed of the choice of anchors.
        bytes_at_once: Embeddings to hold, and as much again while they are put together; a pass over the loader for as
            many conditions as fit, one at least.
        quiet: Show no progress bars.

    Returns:
        The changes; None for a model without one linear classifier, whose input would be the embedding.
    """
    head = next((site for site in find_sites(model) if site.kind == "head"), None)
    if head is None:
        return None
    intact = sweep(model, loader, [], classes=classes, keep_embeddings=True, quiet=quiet)
    before = intact.baseline_embeddings
    assert before is not None
    metrics = EmbeddingMetrics(before, intact.labels, seed=seed)
    comparisons, turned = [], []
    step = max(1, bytes_at_once // before.nbytes)
    for start in range(0, len(conditions), step):
        some = conditions[start : start + step]
        swept = sweep(model, loader, some, classes=classes, keep_embeddings=True, quiet=quiet).embeddings
        assert swept is not None
        for condition, after in zip(some, swept, strict=True):
            written = written_by(condition, head)
            comparisons.append(metrics.compare(after, written))
            kept = np.delete(np.arange(before.shape[1]), written)
            turned.append(angles(before[:, kept], after[:, kept], intact.labels, len(classes)))
    names = tuple(condition.name for condition in conditions)
    found, left_out = (np.stack(rows) for rows in zip(*turned, strict=True))
    return EmbeddingChanges(names, metrics, tuple(comparisons), found, left_out)


def written_by(condition: Condition, head: Site) -> np.ndarray:
    """int64, the coordinates of the embedding that a condition writes itself: the head's neurons that it changes."""
    neurons = condition.neurons_at(head)
    return np.empty(0, np.int64) if neurons is None or condition.scale == 1 else neurons.numpy()
