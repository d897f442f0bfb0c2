"""Conditions, what they do at each site, and `ablate`, which does it for the duration of a context."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast import ops
from skillfast.errors import ArgumentError, ModelError
from skillfast.models.sites import Site, find_sites, fingerprint, refuse_compiled, refuse_training
from skillfast.vocabulary import KINDS, MODES, Mode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from skillfast.skills.skill import Skill
    from skillfast.statistics.scores import NeuronScores

MOST_TABLE_BYTES = 1 << 28  # kept between batches; beyond, tables are made anew


@dataclass(frozen=True)
class Condition:
    """A skill, an intervention and the components that it touches.

    Attributes:
        skill: The neurons.
        components: Kinds of sites in which they are changed; the skill's neurons elsewhere stay.
        scale: Factor on each neuron's activation: 0 removes, above 1 amplifies.
        mode: What `scale` 0 leaves: `"zero"` nothing, `"mean"` the mean that the reference scores hold, `"resample"`
            the activation of another sample of the batch; in general `other + scale * (x - other)`.
        name: What a sweep's result calls it; by default the skill's name and the settings that are not the defaults,
            such as `"deer (mlp+attn, x 2.0)"`. A sweep wants a different name for each of its conditions.
    """

    skill: Skill
    components: tuple[str, ...] = KINDS
    scale: float = 0.0
    mode: Mode = "zero"
    name: str = ""

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.components if kind not in KINDS]
        if unknown:
            raise ArgumentError(f"components: expected some of {', '.join(KINDS)}, got {', '.join(unknown)}")
        if self.mode not in MODES:
            raise ArgumentError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        if not isinstance(self.scale, int | float) or not abs(self.scale) < float(np.finfo(np.float32).max):
            raise ArgumentError(f"scale: expected a finite number, got {self.scale}")
        if not self.name:
            object.__setattr__(self, "name", self._derived_name())

    def _derived_name(self) -> str:
        special = [
            "+".join(self.components) if set(self.components) != set(KINDS) else "",
            f"x {self.scale}" if self.scale != 0 else "",
            self.mode if self.mode != "zero" else "",
        ]
        settings = ", ".join(text for text in special if text)
        return f"{self.skill.name} ({settings})" if settings else self.skill.name

    def neurons_at(self, site: Site) -> torch.Tensor | None:
        """int64 indices of the neurons that it changes at a site, or None."""
        return self.skill.neurons.get(site.name) if site.kind in self.components else None


def partners(batch: int) -> torch.Tensor:
    """int64 [batch]: another sample for each, by one random cycle that depends on the batch's size alone.

    Raises:
        ModelError: One sample has no other.
    """
    if batch < 2:
        raise ModelError(f"mode 'resample': expected at least 2 samples in a batch, got {batch}; use larger batches")
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(batch))
    return torch.empty_like(order).scatter_(0, order, order.roll(-1))


@dataclass(frozen=True)
class SiteChange:
    """What one condition does to a batch at one site.

    Attributes:
        neurons: int64 [S].
        scale: Factor on these neurons.
        mean: float64 [S], what `mode="mean"` leaves; None in other modes.
        resample: Whether it leaves another sample's activations.
    """

    neurons: torch.Tensor
    scale: float
    mean: torch.Tensor | None
    resample: bool


@dataclass(frozen=True)
class _Tables:
    """Rows as the arguments of `neuron_scale`: [conditions, D] each, None where they would do nothing."""

    scale: torch.Tensor
    shift: torch.Tensor | None
    other: torch.Tensor | None  # factor on the partner's activations

    @staticmethod
    def of(changes: Sequence[SiteChange | None], width: int, dtype: torch.dtype, device: torch.device) -> _Tables:
        scale = torch.ones(len(changes), width, dtype=dtype)
        shift, other = torch.zeros_like(scale), torch.zeros_like(scale)
        for k, change in enumerate(changes):
            if change is None:
                continue
            scale[k, change.neurons] = change.scale
            if change.mean is not None:
                shift[k, change.neurons] = (1 - change.scale) * change.mean.to(dtype)
            if change.resample:
                other[k, change.neurons] = 1 - change.scale
        shift_or_none, other_or_none = (t.to(device) if bool(t.any()) else None for t in (shift, other))
        return _Tables(scale.to(device), shift_or_none, other_or_none)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.scale, self.shift, self.other) if t is not None)


class Interventions:
    """What conditions do, checked against a model.

    Attributes:
        conditions: As given.
        sites: The sites that any condition changes, in the model's order.
    """

    def __init__(self, model: torch.nn.Module, conditions: Sequence[Condition], reference: NeuronScores | None) -> None:
        sites = {site.name: site for site in find_sites(model)}
        fingerprint_of_model = fingerprint(model)
        for condition in conditions:
            _check(condition.skill, sites, fingerprint_of_model)
        self.conditions = conditions
        self._changes: dict[str, dict[int, SiteChange]] = {}  # site -> condition -> change
        for site in sites.values():
            changes = {}
            for i, condition in enumerate(conditions):
                neurons = condition.neurons_at(site)
                if neurons is not None:
                    mean = _reference_mean(reference, site)[neurons] if condition.mode == "mean" else None
                    changes[i] = SiteChange(neurons, float(condition.scale), mean, condition.mode == "resample")
            if changes:
                self._changes[site.name] = changes
        self.sites = [site for site in sites.values() if site.name in self._changes]
        self._kept: dict[tuple[Any, ...], _Tables] = {}
        self.resamples = any(change.resample for changes in self._changes.values() for change in changes.values())

    def change_at(self, site: Site, condition: int) -> SiteChange | None:
        """What a condition does at a site; None where it does nothing."""
        return self._changes.get(site.name, {}).get(condition)

    def apply(self, site: Site, x: torch.Tensor, conditions: Sequence[int]) -> torch.Tensor:
        """Activations [conditions * batch, ..., D], one condition after the other, each changed by its own.

        Raises:
            ModelError: One sample alone where another one's activations are wanted.
        """
        changes = self._changes[site.name]
        if not any(i in changes for i in conditions):
            return x
        tables = self._tables(site, x, tuple(conditions))
        batch = x.shape[0] // len(conditions)
        condition = (
            torch.arange(len(conditions), device=x.device).repeat_interleave(batch) if len(conditions) > 1 else None
        )
        changed = ops.neuron_scale(x, tables.scale, tables.shift, condition)
        if tables.other is not None:
            partner = torch.cat([partners(batch) + k * batch for k in range(len(conditions))]).to(x.device)
            changed = changed + ops.neuron_scale(x[partner], tables.other, None, condition)
        return changed

    def _tables(self, site: Site, x: torch.Tensor, conditions: tuple[int, ...]) -> _Tables:
        """The tables of these conditions where the activations are, kept for the next batch."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (site.name, conditions, x.device, dtype)
        if key not in self._kept:
            if sum(tables.nbytes for tables in self._kept.values()) > MOST_TABLE_BYTES:
                self._kept.clear()
            changes = self._changes[site.name]
            with torch.inference_mode(False):
                self._kept[key] = _Tables.of([changes.get(i) for i in conditions], site.width, dtype, x.device)
        return self._kept[key]


