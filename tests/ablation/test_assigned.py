"""Predictions of each example under a removal of its own, with donors and without, in one call."""

from __future__ import annotations

import numpy as np
import torch
from conftest import one_line

import skillfast
from skillfast import Condition, Skill, progress
from skillfast.ablation.assigned import predict_assigned
from skillfast.errors import ArgumentError

SKILLS = [Skill("a", {"blocks.0.mlp": range(60)}), Skill("b", {"blocks.2.attn": range(12), "head": [3, 4]})]


def test_rows_with_donors_and_without_keep_their_places(vit, batches):
    """Row by row what `ablate` gives, an example at a time; a row that no donor is needed in is the intact model."""
    images = torch.cat([x for x, _ in batches])
    with torch.no_grad():  # so that every class is predicted of some image
        vit.head.bias -= vit(images).mean(0)
    bank = skillfast.donors(vit, batches, SKILLS, n_donors=8)
    assigned = np.random.default_rng(0).integers(-1, 2, 37)
    modes = ("resample", "zero", "resample", "zero")
    rows = [[Condition(skill, mode=mode, scale=-i) for skill in SKILLS] for i, mode in enumerate(modes)]
    rows.append([Condition(skill, components=("ssm",), mode="resample") for skill in SKILLS])
    lines = []
    with progress.telling(lines.append):
        found = predict_assigned(vit, batches, rows, assigned, donors=bank, what="rows")
    assert lines[0] == "5 rows on 37 examples: 185 forwards"
    with torch.inference_mode():
        want = np.tile(vit(images).argmax(1).numpy(), (5, 1))
        for i, row in enumerate(rows[:4]):
            for c, condition in enumerate(row):
                with skillfast.ablate(vit, condition.skill, mode=condition.mode, scale=condition.scale, donors=bank):
                    want[i] = np.where(assigned == c, vit(images).argmax(1).numpy(), want[i])
    np.testing.assert_array_equal(found, want)
    assert len(np.unique(want, axis=0)) >= 4
    text = one_line(ArgumentError, predict_assigned, vit, batches, rows[:1], assigned)
    assert "expected donors=skillfast.donors(model, loader, skills), got none" in text
