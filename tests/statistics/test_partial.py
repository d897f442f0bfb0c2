"""Partial correlations against residuals of a regression in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import one_line

import skillfast
from skillfast.errors import ArgumentError
from skillfast.metrics import Categorical, Continuous
from skillfast.models.sites import Site
from skillfast.statistics.partial import partial_correlations

N, D, CLASSES = 3000, 9, 4
METRICS = {"label": Categorical(CLASSES), "loss": Continuous(), "length": Continuous()}


def made() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Neurons and a loss that follow the label and the length, and something of their own."""
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, CLASSES - 1, (N,), generator=g)  # the last class never comes
    length, own = (torch.randn(N, generator=g, dtype=torch.float64) for _ in range(2))
    loss = 2.0 * label + length + 0.5 * own + 300
    x = torch.randn(N, D, generator=g)
    x[:, 0] += 3 * label
    x[:, 1] += (label == 1).float() - 2.0 * own.float()
    x[:, 2] = x[:, 2] * 0.1 + length.float() + 1000
    x[:, 3] = 1.0
    x[:, 4] = 2.0 * label + 5
    return x, {"label": label, "loss": loss, "length": length}


def residuals(values: np.ndarray, on: np.ndarray) -> np.ndarray:
    """What a regression with an intercept leaves of columns [n, k]."""
    design = np.column_stack([np.ones(len(on)), on])
    return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]


def reference(x: torch.Tensor, y: np.ndarray, on: np.ndarray) -> np.ndarray:
    """r [D] of neurons and a column after a regression on others, in float64."""
    a, b = residuals(x.double().numpy(), on), residuals(y[:, None], on)[:, 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a.T @ b) / np.sqrt((a**2).sum(0) * (b**2).sum())


X, VALUES = made()
ONE_HOT = torch.nn.functional.one_hot(VALUES["label"], CLASSES).double().numpy()
LENGTH, LOSS = VALUES["length"].numpy(), VALUES["loss"].numpy()
USUAL = [0, 1, 2, 5, 6, 7, 8]  # neurons that are neither constant nor the label


def accumulated(parts: int = 1) -> skillfast.NeuronScores:
    """Scores of the data, of shards with shifts of their own that are merged."""
    shards = []
    for rows in torch.arange(N).chunk(parts):
        shards.append(skillfast.NeuronStatistics(D, METRICS, ("pearson",), buffer_rows=256))
        shards[-1].update(X[rows], {name: values[rows] for name, values in VALUES.items()})
    for shard in shards[1:]:
        shards[0].merge(skillfast.NeuronStatistics.from_state_dict(shard.state_dict()))
    return shards[0].compute()


@pytest.mark.filterwarnings("ignore:some scores")
@pytest.mark.parametrize("parts", [1, 3])
def test_partial_correlations_are_those_of_residuals(parts):
    scores = accumulated(parts)
    within = scores.given("label")
    assert within.columns == ("loss", "length")
    assert within.conditioned_on == ("label",)
    for i, y in enumerate((LOSS, LENGTH)):
        np.testing.assert_allclose(within.pearson[USUAL, i], reference(X, y, ONE_HOT)[USUAL], atol=2e-5)
    assert scores.pearson[0, CLASSES] > 0.7  # which is the label's
    assert abs(within.pearson[0, 0]) < 0.05
    assert within.pearson[1, 0] < -0.35
    both = scores.given("label", "length").pearson[:, 0]
    expected = reference(X, LOSS, np.column_stack([ONE_HOT, LENGTH]))
    np.testing.assert_allclose(both[USUAL], expected[USUAL], atol=2e-5)
    np.testing.assert_allclose(within.given("length").pearson[USUAL, 0], both[USUAL], atol=1e-9)
    other = scores.given("loss")
    assert other.columns[:CLASSES] == scores.columns[:CLASSES]
    np.testing.assert_allclose(other.pearson[USUAL, 1], reference(X, ONE_HOT[:, 1], LOSS[:, None])[USUAL], atol=2e-5)


@pytest.mark.filterwarnings("ignore:some scores")
def test_what_follows_from_what_is_given_is_named():
    within = accumulated().given("label")
    assert within.reasons["constant_neuron"] == (3,)
    assert within.reasons["explained_neuron"] == (4,)
    assert np.isnan(within.pearson[[3, 4]]).all()
    assert np.isfinite(within.pearson[USUAL]).all()
    assert "explained_metric" not in within.reasons
    values = {**VALUES, "twice": 2 * VALUES["length"] + 1}
    found = skillfast.correlate(X, values, {**METRICS, "twice": Continuous()}, statistics=("pearson",))
    given = found.given("length")
    assert given.reasons["explained_metric"] == ("twice",)
    assert np.isnan(given.pearson[:, given.columns.index("twice")]).all()
    assert np.isfinite(given.pearson[USUAL, given.columns.index("loss")]).all()


def test_columns_correlate_with_each_other_as_in_one_matrix():
    """Two labels, a score between them: only one label's products are known without a sum."""
    g = torch.Generator().manual_seed(3)
    values = {"few": torch.randint(3, (500,), generator=g), "loss": torch.randn(500, generator=g)}
    values["many"] = (values["few"] + torch.randint(3, (500,), generator=g)) % 5
    metrics = {"few": Categorical(3), "loss": Continuous(), "many": Categorical(5)}
    scores = skillfast.correlate(torch.randn(500, 2, generator=g), values, metrics, statistics=("pearson",))
    few, many = (torch.nn.functional.one_hot(values[name]).double() for name in ("few", "many"))
    columns = torch.cat([few, values["loss"].double()[:, None], many], 1)
    np.testing.assert_allclose(scores.between, np.corrcoef(columns.T.numpy()), atol=1e-12)


