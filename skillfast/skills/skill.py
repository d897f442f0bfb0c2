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
from skillfast.results.skills import FILE, MOST, SkillEntry, Skills

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from skillfast.models.sites import Site

NEAR = 8  # places up or down in the order of mean activation from which a matched neuron is drawn


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
        knob: Factor on the neurons' activations that `knobs` starts at, and `export --knobs` bakes; 1 changes nothing.
    """

    name: str
    neurons: Mapping[str, torch.Tensor]
    metric: str | None = None
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    knob: float = 1.0

    def __post_init__(self) -> None:
        neurons = {site: _indices(self.name, site, index) for site, index in self.neurons.items()}
        for site, index in neurons.items():
            if index.numel() and int(index[0]) < 0:
                raise ArgumentError(f"skill {self.name!r}: expected indices from 0 in {site}, got {int(index[0])}")
        if not isinstance(self.knob, int | float) or not abs(self.knob) <= MOST:
            raise ArgumentError(f"skill {self.name!r}: expected a finite knob, got {self.knob}; 0 removes, 2 doubles")
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
            knob=None if self.knob == 1 else float(self.knob),
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
    """As many other neurons of each site as the skill has there, drawn at random, `draws` times.

    Of a site that has too few others all are taken, and the rest are neurons of the skill.
    """
    widths = {site.name: site.width for site in sites}

    def drawn(width: int, own: np.ndarray) -> np.ndarray:
        others = np.setdiff1d(np.arange(width), own)
        count = min(len(own), len(others))
        few = rng.choice(own, size=len(own) - count, replace=False)
        return np.concatenate([rng.choice(others, size=count, replace=False), few])

    return [
        Skill(
            name=f"random {i} for {skill.name}",
            neurons={
                name: torch.from_numpy(drawn(widths[name], index.numpy())) for name, index in skill.neurons.items()
            },
        )
        for i in range(draws)
    ]


def matched_skills(skill: Skill, means: Mapping[str, np.ndarray], draws: int, rng: np.random.Generator) -> list[Skill]:
    """As many other neurons of each site, each about as active as one of the skill's, drawn `draws` times.

    For a neuron of the skill one is drawn among the `2 NEAR + 1` others whose mean activations are nearest in size; the
    nearest free one where that is taken. Of a site that has too few others all are taken.

    Args:
        skill: The skill.
        means: Site -> float [width], mean activation of every neuron.
        draws: How often.
        rng: Draws.
    """
    return [
        Skill(
            name=f"matched {i} for {skill.name}",
            neurons={name: _matched(np.abs(means[name]), index.numpy(), rng) for name, index in skill.neurons.items()},
        )
        for i in range(draws)
    ]


def _matched(size: np.ndarray, own: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    others = np.setdiff1d(np.arange(len(size)), own)
    others = others[np.argsort(size[others], kind="stable")]
    wanted = np.searchsorted(size[others], size[own]) + rng.integers(-NEAR, NEAR + 1, len(own))
    free, chosen = set(range(len(others))), []
    for place in rng.permutation(wanted)[: len(others)].tolist():
        near = next(p for step in range(len(size) + NEAR + 1) for p in (place - step, place + step) if p in free)
        free.remove(near)
        chosen.append(near)
    return torch.from_numpy(others[chosen])


def save_skills(directory: str | Path, skills: Iterable[Skill]) -> Path:
    """Write `skills.json` into the folder; returns its path."""
    path = files.output_folder(directory) / FILE
    skills = list(skills)
    fingerprints = {skill.fingerprint for skill in skills}
    if len(fingerprints) > 1:
        raise ArgumentError(f"skills: expected one model's, got fingerprints {sorted(map(str, fingerprints))}")
    records.write(Skills(next(iter(fingerprints), None), [skill.entry() for skill in skills]), path)
    return path


def load_skills(directory: str | Path, names: Iterable[str] = ()) -> dict[str, Skill]:
    """Read a folder's `skills.json`, or that file.

    Args:
        directory: The folder, or the file.
        names: Skills to take, in this order; all by default.

    Raises:
        ArgumentError: A name that no skill has.
        DataError: A file that is missing, broken or of another version.
    """
    path = Path(directory)
    path = path if path.is_file() else path / FILE
    remedy = "write it with save_skills or `skillfast bench`"
    found = records.read(Skills, path, remedy)
    made = [
        Skill(
            **{name: value for name, value in msgspec.structs.asdict(entry).items() if name != "knob"},
            fingerprint=found.fingerprint,
            knob=1.0 if entry.knob is None else entry.knob,
        )
        for entry in found.skills
    ]
    skills = {skill.name: skill for skill in made}
    names = list(names)
    if unknown := [name for name in names if name not in skills]:
        raise ArgumentError(
            f"skill: expected some of {', '.join(skills)}, got {', '.join(unknown)}; {path} has no others"
        )
    return {name: skills[name] for name in names} if names else skills
