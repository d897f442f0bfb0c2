"""The bin table's edges and the scores from it: against scipy, its bounds, and its merges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

import skillfast
from skillfast import ops
from skillfast.metrics import Binary, Categorical, Continuous
from skillfast.statistics.bins import edges, estimates, scores
from skillfast.statistics.bins import overflow as spilling
from skillfast.statistics.bins.edges import (
    _runs,
    _threshold,
    _with_tails,
    atomic_bins,
    build_edges,
    calibration_rows,
    next_value,
)
from skillfast.statistics.bins.layout import BinLayout, hat_positions, hat_weights
from skillfast.statistics.bins.scores import column_ranks, exact, finalise, fit_continuous, sorted_ranks
from skillfast.statistics.bins.table import BinTable

BINS = 128
N = 20_000
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


# Edges


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_next_value(dtype):
    values = torch.tensor([-torch.inf, -2.0, -1.0, -0.0, 0.0, 1.0, 3.0, 60000.0]).to(dtype)
    above = next_value(values.float(), dtype)
    if dtype == torch.float16:
        expected = torch.from_numpy(np.nextafter(values.numpy(), np.float16(np.inf)))
    else:
        expected = torch.nextafter(values, torch.tensor(torch.inf, dtype=dtype))
    assert torch.equal(above, expected.float())
    assert next_value(torch.tensor([torch.inf]), dtype) == torch.inf


def test_edges_divide_evenly():
    rows = torch.randn(1024, 50, generator=torch.Generator().manual_seed(0))
    edges = build_edges(rows, BINS)
    assert edges.shape == (50, BINS - 1)
    assert edges.isfinite().all()
    assert (edges.diff(dim=1) > 0).all()
    place = torch.searchsorted(edges, rows.T.contiguous(), right=True)
    held = torch.zeros(50, BINS).scatter_add_(1, place, torch.ones(50, 1024))
    assert held.max() <= 10
    assert not atomic_bins(edges, torch.float32).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_values_get_atomic_bins(dtype):
    g = torch.Generator().manual_seed(1)
    sparse = torch.where(torch.rand(1024, generator=g) < 0.9, 0.0, torch.randn(1024, generator=g))
    few = torch.randint(-2, 5, (1024,), generator=g).float()
    rows = torch.stack([sparse, few, torch.full((1024,), 3.0)], 1).to(dtype)
    edges = build_edges(rows, BINS)
    atomic = atomic_bins(edges, dtype)
    for neuron, values in ((0, [0.0, -0.0]), (1, range(-2, 5)), (2, [3.0])):
        for value in values:
            place = torch.searchsorted(edges[neuron], torch.tensor([float(value)]), right=True)
            assert atomic[neuron, place], (neuron, value)
    assert not atomic[:, 0].any()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_placeis_atomic_exactly_if_one_value_of_the_dtype_fits(dtype):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()].unique()
    g = torch.Generator().manual_seed(0)
    at = torch.randint(0, len(every) - 4, (200,), generator=g)
    edges = torch.cat([every[at], every[at + 1], every[at + 3], torch.randn(100, generator=g)]).unique()
    inside = torch.bincount(torch.searchsorted(edges, every, right=True), minlength=len(edges) + 1)
    assert torch.equal(atomic_bins(edges[None], dtype)[0, 1:-1], inside[1:-1] <= 1)


def test_edges_of_values_that_are_not_finite():
    rows = torch.randn(512, 3, generator=torch.Generator().manual_seed(0))
    spoilt = rows.clone()
    for first, value in ((0, torch.nan), (3, torch.inf), (5, -torch.inf)):
        spoilt[first::7, 0] = value
    spoilt[:, 1] = torch.nan
    edges = build_edges(spoilt, 64)
    assert torch.equal(edges[:1], build_edges(spoilt[spoilt[:, 0].isfinite(), :1], 64))
    assert (edges[1] == torch.inf).all()
    assert torch.equal(edges[2:], build_edges(rows[:, 2:], 64))


@pytest.mark.parametrize("n", [1, 2, 7, 200])
@pytest.mark.parametrize("n_bins", [2, 5, 8, 256])
def test_edges_from_few_rows(n, n_bins):
    edges = build_edges(torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), n_bins)
    assert edges.shape == (4, n_bins - 1)
    assert not edges.isnan().any()
    assert (edges[:, 1:] >= edges[:, :-1]).all()


def test_values_that_do_not_repeat_keep_bins_where_many_others_do():
    """At most three eighths of the edges inside go to values that repeat, here 14 of them."""
    g = torch.Generator().manual_seed(0)
    others = torch.randn(92, generator=g) + 20
    rows = torch.cat([torch.arange(14.0).repeat(30), others])[torch.randperm(512, generator=g)]
    (edges,) = build_edges(rows[:, None], 32)
    held = torch.bincount(torch.searchsorted(edges, others, right=True))
    assert held.max() <= 25


# Scores


def metrics():
    return {
        "label": Categorical(10),
        "correct": Binary(),
        "rare": Binary(),
        "loss": Continuous(),
        "confidence": Continuous(),
    }


def planted(seed=0):
    """Neurons of every kind, and metrics that go with some of them."""
    g = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(N, generator=g)

    def uniform():
        return torch.rand(N, generator=g)

    label = torch.randint(0, 10, (N,), generator=g)
    signal = (label - 4.5) / 3
    loss = (normal() * 2 + signal).exp()  # heavy tail
    neurons = {
        "normal": normal() + 0.3 * signal,
        "independent": normal(),
        "gelu": torch.nn.functional.gelu(normal() + 0.3 * signal),
        "90% zeros": torch.where(uniform() < 0.9 - 0.05 * signal, 0.0, (normal() + signal).exp()),
        "99.9% zeros": torch.where(uniform() < 0.999, 0.0, normal().abs()),
        "cauchy": (normal() / normal() + signal).clamp(-6e4, 6e4),
        "log-normal": (2 * normal() + signal).exp(),
        "follows loss": loss.log() + 0.3 * normal(),
        "is loss": -loss.log(),
        "classes apart": normal() + 5 * signal,
        "drifting": normal() + torch.linspace(0, 20, N),
        "scale changes": normal() * torch.where(torch.arange(N) < N // 2, 1.0, 100.0),
        "offset": 1000 + 0.01 * (normal() + signal),
        "bimodal": torch.where(uniform() < 0.5, -1.0, 1.0) + 1e-4 * normal() + 1e-5 * signal,
        "few integers": torch.poisson(2 + 0.3 * signal, generator=g),
        "many integers": torch.round(30 * (normal() + signal)),
    }
    values = {
        "label": label,
        "correct": uniform() < torch.sigmoid(1 + signal),
        "rare": uniform() < 1e-3,
        "loss": loss,
        "confidence": torch.round(torch.sigmoid(normal() + signal) * 50) / 50,  # ties
    }
    return list(neurons), torch.stack(list(neurons.values()), 1), values


def table_scores(x, values, order, calibration, of=None, n_bins=BINS, buffer=512):
    """Streams rows in this order over edges from these calibration rows."""
    layout = BinLayout.of(of or metrics(), n_bins)
    edges = build_edges(x[calibration], n_bins)
    references = {name: values[name][calibration].double().sort().values for name in layout.hats}
    table = layout.zeros(x.shape[1])
    for rows in order.split(buffer):
        payload = layout.payload({name: value[rows] for name, value in values.items()}, references)
        ops.bins_update(x[rows], edges, *payload, table)
    fits = fit_continuous(layout, values, references)
    return finalise(layout, table, edges, x.dtype, fits), table


def oracle(x, values):
    """Spearman's rho and AUROC from ranks of all the stored values."""
    columns = torch.cat(
        [metric.expand(metric.check(name, values[name])) for name, metric in metrics().items()], 1
    ).numpy()
    rank_x, rank_y = rankdata(x.double().numpy(), axis=0), rankdata(columns, axis=0)
    with np.errstate(invalid="ignore"):
        rho = np.corrcoef(rank_x.T, rank_y.T)[: x.shape[1], x.shape[1] :]
    labels = columns[:, :12]
    positives = labels.sum(0)
    area = (rank_x.T @ labels - positives * (positives + 1) / 2) / (positives * (len(columns) - positives))
    return rho, area, positives


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_against_scipy(dtype, seed):
    names, x, values = planted(seed)
    x = x.to(dtype)
    calibration = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[: calibration_rows(BINS)]
    scores, _ = table_scores(x, values, torch.arange(N), calibration)
    rho, area, positives = oracle(x, values)
    constant = (x == x[0]).all(0)  # "offset" has few values in 16 bits
    assert not constant.any() or dtype != torch.float32
    assert scores.spearman[constant].isnan().all()
    kept = ~constant
    assert scores.spearman[kept].isfinite().all()
    assert scores.spearman_bound[kept].isfinite().all()
    assert scores.auroc[kept][:, :12].isfinite().all()
    assert scores.auroc_bound[kept][:, :12].isfinite().all()
    assert scores.auroc[:, 12:].isnan().all()
    kept = kept.numpy()
    wrong = np.abs(scores.spearman.numpy() - rho)[kept]
    assert wrong.max() <= 5e-4, (np.array(names)[kept][wrong.max(1).argmax()], wrong.max())
    bound = scores.spearman_bound.numpy()[kept]
    assert (wrong <= bound).all()
    assert np.median(bound[:, :12]) <= 0.012
    assert np.median(bound[:, 12:]) <= 0.04
    wrong = np.abs(scores.auroc.numpy()[:, :12] - area)[kept]
    assert wrong[:, positives >= 1000].max() <= 5e-4
    assert (wrong <= scores.auroc_bound.numpy()[kept][:, :12]).all()
    assert not scores.stale.any()


