from __future__ import annotations

import numpy as np
import planted
import pytest
import torch
from scipy.stats import false_discovery_control, nct, norm, t, ttest_1samp, ttest_rel

import skillfast
from skillfast.evaluation.directions import angles as turned
from skillfast.evaluation.interference import (
    LEVEL,
    RELEVANT,
    Effects,
    Margins,
    _against_draws,
    _difference,
    _left_out,
    _level_of_one_more,
    _paired,
    _Shift,
    find_pairs,
    interference,
    replicated_q,
    visible_pairs,
)
from skillfast.evaluation.jackknife import jackknife_interval, variance_of_mean
from skillfast.evaluation.power import POWER
from skillfast.evaluation.selectivity import oracle_predictions, removal_matrix
from skillfast.results.records import to_json
from skillfast.skills.skill import overlap

K = 5


def turns(angles, groups=3):
    """Angles [..., K, K], which no group of images changes."""
    return angles, np.repeat(angles[..., None, :], groups, -2)


def no_turn(k):
    return turns(np.zeros((k, k)))


def world(rng, n=100, *, shift=(), oracle=(), draws=5, k=K, common=0.05):
    """Predictions and margins of k classes, 90 % right: each removal and draw adds noise to every image's margin.

    Args:
        rng: Source of chance.
        n: Images of each class.
        shift: (removed, class, shift of its margins) by the skills' removal.
        oracle: The same of the oracle's.
        draws: Random controls.
        k: Number of classes.
        common: Deviation of what a removal or draw does to all images of a class at once.
    """
    labels = np.arange(k).repeat(n)
    intact = rng.normal(1.28, 1, k * n)

    def removed(*shape):
        per_class = rng.normal(0, common, (*shape, k))[..., labels]
        return intact + per_class + rng.normal(0, 0.3, (*shape, k * n))

    margins = Margins(removed(k), removed(draws, k), np.tile(intact, (k, 1)), intact)
    for rows, shifts in ((margins.removed, shift), (margins.oracle, oracle)):
        for i, j, by in shifts:
            rows[i, labels == j] += by

    def predicted(of):
        return np.where(of > 0, labels, (labels + 1) % k)

    return *map(predicted, (margins.removed, margins.oracle, intact)), labels, margins


def pairs_of(*made, **more):
    return find_pairs(Effects.of(*world(*made, **more)), [str(i) for i in range(more.get("k", K))])


def classes_of(pairs):
    return [pair.classes for pair in pairs if pair.significant]


def both_ways(a, b, by):
    return (a, b, by), (b, a, by)


def test_planted_competition_and_linkage_are_found_and_nothing_besides():
    """Removing 0 helps 1 and the reverse; removing 2 hurts 3 and the reverse; removing 0 hurts 4, and no more."""
    shift = (*both_ways(0, 1, 0.5), *both_ways(2, 3, -0.5), (0, 4, -0.5))
    predictions, oracle, intact, labels, margins = world(np.random.default_rng(0), shift=shift)
    classes = ["a", "b", "c", "d", "e"]
    found = to_json(interference(no_turn(K), predictions, oracle, intact, labels, np.eye(K), classes, margins))
    assert [pair["classes"] for pair in found["competition"]] == [["a", "b"]]
    assert [pair["classes"] for pair in found["linkage"]] == [["c", "d"]]
    assert found["competition"][0]["margin"] == pytest.approx([0.5, 0.5], abs=0.1)
    assert found["competition"][0]["margin_beyond_oracle"] == pytest.approx([0.5, 0.5], abs=0.1)
    matrix = removal_matrix(predictions, intact, labels)
    assert found["competition"][0]["change"] == pytest.approx([matrix[0, 1], matrix[1, 0]])
    assert found["linkage"][0]["margin"] == pytest.approx([-0.5, -0.5], abs=0.1)
    assert found["strongest"]["competition"] == found["competition"][0]
    assert found["strongest"]["linkage"] == found["linkage"][0]
    assert found["strongest"]["angle"] is found["strongest"]["overlap"] is None
    assert found["oracle_explains"] == []
    assert "reasons" not in found


