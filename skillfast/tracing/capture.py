"""Where neurons are read: inside the activation of a plain MLP, or by a hook before the output projection.

In an MLP that is `fc2(dropout(activation(fc1(x))))` with nothing active between activation and projection, the
activation module is swapped for one that applies it, writes it and pools it in one read. Everywhere else a forward
pre-hook reads the projection's input.
"""

from __future__ import annotations

import copy
import sys
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from skillfast.errors import ModelError
from skillfast.models.activations import RoutedActivations
from skillfast.models.watching import watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from skillfast.models.activations import Activations
    from skillfast.models.sites import Site
    from skillfast.vocabulary import Activation

    # (what goes into the activation, its name, whether the result is wanted) -> the result
    Read = Callable[[torch.Tensor, Activation, bool], torch.Tensor]


def activation_name(module: nn.Module) -> Activation | None:
    """The op's name for an activation module, or None for one that it does not have."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    names: dict[object, Activation] = {
        _of_timm("GELU"): "gelu", _of_timm("GELUTanh"): "gelu_tanh", nn.ReLU: "relu", nn.SiLU: "silu",
        nn.Identity: "identity",
    }  # fmt: skip
    return names.get(type(module))


def _of_timm(name: str) -> object:
    """A class of timm's layers; None while nobody has imported timm, so that no model is made of it."""
    return getattr(sys.modules.get("timm.layers"), name, None)


def plain_mlp(model: nn.Module, site: Site) -> nn.Module | None:
    """The MLP around a site where its activation may be swapped, or None: then a hook reads the site.

    It is one of timm's `Mlp`, whose dropout and norm between activation and projection do nothing, and which nobody
    watches there with hooks of their own.
    """
    parent, _, projection = site.path.rpartition(".")
    owner: Any = model.get_submodule(parent)
    if projection != "fc2" or site.layout != "tokens" or type(owner) is not _of_timm("Mlp"):
        return None
    if activation_name(owner.act) is None:
        return None
    dropping = owner.drop1.p > 0 and owner.drop1.training
    between = (owner.act, owner.drop1, owner.norm)
    watched = any(module._forward_hooks or module._forward_pre_hooks for module in between)
    if dropping or watched or type(owner.norm) is not nn.Identity or owner.fc2._forward_pre_hooks:
        return None
    return owner


class FusedActivation(nn.Module):
    """Stands in for an activation module: the same values flow on, and are read on the way.

    Args:
        original: The activation module.
        dropout: What follows it; its being active would be missed.
        read: Gets what goes into the activation.
    """

    def __init__(self, original: nn.Module, dropout: nn.Module, read: Read) -> None:
        super().__init__()
        self.original = original
        self.read = read
        name = activation_name(original)
        assert name is not None
        self.activation: Activation = name
        self._probability = float(getattr(dropout, "p", 0.0))
        self.train(original.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A copy of the model is not read."""
        return copy.deepcopy(self.original, memo)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the original gives."""
        if self.training and self._probability > 0:
            raise ModelError(
                "tracing: expected the dropout after an activation to stay inactive, got model.train() inside the "
                "context; enter the Tracer after it"
            )
        if torch.is_grad_enabled() and x.requires_grad:  # the op has no gradient
            y = self.original(x)
            self.read(y.detach(), "identity", False)
            return y
        return self.read(x, self.activation, True)


@contextmanager
def reading(model: nn.Module, site: Site, read: Read) -> Iterator[None]:
    """Hand every forward's neurons of a site to `read`; the model is as before on every way out."""
    owner = plain_mlp(model, site)
    if owner is None:

        def at_projection(found: Activations) -> None:
            read(found.values.detach(), "identity", False)

        with watched(model, site, at_projection):
            yield
        return
    original = owner.act
    owner.act = FusedActivation(original, owner.drop1, read)  # type: ignore[arg-type]  # modules both
    try:
        yield
    finally:
        owner.act = original


@contextmanager
def reading_routed(
    model: nn.Module,
    site: Site,
    read: Callable[[RoutedActivations], None],
    wanted: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Hand the rows of all experts to `read`, once per forward in which they are wanted."""
    parts: list[RoutedActivations] = []

    def keep(found: Activations) -> None:
        assert isinstance(found, RoutedActivations)
        if not wanted():
            return
        parts.append(replace(found, values=found.values.detach(), gate=found.gate.detach()))

    def after_experts(*_: object) -> None:
        if wanted():
            read(RoutedActivations.joined(parts))
        parts.clear()

    with watched(model, site, keep):
        handle = model.get_submodule(site.path).register_forward_hook(after_experts)
        try:
            yield
        finally:
            handle.remove()
