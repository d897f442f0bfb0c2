"""Donors: examples whose activations take the place of another example's (`mode="resample"`).

Which examples are donors, and which of them an example gets, follows from a seeded digest of what the model reads of
it, padding left out. So neither depends on the order of the data, on the size of a batch or on what stands beside it.
"""

from __future__ import annotations

import hashlib
import heapq
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast.errors import ArgumentError
from skillfast.memory.budget import memory_limit
from skillfast.models.activations import RoutedActivations, by_sample
from skillfast.models.batches import read_batch
from skillfast.models.inputs import (
    MASK,
    Inputs,
    bytes_of,
    call,
    examples_in,
    joined,
    mapped,
    mask_of,
    tensors_in,
    unpadded,
)
from skillfast.models.shards import refuse_spread
from skillfast.models.sites import find_sites, fingerprint, module_device, refuse_training, unwrap_compiled
from skillfast.models.watching import watched
from skillfast.progress import track

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from skillfast.models.activations import Activations
    from skillfast.models.sites import Site
    from skillfast.skills.skill import Skill

DONORS = 256
TOGETHER = 16  # donors per forward, whatever the loader's batches: what rounding leaves is the same, too


@dataclass(frozen=True)
class DonorBank:
    """Activations of examples drawn at random from a whole data set; made by `donors`.

    Attributes:
        indices: int64 [M], places of the donors in the data, in the order in which the loader gave them.
        labels: int64 [M], their classes; -1 where tokens have labels.
        neurons: Site -> int64 [S], ascending: the neurons that are kept.
        activations: Site -> [M, ..., S] in the dtype of the model. Tokens are those of the donor, place by place; of
            a model that is told its padding they are one, [M, 1, S]: the mean over the donor's real tokens. So they are
            of routed experts and their gates, over the donor's tokens that were routed there; of a donor without any
            the mean of the other donors.
        digests: uint64 [M], ascending.
        seed: Seed of the draw, and of who gets which donor.
        fingerprint: Digest of the model's architecture.
    """

    indices: np.ndarray
    labels: np.ndarray
    neurons: Mapping[str, torch.Tensor]
    activations: Mapping[str, torch.Tensor]
    digests: np.ndarray
    seed: int
    fingerprint: str

    def __len__(self) -> int:
        """Number of donors."""
        return len(self.digests)

    def rows_of(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Row of the bank that each example gets, never its own: int64 [batch] on the CPU.

        Args:
            model: Tells where the inputs are padding, if it is told (`token_mask`).
            inputs: What the model is called with, one tensor [batch, ...] or keyword arguments.
        """
        rows = np.empty(examples_in(inputs), dtype=np.int64)
        for i, (digest, draw) in enumerate(example_digests(model, inputs, self.seed)):
            row = draw % len(self)
            rows[i] = (row + 1) % len(self) if self.digests[row] == digest else row
        return torch.from_numpy(rows)

    def places(self, site: str, neurons: torch.Tensor) -> torch.Tensor | None:
        """Where a site's neurons int64 [S] stand among those that are kept; None where one is missing."""
        kept = self.neurons.get(site)
        if kept is None or not bool(torch.isin(neurons, kept).all()):
            return None
        return torch.searchsorted(kept, neurons)


def donors(
    model: torch.nn.Module,
    loader: Iterable[Any],
    skills: Iterable[Skill],
    *,
    n_donors: int = DONORS,
    label_key: str | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
    quiet: bool = True,
) -> DonorBank:
    """Draw donors from all examples of a loader and keep their activations of the skills' neurons.

    The loader is read once, of which the donors alone run through the model. Examples that are the same to the model
    count once; the loader's order and batches do not matter.

    Args:
        model: In evaluation mode.
        loader: Batches of (inputs, labels), or mappings with labels and the model's arguments.
        skills: Skills whose neurons to keep; `mode="resample"` can be used for these neurons.
        n_donors: Number of donors; all where there are fewer.
        label_key: Key of the labels in a batch that is a mapping; by default `labels` or `label`.
        seed: Seed of the draw, and of who gets which donor.
        memory_budget: Bytes that inputs and activations of the donors may take; by default what `limited_memory`
            says, or half of what is free.
        quiet: Show no progress bar.

    Raises:
        ArgumentError: Fewer than two different examples, skills that do not fit the model, examples of different
            numbers of tokens in a model that is not told its padding, an expert that no donor's token was routed to, or
            more bytes than the budget has.
        ModelError: A model in training mode, or one that folds tokens into the batch.
    """
    model = unwrap_compiled(model)
    refuse_training(model, "donors")
    refuse_spread(model, "donors")
    if n_donors < 2:
        raise ArgumentError(f"n_donors: expected at least 2, got {n_donors}; 256 are usual")
    sites = find_sites(model)
    neurons = _union(skills, sites)
    drawn = _drawn(model, loader, n_donors, label_key, seed, quiet)
    if len(drawn) < 2:
        raise ArgumentError(f"donors: expected at least 2 different examples, got {len(drawn)}; give more data")
    budget = memory_limit(module_device(model)) if memory_budget is None else memory_budget
    reader = _Reader(model, [site for site in sites if site.name in neurons], neurons)
    kept: dict[str, list[tuple[int, torch.Tensor]]] = {name: [] for name in neurons}
    with torch.inference_mode():
        for rows in track(list(_alike(drawn)), "donors", quiet=quiet):
            for name, x in reader.read(joined([drawn[row].inputs for row in rows])).items():
                kept[name] += zip(rows, x, strict=True)
            _refuse_too_large(kept, drawn, len(rows), budget)
    activations = {name: _stacked(name, found) for name, found in kept.items()}
    for site in sites:
        if site.experts is not None and site.name in neurons:
            activations[site.name] = _of_others(site, neurons[site.name], activations[site.name])
    return DonorBank(
        indices=np.array([donor.index for donor in drawn]),
        labels=np.array([donor.label for donor in drawn]),
        neurons=neurons,
        activations=activations,
        digests=np.array([donor.digest for donor in drawn], dtype=np.uint64),
        seed=seed,
        fingerprint=fingerprint(model),
    )


@dataclass(frozen=True)
class _Drawn:
    """An example that was drawn: inputs of a batch of one, without padding."""

    digest: int
    index: int
    label: int
    inputs: Inputs


def token_mask(model: torch.nn.Module, inputs: Inputs) -> torch.Tensor | None:
    """Which tokens of the inputs are real, bool [batch, tokens]; None for a model that is not told its padding."""
    if isinstance(inputs, dict):
        mask = mask_of(inputs)
        return None if mask is None else mask != 0
    told = getattr(model, "token_mask", None)
    return None if told is None else told(inputs)


def _observed(model: torch.nn.Module, inputs: Inputs) -> torch.Tensor | None:
    """Like `token_mask`, without the virtual tokens of a soft prompt, which are the same before every text."""
    told = getattr(model, "observed", None)
    return told(inputs) if told is not None and isinstance(inputs, torch.Tensor) else token_mask(model, inputs)


def _unpadded(model: torch.nn.Module, inputs: Inputs) -> Iterator[Inputs]:
    """Each example as a batch of one, without its padding."""
    if isinstance(inputs, dict):
        return unpadded(inputs)
    mask = token_mask(model, inputs)
    return (x[None] if mask is None else x[None, ..., mask[i]] for i, x in enumerate(inputs))


def example_digests(model: torch.nn.Module, inputs: Inputs, seed: int) -> Iterator[tuple[int, int]]:
    """Two independent numbers below 2^64 for each example of a batch, from what the model reads of it.

    Args:
        model: Tells where the inputs are padding, if it is told (`token_mask`).
        inputs: What the model is called with.
        seed: Seed of the digests.
    """
    salt = seed.to_bytes(8, "little", signed=True)
    for one in _unpadded(model, mapped(inputs, torch.Tensor.cpu)):
        if isinstance(one, dict):
            one.pop(MASK, None)  # all real, and not every call gives it
        found = hashlib.blake2b(digest_size=16, salt=salt)
        for x in tensors_in(one):
            found.update(x.contiguous().flatten().view(torch.uint8).numpy().data)
        first, second = struct.unpack("<2Q", found.digest())
        yield first, second


def _drawn(
    model: torch.nn.Module, loader: Iterable[Any], count: int, key: str | None, seed: int, quiet: bool
) -> list[_Drawn]:
    """The `count` examples of the smallest digests, ascending: a simple random sample, whatever their order."""
    smallest: list[tuple[int, int]] = []  # (-digest, index), the largest digest first
    kept: dict[int, _Drawn] = {}
    seen = 0
    for batch in track(loader, "drawing donors", quiet=quiet):
        found = read_batch(batch, key, tokens=True)
        labels = [-1] * len(found) if found.per_token else found.labels.tolist()
        for x, label, (digest, _) in zip(
            _unpadded(model, found.inputs), labels, example_digests(model, found.inputs, seed), strict=True
        ):
            if digest not in kept and (len(kept) < count or digest < -smallest[0][0]):
                kept[digest] = _Drawn(digest, seen, int(label), mapped(x, torch.Tensor.clone))
                heapq.heappush(smallest, (-digest, seen))
                if len(kept) > count:
                    del kept[-heapq.heappop(smallest)[0]]
            seen += 1
    return [kept[digest] for digest in sorted(kept)]


def _alike(drawn: Sequence[_Drawn]) -> Iterator[list[int]]:
    """Rows of donors whose inputs have one shape, a few at a time."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for row, donor in enumerate(drawn):
        shape = tuple(size for x in tensors_in(donor.inputs) for size in x.shape)
        by_shape.setdefault(shape, []).append(row)
    for rows in by_shape.values():
        yield from (rows[start : start + TOGETHER] for start in range(0, len(rows), TOGETHER))


def _union(skills: Iterable[Skill], sites: Sequence[Site]) -> dict[str, torch.Tensor]:
    """Site -> all neurons of the skills there, ascending."""
    widths = {site.name: site.width for site in sites}
    found: dict[str, list[torch.Tensor]] = {}
    for skill in skills:
        for name, index in skill.neurons.items():
            if int(index[-1]) >= widths.get(name, 0):
                raise ArgumentError(
                    f"skill {skill.name!r}: expected neurons that the model has, got {int(index[-1])} in {name}; "
                    "select it on this model"
                )
            found.setdefault(name, []).append(index)
    return {name: torch.cat(parts).unique() for name, parts in found.items()}


class _Reader:
    """Reads neurons of a few examples that have no padding."""

    def __init__(self, model: torch.nn.Module, sites: Sequence[Site], neurons: Mapping[str, torch.Tensor]) -> None:
        self.model = model
        self.sites = sites
        self.neurons = neurons

    def read(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Site -> activations [batch, ..., S], tokens averaged where the model is told its padding."""
        found: dict[str, torch.Tensor] = {}
        mask, n = _observed(self.model, inputs), examples_in(inputs)

        def keep(name: str, x: torch.Tensor) -> None:
            chosen = by_sample(x.index_select(-1, self.neurons[name].to(x.device)), n, name)
            if mask is None or x.dim() != 3:
                found[name] = chosen
            else:
                weight = mask.to(x.device)[:, None].float()
                found[name] = (weight @ chosen.float() / weight.sum(2, keepdim=True)).to(x.dtype)

        routed: dict[str, list[RoutedActivations]] = {site.name: [] for site in self.sites if site.experts is not None}

        def see(name: str, seen: Activations) -> None:
            if isinstance(seen, RoutedActivations):
                routed[name].append(seen if mask is None else seen.within(mask))
            else:
                keep(name, seen.values)

        with ExitStack() as stack:
            for site in self.sites:
                stack.enter_context(watched(self.model, site, partial(see, site.name)))
            device = module_device(self.model)
            call(self.model, mapped(inputs, lambda x: x.to(device)))
        means = {name: _mean_where_routed(parts, self.neurons[name]) for name, parts in routed.items() if parts}
        return found | means


def _mean_where_routed(parts: Sequence[RoutedActivations], neurons: torch.Tensor) -> torch.Tensor:
    """Mean of experts' neurons over each example's tokens that were routed there [batch, 1, S]; NaN without any."""
    rows = RoutedActivations.joined(parts)
    one = torch.ones_like(rows.values[:, :1])
    counts = rows.summed(one.double()).to(torch.float64)  # [batch, experts]
    index = neurons.to(counts.device)
    means = rows.summed(rows.values.double())[:, index] / counts[:, index // rows.values.shape[-1]]
    return means[:, None].to(rows.values.dtype)


def _of_others(site: Site, neurons: torch.Tensor, activations: torch.Tensor) -> torch.Tensor:
    """Activations [M, 1, S] with the other donors' mean where a donor's tokens passed an expert by."""
    means = activations.double().nanmean(0).to(activations.dtype)
    if bool(means.isnan().any()):
        assert site.experts is not None
        lacking = sorted(set((neurons.to(means.device)[means[0].isnan()] // (site.width // site.experts)).tolist()))
        raise ArgumentError(
            f"donors: expected tokens of some donor at each expert of {site.name} that a skill has, got none at expert "
            f"{lacking[0]}; raise n_donors, or leave it out"
        )
    return torch.where(activations.isnan(), means, activations)


def _refuse_too_large(
    kept: Mapping[str, list[tuple[int, torch.Tensor]]], drawn: Sequence[_Drawn], ran: int, budget: int
) -> None:
    """Raise ArgumentError where all donors will take more than the budget, by what the last ones took."""
    each = sum(x.nbytes for found in kept.values() for _, x in found[-ran:]) / ran
    needed = int(each * len(drawn)) + sum(bytes_of(donor.inputs) for donor in drawn)
    if needed > budget:
        raise ArgumentError(
            f"memory budget: expected at least {needed / 2**20:,.0f} MiB for {len(drawn)} donors, got "
            f"{budget / 2**20:,.0f} MiB; lower n_donors or raise --memory-budget"
        )


def _stacked(site: str, found: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Rows [M, ..., S] in the donors' order."""
    rows = [x for _, x in sorted(found, key=lambda pair: pair[0])]
    shapes = {tuple(x.shape[:-1]) for x in rows}
    if len(shapes) > 1:
        one, other = sorted(shapes)[:2]
        raise ArgumentError(
            f"donors: expected examples of one number of tokens, got {list(one)} and {list(other)} at {site}; give "
            "inputs of one size, or a model with token_mask"
        )
    return torch.stack(rows)
