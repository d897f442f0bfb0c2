"""`trace_windows`: each window as if traced alone, what changes along a text and nothing else, and what is refused."""

from __future__ import annotations

import numpy as np
import planted
import pytest
import torch
from scipy import stats

import skillfast
from skillfast.metrics import Categorical, Continuous
from skillfast.statistics.bootstrap import fisher_z
from skillfast.statistics.heterogeneity import heterogeneity
from skillfast.tracing import sampling, windows
from skillfast.tracing.windows import Changes

LABEL = {"label": Categorical(["bad", "good"])}


def batches(n, seed=0, size=64):
    whole = planted.wandering_texts(n, seed)
    return [{name: value[i : i + size] for name, value in whole.items()} for i in range(0, n, size)]


@pytest.fixture(scope="module")
def model():
    return planted.Wanders()


@pytest.fixture(scope="module")
def traced(model):
    return skillfast.trace_windows(model, batches(320), (0, 6, 12), LABEL)


def test_a_skill_that_moves_is_found_and_nothing_else(traced):
    assert traced.windows == ("tokens 0 to 5", "tokens 6 to 11", "tokens from 12")
    changes = traced.changes("label:good")
    assert changes.found() == {"blocks.0.mlp": [0, 1]}
    assert changes.p[2] > 0.05  # the same skill all along
    assert abs(changes.r[0, 0]) > 0.5 > 0.2 > np.abs(changes.r[0, 1:]).max()
    assert np.abs(changes.r[1, 1:]).min() > 0.5 > 0.2 > abs(changes.r[1, 0])
    of_skill = traced.changes("label:good", {"blocks.0.mlp": torch.tensor([2, 1])})
    assert of_skill.unit.tolist() == [2, 1]
    assert of_skill.found() == {"blocks.0.mlp": [1]}
    assert of_skill.q[1] == pytest.approx(2 * changes.p[1])  # of two tests


def test_windows_share_what_stays(traced):
    overlap = traced.overlap("label:good", top=2)
    assert overlap.shared.tolist() == [[2, 1, 1], [1, 2, 2], [1, 2, 2]]
    assert overlap.expected == pytest.approx(np.full((3, 3), 4 / 16))
    assert overlap.p[0] == pytest.approx([1 / 120, 29 / 120, 29 / 120])  # of 16 neurons
    assert overlap.low[0].tolist() == [0] * 3
    assert overlap.high[0].tolist() == [1] * 3


def test_a_window_is_as_traced_alone(model, traced):
    """Texts that end before a window are left out there; of the others the tokens in it count."""
    last = batches(320)
    for batch in last:
        place = batch["attention_mask"].cumsum(1) - 1
        batch["window"] = (place >= 12) & (batch["attention_mask"] == 1)
    long = [{name: value[batch["window"].any(1)] for name, value in batch.items()} for batch in last]

    def forward(model, batch):
        return model(batch["input_ids"], batch["attention_mask"]), {"label": batch["labels"]}

    alone = skillfast.trace(
        model, long, LABEL, statistics=("pearson",), forward=forward, mask=lambda batch: batch["window"]
    )
    found = traced["tokens from 12"]
    assert found.n_observations == sum(len(batch["labels"]) for batch in long) < 320
    assert found.pearson == pytest.approx(alone.pearson, abs=1e-6)
    assert (found.pearson_low < found.pearson).all()
    assert (found.pearson < found.pearson_high).all()


