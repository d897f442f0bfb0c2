from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from skillfast import Binary, Categorical, Continuous, NeuronScores, NeuronStatistics, backends
from skillfast.errors import ArgumentError
from skillfast.models.sites import Site
from skillfast.statistics.state import MOST_COLUMNS

# Warnings of what has no score have tests of their own.
pytestmark = pytest.mark.filterwarnings("ignore:some scores are not defined")

METRICS = {"label": Categorical(["cat", "dog", "owl"]), "correct": Binary(), "loss": Continuous()}


def sample(n, width, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 3, (n,), generator=g)
    x = torch.randn(n, width, generator=g) + 0.7 * torch.nn.functional.one_hot(label, 3)[:, [0]]
    values = {
        "label": label,
        "correct": torch.rand(n, generator=g) < 0.8,
        "loss": torch.randn(n, generator=g).exp() + x[:, 0].abs(),
    }
    return x.to(dtype), values


def oracle(x, values):
    """scipy's Pearson r of the stored values, in float64."""
    y = [*((values["label"] == k).double() for k in range(3)), values["correct"].double(), values["loss"].double()]
    columns = [[stats.pearsonr(x[:, d].double().numpy(), c.numpy()).statistic for c in y] for d in range(x.shape[1])]
    return np.array(columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_pearson_equals_scipys(dtype):
    x, values = sample(3000, 20, dtype=dtype)
    acc = NeuronStatistics(20, METRICS)
    backends.calls.clear()
    for start in range(0, 3000, 70):
        rows = slice(start, start + 70)
        acc.update(x[rows], {name: v[rows] for name, v in values.items()})
    scores = acc.compute()
    assert set(backends.calls) == {("comoments_update", "native"), ("bins_update", "native")}
    assert scores.columns == ("label:cat", "label:dog", "label:owl", "correct", "loss")
    assert np.isfinite(scores.pearson).all()
    np.testing.assert_allclose(scores.pearson, oracle(x, values), atol=1e-6)
    np.testing.assert_allclose(scores.mean, x.double().mean(0), atol=1e-6)
    np.testing.assert_allclose(scores.std, x.double().std(0, correction=0), rtol=1e-5)
    assert scores.n_observations == 3000
    assert scores.reasons == {}


DISTRIBUTIONS = {
    "normal": lambda g, n: g.normal(size=(n, 4)),
    "relu": lambda g, n: np.maximum(0, g.normal(size=(n, 4))),
    "99.9 % zeros": lambda g, n: g.normal(size=(n, 4)) * (g.random((n, 4)) < 1e-3),
    "cauchy": lambda g, n: g.standard_cauchy(size=(n, 4)),
    "log-normal": lambda g, n: g.lognormal(size=(n, 4)),
    "drifting mean": lambda g, n: g.normal(size=(n, 4)) + np.linspace(0, 20, n)[:, None],
    "late scale": lambda g, n: g.normal(size=(n, 4)) * np.where(np.arange(n) > 0.9 * n, 100, 1)[:, None],
    "bimodal": lambda g, n: g.normal(size=(n, 4)) * 1e-2 + g.integers(0, 2, (n, 4)) * 5,
    "few integers": lambda g, n: g.integers(0, 3, (n, 4)).astype(float),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("ordered", [False, True])
def test_pearson_on_distributions_a_rare_label_and_a_heavy_tail(name, ordered):
    g = np.random.default_rng(0)
    n = 20_000
    x = DISTRIBUTIONS[name](g, n).astype(np.float32)
    rare = np.zeros(n, dtype=bool)
    rare[g.choice(n, 2, replace=False)] = True  # prevalence 1e-4
    loss = g.lognormal(sigma=3, size=n)
    if ordered:
        order = np.argsort(rare, kind="stable")
        x, rare, loss = x[order], rare[order], loss[order]
    acc = NeuronStatistics(4, {"rare": Binary(), "loss": Continuous()})
    for rows in np.array_split(np.arange(n), 37):
        acc.update(x[rows], {"rare": rare[rows], "loss": loss[rows]})
    got = acc.compute().pearson
    want = np.corrcoef(np.column_stack([x.astype(float), rare, loss]).T)[:4, 4:]
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_pearson_survives_an_offset():
    g = np.random.default_rng(0)
    x = (1e3 + 1e-2 * g.normal(size=(20_000, 8))).astype(np.float32)
    y = g.integers(0, 2, 20_000).astype(bool)
    x[y] += np.float32(3e-3)
    acc = NeuronStatistics(8, {"y": Binary()})
    for rows in np.array_split(np.arange(20_000), 100):
        acc.update(x[rows], {"y": y[rows]})
    want = np.corrcoef(np.column_stack([x.astype(float), y]).T)[:8, 8:]
    np.testing.assert_allclose(acc.compute().pearson, want, atol=2e-5)


def test_pearson_goes_on_past_two_to_the_24():
    """float32 counters stick there: the state is put past it, then rows that change the result follow."""
    x, values = sample(4096, 5)
    acc = NeuronStatistics(5, METRICS, ("pearson",))
    acc.update(x, values)
    for _ in range(13):  # doubles 4,096 rows to 33.5 million
        acc.merge(acc)
    assert acc.n_observations == 4096 * 2**13 > 2**24
    np.testing.assert_allclose(acc.compute().pearson, oracle(x, values), atol=1e-6)
    more, more_values = sample(1, 5, seed=1)
    acc.update(more + 1e4, more_values)
    weights = np.r_[np.full(4096, 2.0**13), 1]
    loss = np.r_[values["loss"], more_values["loss"]]
    want = np.cov(np.r_[x[:, 0], more[:, 0] + 1e4], loss, aweights=weights)
    np.testing.assert_allclose(acc.compute().pearson[0, 4], want[0, 1] / np.sqrt(want[0, 0] * want[1, 1]), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_cut_order_and_merge_tree_gives_the_same(data):
    n = data.draw(st.integers(20, 300))
    x, values = sample(n, 6, seed=data.draw(st.integers(0, 9)))
    first = NeuronStatistics(6, METRICS)
    first.calibrate(x[:20], {name: v[:20] for name, v in values.items()})
    whole = first.like()
    whole.update(x, values)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    shards = []
    for rows in torch.tensor_split(order, cuts):
        shard = first.like()
        for batch in rows.split(data.draw(st.integers(1, 50))):
            shard.update(x[batch], {name: v[batch] for name, v in values.items()})
        shards.append(shard)
    while len(shards) > 1:
        a = shards.pop(data.draw(st.integers(0, len(shards) - 1)))
        shards[data.draw(st.integers(0, len(shards) - 1))].merge(a)
    scores, want = shards[0].compute(), whole.compute()
    assert scores.n_observations == n
    np.testing.assert_allclose(scores.pearson, want.pearson, atol=1e-7)


def test_state_goes_on_elsewhere(tmp_path):
    x, values = sample(500, 6)
    head, tail = ({k: v[s] for k, v in values.items()} for s in (slice(0, 123), slice(123, None)))
    acc, whole = NeuronStatistics(6, METRICS), NeuronStatistics(6, METRICS)
    acc.update(x[:123], head)
    torch.save(acc.state_dict(), tmp_path / "state.pt")
    other = NeuronStatistics.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other.update(x[123:], tail)
    whole.update(x[:123], head)
    whole.update(x[123:], tail)
    np.testing.assert_allclose(other.compute().pearson, whole.compute().pearson, atol=1e-7)


def test_calibration_sets_the_shift_of_all_shards():
    x, values = sample(200, 6)
    acc = NeuronStatistics(6, METRICS)
    acc.calibrate(x[::4], {name: v[::4] for name, v in values.items()})
    assert acc.n_observations == 0
    shard = NeuronStatistics.from_state_dict(acc.like().state_dict())  # of which nothing is counted yet
    shard.update(x + 100, values)  # these rows would have another
    torch.testing.assert_close(shard.state.moments.shift_x, x[::4].mean(0))
    assert shard.n_observations == 200


@pytest.mark.parametrize("n", [60, 100])  # exact, and counted in bins
def test_bounds_of_a_label_of_one_row(n):
    """Nothing is a sample here, so that one row alone has the label makes no score less certain."""
    acc = NeuronStatistics(3, {"rare": Binary()}, ("spearman", "auroc"), bins=4)
    for rows, rare in zip(sample(n, 3)[0].split(10), (torch.arange(n) == 7).split(10), strict=True):
        acc.update(rows, {"rare": rare})
    scores = acc.compute()
    assert (scores.spearman_bound < 0.5).all()
    assert (scores.auroc_bound < 0.5).all()
    assert n > 64 or not scores.spearman_bound.any()


def test_state_of_another_kind_is_refused():
    state = NeuronStatistics(6, METRICS).state_dict()
    with pytest.raises(ArgumentError, match=r"expected schema 'skillfast.statistics/1', got 'x'"):
        NeuronStatistics.from_state_dict({**state, "schema": "x"})
    state["comoments"]["sum_x"] = torch.zeros(5, dtype=torch.float64)
    with pytest.raises(ArgumentError, match=r"sum_x: expected float64 \[6\], got float64 \[5\]"):
        NeuronStatistics.from_state_dict(state)


def test_what_has_no_score_is_named():
    x, values = sample(100, 4)
    x[:, 1] = 0.1  # no float32 sum of it is exact
    x[7, 2] = torch.nan
    values["correct"][:] = True
    acc = NeuronStatistics(4, METRICS)
    for rows in torch.arange(100).split(9):
        acc.update(x[rows], {name: v[rows] for name, v in values.items()})
    with pytest.warns(RuntimeWarning, match=r"constant_neuron \(1 neurons\); .*constant_metric \(correct\)") as told:
        scores = acc.compute()
    assert len(told) == 1
    assert scores.reasons == {
        "constant_neuron": (1,), "non_finite_activation": (2,), "constant_metric": ("correct",),
    }  # fmt: skip
    undefined = np.isnan(scores.pearson)
    assert undefined[1].all()
    assert undefined[2].all()
    assert undefined[:, 3].all()
    assert not undefined[[0, 3]][:, [0, 1, 2, 4]].any()


def test_a_merge_of_nothing_keeps_the_shift():
    x, values = sample(300, 4)
    x, first, second = x + 1000, slice(0, 200), slice(200, 300)
    acc = NeuronStatistics(4, METRICS, ("pearson",))
    acc.update(x[first], {name: v[first] for name, v in values.items()})
    acc.merge(acc.like())
    acc.update(x[second], {name: v[second] for name, v in values.items()})
    np.testing.assert_allclose(acc.compute().pearson, oracle(x, values), atol=1e-5)


def test_as_many_columns_as_a_channel_can_tell():
    NeuronStatistics(1, {"label": Categorical(MOST_COLUMNS)}, bins=2)
    with pytest.raises(ArgumentError, match=f"expected at most {MOST_COLUMNS} columns"):
        NeuronStatistics(1, {"label": Categorical(MOST_COLUMNS + 1)}, bins=2)


def test_reasons_of_a_site_count_from_its_first_neuron():
    sites = (Site("blocks.0.mlp", "mlp", 0, "a", 8), Site("blocks.1.attn", "attn", 1, "b", 4, 2))
    reasons = {"constant_neuron": (1, 9, 11), "stale_edges": (3,), "constant_metric": ("y",)}
    scores = NeuronScores(("y",), np.zeros(12), np.ones(12), 5, pearson=np.zeros((12, 1)), sites=sites, reasons=reasons)
    assert scores["blocks.1.attn"].reasons == {"constant_neuron": (1, 3), "constant_metric": ("y",)}
    assert scores["blocks.0.mlp"].reasons == {"constant_neuron": (1,), "stale_edges": (3,), "constant_metric": ("y",)}


def test_a_constant_stays_one_through_a_merge():
    metrics = {"y": Continuous()}
    a, b = NeuronStatistics(2, metrics), NeuronStatistics(2, metrics)
    for acc, n in ((a, 70), (b, 33)):
        acc.update(torch.stack([torch.full((n,), 1234.567), torch.arange(n) * 0.1], 1), {"y": torch.arange(n)})
    a.merge(b)
    assert a.compute().reasons == {"constant_neuron": (0,)}


@pytest.mark.parametrize(
    ("width", "changed", "words"),
    [
        (5, {}, r"expected \[n, 4\]"),
        (4, {"other": [0, 1]}, "expected values for"),
        (4, {"label": [0, 3]}, r"'label': expected class indices in \[0, 3\), got 0 to 3"),
        (4, {"correct": [0.0, 0.5]}, "'correct': expected 0 and 1"),
        (4, {"loss": [0.0, float("nan")]}, "'loss': expected finite"),
        (4, {"loss": [0.0]}, r"'loss': expected 2 values, got shape \[1\]"),
    ],
)
def test_update_refuses(width, changed, words):
    values = {"label": [0, 1], "correct": [True, False], "loss": [0.1, 0.2], **changed}
    acc = NeuronStatistics(4, METRICS)
    with pytest.raises(ArgumentError, match=words):
        acc.update(torch.ones(2, width), values)
    assert acc.n_observations == 0


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ArgumentError, match="at least one neuron"):
        NeuronStatistics(0, METRICS)
    with pytest.raises(ArgumentError, match="expected some of pearson, spearman, auroc, mutual_info"):
        NeuronStatistics(3, METRICS, ("kendall",))
    with pytest.raises(ArgumentError, match="at least one observation"):
        NeuronStatistics(3, METRICS).compute()
    with pytest.raises(ArgumentError, match="calibrate: expected at least one row, got none"):
        NeuronStatistics(3, {"y": Continuous()}).calibrate(torch.empty(0, 3), {"y": []})
    NeuronStatistics(3, {"y": Continuous()}).calibrate(torch.ones(1, 3), {"y": [0.5]})
    with pytest.raises(ArgumentError, match="at least two different names"):
        Categorical(["a", "a"])
    with pytest.raises(ArgumentError, match="merge: expected neurons 3, got 4; count both"):
        NeuronStatistics(3, METRICS).merge(NeuronStatistics(4, METRICS))
    with pytest.raises(
        ArgumentError, match=r"merge: expected metrics \('y', Continuous\(\)\), got \('y', Binary\(\)\)"
    ):
        NeuronStatistics(3, {"y": Continuous()}).merge(NeuronStatistics(3, {"y": Binary()}))


def test_updates_in_and_out_of_inference_mode_mix():
    x, values = sample(40, 3)
    acc = NeuronStatistics(3, METRICS, buffer_rows=8)
    for start in range(0, 40, 5):
        rows = slice(start, start + 5)
        with torch.inference_mode(start % 10 == 0):
            acc.update(x[rows] * 1, {name: v[rows] for name, v in values.items()})
    np.testing.assert_allclose(acc.compute().pearson, oracle(x, values), atol=1e-6)


def test_a_memory_map_is_read(tmp_path):
    x, values = sample(100, 4)
    np.save(tmp_path / "x.npy", x.numpy())
    acc = NeuronStatistics(4, METRICS)
    acc.update(np.load(tmp_path / "x.npy", mmap_mode="r"), values)
    np.testing.assert_allclose(acc.compute().pearson, oracle(x, values), atol=1e-6)


def test_r_of_columns_in_a_line_stays_within_its_range():
    """Of a thousand factors many give 1 + 1e-16 before rounding is cut off."""
    y = torch.randn(37, generator=torch.Generator().manual_seed(0))
    factors = torch.linspace(-3, 3, 1000)
    acc = NeuronStatistics(1000, {"y": Continuous()}, ("pearson",))
    acc.update(y[:, None] * factors, {"y": y})
    found = acc.compute().pearson[:, 0]
    assert (found.min(), found.max()) == (-1, 1)
    np.testing.assert_allclose(found, np.sign(factors.numpy()), atol=1e-6)


def test_rows_that_are_no_longer_kept_leave_no_trace():
    x, values = sample(60, 3)
    keep = torch.arange(60) % 3 != 1
    acc, want = (NeuronStatistics(3, METRICS, buffer_rows=16) for _ in range(2))
    acc.update(x[:45], {name: v[:45] for name, v in values.items()})
    acc.compute()
    acc.keep_rows(keep[:45])
    acc.update(x[45:], {name: v[45:] for name, v in values.items()})
    keep[45:] = True
    want.update(x[keep], {name: v[keep] for name, v in values.items()})
    found, plain = acc.compute(), want.compute()
    assert found.n_observations == int(keep.sum())
    for name, array in plain.arrays().items():
        np.testing.assert_allclose(found.arrays()[name], array, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("bins", [4, 32])  # into a table after 64 rows, or kept
@pytest.mark.parametrize("reserved", [False, True])
def test_batches_of_any_size_and_dtype_mix(bins, reserved):
    x, values = sample(300, 3)
    acc = NeuronStatistics(3, METRICS, bins=bins, buffer_rows=16)
    dtypes = (torch.bfloat16, torch.float32, torch.float64, torch.float16)
    start, stored = 0, []
    for i, n in enumerate((1, 7, 16, 17, 40, 3, 16, 2, 33, 64, 1, 100)):
        rows = x[start : start + n].to(dtypes[i % 4])
        part = {name: v[start : start + n] for name, v in values.items()}
        if reserved:
            acc.reserve(n, rows.dtype).copy_(rows)
            acc.commit(acc.check(part, n))
        else:
            acc.update(rows, part)
        stored.append(rows.double())
        start += n
        assert acc.n_observations == start
        assert acc.state.buffer.filled < 16 or acc.state.keeping
    stored = torch.cat(stored)
    scores = acc.compute()
    np.testing.assert_allclose(scores.mean, stored.mean(0), rtol=1e-6)
    np.testing.assert_allclose(scores.pearson, oracle(stored, values), atol=1e-6)
    want = np.array([[stats.spearmanr(column, values["loss"]).statistic] for column in stored.T])
    off = np.abs(scores.spearman[:, -1:] - want)
    assert (off <= (scores.spearman_bound[:, -1:] if bins == 4 else 1e-6)).all()


def test_rows_of_float64_are_summed_as_they_are():
    """Also where rows of float32 wait before them, which would round them away."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 3, generator=g, dtype=torch.float64)
    x, y = 1e4 + 2e-3 * noise, noise.sum(1)
    acc = NeuronStatistics(3, {"y": Continuous()}, ("pearson",), buffer_rows=100)
    acc.update(torch.full((4, 3), 1e4), {"y": torch.zeros(4)})
    acc.update(x, {"y": y})
    rows = np.vstack([np.full((4, 3), 1e4), x])
    want = np.corrcoef(rows.T, np.concatenate([np.zeros(4), y]))[:3, 3:]
    np.testing.assert_allclose(acc.compute().pearson, want, atol=1e-4)
