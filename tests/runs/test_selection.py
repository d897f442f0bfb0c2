from __future__ import annotations

import functools

import numpy as np
import planted
import pytest
import torch
from conftest import one_line
from msgspec import structs

import skillfast
from skillfast import BenchConfig
from skillfast.ablation.sweep import SweepResult
from skillfast.data import Splits
from skillfast.data.splits import TensorImages
from skillfast.errors import ArgumentError
from skillfast.results.bench import EffectIntervals, Selectivity
from skillfast.results.records import to_json
from skillfast.runs import bench as protocol
from skillfast.runs import selection
from skillfast.runs.cost import Clock
from skillfast.runs.removals import Removals
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
    config = BenchConfig.of(sites=("mlp", "attn"), statistics=("pearson",), share=0.0032, control_draws=2, **more)
    device, training = torch.device("cpu"), Training(dict)
    return Subject(config, planted.model(), "planted", splits, device, "scratch", "none", training)


def chosen_on(splits, **more):
    made = subject(splits, **more)
    scores = skillfast.trace(made.model, made.loader("select"), sites=("mlp", "attn"), statistics=("pearson",))
    return made, protocol.choose_skills(Session(made, None, Clock(), True, lambda _: None), scores)[0]


@pytest.fixture(scope="module")
def chosen(splits):
    return chosen_on(splits)


@pytest.mark.parametrize(
    ("found", "want"),
    [
        ([(0.6, 0.01), (0.9, 0.02), (0.7, 0.01)], 1),  # the most drop within the limit
        ([(0.6, 0.01), (0.9, 0.03), (0.7, 0.02)], 2),
        ([(0.6, 0.05), (0.9, 0.04), (0.7, 0.03)], 2),  # none within: the least regret
        ([(0.6, 0.01), (0.6, 0.01)], 0),
        ([(0.1, -0.01), (0.0, -0.02)], 0),
        ([(0.6, 0.02), (0.6, 0.01), (0.2, 0.0)], 1),  # of equal drops the one of less regret
    ],
)
def test_the_rule(found, want):
    drops, highest = np.array(found).T
    assert selection.best(drops, highest, np.full(len(found), 0.02)) == want


def test_the_rule_allows_each_size_its_own_regret():
    assert selection.best(np.array([0.6, 0.9]), np.array([0.02, 0.03]), np.array([0.02, 0.04])) == 1
    assert selection.best(np.array([0.6, 0.9]), np.array([0.02, 0.03]), np.array([0.03, 0.02])) == 0


def trials(rng, drops, regrets, n=100):
    """What `choose` asks a sweep for: candidates that cost class j `drops[c][j]` and all others `regrets[c][i]` each.

    Two sets of random neurons of one size, which change nothing, come after the candidates.
    """
    sets = [*map(str, range(len(drops))), "random 0.03, draw 0", "random 0.03, draw 1"]
    drops, regrets = np.array(drops), np.array(regrets)
    k = drops.shape[1]
    labels = np.arange(k).repeat(n)
    own = labels == np.arange(k)[:, None]
    lost = rng.random((len(drops), k, k * n)) < np.where(own, drops[:, labels][:, None], regrets[:, :, None])
    predictions = np.where(lost, (labels + 1) % k, labels)
    names = [chr(97 + j) for j in range(k)]
    rows = [*predictions.reshape(-1, k * n), *np.tile(labels, (2 * k, 1))]
    tried = [Candidate("pearson", False, 0.03) for _ in drops]
    accuracy = np.zeros((len(rows), k))
    swept = SweepResult(
        classes=tuple(names), names=tuple(f"{of}: {name}" for of in sets for name in names), labels=labels,
        baseline=accuracy[0], per_class_accuracy=accuracy, baseline_margin=accuracy[0], per_class_margin=accuracy,
        top2=np.stack([labels, (labels + 2) % k], 1), predictions=np.stack(rows),
    )  # fmt: skip
    skills = [{name: skillfast.Skill(name, {"head": [c]}) for name in names} for c in range(len(drops))]
    return tried, skills, swept


def test_a_candidate_whose_regret_has_no_interval_keeps_its_place(monkeypatch):
    """The other candidates' ends stay with their drops, and it is not taken before one that has an interval."""
    trial = selection._Trial((0.03,) * 3, *(np.empty(0),) * 5)
    ends = EffectIntervals(None, [0.0, 0.0], None, None, None)
    effects = [
        Selectivity(drop, None, None, None, None, None, None, None, None, None, structs.replace(ends, regret=end), None)
        for drop, end in ((0.99, None), (0.5, [0.0, 0.01]), (0.9, [0.0, 0.3]))
    ]
    monkeypatch.setattr(selection._Trial, "effects", lambda _: effects)
    monkeypatch.setattr(selection._Trial, "limits", lambda _: np.full(3, 0.02))
    assert trial.together() == 1


