"""Two models on the same examples: tests against scipy, planted pairs for each verdict, and a gate."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from compared import judged, planted, wrong
from conftest import one_line
from scipy.stats import binom, binomtest, false_discovery_control, hypergeom, norm

from skillfast.errors import ArgumentError
from skillfast.evaluation import comparison
from skillfast.evaluation.comparison import (
    CHANGES,
    ClassPair,
    Measured,
    carried,
    changes_of,
    interferences,
    moved_between,
    overlap_of,
    verdicts,
    visible,
)
from skillfast.evaluation.gate import Quantities, Quantity, decide
from skillfast.evaluation.intervals import Z, share_limits
from skillfast.evaluation.paired import (
    PairedDifference,
    discoveries,
    kl_divergence,
    mean_limits,
    shared_by_chance,
)
from skillfast.evaluation.power import smallest_visible
from skillfast.results.bench import Harm
from skillfast.results.comparison import Overlap, PairedChange, Shift
from skillfast.results.gates import gates_of

FINDINGS = {"lost", "gained", "weakened", "strengthened", "moved", "merged"}


# paired tests


def test_of_decisions_it_is_the_mid_p_mcnemar_test():
    rng = np.random.default_rng(0)
    for _ in range(50):
        change = rng.choice([-1, 0, 0, 1], 40)
        gains, losses = int((change > 0).sum()), int((change < 0).sum())
        found = PairedDifference(change)
        seen = binom.pmf(gains, gains + losses, 0.5)
        assert found.p == pytest.approx(binomtest(gains, gains + losses).pvalue - (seen if gains != losses else 0))
        less = binomtest(losses, gains + losses, alternative="greater").pvalue
        assert found.p_less == pytest.approx(less)
        assert found.least_p == pytest.approx(0.5 ** (gains + losses))


def test_of_drops_it_is_the_mid_p_test_of_signs():
    """All signs of a few differences by hand, of 1 and of 2."""
    first, second = np.array([1, 1, 0, 1, 1, 0, -1]), np.array([-1, 0, 1, -1, -1, 0, 0])
    total = first - second
    size = np.abs(total[total != 0])
    signs = 1 - 2 * (np.arange(2 ** len(size))[:, None] >> np.arange(len(size)) & 1)
    sums = np.abs((signs * size).sum(1))
    found = PairedDifference(first, second)
    assert (found.ones, found.twos) == ((size == 1).sum(), (size == 2).sum())
    assert found.p == pytest.approx(((sums > abs(total.sum())) + (sums == abs(total.sum())) / 2).mean())
    assert PairedDifference(np.zeros(9)).p == PairedDifference(np.array([1, -1])).p == 1
    every = PairedDifference(np.array([1, 1]), np.array([-1, -1]))
    assert every.p == every.least_p == 0.25


def test_limits_are_those_of_a_bootstrap_where_much_changes():
    rng = np.random.default_rng(1)
    right = (rng.random((4, 800)) < [[0.9], [0.8], [0.3], [0.35]]).astype(int)  # base, new, and without the skill
    parts = right[1] - right[0], right[3] - right[2]
    rows = rng.integers(0, 800, (2000, 800))
    for taken in (parts[:1], parts):
        total = taken[0] - sum(taken[1:], np.zeros(800, int))
        want = np.quantile(total[rows].mean(1), [0.025, 0.975])
        np.testing.assert_allclose(PairedDifference(*taken).limits(), want, atol=0.006)


def test_limits_have_a_width_where_nothing_changes():
    low, high = PairedDifference(np.zeros(54)).limits()
    assert high == -low == pytest.approx(0.0664, abs=1e-3)
    low, high = PairedDifference(np.zeros(54), np.zeros(54)).limits()
    assert high == pytest.approx(0.0664 * 2**0.5, abs=1e-3)


def test_limits_of_fewer_than_two_examples_are_all_that_can_be():
    """A difference of two changes lies between -2 and 2."""
    assert PairedDifference(np.ones(1)).limits() == PairedDifference(np.empty(0)).limits() == (-2, 2)


def test_limits_hold_the_truth():
    rng, held = np.random.default_rng(2), 0
    for _ in range(400):
        change = rng.choice([-1, 0, 1], 60, p=[0.12, 0.84, 0.04])
        low, high = PairedDifference(change).limits()
        held += low <= -0.08 <= high
    assert held / 400 >= 0.93


def test_equivalence_is_two_one_sided_tests():
    """At p of 5 % the 90 % interval touches the margin; beyond the margin nothing is equivalent."""
    change = np.array([1, -1, 1] + [0] * 97)
    found = PairedDifference(change)
    low, high = found.limits(1.6448536)
    assert found.equivalence_p(max(high, -low)) == pytest.approx(0.05, abs=1e-6)
    assert found.equivalence_p(0.2) < found.equivalence_p(0.08)
    assert PairedDifference(np.ones(50)).equivalence_p(0.5) == 1


def test_equivalence_is_seldom_said_of_a_change_as_large_as_the_margin():
    rng = np.random.default_rng(3)
    said = [
        PairedDifference(rng.choice([-1, 0, 1], 200, p=[0.06, 0.93, 0.01])).equivalence_p(0.05) <= 0.05
        for _ in range(400)
    ]
    assert np.mean(said) <= 0.075  # 5 %, and two and a half standard errors


def test_tests_that_could_not_be_significant_are_not_corrected_for():
    p, least = np.array([0.02, 1.0, 1.0, 0.5]), np.array([1e-3, 0.5, 1.0, 0.25])
    np.testing.assert_allclose(discoveries(p, least), [0.02, 1, 1, 1])
    p, least = np.array([0.02, 0.04, 0.3]), np.full(3, 1e-9)
    np.testing.assert_allclose(discoveries(p, least), false_discovery_control(p))
    assert discoveries(np.empty(0), np.empty(0)).shape == (0,)


@pytest.mark.parametrize("n", [20, 60])
def test_p_of_equal_models_is_seldom_small(n):
    """The rate of false findings in closed form, however many of the examples change."""
    changed = np.arange(1, n + 1)
    p = [np.array([PairedDifference(np.repeat([1, -1], [up, m - up])).p for up in range(m + 1)]) for m in changed[1:]]
    for level in (0.05, 0.005):
        rate = np.array([0.0] + [binom.pmf(np.arange(m + 1), m, 0.5)[of <= level].sum() for m, of in enumerate(p, 2)])
        found = [binom.pmf(changed, n, share) @ rate for share in np.linspace(0.01, 0.8, 80)]
        assert 0.5 * level < max(found) <= 1.02 * level


def test_overlap_beside_chance():
    one, other, widths = {"a": {0, 1, 2}, "b": {5}}, {"a": {1, 2, 9}, "b": {6}}, {"a": 20, "b": 8}
    found = overlap_of(one, other, widths)
    assert (found.shared, found.jaccard) == (2, pytest.approx(2 / 6))
    expected = 9 / 20 + 1 / 8
    assert found.chance == pytest.approx(expected / (8 - expected))
    same, nothing = overlap_of({"a": {1}}, {"a": {1}}, {"a": 20}), overlap_of({}, {"a": {1}}, {"a": 20})
    assert (same.shared, same.jaccard, same.chance) == (1, 1, pytest.approx((1 / 20) / (2 - 1 / 20)))
    assert (nothing.shared, nothing.jaccard, nothing.chance) == (0, 0, 0)
    rng, many = np.random.default_rng(5), 4000
    drawn = [len({0, 1, 2} & set(rng.choice(20, 3, replace=False))) + (rng.integers(8) == 5) for _ in range(many)]
    assert shared_by_chance(one, other, widths) == pytest.approx(np.mean(np.array(drawn) >= 2), abs=0.02)
    assert shared_by_chance({"a": {1}}, {"a": {2}}, widths) == 1
    assert shared_by_chance({"a": {1, 2}}, {"a": {1, 2}}, widths) == pytest.approx(hypergeom.pmf(2, 20, 2, 2))


def test_divergence_of_probabilities():
    base, new = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    np.testing.assert_allclose(kl_divergence(base, new), [0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0], atol=1e-12)
    gone = np.array([[0.0, -np.inf]])
    assert kl_divergence(gone, gone).tolist() == [0]
    assert mean_limits(np.array([1.0, 3.0]), 2.0) == pytest.approx((0, 4))  # 2 +- 2 * sqrt(2) / sqrt(2)
    assert mean_limits(np.array([1.0])) == (-np.inf, np.inf)
    low, high = mean_limits(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == (pytest.approx(2 - 1.96 / 3**0.5, abs=1e-3), pytest.approx(2 + 1.96 / 3**0.5, abs=1e-3))


# verdicts


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_a_model_against_itself_is_unchanged(rng):
    labels, base, _ = planted(rng, n=54)
    assert judged(labels, base, base)[0] == [["unchanged"]] * 10
    few, base, _ = planted(rng, n=20)
    assert judged(few, base, base)[0] == [["undecided"]] * 10  # no difference is found, but none is ruled out


def test_other_neurons_of_the_same_model_are_no_finding(rng):
    """A mask of another seed takes 8 points less, of the same decisions."""
    labels, base, _ = planted(rng, drop=0.85)
    _, _, other = planted(np.random.default_rng(8), drop=0.77)
    new = Measured(base.intact, np.where(base.intact == labels, other.removed, base.intact), None)
    for again, said in ((None, "undecided"), (base.removed, "unchanged")):
        found, _ = judged(labels, base, Measured(new.intact, new.removed, again))
        assert not FINDINGS & {name for names in found for name in names}
        assert said in {name for names in found for name in names}
    assert found == [["unchanged"]] * 10


def test_a_lost_class_and_a_weaker_one(rng):
    labels, base, _ = planted(rng)
    intact = np.where((labels == 2) & (rng.random(1000) < 0.9), 3, base.intact)
    intact = np.where((labels == 5) & (rng.random(1000) < 0.25), 6, intact)
    changed = Measured(intact, np.where(intact == base.intact, base.removed, intact), None)
    found, four = judged(labels, base, changed)
    assert (found[2], found[5]) == (["lost"], ["weakened"])
    assert all(not FINDINGS & set(found[i]) for i in range(10) if i not in (2, 5))
    assert four["accuracy"][2].change < -0.7
    back, _ = judged(labels, changed, base)
    assert (back[2], back[5]) == (["gained"], ["strengthened"])


def test_a_skill_that_moved_is_told_from_one_that_weakened(rng):
    """BASE's neurons of class 0 take nothing from NEW any more; in NEW its own take as much, or little."""
    labels, base, _ = planted(rng)
    own = labels == 0
    without_base = base.removed.copy()
    without_base[0, own] = base.intact[own]
    moved = Measured(base.intact, base.removed, without_base)
    assert judged(labels, base, moved)[0][0] == ["moved"]
    weaker = base.removed.copy()
    weaker[0, own] = np.where(rng.random(100) < 0.7, base.intact[own], base.removed[0, own])
    found, _ = judged(labels, base, Measured(base.intact, weaker, np.where(own, weaker, base.removed)))
    assert found[0] == ["weakened"]
    assert found[1:] == [["unchanged"]] * 9


