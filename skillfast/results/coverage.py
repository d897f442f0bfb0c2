"""What a model's sites cover, as every result says it."""

from __future__ import annotations

from skillfast.results.records import Fraction, Name, Record


class ModelCoverage(Record, frozen=True):
    """Which of the blocks' weights act through the sites alone.

    Attributes:
        share: Share of the blocks' weights that act through sites alone.
        complete: Whether all weights of the blocks do.
        missing: Module -> share of the blocks' weights, of matrices that act past the sites.
        unexercised: Module -> share, of matrices that had no effect in the intact model either.
        inputs: What the model was run on.
    """

    share: Fraction
    complete: bool
    missing: dict[str, Fraction]
    unexercised: dict[str, Fraction]
    inputs: Name