def test_a_shift_worth_four_points_is_found_among_ten_classes():
    """90 % are right; margins that rise by 0.27 deviations make it 94 %. Exact tests of decisions find next to none."""
    found = [
        classes_of(pairs_of(np.random.default_rng(trial), shift=both_ways(0, 1, 0.27), k=10)["competition"])
        for trial in range(60)
    ]
    assert np.mean([["0", "1"] in pairs for pairs in found]) >= 0.8
    assert np.mean([(len(pairs) - (["0", "1"] in pairs)) / max(1, len(pairs)) for pairs in found]) <= 0.05


def test_false_discoveries_are_rare():
    """Removals differ from random draws by chance alone: hardly ever is any of the 90 claims significant."""
    for common in (0.0, 0.2):
        any_found = 0
        for trial in range(40):
            pairs = pairs_of(np.random.default_rng(trial), 54, common=common, k=10)
            any_found += any(pair.significant for found in pairs.values() for pair in found)
        assert any_found <= 4


def test_what_random_draws_do_too_is_no_competition():
    """All removals and draws help all classes: that is the number of neurons, not the skills."""
    rng = np.random.default_rng(0)
    predictions, oracle, intact, labels, margins = world(rng)
    shifted = Margins(margins.removed + 1, margins.random + 1, margins.oracle, margins.intact)
    pairs = find_pairs(Effects.of(predictions, oracle, intact, labels, shifted), "abcde")
    assert not any(pair.significant for found in pairs.values() for pair in found)


def test_a_shift_that_hides_among_draws_that_vary_is_not_significant():
    found = [
        classes_of(pairs_of(np.random.default_rng(trial), shift=both_ways(0, 1, 0.27), common=0.3)["competition"])
        for trial in range(20)
    ]
    assert sum(map(len, found)) <= 5  # 20 where the draws hardly vary


@pytest.mark.parametrize(
    ("kind", "sign", "n", "draws", "spread"), [("competition", 1, 54, 2, 0.2), ("linkage", -1, 100, 5, 0.05)]
)
def test_what_could_have_been_found_is_found(kind, sign, n, draws, spread):
    """A pair whose removals shift both margins by what is said to be visible is found; half of that is not."""
    found, visible = {1.0: [], 0.5: []}, []
    for trial in range(25):
        predictions, oracle, intact, labels, margins = world(
            np.random.default_rng(trial), n, draws=draws, common=spread, k=6
        )
        visible.append(getattr(visible_pairs(Effects.of(predictions, oracle, intact, labels, margins)), kind))
        for part, all_found in found.items():
            for i, j in ((0, 1), (1, 0)):
                own = labels == j  # all of the removal's effect is what is planted
                by = part * sign * visible[-1].margin - (margins.removed[i, own] - margins.intact[own]).mean()
                margins.removed[i, own] += by
            pairs = find_pairs(Effects.of(predictions, oracle, intact, labels, margins), [str(c) for c in range(6)])
            all_found.append(["0", "1"] in classes_of(pairs[kind]))
    assert np.mean(found[1.0]) >= 0.7
    assert np.mean(found[0.5]) <= 0.3
    worth = np.mean([pair.change for pair in visible])  # of normal margins, 1.28 deviations above 0
    shift = np.mean([sign * pair.margin for pair in visible])
    assert worth == pytest.approx(sign * (norm.cdf(1.28 + shift) - norm.cdf(1.28)), abs=0.015)


@pytest.mark.parametrize("freedom", [9.0, 30.0])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_what_a_t_test_reaches_is_that_of_the_noncentral_t(freedom, level):
    shift = _Shift(*(np.array([value]) for value in (0.0, 0.25, freedom, 0.25)))
    far = shift.reach(np.array([0.1]), level)[0] - 0.1
    assert nct.sf(t.isf(level, freedom), freedom, far / 0.5) == pytest.approx(POWER**0.5, abs=0.013)


