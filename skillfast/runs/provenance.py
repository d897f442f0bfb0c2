"""What a run measured: the SHA-256 of its weights and of its data."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from skillfast.models.digests import weights_digest
from skillfast.results.provenance import DataDigests, PartDigests, Weights
from skillfast.vocabulary import GIVEN

if TYPE_CHECKING:
    from skillfast.data.splits import LabelledDataset, Splits
    from skillfast.runs.subject import Subject


def data_digests(splits: Splits) -> DataDigests:
    """Digests of each part of the data, from all of its examples and labels."""
    return DataDigests(*(_part_digests(part) for part in (splits.select, splits.validate, splits.test)))


def _part_digests(part: LabelledDataset) -> PartDigests:
    examples, labels = hashlib.sha256(), hashlib.sha256()
    for index in range(len(part)):
        content = part.content(index)
        examples.update(len(content).to_bytes(8, "little"))
        examples.update(content)
    labels.update(json.dumps(list(part.classes)).encode() + b"\n")
    labels.update(part.labels.numpy().astype("<i8").tobytes())
    return PartDigests(examples.hexdigest(), labels.hexdigest())


def measured_weights(subject: Subject) -> Weights:
    """Digest and origin of the weights of a subject, once they are trained."""
    model: Any = getattr(subject.model, "language_model", subject.model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    origins = {
        GIVEN: f"{type(model).__name__} that the caller gave",
        "scratch": f"random weights of seed {subject.config.run.seed}",
        "checkpoint": str(subject.config.model.checkpoint),
        "pretrained": cfg.get("hf_hub_id") or cfg.get("url") or subject.name.removeprefix("hf:"),
    }
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    return Weights(weights_digest(model), origins[subject.source], revision)