def test_without_the_earlier_skill_overlap_tells_what_moved(rng):
    labels, base, _ = planted(rng)
    widths = {"a": 100}
    same, none = overlap_of({"a": {1, 2}}, {"a": {1, 2}}, widths), overlap_of({"a": {1, 2}}, {"a": {3}}, widths)
    found, _ = judged(labels, base, base, [none] + [same] * 9)
    assert found == [["moved"]] + [["unchanged"]] * 9
    idle = Measured(
        base.intact, np.where((labels == 0) & (np.arange(10)[:, None] == 0), base.intact, base.removed), None
    )
    for one, other, verdict in (
        (idle, base, "strengthened"),
        (base, idle, "weakened"),
    ):  # what took nothing moves nowhere
        assert judged(labels, one, other, [none] + [same] * 9)[0][0] == [verdict]


def change(base, new, q=0.01, ci95=(0.0, 0.0), equivalence_q=1.0):
    return PairedChange(
        base=base, new=new, change=new - base, ci95=list(ci95), p=q, q=q, equivalence_q=equivalence_q
    )  # fmt: skip


def test_where_one_verdict_ends_and_another_begins():
    """Each limit from both sides, of a class with 100 examples."""
    same, up, down = change(0.5, 0.5), change(0.2, 0.8), change(0.8, 0.2)
    most = share_limits(0.3, 0.0, 100)[1]
    twice = most / 0.5
    less = float(np.nextafter(twice, 0))
    close, apart = (Overlap(shared=1, jaccard=0.1, chance=0.1, p=p) for p in (0.05, 0.051))
    works, idle, hurts = (SimpleNamespace(limits=lambda low=low: (low, 1.0)) for low in (0.1, 0.0, -0.1))

    def told(accuracy, drop=same, base_skill=None, own=None, overlap=None, merged=False, before=works, after=works):
        pair = SimpleNamespace(n=100, taken={("base", "base"): before, ("new", "new"): after})
        found = {"accuracy": accuracy, "drop": drop, "base_skill": base_skill, "in_new": own}
        return verdicts(pair, found, overlap, merged)

    assert told(None) == told(same, None) == ["undecided"]
    # accuracy: half of what it had, at the far end of an interval
    assert told(change(twice, 0.3)) == ["lost"]
    assert told(change(less, 0.3)) == ["weakened"]
    assert told(change(0.3, twice)) == ["gained"]
    assert told(change(0.3, less)) == ["strengthened"]
    assert told(change(0.3, 0.9, q=0.05)) == ["gained"]
    assert told(change(0.9, 0.3, q=0.05)) == ["lost"]
    assert told(change(0.9, 0.3, q=0.051)) == told(change(0.3, 0.9, q=0.051)) == told(same) == ["undecided"]
    # what removals take, where accuracy says nothing
    assert told(same, down, down) == ["weakened"]
    assert told(same, up, up) == ["strengthened"]
    for drop, base_skill in ((down, up), (up, down), (down, same), (same, down), (up, same), (same, up)):
        assert told(same, drop, base_skill) == ["undecided"]
    assert told(change(less, 0.3), up, up) == ["weakened"]
    for end, verdict in ((-0.501, "weakened"), (-0.5, "undecided"), (0.5, "undecided"), (0.501, "strengthened")):
        drop = change(0.8, 0.2, ci95=(-0.9, end)) if end < 0 else change(0.2, 0.8, ci95=(end, 0.9))
        assert told(same, drop) == [verdict]
        unsure = change(drop.base, drop.new, q=0.06, ci95=drop.ci95)
        assert told(same, unsure) == ["undecided"]
    # moved
    for new, verdicts_ in ((0.4, ["moved"]), (0.401, ["weakened"])):
        assert told(same, down, change(0.8, new), own=up) == verdicts_
    assert told(same, down, down, own=down) == told(same, down, down) == ["weakened"]
    assert told(same, same, change(0.8, 0.2, q=0.06), own=up) == ["undecided"]
    assert told(same, overlap=apart) == ["moved"]
    assert told(same, overlap=close) == told(same) == ["undecided"]
    for before, after in ((works, idle), (idle, works), (hurts, hurts)):
        assert told(same, overlap=apart, before=before, after=after) == ["undecided"]
    # several, the gravest first
    assert told(change(twice, 0.3), overlap=apart, merged=True) == ["lost", "merged"]
    assert told(change(less, 0.3), overlap=apart, merged=True) == ["merged", "weakened", "moved"]
    assert told(change(0.3, twice), overlap=apart) == ["moved", "gained"]
    assert told(change(0.3, less), overlap=apart) == ["moved", "strengthened"]
    # unchanged: both are within the margin
    for one, other, verdict in ((0.05, 0.05, "unchanged"), (0.051, 0.05, "undecided"), (0.05, 0.051, "undecided")):
        accuracy, drop = (change(0.5, 0.5, 1.0, equivalence_q=q) for q in (one, other))
        assert told(accuracy, drop) == [verdict]
        # where NEW was measured with BASE's skill that decides, and no other choice of neurons
        assert told(accuracy, same, drop) == [verdict]
    assert told(change(0.5, 0.5, 1.0, equivalence_q=0.0), change(0.5, 0.5, 1.0, equivalence_q=0.0), same) == [
        "undecided"
    ]


