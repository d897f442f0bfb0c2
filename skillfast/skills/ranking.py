"""`NeuronRanking`: the one table of sites and columns that `select` cuts, whatever made its numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skillfast import files
from skillfast.errors import ArgumentError
from skillfast.models.sites import Site, site_slices

if TYPE_CHECKING:
    from collections.abc import Mapping

    from skillfast.statistics.scores import NeuronScores

SCHEMA = "skillfast.ranking/1"
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
        header = {
            "schema": SCHEMA,
            "method": self.method,
            "columns": self.columns,
            "sites": [asdict(site) for site in self.sites],
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
        }
        files.write_arrays(path, {"values": self.values, "n_observations": self.n_observations}, header)
        return path

    @staticmethod
    def load(directory: str | Path) -> NeuronRanking:
        """Read what `save` wrote; raises DataError where the file is missing, broken or of another version."""
        path, remedy = Path(directory) / FILE, "write it with NeuronRanking.save"
        arrays, header = files.read_arrays(path, SCHEMA, remedy)
        with files.whole(path, remedy):
            return NeuronRanking(
                method=header["method"],
                columns=tuple(header["columns"]),
                sites=tuple(Site(**site) for site in header["sites"]),
                fingerprint=header["fingerprint"],
                settings=header["settings"],
                **arrays,
            )


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
