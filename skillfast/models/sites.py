"""Sites: the inputs of a model's output projections, found by structure.

A neuron is one coordinate of the input of a block's output projection (`mlp.fc2`, `attn.proj`, ...) or of the
classifier. Module names differ between families, so a family is a row of `families.FAMILIES`, data and not code; a
model of no family says where its sites are (`declare_sites`).
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ArgumentError, ModelError
from skillfast.models.experts import experts_of, takes_gates
from skillfast.models.families import HEAD_COUNTS, HEAD_WIDTHS, HEADS, Family, families, register_family
from skillfast.models.projections import input_width, layout_of, parent_of
from skillfast.vocabulary import KINDS, Kind, Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from skillfast.skills.skill import Skill

__all__ = [
    "Family",
    "Site",
    "check_neurons",
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
HEADED = ("attn", "ssm")
DECLARED = "skillfast_sites"
"""Attribute of a model (or of its class) that maps canonical names to module paths."""


@dataclass(frozen=True)
class Site:
    """A place whose coordinates are neurons.

    Attributes:
        name: Canonical name in every family: `blocks.3.mlp`, `blocks.3.attn`, `blocks.3.cross_attn`,
            `blocks.3.experts`, `head`; a second one of a block is `blocks.3.mlp_2`, experts of attention are
            `blocks.3.attn_experts`.
        kind: `"mlp"`, `"attn"`, `"ssm"`, `"expert"`, `"router"` or `"head"`.
        block: Index of the block, counted in the order of the model's modules; None for the head.
        path: Path of the projection module whose input holds the neurons. Of routed experts, of the module of all of a
            block: the inputs of its down projections hold them, or the gates that it is given (`"router"`).
        width: Number of neurons.
        heads: Number of heads of attention or of a state-space mixer; None elsewhere.
        experts: Number of routed experts, each with `width // experts` neurons; None elsewhere.
        layout: Where the projection takes its neurons: in the last dimension, as channels after the batch, or in the
            last dimension with the tokens before the batch.
        inside: Path of the block.
    """

    name: str
    kind: Kind
    block: int | None
    path: str
    width: int
    heads: int | None = None
    experts: int | None = field(default=None, repr=False)
    layout: Layout = field(default="tokens", repr=False)
    inside: str = field(default="", repr=False)


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
    role_of, named = _roles(families()), _Names()
    for path, module in model.named_modules():
        if (routed := experts_of(model, path, module)) is not None:
            named.add_experts(path, *routed, gated=takes_gates(module))
        if (width := input_width(module)) is None:
            continue
        if (role := role_of(path)) is not None:
            named.add(model, role, path, width)
    sites = named.sites
    if not sites:
        raise ModelError(
            f"{type(model).__name__}: expected blocks named as in a known family, got none; let "
            "skillfast.discover(model, batch) find and certify its sites, or declare them: "
            'sites={"blocks.0.mlp": "<path of the projection>", ..., "head": "<path>"}, or for a whole family '
            "skillfast.models.sites.register_family"
        )
    head = classifier_of(model)
    if head is not None:
        sites.append(Site("head", "head", None, *head, layout=layout_of(model, head[0])))
    return tuple(sites)


@dataclass(frozen=True)
class _Role:
    """What a path says of a projection: `"mlp"` or `"cross_attn"`, its kind, and the path of its block."""

    name: str
    kind: Kind
    block: str


@lru_cache(maxsize=8)
def _roles(known: tuple[Family, ...]) -> Callable[[str], _Role | None]:
    """A function of the path of a projection, which remembers what it said: models are asked again and again."""
    patterns = [pattern for family in known for pattern in family.patterns()]

    @lru_cache(maxsize=100_000)
    def role_of(path: str) -> _Role | None:
        matches = ((name, kind, pattern.fullmatch(path)) for name, kind, pattern in patterns)
        return next((_Role(name, kind, found["block"]) for name, kind, found in matches if found is not None), None)

    return role_of


class _Names:
    """Sites under canonical names, blocks counted in the order in which they are met."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self._blocks: dict[str, int] = {}
        self._taken: set[str] = set()

    def add(self, model: torch.nn.Module, role: _Role, path: str, width: int) -> None:
        index = self._blocks.setdefault(role.block, len(self._blocks))
        name, again = f"blocks.{index}.{role.name}", 2
        while name in self._taken:
            name, again = f"blocks.{index}.{role.name}_{again}", again + 1
        self._taken.add(name)
        heads = _heads(model, path, width, neighbours=role.kind == "attn") if role.kind in HEADED else None
        layout = layout_of(model, path)
        self.sites.append(Site(name, role.kind, index, path, width, heads, layout=layout, inside=role.block))

    def add_experts(self, path: str, experts: int, units: int, *, gated: bool) -> None:
        """The sites of a block's routed experts, and of the gates that weigh them, if any are given to them."""
        block = next((block for block in self._blocks if path.startswith(f"{block}.")), _numbered(path))
        index = self._blocks.setdefault(block, len(self._blocks))
        name = f"blocks.{index}.{'attn_' if 'attention' in path[len(block) :] else ''}experts"
        site = Site(name, "expert", index, path, experts * units, experts=experts, inside=block)
        self.sites += [router_of(site), site] if gated else [site]


