"""What a class loses where something else than 0 takes the place of its skill's neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader

from skillfast.ablation.assigned import predict_assigned
from skillfast.ablation.constants import STEPS, mean_constants, optimal_constants
from skillfast.ablation.donors import donors
from skillfast.ablation.interventions import Condition
from skillfast.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from skillfast.runs.session import Session
    from skillfast.skills.skill import Skill

DONORS = 64  # fewer than for a sweep of its own: their neurons of all skills are kept at once
ROWS = 128  # examples per step of fitting constants, at most
PASSES = 3  # over the select part while they are fitted, at most


def replaced_predictions(session: Session, skills: Sequence[Skill], labels: np.ndarray) -> list[list[int]] | None:
    """Predict every test example with means, donors and optimal constants in place of its own class's skill.

    Donors are drawn, and means and constants found, on the select part.

    Args:
        session: The running session.
        skills: One per class.
        labels: int64 [n], of the test part.

    Returns:
        [3][n], or None where donors do not fit the memory, which is said.
    """
    subject, quiet, seed = session.subject, session.quiet, session.config.run.seed
    select = subject.loader("select")
    try:
        bank = donors(subject.model, select, skills, n_donors=DONORS, seed=seed, quiet=quiet)
    except ArgumentError as error:
        session.say(f"what takes the place of neurons is not compared: {error}")
        return None
    shuffled: DataLoader[tuple[torch.Tensor, torch.Tensor]] = DataLoader(
        select.dataset,
        max(1, min(ROWS, PASSES * len(select.dataset) // STEPS)),  # type: ignore[arg-type]
        shuffle=True,
        collate_fn=select.collate_fn,
        generator=torch.Generator().manual_seed(seed),
    )
    fitted = optimal_constants(subject.model, shuffled, skills, bank, seed=seed, quiet=quiet)
    conditions = [
        [Condition(skill, mode="constant", constants=mean_constants(skill, bank)) for skill in skills],
        [Condition(skill, mode="resample") for skill in skills],
        [
            Condition(skill, mode="constant", constants=constants)
            for skill, constants in zip(skills, fitted, strict=True)
        ],
    ]
    found = predict_assigned(
        subject.model,
        subject.loader("test"),
        conditions,
        labels,
        donors=bank,
        what="values in place of a skill",
        quiet=quiet,
    )
    rows: list[list[int]] = found.tolist()
    return rows
