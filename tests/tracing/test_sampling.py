from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import skillfast
from skillfast.tracing import sampling
from skillfast.tracing.sampling import ValidRows, _bytes_of, _random_batches, _rows_of, _shuffled, plan


def test_batches_of_any_form_are_counted():
    images, labels = torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)
    for batch in ((images, labels), [images, labels], {"x": images, "more": (labels,)}, ("a name", [images], labels)):
        assert _bytes_of(batch) == 5 * 3 * 4 + 5 * 8
        assert _rows_of(batch) == 5
    assert _bytes_of("a name") == _rows_of(torch.tensor(1.0)) == 0


def test_a_list_gives_random_batches_until_their_rows_are_enough():
    batches = [torch.full((4,), i) for i in range(10)]
    assert _random_batches(batches, 10, 40, 0) == []  # all 40 rows are kept and exact
    for rows, count in ((1, 8), (32, 8), (33, 9), (100, 10)):  # at least 8 batches, since one may hold a single class
        chosen = [int(batch[0]) for batch in _random_batches(batches, rows, 39, 0)]
        assert len(chosen) == len(set(chosen)) == count
    assert chosen != sorted(chosen)
    assert chosen != [int(batch[0]) for batch in _random_batches(batches, 100, 39, 1)]
    assert len(_random_batches(batches, 1, 39, 0, most=19)) == 4  # more than one, as far as 19 rows allow
    assert plan(batches, 8, 40).calibration == []
    assert len(plan(batches, 33, 39).calibration) == 9


@pytest.mark.parametrize(("rows", "held"), [(10, 5), (2, 1), (1, 1), (1000, 20)])
def test_a_stream_waits_in_a_buffer_of_twice_the_rows(rows, held):
    taken = []

    def stream():
        for i in range(20):
            taken.append(i)
            yield torch.full((4,), i)

    drawn = _shuffled(stream(), rows, 0)
    first = int(next(drawn)[0])
    assert len(taken) == min(20, held + 1)  # the one that is drawn makes room for the next
    rest = [int(batch[0]) for batch in drawn]
    assert sorted([first, *rest]) == list(range(20))
    assert ([first, *rest] == list(range(20))) == (held == 1)
    assert list(_shuffled([], rows, 0)) == []


def test_a_buffer_of_large_batches_holds_fewer(monkeypatch):
    monkeypatch.setattr(sampling, "_BUFFER_BYTES", 3 * 16)
    taken = []
    next(_shuffled((taken.append(i) or torch.zeros(4) for i in range(20)), 1000, 0))
    assert len(taken) == 4


@pytest.mark.parametrize("sampler", [None, "of batches"])
def test_random_items_of_a_data_set_come_in_batches(sampler):
    data = TensorDataset(torch.arange(100))
    loader = DataLoader(data, 7)
    if sampler:
        loader = DataLoader(data, batch_sampler=loader.batch_sampler)
    state = torch.get_rng_state()
    found = plan(loader, 20, 99)
    drawn = [rows for (rows,) in found.calibration]
    assert torch.equal(torch.get_rng_state(), state)
    assert found.batches is loader
    assert not found.distributed
    assert [len(part) for part in drawn] == ([20] if sampler else [7, 7, 6])
    assert len(torch.cat(drawn).unique()) == 20
    assert torch.cat(drawn).max() > 50
    assert plan(loader, 20, 100).calibration == ()


@pytest.mark.parametrize("kind", [iter, lambda batches: DataLoader(batches, batch_size=None)])
def test_what_gives_whole_batches_one_by_one_is_a_stream(kind):
    batches = [torch.full((4,), i) for i in range(30)]
    found = plan(kind(batches), 20, 16)
    assert found.calibration == ()
    assert not found.distributed
    drawn = [int(batch[0]) for batch in found.batches]
    assert sorted(drawn) == list(range(30)) != drawn


@pytest.mark.parametrize(("replicas", "shuffle", "calibrated"), [(1, False, 8), (2, False, 8), (2, True, 8)])
def test_processes_calibrate_on_the_same_items_even_where_they_shuffle(replicas, shuffle, calibrated):
    data = TensorDataset(torch.arange(40))
    plans = [
        plan(DataLoader(data, 4, sampler=DistributedSampler(data, replicas, rank, shuffle=shuffle)), 8, 16)
        for rank in range(replicas)
    ]
    drawn = [torch.cat([batch for (batch,) in each.calibration]).tolist() for each in plans]
    assert [len(items) for items in drawn] == [calibrated] * replicas
    assert all(items == drawn[0] for items in drawn)
    assert [each.distributed for each in plans] == [replicas > 1] * replicas


def test_rows_that_a_sampler_repeats_are_no_ones_own():
    data = TensorDataset(torch.arange(7))
    places = []
    for rank in range(3):  # 3 rows each: two are repeated
        valid = ValidRows(DataLoader(data, 2, sampler=DistributedSampler(data, 3, rank, shuffle=False)))
        for n in (2, 1):
            rows = valid.next(n)
            assert rows.own.tolist() == (rows.place < 7).tolist()
            places += rows.place.tolist()
    assert sorted(places) == list(range(9))
    assert places[:3] == [0, 3, 6]
    alone = ValidRows(DataLoader(data, 2)).next(2)
    assert alone.own is alone.place is None


@pytest.mark.filterwarnings("ignore:some scores are not defined")  # of a class without images
def test_a_trace_counts_no_repeated_sample(vit, batches):
    images, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    sampler = DistributedSampler(range(37), 2, 1, shuffle=False)  # 18 of 37, and the first of all once more
    per_token = {
        "metrics": {"pixel": skillfast.Continuous()}, "pool": "none", "statistics": ("pearson",), "sites": ("mlp",),
        "forward": lambda model, batch: (model(batch[0]), {"pixel": batch[0].flatten(1)[:, :17]}),
    }  # fmt: skip
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        loader = DataLoader(TensorDataset(images, labels), 8, sampler=sampler)
        found = skillfast.trace(vit, loader, statistics=("pearson",))
        tokens = skillfast.trace(vit, loader, **per_token)
    finally:
        distributed.destroy_process_group()
    same = skillfast.trace(vit, [(images[1::2], labels[1::2])], **per_token)
    assert tokens.n_observations == same.n_observations == 18 * 17
    np.testing.assert_allclose(tokens.pearson, same.pearson, atol=1e-5)
    want = skillfast.trace(vit, [(images[1::2], labels[1::2])], statistics=("pearson",))
    assert found.n_observations == want.n_observations == 18
    np.testing.assert_allclose(found.pearson, want.pearson, atol=1e-5)
