"""Shards that were counted apart, each about a shift of its own, add up to what float64 gives of all rows."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from skillfast import Categorical, Continuous, NeuronStatistics
from skillfast.errors import ArgumentError
from skillfast.statistics import bootstrap, distributed
from skillfast.statistics.bins import overflow
from skillfast.statistics.bins.overflow import SPILL_ROWS, widened
from skillfast.statistics.bins.table import BinTable
from skillfast.statistics.routed import RoutedRows, RoutedStatistics
from skillfast.statistics.tokens import TokenStatistics

METRICS = {"label": Categorical(2), "loss": Continuous()}
REPLICATES = 8


class Threads:
    """What the accumulator uses of `torch.distributed`, for threads in place of processes."""

    def __init__(self, size):
        self.size, self.rank = size, threading.local()
        self.given, self.barrier = [None] * size, threading.Barrier(size, timeout=60)
        self.groups = set()

    def get_world_size(self, group):
        return self.size

    def all_gather_object(self, values, value, group):
        self.groups.add(group)
        self.given[self.rank.number] = value
        self.barrier.wait()
        values[:] = self.given
        self.barrier.wait()

    def all_reduce(self, tensor, group):
        everybodys = [None] * self.size
        self.all_gather_object(everybodys, tensor.clone(), group)
        tensor.copy_(sum(everybodys))

    def run(self, function, items):
        failures = []

        def one(number, item):
            self.rank.number = number
            try:
                function(item)
            except BaseException as error:
                failures.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=pair) for pair in enumerate(items)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


@pytest.fixture
def two(monkeypatch):
    threads = Threads(2)
    monkeypatch.setattr(distributed, "dist", threads)
    return threads


def data(n=240, half=None):
    """Rows whose two parts lie far apart and far from 0, in every neuron and in the loss."""
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, 2, (n,), generator=g)
    late = (torch.arange(n) >= (half or n // 2)).double()
    loss = torch.randn(n, generator=g).double() + 50 * late + 300
    x = torch.randn(n, 3, generator=g) + 0.5 * label[:, None] + (1000 + 30 * late)[:, None] * torch.tensor([1, -1, 0.1])
    return x.float(), {"label": label, "loss": loss}


def part(values, rows):
    return {name: value[rows] for name, value in values.items()}


def halves(x, values, statistics=("pearson",), **settings):
    """Two accumulators that know nothing of each other, one for each half of the rows."""
    n = len(x)
    shards = []
    for rows in (torch.arange(n // 2), torch.arange(n // 2, n)):
        shard = NeuronStatistics(x.shape[1], METRICS, statistics, n_bootstrap=REPLICATES, buffer_rows=32, **settings)
        for batch in rows.split(17):
            shard.update(x[batch], part(values, batch), groups=batch)
        shard.compute()  # the rows that wait are summed
        shards.append(shard)
    return shards


def columns(values):
    return np.column_stack([np.eye(2)[values["label"]], values["loss"]])


def check(state, x, values, groups=None, rows=slice(None)):
    """Mean, deviation, r and the r of every replicate, against numpy's of the stored rows in float64."""
    x, y = x.double().numpy(), columns(values)
    mean, variance, mean_y, variance_y = (tensor.numpy() for tensor in state.moments.mean_and_variance())
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-9)
    np.testing.assert_allclose(variance, x.var(0), rtol=1e-5)
    np.testing.assert_allclose(mean_y, y.mean(0), rtol=1e-9)
    np.testing.assert_allclose(variance_y, y.var(0), rtol=1e-9)
    none = torch.zeros(3, dtype=torch.bool)
    r = state.moments.pearson(none, none).numpy()
    np.testing.assert_allclose(r, np.corrcoef(x.T, y.T)[:3, 3:], atol=1e-6)
    numbers = torch.arange(len(x)) if groups is None else torch.as_tensor(groups).long()
    weights = bootstrap.weights(0, numbers, REPLICATES).numpy().astype(int)
    got = state.replicates.pearson(slice(0, 3)).numpy()
    for b in range(REPLICATES):
        cov = np.cov(np.column_stack([x, y]).T, fweights=weights[:, b])
        sd = np.sqrt(np.diag(cov))
        np.testing.assert_allclose(got[b], (cov / np.outer(sd, sd))[:3, 3:], atol=2e-6)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_shards_with_shifts_of_their_own_merge(turned, stored):
    x, values = data()
    a, b = halves(x, values)
    assert (a.state.moments.shift_x - b.state.moments.shift_x).abs().min() > 2
    assert abs(float(a.state.moments.shift_y[-1] - b.state.moments.shift_y[-1])) > 40
    if stored:
        a, b = (NeuronStatistics.from_state_dict(shard.state_dict()) for shard in (a, b))
    if turned:
        a, b = b, a
    a.merge(b)
    check(a.state, x, values)


