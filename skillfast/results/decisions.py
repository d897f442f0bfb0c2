"""`decisions.safetensors`: what a run decided on each test example, for comparing two runs on the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from skillfast import files
from skillfast.results.bench import REMEDY

SCHEMA = "skillfast.decisions/1"
FILE = "decisions.safetensors"
_OPTIONAL = ("earlier", "in_earlier")  # arrays of a run like an earlier one


@dataclass(frozen=True)
class Decisions:
    """Decisions on the test examples, intact and without each skill.

    Attributes:
        classes: Class names.
        labels: int64 [n], the true class.
        digests: uint64 [n], of what the model reads of each example, padding left out.
        intact: int64 [n], the intact model's.
        removed: int64 [K, n], with class i's skill removed.
        log_probabilities: float16 [n, K], of the classes by the intact model.
        earlier: int64 [E, n], with each skill of an earlier run removed; None where none was given.
        earlier_classes: Classes of these skills.
        earlier_skills: Digest of these skills (`skills_digest`).
        in_earlier: int64 [K, n], of the earlier run's model, with each skill of this run removed; None where that was
            not measured.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    digests: np.ndarray
    intact: np.ndarray
    removed: np.ndarray
    log_probabilities: np.ndarray
    earlier: np.ndarray | None = None
    earlier_classes: tuple[str, ...] = ()
    earlier_skills: str | None = None
    in_earlier: np.ndarray | None = None

    def save(self, directory: str | Path) -> Path:
        """Write `decisions.safetensors` into the folder, class indices in as few bytes as hold them; its path."""
        path = files.output_folder(directory) / FILE
        small = np.min_scalar_type(len(self.classes) - 1)
        arrays = {
            "labels": self.labels.astype(small),
            "digests": self.digests,
            "intact": self.intact.astype(small),
            "removed": self.removed.astype(small),
            "log_probabilities": self.log_probabilities,
        }
        for name in _OPTIONAL:
            if (decided := getattr(self, name)) is not None:
                arrays[name] = decided.astype(small)
        header = {
            "schema": SCHEMA,
            "classes": self.classes,
            "earlier_classes": self.earlier_classes,
            "earlier_skills": self.earlier_skills,
        }
        files.write_arrays(path, arrays, header)
        return path

    @staticmethod
    def load(directory: str | Path) -> Decisions:
        """Read what `save` wrote; raises DataError where the file is missing, broken or of another version."""
        path, remedy = Path(directory) / FILE, REMEDY
        arrays, header = files.read_arrays(path, SCHEMA, remedy)
        with files.whole(path, remedy):
            classes, earlier = tuple(header["classes"]), tuple(header["earlier_classes"])
            found = {
                name: np.asarray(arrays[name], dtype=np.int64)
                for name in ("labels", "intact", "removed", *_OPTIONAL)
                if name in arrays or name not in _OPTIONAL
            }
            n, k = len(found["labels"]), len(classes)
            shapes = {
                "labels": (n,), "intact": (n,), "removed": (k, n), "earlier": (len(earlier), n), "in_earlier": (k, n)
            }  # fmt: skip
            fits = all(found[name].shape == shapes[name] for name in found)
            within = all(0 <= value.min(initial=0) <= value.max(initial=0) < k for value in found.values())
            digests, log_probabilities = arrays["digests"], arrays["log_probabilities"]
            fits &= digests.shape == (n,) and digests.dtype == np.uint64 and log_probabilities.shape == (n, k)
            if not fits or not within or ("earlier" in found) != bool(earlier):
                raise ValueError("arrays that do not fit each other")
            return Decisions(
                classes=classes,
                digests=digests,
                log_probabilities=log_probabilities,
                earlier_classes=earlier,
                earlier_skills=header["earlier_skills"],
                **found,
            )
