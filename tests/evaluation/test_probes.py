"""Gone or hidden: planted erasures, edits of the head, and the probes against scikit-learn."""

from __future__ import annotations

import numpy as np
import planted
import pytest
import torch
from scipy.optimize import minimize
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from skillfast import Condition, Skill, ablate
from skillfast.data import TensorImages, loader
from skillfast.data.splits import few_per_class
from skillfast.evaluation.jackknife import deal, jackknife_interval
from skillfast.evaluation.probes import (
    OTHERS,
    SHOTS,
    OtherModel,
    Reader,
    Readings,
    information,
    probe_predictions,
    share_lost,
    told_apart,
    tuned_predictions,
)
from skillfast.models.sites import find_sites
from skillfast.runs.embedding_sweep import compare_embeddings, linear_head


@pytest.fixture(scope="module")
def clouds():
    """Embeddings of three classes that overlap: 300 to fit on, 600 to test, of 8 coordinates of unlike sizes."""
    rng = np.random.default_rng(0)
    sizes, means = np.array([1, 1, 3, 0.2, 1, 1, 1, 1]), rng.normal(size=(3, 8))
    labels = np.arange(900) % 3
    rows = (means[labels] + rng.normal(size=(900, 8))) * sizes
    return rows[:300], labels[:300], rows[300:], labels[300:]


def test_the_probe_is_scikit_learns_and_as_good_as_a_logistic_one(clouds):
    fitted, fitted_labels, rows, labels = clouds
    found = probe_predictions(fitted, fitted_labels, rows)
    lda = LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(3, 1 / 3)).fit(fitted, fitted_labels)
    assert (found == lda.predict(rows)).mean() > 0.95  # which does not shrink the covariance
    moved = probe_predictions(fitted + 100, fitted_labels, rows + 100)  # classes count alike wherever the origin is
    np.testing.assert_array_equal(moved, found)
    logistic = LogisticRegression(max_iter=1000).fit(fitted, fitted_labels)
    assert (found == labels).mean() > (logistic.predict(rows) == labels).mean() - 0.03


def test_a_probe_on_few_examples_and_on_none_of_a_class(clouds):
    fitted, fitted_labels, rows, labels = clouds
    wide = np.concatenate([rows, np.zeros((600, 40))], 1)  # more coordinates than examples, and constant ones
    few = np.concatenate([fitted[:30], np.zeros((30, 40))], 1)
    assert (probe_predictions(few, fitted_labels[:30], wide) == labels).mean() > 0.6
    kept = fitted_labels != 1
    assert set(probe_predictions(fitted[kept], fitted_labels[kept], rows)) == {0, 2}
    assert probe_predictions(np.ones((4, 2)), np.arange(4) % 2, np.ones((3, 2))).shape == (3,)


def test_tuning_goes_where_logistic_regression_goes(clouds):
    fitted, fitted_labels, rows, _ = clouds
    head = np.zeros((3, 8)), np.zeros(3)

    def loss(flat):
        logits = fitted @ flat[:24].reshape(3, 8).T + flat[24:]
        logits -= logits.max(1, keepdims=True)
        return -(logits[np.arange(300), fitted_labels] - np.log(np.exp(logits).sum(1))).mean()

    best = minimize(loss, np.zeros(27)).x
    want = (rows @ best[:24].reshape(3, 8).T + best[24:]).argmax(1)
    assert (tuned_predictions(head, fitted, fitted_labels, rows, 2000) == want).mean() > 0.99
    start = np.random.default_rng(1).normal(size=(3, 8)), np.array([0.0, 1, 0])
    assert (tuned_predictions(start, fitted, fitted_labels, rows, 0) == (rows @ start[0].T + start[1]).argmax(1)).all()


def test_a_few_steps_are_those_of_nesterov():
    """On a line the boundary between two classes is where the reference has it, to a thousandth."""
    generator = np.random.default_rng(3)
    few, labels = generator.normal([[2.0], [2.3], [2.5], [3.5]], 0.1), np.array([0, 0, 1, 1])
    start = np.array([[-0.5], [0.5]]), np.array([0.5, -0.5])
    line = np.arange(-5, 10, 0.001)[:, None]
    weights = np.concatenate([start[0], start[1][:, None]], 1)
    rows = np.concatenate([few, np.ones((4, 1))], 1)
    step = 2 * 4 / np.linalg.svd(rows, compute_uv=False)[0] ** 2
    ahead, theta = weights, 1.0
    for _ in range(30):
        odds = np.exp(rows @ ahead.T)
        slope = (odds / odds.sum(1, keepdims=True) - np.eye(2)[labels]).T @ rows / 4
        new = ahead - step * slope
        following = (1 + np.sqrt(1 + 4 * theta**2)) / 2
        ahead, weights, theta = new + (theta - 1) / following * (new - weights), new, following
    boundary = (weights[0, 1] - weights[1, 1]) / (weights[1, 0] - weights[0, 0])
    assert 0 < boundary < 10
    found = line[tuned_predictions(start, few, labels, line, 30) == 1, 0]
    assert found.min() == pytest.approx(boundary, abs=1.1e-3)
    assert found.max() == line[-1, 0]


