"""Auxiliary metrics against float64 references."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from conftest import one_line
from scipy import special, stats

from skillfast import Binary, Categorical, Continuous, metrics
from skillfast.errors import ArgumentError


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64])
def case(request):
    """Logits of a dtype, labels, and the same logits for numpy."""
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(200, 7, generator=g) * 4).to(request.param)
    labels = torch.randint(0, 7, (200,), generator=g)
    return logits, labels, logits.double().numpy()


def test_metrics_equal_float64_references(case):
    logits, labels, x = case
    y = labels.numpy()
    log_p = special.log_softmax(x, 1)
    rows = np.arange(len(y))
    others = np.where(np.arange(7) == y[:, None], -np.inf, x)
    want = {
        "label": y,
        "correct": x.argmax(1) == y,
        "confidence": np.exp(log_p).max(1),
        "loss": -log_p[rows, y],
        "margin": x[rows, y] - others.max(1),
        "entropy": stats.entropy(np.exp(log_p), axis=1),
    }
    assert list(want) == list(metrics.FUNCTIONS)
    for name, function in metrics.FUNCTIONS.items():
        got = function(logits, labels)
        assert got.shape == (200,)
        assert got.dtype not in (torch.bfloat16, torch.float16), name
        np.testing.assert_allclose(got.double(), want[name], rtol=1e-5, atol=2e-6, err_msg=name)
    assert (want["margin"] > 0).sum() == want["correct"].sum()


def test_an_impossible_class_adds_no_entropy():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -torch.inf, -torch.inf]])
    torch.testing.assert_close(metrics.entropy(logits, torch.zeros(2, dtype=torch.long)), torch.tensor([0.69314718, 0]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_log_probabilities_are_those_of_the_next_token(case, side):
    logits = case[0][:40].reshape(4, 10, 7)
    x = logits.double().numpy()
    ids = torch.randint(0, 7, (4, 10), generator=torch.Generator().manual_seed(1))
    lengths = [10, 7, 2, 1]
    mask = torch.zeros(4, 10, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, -n:] = side == "left"
        mask[row, :n] |= side == "right"
    values, valid = metrics.token_log_probabilities(logits, ids, mask)
    assert valid.sum(1).tolist() == [9, 6, 1, 0]
    log_p = special.log_softmax(x, 2)
    for row, n in enumerate(lengths):
        first = 10 - n if side == "left" else 0
        places = range(first, first + n - 1)
        assert valid[row].nonzero().flatten().tolist() == list(places)
        for t in places:
            assert float(values[row, t]) == pytest.approx(log_p[row, t, ids[row, t + 1]], rel=1e-5, abs=1e-6)
        assert not values[row][~valid[row]].any()
    got = metrics.mean_log_probability(logits[:3], ids[:3], mask[:3])
    np.testing.assert_allclose(got, (values[:3].double().sum(1) / torch.tensor([9, 6, 1])), rtol=1e-6)
    text = one_line(ArgumentError, metrics.mean_log_probability, logits, ids, mask)
    assert "expected at least two tokens each" in text


def test_without_a_mask_every_token_counts():
    logits, ids = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    values, valid = metrics.token_log_probabilities(logits, ids)
    assert valid.tolist() == [[True] * 4 + [False]] * 2
    want = logits.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    np.testing.assert_allclose(values[:, :-1], want, rtol=1e-5)
    assert "expected [batch, tokens, vocabulary]" in one_line(
        ArgumentError, metrics.token_log_probabilities, logits[:, 0], ids
    )


def surprise(logits, labels):
    return logits.amax(1) - logits.mean(1)


def is_long(logits, labels):
    return labels > 1


is_long.metric = Binary()


@pytest.fixture
def their_module(monkeypatch):
    module = types.ModuleType("their_metrics")
    module.surprise, module.is_long, module.number = surprise, is_long, 3
    module.bad = lambda logits, labels: logits
    module.odd = lambda logits, labels: labels
    module.odd.metric = "binary"
    monkeypatch.setitem(sys.modules, "their_metrics", module)


def test_metrics_are_chosen_by_name_function_and_column(their_module):
    columns = {"length": Continuous(), "genre": Categorical(["a", "b"])}
    wanted = ["label", "confidence", "their_metrics:is_long", surprise, "column:length", "column:genre"]
    chosen = metrics.parse_metrics(wanted, ["no", "yes"], columns)
    assert {name: metric.kind for name, metric in chosen.items()} == {
        "label": Categorical(["no", "yes"]), "confidence": Continuous(), "is_long": Binary(),
        "surprise": Continuous(), "length": Continuous(), "genre": Categorical(["a", "b"]),
    }  # fmt: skip
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    data = {"length": torch.arange(6.0), "genre": torch.zeros(6, dtype=torch.long)}
    got = {name: metric.values(logits, labels, data) for name, metric in chosen.items()}
    torch.testing.assert_close(got["surprise"], logits.amax(1) - logits.mean(1))
    assert got["is_long"].tolist() == [False, False, True] * 2
    assert got["length"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (
            ["labels"],
            "expected one of label, correct, confidence, loss, margin, entropy, token_log_probability, module:function",
        ),
        ([], "metrics: expected some of label"),
        (["loss", "loss"], "got 'loss' twice"),
        (["column:size"], "expected a column that was read (length), got 'size'"),
        (["their_metrics:none"], "got AttributeError"),
        (["not_a_module_at_all:f"], "got ModuleNotFoundError"),
        (["their_metrics:number"], "expected a function, got int"),
        (["their_metrics:odd"], "in its attribute `metric`, got str"),
    ],
)
def test_metrics_that_mean_nothing_are_refused(their_module, wanted, words):
    assert words in one_line(ArgumentError, metrics.parse_metrics, wanted, ["no", "yes"], {"length": Continuous()})


def test_a_function_that_gives_something_else_is_refused(their_module):
    chosen = metrics.parse_metrics(["their_metrics:bad"], ["no", "yes"])["bad"]
    logits, labels = torch.randn(6, 3), torch.zeros(6, dtype=torch.long)
    assert "expected 6 values, one per example, got shape [6, 3]" in one_line(
        ArgumentError, chosen.values, logits, labels
    )