@pytest.mark.filterwarnings("ignore:some scores")
def test_a_constant_column_correlates_with_none():
    """Its sums leave what rounding does of a variance, about shifts that differ by rounding."""
    metrics = {"fixed": Continuous(), "loss": Continuous()}
    counted = skillfast.NeuronStatistics(1, metrics, ("pearson",))
    counted.update(torch.randn(70, 1), {"fixed": torch.full((70,), 1234.567), "loss": torch.randn(70)})
    counted.state.moments.shift_y += 1e-9
    counted.state.moments.sum_y -= 70e-9
    between = counted.compute().between
    assert np.isnan(between[0]).all() & np.isnan(between[:, 0]).all()
    assert between[1, 1] == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:some scores")
def test_a_label_of_very_many_classes_costs_no_square_of_them():
    counted = skillfast.NeuronStatistics(2, {"label": Categorical(4096), "loss": Continuous()}, ("pearson",))
    counted.update(torch.randn(9, 2), {"label": torch.arange(9), "loss": torch.randn(9)})
    assert counted.state.nbytes < 8 * 4097 * 10
    scores = counted.compute()
    assert scores.between is None
    assert "expected at most 4,096 columns, got 4,097" in one_line(ArgumentError, scores.given, "label")


@pytest.mark.filterwarnings("ignore:some scores")
def test_rounding_is_no_direction_of_the_classes_that_add_up():
    scores = accumulated()
    given = np.arange(len(scores.columns)) < CLASSES
    rounding = np.random.default_rng(0).normal(scale=3e-14, size=scores.between.shape)
    found = partial_correlations(scores.pearson, scores.between + rounding + rounding.T, given)
    np.testing.assert_allclose(found.neurons[USUAL, 0], reference(X, LOSS, ONE_HOT)[USUAL], atol=2e-5)
    assert not found.explained_neurons[USUAL].any()


class Block(torch.nn.Module):
    """A block of one MLP, over tokens [batch, tokens, 4]."""

    def __init__(self):
        super().__init__()
        self.skillfast_sites = {"blocks.0.mlp": "down"}
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("per_token", [True, False])
def test_tokens_that_are_observations_are_counted_as_rows_are(per_token):
    model, g = Block().eval(), torch.Generator().manual_seed(1)
    x = torch.randn(24, 5, 4, generator=g)
    mask = torch.rand(24, 5, generator=g) < 0.8
    loss, length = (torch.randn(24, 5, generator=g, dtype=torch.float64) for _ in range(2))
    loss = loss + length + x[..., 0]
    if not per_token:  # told of each example, after the forward
        loss, length = loss[:, :1].expand(-1, 5), length[:, :1].expand(-1, 5)

    def forward(model, rows):
        values = {"loss": loss[rows], "length": length[rows]}
        return model(x[rows]), values if per_token else {name: value[:, 0] for name, value in values.items()}

    scores = skillfast.trace(
        model,
        [torch.arange(24)[i : i + 8] for i in range(0, 24, 8)],
        {"loss": Continuous(), "length": Continuous()},
        pool="none",
        statistics=("pearson",),
        forward=forward,
        mask=lambda rows: mask[rows],
    )
    with torch.inference_mode():
        neurons = model.up(x).relu()[mask]
    y, z = loss[mask].numpy(), length[mask].numpy()
    np.testing.assert_allclose(scores.between, np.corrcoef(y, z), atol=1e-9)
    expected = reference(neurons, y, z[:, None])
    np.testing.assert_allclose(scores.given("length").pearson[:6, 0], expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:some scores")
def test_a_file_keeps_what_partial_correlations_need(tmp_path):
    scores = accumulated()
    scores.save(tmp_path)
    loaded = skillfast.NeuronScores.load(tmp_path)
    np.testing.assert_array_equal(loaded.given("label").pearson, scores.given("label").pearson)
    loaded.given("label").save(tmp_path)
    assert skillfast.NeuronScores.load(tmp_path).conditioned_on == ("label",)


@pytest.mark.filterwarnings("ignore:some scores")
@pytest.mark.parametrize("names", [(), ("nothing",), ("label", "loss", "length")])
def test_what_was_not_traced_cannot_be_given(names):
    text = one_line(ArgumentError, accumulated().given, *names)
    assert "given: expected some of label, loss, length and not all, got " in text


def test_ranks_alone_have_no_partial_correlation():
    found = skillfast.correlate(X[:100, :2], {"a": LENGTH[:100], "b": LOSS[:100]}, statistics=("auroc", "spearman"))
    assert found.between is None
    assert "trace with pearson" in one_line(ArgumentError, found.given, "a")


def test_units_of_experts_whose_tokens_differ_have_no_partial_correlation():
    """The columns correlate over all tokens, and over those that an expert got in another way."""
    x, values = made()
    with pytest.warns(RuntimeWarning, match="constant_neuron"):
        whole = skillfast.correlate(x, values, METRICS, statistics=["pearson"])
    mlp, experts = Site("blocks.0.mlp", "mlp", 0, "a", 3), Site("blocks.0.experts", "expert", 0, "b", 6, experts=2)
    sites = dataclasses.replace(whole, sites=(mlp, experts))
    known, routed = (each.given("label") for each in (sites, dataclasses.replace(sites, n_routed=np.full(D, N))))
    assert np.isfinite(known.pearson[[0, 1, 2, 5, 6, 7, 8]]).all()
    np.testing.assert_array_equal(routed.pearson[:3], known.pearson[:3])
    assert np.isnan(routed.pearson[3:]).all()
