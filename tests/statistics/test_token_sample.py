"""Ranks over tokens: every token in the sample with one probability, whatever the batches, and bounds that say so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import skillfast
from skillfast import Categorical, Continuous, NeuronScores, Tracer
from skillfast.models.sites import declare_sites
from skillfast.statistics.bins.estimates import _reach, continuous_sampling, label_sampling
from skillfast.statistics.bins.layout import UNIT

METRICS = {"label": Categorical(3), "loss": Continuous()}
STATISTICS = ("pearson", "spearman", "auroc")
WIDTH = 24


class Flow(torch.nn.Module):
    """A model whose neurons are its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(WIDTH, 2)
        declare_sites(self, {"blocks.0.mlp": "proj"})

    def forward(self, x):
        return self.proj(x)


def texts(n, seed, longest=120):
    """Activations [length, D] of texts of uneven length, that go with the text's label and loss and differ by text."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(2 + rng.geometric(0.06, n) * rng.integers(1, 5, n), longest)
    label, loss = rng.integers(0, 3, n), rng.gamma(2, size=n)
    loss += lengths / 40  # long texts are harder: what counts texts differs from what counts tokens
    strength = np.linspace(0, 1.5, WIDTH)
    own = rng.normal(size=(n, WIDTH))
    rows = [
        own[i] + strength * ((label[i] == 1) + 0.4 * loss[i]) + rng.normal(size=(size, WIDTH)) * (1 + strength)
        for i, size in enumerate(lengths)
    ]
    return (
        [np.maximum(x, 0).astype(np.float32) if i % 2 else x.astype(np.float32) for i, x in enumerate(rows)],
        label,
        loss,
    )


def traced(data, batch_size, *, side="right", calibrate=0, seed=0, bins=16):
    rows, label, loss = data
    tracer = Tracer(Flow(), METRICS, sites=("mlp",), pool="none", bins=bins, statistics=STATISTICS, seed=seed)
    order = [*range(calibrate), *range(len(rows))]
    cuts = [order[i : i + batch_size] for i in range(0, calibrate, batch_size)]
    cuts += [order[calibrate:][i : i + batch_size] for i in range(0, len(rows), batch_size)]
    with tracer, torch.no_grad():
        for k, at in enumerate(cuts):
            if calibrate and k == -(-calibrate // batch_size):
                tracer.calibrate()
            tokens = max(len(rows[i]) for i in at)
            x, mask = torch.full((len(at), tokens, WIDTH), torch.nan), torch.zeros(len(at), tokens)
            for row, i in enumerate(at):
                where = slice(len(rows[i])) if side == "right" else slice(tokens - len(rows[i]), tokens)
                x[row, where], mask[row, where] = torch.from_numpy(rows[i]), 1
            tracer.expect(mask)
            tracer._model(x)
            tracer.step(label=torch.from_numpy(label[at]), loss=torch.from_numpy(loss[at]))
    return tracer.compute()


def of_all_tokens(data):
    """Spearman's rho and AUROC of every token, by scipy."""
    rows, label, loss = data
    x, times = np.concatenate(rows), [len(row) for row in rows]
    label, loss = np.repeat(label, times), np.repeat(loss, times)
    columns = np.stack([label == 0, label == 1, label == 2, loss], 1).astype(float)
    ranks = stats.rankdata(x, axis=0)
    rho = np.corrcoef(ranks.T, stats.rankdata(columns, axis=0).T)[:WIDTH, WIDTH:]
    area = np.full_like(rho, np.nan)
    for c in range(3):
        one = columns[:, c] == 1
        area[:, c] = (ranks[one].mean(0) - (one.sum() + 1) / 2) / (~one).sum()
    return rho, area


def test_few_tokens_are_all_ranked():
    data = texts(12, 0)
    n = sum(map(len, data[0]))
    scores = traced(data, 5, bins=128)
    assert scores.n_ranked == scores.n_observations == n <= 2048
    rho, area = of_all_tokens(data)
    np.testing.assert_allclose(scores.spearman, rho, atol=1e-9)
    np.testing.assert_allclose(scores.auroc, area, atol=1e-9)
    assert (scores.spearman_bound < 1e-9).all()