def test_changes_are_means_with_the_paired_test_of_each_class():
    """Of classes with many, with one and without examples; of the other run's skill where that was measured."""
    rng = np.random.default_rng(0)
    labels = np.array([0] * 40 + [1] * 25 + [3] + [4] * 30)
    base, new = (
        Measured(np.where(rng.random(96) < 0.7, labels, 2), np.where(rng.random((5, 96)) < 0.4, labels, 2), None)
        for _ in "ab"
    )
    new, base = (
        Measured(side.intact, side.removed, np.where(rng.random((5, 96)) < 0.8, labels, 2)) for side in (new, base)
    )
    pairs = [ClassPair(base, new, label, labels == label) for label in range(5)]
    assert [pair.n for pair in pairs] == [40, 25, 0, 1, 30]
    right = {}
    for i in (0, 1, 3, 4):
        rows = labels == i
        b, w, b0, w0, wb, bw = (
            (decided[rows] == i).astype(int)
            for decided in (
                base.intact,
                new.intact,
                base.removed[i],
                new.removed[i],
                new.other[i],
                base.other[i],
            )
        )
        right[i] = {
            "accuracy": ((b, w), PairedDifference(w - b)),
            "drop": ((b - b0, w - w0), PairedDifference(w - b, w0 - b0)),
            "base_skill": ((b - b0, w - wb), PairedDifference(w - b, wb - b0)),
            "new_skill": ((b - bw, w - w0), PairedDifference(w - b, w0 - bw)),
            "in_base": ((b - b0, b - bw), PairedDifference(b0 - bw)),
            "in_new": ((w - wb, w - w0), PairedDifference(wb - w0)),
        }
        takes = {("base", "base"): b - b0, ("base", "new"): b - bw, ("new", "base"): w - wb, ("new", "new"): w - w0}
        assert pairs[i].taken.keys() == takes.keys()
        for way, parts in takes.items():
            mine = pairs[i].taken[way]
            assert mine.change == pytest.approx(parts.mean())
            assert mine.limits() == PairedDifference(parts).limits()
    for name in CHANGES:
        margin = 0.2 if name == "accuracy" else 0.4
        found = changes_of(pairs, name, margin)
        assert found[2] is None
        known = [right[i][name] for i in (0, 1, 3, 4)]
        q = discoveries(np.array([d.p for _, d in known]), np.array([d.least_p for _, d in known]))
        within = false_discovery_control([d.equivalence_p(margin) for _, d in known])
        for one, ((before, after), difference), q1, q2 in zip(
            [found[i] for i in (0, 1, 3, 4)], known, q, within, strict=True
        ):
            want = (before.mean(), after.mean(), after.mean() - before.mean(), difference.p, q1, q2)
            assert (one.base, one.new, one.change, one.p, one.q, one.equivalence_q) == pytest.approx(want)
            assert one.ci95 == pytest.approx(difference.limits())
    alone = Measured(base.intact, base.removed, None)
    nothing = [ClassPair(alone, alone, label, labels == label) for label in range(5)]
    for name in ("base_skill", "new_skill", "in_base", "in_new"):
        assert changes_of(nothing, name, 0.1) == [None] * 5
    assert carried(nothing[0], "base", "new") is carried(pairs[2], "base", "new") is None


