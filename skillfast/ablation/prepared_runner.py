"""A sweep of a prepared model: every condition in its gates, one whole forward of one shape after the other."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from skillfast.ablation.batch_result import BatchRecorder, Observed, embedding_of
from skillfast.ablation.prefix_reuse import routes_of
from skillfast.errors import ArgumentError
from skillfast.models.batches import logits_of
from skillfast.models.inputs import call
from skillfast.models.sites import module_device, unwrap_compiled
from skillfast.tracing.gates import RoutedGate, SiteGate
from skillfast.tracing.prepared import prepared

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from skillfast.ablation.batch_result import BatchResult
    from skillfast.ablation.interventions import Interventions
    from skillfast.models.batches import Batch


class PreparedRunner:
    """Runs batches under the intact model and every condition.

    Args:
        model: A prepared model, compiled or not.
        interventions: What every condition does.

    Raises:
        ArgumentError: A site that the model is not prepared at, or a router whose logits are masked.
    """

    def __init__(self, model: torch.nn.Module, interventions: Interventions) -> None:
        known = prepared(model)
        assert known is not None
        known.require(interventions.sites)
        self.model = model
        self.inner = unwrap_compiled(model)
        self.known = known
        self.device = module_device(self.inner)
        self.interventions = interventions
        self.factors = [interventions.factors(i) for i in range(len(interventions.conditions))]
        self.routers = [site for site in known.sites if site.kind == "router"]
        self.head = next((site for site in known.sites if site.kind == "head"), None)

    def run(self, batch: Batch, keep_embeddings: bool, *, keep_logits: bool) -> BatchResult:
        """Run one batch under the intact model and every condition."""
        batch = batch.to(self.device)
        self.known.expect(self.inner, None)
        if keep_embeddings and len(batch) > self.known.rows:
            raise ArgumentError(
                f"embeddings: expected batches of up to {self.known.rows}, which the model is prepared for, got "
                f"{len(batch)}; prepare(model, rows={len(batch)})"
            )
        logits = self._logits(batch)
        observed = Observed.of(batch, logits, self.inner)
        embedding = embedding_of(batch, self._embedding(batch), self.inner) if keep_embeddings else None
        routes = self._routes(batch)
        bank = self.interventions.donors
        rows = None if bank is None else bank.rows_of(self.inner, batch.inputs)
        part = BatchRecorder(
            observed, logits, embedding, len(self.factors), keep_logits=keep_logits, donors=rows,
            routed=_choices(routes, batch),
        )  # fmt: skip
        for i, factors in enumerate(self.factors):
            with self.known.changed(self.inner, factors), self._given(i, rows):
                changed = self._logits(batch)
                embedding = self._embedding(batch) if keep_embeddings else None
            others = [(now != before).any(-1) for now, before in zip(self._routes(batch), routes, strict=True)]
            part.set([i], changed[None], None if embedding is None else embedding[None], _total(others, batch))
        return part.result()

    @contextmanager
    def _given(self, condition: int, rows: torch.Tensor | None) -> Iterator[None]:
        """What a condition's one forward inside the context gets of donors."""
        sites = self.interventions.sites_of_donors(condition)
        if rows is None or not sites:
            yield
            return
        given = self.interventions.given(condition, rows)
        with self.known.resampling(sites):
            before = self.known.forwards(self.inner)
            self.known.give(self.inner, given)
            try:
                yield
                tokens = {site.name: values.shape[1] for site, (_, values) in given.items()}
                self.known.check_given(self.inner, sites, tokens, 1, before)
            finally:
                self.known.take_back(self.inner, sites)

    def _routes(self, batch: Batch) -> list[torch.Tensor]:
        """The experts of each token in the last forward, ascending: int64 [batch, tokens, slots] of each router."""
        if not self.routers:
            return []
        if len(batch) > self.known.rows:
            raise ArgumentError(
                f"routers: expected batches of up to {self.known.rows}, which the model is prepared for, got "
                f"{len(batch)}; prepare(model, rows={len(batch)})"
            )
        told, found = self.known.forwards(self.inner), list[torch.Tensor]()
        for site in self.routers:
            gate = self.known.gate(self.inner, site)
            assert isinstance(gate, RoutedGate)
            found.append(routes_of(gate.last(*told[site.name][1:])).clone())
        return found

    def _logits(self, batch: Batch) -> torch.Tensor:
        return logits_of(call(self.model, batch.inputs), self.inner)

    def _embedding(self, batch: Batch) -> torch.Tensor | None:
        """What the classifier read; None for a model without one, or with one that reads every token."""
        if self.head is None:
            return None
        gate = self.known.gate(self.inner, self.head)
        assert isinstance(gate, SiteGate)
        return gate.last(len(batch), 1, 0).clone() if int(gate.read[2]) == 1 else None


def _total(chosen: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor | None:
    """How many real tokens at all routers, int64 [1], of bool [batch, tokens] each; None without routers."""
    if not chosen:
        return None
    real = batch.mask
    return torch.stack([(x if real is None else x & (real.to(x.device) != 0)).sum() for x in chosen]).sum()[None]


def _choices(routes: Sequence[torch.Tensor], batch: Batch) -> int:
    total = _total([torch.ones_like(route[..., 0], dtype=torch.bool) for route in routes], batch)
    return 0 if total is None else int(total)
