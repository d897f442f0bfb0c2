"""What a table of bins tells about ranks: pure functions, float64, on a slice of the neurons.

Shapes: d neurons, C bins, K columns. `occupancy` [d, C] is how many rows fell into each bin, `positives` [d, C, K]
how many of them have each label, `atomic` [d, C] which bins hold one value only. N rows in all.

The bounds are never broken, whatever the rows and their order: they follow from the table alone. Within a bin that
is not atomic the order of the rows is unknown, and nothing else is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy import stats

from skillfast.statistics.bins.layout import UNIT

SAMPLING_CONFIDENCE = 0.99  # that a neuron's score lies within its bound, where rows are a sample of all
ROUNDING = 1e-12  # added to bounds: float64 rounding in them and in whatever they are compared with


@dataclass(frozen=True)
class BinRanks:
    """A neuron's ranks as far as the table knows them.

    Attributes:
        rank: [d, C], mean rank of each bin's rows, centred.
        between: [d], variance of the ranks between bins.
        hidden: [d], eta^2: the largest share of the ranks' variance that bins which are not atomic can hide.
    """

    rank: torch.Tensor
    between: torch.Tensor
    hidden: torch.Tensor


def bin_ranks(occupancy: torch.Tensor, atomic: torch.Tensor) -> BinRanks:
    """Mean ranks of the bins; eta^2 = within / (between + within), where `within` assumes no ties outside atoms."""
    n = occupancy.sum(1, keepdim=True)
    rank = occupancy.cumsum(1) - occupancy / 2 - n / 2  # before + (w + 1) / 2 - (N + 1) / 2
    between = (occupancy * rank.square()).sum(1) / n[:, 0]
    open_ = torch.where(atomic, 0.0, occupancy)
    within = (open_ * (open_.square() - 1).clamp_min(0)).sum(1) / (12 * n[:, 0])
    return BinRanks(rank, between, within / (between + within).clamp_min(torch.finfo(torch.float64).tiny))


def is_stale(hidden: torch.Tensor, bins: int) -> torch.Tensor:
    """Whether [d] the edges no longer divide the rows; they hide four times what even bins would."""
    return hidden.sqrt() > max(4 / bins, 0.02)


def is_constant(occupancy: torch.Tensor, atomic: torch.Tensor) -> torch.Tensor:
    """Whether [d] every row fell into one atomic bin."""
    return (occupancy.gt(0).sum(1) == 1) & ((occupancy > 0) & atomic).any(1)


def _bounded(
    rho: torch.Tensor, shift: torch.Tensor, ranks: BinRanks, constant: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate and bound [d, K]; `shift` is how far hidden order can move the estimate."""
    shrink = 1 - (1 - ranks.hidden).sqrt()
    bound = shrink[:, None] * rho.abs() + shift + ROUNDING
    bound = torch.minimum(bound, 1 + rho.abs())
    return rho.masked_fill(constant, torch.nan), bound.masked_fill(constant, torch.nan)


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), 0.0)


