"""Shares of kinds and of blocks against averages over orders, by plain loops."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from skillfast.evaluation.resampling import interval
from skillfast.evaluation.shapley import block_values, kinds_of, layer_contribution, per_block, shapley, subsets
from skillfast.models.sites import Site
from skillfast.results.records import to_json

KINDS = ("mlp", "attn", "head")
SETS = [("mlp", "attn", "head"), ("mlp", "attn"), ("mlp", "head"), ("attn", "head"), ("mlp",), ("attn",), ("head",)]


def over_orders(worth, parts):
    """Each part's gain over the parts before it, the mean over all orders; `worth` of a set of parts."""
    gains = dict.fromkeys(parts, 0.0)
    for order in permutations(parts):
        for i, part in enumerate(order):
            gains[part] += worth(set(order[: i + 1])) - worth(set(order[:i]))
    return [gains[part] / len(list(permutations(parts))) for part in parts]


def test_shares_are_means_over_all_orders():
    assert list(subsets(KINDS)) == SETS
    assert subsets(("head",)) == (("head",),)
    sites = [Site(f"{kind}.{i}", kind, i, "path", 4) for kind in ("head", "ssm", "mlp") for i in range(2)]
    assert kinds_of(sites) == ("mlp", "ssm", "head")
    values = np.random.default_rng(0).normal(size=(7, 2))
    known = {frozenset(): np.zeros(2), **{frozenset(s): v for s, v in zip(SETS, values, strict=True)}}
    found = shapley(values, KINDS)
    np.testing.assert_allclose(found, over_orders(lambda s: known[frozenset(s)], KINDS))
    np.testing.assert_allclose(found.sum(0), values[0])


def test_what_kinds_contribute():
    rng = np.random.default_rng(1)
    drops = rng.uniform(0.1, 0.3, (7, 3))
    drops[0], drops[0, 2] = 0.6, 0  # nothing dropped of the third class
    resampled = drops[..., None] + 0.02 * rng.normal(size=(7, 3, 300))
    found = to_json(layer_contribution(drops, resampled, "abc", KINDS))

    def shares(values):
        return dict(zip(KINDS, shapley(values, KINDS) / values[0], strict=True))

    def rest(values):
        return 1 - (values[4] + values[5] + values[6]) / values[0]

    mean, spread = drops.mean(1), resampled.mean(1)
    assert {kind: found[kind] for kind in KINDS} == pytest.approx(shares(mean))
    assert found["non_additivity"] == pytest.approx(rest(mean))
    for i, name in enumerate("ab"):
        own = found["per_class"][name]
        assert {kind: own[kind] for kind in KINDS} == pytest.approx(shares(drops[:, i]))
    assert set(found["per_class"]["c"].values()) <= {None}
    for kind, row in shares(spread).items():
        assert found["ci95"][kind] == pytest.approx(interval(row))
    assert found["ci95"]["non_additivity"] == pytest.approx(interval(rest(spread)))
    assert all(found.get(kind) is None for kind in ("ssm", "expert", "router"))
    nothing = to_json(layer_contribution(0 * drops, 0 * resampled, "abc", KINDS))
    assert nothing["non_additivity"] is nothing["mlp"] is None
    assert set(nothing["ci95"].values()) == {None}
    few = np.where(np.arange(300) < 9, 0, resampled)  # of 3 % of the resamples the whole drops nothing
    assert set(to_json(layer_contribution(drops, few, "abc", KINDS))["ci95"].values()) == {None}


def test_blocks_add_up_from_either_end():
    rng = np.random.default_rng(2)
    worth = rng.uniform(0.1, 0.5, (7, 2))  # all four blocks, the first 1 to 3, the last 1 to 3; two classes
    worth[0], worth[:, 1] = 0.8, 0
    resampled = worth[..., None] + 0.01 * rng.normal(size=(7, 2, 200))
    blocks = [0, 2, 5, None]
    up, down = block_values(worth[1:], worth[0])
    w = worth[:, 0]
    assert up[:, 0] == pytest.approx([w[1], w[2] - w[1], w[3] - w[2], w[0] - w[3]])
    assert down[:, 0] == pytest.approx([w[0] - w[6], w[6] - w[5], w[5] - w[4], w[4]])
    found = to_json(per_block(blocks, worth, resampled, "ab"))
    ends = np.mean(block_values(resampled.mean(1)[1:], resampled.mean(1)[0]), 0) / resampled.mean(1)[0]
    for b, entry in enumerate(found):
        assert entry.get("block") == blocks[b]
        assert entry["bottom_up"] == pytest.approx(up[b, 0] / w[0])
        assert entry["top_down"] == pytest.approx(down[b, 0] / w[0])
        assert entry["share"] == pytest.approx((entry["bottom_up"] + entry["top_down"]) / 2)
        assert entry["per_class"] == {"a": pytest.approx(entry["share"]), "b": None}
        assert entry["ci95"] == pytest.approx(interval(ends[b]))
    assert sum(entry["share"] for entry in found) == pytest.approx(1)
    nothing = to_json(per_block(blocks, 0 * worth, 0 * resampled, "ab"))
    assert all(e["share"] is e["ci95"] is e["bottom_up"] is e["top_down"] is None for e in nothing)
