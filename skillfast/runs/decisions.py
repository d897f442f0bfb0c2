"""What a run keeps of each test example, for `skillfast compare`; and an earlier run's skills, removed as well."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import log_softmax

from skillfast.ablation.donors import example_digests
from skillfast.ablation.interventions import Condition
from skillfast.ablation.sweep import SweepResult, sweep
from skillfast.errors import SkillfastError
from skillfast.models.batches import read_batch
from skillfast.models.sites import fingerprint
from skillfast.results import records, skills
from skillfast.results.bench import REMEDY
from skillfast.results.decisions import Decisions
from skillfast.runs.earlier import earlier_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from skillfast.runs.removals import Removals
    from skillfast.runs.session import Session
    from skillfast.skills.skill import Skill

OTHERWISE = 0.01  # share of the examples on which a model may decide otherwise on another device or in another dtype


def remove_earlier(session: Session, found: Mapping[str, Skill], directory: str) -> SweepResult | None:
    """Remove the skills of an earlier run on the test part; None, and a line, where they are of another architecture.

    Args:
        session: The run.
        found: The earlier run's skills, by name.
        directory: Folder of the earlier run, which the line names.
    """
    subject = session.subject
    theirs, ours = next(iter(found.values())).fingerprint, fingerprint(subject.model)
    if theirs not in (None, ours):
        session.say(f"the skills of {directory} are of another architecture: they are not removed from this model")
        return None
    return sweep(
        subject.model,
        subject.loader("test"),
        [Condition(skill, scale=session.config.ablate.scale, name=name) for name, skill in found.items()],
        classes=subject.splits.classes,
        keep_predictions=True,
        quiet=session.quiet,
    )


def remove_from_earlier(
    session: Session, directory: str | Path, removals: Removals, model: torch.nn.Module | None = None
) -> SweepResult | None:
    """Remove this run's skills from the earlier run's model on the test part; None, and a line, where it is not there.

    Args:
        session: The run.
        directory: Folder of the earlier run, of the same architecture.
        removals: What this run removed.
        model: The earlier run's model; None loads it.
    """
    subject = session.subject
    try:
        found = sweep(
            earlier_model(session, Path(directory)) if model is None else model,
            subject.loader("test"),
            removals.whole,
            classes=subject.splits.classes,
            keep_predictions=True,
            quiet=session.quiet,
        )
    except SkillfastError as error:
        session.say(f"the skills are not removed from the model of {directory}: {error}")
        return None
    before = Decisions.load(directory)
    decided = dict(zip(before.digests.tolist(), before.intact.tolist(), strict=True))
    same = [decided[digest] == at for digest, at in zip(_digests(session), found.top2[:, 0], strict=True)
            if digest in decided]  # fmt: skip
    if (other := same.count(False)) > OTHERWISE * len(same):
        session.say(
            f"the skills are not removed from the model of {directory}: what is loaded is another model, that decides "
            f"otherwise on {other:,} of {len(same):,} examples"
        )
        return None
    return found


def _digests(session: Session) -> list[int]:
    """Digests of the test examples, of what the model reads."""
    subject = session.subject
    return [
        digest
        for batch in subject.loader("test")
        for digest, _ in example_digests(subject.model, read_batch(batch).inputs, 0)
    ]


def kept_decisions(
    session: Session,
    removals: Removals,
    swept: SweepResult,
    earlier: SweepResult | None,
    in_earlier: SweepResult | None,
) -> Decisions:
    """What the run decided on each test example.

    Args:
        session: The run.
        removals: What it removed.
        swept: The sweep, with predictions and logits.
        earlier: Another run's skills removed, from `remove_earlier`.
        in_earlier: The skills removed from that run's model, from `remove_from_earlier`.
    """
    subject, like = session.subject, session.config.run.like
    assert swept.baseline_logits is not None
    found = Decisions(
        classes=tuple(subject.splits.classes),
        labels=swept.labels,
        digests=np.array(_digests(session), dtype=np.uint64),
        intact=swept.top2[:, 0],
        removed=swept.predictions_of(condition.name for condition in removals.whole),
        log_probabilities=log_softmax(swept.baseline_logits.astype(np.float64), axis=1).astype(np.float16),
    )
    if earlier is None or like is None:
        return found
    of = records.read(skills.Skills, Path(like) / skills.FILE, REMEDY)
    return Decisions(
        **vars(found)
        | {
            "earlier": earlier.predictions_of(earlier.names),
            "earlier_classes": earlier.names,
            "earlier_skills": skills.skills_digest(of),
            "in_earlier": None if in_earlier is None else in_earlier.predictions_of(c.name for c in removals.whole),
        }
    )
