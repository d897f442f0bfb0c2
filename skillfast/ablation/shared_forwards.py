"""Rows of removals, each forward begun where it parts from one that has run.

In a row every example is under a removal of its own. Rows often differ late: removals from the first blocks are those
of all blocks up to where they end, and a removal from the last blocks is none at all before it begins. So some rows run
whole and leave the hidden states that others go on from; what an intact forward leaves serves as well. Nothing is
assumed of the model: each start is compared with the plain forward first (see `prefix_reuse`).
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from skillfast.ablation.forward_trace import trace_forward
from skillfast.ablation.interventions import Interventions, standing_for
from skillfast.ablation.prefix_reuse import HALF_TOLERANCE, TOLERANCE, PrefixCache, PrefixReuse, ResumePoint, Route
from skillfast.memory.budget import memory_limit
from skillfast.models.activations import Activations
from skillfast.models.batches import logits_of
from skillfast.models.inputs import call, examples_in, repeated, taken
from skillfast.models.sites import module_device
from skillfast.models.watching import watched
from skillfast.tracing.prepared import prepared

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from skillfast.ablation.interventions import Condition
    from skillfast.models.batches import Batch
    from skillfast.models.sites import Site

INTACT = -1  # in place of a row: the model as it is


class SharedForwards:
    """Predicts batches under every row, each example under one condition of it.

    Args:
        model: In evaluation mode.
        rows: Conditions without donors.
        examples: The first batch; two examples of it prove the starts.

    Attributes:
        whole: Rows that run from the input on.
        begun: Row -> the row, or `INTACT`, whose hidden states it goes on from, and the stage at which: a position in
            the order of the blocks, or their number for the classifier.
    """

    def __init__(self, model: torch.nn.Module, rows: Sequence[Sequence[Condition]], examples: Batch) -> None:
        self.model, self.rows = model, rows
        self.whole, self.begun = list(range(len(rows))), dict[int, tuple[int, int]]()
        self._routes: dict[int, Route] = {}
        self._kept_bytes = 0.0  # per example
        if len(rows) < 2 or prepared(model) is not None:
            return
        inputs = examples.inputs
        few = taken(inputs, slice(2)) if examples_in(inputs) > 1 else repeated(inputs, 2)
        self._reuse = PrefixReuse(model, Interventions(model, [], None, None), trace_forward(model, few))
        self._stages = len(self._reuse.trace.blocks)
        self._plan(self._signatures(), range(self._stages + 1))
        if self.begun:
            self._plan(self._signatures(), self._proven(examples.taken(slice(2))))

    @property
    def work(self) -> float:
        """Whole forwards of an example that all rows take."""
        rest = sum(1 - stage / self._stages for _, stage in self.begun.values())
        return len(self.whole) + self._from_intact + rest

    @property
    def _from_intact(self) -> bool:
        return any(row == INTACT for row, _ in self.begun.values())

    def predict(self, examples: Batch, own: torch.Tensor) -> np.ndarray:
        """Predictions int64 [rows, batch].

        Args:
            examples: On the model's device.
            own: int64 [batch], position of each example's condition in every row; -1 for none.
        """
        if not self.begun:
            found = [self._filled(examples, row, own, ()).logits.argmax(-1).cpu().numpy() for row in self.whole]
            return np.stack(found) if found else np.empty((0, len(own)), np.int64)
        size = max(1, int(memory_limit(own.device) / max(1.0, self._kept_bytes)))
        parts = zip(examples.split(size), own.split(size), strict=True)
        return np.concatenate([self._part(part, of) for part, of in parts], 1)

    def _part(self, examples: Batch, own: torch.Tensor) -> np.ndarray:
        found = np.empty((len(self.rows), len(own)), np.int64)
        for root in ([INTACT] if self._from_intact else []) + self.whole:
            rest = [(row, stage) for row, (of, stage) in self.begun.items() if of == root]
            cache = self._filled(examples, root, own, {stage for _, stage in rest})
            if root != INTACT:
                found[root] = cache.logits.argmax(-1).cpu().numpy()
            for row, stage in rest:
                found[row] = self._resumed(cache, row, stage, own).argmax(-1).cpu().numpy()
        return found

    def _signatures(self) -> dict[int, list[frozenset[object]]]:
        """What each row changes in each stage, the intact model's nothing among them."""
        found: dict[int, list[frozenset[object]]] = {INTACT: [frozenset()] * (self._stages + 1)}
        for row, conditions in enumerate(self.rows):
            interventions = Interventions(self.model, conditions, None, None)
            stages: list[set[object]] = [set() for _ in range(self._stages + 1)]
            for site in interventions.sites:
                stage = self._stage_of(site)
                for i in range(len(conditions)):
                    change = interventions.change_at(site, i)
                    if change is not None and stage is not None:
                        mean = None if change.mean is None else change.mean.numpy().tobytes()
                        neurons = change.neurons.numpy().tobytes()
                        stages[stage].add((i, site.name, neurons, change.scale, mean, change.masked))
            found[row] = [frozenset(changes) for changes in stages]
        return found

    def _stage_of(self, site: Site) -> int | None:
        """Where a site is in the order of the forward; None for one that never runs."""
        trace = self._reuse.trace
        if site.name not in trace.block_of:
            return None
        block = trace.block_of[site.name]
        return self._stages if block is None else block

    def _plan(self, signatures: dict[int, list[frozenset[object]]], allowed: Iterable[int]) -> None:
        """Let rows go on from others, those that change most first, at stages that are allowed."""
        allowed = sorted(allowed)

        def shared(row: int, other: int) -> int:
            """The last allowed stage up to which both do the same."""
            pairs = zip(signatures[row], signatures[other], strict=True)
            differ = next((stage for stage, (a, b) in enumerate(pairs) if a != b), self._stages)
            return max((stage for stage in allowed if stage <= differ), default=0)

        for intact in (True, False):
            self.whole, self.begun = [], {}
            most = sorted(range(len(self.rows)), key=lambda row: -sum(map(len, signatures[row])))
            for row in most:
                others = ([INTACT] if intact else []) + self.whole
                stage, other = max(((shared(row, other), other) for other in others), default=(0, INTACT))
                if stage:
                    self.begun[row] = other, stage
                else:
                    self.whole.append(row)
            if self.work < len(self.rows):  # an intact forward costs one that nobody asked for
                return
        self.whole, self.begun = list(range(len(self.rows))), {}

    def _proven(self, few: Batch) -> list[int]:
        """The stages from which two examples' forwards give the intact logits; none where a row of any kind differs."""
        reuse, model = self._reuse, self.model
        if not reuse.trace.sequential:
            return []
        n, stages = len(few), {stage for _, stage in self.begun.values()}
        own = torch.arange(n, device=module_device(model)) % max(1, min(len(row) for row in self.rows))
        tolerance, proven = TOLERANCE.get(reuse.trace.dtype, HALF_TOLERANCE), list[int]()
        for stage in sorted(stages):
            if stage == self._stages and not (reuse.trace.head and reuse.trace.head_is_last):
                continue
            for whole_stem in (False, True):
                self._routes[stage] = route = Route(ResumePoint(stage, None), whole_stem=whole_stem)
                if stage == self._stages:
                    route = Route(ResumePoint(None, reuse.trace.head))
                assert route.point is not None
                reuse.routes = {route.point: route}
                cache = self._filled(few, INTACT, own, {stage})
                if reuse.agrees(cache, route.point, 0, cache.logits, tolerance, changed=False):
                    proven.append(stage)
                    break
        reuse.routes = {}
        self._kept_bytes = self._filled(few, INTACT, own, set(proven)).nbytes / n
        tried = set()
        for row, (of, stage) in self.begun.items():
            kind = (of == INTACT, stage == self._stages)
            if stage in proven and kind not in tried:
                tried.add(kind)
                if not self._as_plain(few, row, of, stage, own, tolerance):
                    return []
        return proven

    def _as_plain(self, few: Batch, row: int, of: int, stage: int, own: torch.Tensor, tolerance: float) -> bool:
        """Whether a row's forward from a stage gives what its plain one does."""
        want = self._filled(few, row, own, ()).logits
        got = self._resumed(self._filled(few, of, own, {stage}), row, stage, own)
        return got.shape == want.shape and bool(((got - want).abs() <= tolerance * want.abs().max()).all())

    def _interventions(self, row: int) -> Interventions:
        """Made anew for each batch, since the tables of many rows and classes would not fit."""
        return Interventions(self.model, [] if row == INTACT else self.rows[row], None, None)

    def _filled(self, examples: Batch, row: int, own: torch.Tensor, stages: Iterable[int]) -> PrefixCache:
        """The forward of a row from the input on, and the hidden states at these stages."""
        stages, embeddings = set(stages), list[torch.Tensor]()
        with ExitStack() as stack:
            if stages and self._stages in stages and self._reuse.trace.head is not None:
                head = self.model.get_submodule(self._reuse.trace.head.path)  # seen before the row changes it
                stack.callback(head.register_forward_pre_hook(lambda _, args: embeddings.append(args[0])).remove)
            self._change(stack, self._interventions(row), own, 0)
            if not stages:
                return PrefixCache(examples.inputs, examples.logits(self.model), None)
            cache = self._reuse.fill_cache(
                examples.inputs, [self._routes[stage] for stage in sorted(stages) if stage < self._stages]
            )
        examples.check_logits(cache.logits, self.model)
        cache.embedding = embeddings[0] if embeddings else None
        return cache

    def _resumed(self, cache: PrefixCache, row: int, stage: int, own: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes] of a row, from a stage on."""
        interventions, head = self._interventions(row), self._reuse.trace.head
        if stage == self._stages:
            assert head is not None
            assert cache.embedding is not None
            x = cache.embedding
            if head in interventions.sites:
                x = interventions.apply_each(head, Activations(x), _each(interventions, own))
            return self.model.get_submodule(head.path)(x)
        route = self._routes[stage]
        with ExitStack() as stack:
            self._reuse.set_up(stack, cache, route, [0], changed=False)
            self._change(stack, interventions, own, stage)
            stack.enter_context(standing_for(cache.inputs, 1))
            inputs = cache.inputs if route.whole_stem else taken(cache.inputs, slice(1))
            return logits_of(call(self.model, inputs), self.model)

    def _change(self, stack: ExitStack, interventions: Interventions, own: torch.Tensor, stage: int) -> None:
        """Hook the sites from a stage on; each example is changed by its own condition."""
        each = _each(interventions, own)
        for site in interventions.sites:
            if stage and (at := self._stage_of(site)) is not None and at < stage:
                continue
            change = partial(interventions.apply_each, site, condition=each)
            stack.enter_context(watched(self.model, site, change))


def _each(interventions: Interventions, own: torch.Tensor) -> torch.Tensor:
    """Position of each example's condition, their number for none."""
    return torch.where(own < 0, len(interventions.conditions), own)
