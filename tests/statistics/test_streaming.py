"""The accumulator as a whole against scipy on stored values: any statistic, any order, any cut."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import streamed
import torch
from conftest import make_vit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import skillfast
from skillfast import Binary, Categorical, Continuous, NeuronStatistics
from skillfast.errors import ArgumentError, DataError
from skillfast.statistics.bins.edges import exact_rows
from skillfast.tracing import sampling

# Warnings of what has no score have tests of their own.
pytestmark = pytest.mark.filterwarnings("ignore:some scores are not defined")

METRICS = {"label": Categorical(4), "right": Binary(), "loss": Continuous()}
COLUMNS = ("label:0", "label:1", "label:2", "label:3", "right", "loss")


def rows(n, seed=0, dtype=torch.float32):
    """Neurons of several kinds, some of which go with the metrics."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 4, (n,), generator=g)
    base = torch.randn(n, 6, generator=g)
    x = torch.stack(
        [
            base[:, 0],
            torch.nn.functional.gelu(base[:, 1] + (label == 2)),
            torch.relu(base[:, 2] - 1.2),
            (base[:, 3] * 2).exp() + label,
            base[:, 4] * 1e-2 + 1e3,
            torch.round(base[:, 5] + 0.5 * (label == 0)),
        ],
        1,
    ).to(dtype)
    values = {
        "label": label,
        "right": torch.rand(n, generator=g) < 0.8,
        "loss": (torch.randn(n, generator=g) + 0.5 * base[:, 0]).exp(),
    }
    return x, values


def part(values, index):
    return {name: v[index] for name, v in values.items()}


def expanded(values):
    label = values["label"].numpy()
    return [
        *((label == k).astype(float) for k in range(4)),
        values["right"].double().numpy(),
        values["loss"].double().numpy(),
    ]


def stream(x, values, order=None, batch=97, **settings):
    acc = NeuronStatistics(x.shape[1], METRICS, **settings)
    order = torch.arange(len(x)) if order is None else order
    for index in order.split(batch):
        acc.update(x[index], part(values, index))
    return acc


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [900, 20_000])
def test_all_four_statistics_against_scipy(n, dtype):
    x, values = rows(n, dtype=dtype)
    x = x[:, [0, 1, 2, 3, 5]]  # an offset of 1e3 has no float16 neighbours left
    scores = stream(x, values).compute()
    assert scores.columns == COLUMNS
    for d in range(x.shape[1]):
        neuron = x[:, d].double().numpy()
        for m, column in enumerate(expanded(values)):
            rho = stats.spearmanr(neuron, column).statistic
            assert np.isfinite(scores.spearman[d, m])
            assert abs(scores.spearman[d, m] - rho) <= min(5e-4, scores.spearman_bound[d, m] + 1e-9)
            if m < 5:
                area = roc_auc_score(column, neuron)
                assert abs(scores.auroc[d, m] - area) <= min(5e-4, scores.auroc_bound[d, m] + 1e-9)
            assert scores.mutual_info[d, m] >= 0
    assert np.isnan(scores.auroc[:, 5]).all()
    assert scores.mutual_info[1, 2] > 0.05 > 0.02 > scores.mutual_info[0, 2]
    if n <= exact_rows(128):
        assert np.nanmax(scores.spearman_bound) == 0
    else:
        assert np.median(scores.spearman_bound[:, :5]) <= 0.012
        assert np.median(scores.spearman_bound[:, 5]) <= 0.04


@pytest.mark.parametrize("classes", [2, 37, 100])
def test_metrics_of_few_and_many_classes(classes):
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, classes, (20_000,), generator=g)
    x = torch.randn(20_000, 2, generator=g) + (label == 1)[:, None] * torch.tensor([0.0, 2.0])
    acc = NeuronStatistics(2, {"label": Categorical(classes)})
    acc.update(x, {"label": label})
    scores = acc.compute()
    for k in range(0, classes, max(1, classes // 9)):
        for d in range(2):
            rho = stats.spearmanr(x[:, d], label == k).statistic
            assert abs(scores.spearman[d, k] - rho) <= min(5e-4, scores.spearman_bound[d, k])
            area = roc_auc_score(label == k, x[:, d])
            assert abs(scores.auroc[d, k] - area) <= scores.auroc_bound[d, k]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.data_too_large])