def test_of_several_processes_each_counts_its_own_rows(model, monkeypatch):
    """Rows that are another process's are left out; groups follow the rows' places in all of the data."""

    class EverySecond:
        def __init__(self, loader):
            self.seen = 0

        def next(self, n):
            place = self.seen + torch.arange(n)
            self.seen += n
            return sampling.Rows(place % 2 == 0, place // 2)

    whole = planted.wandering_texts(256, 3)
    whole["labels"] = torch.arange(256) // 2 % 2
    own = [{name: value[i : i + 64 : 2] for name, value in whole.items()} for i in range(0, 256, 64)]
    alone = skillfast.trace_windows(model, own, (0, 6), LABEL)
    monkeypatch.setattr(sampling, "ValidRows", EverySecond)
    read = [{name: value[i : i + 64] for name, value in whole.items()} for i in range(0, 256, 64)]
    found = skillfast.trace_windows(model, read, (0, 6), LABEL)
    assert [scores.n_observations for scores in found.scores] == [128, 128]
    assert found.scores[1].pearson == pytest.approx(alone.scores[1].pearson, abs=1e-6)
    assert found.p == pytest.approx(alone.p, abs=1e-4)


def test_the_same_texts_are_left_out_of_every_window(model, monkeypatch):
    """A text's group is by its place in the data, also in a window that others before it lack."""
    seen = []

    def keep(z, left_out):
        seen.append(left_out)
        return heterogeneity(z, left_out)

    monkeypatch.setattr(windows, "heterogeneity", keep)
    skillfast.trace_windows(model, batches(96), (0, 12), LABEL, groups=8)
    (whole,), neurons = batches(96, size=96), []
    with model.write.register_forward_pre_hook(lambda _, args: neurons.append(args[0].detach())):
        model(whole["input_ids"], whole["attention_mask"])
    last = (whole["attention_mask"].cumsum(1) > 12) & (whole["attention_mask"] == 1)
    there = last.any(1).nonzero()[:, 0]
    assert len(there) < 96
    rows = np.array([neurons[0][i][last[i]].mean(0).numpy() for i in there])
    for group in range(8):
        kept = there.numpy() % 8 != group
        r = np.corrcoef(rows[kept, 1], whole["labels"][there].numpy()[kept])[0, 1]
        assert float(seen[0][group, 1, 1, 1]) == pytest.approx(np.arctanh(r), abs=1e-5)


def test_windows_of_a_function_and_metrics_per_token(model):
    """Turns of a conversation, by their numbers; a value per token counts with its mean over the turn."""
    read = batches(128)
    turns = [(batch["attention_mask"].cumsum(1) - 1) // 4 for batch in read]
    number = {id(batch): torch.where(turn < 2, turn, -1) for batch, turn in zip(read, turns, strict=True)}

    def forward(model, batch):
        evidence = (batch["input_ids"] == 2).double() - (batch["input_ids"] == 1).double()
        return model(batch["input_ids"], batch["attention_mask"]), {"evidence": evidence}

    found = skillfast.trace_windows(
        model, read, lambda batch: number[id(batch)], {"evidence": Continuous()}, names=["first", "second"],
        forward=forward, mask=lambda batch: batch["attention_mask"],
    )  # fmt: skip
    x, y = [], []
    for batch in read:
        turn = (number[id(batch)] == 1) & (batch["attention_mask"] == 1)
        noise = 0.5 * model.noise(batch["input_ids"])[..., 5].double().detach()
        evidence = forward(model, batch)[1]["evidence"]
        x += [float(row[here].mean()) for row, here in zip(noise, turn, strict=True)]
        y += [float(row[here].mean()) for row, here in zip(evidence, turn, strict=True)]
    assert found["second"].pearson[5, 0] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
    assert found["first"].n_observations == 128


def test_values_of_tokens_that_labels_give_are_those_of_the_window(model):
    """Labels of tokens: what `trace` takes over a whole text is taken over each window."""

    class Tagger(planted.Wanders):
        def forward(self, input_ids, attention_mask):
            return self.write(self.noise(input_ids))

    read = batches(64)
    for batch in read:
        batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"] % 2, -100)
    found = skillfast.trace_windows(Tagger(), read, (0, 4), groups=8, classes=2)
    assert found.scores[0].columns == ("correct", "confidence", "loss")
    rows, values = [], []
    for batch in read:
        here = (batch["attention_mask"].cumsum(1) > 4) & (batch["attention_mask"] == 1)
        hidden = Tagger().noise(batch["input_ids"])[..., 7].double().detach()
        confidence = Tagger()(batch["input_ids"], None).softmax(-1).amax(-1).double().detach()
        rows += [float(row[mask].mean()) for row, mask in zip(hidden, here, strict=True)]
        values += [float(row[mask].mean()) for row, mask in zip(confidence, here, strict=True)]
    assert found.scores[1].pearson[7, 1] == pytest.approx(np.corrcoef(rows, values)[0, 1], abs=1e-5)


@pytest.mark.parametrize("heavy", [False, True])
def test_neurons_that_do_not_change_are_rarely_found(heavy):
    """Windows of the same texts, which go together, and one that a third of the texts lacks; 600 neurons of no change.

    With neurons of heavy tails a bootstrap's covariance found up to 27 of 700 in one set of 60 texts.
    """
    rng, n, neurons, windows, groups = np.random.default_rng(5), 80, 600, 3, 40
    text = rng.normal(size=(n, neurons))
    y = torch.arange(n) % 2
    states = []
    for window in range(windows):
        x = 0.6 * text + 0.8 * rng.normal(size=(n, neurons))
        x = (np.exp(x) / 2.16 if heavy else x) + 1.2 * (y.numpy()[:, None] - 0.5)
        here = torch.arange(n) % 3 < (2 if window == 2 else 3)
        state = skillfast.NeuronStatistics(neurons, {"y": Continuous()}, ("pearson",), n_bootstrap=groups)
        state.replicates.leaves_out = True
        state.update(torch.from_numpy(x)[here].float(), {"y": y[here]}, torch.arange(n)[here])
        states.append(state)
    z = torch.stack([torch.from_numpy(state.compute().pearson) for state in states], -1)
    left = torch.stack([state.replicates.pearson(slice(0, neurons)) for state in states], -1)
    _, p = heterogeneity(fisher_z(z), fisher_z(left))
    assert 0.02 < float((p < 0.05).mean()) < 0.075
    assert p.min() > 0.05 / neurons / 5


def test_q_is_the_plain_one_of_independent_windows():
    """With windows that do not depend on each other Q is Cochran's own: weights are inverse variances."""
    rng = np.random.default_rng(0)
    groups, windows = 40, 3
    basis = np.linalg.qr(np.column_stack([np.ones(groups), rng.normal(size=(groups, windows))]))[0][:, 1:]
    errors = np.array([0.1, 0.2, 0.3])
    left = basis * errors / np.sqrt((groups - 1) / groups)  # uncorrelated, jackknife's errors are these
    z = np.array([0.1, 0.5, -0.2])
    weights = errors**-2.0
    expected = (weights * (z - (weights * z).sum() / weights.sum()) ** 2).sum()
    q, _ = heterogeneity(torch.from_numpy(z), torch.from_numpy(left))
    assert float(q) == pytest.approx(expected)
    q, p = heterogeneity(torch.tensor([0.1, 0.2]), torch.zeros(40, 2, dtype=torch.float64))
    assert np.isnan([q, p]).all()  # nothing tells how far they scatter


def test_a_covariance_that_few_groups_make_up_counts_for_less():
    """Of two windows Q is a squared t, whose degrees of freedom are 2 G / (kurtosis - 1), at most G - 1."""
    changes = np.zeros(40)
    changes[:4] = [0.3, -0.1, 0.2, 0.05]
    z, left = torch.tensor([0.2, 0.9], dtype=torch.float64), torch.zeros(40, 2, dtype=torch.float64)
    left[:, 1] = torch.from_numpy(changes)
    apart = changes - changes.mean()
    variance = 39 / 40 * (apart**2).sum()
    freedom = 80 / ((apart**4).mean() / (apart**2).mean() ** 2 - 1)
    q, p = heterogeneity(z, left)
    assert float(q) == pytest.approx(0.49 / variance)
    assert freedom < 5
    assert float(p) == pytest.approx(2 * stats.t.sf(np.sqrt(0.49 / variance), freedom))
    left[:, 1] = torch.tensor([0.1, -0.1]).repeat(20)
    q, p = heterogeneity(z, left)
    assert float(p) == pytest.approx(2 * stats.t.sf(np.sqrt(float(q)), 39))
    three = torch.stack(
        [left[:, 0], left[:, 1], (1 + 1e-7 * torch.arange(40)) * left[:, 1]], 1
    )  # nothing tells how two of them scatter apart
    assert np.isnan(heterogeneity(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), three)).all()


def test_the_jackknife_leaves_groups_out():
    """Replicates are sums without every 10th group; the interval of r is the jackknife's."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(60, 4)).astype(np.float32), rng.normal(size=60)
    state = skillfast.NeuronStatistics(4, {"y": Continuous()}, ("pearson",), n_bootstrap=10)
    state.replicates.leaves_out = True
    state.update(x[:31], {"y": y[:31]}, np.arange(31))
    state.update(x[31:], {"y": y[31:]}, np.arange(31, 60))
    left = np.array([[np.corrcoef(x[keep, i], y[keep])[0, 1] for i in range(4)] for keep in (
        np.arange(60) % 10 != b for b in range(10)
    )])  # fmt: skip
    assert state.replicates.pearson(slice(0, 4))[..., 0].numpy() == pytest.approx(left, abs=1e-6)
    scores, z = state.compute(), np.arctanh(left)
    error = np.sqrt(0.9 * ((z - z.mean(0)) ** 2).sum(0))
    middle = (np.arctanh(scores.pearson_high) + np.arctanh(scores.pearson_low))[:, 0] / 2
    reach = (np.arctanh(scores.pearson_high) - np.arctanh(scores.pearson_low))[:, 0] / 2
    assert middle == pytest.approx(np.arctanh(scores.pearson[:, 0]), abs=1e-6)
    assert reach == pytest.approx(2.2621572 * error, rel=1e-4)  # Student's t with 9 degrees of freedom
    assert state.state.like(torch.device("cpu")).replicates.leaves_out


@pytest.mark.parametrize(
    ("windows", "more", "message"),
    [
        ((0, 0), {}, "windows: expected starts that rise"),
        ((0,), {}, "windows: expected names of two or more"),
        ((0, 4), {"names": ["a", "b", "c"]}, "names: expected one for each of 2 windows"),
        (lambda batch: batch["input_ids"], {}, "windows: expected names of two or more"),
        (lambda batch: batch["input_ids"], {"names": ["a", "b"]}, "windows: expected numbers below 2"),
        (lambda batch: batch["labels"], {"names": ["a", "b"]}, "windows: expected a number for each of"),
        ((0, 4), {"pool": "none"}, "expected a pool of mean, max, last"),
        ((0, 4), {"statistics": ("spearman",)}, "the statistic pearson"),
        ((0, 4), {"groups": 3}, "groups: expected at least twice the 2 windows"),
        ((0, 100), {}, "got none in tokens from 100"),
        ((0, 4), {"forward": lambda m, b: (None, {"label": b["labels"]})}, "expected batches with an attention_mask"),
    ],
)
def test_what_cannot_be_windows_is_refused(model, windows, more, message):
    with pytest.raises(skillfast.SkillfastError, match=message):
        skillfast.trace_windows(model, batches(64), windows, LABEL, **more)


def test_unknown_names_are_refused(traced):
    for call, message in (
        (lambda: traced["x"], "window: expected one of tokens 0 to 5"),
        (lambda: traced.changes("label"), "column: expected one of label:bad, label:good"),
        (lambda: traced.changes("label:bad", {"blocks.0.mlp": [16]}), "neurons: expected some of the traced"),
        (lambda: traced.overlap("label:bad", top=17), "top: expected 1 to 16"),
    ):
        with pytest.raises(skillfast.SkillfastError, match=message):
            call()


def test_changes_at_the_level_itself_are_found():
    changes = Changes(
        "y", ("a", "b"), ("s", "s", "s"), np.arange(3), *[np.zeros(3)] * 3, np.array([0.05, 0.051, np.nan])
    )
    assert changes.found() == {"s": [0]}
    assert changes.found(0.06) == {"s": [0, 1]}


def test_each_site_is_tested_with_its_own_neurons(monkeypatch):
    """Of several sites in one accumulator, and in slices of one: p is that of each site traced alone."""
    vit, (images, labels) = planted.model(), planted.images(48)
    read = [(images[i : i + 16], labels[i : i + 16]) for i in range(0, 48, 16)]
    number = torch.tensor([[0, 0, 1, 1]]).expand(16, -1)

    def traced(sites):
        return skillfast.trace_windows(
            vit, read, lambda batch: number, {"label": Categorical(6)}, names=["top", "bottom"], sites=sites, groups=8
        )

    alone = traced(["blocks.1.mlp"])
    monkeypatch.setattr(windows, "_SLICE", 8 * 6 * 2 * 100)
    both = traced(["blocks.0.mlp", "blocks.1.mlp"])
    assert np.isfinite(alone.p).mean() > 0.5
    assert both.p[256:] == pytest.approx(alone.p, rel=1e-3, nan_ok=True)


def test_ranks_by_window(model):
    """Statistics of ranks come with it: exact ones of each window's rows."""
    found = skillfast.trace_windows(
        model, batches(64), (0, 6), LABEL, statistics=("pearson", "auroc"), groups=8, sites=["mlp"]
    )
    assert found["tokens 0 to 5"].auroc[0, 1] > 0.8
    assert abs(found["tokens from 6"].auroc[0, 1] - 0.5) < 0.15
