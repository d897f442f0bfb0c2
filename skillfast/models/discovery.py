"""Sites of a model of no known family: found by structure, taken where they certify."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from skillfast.errors import ModelError
from skillfast.models.batches import inputs_of
from skillfast.models.coverage import coverage, graph_of, made_inputs, past_sites, stream_acts, warm_up
from skillfast.models.projections import input_width
from skillfast.models.sites import DECLARED, classifier_of, declare_sites, unwrap_compiled
from skillfast.models.structure import projections_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from skillfast.models.sites import Site
    from skillfast.models.structure import Projection


def discover(
    model: torch.nn.Module, batch: torch.Tensor | Mapping[str, torch.Tensor] | None = None
) -> tuple[Site, ...]:
    """Find the sites of a model by its structure, certify that they hold all that its blocks do, and declare them.

    Sites are the inputs of the linear layers and convolutions whose output reaches the residual stream through no other
    weight matrix. The stream is the way from the input to the output through the fewest weight matrices.

    Args:
        model: Any model; the model keeps what was found, as `declare_sites` would.
        batch: What the model is called with; None: as for `coverage`, which runs a small copy where it can.

    Returns:
        The sites.

    Raises:
        ArgumentError: No batch, and a model of which nobody knows what it takes.
        ModelError: The sites that were found do not certify: the line shows them, and what acts past them.
    """
    model = unwrap_compiled(model)
    made, inputs = (model, inputs_of(batch, None)) if batch is not None else made_inputs(model)[:2]
    before = vars(made).get(DECLARED)
    try:
        found = _certified(made, inputs)
    except BaseException:
        vars(made).pop(DECLARED, None)
        if before is not None:
            setattr(made, DECLARED, before)
        raise
    modules = {path for path, _ in model.named_modules()}
    if modules != {path for path, _ in made.named_modules()}:  # of a small copy: the same modules of every block
        patterns = {_pattern(path): each for path, each in found.items()}
        found = {path: patterns[_pattern(path)] for path in modules if _pattern(path) in patterns}
    return declare_sites(model, _paths(model, found))


def _certified(made: torch.nn.Module, inputs: Any) -> dict[str, Projection]:
    """Path -> projection, of those with which the sites of a model certify."""
    warm_up(made, inputs)
    with graph_of(made, inputs) as (outputs, source):
        found = {each.path: each for each in projections_of(made, outputs, source)}
    if not found:
        raise ModelError(
            f"{type(made).__name__}: expected linear layers that write to a residual stream, got none; declare its "
            "sites with declare_sites"
        )
    for pattern in dict.fromkeys(map(_pattern, found)):  # a factor on what another projection writes is none itself
        others = {path: each for path, each in found.items() if _pattern(path) != pattern}
        if others and not past_sites(made, inputs, declare_sites(made, _paths(made, others))):
            found = others
    sites = declare_sites(made, _paths(made, found))
    certified = coverage(made, inputs)
    if not certified.complete or not stream_acts(made, inputs, sites):
        why = certified if not certified.complete else "nothing of the input passes beside them"
        patterns = ", ".join(dict.fromkeys(map(_pattern, found)))
        raise ModelError(
            f"{type(made).__name__}: expected projections that certify, got {patterns}; {why}; declare its sites with "
            "declare_sites"
        )
    return found


def _pattern(path: str) -> str:
    """A path with `*` for its numbers: the same module of every block."""
    return re.sub(r"\b\d+\b", "*", path)


def _paths(model: torch.nn.Module, found: Mapping[str, Projection]) -> dict[str, str]:
    """Canonical name -> path of what was found, and of the head."""
    blocks: dict[str, int] = {}
    names: dict[str, str] = {}
    for path, module in model.named_modules():
        each = found.get(path)
        if each is None or input_width(module) is None:
            continue
        numbered = re.match(r"^(.*\b\d+)\.", path)
        block = blocks.setdefault(numbered[1] if numbered else path.rpartition(".")[0], len(blocks))
        names[_free(f"blocks.{block}.{each.kind}", names)] = path
    head = classifier_of(model)
    return names if head is None or head[0] in names.values() else {**names, "head": head[0]}


def _free(name: str, taken: Iterable[str]) -> str:
    """The name, or with the first number from 2 on that is free."""
    used: Any = set(taken)
    numbered = (f"{name}_{again}" for again in range(2, len(used) + 2))
    return name if name not in used else next(one for one in numbered if one not in used)
