"""`NeuronScores`: how every neuron goes with every metric column."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from msgspec import Meta, structs

from skillfast import files
from skillfast.errors import ArgumentError
from skillfast.models.sites import Site, site_slices
from skillfast.results import arrays
from skillfast.results.arrays import Array, indices
from skillfast.results.records import Count, Document, Positive
from skillfast.statistics.partial import partial_correlations
from skillfast.statistics.saved_sites import SavedSite, saved_sites, sites_of
from skillfast.vocabulary import STATISTICS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

FILE = "scores.safetensors"
MOST_BETWEEN = 4096  # columns beyond which their correlations with each other outgrow those of the neurons
_PER_COLUMN = (
    "pearson", "pearson_low", "pearson_high", "pearson_p", "pearson_q", "spearman", "spearman_bound", "auroc",
    "auroc_bound", "mutual_info",
)  # fmt: skip
OF_NEURONS = (
    "constant_neuron",
    "non_finite_activation",
    "stale_edges",
    "beyond_float32",
    "too_few_tokens",
    "constant_where_routed",
    "explained_neuron",
)  # reasons that hold indices of neurons
_ROUTED = "routed."  # before the names of the shares' arrays in a file
_PER_NEURON = ("mean", "std", "n_routed")


@dataclass(frozen=True)
class NeuronScores:
    """The result of a trace; index it with a site's name to get that site's rows.

    Attributes:
        columns: One name per metric, one per class of a categorical metric: `("label:airplane", ..., "loss")`.
        mean: float64 [n_neurons], in units of the (pooled) activation.
        std: float64 [n_neurons], population standard deviation.
        n_observations: Rows counted.
        n_ranked: Rows that all statistics but Pearson's r come from: a sample where tokens are observations and there
            are many; None without such statistics.
        n_routed: int64 [n_neurons], observations of each neuron where tokens are observations and some sites are of
            experts, which count the tokens that were routed to each; None elsewhere.
        routed: Scores of another value, the share of an example's tokens that was routed to each expert: a neuron for
            each, by the site of its router (`scores.routed["blocks.3.router"]`); None without pooled experts.
        pearson: float64 [n_neurons, n_columns], Pearson's r; NaN where it is not defined, None where not asked for.
        pearson_low: float64 [n_neurons, n_columns], lower end of the 95 % bootstrap interval of r; None without
            `n_bootstrap`.
        pearson_high: float64 [n_neurons, n_columns], upper end of the interval of r.
        pearson_p: float64 [n_neurons, n_columns], p of no correlation.
        pearson_q: p adjusted over all neurons and columns of the accumulator (Benjamini and Hochberg).
        spearman: float64 [n_neurons, n_columns], Spearman's rho.
        spearman_bound: How far `spearman` can be from the rho of sorted rows, whatever the data: a certificate, not an
            interval. Where ranks come from a sample of the tokens it holds the sampling error as well, with 99 %
            confidence for each neuron and column by itself.
        auroc: float64 [n_neurons, n_columns], area under the ROC curve; NaN for continuous metrics.
        auroc_bound: How far `auroc` can be from the one of sorted rows, as for `spearman_bound`.
        mutual_info: float64 [n_neurons, n_columns], mutual information in nats, of a class against the rest, at most
            log 2; of a continuous metric with its 8 soft levels, at most about 1.5 however exactly the neuron follows
            it. So compare neurons within a column, not columns of labels with those of continuous metrics. 0 for a
            constant neuron.
        between: float64 [n_columns, n_columns], Pearson's r of the columns with each other, from which `given` makes
            partial correlations; None without Pearson's r, of more than 4,096 columns, and where there are sites of
            experts alone whose tokens are observations.
        conditioned_on: Metrics that `pearson` is given; empty for plain correlations.
        sites: The sites whose neurons these are, in order; empty for activations without a model.
        pool: How tokens became one observation; None for activations without a model.
        fingerprint: Digest of the model's architecture, or None.
        reasons: What went wrong and where: `constant_neuron` and `non_finite_activation` hold indices of neurons,
            `constant_metric` names of columns, `hook_never_fired` names of sites. `stale_edges` holds neurons whose
            bins no longer divide the rows: their bounds are wide, calibrate on random rows. `beyond_float32` holds
            neurons whose squares leave float32's range, `metric_beyond_float32` columns that do: rescale them.
            `explained_neuron` and `explained_metric` hold neurons and columns that follow from what they are given.
            `too_few_tokens` holds units of experts to which fewer than 10 tokens were routed, `constant_where_routed`
            those of experts whose tokens have one value of a metric.
    """

    columns: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    n_observations: int
    n_ranked: int | None = None
    n_routed: np.ndarray | None = None
    routed: NeuronScores | None = None
    pearson: np.ndarray | None = None
    pearson_low: np.ndarray | None = None
    pearson_high: np.ndarray | None = None
    pearson_p: np.ndarray | None = None
    pearson_q: np.ndarray | None = None
    spearman: np.ndarray | None = None
    spearman_bound: np.ndarray | None = None
    auroc: np.ndarray | None = None
    auroc_bound: np.ndarray | None = None
    mutual_info: np.ndarray | None = None
    between: np.ndarray | None = None
    conditioned_on: tuple[str, ...] = ()
    sites: tuple[Site, ...] = ()
    pool: str | None = None
    fingerprint: str | None = None
    reasons: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array that is there, by name; the first axis is the neurons."""
        named = {name: getattr(self, name) for name in (*_PER_NEURON, *_PER_COLUMN)}
        return {name: array for name, array in named.items() if array is not None}

    def statistic(self, name: str) -> np.ndarray:
        """A statistic by name; raises ArgumentError where it was not computed."""
        array = getattr(self, name, None) if name in STATISTICS else None
        if array is None:
            known = [statistic for statistic in STATISTICS if getattr(self, statistic) is not None]
            raise ArgumentError(f"statistic: expected one of {', '.join(known)}, got {name!r}")
        return array

    @property
    def n_neurons(self) -> int:
        """Number of neurons."""
        return len(self.mean)

    def site_slices(self) -> dict[str, slice]:
        """Name of each site -> rows of its neurons."""
        return site_slices(self.sites)

    def __getitem__(self, site: str) -> NeuronScores:
        """The scores of one site; raises ArgumentError for a name that was not traced."""
        slices = self.site_slices()
        if site not in slices:
            raise ArgumentError(f"site: expected one of {', '.join(slices) or 'none (no model)'}, got {site!r}")
        return self.taken(slices[site], tuple(s for s in self.sites if s.name == site))

    def taken(self, rows: slice, sites: tuple[Site, ...]) -> NeuronScores:
        """The scores of a slice of the neurons, which are those of these sites."""
        reasons: dict[str, tuple[Any, ...]] = {
            name: tuple(i - rows.start for i in where if rows.start <= i < rows.stop) if name in OF_NEURONS else where
            for name, where in self.reasons.items()
        }
        arrays: dict[str, Any] = {name: array[rows] for name, array in self.arrays().items()}
        return replace(self, sites=sites, routed=None, reasons={k: v for k, v in reasons.items() if v}, **arrays)

    def to_dataframe(self, site: str | None = None, metric: str | None = None, top: int | None = None) -> pd.DataFrame:
        """Long form, one row per neuron, column and statistic; needs pandas.

        Args:
            site: Only this site.
            metric: Only this metric (all its classes) or this column.
            top: Only the neurons with this many largest absolute values per column and statistic.

        Returns:
            A frame with columns `site` (two of a block may be of one kind), `layer` (integer, missing for the head),
            `kind`, `head` (missing outside attention), `expert` (missing outside routed experts), `unit`, `metric`,
            `statistic`, `value`, `n` (observations that the value comes from).
        """
        import pandas as pd

        scores = self if site is None else self[site]
        columns = [name for name in self.columns if metric in (None, name, name.partition(":")[0])]
        if not columns:
            raise ArgumentError(f"metric: expected one of {', '.join(self.columns)}, got {metric!r}")
        neurons = _neuron_frame(scores)
        parts = []
        for column in columns:
            for statistic in (name for name in _PER_COLUMN if name in scores.arrays()):
                values = scores.arrays()[statistic][:, self.columns.index(column)]
                n = self.n_observations if statistic.startswith("pearson") else self.n_ranked
                own = n if scores.n_routed is None else scores.n_routed
                part = neurons.assign(metric=column, statistic=statistic, value=values, n=own)
                if top is not None:
                    part = part.loc[part["value"].abs().nlargest(top).index]
                parts.append(part)
        return pd.concat(parts, ignore_index=True)

    def given(self, *metrics: str) -> NeuronScores:
        """Partial correlations: Pearson's r of neurons and columns after a regression of both on other metrics.

        Confidence follows the label, so neurons that carry the label correlate with both; `given("label")` keeps of
        their r with confidence what is left within classes. It is made from the correlations alone, without the data.

        Args:
            *metrics: Names of metrics that were traced; of a categorical one all classes are meant.

        Returns:
            Scores whose `pearson` is given these metrics, without their columns and without other statistics. NaN
            where less than a ten-thousandth of a neuron's or a column's variance is left, and for units of experts
            whose own tokens are the observations.

        Raises:
            ArgumentError: A metric that was not traced, none or all of them, or scores without Pearson's r.
        """
        if len(self.columns) > MOST_BETWEEN:
            raise ArgumentError(
                f"given: expected at most {MOST_BETWEEN:,} columns, got {len(self.columns):,}; trace fewer classes"
            )
        if self.pearson is None or self.between is None:
            raise ArgumentError("given: expected scores with Pearson's r of dense sites, got none; trace with pearson")
        names = list(dict.fromkeys(column.partition(":")[0] for column in self.columns))
        if not metrics or not set(metrics) < set(names):
            raise ArgumentError(
                f"given: expected some of {', '.join(names)} and not all, got {', '.join(metrics) or 'none'}; trace "
                "more metrics"
            )
        fixed = np.array([column.partition(":")[0] in metrics for column in self.columns])
        found = partial_correlations(self.pearson, self.between, fixed)
        slices = self.site_slices()
        if self.n_routed is not None:
            for site in (site for site in self.sites if site.experts is not None):
                found.neurons[slices[site.name]] = np.nan
        columns = tuple(column for column, out in zip(self.columns, fixed, strict=True) if not out)
        reasons = {
            **self.reasons,
            "explained_neuron": tuple(np.flatnonzero(found.explained_neurons).tolist()),
            "explained_metric": tuple(columns[i] for i in np.flatnonzero(found.explained_columns)),
        }
        return NeuronScores(
            columns=columns,
            mean=self.mean,
            std=self.std,
            n_observations=self.n_observations,
            n_routed=self.n_routed,
            routed=None if self.routed is None else self.routed.given(*metrics),
            pearson=found.neurons,
            between=found.columns,
            conditioned_on=(*self.conditioned_on, *metrics),
            sites=self.sites,
            pool=self.pool,
            fingerprint=self.fingerprint,
            reasons={name: where for name, where in reasons.items() if where},
        )

    def save(self, directory: str | Path) -> Path:
        """Write `scores.safetensors` into the folder; returns its path."""
        path = files.output_folder(directory) / FILE
        stored, header = self._stored(), ScoresHeader(**self._told())
        if self.routed is not None:
            stored |= {f"{_ROUTED}{name}": array for name, array in self.routed._stored().items()}
            header = structs.replace(header, routed=ToldScores(**self.routed._told()))
        arrays.write(path, header, stored)
        return path

    def _stored(self) -> dict[str, np.ndarray]:
        return self.arrays() if self.between is None else {**self.arrays(), "between": self.between}

    def _told(self) -> dict[str, Any]:
        """What a file's header tells of the arrays."""
        return {
            "columns": list(self.columns),
            "n_observations": self.n_observations,
            "n_ranked": self.n_ranked,
            "sites": saved_sites(self.sites),
            "pool": self.pool,
            "fingerprint": self.fingerprint,
            "conditioned_on": list(self.conditioned_on),
            "reasons": {name: list(where) for name, where in self.reasons.items()},
        }

    @staticmethod
    def load(directory: str | Path) -> NeuronScores:
        """Read what `save` wrote; raises DataError where the file is missing, broken or of another version."""
        header, found = arrays.read(
            ScoresHeader, Path(directory) / FILE, _layout, "write it with NeuronScores.save or `skillfast trace`"
        )
        routed = None
        if header.routed is not None:
            named = {name.removeprefix(_ROUTED): array for name, array in found.items() if name.startswith(_ROUTED)}
            routed = _of_header(named, header.routed)
        own = {name: array for name, array in found.items() if not name.startswith(_ROUTED)}
        return replace(_of_header(own, header), routed=routed)