@pytest.mark.parametrize(("n", "calibrate", "rate"), [(120, 0, None), (900, 0, 1 / 32), (900, 30, 1 / 32)])
def test_bounds_hold_what_a_sample_is_off(n, calibrate, rate):
    """At least 95 % of the neurons lie within their bound of 99 % confidence, in each of 8 runs and 99 % of all."""
    inside = []
    for seed in range(8):
        data = texts(n, seed)
        scores = traced(data, 40, calibrate=calibrate, seed=seed)
        assert scores.n_observations == sum(map(len, data[0]))
        if rate is None:
            assert 128 < scores.n_ranked <= 256
        else:
            assert abs(scores.n_ranked / scores.n_observations / rate - 1) < 0.12
        rho, area = of_all_tokens(data)
        off = np.abs(scores.spearman - rho) <= scores.spearman_bound
        of_area = np.abs(scores.auroc - area)[:, :3] <= scores.auroc_bound[:, :3]
        assert off.mean() >= 0.95
        assert of_area.mean() >= 0.95
        inside.append((off.mean() + of_area.mean()) / 2)
        assert np.median(scores.spearman_bound) < 5 / np.sqrt(scores.n_ranked)  # and not wide
    assert np.mean(inside) >= 0.985


def test_the_sample_depends_neither_on_batches_nor_on_padding():
    data = texts(150, 3)
    want = traced(data, 150)
    for size, side in ((7, "right"), (1, "left"), (40, "left")):
        got = traced(data, size, side=side)
        assert got.n_ranked == want.n_ranked
        np.testing.assert_allclose(got.spearman, want.spearman, atol=1e-12)
    other = traced(data, 40, seed=1)
    assert not np.allclose(other.spearman, want.spearman, atol=1e-3)


def test_edges_that_no_longer_fit_are_named():
    rows, label, loss = texts(400, 5)
    rows = [x + 40 * (i >= 60) * (np.arange(WIDTH) < 3) for i, x in enumerate(rows)]
    with pytest.warns(RuntimeWarning, match="stale_edges"):
        scores = traced(([x.astype(np.float32) for x in rows], label, loss), 40, calibrate=60)
    assert {0, 1, 2} <= set(scores.reasons["stale_edges"]) != set(range(WIDTH))


def test_every_token_is_sampled_alike():
    """Over 40 seeds tokens of short and of long texts, early and late ones, are ranked equally often."""
    from skillfast.statistics.tokens import TokenSample

    lengths = np.array([3] * 100 + [90] * 10)
    seen = np.zeros((len(lengths), 90))
    for seed in range(40):
        sample = TokenSample(seed, capacity=256)
        for part in np.array_split(np.arange(len(lengths)), 7):
            mask = np.arange(90) < lengths[part][:, None]
            hashes = sample.hashes(mask)
            stay = sample.make_room(hashes[mask])
            sample.kept = np.concatenate([sample.kept[stay], hashes[mask & sample.below(hashes)]])
            sample.examples += len(part)
        assert sample.rate == 1 / 8
        kept = set(sample.kept.tolist())
        again = TokenSample(seed, capacity=256)
        mask = np.arange(90) < lengths[:, None]
        seen += np.vectorize(kept.__contains__)(again.hashes(mask)) & mask
    for rows in (slice(100), slice(100, None)):
        here = lengths[rows].sum() * 40
        assert abs(seen[rows].sum() - here / 8) < 4.5 * np.sqrt(here * 7) / 8