@given(data=st.data())
def test_the_same_edges_give_bitwise_the_same_table(data):
    x, values = rows(3000, seed=data.draw(st.integers(0, 3)))
    first = NeuronStatistics(6, METRICS, bins=16)
    sample = torch.randperm(3000, generator=torch.Generator().manual_seed(0))[:128]
    first.calibrate(x[sample], part(values, sample))
    whole = first.like()
    whole.update(x, values)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    shards = []
    for index in torch.tensor_split(order, sorted(data.draw(st.lists(st.integers(0, 3000), max_size=4)))):
        shard = first.like()
        for cut in index.split(data.draw(st.integers(1, 900))):
            shard.update(x[cut], part(values, cut))
        shards.append(shard)
    while len(shards) > 1:
        other = shards.pop(data.draw(st.integers(0, len(shards) - 1)))
        shards[data.draw(st.integers(0, len(shards) - 1))].merge(other)
    got, want = shards[0].state_dict(), whole.state_dict()
    assert torch.equal(got["table"]["table"], want["table"]["table"])
    assert shards[0].n_observations == 3000
    np.testing.assert_allclose(shards[0].compute().pearson, whole.compute().pearson, atol=1e-7)
    np.testing.assert_allclose(shards[0].compute().spearman, whole.compute().spearman, atol=1e-12)


def test_shards_that_still_keep_their_rows_merge_exactly():
    x, values = rows(5000)
    whole = stream(x, values)
    for cut in (100, 4900):  # a keeper into a table, a table into a keeper
        index = torch.arange(5000)
        acc, other = stream(x[:cut], part(values, index[:cut])), stream(x[cut:], part(values, index[cut:]))
        acc.merge(other)
        assert acc.n_observations == 5000
        np.testing.assert_allclose(acc.compute().pearson, whole.compute().pearson, atol=1e-7)
        for d in range(6):
            rho = stats.spearmanr(x[:, d].double(), values["loss"].double()).statistic
            assert abs(acc.compute().spearman[d, 5] - rho) <= acc.compute().spearman_bound[d, 5] + 1e-9


def test_shards_with_other_edges_are_refused():
    x, values = rows(3000)
    half = torch.arange(3000)
    a, b = (stream(x[s], part(values, half[s]), bins=8) for s in (slice(0, 1500), slice(1500, None)))
    with pytest.raises(ArgumentError, match=r"expected the same bin edges, got others; make shards with like\(\)"):
        a.merge(b)