def test_an_empty_accumulator_takes_over_the_shift():
    x, values = data()
    total = NeuronStatistics(3, METRICS, ("pearson",), n_bootstrap=REPLICATES)
    for shard in halves(x, values):
        total.merge(shard)
    assert total.state.moments.shift_x.abs().min() > 90
    check(total.state, x, values)
    later, rows = NeuronStatistics(3, METRICS, ("pearson",), n_bootstrap=REPLICATES), torch.arange(120, 240)
    later.merge(halves(x, values)[0])
    later.update(x[rows], part(values, rows), groups=rows)  # about the shift that it took over
    later.compute()
    check(later.state, x, values)


def test_metrics_far_from_0_survive_a_merge_into_an_empty_accumulator():
    g = torch.Generator().manual_seed(0)
    x, loss = torch.randn(300, 2, generator=g), torch.randn(300, generator=g, dtype=torch.float64)
    found = []
    for offset in (0.0, 1e9):
        full, empty = (NeuronStatistics(2, {"loss": Continuous()}, ["pearson"], buffer_rows=64) for _ in range(2))
        full.update(x, {"loss": loss + offset})
        empty.merge(full)
        found.append(empty.compute().pearson)
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)


def test_what_cannot_set_edges_is_refused():
    values = {"label": torch.arange(64) % 2, "loss": torch.arange(64.0)}
    acc = NeuronStatistics(2, METRICS, bins=2, buffer_rows=8)
    with pytest.raises(ArgumentError, match="calibrate: expected 1 to 32 rows counted before, got 0"):
        acc.calibrate_on_counted()
    acc.update(torch.randn(8, 2), {name: value[:8] for name, value in values.items()})
    acc.calibrate_on_counted()
    acc.update(torch.randn(64, 2), values)
    with pytest.raises(ArgumentError, match="calibrate: expected 1 to 32 rows counted before, got 64"):
        acc.calibrate_on_counted()


def test_a_shard_without_rows_leaves_the_shift_alone():
    x, values = data()
    total = NeuronStatistics(3, METRICS, ("pearson",), n_bootstrap=REPLICATES, buffer_rows=32)
    total.merge(NeuronStatistics(3, METRICS, ("pearson",), n_bootstrap=REPLICATES))
    total.update(x, values, groups=torch.arange(len(x)))
    total.compute()
    assert total.state.moments.shift_x.abs().min() > 90
    check(total.state, x, values)


def test_processes_with_shifts_of_their_own_add_up(two):
    x, values = data()
    shards = halves(x, values)
    two.run(lambda shard: shard.all_reduce(), shards)
    for shard in shards:
        check(shard.state, x, values)


def test_rows_that_wait_in_a_buffer_are_in_the_sum(two):
    x, values = data()
    shards = [NeuronStatistics(3, METRICS, ("pearson",), n_bootstrap=REPLICATES) for _ in range(2)]
    for shard, rows in zip(shards, torch.arange(len(x)).chunk(2), strict=True):
        shard.update(x[rows], part(values, rows), groups=rows)
        assert shard.state.buffer.filled
    two.run(lambda shard: shard.all_reduce(), shards)
    for shard in shards:
        check(shard.state, x, values)


