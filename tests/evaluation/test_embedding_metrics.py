from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import KNeighborsClassifier

from skillfast.evaluation.embeddings import (
    KEYS,
    Alignment,
    EmbeddingMetrics,
    _difference,
    _Estimates,
    _Sums,
    order_kept,
    standard_metrics,
)
from skillfast.evaluation.jackknife import deal, jackknife_interval
from skillfast.results.records import to_json


def cka(before, after):
    """Debiased CKA, of no groups."""
    return Alignment(before, np.zeros(len(before), int), groups=0).compare(after)[0]


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


def hsic(x, y):
    """The unbiased criterion of Song et al. (2012), equation 4, by loops over images."""
    n = len(x)
    k, m = ([[float(a @ b) if i != j else 0.0 for j, b in enumerate(z)] for i, a in enumerate(z)] for z in (x, y))
    trace = sum(k[i][j] * m[j][i] for i in range(n) for j in range(n))
    totals = sum(map(sum, k)) * sum(map(sum, m))
    rows = sum(sum(k[i]) * sum(m[i]) for i in range(n))
    return (trace + totals / (n - 1) / (n - 2) - 2 * rows / (n - 2)) / (n * (n - 3))


def test_cka_equals_the_definition_over_all_pairs_of_images(pair):
    before, after, _ = (x[:40] for x in pair)
    after = after[:, :7]  # widths may differ
    x, y = before.astype(np.float64), after.astype(np.float64)
    want = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    assert cka(before, after) == pytest.approx(want, rel=1e-9)
    assert np.isnan(cka(before[:3], after[:3]))


def test_cka_without_a_group_equals_cka_of_the_others(pair):
    before, after, labels = pair
    dealt = deal(labels, 7)
    _, left_out = Alignment(before, dealt, groups=7).compare(after)
    want = [cka(before[dealt != group], after[dealt != group]) for group in range(7)]
    np.testing.assert_allclose(left_out, want)


def test_few_images_do_not_make_embeddings_alike():
    """30 images, 100 coordinates, nothing in common: CKA with its bias says 0.77, the debiased one 0."""
    rng = np.random.default_rng(1)
    found, biased = [], []
    for _ in range(100):
        x, y = rng.normal(size=(2, 30, 100))
        found.append(cka(x, y))
        x, y = x - x.mean(0), y - y.mean(0)
        biased.append(np.sum((x.T @ y) ** 2) / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y))
    assert abs(np.mean(found)) < 0.02
    assert np.mean(biased) > 0.7


def test_the_interval_of_cka_covers():
    """Two noisy views of the same directions; CKA of very many images is what 95 % of the intervals hold."""
    mix = np.random.default_rng(0).normal(size=(2, 5, 5))

    def drawn(n, seed):
        rng = np.random.default_rng(seed)
        hidden = rng.normal(size=(n, 5))
        return [hidden @ m + 0.5 * rng.normal(size=(n, 5)) for m in mix]

    truth = cka(*drawn(400_000, 0))
    held = 0
    for seed in range(1, 201):
        before, after = drawn(200, seed)
        value, left_out = Alignment(before, deal(np.arange(200) % 10), 40).compare(after)
        low, high = jackknife_interval(value, left_out, -1.0, 1.0)
        held += low <= truth <= high
    assert 184 <= held <= 196


def test_invariances(pair):
    """Angles and neighbours see neither scale nor rotation; CKA besides no shift."""
    before, after, labels = pair
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0]
    want = EmbeddingMetrics(before, labels).compare(after)
    turned = EmbeddingMetrics(before, labels).compare(3 * after @ turn)
    np.testing.assert_allclose(turned.rank_preservation, want.rank_preservation, atol=1e-6)
    np.testing.assert_array_equal(turned.knn_accuracy_change, want.knn_accuracy_change)
    assert turned.cka == pytest.approx(want.cka)
    assert cka(before, 3 * after @ turn + np.arange(12)) == pytest.approx(want.cka)
    together = EmbeddingMetrics(before @ turn, labels).compare(7 * after @ turn)
    np.testing.assert_allclose(together.cosine, want.cosine, atol=1e-6)


