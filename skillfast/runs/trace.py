"""`skillfast trace`: a run that does nothing but trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skillfast.runs.session import open_session

if TYPE_CHECKING:
    from collections.abc import Callable

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
