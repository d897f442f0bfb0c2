"""Conditions, what they do at each site, and `ablate`, which does it for the duration of a context."""

from __future__ import annotations

import inspect
import math
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast.errors import ArgumentError, ModelError
from skillfast.models.activations import RoutedActivations
from skillfast.models.batches import LABELS
from skillfast.models.coverage import warn_incomplete
from skillfast.models.experts import without_experts
from skillfast.models.inputs import described, examples_in
from skillfast.models.shards import refuse_spread, shards_of
from skillfast.models.sites import (
    Site,
    check_neurons,
    find_sites,
    fingerprint,
    refuse_compiled,
    refuse_training,
    router_of,
    unwrap_compiled,
)
from skillfast.models.watching import watched
from skillfast.tracing.prepared import prepared
from skillfast.transfer import moved
from skillfast.vocabulary import KINDS, MODES, Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from skillfast.ablation.donors import DonorBank
    from skillfast.models.activations import Activations
    from skillfast.models.inputs import Inputs
    from skillfast.skills.skill import Skill
    from skillfast.statistics.scores import NeuronScores
    from skillfast.tracing.prepared import Prepared

MOST_TABLE_BYTES = 1 << 28  # kept between batches; beyond, tables are made anew


@dataclass(frozen=True)
class Condition:
    """A skill, an intervention and the components that it touches.

    Attributes:
        skill: The neurons.
        components: Kinds of sites in which they are changed; the skill's neurons elsewhere stay.
        scale: Factor on each neuron's activation: 0 removes, above 1 amplifies.
        mode: What `scale` 0 leaves: `"zero"` nothing, `"mean"` the mean that the reference scores hold (of units and
            gates of experts that over the tokens that were routed there, units weighed by their gates), `"resample"`
            the activation of a donor, another example drawn from a whole data set (at experts its mean over the tokens
            that were routed there), `"constant"` the `constants`; in
            general `other + scale * (x - other)`. `"reroute"` is `"zero"`, but an expert whose neuron of a router is
            in the skill gets its logit masked, so that its tokens are routed to other experts.
        name: What a sweep's result calls it; by default the skill's name and the settings that are not the defaults,
            such as `"deer (mlp+attn, x 2.0)"`. A sweep wants a different name for each of its conditions.
        constants: Site -> float [S], a value for each of the skill's neurons there in their order; for
            `mode="constant"`.
    """

    skill: Skill
    components: tuple[str, ...] = KINDS
    scale: float = 0.0
    mode: Mode = "zero"
    name: str = ""
    constants: Mapping[str, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.components if kind not in KINDS]
        if unknown:
            raise ArgumentError(f"components: expected some of {', '.join(KINDS)}, got {', '.join(unknown)}")
        if self.mode not in MODES:
            raise ArgumentError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        if not isinstance(self.scale, int | float) or not abs(self.scale) < float(np.finfo(np.float32).max):
            raise ArgumentError(f"scale: expected a finite number, got {self.scale}; 0 removes, 2 doubles")
        if self.mode == "reroute" and self.scale != 0:
            raise ArgumentError(f"scale: expected 0 with mode 'reroute', got {self.scale}; an expert is there or not")
        if (self.mode == "constant") != (self.constants is not None):
            got = "none" if self.constants is None else f"some with mode {self.mode!r}"
            raise ArgumentError(f"constants: expected some with mode 'constant' alone, got {got}; change the mode")
        for site, index in self.skill.neurons.items():
            if self.constants is not None and len(self.constants.get(site, ())) != len(index):
                raise ArgumentError(
                    f"constants: expected {len(index)} values for {site}, one per neuron of skill {self.skill.name!r}, "
                    "got another number; give them in the neurons' order"
                )
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