class ToldScores(Document, frozen=True):
    """What a file tells of the scores beside their arrays, as attributes of `NeuronScores` of the same names."""

    columns: Annotated[list[str], Meta(min_length=1)]
    n_observations: Positive
    n_ranked: Count | None
    sites: list[SavedSite]
    pool: str | None
    fingerprint: str | None
    conditioned_on: list[str]
    reasons: dict[str, list[Count | str]]

    def __post_init__(self) -> None:
        if len(set(self.columns)) < len(self.columns):
            raise ValueError("expected columns with different names at columns, got one twice")
        sites_of(self.sites)
        for name, where in self.reasons.items():
            if not all(isinstance(place, int if name in OF_NEURONS else str) for place in where):
                raise ValueError(
                    f"expected {'indices' if name in OF_NEURONS else 'names'} at reasons.{name}, got others"
                )


class ScoresHeader(ToldScores, frozen=True, tag="skillfast.scores/1", tag_field="schema"):
    """The header of `scores.safetensors`.

    Attributes:
        routed: What `NeuronScores.routed` says, without its arrays; absent where no site is of experts.
    """

    routed: ToldScores | None = None


_LIMITS: dict[str, tuple[float | None, float | None]] = {
    "pearson": (-1.0001, 1.0001), "pearson_p": (0, 1), "pearson_q": (0, 1), "spearman": (-1.0001, 1.0001),
    "spearman_bound": (0, None), "auroc": (0, 1), "auroc_bound": (0, None), "mutual_info": (0, None),
}  # fmt: skip