@pytest.mark.parametrize("n", [300, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_state_goes_on_to_the_same_result(tmp_path, n, dtype):
    x, values = rows(n, dtype=dtype)
    index = torch.arange(n)
    whole = stream(x, values)
    half = stream(x[: n // 2], part(values, index[: n // 2]))
    path = half.save(tmp_path)
    other = NeuronStatistics.load(tmp_path)
    assert other.n_observations == n // 2
    for cut in index[n // 2 :].split(97):
        other.update(x[cut], part(values, cut))
    got, want = other.compute(), whole.compute()
    np.testing.assert_allclose(got.pearson, want.pearson, atol=1e-7)
    if n == 300:
        np.testing.assert_array_equal(got.spearman, want.spearman)
    elif len(half.state_dict()["kept"]["rows"]) == 0:
        assert torch.equal(other.state_dict()["table"]["edges"], whole.state_dict()["table"]["edges"])
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match="expected a safetensors file, got one that is broken"):
        NeuronStatistics.load(tmp_path)


def test_a_table_saved_mid_pass_continues_bitwise(tmp_path):
    x, values = rows(6000)
    index = torch.arange(6000)
    first = NeuronStatistics(6, METRICS)
    first.calibrate(x[::6], part(values, index[::6]))
    whole, half = first.like(), first.like()
    whole.update(x, values)
    half.update(x[:2500], part(values, index[:2500]))
    half.save(tmp_path)
    other = NeuronStatistics.load(tmp_path)
    other.update(x[2500:], part(values, index[2500:]))
    assert torch.equal(other.state_dict()["table"]["table"], whole.state_dict()["table"]["table"])
    np.testing.assert_allclose(other.compute().spearman, whole.compute().spearman, atol=1e-12)


def test_states_of_another_version_or_shape_are_refused():
    x, values = rows(3000)
    state = stream(x, values).state_dict()
    with pytest.raises(ArgumentError, match=r"expected schema 'skillfast.statistics/1', got 'skillfast.statistics/9'"):
        NeuronStatistics.from_state_dict({**state, "schema": "skillfast.statistics/9"})
    with pytest.raises(ArgumentError, match=r"state_dict table: expected int32 \[6, \d+\], got int32 \[5, \d+\]"):
        NeuronStatistics.from_state_dict({**state, "table": {**state["table"], "table": state["table"]["table"][:5]}})


def test_stale_edges_are_named_and_bounded():
    """Rows sorted by a class that is far away: the first rows say nothing of the later ones."""
    x, values = rows(8000)
    order = values["label"].argsort(stable=True)
    x = x + 50.0 * values["label"][:, None]
    scores = stream(x, values, order=order).compute()
    assert len(scores.reasons["stale_edges"]) == 6
    for d in range(6):
        for m, column in enumerate(expanded(values)):
            rho = stats.spearmanr(x[:, d].double(), column).statistic
            assert abs(scores.spearman[d, m] - rho) <= scores.spearman_bound[d, m] + 1e-9
    assert np.median(scores.spearman_bound[:, 5]) > 0.05


def test_correlate_is_right_on_sorted_rows():
    x, values = rows(8000)
    order = values["label"].argsort(stable=True)
    x = (x + 50.0 * values["label"][:, None])[order]
    values = part(values, order)
    scores = skillfast.correlate(x, values, METRICS)
    assert "stale_edges" not in scores.reasons
    for d in range(6):
        rho = stats.spearmanr(x[:, d].double(), values["loss"].double()).statistic
        assert abs(scores.spearman[d, 5] - rho) < 1e-3


def test_updates_in_and_out_of_inference_mode_mix_past_the_kept_rows():
    x, values = rows(400)
    acc = NeuronStatistics(6, METRICS, bins=8, buffer_rows=32)
    for i, index in enumerate(torch.arange(400).split(30)):
        with torch.inference_mode(i % 2 == 0):
            acc.update(x[index] * 1, part(values, index))
    rho = stats.spearmanr(x[:, 0].double(), values["loss"].double()).statistic
    scores = acc.compute()
    assert abs(scores.spearman[0, 5] - rho) <= scores.spearman_bound[0, 5]


def test_what_has_no_score_is_named_in_every_statistic():
    x, values = rows(4000)
    x[:, 1] = 0.3
    x[3999, 2] = torch.inf
    values["right"][:] = True
    for acc in (stream(x, values), stream(x[-500:], part(values, torch.arange(3500, 4000)))):
        scores = acc.compute()
        assert scores.reasons["constant_neuron"] == (1,)
        assert scores.reasons["non_finite_activation"] == (2,)
        assert scores.reasons["constant_metric"] == ("right",)
        assert np.isnan(scores.spearman[1:3]).all()
        assert np.isnan(scores.auroc[1:3]).all()
        assert np.isnan(scores.spearman[:, 4]).all()
        assert (scores.mutual_info[1] == 0).all()
        assert np.isnan(scores.mutual_info[2]).all()
        assert np.isfinite(scores.spearman[[0, 3]][:, [0, 1, 2, 3, 5]]).all()


# the order of a loader's data


class Stream(IterableDataset):
    def __init__(self, images, labels):
        self.items = (images, labels)

    def __iter__(self):
        return iter(zip(*self.items, strict=True))


@pytest.fixture(scope="module")
def pictures():
    """1,200 images in class order, classes far apart; 64 rows are kept, so edges matter."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat_interleave(240)
    images = torch.randn(1200, 3, 16, 16, generator=g) + 3.0 * labels[:, None, None, None]
    return images, labels


def loaders(pictures):
    data = TensorDataset(*pictures)
    g = torch.Generator().manual_seed(0)
    return {
        "shuffled": DataLoader(data, 50, shuffle=True, generator=g),
        "sorted": DataLoader(data, 50),
        "list": list(DataLoader(data, 50)),
    }


@pytest.mark.parametrize("kind", ["shuffled", "sorted", "list"])
def test_a_trace_in_any_order(pictures, kind):
    model = make_vit()
    scores = skillfast.trace(model, loaders(pictures)[kind], bins=16, classes=5, sites=("mlp",))
    want = skillfast.trace(model, loaders(pictures)["sorted"], bins=128, classes=5, sites=("mlp",))  # exact
    assert scores.n_observations == want.n_observations == 1200
    assert np.nanmax(want.spearman_bound) == 0
    assert "stale_edges" not in scores.reasons
    error = np.abs(scores.spearman - want.spearman)
    assert (error <= scores.spearman_bound + 1e-9).all()
    assert np.nanmedian(error) < 0.01


def test_only_an_unshuffled_loader_is_calibrated(pictures):
    plans = {kind: sampling.plan(loader, 128, 256, most=256) for kind, loader in loaders(pictures).items()}
    calibrated = {kind: sum(len(y) for _, y in plan.calibration) for kind, plan in plans.items()}
    assert calibrated == {"shuffled": 0, "sorted": 128, "list": 250}
    assert sampling.plan(loaders(pictures)["sorted"], 128, 1200).calibration == ()
    drawn = torch.cat([y for _, y in plans["sorted"].calibration])
    assert set(drawn.tolist()) == set(range(5))


def test_a_stream_is_shuffled_in_a_buffer(pictures):
    images, labels = pictures
    batches = DataLoader(Stream(images[:, :, 0, 0], labels), 20)
    seen = torch.cat([y for _, y in sampling.plan(batches, 100, 0).batches])
    assert sorted(seen.tolist()) == sorted(labels.tolist())
    assert not torch.equal(seen, labels)
    with pytest.warns(RuntimeWarning, match=r"stale_edges \(\d+ neurons\)") as told:  # no buffer mends a sorted stream
        scores = skillfast.trace(make_vit(), DataLoader(Stream(images, labels), 50), bins=16, classes=5)
    assert len(told) == 1
    assert scores.n_observations == 1200
    order = torch.randperm(1200, generator=torch.Generator().manual_seed(0))
    mixed = DataLoader(Stream(images[order], labels[order]), 50)
    assert "stale_edges" not in skillfast.trace(make_vit(), mixed, bins=16, classes=5).reasons


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
import skillfast

folder, tests = sys.argv[1:]
sys.path.insert(0, tests)
from streamed import CASES, SITES, model, points

torch.set_num_threads(1)
dist.init_process_group("gloo")
for n, bins in CASES:
    data = points(n)
    for shuffle in (False, True):
        loader = DataLoader(data, 16, sampler=DistributedSampler(data, shuffle=shuffle))
        scores = skillfast.trace(model(), loader, bins=bins, classes=5, sites=SITES)
        scores.save(f"{folder}/{n}-{dist.get_rank()}-{shuffle}")
dist.destroy_process_group()
"""


def test_two_processes_under_torchrun_give_the_result_of_one(tmp_path):
    """101 and 301 do not divide by two: a DistributedSampler repeats a sample, which must not count twice."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [tmp_path / "script.py", tmp_path, Path(__file__).parents[1]]
    done = subprocess.run(
        [*command, *map(str, arguments)], check=False, capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for n, bins in streamed.CASES:
        loader = DataLoader(streamed.points(n), 16)
        want = skillfast.trace(streamed.model(), loader, bins=bins, classes=5, sites=streamed.SITES)
        assert bins == 128 or np.nanmax(want.spearman_bound) > 0  # the table is there
        for name in ("0-False", "1-False", "0-True", "1-True"):
            got = skillfast.NeuronScores.load(tmp_path / f"{n}-{name}")
            assert got.n_observations == n
            np.testing.assert_allclose(got.pearson, want.pearson, atol=1e-5)  # other batches round otherwise
            np.testing.assert_allclose(got.spearman, want.spearman, atol=2e-2 if bins == 8 else 1e-4)


def test_a_sampler_that_drops_is_refused():
    data = TensorDataset(torch.zeros(7, 3, 16, 16), torch.zeros(7, dtype=torch.int64))
    loader = DataLoader(data, 2, sampler=DistributedSampler(data, 2, 0, drop_last=True))
    with pytest.raises(ArgumentError, match="drops nothing, got drop_last=True"):
        skillfast.trace(make_vit(), loader, classes=5)
