"""A skill's own parameters, and a context in which a trainer changes these alone."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from skillfast.errors import ArgumentError, ModelError
from skillfast.models.batches import inputs_of
from skillfast.models.columns import written
from skillfast.models.coverage import graph_of, random_inputs, warm_up
from skillfast.models.experts import experts_of, units_first
from skillfast.models.inputs import mapped
from skillfast.models.projections import CONVOLUTIONS, TRANSPOSED
from skillfast.models.sites import (
    check_neurons,
    find_sites,
    fingerprint,
    module_device,
    refuse_compiled,
    unwrap_compiled,
)
from skillfast.models.watching import watched
from skillfast.vocabulary import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from skillfast.models.activations import Activations
    from skillfast.models.sites import Site
    from skillfast.skills.skill import Skill


def skill_parameters(
    model: nn.Module,
    skill: Skill,
    batch: torch.Tensor | Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    components: Sequence[str] = KINDS,
    label_key: str | None = None,
) -> dict[str, torch.Tensor]:
    """Masks of the parameters that act on the model's output through a skill's neurons alone.

    Each neuron's column of the output projection is one part of them. The other are the rows that make the neurons: of
    `fc1`, of gate and up projections, of values; of queries and keys where all of a head is in the skill, for they make
    the whole head; of an input that several neurons share where all of these are. They are found by gradients, in any
    family: with the skill's neurons cut from the graph of one forward, a row of the skill's own has a gradient of
    exactly 0, and another one without the cut.

    Args:
        model: The model, which stays as it is.
        skill: The neurons.
        batch: As `trace` takes it, with labels or without; random inputs by default. Neurons that are 0 on all of it
            have no gradient, so that nothing is known of what makes them: a warning counts them.
        components: Kinds of sites whose neurons count.
        label_key: Key of the labels in a batch that is a mapping; by default `labels` or `label`.

    Returns:
        Name -> bool mask, shaped like the parameter, for each parameter with anything of the skill's own.

    Raises:
        ArgumentError: Neurons that the model lacks, none of these kinds, or no batch where nobody knows what the model
            takes.
        ModelError: Output projections that are quantised, adapted, sharded, or whose weights are other modules', too.
    """
    model = unwrap_compiled(model)
    refuse_compiled(model)
    chosen = _chosen(model, skill, components)
    inputs = random_inputs(model) if batch is None else inputs_of(batch, label_key)
    inputs = mapped(inputs, lambda x: x.to(module_device(model)))
    masks: dict[str, Tensor] = {}
    for site in chosen:
        for columns in written(model, site).columns:
            columns.refuse_shared(model, site)
            mask = masks.setdefault(columns.name, torch.zeros_like(columns.parameter, dtype=torch.bool))
            columns.by_neuron(mask)[columns.at(skill.neurons[site.name])] = True
    warm_up(model, inputs)
    zero: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for site in chosen:
            stack.enter_context(watched(model, site, partial(_note, zero, site)))
        whole = _gradients(model, inputs)
    with ExitStack() as stack:
        for site in chosen:
            stack.enter_context(watched(model, site, partial(_cut, site, skill.neurons[site.name])))
        past = _gradients(model, inputs)
    named = dict(model.named_parameters())
    rows = {name: _rows(model, name, gradient != 0, past.get(name)) for name, gradient in whole.items()}
    for name, own in rows.items():
        path, _, kind = name.rpartition(".")
        weight = rows.get(f"{path}.weight")
        if kind == "bias" and weight is not None and (along := _inputs_of(model, f"{path}.weight", weight)):
            own = weight.any(along)  # a softmax does not see its keys' biases, whose gradient is rounding
        if bool(own.any()):
            masks[name] = masks[name] | own if name in masks else own
    silent = sum(int(zero[site.name][skill.neurons[site.name]].sum()) for site in chosen if site.name in zero)
    if silent:
        warnings.warn(
            f"{silent} of the {sum(len(skill.neurons[site.name]) for site in chosen)} neurons of skill {skill.name!r} "
            "are 0 on this batch: of what makes them nothing is in the masks; pass another batch",
            RuntimeWarning,
            stacklevel=2,
        )
    return {name: masks[name] for name in named if name in masks}


@contextmanager
def tune_only(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let an optimiser change nothing but what the masks hold, whatever trainer runs inside the context.

    Gradients of everything else are 0 before anyone sees them, so that clipping and moments are those of the masked
    parameters. What weight decay or an optimiser's earlier momentum does to the rest of a masked parameter is undone
    after each step; parameters without a mask need no gradient inside. Buffers, such as the running means of a batch
    norm, are the trainer's.

    Args:
        model: The model; all of its parameters are as before after the context, but for what was tuned.
        masks: Name -> bool mask, from `skill_parameters`; several skills' may be joined with `|`.

    Raises:
        ArgumentError: A parameter that the model lacks, or a mask of another shape.
    """
    model = unwrap_compiled(model)
    named = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in named or named[name].shape != mask.shape or mask.dtype != torch.bool:
            got = f"{mask.dtype} {list(mask.shape)}"
            raise ArgumentError(
                f"masks: expected bool masks of the model's parameters, got {got} for {name!r}; "
                "make them with skill_parameters(model, skill)"
            )
    before = {parameter: parameter.requires_grad for parameter in named.values()}
    tuned = {named[name]: mask.to(named[name].device) for name, mask in masks.items()}
    kept = {parameter: parameter.detach().clone() for parameter in tuned}

    def restore(optimiser: torch.optim.Optimizer, *_: object) -> None:
        held = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
        with torch.no_grad():
            for parameter, mask in tuned.items():
                if id(parameter) in held:
                    parameter.copy_(torch.where(mask, parameter, kept[parameter]))

    with ExitStack() as stack:
        for parameter in named.values():
            parameter.requires_grad_(parameter in tuned)
            if parameter not in tuned:
                parameter.grad = None  # one of an earlier step would be taken again
        stack.callback(lambda: [parameter.requires_grad_(required) for parameter, required in before.items()])
        for parameter, mask in tuned.items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~mask, 0)
            handle = parameter.register_hook(lambda gradient, mask=mask: gradient.masked_fill(~mask, 0))
            stack.callback(handle.remove)
        stack.callback(register_optimizer_step_post_hook(restore).remove)
        yield


