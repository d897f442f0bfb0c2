"""Prefix reuse: forwards that start in the middle of a model, from what the intact forward left there.

A condition changes nothing before the first site that it touches. So the intact forward of a batch keeps what goes into
the blocks where conditions begin, and a condition's forward runs the model's own code from there: earlier blocks hand
their input through, the first one gets what was kept, and at the first touched projection its output is the kept one
plus what the changed neurons change of it, `W[:, S] @ (change of neurons S)`. After the last block's attention many
models read the class token alone; then that row alone is run. Which of this a model allows is not assumed: each start
is compared with the plain forward before it is used (`Replay.verify`).
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from skillfast.ablation.interventions import Interventions, hooked, partners
from skillfast.ablation.survey import Survey, first_tensor, logits_of, with_first_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from skillfast.models.sites import Site


@dataclass(frozen=True)
class Start:
    """Where a condition's forward departs from the intact one.

    Attributes:
        block: Position of the block in the order of calls; None: at the classifier.
        site: The first site that is changed, where its projection's output can be corrected; None: the block's input.
    """

    block: int | None
    site: Site | None


@dataclass(frozen=True)
class Route:
    """How to run from a start.

    Attributes:
        start: None: from the beginning, as a plain forward.
        narrow: Only the first token's row passes the last block.
        whole_stem: What precedes the blocks runs on all rows, not on one.
    """

    start: Start | None
    narrow: bool = False
    whole_stem: bool = False


@dataclass
class Record:
    """What the intact forward of one batch left for the routes.

    Attributes:
        inputs: [batch, ...].
        logits: [batch, classes].
        embedding: [batch, E], the classifier's input; None for a model without one.
        calls: Block -> its arguments as flat leaves.
        outputs: Path of a site's owner -> its output.
        neurons: Site -> activations [batch, tokens, S] of the neurons that conditions change.
    """

    inputs: torch.Tensor
    logits: torch.Tensor
    embedding: torch.Tensor | None
    calls: dict[str, tuple[list[Any], Any]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    neurons: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether corrections may be added: removing a neuron that is not finite is no subtraction."""
        return bool(self.logits.isfinite().all())

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        kept = [leaf for leaves, _ in self.calls.values() for leaf in leaves]
        tensors = {id(t): t for t in (*kept, *map(first_tensor, self.outputs.values()), *self.neurons.values())}
        return sum(t.nbytes for t in tensors.values() if isinstance(t, torch.Tensor))