def _layout(header: ScoresHeader) -> dict[str, Array]:
    found = _arrays_of(header, "n")
    if header.routed is not None:
        found |= {f"{_ROUTED}{name}": array for name, array in _arrays_of(header.routed, "routed").items()}
    return found


def _arrays_of(told: ToldScores, length: str) -> dict[str, Array]:
    """What each array must be; NaN is a statistic that is not defined."""
    n = sum(site.width for site in told.sites) if told.sites else length
    ends = {name: _LIMITS.get(name, (None, None)) for name in _PER_COLUMN}
    return {
        "mean": Array((n,), nan=True, infinite=True),
        "std": Array((n,), low=0, nan=True, infinite=True),
        "n_routed": indices(n, below=None, optional=True),
        "between": Array((len(told.columns), len(told.columns)), low=-1.0001, high=1.0001, nan=True, optional=True),
        **{
            name: Array((n, len(told.columns)), low=low, high=high, nan=True, optional=True)
            for name, (low, high) in ends.items()
        },
    }


def _of_header(found: Mapping[str, np.ndarray], told: ToldScores) -> NeuronScores:
    return NeuronScores(
        columns=tuple(told.columns),
        n_observations=told.n_observations,
        n_ranked=told.n_ranked,
        sites=sites_of(told.sites),
        pool=told.pool,
        fingerprint=told.fingerprint,
        conditioned_on=tuple(told.conditioned_on),
        reasons={name: tuple(where) for name, where in told.reasons.items()},
        **dict[str, Any](found),
    )


def _neuron_frame(scores: NeuronScores) -> pd.DataFrame:
    """site, layer, kind, head, expert and unit of every neuron."""
    import pandas as pd

    if not scores.sites:
        missing = pd.array([pd.NA] * scores.n_neurons, dtype="Int64")
        return pd.DataFrame(
            {
                "site": None,
                "layer": missing,
                "kind": None,
                "head": missing,
                "expert": missing,
                "unit": np.arange(scores.n_neurons),
            }
        )
    frames = []
    for site in scores.sites:
        unit = np.arange(site.width)
        head = unit // (site.width // site.heads) if site.heads else None
        expert = unit // (site.width // site.experts) if site.experts else None
        frame = pd.DataFrame(
            {"site": site.name, "layer": site.block, "kind": site.kind, "head": head, "expert": expert, "unit": unit}
        )
        frames.append(frame.astype({"layer": "Int64", "head": "Int64", "expert": "Int64"}))
    return pd.concat(frames, ignore_index=True)