def router_of(site: Site) -> Site:
    """The site of the gates of a block's experts, with a neuron for each."""
    assert site.experts is not None
    name = site.name.removesuffix("router").removesuffix("experts") + "router"
    return replace(site, name=name, kind="router", width=site.experts)


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
        found = re.fullmatch(r"blocks\.(\d+)\.(mlp|attn|ssm|cross_attn)(?:_\d+)?|head", name)
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
        kind: Kind = "attn" if found[2] == "cross_attn" else next((kind for kind in KINDS if kind == found[2]), "head")
        heads = _heads(model, path, width, neighbours=kind == "attn") if kind in HEADED else None
        block = None if kind == "head" else int(found[1])
        layout = layout_of(model, path)
        sites.append(Site(name, kind, block, path, width, heads, layout=layout, inside=_numbered(path)))
    if not sites:
        raise ArgumentError("sites: expected at least one name and path, got none; see skillfast.models.sites")
    return tuple(sorted(sites, key=lambda site: (site.block is None, site.block or 0)))


def _heads(model: torch.nn.Module, path: str, width: int, *, neighbours: bool = True) -> int | None:
    """Query heads of a projection: told by the module around it, or by that module's neighbours (BERT)."""
    around = model.get_submodule(".".join(path.split(".")[:-2]))
    for module in (parent_of(model, path), *(around.children() if neighbours else ())):
        counts = [getattr(module, name, None) for name in HEAD_COUNTS]
        widths: list[Any] = [getattr(module, name, None) for name in HEAD_WIDTHS]
        counts += [width // each for each in widths if _divides(each, width)]
        if (heads := next((count for count in counts if _divides(count, width)), None)) is not None:
            return heads
    return None


def _divides(part: Any, whole: int) -> bool:
    return isinstance(part, int) and part > 0 and whole % part == 0


def _numbered(path: str) -> str:
    """Path of a block: up to the last number."""
    found = re.match(r"^(.*\b\d+)\.", path)
    return found[1] if found else ""


def classifier_of(model: torch.nn.Module) -> tuple[str, int] | None:
    """Path and width of the classifier or the language-model head; None for a model without one."""
    known = families()
    modules = dict(model.named_modules())
    get_classifier = getattr(model, "get_classifier", None)
    candidates = [get_classifier() if callable(get_classifier) else getattr(model, "head", None)]
    candidates += [modules.get(path) for path in (*(family.head for family in known if family.head), *HEADS)]
    get_output = getattr(model, "get_output_embeddings", None)
    candidates += [get_output() if callable(get_output) else None]
    for candidate in candidates:
        inner = getattr(candidate, "fc", None)  # of timm's heads that pool, too
        head = inner if isinstance(inner, torch.nn.Module) and input_width(inner) is not None else candidate
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


def check_neurons(skill: Skill, sites: Mapping[str, Site], fingerprint_of_model: str) -> None:
    """Raise ArgumentError where a skill is of another architecture, or has sites or neurons that a model lacks."""
    if skill.fingerprint is not None and skill.fingerprint != fingerprint_of_model:
        raise ArgumentError(
            f"skill {skill.name!r}: expected one of the model's architecture ({fingerprint_of_model}), got one of "
            f"{skill.fingerprint}; select it on this model"
        )
    for name, index in skill.neurons.items():
        if name not in sites:
            raise ArgumentError(
                f"skill {skill.name!r}: expected sites that the model has, got {name!r}; it has "
                f"{next(iter(sites))} to {list(sites)[-1]}"
            )
        if int(index[-1]) >= sites[name].width:
            raise ArgumentError(
                f"skill {skill.name!r}: expected indices below {sites[name].width} in {name}, got {int(index[-1])}; "
                "select it on this model"
            )


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of the architecture: the class, and every site's name, path, width and heads. Weights do not enter.

    A class with an attribute `FINGERPRINT` shares its neurons with the class of that name, and so their skills.
    """
    model = unwrap_compiled(model)
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whose fully_shard gives a model a class of its own
    own = type(model) if fsdp is None else next(c for c in type(model).__mro__ if not issubclass(c, fsdp.FSDPModule))
    name = getattr(own, FINGERPRINT, own.__name__)
    text = "\n".join([name, *(repr(site) for site in find_sites(model))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
