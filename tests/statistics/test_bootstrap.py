from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from skillfast import Binary, Categorical, Continuous, NeuronStatistics, Tracer
from skillfast.errors import ArgumentError
from skillfast.statistics import bootstrap

# Warnings of what has no score have tests of their own.
pytestmark = pytest.mark.filterwarnings("ignore:some scores are not defined")

METRICS = {"label": Categorical(3), "loss": Continuous()}


def sample(n, width=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 3, (n,), generator=g)
    x = torch.randn(n, width, generator=g) + 0.5 * (label == 1)[:, None]
    return x, {"label": label, "loss": torch.randn(n, generator=g) + 0.3 * x[:, 0]}


def test_weights_are_poisson_and_reproducible():
    w = bootstrap.weights(3, torch.arange(20_000), 16).numpy()
    assert np.array_equal(w, bootstrap.weights(3, torch.arange(20_000), 16))
    assert not np.array_equal(w, bootstrap.weights(4, torch.arange(20_000), 16))
    bits = bootstrap.mix(3, np.arange(20_000)[:, None], np.arange(16))  # by NumPy's whole numbers without a sign
    assert np.array_equal(w, stats.poisson(1).ppf(bits * 2.0**-64))
    counts = np.bincount(w.astype(int).ravel(), minlength=8)[:8]
    expected = stats.poisson(1).pmf(np.arange(8)) * w.size
    assert stats.chisquare(counts[:6], expected[:6] * counts[:6].sum() / expected[:6].sum()).pvalue > 1e-3
    assert np.abs(np.corrcoef(w.T) - np.eye(16)).max() < 0.04  # replicates are independent
    assert abs(np.corrcoef(w[:-1, 0], w[1:, 0])[0, 1]) < 0.03  # and so are neighbours


def test_replicates_equal_weighted_correlations():
    x, values = sample(700)
    acc = NeuronStatistics(5, METRICS, n_bootstrap=12, seed=7, buffer_rows=64)
    for index in torch.arange(700).split(50):
        acc.update(x[index], {k: v[index] for k, v in values.items()}, groups=index)
    acc.compute()
    w = bootstrap.weights(7, torch.arange(700), 12).numpy()
    y = np.column_stack([torch.nn.functional.one_hot(values["label"], 3), values["loss"]])
    r = acc.state.replicates.pearson(slice(0, 5)).numpy()
    for b in range(12):
        cov = np.cov(np.column_stack([x.double(), y]).T, fweights=w[:, b].astype(int))
        sd = np.sqrt(np.diag(cov))
        np.testing.assert_allclose(r[b], (cov / np.outer(sd, sd))[:5, 5:], atol=1e-6)


@pytest.mark.slow
def test_the_interval_covers_and_p_is_uniform():
    """Correlations of 0.3 with a continuous metric and 0 with a binary one, 300 rows, 400 neurons at a time."""
    rho, n, held, p = 0.3, 300, [], []
    for trial in range(12):
        g = torch.Generator().manual_seed(trial)
        y = torch.randn(n, generator=g)
        x = rho * y[:, None] + (1 - rho**2) ** 0.5 * torch.randn(n, 400, generator=g)
        acc = NeuronStatistics(400, {"y": Continuous(), "coin": Binary()}, ("pearson",), n_bootstrap=64, seed=trial)
        acc.update(x, {"y": y, "coin": torch.rand(n, generator=g) < 0.5})
        scores = acc.compute()
        held.append(((scores.pearson_low[:, 0] <= rho) & (rho <= scores.pearson_high[:, 0])).mean())
        p.append(scores.pearson_p[:, 1])
    # Neurons of one trial share their metric, so trials are what averages.
    assert 0.93 <= np.mean(held) <= 0.97
    assert 0.03 <= np.mean(np.concatenate(p) < 0.05) <= 0.07


def test_groups_keep_the_tokens_of_an_example_together():
    """50 examples of 20 equal tokens hold as much evidence as 50 observations, not as 1,000."""
    x, values = sample(50)
    tokens = torch.arange(50).repeat_interleave(20)
    plain = NeuronStatistics(5, METRICS, ("pearson",), n_bootstrap=200)
    plain.update(x, values)
    acc, wrong = (NeuronStatistics(5, METRICS, ("pearson",), n_bootstrap=200) for _ in range(2))
    acc.update(x[tokens], {k: v[tokens] for k, v in values.items()}, groups=tokens)
    wrong.update(x[tokens], {k: v[tokens] for k, v in values.items()})
    width = [np.mean(s.pearson_high - s.pearson_low) for s in (a.compute() for a in (plain, acc, wrong))]
    assert width[1] == pytest.approx(width[0], rel=0.02)  # the same groups, the same weights
    assert width[2] < 0.35 * width[0]


