"""Where a site's activations are read and replaced in a forward, the one place for every command."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from skillfast.models.activations import Activations
from skillfast.models.experts import routed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from skillfast.models.sites import Site

    # what flows on instead of a site's activations, like their `values`; None: what came
    See = Callable[[Activations], torch.Tensor | None]


@contextmanager
def watched(model: torch.nn.Module, site: Site, see: See) -> Iterator[None]:
    """Hand the activations of a site to `see` in every forward inside the context.

    Contexts nest: each sees what those before it have left. The rows of a block's experts come in parts where they are
    computed expert by expert.

    Args:
        model: The model.
        site: Where.
        see: Returns what flows on instead, or None for what came.
    """
    if site.experts is not None:
        with routed(model, site, see):
            yield
        return

    def before_projection(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        replaced = see(Activations(args[0]))
        return None if replaced is None else (replaced, *args[1:])

    handle = model.get_submodule(site.path).register_forward_pre_hook(before_projection)
    try:
        yield
    finally:
        handle.remove()
