"""The test that may be looked at after every value: its false alarms in long streams, and what it finds how soon."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import integrate

from skillfast.statistics.sequential import DriftTest

if TYPE_CHECKING:
    from collections.abc import Callable

STREAMS, LENGTH, LOOK = 200, 1920, 64


def highest(reference: np.ndarray, stream: np.ndarray, seed: int) -> np.ndarray:
    """Largest evidence in each of many looks."""
    test = DriftTest(reference, seed)
    return np.array([test.update(part) for part in np.split(stream, range(LOOK, len(stream), LOOK))])


@pytest.mark.parametrize(("n", "ties"), [(20, False), (200, True)])
def test_without_a_change_false_alarms_are_rare_at_any_time(n: int, ties: bool) -> None:
    found = []
    for seed in range(STREAMS):
        x = np.random.default_rng(seed).exponential(size=n + LENGTH)
        x = np.round(2 * x) if ties else x  # few values, many equal
        found.append(highest(x[:n], x[n:], seed).max())
    for alpha in (0.05, 0.2):
        rate = np.mean(np.array(found) >= np.log(1 / alpha))
        assert rate <= alpha + 2 * np.sqrt(alpha * (1 - alpha) / len(found)), (alpha, rate)
    assert np.mean(np.array(found) >= np.log(2)) > 0.1  # it does bet


@pytest.mark.parametrize("quiet", [0, 1600])
@pytest.mark.parametrize(
    ("change", "within"),
    [
        (lambda x: x - 0.5, 8),
        (lambda x: x + 0.5, 8),
        (lambda x: x - 2, 1),
        (lambda x: 0.4 * x, 3),  # narrower, at the same mean
        (lambda x: 2.5 * x, 3),
    ],
)
def test_a_change_is_found(change: Callable[[np.ndarray], np.ndarray], within: int, quiet: int) -> None:
    """At the level of one in a thousand, within so many looks of 64, in at least 9 of 10 streams."""
    found = []
    for seed in range(20):
        x = np.random.default_rng(seed).standard_normal(200 + quiet + within * LOOK)
        x[200 + quiet :] = change(x[200 + quiet :])
        evidence = highest(x[:200], x[200:], seed)
        assert (evidence[: quiet // LOOK] < np.log(1000)).all()
        found.append(evidence.max() >= np.log(1000))
    assert np.mean(found) >= 0.9


def test_p_values_are_ranks_among_all_that_came_before() -> None:
    rng = np.random.default_rng(0)
    x = np.round(rng.standard_normal(90), 1)
    test = DriftTest(x[:30], seed=3)
    places = np.random.default_rng(3)
    for start, stop in ((30, 31), (31, 60), (60, 90)):
        found = test._p_values(x[start:stop])
        place = places.random(stop - start)
        expected = [
            ((x[:t] < x[t]).sum() + place[t - start] * ((x[:t] == x[t]).sum() + 1)) / (t + 1)
            for t in range(start, stop)
        ]
        np.testing.assert_allclose(found, expected, atol=1e-9)
        test._seen = np.sort(x[:stop])


def test_evidence_is_a_bettors_money() -> None:
    """Step by step as the sums say, in whatever parts values come; every bet is fair."""
    from skillfast.statistics.sequential import _BETS

    for bet in _BETS:
        assert integrate.quad(bet, 0, 0.5)[0] + integrate.quad(bet, 0.5, 1)[0] == pytest.approx(1, abs=1e-6)
    x = np.random.default_rng(1).standard_normal(300) - 0.3
    whole, parts, single = (DriftTest(np.random.default_rng(0).standard_normal(50)) for _ in range(3))
    whole.update(x)
    for part in np.array_split(x, 7):
        parts.update(part)
    money, waiting = np.zeros(len(_BETS)), 1.0
    for t, value in enumerate(x):
        p = single._p_values(np.array([value]))
        single._seen = np.sort(np.append(single._seen, value))
        wage = 1 / np.log2(t + 2) - 1 / np.log2(t + 3)
        money, waiting = (money + wage) * [float(bet(p)[0]) for bet in _BETS], waiting - wage
    assert whole.evidence == pytest.approx(np.log(money.mean() + waiting), abs=1e-9)
    assert parts.evidence == pytest.approx(whole.evidence, abs=1e-9)
    before = whole.evidence
    assert whole.update([]) == before == whole.evidence
