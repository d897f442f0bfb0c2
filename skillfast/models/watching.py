"""Where a site's activations are read and replaced in a forward, the one place for every command."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from skillfast.models.activations import Activations
from skillfast.models.experts import routed
from skillfast.models.projections import parent_of
from skillfast.models.shards import local_part, spread_as

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.utils.hooks import RemovableHandle

    from skillfast.models.sites import Site
    from skillfast.vocabulary import Layout

    # what flows on instead of a site's activations, like their `values`; None: what came
    See = Callable[[Activations], torch.Tensor | None]

_READERS = "_skillfast_readers"  # of an attention module of torch, how many want its projection called
_COUNTED = ("image_grid_thw", "grid_thw", "input_ids", "pixel_values", "inputs_embeds")


@contextmanager
def watched(
    model: torch.nn.Module, site: Site, see: See, *, wanted: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Hand the activations of a site to `see` in every forward inside the context.

    Contexts nest: each sees what those before it have left. The rows of a block's experts come in parts where they are
    computed expert by expert.

    Args:
        model: The model.
        site: Where.
        see: Gets [batch, ..., D] from every layout, of windows that a model folds into the batch [batch * windows, ...,
            D]; returns what flows on instead, or None for what came.
        wanted: Says whether `see` is called at all; for sites without experts.
    """
    if site.experts is not None:
        with routed(model, site, see):
            yield
        return

    def before_projection(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not wanted():
            return None
        replaced = see(Activations(turned(local_part(args[0]), site.layout)))
        if replaced is None:
            return None
        return spread_as(args[0], turned(replaced, site.layout, back=True)), *args[1:]

    with projecting(model, site):
        handle = model.get_submodule(site.path).register_forward_pre_hook(before_projection)
        try:
            yield
        finally:
            handle.remove()


def projecting(model: nn.Module, site: Site) -> AbstractContextManager[None]:
    """A context in which the module at a site's path is called, which torch's attention else does not do."""
    parent = parent_of(model, site.path)
    return _calling_its_projection(parent) if isinstance(parent, nn.MultiheadAttention) else nullcontext()


def samples_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How many samples a forward with these arguments has; None where no tensor is among them."""
    named = [kwargs[name] for name in _COUNTED if kwargs.get(name) is not None]
    found = [x for x in (*named, *tree_leaves((args, kwargs))) if isinstance(x, torch.Tensor) and x.dim()]
    return found[0].shape[0] if found else None


def on_samples(model: nn.Module, tell: Callable[[int], None]) -> RemovableHandle:
    """Tell how many samples each forward of a model has: rows of its first tensor, or images of packed patches."""

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (samples := samples_of(args, kwargs)) is not None:
            tell(samples)

    return model.register_forward_pre_hook(begin, with_kwargs=True)


def turned(x: torch.Tensor, layout: Layout, *, back: bool = False) -> torch.Tensor:
    """What a projection takes as [batch, ..., D], and back."""
    if layout == "channels_first":
        return x.movedim(-1, 1) if back else x.movedim(1, -1)
    return x.transpose(0, 1) if layout == "tokens_first" and x.dim() > 2 else x


@contextmanager
def _calling_its_projection(attention: nn.MultiheadAttention) -> Iterator[None]:
    call_projection(attention)
    try:
        yield
    finally:
        leave_projection(attention)


def call_projection(attention: nn.MultiheadAttention) -> None:
    """Let an attention module of torch call its projection, whose weights it else hands to a function."""
    readers = getattr(attention, _READERS, 0)
    setattr(attention, _READERS, readers + 1)
    if not readers:
        attention.forward = partial(_with_projection, attention)  # type: ignore[method-assign]


def leave_projection(attention: nn.MultiheadAttention) -> None:
    """Undo one `call_projection`; the module is as it was when all are undone."""
    readers = getattr(attention, _READERS) - 1
    setattr(attention, _READERS, readers)
    if not readers:
        delattr(attention, _READERS)
        del attention.forward


class _Identity(nn.Module):
    """A projection that changes nothing: a sum with zeros is exact."""

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.eye(len(like), dtype=like.dtype, device=like.device)
        self.bias = torch.zeros_like(self.weight[0])


def _with_projection(attention: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    """What `nn.MultiheadAttention` gives: the module's own code with an identity, then its projection."""
    projection = attention.out_proj
    attention.out_proj = _Identity(projection.weight)  # type: ignore[assignment]
    try:
        heads, weights = type(attention).forward(attention, *args, **kwargs)
    finally:
        attention.out_proj = projection
    return projection(heads), weights