@dataclass(frozen=True)
class SiteChange:
    """What one condition does to a batch at one site.

    Attributes:
        neurons: int64 [S].
        scale: Factor on these neurons.
        mean: float64 [S], what `mode="mean"` or `"constant"` leaves; None in other modes.
        donors: [M, ..., neurons that are kept], the donors' activations for `mode="resample"`; None in other modes.
        places: int64 [S], where the neurons stand in `donors`.
        masked: Whether tokens are routed past the experts of these neurons, whose gates stay as they come.
    """

    neurons: torch.Tensor
    scale: float
    mean: torch.Tensor | None = None
    donors: torch.Tensor | None = None
    places: torch.Tensor | None = None
    masked: bool = False

    def within(self, held: torch.Tensor) -> SiteChange:
        """The change of those neurons that are held, int64 ascending, which are counted from 0 then."""
        at = torch.searchsorted(held, self.neurons)
        here = (at < len(held)) & (held[at.clamp(max=len(held) - 1)] == self.neurons)
        mean = None if self.mean is None else self.mean[here]
        return replace(self, neurons=at[here], mean=mean, places=None if self.places is None else self.places[here])

    def donated(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Activations [batch, ..., S] of each example's donor, by its row int64 [batch]; None in other modes."""
        if self.donors is None or self.places is None:
            return None
        device = self.donors.device
        return self.donors.index_select(-1, self.places.to(device)).index_select(0, rows.to(device))


@dataclass(frozen=True)
class _Tables:
    """Rows as the arguments of `neuron_scale`: [conditions, D] each, None where they would do nothing."""

    scale: torch.Tensor
    shift: torch.Tensor | None

    @staticmethod
    def of(changes: Sequence[SiteChange | None], width: int, dtype: torch.dtype, device: torch.device) -> _Tables:
        scale = torch.ones(len(changes), width, dtype=dtype)
        shift = torch.zeros_like(scale)
        for k, change in enumerate(changes):
            if change is None:
                continue
            scale[k, change.neurons] = change.scale
            if change.mean is not None:
                shift[k, change.neurons] = (1 - change.scale) * change.mean.to(dtype)
        return _Tables(moved(scale, device), moved(shift, device) if bool(shift.any()) else None)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.scale, self.shift) if t is not None)


