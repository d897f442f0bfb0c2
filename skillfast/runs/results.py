"""What an evaluation found, and its files."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from skillfast import __version__, files
from skillfast.results import records
from skillfast.results.evaluation import EvaluationEnvironment, EvaluationResults
from skillfast.skills.skill import Skill, save_skills

FILE = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    Attributes:
        results: The content of `evaluation.json`.
        skills: The skills that were chosen, from all layers at the largest size, which go to `skills.json`; none where
            they were loaded.
    """

    results: EvaluationResults
    skills: tuple[Skill, ...] = ()

    def save(self, directory: str | Path) -> Path:
        """Write `evaluation.json` into the folder, and `skills.json` where skills were chosen; returns the first."""
        path = files.output_folder(directory) / FILE
        if self.skills:
            save_skills(directory, self.skills)
        records.write(self.results, path)
        return path

    @staticmethod
    def load(directory: str | Path) -> Evaluation:
        """Read a folder's `evaluation.json`, without skills.

        Raises:
            DataError: A file that is missing, broken or of another version.
        """
        return Evaluation(records.read(EvaluationResults, Path(directory) / FILE, "write it with `skillfast evaluate`"))


def environment(device: torch.device) -> EvaluationEnvironment:
    """Versions and where it ran."""
    import sklearn

    return EvaluationEnvironment(
        skillfast=__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),
        numpy=np.__version__,
        scikit_learn=sklearn.__version__,
        platform=f"{platform.system()} {platform.machine()}",
        device=str(device),
    )
