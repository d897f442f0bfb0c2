"""A classifier's outcomes: every case and factor in one sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillfast.ablation.interventions import Condition
from skillfast.ablation.sweep import sweep
from skillfast.evaluation.classification import intact_measures, measure, own_class, unchanged
from skillfast.evaluation.resampling import PairedBootstrap
from skillfast.runs.grid import outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from skillfast.results.evaluation import Intact, Outcome
    from skillfast.runs.grid import Case


def class_outcomes(
    model: torch.nn.Module,
    loader: Iterable[Any],
    cases: Sequence[Case],
    classes: Sequence[str],
    *,
    replicates: int = 1000,
    seed: int = 0,
    quiet: bool = True,
) -> tuple[Intact, list[Outcome]]:
    """Every case's measures on held-out data, in one sweep.

    Args:
        model: In evaluation mode.
        loader: Batches of (inputs, labels) that chose nothing.
        cases: From `cases_of_scores` or `cases_of_skills`.
        classes: Class names; a skill named in its metric as `label:NAME` has NAME as its own class.
        replicates: Number of bootstrap replicates.
        seed: Seed of the bootstrap.
        quiet: Show no progress bar.

    Returns:
        The intact model's measures, and an outcome per case and factor, in their order.
    """
    rows = [(case, scale) for case in cases for scale in case.scales]
    conditions = [
        Condition(skill, scale=scale, name=f"{i}: {skill.name}")
        for i, (case, scale) in enumerate(rows)
        if scale != 1  # the intact model
        for skill in (case.skill, *case.controls)
    ]
    swept = sweep(model, loader, conditions, classes=classes, keep_predictions=True, quiet=quiet)
    assert swept.predictions is not None
    intact, bootstrap = swept.top2[:, 0], PairedBootstrap(swept.labels, len(classes), replicates, seed)
    found, remaining = [], iter(swept.predictions)
    for case, scale in rows:
        own = own_class(case.skill.metric, classes)
        if scale == 1:
            measured = [unchanged(bootstrap, intact, own)] * (1 + len(case.controls))
        else:
            measured = [measure(bootstrap, intact, next(remaining), own) for _ in (case.skill, *case.controls)]
        found.append(outcome(case, scale, measured[0], measured[1:]))
    return intact_measures(bootstrap, intact), found