def label_scores(
    positives: torch.Tensor, occupancy: torch.Tensor, atomic: torch.Tensor, ranks: BinRanks
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Spearman's rho and AUROC of each neuron with each 0/1 label, and how far off they can be.

    AUROC counts ties half, so it is the positives' mean rank; within a bin that is not atomic any share of the pairs
    of a positive and a negative can be in order, so its bound is half of all such pairs. The same pairs bound
    Cov(rank, label); so does eta sd(rank) sd(label) sqrt(1 - R^2), with R^2 the share of the label's variance between
    bins. The smaller of the two counts for rho.

    Returns:
        rho, its bound, AUROC, its bound: float64 [d, K]; NaN where the neuron or the label is constant.
    """
    n = occupancy.sum(1)[:, None]
    one, several = positives.sum(1), occupancy.gt(0)
    other = n - one
    squares = positives.square()
    open_ = torch.where(atomic, 0.0, 1.0)
    inverse = torch.where(several, 1 / occupancy.clamp_min(1), 0.0)
    of_positives = torch.stack([ranks.rank, open_ * occupancy], 1) @ positives  # [d, 2, K]
    of_squares = torch.stack([inverse, open_], 1) @ squares
    pairs_hidden = (of_positives[:, 1] - of_squares[:, 1]).clamp_min(0) / 2  # half of sum a (w - a)
    deviation = (one * other).sqrt() / n
    scale = ranks.between.sqrt()[:, None] * deviation
    rho = _ratio(of_positives[:, 0] / n, scale).clamp(-1, 1)
    explained = of_squares[:, 0] / n - (one / n).square()
    unexplained = (1 - _ratio(explained, deviation.square())).clamp(0, 1).sqrt()
    sorted_ = torch.where(scale > 0, _ratio(pairs_hidden / n, scale), torch.inf)  # sd of the true ranks is no less
    shift = torch.minimum(ranks.hidden.sqrt()[:, None] * unexplained, sorted_)
    undefined = is_constant(occupancy, atomic)[:, None] | (deviation == 0)
    rho, bound = _bounded(rho, shift, ranks, undefined)
    area = 0.5 + _ratio(of_positives[:, 0], one * other)
    area_bound = _ratio(pairs_hidden, one * other) + ROUNDING
    return rho, bound, area.masked_fill(undefined, torch.nan), area_bound.masked_fill(undefined, torch.nan)


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
    sums: torch.Tensor, occupancy: torch.Tensor, atomic: torch.Tensor, ranks: BinRanks, fit: RankFit
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spearman's rho of each neuron with one continuous metric, and how far off it can be.

    `sums` [d, C, 8] are the bins' hat weights. What the fit leaves of the metric's ranks is orthogonal to the hats,
    so only the part of the neuron's ranks that is orthogonal to them too can go with it.

    Returns:
        rho and bound, float64 [d]; NaN where the neuron or the metric is constant.
    """
    n = occupancy.sum(1)
    with_hats = torch.einsum("dc,dcj->dj", ranks.rank, sums) / (UNIT * n[:, None])  # Cov(rank, h_j)
    scale = ranks.between.sqrt() * fit.deviation
    rho = _ratio(with_hats @ fit.coefficients, scale).clamp(-1, 1)
    projected = _ratio(torch.einsum("dj,jk,dk->d", with_hats, fit.gram_inverse, with_hats), ranks.between)
    fitted = sums @ fit.coefficients / UNIT  # [d, C], sum of the fitted ranks in each bin
    between = ((_ratio(fitted.square(), occupancy).sum(1) / n).sqrt() / max(fit.deviation, ROUNDING)).clamp(0, 1)
    unexplained = 1 - (between - fit.residual).clamp_min(0).square()
    # Ties in open bins leave the ranks less variance than `hidden` says, so it does not shrink the first part.
    shift = fit.residual * (1 - projected).clamp(0, 1).sqrt() + ranks.hidden.sqrt() * unexplained.sqrt()
    constant = is_constant(occupancy, atomic) | (fit.deviation == 0)
    rho, bound = _bounded(rho[:, None], shift[:, None], ranks, constant[:, None])
    return rho[:, 0], bound[:, 0]


def _above(mass: torch.Tensor) -> torch.Tensor:
    """What lies above each bin of [d, C, ...], and half of what lies in it."""
    return mass.flip(1).cumsum(1).flip(1) - mass / 2


def _reach(variance: torch.Tensor, n: torch.Tensor, rate: float) -> torch.Tensor:
    """How far a mean over a sample can be from that over all, at `SAMPLING_CONFIDENCE`; infinite from one row.

    Args:
        variance: Variance of one row's influence, over all n rows.
        n: Rows that it is estimated from.
        rate: Share of all rows that are in the sample, each with this probability.
    """
    freedom = (n - 1).clamp_min(0)
    quantile = torch.from_numpy(stats.t.ppf((1 + SAMPLING_CONFIDENCE) / 2, freedom.clamp_min(1).cpu().numpy()))
    reach = quantile.to(variance.device) * ((1 - rate) * variance / freedom).sqrt()
    return torch.where(freedom > 0, reach, torch.inf)


def label_sampling(positives: torch.Tensor, occupancy: torch.Tensor, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """How far rho and AUROC of a sample of the rows can be from those of all, for each neuron and label.

    The standard errors are those of the influence of single rows: of rho, a correlation of ranks with a label, and of
    AUROC (DeLong, DeLong and Clarke-Pearson, 1988). Rows are drawn by themselves, so rows that are alike, as tokens of
    one text are, make the errors no larger.

    Args:
        positives: [d, C, K].
        occupancy: [d, C].
        rate: Share of all rows that are in the sample.

    Returns:
        float64 [d, K] each.
    """
    n = occupancy.sum(1)[:, None]
    one = positives.sum(1)
    other = n - one
    negatives = occupancy[:, :, None] - positives
    u = ((occupancy.cumsum(1) - occupancy / 2) / n - 0.5)[:, :, None]  # [d, C, 1], ranks
    mass = (occupancy / n)[:, :, None]
    scale = (mass * u.square()).sum(1, keepdim=True).sqrt()  # [d, 1, 1]
    prevalence = (one / n)[:, None]
    deviation = (prevalence * (1 - prevalence)).sqrt()  # [d, 1, K]
    low, high = _ratio(-prevalence, deviation), _ratio(1 - prevalence, deviation)
    above = _above((positives * high + negatives * low) / n[:, :, None])
    moves = _ratio(u.square() + 2 * _above(mass * u), scale.square()) - 3  # of the ranks' variance
    covariance = ((positives * high + negatives * low) * u).sum(1, keepdim=True) / n[:, :, None]
    rho = _ratio(covariance, scale)
    squares = torch.zeros_like(one)
    for rows, y in ((positives, high), (negatives, low)):
        influence = _ratio(u * y + above - 2 * covariance, scale) - rho / 2 * (moves + y.square() - 1)
        squares += (rows * influence.square()).sum(1)
    fewer = torch.minimum(one, other)
    of_rho = _reach(squares / n * _ratio(fewer, n), fewer, rate)
    of_area = torch.zeros_like(of_rho)
    for rows, rest in ((positives, negatives), (negatives, positives)):
        count = rows.sum(1)
        share = (rest.cumsum(1) - rest / 2) / rest.sum(1, keepdim=True).clamp_min(1)  # of the others below
        mean = _ratio((rows * share).sum(1), count)
        variance = _ratio((rows * (share - mean[:, None]).square()).sum(1), count)
        of_area += _reach(variance, count, rate).square()
    return of_rho, of_area.sqrt()


def continuous_sampling(sums: torch.Tensor, occupancy: torch.Tensor, rate: float) -> torch.Tensor:
    """How far rho of a sample of the rows can be from that of all, as `label_sampling`: float64 [d].

    The metric's ranks are those of its soft levels; a row that is divided among two counts as divided.
    """
    n = occupancy.sum(1)[:, None, None]
    joint = sums / (UNIT * n)  # [d, C, 8]
    u = ((occupancy.cumsum(1) - occupancy / 2) / n[:, 0] - 0.5)[:, :, None]
    mass = (occupancy / n[:, 0])[:, :, None]
    levels = joint.sum(1, keepdim=True)  # [d, 1, 8]
    v = levels.cumsum(2) - levels / 2 - 0.5
    of_u, of_v = (mass * u.square()).sum(1, keepdim=True), (levels * v.square()).sum(2, keepdim=True)
    scale = (of_u * of_v).sqrt()
    covariance = (joint * u * v).sum((1, 2), keepdim=True)
    rho = _ratio(covariance, scale)
    above_u = _above((joint * v).sum(2, keepdim=True))  # [d, C, 1]
    above_v = _above((joint * u).sum(1, keepdim=True).transpose(1, 2)).transpose(1, 2)  # [d, 1, 8]
    moves_u = _ratio(u.square() + 2 * _above(mass * u), of_u) - 3
    moves_v = _ratio(v.square() + 2 * _above((levels * v).transpose(1, 2)).transpose(1, 2), of_v) - 3
    influence = _ratio(u * v + above_u + above_v - 3 * covariance, scale) - rho / 2 * (moves_u + moves_v)
    return _reach((joint * influence.square()).sum((1, 2)), n[:, 0, 0], rate)


def _places(occupancy: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Which merged bin int64 [d, C] each bin goes to, where the ranks are divided into `wanted` [d] even groups."""
    n = occupancy.sum(1, keepdim=True)
    wanted = wanted.floor().clamp_min(1)[:, None]
    group = torch.minimum(((occupancy.cumsum(1) - occupancy / 2) * (wanted / n)).floor(), wanted - 1)
    place = torch.zeros_like(group, dtype=torch.int64)
    place[:, 1:] = (group[:, 1:] > group[:, :-1]).cumsum(1)
    return place


def _two_level_groups(n: torch.Tensor, rarer: torch.Tensor) -> torch.Tensor:
    """How many groups [d]: N / 20, halved until about 5 rows of the rarer level fall into each; 2 at least.

    With fewer, Miller and Madow's correction would leave most of a rare label's bias. Halved, so that labels that
    are about as rare share one merging.
    """
    halvings = (n / 20 / (rarer / 5).clamp_min(2)).clamp_min(1).log2().ceil()
    return torch.maximum(n / 20 * torch.exp2(-halvings), (n / 20).clamp_max(2))


def merge_bins(joint: torch.Tensor) -> torch.Tensor:
    """Merges neighbouring bins of [d, C, K] until about 10 rows per class fall into each.

    The rows' ranks are divided into N / (10 K) even groups; bins whose middles fall into one group are merged, so
    there are at most that many. With two levels there are fewer, `_two_level_groups`.

    Returns:
        float64 [d, C, K], the merged bins first, then empty ones.
    """
    occupancy = joint.sum(2)
    n = occupancy.sum(1)
    wanted = n / (10 * joint.shape[2]) if joint.shape[2] != 2 else _two_level_groups(n, joint.sum(1).amin(1))
    place = _places(occupancy, wanted)
    return torch.zeros_like(joint).scatter_add_(1, place[:, :, None].expand_as(joint), joint)


def _plogp(counts: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """Each share p of n as p log p, 0 where p is."""
    p = counts / n
    return p * p.clamp_min(torch.finfo(torch.float64).tiny).log()


def mutual_information(joint: torch.Tensor, freedom: float | None = None) -> torch.Tensor:
    """Mutual information of each neuron's bins with a variable of K levels, in nats.

    Plug-in estimate on bins merged by `merge_bins`, Miller and Madow's correction, clipped to [0, H(levels)].

    Args:
        joint: float64 [d, C, K], rows of each bin and level.
        freedom: Degrees of freedom of the levels, for soft ones whose rows are divided among several; None: counts,
            for which the correction counts the occupied places.

    Returns:
        float64 [d].
    """
    merged = merge_bins(joint)
    bins, levels = merged.sum(2), merged.sum(1)
    n = bins.sum(1, keepdim=True)
    entropy = -_plogp(levels, n).sum(1)
    plugin = _plogp(merged, n[:, :, None]).sum((1, 2)) - _plogp(bins, n).sum(1) + entropy
    rows, columns = bins.gt(0).sum(1), levels.gt(0).sum(1)
    occupied = merged.gt(0).sum((1, 2))
    excess = occupied - rows - columns + 1 if freedom is None else (rows - 1) * freedom
    return torch.minimum((plugin - excess / (2 * n[:, 0])).clamp_min(0), entropy)


def label_information(positives: torch.Tensor, occupancy: torch.Tensor) -> torch.Tensor:
    """`mutual_information` of each neuron with each 0/1 label: float64 [d, K].

    Every neuron has seen the same labels. Labels that want as many merged bins share one merging.
    """
    one = positives[0].sum(0)
    n = occupancy[0].sum().expand_as(one)
    wanted = _two_level_groups(n, torch.minimum(one, n - one))
    found = torch.empty_like(positives[:, 0])
    for groups in wanted.unique():
        alike = wanted == groups
        place = _places(occupancy, groups.expand(len(occupancy)))
        found[:, alike] = _label_information(positives[:, :, alike], occupancy, place)
    return found


def _label_information(positives: torch.Tensor, occupancy: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    n = occupancy.sum(1, keepdim=True)
    n_bins = int(place.max()) + 1
    bins = torch.zeros_like(occupancy[:, :n_bins]).scatter_add_(1, place, occupancy)
    merged = torch.zeros_like(positives[:, :n_bins])
    merged.scatter_add_(1, place[:, :, None].expand_as(positives), positives)
    rest = bins[:, :, None] - merged
    one = positives.sum(1)
    entropy = -_plogp(one, n) - _plogp(n - one, n)
    both = _plogp(merged, n[:, :, None]).sum(1) + _plogp(rest, n[:, :, None]).sum(1)
    occupied = merged.gt(0).sum(1) + rest.gt(0).sum(1)
    levels = one.gt(0).long() + (n > one).long()
    excess = occupied - bins.gt(0).sum(1, keepdim=True) - levels + 1
    plugin = both - _plogp(bins, n).sum(1, keepdim=True) + entropy
    return torch.minimum((plugin - excess / (2 * n)).clamp_min(0), entropy)
