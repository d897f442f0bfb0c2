"""Estimates and bounds of small tables against the rows that are in them, written out one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from skillfast.statistics.bins import estimates
from skillfast.statistics.bins.layout import UNIT

SEEDS = range(6)


def tensor(*arrays):
    return [torch.from_numpy(np.asarray(array, dtype=float))[None] for array in arrays]


def rows_of(seed):
    """The bin of each row, a 0/1 label that goes with it, the weights on 8 hats, and which of 7 bins are atomic."""
    rng = np.random.default_rng(seed)
    place = np.repeat(np.arange(7), rng.integers(0, 9, 7) + (np.arange(7) == 2) * 3)
    if seed % 2:
        place = place // 6 * 3  # two bins, which hide most of the order
    label = (rng.random(len(place)) < 0.2 + 0.1 * place).astype(float)
    label[:2] = [0, 1]
    at = np.clip(rng.random(len(place)) * 5 + place / 3, 0, 7)
    hats = np.maximum(0, UNIT - np.abs(np.round(at * UNIT)[:, None] - np.arange(8) * UNIT))
    return place, label, at, hats, rng.random(7) < 0.4


def counted(place, weights):
    """Sums over the rows of each bin."""
    sums = np.zeros((7, *weights.shape[1:]))
    np.add.at(sums, place, weights)
    return sums


def ranks_of(place, atomic, within):
    """Centred ranks where rows of an open bin are in the order of `within`, and those of an atomic bin are tied."""
    order = place + np.where(atomic[place], 0, (stats.rankdata(within, "ordinal") - 1) / len(place))
    return stats.rankdata(order) - (len(place) + 1) / 2


def of_bins(place, values):
    """Each row's mean over its bin."""
    with np.errstate(invalid="ignore"):
        return (counted(place, values) / counted(place, np.ones_like(values)))[place]


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_of_a_label_and_how_far_an_order_within_the_bins_can_move_them(seed):
    place, label, _, _, atomic = rows_of(seed)
    low, high = (ranks_of(place, atomic, sign * label) for sign in (-1, 1))  # the orders that move them farthest
    mean = of_bins(place, low)
    (occupancy, positives), one = tensor(counted(place, np.ones_like(label)), counted(place, label)), label == 1
    open_ = torch.from_numpy(atomic)[None]
    ranks = estimates.bin_ranks(occupancy, open_)
    hidden = 1 - mean.var() / low.var()
    np.testing.assert_allclose(ranks.hidden, hidden, atol=1e-12)
    np.testing.assert_allclose(ranks.between, mean.var())
    rho, bound, area, area_bound = (
        float(t) for t in estimates.label_scores(positives[:, :, None], occupancy, open_, ranks)
    )
    areas = [stats.mannwhitneyu(r[one], r[~one]).statistic / one.sum() / (~one).sum() for r in (low, high)]
    np.testing.assert_allclose([area - area_bound, area + area_bound], areas, atol=1e-9)
    np.testing.assert_allclose(rho, np.corrcoef(mean, label)[0, 1])
    moved = (np.cov(high, label, ddof=0)[0, 1] - np.cov(low, label, ddof=0)[0, 1]) / 2 / mean.std() / label.std()
    unexplained = 1 - of_bins(place, label).var() / label.var()
    shift = min(np.sqrt(hidden * unexplained), moved)
    want = min((1 - np.sqrt(1 - hidden)) * abs(rho) + shift, 1 + abs(rho))
    np.testing.assert_allclose(bound, want, atol=1e-9)
    for r in (low, high):
        assert abs(np.corrcoef(r, label)[0, 1] - rho) <= bound