class Interventions:
    """What conditions do, checked against a model.

    Attributes:
        conditions: As given.
        sites: The sites that any condition changes, in the model's order.
        donors: The bank of those whose activations `mode="resample"` leaves; None where no condition does.
        shards: How the neurons of these sites are spread over processes; None where this one holds all of them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        conditions: Sequence[Condition],
        reference: NeuronScores | None = None,
        donors: DonorBank | None = None,
    ) -> None:
        sites = {site.name: site for site in find_sites(model)}
        fingerprint_of_model = fingerprint(model)
        for condition in conditions:
            check_neurons(condition.skill, sites, fingerprint_of_model)
        if any(condition.mode == "resample" for condition in conditions):
            refuse_spread(model, "mode 'resample'")
        self.conditions = conditions
        self._changes: dict[str, dict[int, SiteChange]] = {}  # site -> condition -> change
        for site in sites.values():
            changes = {}
            for i, condition in enumerate(conditions):
                neurons = condition.neurons_at(site)
                if neurons is not None:
                    scale = float(condition.scale)
                    if condition.mode == "mean":
                        gated = site.experts is not None and router_of(site).name in sites
                        mean = _reference_mean(reference, site, neurons, gated=gated)
                        changes[i] = SiteChange(neurons, scale, mean=mean)
                    elif condition.constants is not None:
                        changes[i] = SiteChange(neurons, scale, mean=condition.constants[site.name].double().cpu())
                    elif condition.mode == "resample":
                        kept, places = _of_donors(donors, condition.skill, site, neurons, fingerprint_of_model)
                        changes[i] = SiteChange(neurons, scale, donors=kept, places=places)
                    elif condition.mode == "reroute" and site.kind == "router":
                        changes[i] = SiteChange(neurons, 1.0, masked=True)
                    else:
                        changes[i] = SiteChange(neurons, scale)
            if changes:
                self._changes[site.name] = changes
        self.sites = [site for site in sites.values() if site.name in self._changes]
        self._widths = {site.name: site.width for site in self.sites}
        self.shards = shards_of(model, self.sites)
        if self.shards is not None:
            for name, held in self.shards.held.items():
                self._widths[name] = len(held)
                self._changes[name] = {i: change.within(held) for i, change in self._changes[name].items()}
        self._kept: dict[tuple[Any, ...], _Tables] = {}
        resamples = any(change.donors is not None for site in self._changes.values() for change in site.values())
        self.donors = donors if resamples else None

    def change_at(self, site: Site, condition: int) -> SiteChange | None:
        """What a condition does at a site; None where it does nothing."""
        return self._changes.get(site.name, {}).get(condition)

    def masks(self, site: Site, conditions: Sequence[int], batch: int) -> torch.Tensor | None:
        """Which experts each of [conditions * batch] examples lacks, bool [examples, experts]; None for none."""
        changes = self._changes[site.name]
        if not any(i in changes and changes[i].masked for i in conditions):
            return None
        masked = torch.zeros(len(conditions), site.width, dtype=torch.bool)
        for k, i in enumerate(conditions):
            if i in changes and changes[i].masked:
                masked[k, changes[i].neurons] = True
        return masked.repeat_interleave(batch // len(conditions), 0)

    def apply(
        self, site: Site, found: Activations, conditions: Sequence[int], rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Activations of [conditions * batch] examples, one condition after the other, each changed by its own.

        Args:
            site: Where.
            found: What flows there.
            conditions: Positions of the conditions.
            rows: int64 [batch], each example's row of the bank of donors; None where no condition needs one.

        Raises:
            ModelError: Donors are needed and not known, or for another number of examples.
        """
        changes, x = self._changes[site.name], found.values
        if not any(i in changes for i in conditions):
            return x
        tables = self._tables(site, x, tuple(conditions))
        batch = found.batch // len(conditions)
        condition = (
            torch.arange(len(conditions), device=x.device).repeat_interleave(batch) if len(conditions) > 1 else None
        )
        changed = found.scaled(tables.scale, tables.shift, condition)
        if self.donors is None:
            return changed
        if isinstance(found, RoutedActivations):
            added = self._donated_to_experts(site, found, conditions, rows)
            return torch.where((found.expert < found.n_experts)[:, None], changed + added, changed)
        for part, i in zip(changed.split(batch), conditions, strict=True):
            change = changes.get(i)
            if change is None or change.donors is None:
                continue
            if rows is None or not len(rows) or batch % len(rows):
                raise ModelError(
                    f"{site.name}: expected a forward of the whole model, which tells whose donors are wanted, got "
                    f"{batch} rows where {'none' if rows is None else len(rows)} went in; call the model itself"
                )
            other = change.donated(rows)
            assert other is not None
            if other.dim() == part.dim() == 3 and part.shape[1] == 1:
                other = other[:, :1]  # a sweep lets the first token alone pass the last block
            wanted = (*part.shape[:-1], len(change.neurons))
            if len(rows) != batch and other.numel() == math.prod(wanted):
                other = other.reshape(wanted)  # windows, which donors hold unfolded
            try:
                other = other.to(part).expand(wanted)
            except RuntimeError as error:
                raise ArgumentError(
                    f"donors: expected activations {list(wanted)} at {site.name}, got {list(other.shape)} of examples "
                    "of another size; draw donors from data of this size"
                ) from error
            part.index_add_(-1, change.neurons.to(part.device), (1 - change.scale) * other)
        return changed

    def _donated_to_experts(
        self, site: Site, found: RoutedActivations, conditions: Sequence[int], rows: torch.Tensor | None
    ) -> torch.Tensor:
        """What each row [rows, U] at experts gets of its example's donor."""
        batch = found.batch // len(conditions)
        if rows is None or len(rows) != batch:
            raise ModelError(
                f"{site.name}: expected a forward of the whole model, which tells whose donors are wanted, got "
                f"{batch} examples where {'none' if rows is None else len(rows)} went in; call the model itself"
            )
        added = found.values.new_zeros(found.batch, site.width)
        for part, i in zip(added.split(batch), conditions, strict=True):
            change = self._changes[site.name].get(i)
            if change is not None and (other := change.donated(rows)) is not None:
                part[:, change.neurons.to(part.device)] = (1 - change.scale) * other[:, 0].to(part)
        each = added.view(found.batch, found.n_experts, -1)
        return each[found.example, found.expert.clamp(max=found.n_experts - 1)]

    def apply_each(self, site: Site, found: Activations, condition: torch.Tensor) -> torch.Tensor:
        """Activations of [batch] examples, each changed by a condition of its own, without donors.

        Args:
            site: Where.
            found: What flows there.
            condition: int64 [batch], position of each example's condition; as many as there are for none.
        """
        every = tuple(range(len(self.conditions) + 1))  # the last one changes nothing
        tables = self._tables(site, found.values, every)
        return found.scaled(tables.scale, tables.shift, condition)

    def factors(self, condition: int) -> dict[Site, tuple[torch.Tensor, torch.Tensor]]:
        """Site -> scale and shift, float64 [1, D] each, of what one condition does there, donors aside.

        Raises:
            ArgumentError: A router whose logits are masked.
        """
        found = {}
        for site in self.sites:
            change = self.change_at(site, condition)
            if change is None:
                continue
            if change.masked:
                raise ArgumentError(
                    "mode 'reroute': expected another mode for a prepared model, got a router's logits to mask, which "
                    "are inside its own code, where no gate stands; use mode 'zero', or the model that was not prepared"
                )
            tables = _Tables.of([change], self._widths[site.name], torch.float64, torch.device("cpu"))
            found[site] = (tables.scale, torch.zeros_like(tables.scale) if tables.shift is None else tables.shift)
        return found

    def given(self, condition: int, rows: torch.Tensor) -> dict[Site, tuple[torch.Tensor, torch.Tensor]]:
        """Site -> neurons int64 [S], and what they get of donors beside `factors` [batch, tokens or 1, S].

        Args:
            condition: Position of the condition.
            rows: int64 [batch], each example's row of the bank of donors.
        """
        found = {}
        for site in self.sites_of_donors(condition):
            change = self._changes[site.name][condition]
            other = change.donated(rows)
            assert other is not None
            tokens = other.flatten(1, -2) if other.dim() > 2 else other[:, None]
            found[site] = (change.neurons, (1 - change.scale) * tokens)
        return found

    def sites_of_donors(self, condition: int) -> list[Site]:
        """Sites at which a condition leaves something of donors."""
        changes = ((site, self.change_at(site, condition)) for site in self.sites)
        return [site for site, change in changes if change is not None and change.donors is not None]

    def _tables(self, site: Site, x: torch.Tensor, conditions: tuple[int, ...]) -> _Tables:
        """The tables of these conditions where the activations are, kept for the next batch."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (site.name, conditions, x.device, dtype)
        if key not in self._kept:
            if sum(tables.nbytes for tables in self._kept.values()) > MOST_TABLE_BYTES:
                self._kept.clear()
            changes = self._changes[site.name]
            with torch.inference_mode(False):
                self._kept[key] = _Tables.of(
                    [changes.get(i) for i in conditions], self._widths[site.name], dtype, x.device
                )
        return self._kept[key]


def _reference_mean(reference: NeuronScores | None, site: Site, neurons: torch.Tensor, *, gated: bool) -> torch.Tensor:
    """float64 [S], what `mode="mean"` leaves of these neurons; of experts `gated` says whether they have a router."""
    if reference is None:
        raise ArgumentError("mode 'mean': expected reference=scores of a trace, got none; trace this model")
    if reference.pool not in ("mean", "none") and site.kind != "head":
        raise ArgumentError(
            f"mode 'mean': expected reference scores pooled by 'mean', got {reference.pool!r}; "
            "another pooling's mean is not the mean over tokens"
        )
    if site.experts is not None:
        return _routed_mean(reference, site, neurons, gated)
    return torch.from_numpy(reference[site.name].mean)[neurons]


def _routed_mean(reference: NeuronScores, site: Site, neurons: torch.Tensor, gated: bool) -> torch.Tensor:
    """What neurons are on average where tokens are routed to their experts, float64 [S].

    Scores are of gate x activation, so a unit's is divided by the gate's: that constant adds over all tokens what the
    unit does. Pooled scores count tokens that pass by as 0; the share of tokens at each expert tells without these.
    """
    router = router_of(site).name
    weights = np.ones(site.experts or 0)  # of tokens as observations, which are those that were routed
    if site.kind == "expert" and gated:
        if all(each.name != router for each in reference.sites):
            raise ArgumentError(
                f"mode 'mean': expected reference scores of {router} beside those of {site.name}, got none; trace "
                "kinds expert and router together"
            )
        weights = reference[router].mean
    elif reference.n_routed is None:
        if reference.routed is None:
            raise ArgumentError(
                f"mode 'mean': expected shares of tokens at the experts of {site.name} in the reference scores, got "
                "none; trace kinds expert and router together"
            )
        weights = reference.routed[router].mean
    expert = neurons // (site.width // len(weights))
    found = torch.from_numpy(reference[site.name].mean)[neurons] / torch.from_numpy(weights)[expert]
    if not bool(found.isfinite().all()):
        unknown = sorted(set(expert[~found.isfinite()].tolist()))
        raise ArgumentError(
            f"mode 'mean': expected tokens at each expert of {site.name} that is changed in the reference scores, got "
            f"none or too few at expert {unknown[0]}; trace more data, or leave it out"
        )
    return found


def _of_donors(
    bank: DonorBank | None, skill: Skill, site: Site, neurons: torch.Tensor, fingerprint_of_model: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The donors' activations at a site, and where these neurons stand in them."""
    if bank is None:
        raise ArgumentError(
            "mode 'resample': expected donors=skillfast.donors(model, loader, skills), got none; draw them first"
        )
    if bank.fingerprint != fingerprint_of_model:
        raise ArgumentError(
            f"donors: expected some of the model's architecture ({fingerprint_of_model}), got some of "
            f"{bank.fingerprint}; draw them with this model"
        )
    places = bank.places(site.name, neurons)
    if places is None:
        raise ArgumentError(
            f"donors: expected activations of all neurons of skill {skill.name!r} in {site.name}, got some without; "
            "draw them for this skill, too"
        )
    return bank.activations[site.name], places


