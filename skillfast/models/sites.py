"""Sites: the inputs of a model's output projections, found by structure.

A neuron is one coordinate of the input of a block's output projection (`mlp.fc2`, `attn.proj`, ...) or of the
classifier. Module names differ between families, so a family is a row of `families.FAMILIES`, data and not code; a
model of no family says where its sites are (`declare_sites`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ArgumentError, ModelError
from skillfast.models.experts import experts_of, takes_gates
from skillfast.models.families import HEAD_COUNTS, HEAD_WIDTHS, HEADS, Family, families, register_family
from skillfast.vocabulary import KINDS, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Family",
    "Site",
    "choose_sites",
    "declare_sites",
    "find_sites",
    "fingerprint",
    "input_width",
    "module_device",
    "refuse_compiled",
    "refuse_training",
    "register_family",
    "site_slices",
    "unwrap_compiled",
]

FINGERPRINT = "skillfast_architecture"
DECLARED = "skillfast_sites"
"""Attribute of a model (or of its class) that maps canonical names to module paths."""


@dataclass(frozen=True)
class Site:
    """A place whose coordinates are neurons.

    Attributes:
        name: Canonical name in every family: `blocks.3.mlp`, `blocks.3.attn`, `blocks.3.experts`, `head`.
        kind: `"mlp"`, `"attn"`, `"expert"`, `"router"` or `"head"`.
        block: Index of the block, counted in the order of the model's modules; None for the head.
        path: Path of the projection module whose input holds the neurons. Of routed experts, of the module of all of a
            block: the inputs of its down projections hold them, or the gates that it is given (`"router"`).
        width: Number of neurons.
        heads: Number of attention heads; None elsewhere.
        experts: Number of routed experts, each with `width // experts` neurons; None elsewhere.
    """

    name: str
    kind: Kind
    block: int | None
    path: str
    width: int
    heads: int | None = None
    experts: int | None = field(default=None, repr=False)


def site_slices(sites: Sequence[Site]) -> dict[str, slice]:
    """Name of each site -> rows of its neurons, in an array [n_neurons, ...] of the sites' one after the other."""
    slices, start = {}, 0
    for site in sites:
        slices[site.name] = slice(start, start + site.width)
        start += site.width
    return slices


