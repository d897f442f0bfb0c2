"""`prepare`: reads and gates that stay in a model, so that it is traced and ablated as it is compiled.

A hook that comes or goes is code that changes: a compiled model skips it. So each site gets one hook for good, which
multiplies its neurons by a buffer and leaves their pooled rows in another. What a `Tracer` or an ablation does then is
reading and writing these buffers between forwards, which no graph sees.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from skillfast.errors import ArgumentError, ModelError
from skillfast.models.coverage import warn_incomplete
from skillfast.models.experts import AT_ONCE, implementation_of
from skillfast.models.shards import refuse_spread
from skillfast.models.sites import choose_sites, refuse_training, unwrap_compiled
from skillfast.tracing.gates import RoutedGate, SiteGate, at_once, gate_name, install, tell_samples, uninstall
from skillfast.transfer import moved
from skillfast.vocabulary import POOLS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from skillfast.models.sites import Site
    from skillfast.statistics.tokens import TokenMask
    from skillfast.vocabulary import Pool

Forwards = dict[str, tuple[int, int, int, int]]
PREPARED = "skillfast_prepared"
ROWS = 64


@dataclass
class Prepared:
    """What a model was prepared for, and what its gates do at the moment.

    Attributes:
        sites: Sites with a gate.
        pool: How tokens become one row; `"none"`: each is an observation.
        rows: Examples that a forward has at most.
        tokens: Tokens that an example has at most, where some may be padding or each is left; None else.
        donors: Whether the gates have room for donors.
        changes: Site -> factors and shifts [1, D] each, in the order in which they are applied.
        resampled: Sites that get something of donors -> the change that goes with it.
    """

    sites: tuple[Site, ...]
    pool: Pool
    rows: int
    tokens: int | None
    donors: bool = False
    changes: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    resampled: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def most(self) -> str:
        """The largest batch, for people."""
        return f"{self.rows}" if self.tokens is None else f"{self.rows} examples of {self.tokens} tokens"

    def chosen(self, model: nn.Module, wanted: Sequence[str] | None, pool: str) -> tuple[Site, ...]:
        """The sites that were asked for; raises ArgumentError for what the model was not prepared for."""
        if pool != self.pool:
            raise ArgumentError(
                f"pool: expected {self.pool!r}, which this {type(model).__name__} is prepared for, got {pool!r}; "
                f"prepare(model, pool={pool!r})"
            )
        if wanted is None:
            return self.sites
        sites = choose_sites(model, wanted)
        self.require(sites)
        return sites

    def require(self, sites: Sequence[Site]) -> None:
        """Raises ArgumentError for a site without a gate."""
        known = {site.name for site in self.sites}
        for site in sites:
            if site.name not in known:
                raise ArgumentError(
                    f"site {site.name!r}: expected one that the model is prepared at ({self.sites[0].name} to "
                    f"{self.sites[-1].name}), got another; prepare(model, sites=...) with it"
                )

    @staticmethod
    def gate(model: nn.Module, site: Site) -> SiteGate | RoutedGate:
        """The gate at a site."""
        return cast("SiteGate | RoutedGate", getattr(model.get_submodule(site.path), gate_name(site)))

    def forwards(self, model: nn.Module) -> Forwards:
        """Site -> forwards that were read so far, and the examples, tokens and routed rows of the last."""
        by_device: dict[torch.device, dict[str, torch.Tensor]] = {}
        for site in self.sites:
            read = self.gate(model, site).read
            by_device.setdefault(read.device, {})[site.name] = read
        return {
            name: (times, n, tokens, rows)
            for on_device in by_device.values()  # one wait for each
            for name, (times, n, tokens, rows) in zip(
                on_device, torch.stack([*on_device.values()]).tolist(), strict=True
            )
        }

    def expect(self, model: nn.Module, mask: TokenMask | None) -> None:
        """Tell every gate which tokens of the next forward are real; None: all."""
        if mask is None and self.tokens is None:
            return
        most = (self.rows, self.tokens or 0)
        if mask is not None and (mask.shape[0] > most[0] or mask.shape[1] > most[1]):
            raise ArgumentError(
                f"mask: expected at most {most[0]} x {most[1]} tokens, which the model is prepared for, got shape "
                f"{list(mask.shape)}; prepare(model, rows={max(most[0], mask.shape[0])}, tokens={mask.shape[1]})"
            )
        for site in self.sites:
            gate = self.gate(model, site)
            if not isinstance(gate, SiteGate) or (kept := gate.mask) is None:
                continue  # what is left of every token is masked when it is read
            kept.fill_(True)
            if mask is not None:
                kept[: mask.shape[0], : mask.shape[1]].copy_(mask.on(kept.device))

    @contextmanager
    def changed(self, model: nn.Module, changes: dict[Site, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
        """Change sites' neurons inside the context: x -> x * scale + shift, [1, D] each, after what changes them."""
        self.require(list(changes))
        try:
            for site, change in changes.items():
                self.changes.setdefault(site.name, []).append(change)
                self._write(model, site)
            yield
        finally:
            for site, change in changes.items():
                kept = self.changes.get(site.name, [])
                self.changes[site.name] = [other for other in kept if other is not change]
                self._write(model, site)

    @contextmanager
    def resampling(self, sites: Sequence[Site]) -> Iterator[None]:
        """Sites that get something of donors inside the context, beside their last change.

        Changes that are entered later change what they got, too.

        Raises:
            ArgumentError: Gates without room for donors.
            ModelError: A site that gets something of other donors already.
        """
        if not self.donors:
            raise ArgumentError(
                "mode 'resample': expected a model that is prepared for donors, got one that is not; "
                "prepare(model, donors=True, tokens=...)"
            )
        if twice := [site.name for site in sites if site.name in self.resampled]:
            raise ModelError(
                f"mode 'resample': expected no other donors of a prepared model at {twice[0]}, got some, for whom the "
                "gate has no room; leave their context first"
            )
        self.resampled |= {site.name: self.changes[site.name][-1] for site in sites}
        try:
            yield
        finally:
            for site in sites:
                del self.resampled[site.name]

    def _later(self, site: Site) -> torch.Tensor | None:
        """The product [1, D] of the factors that came after a site's donors; None without."""
        own, product = self.resampled[site.name], None
        for change in reversed(self.changes[site.name]):
            if change is own:
                break
            product = change[0] if product is None else product * change[0].to(product)
        return product

    def give(self, model: nn.Module, given: Mapping[Site, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Tell the gates what the next forward's examples get.

        Args:
            model: The model.
            given: Site -> neurons int64 [S], and what is added to them [examples, tokens, S], or [examples, 1, S] for
                all tokens.

        Raises:
            ArgumentError: More examples or tokens than the model is prepared for.
        """
        for site, (neurons, values) in given.items():
            other = self.gate(model, site).other
            assert other is not None
            n, tokens = values.shape[:2]
            if n > other.shape[0] or tokens > other.shape[1]:
                raise ArgumentError(
                    f"mode 'resample': expected batches of up to {self.most}, which the model is prepared for, got {n} "
                    f"examples of {tokens} tokens at {site.name}; prepare(model, rows=..., tokens=...) for these"
                )
            at = moved(neurons, other.device)
            own = values.to(other).expand(-1, other.shape[1] if tokens == 1 else tokens, -1)
            if (later := self._later(site)) is not None:
                own = own * later.to(other)[0, at]
            other.zero_()
            other[:n, : own.shape[1], at] = own

    def take_back(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Nothing of donors from now on."""
        for site in sites:
            other = self.gate(model, site).other
            assert other is not None
            other.zero_()

    def check_given(
        self, model: nn.Module, sites: Sequence[Site], tokens: Mapping[str, int], forwards: int, before: Forwards
    ) -> None:
        """Raises ModelError where other forwards ran than those that were told of donors.

        Args:
            model: The model.
            sites: Sites that get something of donors.
            tokens: Site -> tokens that a donor has there.
            forwards: How many forwards were told.
            before: What `forwards` said before them.
        """
        told = self.forwards(model)
        for site in sites:
            times, n, seen, _ = told[site.name]
            times -= before[site.name][0]
            wanted = tokens.get(site.name, 1)
            if times != forwards or (forwards and site.experts is None and wanted not in (1, seen)):
                raise ModelError(
                    f"{site.name}: expected {forwards} forwards that were told of donors, of {wanted} tokens as they, "
                    f"got {times}, the last of {n} x {seen}; call the very model that was given, with inputs of the "
                    "donors' size"
                )

    def _write(self, model: nn.Module, site: Site) -> None:
        gate = self.gate(model, site)
        scale, shift = torch.ones_like(gate.scale), torch.zeros_like(gate.shift)
        for factor, added in self.changes[site.name]:
            scale, shift = scale * factor.to(scale), shift * factor.to(scale) + added.to(scale)
        gate.scale.copy_(scale)
        gate.shift.copy_(shift)


def prepared(model: nn.Module) -> Prepared | None:
    """What a model was prepared for, compiled or not; None for one that was not."""
    return cast("Prepared | None", getattr(unwrap_compiled(model), PREPARED, None))


def to_run(model: nn.Module) -> nn.Module:
    """The module to call: a prepared model as it is, compiled; of any other the one inside torch.compile's wrapper."""
    return model if prepared(model) is not None else unwrap_compiled(model)


def prepare(
    model: nn.Module,
    *,
    sites: Sequence[str] | None = None,
    pool: Pool = "mean",
    rows: int = ROWS,
    tokens: int | None = None,
    donors: bool = False,
) -> nn.Module:
    """Install reads and gates that stay, so that the model is traced and ablated compiled; in place.

    Each site's neurons are multiplied by a buffer and what they are is left in another, in every forward. Then
    `Tracer`, `trace`, `ablate` and `sweep` work on the model as `torch.compile` makes it: one graph, which stays as it
    is when skills change. A sweep runs its conditions one by one, each a whole forward of the same shape. Prepare a
    model once more for other settings.

    Args:
        model: In evaluation mode; before or after it is compiled. One that has run compiled is compiled anew
            (`torch.compiler.reset`, which all compiled functions of the process see). Routed experts are those of the
            transformers library with the implementation `grouped_mm` or `batched_mm`.
        sites: Kinds or names of sites; None for every kind that the model has.
        pool: How the tokens of an example become one observation: `"mean"`, `"cls"`, `"max"` or `"last"`; `"none"`:
            each token is an observation, and the activations of all tokens of a forward are left, rows x tokens for
            each neuron.
        rows: Examples of the largest batch that is traced; 4 bytes for each and every neuron.
        tokens: Tokens of the longest example, where batches have padding, so that masks can be told, with `pool="none"`
            and for experts, of whom the rows of all tokens are left, and for donors; None else.
        donors: Make room for donors (`mode="resample"`), rows x tokens for each neuron (of experts rows).

    Returns:
        The model that was given.

    Raises:
        ArgumentError: An unknown site or pool, a number that is too small or missing, or a site that cannot be
            prepared: experts that are computed one by one.
        ModelError: A model in training mode or without known sites.
    """
    inner = unwrap_compiled(model)
    refuse_training(inner, "prepare")
    refuse_spread(inner, "prepare")
    if pool not in POOLS:
        raise ArgumentError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}; mean is usual")
    if rows < 1 or (tokens is not None and tokens < 1):
        raise ArgumentError(f"rows, tokens: expected at least 1, got {rows}, {tokens}; give those of the largest batch")
    chosen = choose_sites(inner, sites)
    for site in chosen:
        _check(inner, site)
    routed = next((site for site in chosen if site.experts is not None), None)
    if tokens is None and (routed or donors or pool == "none"):
        why = f"{routed.name}, of which the rows of all tokens are left" if routed else "pool 'none'"
        if routed is None and pool != "none":
            why = "donors"
        raise ArgumentError(
            f"tokens: expected how many the longest example has, for {why}, got none; give tokens="
            + (", or leave out experts and routers with sites=" if routed else "")
        )
    warn_incomplete(inner)
    if (before := prepared(inner)) is not None:
        if any(before.changes.values()) or before.resampled:
            raise ModelError("prepare: expected no ablation around it, got one; leave its context first")
        uninstall(inner)
    for site in chosen:
        install(inner, site, pool, rows, tokens, donors)
    tell_samples(inner, [gate for site in chosen if isinstance(gate := Prepared.gate(inner, site), SiteGate)])
    setattr(inner, PREPARED, Prepared(chosen, pool, rows, tokens, donors))
    if _guard_hooks() or inner is not model or any(getattr(m, "_compiled_call_impl", None) for m in inner.modules()):
        torch.compiler.reset()  # graphs that were made before have no gates
    return model


def _guard_hooks() -> bool:
    """Let graphs be of modules with the same hooks alone; whether others may have been made before.

    By default a graph of another model of the class, without gates or with gates elsewhere, would be run in silence.
    """
    import torch._dynamo  # seconds, which only those wait for who compile

    config = torch._dynamo.config
    skipped, config.skip_nnmodule_hook_guards = config.skip_nnmodule_hook_guards, False
    return bool(skipped)


def _check(model: nn.Module, site: Site) -> None:
    """Raises ArgumentError for a site that no gate can stand at in one graph."""
    if site.experts is not None and not at_once(model.get_submodule(site.path)):
        raise ArgumentError(
            f"sites: expected experts computed by {' or '.join(AT_ONCE)}, got {site.name} by "
            f"{implementation_of(model.get_submodule(site.path))!r}, whose loop over experts is no one graph; call "
            "model.set_experts_implementation('grouped_mm') where the model has it, or leave out experts and routers"
        )