@contextmanager
def ablate(
    model: torch.nn.Module,
    skill: Skill,
    *,
    scale: float = 0.0,
    mode: Mode = "zero",
    reference: NeuronScores | None = None,
    donors: DonorBank | None = None,
    components: Sequence[str] = KINDS,
) -> Iterator[None]:
    """Change a skill's neurons in every forward of the model inside the context; contexts nest.

    Args:
        model: In evaluation mode.
        skill: The neurons.
        scale: 0 removes them, 2 doubles their activations.
        mode: `"zero"` scales towards 0, `"mean"` towards the mean that the reference scores hold, `"resample"` towards
            the activations of the donor that each example gets, whatever batch it is in; `"reroute"` is `"zero"`, but
            experts whose neuron of a router is in the skill are left out of the choice, so that tokens are routed anew.
        reference: Scores of this model, for `mode="mean"`.
        donors: For `mode="resample"`, from `skillfast.donors`. What the model is called with first tells who an example
            is, so call the model itself, not a part of it.
        components: Kinds of sites in which the neurons are changed.

    Raises:
        ArgumentError: A site or neuron that the model lacks, a skill of another architecture, an unknown mode, or one
            whose reference or donors are missing.
        ModelError: A model in training mode, or wrapped by `torch.compile` and not prepared (`prepare`).
    """
    known = prepared(model)
    if known is None:
        refuse_compiled(model)
    refuse_training(model, "ablate")
    warn_incomplete(model)
    interventions = Interventions(model, [Condition(skill, tuple(components), scale, mode)], reference, donors)
    if known is not None:
        inner = unwrap_compiled(model)
        with known.changed(inner, interventions.factors(0)), ExitStack() as stack:
            if interventions.donors is not None:
                stack.enter_context(_giving(model, known, interventions))
            yield
        return
    with ExitStack() as stack:
        rows = stack.enter_context(_rows_of_calls(model, interventions.donors))
        stack.enter_context(hooked(model, interventions, interventions.sites, [0], rows))
        yield


