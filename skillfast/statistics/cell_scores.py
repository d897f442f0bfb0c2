"""What a table of cells tells about ranks: pure functions, float64, on a slice of the neurons.

Shapes: d neurons, C cells, K columns. `occupancy` [d, C] is how many rows fell into each cell, `positives` [d, C, K]
how many of them have each label, `atomic` [d, C] which cells hold one value only. N rows in all.

The bounds are never broken, whatever the rows and their order: they follow from the table alone. Within a cell that
is not atomic the order of the rows is unknown, and nothing else is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

HATS = 8
UNIT = 256  # a row's hat weights sum to this
ROUNDING = 1e-12  # added to bounds: float64 rounding in them and in whatever they are compared with


@dataclass(frozen=True)
class CellRanks:
    """A neuron's ranks as far as the table knows them.

    Attributes:
        rank: [d, C], mean rank of each cell's rows, centred.
        between: [d], variance of the ranks between cells.
        hidden: [d], eta^2: the largest share of the ranks' variance that cells which are not atomic can hide.
    """

    rank: torch.Tensor
    between: torch.Tensor
    hidden: torch.Tensor


def cell_ranks(occupancy: torch.Tensor, atomic: torch.Tensor) -> CellRanks:
    """Mean ranks of the cells; eta^2 = within / (between + within), where `within` assumes no ties outside atoms."""
    n = occupancy.sum(1, keepdim=True)
    rank = occupancy.cumsum(1) - occupancy / 2 - n / 2  # before + (w + 1) / 2 - (N + 1) / 2
    between = (occupancy * rank.square()).sum(1) / n[:, 0]
    open_ = torch.where(atomic, 0.0, occupancy)
    within = (open_ * (open_.square() - 1).clamp_min(0)).sum(1) / (12 * n[:, 0])
    return CellRanks(rank, between, within / (between + within).clamp_min(torch.finfo(torch.float64).tiny))


def is_stale(hidden: torch.Tensor, cells: int) -> torch.Tensor:
    """Whether [d] the edges no longer divide the rows; they hide four times what even cells would."""
    return hidden.sqrt() > max(4 / cells, 0.02)


def is_constant(occupancy: torch.Tensor, atomic: torch.Tensor) -> torch.Tensor:
    """Whether [d] every row fell into one atomic cell."""
    return (occupancy.gt(0).sum(1) == 1) & ((occupancy > 0) & atomic).any(1)


def _bounded(
    rho: torch.Tensor, shift: torch.Tensor, ranks: CellRanks, constant: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate and bound [d, K]; `shift` is how far hidden order can move the estimate."""
    shrink = 1 - (1 - ranks.hidden).sqrt()
    bound = shrink[:, None] * rho.abs() + shift + ROUNDING
    bound = torch.minimum(bound, 1 + rho.abs())
    return rho.masked_fill(constant, torch.nan), bound.masked_fill(constant, torch.nan)


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), 0.0)