def test_one_pair_against_scipy_itself():
    _, x, values = planted()
    calibration = torch.randperm(N, generator=torch.Generator().manual_seed(0))[: calibration_rows(BINS)]
    scores, _ = table_scores(x, values, torch.arange(N), calibration)
    rho = spearmanr(x[:, 7].numpy(), values["loss"].numpy()).statistic
    assert abs(float(scores.spearman[7, 12]) - rho) <= 5e-4


@pytest.mark.parametrize("n_bins", [16, 64, 256])
@pytest.mark.parametrize(
    "kind", ["sorted by class", "sorted by value", "short prefix of one class", "constant at first"]
)
def test_the_bounds_hold_with_stale_edges(kind, n_bins):
    names, x, values = planted()
    order = torch.arange(N)
    if kind == "sorted by value":
        order = x[:, 0].argsort()
    elif kind != "constant at first":
        order = values["label"].argsort(stable=True)
    x, values = x[order], {name: value[order] for name, value in values.items()}
    n0 = calibration_rows(n_bins) // (8 if kind.startswith("short") else 1)
    if kind == "constant at first":
        x[:n0] = 1.0
    scores, _ = table_scores(x, values, torch.arange(N), torch.arange(n0), n_bins=n_bins)
    rho, area, _ = oracle(x, values)
    assert scores.spearman.isfinite().all()
    assert scores.auroc[:, :12].isfinite().all()
    assert (np.abs(scores.spearman.numpy() - rho) <= scores.spearman_bound.numpy()).all()
    assert (np.abs(scores.auroc.numpy()[:, :12] - area) <= scores.auroc_bound.numpy()[:, :12]).all()
    if kind == "sorted by class":
        assert scores.stale[names.index("classes apart")]
    if kind == "constant at first":
        assert scores.stale[names.index("independent")]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_bounds_hold_for_any_rows_and_any_edges(data):
    n = data.draw(st.integers(3, 120))
    n_bins = data.draw(st.integers(2, 12))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    steps = data.draw(st.sampled_from([1, 3, 1000]))  # from many ties to none
    tied = data.draw(st.sampled_from([1, 4, 1000]))
    x = torch.round(torch.randn(n, 4, generator=g) * steps) / steps
    loss = torch.round(torch.randn(n, generator=g) * tied) / tied
    x[:, 1] = loss  # the metric itself,
    x[:, 2] = loss.sort().values  # and one that is sorted within the bins
    values = {
        "label": (loss > loss.median()).long() if data.draw(st.booleans()) else torch.randint(0, 3, (n,), generator=g),
        "loss": loss,
    }
    of = {"label": Categorical(3), "loss": Continuous()}
    calibration = torch.arange(data.draw(st.integers(1, n)))
    scores, _ = table_scores(x, values, torch.arange(n), calibration, of, n_bins)
    for neuron in range(4):
        for k in range(3):
            one = (values["label"] == k).double().numpy()
            if 0 < one.sum() < n and x[:, neuron].unique().numel() > 1:
                rho = spearmanr(x[:, neuron].numpy(), one).statistic
                assert abs(float(scores.spearman[neuron, k]) - rho) <= float(scores.spearman_bound[neuron, k])
                rank = rankdata(x[:, neuron].numpy())
                area = (rank @ one - one.sum() * (one.sum() + 1) / 2) / (one.sum() * (n - one.sum()))
                assert abs(float(scores.auroc[neuron, k]) - area) <= float(scores.auroc_bound[neuron, k])
        if x[:, neuron].unique().numel() > 1 and loss.unique().numel() > 1:
            rho = spearmanr(x[:, neuron].numpy(), loss.numpy()).statistic
            assert abs(float(scores.spearman[neuron, 3]) - rho) <= float(scores.spearman_bound[neuron, 3])


