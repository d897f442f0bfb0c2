from __future__ import annotations

import functools
import json

import numpy as np
import planted
import pytest
import torch
from conftest import one_line

import skillfast
from skillfast import BenchConfig
from skillfast.data import Splits
from skillfast.data.splits import TensorImages
from skillfast.errors import ArgumentError
from skillfast.evaluation import selectivity as removal
from skillfast.evaluation.resampling import Bootstrap
from skillfast.results.records import to_json
from skillfast.runs import bench as protocol
from skillfast.runs import selection
from skillfast.runs.cost import Clock
from skillfast.runs.selection import Candidate
from skillfast.runs.session import Session
from skillfast.runs.subject import Subject, Training
from skillfast.skills.skill import random_skills

pytestmark = pytest.mark.filterwarnings("ignore:some scores are not defined", "ignore:no neuron was chosen")
CLASSES = tuple("abcdef")


def part(n, seed):
    images, labels = planted.images(n, seed)
    return TensorImages(images, labels, CLASSES)


def permuted(data, seed=0):
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return TensorImages(data.images, data.labels[order], data.classes)


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """Planted neurons are found at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "learn_masks", functools.partial(skillfast.learn_masks, steps=8))
        yield


@pytest.fixture(scope="module")
def splits():
    return Splits("planted", CLASSES, select=part(120, 0), validate=part(60, 1), test=part(90, 2))


def subject(splits, **more):
    config = BenchConfig.of(sites=("mlp", "attn"), statistics=("pearson",), share=0.003, control_draws=2, **more)
    device, training = torch.device("cpu"), Training(dict)
    return Subject(config, planted.model(), "planted", splits, device, "scratch", "none", training)


def chosen_on(splits, **more):
    made = subject(splits, **more)
    scores = skillfast.trace(made.model, made.loader("select"), sites=("mlp", "attn"), statistics=("pearson",))
    return made, protocol._choose(Session(made, None, Clock(), True, lambda _: None), scores)


@pytest.fixture(scope="module")
def chosen(splits):
    return chosen_on(splits)


def effect(drop, harm, gain=0.0):
    return {"target_drop": drop, "other_harm": harm, "other_abs_change": harm + gain}


@pytest.mark.parametrize(
    ("found", "want"),
    [
        ([effect(0.6, 0.003), effect(0.7, 0.015), effect(0.9, 0.03)], 0),  # 0.7 has a ratio of 47, at fivefold harm
        ([effect(0.6, 0.01), effect(0.9, 0.02), effect(0.99, 0.03)], 1),  # the last has a ratio of 33
        ([effect(0.1, 0.0), effect(0.5, 0.0125)], 1),  # no harm, but hardly a drop either
        ([effect(0.1, 0.0), effect(0.45, 0.02)], 0),  # none has both: harm counts twentyfold
        ([effect(0.1, 0.0), effect(0.45, 0.01)], 1),
        ([effect(0.0, 0.0), effect(0.0, 0.0)], 0),
        ([effect(0.9, 0.001, gain=0.08), effect(0.6, 0.005, gain=0.02)], 1),  # strict 11 and 24 of 20
        ([effect(0.9, 0.001, gain=0.08), effect(0.6, 0.005, gain=0.04)], 0),  # neither, so the drop counts
    ],
)
def test_the_rule(found, want):
    assert selection.best(found, {"strict_ratio": None}) == want
    assert selection.best(found, {"strict_ratio": 30.0}) == want


def test_the_rule_wants_no_more_than_the_oracle_allows():
    found = [effect(0.9, 0.001, gain=0.08), effect(0.6, 0.005, gain=0.02)]
    assert selection.best(found, {"strict_ratio": 13.0}) == 0  # of which 0.8 are 10.4
    assert "40" in selection.RULE


def test_the_published_point_is_the_one_of_least_harm():
    found = [
        {"target_drop": 0.09, "other_change": 0.0, "other_harm": 0.0},  # too little
        {"target_drop": 0.6, "other_change": -0.01, "other_harm": 0.03},  # 60 times, by harm that gains cancel
        {"target_drop": 0.3, "other_change": 0.005, "other_harm": 0.002},  # 60 times
        {"target_drop": 0.6, "other_change": 0.011, "other_harm": 0.0},  # 54.5 times
    ]
    assert selection.published(found) == 2
    assert selection.published(found[:1] + found[3:]) is None


def test_candidates():
    auto = selection.candidates("auto", 0.03)
    assert len(auto) == 14
    assert {(c.method, c.contrastive, c.keep) for c in auto} == {
        ("pearson", False, None), ("pearson", True, None), ("attribution", False, None), ("attribution", True, None),
        ("mask", False, 1.0), ("mask", False, 5.0), ("mask", False, 20.0),
    }  # fmt: skip
    assert sorted({round(c.share, 9) for c in auto}) == [0.01, 0.03]
    assert selection.candidates("mask", 0.1) == (Candidate("mask", False, 0.1, 10.0),)
    assert selection.candidates("auroc", 0.1, contrastive=True) == (Candidate("auroc", True, 0.1),)
    assert selection.candidates("auto", 0.1, statistics=("auroc",))[0].method == "auroc"
    assert str(Candidate("attribution", True, 0.005)) == "contrastive attribution, 0.005 of all neurons"


def test_effect_equals_selectivity():
    rng = np.random.default_rng(0)
    labels, intact, predictions = (rng.integers(0, 3, shape) for shape in (60, 60, (3, 60)))
    want = to_json(removal.selectivity(predictions[None], intact, labels, Bootstrap(labels, 5)))
    assert to_json(removal.effect(predictions, intact, labels)) == pytest.approx(
        {k: v for k, v in want.items() if k != "ci95"}
    )


def test_changes_that_cancel_have_no_ratio():
    labels = np.arange(4).repeat(10)
    intact = np.where(np.arange(40) % 10 < 5, labels, (labels + 1) % 4)
    predictions = np.stack([intact] * 4)
    predictions[0, 10:13], predictions[1, 26:29] = 3, 2  # one class loses 0.3, another gains 0.3
    found = to_json(removal.effect(predictions, intact, labels))
    assert found["other_change"] == pytest.approx(0, abs=1e-15)
    assert found["ratio"] is None
    assert found["strict_ratio"] == 0


def test_the_planted_skills_are_chosen(splits, chosen):
    made, found = chosen
    best = found.validation[found.chosen]
    assert (best["target_drop"], best["other_harm"]) == (pytest.approx(5 / 6), 0)  # "none" has no neurons
    assert found.oracle["target_drop"] == 1
    skills = found.skills[found.chosen]
    assert list(skills) == list(CLASSES)
    for label, sites in planted.PLANTED.items():
        want = {(site, i) for site, neurons in sites.items() for i in neurons}
        assert want <= {(s, int(i)) for s, index in skills[CLASSES[label]].neurons.items() for i in index}
    on_test = selection.effects(made.model, made.loader("test"), found.skills)["candidates"]
    written = json.loads(json.dumps(found.to_json(on_test)))
    assert written["chosen"] == found.chosen
    assert written["candidates"][found.chosen]["test"]["target_drop"] == pytest.approx(5 / 6)
    assert written["gap"]["target_drop"] == pytest.approx(0)
    assert written["gap"]["harm_ratio"] is None  # no harm on either part


def test_masks_of_other_weights_start_from_the_middle_one(chosen):
    found = chosen[1]
    made = zip(found.candidates, found.skills, strict=True)
    starts = {c.keep: skills["a"].settings["start_keep"] for c, skills in made if c.method == "mask"}
    assert starts == {1.0: 5.0, 5.0: None, 20.0: 5.0}


def test_the_choice_does_not_see_the_test_part(splits, chosen):
    """Neither its labels nor its images."""
    blank = TensorImages(torch.full_like(splits.test.images, torch.nan), permuted(splits.test).labels, CLASSES)
    _, again = chosen_on(Splits("planted", CLASSES, splits.select, splits.validate, blank))
    assert again.chosen == chosen[1].chosen
    assert again.validation == chosen[1].validation
    for ours, theirs in zip(again.skills, chosen[1].skills, strict=True):
        assert {n: s.entry() for n, s in ours.items()} == {n: s.entry() for n, s in theirs.items()}


def test_permuted_labels_select_nothing(splits):
    """Where labels say nothing, what is chosen does no more to its class than neurons drawn at random."""
    blind = Splits("planted", CLASSES, permuted(splits.select), permuted(splits.validate, 1), permuted(splits.test, 2))
    made, found = chosen_on(blind)
    on_test = selection.effects(made.model, made.loader("test"), found.skills)["candidates"][found.chosen]
    rng = np.random.default_rng(0)
    drawn = [
        random_skills(s, skillfast.trace(made.model, made.loader("test"), sites=("mlp", "attn")).sites, 1, rng)
        for s in found.skills[found.chosen].values()
    ]
    swept = skillfast.sweep(
        made.model, made.loader("test"), [skillfast.Condition(s) for (s,) in drawn], keep_predictions=True
    )
    control = to_json(removal.effect(swept.predictions, swept.top2[:, 0], swept.labels))
    noise = 3 * np.sqrt(2 * 0.25 / 90)  # three standard errors of a difference, at most
    assert abs(on_test["target_drop"] - control["target_drop"]) < noise
    assert abs(on_test["target_drop"] + on_test["other_change"]) < noise  # the own class fares as the others do


def test_a_method_by_name_is_one_candidate(splits):
    _, found = chosen_on(splits, method="attribution", contrastive=True)
    assert found.candidates == (Candidate("attribution", True, 0.003),)
    assert {s.method for s in found.skills[0].values()} == {"attribution"}
    assert found.skills[0]["a"].settings["contrastive"] is True


def test_what_cannot_be_is_refused(batches):
    assert "candidates: expected at least one" in one_line(ArgumentError, selection.cut, {}, ())
    assert "contrastive: expected with a statistic" in one_line(ArgumentError, BenchConfig.of, contrastive=True)
    assert "contrastive" in one_line(ArgumentError, BenchConfig.of, contrastive=True, method="mask")
    with pytest.raises(ArgumentError, match=r"method: expected one of auto, pearson, .*, mask, got 'magic'"):
        BenchConfig.of(method="magic")
