"""Where a skill lives: Shapley values of its parts in each kind of site, and of its parts by block."""

from __future__ import annotations

from itertools import combinations
from math import factorial
from typing import TYPE_CHECKING

import numpy as np

from skillfast.evaluation.resampling import interval
from skillfast.results.bench import BlockShare, LayerContribution, ShareIntervals, Shares
from skillfast.vocabulary import KINDS, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skillfast.models.sites import Site
    from skillfast.skills.skill import Skill


def kinds_of(sites: Sequence[Site]) -> tuple[Kind, ...]:
    """The kinds that shares are taken over: those of the sites, in the order of `KINDS`."""
    return tuple(kind for kind in KINDS if any(site.kind == kind for site in sites))


def subsets(kinds: Sequence[Kind]) -> tuple[tuple[Kind, ...], ...]:
    """All sets of kinds but the empty one, the whole first."""
    return tuple(subset for size in range(len(kinds), 0, -1) for subset in combinations(kinds, size))


def shapley(values: np.ndarray, kinds: Sequence[Kind]) -> np.ndarray:
    """Shapley value of each kind: values [sets, ...] of `subsets` -> [kinds, ...]; the empty set is worth 0."""
    worth: dict[frozenset[Kind], np.ndarray] = dict(zip(map(frozenset, subsets(kinds)), values, strict=True))
    worth[frozenset()] = np.zeros_like(values[0])
    n = len(kinds)
    result = []
    for kind in kinds:
        share = np.zeros_like(values[0])
        for subset in worth:
            if kind not in subset:
                weight = factorial(len(subset)) * factorial(n - len(subset) - 1) / factorial(n)
                share = share + weight * (worth[subset | {kind}] - worth[subset])
        result.append(share)
    return np.stack(result)


def layer_contribution(
    drops: np.ndarray, resampled: np.ndarray, classes: Sequence[str], kinds: Sequence[Kind]
) -> LayerContribution:
    """Share of each kind in what a removal costs, all classes together and each; `per_block` is left out.

    Args:
        drops: float64 [sets, K], drop of each class's accuracy when its skill's neurons in a set of kinds go, in the
            order of `subsets`.
        resampled: float64 [sets, K, replicates].
        classes: Class names.
        kinds: What `kinds_of` gives; a kind that the model lacks has no share.
    """
    total = drops.mean(1)  # [sets]
    spread = resampled.mean(1)  # [sets, replicates]
    with np.errstate(divide="ignore", invalid="ignore"):
        spread_shares = shapley(spread, kinds) / spread[0]
        spread_rest = 1 - _alone(spread, kinds) / spread[0]
    shares = _shares(total, kinds)
    per_class = {name: Shares(**_shares(drops[:, i], kinds)) for i, name in enumerate(classes)}
    ci95 = {**dict.fromkeys(KINDS), **{kind: _ends(spread_shares[i], spread[0]) for i, kind in enumerate(kinds)}}
    return LayerContribution(
        **shares,  # type: ignore[arg-type]  # a field per kind
        non_additivity=float(1 - _alone(total, kinds) / total[0]) if total[0] > 0 else None,
        per_class=per_class,
        ci95=ShareIntervals(**ci95, non_additivity=_ends(spread_rest, spread[0])),
    )


def _alone(values: np.ndarray, kinds: Sequence[Kind]) -> np.ndarray:
    """Sum of what each kind is worth alone."""
    return sum((values[subsets(kinds).index((kind,))] for kind in kinds), np.zeros_like(values[0]))


def _shares(values: np.ndarray, kinds: Sequence[Kind]) -> dict[str, float | None]:
    """Share of each kind in the drop of the whole skill; None where nothing dropped or the model has none."""
    found: dict[str, float | None] = dict.fromkeys(KINDS)
    if values[0] > 0:
        found |= dict(zip(kinds, (shapley(values, kinds) / values[0]).tolist(), strict=True))
    return found


def occupied_blocks(skills: Sequence[Skill], sites: Sequence[Site]) -> list[int | None]:
    """Blocks in which any skill has neurons, in the order of the forward; None, the last, is the head."""
    blocks = {site.block for site in sites if any(site.name in skill.neurons for skill in skills)}
    return sorted(blocks, key=lambda block: (block is None, block))


def block_values(values: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each block adds, from the bottom up and from the top down.

    The mean of the two is the Shapley value over one order of the blocks and its reverse. Either order adds up to
    `whole`, so the mean does; it is the Shapley value over all orders where blocks interact in pairs at most, for each
    pair is met once in either order (antithetic sampling: Mitchell et al., Sampling Permutations for Shapley Value
    Estimation, JMLR 2022).

    Args:
        values: Worth [2 (blocks - 1), ...] of the sets of `block_conditions`.
        whole: Worth [...] of all blocks.

    Returns:
        Two arrays [blocks, ...] in the order of the blocks.
    """
    nothing = np.zeros_like(whole)[None]
    first, last = np.split(values, 2)
    bottom_up = np.diff(np.concatenate([nothing, first, whole[None]]), axis=0)
    top_down = np.diff(np.concatenate([nothing, last, whole[None]]), axis=0)[::-1]
    return bottom_up, top_down


def per_block(
    blocks: Sequence[int | None], drops: np.ndarray, resampled: np.ndarray, classes: Sequence[str]
) -> list[BlockShare]:
    """Each block's share of what the whole skill costs.

    Args:
        blocks: What `occupied_blocks` gives.
        drops: float64 [1 + 2 (blocks - 1), K], drop of each class's accuracy when its whole skill goes, then under each
            set of `block_conditions`.
        resampled: float64 [1 + 2 (blocks - 1), K, replicates].
        classes: Class names.

    Returns:
        Per block its share (they add up to 1), interval, the shares in either order and those of each class; None
        where nothing dropped. Empty where no skill has a neuron.
    """
    total, spread = drops.mean(1), resampled.mean(1)
    orders = [_share(values, total[0]) for values in block_values(total[1:], total[0])]
    by_class = [
        _share(np.mean(block_values(drops[1:, i], drops[0, i]), axis=0), drops[0, i]) for i in range(len(classes))
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.mean(block_values(spread[1:], spread[0]), axis=0) / spread[0]  # [blocks, replicates]
    shares = _share(np.mean(block_values(total[1:], total[0]), axis=0), total[0])
    return [
        BlockShare(
            block=block,
            share=shares[b],
            ci95=_ends(ends[b], spread[0]),
            bottom_up=orders[0][b],
            top_down=orders[1][b],
            per_class={name: row[b] for name, row in zip(classes, by_class, strict=True)},
        )
        for b, block in enumerate(blocks)
    ]


def _ends(shares: np.ndarray, whole: np.ndarray) -> list[float] | None:
    """95 % interval of resampled shares [replicates]; None where the whole [replicates] may be 0."""
    return interval(shares) if np.quantile(whole, 0.025) > 0 else None


def _share(values: np.ndarray, whole: float) -> list[float | None]:
    """Values [blocks] over that of the whole skill; None where nothing dropped."""
    return (values / whole).tolist() if whole > 0 else [None] * len(values)
