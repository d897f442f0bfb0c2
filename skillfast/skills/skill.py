"""Skills: sets of neurons chosen for one metric column."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast import files
from skillfast.errors import ArgumentError
from skillfast.skills.attribution import NeuronRanking
from skillfast.vocabulary import METHODS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from skillfast.statistics.scores import NeuronScores

SCHEMA = "skillfast.skills/1"
FILE = "skills.json"


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

    def to_json(self) -> dict[str, Any]:
        """One entry of skills.json."""
        return {
            "name": self.name,
            "metric": self.metric,
            "method": self.method,
            "settings": dict(self.settings),
            "neurons": {site: index.tolist() for site, index in self.neurons.items()},
        }


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


def save_skills(directory: str | Path, skills: Iterable[Skill]) -> Path:
    """Write `skills.json` into the folder; returns its path."""
    path = files.output_folder(directory) / FILE
    skills = list(skills)
    fingerprints = {skill.fingerprint for skill in skills}
    if len(fingerprints) > 1:
        raise ArgumentError(f"skills: expected one model's, got fingerprints {sorted(map(str, fingerprints))}")
    entries = [skill.to_json() for skill in skills]
    files.write_json(path, {"schema": SCHEMA, "fingerprint": next(iter(fingerprints), None), "skills": entries})
    return path


def load_skills(directory: str | Path) -> dict[str, Skill]:
    """Read a folder's `skills.json`, or that file; raises DataError where it is missing, broken or another version."""
    path = Path(directory)
    path = path if path.is_file() else path / FILE
    remedy = "write it with save_skills or `skillfast bench`"
    value = files.read_json(path, SCHEMA, remedy)
    with files.whole(path, remedy):
        skills = [Skill(**entry, fingerprint=value["fingerprint"]) for entry in value["skills"]]
    return {skill.name: skill for skill in skills}


def select(
    scores: NeuronScores | NeuronRanking,
    method: str | None = None,
    *,
    metric: str | None = None,
    share: float = 0.03,
    max_site_share: float = 0.25,
    signed: bool = True,
    contrastive: bool = False,
) -> dict[str, Skill]:
    """Choose the neurons that carry each metric column.

    Neurons are ranked by their score, best first; the best `share` of all is the skill, at most `max_site_share` of
    any site. Neurons without a score, and with `signed` those that go against the metric, are never chosen.

    Args:
        scores: What `trace`, `attribute` or `learn_masks` gives.
        method: What to rank by: of a trace a statistic, `"pearson"` (the default), `"spearman"`, `"auroc"` (from 0.5)
            or `"mutual_info"`; `"attribution"` or `"mask"` for what the other two give.
        metric: Only this metric's columns (`"label"`) or this column (`"label:deer"`); all by default.
        share: Share of all neurons in (0, 1].
        max_site_share: Largest share of one site's neurons in (0, 1].
        signed: Rank by the score itself; otherwise by its absolute value.
        contrastive: Rank by the score minus the best one that the neuron has on another column of the same metric; by
            the attribution minus the largest positive one.

    Returns:
        A skill per column, by class name for columns of a categorical metric, else by the metric's name; by the
        whole column where two columns would share a name.

    Raises:
        ArgumentError: A method that is not known or not in the scores, an unknown metric, a share out of range, scores
            without sites, or contrastive masks.
    """
    method = method or (scores.method if isinstance(scores, NeuronRanking) else "pearson")
    if method not in METHODS:
        raise ArgumentError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if method == "mask" and contrastive:
        raise ArgumentError("contrastive: expected False with learned masks, got True; they spare other classes anyway")
    for name, value in (("share", share), ("max_site_share", max_site_share)):
        if not 0 < value <= 1:
            raise ArgumentError(f"{name}: expected a share in (0, 1], got {value}")
    scores.statistic(method)
    if not scores.sites:
        raise ArgumentError("select: expected scores of a traced model, got scores without sites")
    columns = [column for column in scores.columns if metric in (None, column, column.partition(":")[0])]
    if not columns:
        raise ArgumentError(f"metric: expected one of {', '.join(scores.columns)}, got {metric!r}")
    settings = {
        "share": share, "max_site_share": max_site_share, "signed": signed, "contrastive": contrastive,
        **(scores.settings if isinstance(scores, NeuronRanking) else {}),
    }  # fmt: skip
    ranking = {column: _ranking(scores, method, column, signed, contrastive) for column in columns}
    chosen = {column: _best(scores, ranking[column], share, max_site_share) for column in columns}
    empty = [column for column, neurons in chosen.items() if not any(len(index) for index in neurons.values())]
    if empty:
        warnings.warn(
            f"no neuron was chosen for {', '.join(empty)}: none has a score above 0 within the shares",
            RuntimeWarning,
            stacklevel=2,
        )
    short = [column.partition(":")[2] or column for column in columns]
    names = short if len(set(short)) == len(short) else columns
    return {
        name: Skill(
            name=name,
            neurons=chosen[column],
            metric=column,
            method=method,
            settings=settings,
            fingerprint=scores.fingerprint,
        )
        for name, column in zip(names, columns, strict=True)
    }


def _ranking(
    scores: NeuronScores | NeuronRanking, method: str, column: str, signed: bool, contrastive: bool
) -> np.ndarray:
    """The value to rank by, float64 [n_neurons]; -inf for neurons that must not be chosen."""
    values = scores.statistic(method)
    if method == "mask":  # a strength's sign says nothing
        own = values[:, scores.columns.index(column)]
        return np.where(np.isnan(own), -np.inf, own)
    values = values - 0.5 if method == "auroc" else values  # what does not go with the class is 0
    values = values if signed else np.abs(values)
    own = values[:, scores.columns.index(column)]
    never = np.isnan(own) | (own <= 0)
    if contrastive:
        metric = column.partition(":")[0]
        others = [i for i, c in enumerate(scores.columns) if c != column and c.partition(":")[0] == metric]
        if others:
            best = np.nan_to_num(values[:, others], nan=-np.inf).max(1)
            own = own - (np.maximum(best, 0) if method == "attribution" else best)
    return np.where(never, -np.inf, own)


def _best(
    scores: NeuronScores | NeuronRanking, ranking: np.ndarray, share: float, max_site_share: float
) -> dict[str, torch.Tensor]:
    """The best neurons by site, no site giving more than its share."""
    allowed = np.zeros(scores.n_neurons, dtype=bool)
    slices = scores.site_slices()
    for site in scores.sites:
        rows = slices[site.name]
        most = int(max_site_share * site.width)
        best = np.argsort(-ranking[rows], kind="stable")[:most] + rows.start
        allowed[best] = True
    candidates = np.flatnonzero(allowed & np.isfinite(ranking))
    count = max(1, round(share * scores.n_neurons))
    chosen = np.zeros(scores.n_neurons, dtype=bool)
    chosen[candidates[np.argsort(-ranking[candidates], kind="stable")[:count]]] = True
    return {name: torch.from_numpy(np.flatnonzero(chosen[rows])) for name, rows in slices.items()}
