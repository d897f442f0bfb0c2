"""Sites: the inputs of a model's output projections, found by structure.

A neuron is one coordinate of the input of a block's output projection (`mlp.fc2`, `attn.proj`, ...) or of the
classifier. Module names differ between families, so a family is a row of `PATTERNS`, data and not code.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from skillfast.errors import ArgumentError, ModelError
from skillfast.vocabulary import KINDS, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

PATTERNS: tuple[tuple[Kind, str], ...] = (
    ("attn", r"^(?P<block>.*\b\d+)\.attn\.proj$"),  # timm: ViT, DeiT, BEiT, EVA
    ("mlp", r"^(?P<block>.*\b\d+)\.mlp\.fc2$"),
)
"""(kind, module path) of each known family; `block` is what the sites of one block share."""


@dataclass(frozen=True)
class Site:
    """A place whose coordinates are neurons.

    Attributes:
        name: Canonical name in every family: `blocks.3.mlp`, `blocks.3.attn`, `head`.
        kind: `"mlp"`, `"attn"` or `"head"`.
        block: Index of the block, counted in the order of the model's modules; None for the head.
        path: Path of the projection module whose input holds the neurons.
        width: Number of neurons.
        heads: Number of attention heads; None elsewhere.
    """

    name: str
    kind: Kind
    block: int | None
    path: str
    width: int
    heads: int | None = None


def unwrap_compiled(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside a `torch.compile` wrapper: hooks added after compiling are silently skipped."""
    return getattr(model, "_orig_mod", model)


def refuse_compiled(model: torch.nn.Module) -> None:
    """Raises ModelError where the caller runs a compiled model itself, whose hooks would not fire."""
    compiled = [path for path, module in model.named_modules() if getattr(module, "_compiled_call_impl", None)]
    if compiled:
        raise ModelError(
            f"model: expected modules that run their hooks, got {compiled[0] or type(model).__name__} compiled by its "
            ".compile(), which skips hooks added later; use the model before it is compiled"
        )
    if unwrap_compiled(model) is not model:
        raise ModelError(
            "model: expected a module that runs its hooks, got one wrapped by torch.compile, which skips hooks added "
            "after compiling; pass the module that was compiled (model._orig_mod) and call that"
        )


def find_sites(model: torch.nn.Module) -> tuple[Site, ...]:
    """All sites of a model, in the order of its blocks, the classifier's last.

    Args:
        model: A timm vision transformer, or any model with modules named as in `PATTERNS`.

    Raises:
        ModelError: No module of the model is a known site.
    """
    model = unwrap_compiled(model)
    blocks: dict[str, int] = {}
    sites = []
    for path, module in model.named_modules():
        for kind, pattern in PATTERNS:
            found = re.match(pattern, path)
            if found is None or not isinstance(module, torch.nn.Linear):
                continue
            index = blocks.setdefault(found["block"], len(blocks))
            owner = model.get_submodule(path.rpartition(".")[0])
            heads = getattr(owner, "num_heads", None) if kind == "attn" else None
            sites.append(Site(f"blocks.{index}.{kind}", kind, index, path, module.in_features, heads))
    if not sites:
        raise ModelError(
            f"{type(model).__name__}: expected blocks with linear modules named attn.proj and mlp.fc2 (timm's vision "
            "transformers), got none; use a model of that form"
        )
    head = _classifier(model)
    if head is not None:
        sites.append(Site("head", "head", None, head[0], head[1].in_features))
    return tuple(sites)


def _classifier(model: torch.nn.Module) -> tuple[str, torch.nn.Linear] | None:
    get_classifier = getattr(model, "get_classifier", None)
    head = get_classifier() if callable(get_classifier) else getattr(model, "head", None)
    if not isinstance(head, torch.nn.Linear):
        return None
    return next((path, module) for path, module in model.named_modules() if module is head)


def choose_sites(model: torch.nn.Module, wanted: Sequence[str]) -> tuple[Site, ...]:
    """The sites of a model that were asked for, by kind (`"mlp"`) or by name (`"blocks.3.mlp"`).

    Raises:
        ArgumentError: A wanted name is no kind and no site of the model.
        ModelError: The model has no known sites.
    """
    sites = find_sites(model)
    if not wanted:
        raise ArgumentError(f"sites: expected some of {', '.join(KINDS)} or names such as {sites[0].name}, got none")
    for name in wanted:
        if not any(name in (site.kind, site.name) for site in sites):
            raise ArgumentError(
                f"site {name!r}: expected one of {', '.join(KINDS)} or a name from {sites[0].name} to "
                f"{sites[-1].name} that this {type(unwrap_compiled(model)).__name__} has; "
                "`skillfast info --model ...` lists them"
            )
    return tuple(site for site in sites if site.kind in wanted or site.name in wanted)


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of the architecture: the class, and every site's name, path, width and heads. Weights do not enter."""
    model = unwrap_compiled(model)
    text = "\n".join([type(model).__name__, *(repr(site) for site in find_sites(model))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
