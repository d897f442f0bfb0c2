"""`Skill`: a set of neurons; how two of them overlap, and skills.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from skillfast import files
from skillfast.errors import ArgumentError
from skillfast.results import records
from skillfast.results.skills import FILE, SkillEntry, Skills

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from skillfast.models.sites import Site


@dataclass(frozen=True)
class Skill:
    """A set of neurons; made by `select`, or by hand from a name and neurons.

    Attributes:
        name: The class or metric that the neurons carry.
        neurons: Site name -> int64 indices of neurons in that site, ascending, without repeats.
        metric: The column that chose them (`"label:deer"`), or None.
        method: How they were chosen, or None.
        settings: The settings of that method.
        fingerprint: Digest of the architecture that the neurons belong to, or None: any model that has them.
    """

    name: str
    neurons: Mapping[str, torch.Tensor]
    metric: str | None = None
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        neurons = {site: _indices(self.name, site, index) for site, index in self.neurons.items()}
        for site, index in neurons.items():
            if index.numel() and int(index[0]) < 0:
                raise ArgumentError(f"skill {self.name!r}: expected indices from 0 in {site}, got {int(index[0])}")
        object.__setattr__(self, "neurons", {site: index for site, index in neurons.items() if index.numel()})

    def __len__(self) -> int:
        """Number of neurons."""
        return sum(index.numel() for index in self.neurons.values())

    def entry(self) -> SkillEntry:
        """The skill as `skills.json` has it."""
        return SkillEntry(
            name=self.name,
            metric=self.metric,
            method=self.method,
            settings=dict(self.settings),
            neurons={site: index.tolist() for site, index in self.neurons.items()},
        )


def _indices(skill: str, site: str, index: Any) -> torch.Tensor:
    """Indices, or a bool mask over the site's neurons, as ascending int64 without repeats."""
    tensor = torch.as_tensor(index)
    if tensor.dtype == torch.bool:
        tensor = tensor.nonzero()[:, 0]
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
        raise ArgumentError(f"skill {skill!r}: expected whole numbers or a mask in {site}, got {tensor.dtype}")
    return tensor.to(torch.int64).unique()


def overlap(skills: Sequence[Skill]) -> np.ndarray:
    """Jaccard index of every pair's neurons, float64 [K, K]; 0 for two empty skills."""
    sets = [{(site, i) for site, index in skill.neurons.items() for i in index.tolist()} for skill in skills]
    return np.array([[len(a & b) / max(1, len(a | b)) for b in sets] for a in sets])


def random_skills(skill: Skill, sites: Sequence[Site], draws: int, rng: np.random.Generator) -> list[Skill]:
    """As many neurons of each site as the skill has there, drawn at random, `draws` times."""
    widths = {site.name: site.width for site in sites}
    return [
        Skill(
            name=f"random {i} for {skill.name}",
            neurons={
                name: torch.from_numpy(rng.choice(widths[name], size=len(index), replace=False))
                for name, index in skill.neurons.items()
            },
        )
        for i in range(draws)
    ]


def save_skills(directory: str | Path, skills: Iterable[Skill]) -> Path:
    """Write `skills.json` into the folder; returns its path."""
    path = files.output_folder(directory) / FILE
    skills = list(skills)
    fingerprints = {skill.fingerprint for skill in skills}
    if len(fingerprints) > 1:
        raise ArgumentError(f"skills: expected one model's, got fingerprints {sorted(map(str, fingerprints))}")
    records.write(Skills(next(iter(fingerprints), None), [skill.entry() for skill in skills]), path)
    return path


def load_skills(directory: str | Path) -> dict[str, Skill]:
    """Read a folder's `skills.json`, or that file; raises DataError where it is missing, broken or another version."""
    path = Path(directory)
    path = path if path.is_file() else path / FILE
    remedy = "write it with save_skills or `skillfast bench`"
    found = records.read(Skills, path, remedy)
    made = [Skill(**msgspec.structs.asdict(entry), fingerprint=found.fingerprint) for entry in found.skills]
    return {skill.name: skill for skill in made}
