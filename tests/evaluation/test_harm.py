"""Harm, regret and their intervals: exact sums against enumeration, and what they say of simulated removals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from skillfast.evaluation.harm import bracket, cross_fitted, noise_floor, per_example, plug_in, size
from skillfast.evaluation.intervals import difference_limits, share_limits
from skillfast.evaluation.selectivity import class_terms, oracle_selectivity, selectivity

K = 10
TERMS = ("target_drop", "regret", "agreement", "gross_loss", "other_change")


@pytest.mark.parametrize(("losses", "gains"), itertools.product(range(5), range(4)))
def test_cross_fitting_is_the_mean_over_all_halves(losses, gains):
    want = []
    for halves in itertools.product((0, 1), repeat=losses + gains):
        change = np.array([-1] * losses + [1] * gains)
        first, second = (int(change[np.array(halves) == half].sum()) for half in (0, 1))
        want.append((1.0 if first < 0 else 0.5 if first == 0 else 0.0) * -second)
    counts = np.array(losses), np.array(gains), np.array(50)
    assert cross_fitted(*counts) == pytest.approx(2 * np.mean(want) / 50)
    assert cross_fitted(*counts) <= plug_in(*counts) + 1e-15


def test_a_bracket_lies_between_0_and_1_and_says_nothing_of_one_example():
    assert bracket(-0.1, -5e-19, 0.0, 0.0) == (-0.1, 0.0, [0.0, 0.0])
    assert bracket(0.1, 0.2, np.inf, np.inf) == (0.1, 0.2, [0.0, 1.0])
    assert bracket(0.1, 0.2, 4.0, 9.0)[2] == [0.0, 1.0]
    low, high, ends = bracket(0.1, 0.2, 1e-4, 1e-4)
    assert 0 < ends[0] < low < high < ends[1] < 0.25


@pytest.mark.parametrize("changed", range(7))
def test_the_noise_floor_is_the_mean_over_all_signs(changed):
    want = np.mean([max(0, -sum(signs)) for signs in itertools.product((-1, 1), repeat=changed)])
    for losses in range(changed + 1):
        assert noise_floor(np.array(losses), np.array(changed - losses), np.array(20)) == pytest.approx(want / 20)


def test_estimates_per_example_are_those_of_leaving_one_out():
    rng = np.random.default_rng(0)
    change = rng.integers(-1, 2, (3, 12)).astype(np.int8)
    for estimate in (plug_in, cross_fitted, noise_floor, size(cross_fitted)):

        def value(rows, estimate=estimate):
            return estimate((rows < 0).sum(-1), (rows > 0).sum(-1), np.array(rows.shape[-1]))

        left_out = np.stack([value(np.delete(change, i, 1)) for i in range(12)], 1)
        found = per_example(estimate, change)
        np.testing.assert_allclose(found.mean(1), value(change))
        np.testing.assert_allclose(
            found - found.mean(1, keepdims=True), -11 * (left_out - left_out.mean(1, keepdims=True)), atol=1e-12
        )
    assert per_example(plug_in, np.array([-1], np.int8)) == [1]


def removals(rng, n, *, harm=0.0, flips=0.01, right=0.95, drop=0.85, k=K):
    """Predictions without each skill, the oracle's, intact ones and labels; decisions flip either way.

    Args:
        rng: Source of chance.
        n: Images of each class.
        harm: Share of each other class's images that is lost for good, one number or [K, K].
        flips: Share that flips from right to wrong, and as large a share from wrong to right.
        right: Accuracy of the intact model.
        drop: Share of the own class's images that is lost.
        k: Number of classes.
    """
    labels = np.arange(k).repeat(n)
    known, wrong = rng.random(k * n) < right, (labels + 1) % k
    intact = np.where(known, labels, wrong)
    chance = rng.random((k, k * n))
    lost = known & (chance < (flips + np.broadcast_to(harm, (k, k))[:, labels]) / right)
    predictions = np.where(lost, wrong, np.where(~known & (chance < flips / (1 - right)), labels, intact))
    own = labels == np.arange(k)[:, None]
    own_lost = known & (rng.random((k, k * n)) < drop / right)
    return np.where(own, np.where(own_lost, wrong, intact), predictions)[None], np.tile(intact, (k, 1)), intact, labels


@pytest.fixture(scope="module")
def nulls():
    """Experiments without harm at two sizes of the test set: images per class -> what each finds.

    Of 400 experiments with 500 images, seeds 1000 to 1399, intervals hold the truth in 94.8 to 97.5 %.
    """
    return {
        n: [selectivity(*removals(np.random.default_rng([n, first + trial]), n)) for trial in range(200)]
        for n, first in ((54, 0), (500, 1200))
    }


def test_without_harm_every_interval_covers(nulls):
    truth = {"target_drop": 0.85, "regret": 0, "agreement": 0.98, "gross_loss": 0.01, "other_change": 0, "harm": 0}
    for (n, trials), (name, value) in itertools.product(nulls.items(), truth.items()):
        ends = [found.harm.ci95 if name == "harm" else getattr(found.ci95, name) for found in trials]
        held = np.mean([low <= value <= high for low, high in ends])
        assert 0.92 <= held <= 0.98, f"{name}, {n} images of each class: {held}"


def test_without_harm_the_estimates_do_not_depend_on_the_number_of_images(nulls):
    """The net losses that are seen do; they are what chance alone gives."""
    mean = {
        (n, name): np.mean([getattr(found.harm, name) for found in trials])
        for n, trials in nulls.items()
        for name in ("plug_in", "cross_fitted", "noise_floor")
    }
    for n in nulls:
        assert abs(mean[n, "cross_fitted"]) < 0.0005
        assert mean[n, "plug_in"] == pytest.approx(mean[n, "noise_floor"], rel=0.06)
        assert np.mean([found.regret for found in nulls[n]]) == pytest.approx(0, abs=0.0005)
    assert mean[54, "plug_in"] > 2.5 * mean[500, "plug_in"]


def test_harm_lies_in_its_bracket_at_either_number_of_images():
    """Every fifth pair of classes loses 5 points for good, on average 1 point; chance flips 1 % either way."""
    harm = np.where(np.add.outer(np.arange(K), 2 * np.arange(K)) % 5 == 0, 0.05, 0.0)
    true = harm[~np.eye(K, dtype=bool)].mean()
    for n, trials, width in ((54, 40, 0.01), (500, 20, 0.003)):
        found = [selectivity(*removals(np.random.default_rng([n, t]), n, harm=harm)).harm for t in range(trials)]
        assert np.mean([h.cross_fitted for h in found]) < true + 0.0003
        assert np.mean([h.plug_in for h in found]) > true
        assert np.mean([h.ci95[0] <= true <= h.ci95[1] for h in found]) >= 0.9
        assert np.mean([h.ci95[0] > 0 for h in found]) >= 0.9  # and it is seen
        assert np.mean([h.plug_in - h.cross_fitted for h in found]) < width


def test_terms_equal_plain_loops():
    rng = np.random.default_rng(1)
    labels = np.sort(rng.integers(0, 4, 80))
    intact, oracle, predictions = (
        np.where(rng.random(shape) < 0.8, labels, rng.integers(0, 4, shape)) for shape in ((80,), (4, 80), (3, 4, 80))
    )
    predictions[:, labels == np.arange(4)[:, None]] = 0  # the own class goes, but for class 0
    found = selectivity(predictions, oracle, intact, labels)
    drop, change, regret, loss, agree, harm, low, floor, absolute = (0.0,) * 9
    for rows, i, j in itertools.product(predictions, range(4), range(4)):
        of = labels == j
        before, after, best = (p[of] == j for p in (intact, rows[i], oracle[i]))
        if i == j:
            drop += (before.mean() - after.mean()) / 12
            continue
        losses, gains, n = (before & ~after).sum(), (after & ~before).sum(), of.sum()
        change += (after.mean() - before.mean()) / 36
        regret += (best.mean() - after.mean()) / 36
        loss += (before & ~after).mean() / 36
        agree += (rows[i][of] == oracle[i][of]).mean() / 36
        harm, low, floor = (
            total + float(estimate(losses, gains, n)) / 36
            for total, estimate in ((harm, plug_in), (low, cross_fitted), (floor, noise_floor))
        )
        absolute += abs(after.mean() - before.mean()) / 36
    assert [getattr(found, name) for name in TERMS] == pytest.approx([drop, regret, agree, loss, change])
    assert [found.harm.plug_in, found.harm.cross_fitted, found.harm.noise_floor] == pytest.approx([harm, low, floor])
    assert found.other_abs_change == pytest.approx(absolute)
    assert [found.ratio, found.strict_ratio, found.harm_ratio] == pytest.approx(
        [drop / abs(change), drop / absolute, drop / harm]
    )
    ends = found.ci95
    for name in TERMS:
        assert getattr(ends, name)[0] < getattr(found, name) < getattr(ends, name)[1] < 1
    assert found.at_least.ratio == pytest.approx(ends.target_drop[0] / max(map(abs, ends.other_change)))
    assert found.at_least.harm_ratio == pytest.approx(ends.target_drop[0] / found.harm.ci95[1])
    assert found.at_least.strict_ratio < found.strict_ratio


def test_classes_without_images_do_not_count():
    rng = np.random.default_rng(2)
    predictions, oracle, intact, labels = removals(rng, 40, k=3)
    with_one_more = [np.concatenate([p, p[..., :1, :]], -2) for p in (predictions, oracle)]
    assert selectivity(*with_one_more, intact, labels) == selectivity(predictions, oracle, intact, labels)
    drops, _, _ = class_terms(with_one_more[0][0], with_one_more[1], intact, labels)
    assert np.isnan(drops).tolist() == [False, False, False, True]


def test_the_oracle_has_no_regret_and_no_interval_of_it():
    rng = np.random.default_rng(3)
    labels = np.arange(3).repeat(30)
    second, first = labels.copy(), np.where(rng.random(90) < 0.9, labels, (labels + 1) % 3)
    second = np.where(first == labels, (labels + 1) % 3, labels)
    oracle = np.where(first == np.arange(3)[:, None], second, first)
    found = oracle_selectivity(oracle, first, labels)
    assert (found.regret, found.agreement, found.gross_loss, found.harm.plug_in) == (0, 1, 0, 0)
    assert found.ci95.regret is found.ci95.agreement is found.ci95.gross_loss is found.harm.ci95 is None
    assert found.other_change > 0  # it frees what was mistaken for the class
    assert found.target_drop == pytest.approx((first == labels).mean())


def test_each_removal_has_its_own_terms():
    rng = np.random.default_rng(4)
    harm = np.zeros((4, 4))
    harm[1] = 0.3
    predictions, oracle, intact, labels = removals(rng, 200, harm=harm, k=4)
    drops, regrets, highest = class_terms(predictions, oracle, intact, labels)
    assert drops.shape == (1, 4)
    assert drops[0] == pytest.approx(0.85, abs=0.1)
    assert regrets[0] == pytest.approx([0, 0.3, 0, 0], abs=0.05)
    assert (highest > regrets).all()
    assert regrets.mean() == pytest.approx(selectivity(predictions, oracle, intact, labels).regret)
    assert share_limits(0, 0, 600)[1] < highest[0, 0]  # wider than without a flip


@pytest.mark.filterwarnings("ignore:intervals")
def test_one_example_of_each_class_leaves_all_open():
    labels = np.arange(3)
    same = np.tile(labels, (3, 1))
    found = selectivity(np.where(np.eye(3, dtype=bool), (labels + 1) % 3, same)[None], same, labels, labels)
    assert found.target_drop == pytest.approx(1)
    low, high = found.ci95.target_drop
    assert low < 0.5 < high
    worse = selectivity(np.where(np.eye(3, dtype=bool), same, (labels + 1) % 3)[None], same, labels, labels)
    assert worse.harm.ci95 == [0, 1]


def test_where_nothing_changes_intervals_count_the_decisions_that_could_have():
    """Of 90 examples 90 of the own class and 180 of others; no loss is no certainty of no harm."""
    labels = np.arange(3).repeat(30)
    same = np.tile(labels, (3, 1))
    found = selectivity(same[None], same, labels, labels)
    none = np.zeros((2, 2))
    assert found.ci95.target_drop == pytest.approx(difference_limits(0, 0, none, 90))
    for ends in (found.ci95.regret, found.ci95.other_change):
        assert ends == pytest.approx(difference_limits(0, 0, none, 180))
    assert found.ci95.gross_loss == pytest.approx(share_limits(0, 0, 180))
    assert found.ci95.agreement == pytest.approx([1 - share_limits(0, 0, 180)[1], 1])
    assert found.harm.ci95 == pytest.approx([0, share_limits(0, 0, 180)[1]])
    gone = np.where(labels == np.arange(3)[:, None], (labels + 1) % 3, labels)
    wrong = (labels + 1) % 3
    found = selectivity(same[None], same, wrong, labels)  # all that was wrong is right: others only gain
    assert [found.other_change, found.other_abs_change] == pytest.approx([1, 1])
    assert found.gross_loss == found.harm.plug_in == 0
    assert found.harm.cross_fitted == pytest.approx(0, abs=1e-8)
    assert found.harm.ci95[1] == found.ci95.gross_loss[1]
    assert found.at_least.ratio is None  # the own class gains as well
    found = selectivity(gone[None], same, labels, labels)
    assert found.target_drop == pytest.approx(1)
    assert found.ratio is found.harm_ratio is found.strict_ratio is None  # nothing to divide by
    low = found.ci95.target_drop[0]
    assert found.at_least.ratio == pytest.approx(low / difference_limits(0, 0, none, 180)[1])
    assert found.at_least.harm_ratio == pytest.approx(low / share_limits(0, 0, 180)[1])
    assert found.at_least.strict_ratio == found.at_least.harm_ratio


def test_terms_of_each_removal_equal_plain_loops():
    rng = np.random.default_rng(5)
    labels = np.array([0] * 9 + [1] * 14 + [3] * 20)
    intact, oracle, predictions = (
        np.where(rng.random(shape) < 0.8, labels, rng.integers(0, 4, shape)) for shape in ((43,), (4, 43), (2, 4, 43))
    )
    drops, regrets, highest = class_terms(predictions, oracle, intact, labels)
    assert drops.shape == regrets.shape == highest.shape == (2, 4)
    for row, i in itertools.product(range(2), range(4)):
        own, found, best = labels == i, predictions[row, i], oracle[i]
        want = (intact[own] == i).mean() - (found[own] == i).mean() if own.any() else np.nan
        assert drops[row, i] == pytest.approx(want, nan_ok=True)
        others = [labels == j for j in (0, 1, 3) if j != i]
        events = np.stack([(found != labels) & (best == labels), (found == labels) & (best != labels)])
        lost, gained = np.mean([events[:, of].mean(1) for of in others], 0)
        covariance = sum(np.cov(events[:, of]) / of.sum() for of in others) / len(others) ** 2
        effective = len(others) ** 2 / sum(1 / of.sum() for of in others)
        assert regrets[row, i] == pytest.approx(lost - gained)
        assert highest[row, i] == pytest.approx(difference_limits(lost, gained, covariance, effective)[1])