def test_what_is_visible_goes_beyond_oracle_and_random_draws():
    """Where the oracle shifts a class by 2, competition has to; where draws hurt it, linkage has to hurt more."""
    rng = np.random.default_rng(0)
    predictions, oracle, intact, labels, margins = world(rng, oracle=[(i, j, 2.0) for i in range(K) for j in range(K)])
    pairs = visible_pairs(Effects.of(predictions, oracle, intact, labels, margins))
    assert 2.0 < pairs.competition.margin < 2.6
    assert pairs.linkage.margin < 0.6
    hurt = Margins(margins.removed - 2, margins.random - 2, margins.oracle, margins.intact)
    pairs = visible_pairs(Effects.of(predictions, oracle, intact, labels, hurt))
    assert 4.0 < pairs.competition.margin < 4.6  # 2 to be as the intact model, 2 to be as the oracle
    assert pairs.linkage.margin < 0.6
    assert pairs.linkage.change == pytest.approx(norm.cdf(1.28) - norm.cdf(1.28 - 2.2), abs=0.04)  # draws', and more


def test_one_more_pair_needs_less_where_others_are_far_from_being_found():
    """As `replicated_q` would find it: with a claim of p in both directions beside those that there are."""
    rng = np.random.default_rng(0)
    for power in (1, 3, 8):
        p = rng.random((2, 6, 6)) ** power
        level = _level_of_one_more(p)
        i, j = np.triu_indices(6, 1)
        either = np.minimum(p[:, i, j], p[:, j, i]).ravel()
        claims = np.stack([either, np.ones_like(either)])  # none of them can be made
        for by, found in ((level * (1 - 1e-9), True), (level * 1.001, False)):
            assert (replicated_q(np.c_[claims, [by, by]])[-1] <= LEVEL) is np.bool_(found)


def test_what_the_oracle_does_too_is_listed_as_explained():
    """Images freed by the removal go to the other class in the oracle as well."""
    found = pairs_of(np.random.default_rng(0), shift=both_ways(0, 1, 0.5), oracle=both_ways(0, 1, 0.6))
    assert classes_of(found["competition"]) == []
    assert classes_of(found["oracle_explains"]) == [["0", "1"]]


def test_gaining_less_than_by_the_oracle_is_no_linkage():
    """The oracle frees images of the other class, the removal does not: nobody is hurt."""
    found = pairs_of(np.random.default_rng(0), oracle=both_ways(0, 1, 2.0))
    assert not classes_of(found["linkage"])
    assert not classes_of(found["competition"])


def test_margins_under_the_oracle_equal_a_plain_loop():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(30, 4)), rng.integers(0, 4, 30)
    none = np.zeros((4, 30))
    made = Margins.of(none, none[None], logits, labels)
    found = made.oracle
    for i in range(4):
        for row, label in enumerate(labels):
            others = [value for c, value in enumerate(logits[row]) if c not in (i, label)]
            assert found[i, row] == pytest.approx(logits[row, label] - max(others))
            rivals = [value for c, value in enumerate(logits[row]) if c != label]
            assert made.intact[row] == pytest.approx(logits[row, label] - max(rivals))
    two = Margins.of(none[:2], none[None, :2], logits[:, :2], labels % 2)
    assert np.isinf(two.oracle[0, labels % 2 == 1]).all()


def test_two_classes_have_no_competition_beyond_an_oracle_that_leaves_one():
    rng = np.random.default_rng(0)
    predictions, oracle, intact, labels, margins = world(rng, shift=both_ways(0, 1, 2.0), k=2)
    margins.oracle[[0, 1], :] = np.inf
    found = find_pairs(Effects.of(predictions, oracle, intact, labels, margins), "ab")
    assert classes_of(found["competition"]) == []
    (pair,) = found["oracle_explains"]
    assert pair.margin_beyond_oracle is None


