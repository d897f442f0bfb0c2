"""skillfast: find, remove and measure the skills inside trained transformers, without storing activations."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Public name -> module; imported on first use, so that `import skillfast` costs nothing.
_PUBLIC = {
    "Binary": "metrics",
    "Categorical": "metrics",
    "Continuous": "metrics",
    "NeuronScores": "statistics.scores",
    "NeuronStatistics": "statistics.accumulator",
    "Tracer": "tracing.tracer",
    "Monitor": "tracing.monitor",
    "prepare": "tracing.prepared",
    "correlate": "tracing.trace",
    "trace": "tracing.trace",
    "WindowScores": "tracing.windows",
    "trace_windows": "tracing.windows",
    "NeuronRanking": "skills.ranking",
    "attribute": "skills.attribution",
    "learn_masks": "skills.learned_mask",
    "Skill": "skills.skill",
    "load_skills": "skills.skill",
    "save_skills": "skills.skill",
    "skill_parameters": "skills.tuning",
    "tune_only": "skills.tuning",
    "select": "skills.select",
    "Condition": "ablation.interventions",
    "DonorBank": "ablation.donors",
    "SweepResult": "ablation.sweep",
    "ablate": "ablation.interventions",
    "export": "ablation.export",
    "knobs": "ablation.knobs",
    "donors": "ablation.donors",
    "sweep": "ablation.sweep",
    "BenchConfig": "runs.config",
    "bench": "runs.bench",
    "Comparison": "results.comparison",
    "compare": "runs.compare",
    "Trajectory": "results.trajectory",
    "trajectory": "runs.trajectory",
    "Grid": "runs.config",
    "Evaluation": "runs.evaluate",
    "evaluate": "runs.evaluate",
    "Coverage": "models.coverage",
    "coverage": "models.coverage",
    "discover": "models.discovery",
    "SoftPrompt": "models.soft_prompt",
    "tune_prompt": "models.prompt_tuning",
    "SkillfastError": "errors",
    "use_backend": "backends",
}

if TYPE_CHECKING:
    from skillfast.ablation.donors import DonorBank as DonorBank
    from skillfast.ablation.donors import donors as donors
    from skillfast.ablation.export import export as export
    from skillfast.ablation.interventions import Condition as Condition
    from skillfast.ablation.interventions import ablate as ablate
    from skillfast.ablation.knobs import knobs as knobs
    from skillfast.ablation.sweep import SweepResult as SweepResult
    from skillfast.ablation.sweep import sweep as sweep
    from skillfast.backends import use_backend as use_backend
    from skillfast.errors import SkillfastError as SkillfastError
    from skillfast.metrics import Binary as Binary
    from skillfast.metrics import Categorical as Categorical
    from skillfast.metrics import Continuous as Continuous
    from skillfast.models.coverage import Coverage as Coverage
    from skillfast.models.coverage import coverage as coverage
    from skillfast.models.discovery import discover as discover
    from skillfast.models.prompt_tuning import tune_prompt as tune_prompt
    from skillfast.models.soft_prompt import SoftPrompt as SoftPrompt
    from skillfast.results.comparison import Comparison as Comparison
    from skillfast.results.trajectory import Trajectory as Trajectory
    from skillfast.runs.bench import bench as bench
    from skillfast.runs.compare import compare as compare
    from skillfast.runs.config import BenchConfig as BenchConfig
    from skillfast.runs.config import Grid as Grid
    from skillfast.runs.evaluate import Evaluation as Evaluation
    from skillfast.runs.evaluate import evaluate as evaluate
    from skillfast.runs.trajectory import trajectory as trajectory
    from skillfast.skills.attribution import attribute as attribute
    from skillfast.skills.learned_mask import learn_masks as learn_masks
    from skillfast.skills.ranking import NeuronRanking as NeuronRanking
    from skillfast.skills.select import select as select
    from skillfast.skills.skill import Skill as Skill
    from skillfast.skills.skill import load_skills as load_skills
    from skillfast.skills.skill import save_skills as save_skills
    from skillfast.skills.tuning import skill_parameters as skill_parameters
    from skillfast.skills.tuning import tune_only as tune_only
    from skillfast.statistics.accumulator import NeuronStatistics as NeuronStatistics
    from skillfast.statistics.scores import NeuronScores as NeuronScores
    from skillfast.tracing.monitor import Monitor as Monitor
    from skillfast.tracing.prepared import prepare as prepare
    from skillfast.tracing.trace import correlate as correlate
    from skillfast.tracing.trace import trace as trace
    from skillfast.tracing.tracer import Tracer as Tracer
    from skillfast.tracing.windows import WindowScores as WindowScores
    from skillfast.tracing.windows import trace_windows as trace_windows

__all__ = ["__version__", *sorted(_PUBLIC)]


if not TYPE_CHECKING:  # a type checker shall refuse names that are not there

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'skillfast' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"skillfast.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return list(__all__)
