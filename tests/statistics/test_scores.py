"""Scores as they are indexed, saved and written as a table, whatever they hold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from skillfast import NeuronScores
from skillfast.errors import ArgumentError, DataError
from skillfast.models.sites import Site
from skillfast.statistics.scores import OF_NEURONS

SITES = (
    Site("blocks.0.attn", "attn", 0, "a", 4, heads=2),
    Site("blocks.1.experts", "expert", 1, "e", 6, experts=3, layout="channels_first"),
    Site("head", "head", None, "h", 2, inside="x"),
)
COLUMNS = ("label:0", "label:1", "loss")


def scores(**changes):
    """Every array is there, and every reason."""
    rng = np.random.default_rng(0)
    names = [field.name for field in dataclasses.fields(NeuronScores) if field.type.startswith("np.ndarray | None")]
    arrays = {name: rng.random((12, 3)) for name in names if name not in ("n_routed", "between")}
    arrays["auroc"][:, 2] = np.nan
    router = Site("blocks.1.router", "router", 1, "r", 3, experts=3)
    routed = NeuronScores(
        COLUMNS, rng.random(3), rng.random(3), 50, pearson=rng.uniform(-1, 1, (3, 3)), sites=(router,), pool="mean",
        reasons={"constant_neuron": (2,)},
    )  # fmt: skip
    reasons = {name: tuple(range(i, 12, 3)) for i, name in enumerate(OF_NEURONS)}
    reasons |= {"constant_metric": ("loss",), "metric_beyond_float32": ("label:0",), "hook_never_fired": ("head",)}
    reasons["stale_edges"] = (0, 3)
    given = {
        "mean": rng.random(12), "std": rng.random(12), "n_observations": 100, "n_ranked": 60,
        "n_routed": np.arange(12), "routed": routed, "sites": SITES, "pool": "mean", "fingerprint": "abc",
        "reasons": reasons, "between": rng.uniform(-1, 1, (3, 3)), "conditioned_on": ("loss",), **arrays, **changes,
    }  # fmt: skip
    return NeuronScores(COLUMNS, **given)


def same(found, want):
    assert found.arrays().keys() == want.arrays().keys()
    for name, array in want.arrays().items():
        np.testing.assert_array_equal(found.arrays()[name], array, err_msg=name)
    np.testing.assert_array_equal(found.between, want.between)
    for name in ("columns", "conditioned_on", "n_observations", "n_ranked", "sites", "pool", "fingerprint", "reasons"):
        assert getattr(found, name) == getattr(want, name), name


def test_all_that_scores_hold_is_saved(tmp_path):
    want = scores()
    assert len(want.arrays()) == 13
    want.save(tmp_path)
    with safe_open(tmp_path / "scores.safetensors", "numpy") as file:
        assert set(file.keys()) == {"between", *want.arrays(), *(f"routed.{name}" for name in want.routed.arrays())}
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    found = NeuronScores.load(tmp_path)
    same(found, want)
    same(found.routed, want.routed)
    save_file(kept, tmp_path / "scores.safetensors")  # the arrays alone
    with pytest.raises(DataError, match=r"expected schema 'skillfast\.scores/1', got None"):
        NeuronScores.load(tmp_path)
    few = NeuronScores(("y",), np.ones(2), np.ones(2), 7)
    few.save(tmp_path)
    found = NeuronScores.load(tmp_path)
    same(found, few)
    assert found.routed is None


def test_a_sites_scores_are_its_rows():
    whole = scores()
    own = whole["blocks.1.experts"]
    assert own.sites == SITES[1:2]
    assert own.routed is None
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(own.arrays()[name], array[4:10])
    for name in OF_NEURONS:
        assert own.reasons.get(name, ()) == tuple(i - 4 for i in whole.reasons[name] if 4 <= i < 10)
    assert "stale_edges" not in own.reasons
    assert own.reasons["constant_metric"] == ("loss",)
    with pytest.raises(ArgumentError, match=r"site: expected one of none \(no model\), got 'head'"):
        scores(sites=())["head"]
    for name in ("pearson", "spearman", "auroc", "mutual_info"):
        assert whole.statistic(name) is getattr(whole, name)
    with pytest.raises(ArgumentError, match="expected one of pearson, auroc, mutual_info, got 'spearman'"):
        scores(spearman=None).statistic("spearman")
    with pytest.raises(ArgumentError, match="got 'mean'"):
        whole.statistic("mean")


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("sites", [SITES, ()])
def test_every_row_of_the_table_is_one_value(routed, sites):
    pytest.importorskip("pandas")
    whole = scores(sites=sites, **({} if routed else {"n_routed": None}))
    frame = whole.to_dataframe()
    assert frame.index.tolist() == list(range(len(frame)))
    assert len(frame) == 12 * 3 * 10
    where = [(site, unit) for site in sites for unit in range(site.width)] or [(None, unit) for unit in range(12)]
    for (column, statistic), part in frame.groupby(["metric", "statistic"]):
        assert len(part) == 12
        for i, (row, (site, unit)) in enumerate(zip(part.to_dict("records"), where, strict=True)):
            value = whole.arrays()[statistic][i, COLUMNS.index(column)]
            np.testing.assert_equal(row["value"], value)
            n = i if routed else 100 if statistic.startswith("pearson") else 60
            assert row["n"] == n
            assert row["unit"] == unit
            if site is not None:
                assert (row["site"], row["kind"]) == (site.name, site.kind)
    best = whole.to_dataframe(metric="label", top=2)
    assert set(best["metric"]) == {"label:0", "label:1"}
    for (column, statistic), part in best.groupby(["metric", "statistic"]):
        values = np.abs(whole.arrays()[statistic][:, COLUMNS.index(column)])
        np.testing.assert_array_equal(part["value"].abs(), np.sort(values)[:-3:-1])


def test_layers_heads_and_experts_of_neurons():
    pytest.importorskip("pandas")
    frame = scores().to_dataframe(metric="loss")
    part = frame[frame["statistic"] == "pearson"]
    told = {name: part[name].astype(object).where(part[name].notna(), None).tolist() for name in part}
    assert told["layer"] == [0] * 4 + [1] * 6 + [None] * 2
    assert told["head"] == [0, 0, 1, 1] + [None] * 8
    assert told["expert"] == [None] * 4 + [0, 0, 1, 1, 2, 2] + [None] * 2
    assert told["unit"] == [*range(4), *range(6), 0, 1]
    own = scores().to_dataframe(site="head", metric="loss")
    assert set(own["site"]) == {"head"}
    assert len(own) == 2 * 10
