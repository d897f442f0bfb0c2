"""The jackknife over groups against closed forms and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from skillfast.evaluation.jackknife import deal, jackknife_interval, means_without


def test_each_class_is_dealt_out_evenly():
    labels = np.random.default_rng(0).integers(0, 3, 100)
    dealt = deal(labels, 8)
    assert sorted(np.bincount(dealt)) == [12] * 4 + [13] * 4
    for label in range(3):
        assert np.ptp(np.bincount(dealt[labels == label], minlength=8)) <= 1
        assert set(np.diff(dealt[labels == label]) % 8) == {1}  # in the order of the examples
    assert sorted(deal(labels[:5], 40)) == [0, 1, 2, 3, 4]


def test_means_without_a_group_equal_a_loop():
    rng = np.random.default_rng(1)
    values, dealt = rng.normal(size=(2, 30)), rng.integers(0, 4, 30)
    values[0, [3, 8]] = np.nan
    mean = np.nanmean(values, 1)
    found = mean[:, None] + means_without(values - mean[:, None], dealt, 4)
    np.testing.assert_allclose(found, np.stack([np.nanmean(values[:, dealt != group], 1) for group in range(4)], 1))
    assert np.isnan(means_without(np.full(30, np.nan), dealt, 4)).all()


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.random.default_rng(3).normal(0.5, 0.1, 12)
    left_out = (values.sum() - values) / 11
    want = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    assert jackknife_interval(values.mean(), left_out, -1, 2) == pytest.approx(want)
    assert jackknife_interval(values.mean(), left_out, 0.49, 0.51) == [0.49, 0.51]
    wider = stats.t.interval(0.95, 11, values.mean(), np.hypot(stats.sem(values), 0.2))
    assert jackknife_interval(values.mean(), left_out, -1, 2, variance=0.04) == pytest.approx(wider)
    assert jackknife_interval(values.mean(), left_out, -1, 2, variance=np.nan) is None
    assert jackknife_interval(None, left_out, 0, 1) is None
    assert jackknife_interval(0.5, np.append(left_out, np.nan), 0, 1) is None
    assert jackknife_interval(0.5, np.array([0.5]), 0, 1) is None
