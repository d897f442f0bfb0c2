from __future__ import annotations

import itertools

import numpy as np
import pytest

from skillfast.evaluation.resampling import interval
from skillfast.evaluation.shapley import SUBSETS, block_values, layer_contribution, per_block, shapley
from skillfast.vocabulary import KINDS

CLASSES = ["cat", "dog", "owl"]


def drawn(rows, replicates, seed=0):
    """Drops [rows, 3] and resamples of them [rows, 3, replicates] that vary a little."""
    rng = np.random.default_rng(seed)
    drops = rng.uniform(0.2, 0.9, (rows, 3))
    return drops, drops[:, :, None] + rng.normal(0, 0.01, (rows, 3, replicates))


def over_all_orders(worth):
    """Each kind's mean marginal worth over every order in which kinds can join: the definition."""
    orders = list(itertools.permutations(KINDS))
    found = dict.fromkeys(KINDS, 0.0)
    for order in orders:
        for i, kind in enumerate(order):
            found[kind] += (worth[frozenset(order[: i + 1])] - worth[frozenset(order[:i])]) / len(orders)
    return [found[kind] for kind in KINDS]


def worth_of(values):
    return {frozenset(): 0.0, **{frozenset(s): v for s, v in zip(SUBSETS, values, strict=True)}}


def test_shares_are_means_over_all_orders():
    drops, resampled = drawn(len(SUBSETS), 200)
    want = np.array(over_all_orders(worth_of(drops.mean(1))))
    np.testing.assert_allclose(shapley(drops.mean(1)), want)
    found = layer_contribution(drops, resampled, CLASSES)
    np.testing.assert_allclose([getattr(found, kind) for kind in KINDS], want / drops[0].mean())
    assert found.mlp + found.attn + found.head == pytest.approx(1)
    for c, name in enumerate(CLASSES):
        of_class = np.array(over_all_orders(worth_of(drops[:, c]))) / drops[0, c]
        np.testing.assert_allclose([getattr(found.per_class[name], kind) for kind in KINDS], of_class)
    alone = [SUBSETS.index((kind,)) for kind in KINDS]
    assert found.non_additivity == pytest.approx(1 - drops[alone].mean(1).sum() / drops[0].mean())
    spread = resampled.mean(1)
    rest = [1 - sum(row[i] for i in alone) / row[0] for row in spread.T]
    assert found.ci95.non_additivity == pytest.approx(interval(np.array(rest)))
    for i, kind in enumerate(KINDS):
        shares = [over_all_orders(worth_of(row))[i] / row[0] for row in spread.T]
        assert getattr(found.ci95, kind) == pytest.approx(interval(np.array(shares)))


def test_where_nothing_drops_there_are_no_shares():
    drops, resampled = drawn(len(SUBSETS), 50)
    drops[:, 1] = 0
    found = layer_contribution(drops, resampled, CLASSES)
    assert found.per_class["dog"].mlp is found.per_class["dog"].head is None
    assert found.per_class["cat"].mlp is not None
    none = layer_contribution(0 * drops, 0 * resampled, CLASSES)
    assert none.mlp is none.attn is none.head is none.non_additivity is None
    assert none.ci95.mlp is none.ci95.non_additivity is None
    assert [block.share for block in per_block([0, None], np.zeros((3, 3)), np.zeros((3, 3, 9)), CLASSES)] == [None] * 2


def test_blocks_add_up_to_the_whole_from_either_end():
    """Worth of the first blocks, then of the last ones: what each adds in either order, and the mean of the two."""
    drops, resampled = drawn(5, 300)  # the whole, {a}, {a, b}, {c}, {b, c}
    whole, a, ab, c, bc = drops.mean(1)
    up, down = [a, ab - a, whole - ab], [whole - bc, bc - c, c]
    got = block_values(drops[1:].mean(1), whole)
    np.testing.assert_allclose(got, [up, down])
    found = per_block([0, 2, None], drops, resampled, CLASSES)
    assert [block.block for block in found] == [0, 2, None]
    np.testing.assert_allclose([block.bottom_up for block in found], np.array(up) / whole)
    np.testing.assert_allclose([block.top_down for block in found], np.array(down) / whole)
    np.testing.assert_allclose([block.share for block in found], (np.array(up) + down) / 2 / whole)
    spread = resampled.mean(1)
    shares = ((spread[2] - spread[1]) + (spread[4] - spread[3])) / 2 / spread[0]
    assert found[1].ci95 == pytest.approx(interval(shares))
    for i, name in enumerate(CLASSES):
        of_class = ((drops[2, i] - drops[1, i]) + (drops[4, i] - drops[3, i])) / 2 / drops[0, i]
        assert found[1].per_class[name] == pytest.approx(of_class)