@pytest.mark.parametrize("n", [300, 5000])
def test_shards_merges_and_saved_states_agree(tmp_path, n):
    x, values = sample(n)
    index = torch.arange(n)
    whole = NeuronStatistics(5, METRICS, n_bootstrap=16, bins=16)
    whole.update(x, values, groups=index)
    a, b = whole.like(), whole.like()
    a.update(x[: n // 3], {k: v[: n // 3] for k, v in values.items()}, groups=index[: n // 3])
    a.save(tmp_path)
    a = NeuronStatistics.load(tmp_path)
    b.update(x[n // 3 :], {k: v[n // 3 :] for k, v in values.items()}, groups=index[n // 3 :])
    a.merge(b)
    got, want = a.compute(), whole.compute()
    for name in ("pearson_low", "pearson_high", "pearson_q"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=1e-5)


def test_shards_have_weights_of_their_own():
    acc = NeuronStatistics(5, METRICS, ("pearson",), n_bootstrap=8)
    x, values = sample(10)
    shards = [acc.like(), acc.like()]
    for shard in shards:
        shard.update(x, values)
    assert not torch.equal(*(shard.state.buffer.values[:10, -1] for shard in shards))
    assert not torch.equal(*(shard.compute() and shard.state.replicates.count for shard in shards))


def test_shards_of_one_stream_are_refused():
    x, values = sample(10)
    acc = NeuronStatistics(5, METRICS, ("pearson",), n_bootstrap=8)
    copies = [NeuronStatistics.from_state_dict(acc.state_dict()) for _ in range(2)]
    for copy in copies:
        copy.update(x, values)
    with pytest.raises(ArgumentError, match="got two of one stream; make each with like"):
        copies[0].merge(copies[1])


def test_adjusted_p_is_benjamini_and_hochbergs():
    x, values = sample(400)
    acc = NeuronStatistics(5, METRICS, ("pearson",), n_bootstrap=64)
    x[:, 3] = 1.0
    acc.update(x, values)
    scores = acc.compute()
    known = np.isfinite(scores.pearson_p)
    assert not known[3].any()
    assert known.sum() == 16
    np.testing.assert_allclose(scores.pearson_q[known], stats.false_discovery_control(scores.pearson_p[known]))
    assert scores.pearson_q[0, 3] < 0.01 < scores.pearson_q[1, 3]


def test_adjusted_p_does_not_depend_on_how_neurons_are_grouped(vit, batches):
    """With tokens as observations the classifier counts by itself, as the neurons of another device do."""
    tracer = Tracer(vit, {"label": Categorical(5)}, pool="none", statistics=("pearson",), n_bootstrap=16)
    with tracer, torch.no_grad():
        for x, y in batches:
            vit(x)
            tracer.step(label=y)
    scores = tracer.compute()
    known = np.isfinite(scores.pearson_p)
    np.testing.assert_allclose(scores.pearson_q[known], stats.false_discovery_control(scores.pearson_p[known]))


@pytest.mark.parametrize(("name", "most"), [("n_neurons", 2**40), ("n_bootstrap", 2**16), ("buffer_rows", 2**16)])
def test_sizes_that_no_state_has_are_refused_before_they_are_allocated(name, most):
    sizes = {"n_neurons": 5, "n_bootstrap": 8, "buffer_rows": 4, name: most + 1}
    with pytest.raises(ArgumentError, match=f"^{name}: expected at most {most:,}, got {most + 1}; take fewer"):
        NeuronStatistics(sizes.pop("n_neurons"), METRICS, **sizes)
    if name == "buffer_rows":
        assert NeuronStatistics(5, METRICS, buffer_rows=most).settings.buffer_rows == most
    saved = NeuronStatistics(5, METRICS, n_bootstrap=8).state_dict() | {name: 2**62}
    with pytest.raises(ArgumentError, match=f"^{name}: expected at most"):
        NeuronStatistics.from_state_dict(saved)


def test_too_few_replicates_or_wrong_groups_are_refused():
    with pytest.raises(ArgumentError, match="expected at least 8 replicates, got 2"):
        NeuronStatistics(5, METRICS, n_bootstrap=2)
    x, values = sample(4)
    with pytest.raises(ArgumentError, match="groups: expected 4 whole numbers"):
        NeuronStatistics(5, METRICS).update(x, values, groups=[0.5, 1, 2, 3])


def test_the_hash_is_splitmix64s():
    assert int(bootstrap.mix(0)) == 0xE220A8397B1DCDAF  # its first number after the seed 0


def test_observations_without_a_group_are_numbered_on():
    x, values = sample(100)
    whole, parts = (NeuronStatistics(5, METRICS, ("pearson",), n_bootstrap=16) for _ in range(2))
    whole.update(x, values)
    for index in torch.arange(100).split(40):
        parts.update(x[index], {k: v[index] for k, v in values.items()})
    np.testing.assert_allclose(parts.compute().pearson_low, whole.compute().pearson_low, atol=1e-5)


def test_shards_are_numbered_from_one():
    numbering = bootstrap.Numbering(stream=7)
    streams = [numbering.shard().stream for _ in range(2)]
    assert streams == [int(bootstrap.mix(7, number)) >> 1 for number in (1, 2)]
    assert numbering.shards == 2


def test_slices_of_neurons_change_nothing(monkeypatch):
    x, values = sample(60, width=7)
    acc = NeuronStatistics(7, METRICS, ("pearson",), n_bootstrap=8)
    acc.update(x, values)
    want = acc.compute()
    for values_at_once in (1, 3 * 8 * 4):  # one neuron, three neurons
        monkeypatch.setattr(bootstrap, "_SLICE", values_at_once)
        found = acc.compute()
        for name in ("pearson_low", "pearson_high", "pearson_p", "pearson_q"):
            np.testing.assert_allclose(getattr(found, name), getattr(want, name), rtol=1e-12)


def test_every_process_numbers_for_itself(monkeypatch):
    assert bootstrap.Numbering.of_process().stream == 0
    monkeypatch.setattr(bootstrap.dist, "is_initialized", lambda: True)
    streams = []
    for rank in (0, 1, 2):
        monkeypatch.setattr(bootstrap.dist, "get_rank", lambda rank=rank: rank)
        streams.append(bootstrap.Numbering.of_process().stream)
    assert streams[0] == 0
    assert len(set(streams)) == 3


@pytest.mark.parametrize("first", [False, True])
def test_replicates_that_miss_a_rare_label_are_left_out(first):
    """Also where the first buffer holds the label, whose mean then shifts what is summed."""
    x, _ = sample(60)
    rare = torch.arange(60) < 2 if first else torch.arange(60) >= 58
    acc = NeuronStatistics(5, {"rare": Binary()}, ("pearson",), n_bootstrap=64, buffer_rows=20)
    for index in torch.arange(60).split(20):
        acc.update(x[index], {"rare": rare[index]})
    scores = acc.compute()
    z = np.arctanh(acc.state.replicates.pearson(slice(0, 5))[:, :, 0].numpy())
    assert 2 < np.isnan(z[:, 0]).sum() < 32
    reach = stats.t.ppf(0.975, 63) * np.nanstd(z, axis=0, ddof=1)
    np.testing.assert_allclose(scores.pearson_low[:, 0], np.tanh(np.arctanh(scores.pearson[:, 0]) - reach), atol=1e-6)
    np.testing.assert_allclose(scores.pearson_high[:, 0], np.tanh(np.arctanh(scores.pearson[:, 0]) + reach), atol=1e-6)


def test_a_neuron_that_is_the_metric_has_a_finite_interval():
    x = torch.linspace(-1, 1, 64)[:, None].repeat(1, 2) * torch.tensor([1.0, -2.0])
    acc = NeuronStatistics(2, {"y": Continuous()}, ("pearson",), n_bootstrap=50)
    acc.update(x, {"y": x[:, 0]})
    found = acc.compute()
    for name in ("pearson", "pearson_low", "pearson_high"):
        np.testing.assert_allclose(getattr(found, name)[:, 0], [1, -1], atol=1e-6)
    assert (found.pearson_p < 1e-6).all()