_STANDS_FOR: ContextVar[tuple[Inputs, int] | None] = ContextVar("skillfast_stands_for", default=None)


@contextmanager
def standing_for(inputs: Inputs, n: int) -> Iterator[None]:
    """Tell ablations around it that a forward inside is of these examples, n times over, whatever it is called with."""
    token = _STANDS_FOR.set((inputs, n))
    try:
        yield
    finally:
        _STANDS_FOR.reset(token)


@contextmanager
def _giving(model: torch.nn.Module, known: Prepared, interventions: Interventions) -> Iterator[None]:
    """Tell the gates of a prepared model before each of its forwards what they get of whose donor."""
    inner, bank, sites = unwrap_compiled(model), interventions.donors, interventions.sites_of_donors(0)
    assert bank is not None
    if getattr(inner, "_compiled_call_impl", None):
        raise ModelError(
            "mode 'resample': expected a model that torch.compile(model) has wrapped, got one compiled in place, whose "
            "hooks are part of its graph; wrap it, or sweep, which tells donors outside of it"
        )
    tokens: dict[str, int] = {}
    calls = 0

    def begin(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        given = interventions.given(0, bank.rows_of(inner, _arguments(inner, args, kwargs)))
        known.give(inner, given)
        tokens.update({site.name: values.shape[1] for site, (_, values) in given.items()})
        calls += 1

    with known.resampling(sites):
        before = known.forwards(inner)
        handle = model.register_forward_pre_hook(begin, with_kwargs=True)
        try:
            yield
            known.check_given(inner, sites, tokens, calls, before)
        finally:
            handle.remove()
            known.take_back(inner, sites)


@contextmanager
def _rows_of_calls(model: torch.nn.Module, bank: DonorBank | None) -> Iterator[Callable[[], torch.Tensor | None]]:
    """A function that gives the donors' rows of the forward that runs at the moment."""
    running: list[torch.Tensor] = []
    if bank is None:
        yield lambda: None
        return

    def begin(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        told = _STANDS_FOR.get()
        if told is None:
            running[:] = [bank.rows_of(model, _arguments(model, args, kwargs))]
        else:
            running[:] = [bank.rows_of(model, told[0]).repeat(told[1])]

    def end(*_: object) -> None:
        running.clear()

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(end, always_call=True).remove)
        yield lambda: running[0] if running else None


def _arguments(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """What tells the examples of a call apart: its one tensor, or its arguments by name without the labels."""
    if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
        return args[0]
    try:
        names = list(inspect.signature(model.forward).parameters)
        given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        found = {name: value for name, value in given.items() if name not in LABELS}
        examples_in(found)
    except ArgumentError as error:
        raise ArgumentError(
            f"mode 'resample': expected a tensor that tells the examples apart, got {described(kwargs)}; call the "
            "model with its inputs by name"
        ) from error
    return found


@contextmanager
def hooked(
    model: torch.nn.Module,
    interventions: Interventions,
    sites: Sequence[Site],
    conditions: Sequence[int],
    rows: Callable[[], torch.Tensor | None],
) -> Iterator[None]:
    """Change what flows at the sites, conditions stacked along the batch.

    Args:
        model: The model.
        interventions: What every condition does.
        sites: Sites whose activations to change.
        conditions: Positions of the conditions that run.
        rows: Gives the examples' rows of the bank of donors, int64 [batch], while a forward runs.
    """
    with ExitStack() as stack:
        for site in sites:

            def change(found: Activations, site: Site = site) -> torch.Tensor:
                return interventions.apply(site, found, conditions, rows())

            stack.enter_context(watched(model, site, change))
            if site.kind == "router":
                masks = partial(interventions.masks, site, conditions)
                stack.enter_context(without_experts(model, site, masks))
        yield
