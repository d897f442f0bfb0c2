"""Accuracy and F1 against scikit-learn and plain loops, and their spread over random draws."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, recall_score

from skillfast.evaluation.classification import intact_measures, measure, own_class, scores_of_counts
from skillfast.evaluation.measures import finite, random_draws
from skillfast.evaluation.resampling import PairedBootstrap, interval
from skillfast.results.records import to_json

NONE = {"mean": None, "low": None, "high": None}


@pytest.fixture
def predicted():
    """Labels of classes 0, 1 and 3 of four, intact predictions and others, of which one is of class 2."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 3], 60)
    intact = np.where(rng.random(60) < 0.8, labels, rng.integers(0, 4, 60))
    return PairedBootstrap(labels, 4, replicates=300), labels, intact, np.where(rng.random(60) < 0.7, intact, 1)


def test_measures_are_scikit_learns(predicted):
    bootstrap, labels, *both = predicted
    f1 = [f1_score(labels, p, labels=range(4), average=None, zero_division=0) for p in both]
    recall = [recall_score(labels, p, labels=range(4), average=None, zero_division=np.nan) for p in both]
    counts = bootstrap.counts(*both)
    for own in (None, 0, 2, 3):
        found = measure(bootstrap, *both, own)
        want = [
            {
                "accuracy": (p == labels).mean(),
                "f1_macro": f1[i].mean(),
                "class_accuracy": None if own in (None, 2) else recall[i][own],
                "class_f1": None if own is None else f1[i][own],
            }
            for i, p in enumerate(both)
        ]
        assert found.values == pytest.approx(want[1])
        assert found.change == pytest.approx({k: None if v is None else v - want[0][k] for k, v in want[1].items()})
        spread = [scores_of_counts(hits, rows, bootstrap.support, own) for hits, rows in counts]
        for name in want[0]:
            ends = None if want[1][name] is None else interval(spread[1][name])
            assert found.ci95[name] == ends
            assert found.change_ci95[name] == (ends and interval(spread[1][name] - spread[0][name]))
            if ends:
                assert ends[0] <= want[1][name] <= ends[1]
    whole = intact_measures(bootstrap, both[0])
    assert whole.values == pytest.approx({"accuracy": (both[0] == labels).mean(), "f1_macro": f1[0].mean()})
    assert set(whole.ci95) == {"accuracy", "f1_macro"}
    assert whole.per_class.accuracy == pytest.approx([recall[0][0], recall[0][1], None, recall[0][3]])
    assert whole.per_class.f1 == pytest.approx(f1[0])
    assert whole.per_class.examples == np.bincount(labels, minlength=4).tolist()


def test_measures_of_counts_are_those_of_the_examples(predicted):
    _, labels, intact, _ = predicted
    hits = np.array([((labels == c) & (intact == c)).sum() for c in range(4)])
    found = scores_of_counts(hits[None], np.bincount(intact, minlength=4)[None], np.bincount(labels, minlength=4), 1)
    assert found["accuracy"] == pytest.approx([(intact == labels).mean()])
    assert found["f1_macro"] == pytest.approx([f1_score(labels, intact, average="macro", zero_division=0)])
    assert found["class_accuracy"] == pytest.approx([(intact == 1)[labels == 1].mean()])
    assert found["class_f1"] == pytest.approx([f1_score(labels, intact, average=None)[1]])
    neither = scores_of_counts(np.zeros((2, 3)), np.zeros((2, 3)), np.array([4, 0, 0]), 1)
    assert neither["class_f1"].tolist() == [0, 0]  # of a class that is neither there nor predicted
    assert np.isnan(neither["class_accuracy"]).tolist() == [True, True]


def test_the_class_of_a_column():
    assert [own_class(m, ["a", "b"]) for m in ("label:b", "label:c", "b", "loss", "label:", None)] == [1, *[None] * 5]


def test_draws_have_a_mean_and_ends_where_all_are_defined(predicted):
    bootstrap, _, intact, other = predicted
    controls = [measure(bootstrap, intact, p, own) for p, own in ((other, 0), (intact, 0), (other, None))]
    found = to_json(random_draws(controls))
    assert found["draws"] == 3
    for part in ("values", "change"):
        row = [getattr(one, part)["accuracy"] for one in controls]
        want = {"mean": np.mean(row), "low": min(row), "high": max(row)}
        assert found[part]["accuracy"] == pytest.approx(want)
        assert found[part]["class_f1"] == NONE
    assert to_json(random_draws(controls[:1]))["values"]["accuracy"]["low"] == controls[0].values["accuracy"]
    assert finite({"a": np.float32(1), "b": np.nan, "c": -np.inf}) == {"a": 1.0, "b": None, "c": None}