def test_told_apart_equals_a_loop():
    rng = np.random.default_rng(2)
    labels, predictions = rng.integers(0, 4, (2, 80))
    predictions[labels == 1] = 1
    dealt = deal(labels, 5)
    for target in range(4):
        found = told_apart(predictions, labels, target, dealt)
        for group in range(-1, 5):
            kept = dealt != group
            share = [(predictions[kept & (labels == c)] == target).mean() for c in range(4)]
            want = max(0, share[target] - max(s for c, s in enumerate(share) if c != target))
            assert found[1 + group] == pytest.approx(want)
    assert np.isnan(told_apart(predictions, labels, 6, dealt)).all()


def test_a_class_that_merges_with_another_is_not_told_apart():
    labels = np.arange(4).repeat(50)
    dealt = deal(labels)
    merged = np.where(labels == 1, 0, labels)
    assert told_apart(merged, labels, 0, dealt)[0] == 0  # though its recall is 1
    assert told_apart(merged, labels, 1, dealt)[0] == 0
    assert told_apart(merged, labels, 2, dealt)[0] == 1
    assert [share_lost(labels, merged, labels, c) for c in range(4)] == [1, 1, 0, 0]
    half = np.where((labels == 2) & (np.arange(200) % 2 == 0), 3, labels)
    assert share_lost(labels, half, labels, 2) == pytest.approx(0.5)
    assert share_lost(half, labels, labels, 2) == pytest.approx(-1)  # told apart better than before
    assert np.isnan(share_lost(merged, labels, labels, 0))


@pytest.fixture(scope="module")
def copies():
    return planted.Copies(), loader(TensorImages(*planted.evidence(1500, 2), classes=list("abcd-")), 256)


def lost(copies, skills):
    """What the removal of each of five skills takes."""
    model, test = copies
    conditions = [Condition(skill) for skill in skills]
    found = compare_embeddings(model, test, conditions, [], classes=list("abcd-"))
    labels = test.dataset.labels.numpy()
    with torch.inference_mode():
        baseline = model(test.dataset.images).argmax(1).numpy()
    predictions = []
    for skill in skills:
        with torch.inference_mode(), ablate(model, skill):
            predictions.append(model(test.dataset.images).argmax(1).numpy())
    return information(found.readings, np.stack(predictions), baseline, labels, list("abcd-"))


def test_an_erasure_is_gone(copies):
    found = lost(copies, [Skill(str(k), {"blocks.0.mlp": [k, 4 + k]} if k < 4 else {}) for k in range(5)])
    for name in "abcd":
        values = found.per_class[name]
        assert values.readout_lost > 0.95
        assert values.information_lost >= 0.9
        assert values.relearned < 0.1
    assert found.per_class["-"].information_lost == 0  # nothing was removed
    assert found.n_fitted == 1000  # what reads a third are the other two


def test_what_only_the_head_cannot_read_is_hidden(copies):
    found = lost(copies, [Skill(str(k), {"blocks.0.mlp": [k]} if k < 4 else {}) for k in range(5)])
    for name in "abcd":
        values = found.per_class[name]
        assert values.readout_lost > 0.95
        assert values.information_lost <= 0.05
        assert values.recall > 0.95
        assert values.recall_removed < 0.05
        assert values.recall_refitted > 0.95
        assert values.relearned > 0.8
        assert values.relearned_without < 0.2


def test_an_edit_of_the_head_loses_no_information(copies):
    """A class's weights set to 0, and the head's neurons that it reads removed: the embeddings keep the class."""
    found = lost(copies, [Skill(str(k), {"head": [k]} if k < 4 else {}) for k in range(5)])
    assert max(found.per_class[name].information_lost for name in "abcd") <= 0.05
    assert min(found.per_class[name].readout_lost for name in "abcd") > 0.95
    labels = np.arange(5).repeat(60)
    same = np.tile(labels, (5, 1))
    readings = Readings(labels, same, np.empty((5, 0, 300), int), np.empty((5, 0, 300), int), 100)
    found = information(
        readings, np.where(same == np.arange(5)[:, None], (same + 1) % 5, same), labels, labels, "abcd-"
    )
    assert found.readout_lost == 1
    assert found.information_lost == 0
    assert found.relearned is None
    assert found.ci95.relearned is None


