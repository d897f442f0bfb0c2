"""Predictions of every example under one skill's removal, the skill that is assigned to it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast.ablation.interventions import Condition, Interventions
from skillfast.errors import ArgumentError
from skillfast.models.batches import read_batch
from skillfast.models.sites import module_device, refuse_compiled, refuse_training
from skillfast.progress import track

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from skillfast.models.sites import Site
    from skillfast.skills.skill import Skill


def predict_assigned(
    model: torch.nn.Module,
    loader: Iterable[Any],
    skills: Sequence[Skill],
    assigned: np.ndarray,
    *,
    scale: float = 0.0,
    quiet: bool = True,
) -> np.ndarray:
    """Predict every example while the skill that is assigned to it is removed.

    It costs one forward of the data, however many skills there are.

    Args:
        model: In evaluation mode.
        loader: Batches of (images, labels), not shuffled.
        skills: The skills.
        assigned: int64 [n], position of each example's skill, in the loader's order; -1 for none.
        scale: Factor on the activations of removed neurons.
        quiet: Show no progress bar.

    Returns:
        int64 [n].

    Raises:
        ArgumentError: A skill that does not fit the model, or another number of examples than are assigned.
        ModelError: A model in training mode, or wrapped by `torch.compile`.
    """
    refuse_compiled(model)
    refuse_training(model, "predict_assigned")
    interventions = Interventions(
        model, [Condition(skill, scale=scale, name=str(i)) for i, skill in enumerate(skills)], None
    )
    wanted = torch.from_numpy(np.where(assigned < 0, len(skills), assigned)).to(module_device(model))
    found, done = [], 0
    with torch.inference_mode():
        for batch in track(loader, "predictions under each example's skill", quiet=quiet):
            examples = read_batch(batch).to(wanted.device)
            rows = wanted[done : done + len(examples.labels)]
            if len(rows) < len(examples.labels):
                break
            with ExitStack() as stack:
                for site in interventions.sites:

                    def changed(
                        _: torch.nn.Module, args: tuple[Any, ...], site: Site = site, rows: torch.Tensor = rows
                    ) -> tuple[Any, ...]:
                        return (interventions.apply_each(site, args[0], rows), *args[1:])

                    stack.callback(model.get_submodule(site.path).register_forward_pre_hook(changed).remove)
                found.append(examples.logits(model).argmax(-1).cpu().numpy())
            done += len(rows)
        else:
            if done == len(wanted):
                return np.concatenate([np.empty(0, np.int64), *found])
    raise ArgumentError(
        f"assigned: expected a skill for each example of the loader, got {len(wanted)}; give one for each"
    )
