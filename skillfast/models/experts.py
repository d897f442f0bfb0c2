"""Routed experts of transformers 5: where they are, and what flows into their down projections.

Their weights are one parameter for all experts, `down_proj` [experts, ...], and the input of the down projection is a
local variable that no hook sees. Two ways lead to it. The implementations `grouped_mm` and `batched_mm` make all rows
at once with the module's own `_apply_gate` (or `act_fn`, where nothing is gated), which is replaced on the instance.
The implementation `eager`, and experts with code of their own, multiply by a slice of `down_proj` for each expert: the
module runs under a mode that sees these products. Which token a row is of is what the implementation itself computed,
the order of its sort or the result of its search, since its sort is not stable. Experts that are modules (NLLB-MoE,
Switch Transformers) are seen by the same products; those whose rows come sorted (JetMoe, Granite's before transformers
5.24) by a hook on the router, which gives their order and gates, and one on the module of all down projections.
"""

from __future__ import annotations

import inspect
import re
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch.overrides import TorchFunctionMode

from skillfast.errors import ModelError
from skillfast.models.activations import RoutedActivations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from skillfast.models.sites import Site

    See = Callable[[RoutedActivations], torch.Tensor | None]
    Masks = Callable[[int], torch.Tensor | None]

AT_ONCE = ("grouped_mm", "batched_mm")
"""Implementations that make the rows of all experts at once."""
_PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm")
_CHOICES = ("softmax", "sigmoid", "topk", "argmax")  # of routers, on a value for each token and expert


def experts_of(model: torch.nn.Module, path: str, module: torch.nn.Module) -> tuple[int, int] | None:
    """Experts and units of each, of the module at the path of a block's routed experts; None of any other module."""
    if each := _separate(module):
        return len(each), each[0].in_features
    weight = down_projections(module)
    if weight is None:
        return None
    takes = len(_signature(module).parameters)
    all_of_one = takes == 1 and getattr(module, "num_experts", None) == len(weight)
    if takes != 3 and not all_of_one and _sorting_router(model, path) is None:
        return None
    if not weight.is_floating_point():
        raise ModelError(
            f"{path}: expected experts in floating point, got packed ones ({weight.dtype}); load the model without "
            "quantisation, of a GGUF file with GgufConfig(dequantize=True)"
        )
    if weight.dim() == 2:
        experts, units, _ = by_unit(module, weight).shape
        return experts, units
    return weight.shape[0], weight.shape[1 if units_first(module) else 2]


