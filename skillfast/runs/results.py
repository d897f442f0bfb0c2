"""What an evaluation found, and its file `evaluation.json`."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast import __version__, files
from skillfast.skills.skill import Skill, save_skills

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from skillfast.evaluation.grid import Case

SCHEMA = "skillfast.evaluation/1"
FILE = "evaluation.json"

Values = dict[str, float | None]
Intervals = dict[str, list[float] | None]


@dataclass(frozen=True)
class Measured:
    """Measures under one intervention.

    Attributes:
        values: Measure -> value; None where it is not defined.
        change: `value` minus the intact model's, per measure.
        ci95: 95 % bootstrap interval of each value; None where there is none.
        change_ci95: 95 % interval of each change, the same resampled examples on both sides.
    """

    values: Values
    change: Values
    ci95: Intervals
    change_ci95: Intervals


@dataclass(frozen=True)
class Outcome:
    """What one skill at one size, in some layers and scaled by one factor does.

    Attributes:
        skill: Name of its class or metric.
        metric: The column that chose it, or None.
        share: Size of the skill as a share of all neurons, as asked for.
        layers: `"all"`, `"head"` or a block.
        scale: Factor on its activations; 0 removes.
        neurons: How many it has.
        measured: What the skill's intervention gives.
        random: Results of as many random neurons per site under the same factor: `draws`, and the mean, smallest and
            largest value and change of each measure.
    """

    skill: str
    metric: str | None
    share: float
    layers: str
    scale: float
    neurons: int
    measured: Measured
    random: dict[str, Any]

    @staticmethod
    def of(case: Case, scale: float, own: Measured, controls: Sequence[Measured]) -> Outcome:
        """From the measures of a case's skill and of its random controls."""
        skill = case.skill
        return Outcome(skill.name, skill.metric, case.share, case.layers, scale, len(skill), own, summary(controls))


def summary(controls: Sequence[Measured]) -> dict[str, Any]:
    """Mean, smallest and largest over random draws; None where a draw's is not defined."""
    found: dict[str, Any] = {"draws": len(controls)}
    for kind in ("values", "change"):
        rows = [getattr(control, kind) for control in controls]
        found[kind] = {}
        for name in rows[0]:
            drawn = [row[name] for row in rows]
            known = None not in drawn
            found[kind][name] = {
                "mean": float(np.mean(drawn)) if known else None,
                "low": float(np.min(drawn)) if known else None,
                "high": float(np.max(drawn)) if known else None,
            }
    return found


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    Attributes:
        task: `"classification"` or `"causal"`.
        measures: Names of what was measured.
        intact: Results of the intact model: `values` and `ci95` per measure, and `per_class` for a classifier.
        outcomes: One per skill, size, layers and factor.
        model: Name, fingerprint, neurons and sites.
        data: Name, classes, and how many examples skills were chosen and measured on.
        config: The settings.
        environment: Versions and device.
        tasks: What `skillfast.evaluation.tasks` found, where several tasks were compared.
        skills: The skills that were chosen, from all layers at the largest size, which go to `skills.json`; none where
            they were loaded.
    """

    task: str
    measures: tuple[str, ...]
    intact: dict[str, Any]
    outcomes: tuple[Outcome, ...]
    model: dict[str, Any]
    data: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any]
    tasks: dict[str, Any] | None = None
    skills: tuple[Skill, ...] = field(default=(), compare=False)

    def to_json(self) -> dict[str, Any]:
        """The content of evaluation.json."""
        found = {"schema": SCHEMA, **asdict(replace(self, skills=()))}
        del found["skills"]
        found["measures"] = list(self.measures)
        found["outcomes"] = [
            {**{k: v for k, v in o.items() if k != "measured"}, **o["measured"]} for o in found["outcomes"]
        ]
        if self.tasks is None:
            del found["tasks"]
        return found

    def save(self, directory: str | Path) -> Path:
        """Write `evaluation.json` into the folder, and `skills.json` where skills were chosen; returns the first."""
        path = files.output_folder(directory) / FILE
        if self.skills:
            save_skills(directory, self.skills)
        files.write_json(path, self.to_json())
        return path

    @staticmethod
    def load(directory: str | Path) -> Evaluation:
        """Read a folder's `evaluation.json`, without skills.

        Raises:
            DataError: A file that is missing, broken or of another version.
        """
        path, remedy = Path(directory) / FILE, "write it with `skillfast evaluate`"
        found = files.read_json(path, SCHEMA, remedy)
        with files.whole(path, remedy):
            parts = ("values", "change", "ci95", "change_ci95")
            outcomes = tuple(
                Outcome(
                    **{name: value for name, value in entry.items() if name not in parts},
                    measured=Measured(**{name: entry[name] for name in parts}),
                )
                for entry in found["outcomes"]
            )
            rest = {name: value for name, value in found.items() if name not in ("schema", "measures", "outcomes")}
            return Evaluation(measures=tuple(found["measures"]), outcomes=outcomes, **rest)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and where it ran."""
    import sklearn

    return {
        "skillfast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(device),
    }


def finite(values: Mapping[str, float]) -> Values:
    """Numbers as JSON has them: None for what is not finite."""
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}