def test_constant_neuron_and_constant_metric():
    g = torch.Generator().manual_seed(0)
    x = torch.stack([torch.full((3000,), 2.5), torch.randn(3000, generator=g)], 1)
    of = {"one": Binary(), "label": Categorical(3), "same": Continuous(), "loss": Continuous()}
    values = {
        "one": torch.ones(3000, dtype=torch.bool),
        "label": torch.randint(0, 2, (3000,), generator=g),
        "same": torch.zeros(3000),
        "loss": torch.randn(3000, generator=g),
    }
    scores, _ = table_scores(x, values, torch.arange(3000), torch.arange(1024), of)
    assert scores.spearman[0].isnan().all()
    assert scores.auroc[0].isnan().all()
    assert (scores.mutual_info[0] == 0).all()
    assert scores.spearman[1].isnan().tolist() == [True, False, False, True, True, False]
    assert scores.auroc[1].isnan().tolist() == [True, False, False, True, True, True]
    assert scores.mutual_info.isfinite().all()
    assert scores.mutual_info[1][[0, 3, 4]].tolist() == [0, 0, 0]


def plain_mutual_information(joint):
    """Miller and Madow's estimate from one table, written out."""
    n = joint.sum()
    p = joint / n
    px, py = p.sum(1), p.sum(0)
    total = 0.0
    for c in range(p.shape[0]):
        for k in range(p.shape[1]):
            if p[c, k] > 0:
                total += p[c, k] * np.log(p[c, k] / (px[c] * py[k]))
    total -= ((p > 0).sum() - (px > 0).sum() - (py > 0).sum() + 1) / (2 * n)
    entropy = -(py[py > 0] * np.log(py[py > 0])).sum()
    return min(max(total, 0.0), entropy)


