"""Resamples and intervals against closed forms and plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from skillfast.evaluation.resampling import Bootstrap, PairedBootstrap, interval

LABELS = np.random.default_rng(0).integers(0, 3, 50)


def test_resamples_draw_as_many_images_of_each_class_as_there_are():
    bootstrap = Bootstrap(LABELS, 400)
    assert bootstrap.replicates == 400
    for label, (members, weights) in enumerate(zip(bootstrap.members, bootstrap.weights, strict=True)):
        assert members.tolist() == [i for i, of in enumerate(LABELS) if of == label]
        times = weights * len(members)
        np.testing.assert_allclose(times, times.round())
        np.testing.assert_allclose(times.sum(0), len(members))
        assert times.mean(1) == pytest.approx(1, abs=0.3)
        assert times.var(1).mean() == pytest.approx(1 - 1 / len(members), rel=0.1)  # of a binomial count
    same, other = Bootstrap(LABELS, 400), Bootstrap(LABELS, 400, seed=1)
    assert np.array_equal(bootstrap.weights[0], same.weights[0])
    assert not np.array_equal(bootstrap.weights[0], other.weights[0])


def test_resampled_changes_are_those_of_weighted_images():
    change = np.random.default_rng(1).normal(size=(3, 50))
    bootstrap = Bootstrap(LABELS, 7)
    own = np.zeros((3, 7))
    for label, (members, weights) in enumerate(zip(bootstrap.members, bootstrap.weights, strict=True)):
        for image, weight in zip(members, weights, strict=True):
            own[label] += change[0, image] * weight
    np.testing.assert_allclose(bootstrap.own_class(change[0]), own)


def test_paired_counts_are_those_of_the_predictions_on_average():
    rng = np.random.default_rng(2)
    before, after = rng.integers(0, 3, (2, 50))
    found = PairedBootstrap(LABELS, 4, replicates=4000).counts(before, after)
    for (hits, predicted), own in zip(found, (before, after), strict=True):
        assert hits.shape == predicted.shape == (4000, 4)
        assert (predicted.sum(1) == 50).all()
        assert hits.mean(0) == pytest.approx([((c == LABELS) & (own == c)).sum() for c in range(4)], abs=0.3)
        assert predicted.mean(0) == pytest.approx(np.bincount(own, minlength=4), abs=0.4)
        recall = hits.mean(0)[0] / (LABELS == 0).sum()
        assert hits[:, 0].var() == pytest.approx((LABELS == 0).sum() * recall * (1 - recall), rel=0.1)
    again = PairedBootstrap(LABELS, 4, replicates=50)
    (one, _), (other, _) = again.counts(after, after)
    assert np.array_equal(one, other)  # the same images in either
    assert np.array_equal(again.counts(after, after)[0][0], one)  # and whenever they are drawn
    assert PairedBootstrap(LABELS, 4).replicates == Bootstrap(LABELS).replicates == 1000


def test_an_interval_is_the_middle_95_percent():
    assert interval(np.random.default_rng(0).permutation(1001)) == pytest.approx([25, 975])
    assert interval(np.append(np.zeros(99), np.nan)) is None
    assert interval(np.append(np.zeros(9), np.inf)) is None
