"""Which weights a neuron writes through: its column of an output projection, its part of a block's experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from skillfast.errors import ModelError
from skillfast.models.experts import by_unit, down_projections
from skillfast.models.projections import CONVOLUTIONS, TRANSPOSED

if TYPE_CHECKING:
    from collections.abc import Callable

    from skillfast.models.sites import Site

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_OF_LAYERS = {"weight", "bias"}


@dataclass(frozen=True)
class Columns:
    """The part of a parameter that a site's neurons write through.

    Attributes:
        name: Path of the parameter in the model.
        parameter: The parameter.
        by_neuron: Gives a view [*shape, ...], neurons first, of a tensor that is shaped like the parameter.
        shape: What the neurons are counted by: `(D,)`, `(groups, D / groups)` or `(experts, units)`.
    """

    name: str
    parameter: nn.Parameter
    by_neuron: Callable[[torch.Tensor], torch.Tensor]
    shape: tuple[int, ...]

    def refuse_shared(self, model: nn.Module, site: Site) -> None:
        """Raise ModelError where another module has the parameter, too."""
        place = self.parameter.untyped_storage().data_ptr()
        named = model.named_parameters(remove_duplicate=False)
        others = [name for name, each in named if name != self.name and each.untyped_storage().data_ptr() == place]
        if others:
            raise ModelError(
                f"{site.name}: expected weights that nothing else uses, got {self.name} shared with "
                f"{', '.join(others[:2])}; give each its own, or leave out components {site.kind}"
            )

    def at(self, neurons: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Where neurons, int64 [S], stand in what `by_neuron` gives."""
        return torch.unravel_index(neurons.to(self.parameter.device), self.shape)


@dataclass(frozen=True)
class Written:
    """How a site's neurons act on what follows them.

    Attributes:
        columns: Everything that is linear in a neuron: its column of a weight; of an expert's gate the bias, too.
        bias: Path of the bias that can take a constant in the place of neurons; None where there is none.
    """

    columns: tuple[Columns, ...]
    bias: str | None = None


def written(model: nn.Module, site: Site) -> Written:
    """How the neurons of a site act on what follows.

    Args:
        model: The model.
        site: One of its sites.

    Raises:
        ModelError: A projection that is not linear in one plain weight, because it is quantised, adapted, sharded, or
            of another kind; or weights that are not in memory.
    """
    module = model.get_submodule(site.path)
    if site.experts is not None:
        return Written(_of_experts(module, site))
    seen = _seen_by_neuron(module)
    weight = getattr(module, "weight", None)
    if seen is None or not isinstance(weight, nn.Parameter) or set(dict(module.named_parameters())) - _OF_LAYERS:
        raise ModelError(
            f"{site.name}: expected a plain linear layer or convolution at {site.path}, got {type(module).__name__}; "
            "merge adapters into the weights, and load the model without quantisation"
        )
    by_neuron, shape = seen
    columns = _checked(Columns(f"{site.path}.weight", weight, by_neuron, shape), site)
    takes_constants = getattr(module, "bias", None) is not None and _is_pointwise(module)
    return Written((columns,), f"{site.path}.bias" if takes_constants else None)


def _seen_by_neuron(module: nn.Module) -> tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...]] | None:
    """How a projection's weight is seen neurons first, and their shape; None for another kind of module."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return torch.t, (module.in_features,)
    if isinstance(module, TRANSPOSED):  # [in, out / groups, ...]
        return _as_it_is, (module.in_channels,)
    if isinstance(module, CONVOLUTIONS):
        groups: int = module.groups
        return partial(_of_groups, groups), (groups, module.in_channels // groups)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # of GPT-2: [in, out]
        return _as_it_is, (len(module.weight),)  # type: ignore[arg-type]
    return None


def _as_it_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _of_groups(groups: int, weight: torch.Tensor) -> torch.Tensor:
    """[groups, in / groups, out / groups, ...] of a convolution's [out, in / groups, ...]."""
    return weight.view(groups, len(weight) // groups, *weight.shape[1:]).transpose(1, 2)


def _is_pointwise(module: nn.Module) -> bool:
    """Whether a constant neuron is a constant in every output, as it is not at the edges of a larger kernel."""
    if isinstance(module, TRANSPOSED):
        return False
    if not isinstance(module, CONVOLUTIONS):
        return True
    return (
        module.groups == 1
        and set(module.kernel_size) == {1}
        and module.padding in ((0,) * len(module.kernel_size), "valid", "same")
    )


def _of_experts(module: nn.Module, site: Site) -> tuple[Columns, ...]:
    weight = down_projections(module)
    if weight is None:
        raise ModelError(
            f"{site.name}: expected the down projections of all experts in one parameter, got a module for each; "
            "ablate the model in memory, with skillfast.ablate"
        )
    experts, units, *_ = by_unit(module, weight).shape
    found = (experts, units)
    name = next(name for name, parameter in module.named_parameters() if parameter is weight)
    columns = _checked(Columns(f"{site.path}.{name}", weight, partial(by_unit, module), found), site)
    if site.kind == "expert":
        return (columns,)
    # A gate is a factor on all that an expert gives.
    whole = Columns(columns.name, weight, columns.by_neuron, found[:1])
    bias = getattr(module, f"{name}_bias", None)
    if not isinstance(bias, nn.Parameter):
        return (whole,)
    return whole, _checked(Columns(f"{site.path}.{name}_bias", bias, _as_it_is, found[:1]), site)


def _checked(columns: Columns, site: Site) -> Columns:
    """The columns; raises ModelError where they are not the neurons', or cannot be written."""
    parameter = columns.parameter
    if parameter.is_meta:
        got = "weights that are offloaded"
    elif parameter.dtype not in _FLOATS:
        got = f"weights of {parameter.dtype}"
    elif type(parameter.data) is not torch.Tensor:
        got = f"a {type(parameter.data).__name__}"
    else:
        try:
            if columns.by_neuron(parameter.detach()).shape[: len(columns.shape)] == columns.shape:
                return columns
        except RuntimeError:  # flattened by a trainer that shards
            pass
        got = f"shape {list(parameter.shape)}"
    raise ModelError(
        f"{site.name}: expected {columns.name} whole, in floating point and in memory, got {got}; gather or load it so"
    )