def _check(skill: Skill, sites: dict[str, Site], fingerprint_of_model: str) -> None:
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
                f"skill {skill.name!r}: expected indices below {sites[name].width} in {name}, got {int(index[-1])}"
            )


def _reference_mean(reference: NeuronScores | None, site: Site) -> torch.Tensor:
    if reference is None:
        raise ArgumentError("mode 'mean': expected reference=scores of a trace, got none")
    if reference.pool not in ("mean", "none") and site.kind != "head":
        raise ArgumentError(
            f"mode 'mean': expected reference scores pooled by 'mean', got {reference.pool!r}; "
            "another pooling's mean is not the mean over tokens"
        )
    return torch.from_numpy(reference[site.name].mean)


@contextmanager
def ablate(
    model: torch.nn.Module,
    skill: Skill,
    *,
    scale: float = 0.0,
    mode: Mode = "zero",
    reference: NeuronScores | None = None,
    components: Sequence[str] = KINDS,
) -> Iterator[None]:
    """Change a skill's neurons in every forward of the model inside the context; contexts nest.

    Args:
        model: In evaluation mode.
        skill: The neurons.
        scale: 0 removes them, 2 doubles their activations.
        mode: `"zero"` scales towards 0, `"mean"` towards the mean that the reference scores hold, `"resample"` towards
            the activations of another sample of the batch, drawn by a cycle that depends on the batch's size alone.
        reference: Scores of this model, for `mode="mean"`.
        components: Kinds of sites in which the neurons are changed.

    Raises:
        ArgumentError: A site or neuron that the model lacks, a skill of another architecture, an unknown mode.
        ModelError: A model in training mode, or wrapped by `torch.compile`.
    """
    refuse_compiled(model)
    refuse_training(model, "ablate")
    interventions = Interventions(model, [Condition(skill, tuple(components), scale, mode)], reference)
    with hooked(model, interventions, interventions.sites, [0]):
        yield


@contextmanager
def hooked(
    model: torch.nn.Module, interventions: Interventions, sites: Sequence[Site], conditions: Sequence[int]
) -> Iterator[None]:
    """Pre-hooks that replace the input of the sites' projections, conditions stacked along the batch."""
    with ExitStack() as stack:
        for site in sites:

            def replace_input(_: torch.nn.Module, args: tuple[Any, ...], site: Site = site) -> tuple[Any, ...]:
                return (interventions.apply(site, args[0], conditions), *args[1:])

            handle = model.get_submodule(site.path).register_forward_pre_hook(replace_input)
            stack.callback(handle.remove)
        yield