def test_intervals_of_what_is_lost_cover():
    """Classes that are recalled with known chances before and after: intervals hold the truth in 92 to 98 %."""
    rng = np.random.default_rng(3)
    labels = np.arange(5).repeat(60)
    before, after = np.array([0.95, 0.9, 0.8, 0.95, 0.9]), np.array([0.1, 0.2, 0.3, 0.15, 0.5])

    def drawn(recall):  # what is missed goes to "none", the class behind the others
        return np.where(rng.random(300) < recall[labels], labels, 5)

    held = 0
    truth = np.mean(1 - after / before)
    for _ in range(200):
        intact = drawn(before)
        removed = np.stack([drawn(after) for _ in range(5)])
        readings = Readings(intact, removed, np.empty((5, 0, 300), int), np.empty((5, 0, 300), int), 100)
        found = information(readings, removed, intact, labels, "abcde")
        low, high = found.ci95.readout_lost
        held += low <= truth <= high
    assert 184 <= held <= 196


def test_classes_without_examples_have_no_share():
    labels = np.array([0] * 10 + [2] * 10)
    same = np.tile(labels, (3, 1))
    readings = Readings(labels, same, same[:, None], same[:, None], 20)
    found = information(readings, same, labels, labels, "abc")
    assert found.per_class["b"].readout_lost is found.per_class["b"].recall is None
    assert found.per_class["a"].readout_lost == 0
    assert found.relearned == 1


def test_a_probe_sees_as_many_of_each_class():
    labels = np.random.default_rng(4).permutation(np.arange(4).repeat([100, 80, 30, 1]))
    rows = few_per_class(labels, 0, 40, 2000)
    assert np.bincount(labels[rows]).tolist() == [40, 40, 30, 1]
    assert rows == sorted(rows)
    assert rows != few_per_class(labels, 1, 40, 2000)
    assert len(few_per_class(np.arange(100).repeat(40), 0, 40, 2000)) == 2000


