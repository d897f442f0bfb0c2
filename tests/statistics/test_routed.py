"""Sums over the rows of experts against float64, wherever they are taken, and without waiting on a device."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import one_line
from fake_cuda import DEVICE, FakeCuda

from skillfast import Categorical, Continuous
from skillfast.errors import ArgumentError, DataError
from skillfast.statistics import routed
from skillfast.statistics.routed import RoutedRows, RoutedStatistics
from skillfast.statistics.tokens import TokenMask

METRICS = {"label": Categorical(3), "loss": Continuous()}
EXPERTS, UNITS, BATCH, TOKENS, SLOTS = 5, 6, 4, 13, 2
OFFSETS = {torch.float32: 1e3, torch.bfloat16: 4.0}


def made(device="cpu", statistics=("pearson",), n_bootstrap=None):
    return RoutedStatistics(
        EXPERTS, UNITS, METRICS, statistics, bins=16, n_bootstrap=n_bootstrap, seed=0, buffer_rows=16,
        device=torch.device(device),
    )  # fmt: skip


def steps(dtype=torch.float32, n=3):
    """Rows and values of some forwards; expert 3 gets nothing, expert 1 nothing in the first, some rows no expert."""
    g = torch.Generator().manual_seed(1)
    found = []
    for step in range(n):
        token = torch.arange(BATCH * TOKENS).repeat_interleave(SLOTS)
        expert = torch.tensor([0, 1, 2, 4, 5])[torch.randint(0, 5, (len(token),), generator=g)]
        expert = torch.where((expert == 1) & (step == 0), 2, expert)
        order = torch.randperm(len(token), generator=g)
        x = torch.randn(len(token), UNITS, generator=g) + OFFSETS[dtype] * (1 + expert[:, None])
        rows = RoutedRows(x.to(dtype), torch.ones(len(token)).to(dtype), expert, token, (BATCH, TOKENS))
        loss = torch.randn(BATCH, TOKENS, generator=g) + 5
        found.append((rows.at(order), {"label": torch.randint(0, 3, (BATCH,), generator=g), "loss": loss}))
    return found


def reference(found, per_token):
    """Rows float64 [rows, U] and columns [rows, 4] of each expert."""
    x, y, expert = [], [], []
    for rows, values in found:
        example, token = rows.example, rows.token
        loss = values["loss"].flatten()[token] if per_token else values["loss"][:, 0][example]
        x.append(rows.x.double() * rows.gate.double()[:, None])
        y.append(torch.cat([torch.eye(3).double()[values["label"][example]], loss.double()[:, None]], 1))
        expert.append(rows.expert)
    x, y, expert = torch.cat(x).numpy(), torch.cat(y).numpy(), torch.cat(expert).numpy()
    return [(x[expert == e], y[expert == e]) for e in range(EXPERTS)]


def check(scores, found, per_token, tolerance=1e-4):
    for e, (x, y) in enumerate(reference(found, per_token)):
        own = slice(e * UNITS, (e + 1) * UNITS)
        assert set(scores.n_routed[own]) == {len(x)}
        if len(x) < routed.LEAST:
            assert np.isnan(scores.pearson[own]).all()
            assert set(range(own.start, own.stop)) <= set(scores.reasons["too_few_tokens"])
            continue
        np.testing.assert_allclose(scores.mean[own], x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(scores.std[own], x.std(0), rtol=tolerance)
        want = np.corrcoef(x.T, y.T)[:UNITS, UNITS:]
        np.testing.assert_allclose(scores.pearson[own], want, atol=tolerance)
    assert scores.n_observations == sum(len(x) for x, _ in reference(found, per_token))


def count(statistics, rows, values, per_token, device="cpu", mask=None):
    rows = RoutedRows(
        *(t.to(device, non_blocking=True) for t in (rows.x, rows.gate, rows.expert, rows.token)), rows.shape
    )
    if per_token:
        given = {name: value.to(device, non_blocking=True) for name, value in values.items()}
        checked = statistics.check_tokens(given, BATCH, TOKENS, mask)
        statistics.center(rows)
        statistics.add_accumulated(statistics.accumulated(rows, checked))
    else:
        values = {name: value if value.dim() == 1 else value[:, 0] for name, value in values.items()}
        if statistics.keeps_rows:
            statistics.add(rows, statistics.check(values, BATCH)[rows.example], rows.example)
            return
        statistics.center(rows)
        statistics.add_sums(*statistics.summed(rows), statistics.check(values, BATCH))


@pytest.mark.parametrize("dtype", OFFSETS)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sums_of_all_experts_are_those_of_float64(monkeypatch, dtype, per_token, device):
    """Far from 0, ragged, some experts without rows; on a device nothing is waited for before the scores are read."""
    monkeypatch.setattr(routed, "_AT_ONCE", 4 * UNITS)
    found = steps(dtype)
    with FakeCuda() if device == "cuda" else nullcontext() as fake:
        there = DEVICE if device == "cuda" else "cpu"
        statistics = made(there)
        # a first step whose rows are all left out
        nothing = {"label": torch.zeros(0, dtype=torch.int64), "loss": torch.zeros(0)}
        none = torch.zeros(2, 0, EXPERTS, UNITS), torch.zeros(0, EXPERTS, dtype=torch.int64)
        none = [x.to(there, non_blocking=True) for x in none]
        statistics.add_sums(*none, statistics.check(nothing, 0))
        for rows, values in found:
            count(statistics, rows, values, per_token, there)
        assert fake is None or not fake.waits
        scores = statistics.scores()
    check(scores, found, per_token)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_row_that_is_not_finite_spoils_its_own_expert_alone(device):
    ((rows, values),) = steps(n=1)
    at = int((rows.expert == 2).nonzero()[3])
    rows.x[at, 4] = torch.inf
    with FakeCuda() if device == "cuda" else nullcontext():
        statistics = made(DEVICE if device == "cuda" else "cpu")
        count(statistics, rows, values, per_token=True, device=statistics.device)
        scores = statistics.scores()
    spoilt = np.zeros((EXPERTS, UNITS), dtype=bool)
    spoilt[2, 4] = True
    assert scores.reasons["non_finite_activation"] == (2 * UNITS + 4,)
    enough = np.isin(np.arange(EXPERTS), [e for e in range(EXPERTS) if int((rows.expert == e).sum()) >= routed.LEAST])
    assert (np.isfinite(scores.pearson[:, -1]).reshape(EXPERTS, UNITS) == ~spoilt & enough[:, None]).all()


def test_examples_of_the_rows_that_are_kept_are_those_of_float64():
    """Ranks and intervals: an accumulator for each expert, which gets its rows when there are enough of all."""
    found = steps(n=6)
    statistics = made(statistics=("pearson", "spearman"), n_bootstrap=8)
    for i, (rows, values) in enumerate(found):
        checked = statistics.check({"label": values["label"], "loss": values["loss"][:, 0]}, BATCH)
        statistics.add(rows, checked[rows.example], rows.example + i * BATCH)
        assert statistics.state_bytes > 0
    scores = statistics.scores()
    check(scores, found, per_token=False, tolerance=1e-3)
    known = np.isfinite(scores.pearson)
    assert (scores.pearson_low[known] < scores.pearson[known]).all()


def test_rows_that_wait_are_counted_when_there_are_enough_for_every_expert():
    statistics = made(statistics=("spearman",))
    rows, values = steps(n=1)[0]
    checked = statistics.check({"label": values["label"], "loss": values["loss"][:, 0]}, BATCH)[rows.example]
    statistics.add(rows, checked, rows.example)
    enough = len(rows.x) >= 16 * EXPERTS
    assert enough == (sum(expert.n_observations for expert in statistics.experts) > 0)
    few = rows.at(slice(0, 10))
    before = sum(expert.n_observations for expert in statistics.experts)
    statistics.add(few, checked[:10], few.example)
    assert sum(expert.n_observations for expert in statistics.experts) == before
    assert statistics.n_observations == before + int((few.expert < EXPERTS).sum())


def test_rows_that_wait_have_the_models_type_whatever_the_gates_have():
    statistics = made(statistics=("spearman",))
    rows, values = steps(torch.bfloat16, n=1)[0]
    checked = statistics.check({"label": values["label"], "loss": values["loss"][:, 0]}, BATCH)[rows.example]
    statistics.add(replace(rows, gate=rows.gate.float()), checked, rows.example)
    kept = statistics.state_dict()["experts"]["0"]["kept"]["rows"]
    assert len(kept) > 0
    assert kept.dtype == torch.bfloat16


def test_padding_is_left_out_of_a_columns_shift():
    statistics = made()
    ((rows, values),) = steps(n=1)
    mask = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    mask[:, :6] = True
    values["loss"][:, 6:] = 1e9
    rows = RoutedRows(
        rows.x, rows.gate, torch.where(mask.flatten()[rows.token], rows.expert, EXPERTS), rows.token, rows.shape
    )
    count(statistics, rows, values, per_token=True, mask=TokenMask(mask))
    check(statistics.scores(), [(rows, values)], per_token=True)


def test_too_few_tokens_at_every_expert_are_refused():
    statistics = made()
    ((rows, values),) = steps(n=1)
    count(statistics, rows.at(slice(0, 9)), values, per_token=False)
    with pytest.raises(ArgumentError, match="expected at least 10 tokens that were routed to one expert, got fewer"):
        statistics.scores()


@pytest.mark.parametrize("kept", [False, True])
def test_what_is_forgotten_leaves_no_trace(kept):
    found = steps(n=4)
    statistics = made(statistics=("pearson", "spearman") if kept else ("pearson",))
    for i, (rows, values) in enumerate(found):
        if kept:
            checked = statistics.check({"label": values["label"], "loss": values["loss"][:, 0]}, BATCH)
            statistics.add(rows, checked[rows.example], rows.example)
        else:
            count(statistics, rows, values, per_token=False)
        if i == 1:
            statistics.forget()
            assert statistics.n_observations == 0
    check(statistics.scores(), found[2:], per_token=False, tolerance=1e-3)


def stored(statistics, folder=None):
    if folder is None:
        return RoutedStatistics.from_state_dict(statistics.state_dict())
    assert statistics.save(folder).name == "routed.safetensors"
    return RoutedStatistics.load(folder)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_shards_with_shifts_of_their_own_merge(tmp_path, per_token, resumed):
    """Each shard's first rows are its shift, experts that one of them never met are the other's alone."""
    found = steps(n=4)
    for _, values in found[2:]:
        values["loss"] += 100.0
    assert 4 in found[2][0].expert  # which now comes in the first shard only
    without = [torch.where(rows.expert == 4, EXPERTS, rows.expert) for rows, _ in found[2:]]
    found[2:] = [(replace(rows, expert=expert), v) for (rows, v), expert in zip(found[2:], without, strict=True)]
    shards = [made(), made(), made()]  # the last one has counted nothing
    for shard, part in zip(shards, (found[:2], found[2:], []), strict=True):
        for rows, values in part:
            count(shard, rows, values, per_token)
    if resumed:
        shards = [stored(shards[0]), stored(shards[1], tmp_path), stored(shards[2])]
    before = shards[1].state_dict()["sums"]["comoments"]
    merged = shards[2]
    merged.merge(shards[0])
    merged.merge(shards[1])
    merged.merge(made())
    check(merged.scores(), found, per_token)
    one = made()
    for rows, values in found:
        count(one, rows, values, per_token)
    np.testing.assert_allclose(merged.scores().pearson, one.scores().pearson, atol=1e-9 if not per_token else 1e-5)
    for name, tensor in shards[1].state_dict()["sums"]["comoments"].items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("statistics", [("pearson",), ("pearson", "spearman", "auroc")])
def test_a_pass_goes_on_where_it_was_stored(tmp_path, statistics):
    found = steps(n=6)
    one, first = made(statistics=statistics), made(statistics=statistics)
    for rows, values in found:
        count(one, rows, values, False)
    for rows, values in found[:3]:
        count(first, rows, values, False)
    resumed = stored(first, tmp_path)
    for rows, values in found[3:]:
        count(resumed, rows, values, False)
    assert resumed.counts() == one.counts()
    for name, want in one.scores().arrays().items():
        atol = 1e-12 if len(statistics) == 1 else 1e-6  # float32 sums of other buffers
        np.testing.assert_allclose(resumed.scores().arrays()[name], want, atol=atol, err_msg=name)
    if len(statistics) > 1:
        second = made(statistics=statistics)
        for rows, values in found[3:]:
            count(second, rows, values, False)
        first.merge(second)
        for name, want in one.scores().arrays().items():
            np.testing.assert_allclose(first.scores().arrays()[name], want, atol=1e-6, err_msg=name)


def test_what_does_not_fit_is_refused_on_the_way_back(tmp_path):
    kept, plain = made(statistics=("spearman",)), made()
    told = one_line(ArgumentError, kept.merge, plain)
    assert told == "merge: expected statistics spearman, got pearson; count both with the same settings"
    state = kept.state_dict()
    del state["experts"]["4"]
    told = one_line(ArgumentError, RoutedStatistics.from_state_dict, state)
    assert "expected the states of experts 0 to 4 at experts, got others" in told
    told = one_line(ArgumentError, RoutedStatistics.from_state_dict, {**kept.state_dict(), "statistics": ["pearson"]})
    assert "expected the states of 0 experts, got 5" in told
    told = one_line(ArgumentError, RoutedStatistics.from_state_dict, {**state, "schema": "other"})
    assert "expected schema 'skillfast.routed/1', got 'other'" in told
    state = plain.state_dict()
    state["sums"]["comoments"]["count"][3] = -1
    assert "count -1" in one_line(ArgumentError, RoutedStatistics.from_state_dict, state)
    for experts in (4, 2**62):  # the second has no memory, not even on the meta device
        told = one_line(ArgumentError, RoutedStatistics.from_state_dict, {**plain.state_dict(), "n_experts": experts})
        assert f"count: expected int64 [{experts}], got int64 [5]; it is damaged" in told
    told = one_line(DataError, RoutedStatistics.load, tmp_path)
    assert "write it with RoutedStatistics.save" in told