def test_one_candidate_is_chosen_for_all_classes_where_none_is_better_by_class():
    found = selection.choose(*trials(np.random.default_rng(0), [[0.5] * 4, [0.9] * 4], [[0.0] * 4, [0.0] * 4]))
    assert found.chosen == (1, 1, 1, 1)
    assert found.combined == found.validation[1]
    assert found.limits == (selection.MARGIN, selection.MARGIN)  # random neurons cost nothing
    assert str(found) == "pearson, 0.03 of all neurons"
    assert {name: s.neurons["head"].tolist() for name, s in found.removed.items()} == {name: [1] for name in "abcd"}


def test_candidates_are_chosen_by_class_where_that_drops_more():
    drops, regrets = [[0.9, 0.9, 0.2, 0.2], [0.2, 0.2, 0.9, 0.9]], [[0.0] * 4, [0.0] * 4]
    found = selection.choose(*trials(np.random.default_rng(0), drops, regrets))
    assert found.chosen == (0, 0, 1, 1)
    assert found.combined.target_drop == pytest.approx(0.9, abs=0.05)
    assert str(found) == "pearson, 0.03 of all neurons for a, b; pearson, 0.03 of all neurons for c, d"
    assert [s.neurons["head"].tolist() for s in found.removed.values()] == [[0], [0], [1], [1]]


def test_regret_beyond_the_random_controls_is_not_chosen():
    drops, regrets = [[0.5] * 4, [0.9] * 4], [[0.0] * 4, [0.1] * 4]
    found = selection.choose(*trials(np.random.default_rng(0), drops, regrets))
    assert found.chosen == (0, 0, 0, 0)
    by_class = selection.choose(*trials(np.random.default_rng(0), drops, [[0.0] * 4, [0.0, 0.0, 0.2, 0.2]]))
    assert by_class.chosen == (1, 1, 0, 0)


def test_chance_does_not_choose_by_class():
    """Candidates that are alike: by class would always fit the validation part better, not the other half of it."""
    alike = [[0.8] * 5] * 4, [[0.005] * 5] * 4
    chosen = [selection.choose(*trials(np.random.default_rng(trial), *alike)).chosen for trial in range(8)]
    assert sum(len(set(one)) > 1 for one in chosen) <= 2


def test_others_are_measured_where_the_first_are_not_within_their_limit():
    assert selection.running([0.2, 0.9, 0.5, 0.44]) == ([1, 2], [0, 3])
    assert selection.running([-0.1, -0.2]) == ([0, 1], [])  # nothing drops: all are looked at
    tried, skills, swept = trials(np.random.default_rng(0), [[0.3] * 4, [0.9] * 4], [[0.0] * 4, [0.1] * 4])
    strong = swept.renamed({name: name for name in swept.names if not name.startswith("0")})
    alone = selection.choose(tried, skills, strong, [0.3, 0.9])
    assert (alone.within, alone.chosen, alone.validation[0], alone.limits[0]) == (False, (1,) * 4, None, None)
    assert alone.drops == (0.3, alone.validation[1].target_drop)
    both = selection.choose(
        tried, skills, strong.joined(swept.renamed({f"0: {name}": f"0: {name}" for name in "abcd"}))
    )
    assert both == selection.choose(tried, skills, swept)
    assert (both.within, both.chosen) == (True, (0,) * 4)


def test_candidates():
    auto = selection.candidates("auto", 0.03)
    assert len(auto) == 12
    assert {(c.method, c.contrastive, c.keep) for c in auto} == {
        ("pearson", False, None), ("pearson", True, None), ("attribution", False, None), ("attribution", True, None),
        ("mask", False, 1.0), ("mask", False, 5.0),
    }  # fmt: skip
    assert sorted({round(c.share, 9) for c in auto}) == [0.01, 0.03]
    assert selection.candidates("mask", 0.1) == (Candidate("mask", False, 0.1, 10.0),)
    assert selection.candidates("auroc", 0.1, contrastive=True) == (Candidate("auroc", True, 0.1),)
    assert selection.candidates("auto", 0.1, statistics=("auroc",))[0].method == "auroc"
    assert str(Candidate("attribution", True, 0.005)) == "contrastive attribution, 0.005 of all neurons"


