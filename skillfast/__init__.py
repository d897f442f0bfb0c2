"""skillfast: find, remove and measure the skills inside trained transformers, without storing activations."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module; imported on first use, so that `import skillfast` costs nothing.
_PUBLIC = {
    "Binary": "metrics",
    "Categorical": "metrics",
    "Continuous": "metrics",
    "NeuronScores": "statistics.neuron_scores",
    "NeuronStatistics": "statistics.neuron_statistics",
    "Tracer": "tracer",
    "correlate": "tracing",
    "trace": "tracing",
    "NeuronRanking": "attribution",
    "attribute": "attribution",
    "learn_masks": "learned_mask",
    "Skill": "skills",
    "load_skills": "skills",
    "save_skills": "skills",
    "select": "skills",
    "Condition": "ablation",
    "SweepResult": "ablation",
    "ablate": "ablation",
    "sweep": "ablation",
    "BenchConfig": "benchmark.config",
    "bench": "benchmark.protocol",
    "Grid": "benchmark.grid",
    "Validation": "benchmark.outcomes",
    "validate": "benchmark.validation",
    "SkillfastError": "errors",
    "use_backend": "backends",
}

if TYPE_CHECKING:
    from skillfast.ablation import Condition as Condition
    from skillfast.ablation import SweepResult as SweepResult
    from skillfast.ablation import ablate as ablate
    from skillfast.ablation import sweep as sweep
    from skillfast.attribution import NeuronRanking as NeuronRanking
    from skillfast.attribution import attribute as attribute
    from skillfast.backends import use_backend as use_backend
    from skillfast.benchmark.config import BenchConfig as BenchConfig
    from skillfast.benchmark.grid import Grid as Grid
    from skillfast.benchmark.outcomes import Validation as Validation
    from skillfast.benchmark.protocol import bench as bench
    from skillfast.benchmark.validation import validate as validate
    from skillfast.errors import SkillfastError as SkillfastError
    from skillfast.learned_mask import learn_masks as learn_masks
    from skillfast.metrics import Binary as Binary
    from skillfast.metrics import Categorical as Categorical
    from skillfast.metrics import Continuous as Continuous
    from skillfast.skills import Skill as Skill
    from skillfast.skills import load_skills as load_skills
    from skillfast.skills import save_skills as save_skills
    from skillfast.skills import select as select
    from skillfast.statistics.neuron_scores import NeuronScores as NeuronScores
    from skillfast.statistics.neuron_statistics import NeuronStatistics as NeuronStatistics
    from skillfast.tracer import Tracer as Tracer
    from skillfast.tracing import correlate as correlate
    from skillfast.tracing import trace as trace

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'skillfast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"skillfast.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
