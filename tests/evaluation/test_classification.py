"""Accuracy and F1 against scikit-learn and plain loops, and their spread over random draws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score, recall_score

from skillfast.evaluation.classification import MEASURES, f1_of_counts, intact_measures, measure, own_class, unchanged
from skillfast.evaluation.measures import finite, random_draws
from skillfast.evaluation.paired import PairedDifference
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
                "other_accuracy": None if own is None else (p == labels)[labels != own].mean(),
                "class_f1": None if own is None else f1[i][own],
            }
            for i, p in enumerate(both)
        ]
        assert tuple(found.values) == tuple(found.ci95) == tuple(found.change_ci95) == MEASURES
        assert found.values == pytest.approx(want[1])
        assert found.change == pytest.approx({k: None if v is None else v - want[0][k] for k, v in want[1].items()})
        spread = [f1_of_counts(hits, rows, bootstrap.support, own) for hits, rows in counts]
        for name in ("f1_macro", "class_f1"):
            ends = None if want[1][name] is None else interval(spread[1][name])
            assert found.ci95[name] == ends
            assert found.change_ci95[name] == (ends and interval(spread[1][name] - spread[0][name]))
            if ends:
                assert ends[0] <= want[1][name] <= ends[1]


def test_limits_of_accuracies_are_wilsons_and_of_changes_newcombes(predicted):
    bootstrap, labels, intact, other = predicted
    counted = {"accuracy": labels < 4, "class_accuracy": labels == 3, "other_accuracy": labels != 3}
    found = measure(bootstrap, intact, other, 3)
    for name, rows in counted.items():
        right, before = (p[rows] == labels[rows] for p in (other, intact))
        want = binomtest(int(right.sum()), len(right)).proportion_ci(0.95, method="wilson")
        assert found.ci95[name] == pytest.approx([want.low, want.high])
        assert found.change_ci95[name] == pytest.approx(PairedDifference(right * 1 - before * 1).limits())
    always = measure(bootstrap, labels, labels, 3)
    assert always.ci95["class_accuracy"][0] < 0.9 < always.ci95["class_accuracy"][1] == 1
    assert always.change_ci95["class_accuracy"][0] < 0 < always.change_ci95["class_accuracy"][1]
    none, absent = measure(bootstrap, intact, other, None), measure(bootstrap, intact, other, 2)
    assert none.ci95["class_accuracy"] is none.ci95["other_accuracy"] is None
    assert none.change_ci95["class_accuracy"] is none.change_ci95["other_accuracy"] is None
    assert absent.ci95["class_accuracy"] is absent.change_ci95["class_accuracy"] is None
    assert absent.ci95["other_accuracy"] == absent.ci95["accuracy"]
    single = measure(PairedBootstrap(np.array([0, 1, 1]), 2, 10), np.array([0, 1, 1]), np.array([1, 1, 1]), 0)
    assert single.ci95["class_accuracy"][1] < 0.8
    assert single.change_ci95["class_accuracy"] is None  # of one example nothing is known of how they vary
    assert single.change_ci95["other_accuracy"] is not None


def test_what_is_not_changed_would_not_be_in_another_sample(predicted):
    bootstrap, _, intact, _ = predicted
    for own in (None, 2, 3):
        found, plain = unchanged(bootstrap, intact, own), measure(bootstrap, intact, intact, own)
        assert (found.values, found.ci95, found.change) == (plain.values, plain.ci95, plain.change)
        assert not any(found.change.values())
        assert found.change_ci95 == {k: None if v is None else [0, 0] for k, v in found.values.items()}


def test_the_intact_models_measures(predicted):
    bootstrap, labels, intact, _ = predicted
    f1 = f1_score(labels, intact, labels=range(4), average=None, zero_division=0)
    recall = recall_score(labels, intact, labels=range(4), average=None, zero_division=np.nan)
    whole = intact_measures(bootstrap, intact)
    assert whole.values == pytest.approx({"accuracy": (intact == labels).mean(), "f1_macro": f1.mean()})
    assert set(whole.ci95) == {"accuracy", "f1_macro"}
    assert whole.per_class.accuracy == pytest.approx([recall[0], recall[1], None, recall[3]])
    assert whole.per_class.f1 == pytest.approx(f1)
    assert whole.per_class.examples == np.bincount(labels, minlength=4).tolist()


def test_measures_of_counts_are_those_of_the_examples(predicted):
    _, labels, intact, _ = predicted
    hits = np.array([((labels == c) & (intact == c)).sum() for c in range(4)])
    found = f1_of_counts(hits[None], np.bincount(intact, minlength=4)[None], np.bincount(labels, minlength=4), 1)
    assert found["f1_macro"] == pytest.approx([f1_score(labels, intact, average="macro", zero_division=0)])
    assert found["class_f1"] == pytest.approx([f1_score(labels, intact, average=None)[1]])
    neither = f1_of_counts(np.zeros((2, 3)), np.zeros((2, 3)), np.array([4, 0, 0]), 1)
    assert neither["class_f1"].tolist() == [0, 0]  # of a class that is neither there nor predicted


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