def test_the_planted_skills_are_chosen(splits, chosen):
    made, found = chosen
    best = found.combined
    assert (best.target_drop, best.harm.plug_in) == (pytest.approx(5 / 6), 0)  # "none" has no neurons
    assert best.regret == 0
    assert found.oracle.target_drop == 1
    assert list(found.removed) == list(CLASSES)
    for label, sites in planted.PLANTED.items():
        want = {(site, i) for site, neurons in sites.items() for i in neurons}
        assert want <= {(s, int(i)) for s, index in found.removed[CLASSES[label]].neurons.items() for i in index}
    measured = [(c, most) for c, most, v in zip(found.candidates, found.limits, found.validation, strict=True) if v]
    assert set(found.controls) == {candidate.share for candidate, _ in measured}
    assert all(found.controls[candidate.share].regret + selection.MARGIN == most for candidate, most in measured)
    running = [i for i, effect in enumerate(found.validation) if effect]
    assert running == [i for i, drop in enumerate(found.drops) if drop >= max(found.drops) / 2]
    assert set(found.chosen) <= set(found.tested) <= set(running)
    tested = {str(i): found.skills[i] for i in found.tested}
    written = to_json(found.to_json(selection.try_on(made.model, made.loader("test"), tested)))
    assert written["chosen"] == list(found.chosen)
    assert written["candidates"][found.chosen[0]]["test"]["target_drop"] == pytest.approx(5 / 6)
    assert written["validation"]["target_drop"] == pytest.approx(5 / 6)
    assert written["gap"] == pytest.approx(dict.fromkeys(written["gap"], 0))
    assert not any(word in written["rule"] for word in ("40", "56", "20"))  # no figure of ours


def test_masks_of_the_other_weight_start_from_the_larger_one(chosen):
    found = chosen[1]
    made = zip(found.candidates, found.skills, strict=True)
    starts = {c.keep: skills["a"].settings["start_keep"] for c, skills in made if c.method == "mask"}
    assert starts == {1.0: 5.0, 5.0: None}


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
    sites = skillfast.trace(made.model, made.loader("test"), sites=("mlp", "attn")).sites
    rng = np.random.default_rng(0)
    drawn = {name: random_skills(skill, sites, 1, rng)[0] for name, skill in found.removed.items()}
    sets = [dict(found.removed), drawn]
    swept = selection.try_on(made.model, made.loader("test"), {str(i): made for i, made in enumerate(sets)})
    on_test, control = selection.effects(swept, sets)
    noise = 3 * np.sqrt(2 * 0.25 / 90)  # three standard errors of a difference, at most
    assert abs(on_test.target_drop - control.target_drop) < noise
    assert abs(on_test.target_drop + on_test.other_change) < noise  # the own class fares as the others do


def test_a_lone_candidate_is_removed_once(splits):
    """Its effect on the test part is that of the sweep that removes it, under the trade-off's names."""
    made, found = chosen_on(splits, method="attribution")
    scores = skillfast.trace(made.model, made.loader("select"), sites=("mlp", "attn"), statistics=("pearson",))
    session = Session(made, None, Clock(), True, lambda _: None)
    removals = Removals.of(made, list(found.removed.values()), scores)
    swept = protocol._sweep(session, removals)
    forwards = []
    handle = made.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    reused = protocol._try_on_test(session, found, removals, swept)
    assert not forwards
    handle.remove()
    want = protocol._try(session, {"0": found.skills[0]}, "test")
    assert reused.names == want.names
    np.testing.assert_array_equal(reused.predictions, want.predictions)
    np.testing.assert_array_equal(reused.per_class_accuracy, want.per_class_accuracy)
    assert reused.embeddings is None
    assert found.to_json(reused) == found.to_json(want)


def test_a_method_by_name_is_one_candidate(splits):
    _, found = chosen_on(splits, method="attribution", contrastive=True)
    assert found.candidates == (Candidate("attribution", True, 0.0032),)
    assert {s.method for s in found.skills[0].values()} == {"attribution"}
    assert found.skills[0]["a"].settings["contrastive"] is True
    assert found.controls == {}  # nothing is compared
    assert found.limits == (None,)
    assert found.chosen == (0,) * len(CLASSES)


def test_what_cannot_be_is_refused(batches):
    assert "candidates: expected at least one" in one_line(ArgumentError, selection.cut, {}, ())
    assert "contrastive: expected with a statistic" in one_line(ArgumentError, BenchConfig.of, contrastive=True)
    assert "contrastive" in one_line(ArgumentError, BenchConfig.of, contrastive=True, method="mask")
    with pytest.raises(ArgumentError, match=r"method: expected one of auto, pearson, .*, erase, got 'magic'"):
        BenchConfig.of(method="magic")
