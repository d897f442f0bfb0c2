"""`trace_windows`: the statistics of a trace by the place in a text or conversation, in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from skillfast.errors import ArgumentError
from skillfast.metrics import Categorical
from skillfast.statistics.bootstrap import adjusted, fisher_z
from skillfast.statistics.heterogeneity import heterogeneity
from skillfast.statistics.inputs import as_tensor
from skillfast.statistics.overlaps import shared_by_chance
from skillfast.tracing.prepared import prepared
from skillfast.tracing.trace import Pass, run
from skillfast.tracing.tracer import Tracer
from skillfast.vocabulary import BINS, Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from skillfast.metrics import Metric
    from skillfast.statistics.scores import NeuronScores
    from skillfast.tracing.sampling import ValidRows
    from skillfast.tracing.trace import Forward

GROUPS = 40  # of texts, each left out once: the jackknife's
LEVEL = 0.05  # false discoveries among what changes
_SLICE = 1 << 20  # z of all groups, columns and windows that are compared at once
_POOLS = ("mean", "max", "last")


@dataclass(frozen=True)
class Changes:
    """Whether neurons follow a metric differently along the text.

    Attributes:
        column: The metric's column.
        windows: Names of the windows.
        site: Site of each neuron.
        unit: int64 [n], its number there.
        r: float64 [n, windows], Pearson's r in each window.
        q_statistic: float64 [n], Cochran's Q of Fisher's z over the windows, which depend on each other.
        p: float64 [n], p of the same correlation in all windows; NaN where it is not defined.
        q: float64 [n], p adjusted over these neurons (Benjamini and Hochberg).
    """

    column: str
    windows: tuple[str, ...]
    site: tuple[str, ...]
    unit: np.ndarray
    r: np.ndarray
    q_statistic: np.ndarray
    p: np.ndarray
    q: np.ndarray

    def found(self, level: float = LEVEL) -> dict[str, list[int]]:
        """Neurons that change, by site.

        Args:
            level: Expected share of false ones among them.
        """
        neurons: dict[str, list[int]] = {}
        for i in np.flatnonzero(np.nan_to_num(self.q, nan=1) <= level):
            neurons.setdefault(self.site[i], []).append(int(self.unit[i]))
        return neurons


@dataclass(frozen=True)
class WindowOverlap:
    """Which of their best neurons windows share, beside chance.

    Attributes:
        top: How many neurons of each window count as its best.
        shared: int64 [windows, windows].
        expected: float64 [windows, windows], what random sets share that have as many neurons of each site.
        low: int64 [windows, windows], lower ends of the central 95 % of that.
        high: int64 [windows, windows], upper ends.
        p: float64 [windows, windows], how probable it is that random sets share as many or more.
    """

    top: int
    shared: np.ndarray
    expected: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray


@dataclass(frozen=True)
class WindowScores:
    """What `trace_windows` gives; index it with a window's name to get that window's scores.

    Attributes:
        windows: Names of the windows, in their order.
        scores: The scores of each window; intervals and p of r are the jackknife's over groups of texts.
        q_statistic: float64 [n_neurons, n_columns], Cochran's Q of Fisher's z over the windows.
        p: float64 [n_neurons, n_columns], p of the same correlation in all windows; NaN where it is not defined.
    """

    windows: tuple[str, ...]
    scores: tuple[NeuronScores, ...]
    q_statistic: np.ndarray
    p: np.ndarray

    def __getitem__(self, window: str) -> NeuronScores:
        """The scores of one window; raises ArgumentError for an unknown name."""
        if window not in self.windows:
            raise ArgumentError(f"window: expected one of {', '.join(self.windows)}, got {window!r}")
        return self.scores[self.windows.index(window)]

    def changes(
        self, column: str, neurons: Mapping[str, Sequence[int] | np.ndarray | torch.Tensor] | None = None
    ) -> Changes:
        """Test of each neuron whether its correlation with a metric changes along the text.

        Args:
            column: A metric's column, such as `"label:positive"`.
            neurons: Site -> neurons to test, such as a skill's; all by default. Fewer tests find smaller changes, but a
                skill that was chosen on the same texts is no fair choice: take one of others.

        Raises:
            ArgumentError: An unknown column, site or neuron.
        """
        first, at = self.scores[0], self._column(column)
        slices, widths = first.site_slices(), {site.name: site.width for site in first.sites}
        chosen = {name: np.arange(width) for name, width in widths.items()}
        if neurons is not None:
            chosen = {name: np.asarray(index, dtype=np.int64) for name, index in neurons.items()}
            for name, index in chosen.items():
                if name not in widths or (len(index) and not 0 <= index.min() <= index.max() < widths[name]):
                    raise ArgumentError(f"neurons: expected some of the traced ones, got others at {name}")
        rows = np.concatenate([slices[name].start + index for name, index in chosen.items()]).astype(np.int64)
        p = self.p[rows, at]
        return Changes(
            column=column,
            windows=self.windows,
            site=tuple(name for name, index in chosen.items() for _ in index),
            unit=np.concatenate(list(chosen.values())),
            r=np.stack([scores.statistic("pearson")[rows, at] for scores in self.scores], 1),
            q_statistic=self.q_statistic[rows, at],
            p=p,
            q=adjusted(p),
        )

    def overlap(self, column: str, top: int = 10) -> WindowOverlap:
        """How many of the best neurons by |r| every two windows share, beside what chance gives.

        Args:
            column: A metric's column.
            top: How many neurons of each window, of all sites together.

        Raises:
            ArgumentError: An unknown column, or more neurons than there are.
        """
        first, at = self.scores[0], self._column(column)
        if not 1 <= top <= first.n_neurons:
            raise ArgumentError(f"top: expected 1 to {first.n_neurons}, got {top}")
        sizes = [np.nan_to_num(np.abs(scores.statistic("pearson")[:, at]), nan=-1) for scores in self.scores]
        best = [np.argsort(-size, kind="stable")[:top] for size in sizes]
        slices, widths = first.site_slices().values(), [site.width for site in first.sites]
        per_site = [[int(((own >= s.start) & (own < s.stop)).sum()) for s in slices] for own in best]
        chance = [[shared_by_chance(a, b, widths) for b in per_site] for a in per_site]
        shared = np.array([[len(np.intersect1d(a, b)) for b in best] for a in best])
        return WindowOverlap(
            top=top,
            shared=shared,
            expected=np.array([[pair.mean for pair in row] for row in chance]),
            low=np.array([[pair.low for pair in row] for row in chance]),
            high=np.array([[pair.high for pair in row] for row in chance]),
            p=np.array(
                [[pair.p_of(n) for pair, n in zip(*row, strict=True)] for row in zip(chance, shared, strict=True)]
            ),
        )

    def _column(self, column: str) -> int:
        columns = self.scores[0].columns
        if column not in columns:
            raise ArgumentError(f"column: expected one of {', '.join(columns)}, got {column!r}")
        return columns.index(column)


def trace_windows(
    model: torch.nn.Module,
    loader: Iterable[Any],
    windows: Sequence[int] | Callable[[Any], torch.Tensor],
    metrics: Mapping[str, Metric] | Literal["classification"] = "classification",
    *,
    names: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
    pool: Pool = "mean",
    statistics: Sequence[str] = ("pearson",),
    bins: int = BINS,
    groups: int = GROUPS,
    classes: Sequence[str] | int | None = None,
    label_key: str | None = None,
    forward: Forward | None = None,
    mask: Callable[[Any], torch.Tensor | None] | None = None,
    quiet: bool = True,
) -> WindowScores:
    """Correlate neurons with metrics in each window of the texts, in one pass, and test whether it changes along them.

    A text's observation in a window is pooled over the window's tokens; a text without any is left out there. A metric
    that has a value per token counts with its mean over the window. Windows further on hold the longer texts alone.
    Every window has an accumulator and reads the activations once more.

    Args:
        model: In evaluation mode, on the device where it shall run.
        loader: Batches as `trace` takes them.
        windows: Places of the windows' first tokens among the real ones, such as (0, 16, 64), the last of which goes to
            the end; or `windows(batch) -> [batch, tokens]`, the number of each token's window, such as a conversation's
            turn, below 0 for none.
        metrics: What to correlate with, as `trace` takes it.
        names: Names of the windows; needed with a function, which then gives numbers of these.
        sites: Kinds or names of sites; None for every kind that the model has. A classifier that sees one row of an
            example sees it in every window.
        pool: `"mean"`, `"max"` or `"last"` over a window's tokens.
        statistics: Which statistics to compute, Pearson's r among them.
        bins: Bins per neuron for all but Pearson's r; 2 to 256.
        groups: Groups of texts that are left out in turn for the test: twice the windows at least. Each takes as much
            memory as a replicate of a bootstrap.
        classes: Class names for `"classification"`.
        label_key: Key of the labels in a batch that is a mapping.
        forward: `forward(model, batch) -> (output, {metric: values [batch] or [batch, tokens]})` for anything unusual.
        mask: `mask(batch) -> [batch, tokens]`, true for real tokens; by default a mapping's `attention_mask`, where
            `forward` is the default one.
        quiet: Show no progress bar.

    Returns:
        The scores of each window, and the test of each neuron and column.

    Raises:
        ArgumentError: Windows that are none, an unknown site, pool, statistic or metric, or a window without any token.
        ModelError: A model in training mode, prepared, or without known sites.
    """
    if pool not in _POOLS or "pearson" not in statistics:
        raise ArgumentError(
            f"trace_windows: expected a pool of {', '.join(_POOLS)} and the statistic pearson, got {pool!r} and "
            f"{', '.join(statistics)}"
        )
    split = _Windows(windows, names)
    if groups < 2 * len(split.names):
        raise ArgumentError(
            f"groups: expected at least twice the {len(split.names)} windows, got {groups}; {GROUPS} are usual"
        )
    if prepared(model) is not None:
        raise ArgumentError("trace_windows: expected a model that is not prepared, got one; take the original")
    planned = Pass.of(
        model, loader, metrics, sites=sites, pool=pool, bins=bins, classes=classes, label_key=label_key,
        forward=forward, mask=mask, windows=True,
    )  # fmt: skip
    tracers = [
        Tracer(
            planned.model, planned.metrics, sites=sites, pool=pool, statistics=statistics, bins=bins,
            n_bootstrap=groups,
        )
        for _ in split.names
    ]  # fmt: skip
    for tracer in tracers:
        for replicates, _ in tracer.replicated().values():
            replicates.leaves_out = True
    planned.count(tracers, _WindowCounter(tracers, planned, split), quiet=quiet)
    for name, tracer in zip(split.names, tracers, strict=True):
        if not tracer.n_observations:
            raise ArgumentError(f"windows: expected a text with tokens in each, got none in {name}; leave it out")
    scores = tuple(tracer.compute() for tracer in tracers)
    statistic, p = _tested(tracers, scores)
    return WindowScores(split.names, scores, statistic, p)


class _Windows:
    """Which window each token is in.

    Args:
        windows: Starts, or a function.
        names: Names of the windows.

    Raises:
        ArgumentError: Fewer than two windows, starts that do not rise, or names that are not as many.
    """

    def __init__(self, windows: Sequence[int] | Callable[[Any], torch.Tensor], names: Sequence[str] | None) -> None:
        self.of_batch = windows if callable(windows) else None
        self.starts = [] if callable(windows) else [int(start) for start in windows]
        if self.starts and (self.starts[0] < 0 or sorted(set(self.starts)) != self.starts):
            raise ArgumentError(f"windows: expected starts that rise from 0 or more, got {self.starts}")
        if names is None and self.starts:
            names = [f"tokens {a} to {b - 1}" for a, b in zip(self.starts, self.starts[1:], strict=False)]
            names = [*names, f"tokens from {self.starts[-1]}"]
        self.names = tuple(names or ())
        if len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise ArgumentError(f"windows: expected names of two or more, got {', '.join(self.names) or 'none'}")
        if self.starts and len(self.starts) != len(self.names):
            raise ArgumentError(f"names: expected one for each of {len(self.starts)} windows, got {len(self.names)}")

    def parts(self, batch: Any, mask: torch.Tensor | None) -> list[torch.Tensor]:
        """Bool [batch, tokens] of each window: its real tokens."""
        if self.of_batch is not None:
            number = torch.as_tensor(self.of_batch(batch))
            if mask is not None and number.shape != mask.shape:
                raise ArgumentError(
                    f"windows: expected a number for each of {list(mask.shape)} tokens, got {list(number.shape)}"
                )
            if int(number.max()) >= len(self.names):
                raise ArgumentError(
                    f"windows: expected numbers below {len(self.names)}, one per name, got {int(number.max())}"
                )
        elif mask is None:
            raise ArgumentError(
                "windows: expected batches with an attention_mask, which tells the real tokens, got one without; pass "
                "mask="
            )
        else:
            place = (mask != 0).long().cumsum(1) - 1
            number = torch.bucketize(place, torch.tensor(self.starts, device=place.device), right=True) - 1
        real = number >= 0 if mask is None else (mask != 0).to(number.device)
        return [(number == i) & real for i in range(len(self.names))]


class _WindowCounter:
    """Counts a batch in each window."""

    def __init__(self, tracers: Sequence[Tracer], planned: Pass, windows: _Windows) -> None:
        self.tracers = tracers
        self.planned = planned
        self.windows = windows
        self._seen = 0

    def count(self, batch: Any, valid: ValidRows | None = None) -> None:
        """Run and count one batch, of it the rows that are this process's own."""
        planned = self.planned
        parts = self.windows.parts(batch, None if planned.mask is None else planned.mask(batch))
        for tracer, part in zip(self.tracers, parts, strict=True):
            tracer.expect(part)
        values = {name: as_tensor(value) for name, value in run(planned, batch).items()}
        n = len(parts[0])
        rows = None if valid is None else valid.next(n)
        place = self._seen + torch.arange(n) if rows is None or rows.place is None else rows.place
        self._seen += n
        for tracer, part in zip(self.tracers, parts, strict=True):
            here = part.any(1).cpu()
            if rows is not None and rows.own is not None:
                here &= rows.own.cpu()
            if here.any():
                tracer.step(valid=here, groups=place, **self._of_window(values, part))
            else:
                tracer.discard()

    def _of_window(self, values: Mapping[str, torch.Tensor], part: torch.Tensor) -> dict[str, torch.Tensor]:
        """Values [batch] in a window, of those per token the mean over its tokens."""
        found = {}
        for name, value in values.items():
            if value.dim() < 2:
                found[name] = value
                continue
            if value.shape != part.shape or isinstance(self.planned.metrics.get(name), Categorical):
                raise ArgumentError(
                    f"metric {name!r}: expected a value per example, or numbers of the {list(part.shape)} tokens, got "
                    f"{list(value.shape)}; give each text its class"
                )
            here = part.to(value.device)
            found[name] = torch.where(here, value.double(), 0.0).sum(1) / here.sum(1)
        return found


def _tested(tracers: Sequence[Tracer], scores: Sequence[NeuronScores]) -> tuple[np.ndarray, np.ndarray]:
    """Cochran's Q and its p of every neuron and column."""
    replicated = [tracer.replicated() for tracer in tracers]
    statistic, p = (np.empty_like(scores[0].statistic("pearson")) for _ in range(2))
    for site, rows in scores[0].site_slices().items():
        sources = [of_window[site] for of_window in replicated]
        groups, columns = sources[0][0].sum_y.shape
        step = max(1, _SLICE // (groups * columns * len(sources)))
        for start in range(rows.start, rows.stop, step):
            part = slice(start, min(start + step, rows.stop))
            z = torch.stack([torch.from_numpy(one.statistic("pearson")[part]) for one in scores], -1)
            left = [
                replicates.pearson(slice(own.start + part.start - rows.start, own.start + part.stop - rows.start))
                for replicates, own in sources
            ]
            statistic[part], p[part] = heterogeneity(fisher_z(z), fisher_z(torch.stack(left, -1)).cpu())
    return statistic, p
