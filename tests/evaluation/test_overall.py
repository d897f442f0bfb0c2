from __future__ import annotations

import numpy as np
import pytest

from skillfast import Skill
from skillfast.evaluation.overall import overall_accuracy


def test_changes_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(2).repeat([120, 80]))
    intact = np.where(rng.random(200) < 0.9, labels, 1 - labels)
    predictions = np.where(rng.random((2, 200)) < 0.3, 1 - labels, intact)
    controls = np.where(rng.random((3, 2, 200)) < 0.05, 1 - labels, intact)
    skills = [Skill("a", {"head": [0, 1]}), Skill("b", {"head": [4]})]
    found = overall_accuracy(predictions, controls, intact, labels, skills, 50)
    before = sum(int(a == b) for a, b in zip(intact, labels, strict=True)) / 200
    assert found.accuracy == pytest.approx(before)
    assert found.n_test == 200
    of_draws = np.array([[(row == labels).mean() - before for row in draw] for draw in controls])
    assert found.random_change == pytest.approx(of_draws.mean())
    for i, removal in enumerate(found.removals):
        after = (predictions[i] == labels).mean()
        assert (removal.skill, removal.neurons, removal.share) == (("a", 2, 0.04), ("b", 1, 0.02))[i]
        assert removal.accuracy == pytest.approx(after)
        assert removal.change == pytest.approx(after - before)
        np.testing.assert_allclose(removal.random_changes, of_draws[:, i])
        change = (predictions[i] == labels).astype(float) - (intact == labels)
        # the spread of the mean over examples drawn anew within their classes
        error = np.sqrt(sum(np.square(change[labels == c] - change[labels == c].mean()).sum() for c in (0, 1))) / 200
        low, high = removal.ci95
        assert low < removal.change < high
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
