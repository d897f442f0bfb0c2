"""Models that never saw a class: the reference for what a removal of it may leave."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast.ablation.sweep import sweep
from skillfast.errors import ArgumentError
from skillfast.evaluation.probes import OtherModel, Reader
from skillfast.models.sites import find_sites
from skillfast.runs.kept import JSON

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from skillfast.runs.session import Session
    from skillfast.runs.subject import Subject

STAGE = "never_seen"
_LEAST = 3  # classes: without one of them there are still two to be told apart


def check_never_seen(subject: Subject) -> None:
    """Raise ArgumentError for classes to be left out that the data or the model does not allow, before any training."""
    classes, asked = subject.splits.classes, subject.config.ablate.never_seen
    if unknown := [name for name in asked if name not in classes]:
        known = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        raise ArgumentError(f"never_seen: expected classes among {known}, got {unknown[0]!r}; check its name")
    if asked and len(classes) < _LEAST:
        raise ArgumentError(
            f"never_seen: expected data of {_LEAST} classes at least, got {len(classes)}; leave it out, since one "
            "class alone cannot be learned"
        )
    if asked and not any(site.kind == "head" for site in find_sites(subject.model)):
        raise ArgumentError(
            f"never_seen: expected a model with one linear classifier, got {subject.name} without; leave it out"
        )


def never_seen(session: Session) -> dict[int, OtherModel]:
    """Train and read a model for each class that the settings name; by class.

    Each is a stage of its own, of which an interrupted run keeps what was read; the default model's are cached.
    """
    subject, found = session.subject, {}
    classes = subject.splits.classes
    for name in subject.config.ablate.never_seen:
        target = classes.index(name)
        read = session.stage(STAGE, partial(_train_and_read, session, target), JSON, part=name)
        predicted, probed = (np.asarray(read[key], np.int64) for key in ("predicted", "probed"))
        found[target] = OtherModel(predicted, probed, read["n_train"])
    return found


def _train_and_read(session: Session, target: int) -> dict[str, Any]:
    from skillfast.models.digits import load_or_train_digits
    from skillfast.runs.images import train_anew  # only for images: it imports timm, which takes seconds

    subject, config, quiet = session.subject, session.config, session.quiet
    splits = subject.splits
    session.say(f"training a model that never sees {splits.classes[target]}, as {subject.name} was trained")
    # the run's own context would keep low-precision copies of weights from one training step to the next
    with torch.autocast(subject.device.type, enabled=False, cache_enabled=False):
        if config.model.name is None:
            loaded, trained = load_or_train_digits(splits, config.run.seed, quiet=quiet, without=target)
            model = loaded.model.to(subject.device)
        else:
            model, trained = train_anew(config, splits.without(target), subject.device, quiet=quiet)
    reader = Reader(splits.test.labels.numpy(), len(splits.classes), None)
    predicted, probed = read_model(model, subject.loader("test"), splits.classes, reader)
    return {"predicted": predicted.tolist(), "probed": probed.tolist(), "n_train": trained["n_train"]}


def read_model(
    model: torch.nn.Module, batches: Iterable[Any], classes: Sequence[str], reader: Reader
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions of examples: by a model's classifier, and by a probe that is fitted anew on its embeddings.

    Args:
        model: In evaluation mode, with one classifier.
        batches: The examples of the reader, in their order.
        classes: Class names.
        reader: Fits the probe.

    Returns:
        int64 [n] each.
    """
    swept = sweep(model, batches, [], classes=classes, keep_embeddings=True)
    assert swept.baseline_embeddings is not None
    return swept.top2[:, 0], reader.probe(swept.baseline_embeddings)
