"""Which of a site's neurons this process holds, where weights are spread over processes (tensor parallelism)."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from skillfast.errors import ModelError
from skillfast.models.sites import find_sites, site_slices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed import ProcessGroup
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
        rank: This process's place among them.
        size: How many they are.
        held: Site -> its neurons that this process holds, int64 [held], ascending; of a site that is not spread there
            is none.
    """

    group: ProcessGroup
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
    held: dict[str, torch.Tensor] = {}
    found: tuple[Any, int] | None = None
    for site in sites:
        module = model.get_submodule(site.path)
        _refuse_old(module, site)
        weight = getattr(module, "weight", None)
        if not _is_spread(weight):
            continue
        along = 0 if type(module).__name__ == "Conv1D" else 1
        mesh, placements = weight.device_mesh, weight.placements
        dims = [i for i in range(mesh.ndim) if placements[i].is_shard(along) and _is_tensor_dim(weight, i)]
        if not dims:
            continue
        plain = len(dims) == 1 and type(placements[dims[0]]).__name__ == "Shard"
        if not plain or found not in (None, (mesh, dims[0])):
            raise ModelError(
                f"{site.name}: expected a projection that is spread along one dimension of one mesh, got "
                f"{placements} of {mesh}; trace the model with one tp_plan"
            )
        found = mesh, dims[0]
        size, rank = mesh.size(dims[0]), mesh.get_local_rank(dims[0])
        each = -(-site.width // size)
        start = min(site.width, rank * each)
        held[site.name] = torch.arange(start, min(site.width, start + each))
        if not len(held[site.name]) or len(held[site.name]) != weight.to_local().shape[along]:
            raise ModelError(
                f"{site.name}: expected {site.width} neurons in {size} parts of {each}, got "
                f"{weight.to_local().shape[along]} in process {rank}; use a number of processes that divides them"
            )
        if site.heads and len(held[site.name]) % (site.width // site.heads):
            raise ModelError(
                f"{site.name}: expected whole heads in every process, got {site.heads} of them in {size} parts; use a "
                "number of processes that divides them"
            )
    if found is None:
        return None
    mesh, dim = found
    return Shards(mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(dim), held)


def local_part(x: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that may be spread over several."""
    return x.to_local() if _is_spread(x) else x  # type: ignore[attr-defined]


def refuse_spread(model: torch.nn.Module, what: str) -> None:
    """Raises ModelError where weights of projections are spread over processes."""
    if shards_of(model, find_sites(model)) is not None:
        raise ModelError(f"{what}: expected a model that one process holds, got one spread over several; load it whole")


def _is_spread(weight: Any) -> bool:
    if "torch.distributed.tensor" not in sys.modules:  # nobody has made one
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def _is_tensor_dim(weight: DTensor, dim: int) -> bool:
    """Whether weights lie in parts along a dimension of the mesh while they are used, and not only in between."""
    mesh = weight.device_mesh
    return mesh.mesh_dim_names is None or mesh.mesh_dim_names[dim] == TENSOR


def _refuse_old(module: torch.nn.Module, site: Site) -> None:
    weight = getattr(module, "weight", None)
    if getattr(module, "_hf_tp_plan", None) is not None and not _is_spread(weight):
        raise ModelError(
            f"{site.name}: expected weights that say how they are spread over processes (DTensor), got parts without; "
            "load the model with transformers 5.24 or newer"
        )