def test_a_set_carries_a_class_where_its_whole_interval_is_half_of_the_own_set_or_more():
    """Of 100 examples, all right intact, the own set takes 80: at 40 both ends of the interval have to be beyond."""
    labels, intact = np.zeros(100, int), np.zeros(100, int)

    def told(takes, own=80):
        without, ours = (np.where(np.arange(100) < many, 1, 0)[None] for many in (takes, own))
        one = Measured(intact, ours, without)
        return carried(ClassPair(one, one, 0, labels == 0), "base", "new")

    ends = {takes: told(takes) for takes in range(25, 60)}
    assert {takes: found.carries for takes, found in ends.items()} == {
        takes: "yes" if found.ci95[0] >= 0.4 else "no" if found.ci95[1] <= 0.4 else "undecided"
        for takes, found in ends.items()
    }
    assert {found.carries for found in ends.values()} == {"yes", "no", "undecided"}
    for takes, found in ends.items():
        assert (found.takes, found.own) == (pytest.approx(takes / 100), 0.8)
        low, high = PairedDifference((np.arange(100) < takes).astype(int)).limits()
        assert found.ci95 == pytest.approx([low, high])
    assert told(50, own=0).carries == "undecided"  # an own set that takes nothing has no half
    one = Measured(intact, np.ones((1, 100), int), np.zeros((1, 100), int))
    other = Measured(intact, np.zeros((1, 100), int), np.ones((1, 100), int))
    pair = ClassPair(one, other, 0, labels == 0)
    assert (carried(pair, "new", "base").takes, carried(pair, "new", "base").own) == (1, 0)
    assert (carried(pair, "base", "new").takes, carried(pair, "base", "new").carries) == (0, "no")


