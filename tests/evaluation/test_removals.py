from __future__ import annotations

import numpy as np
import pytest

from skillfast import Skill
from skillfast.evaluation.controls import own_control
from skillfast.evaluation.interference import Effects, Margins, find_pairs
from skillfast.evaluation.intervals import difference_limits
from skillfast.evaluation.overall import overall_accuracy
from skillfast.evaluation.resampling import Bootstrap
from skillfast.evaluation.selectivity import own_drops, selectivity
from skillfast.evaluation.shapley import occupied_blocks
from skillfast.models.sites import Site


def test_occupied_blocks_follow_the_forward():
    sites = [Site(f"blocks.{i}.mlp", "mlp", i, str(i), 4) for i in range(3)] + [Site("head", "head", None, "h", 4)]
    skills = [Skill("a", {"head": [0], "blocks.2.mlp": [1]}), Skill("b", {"blocks.0.mlp": [2]})]
    assert occupied_blocks(skills, sites) == [0, 2, None]


def test_drops_of_ones_own_class_and_their_resamples_agree():
    rng = np.random.default_rng(0)
    labels = np.arange(3).repeat(40)
    baseline = np.where(rng.random(120) < 0.9, labels, 0)
    predictions = np.where(rng.random((2, 120)) < 0.5, baseline, (labels + 1) % 3)
    drops, resampled = own_drops(predictions, baseline, labels, Bootstrap(labels, 2000))
    for c in range(2):
        for k in range(3):
            own = labels == k
            want = (baseline[own] == k).mean() - (predictions[c, own] == k).mean()
            np.testing.assert_allclose(drops[c, k], want)
            np.testing.assert_allclose(resampled[c, k].mean(), want, atol=0.01)


def test_the_interval_of_a_control_holds_the_spread_of_its_draws():
    """300 runs, each with other images and draws that differ: 95 % intervals cover, those of images alone would not."""
    rng = np.random.default_rng(0)
    classes, n, draws = 4, 30, 20
    labels = np.arange(classes).repeat(n)
    covered, narrow, spreads = [], [], []
    for trial in range(300):
        chance = np.clip(rng.normal(0.2, 0.1, (draws, classes)), 0, 1)  # that a draw costs an image its class
        fragile = rng.random(len(labels)) < 0.5  # images that a draw can cost at all
        lost = (rng.random((draws, len(labels))) < 2 * chance[:, labels]) & fragile
        found = own_control(np.where(lost, (labels + 1) % classes, labels), labels, labels)
        covered.append(found.ci95[0] <= 0.2 <= found.ci95[1])
        means = Bootstrap(labels, 200, trial).own_class(lost.mean(0)).mean(0)
        narrow.append(np.quantile(means, 0.025) <= 0.2 <= np.quantile(means, 0.975))
        spreads.append(found.spread)
    assert 0.93 <= np.mean(covered) <= 0.99
    none = own_control(labels[None].repeat(2, 0), labels, labels)
    assert none.target_drop == 0
    assert none.ci95[0] < 0 < none.ci95[1]  # no event is no certainty
    assert np.mean(narrow) < np.mean(covered) - 0.02
    assert 0.1 < np.mean(spreads) < 0.16  # 0.1, and what 30 images add


def test_a_control_is_a_mean_over_classes_and_draws():
    labels, intact = np.array([0, 0, 1, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 0])
    predictions = np.array([[1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0]])
    found = own_control(predictions, intact, labels)
    np.testing.assert_allclose(found.per_class, [0.25, (-0.25 + 0.5) / 2])
    np.testing.assert_allclose(found.target_drop, np.mean(found.per_class))
    np.testing.assert_allclose(found.spread, np.mean([np.std([0.5, 0], ddof=1), np.std([-0.25, 0.5], ddof=1)]))
    assert own_control(predictions[:1], intact, labels).spread is None


def test_fewer_than_two_classes_have_no_pairs():
    labels, one = np.zeros(4, dtype=int), np.zeros((2, 4), dtype=int)
    margins = Margins(np.zeros((2, 4)), np.zeros((1, 2, 4)), np.zeros((2, 4)), np.zeros(4))
    effects = Effects.of(one, one, one[0], labels, margins)
    assert find_pairs(effects, ["a", "b"]) == {"competition": [], "linkage": [], "oracle_explains": []}


def test_removals_that_change_nothing_have_no_ratio():
    labels = np.arange(3).repeat(10)
    same = np.tile(labels, (3, 1))
    found = selectivity(same[None], same, labels, labels)
    assert found.target_drop == found.regret == found.gross_loss == 0
    assert found.agreement == 1
    assert found.ratio is found.strict_ratio is found.harm_ratio is None
    assert found.at_least.ratio is found.at_least.strict_ratio is found.at_least.harm_ratio is None
    margins = Margins(np.ones((3, 30)), np.ones((2, 3, 30)), np.ones((3, 30)), np.ones(30))
    pairs = find_pairs(Effects.of(same, same, labels, labels, margins), ["a", "b", "c"])
    assert pairs == {"competition": [], "linkage": [], "oracle_explains": []}  # a margin that stays is no help
    low, high = found.ci95.regret  # 60 decisions say nothing of what one in a hundred would do
    assert -0.07 < low < -0.05
    assert 0.05 < high < 0.07


def test_overall_changes_have_the_intervals_of_shares_of_all_examples():
    rng = np.random.default_rng(0)
    labels = np.array([0] * 30 + [2] * 50)  # no example of class 1
    intact = np.where(rng.random(80) < 0.8, labels, 1)
    removed, drawn = np.where(rng.random((2, 80)) < 0.7, labels, 1), np.where(rng.random((3, 2, 80)) < 0.8, labels, 1)
    skills = [Skill("a", {"head": [0, 1], "blocks.0.mlp": [4]}), Skill("b", {"head": [1]})]
    found = overall_accuracy(removed, drawn, intact, labels, skills, 12)
    assert found.n_test == 80
    for i, (removal, skill) in enumerate(zip(found.removals, skills, strict=True)):
        gained, lost = (removed[i] == labels) & (intact != labels), (removed[i] != labels) & (intact == labels)
        parts = [np.stack([gained, lost])[:, labels == c] for c in (0, 2)]
        covariance = sum(np.cov(part) * (part.shape[1] / 80) ** 2 / part.shape[1] for part in parts)
        want = difference_limits(gained.mean(), lost.mean(), covariance, 80)
        assert removal.ci95 == pytest.approx(want)
        assert removal.change == pytest.approx(gained.mean() - lost.mean())
        assert (removal.skill, removal.neurons, removal.share) == (skill.name, len(skill), len(skill) / 12)
        change = [(rows[i] == labels).mean() - (intact == labels).mean() for rows in drawn]
        assert removal.random_changes == pytest.approx(change)
    mean = (drawn == labels).mean() - (intact == labels).mean()
    assert found.random_change == pytest.approx(mean)