def test_p_and_q_equal_scipys():
    """With one draw nothing but images varies: plain paired t tests."""
    rng = np.random.default_rng(4)
    predictions, oracle, baseline, labels, margins = world(rng, draws=1, k=4)
    effects = Effects.of(predictions, oracle, baseline, labels, margins)
    np.testing.assert_allclose(effects.change, removal_matrix(predictions, baseline, labels))
    least = [RELEVANT * np.sqrt(np.square(margins.intact[labels == j]).mean()) for j in range(4)]
    for i in range(4):
        for j in range(4):
            own = labels == j
            removed, others = margins.removed[i, own], (margins.random[0, i, own], margins.intact[own])
            tests = [
                [ttest_rel(removed - sign * least[j], other, alternative=way).pvalue for other in others]
                for way, sign in (("greater", 1), ("less", -1))
            ]
            assert [effects.p_gain[i, j], effects.p_loss[i, j]] == pytest.approx(np.max(tests, axis=1))
            beyond = ttest_rel(removed - least[j], margins.oracle[i, own], alternative="greater").pvalue
            assert effects.p_beyond[i, j] == pytest.approx(max(tests[0][0], beyond))
            right = predictions[i, own] == j
            assert effects.beyond_oracle[i, j] == pytest.approx(right.mean() - (oracle[i, own] == j).mean())
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    both = [(test[i, j], test[j, i]) for test in (effects.p_beyond, effects.p_loss) for i, j in pairs]
    p, claims = np.max(both, axis=1), [(kind, *pair) for kind in ("competition", "linkage") for pair in pairs]
    known = dict(zip(claims, zip(p, replicated_q(np.array(both).T), strict=True), strict=True))
    found = to_json(find_pairs(effects, "0123"))
    entries = [(kind, entry) for kind in ("competition", "linkage") for entry in found[kind]]
    assert entries
    for kind, entry in entries:
        assert (entry["p"], entry["q"]) == pytest.approx(known[(kind, *map(int, entry["classes"]))])


def test_q_of_claims_that_need_two_findings():
    """At every threshold: how many claims could be made by chance, of how many are made."""
    rng = np.random.default_rng(0)
    p = rng.random((2, 40)) ** 3
    found = replicated_q(p)
    at = {g: g * (p.min(0) <= g).sum() / (p.max(0) <= g).sum() for g in p.max(0)}
    for claim, larger in enumerate(p.max(0)):
        assert found[claim] == pytest.approx(min(1, min(q for g, q in at.items() if g >= larger)))
    same = np.stack([p[0], p[0]])  # where both findings are one, Benjamini and Hochberg's, of the claims alone
    assert (replicated_q(same) <= false_discovery_control(p[0]) + 1e-12).all()


def margins_like(predictions, labels):
    """Margins of 1 where a prediction is right and -1 where it is wrong, under all that is compared."""
    removed = np.where(predictions == labels, 1.0, -1.0)
    return Margins(removed, removed[None], removed, removed[0])


def test_classes_without_images_are_named():
    labels = np.array([0, 0, 1, 1, 3])
    predictions = np.array([[1, 1, 1, 1, 3], [0, 0, 0, 0, 3], [0, 0, 1, 1, 3], [0, 0, 1, 1, 0]])
    same, margins = (predictions, predictions, labels, labels), margins_like(predictions, labels)
    angles = np.where(np.arange(4) == 2, np.nan, np.zeros((4, 4)))
    found = to_json(interference(turns(angles), *same, np.eye(4), "abcd", margins))
    assert found["reasons"] == {"no_images": ["c"], "one_image": ["d"]}
    assert [row[2] for row in found["angles_deg"]] == [None] * 4
    angles[:, [1, 3]] = np.nan
    found = to_json(interference(turns(angles), *same, np.eye(4), "abcd", margins))
    assert found["reasons"]["no_direction"] == ["b", "d"]


def test_the_difference_to_random_draws():
    """Means of the skills' angles minus those of the draws; the spread of draws widens the interval."""
    rng = np.random.default_rng(0)
    *effects, margins = world(rng)
    found = np.where(np.eye(K, dtype=bool), 30.0, 5.0)
    draws = np.where(np.eye(K, dtype=bool), 7.0, 4.0) + rng.normal(size=(2, K, K))
    control = turns(draws)
    out = interference(turns(found), *effects, np.eye(K), "abcde", margins, control).difference
    own, other = np.eye(K, dtype=bool), ~np.eye(K, dtype=bool)
    assert out.own_angle_deg == pytest.approx(30 - draws[:, own].mean())
    assert out.other_angle_deg == pytest.approx(5 - draws[:, other].mean())
    assert out.draws == 2
    rows = draws[:, other].reshape(2 * K, K - 1).mean(-1)  # what each removal does to the others
    error = rows.std(ddof=1) / np.sqrt(2 * K)
    low, high = out.ci95["other_angle_deg"]
    assert (high - low) / 2 == pytest.approx(error * t.ppf(0.975, 2))