@pytest.mark.parametrize("seed", SEEDS)
def test_rho_of_a_continuous_metric_and_its_bound(seed):
    place, _, metric, hats, atomic = rows_of(seed)
    y = stats.rankdata(metric) - (len(metric) + 1) / 2
    h = hats / UNIT
    fitted = h @ np.linalg.lstsq(h, y, rcond=None)[0]
    residual = np.sqrt(np.mean((y - fitted) ** 2)) / y.std()
    fit = estimates.fit_ranks(torch.from_numpy(y), torch.from_numpy(hats))
    np.testing.assert_allclose([fit.deviation, fit.residual], [y.std(), residual])
    share = h.mean(0)[h.any(0)]
    np.testing.assert_allclose(fit.freedom, ((h**2).mean(0)[h.any(0)] / share).sum() - 1)
    occupancy, sums = tensor(counted(place, np.ones(len(place))), counted(place, hats))
    open_ = torch.from_numpy(atomic)[None]
    ranks = estimates.bin_ranks(occupancy, open_)
    rho, bound = (float(t) for t in estimates.spearman_continuous(sums, occupancy, open_, ranks, fit))
    mean = of_bins(place, ranks_of(place, atomic, np.zeros(len(place))))
    np.testing.assert_allclose(rho, np.mean(mean * fitted) / mean.std() / y.std())
    projected = h @ np.linalg.lstsq(h, mean, rcond=None)[0]
    beside = residual * np.sqrt(1 - np.mean(projected**2) / np.mean(mean**2))
    between = max(0, of_bins(place, fitted).std() / y.std() - residual)
    hidden = float(ranks.hidden)
    shift = beside + np.sqrt(hidden * (1 - between**2))
    np.testing.assert_allclose(bound, min((1 - np.sqrt(1 - hidden)) * abs(rho) + shift, 1 + abs(rho)), atol=1e-9)
    for order in (metric, -metric):
        assert abs(stats.spearmanr(ranks_of(place, atomic, order), metric).statistic - rho) <= bound


@pytest.mark.parametrize("seed", SEEDS)
def test_errors_of_a_sample_are_those_of_the_influences_of_its_rows(seed):
    """Of rho by finite differences of a table with one cell's weight moved; of AUROC DeLong's, of rows written out."""
    place, label, _, _, _ = rows_of(seed)
    one, rate, step = label == 1, 0.25, 1e-5
    joint = np.stack([counted(place, 1 - label), counted(place, label)], 1)

    def rho(p):
        u, v = p.sum(1).cumsum() - p.sum(1) / 2 - 0.5, np.array([0.0, 1.0]) - p[:, 1].sum()
        return (u @ p @ v) / np.sqrt((p.sum(1) @ u**2) * (p.sum(0) @ v**2))

    n, variance = joint.sum(), 0.0
    for cell in zip(*joint.nonzero(), strict=True):
        moved = np.zeros_like(joint)
        moved[cell] = 1
        up, down = (rho((1 - e) * joint / n + e * moved) for e in (step, -step))
        variance += joint[cell] / n * ((up - down) / (2 * step)) ** 2
    fewer = min(one.sum(), (~one).sum())

    def reach(variances, counts):  # 99 % of Student's t
        t = stats.t.ppf(0.995, np.maximum(np.array(counts) - 1, 1))
        return np.sqrt(np.sum(t**2 * (1 - rate) * np.array(variances) / (np.array(counts) - 1)))

    higher = (place[one][:, None] > place[~one]) + (place[one][:, None] == place[~one]) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        want = reach([variance * fewer / n], [fewer]), reach([higher.mean(k).var() for k in (1, 0)], higher.shape)
    found = estimates.label_sampling(*tensor(joint[:, 1:], joint.sum(1)), rate)
    if fewer > 1:
        np.testing.assert_allclose([float(t) for t in found], want, rtol=1e-6)
    else:
        assert torch.isinf(torch.stack(found)).all()


def test_how_many_groups_the_rows_of_a_rare_label_are_divided_into():
    """A 20th of the rows, halved until 5 rows of the rarer level fall into each; 2 where there are 40 rows."""
    n, rarer = torch.tensor([[400.0, 400, 400, 400, 400, 20], [200, 100, 95, 50, 1, 10]])
    assert estimates._two_level_groups(n, rarer).tolist() == [20, 20, 10, 10, 2, 1]