@contextmanager
def replaced_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another `forward` for one module; what was there before is back on every way out."""
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


def _hand_through(x: Any, *_: Any, **__: Any) -> Any:
    return x


class Replay:
    """Runs conditions on a model from wherever they begin.

    Args:
        model: In evaluation mode.
        interventions: Of all conditions.
        survey: What is known of the model's forward.
    """

    def __init__(self, model: torch.nn.Module, interventions: Interventions, survey: Survey) -> None:
        self.model = model
        self.interventions = interventions
        self.survey = survey
        self.routes: dict[Start, Route] = {}
        self.members: dict[Start | None, list[int]] = {}  # None: conditions that change nothing
        for i in range(len(interventions.conditions)):
            self.members.setdefault(self._start(i), []).append(i)
        self._touched: dict[str, torch.Tensor] = {}  # site of a start -> sorted neurons that its conditions change
        for start, conditions in self.members.items():
            if start is not None and start.site is not None and start.block is not None:
                rows = [self._row(start.site, i).neurons for i in conditions]
                self._touched[start.site.name] = torch.cat(rows).unique()

    def _row(self, site: Site, condition: int) -> Any:
        row = self.interventions.row(site, condition)
        assert row is not None  # of a site at which the condition starts
        return row

    def _start(self, condition: int) -> Start | None:
        for site in self.survey.sites:
            if self.interventions.row(site, condition) is None:
                continue
            if site.kind == "head":
                return Start(None, site)
            block = self.survey.block_of[site.name]
            return Start(block, site if site.name in self.survey.owners else None)
        return None

    def candidates(self, start: Start) -> Iterator[Route]:
        """Routes from a start, the shortest first; the plain forward last."""
        if not self.survey.sequential:
            yield Route(None)
            return
        if start.block is None:
            if self.survey.head_is_last:
                yield Route(start)
            start = Start(len(self.survey.blocks) - 1, None)
        starts = [start] if start.site is None else [start, Start(start.block, None)]
        for whole_stem in (False, True):
            for narrow in (True, False):
                yield from (Route(begin, narrow, whole_stem) for begin in starts)
        yield Route(None)

    def verify(self, inputs: torch.Tensor, plain: Callable[[int], torch.Tensor], tolerance: float) -> None:
        """Choose each start's route: the shortest that gives back the intact model's logits with nothing changed.

        Of each kind of route one is compared with a condition's plain forward, too.

        Args:
            inputs: A few samples.
            plain: Condition -> logits of the plain forward.
            tolerance: Largest difference, as a share of the largest logit.
        """
        starts = [start for start in self.members if start is not None]
        last = Start(len(self.survey.blocks) - 1, None)
        whole = self.record(
            inputs, [Route(last if s.block is None else s) for s in starts] if self.survey.blocks else []
        )
        proven: set[tuple[Any, ...]] = set()
        for start in starts:
            condition = self.members[start][0]
            for route in self.candidates(start):
                self.routes[start] = route
                if route.start is None:
                    break
                kind = (route.start.block is None, route.start.site and route.start.site.kind, route.narrow)
                if not self._agrees(whole, start, condition, whole.logits, tolerance, changed=False):
                    continue
                if kind in proven or self._agrees(whole, start, condition, plain(condition), tolerance):
                    proven.add(kind)
                    break

    def _agrees(
        self,
        record: Record,
        start: Start,
        condition: int,
        want: torch.Tensor,
        tolerance: float,
        *,
        changed: bool = True,
    ) -> bool:
        try:
            got = self.run(record, start, [condition], changed=changed)[0]
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False  # the model's own code has no use for this route
        allowed = tolerance * float(want.abs().max())
        return got.shape[1:] == want.shape and bool(((got[0] - want).abs() <= allowed).all())

    # -- the intact forward -------------------------------------------------------------------------------------------

    def record(self, inputs: torch.Tensor, routes: Iterable[Route] | None = None) -> Record:
        """The intact forward of a batch, and what the routes need of it: those of all starts, or these."""
        record = Record(inputs, torch.empty(0), None)
        with ExitStack() as stack:
            for route in self.routes.values() if routes is None else routes:
                self._keep(stack, record, route)
            if self.survey.head is not None:

                def keep_embedding(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
                    record.embedding = args[0]

                head = self.model.get_submodule(self.survey.head.path)
                stack.callback(head.register_forward_pre_hook(keep_embedding).remove)
            record.logits = logits_of(self.model(inputs))
        return record

    def _keep(self, stack: ExitStack, record: Record, route: Route) -> None:
        start = route.start
        if start is None or start.block is None:
            return
        in_last = start.block == len(self.survey.blocks) - 1
        narrow = route.narrow and in_last and start.site is not None
        for block in self.survey.blocks[start.block :]:
            first = block == self.survey.blocks[start.block]
            if first or self.survey.takes_more(block):
                self._keep_call(stack, record, block, narrow, hidden=first)
        if start.site is None:
            return
        for site in self.survey.sites_until(start.site):
            owner = self.survey.owners[site.name]

            def keep_output(_: torch.nn.Module, __: Any, output: Any, owner: str = owner) -> None:
                kept = first_tensor(output)
                record.outputs[owner] = with_first_tensor(output, kept[:, :1].clone() if narrow else kept)

            stack.callback(self.model.get_submodule(owner).register_forward_hook(keep_output).remove)
        touched, name = self._touched[start.site.name], start.site.name

        def keep_neurons(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0][:, :1] if narrow else args[0]
            record.neurons[name] = x.index_select(-1, touched.to(x.device))

        stack.callback(self.model.get_submodule(start.site.path).register_forward_pre_hook(keep_neurons).remove)

    def _keep_call(self, stack: ExitStack, record: Record, block: str, narrow: bool, *, hidden: bool) -> None:
        def keep(_: torch.nn.Module, args: Any, kwargs: Any) -> None:
            if not hidden and block in record.calls:
                return
            (state, *more), spec = tree_flatten((args, kwargs))
            if narrow:
                state = state[:, :1].clone()
            record.calls[block] = ([state if hidden else None, *more], spec)  # else earlier blocks make it anew

        handle = self.model.get_submodule(block).register_forward_pre_hook(keep, with_kwargs=True)
        stack.callback(handle.remove)

    # -- a forward from the middle ------------------------------------------------------------------------------------

    def run(
        self, record: Record, start: Start, conditions: Sequence[int], *, changed: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The forwards of conditions that begin at `start`, stacked along the batch; unchanged ones to see the route.

        Returns:
            Logits [conditions, batch, classes], and embeddings [conditions, batch, E] or None without a classifier.
        """
        route = self.routes[start] if record.finite else Route(None)
        n = len(conditions)
        if route.start is not None and route.start.block is None:
            assert self.survey.head is not None
            assert record.embedding is not None
            stacked = _repeat(record.embedding, n)
            if changed:
                stacked = self.interventions.apply(self.survey.head, stacked, conditions)
            logits = self.model.get_submodule(self.survey.head.path)(stacked)
            return _unstack(logits, n), _unstack(stacked, n)
        seen: list[torch.Tensor] = []
        with ExitStack() as stack:
            sites = self.interventions.sites
            rows = n if route.start is None or route.whole_stem else 0
            if route.start is not None:
                sites = self._enter(stack, record, route, conditions, changed)
            stack.enter_context(hooked(self.model, self.interventions, sites if changed else [], conditions))
            if self.survey.head is not None:
                head = self.model.get_submodule(self.survey.head.path)
                stack.callback(head.register_forward_pre_hook(lambda _, args: seen.append(args[0])).remove)
            output = logits_of(self.model(_repeat(record.inputs, rows) if rows else record.inputs[:1]))
        return _unstack(output, n), _unstack(seen[0], n) if seen else None

    def _enter(
        self, stack: ExitStack, record: Record, route: Route, conditions: Sequence[int], changed: bool
    ) -> list[Site]:
        """Hooks and forwards of one run from the middle; returns the sites whose input is still to be changed."""
        start = route.start
        assert start is not None
        assert start.block is not None
        module = self.model.get_submodule
        before, block, after = (
            self.survey.blocks[: start.block],
            self.survey.blocks[start.block],
            self.survey.blocks[start.block + 1 :],
        )
        for path in before:
            stack.enter_context(replaced_forward(module(path), _hand_through))
        last = self.survey.blocks[-1]
        narrow = route.narrow and block == last and start.site is not None  # all that is kept, then
        self._inject(stack, record, block, len(conditions), hidden=True, narrow=narrow)
        for path in after:
            if path in record.calls and self.survey.takes_more(path):
                self._inject(stack, record, path, len(conditions), hidden=False, narrow=False)
        done: list[Site] = []
        if start.site is not None:
            done = self.survey.sites_until(start.site)
            for site in done:
                change = changed and site is start.site
                output = self._start_output(record, site, conditions, changed=change, narrow=narrow)
                self._replace_owner(stack, site, output)
        if route.narrow and not narrow:
            self._narrow(stack, last)
        block_of = self.survey.block_of
        later = {name for name, at in block_of.items() if at is None or at >= start.block} - {s.name for s in done}
        return [site for site in self.interventions.sites if site.name in later]

    def _inject(self, stack: ExitStack, record: Record, block: str, n: int, *, hidden: bool, narrow: bool) -> None:
        """Give a block its kept arguments, all of them or all but the hidden state."""
        leaves, spec = record.calls[block]
        if narrow:
            leaves = [leaves[0][:, :1], *leaves[1:]]
        samples = len(record.inputs)
        batched = [
            _rows(leaf) == samples if many is None else many
            for leaf, many in zip(leaves, self.survey.batched[block], strict=True)
        ]
        rows = n * samples

        def give(_: torch.nn.Module, args: Any, kwargs: Any) -> Any:
            own = tree_flatten((args, kwargs))[0]
            given = [
                _repeat(leaf, n) if many and leaf is not None else leaf
                for leaf, many in zip(leaves, batched, strict=True)
            ]
            if not hidden:  # what earlier blocks made is right; what the stem made of one row is not
                given = [
                    kept if _rows(kept) and _rows(leaf) != rows else leaf for leaf, kept in zip(own, given, strict=True)
                ]
            return tree_unflatten(given, spec)

        handle = self.model.get_submodule(block).register_forward_pre_hook(give, with_kwargs=True)
        stack.callback(handle.remove)

    def _replace_owner(self, stack: ExitStack, site: Site, output: Any) -> None:
        owner = self.survey.owners[site.name]
        stack.enter_context(replaced_forward(self.model.get_submodule(owner), lambda *_, **__: output))
        feed = self.survey.feeds.get(owner)
        if feed is not None:
            stack.enter_context(replaced_forward(self.model.get_submodule(feed), _hand_through))

    def _start_output(
        self, record: Record, site: Site, conditions: Sequence[int], *, changed: bool, narrow: bool
    ) -> Any:
        """A site's owner's output under each condition: the kept one, corrected for the neurons that change."""
        kept = record.outputs[self.survey.owners[site.name]]
        base = first_tensor(kept)[:, :1] if narrow else first_tensor(kept)  # [batch, tokens, E]
        n = len(conditions)
        stacked = _repeat(base, n)
        if not changed:
            return with_first_tensor(kept, stacked)
        weight = self.model.get_parameter(f"{site.path}.weight")
        neurons = record.neurons[site.name][:, : base.shape[1]]  # [batch, tokens, S], of all conditions
        touched = self._touched[site.name]
        with torch.autocast(base.device.type, enabled=False):
            for out, i in zip(stacked.view(n, -1, stacked.shape[-1]), conditions, strict=True):
                row = self._row(site, i)
                where = torch.searchsorted(touched, row.neurons).to(base.device)
                x = neurons.index_select(-1, where)
                if row.mean is not None:
                    x = x - row.mean.to(x)
                if row.resample:
                    x = x - x[partners(len(x)).to(x.device)]
                columns = weight.index_select(1, row.neurons.to(weight.device)).to(base.dtype)  # [E, S]
                out.addmm_(x.flatten(0, -2).to(base.dtype), columns.T, alpha=row.scale - 1)
        return with_first_tensor(kept, stacked)

    def _narrow(self, stack: ExitStack, last: str) -> None:
        """Let only the first token's row pass the last block; its attention still reads them all."""
        module = self.model.get_submodule
        whole: list[Any] = []

        def first_row(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            whole[:] = [args[0]]
            return (args[0][:, :1], *args[1:])

        stack.callback(module(last).register_forward_pre_hook(first_row).remove)
        for site in self.survey.sites:
            if site.kind != "attn" or self.survey.blocks[self.survey.block_of[site.name] or 0] != last:
                continue
            path = self.survey.owners[site.name]
            owner, feed = module(path), self.survey.feeds.get(path)
            read = module(feed) if feed is not None else _hand_through

            def attend(_: Any, *args: Any, forward: Any = owner.forward, read: Any = read, **kwargs: Any) -> Any:
                return forward(read(whole[0]), *args, **kwargs)

            stack.enter_context(replaced_forward(owner, attend))
            handle = module(site.path).register_forward_pre_hook(lambda _, args: (args[0][:, :1], *args[1:]))
            stack.callback(handle.remove)


def _repeat(x: Any, n: int) -> Any:
    return x.repeat(n, *(1,) * (x.dim() - 1)) if isinstance(x, torch.Tensor) else x


def _unstack(x: torch.Tensor, n: int) -> torch.Tensor:
    return x.view(n, -1, *x.shape[1:])
