"""Prefix reuse: forwards that start in the middle of a model, from what the intact forward left there.

A condition changes nothing before the first site that it touches. So the intact forward of a batch fills a
`PrefixCache` with the inputs of the blocks where conditions begin, and a condition's forward runs the model's own code
from there (its `ResumePoint`): earlier blocks return their input, the first block gets the cached arguments, and at the
first touched projection the output is the cached one plus what the changed neurons S add to it,
`W[:, S] @ (change of neurons S)`. After the last block's attention many models read the class token alone; then only
that token runs. None of this is assumed of a model: each way to run is compared with the plain forward before it is
used (`PrefixReuse.verify`).
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from skillfast.ablation.donors import token_mask
from skillfast.ablation.forward_trace import ForwardTrace, first_tensor, with_first_tensor
from skillfast.ablation.interventions import Interventions, hooked, standing_for
from skillfast.errors import ModelError
from skillfast.models.activations import Activations, RoutedActivations
from skillfast.models.batches import logits_of
from skillfast.models.inputs import Inputs, call, examples_in, repeated, taken
from skillfast.models.shards import local_part
from skillfast.models.watching import watched
from skillfast.transfer import moved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from skillfast.models.sites import Site

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of logits, as a share of the largest
HALF_TOLERANCE = 3e-2


@dataclass(frozen=True)
class ResumePoint:
    """Where a condition's forward departs from the intact one.

    Attributes:
        block: Position of the block in the order of calls; None: at the classifier.
        site: The first site that is changed, where its projection's output can be corrected; None: the block's input.
    """

    block: int | None
    site: Site | None


@dataclass(frozen=True)
class Route:
    """How to run the forwards of conditions.

    Attributes:
        point: Where to begin; None: at the input, as a plain forward.
        narrow: Whether only the first token passes the last block.
        whole_stem: Whether what precedes the blocks runs on all rows, not on one.
    """

    point: ResumePoint | None
    narrow: bool = False
    whole_stem: bool = False


@dataclass
class PrefixCache:
    """What the intact forward of one batch left for the routes.

    Attributes:
        inputs: What the model was called with, one tensor [batch, ...] or keyword arguments.
        logits: [batch, classes] or [batch, tokens, classes], the intact model's.
        embedding: [batch, E], the classifier's input; None for a model without a classifier.
        calls: Path of a block -> its arguments, flattened, and the tree that they are of.
        outputs: Path of the module around a site's projection -> its output.
        neurons: Name of a site -> activations [batch, tokens, S] of the neurons that conditions change.
        donors: int64 [batch], each sample's row of the bank of donors; None where no condition needs one.
        routes: Name of a router -> int64 [batch, tokens, slots], ascending: the experts of each token.
        real: bool [batch, tokens], False for padding; None where the model is not told of any.
    """

    inputs: Inputs
    logits: torch.Tensor
    embedding: torch.Tensor | None
    calls: dict[str, tuple[list[Any], Any]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    neurons: dict[str, torch.Tensor] = field(default_factory=dict)
    donors: torch.Tensor | None = None
    routes: dict[str, torch.Tensor] = field(default_factory=dict)
    real: torch.Tensor | None = None

    @property
    def routed(self) -> int:
        """How many choices of experts the intact forward made: routers times real tokens."""
        each = [route[..., 0].numel() if self.real is None else int(self.real.sum()) for route in self.routes.values()]
        return sum(each)

    @cached_property
    def finite(self) -> bool:
        """Whether corrections may be added: removing a neuron that is not finite is no subtraction. Asked once."""
        return bool(self.logits.isfinite().all())

    @property
    def nbytes(self) -> int:
        """Bytes of all kept tensors."""
        kept = [leaf for leaves, _ in self.calls.values() for leaf in leaves]
        tensors = {id(t): t for t in (*kept, *map(first_tensor, self.outputs.values()), *self.neurons.values())}
        return sum(t.nbytes for t in tensors.values() if isinstance(t, torch.Tensor))


def routes_of(found: Activations) -> torch.Tensor:
    """The experts of each token at a router, ascending: int64 [batch, tokens, slots]."""
    assert isinstance(found, RoutedActivations)
    return found.expert.view(*found.shape, -1).sort(-1).values


@contextmanager
def replaced_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's `forward` inside the context; an exception restores it, too."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _rows(leaf: Any) -> int:
    """Length of an argument's first dimension; 0 for what has none."""
    return leaf.shape[0] if isinstance(leaf, torch.Tensor) and leaf.dim() else 0