def plain_rho(before, after, kept):
    """Mean of Spearman's rho of each image's similarities to the others, among some images, by loops."""
    rows = [x[kept] @ x[kept].T for x in (before, after)]
    others = ~np.eye(len(kept), dtype=bool)
    return np.mean([spearmanr(rows[0][i, o], rows[1][i, o]).statistic for i, o in enumerate(others)])


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_the_influence_on_the_kept_order_is_that_of_leaving_images_out(pair):
    before, after = (unit(x[:50].astype(np.float64)) for x in pair[:2])
    rho, influence = order_kept(before, after, np.arange(50))
    assert influence.sum() == pytest.approx(0, abs=1e-9)
    want = [plain_rho(before, after, np.delete(np.arange(50), i)) - rho.mean() for i in range(50)]
    assert np.corrcoef(-influence / 49, want)[0, 1] > 0.999
    assert np.std(-influence / 49) == pytest.approx(np.std(want), rel=0.05)
    as_anchor = rho - rho.mean()  # what a bootstrap over rows would see alone
    assert influence.std() > 1.4 * as_anchor.std()


def test_the_interval_of_the_kept_order_covers():
    """Neighbours are drawn, too: intervals hold the rho of many images in 92 to 98 % of 200 cases."""
    means = 1.5 * np.random.default_rng(0).normal(size=(3, 6))

    def drawn(n, seed):
        rng = np.random.default_rng(seed)
        labels = np.arange(3).repeat(n // 3)
        before = means[labels] + rng.normal(size=(n, 6))
        return before, before + 0.7 * rng.normal(size=(n, 6)), labels

    def kept(n, seed):
        return EmbeddingMetrics(*drawn(n, seed)[::2]).compare(drawn(n, seed)[1]).rank_preservation.mean()

    truth = np.mean([kept(300, seed) for seed in range(1000, 1060)])  # 18,000 images
    held = narrow = 0
    for seed in range(1, 201):
        before, after, labels = drawn(150, seed)
        metrics = EmbeddingMetrics(before, labels)
        found = metrics.compare(after)
        result = standard_metrics(metrics, [found] * 3, np.zeros(3), "abc")
        low, high = result.ci95.rank_preservation
        held += low <= truth <= high
        rho = found.rank_preservation
        narrow += abs(rho.mean() - truth) <= 1.96 * rho.std() / np.sqrt(150)  # of rows alone
    assert 184 <= held <= 196
    assert narrow < 170


def test_what_a_removal_writes_itself_is_left_out(pair):
    """A removal that zeroes four coordinates and moves nothing else changes no metric."""
    before, _, labels = pair
    after, written = before.copy(), np.array([0, 2, 5, 11])
    after[:, written] = 0
    metrics = EmbeddingMetrics(before, labels)
    found = metrics.compare(after, written)
    np.testing.assert_allclose(found.cosine, 1)
    np.testing.assert_allclose(found.rank_preservation, 1)
    assert not found.knn_accuracy_change.any()
    assert found.cka == pytest.approx(1)
    assert found.n_written == 4
    with_them = metrics.compare(after)
    assert with_them.cosine.mean() < 0.9
    assert with_them.cka < 0.95
    moved = before + 0.3 * np.random.default_rng(3).normal(size=before.shape)
    kept = np.delete(np.arange(12), written)
    want = EmbeddingMetrics(before[:, kept], labels).compare(moved[:, kept])
    got = metrics.compare(moved, written)
    for name in ("cosine", "rank_preservation", "knn_accuracy_change", "cka"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    nothing = metrics.compare(before, np.arange(12))
    assert len(nothing.undefined) == 150


def test_the_difference_to_random_draws(pair):
    before, after, labels = pair
    rng = np.random.default_rng(5)
    metrics = EmbeddingMetrics(before, labels)
    skills = [metrics.compare(after + 0.1 * i) for i in range(3)]
    random = [metrics.compare(before + s * rng.normal(size=before.shape)) for s in (0.2, 0.3, 0.4, 0.25, 0.35, 0.5)]
    result = standard_metrics(metrics, skills, np.zeros(3), "abc", random)
    for key in ("cosine", "rank_preservation", "knn_accuracy_change", "cka", "target_knn_accuracy_change"):
        want = getattr(result, key) - getattr(result.random_control, key)
        assert getattr(result.difference, key) == pytest.approx(want)
        low, high = getattr(result.difference.ci95, key)
        assert low < want < high
    assert result.difference.draws == 2
    assert result.reasons is None
    own = [found.knn_accuracy_change[labels == i].mean() for i, found in enumerate(skills)]
    assert result.target_knn_accuracy_change == pytest.approx(np.mean(own))
    low, high = result.ci95.target_knn_accuracy_change
    spread = sum(found.knn_accuracy_change[labels == i].var() / (labels == i).sum() for i, found in enumerate(skills))
    assert (high - low) / 2 == pytest.approx(2.02 * np.sqrt(spread) / 3, rel=0.25)
    assert result.random_control.cosine == pytest.approx(np.mean([found.cosine.mean() for found in random]))
    rows = np.stack([found.cosine for found in skills]).mean(0) - np.stack([found.cosine for found in random]).mean(0)
    means = np.array([found.cosine.mean() for found in random])
    error = np.sqrt(rows.var() / 150 + means.var(ddof=1) / 6)
    low, high = result.difference.ci95.cosine
    assert (high - low) / 2 == pytest.approx(2.02 * error, rel=0.25)


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
        found = standard_metrics(made, [found] * 2, np.array([0.5, 0.7]), ["a", "b"])
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
    result = to_json(standard_metrics(metrics, [found] * 2, np.zeros(2), ["a", "b"]))
    assert result["rank_preservation"] is result["cka"] is None
    assert result["cosine"] is not None
    assert result["reasons"] == {"constant_embeddings": ["a", "b"]}
    assert np.isnan(metrics.compare(np.tile(before[:1], (30, 1))).cka)  # constant, each number another


def test_few_images():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 4, 5):
        before, after = rng.normal(size=(2, n, 3))
        assert np.isnan(_Sums.of(before, after).dependence()) == (n < 4)
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
    result = to_json(standard_metrics(metrics, [found] * 3, np.zeros(3), ["a", "b", "c"]))
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
    for _ in range(150):
        labels = np.arange(2).repeat(60)
        angle = rng.choice(turns, 120)
        before = np.tile([1.0, 0.0], (120, 1)) + 1e-3 * rng.normal(size=(120, 2))
        turn = np.stack(
            [np.stack([np.cos(angle), -np.sin(angle)], -1), np.stack([np.sin(angle), np.cos(angle)], -1)], 1
        )
        metrics = EmbeddingMetrics(before, labels, max_anchors=2)
        found = metrics.compare(np.einsum("nij,nj->ni", turn, before))
        result = to_json(standard_metrics(metrics, [found] * 2, np.zeros(2), ["a", "b"]))
        low, high = result["ci95"]["cosine"]
        held += low <= np.cos(turns).mean() <= high
    assert 138 <= held <= 147


def test_a_difference_is_missing_where_either_side_is_and_reasons_name_the_classes(pair):
    before, after, labels = pair
    metrics = EmbeddingMetrics(before, np.where(labels == 2, 3, labels))
    skills, still = [metrics.compare(after)] * 4, [metrics.compare(np.full_like(before, 0.1))] * 4
    for ours, theirs in ((skills, still), (still, skills)):
        found = standard_metrics(metrics, ours, np.zeros(4), "abcd", theirs)
        assert found.difference.cka is found.difference.ci95.cka is None
        assert found.difference.cosine == pytest.approx(found.cosine - found.random_control.cosine)
    found = standard_metrics(metrics, skills, np.zeros(4), "abcd", skills * 2).difference
    for key in ("cosine", "rank_preservation", "knn_accuracy_change", "cka"):  # images move both alike
        assert getattr(found, key) == 0
        assert getattr(found.ci95, key) == pytest.approx([0, 0], abs=1e-12)
    single = np.array([0] * 7 + [1])
    found = EmbeddingMetrics(before[:8], single).compare(after[:8])
    result = to_json(standard_metrics(EmbeddingMetrics(before[:8], single), [found] * 3, np.zeros(3), "abc"))
    assert result["reasons"] == {"one_image": ["b"], "no_images": ["c"]}


def test_the_record_of_each_removal(pair):
    before, after, labels = pair
    before = before.copy()
    before[[4, 9]] = 0
    metrics = EmbeddingMetrics(before, labels, n_neighbours=4, max_anchors=60)
    found = [metrics.compare(after, [1, 2]), metrics.compare(after[:, ::-1]), metrics.compare(before)]
    result = standard_metrics(metrics, found, np.array([0.25, np.nan, 0.75]), "abc")
    for i, (name, one) in enumerate(zip("abc", found, strict=True)):
        entry = result.per_class[name]
        per_image = (one.cosine, one.rank_preservation, one.knn_accuracy_change)
        want = [np.nanmean(row) for row in per_image] + [one.cka, np.nanmean(one.knn_accuracy_change[labels == i])]
        keys = ("cosine", "rank_preservation", "knn_accuracy_change", "cka", "target_knn_accuracy_change")
        assert [getattr(entry, key) for key in keys] == pytest.approx(want)
        change = [np.nanmean(one.knn_accuracy_change[labels == j]) for j in range(3)]
        assert entry.knn_accuracy_change_per_class == pytest.approx(change)
        assert entry.coordinates_left_out == one.n_written == (2 if i == 0 else 0)
    for key in keys:
        assert getattr(result, key) == pytest.approx(np.mean([getattr(result.per_class[c], key) for c in "abc"]))
    assert [result.per_class[name].target_drop for name in "abc"] == [0.25, None, 0.75]
    assert result.target_drop == 0.5
    assert (result.n_neighbours, result.n_ranked) == (4, 60)
    assert result.random_control is result.difference is None
    kept = np.setdiff1d(np.arange(150), [4, 9])
    few = EmbeddingMetrics(before[kept], labels[kept], n_neighbours=4)
    assert result.knn_accuracy == few.knn_accuracy()
    assert 0.5 < result.knn_accuracy < 1
    assert standard_metrics(few, [few.compare(after[kept])] * 3, np.zeros(3), "abc").n_ranked == 148


def test_a_difference_lies_between_minus_2_and_2():
    """Cosines are from -1 to 1; so are their differences to draws from -2 to 2, however wide the interval is."""
    ones = {key: np.ones((2, 3)) for key in KEYS}
    apart = {key: np.array([[1.0, -1, 1], [-1, 1, -1]]) for key in KEYS}
    left_out = {key: np.tile([3.0, -3], (2, 3, 4)) for key in KEYS}
    same = {key: np.zeros((2, 3, 8)) for key in KEYS}
    found = _difference(_Estimates(ones, left_out), _Estimates(apart, same))
    assert found.ci95.cka == [-2, 2]
    assert found.draws == 2
    value = found.cosine
    assert value == pytest.approx(1 - np.mean(apart["cosine"]))
    steady = _difference(_Estimates(ones, same), _Estimates(apart, same))
    want = jackknife_interval(value, np.zeros(8), -2, 2, np.var(apart["cosine"], ddof=1) / 6)
    assert steady.ci95.cosine == pytest.approx(want)
    assert _Estimates({"cka": np.full((1, 2), np.nan)}, {"cka": np.ones((1, 2, 5))}).mean_left_out("cka").shape == (5,)
