"""What a test set can see, and what is said of each removal."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binom, binomtest, multinomial, norm

from skillfast.evaluation.harm import cross_fitted, noise_floor, plug_in
from skillfast.evaluation.intervals import difference_limits as limits
from skillfast.evaluation.power import loss_p, power, smallest_visible
from skillfast.evaluation.selectivity import selectivity
from skillfast.evaluation.verdicts import verdicts

K = 5
NAMES = list("abcde")


@pytest.mark.parametrize(("n", "chance", "level"), [(54, 0.01, 0.05), (100, 0.02, 0.05 / 90), (500, 0.01, 0.05 / 90)])
def test_predicted_power_is_that_of_simulation(n, chance, level):
    rng = np.random.default_rng(0)
    for harm in (0.0, 0.05, 0.15):
        losses, gains, _ = rng.multinomial(n, [chance + harm, chance, 1 - 2 * chance - harm], size=4000).T
        assert power(n, chance, harm, level) == pytest.approx((loss_p(losses, gains) <= level).mean(), abs=0.03)
        mid = (loss_p(losses, gains) + loss_p(losses + 1, gains - 1)) / 2 <= level
        assert power(n, chance, harm, level, mid=True) == pytest.approx(mid.mean(), abs=0.03)


def test_the_p_is_mcnemars():
    for losses, gains in ((0, 0), (3, 1), (5, 0), (2, 6)):
        want = binomtest(losses, losses + gains, alternative="greater").pvalue if losses + gains else 1
        assert loss_p(np.array(losses), np.array(gains)) == pytest.approx(want)


def test_the_smallest_visible_harm_has_a_power_of_80_percent():
    for n, level in ((54, 0.05), (200, 0.05 / 90)):
        assert power(n, 0.01, smallest_visible(n, 0.01, level), level) == pytest.approx(0.8, abs=0.01)
        least = smallest_visible(n, 0.01, level, mid=True)
        assert power(n, 0.01, least, level, mid=True) == pytest.approx(0.8, abs=0.01)
        assert least < smallest_visible(n, 0.01, level)
    assert smallest_visible(54, 0.01, 0.05) > smallest_visible(540, 0.01, 0.05)
    assert smallest_visible(54, 0.01, 0.05) < smallest_visible(54, 0.01, 0.05 / 90)
    assert smallest_visible(4, 0.01, 0.05 / 90) is None
    assert smallest_visible(54, 0.5, 0.05) is None  # chance alone changes every example


def removals(rng, harm, n=100, flips=0.01):
    """Each removal takes its class whole; removal i takes `harm[i, j]` of class j besides; chance flips either way."""
    labels = np.arange(K).repeat(n)
    known = rng.random(K * n) < 0.9
    intact = np.where(known, labels, (labels + 1) % K)
    chance = rng.random((K, K * n))
    lost = known & (chance < (flips + harm[:, labels]) / 0.9)
    predictions = np.where(lost, (labels + 1) % K, np.where(~known & (chance < flips / 0.1), labels, intact))
    return np.where(labels == np.arange(K)[:, None], (labels + 1) % K, predictions), intact, labels


def test_planted_harm_is_called_harmful_and_nothing_else_is():
    harm = np.zeros((K, K))
    harm[1, 3] = 0.3
    found = verdicts(*removals(np.random.default_rng(0), harm), NAMES)
    assert found["b"].verdict == "harmful"
    assert found["b"].harmed == ["d"]
    assert found["b"].harm.ci95[0] > 0.02
    for name in "acde":
        assert found[name].verdict == "not above"
        assert found[name].others_lose_at_most <= found[name].visible_of_all
        assert found[name].harmed == []
    assert found["a"].target_drop == pytest.approx(0.9, abs=0.1)
    low, high = found["a"].ci95
    assert low < found["a"].target_drop < high


def test_what_is_said_of_all_others_is_seldom_wrong():
    """Of 100 removals without harm hardly 5 are called harmful, and of 80 with harm few bounds are too low."""
    harm = np.full((K, K), 0.0)
    harm[:, 2] = 0.04
    wrong, low = 0, 0
    for trial in range(20):
        rng = np.random.default_rng(trial)
        none = verdicts(*removals(rng, np.zeros((K, K))), NAMES)
        wrong += sum(found.verdict == "harmful" for found in none.values())
        some = verdicts(*removals(rng, harm), NAMES)
        low += sum(found.others_lose_at_most < 0.04 for name, found in some.items() if name != "c")
    assert wrong <= 9
    assert low <= 8


def test_few_examples_decide_nothing():
    found = verdicts(*removals(np.random.default_rng(0), np.zeros((K, K)), n=6), NAMES)
    assert {one.verdict for one in found.values()} == {"undecided"}
    assert found["a"].visible_of_all is None


def test_losses_that_gains_make_up_for_are_no_harm_below_0():
    """What examples add to an estimate of 0 is not 0, and adds up to it within rounding."""
    for n in range(20, 80):
        labels = np.arange(3).repeat(n)
        intact, predictions = labels.copy(), np.tile(labels, (3, 1))
        predictions[0, n], intact[n + 1] = 2, 2  # of class b one is lost and one gained
        harm = verdicts(predictions, intact, labels, "abc")["a"].harm
        assert harm.plug_in == 0
        assert harm.cross_fitted < 0
        assert selectivity(predictions[None], predictions, intact, labels).harm.plug_in >= 0


def test_a_verdict_says_what_these_examples_would_have_shown():
    harm = np.zeros((K, K))
    harm[1, 3] = 0.3
    predictions, intact, labels = removals(np.random.default_rng(3), harm, n=80)
    predictions[0, labels == 4] = 4  # one class gains
    labels, intact, predictions = labels[10:], intact[10:], predictions[:, 10:]  # of class a 70
    found = verdicts(predictions, intact, labels, NAMES)
    for i, name in enumerate(NAMES):
        change = (predictions[i] == labels) * 1 - (intact == labels)
        others = [change[labels == j] for j in range(K) if j != i]
        losses, gains, n = (
            np.array([f(x) for x in others]) for f in (lambda x: (x < 0).sum(), lambda x: (x > 0).sum(), len)
        )
        chance, least = np.mean(np.minimum(losses, gains) / n), 80 if i == 0 else 70
        one = found[name]
        assert one.target_drop == pytest.approx(-change[labels == i].mean())
        assert one.visible_alone == pytest.approx(smallest_visible(least, chance, 0.05))
        assert one.visible_of_all == pytest.approx(smallest_visible(least, chance, 0.05 / 20))
        p = [
            binomtest(int(a), int(a + b), alternative="greater").pvalue if a + b else 1
            for a, b in zip(losses, gains, strict=True)
        ]
        assert one.harmed == [
            c for c, value in zip([c for c in NAMES if c != name], p, strict=True) if value <= 0.05 / 4
        ]
        assert [one.harm.plug_in, one.harm.cross_fitted, one.harm.noise_floor] == pytest.approx(
            [estimate(losses, gains, n).mean() for estimate in (plug_in, cross_fitted, noise_floor)]
        )
        bounds = [
            limits((x < 0).mean(), (x > 0).mean(), np.cov(x < 0, x > 0) / len(x), len(x), norm.isf(0.05 / 4))[1]
            for x in others
        ]
        assert one.others_lose_at_most == pytest.approx(max(bounds))
        own = change[labels == i]
        want = limits((own < 0).mean(), (own > 0).mean(), np.cov(own < 0, own > 0) / len(own), len(own))
        assert one.ci95 == pytest.approx(want)
        assert 0 <= one.harm.ci95[0] <= max(0, one.harm.cross_fitted) <= one.harm.plug_in <= one.harm.ci95[1] <= 1


def test_power_is_the_sum_over_all_outcomes():
    """Chances of losses and gains from the multinomial; a test's p from the binomial."""
    for n, chance, harm, level in ((6, 0.1, 0.3, 0.05), (5, 0.0, 0.9, 0.05), (7, 0.25, 0.5, 0.2), (6, 0.0, 1.0, 0.01)):
        want = 0.0
        for losses in range(n + 1):
            for gains in range(n + 1 - losses):
                p = binomtest(losses, losses + gains, alternative="greater").pvalue if losses + gains else 1
                parts = [chance + harm, chance, max(0.0, 1 - 2 * chance - harm)]
                want += (p <= level) * multinomial.pmf([losses, gains, n - losses - gains], n, parts)
        assert power(n, chance, harm, level) == pytest.approx(want)
    assert power(50, 0.0, 0.0, 0.05) == 0
    assert power(8, 0.5, 0.4, 0.05) == pytest.approx(binom.sf(6, 8, 0.9))  # every example changes
    assert smallest_visible(30, 0.0, 0.05) == pytest.approx(brentq(lambda h: binom.sf(4, 30, h) - 0.8, 0, 1), abs=1e-3)