def spearman_labels(
    positives: torch.Tensor, occupancy: torch.Tensor, atomic: torch.Tensor, ranks: CellRanks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spearman's rho of each neuron with each 0/1 label, and how far off it can be.

    The hidden order moves Cov(rank, label) by at most eta sd(rank) sd(label) sqrt(1 - R^2) with R^2 the share of the
    label's variance between cells, and by at most sum a (w - a) / 2N over cells with `a` of `w` rows positive: all of
    a cell's positives on top. The smaller of the two counts.

    Returns:
        rho and bound, float64 [d, K]; NaN where the neuron or the label is constant.
    """
    n = occupancy.sum(1)[:, None]
    mean = positives.sum(1) / n  # [d, K]
    deviation = (mean * (1 - mean)).clamp_min(0).sqrt()
    covariance = torch.einsum("dc,dck->dk", ranks.rank, positives) / n
    scale = ranks.between.sqrt()[:, None] * deviation
    rho = _ratio(covariance, scale).clamp(-1, 1)
    cell_mean = _ratio(positives, occupancy[:, :, None])
    explained = (cell_mean * positives).sum(1) / n - mean.square()
    unexplained = (1 - _ratio(explained, deviation.square())).clamp(0, 1)
    negatives = occupancy[:, :, None] - positives
    sorted_ = (torch.where(atomic, 0.0, 0.5)[:, :, None] * positives * negatives).sum(1) / n
    # sd of the true ranks is at least sd between cells
    shift = torch.minimum(ranks.hidden.sqrt()[:, None] * unexplained.sqrt(), _shift(sorted_, scale))
    return _bounded(rho, shift, ranks, is_constant(occupancy, atomic)[:, None] | (deviation == 0))


def _shift(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), torch.inf)


@dataclass(frozen=True)
class RankFit:
    """A continuous metric's exact ranks, fitted onto its hat functions.

    Attributes:
        coefficients: [8], the fit is sum_j a_j h_j with hats that sum to 1.
        gram_inverse: [8, 8], pseudo-inverse of E[h h^T].
        deviation: sd of the ranks; 0 for a constant metric.
        residual: sd of what the fit leaves, over `deviation`.
        freedom: degrees of freedom of the soft levels, sum_j E[h_j^2] / E[h_j] - 1.
    """

    coefficients: torch.Tensor
    gram_inverse: torch.Tensor
    deviation: float
    residual: float
    freedom: float


def fit_ranks(ranks: torch.Tensor, hats: torch.Tensor) -> RankFit:
    """Least squares of centred average ranks [N] on hat weights [N, 8] (integers that sum to UNIT)."""
    weights = hats.double() / UNIT
    gram = weights.T @ weights / weights.shape[0]
    inverse = torch.linalg.pinv(gram, hermitian=True, rtol=1e-10)
    coefficients = inverse @ (weights.T @ ranks / weights.shape[0])
    deviation = float(ranks.square().mean().sqrt())
    residual = float((ranks - weights @ coefficients).square().mean().sqrt())
    mean = weights.mean(0)
    freedom = float(_ratio(gram.diagonal(), mean).sum()) - 1
    return RankFit(coefficients, inverse, deviation, residual / deviation if deviation else 0.0, freedom)


def spearman_continuous(
    sums: torch.Tensor, occupancy: torch.Tensor, atomic: torch.Tensor, ranks: CellRanks, fit: RankFit
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spearman's rho of each neuron with one continuous metric, and how far off it can be.

    `sums` [d, C, 8] are the cells' hat weights. What the fit leaves of the metric's ranks is orthogonal to the hats,
    so only the part of the neuron's ranks that is orthogonal to them too can go with it.

    Returns:
        rho and bound, float64 [d]; NaN where the neuron or the metric is constant.
    """
    n = occupancy.sum(1)
    with_hats = torch.einsum("dc,dcj->dj", ranks.rank, sums) / (UNIT * n[:, None])  # Cov(rank, h_j)
    scale = ranks.between.sqrt() * fit.deviation
    rho = _ratio(with_hats @ fit.coefficients, scale).clamp(-1, 1)
    projected = _ratio(torch.einsum("dj,jk,dk->d", with_hats, fit.gram_inverse, with_hats), ranks.between)
    fitted = sums @ fit.coefficients / UNIT  # [d, C], sum of the fitted ranks in each cell
    between = ((_ratio(fitted.square(), occupancy).sum(1) / n).sqrt() / max(fit.deviation, ROUNDING)).clamp(0, 1)
    unexplained = 1 - (between - fit.residual).clamp_min(0).square()
    shift = (
        (1 - ranks.hidden).sqrt() * fit.residual * (1 - projected).clamp(0, 1).sqrt()
        + ranks.hidden.sqrt() * unexplained.sqrt()
    )  # fmt: skip
    constant = is_constant(occupancy, atomic) | (fit.deviation == 0)
    rho, bound = _bounded(rho[:, None], shift[:, None], ranks, constant[:, None])
    return rho[:, 0], bound[:, 0]


def auroc(positives: torch.Tensor, occupancy: torch.Tensor, atomic: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Area under the ROC curve of each neuron as a score for each label, ties counted half, and how far off it can be.

    Within a cell that is not atomic any share of the pairs of a positive and a negative can be in order: the bound is
    half of all such pairs.

    Returns:
        AUROC and bound, float64 [d, K]; NaN where the neuron is constant or a label has one value.
    """
    negatives = occupancy[:, :, None] - positives
    below = negatives.cumsum(1) - negatives
    pairs = positives.sum(1) * negatives.sum(1)
    together = positives * negatives / 2  # half the pairs of each cell
    area = _ratio((positives * below + together).sum(1), pairs)
    bound = _ratio(torch.where(atomic[:, :, None], 0.0, together).sum(1), pairs) + ROUNDING
    undefined = is_constant(occupancy, atomic)[:, None] | (pairs == 0)
    return area.masked_fill(undefined, torch.nan), bound.masked_fill(undefined, torch.nan)


def merge_cells(joint: torch.Tensor, classes: int) -> torch.Tensor:
    """Merges neighbouring cells of [d, C, K] until about 10 rows per class fall into each.

    The rows' ranks are divided into N / (10 classes) even groups; cells whose middles fall into one group are merged,
    so there are at most that many. With two levels there are also at most as many as the rarer one has rows (2 at
    least): Miller and Madow's correction would leave most of the bias of a rare label spread over more.

    Returns:
        float64 [d, C, K], the merged cells first, then empty ones.
    """
    occupancy = joint.sum(2)
    n = occupancy.sum(1)
    wanted = n / (10 * classes)
    if joint.shape[2] == 2:
        wanted = torch.minimum(wanted, joint.sum(1).amin(1).clamp_min(2))
    wanted = wanted.floor().clamp_min(1)[:, None]
    middle = (occupancy.cumsum(1) - occupancy / 2) / n[:, None]
    group = torch.minimum((middle * wanted).floor(), wanted - 1)
    place = torch.zeros_like(group, dtype=torch.int64)
    place[:, 1:] = (group[:, 1:] > group[:, :-1]).cumsum(1)
    return torch.zeros_like(joint).scatter_add_(1, place[:, :, None].expand_as(joint), joint)


def mutual_information(joint: torch.Tensor, freedom: float | None = None) -> torch.Tensor:
    """Mutual information of each neuron's cells with a variable of K levels, in nats.

    Plug-in estimate on cells merged by `merge_cells`, Miller and Madow's correction, clipped to [0, H(levels)].

    Args:
        joint: float64 [d, C, K], rows of each cell and level.
        freedom: Degrees of freedom of the levels, for soft ones whose rows are divided among several; None: counts,
            for which the correction counts the occupied places.

    Returns:
        float64 [d].
    """
    merged = merge_cells(joint, joint.shape[2])
    cells, levels = merged.sum(2), merged.sum(1)
    n = cells.sum(1)

    def entropy(counts: torch.Tensor) -> torch.Tensor:  # [d, places]
        p = counts / n[:, None]
        return -torch.special.xlogy(p, p).sum(1)

    plugin = entropy(cells) + entropy(levels) - entropy(merged.flatten(1))
    rows, columns = cells.gt(0).sum(1), levels.gt(0).sum(1)
    occupied = merged.flatten(1).gt(0).sum(1)
    excess = occupied - rows - columns + 1 if freedom is None else (rows - 1) * freedom
    return torch.minimum((plugin - excess / (2 * n)).clamp_min(0), entropy(levels))
