"""Ablations as weights: a factor on a neuron is a factor on its column, a constant in its place is one in the bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from skillfast.ablation.interventions import Condition, Interventions
from skillfast.errors import ArgumentError
from skillfast.models.columns import written
from skillfast.vocabulary import FOLDED

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor, nn

    from skillfast.models.columns import Columns
    from skillfast.models.sites import Site
    from skillfast.statistics.scores import NeuronScores


def folded(
    model: nn.Module,
    conditions: Sequence[Condition],
    reference: NeuronScores | None = None,
    untied: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """Weights with which the model does by itself what it does inside the ablations of all these conditions.

    Args:
        model: The model; it stays as it is.
        conditions: What to do to which neurons, as contexts of `ablate` one inside the other: factors on a neuron that
            several have multiply.
        reference: Scores of this model, for `mode="mean"`.
        untied: Names of parameters that others share and that may become their own.

    Returns:
        Name -> new value of each parameter that changes, in its dtype and where it is. What other neurons write through
        is bitwise what it was.

    Raises:
        ArgumentError: As of `ablate`; a mode that differs between examples; a constant that no bias takes.
        ModelError: A projection whose weights are not plain, or are another module's, too.
    """
    for condition in conditions:
        if condition.mode not in FOLDED:
            raise ArgumentError(
                f"mode: expected one of {', '.join(FOLDED)} for weights, got {condition.mode!r}, which is not the same "
                "for every example; use skillfast.ablate"
            )
    interventions = Interventions(model, conditions, reference)
    changed: dict[str, Tensor] = {}
    for site in interventions.sites:
        how = written(model, site)
        scale, shift = _combined(interventions, site)
        neurons = ((scale != 1) | (shift != 0)).nonzero()[:, 0]
        for columns in how.columns:
            if columns.name not in untied:
                columns.refuse_shared(model, site)
            if bool(shift.any()):
                changed.update(_with_constants(model, site, how.bias, columns, neurons, shift, changed))
            values = changed.setdefault(columns.name, columns.parameter.detach().clone())
            view, at = columns.by_neuron(values), columns.at(neurons)
            kept = view[at].double()
            view[at] = (kept * _along(scale[neurons], kept)).to(view.dtype)
    return changed


def _combined(interventions: Interventions, site: Site) -> tuple[Tensor, Tensor]:
    """Factor and constant float64 [D] of every neuron of a site, of all conditions one after the other."""
    scale, shift = torch.ones(site.width, dtype=torch.float64), torch.zeros(site.width, dtype=torch.float64)
    for condition in range(len(interventions.conditions)):
        found = interventions.factors(condition).get(site)
        if found is not None:
            factor, constant = (each[0] for each in found)
            scale, shift = scale * factor, shift * factor + constant
    return scale, shift


def _with_constants(
    model: nn.Module,
    site: Site,
    bias: str | None,
    columns: Columns,
    neurons: Tensor,
    shift: Tensor,
    changed: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The bias with what the neurons' constants add, by the weights as they were."""
    if bias is None:
        raise ArgumentError(
            f"mode 'mean': expected a bias at {site.path} that takes the means, got none, or a convolution with edges; "
            f"use mode 'zero', or leave out components {site.kind}"
        )
    old = changed.get(bias, model.get_parameter(bias).detach())
    weights = columns.by_neuron(columns.parameter.detach())[columns.at(neurons)].double().flatten(1)  # [S, outputs]
    return {bias: (old.double() + shift[neurons].to(weights.device) @ weights).to(old.dtype)}


def _along(factors: Tensor, like: Tensor) -> Tensor:
    return factors.to(like.device).view(-1, *(1,) * (like.dim() - 1))