@pytest.mark.parametrize(("n", "classes"), [(20_000, 2), (20_000, 100), (3000, 10), (50, 7)])
def test_mutual_information_is_the_plain_one_on_the_merged_table(n, classes):
    g = np.random.default_rng(0)
    joint = torch.from_numpy(g.multinomial(n, g.dirichlet(np.full(BINS * classes, 0.3)), size=6)).double()
    joint = joint.view(6, BINS, classes)
    merged = estimates.merge_bins(joint)
    assert torch.equal(merged.sum(1), joint.sum(1))
    assert (merged.sum(2).gt(0).sum(1) * 10 * classes <= max(n, 10 * classes)).all()
    found = estimates.mutual_information(joint)
    assert found.isfinite().all()
    expected = [plain_mutual_information(table.numpy()) for table in merged]
    assert np.allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("n", [400, 3000, 20_000])
def test_labels_share_the_mutual_information_of_two_levels(n):
    g = np.random.default_rng(0)
    prevalence = np.array([0.5, 0.2, 0.25, 0.049, 0.001, 0.0])
    weight = np.concatenate([[0.5], np.full(BINS - 1, 0.5 / (BINS - 1))])[:, None] * prevalence  # half in one bin
    joint = torch.from_numpy(g.multinomial(n, weight.ravel() / weight.sum(), size=4)).double().view(4, BINS, 6)
    joint[:] = joint[:1]  # as in a table, every neuron sees the same labels
    joint[1] = joint[1][torch.randperm(BINS)]
    occupancy = joint.sum(2)
    found = estimates.label_information(joint, occupancy)
    for k in range(6):
        one = torch.stack([joint[:, :, k], occupancy - joint[:, :, k]], 2)
        assert np.allclose(found[:, k].numpy(), estimates.mutual_information(one).numpy(), atol=1e-12)


def test_a_label_of_one_row_or_of_all_but_one_shares_it():
    occupancy = torch.full((1, BINS), 4.0, dtype=torch.float64)
    one = torch.zeros(1, BINS, dtype=torch.float64)
    one[0, 3] = 1
    found = estimates.label_information(torch.stack([one, occupancy - one], 2), occupancy)[0]
    want = estimates.mutual_information(torch.stack([one, occupancy - one], 2))[0]
    assert want > 0
    assert np.allclose(found.numpy(), float(want), rtol=1e-9, atol=0)


