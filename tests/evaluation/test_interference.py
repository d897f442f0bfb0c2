from __future__ import annotations

import numpy as np
import planted
import pytest
import torch
from scipy.stats import binomtest, false_discovery_control, t

import skillfast
from skillfast.evaluation.directions import angles as turned
from skillfast.evaluation.interference import Effects, find_pairs, interference
from skillfast.evaluation.selectivity import oracle_predictions, removal_matrix
from skillfast.results.records import to_json
from skillfast.skills.skill import overlap

K = 5


def turns(angles, groups=3):
    """Angles [..., K, K], which no group of images changes."""
    return angles, np.repeat(angles[..., None, :], groups, -2)


def no_turn(k):
    return turns(np.zeros((k, k)))


def planted_pairs(n=100, moved=20):
    """Removing 0 helps 1 and removing 1 helps 0; removing 2 hurts 3 and the reverse; removing 0 hurts 4, no more."""
    labels = np.arange(K).repeat(n)
    right = labels.copy()
    right[::2] = (labels[::2] + 1) % K  # every other image is wrong before anything is removed
    wrong, known = np.flatnonzero(right != labels), np.flatnonzero(right == labels)
    predictions = np.tile(right, (K, 1))

    def change(removed, label, gain):
        rows = (wrong if gain else known)[labels[wrong if gain else known] == label][:moved]
        predictions[removed, rows] = label if gain else (label + 2) % K

    for removed, label, gain in ((0, 1, True), (1, 0, True), (2, 3, False), (3, 2, False), (0, 4, False)):
        change(removed, label, gain)
    return predictions, np.tile(right, (K, 1)), right, labels


def test_planted_competition_and_linkage_are_found_and_nothing_besides():
    predictions, oracle, right, labels = planted_pairs()
    classes = ["a", "b", "c", "d", "e"]
    found = to_json(interference(no_turn(K), predictions, oracle, right, labels, np.eye(K), classes))
    assert [pair["classes"] for pair in found["competition"]] == [["a", "b"]]
    assert [pair["classes"] for pair in found["linkage"]] == [["c", "d"]]
    for key in ("beyond_oracle", "change"):
        assert found["competition"][0][key] == pytest.approx([0.2, 0.2])
    assert found["linkage"][0]["beyond_oracle"] == pytest.approx([-0.2, -0.2])
    assert found["strongest"]["competition"] == found["competition"][0]
    assert found["strongest"]["linkage"] == found["linkage"][0]
    assert found["strongest"]["angle"] is found["strongest"]["overlap"] is None
    assert "reasons" not in found


def test_what_the_oracle_does_too_is_no_competition():
    """Images freed by the removal go to the other class in the oracle as well."""
    predictions, _, right, labels = planted_pairs()
    assert to_json(find_pairs(Effects.of(predictions, predictions, right, labels), "abcde")) == {
        "competition": [], "linkage": [],
    }  # fmt: skip


def test_gaining_less_than_by_the_oracle_is_no_linkage():
    """The oracle frees images of the other class, the removal does not: nobody is hurt."""
    _, _, right, labels = planted_pairs()
    oracle = np.tile(labels, (K, 1))
    effects = Effects.of(np.tile(right, (K, 1)), oracle, right, labels)
    assert (effects.beyond_oracle == -0.5).all()
    assert to_json(find_pairs(effects, "abcde")) == {"competition": [], "linkage": []}


def test_too_few_images_are_named_but_not_significant():
    predictions, oracle, right, labels = planted_pairs(moved=3)
    found = to_json(interference(no_turn(K), predictions, oracle, right, labels, np.eye(K), "abcde"))
    assert found["competition"] == found["linkage"] == []
    strongest = found["strongest"]["competition"]
    assert strongest["classes"] == ["a", "b"]
    assert not strongest["significant"]
    assert strongest["p"] == pytest.approx(1 / 8)


def test_p_and_q_equal_scipys():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 4, 300)
    predictions, oracle = rng.integers(0, 4, (2, 4, 300))
    baseline = rng.integers(0, 4, 300)
    effects = Effects.of(predictions, oracle, baseline, labels)
    np.testing.assert_allclose(effects.change, removal_matrix(predictions, baseline, labels))
    for i in range(4):
        for j in range(4):
            own = labels == j
            right = predictions[i, own] == j
            tests = []
            for other in (baseline[own] == j, oracle[i, own] == j):
                gains, losses = int((right & ~other).sum()), int((other & ~right).sum())
                tests.append([binomtest(x, gains + losses, alternative="greater").pvalue for x in (gains, losses)])
            assert effects.beyond_oracle[i, j] == pytest.approx(right.mean() - (oracle[i, own] == j).mean())
            assert [effects.p_gain[i, j], effects.p_loss[i, j]] == pytest.approx(np.max(tests, axis=0))
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    p = [max(test[i, j], test[j, i]) for test in (effects.p_gain, effects.p_loss) for i, j in pairs]
    q = dict(zip([(kind, *pair) for kind in ("competition", "linkage") for pair in pairs],
                 false_discovery_control(p), strict=True))  # fmt: skip
    found = to_json(find_pairs(effects, "0123"))
    entries = [(kind, entry) for kind, pairs in found.items() for entry in pairs]
    assert entries
    for kind, entry in entries:
        assert entry["q"] == pytest.approx(q[(kind, *map(int, entry["classes"]))])


