"""Angles between class means before and after a removal, against plain loops and planted turns."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from skillfast.evaluation.directions import angles
from skillfast.evaluation.jackknife import deal, jackknife_interval


def rotated(vectors, degrees):
    """Each row turned in the plane of its first two coordinates."""
    angle = np.radians(degrees)
    turned = vectors.copy()
    turned[:, 0] = np.cos(angle) * vectors[:, 0] - np.sin(angle) * vectors[:, 1]
    turned[:, 1] = np.sin(angle) * vectors[:, 0] + np.cos(angle) * vectors[:, 1]
    return turned


def plain(before, after, labels, n_classes):
    """Angles between whole means, whose products hold the noise of the images that both are means of."""
    centre = before.mean(0)
    out = []
    for label in range(n_classes):
        u, v = (x[labels == label].mean(0) - centre for x in (before, after))
        out.append(np.degrees(np.arccos(u @ v / np.linalg.norm(u) / np.linalg.norm(v))))
    return np.array(out)


def halves_of(labels):
    """Every way to split each class of an even number of images into halves."""
    per_class = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        per_class.append([(one, tuple(set(members) - set(one))) for one in combinations(members, len(members) // 2)])
    for choice in product(*per_class):
        yield [[i for pair in choice for i in pair[side]] for side in (0, 1)]


def test_angles_equal_the_mean_over_all_splits():
    rng = np.random.default_rng(1)
    labels = np.array([0] * 4 + [1] * 4 + [2] * 2)
    before = 2 * np.eye(5)[labels] + 0.3 * rng.normal(size=(10, 5))
    after = rotated(before, 50) + 0.3 * rng.normal(size=(10, 5))
    weights = [0.4, 0.4, 0.2]
    splits = list(halves_of(labels))
    want = []
    for label in range(3):
        sums = {"bb": 0.0, "ba": 0.0, "aa": 0.0}
        for split in splits:
            seen = []
            for half in split:
                means = {name: [np.zeros(5)] * 3 for name in "ba"}
                for name, rows in (("b", before), ("a", after)):
                    for j in range(3):
                        own = [i for i in half if labels[i] == j]
                        means[name][j] = sum(rows[i] for i in own) / len(own)
                centre = sum(weights[j] * means["b"][j] for j in range(3))
                seen.append({name: means[name][label] - centre for name in "ba"})
            one, other = seen
            sums["bb"] += sum(x * y for x, y in zip(one["b"], other["b"], strict=True))
            sums["aa"] += sum(x * y for x, y in zip(one["a"], other["a"], strict=True))
            sums["ba"] += sum(x * y for x, y in zip(one["b"], other["a"], strict=True)) / 2
            sums["ba"] += sum(x * y for x, y in zip(one["a"], other["b"], strict=True)) / 2
        want.append(np.degrees(np.arccos(min(1.0, sums["ba"] / (sums["bb"] * sums["aa"]) ** 0.5))))
    found, _ = angles(before, after, labels, 3)
    np.testing.assert_allclose(found, want, rtol=1e-9)
    assert np.abs(found - plain(before, after, labels, 3)).max() > 0.1


def test_angles_without_a_group_are_those_of_the_others():
    rng = np.random.default_rng(2)
    labels = np.arange(63) % 3  # of each class as many in each group, so that the classes' weights stay
    before = 2 * np.eye(6)[labels] + rng.normal(size=(63, 6))
    after = before + rng.normal(size=(63, 6))
    _, left_out = angles(before, after, labels, 4, groups=7)
    dealt = deal(labels, 7)
    for group in range(7):
        kept = dealt != group
        want = angles(before[kept], after[kept], labels[kept], 4)[0]
        np.testing.assert_allclose(left_out[group], want)


@pytest.fixture
def clouds():
    """Embeddings [400, 8] of 4 classes whose centred means lie in the plane of the first two coordinates."""
    rng = np.random.default_rng(0)
    labels = np.arange(4).repeat(100)
    means = np.zeros((4, 8))
    means[:, :2] = [[3, 0], [0, 2], [-3, 0], [0, -2]]
    noise = 1e-6 * rng.normal(size=(4, 100, 8))
    noise -= noise.mean(1, keepdims=True)
    return means[labels] + noise.reshape(400, 8), labels


@pytest.mark.parametrize("degrees", [1e-4, 0.8, 45, 179.99])
def test_planted_angles_are_recovered(clouds, degrees):
    embeddings, labels = clouds
    offset = np.linspace(-5, 5, 8)  # the centre is the intact model's, wherever it lies
    after = np.where((labels == 2)[:, None], rotated(embeddings, degrees), embeddings)
    found, _ = angles(embeddings + offset, after + offset, labels, 4)
    np.testing.assert_allclose(found, [0, 0, degrees, 0], rtol=1e-4, atol=1e-5)


def test_identical_embeddings_have_no_angle():
    rng = np.random.default_rng(3)
    labels = np.arange(3).repeat(20)
    embeddings = (np.eye(6)[labels] + rng.normal(size=(60, 6))).astype(np.float32)
    found, left_out = angles(embeddings, embeddings, labels, 3)
    assert found.tolist() == [0, 0, 0]
    assert not left_out.any()


def test_angles_do_not_see_units_or_rotations(clouds):
    embeddings, labels = clouds
    after = embeddings + np.random.default_rng(2).normal(size=embeddings.shape)
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(8, 8)))[0]
    want, without = angles(embeddings, after, labels, 4)
    found, left_out = angles(7 * embeddings @ turn + 3, 7 * after @ turn + 3, labels, 4)
    np.testing.assert_allclose(found, want)
    np.testing.assert_allclose(left_out, without)
    np.testing.assert_allclose(angles(embeddings + 1e6, after + 1e6, labels, 4)[0], want, rtol=1e-6)  # nor an offset


def test_what_has_no_direction_has_no_angle():
    rng = np.random.default_rng(0)
    labels = np.array([0] * 10 + [1] * 10 + [3])
    embeddings = (3 * np.eye(4)[labels] + rng.normal(size=(21, 4))).astype(np.float32)
    undefined = np.isnan(angles(embeddings, embeddings, labels, 4)[0])
    assert undefined.tolist() == [False, False, True, True]  # no image, and one, of which there are no halves
    constant = np.full_like(embeddings, 0.1)
    assert np.isnan(angles(constant, embeddings, labels, 4)[0]).all()
    rounded = (1000 + 1e-5 * rng.normal(size=(21, 4))).astype(np.float64)  # less than float32 keeps of 1,000
    assert np.isnan(angles(rounded, embeddings, labels, 4)[0]).all()
    gone = np.tile(embeddings.mean(0, dtype=np.float64), (21, 1))
    assert np.isnan(angles(embeddings, gone, labels, 4)[0]).all()
    assert np.isnan(angles(embeddings[:, :0], embeddings[:, :0], labels, 4)[0]).all()  # all coordinates left out
    overflowed = embeddings.copy()
    overflowed[0, 0] = np.inf
    assert np.isnan(angles(embeddings, overflowed, labels, 4)[0]).tolist() == [True, False, True, True]


def noisy(rng, degrees, n, noise, shared):
    """Two classes of n images, turned by `degrees`, and noise of which a part is the same before and after."""
    labels = np.arange(2).repeat(n)
    means = np.zeros((2, 30))
    means[:, 0] = [3, -3]
    both = shared * noise * rng.normal(size=(2 * n, 30))
    own = [np.sqrt(1 - shared**2) * noise * rng.normal(size=(2 * n, 30)) for _ in "ba"]
    return means[labels] + both + own[0], rotated(means, degrees)[labels] + both + own[1], labels


def test_noise_neither_turns_nor_hides_a_class():
    """20 images of much noise: whole means say 36 degrees where classes turn by 20, products across halves about 20.

    The products are unbiased; the angle is a curve of them that ends at 0, so its median is compared.
    """
    rng = np.random.default_rng(4)
    found, whole = [], []
    for _ in range(150):
        before, after, labels = noisy(rng, 20, 20, 1.0, 0.0)
        found.append(angles(before, after, labels, 2, groups=1)[0])
        whole.append(plain(before, after, labels, 2))
    assert np.median(found) == pytest.approx(20, abs=2)
    assert np.median(whole) > 33


@pytest.mark.parametrize(("degrees", "shared"), [(10, 0.9), (30, 0.0), (60, 0.5)])
def test_the_interval_of_an_angle_covers(degrees, shared):
    """Classes turned by a known angle: 95 % intervals hold it in 92 to 98 of 100 cases."""
    rng = np.random.default_rng(5)
    held = trials = 0
    for _ in range(250):
        before, after, labels = noisy(rng, degrees, 50, 1.0, shared)
        found, left_out = angles(before, after, labels, 2)
        for j in range(2):
            low, high = jackknife_interval(found[j], left_out[:, j], 0.0, 180.0)
            held += low <= degrees <= high
            trials += 1
    assert 0.92 <= held / trials <= 0.98
