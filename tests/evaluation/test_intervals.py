"""Intervals against closed forms, other libraries and simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from skillfast.evaluation.intervals import Strata, bracket_limits, difference_limits, share_limits


def test_the_limits_of_a_share_are_wilsons():
    for events, n in ((0, 10), (3, 40), (40, 40), (17, 30)):
        share = events / n
        want = stats.binomtest(events, n).proportion_ci(method="wilson")
        assert share_limits(share, share * (1 - share) / n, n) == pytest.approx((want.low, want.high))
    clustered = share_limits(0.2, 4 * 0.16 / 100, 100)  # each example counts four times
    assert clustered == pytest.approx(stats.binomtest(5, 25).proportion_ci(method="wilson"))


def test_the_limits_of_a_difference_are_newcombes():
    """Of uncorrelated shares those of Newcombe's method for independent samples, by its formula."""
    one, other, n = 0.3, 0.1, 50
    (low, high), (other_low, other_high) = (
        stats.binomtest(round(p * n), n).proportion_ci(method="wilson") for p in (one, other)
    )
    covariance = np.diag([p * (1 - p) / n for p in (one, other)])
    want = 0.2 - np.hypot(one - low, other_high - other), 0.2 + np.hypot(high - one, other - other_low)
    assert difference_limits(one, other, covariance, n) == pytest.approx(want)
    same = np.full((2, 2), 0.3 * 0.7 / n)  # a share and itself: Wilson's limits are not symmetric, so not quite 0
    assert difference_limits(0.3, 0.3, same, n) == pytest.approx((0, 0), abs=0.03)
    assert difference_limits(0.0, 0.0, np.zeros((2, 2)), 100) == pytest.approx((-0.037, 0.037), abs=1e-3)


def test_the_interval_of_a_bracket():
    one_sided, two_sided = stats.norm.ppf([0.95, 0.975])
    assert bracket_limits(0.0, 5.0, 0.01, 0.04) == pytest.approx((-0.1 * one_sided, 5 + 0.2 * one_sided), abs=1e-4)
    assert bracket_limits(1.0, 1.0, 0.01, 0.01) == pytest.approx((1 - 0.1 * two_sided, 1 + 0.1 * two_sided))
    assert bracket_limits(0.1, 0.2, 0, 0) == (0.1, 0.2)


def test_strata_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    labels, values = rng.permutation(np.repeat(range(4), [25, 20, 13, 2])), rng.normal(size=(2, 60))
    parts = [values[:, labels == label] for label in range(4)]
    strata = Strata(labels)
    np.testing.assert_allclose(strata.mean(values), np.mean([part.mean(1) for part in parts], 0))
    want = sum(np.cov(part) / part.shape[1] for part in parts) / 16
    np.testing.assert_allclose(strata.covariance(values), want)
    assert strata.effective == pytest.approx(16 / sum(1 / part.shape[1] for part in parts))
    gap = Strata(np.where(labels == 3, 5, labels))  # classes without examples do not count
    assert gap.effective == pytest.approx(strata.effective)
    assert gap.classes.tolist() == [0, 1, 2, 5]
    np.testing.assert_allclose(gap.mean(values), strata.mean(values))
    over_all = Strata(labels, np.bincount(labels) / 60)
    np.testing.assert_allclose(over_all.mean(values), values.mean(1))
    assert over_all.effective == pytest.approx(60)


def test_a_class_of_one_example_varies_as_the_others_do():
    rng = np.random.default_rng(0)
    several = np.arange(3).repeat(400)
    values = rng.normal(size=(1, 1201))
    found = Strata(np.append(several, 3)).covariance(values)[0, 0]
    assert found == pytest.approx((3 / 400 + 1) / 16, rel=0.1)


def test_one_example_of_each_class_is_said_and_counts_as_of_a_single_class():
    """Losses and gains exclude each other, which makes their difference wider than that of independent shares."""
    with pytest.warns(RuntimeWarning, match="^intervals: expected a class with two examples, .*, got one of each; "):
        strata = Strata(np.arange(6))
    events = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]])
    unknown = strata.covariance(events)
    assert np.isnan(unknown).all()
    found = difference_limits(1 / 2, 1 / 3, unknown, strata.effective)
    assert found == pytest.approx(difference_limits(1 / 2, 1 / 3, np.cov(events, ddof=0) / 6, 6))
    independent = difference_limits(1 / 2, 1 / 3, np.diag([1 / 4, 2 / 9]) / 6, 6)
    assert found[0] < independent[0] - 0.1
    assert found[1] > independent[1] + 0.05
    alone = Strata(np.zeros(1, int))  # one example is no class among others: it says nothing
    assert np.isnan(alone.covariance(events[:, :1])).all()


def test_the_variance_over_images_and_draws():
    """Draws and images both vary: the formula gives what repeating both gives, and a single draw what images give."""
    rng = np.random.default_rng(0)
    labels = np.arange(2).repeat(30)
    strata, means, found = Strata(labels), [], []
    for _ in range(400):
        images, draws = rng.normal(size=60), rng.normal(0, 0.2, (6, 1))
        values = (images + draws + rng.normal(0, 0.5, (6, 60)))[None]
        means.append(strata.mean(values).mean())
        found.append(strata.crossed_covariance(values)[0, 0])
    assert np.mean(found) == pytest.approx(np.var(means), rel=0.15)
    np.testing.assert_allclose(strata.crossed_covariance(values[:, :1]), strata.covariance(values[:, 0]))