def test_false_discoveries_are_rare():
    """Removal, oracle and intact model differ by chance alone: hardly ever is any of the 20 claims significant."""
    rng = np.random.default_rng(5)
    labels = np.arange(K).repeat(100)
    any_found = 0
    for _ in range(200):
        flips = rng.random((2 * K + 1, 500)) < 0.1
        predictions, oracle, baseline = np.split(np.where(flips, (labels + 1) % K, labels), [K, 2 * K])
        found = find_pairs(Effects.of(predictions, oracle, baseline[0], labels), "abcde")
        any_found += any(pair.significant for pairs in found.values() for pair in pairs)
    assert any_found <= 10


def test_classes_without_images_are_named():
    labels = np.array([0, 0, 1, 1, 3])
    predictions = np.array([[1, 1, 1, 1, 3], [0, 0, 0, 0, 3], [0, 0, 1, 1, 3], [0, 0, 1, 1, 0]])
    angles = np.where(np.arange(4) == 2, np.nan, np.zeros((4, 4)))
    found = to_json(interference(turns(angles), predictions, predictions, labels, labels, np.eye(4), "abcd"))
    assert found["reasons"] == {"no_images": ["c"], "one_image": ["d"]}
    assert [row[2] for row in found["angles_deg"]] == [None] * 4
    angles[:, 1] = np.nan
    found = to_json(interference(turns(angles), predictions, predictions, labels, labels, np.eye(4), "abcd"))
    assert found["reasons"]["no_direction"] == ["b"]


def test_the_difference_to_random_draws():
    """Means of the skills' angles minus those of the draws; the spread of draws widens the interval."""
    predictions, oracle, right, labels = planted_pairs()
    rng = np.random.default_rng(0)
    found = np.where(np.eye(K, dtype=bool), 30.0, 5.0)
    draws = np.where(np.eye(K, dtype=bool), 7.0, 4.0) + rng.normal(size=(2, K, K))
    control = turns(draws)
    out = interference(turns(found), predictions, oracle, right, labels, np.eye(K), "abcde", control).difference
    own, other = np.eye(K, dtype=bool), ~np.eye(K, dtype=bool)
    assert out.own_angle_deg == pytest.approx(30 - draws[:, own].mean())
    assert out.other_angle_deg == pytest.approx(5 - draws[:, other].mean())
    assert out.draws == 2
    rows = draws[:, other].reshape(2 * K, K - 1).mean(-1)  # what each removal does to the others
    error = rows.std(ddof=1) / np.sqrt(2 * K)
    low, high = out.ci95["other_angle_deg"]
    assert (high - low) / 2 == pytest.approx(error * t.ppf(0.975, 2))


def test_a_model_without_embeddings_has_pairs_but_no_angles():
    predictions, oracle, right, labels = planted_pairs()
    found = to_json(interference(None, predictions, oracle, right, labels, np.eye(K), "abcde"))
    assert {"angles_deg", "own_angle_deg", "other_angle_deg", "ci95"}.isdisjoint(found)
    assert found["strongest"]["angle"] is None
    assert len(found["competition"]) == len(found["linkage"]) == 1


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
    result = skillfast.sweep(model, [(images, labels)], map(skillfast.Condition, skills), keep_predictions=True)
    predictions = np.concatenate([result.predictions, result.top2[None, :, 0]])  # a removal of "none" does nothing
    angles = np.concatenate([angles, np.zeros((1, 6))])
    oracle = oracle_predictions(result.top2, planted.CLASSES)
    found = to_json(
        interference(turns(angles), predictions, oracle, result.top2[:, 0], result.labels, np.eye(6), "012345")
    )
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
    result = skillfast.sweep(model, [(images, labels)], map(skillfast.Condition, skills), keep_predictions=True)
    oracle = oracle_predictions(result.top2, planted.CLASSES)
    found = to_json(
        interference(None, result.predictions, oracle, result.top2[:, 0], result.labels, overlap(skills), "012345")
    )
    assert [(pair["classes"], pair["beyond_oracle"]) for pair in found["competition"]] == [(["0", "1"], [1, 1])]
    assert [(pair["classes"], pair["beyond_oracle"]) for pair in found["linkage"]] == [(["2", "4"], [-1, -1])]
    assert found["strongest"]["overlap"] == {"one": "2", "other": "4", "jaccard": 1}
