from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import KNeighborsClassifier

from skillfast.evaluation.embeddings import (
    Alignment,
    EmbeddingMetrics,
    jackknife_interval,
    linear_cka,
    standard_metrics,
)
from skillfast.evaluation.resampling import Bootstrap
from skillfast.results.records import to_json


@pytest.fixture
def pair():
    """Embeddings [150, 12] of 3 classes, before and after something moved them all."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 150)
    before = (2 * np.eye(12)[labels] + rng.normal(size=(150, 12))).astype(np.float32)
    return before, (before + 0.8 * rng.normal(size=before.shape)).astype(np.float32), labels


def test_identical_embeddings(pair):
    before, _, labels = pair
    found = EmbeddingMetrics(before, labels).compare(before.copy())
    np.testing.assert_allclose(found.cosine, 1)
    np.testing.assert_allclose(found.rank_preservation, 1)
    assert not found.knn_accuracy_change.any()
    assert found.cka == pytest.approx(1)
    assert not len(found.undefined)


def test_cosine_and_ranks_equal_sklearns_and_scipys(pair):
    before, after, labels = pair
    found = EmbeddingMetrics(before, labels).compare(after)
    wide = before.astype(np.float64), after.astype(np.float64)
    np.testing.assert_allclose(found.cosine, np.diagonal(cosine_similarity(*wide)))
    rows = [cosine_similarity(x) for x in wide]
    for i in range(150):
        others = np.arange(150) != i
        rho = spearmanr(rows[0][i, others], rows[1][i, others]).statistic
        assert found.rank_preservation[i] == pytest.approx(rho, abs=1e-12)


def test_knn_equals_sklearns_one_image_at_a_time(pair):
    before, after, labels = pair
    found = EmbeddingMetrics(before, labels, n_neighbours=4).compare(after)  # an even number: votes tie
    right = []
    for embeddings in (before, after):
        row = []
        for i in range(150):
            others = np.arange(150) != i
            knn = KNeighborsClassifier(4, metric="cosine", algorithm="brute")
            row.append(knn.fit(embeddings[others], labels[others]).predict(embeddings[[i]])[0] == labels[i])
        right.append(np.array(row, dtype=float))
    np.testing.assert_array_equal(found.knn_accuracy_change, right[1] - right[0])
    assert found.knn_accuracy_change.any()
    assert EmbeddingMetrics(before, labels, n_neighbours=4).knn_accuracy() == pytest.approx(right[0].mean())


def test_cka_equals_the_definition_over_gram_matrices(pair):
    before, after, _ = pair
    after = after[:, :7]  # widths may differ
    centring = np.eye(150) - 1 / 150
    k, m = (centring @ x.astype(np.float64) @ x.T.astype(np.float64) @ centring for x in (before, after))
    want = np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))
    assert linear_cka(before, after) == pytest.approx(want)


def test_cka_without_a_group_equals_cka_of_the_others(pair):
    before, after, labels = pair
    _, left_out = Alignment(before, labels, groups=7).compare(after)
    dealt = np.empty(len(labels), int)
    dealt[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % 7
    want = [linear_cka(before[dealt != group], after[dealt != group]) for group in range(7)]
    np.testing.assert_allclose(left_out, want)


def test_the_interval_of_cka_covers():
    """Two noisy views of the same directions; CKA of very many images is what 95 % of the intervals hold."""
    mix = np.random.default_rng(0).normal(size=(2, 5, 5))

    def drawn(n, seed):
        rng = np.random.default_rng(seed)
        hidden = rng.normal(size=(n, 5))
        return [hidden @ m + 0.5 * rng.normal(size=(n, 5)) for m in mix]

    truth = linear_cka(*drawn(400_000, 0))
    held = 0
    for seed in range(1, 201):
        before, after = drawn(800, seed)
        cka, left_out = Alignment(before, np.arange(800) % 10).compare(after)
        low, high = jackknife_interval(cka, left_out, 0.0, 1.0)
        held += low <= truth <= high
    assert 181 <= held <= 199
    assert jackknife_interval(0.5, np.array([0.5, np.nan]), 0.0, 1.0) is None


def test_invariances(pair):
    """Angles and neighbours see neither scale nor rotation; CKA besides no shift."""
    before, after, labels = pair
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0]
    want = EmbeddingMetrics(before, labels).compare(after)
    turned = EmbeddingMetrics(before, labels).compare(3 * after @ turn)
    np.testing.assert_allclose(turned.rank_preservation, want.rank_preservation, atol=1e-6)
    np.testing.assert_array_equal(turned.knn_accuracy_change, want.knn_accuracy_change)
    assert turned.cka == pytest.approx(want.cka)
    assert linear_cka(before, 3 * after @ turn + 5) == pytest.approx(want.cka)
    together = EmbeddingMetrics(before @ turn, labels).compare(7 * after @ turn)
    np.testing.assert_allclose(together.cosine, want.cosine, atol=1e-6)


def test_what_has_nothing_in_common_scores_near_0():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 2000, 4))
    found = EmbeddingMetrics(before, np.arange(2000) % 2).compare(after)
    assert abs(np.nanmean(found.rank_preservation)) < 0.02
    assert abs(found.cosine.mean()) < 0.05
    assert found.cka < 0.01


def test_more_images_than_anchors(pair):
    before, after, labels = pair
    every = EmbeddingMetrics(before, labels).compare(after).rank_preservation
    some = EmbeddingMetrics(before, labels, max_anchors=40).compare(after).rank_preservation
    assert np.isfinite(some).sum() == 40
    np.testing.assert_array_equal(some[np.isfinite(some)], every[np.isfinite(some)])


def test_embeddings_without_direction_are_left_out_and_counted(pair):
    before, after, labels = pair
    broken = after.copy()
    broken[[3, 7]] = 0
    broken[11, 2] = np.inf
    before = before.copy()
    before[20] = 0
    found = EmbeddingMetrics(before, labels).compare(broken)
    assert found.undefined.tolist() == [3, 7, 11, 20]
    kept = np.setdiff1d(np.arange(150), [3, 7, 11, 20])
    want = EmbeddingMetrics(before[kept], labels[kept]).compare(after[kept])
    for name in ("cosine", "rank_preservation", "knn_accuracy_change"):
        values = getattr(found, name)
        np.testing.assert_array_equal(values[kept], getattr(want, name))
        assert np.isnan(values[found.undefined]).all()
    assert found.cka == want.cka


def test_nothing_is_left():
    before = np.random.default_rng(0).normal(size=(20, 3))
    labels = np.arange(20) % 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = EmbeddingMetrics(before, labels).compare(np.zeros((20, 3)))
        made = EmbeddingMetrics(before, labels)
        found = standard_metrics(made, [found] * 2, np.array([0.5, 0.7]), ["a", "b"], Bootstrap(labels, 20))
    result = to_json(found)
    assert [result[key] for key in ("cosine", "rank_preservation", "knn_accuracy_change", "cka")] == [None] * 4
    assert result["reasons"] == {"zero_or_not_finite": {"a": 20, "b": 20}}
    assert set(result["ci95"].values()) == {None}
    assert result["target_drop"] == pytest.approx(0.6)
    assert EmbeddingMetrics(np.zeros((20, 3)), labels).knn_accuracy() is None


def test_constant_embeddings_have_no_order_and_no_cka():
    before = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    labels = np.arange(30) % 2
    found = EmbeddingMetrics(before, labels).compare(np.full_like(before, 0.1))
    assert np.isnan(found.rank_preservation).all()
    assert np.isnan(found.cka)
    assert np.isfinite(found.cosine).all()
    metrics = EmbeddingMetrics(before, labels)
    result = to_json(standard_metrics(metrics, [found] * 2, np.zeros(2), ["a", "b"], Bootstrap(labels, 20)))
    assert result["rank_preservation"] is result["cka"] is None
    assert result["cosine"] is not None
    assert result["reasons"] == {"constant_embeddings": ["a", "b"]}


def test_few_images():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5):
        before, after = rng.normal(size=(2, n, 3))
        found = EmbeddingMetrics(before, np.zeros(n, dtype=int)).compare(after)
        assert np.isfinite(found.cosine).all()
        assert np.isfinite(found.rank_preservation).all() == (n > 2)
        assert np.isnan(found.knn_accuracy_change).all()  # at most n - 1 < 5 neighbours


def test_a_class_of_one_image_has_no_knn_accuracy():
    rng = np.random.default_rng(0)
    labels = np.array([0] * 20 + [1] * 20 + [2])
    before = np.eye(3)[labels] + 0.1 * rng.normal(size=(41, 3))
    metrics = EmbeddingMetrics(before, labels)
    found = metrics.compare(before)
    assert np.isnan(found.knn_accuracy_change).tolist() == [False] * 40 + [True]
    assert metrics.knn_accuracy() == 1
    result = to_json(standard_metrics(metrics, [found] * 3, np.zeros(3), ["a", "b", "c"], Bootstrap(labels, 50)))
    assert result["per_class"]["c"]["target_knn_accuracy_change"] is None
    assert result["per_class"]["a"]["knn_accuracy_change_per_class"] == [0, 0, None]
    assert result["reasons"] == {"one_image": ["c"]}


def test_planted_what_embedding_metrics_miss():
    """One class of ten loses itself among the others: the target falls, the averages over all images hardly move."""
    rng = np.random.default_rng(0)
    labels = np.arange(10).repeat(50)
    before = 3 * np.eye(16)[labels] + 0.5 * rng.normal(size=(500, 16)) + 4
    after = before.copy()
    after[labels == 3] -= 3 * np.eye(16)[3]
    metrics = EmbeddingMetrics(before, labels)
    found = metrics.compare(after)
    assert np.nanmean(found.cosine) > 0.99
    assert np.nanmean(found.rank_preservation) > 0.8
    others = found.knn_accuracy_change[labels != 3]
    assert abs(others.mean()) < 0.02
    still = metrics.compare(before)
    result = standard_metrics(
        metrics, [found if i == 3 else still for i in range(10)], np.eye(10)[3], list("0123456789"),
        Bootstrap(labels, 200),
    )  # fmt: skip
    result = to_json(result)
    assert result["per_class"]["3"]["target_drop"] == 1
    assert result["per_class"]["2"]["cosine"] == pytest.approx(1)
    assert result["cosine"] == pytest.approx((9 + found.cosine.mean()) / 10)
    low, high = result["ci95"]["cosine"]
    assert low <= result["cosine"] <= high < 1


def test_the_intervals_cover():
    """Means over images of a known mean: the 95 % interval of the mean cosine holds it about 95 times in 100."""
    rng = np.random.default_rng(0)
    turns = np.array([0.2, 1.0])  # radians, of the two halves of the images
    held = 0
    for trial in range(150):
        labels = np.arange(2).repeat(60)
        angle = rng.choice(turns, 120)
        before = np.tile([1.0, 0.0], (120, 1)) + 1e-3 * rng.normal(size=(120, 2))
        turn = np.stack(
            [np.stack([np.cos(angle), -np.sin(angle)], -1), np.stack([np.sin(angle), np.cos(angle)], -1)], 1
        )
        metrics = EmbeddingMetrics(before, labels, max_anchors=2)
        found = metrics.compare(np.einsum("nij,nj->ni", turn, before))
        result = to_json(standard_metrics(metrics, [found] * 2, np.zeros(2), ["a", "b"], Bootstrap(labels, 300, trial)))
        low, high = result["ci95"]["cosine"]
        held += low <= np.cos(turns).mean() <= high
    assert 133 <= held <= 149