def unwrap_compiled(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside a `torch.compile` wrapper: hooks added after compiling are silently skipped."""
    return getattr(model, "_orig_mod", model)


def refuse_compiled(model: torch.nn.Module) -> None:
    """Raises ModelError where the caller runs a compiled model itself, whose hooks would not fire."""
    compiled = [path for path, module in model.named_modules() if getattr(module, "_compiled_call_impl", None)]
    if compiled:
        raise ModelError(
            f"model: expected modules that run their hooks, got {compiled[0] or type(model).__name__} compiled by its "
            ".compile(), which skips hooks added later; skillfast.prepare(model), or use it before it is compiled"
        )
    if unwrap_compiled(model) is not model:
        raise ModelError(
            "model: expected a module that runs its hooks, got one wrapped by torch.compile, which skips hooks added "
            "after compiling; skillfast.prepare(model), or pass and call the module that was compiled (model._orig_mod)"
        )


def refuse_training(model: torch.nn.Module, what: str) -> None:
    """Raises ModelError for a model in training mode, whose dropout would be traced or ablated too."""
    if unwrap_compiled(model).training:
        raise ModelError(f"{what}: expected a model in evaluation mode, got one in training mode; call model.eval()")


def find_sites(model: torch.nn.Module) -> tuple[Site, ...]:
    """All sites of a model, in the order of its blocks, the classifier's last.

    Args:
        model: One that declares its sites, or whose modules are named as in a known family (`families.FAMILIES`): a
            timm vision transformer, a Hugging Face encoder or decoder. The blocks of an encoder-decoder are counted
            through, the encoder's first.

    Raises:
        ModelError: No module of the model is a known site.
    """
    model = unwrap_compiled(model)
    if (declared := getattr(model, DECLARED, None)) is not None:
        return _declared_sites(model, declared)
    known = families()
    patterns = [pattern for family in known for pattern in family.patterns()]
    blocks: dict[str, int] = {}
    sites = []
    for path, module in model.named_modules():
        if (routed := experts_of(module)) is not None:
            sites += _expert_sites(path, *routed, blocks, gated=takes_gates(module))
            continue
        width = input_width(module)
        if width is None or isinstance(parent := _parent(model, path), torch.nn.MultiheadAttention):
            continue  # that one never calls its projection
        for kind, pattern in patterns:
            if (found := pattern.fullmatch(path)) is not None:
                index = blocks.setdefault(found["block"], len(blocks))
                heads = _heads(model, path, parent, width) if kind == "attn" else None
                sites.append(Site(f"blocks.{index}.{kind}", kind, index, path, width, heads))
                break
    if not sites:
        raise ModelError(
            f"{type(model).__name__}: expected blocks named as in a known family, got none; declare its "
            "sites: "
            'sites={"blocks.0.mlp": "<path of the projection>", ..., "head": "<path>"}, or for a whole family '
            "skillfast.models.sites.register_family"
        )
    head = _classifier(model, known)
    if head is not None:
        sites.append(Site("head", "head", None, *head))
    return tuple(sites)


def _expert_sites(path: str, experts: int, units: int, blocks: dict[str, int], *, gated: bool) -> list[Site]:
    """The sites of a block's routed experts, and of the gates that weigh them, if any are given to them."""
    numbered = re.match(r".*\b\d+(?=\.)", path)
    around = next((block for block in blocks if path.startswith(f"{block}.")), numbered[0] if numbered else "")
    index = blocks.setdefault(around, len(blocks))
    router = Site(f"blocks.{index}.router", "router", index, path, experts, experts=experts)
    return [
        *([router] if gated else []),
        Site(f"blocks.{index}.experts", "expert", index, path, experts * units, experts=experts),
    ]


def input_width(module: torch.nn.Module) -> int | None:
    """The number of input features of a projection; None for any other module.

    A projection is whatever has `in_features`, as `nn.Linear`, its quantised kin and adapters around it have, or a
    transposed linear layer (`Conv1D` of GPT-2), whose weight is [in, out].
    """
    if isinstance(width := getattr(module, "in_features", None), int):
        return width
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return weight.shape[0]
    return None


def module_device(module: torch.nn.Module) -> torch.device:
    """Where a module computes: its weights' device, or what accelerate moves them to for each forward.

    Packed weights of quantised layers are no parameters; a module with neither parameters nor buffers is on the CPU.
    """
    hook = getattr(module, "_hf_hook", None)
    for part in (hook, *getattr(hook, "hooks", ())):
        if (device := getattr(part, "execution_device", None)) is not None:
            return torch.device(device)
    for tensors in (module.parameters(), module.buffers()):
        if (first := next(tensors, None)) is not None:
            return first.device
    return torch.device("cpu")


def declare_sites(model: torch.nn.Module, paths: Mapping[str, str]) -> tuple[Site, ...]:
    """Say where the sites of a model of no known family are; the model keeps it, as its attribute `skillfast_sites`.

    Args:
        model: Any model.
        paths: Canonical name (`blocks.3.mlp`, `blocks.3.attn`, `head`) -> path of the projection module whose input
            holds the neurons.

    Returns:
        The sites.

    Raises:
        ArgumentError: A name that is not canonical, or a path that is no projection of the model.
    """
    model = unwrap_compiled(model)
    sites = _declared_sites(model, paths)
    setattr(model, DECLARED, dict(paths))
    return sites


def _declared_sites(model: torch.nn.Module, paths: Mapping[str, str]) -> tuple[Site, ...]:
    modules = dict(model.named_modules())
    sites = []
    for name, path in paths.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(mlp|attn)|head", name)
        if found is None:
            raise ArgumentError(
                f"site {name!r}: expected a name such as blocks.0.mlp, blocks.0.attn or head, got another; rename it"
            )
        width = input_width(modules[path]) if path in modules else None
        if width is None:
            got = "no such module" if path not in modules else type(modules[path]).__name__
            raise ArgumentError(
                f"site {name!r}: expected the path of a linear layer of {type(model).__name__}, got {path!r} ({got}); "
                "model.named_modules() lists them"
            )
        kind: Kind = next((kind for kind in KINDS if kind == found[2]), "head")
        heads = _heads(model, path, _parent(model, path), width) if kind == "attn" else None
        sites.append(Site(name, kind, None if kind == "head" else int(found[1]), path, width, heads))
    if not sites:
        raise ArgumentError("sites: expected at least one name and path, got none; see skillfast.models.sites")
    return tuple(sorted(sites, key=lambda site: (site.block is None, site.block or 0)))


def _parent(model: torch.nn.Module, path: str) -> torch.nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def _heads(model: torch.nn.Module, path: str, parent: torch.nn.Module, width: int) -> int | None:
    """Query heads of an attention projection: told by the module around it, or by that module's neighbours (BERT)."""
    around = model.get_submodule(".".join(path.split(".")[:-2]))
    for module in (parent, *around.children()):
        counts = [getattr(module, name, None) for name in HEAD_COUNTS]
        widths: list[Any] = [getattr(module, name, None) for name in HEAD_WIDTHS]
        counts += [width // each for each in widths if _divides(each, width)]
        if (heads := next((count for count in counts if _divides(count, width)), None)) is not None:
            return heads
    return None


def _divides(part: Any, whole: int) -> bool:
    return isinstance(part, int) and part > 0 and whole % part == 0


def _classifier(model: torch.nn.Module, known: Sequence[Family]) -> tuple[str, int] | None:
    """Path and width of the classifier or the language-model head."""
    modules = dict(model.named_modules())
    get_classifier = getattr(model, "get_classifier", None)
    candidates = [get_classifier() if callable(get_classifier) else getattr(model, "head", None)]
    candidates += [modules.get(path) for path in (*(family.head for family in known if family.head), *HEADS)]
    get_output = getattr(model, "get_output_embeddings", None)
    candidates += [get_output() if callable(get_output) else None]
    for head in candidates:
        if isinstance(head, torch.nn.Module) and (width := input_width(head)) is not None:
            return next(path for path, module in modules.items() if module is head), width
    return None


def choose_sites(model: torch.nn.Module, wanted: Sequence[str] | Mapping[str, str] | None) -> tuple[Site, ...]:
    """The sites of a model that were asked for.

    Args:
        model: The model.
        wanted: Kinds (`"mlp"`) or names (`"blocks.3.mlp"`); None for all; or the sites of a model of no known family,
            which this declares (see `declare_sites`).

    Raises:
        ArgumentError: A wanted name is no kind and no site of the model.
        ModelError: The model has no known sites.
    """
    if isinstance(wanted, Mapping):
        return declare_sites(model, wanted)
    sites = find_sites(model)
    if wanted is None or set(wanted) >= set(KINDS):
        return sites
    kinds = [kind for kind in KINDS if any(site.kind == kind for site in sites)]
    if not wanted:
        raise ArgumentError(f"sites: expected some of {', '.join(KINDS)} or names such as {sites[0].name}, got none")
    for name in wanted:
        if not any(name in (site.kind, site.name) for site in sites):
            raise ArgumentError(
                f"site {name!r}: expected one of {', '.join(kinds)} or a name from {sites[0].name} to "
                f"{sites[-1].name} that this {type(unwrap_compiled(model)).__name__} has, got another; "
                "`skillfast info --model ...` lists them"
            )
    return tuple(site for site in sites if site.kind in wanted or site.name in wanted)


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of the architecture: the class, and every site's name, path, width and heads. Weights do not enter.

    A class with an attribute `FINGERPRINT` shares its neurons with the class of that name, and so their skills.
    """
    model = unwrap_compiled(model)
    name = getattr(type(model), FINGERPRINT, type(model).__name__)
    text = "\n".join([name, *(repr(site) for site in find_sites(model))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
