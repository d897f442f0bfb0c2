"""`skillfast trace`: a run that does nothing but trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skillfast.errors import ArgumentError
from skillfast.metrics import COLUMN
from skillfast.runs.session import open_session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from skillfast.runs.config import BenchConfig
    from skillfast.statistics.scores import NeuronScores


def traced(config: BenchConfig, *, quiet: bool = True, say: Callable[[str], None] = lambda _: None) -> NeuronScores:
    """Trace the select part.

    Args:
        config: Model, data, and what to trace.
        quiet: Show no progress bars.
        say: Called with each line worth reading.

    Raises:
        SkillfastError: Anything that stops the run, in one line.
    """
    with open_session(config, quiet=quiet, say=say) as session:
        return session.stage("trace", lambda: session.trace("select"))


def check_given(config: BenchConfig, names: Sequence[str]) -> None:
    """Raise ArgumentError where partial correlations given these metrics will not be there."""
    traced_metrics, fixed = ([name.removeprefix(COLUMN) for name in some] for some in (config.trace.metrics, names))
    if names and (not set(fixed) < set(traced_metrics) or "pearson" not in config.trace.statistics):
        raise ArgumentError(
            f"given: expected some of {', '.join(traced_metrics)} and not all, with the statistic pearson, got "
            f"{', '.join(fixed)}; add to --metrics or --statistics"
        )


def of_given(scores: NeuronScores, names: Sequence[str]) -> NeuronScores:
    """Scores given metrics by the names of `--given`, or as they are without any."""
    return scores.given(*(name.removeprefix(COLUMN) for name in names)) if names else scores