@pytest.mark.parametrize("prevalence", [0.5, 0.05])
def test_influences_give_the_errors_of_single_rows(prevalence):
    """The standard errors of rho and AUROC over 3,000 samples of independent rows."""
    rng = np.random.default_rng(0)
    n, bins, trials = 400, 32, 3000
    y = rng.random((trials, n)) < prevalence
    loss = rng.normal(size=(trials, n))
    x = y * 0.8 + 0.6 * loss * (loss > 0) + rng.normal(size=(trials, n))
    rank = stats.rankdata(x, axis=1)
    rho = [np.corrcoef(a, b)[0, 1] for a, b in zip(rank, y, strict=True)]
    rho_loss = [np.corrcoef(a, b)[0, 1] for a, b in zip(rank, stats.rankdata(loss, axis=1), strict=True)]
    ones = y.sum(1)
    area = ((rank * y).sum(1) / ones - (ones + 1) / 2) / (n - ones)
    some = slice(200)
    bin_of = ((rank[some] - 1) * bins // n).astype(int)
    level = ((stats.rankdata(loss[some], axis=1) - 1) * 8 // n).astype(int)
    occupancy, positives, sums = (np.zeros((200, bins, *more)) for more in ((), (1,), (8,)))
    trial = np.arange(200)[:, None]
    np.add.at(occupancy, (trial, bin_of), 1)
    np.add.at(positives, (trial, bin_of, 0), y[some])
    np.add.at(sums, (trial, bin_of, level), UNIT)
    tables = [torch.from_numpy(array) for array in (positives, occupancy, sums)]
    of_rho, of_area = label_sampling(tables[0], tables[1], 0.0)
    of_loss = continuous_sampling(tables[2], tables[1], 0.0)
    fewer = np.minimum(ones, n - ones)[some]
    for reach, freedom, values in (
        (of_rho[:, 0], fewer - 1, rho), (of_area[:, 0], fewer - 1, area), (of_loss, n - 1, rho_loss)
    ):  # fmt: skip
        error = reach.numpy() / stats.t.ppf(0.995, freedom)
        assert 0.93 < np.median(error) / np.std(values) < 1.12


def test_influences_are_derivatives_of_rho_by_the_weight_of_a_row():
    """By finite differences of rho, the correlation of middle ranks, of a table whose weights are moved to one cell."""
    counts = np.random.default_rng(1).integers(1, 9, (6, 8)).astype(float)

    def rho(joint):
        u, v = ((p.cumsum() - p / 2) - 0.5 for p in (joint.sum(1), joint.sum(0)))
        of_u, of_v = joint.sum(1) @ u**2, joint.sum(0) @ v**2
        return (u @ joint @ v) / np.sqrt(of_u * of_v)

    joint, variance, step = counts / counts.sum(), 0.0, 1e-5
    for cell in np.ndindex(*joint.shape):
        moved = np.zeros_like(joint)
        moved[cell] = 1
        up, down = (rho((1 - e) * joint + e * moved) for e in (step, -step))
        variance += joint[cell] * ((up - down) / (2 * step)) ** 2
    n = torch.tensor([counts.sum()])
    want = _reach(torch.tensor([variance]), n, 0.25)
    table = torch.from_numpy(counts)[None]
    torch.testing.assert_close(continuous_sampling(UNIT * table, table.sum(2), 0.25), want, rtol=1e-6, atol=0)
    assert not continuous_sampling(UNIT * table, table.sum(2), 1.0).any()  # nothing was left out


def test_how_many_were_ranked_is_kept(tmp_path):
    scores = traced(texts(60, 0), 20)
    assert scores.n_ranked < scores.n_observations
    scores.save(tmp_path)
    assert NeuronScores.load(tmp_path).n_ranked == scores.n_ranked
    frame = scores.to_dataframe(metric="loss")
    counts = {name: set(part["n"]) for name, part in frame.groupby("statistic")}
    assert counts["pearson"] == {scores.n_observations}
    assert counts["spearman"] == counts["auroc_bound"] == {scores.n_ranked}
    bare = skillfast.correlate(
        np.random.default_rng(0).normal(size=(50, 3)), {"y": np.arange(50.0)}, statistics=["pearson"]
    )
    assert bare.n_ranked is None
