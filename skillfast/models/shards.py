"""Which of a site's neurons this process holds, where weights are spread over processes (tensor parallelism)."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from skillfast.errors import ModelError
from skillfast.models.experts import down_projections, units_first
from skillfast.models.sites import find_sites, site_slices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    from skillfast.models.sites import Site

T = TypeVar("T")
TENSOR = "tp"
"""Name of the dimension of a device mesh along which weights are spread, where others spread data."""


@dataclass(frozen=True)
class Shards:
    """The neurons of a model's sites that a process holds.

    Each process of the group runs the same batches and sees at a site the neurons of its own part of the projection's
    weights, or all of them where the projection's inputs are not spread; those the group's first process counts.

    Attributes:
        group: The processes that hold a model together.
        alike: Processes that hold the same neurons and run other batches; None where there are none, or where their
            mesh does not tell.
        rank: Place of this process in `group`.
        size: How many they are.
        held: Site -> its neurons that this process holds, int64 [held], ascending; of a site that is not spread there
            is none.
    """

    group: ProcessGroup
    alike: ProcessGroup | None
    rank: int
    size: int
    held: Mapping[str, torch.Tensor]

    def counted(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        """The sites whose neurons this process counts, each as wide as what it holds of it."""
        return tuple(self.local(site) for site in sites if site.name in self.held or self.rank == 0)

    def local(self, site: Site) -> Site:
        """A site as this process sees it."""
        if (held := self.held.get(site.name)) is None:
            return site
        heads = site.heads and site.heads * len(held) // site.width
        return replace(site, width=len(held), heads=heads)

    def whole(self, rows: torch.Tensor, sites: Sequence[Site]) -> torch.Tensor:
        """Rows of all neurons of some sites [n_neurons, ...] from those of what each process holds of each site.

        Of a site that is not spread the first process's; every process of the group must call it.
        """
        parts = self.gather((self.held, rows))
        slices, found = site_slices(sites), rows.new_empty(sum(site.width for site in sites), *rows.shape[1:])
        for held, theirs in reversed(parts):
            each = theirs.split([len(held[site.name]) if site.name in held else site.width for site in sites])
            for site, part in zip(sites, each, strict=True):
                found[slices[site.name]][held.get(site.name, slice(None))] = part
        return found

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every process's tensor, in place; all of them must call it."""
        torch.distributed.all_reduce(x, group=self.group)
        return x

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of their ranks; all of them must call it."""
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values


def shards_of(model: torch.nn.Module, sites: Sequence[Site]) -> Shards | None:
    """How the neurons of some sites are spread over processes; None where this process holds all of them.

    Args:
        model: A model of one process, or one whose projections' weights are DTensors, as `tp_plan="auto"` of
            transformers makes them. Weights that are only stored in parts (FSDP2) and whole in each forward are not
            spread.
        sites: Sites of the model.

    Raises:
        ModelError: A projection that is spread in a way that is not known.
    """
    if "torch.distributed.tensor" not in sys.modules:  # nobody has made such a weight
        return None
    gathered = _gathers(model)
    held: dict[str, torch.Tensor] = {}
    found: tuple[Any, int] | None = None
    for site in sites:
        module = model.get_submodule(site.path)
        weight, along = _projection(module, site)
        if not is_spread(weight):
            if getattr(module, "_hf_tp_plan", None) is not None:
                raise ModelError(
                    f"{site.name}: expected weights that say how they are spread over processes (DTensor), got parts; "
                    "load the model with transformers 5.24 or newer"
                )
            continue
        mesh, placements = weight.device_mesh, weight.placements
        dims = [i for i in range(mesh.ndim) if placements[i].is_shard() and not (gathered and _name(mesh, i) != TENSOR)]
        if any(placements[i].is_shard(0) for i in dims) and site.experts is not None:
            raise ModelError(
                f"{site.name}: expected experts that each process holds a part of, got whole ones in several (expert "
                "parallelism); load the model with tp_plan='auto' alone"
            )
        dims = [i for i in dims if placements[i].is_shard(along) and not _splits_inputs(model, site.path)]
        if not dims:
            continue
        if len(dims) > 1 or type(placements[dims[0]]).__name__ != "Shard" or found not in (None, (mesh, dims[0])):
            raise ModelError(
                f"{site.name}: expected a projection that is spread along one dimension of one mesh, got "
                f"{placements} of {mesh}; trace the model with one tp_plan"
            )
        found = mesh, dims[0]
        size, rank = mesh.size(dims[0]), mesh.get_local_rank(dims[0])
        units = site.width // (site.experts or 1)
        each = -(-units // size)  # as torch.chunk divides
        own = torch.arange(min(units, rank * each), min(units, (rank + 1) * each))
        here = weight.to_local().shape[along]
        if not len(own) or len(own) != here or (site.heads and len(own) % (units // site.heads)):
            what = f"{site.heads} heads" if site.heads else f"{units} neurons"
            raise ModelError(
                f"{site.name}: expected {what} to lie in {size} processes alike, got {here} of {units} neurons in "
                f"process {rank}; use a number of processes that divides them"
            )
        held[site.name] = (torch.arange(site.experts or 1)[:, None] * units + own).flatten()
    if found is None:
        return None
    mesh, dim = found
    others = [i for i in range(mesh.ndim) if i != dim and mesh.size(i) > 1]
    alike = mesh.get_group(others[0]) if len(others) == 1 else None
    return Shards(mesh.get_group(dim), alike, mesh.get_local_rank(dim), mesh.size(dim), held)


def local_part(x: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that may be spread over several."""
    return x.to_local() if is_spread(x) else x  # type: ignore[attr-defined]


def spread_as(like: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A tensor that is spread over processes as another is, from this process's part; the part if that is not."""
    if not is_spread(like):
        return part
    spread: DTensor = like  # type: ignore[assignment]
    made: torch.Tensor = type(spread).from_local(part, spread.device_mesh, spread.placements, run_check=False)
    return made


def refuse_spread(model: torch.nn.Module, what: str) -> None:
    """Raises ModelError where weights of projections are spread over processes."""
    if shards_of(model, find_sites(model)) is not None:
        raise ModelError(f"{what}: expected a model that one process holds, got parts of one (DTensor); load it whole")


def is_spread(weight: Any) -> bool:
    """Whether a tensor is held in parts by several processes (a DTensor)."""
    module = sys.modules.get("torch.distributed.tensor")  # else nobody has made one
    return module is not None and isinstance(weight, module.DTensor)


def _projection(module: torch.nn.Module, site: Site) -> tuple[Any, int]:
    """The weights whose inputs the neurons of a site are, and the dimension along which these lie."""
    if site.kind == "expert":
        return down_projections(module), 1 if units_first(module) else 2
    if site.kind == "router":
        return None, 0  # what is weighed is spread, the gates are not
    return getattr(module, "weight", None), 0 if type(module).__name__ == "Conv1D" else 1


def _name(mesh: DeviceMesh, dim: int) -> str | None:
    return mesh.mesh_dim_names[dim] if mesh.mesh_dim_names else None


def _gathers(model: torch.nn.Module) -> bool:
    """Whether some weights are whole while they are used and in parts only in between (FSDP2)."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and any(isinstance(part, module.FSDPModule) for part in model.modules())


def _splits_inputs(model: torch.nn.Module, path: str) -> bool:
    """Whether a projection gets all inputs and takes its part of them itself, behind where neurons are read."""
    plan = getattr(model, "tp_plan", None) or {}
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path)) in ("rowwise_split_input", "rowwise_rep")