def test_what_would_have_been_seen():
    """As many examples flip by chance as flip against the larger direction."""
    labels = np.zeros(80, int)
    decided = np.zeros((3, 80), int)
    decided[1, :6] = decided[2, 6:9] = 1  # six were lost, three gained
    sides = [Measured(row, np.ones((1, 80), int), None) for row in decided]
    for one, other in ((2, 1), (1, 2)):
        found = visible(ClassPair(sides[one], sides[other], 0, labels == 0), 5)
        want = [smallest_visible(80, 3 / 80, 0.025, mid=True), smallest_visible(80, 3 / 80, 0.005, mid=True)]
        assert list(found) == want
    assert visible(ClassPair(*sides[:2], 0, labels == 1), 5) == (None, None)


def test_where_a_skill_moved_to():
    there, elsewhere = {"0": Shift(0.9, 0.8), "1": Shift(0.1, 0.2)}, {"0": Shift(0.9, 0.1), "1": Shift(0.1, 0.9)}
    assert moved_between(there, there) == ["neurons"]
    assert moved_between(None, elsewhere) == ["blocks"]
    assert moved_between(elsewhere, there) == ["kinds"]


def test_half_is_elsewhere_at_a_quarter():
    shares = {"0": Shift(0.75, 0.5), "1": Shift(0.25, 0.5)}
    assert moved_between(shares, None) == ["kinds"]
    assert moved_between(shares, shares) == ["blocks", "kinds"]
    assert moved_between({"0": Shift(0.75, 0.51), "1": Shift(0.25, 0.49)}, None) == ["neurons"]


