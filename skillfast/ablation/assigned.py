"""Predictions of every example under removals that are assigned to it, such as that of its own class's skill."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast.ablation.interventions import Interventions, hooked
from skillfast.ablation.shared_forwards import SharedForwards
from skillfast.errors import ArgumentError
from skillfast.models.batches import fed_batches
from skillfast.models.sites import module_device, refuse_compiled, refuse_training
from skillfast.progress import Forecast, length_of, track

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from skillfast.ablation.donors import DonorBank
    from skillfast.ablation.interventions import Condition
    from skillfast.models.batches import Batch


def predict_assigned(
    model: torch.nn.Module,
    loader: Iterable[Any],
    rows: Sequence[Sequence[Condition]],
    assigned: np.ndarray,
    *,
    donors: DonorBank | None = None,
    what: str = "",
    quiet: bool = True,
) -> np.ndarray:
    """Predict every example under one condition of each row, the one that is assigned to it.

    A row costs at most one forward of the data, however many conditions are in it: removals of 100 classes' skills,
    each on the examples of its own class, cost as much as those of 10. Rows that are alike in the first blocks share
    these.

    Args:
        model: In evaluation mode.
        loader: Batches of (images, labels), not shuffled.
        rows: As many conditions in each.
        assigned: int64 [n], position of each example's condition in every row, in the loader's order; -1 for none.
        donors: For conditions with `mode="resample"`, which all of a row have or none; these run one after the other.
        what: What a row is, in words, to say how much will be run; nothing is said by default.
        quiet: Show no progress bar.

    Returns:
        int64 [len(rows), n].

    Raises:
        ArgumentError: A skill that does not fit the model, or another number of examples than are assigned.
        ModelError: A model in training mode, or wrapped by `torch.compile`.
    """
    refuse_compiled(model)
    refuse_training(model, "predict_assigned")
    wanted = torch.from_numpy(assigned).to(module_device(model))
    drawn = np.array([donors is not None and any(c.mode == "resample" for c in row) for row in rows], dtype=bool)
    found, done = [np.empty((len(rows), 0), np.int64)], 0
    shared: SharedForwards | None = None
    forecast: Forecast | None = None
    with torch.inference_mode():
        batches = fed_batches(loader, wanted.device)
        for batch in track(batches, f"predictions of {what or 'each example'}", length_of(loader), quiet):
            examples = batch.to(wanted.device)
            own = wanted[done : done + len(examples.labels)]
            if len(own) < len(examples.labels):
                break
            if not done:
                shared = SharedForwards(
                    model, [row for row, other in zip(rows, drawn, strict=True) if not other], examples
                )
                work = shared.work + int(drawn.sum())
                forecast = _forecast(len(rows), what, len(assigned), work) if what and rows else None
            assert shared is not None
            predicted = np.empty((len(rows), len(own)), np.int64)
            predicted[~drawn] = shared.predict(examples, own)
            for i in np.flatnonzero(drawn).tolist():
                predicted[i] = _with_donors(model, examples, Interventions(model, rows[i], None, donors), own)
            found.append(predicted)
            done += len(own)
            if forecast is not None:
                forecast.ran(len(own))
        else:
            if done == len(wanted):
                return np.concatenate(found, 1)
    raise ArgumentError(
        f"assigned: expected a condition for each example of the loader, got {len(wanted)}; give one for each"
    )


def _forecast(rows: int, what: str, examples: int, work: float) -> Forecast:
    """Says what will be run, in forwards of an example; `work` is how many whole ones an example takes."""
    whole = "" if work == rows else f", as long as {work * examples:,.0f} whole ones"
    return Forecast(f"{rows} {what} on {examples:,} examples: {rows * examples:,} forwards{whole}", examples)


def _with_donors(
    model: torch.nn.Module, examples: Batch, interventions: Interventions, own: torch.Tensor
) -> np.ndarray:
    """Predictions of a batch's examples, each under its own condition, one condition after the other."""
    found = torch.empty(len(own), dtype=torch.int64)
    for condition in own.unique().tolist():
        at = own == condition
        found[at.cpu()] = _under(model, examples.taken(at.nonzero()[:, 0]), interventions, condition).argmax(-1).cpu()
    return found.numpy()


def _under(model: torch.nn.Module, examples: Batch, interventions: Interventions, condition: int) -> torch.Tensor:
    """Logits of examples under one condition with donors, or -1: under none."""
    bank = interventions.donors
    if condition < 0 or bank is None:
        return examples.logits(model)
    known = bank.rows_of(model, examples.inputs)
    with hooked(model, interventions, interventions.sites, [condition], lambda: known):
        return examples.logits(model)
