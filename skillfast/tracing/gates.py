"""The modules that `prepare` puts at a model's sites: they change the neurons and leave what was read in buffers."""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from skillfast import ops
from skillfast.backends.capture import accumulation_dtype, as_tokens
from skillfast.models.activations import RoutedActivations
from skillfast.models.experts import AT_ONCE, implementation_of
from skillfast.models.projections import parent_of
from skillfast.models.sites import module_device
from skillfast.models.watching import call_projection, leave_projection, samples_of, turned
from skillfast.tracing.observations import pooled_row

if TYPE_CHECKING:
    from collections.abc import Callable

    from skillfast.models.sites import Site
    from skillfast.vocabulary import Layout, Pool

GATE = "skillfast_gate"
ROUTER_GATE = "skillfast_router_gate"
_SLOTS = ("top_k", "num_experts_per_tok", "moe_topk", "moe_top_k", "num_experts_per_token")


class Gate(nn.Module):
    """Buffers that move with the model, and are no weights of it.

    Args:
        site: Where it stands.
        dtype: Type of the factors.
        device: Where the projection is.

    Attributes:
        scale: [1, D], the neurons' factors.
        shift: [1, D], what is added.
        read: int64 [4]: forwards that were read so far, and the examples, tokens and routed rows of the last one.
        other: [rows, tokens, D], what is added of each example's donor; of experts [rows, 1, D]; None without donors.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    read: torch.Tensor
    other: torch.Tensor | None

    def __init__(self, site: Site, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.width = site.width
        self._keep("scale", torch.ones, (1, site.width), dtype, device)
        self._keep("shift", torch.zeros, (1, site.width), dtype, device)
        self._keep("read", torch.zeros, (4,), torch.int64, device)
        self.register_buffer("other", None, persistent=False)

    def _keep(
        self, name: str, make: Callable[..., torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: Any
    ) -> None:
        with torch.inference_mode(False):
            self.register_buffer(name, make(shape, dtype=dtype, device=device), persistent=False)

    def take_donors(self, rows: int, tokens: int) -> None:
        """Make room for donors of as many examples, with as many tokens each."""
        self._keep("other", torch.zeros, (rows, tokens, self.width), self.scale.dtype, self.scale.device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Gate:  # noqa: ARG002
        """Move with the model; its change of dtype changes neither factors nor rows."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer[:0]).device)
        return self


