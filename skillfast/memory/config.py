"""The settings of `skillfast plan`; the command's options are made from their fields. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from skillfast.settings import Settings, setting
from skillfast.vocabulary import BINS, BITS, DTYPES, KINDS, METRICS, STATISTICS, TASKS, Task


@dataclass(frozen=True)
class PlanConfig(Settings):
    """How a model shall be traced."""

    task: Task = setting("own", "What the model is loaded for; own is what its configuration says.", choices=TASKS)  # noqa: RUF009
    sites: tuple[str, ...] = setting(KINDS, "Kinds or names of sites.", required=True)
    statistics: tuple[str, ...] = setting(STATISTICS, "What is computed.", choices=STATISTICS, required=True)
    bins: int = setting(BINS, "Bins per neuron for all but Pearson's r; fewer take less memory.", low=2, high=256)
    metrics: tuple[str, ...] = setting(METRICS, "What neurons are correlated with.", required=True)
    classes: int = setting(2, "Classes of the labels.", low=2)
    n_bootstrap: int | None = setting(None, "replicates of the bootstrap; none by default.", low=8)
    dtype: str = setting("bfloat16", "Of weights and activations.", choices=DTYPES)
    bits: int | None = setting(None, "Bits of quantised linear layers.", choices=BITS)
    batch_size: int = setting(8, "Examples per forward.", low=1)
    tokens: int = setting(512, "Tokens per example.", low=1)
    examples: int = setting(100_000, "Examples that are traced.", low=1)
    devices: int = setting(1, "Devices over which the blocks are spread.", low=1)