def test_mutual_information_of_independent_data():
    g = torch.Generator().manual_seed(5)
    x = torch.cat([torch.randn(N, 100, generator=g), torch.randn(N, 100, generator=g).relu()], 1)
    values = {
        "label": torch.randint(0, 10, (N,), generator=g),
        "correct": torch.rand(N, generator=g) < 0.5,
        "rare": torch.rand(N, generator=g) < 1e-3,
        "loss": torch.randn(N, generator=g),
        "confidence": torch.randint(0, 50, (N,), generator=g) / 50,
    }
    scores, table = table_scores(x, values, torch.arange(N), torch.arange(calibration_rows(BINS)))
    assert scores.mutual_info.isfinite().all()
    assert scores.mutual_info.mean(0).max() < 1e-3
    counts, _ = BinLayout.of(metrics(), BINS).split(table.double())
    assert estimates.mutual_information(counts[:, :, :10]).mean() < 1e-3


def test_mutual_information_with_soft_levels_has_a_ceiling():
    """A neuron that is the metric itself gets 1.5 nats, whatever the number of rows; one that is the label log 2."""
    for n in (5000, 40_000):
        y = torch.randn(n, generator=torch.Generator().manual_seed(0))
        found = skillfast.correlate(y[:, None], {"loss": y, "label": y > 0}, statistics=("mutual_info",)).mutual_info[0]
        assert 1.4 < found[0] < 1.6
        assert abs(found[1] - np.log(2)) < 0.02


def test_few_rows_are_exact():
    _, x, values = planted()
    x, values = x[:900], {name: value[:900] for name, value in values.items()}
    values["rare"][:3] = True
    scores = exact(BinLayout.of(metrics(), 64), x, values)
    rho, area, _ = oracle(x, values)
    varied = ~np.isnan(rho)
    assert varied.sum() > 150
    assert np.allclose(scores.spearman.numpy()[varied], rho[varied], atol=1e-12)
    assert np.allclose(scores.auroc.numpy()[:, :12][varied[:, :12]], area[varied[:, :12]], atol=1e-12)
    assert scores.spearman.isnan().numpy().tolist() == (~varied).tolist()
    assert (scores.spearman_bound.nan_to_num(0) == 0).all()
    assert scores.mutual_info.isfinite().all()


def test_two_rows_have_one_pair():
    scores = exact(
        BinLayout.of({"a": Binary()}, 4), torch.tensor([[0.0, 5.0], [1.0, 4.0]]), {"a": torch.tensor([0, 1])}
    )
    assert scores.auroc.tolist() == [[1], [0]]
    assert scores.spearman[:, 0].tolist() == pytest.approx([1, -1])


# Integers: the same however the rows are cut


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_order_batches_and_shards_change_nothing(data):
    seed = data.draw(st.integers(0, 1000))
    n = data.draw(st.integers(2, 400))
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=g).relu()
    values = {
        "label": torch.randint(0, 4, (n,), generator=g),
        "correct": torch.rand(n, generator=g) < 0.5,
        "loss": torch.randn(n, generator=g),
    }
    layout = BinLayout.of({"label": Categorical(4), "correct": Binary(), "loss": Continuous()}, 32)
    edges = build_edges(x, 32)
    references = {"loss": values["loss"].double().sort().values}

    def count(rows):
        table = layout.zeros(5)
        payload = layout.payload({name: value[rows] for name, value in values.items()}, references)
        ops.bins_update(x[rows], edges, *payload, table)
        return table

    whole = count(torch.arange(n))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 1000))))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=6)))
    shards = [count(rows) for rows in order.tensor_split(cuts)]
    while len(shards) > 1:  # a merge tree of any shape
        at = data.draw(st.integers(0, len(shards) - 2))
        spilling.merge(shards[at], spilling.Overflow.empty(CPU), shards.pop(at + 1), spilling.Overflow.empty(CPU))
    assert torch.equal(shards[0], whole)