def test_a_few_of_the_others_are_no_more_than_a_step_holds():
    labels = np.arange(60).repeat(6)
    own, others = Reader(labels, 60, None)._few(np.arange(360), 3, np.random.default_rng(0))
    assert labels[own].tolist() == [3] * SHOTS
    assert sorted(np.unique(labels[others], return_counts=True)[1].tolist()) == [SHOTS] * (OTHERS // SHOTS)
    assert 3 not in labels[others]


def test_what_reads_an_example_was_not_fitted_on_it():
    """Labels that the embeddings do not tell are read no better than by chance, though a probe could fit them."""
    rng = np.random.default_rng(5)
    labels, embeddings = rng.permutation(np.arange(4).repeat(50)), rng.normal(size=(200, 100))
    reader = Reader(labels, 4, (rng.normal(size=(4, 100)), np.zeros(4)))
    assert (probe_predictions(embeddings, labels, embeddings) == labels).mean() > 0.6
    assert (reader.probe(embeddings) == labels).mean() < 0.4
    relearned, without = reader.tuned(embeddings, 1)
    assert relearned.shape == without.shape == (5, 200)
    assert max((rows == labels).mean() for rows in (*relearned, *without)) < 0.4
    marked = embeddings + 9 * np.eye(100)[labels]
    assert (reader.probe(marked) == labels).mean() > 0.95


def test_the_head_is_read_where_it_is_linear(vit):
    site = find_sites(vit)[-1]
    weight, bias = linear_head(vit, site, 5)
    np.testing.assert_array_equal(weight, vit.head.weight.detach())
    np.testing.assert_array_equal(bias, vit.head.bias.detach())
    assert linear_head(vit, site, 4) is None  # label words of a vocabulary


@pytest.mark.filterwarnings("error")
def test_a_class_that_nothing_tells_apart_has_no_share():
    """Neither the classifier nor a probe ever predicts it: no 0 / 0, and the means are those of the others."""
    labels = np.arange(3).repeat(20)
    never = np.where(labels == 2, 0, labels)
    rows = np.tile(never, (3, 1))
    found = information(Readings(never, rows, rows[:, None], rows[:, None], 20), rows, never, labels, "abc")
    told = found.per_class["c"]
    assert (told.readout_lost, told.information_lost, told.relearned, told.relearned_without) == (None,) * 4
    assert (told.recall, told.recall_removed, told.recall_refitted) == (0, 0, 0)
    assert (found.readout_lost, found.information_lost, found.relearned, found.relearned_without) == (0, 0, 1, 1)
    assert found.ci95.readout_lost == found.ci95.information_lost == [0, 0]
    assert found.ci95.relearned == found.ci95.relearned_without == [1, 1]


def test_shares_and_recalls_equal_a_loop_over_classes_and_draws():
    rng = np.random.default_rng(0)
    labels = np.array([0] * 30 + [1] * 24 + [2] * 41 + [4])
    n = len(labels)

    def noisy(right, *shape):
        return np.where(rng.random((*shape, n)) < right, labels, rng.integers(0, 5, (*shape, n)))

    baseline, intact, predictions, refitted = noisy(0.9), noisy(0.95), noisy(0.3, 5), noisy(0.7, 5)
    relearned, without = noisy(0.6, 5, 3), noisy(0.4, 5, 2)
    baseline[-1] = intact[-1] = 3  # the only example of class 4 is not told apart
    found = information(Readings(intact, refitted, relearned, without, 64), predictions, baseline, labels, "abcde")
    dealt = deal(labels, 40)

    def told(rows, i):
        return np.mean([told_apart(row, labels, i, dealt) for row in rows], 0)

    shares = {name: [] for name in ("readout_lost", "information_lost", "relearned", "relearned_without")}
    for i, name in enumerate("abcde"):
        entry, own = found.per_class[name], labels == i
        for key, rows in (("recall", baseline), ("recall_removed", predictions[i]), ("recall_refitted", refitted[i])):
            assert getattr(entry, key) == (pytest.approx((rows[own] == i).mean()) if own.any() else None)
        if name in "de":
            assert entry.readout_lost is entry.relearned is None
            continue
        before = told([baseline], i)
        shares["readout_lost"].append(1 - told([predictions[i]], i) / before)
        shares["information_lost"].append(1 - told([refitted[i]], i) / told([intact], i))
        shares["relearned"].append(told(relearned[i], i) / before)
        shares["relearned_without"].append(told(without[i], i) / before)
        assert [getattr(entry, key) for key in shares] == pytest.approx([rows[-1][0] for rows in shares.values()])
    for key, rows in shares.items():
        mean = np.mean(rows, 0)
        assert getattr(found, key) == pytest.approx(mean[0])
        assert getattr(found.ci95, key) == pytest.approx(jackknife_interval(mean[0], mean[1:], -np.inf, np.inf))
    assert (found.n_fitted, found.shots, found.steps) == (64, 5, 30)


def test_a_model_that_never_saw_a_class_is_read_as_the_removal_is():
    rng = np.random.default_rng(1)
    labels = np.arange(3).repeat((30, 20, 10))
    before = labels.copy()
    before[30:34] = 0  # four of class 1 are taken for class 0

    def some(right):
        return np.where(rng.random(60) < right, labels, rng.integers(0, 3, 60))

    removed = np.stack([some(0.6) for _ in range(3)])
    others = {target: OtherModel(some(0.7), some(0.8), 40 + target) for target in (1, 2)}
    rows = np.tile(before, (3, 1))
    readings = Readings(before, rows, rows[:, None], rows[:, None], 40)
    found = information(readings, removed, before, labels, "abc", others).per_class
    assert found["a"].never_seen is None
    for target, name in ((1, "b"), (2, "c")):
        beside, other, own = found[name].never_seen, others[target], labels == target
        recalls = [(rows[own] == target).mean() for rows in (other.predicted, other.probed)]
        assert (beside.recall, beside.recall_refitted, beside.n_train) == (*recalls, 40 + target)
        told = []
        for read in (other.probed, before):
            shares = [(read[labels == c] == target).mean() for c in range(3)]
            told.append(shares.pop(target) - max(shares))
        assert min(told) > 0
        assert beside.information_lost == pytest.approx(1 - told[0] / told[1])
        for key, read in (("retained", other.predicted), ("retained_removed", removed[target])):
            each = [(read[labels == c] == c).mean() for c in range(3) if c != target]
            assert getattr(beside, key) == pytest.approx(np.mean(each))
    unread = Readings(np.zeros(60, np.int64), rows, rows[:, None], rows[:, None], 40)
    beside = information(unread, removed, before, labels, "abc", others).per_class["b"].never_seen
    assert beside.information_lost is None  # a probe does not tell it apart in the intact model


def test_nothing_is_tuned_without_a_linear_head_or_examples():
    labels, rows = np.arange(3).repeat(9), np.zeros((27, 2))
    head = np.zeros((4, 2)), np.zeros(4)
    for reader, target in ((Reader(labels, 4, None), 1), (Reader(labels, 4, head), 3)):
        for found in reader.tuned(rows, target):
            assert found.shape == (0, 27)
            assert found.dtype == np.int64
    assert Reader(labels, 4, head).n_fitted == 18
    assert Reader(np.array([0, 1, 0, 1]), 2, None).n_fitted == 2
    assert Reader(np.array([0, 1]), 2, None).n_fitted == 1
