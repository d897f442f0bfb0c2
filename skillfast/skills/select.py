"""`select`: cut a ranking of neurons into the sets that are skills."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from skillfast.errors import ArgumentError
from skillfast.skills.ranking import ranking_of
from skillfast.skills.skill import Skill
from skillfast.vocabulary import LEARNED, MAX_SITE_SHARE, METHODS, SHARE

if TYPE_CHECKING:
    from skillfast.skills.ranking import NeuronRanking
    from skillfast.statistics.scores import NeuronScores


def select(
    scores: NeuronScores | NeuronRanking,
    method: str | None = None,
    *,
    metric: str | None = None,
    share: float = SHARE,
    max_site_share: float = MAX_SITE_SHARE,
    signed: bool = True,
    contrastive: bool = False,
) -> dict[str, Skill]:
    """Choose the neurons that carry each metric column.

    Neurons are ranked by their score, best first; the best `share` of all is the skill, at most `max_site_share` of
    any site. Neurons without a score, and with `signed` those that go against the metric, are never chosen.

    Args:
        scores: What `trace`, `attribute` or `learn_masks` gives.
        method: What to rank by: of a trace a statistic, `"pearson"` (the default), `"spearman"`, `"auroc"` (from 0.5)
            or `"mutual_info"`; `"attribution"`, `"mask"` or `"erase"` (learned with `erase=`) for what the other two
            give.
        metric: Only this metric's columns (`"label"`) or this column (`"label:deer"`); all by default.
        share: Share of all neurons in (0, 1], rounded down to whole neurons, but to one at least.
        max_site_share: Largest share of one site's neurons in (0, 1], rounded down.
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
    if method is not None and method not in METHODS:
        raise ArgumentError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    ranking = ranking_of(scores, method)
    if ranking.method in LEARNED and contrastive:
        raise ArgumentError("contrastive: expected False with learned masks, got True; they spare other classes anyway")
    for name, value in (("share", share), ("max_site_share", max_site_share)):
        if not 0 < value <= 1:
            raise ArgumentError(f"{name}: expected a share in (0, 1], got {value}")
    if not ranking.sites:
        raise ArgumentError("select: expected scores of a traced model, got scores without sites")
    columns = [column for column in ranking.columns if metric in (None, column, column.partition(":")[0])]
    if not columns:
        raise ArgumentError(f"metric: expected one of {', '.join(ranking.columns)}, got {metric!r}")
    settings = {
        "share": share, "max_site_share": max_site_share, "signed": signed, "contrastive": contrastive,
        **ranking.settings,
    }  # fmt: skip
    chosen = {
        column: _best(ranking, _preference(ranking, column, signed, contrastive), share, max_site_share)
        for column in columns
    }
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
            method=ranking.method,
            settings=settings,
            fingerprint=ranking.fingerprint,
        )
        for name, column in zip(names, columns, strict=True)
    }


def at_most(share: float, n: int) -> int:
    """How many of n neurons a share allows: rounded down, but for the rounding of the product itself."""
    return math.floor(share * n + 1e-9)


def skill_size(share: float, n_neurons: int) -> int:
    """How many neurons a skill takes that may have this share of all of them: at least one."""
    return max(1, at_most(share, n_neurons))


def _preference(ranking: NeuronRanking, column: str, signed: bool, contrastive: bool) -> np.ndarray:
    """What neurons are chosen by for one column, float64 [n_neurons]; -inf for those that must not be chosen."""
    values, method = ranking.values, ranking.method
    if method in LEARNED:  # a strength's sign says nothing
        own = values[:, ranking.columns.index(column)]
        return np.where(np.isnan(own), -np.inf, own)
    values = values - 0.5 if method == "auroc" else values  # what does not go with the class is 0
    values = values if signed else np.abs(values)
    own = values[:, ranking.columns.index(column)]
    never = np.isnan(own) | (own <= 0)
    if contrastive:
        metric = column.partition(":")[0]
        others = [i for i, c in enumerate(ranking.columns) if c != column and c.partition(":")[0] == metric]
        if others:
            best = np.nan_to_num(values[:, others], nan=-np.inf).max(1)
            own = own - (np.maximum(best, 0) if method == "attribution" else best)
    return np.where(never, -np.inf, own)


def _best(
    ranking: NeuronRanking, preference: np.ndarray, share: float, max_site_share: float
) -> dict[str, torch.Tensor]:
    """The best neurons by site, no site giving more than its share."""
    allowed = np.zeros(ranking.n_neurons, dtype=bool)
    slices = ranking.site_slices()
    for site in ranking.sites:
        rows = slices[site.name]
        most = at_most(max_site_share, site.width)
        best = np.argsort(-preference[rows], kind="stable")[:most] + rows.start
        allowed[best] = True
    candidates = np.flatnonzero(allowed & np.isfinite(preference))
    count = skill_size(share, ranking.n_neurons)
    chosen = np.zeros(ranking.n_neurons, dtype=bool)
    chosen[candidates[np.argsort(-preference[candidates], kind="stable")[:count]]] = True
    return {name: torch.from_numpy(np.flatnonzero(chosen[rows])) for name, rows in slices.items()}