def _chosen(model: nn.Module, skill: Skill, components: Sequence[str]) -> list[Site]:
    sites = find_sites(model)
    check_neurons(skill, {site.name: site for site in sites}, fingerprint(model))
    chosen = [site for site in sites if site.kind in components and site.name in skill.neurons]
    if not chosen:
        raise ArgumentError(
            f"components: expected kinds of sites in which skill {skill.name!r} has neurons, got "
            f"{', '.join(components)}; it is in {', '.join(skill.neurons)}"
        )
    return chosen


def _note(zero: dict[str, Tensor], site: Site, found: Activations) -> None:
    """Note which neurons are 0 on every token, bool [D]."""
    here = found.summed((found.values.detach() != 0).float()).sum(0) == 0
    zero[site.name] = zero[site.name] & here.cpu() if site.name in zero else here.cpu()


def _cut(site: Site, neurons: Tensor, found: Activations) -> Tensor:
    """The activations, those of some neurons without a gradient."""
    values = found.values
    kept = torch.ones(1, site.width, dtype=torch.float32, device=values.device)
    kept[0, neurons.to(values.device)] = 0
    return found.scaled(kept) + replace(found, values=values.detach()).scaled(1 - kept)


def _gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Name -> gradient of a random projection of the output, of every parameter that has one."""
    generator = torch.Generator().manual_seed(1)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    with graph_of(model, inputs) as (outputs, _), torch.enable_grad():
        if not outputs:
            raise ModelError(
                f"{type(model).__name__}: expected an output that depends on the weights, got none; pass another batch"
            )
        projected = sum(
            (out.float() * torch.randn(out.shape, generator=generator).to(out.device)).sum() for out in outputs
        )
        found = torch.autograd.grad(projected, list(named.values()), allow_unused=True)  # type: ignore[arg-type]
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def _rows(model: nn.Module, name: str, acts: Tensor, past: Tensor | None) -> Tensor:
    """Bool like a parameter: rows that act, and none of which acts past the skill."""
    shape, along = acts.shape, _inputs_of(model, name, acts)
    acts_past = torch.zeros_like(acts) if past is None else past != 0
    if along:
        acts, acts_past = acts.any(along, keepdim=True), acts_past.any(along, keepdim=True)
    return (acts & ~acts_past).expand(shape)


def _inputs_of(model: nn.Module, name: str, weight: Tensor) -> tuple[int, ...]:
    """Dimensions of a parameter along which the inputs of one row lie; none where its entries stand alone."""
    path = name.rpartition(".")[0]
    module = model.get_submodule(path)
    if weight.dim() < 2:
        return ()
    if isinstance(module, TRANSPOSED) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf")):
        return (0, *range(2, weight.dim()))
    if isinstance(module, (torch.nn.Linear, *CONVOLUTIONS)):
        return tuple(range(1, weight.dim()))
    if weight.dim() == 3 and experts_of(model, path, model.get_submodule(path)) is not None:
        return (1,) if units_first(module) else (2,)
    return ()