def test_positions_and_weights():
    reference = torch.arange(100).double()
    positions = hat_positions(torch.tensor([-5.0, 0.0, 49.5, 99.0, 1e9]).double(), reference)
    assert positions.tolist() == [0, 9, 896, 1783, 1792]
    weights = hat_weights(torch.arange(7 * 256 + 1))
    assert (weights.sum(1) == 256).all()
    assert ((weights > 0).sum(1) <= 2).all()
    assert int(weights.min()) == 0


def test_nothing_overflows():
    layout = BinLayout.of({"label": Categorical(2), "loss": Continuous()}, 4)
    edges = torch.tensor([[0.0, 1.0, 2.0]])
    channels, weights = torch.zeros(1, 1, dtype=torch.int16), torch.tensor([[256] + [0] * 7], dtype=torch.int16)
    one, overflow = layout.zeros(1), spilling.Overflow.empty(CPU)
    ops.bins_update(torch.full((1, 1), 1.5), edges, channels, weights, one)
    table = torch.zeros_like(one)
    for _ in range(5):  # 2^22 rows at once
        table += one * spilling.SPILL_ROWS
        assert (table >= 0).all()
        overflow = spilling.spill(table, overflow)
        assert (table < 1 << 30).all()
    other = one * spilling.SPILL_ROWS
    overflow = spilling.merge(table, overflow, other, spilling.spill(other, spilling.Overflow.empty(CPU)))
    total = spilling.widened(table, overflow, slice(0, 1))
    assert torch.equal(total, one.double() * 6 * spilling.SPILL_ROWS)
    assert float(layout.occupancy(*layout.split(total)).sum()) == 6 * spilling.SPILL_ROWS


def test_a_table_spills_before_so_many_rows_came(monkeypatch):
    monkeypatch.setattr(spilling, "SPILL_ROWS", 100)
    x, values = torch.randn(100, 3), {"a": torch.arange(100) % 2}
    table, spilled = BinTable.calibrated({"a": Binary()}, 4, x, values), []
    for n in (60, 40, 1, 99, 1, 100):
        monkeypatch.setattr(table, "spill", lambda n=n: spilled.append(n))
        table.add(x[:n], {"a": values["a"][:n]})
    assert spilled == [1, 1, 100]


@pytest.mark.parametrize(
    "of",
    [
        {"a": Binary(), "b": Binary()},
        {"loss": Continuous()},
        {"b": Binary(), "loss": Continuous()},
        {"label": Categorical(100), "b": Binary()},
    ],
    ids=lambda of: ",".join(of),
)
def test_every_layout_counts_its_rows(of):
    g = torch.Generator().manual_seed(0)
    draw = {
        Categorical: lambda: torch.randint(0, 100, (300,), generator=g),
        Binary: lambda: torch.rand(300, generator=g) < 0.5,
        Continuous: lambda: torch.rand(300, generator=g),
    }
    values = {name: draw[type(metric)]() for name, metric in of.items()}
    scores, table = table_scores(
        torch.randn(300, 3, generator=g), values, torch.arange(300), torch.arange(300), of, n_bins=32
    )
    assert scores.spearman.isfinite().any()
    layout = BinLayout.of(of, 32)
    assert layout.counts == {"a,b": 3, "loss": 0, "b,loss": 1, "label,b": 101}[",".join(of)]  # the rows are told once
    counts, hats = layout.split(table.double())
    assert layout.occupancy(counts, hats).sum(1).tolist() == [300] * 3
    for name, metric in of.items():
        if isinstance(metric, Binary):
            assert (counts[:, :, layout.first[name]].sum(1) == float(values[name].sum())).all()


def test_tails_lie_beyond_either_end_each_four_times_as_far():
    values = torch.arange(11.0)[None]
    inside = torch.tensor([[3.0, 7.0]])
    found = _with_tails(inside, values, torch.tensor([11]), 3)
    assert found.tolist() == [[-10, -2.5, -0.625, 3, 7, 10.625, 12.5, 20]]
    inside = torch.tensor([[3.0, torch.inf]])  # fewer edges are needed
    found = _with_tails(inside, values, torch.tensor([11]), 2)
    assert found.tolist() == [[-2.5, -0.625, 3, 10.625, 12.5, torch.inf]]


def test_one_bin_of_sixteen_lies_beyond_the_rows():
    """Half of them at either end; at least one there, from 8 bins on."""
    rows = torch.randn(2048, 1, generator=torch.Generator().manual_seed(0))
    for n_bins, tails in ((7, 0), (8, 1), (32, 1), (63, 1), (64, 2), (95, 2), (96, 3), (256, 8)):
        edges = build_edges(rows, n_bins)
        assert ((edges < rows.min()).sum(), (edges > rows.max()).sum()) == (tails, tails), n_bins