def test_a_model_without_embeddings_has_pairs_but_no_angles():
    shift = (*both_ways(0, 1, 0.5), *both_ways(2, 3, -0.5))
    predictions, oracle, intact, labels, margins = world(np.random.default_rng(0), shift=shift)
    found = to_json(interference(None, predictions, oracle, intact, labels, np.eye(K), "abcde", margins))
    assert {"angles_deg", "own_angle_deg", "other_angle_deg", "ci95"}.isdisjoint(found)
    assert found["strongest"]["angle"] is None
    assert len(found["competition"]) == len(found["linkage"]) == 1


def swept(model, images, labels, skills, draws=4):
    """Predictions without each of six skills, intact ones, labels and margins; random neurons do nothing."""
    rng = np.random.default_rng(0)
    taken = {(site, i) for sites in planted.PLANTED.values() for site, index in sites.items() for i in index}
    conditions = [skillfast.Condition(skill, name=f"skill {i}") for i, skill in enumerate(skills)]
    for d in range(draws):
        for i, skill in enumerate(skills):
            drawn = {}
            for site, index in skill.neurons.items():
                free = [n for n in range(2 * planted.CLASSES) if (site, n) not in taken]
                drawn[site] = rng.choice(free, min(len(index), len(free)), replace=False)
            conditions.append(skillfast.Condition(skillfast.Skill(f"random {d} {i}", drawn)))
    result = skillfast.sweep(model, [(images, labels)], conditions, keep_predictions=True, keep_margins=True)
    k = len(skills)
    random = result.margins[k:].reshape(draws, k, -1)
    margins = Margins.of(result.margins[:k], random, result.baseline_logits, result.labels)
    oracle = oracle_predictions(result.top2, planted.CLASSES)
    return result.predictions[:k], oracle, result.top2[:, 0], result.labels, margins


@pytest.mark.filterwarnings("ignore:some scores are not defined")
def test_planted_skills_turn_their_own_class_alone():
    """The planted model writes each class's evidence where no other class's is: others keep their direction."""
    images, labels = planted.images(120)
    model = planted.model()
    skills = [skillfast.Skill(str(label), sites) for label, sites in planted.PLANTED.items()]
    rows = []

    def keep(_, args):
        rows.append(args[0].numpy().copy())

    handle = model.head.register_forward_pre_hook(keep)
    with torch.inference_mode():
        model(images)
        for skill in skills:
            with skillfast.ablate(model, skill):
                model(images)
    handle.remove()
    before, *after = rows
    angles = np.stack([turned(before, row, labels.numpy(), planted.CLASSES)[0] for row in after])  # [5, 6]
    own = np.diagonal(angles)
    others = angles[~np.eye(5, 6, dtype=bool)]
    assert own.min() > 10
    assert others.max() < 0.05 * own.min()  # layer norms let a little through
    angles = np.concatenate([angles, np.zeros((1, 6))])  # a removal of "none" does nothing
    *effects, margins = swept(model, images, labels, [*skills, skillfast.Skill("none", {})])
    found = to_json(interference(turns(angles), *effects, np.eye(6), "012345", margins))
    assert found["competition"] == found["linkage"] == []
    assert found["own_angle_deg"] > 50 * found["other_angle_deg"]