def by_unit(module: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A view [experts, units, outputs] of a tensor that is shaped like the down projections of a module of experts."""
    if weight.dim() == 2:
        experts: Any = getattr(module, "num_experts", 1)
        return weight.view(experts, -1, weight.shape[1])
    return weight if units_first(module) else weight.transpose(1, 2)


def units_first(module: torch.nn.Module) -> bool:
    """Whether experts' matrices are [in, out], as in the code of Llama 4 and GPT-OSS, and not [out, in]."""
    return getattr(module, "is_transposed", False) or not takes_gates(module)


def down_projections(module: torch.nn.Module) -> torch.nn.Parameter | None:
    """Find the parameter that holds all experts' down projections, one after the other; None where there is none."""
    # A parameter lies in its module's own table, where looking is cheap: every module of a model is asked.
    inner = module._modules.get("mlp")
    stacked = (module._parameters.get(name) for name in ("down_proj", "weight"))
    flat = None if inner is None else inner._parameters.get("w2")
    for weight, dims in (*((weight, 3) for weight in stacked), (flat, 2)):  # JetMoe has the second, DBRX the last
        if isinstance(weight, torch.nn.Parameter) and weight.dim() == dims:
            return weight
    return None


def _separate(module: torch.nn.Module) -> list[torch.nn.Linear]:
    """The down projections of experts that are modules of their own; none of any other module."""
    if not isinstance(module, torch.nn.ModuleDict) or "expert_0" not in module:
        return []
    each = [getattr(expert, "fc2", getattr(expert, "wo", None)) for expert in module.values()]
    return [last for last in each if isinstance(last, torch.nn.Linear)]


def _sorting_router(model: torch.nn.Module, path: str) -> torch.nn.Module | None:
    """The router that sorts the rows of a module of all down projections; None for any other module."""
    parent, _, name = path.rpartition(".")
    router = getattr(model.get_submodule(parent), "router", None) if name == "output_linear" else None
    weight = getattr(model.get_submodule(path), "weight", None)
    sorts = isinstance(router, torch.nn.Module) and isinstance(weight, torch.nn.Parameter) and weight.dim() == 3
    return router if sorts else None


def takes_gates(module: torch.nn.Module) -> bool:
    """Whether experts have gates that weigh their outputs; those of Llama 4 get inputs that are scaled already."""
    return len(_signature(module).parameters) != 1


def _signature(module: torch.nn.Module) -> inspect.Signature:
    """What a module's own forward takes; one that stands before it, where processes share the work, takes anything."""
    found = inspect.signature(module.forward)
    told = any(each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in found.parameters.values())
    return found if told else inspect.signature(type(module).forward.__get__(module))


@contextmanager
def routed(model: torch.nn.Module, site: Site, see: See) -> Iterator[None]:
    """Hand what flows at a site of experts or of a router to `see` in every forward inside the context.

    Args:
        model: The model.
        site: One of kind `"expert"`, whose rows are inputs of the down projections, or of kind `"router"`, whose rows
            are gates.
        see: Returns what flows on instead, or None for what came.

    Raises:
        ModelError: An implementation of the experts that shows nothing of what it computes.
    """
    _check(model.get_submodule(site.path), site)
    with _seam_of(model, site) as seam:
        watchers = seam.gates if site.kind == "router" else seam.units
        watchers.append(see)
        try:
            yield
        finally:
            watchers.remove(see)


@contextmanager
def without_experts(model: torch.nn.Module, site: Site, masks: Masks) -> Iterator[None]:
    """Mask the logits of experts in every forward inside the context, so that tokens are routed to others.

    Args:
        model: The model.
        site: One of kind `"router"`.
        masks: Function of the number of examples: which experts each of them lacks, bool [batch, experts]; None for
            none.

    Raises:
        ModelError: During a forward whose tokens are routed to masked experts all the same: there are too few others,
            or the router chooses otherwise than by the largest values.
    """
    with _seam_of(model, site) as seam:
        seam.masks.append(masks)
        try:
            yield
        finally:
            seam.masks.remove(masks)


@contextmanager
def _seam_of(model: torch.nn.Module, site: Site) -> Iterator[_Seam]:
    """The hooks of the module at a site, which are there as long as anyone needs them."""
    module = model.get_submodule(site.path)
    seam = _SEAMS.get(module)
    if seam is None:
        seam = _SEAMS[module] = _Seam(model, site)
    seam.users += 1
    try:
        yield seam
    finally:
        seam.users -= 1
        if not seam.users:
            _SEAMS.pop(module).remove()


def _check(module: torch.nn.Module, site: Site) -> None:
    name = implementation_of(module)
    if name not in (*AT_ONCE, "eager"):
        raise ModelError(
            f"{site.name}: expected experts computed by eager, {' or '.join(AT_ONCE)}, got {name!r}, which shows "
            "nothing of them; call model.set_experts_implementation('grouped_mm')"
        )


def implementation_of(module: torch.nn.Module) -> str:
    """Name of what computes a module of experts: one of `AT_ONCE`, `"eager"` for a loop or code of its own, another."""
    if not hasattr(module, "has_gate"):
        return "eager"  # code of its own
    return getattr(getattr(module, "config", None), "_experts_implementation", None) or "eager"


class _Seam:
    """The hooks of one module of experts, for as long as anyone watches it.

    Attributes:
        gates: Who sees the gates.
        units: Who sees the inputs of the down projections.
        masks: Who leaves experts out.
        users: How many contexts need the hooks.
    """

    def __init__(self, model: torch.nn.Module, site: Site) -> None:
        self.site = site
        self.gates: list[See] = []
        self.units: list[See] = []
        self.masks: list[Masks] = []
        self.users = 0
        self._shape: tuple[int, int] | None = None  # examples and tokens of the running forward
        self._forwards: list[_Forward] = []
        self._routings: list[_Routing] = []
        self._sorted: RoutedActivations | None = None  # gates of the running forward, in the order of the rows
        self._stack = ExitStack()
        module = model.get_submodule(site.path)
        block = re.match(r".*\b\d+(?=\.)", site.path)
        around = {site.path.rpartition(".")[0], *([block[0]] if block else [])}
        for path in sorted(around, key=len):  # the block, then what is around the experts
            handle = model.get_submodule(path).register_forward_pre_hook(self._note_shape, with_kwargs=True)
            self._stack.callback(handle.remove)
        router = _sorting_router(model, site.path)
        if router is not None:
            self._stack.callback(router.register_forward_hook(self._sorted_gates).remove)
            self._stack.callback(module.register_forward_pre_hook(self._sorted_rows).remove)
        chooses = router or model.get_submodule(site.path.rpartition(".")[0])
        for hook in (
            chooses.register_forward_pre_hook(self._begin_routing),
            chooses.register_forward_hook(self._end_routing, always_call=True),
        ):
            self._stack.callback(hook.remove)
        if router is not None:
            return
        begin = module.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._stack.callback(begin.remove)
        end = module.register_forward_hook(self._end, always_call=True)
        self._stack.callback(end.remove)

    def remove(self) -> None:
        """Leave the module as it was."""
        self._stack.close()

    def _note_shape(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        if (hidden := next(tensors, None)) is not None and hidden.dim() == 3:
            self._shape = (hidden.shape[0], hidden.shape[1])

    def _begin_routing(self, *_: object) -> None:
        if self.masks and self._shape is not None:
            assert self.site.experts is not None
            every = [mask for masks in self.masks if (mask := masks(self._shape[0])) is not None]
            if every:
                self._routings.append(routing := _Routing(self._shape, torch.stack(every).any(0)))
                routing.__enter__()

    def _end_routing(self, *_: object) -> None:
        if self._routings:
            self._routings.pop().__exit__(None, None, None)

    def _begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = _signature(module).bind(*args, **kwargs)
        if len(bound.arguments) == 1:
            self._enter(module, self._ungated(*bound.arguments.values()), 1)
            return None
        (_, hidden), (_, index), (name, weights) = bound.arguments.items()
        assert self.site.experts is not None
        if isinstance(module, torch.nn.ModuleDict):
            index = _chosen(index, weights, self.site.experts)
        shape = (hidden.shape[0], hidden.shape[1]) if hidden.dim() == 3 else self._shape
        token = torch.arange(index.shape[0], device=index.device).repeat_interleave(index.shape[-1])
        gates = self._gates(weights, index.flatten(), token, shape, index.shape[0])
        bound.arguments[name] = gates.values.view(weights.shape)
        self._enter(module, gates, index.shape[-1])
        return bound.args, bound.kwargs

    def _gates(
        self, weights: torch.Tensor, expert: torch.Tensor, token: torch.Tensor, shape: tuple[int, int] | None, n: int
    ) -> RoutedActivations:
        """What flows on of the gates of a forward, for as many rows as there are pairs of a token and an expert.

        Args:
            weights: The gates, in any shape.
            expert: int64 [rows].
            token: int64 [rows].
            shape: Examples and tokens of each.
            n: Number of tokens that the experts were given.
        """
        assert self.site.experts is not None
        if shape is None or shape[0] * shape[1] != n:
            raise ModelError(
                f"{self.site.name}: expected the tokens of {shape and shape[0]} examples with {shape and shape[1]} "
                f"each, got {n} rows; call the model itself, with inputs [batch, tokens]"
            )
        if self._routings and self._routings[-1].breached(expert, token):
            raise ModelError(
                f"{self.site.name}: expected a router that takes the experts with the largest values and has others to "
                "take, got tokens at experts that are masked; remove the experts' outputs with mode='zero'"
            )
        one = torch.ones_like(weights).flatten()
        expert = expert.masked_fill(weights.flatten() == 0, self.site.experts)  # a token that passes an expert by
        found = RoutedActivations(weights.reshape(-1, 1), expert, token, one, self.site.experts, shape)
        return _passed(self.gates, found)

    def _sorted_gates(self, _: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        order, token, gates, sizes, logits = output
        expert = torch.arange(len(sizes), device=token.device).repeat_interleave(
            torch.as_tensor(sizes, device=token.device)
        )
        self._sorted = self._gates(gates, expert, token, self._shape, len(args[0]))
        return order, token, self._sorted.values.view(gates.shape), sizes, logits

    def _sorted_rows(self, _: torch.nn.Module, args: tuple[Any, ...]) -> Any:
        if self._sorted is None:
            return None  # the router failed, or a watcher came in the middle of a forward
        rows = _passed(self.units, replace(self._sorted, values=args[0], gate=self._sorted.values[:, 0]))
        self._sorted = None
        return (rows.values, *args[1:])

    def _enter(self, module: torch.nn.Module, gates: RoutedActivations, slots: int) -> None:
        self._forwards.append(forward := _Forward(module, gates, slots, self.units))
        forward.__enter__()

    def _ungated(self, hidden: torch.Tensor) -> RoutedActivations:
        """Gates of 1 for inputs [experts * tokens, H], scaled by their gates, which are 0 where a token passes by."""
        n = self.site.experts
        assert n is not None
        if self._shape is None or n * self._shape[0] * self._shape[1] != len(hidden):
            raise ModelError(
                f"{self.site.name}: expected the tokens of {self._shape and self._shape[0]} examples for each of {n} "
                f"experts, got {len(hidden)} rows; call the model itself, with inputs [batch, tokens]"
            )
        expert = torch.arange(n, device=hidden.device).repeat_interleave(len(hidden) // n)
        token = torch.arange(len(hidden) // n, device=hidden.device).repeat(n)
        one = hidden.new_ones(len(hidden))
        routed = hidden.detach().ne(0).any(-1)
        return RoutedActivations(one[:, None], torch.where(routed, expert, n), token, one, n, self._shape)

    def _end(self, _: torch.nn.Module, __: Any, output: Any) -> None:
        if not self._forwards:
            return  # an earlier hook failed
        forward = self._forwards.pop()
        forward.close()
        if output is not None and self.units and not forward.seen:
            gates = forward.gates
            if bool((gates.expert < gates.n_experts).any()):
                raise ModelError(
                    f"{self.site.name}: expected to see the inputs of its down projections, got none; call "
                    "model.set_experts_implementation('grouped_mm'), or leave out sites of kind expert"
                )
            assert self.site.experts is not None
            _passed(self.units, forward.nothing(output, self.site.width // self.site.experts))


def _chosen(index: torch.Tensor, weights: torch.Tensor, n: int) -> torch.Tensor:
    """Experts of each token int64 [tokens, slots], `n` for none, of experts that are modules.

    Args:
        index: [tokens, 1, experts] in Switch Transformers, 1 at the expert, 0 everywhere for a token beyond its
            capacity; in NLLB-MoE something else, with a slot for each expert.
        weights: Gates [tokens, slots].
        n: Number of experts.
    """
    if index.dim() == 3:
        return torch.where(index.any(-1), index.argmax(-1), n)
    return torch.where(weights != 0, torch.arange(n, device=index.device), n)


def _passed(watchers: list[See], rows: RoutedActivations) -> RoutedActivations:
    """What flows on of some rows."""
    for see in tuple(watchers):
        if (replaced := see(rows)) is not None:
            rows = replace(rows, values=replaced)
    return rows


class _Routing(TorchFunctionMode):
    """One forward of what is around the experts: their values are -inf where an example lacks them.

    Args:
        shape: Examples and tokens of each.
        masked: bool [batch, experts], the experts that an example lacks.
    """

    def __init__(self, shape: tuple[int, int], masked: torch.Tensor) -> None:
        super().__init__()
        self.masked = masked.repeat_interleave(shape[1], 0)  # [tokens of all examples, experts]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _CHOICES and args and self._is_of_experts(args[0]):
            masked = self.masked.to(args[0].device).view(args[0].shape)
            args = (args[0].masked_fill(masked, -torch.inf), *args[1:])
        return func(*args, **(kwargs or {}))

    def _is_of_experts(self, x: Any) -> bool:
        """Whether a tensor has a value for each token and expert."""
        of_tokens = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() in (2, 3)
        return of_tokens and x.shape[-1] == self.masked.shape[-1] and x.numel() == self.masked.numel()

    def breached(self, expert: torch.Tensor, token: torch.Tensor) -> bool:
        """Whether a token was routed to an expert that its example lacks; both int64 [rows]."""
        masked = self.masked.to(expert.device)
        real = expert < masked.shape[1]
        return bool((masked[token, expert.clamp(max=masked.shape[1] - 1)] & real).any())


class _Forward(TorchFunctionMode):
    """One forward of a module of experts: finds the inputs of the down projections, and whose they are."""

    def __init__(self, module: torch.nn.Module, gates: RoutedActivations, slots: int, watchers: list[See]) -> None:
        super().__init__()
        self.module = module
        self.gates = gates
        self.slots = slots  # experts of a token
        self.watchers = watchers
        self.seen = False
        self.at_once = implementation_of(module) in AT_ONCE
        self._order: torch.Tensor | None = None  # int64 [rows], of a sort by expert
        self._hit: tuple[torch.Tensor, ...] | None = None  # slots and tokens of the expert that is computed
        self._own = {id(last.weight): i for i, last in enumerate(_separate(module))}  # of experts that are modules
        self._stack = ExitStack()
        if watchers and self.at_once:
            self._replace_activation()

    def close(self) -> None:
        """Leave the module as it was before the forward."""
        self._stack.close()
        self.__exit__(None, None, None)

    def _replace_activation(self) -> None:
        module: Any = self.module
        if not module.has_gate:
            handle = module.act_fn.register_forward_hook(lambda _, __, found: self._all_rows(found))
            self._stack.callback(handle.remove)
            return
        original, own = module._apply_gate, module.__dict__.get("_apply_gate")
        module._apply_gate = lambda gate_up: self._all_rows(original(gate_up))
        if own is None:
            self._stack.callback(module.__dict__.pop, "_apply_gate")
        else:
            self._stack.callback(setattr, module, "_apply_gate", own)  # of a prepared model

    def _all_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Rows of all experts, in the order of the sort where there was one."""
        gates, order = self.gates, self._order
        rows = (gates.expert, gates.token, gates.values[:, 0])
        expert, token, gate = rows if order is None else (each[order] for each in rows)
        return self._passed(values, expert, token, gate)

    def _rows_of(self, expert: int, values: torch.Tensor) -> torch.Tensor:
        """Rows of one expert, of the tokens that were last searched for."""
        assert self._hit is not None
        slot, token = self._hit
        gate = self.gates.values.view(-1, self.slots)[token, slot]
        none = self.gates.expert.view(-1, self.slots)[token, slot] >= self.gates.n_experts  # weighed by a gate of 0
        return self._passed(values, torch.full_like(token, expert).masked_fill(none, self.gates.n_experts), token, gate)

    def _passed(
        self, values: torch.Tensor, expert: torch.Tensor, token: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        self.seen = True
        rows = replace(self.gates, values=values, expert=expert, token=token, gate=gate)
        return _passed(self.watchers, rows).values

    def nothing(self, like: torch.Tensor, units: int) -> RoutedActivations:
        """No rows, where no token was routed to any expert."""
        gates = self.gates
        return replace(
            gates, values=like.new_empty(0, units), expert=gates.expert[:0], token=gates.token[:0], gate=gates.gate[:0]
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self.watchers and not self.at_once and name in _PRODUCTS and len(args) > 1:
            if name == "bmm" and args[1] is down_projections(self.module):
                x = args[0]  # [experts, tokens, units]
                gates = self.gates
                rows = self._passed(x.flatten(0, 1), gates.expert, gates.token, gates.gate)
                args = (rows.view(x.shape), *args[1:])
            elif (expert := self._expert_of(args[1])) is not None:
                args = (self._rows_of(expert, args[0]), *args[1:])
        found = func(*args, **(kwargs or {}))
        if name == "sort" and self._order is None:
            self._order = found[1]
        elif name == "where" and isinstance(found, tuple):
            self._hit = found
        return found

    def _expert_of(self, weight: Any) -> int | None:
        """The expert whose slice of the down projections a matrix is; None for another matrix."""
        if self._own:
            return self._own.get(id(weight))
        whole = down_projections(self.module)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or whole is None:
            return None
        if weight.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return None
        return int(weight.storage_offset() - whole.storage_offset()) // (whole.numel() // self.gates.n_experts)


_SEAMS: WeakKeyDictionary[torch.nn.Module, _Seam] = WeakKeyDictionary()
