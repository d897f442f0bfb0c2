"""What every measure of an evaluation is put into: values that may not be defined, and their spread over draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from skillfast.results.evaluation import RandomDraws, Spread

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from skillfast.results.evaluation import Measured, Values


def finite(values: Mapping[str, float]) -> Values:
    """The values, with None for what is NaN or infinite."""
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}


def random_draws(controls: Sequence[Measured]) -> RandomDraws:
    """Mean, smallest and largest value and change of each measure over random draws, one or more."""
    return RandomDraws(
        draws=len(controls),
        values=_spreads([control.values for control in controls]),
        change=_spreads([control.change for control in controls]),
    )


def _spreads(rows: Sequence[Values]) -> dict[str, Spread]:
    return {name: _spread([row[name] for row in rows]) for name in rows[0]}


def _spread(drawn: Sequence[float | None]) -> Spread:
    """All None where a draw's value is not defined."""
    if None in drawn:
        return Spread(None, None, None)
    return Spread(float(np.mean(drawn)), float(np.min(drawn)), float(np.max(drawn)))  # type: ignore[arg-type]
