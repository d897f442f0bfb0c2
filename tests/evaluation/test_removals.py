from __future__ import annotations

import numpy as np

from skillfast import Skill
from skillfast.evaluation.interference import Effects, find_pairs
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


def test_fewer_than_two_classes_have_no_pairs():
    labels, one = np.zeros(4, dtype=int), np.zeros((2, 4), dtype=int)
    effects = Effects.of(one, one, one[0], labels)
    assert find_pairs(effects, ["a", "b"]) == {"competition": [], "linkage": []}


def test_removals_that_change_nothing_have_no_ratio():
    labels = np.arange(3).repeat(10)
    found = selectivity(np.tile(labels, (1, 3, 1)), labels, labels, Bootstrap(labels, 20))
    assert found.target_drop == 0
    assert found.ratio is found.strict_ratio is found.harm_ratio is found.ci95.ratio is None


def test_intervals_hold_what_they_are_of():
    rng = np.random.default_rng(0)
    labels = np.arange(3).repeat(60)
    intact = np.where(rng.random(180) < 0.8, labels, (labels + 1) % 3)
    removed = np.where((labels == np.arange(3)[:, None]) & (rng.random((3, 180)) < 0.5), (labels + 2) % 3, intact)
    found = selectivity(removed[None], intact, labels, Bootstrap(labels, 400))
    for name in ("target_drop", "other_change", "other_harm"):
        low, high = getattr(found.ci95, name)
        assert low <= getattr(found, name) <= high <= low + 0.3
