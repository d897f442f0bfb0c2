"""`prepare`: reads and gates that stay in a model, so that it is traced and ablated as it is compiled.

A hook that comes or goes is code that changes: a compiled model skips it. So each site gets one hook for good, which
multiplies its neurons by a buffer and leaves their pooled rows in another. What a `Tracer` or an ablation does then is
reading and writing these buffers between forwards, which no graph sees.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from skillfast import ops
from skillfast.backends.capture import accumulation_dtype
from skillfast.errors import ArgumentError, ModelError
from skillfast.models.coverage import warn_incomplete
from skillfast.models.projections import parent_of
from skillfast.models.sites import choose_sites, module_device, refuse_training, unwrap_compiled
from skillfast.tracing.observations import pooled_row
from skillfast.vocabulary import POOLS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from skillfast.models.sites import Site
    from skillfast.statistics.tokens import TokenMask
    from skillfast.vocabulary import Pool

GATE, PREPARED = "skillfast_gate", "skillfast_prepared"
ROWS = 64


class SiteGate(nn.Module):
    """What stands before a site's projection: it scales and shifts the neurons, and leaves their pooled rows.

    Args:
        width: Number of neurons, D.
        pool: How tokens become one row.
        rows: Examples that a forward has at most; one with more is not read.
        tokens: Tokens that an example has at most, where some may be padding; None where none is.
        dtype: Type of the factors.
        device: Where the projection is.

    Attributes:
        scale: [1, D].
        shift: [1, D].
        rows: [rows, D], of the last forward that was read.
        mask: bool [rows, tokens], False for padding of the next forward; None where there is none.
        read: int64 [3]: forwards that were read so far, and the examples and tokens of the last one.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    rows: torch.Tensor
    mask: torch.Tensor | None
    read: torch.Tensor

    def __init__(
        self, width: int, pool: Pool, rows: int, tokens: int | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.pool = pool
        with torch.inference_mode(False):
            self._keep("scale", torch.ones(1, width, dtype=dtype, device=device))
            self._keep("shift", torch.zeros(1, width, dtype=dtype, device=device))
            self._keep("rows", torch.zeros(rows, width, dtype=dtype, device=device))
            self._keep("read", torch.zeros(3, dtype=torch.int64, device=device))
            masked = None if tokens is None else torch.ones(rows, tokens, dtype=torch.bool, device=device)
            self._keep("mask", masked)

    def _keep(self, name: str, value: torch.Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)  # the model's weights stay what they are

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SiteGate:  # noqa: ARG002
        """Move with the model; its change of dtype changes neither factors nor rows."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer[:0]).device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The neurons [batch, ..., D] as they flow on."""
        x = ops.neuron_scale(x, self.scale, self.shift)
        n, tokens = x.shape[0], math.prod(x.shape[1:-1])
        if n <= self.rows.shape[0]:
            mask = None if self.mask is None or x.dim() == 2 else self.mask[:n, :tokens]
            self.rows[:n].copy_(pooled_row(x.detach(), "identity", self.pool, mask, False)[1])
            self.read[0].add_(1)
            self.read[1].fill_(n)
            self.read[2].fill_(tokens)
        return x


def _through_gate(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(module, GATE)(args[0]), *args[1:])


@dataclass
class Prepared:
    """What a model was prepared for, and what its gates do at the moment.

    Attributes:
        sites: Sites with a gate.
        pool: How tokens become one row.
        rows: Examples that a forward has at most.
        tokens: Tokens that an example has at most, where some may be padding; None where none is.
        changes: Site -> factors and shifts [1, D] each, in the order in which they are applied.
    """

    sites: tuple[Site, ...]
    pool: Pool
    rows: int
    tokens: int | None
    changes: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    def chosen(self, model: nn.Module, wanted: Sequence[str] | None, pool: str) -> tuple[Site, ...]:
        """The sites that were asked for; raises ArgumentError for what the model was not prepared for."""
        if pool != self.pool:
            raise ArgumentError(
                f"pool: expected {self.pool!r}, which this {type(model).__name__} is prepared for, got {pool!r}; "
                f"prepare(model, pool={pool!r}), or with tokens as observations trace the model that was not prepared"
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
    def gate(model: nn.Module, site: Site) -> SiteGate:
        """The gate at a site."""
        return cast("SiteGate", getattr(model.get_submodule(site.path), GATE))

    def forwards(self, model: nn.Module) -> dict[str, tuple[int, int, int]]:
        """Site -> forwards that were read so far, and the examples and tokens of the last."""
        by_device: dict[torch.device, dict[str, torch.Tensor]] = {}
        for site in self.sites:
            read = self.gate(model, site).read
            by_device.setdefault(read.device, {})[site.name] = read
        return {
            name: (times, n, tokens)
            for on_device in by_device.values()  # one wait for each
            for name, (times, n, tokens) in zip(on_device, torch.stack([*on_device.values()]).tolist(), strict=True)
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
            kept = self.gate(model, site).mask
            assert kept is not None
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

    def _write(self, model: nn.Module, site: Site) -> None:
        gate = self.gate(model, site)
        scale, shift = torch.ones_like(gate.scale), torch.zeros_like(gate.shift)
        for factor, added in self.changes[site.name]:
            scale, shift = scale * factor.to(scale), shift * factor.to(scale) + added.to(scale)
        gate.scale.copy_(scale)
        gate.shift.copy_(shift)


def _is_plain(model: nn.Module, site: Site) -> bool:
    return site.layout == "tokens" and not isinstance(parent_of(model, site.path), nn.MultiheadAttention)


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
) -> nn.Module:
    """Install reads and gates that stay, so that the model is traced and ablated compiled; in place.

    Each site's neurons are multiplied by a buffer and their pooled rows left in another, in every forward. Then
    `Tracer`, `trace`, `ablate` and `sweep` work on the model as `torch.compile` makes it: one graph, which stays as it
    is when skills change. A sweep runs its conditions one by one, each a whole forward of the same shape. Donors
    (`mode="resample"`) and tokens as observations need a model that was not prepared. Prepare a model once more for
    other settings.

    Args:
        model: In evaluation mode; before or after it is compiled. One that has run compiled is compiled anew
            (`torch.compiler.reset`, which all compiled functions of the process see).
        sites: Kinds or names of sites; None for every kind that the model has but experts and routers.
        pool: How the tokens of an example become one observation: `"mean"`, `"cls"`, `"max"` or `"last"`.
        rows: Examples of the largest batch that is traced; 4 bytes for each and every neuron.
        tokens: Tokens of the longest example, where batches have padding, so that masks can be told; None where none
            has.

    Returns:
        The model that was given.

    Raises:
        ArgumentError: An unknown site or pool, or a number that is too small.
        ModelError: A model in training mode or without known sites.
    """
    inner = unwrap_compiled(model)
    refuse_training(inner, "prepare")
    if pool not in POOLS or pool == "none":
        raise ArgumentError(
            f"pool: expected one of {', '.join(p for p in POOLS if p != 'none')}, got {pool!r}; trace tokens with the "
            "model that is not compiled"
        )
    if rows < 1 or (tokens is not None and tokens < 1):
        raise ArgumentError(f"rows, tokens: expected at least 1, got {rows}, {tokens}; give those of the largest batch")
    chosen = choose_sites(inner, sites)
    if sites is None:
        chosen = tuple(site for site in chosen if site.experts is None)
    if routed := next((site for site in chosen if site.experts is not None), None):
        raise ArgumentError(
            f"sites: expected ones whose neurons every token has, got {routed.name}, whose rows are as many as tokens "
            "are routed; leave out sites of kind expert and router, or trace the model that is not compiled"
        )
    if turned := next((site for site in chosen if not _is_plain(inner, site)), None):
        raise ArgumentError(
            f"sites: expected linear layers that take [batch, ..., D], got {turned.name} ({turned.path}), which takes "
            "channels or tokens first, or is never called; leave it out, or trace the model that is not compiled"
        )
    warn_incomplete(inner)
    if (before := prepared(inner)) is not None:
        if any(before.changes.values()):
            raise ModelError("prepare: expected no ablation around it, got one; leave its context first")
        for module in list(inner.modules()):
            for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _through_gate]:
                del module._forward_pre_hooks[key]
                delattr(module, GATE)
    for site in chosen:
        projection = inner.get_submodule(site.path)
        weight = next((p for p in projection.parameters() if p.is_floating_point()), torch.empty(0))
        dtype, device = accumulation_dtype(weight.dtype), module_device(projection)
        setattr(projection, GATE, SiteGate(site.width, pool, rows, tokens, dtype, device))
        projection.register_forward_pre_hook(_through_gate)
    setattr(inner, PREPARED, Prepared(chosen, pool, rows, tokens))
    if inner is not model or any(getattr(m, "_compiled_call_impl", None) for m in inner.modules()):
        torch.compiler.reset()  # graphs that were made before have no gates
    return model