def test_planted_inhibition_and_shared_neurons_are_competition_and_linkage():
    """The neurons of 0 and 1 suppress each other's evidence in images that show both; 2 and 4 share their neurons."""
    model = planted.model()
    with torch.no_grad():
        for one, other in ((0, 1), (1, 0)):
            model.blocks[1].mlp.fc2.weight[5 + other, planted.PLANTED[one]["blocks.1.mlp"]] = -3
    images, labels = planted.images(120)
    patches = images.reshape(120, 3, 2, 8, 2, 8).permute(0, 2, 4, 1, 3, 5).reshape(120, 4, 192).clone()
    patches[labels == 0, :, 1] = patches[labels == 1, :, 0] = 2.5  # weaker than their own, which is 3
    images = patches.view(120, 2, 2, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(120, 3, 16, 16)
    shared = {**planted.PLANTED[2], **planted.PLANTED[4]}
    neurons = [planted.PLANTED[0], planted.PLANTED[1], shared, planted.PLANTED[3], shared, {}]
    skills = [skillfast.Skill(str(label), sites) for label, sites in enumerate(neurons)]
    *effects, margins = swept(model, images, labels, skills)
    found = to_json(interference(None, *effects, overlap(skills), "012345", margins))
    assert [(pair["classes"], pair["beyond_oracle"]) for pair in found["competition"]] == [(["0", "1"], [1, 1])]
    assert [(pair["classes"], pair["beyond_oracle"]) for pair in found["linkage"]] == [(["2", "4"], [-1, -1])]
    assert found["strongest"]["overlap"] == {"one": "2", "other": "4", "jaccard": 1}


def test_a_shift_that_is_not_known_has_a_p_of_1():
    shift = _Shift(np.array([np.nan, 0.0, 3.0]), np.array([1.0, np.inf, 0.01]), np.full(3, 9.0), np.zeros(3))
    for least in (0.0, 1.0):
        assert shift.p_above(np.full(3, least))[0] == shift.p_below(np.full(3, least))[0] == 1
    assert shift.p_above(np.zeros(3))[1] == 0.5
    assert shift.p_above(np.ones(3))[2] < 1e-6


def test_turns_that_random_draws_do_as_well_differ_by_nothing():
    """The groups of images that are left out move both alike, so that the interval of the difference is a point."""
    rng = np.random.default_rng(0)
    angles, left_out = rng.uniform(10, 40, (3, 3)), rng.uniform(10, 40, (3, 8, 3))
    draws = np.stack([angles] * 4), np.stack([left_out] * 4)
    found = _difference((angles, left_out), draws)
    assert [found.own_angle_deg, found.other_angle_deg] == pytest.approx([0, 0], abs=1e-9)
    each = np.array([np.diagonal(angles)] * 4)  # draws are alike, classes are not
    want = jackknife_interval(0.0, np.zeros(8), -180.0, 180.0, variance_of_mean(each))
    assert found.ci95["own_angle_deg"] == pytest.approx(want)


def test_intervals_of_angles_end_at_0_and_at_180_degrees():
    rng = np.random.default_rng(0)
    *effects, margins = world(rng)
    angles = np.where(np.eye(K, dtype=bool), 178.0, 2.0)
    left_out = angles[:, None] + rng.normal(0, 9, (K, 8, K))
    draws = (180.0 - angles)[None], np.repeat((180 - angles)[None, :, None], 8, 2)
    found = interference((angles, left_out), *effects, np.eye(K), "abcde", margins, draws)
    ends = np.array(found.ci95.angles_deg)
    assert (ends[np.eye(K, dtype=bool), 1] == 180).all()
    assert (ends[~np.eye(K, dtype=bool), 0] == 0).all()
    assert found.ci95.own_angle_deg[1] == 180
    assert found.ci95.other_angle_deg[0] == 0
    assert found.random_control.own_angle_deg == 2
    assert found.random_control.other_angle_deg == 178
    each = np.array([np.diagonal(draws[0][0])])
    want = jackknife_interval(
        176.0, _left_out(angles, left_out)["own_angle_deg"] - 2, -180, 180, variance_of_mean(each)
    )
    assert found.difference.ci95["own_angle_deg"] == pytest.approx(want)
    assert want[1] == 180
    assert found.difference.ci95["other_angle_deg"][0] == -180
    assert found.difference.own_angle_deg == -found.difference.other_angle_deg == 176


def test_means_and_the_strongest_angle_leave_out_what_has_none():
    rng = np.random.default_rng(0)
    *effects, margins = world(rng)
    angles = rng.uniform(1, 40, (K, K))
    angles[:, 3] = angles[2, 0] = np.nan
    left_out = np.repeat(angles[:, None], 4, 1) + rng.normal(size=(K, 4, K))
    overlap_of = rng.random((K, K)) / 2
    np.fill_diagonal(overlap_of, 1)
    draws = angles + rng.normal(size=(3, K, K)), left_out + rng.normal(size=(3, K, 4, K))
    found = interference((angles, left_out), *effects, overlap_of, "abcde", margins, draws)
    for name, which in (("own_angle_deg", np.eye(K, dtype=bool)), ("other_angle_deg", ~np.eye(K, dtype=bool))):
        mean = np.nanmean(angles[which])
        assert getattr(found, name) == pytest.approx(mean)
        assert getattr(found.random_control, name) == pytest.approx(np.nanmean(draws[0][:, which]))
        without = np.array([np.nanmean(left_out[:, g][which]) for g in range(4)])
        assert getattr(found.ci95, name) == pytest.approx(jackknife_interval(mean, without, 0, 180))
        random_without = np.array([np.nanmean(draws[1][:, :, g][:, which]) for g in range(4)])
        each = np.array(
            [[row[i] if "own" in name else np.nanmean(np.delete(row, i)) for i, row in enumerate(d)] for d in draws[0]]
        )
        difference = mean - np.nanmean(draws[0][:, which])
        ends = jackknife_interval(difference, without - random_without, -180, 180, variance_of_mean(each))
        assert getattr(found.difference, name) == pytest.approx(difference)
        assert found.difference.ci95[name] == pytest.approx(ends)
    for i, j in np.ndindex(K, K):
        ends = found.ci95.angles_deg[i][j]
        if np.isnan(angles[i, j]):
            assert found.angles_deg[i][j] is ends is None
        else:
            assert found.angles_deg[i][j] == angles[i, j]
            assert ends == pytest.approx(jackknife_interval(angles[i, j], left_out[i, :, j], 0, 180))
    for part, matrix in (("angle", angles), ("overlap", overlap_of)):
        i, j = np.unravel_index(np.nanargmax(np.where(np.eye(K), np.nan, matrix)), (K, K))
        assert list(to_json(getattr(found.strongest, part)).values()) == ["abcde"[i], "abcde"[j], matrix[i, j]]
    assert found.overlap == overlap_of.tolist()
    assert found.reasons.no_direction == ["a", "d"]
    assert found.reasons.no_images is found.reasons.one_image is None
    none = (np.full((3, K, K), np.nan), np.full((3, K, 4, K), np.nan))
    missing = interference((angles, left_out), *effects, overlap_of, "abcde", margins, none)
    assert missing.difference.own_angle_deg is missing.difference.ci95["own_angle_deg"] is None
    missing = interference((none[0][0], none[1][0]), *effects, overlap_of, "abcde", margins, draws)
    assert missing.difference.own_angle_deg is missing.own_angle_deg is missing.ci95.own_angle_deg is None


def test_a_removal_of_all_images_alike_is_compared_as_one_more_draw():
    """Draws vary by their variance over all rows, and so does the removal; their mean varies, too."""
    rng = np.random.default_rng(0)
    for k, draws in ((1, 3), (3, 5)):
        labels = np.arange(k).repeat(4)
        removed, random = rng.normal(1, 1, (k, k)), rng.normal(0, 1, (draws, k, k))
        intact = np.zeros((k, 4 * k))
        found = _against_draws(Margins(removed[:, labels], random[..., labels], intact, intact[0]), labels, k)
        error = np.sqrt(random.var(0, ddof=1).mean(0) * (1 + 1 / draws))
        np.testing.assert_allclose(found.mean, removed - random.mean(0))
        np.testing.assert_allclose(found.p_above(np.zeros(k)), t.sf(found.mean / error, k * (draws - 1)))


def test_shifts_of_few_images_have_students_tails():
    """Of two images a t test with one degree of freedom; one image says nothing, and none has no shift."""
    rng = np.random.default_rng(0)
    labels = np.array([0, 0, 1, 1, 1, 2])
    shift = rng.normal(1, 1, (2, 6))
    found = _paired(shift, labels, 4)
    p = found.p_above(np.zeros(4))
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert p[i, j] == pytest.approx(ttest_1samp(shift[i, labels == j], 0, alternative="greater").pvalue)
    assert (p[:, 2] == 0.5).all()
    assert (p[:, 3] == 1).all()
    assert np.isinf(found.variance[:, 2]).all()