def test_a_process_without_rows_goes_on_after_the_sum(two):
    x, values = data()
    full, empty = halves(x, values)[0], NeuronStatistics(3, METRICS, ("pearson",), n_bootstrap=REPLICATES)
    two.run(lambda shard: shard.all_reduce(), [full, empty])
    late = torch.arange(len(x) // 2, len(x))
    for shard in (full, empty):
        shard.update(x[late], part(values, late), groups=late)
        shard.compute()
        check(shard.state, x, values)


@pytest.mark.parametrize("bins", [4, 128])
def test_no_process_beyond_the_group_adds_up(two, bins):
    x, values = data()
    shards = halves(x, values, ("pearson", "spearman"), bins=bins)  # with 4 bins into a table, with 128 kept
    if bins == 4:
        for shard in shards[1:]:
            shard.state.table.edges = shards[0].state.table.edges
    two.run(lambda shard: shard.all_reduce("some"), shards)
    assert two.groups == {"some"}


def test_processes_without_rows_choose_their_shift_later(two):
    empty = [NeuronStatistics(3, METRICS, ("pearson",)) for _ in range(2)]
    two.run(lambda shard: shard.all_reduce(), empty)
    assert not any(shard.state.shifted for shard in empty)


@pytest.mark.filterwarnings("ignore:some scores are not defined")
@pytest.mark.parametrize("reduced", [False, True])
def test_kept_rows_add_up_and_a_constant_of_float64_stays_one(two, reduced):
    """Kept rows are gathered; float32 does not hold 0.1, which the sums must know where float64 rows came."""
    n = 60
    x = np.column_stack([np.full(n, 0.1), np.arange(n) * 0.5])
    values = {"label": np.arange(n) % 2, "loss": np.arange(n) ** 2.0}
    shards = [NeuronStatistics(2, METRICS, buffer_rows=8) for _ in range(2)]
    for shard, rows in zip(shards, (slice(0, 20), slice(20, n)), strict=True):
        shard.update(x[rows], part(values, rows))
    if reduced:
        two.run(lambda shard: shard.all_reduce(), shards)
    else:
        shards[0].merge(shards[1])
    scores = shards[0].compute()
    assert scores.n_observations == n
    assert scores.reasons == {"constant_neuron": (0,)}
    assert scores.spearman[1, 2] == pytest.approx(1, abs=1e-12)


@pytest.mark.filterwarnings("ignore:some scores are not defined")
def test_a_keeper_that_takes_a_table_remembers_whom_it_took():
    x, values = data(400)
    first = NeuronStatistics(3, METRICS, bins=4, n_bootstrap=REPLICATES)
    first.calibrate(x[::4], part(values, slice(None, None, 4)))
    shard, keeper = first.like(), NeuronStatistics(3, METRICS, bins=4, n_bootstrap=REPLICATES)
    shard.update(x, values)
    keeper.update(x[:20].double(), part(values, slice(0, 20)))
    keeper.merge(shard)
    assert keeper.n_observations == 420
    assert keeper.state.wide
    with pytest.raises(ArgumentError, match="got two of one stream"):
        keeper.merge(shard)


def test_kept_rows_that_are_too_many_together_get_edges_of_both():
    """Two shards far apart, each of which fits the rows that are kept: the bins know both."""
    x, values = data(200, 100)
    shards = [NeuronStatistics(3, METRICS, ("spearman",), bins=8) for _ in range(2)]
    for shard, rows in zip(shards, torch.arange(200).chunk(2), strict=True):
        shard.update(x[rows], part(values, rows))
    shards[0].merge(shards[1])
    assert int((shards[0].state.table.edges[0] > 1015).sum()) == 4  # of 7


def test_a_state_with_activations_that_are_not_finite_comes_back():
    x, values = data(40)
    x[3, 1] = torch.nan
    acc = NeuronStatistics(3, METRICS, ("pearson",))
    acc.update(x, values)
    again = NeuronStatistics.from_state_dict(acc.state_dict())
    np.testing.assert_array_equal(again.scores().pearson, acc.scores().pearson)
    assert again.scores().reasons == {"non_finite_activation": (1,)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_one_dtype_after_calibration_keep_their_atomic_bins(dtype):
    """Only mixed dtypes make float32's neighbours tell ties: a shard's first, empty buffer is no row."""
    x = torch.randint(0, 3, (400, 2), generator=torch.Generator().manual_seed(0)).to(dtype)
    values = {"label": torch.arange(400) % 2, "loss": torch.arange(400.0)}
    acc = NeuronStatistics(2, METRICS, bins=16, buffer_rows=64)
    acc.calibrate(x[:128], part(values, slice(0, 128)))
    shard = acc.like()
    for each in (acc, shard):
        each.update(x, values)
    acc.merge(shard)
    assert acc.state.table.dtype == dtype
    assert np.nanmax(acc.compute().spearman_bound[:, :2]) < 1e-9  # three values, three bins: no order is hidden


# tables of bins


def counted(times):
    """A table whose entries are so many times those of 50 rows, spilled on the way as `add` would."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=g)
    values = {"label": torch.randint(0, 2, (50,), generator=g).double(), "loss": torch.randn(50, generator=g).double()}
    table = BinTable.calibrated(METRICS, 4, x, values)
    table.add(x, values)
    once = table.table.clone()
    table.table.zero_()
    for _ in range(times):
        table.table += once * (SPILL_ROWS // 50)
        table.spill()
    return table, once.double() * (SPILL_ROWS // 50)


def total(table):
    return widened(table.table, table.overflow, slice(0, 3))


@pytest.mark.parametrize("stored", [False, True])
def test_tables_past_int32_merge(stored):
    (a, once), (b, _) = counted(19), counted(29)
    assert float(once.max()) * 29 > 2**31
    if stored:
        a, b = (BinTable.from_state_dict(t.layout, t.state_dict(), torch.device("cpu")) for t in (a, b))
    a.merge(b)
    assert torch.equal(total(a), once * 48)
    assert torch.equal(total(b), once * 29)
    assert int(a.table.max()) < 1 << 30
    assert len(a.values()["loss"]) == 100
    a.add(torch.randn(5, 3), {"label": torch.arange(5) % 2, "loss": torch.randn(5)})
    assert int(total(a).sum()) > int(once.sum()) * 48


@pytest.mark.parametrize("slices", [None, 7])
def test_tables_past_int32_add_up_over_processes(two, monkeypatch, slices):
    if slices:
        monkeypatch.setattr(distributed, "_SLICE", slices)
        monkeypatch.setattr(overflow, "_SLICE", slices)
    (a, once), (b, _) = counted(19), counted(29)
    full = (1 << 30) - 3  # as large as an entry can be
    for table in (a, b):
        table.table[1, 2] = full
    want = total(a) + total(b)
    two.run(lambda table: distributed.reduce_table(table, None), [a, b])
    for table in (a, b):
        assert torch.equal(total(table), want)
        assert torch.equal(total(table)[0], once[0] * 48)
        assert int(table.table.max()) < 1 << 30


# tokens


def token_statistics(x, values, lengths, examples):
    """Sums over the tokens of some examples, about the mean of their own first one."""
    acc = TokenStatistics(
        3, METRICS, ("pearson",), bins=4, n_bootstrap=REPLICATES, seed=0, buffer_rows=16, device=torch.device("cpu")
    )
    starts = np.cumsum([0, *lengths])
    for few in examples.split(11):
        rows = [x[starts[i] : starts[i + 1]] for i in few.tolist()]
        if not acc.counted:
            acc.center.copy_(rows[0].mean(0))
        sums = torch.stack([torch.stack([(r - acc.center).pow(p).sum(0) for r in rows]) for p in (1, 2)])
        checked = acc.check(part(values, few), len(few))
        acc.add_sums(sums, torch.tensor([len(r) for r in rows]), checked, few)
    return acc


def test_what_one_stream_numbered_is_refused_before_it_is_merged():
    """A stored state and what went on from it number the same examples, so their weights are the same."""
    acc = TokenStatistics(
        3, METRICS, ("pearson",), bins=4, n_bootstrap=REPLICATES, seed=0, buffer_rows=16, device=torch.device("cpu")
    )
    _, values = data(4)
    acc.add_sums(torch.ones(2, 4, 3), torch.ones(4, dtype=torch.int64), acc.check(values, 4), None)
    experts = RoutedStatistics(
        2, 3, METRICS, ("pearson",), bins=4, n_bootstrap=REPLICATES, seed=0, buffer_rows=16, device=torch.device("cpu")
    )
    experts.numbers(4)
    for first in (acc, experts):
        again = type(first).from_state_dict(first.state_dict())
        with pytest.raises(ArgumentError, match="expected shards with weights of their own, got two of one stream"):
            first.check_merge(again)


@pytest.mark.parametrize("how", ["reduced", "merged", "stored", "forgotten"])
def test_tokens_of_shards_with_centers_of_their_own_add_up(two, tmp_path, how):
    lengths = np.random.default_rng(0).integers(1, 9, 80)
    x, _ = data(int(lengths.sum()), int(lengths[:40].sum()))
    _, values = data(80)
    parts = [torch.arange(40), torch.arange(40, 80)]
    shards = [token_statistics(x, values, lengths, few) for few in parts]
    assert (shards[0].center - shards[1].center).abs().min() > 2
    if how == "forgotten":  # sums that are set to 0 again leave nothing behind
        for shard in shards:
            shard.calibrate_on_counted()
            assert shard.n_observations == 0
            assert not any(tensor.any() for tensor in shard._sums.replicates.tensors().values())
            assert not any(tensor.any() for tensor in shard._sums.moments.sums().values())
        return
    tokens = np.repeat(np.arange(80), lengths)
    if how == "reduced":
        two.run(lambda shard: shard.all_reduce(), shards)
    else:
        if how == "stored":
            assert shards[1].save(tmp_path).name == "tokens.safetensors"
            shards = [TokenStatistics.from_state_dict(shards[0].state_dict()), TokenStatistics.load(tmp_path)]
        empty = shards[0].like()  # takes over nothing that it does not have, and brings nothing
        total = TokenStatistics(3, METRICS, ("pearson",), bins=4, n_bootstrap=REPLICATES, seed=0, buffer_rows=16,
                                device=torch.device("cpu"))  # fmt: skip
        for shard in (empty, *shards, empty):
            total.merge(shard)
        assert torch.equal(total.center, shards[0].center)
        shards = [total]
    for shard in shards:
        assert shard.n_observations == lengths.sum()
        check(shard._sums, x, part(values, torch.from_numpy(tokens)), groups=tokens)


def ranking(x, loss, n, stream, *, calibrated):
    """Ranks over the tokens of the first n texts of x [texts, tokens, 3]; no sums are wanted.

    Args:
        calibrated: None, or other texts and their loss, which set the edges.
    """
    tokens = x.shape[1]
    acc = TokenStatistics(
        3, {"loss": Continuous()}, ("spearman",), bins=4, n_bootstrap=None, seed=0, buffer_rows=16,
        device=torch.device("cpu"),
    )  # fmt: skip

    def count(x, loss):
        for few in torch.arange(len(x)).split(5):
            picked = acc.pick(len(few), tokens, None)
            acc.reserve(len(picked)).copy_(x[few].flatten(0, 1)[picked])
            checked = loss[few][:, None, None].expand(-1, tokens, 1)
            acc.commit(acc._sampled.state.buffer.rows[:0], picked, checked, None)
            acc._sums.moments.count += len(few) * tokens

    if calibrated is not None:
        count(*calibrated)
        acc.calibrate_on_counted()
    acc._sample.stream = stream
    if n:
        count(x[:n], loss[:n])
    return acc


@pytest.mark.parametrize("how", ["reduced", "merged", "stored"])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(("short", "long"), [(0, 30), (8, 30), (180, 190), (8, 400), (300, 400)])
def test_samples_of_shards_become_one_with_one_rate(two, short, long, calibrated, how):
    if long == 400 and short == 8 and not calibrated and how == "reduced":
        return  # one process has bins and the other has no edges for them: refused, as for pooled rows
    tokens, g = 9, torch.Generator().manual_seed(0)
    x, loss = torch.randn(2, long, tokens, 3, generator=g), torch.randn(2, long, generator=g).double()
    x += loss[..., None, None].float()
    x[1] += 4  # another shift, other edges
    start = (x[:, :10].flatten(0, 1), loss[:, :10].flatten()) if calibrated else None
    shards = [ranking(x[i], loss[i], n, i, calibrated=start) for i, n in enumerate((short, long))]
    if how == "stored":
        stored = [TokenStatistics.from_state_dict(shard.state_dict()) for shard in shards]
        for tables in zip(*([shard._empty_table for shard in some] for some in (shards, stored)), strict=True):
            assert tables == (None, None) or torch.equal(*(table.edges for table in tables))  # for tokens to come
        shards = stored
    before = [shard._sample.kept.copy() for shard in shards], shards[1]._sampled.n_observations
    if short == 300 and not calibrated:
        act = (lambda shard: shard.all_reduce()) if how == "reduced" else (lambda shard: shards[0].merge(shards[1]))
        with pytest.raises(ArgumentError, match="calibrate"):
            two.run(act, shards) if how == "reduced" else act(None)
        assert shards[0].n_observations == short * tokens * (1 if how != "reduced" else (short + long) / short)
        return
    if how == "reduced":
        two.run(lambda shard: shard.all_reduce("these"), shards)
        assert two.groups == {"these"}
        np.testing.assert_array_equal(shards[0].scores().spearman, shards[1].scores().spearman)
        np.testing.assert_array_equal(shards[0].scores().spearman_bound, shards[1].scores().spearman_bound)
    else:
        shards[0].merge(shards[1])
        assert (shards[1]._sample.kept == before[0][1]).all()  # the other is as it was
        assert shards[1]._sampled.n_observations == before[1]
    if short == 180 and not calibrated and how != "reduced":  # kept by each, too many together: edges know both
        assert (shards[0]._sampled.state.table.edges > 2.5).any(1).all()
    scores, rate = shards[0].scores(), shards[0]._sample.rate
    expected = (short + long) * tokens * rate
    assert abs(scores.n_ranked - expected) <= 4 * np.sqrt(expected * (rate < 1))
    if shards[0]._sampled.keeping:
        assert scores.n_ranked == len(shards[0]._sample.kept) <= 64
    rows = np.concatenate([x[0, :short].flatten(0, 1), x[1, :long].flatten(0, 1)])
    ranks = np.column_stack([rankdata(column) for column in rows.T])
    wanted = rankdata(np.repeat(np.concatenate([loss[0, :short], loss[1, :long]]), tokens))
    rho = np.corrcoef(ranks.T, wanted)[:3, 3]
    assert (np.abs(scores.spearman[:, 0] - rho) <= scores.spearman_bound[:, 0] + 1e-12).all()


@pytest.mark.parametrize("n", [20, 400])
def test_shards_of_one_start_sample_tokens_of_their_own(n):
    """While rows are kept a shard begins with all tokens, once they are counted in bins with the share of its start."""
    x, loss = torch.randn(400, 9, 3, generator=torch.Generator().manual_seed(0)), torch.arange(400).double()
    start = ranking(x, loss, n, 0, calibrated=(x[:20], loss[:20]))
    shards = [start.like() for _ in range(2)]
    assert len({start._sample.stream, *(shard._sample.stream for shard in shards)}) == 3
    for shard in shards:
        assert shard._sample.examples == shard._sampled.n_observations == shard.n_observations == 0
        assert shard._sample.rate == (1 if n == 20 else 1 / 32)
        table = start._empty_table if n == 20 else start._sampled.state.table
        assert torch.equal((shard._empty_table if n == 20 else shard._sampled.state.table).edges, table.edges)
    picked = {tuple(shard.pick(200, 9, None)) for shard in shards}
    assert len(picked) == 2


def test_the_size_of_the_sample_counts():
    sizes = [
        TokenStatistics(
            3, METRICS, names, bins=4, n_bootstrap=None, seed=0, buffer_rows=16, device=torch.device("cpu")
        ).state_bytes
        for names in (("pearson",), ("pearson", "auroc"))
    ]
    sums = 8 * (1 + 3 * 3 + 3 * 2 + 3 * 3 + 1 * 3) + 4 * 3  # count, columns, neurons, products in float64; the shift
    assert sizes == [sums, 2 * sums]


def test_experts_of_processes_with_shifts_of_their_own_add_up(two):
    """Sums that are stacked by expert, one of which only one of the processes saw; counting goes on after the sum."""
    x, values = data()
    expert = torch.arange(len(x)) % 3
    expert[: len(x) // 2][expert[: len(x) // 2] == 2] = 1
    shards = [
        RoutedStatistics(
            3, 3, METRICS, ("pearson",), bins=4, n_bootstrap=None, seed=0, buffer_rows=16, device=torch.device("cpu")
        )
        for _ in range(2)
    ]

    def count(shard, at):
        rows = RoutedRows(x[at], torch.ones(len(at)), expert[at], torch.arange(len(at)), (len(at), 1))
        shard.center(rows)
        shard.add_sums(*shard.summed(rows), shard.check(part(values, at), len(at)))

    last = torch.arange(len(x) - 20, len(x))
    for shard, at in zip(shards, torch.arange(len(x) - 20).split(len(x) // 2), strict=True):
        count(shard, at)
    two.run(lambda shard: shard.all_reduce("these"), shards)
    assert two.groups == {"these"}
    for shard in shards:
        count(shard, last)
        scores = shard.scores()
        for e in range(3):
            own = expert == e
            loss = values["loss"][own].double()
            want = np.corrcoef(x[own].double().numpy().T, loss.numpy())[:3, 3]
            np.testing.assert_allclose(scores.pearson[3 * e : 3 * e + 3, -1], want, atol=1e-6)
            np.testing.assert_allclose(scores.mean[3 * e : 3 * e + 3], x[own].double().mean(0), rtol=1e-6)
            assert set(scores.n_routed[3 * e : 3 * e + 3]) == {int(own.sum())}


def test_rows_of_experts_that_wait_add_up_over_processes(two):
    """Where ranks need the rows: as many as one process would have kept, whoever's buffer they wait in."""
    x, values = data(90)
    expert = torch.arange(90) % 2
    shards = [
        RoutedStatistics(
            2, 3, METRICS, ("pearson", "spearman"), bins=8, n_bootstrap=8, seed=0, buffer_rows=64,
            device=torch.device("cpu"),
        )
        for _ in range(2)
    ]  # fmt: skip
    for shard, at in zip(shards, torch.arange(90).split(60), strict=True):
        rows = RoutedRows(x[at], torch.ones(len(at)), expert[at], torch.arange(len(at)), (len(at), 1))
        shard.add(rows, shard.check(part(values, at), len(at)), at)
    two.run(lambda shard: shard.all_reduce("these"), shards)
    assert two.groups == {"these"}
    for shard in shards:
        assert shard.n_observations == 90
        scores = shard.scores()
        for e in range(2):
            own = expert == e
            for score, of in ((scores.pearson, np.asarray), (scores.spearman, rankdata)):
                want = np.corrcoef(
                    [of(column) for column in (*x[own].double().T.numpy(), values["loss"][own].numpy())]
                )[:3, 3]
                np.testing.assert_allclose(score[3 * e : 3 * e + 3, -1], want, atol=1e-5)
