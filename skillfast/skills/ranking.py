"""`NeuronRanking`: the one table of sites and columns that `select` cuts, whatever made its numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from msgspec import Meta

from skillfast import files
from skillfast.errors import ArgumentError
from skillfast.models.sites import Site, site_slices
from skillfast.results import arrays
from skillfast.results.arrays import Array, indices
from skillfast.results.records import Document, Name
from skillfast.statistics.saved_sites import SavedSite, saved_sites, sites_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from skillfast.statistics.scores import NeuronScores

FILE = "ranking.safetensors"


@dataclass(frozen=True)
class NeuronRanking:
    """A number per neuron and column, which `select` cuts; of a trace's scores, or made by `attribute`, `learn_masks`.

    Attributes:
        method: What the numbers are: a statistic of a trace, `"attribution"`, `"mask"` or `"erase"`.
        columns: One per metric, or per class of a categorical metric: `("label:airplane", ..., "loss")`.
        values: float64 [n_neurons, n_columns], in the order of the sites; higher is chosen first, NaN never.
        sites: The sites whose neurons these are, in order.
        n_observations: int64 [n_columns], observations that entered each column.
        fingerprint: Hash of the model's architecture, or None.
        settings: What made the numbers, for the skills chosen by them.
    """

    method: str
    columns: tuple[str, ...]
    values: np.ndarray
    sites: tuple[Site, ...]
    n_observations: np.ndarray
    fingerprint: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_neurons(self) -> int:
        """Number of neurons."""
        return len(self.values)

    def site_slices(self) -> dict[str, slice]:
        """Name of each site -> rows of its neurons."""
        return site_slices(self.sites)

    def save(self, directory: str | Path) -> Path:
        """Write `ranking.safetensors` into the folder; returns its path."""
        path = files.output_folder(directory) / FILE
        header = RankingHeader(
            method=self.method,
            columns=list(self.columns),
            sites=saved_sites(self.sites),
            fingerprint=self.fingerprint,
            settings=dict(self.settings),
        )
        arrays.write(path, header, {"values": self.values, "n_observations": self.n_observations})
        return path

    @staticmethod
    def load(directory: str | Path) -> NeuronRanking:
        """Read what `save` wrote; raises DataError where the file is missing, broken or of another version."""
        header, found = arrays.read(RankingHeader, Path(directory) / FILE, _layout, "write it with NeuronRanking.save")
        return NeuronRanking(
            method=header.method,
            columns=tuple(header.columns),
            sites=sites_of(header.sites),
            fingerprint=header.fingerprint,
            settings=header.settings,
            **found,
        )


class RankingHeader(Document, frozen=True, tag="skillfast.ranking/1", tag_field="schema"):
    """The header of `ranking.safetensors`, attributes of `NeuronRanking` of the same names."""

    method: Name
    columns: Annotated[list[str], Meta(min_length=1)]
    sites: list[SavedSite]
    fingerprint: str | None
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        if len(set(self.columns)) < len(self.columns):
            raise ValueError("expected columns with different names at columns, got one twice")
        sites_of(self.sites)


def _layout(header: RankingHeader) -> dict[str, Array]:
    n = sum(site.width for site in header.sites) if header.sites else "n"
    columns = len(header.columns)
    return {
        "values": Array((n, columns), nan=True, infinite=True),
        "n_observations": indices(columns, below=None),
    }


def ranking_of(scores: NeuronScores | NeuronRanking, method: str | None = None) -> NeuronRanking:
    """The table of one method's numbers.

    Args:
        scores: What a trace gives; or a ranking, which is returned as it is.
        method: A statistic of the trace, by default `"pearson"`; for a ranking its own method or None.

    Raises:
        ArgumentError: A statistic that the trace did not compute, or another method than the ranking's.
    """
    if isinstance(scores, NeuronRanking):
        if method not in (None, scores.method):
            raise ArgumentError(
                f"method: expected {scores.method}, which this ranking holds, got {method!r}; leave it out"
            )
        return scores
    return NeuronRanking(
        method=method or "pearson",
        columns=scores.columns,
        values=scores.statistic(method or "pearson"),
        sites=scores.sites,
        n_observations=np.full(len(scores.columns), scores.n_observations),
        fingerprint=scores.fingerprint,
    )