class SiteGate(Gate):
    """What stands before a site's projection: it scales and shifts the neurons, and leaves them or their pooled rows.

    Args:
        site: Where it stands.
        pool: How tokens become one row; `"none"`: each is left.
        rows: Examples that a forward has at most; one with more is not read.
        tokens: Tokens that an example has at most, where some may be padding or each is left; None else.
        dtype: Type of the projection's weights.
        device: Where the projection is.

    Attributes:
        rows: [rows, D], of the last forward that was read; [rows, tokens, D] where each token is left.
        mask: bool [rows, tokens], False for padding of the next forward; None where there is none.
    """

    rows: torch.Tensor
    mask: torch.Tensor | None

    def __init__(
        self, site: Site, pool: Pool, rows: int, tokens: int | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(site, accumulation_dtype(dtype), device)
        self.pool = pool
        self.layout: Layout = site.layout
        self.samples: int | None = None  # of the forward that runs
        self.register_buffer("mask", None, persistent=False)
        if pool == "none":
            assert tokens is not None
            self._keep("rows", torch.zeros, (rows, tokens, site.width), dtype, device)
            return
        self._keep("rows", torch.zeros, (rows, site.width), accumulation_dtype(dtype), device)
        if tokens is not None:
            self._keep("mask", torch.ones, (rows, tokens), torch.bool, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What flows on instead of what the projection is given."""
        x = ops.neuron_scale(turned(x, self.layout), self.scale, self.shift)
        n, tokens = x.shape[0], math.prod(x.shape[1:-1])
        samples, self.samples = self.samples, None
        if samples is not None and n > samples > 0 and n % samples == 0:  # windows, a sample's one after the other
            n, tokens = samples, tokens * (n // samples)
        if self.other is not None and n <= self.other.shape[0] and tokens <= self.other.shape[1]:
            x = x + self.other[:n, :tokens].reshape(x.shape).to(x.dtype)
        if n <= self.rows.shape[0] and (self.pool != "none" or tokens <= self.rows.shape[1]):
            seen = x.detach() if n == x.shape[0] else x.detach().reshape(n, tokens, -1)
            if self.pool == "none":
                self.rows[:n, :tokens].copy_(as_tokens(seen))
            else:
                mask = None if self.mask is None or seen.dim() == 2 else self.mask[:n, :tokens]
                self.rows[:n].copy_(pooled_row(seen, "identity", self.pool, mask, False)[1])
            self.read[0].add_(1)
            self.read[1].fill_(n)
            self.read[2].fill_(tokens)
        return turned(x, self.layout, back=True)

    def last(self, n: int, tokens: int, masked: int | None) -> torch.Tensor:
        """What was left of a forward: [n, D], or [n, tokens, D].

        Args:
            n: Number of examples.
            tokens: Number of tokens of each example.
            masked: Tokens that a mask tells of; None without a mask.
        """
        if self.pool != "none":
            return self.rows[:n]
        if tokens == 1 and masked not in (None, 1):
            return self.rows[:n, 0]  # one row of an example whose blocks see many tokens
        return self.rows[:n, :tokens]


class RoutedGate(Gate):
    """What stands before the down projections of routed experts, or takes their gates: it changes and leaves rows.

    Args:
        site: One of kind `"expert"` or `"router"`.
        most: Rows that a forward has at most, pairs of a token and an expert; one with more is not read.
        dtype: Type of the experts' weights.
        device: Where they are.

    Attributes:
        values: [most, units], of the last forward that was read; of a router the gates, [most, 1].
        expert: int64 [most]; the number of experts and above for no expert.
        token: int64 [most], place among the tokens of the batch.
        gate: [most], the factor on the expert's output.
    """

    values: torch.Tensor
    expert: torch.Tensor
    token: torch.Tensor
    gate: torch.Tensor

    def __init__(self, site: Site, most: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(site, accumulation_dtype(dtype), device)
        assert site.experts is not None
        self.experts = site.experts
        of_values = accumulation_dtype(dtype) if site.kind == "router" else dtype
        self._keep("values", torch.zeros, (most, site.width // site.experts), of_values, device)
        self._keep("gate", torch.zeros, (most,), accumulation_dtype(dtype), device)
        for name in ("expert", "token"):
            self._keep(name, torch.zeros, (most,), torch.int64, device)
        self.running: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def forward(
        self, values: torch.Tensor, expert: torch.Tensor, token: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        """What flows on instead of the rows [S, units] of these experts, tokens and gates, [S] each."""
        real = (expert < self.experts)[:, None]
        own = expert.clamp(max=self.experts - 1)
        scale, shift = (each.view(self.experts, -1)[own] for each in (self.scale, self.shift))
        scaled = torch.where(scale == 0, 0, values.to(scale.dtype) * scale) + shift  # 0 removes what is not finite
        if self.other is not None:
            example = (token // self.read[2].clamp(min=1)).clamp(max=self.other.shape[0] - 1)
            scaled = scaled + self.other.view(self.other.shape[0], self.experts, -1)[example, own]
        values = torch.where(real, scaled.to(values.dtype), values)
        n = values.shape[0]
        if n <= self.values.shape[0]:
            for kept, now in ((self.values, values), (self.expert, expert), (self.token, token), (self.gate, gate)):
                kept[:n].copy_(now.detach())
            self.read[0].add_(1)
            self.read[3].fill_(n)
        return values

    def last(self, n: int, tokens: int, rows: int) -> RoutedActivations:
        """The rows of a forward of n examples with as many tokens each."""
        found = (self.values[:rows], self.expert[:rows], self.token[:rows], self.gate[:rows])
        return RoutedActivations(*found, self.experts, (n, tokens))


def _tell_samples(gates: list[SiteGate], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    samples = samples_of(args, kwargs)
    for gate in gates:
        gate.samples = samples


def tell_samples(model: nn.Module, gates: list[SiteGate]) -> None:
    """Tell gates how many samples a forward has, of which some may see windows."""
    model.register_forward_pre_hook(partial(_tell_samples, gates), with_kwargs=True)


def _through_gate(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(module, GATE)(args[0]), *args[1:])


def _tell_shape(gate: RoutedGate, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
    if hidden is not None and hidden.dim() == 3:
        gate.read[1].fill_(hidden.shape[0])
        gate.read[2].fill_(hidden.shape[1])


def _before_experts(
    names: tuple[str, str, str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the gates, and note whose row each will be: one slot of a token after the other, or sorted by expert."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    hidden, index, weights = (given[name] for name in names)
    expert, slots = index.reshape(-1), index.shape[-1]
    token = torch.arange(len(expert), device=expert.device) // slots
    flat = weights.reshape(-1)
    if (router := getattr(module, ROUTER_GATE, None)) is not None:
        flat = router(flat[:, None], expert, token, torch.ones_like(flat))[:, 0]
    if (units := getattr(module, GATE, None)) is not None:
        rows = (expert, token, flat)
        if implementation_of(module) == "grouped_mm":  # the same sort of the same numbers as the implementation's own
            order = torch.sort(expert)[1]
            rows = (expert[order], token[order], flat[order])
        units.running = rows
    return (hidden, index, flat.view(weights.shape)), {}


def _passed(gate: RoutedGate, values: torch.Tensor) -> torch.Tensor:
    running, gate.running = gate.running, None
    assert running is not None
    return gate(values, *running)


def _gated(module: Any, gate_up: torch.Tensor) -> torch.Tensor:
    """In place of a module's own `_apply_gate`."""
    return _passed(getattr(module, GATE), type(module)._apply_gate(module, gate_up))


def _after_activation(gate: RoutedGate, _: nn.Module, __: Any, found: torch.Tensor) -> torch.Tensor:
    return _passed(gate, found)


def at_once(module: nn.Module) -> bool:
    """Whether the rows of all experts are made at once, by code that compiles to one graph."""
    return implementation_of(module) in AT_ONCE


def slots_of(model: nn.Module, path: str, experts: int) -> int:
    """How many experts a token has; all of them where neither the modules around them nor their settings say."""
    module = model.get_submodule(path)
    around = model.get_submodule(path.rpartition(".")[0])
    for holder in (around, *around.children(), module, getattr(module, "config", None)):
        for name in _SLOTS:
            slots = getattr(holder, name, None)
            if isinstance(slots, int) and 0 < slots <= experts:
                return slots
    return experts


def install(model: nn.Module, site: Site, pool: Pool, rows: int, tokens: int | None, donors: bool) -> None:
    """Put a gate at a site for good.

    Args:
        model: The model.
        site: Where: a projection, or experts whose rows are made at once.
        pool: How tokens become one row.
        rows: Examples that a forward has at most.
        tokens: Tokens that an example has at most.
        donors: Whether to make room for donors.
    """
    module = model.get_submodule(site.path)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if site.experts is None:
        plain = SiteGate(site, pool, rows, tokens, dtype, module_device(module))
        if donors:
            assert tokens is not None
            plain.take_donors(rows, tokens)
        setattr(module, GATE, plain)
        module.register_forward_pre_hook(_through_gate)
        if isinstance(attention := parent_of(model, site.path), nn.MultiheadAttention):
            call_projection(attention)
        return
    assert tokens is not None
    gate = RoutedGate(site, rows * tokens * slots_of(model, site.path, site.experts), dtype, module_device(module))
    if donors:
        gate.take_donors(rows, 1)
    if not hasattr(module, GATE) and not hasattr(module, ROUTER_GATE):  # one hook serves both gates
        _, hidden, index, weights = inspect.signature(type(module).forward).parameters
        module.register_forward_pre_hook(partial(_before_experts, (hidden, index, weights)), with_kwargs=True)
    setattr(module, gate_name(site), gate)
    for path in sorted({site.path.rpartition(".")[0], site.inside}):
        model.get_submodule(path).register_forward_pre_hook(partial(_tell_shape, gate), with_kwargs=True)
    inner: Any = module
    if site.kind == "expert" and inner.has_gate:
        inner._apply_gate = partial(_gated, module)
    elif site.kind == "expert":
        inner.act_fn.register_forward_hook(partial(_after_activation, gate))


def uninstall(model: nn.Module) -> None:
    """Take all gates away."""
    ours = (_through_gate, _tell_shape, _tell_samples, _before_experts, _after_activation)
    for module in list(model.modules()):
        if isinstance(module, nn.MultiheadAttention) and hasattr(module.out_proj, GATE):
            leave_projection(module)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "func", hook) in ours]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for name in (GATE, ROUTER_GATE):
            if hasattr(module, name):
                delattr(module, name)
        if getattr(module.__dict__.get("_apply_gate"), "func", None) is _gated:
            del module._apply_gate


def gate_name(site: Site) -> str:
    """Attribute of the module at a site's path that holds its gate."""
    return ROUTER_GATE if site.kind == "router" else GATE