def by_hand(base, new, labels):
    """What `interferences` gives, pair by pair, and all signs of all differences."""
    k, tests = len(base.removed), {}
    for i, j in itertools.permutations(range(k), 2):
        rows = np.flatnonzero(labels == j)
        if len(rows):
            of = [(side.removed[i, rows] == j).astype(int) - (side.intact[rows] == j) for side in (base, new)]
            total = of[1] - of[0]
            sums = np.ones(1)  # of -s ... s in steps of 1
            for size in np.abs(total[total != 0]):
                sums = np.convolve(sums, [0.5, *[0] * (2 * size - 1), 0.5])
            p = sums[: total.sum() + (len(sums) - 1) // 2 + 1].sum()
            parts = [(new.removed[i, rows] == j).astype(int) - (base.removed[i, rows] == j),
                     (new.intact[rows] == j).astype(int) - (base.intact[rows] == j)]  # fmt: skip
            tests[i, j] = (of[0].mean(), of[1].mean(), PairedDifference(*parts).limits(), p, 0.5 ** (total != 0).sum())
    q = discoveries(np.array([t[3] for t in tests.values()]), np.array([min(t[4], 1) for t in tests.values()]))
    found = [(*pair, *t[:4], value) for (pair, t), value in zip(tests.items(), q, strict=True) if value <= 0.05]
    return sorted(found, key=lambda f: f[3] - f[2])


def test_interferences_are_those_of_every_pair_by_hand():
    """Removals that take half of another class or none, classes with few and without examples, other own drops."""
    several = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        labels = np.array([0] * 30 + [1] * 5 + [2] * 24 + [4] * 12)
        sides = []
        for _ in "ab":
            intact = np.where(rng.random(71) < 0.9, labels, 3)
            takes = rng.choice([0, 0, 0.1, 0.6], (5, 5))[:, labels]
            sides.append(Measured(intact, np.where(rng.random((5, 71)) < takes, 3, intact), None))
        found, merged = interferences(*sides, labels, "abcde")
        want = by_hand(*sides, labels)
        assert [(f.removed, f.harmed) for f in found] == [("abcde"[i], "abcde"[j]) for i, j, *_ in want]
        for one, (_, _, *rest) in zip(found, want, strict=True):
            numbers = one.base, one.new, *one.ci95, one.p, one.q
            assert numbers == pytest.approx([*rest[:2], *rest[2], *rest[3:]])
        accuracy = [np.mean(sides[1].intact[labels == j] == j) if (labels == j).any() else 1 for j in range(5)]
        takes = {(i, j) for i, j, _, after, *_ in want if -after >= 0.5 * accuracy[j]}
        assert merged == {frozenset(("abcde"[i], "abcde"[j])) for i, j in takes if (j, i) in takes}
        several += len(want) > 1
    assert several > 3


def test_q_of_the_level_itself_is_a_finding(monkeypatch):
    labels, removed = np.arange(2).repeat(24), np.tile(np.arange(2).repeat(24), (2, 1))
    base = Measured(labels, removed.copy(), None)
    removed[0, 24:34] = 2
    new = Measured(labels, removed, None)
    for q, found in ((0.05, 1), (0.0501, 0)):
        monkeypatch.setattr(comparison, "discoveries", lambda p, least, q=q: np.full(len(p), q))
        assert len(interferences(base, new, labels, "ab")[0]) == found


@pytest.mark.parametrize(("taken", "found"), [(0, 0), (1, 1)])
def test_a_removal_that_helps_another_class_less_than_it_did_is_no_interference(taken, found):
    """In BASE it gives the class its 24 examples; in NEW these are right anyway, or one fewer after it."""
    labels = np.arange(2).repeat(24)
    intact = np.where(labels == 1, 0, labels)
    base = Measured(intact, np.stack([labels, intact]), None)
    removed = np.stack([labels, labels])
    removed[0, 24 : 24 + taken] = 2
    assert len(interferences(base, Measured(labels, removed, None), labels, "ab")[0]) == found


def test_half_of_what_a_class_had_is_enough_to_merge():
    labels = np.arange(2).repeat(24)
    intact = np.where(np.arange(48) % 24 < 20, labels, 2)
    for taken, merged in ((10, {frozenset("ab")}), (9, set())):
        removed = np.tile(intact, (2, 1))
        removed[0, 24 : 24 + 10] = 2
        removed[1, :taken] = 2
        removed[0, :20] = 2  # its own class, too
        base, new = Measured(intact, np.tile(intact, (2, 1)), None), Measured(intact, removed, None)
        found = interferences(base, new, labels, "ab")
        assert found[1] == merged
        assert {(f.removed, f.harmed) for f in found[0]} == {("a", "b"), ("b", "a")}
        assert [f.new for f in found[0]] == sorted(f.new for f in found[0])


def test_two_skills_that_merged(rng):
    """In NEW either removal takes both classes 3 and 4; that of 7 takes some of 8, but not the other way."""
    labels, base, _ = planted(rng)
    removed = base.removed.copy()
    for one, other in ((3, 4), (4, 3)):
        rows = (labels == other) & (rng.random(1000) < 0.8)
        removed[one, rows] = one
    rows = (labels == 8) & (rng.random(1000) < 0.3)
    removed[7, rows] = 7
    names = [str(i) for i in range(10)]
    new = Measured(base.intact, removed, None)
    found, merged = interferences(base, new, labels, names)
    assert merged == {frozenset("34")}
    assert {(entry.removed, entry.harmed) for entry in found} == {("3", "4"), ("4", "3"), ("7", "8")}
    assert all(entry.new < entry.base and entry.ci95[1] < 0 for entry in found)
    told, _ = judged(labels, base, new, merged={3, 4})
    assert told[3] == told[4] == ["merged"]
    assert interferences(base, base, labels, names) == ([], set())


def test_equal_models_are_found_equal():
    """200 pairs of equal models on other test draws: each family of tests at 5 % at most."""
    rng, findings, harms, failed = np.random.default_rng(9), 0, 0, 0
    names = [str(i) for i in range(6)]
    for i in range(200):
        labels, base, new = planted(rng, classes=6, n=60, flips=(0.01, 0.04)[i % 2])
        found, _ = judged(labels, base, new)
        findings += bool(FINDINGS & {name for of in found for name in of})
        harms += bool(interferences(base, new, labels, names)[0])
        failed += decision(labels, base, new, {"max_weakening": 0.0}).decision == "regression"
    assert findings / 200 <= 0.1  # two families
    assert harms / 200 <= 0.05
    assert failed / 200 <= 0.05


def test_a_loss_of_ten_points_is_found():
    """100 images per class, in ten classes, with some flips in all others."""
    found, passed = [], []
    for seed in range(60):
        labels, base, new = planted(np.random.default_rng(seed), flips=0.005 * (seed % 3), loss=0.1)
        found.append(bool(FINDINGS & set(judged(labels, base, new)[0][0])))
        passed.append(decision(labels, base, new, {"max_weakening": 0.05}).decision == "passed")
    assert np.mean(found) >= 0.9
    assert not any(passed)


# the gate


def decision(labels, base, new, thresholds, harm=None, kl=None, comparable=True):
    classes = [str(i) for i in range(len(base.removed))]
    gates = gates_of({"skill": {"*": thresholds}})
    found = {
        name: Quantities(base, new, labels, np.flatnonzero(labels == i), harm, kl) for i, name in enumerate(classes)
    }
    return decide(gates.thresholds(classes), found, comparable=comparable)


def test_a_gate_decides_on_ends_of_intervals(rng):
    labels, base, _ = planted(rng, n=100)
    lost = np.where((labels == 0) & (np.arange(1000) % 2 == 0), 1, base.intact)
    new = Measured(lost, np.where(lost == base.intact, base.removed, lost), None)
    found = decision(labels, base, new, {"max_weakening": 0.05})
    outcomes = {check.skill: check.outcome for check in found.checks}
    assert found.decision == "regression"
    assert outcomes == {"0": "failed", **dict.fromkeys(map(str, range(1, 10)), "passed")}
    first = found.checks[0]
    assert first.value == pytest.approx(np.mean(base.intact[:100] == 0) - np.mean(lost[:100] == 0))
    assert 0.05 < first.low < first.value < first.high
    # at one standard error of the limit neither is shown
    open_one = decision(labels, base, new, {"max_weakening": 0.45})
    assert open_one.checks[0].outcome == "undecided"
    assert open_one.decision == "not comparable"
    assert decision(labels, base, base, {"max_weakening": 0.05}).decision == "passed"
    assert decision(labels, base, base, {"max_weakening": 0.05}, comparable=False).decision == "not comparable"
    few = labels % 10 < 10
    few[:] = np.arange(1000) % 100 < 20
    small = Measured(base.intact[few], base.removed[:, few], None)
    assert decision(labels[few], small, small, {"max_weakening": 0.05}).decision == "not comparable"


@pytest.mark.parametrize("several", [False, True])
def test_values_and_ends_of_every_check(several):
    """Of one class, and of two whose means count once each; ends at 5 %, and at 5 % over the checks."""
    rng = np.random.default_rng(0)
    labels = np.array([0] * 60 + [1] * 25)
    base, new = (
        Measured(np.where(rng.random(85) < share, labels, 2), np.where(rng.random((2, 85)) < 0.4, labels, 2), None)
        for share in (0.9, 0.6)
    )
    rows = np.flatnonzero(labels >= (0 if several else 1))
    groups = [rows[labels[rows] == label] for label in np.unique(labels[rows])]
    kl, harm = rng.random(len(rows)), Harm(plug_in=0.1, cross_fitted=0.08, noise_floor=0.0, ci95=[0.06, 0.12])
    b, w = ((side.intact == labels).astype(int) for side in (base, new))
    b0, w0 = ((side.removed[labels, np.arange(85)] == labels).astype(int) for side in (base, new))

    def mean(values):
        return np.mean([values[group].mean() for group in groups])

    def share(values, z):
        error = sum(values[group].var(ddof=1) / len(group) for group in groups) / len(groups) ** 2
        return share_limits(mean(values), error, 1, z)

    def paired(z, *parts, sign=1):
        of = labels[rows]
        ends = PairedDifference(*(part[rows] for part in parts), labels=of if several else None).limits(z)
        return ends if sign > 0 else tuple(-end for end in ends[::-1])

    fall = mean(b) - mean(w)
    want = {
        "min_accuracy": (mean(w), lambda z: share(w, z)),
        "max_weakening": (fall, lambda z: paired(z, w - b, sign=-1)),
        "max_relative_weakening": (fall / mean(b), None),
        "min_drop": (mean(w - w0), lambda z: paired(z, w - w0)),
        "max_drop_loss": (mean(b - b0) - mean(w - w0), lambda z: paired(z, w - b, w0 - b0, sign=-1)),
        "max_harm": (0.1, lambda z: (0.08 - 0.02 * max(z / Z, 1), 0.12)),
        "max_kl": (kl.mean(), lambda z: mean_limits(kl, z)),
    }
    quantities = Quantities(base, new, labels, rows, harm, kl)
    asked = [("a", name, 0.5) for name in want]
    for check in decide(asked, {"a": quantities}).checks:
        value, limits = want[check.check]
        assert check.value == pytest.approx(value, abs=1e-12)
        if limits is not None:
            z = [norm.isf(0.05), norm.isf(0.05 / 7)][:: 1 if check.check.startswith("min") else -1]
            assert (check.low, check.high) == pytest.approx((limits(z[0])[0], limits(z[1])[1]), abs=1e-12)


def test_runs_that_cannot_be_compared_decide_nothing(rng):
    labels, base, _ = planted(rng, n=100)
    lost = np.where((labels == 0) & (np.arange(1000) % 2 == 0), 1, base.intact)
    new = Measured(lost, np.where(lost == base.intact, base.removed, lost), None)
    for limits in ({"max_weakening": 0.05}, {"max_weakening": 0.99}):
        assert decision(labels, base, new, limits).decision in ("regression", "passed")
        assert decision(labels, base, new, limits, comparable=False).decision == "not comparable"


def test_a_limit_itself_passes_and_beyond_it_fails():
    def outcome(name, low, high, **more):
        found = SimpleNamespace(of=lambda _: Quantity(0.5, lambda _: (low, high)))
        (check,) = decide([("a", name, 0.5)], {"a": found}, **more).checks
        return check.outcome

    for name, ends in (
        ("min_drop", {"passed": (0.5, 0.9), "undecided": (0.4, 0.5), "failed": (0.1, 0.49)}),
        ("max_harm", {"passed": (0.1, 0.5), "undecided": (0.5, 0.6), "failed": (0.51, 0.9)}),
    ):
        for wanted, (low, high) in ends.items():
            assert outcome(name, low, high) == wanted
    assert outcome("max_harm", -np.inf, 0.1) == outcome("max_harm", 0.1, np.nan) == "undefined"


def test_every_threshold_has_two_sides(rng):
    labels, base, _ = planted(rng, n=200, drop=0.8)
    half = np.where(np.arange(2000) % 2 == 0, wrong(labels, 10), base.intact)
    weak = Measured(half, np.where(half == base.intact, base.removed, half), None)
    harm = Harm(plug_in=0.1, cross_fitted=0.08, noise_floor=0.0, ci95=[0.06, 0.12])
    kl = np.linspace(0.1, 0.3, 200)
    sides = {
        "min_accuracy": (0.3, 0.6), "max_weakening": (0.6, 0.3), "max_relative_weakening": (0.7, 0.3),
        "min_drop": (0.25, 0.6), "max_drop_loss": (0.6, 0.2), "max_harm": (0.15, 0.01),
    }  # fmt: skip
    for name, (good, bad) in sides.items():
        outcomes = [
            {check.outcome for check in decision(labels, base, weak, {name: limit}, harm, kl).checks}
            for limit in (good, bad)
        ]
        assert outcomes == [{"passed"}, {"failed"}], name
    whole = Quantities(base, weak, labels, np.arange(2000), harm, np.linspace(0.1, 0.3, 2000))
    found = gates_of({"overall": {"max_kl": 0.25}}).thresholds(["a"])
    assert decide(found, {None: whole}).decision == "passed"
    found = gates_of({"overall": {"max_kl": 0.15, "max_weakening": 0.6}}).thresholds(["a"])
    assert [check.outcome for check in decide(found, {None: whole}).checks] == ["passed", "failed"]


def test_what_is_not_defined_does_not_pass(rng):
    labels, base, _ = planted(rng)
    none = decision(labels, base, base, {"max_harm": 1.0})
    assert {check.outcome for check in none.checks} == {"undefined"}
    assert none.decision == "not comparable"
    assert {check.value for check in none.checks} == {None}
    harm = Harm(plug_in=0.1, cross_fitted=0.08, noise_floor=0.0, ci95=None)
    assert {check.value for check in decision(labels, base, base, {"max_harm": 1.0}, harm).checks} == {None}
    empty = Quantities(base, base, labels, np.empty(0, int), None, None)
    assert decide([("a", "min_accuracy", 0.0)], {"a": empty}).decision == "not comparable"
    nothing = Measured(wrong(labels, 10), base.removed, None)
    relative = decision(labels, nothing, base, {"max_relative_weakening": 1.0})
    assert {check.outcome for check in relative.checks} == {"undefined"}


def test_a_value_without_limits_is_undefined(rng):
    """An infinite divergence has a mean and no standard error."""
    labels, base, _ = planted(rng)
    kl = np.where(np.arange(100) == 3, np.inf, 0.1)
    found = Quantities(base, base, labels, np.flatnonzero(labels == 0), None, kl)
    with np.errstate(invalid="ignore"):
        (check,) = decide([("0", "max_kl", 1.0)], {"0": found}).checks
    assert (check.value, check.low, check.high, check.outcome) == (np.inf, None, None, "undefined")


@pytest.mark.parametrize("share", [0.5, 0.05, -0.5])
def test_a_relative_fall_is_as_wide_as_both_of_its_parts_allow(rng, share):
    """Of the quotients of the ends of the fall and of BASE's accuracy, the least and the largest; falls or gains."""
    labels = np.zeros(200, int)
    some, chance = rng.random(200) < abs(share), np.where(rng.random(200) < 0.8, 0, 1)
    base, new = (Measured(np.where(some & turned, 1, chance), np.ones((1, 200), int), None)
                 for turned in (share < 0, share > 0))  # fmt: skip
    quantities = Quantities(base, new, labels, np.arange(200), None, None)
    fall, accuracy = quantities.of("max_weakening"), (base.intact == 0).mean()
    for z in (1.0, 2.5):
        of_base = share_limits(accuracy, np.var(base.intact == 0, ddof=1) / 200, 200, z)
        quotients = [end / part for end in fall.limits(z) for part in of_base]
        found = quantities.of("max_relative_weakening")
        assert found.limits(z) == pytest.approx((min(quotients), max(quotients)))
        assert found.value == pytest.approx(fall.value / accuracy)


def test_a_class_of_its_own_name_has_its_own_limits():
    gates = gates_of({"skill": {"*": {"max_weakening": 0.05, "min_drop": 0.1}, "deer": {"max_weakening": 0.2}}})
    assert gates.thresholds(["cat", "deer"]) == [
        ("cat", "max_weakening", 0.05), ("cat", "min_drop", 0.1), ("deer", "max_weakening", 0.2),
        ("deer", "min_drop", 0.1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"skill": {"deer": {"max_weakning": 0.1}}}, "gate [skill.deer]: expected keys that are known"),
        ({"skill": {"*": {"max_weakening": 5}}}, "expected `float` <= 1.0 at max_weakening, got 5"),
        ({"skills": {}}, "expected keys that are known, got 'skills'"),
        ({"skill": 3}, "expected `object` at skill, got `int`"),
        ({"overall": {"max_kl": "x"}}, "at overall.max_kl"),
    ],
)
def test_a_gate_with_unknown_keys_is_refused(value, words):
    assert words in one_line(ArgumentError, gates_of, value)


def test_a_gate_of_unknown_skills_or_of_nothing_is_refused():
    gates = gates_of({"skill": {"dear": {"min_drop": 0.1}}})
    assert "got 'dear'" in one_line(ArgumentError, gates.thresholds, ["cat", "deer"])
    assert "at least one threshold" in one_line(ArgumentError, gates_of({}).thresholds, ["cat"])