@pytest.mark.parametrize("n", [1, 2, 65, 300])
@pytest.mark.parametrize("levels", [1, 3, 10**6])
def test_ranks_by_one_sort_are_those_of_scipy(n, levels):
    """The ranks of a GPU's rows, which are not copied to the host to be ranked."""
    rows = torch.randint(-levels, levels, (n, 17), generator=torch.Generator().manual_seed(n)).double() / 7
    torch.testing.assert_close(sorted_ranks(rows), column_ranks(rows), rtol=0, atol=0)


def test_a_run_that_just_reaches_the_largest_rows_is_found():
    """Every other of 101 rows is looked at, so that of four equal ones at the end the last pair alone tells."""
    values = torch.arange(101.0)[None].repeat(2, 1)
    values[0, 97:] = 100.0
    found = _runs(values, torch.tensor([101, 101]), bins=40, most=3)
    assert _threshold(torch.tensor([101]), 40).tolist() == [4]
    assert (found.value[0, 0], found.start[0, 0], found.length[0, 0]) == (100, 97, 4)
    assert not found.length[1].any()


def test_bounds_of_a_sample_stay_within_what_a_score_can_be():
    """A label that one sampled row has says nothing of all rows: AUROC is off by 1 at most, rho by 1 and itself."""
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    values = {"rare": torch.arange(300) == 7}
    layout = BinLayout.of({"rare": Binary()}, 16)
    table = BinTable.calibrated({"rare": Binary()}, 16, x, values)
    table.add(x, values)
    for found in (exact(layout, x, values, 0.1), table.scores(0.1)):
        assert (found.auroc_bound == 1).all()
        torch.testing.assert_close(found.spearman_bound, 1 + found.spearman.abs())


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("step", [1, 3000])
def test_slices_of_neurons_change_nothing(monkeypatch, rate, step):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=g).relu() * torch.arange(1, 6)
    values = {"label": torch.randint(0, 3, (300,), generator=g), "loss": torch.randn(300, generator=g) + x[:, 1]}
    of, found = {"label": Categorical(3), "loss": Continuous()}, []
    for sliced in (False, True):
        if sliced:
            monkeypatch.setattr(edges, "_SLICE", step)
            monkeypatch.setattr(scores, "_SLICE_VALUES", step)
            monkeypatch.setattr(spilling, "_SLICE", step)
        table = BinTable.calibrated(of, 16, x, values)
        table.add(x, values)
        table.table *= (1 << 30) // int(table.table.max()) + 1
        table.spill()
        found.append((table.edges, table.scores(rate), exact(table.layout, x, values, rate)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    for name in ("spearman", "spearman_bound", "auroc", "auroc_bound", "mutual_info"):
        for whole, sliced in zip(found[0][1:], found[1][1:], strict=True):
            torch.testing.assert_close(
                getattr(sliced, name), getattr(whole, name), rtol=1e-9, atol=1e-9, equal_nan=True, msg=name
            )


def test_what_a_sample_is_off_comes_on_top():
    """Of the same bins the rows themselves have no other bound, so that both grow by the same."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=g)
    values = {"label": torch.randint(0, 2, (300,), generator=g), "loss": torch.randn(300, generator=g)}
    table = BinTable.calibrated({"label": Categorical(2), "loss": Continuous()}, 16, x, values)
    table.add(x, values)
    for name in ("spearman_bound", "auroc_bound"):
        whole, sampled, rows = (
            getattr(found, name).nan_to_num(-1)
            for found in (table.scores(), table.scores(0.9), exact(table.layout, x, values, 0.9))
        )
        torch.testing.assert_close(sampled, torch.where(whole < 0, whole, whole + rows), rtol=1e-9, atol=1e-9)
        assert (rows[:, :2] > 0.01).all()


@pytest.mark.parametrize("n", [20, 600])
def test_a_constant_neuron_has_no_area(n):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 2.5
    with pytest.warns(RuntimeWarning, match="constant_neuron"):
        found = skillfast.correlate(x, {"label": torch.arange(n) % 2}, statistics=["auroc", "spearman"], bins=16)
    for array in (found.auroc, found.auroc_bound, found.spearman):
        assert np.isnan(array).any(1).tolist() == [False, True, False]
