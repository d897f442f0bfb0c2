"""Inputs that nobody meant, each with one clear line, and none with a wrong number."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import stats

import skillfast
from skillfast import Binary, Categorical, Condition, Continuous, NeuronStatistics
from skillfast.errors import ArgumentError, DataError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore:some scores are not defined")


def test_an_open_forward_is_no_place_to_compute(vit, batches):
    x, y = batches[0]
    with skillfast.Tracer(vit, {"label": Categorical(5)}) as tracer:
        vit(x)
        tracer.step(label=y)
        vit(x)
        for call in (tracer.compute, tracer.calibrate):
            with pytest.raises(ModelError, match=r"expected step\(\) or discard\(\) after the last forward"):
                call()
        tracer.step(label=y)
        assert tracer.compute().n_observations == 2 * len(y)


def test_shards_without_weights_of_their_own_are_refused():
    def shard():
        acc = NeuronStatistics(2, {"y": Binary()}, ("pearson",), n_bootstrap=8)
        acc.update(torch.randn(10, 2), {"y": torch.arange(10) % 2})
        return acc

    total = NeuronStatistics(2, {"y": Binary()}, ("pearson",), n_bootstrap=8)
    total.merge(shard())
    with pytest.raises(ArgumentError, match="got two of one stream"):
        total.merge(shard())
    total.update(torch.randn(10, 2), {"y": torch.arange(10) % 2})
    groups = total.state.buffer.values[:10, -1]
    assert float(groups.min()) > 10  # not the numbers of the shard that it took


@pytest.mark.parametrize("groups", [2**60 + np.arange(4), [0, 1, 2, np.inf], [0, 1, 2, np.nan]])
def test_groups_that_float64_cannot_tell_apart_are_refused(groups):
    with pytest.raises(ArgumentError, match="whole numbers below 2\\^53"):
        NeuronStatistics(2, {"y": Binary()}).update(torch.zeros(4, 2), {"y": [0, 1, 0, 1]}, groups=groups)


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_few_rows_of_wide_numbers_are_ranked_exactly(dtype):
    g = np.random.default_rng(0)
    x = (10**9 + g.permutation(1000)[:, None]).astype(dtype)
    y = x[:, 0] * 0.001 + g.normal(size=1000)
    scores = skillfast.correlate(x, {"y": y})
    assert scores.spearman[0, 0] == pytest.approx(stats.spearmanr(x[:, 0], y).statistic, abs=1e-12)
    assert scores.pearson[0, 0] == pytest.approx(np.corrcoef(x[:, 0], y)[0, 1], abs=1e-5)


@pytest.mark.parametrize("scale", [1e-23, 1e-30, 1e19, 1e30])
def test_neurons_out_of_float32s_range_are_named(scale):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 2, generator=g)
    y = x[:, 0] + torch.randn(500, generator=g)
    x[:, 1] *= scale
    scores = skillfast.correlate(x, {"y": y})
    assert scores.reasons == {"beyond_float32": (1,)}
    assert np.isnan(scores.pearson[1, 0])
    assert scores.spearman[1, 0] == pytest.approx(stats.spearmanr(x[:, 1], y).statistic, abs=1e-9)


@pytest.mark.parametrize("scale", [1e-46, 1e-35, 1e38, 1e100])
def test_metrics_out_of_float32s_range_are_named(scale):
    x = torch.randn(500, 2)
    y = (x[:, 0].double() + torch.randn(500)) * scale
    scores = skillfast.correlate(x, {"y": y, "other": x[:, 1] * 2})
    assert scores.reasons == {"metric_beyond_float32": ("y",)}
    assert np.isnan(scores.pearson[:, 0]).all()
    assert scores.pearson[1, 1] == pytest.approx(1)


@pytest.mark.parametrize("value", [1 / 3, 0.1, 12345.678, -1e-3])
def test_a_constant_of_float64_is_one(value):
    x = np.column_stack([np.full(50, value), np.arange(50.0)])
    assert skillfast.correlate(x, {"y": np.arange(50) * 0.1}).reasons == {"constant_neuron": (0,)}


def test_a_constant_that_the_calibration_missed_is_one():
    """Squares about a shift that a constant does not meet are rounded to float32, which leaves a variance."""
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(300, generator=g).expand(100, -1), torch.randn(100, 1, generator=g)], 1)
    acc = NeuronStatistics(301, {"y": Continuous()}, ("pearson",))
    rows = torch.randn(50, 301, generator=g) + 3
    acc.calibrate(rows, {"y": torch.randn(50, generator=g)})
    torch.testing.assert_close(acc.state.moments.shift_x, rows.mean(0))
    acc.update(x, {"y": torch.randn(100, generator=g)})
    with pytest.warns(RuntimeWarning, match=r"constant_neuron \(300 neurons\)"):
        scores = acc.compute()
    assert np.isnan(scores.pearson[:300]).all()
    assert np.isfinite(scores.pearson[300])


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"a:0": Continuous(), "a": Categorical(2)}, "expected names without ':'"),
        ({"a:b": Continuous()}, "expected names without ':'"),
        ({"a": Categorical(40_000)}, "expected at most 32000 columns"),
    ],
)
def test_metrics_that_cannot_be_told_apart_are_refused(metrics, words):
    with pytest.raises(ArgumentError, match=words):
        NeuronStatistics(2, metrics)


@pytest.mark.parametrize(
    ("x", "values", "words"),
    [
        (np.zeros((3, 2), complex), {"y": [0, 1, 0]}, "activations: expected real numbers"),
        (np.full((3, 2), None), {"y": [0, 1, 0]}, "values: expected numbers, array-like, got object"),
        ([[1.0], [2.0, 3.0]], {"y": [0, 1, 0]}, "values: expected numbers, array-like, got list"),
        (np.zeros((3, 2)), {"y": np.array(["a", "b", "c"])}, "values: expected numbers, array-like, got <U1"),
        (np.zeros((3, 2)), {"y": [0, 1, np.inf]}, "class indices in"),
    ],
)
def test_what_is_no_number_is_refused(x, values, words):
    with pytest.raises(ArgumentError, match=words):
        NeuronStatistics(2, {"y": Categorical(2)}).update(x, values)


def test_any_array_goes_in():
    import pandas as pd

    x = np.random.default_rng(0).normal(size=(40, 3))
    y = np.arange(40) % 2
    want = skillfast.correlate(x, {"y": y}).pearson
    frame, series = pd.DataFrame(x, index=range(7, 47)), pd.Series(y, index=range(9, 49))
    np.testing.assert_allclose(skillfast.correlate(frame, {"y": series}).pearson, want)
    np.testing.assert_allclose(skillfast.correlate(x[::-1], {"y": y[::-1]}).pearson, want, atol=1e-7)
    np.testing.assert_allclose(skillfast.correlate(x, {"y": y.astype(np.uint16)}).pearson, want)
    assert Categorical(np.int64(3)).classes == ("0", "1", "2")


def test_integers_that_are_no_classes_are_asked_about():
    with pytest.raises(ArgumentError, match="expected class indices below 1000, got 1000000019"):
        skillfast.correlate(np.zeros((20, 2)), {"t": np.arange(20) + 10**9})
    with pytest.raises(ArgumentError, match=r"activations: expected \[n, D\], got shape \[20\]"):
        skillfast.correlate(np.zeros(20), {"t": np.arange(20)})


def test_names_of_step_are_refused(vit):
    for name in ("groups", "mask", "self", "valid"):
        with pytest.raises(ArgumentError, match=rf"expected other names than step\(\) has of its own, got {name}"):
            skillfast.Tracer(vit, {"loss": Continuous(), name: Continuous()})


def test_a_metric_may_be_called_tensor(tmp_path):
    acc = NeuronStatistics(2, {"tensor": Continuous()})
    acc.update(torch.randn(9, 2), {"tensor": torch.randn(9)})
    acc.save(tmp_path)
    np.testing.assert_array_equal(NeuronStatistics.load(tmp_path).compute().pearson, acc.compute().pearson)


def tampered(path, change):
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["skillfast"])
    change(header, tensors)
    save_file(tensors, path, metadata={"skillfast": json.dumps(header)})


@pytest.mark.parametrize(
    "change",
    [
        lambda header, tensors: header.pop("n_neurons"),
        lambda header, tensors: header.pop("table"),
        lambda header, tensors: header["metrics"]["y"].update(type="foo"),
        lambda header, tensors: header["table"].update(dtype="foo"),
        lambda header, tensors: header.update(stream=[1]),
        lambda header, tensors: tensors["comoments/count"].fill_(-5),
        lambda header, tensors: tensors.update({"table/edges": tensors["table/edges"].flip(1).contiguous()}),
        lambda header, tensors: tensors.update({"table/values.y": tensors["table/values.y"][:0]}),
        lambda header, tensors: tensors.pop("table/edges"),
        lambda header, tensors: tensors.update({"replicates/sum_x": tensors["replicates/sum_x"][:, :1].contiguous()}),
    ],
)
def test_tampered_states_are_refused_in_one_line(tmp_path, change):
    acc = NeuronStatistics(2, {"y": Continuous()}, bins=4, n_bootstrap=8)
    for _ in range(3):
        acc.update(torch.randn(50, 2), {"y": torch.randn(50)})
    path = acc.save(tmp_path)
    tampered(path, change)
    with pytest.raises((ArgumentError, DataError)) as caught:
        NeuronStatistics.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ([(torch.zeros(2, 3, 16, 16), torch.tensor([0, 9]))], "labels: expected .* from 0 to 9|got 0 to 9"),
        (
            [(torch.zeros(2, 3, 16, 16), torch.tensor([0, 1]), 3)],
            r"\(images, labels\) or a mapping with labels, got 3 parts",
        ),
        ([torch.zeros(2, 3, 16, 16)], r"got float32 \[2, 3, 16, 16\]"),
    ],
)
def test_batches_of_another_form_are_refused(vit, loader, words):
    with pytest.raises(ArgumentError, match=words):
        skillfast.trace(vit, loader)
    with pytest.raises(ArgumentError, match=words):
        skillfast.sweep(vit, loader, [])


def test_a_forward_without_metrics_is_refused(vit, batches):
    with pytest.raises(ArgumentError, match=r"forward: expected .* got no metrics"):
        skillfast.trace(vit, batches, {"y": Continuous()}, forward=lambda model, batch: (model(batch[0]), {}))


def test_sweeps_take_generators_and_refuse_skills(vit, batches):
    skill = skillfast.Skill("s", {"head": [0]})
    result = skillfast.sweep(vit, iter(batches), (Condition(s) for s in [skill]), classes=5)
    assert result.per_class_accuracy.shape == (1, 5)
    with pytest.raises(ArgumentError, match=r"conditions: expected Condition\(skill\), got Skill"):
        skillfast.sweep(vit, batches, [skill])
    for scale in (1e39, "a"):
        with pytest.raises(ArgumentError, match="scale: expected a finite number"):
            Condition(skill, scale=scale)


def test_neighbours_of_float32_vary_and_what_float64_says_between_them_does_not():
    """Values of float64 are rounded to float32 before they are squared, so that what lies within is no variance."""
    y = torch.randn(200, generator=torch.Generator().manual_seed(0))
    neighbour = torch.nextafter(torch.tensor(1000.0), torch.tensor(2000.0))
    x = torch.where(y > 0, neighbour, torch.tensor(1000.0))[:, None]
    for given, constant in ((x, False), (x.double(), True)):
        acc = NeuronStatistics(1, {"y": Continuous()}, ("pearson",))
        acc.update(given, {"y": y})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = acc.compute().pearson[0, 0]
        assert np.isnan(found) == constant
        assert constant or found == pytest.approx(np.corrcoef(y > 0, y)[0, 1], abs=1e-3)