def _identity(x: Any, *_: Any, **__: Any) -> Any:
    return x


def _passing(parts: int | None) -> Callable[..., Any]:
    """A forward that returns its input as a block does: as the first of several parts, where it returns those."""
    return _identity if parts is None else lambda x, *_, **__: (x, *(None,) * (parts - 1))


class PrefixReuse:
    """Runs each condition's forward from the first site that it changes.

    Args:
        model: In evaluation mode.
        interventions: What every condition does.
        trace: The order of the model's forward.

    Attributes:
        conditions_from: Where to resume -> positions of the conditions that begin there; at None those that change
            nothing.
        routes: Where to resume -> how to; filled by `verify`.
    """

    def __init__(self, model: torch.nn.Module, interventions: Interventions, trace: ForwardTrace) -> None:
        self.model = model
        self.interventions = interventions
        self.trace = trace
        self.routes: dict[ResumePoint, Route] = {}
        self.conditions_from: dict[ResumePoint | None, list[int]] = {}
        for i in range(len(interventions.conditions)):
            self.conditions_from.setdefault(self._resume_point(i), []).append(i)
        self._routers = [site for site in trace.sites if site.kind == "router"]
        self._changed: dict[str, torch.Tensor] = {}  # site of a resume point -> sorted neurons that conditions change
        for point, conditions in self.conditions_from.items():
            if point is not None and point.site is not None and point.block is not None:
                neurons = [self._change(point.site, i).neurons for i in conditions]
                self._changed[point.site.name] = torch.cat(neurons).unique()

    def _change(self, site: Site, condition: int) -> Any:
        change = self.interventions.change_at(site, condition)
        assert change is not None  # asked only where the condition begins
        return change

    def _resume_point(self, condition: int) -> ResumePoint | None:
        for site in self.trace.sites:
            if self.interventions.change_at(site, condition) is None:
                continue
            if site.kind == "head":
                return ResumePoint(None, site)
            block = self.trace.block_of[site.name]
            return ResumePoint(block, site if site.name in self.trace.parents else None)
        return None

    def candidate_routes(self, point: ResumePoint) -> Iterator[Route]:
        """Ways to run from a resume point, the shortest first; the plain forward last."""
        if not self.trace.sequential:
            yield Route(None)
            return
        if point.block is None:
            if self.trace.head_is_last:
                yield Route(point)
            point = ResumePoint(len(self.trace.blocks) - 1, None)
        points = [point] if point.site is None else [point, ResumePoint(point.block, None)]
        for whole_stem in (False, True):
            for narrow in (True, False):
                yield from (Route(begin, narrow, whole_stem) for begin in points)
        yield Route(None)

    def verify(self, inputs: Inputs, plain: Callable[[int], torch.Tensor], tolerance: float) -> None:
        """Choose each resume point's route: the shortest that gives the intact model's logits when nothing is changed.

        One route of each kind is also compared with a condition's plain forward.

        Args:
            inputs: A few samples.
            plain: Function of a condition's position that gives the logits of its plain forward.
            tolerance: Largest difference that counts as equal, as a share of the largest logit.
        """
        points = [point for point in self.conditions_from if point is not None]
        last = ResumePoint(len(self.trace.blocks) - 1, None)
        starts = self.trace.blocks and self.trace.sequential
        whole = self.fill_cache(inputs, [Route(last if p.block is None else p) for p in points] if starts else [])
        proven: set[tuple[Any, ...]] = set()
        for point in points:
            condition = self.conditions_from[point][0]
            for route in self.candidate_routes(point):
                self.routes[point] = route
                if route.point is None:
                    break
                kind = (route.point.block is None, route.point.site and route.point.site.kind, route.narrow)
                if not self.agrees(whole, point, condition, whole.logits, tolerance, changed=False):
                    continue
                if kind in proven or self.agrees(whole, point, condition, plain(condition), tolerance):
                    proven.add(kind)
                    break

    def agrees(
        self,
        cache: PrefixCache,
        point: ResumePoint,
        condition: int,
        want: torch.Tensor,
        tolerance: float,
        *,
        changed: bool = True,
    ) -> bool:
        """Whether the route from a point gives these logits; `changed=False` changes no neuron."""
        try:
            got = self.run(cache, point, [condition], changed=changed)[0]
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ModelError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False  # the model's own code has no use for this route
        allowed = tolerance * float(want.abs().max())
        return got.shape[1:] == want.shape and bool(((got[0] - want).abs() <= allowed).all())

    def work(self, point: ResumePoint) -> float:
        """Share of a whole forward that one from this point runs, by its blocks."""
        begin = self.routes[point].point
        if begin is None:
            return 1.0
        return 0.0 if begin.block is None else 1 - begin.block / len(self.trace.blocks)

    def fill_cache(self, inputs: Inputs, routes: Iterable[Route] | None = None) -> PrefixCache:
        """Run the intact forward of a batch and keep what these routes need; None: those that `verify` chose."""
        cache = PrefixCache(inputs, torch.empty(0), None)
        if self.interventions.donors is not None:
            cache.donors = self.interventions.donors.rows_of(self.model, inputs)
        with ExitStack() as stack:
            for route in self.routes.values() if routes is None else routes:
                self._keep(stack, cache, route)
            if self.trace.head is not None:

                def keep_embedding(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
                    cache.embedding = args[0]

                head = self.model.get_submodule(self.trace.head.path)
                stack.callback(head.register_forward_pre_hook(keep_embedding).remove)
            for site in self._routers:

                def keep_routes(found: Activations, site: Site = site) -> None:
                    cache.routes[site.name] = routes_of(found)

                stack.enter_context(watched(self.model, site, keep_routes))
                cache.real = token_mask(self.model, inputs)
            cache.logits = logits_of(call(self.model, inputs), self.model)
        return cache

    def _keep(self, stack: ExitStack, cache: PrefixCache, route: Route) -> None:
        point = route.point
        if point is None or point.block is None:
            return
        in_last = point.block == len(self.trace.blocks) - 1
        narrow = route.narrow and in_last and point.site is not None
        for block in self.trace.blocks[point.block :]:
            first = block == self.trace.blocks[point.block]
            if first or self.trace.takes_more(block):
                self._keep_call(stack, cache, block, narrow, hidden=first)
        if point.site is None:
            return
        for site in self.trace.sites_until(point.site):
            parent = self.trace.parents[site.name]

            def keep_output(_: torch.nn.Module, __: Any, output: Any, parent: str = parent) -> None:
                kept = first_tensor(output)
                cache.outputs[parent] = with_first_tensor(output, kept[:, :1].clone() if narrow else kept)

            stack.callback(self.model.get_submodule(parent).register_forward_hook(keep_output).remove)
        changed_neurons, name = self._changed[point.site.name], point.site.name

        def keep_neurons(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
            x = local_part(args[0])[:, :1] if narrow else local_part(args[0])
            cache.neurons[name] = x.index_select(-1, moved(changed_neurons, x.device))

        stack.callback(self.model.get_submodule(point.site.path).register_forward_pre_hook(keep_neurons).remove)

    def _keep_call(self, stack: ExitStack, cache: PrefixCache, block: str, narrow: bool, *, hidden: bool) -> None:
        def keep(_: torch.nn.Module, args: Any, kwargs: Any) -> None:
            if not hidden and block in cache.calls:
                return
            (state, *more), spec = tree_flatten((args, kwargs))
            if narrow:
                state = state[:, :1].clone()
            cache.calls[block] = ([state if hidden else None, *more], spec)  # else earlier blocks make it anew

        handle = self.model.get_submodule(block).register_forward_pre_hook(keep, with_kwargs=True)
        stack.callback(handle.remove)

    def run(
        self, cache: PrefixCache, point: ResumePoint, conditions: Sequence[int], *, changed: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Run the forwards of conditions that begin at one point, stacked along the batch.

        Args:
            cache: What the intact forward of the batch left.
            point: Where the conditions begin.
            conditions: Positions of the conditions to run.
            changed: False: change no neuron, to see whether the route gives the intact logits.

        Returns:
            Logits [conditions, batch, ..., classes], embeddings [conditions, batch, ..., E] or None without a
            classifier, and how many of the cache's `routed` choices of experts are others, int64 [conditions], or None
            without routers.
        """
        route = self.routes[point] if cache.finite else Route(None)
        n = len(conditions)
        if route.point is not None and route.point.block is None:
            assert self.trace.head is not None
            assert cache.embedding is not None
            stacked = _repeat(cache.embedding, n)
            if changed:
                stacked = self.interventions.apply(self.trace.head, Activations(stacked), conditions, cache.donors)
            logits = self.model.get_submodule(self.trace.head.path)(stacked)
            none = torch.zeros(n, dtype=torch.int64, device=logits.device) if cache.routes else None
            return _unstack(logits, n), _unstack(stacked, n), none
        seen: list[torch.Tensor] = []
        rerouted = torch.zeros(n, dtype=torch.int64, device=cache.logits.device)
        with ExitStack() as stack:
            sites = self.interventions.sites
            rows = n if route.point is None or route.whole_stem else 0
            if route.point is not None:
                sites = self.set_up(stack, cache, route, conditions, changed)
            sites = sites if changed else []
            stack.enter_context(hooked(self.model, self.interventions, sites, conditions, lambda: cache.donors))
            if self.trace.head is not None:
                head = self.model.get_submodule(self.trace.head.path)
                stack.callback(head.register_forward_pre_hook(lambda _, args: seen.append(args[0])).remove)
            for site in self._routers:

                def compare(found: Activations, site: Site = site) -> None:
                    rerouted.add_(_other_routes(cache, site, routes_of(found), n).to(rerouted.device))

                stack.enter_context(watched(self.model, site, compare))
            stack.enter_context(standing_for(cache.inputs, n))
            inputs = repeated(cache.inputs, rows) if rows else taken(cache.inputs, slice(1))
            output = logits_of(call(self.model, inputs), self.model)
        return _unstack(output, n), _unstack(seen[0], n) if seen else None, rerouted if cache.routes else None

    def set_up(
        self, stack: ExitStack, cache: PrefixCache, route: Route, conditions: Sequence[int], changed: bool
    ) -> list[Site]:
        """Set up a run from the middle; returns the sites whose input is still to be changed."""
        point = route.point
        assert point is not None
        assert point.block is not None
        module = self.model.get_submodule
        before, block, after = (
            self.trace.blocks[: point.block],
            self.trace.blocks[point.block],
            self.trace.blocks[point.block + 1 :],
        )
        for path in before:
            stack.enter_context(replaced_forward(module(path), _passing(self.trace.parts[path])))
        last = self.trace.blocks[-1]
        narrow = route.narrow and block == last and point.site is not None  # the cache holds the first token alone
        self._inject(stack, cache, block, len(conditions), hidden=True, narrow=narrow)
        for path in after:
            if path in cache.calls and self.trace.takes_more(path):
                self._inject(stack, cache, path, len(conditions), hidden=False, narrow=False)
        done: list[Site] = []
        if point.site is not None:
            done = self.trace.sites_until(point.site)
            for site in done:
                change = changed and site is point.site
                output = self._parent_output(cache, site, conditions, changed=change, narrow=narrow)
                self._replace_parent(stack, site, output)
        if route.narrow and not narrow:
            self._narrow(stack, last)
        block_of = self.trace.block_of
        later = {name for name, at in block_of.items() if at is None or at >= point.block} - {s.name for s in done}
        return [site for site in self.interventions.sites if site.name in later]

    def _inject(self, stack: ExitStack, cache: PrefixCache, block: str, n: int, *, hidden: bool, narrow: bool) -> None:
        """Give a block its cached arguments, all of them or all but the hidden state."""
        leaves, spec = cache.calls[block]
        if narrow:
            leaves = [leaves[0][:, :1], *leaves[1:]]
        samples = examples_in(cache.inputs)
        batched = [
            _rows(leaf) == samples if many is None else many
            for leaf, many in zip(leaves, self.trace.batched[block], strict=True)
        ]
        rows = n * samples

        def give(_: torch.nn.Module, args: Any, kwargs: Any) -> Any:
            own = tree_flatten((args, kwargs))[0]
            given = [_repeat(leaf, n) if many else leaf for leaf, many in zip(leaves, batched, strict=True)]
            if not hidden:  # what earlier blocks made is right; what the stem made of one row is not
                given = [
                    kept if _rows(kept) and _rows(leaf) != rows else leaf for leaf, kept in zip(own, given, strict=True)
                ]
            return tree_unflatten(given, spec)

        handle = self.model.get_submodule(block).register_forward_pre_hook(give, with_kwargs=True)
        stack.callback(handle.remove)

    def _replace_parent(self, stack: ExitStack, site: Site, output: Any) -> None:
        parent = self.trace.parents[site.name]
        stack.enter_context(replaced_forward(self.model.get_submodule(parent), lambda *_, **__: output))
        feed = self.trace.feeds.get(parent)
        if feed is not None:
            stack.enter_context(replaced_forward(self.model.get_submodule(feed), _identity))

    def _parent_output(
        self, cache: PrefixCache, site: Site, conditions: Sequence[int], *, changed: bool, narrow: bool
    ) -> Any:
        """Output of the module around a projection under each condition: the cached one plus what neurons change."""
        kept = cache.outputs[self.trace.parents[site.name]]
        base = first_tensor(kept)[:, :1] if narrow else first_tensor(kept)  # [batch, tokens, E]
        n = len(conditions)
        stacked = _repeat(base, n)
        if not changed:
            return with_first_tensor(kept, stacked)
        shards = self.interventions.shards
        spread = shards is not None and site.name in shards.held
        difference = torch.zeros_like(stacked) if spread else stacked  # other processes add what their neurons change
        weight = local_part(self.model.get_parameter(f"{site.path}.weight"))
        neurons = cache.neurons[site.name][:, : base.shape[1]]  # [batch, tokens, S], of all conditions
        changed_neurons = self._changed[site.name]
        with torch.autocast(base.device.type, enabled=False):
            for out, i in zip(difference.view(n, -1, stacked.shape[-1]), conditions, strict=True):
                change = self._change(site, i)
                where = moved(torch.searchsorted(changed_neurons, change.neurons), base.device)
                x = neurons.index_select(-1, where)
                if change.mean is not None:
                    x = x - change.mean.to(x)
                if cache.donors is not None and (other := change.donated(cache.donors)) is not None:
                    x = x - other[:, : base.shape[1]].to(x)
                at = moved(change.neurons, weight.device)
                columns = weight.index_select(1, at).to(base.dtype)  # [E, S]
                out.addmm_(x.flatten(0, -2).to(base.dtype), columns.T, alpha=change.scale - 1)
        if shards is not None and spread:
            stacked += shards.sum(difference)
        return with_first_tensor(kept, stacked)

    def _narrow(self, stack: ExitStack, last: str) -> None:
        """Let only the first token pass the last block; its attention still reads all tokens."""
        module = self.model.get_submodule
        whole: list[Any] = []

        def first_row(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            whole[:] = [args[0]]
            return (args[0][:, :1], *args[1:])

        stack.callback(module(last).register_forward_pre_hook(first_row).remove)
        for site in self.trace.sites:
            if site.kind != "attn" or self.trace.blocks[self.trace.block_of[site.name] or 0] != last:
                continue
            path = self.trace.parents[site.name]
            parent, feed = module(path), self.trace.feeds.get(path)
            read = module(feed) if feed is not None else _identity

            def attend(_: Any, *args: Any, forward: Any = parent.forward, read: Any = read, **kwargs: Any) -> Any:
                return forward(read(whole[0]), *args, **kwargs)

            stack.enter_context(replaced_forward(parent, attend))
            handle = module(site.path).register_forward_pre_hook(lambda _, args: (args[0][:, :1], *args[1:]))
            stack.callback(handle.remove)


def _repeat(x: Any, n: int) -> Any:
    return x.repeat(n, *(1,) * (x.dim() - 1)) if isinstance(x, torch.Tensor) else x


def _other_routes(cache: PrefixCache, site: Site, routes: torch.Tensor, n: int) -> torch.Tensor:
    """How many real tokens have other experts than in the intact forward: int64 [n] conditions."""
    before = cache.routes[site.name]
    if len(routes) != n * len(before):
        return routes.new_zeros(n)  # a block before those that run, on the one row that passes it
    tokens = routes.shape[1]  # the first alone where no other passes the last block
    others = (_unstack(routes, n) != before[None, :, :tokens]).any(-1)  # [n, batch, tokens]
    return (others if cache.real is None else others & cache.real[None, :, :tokens].to(others.device)).sum((1, 2))


def _unstack(x: torch.Tensor, n: int) -> torch.Tensor:
    return x.view(n, -1, *x.shape[1:])
