from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import json

import jsonschema
import numpy as np
import planted
import pytest
import torch
from msgspec import structs
from torch.utils.data import DataLoader, TensorDataset

import skillfast
from skillfast import BenchConfig
from skillfast.ablation.assigned import predict_assigned
from skillfast.data import load_digits
from skillfast.errors import ArgumentError
from skillfast.evaluation import selectivity as removal
from skillfast.evaluation import shapley as contribution
from skillfast.evaluation.resampling import Bootstrap
from skillfast.metrics import classification, per_class_accuracy
from skillfast.models.sites import Site, find_sites
from skillfast.results import records
from skillfast.results.bench import BenchResults
from skillfast.results.records import to_json
from skillfast.results.skills import Skills
from skillfast.runs import removals, selection
from skillfast.runs.cost import Clock, trace_over_forward
from skillfast.runs.given import Given, given_subject
from skillfast.runs.session import Session
from skillfast.runs.shares import OwnPredictions, predict_parts
from skillfast.skills.skill import random_skills


def test_the_removal_matrix_counts():
    labels = np.array([0, 0, 1, 1])
    intact = np.array([0, 1, 1, 1])
    predictions = np.array([[1, 1, 1, 1], [0, 0, 0, 1]])
    np.testing.assert_allclose(removal.removal_matrix(predictions, intact, labels), [[-0.5, 0], [0.5, -0.5]])


def test_the_oracle_takes_the_second_best():
    top2 = np.array([[0, 2], [1, 0], [2, 1]])
    assert removal.oracle_predictions(top2, 3).tolist() == [[2, 1, 2], [0, 0, 2], [0, 1, 1]]


def test_a_ratio_over_nothing_is_null():
    labels = np.arange(3).repeat(10)
    predictions = np.stack([np.where(labels == k, (k + 1) % 3, labels) for k in range(3)])[None]
    found = to_json(removal.selectivity(predictions, np.tile(labels, (3, 1)), labels, labels))
    assert found["target_drop"] == pytest.approx(1)
    assert found["harm"]["plug_in"] == found["harm"]["cross_fitted"] == found["other_abs_change"] == 0
    assert found["ratio"] is found["strict_ratio"] is found["harm_ratio"] is None
    assert 10 < found["at_least"]["harm_ratio"] < 20  # a harm of one in 17 would show in 60 decisions
    assert found["harm"]["ci95"] == [0, pytest.approx(0.06, abs=0.01)]
    low, high = found["ci95"]["target_drop"]
    assert 0.8 < low < high <= 1


def test_random_controls_have_as_many_neurons_per_site():
    sites = [Site("blocks.0.mlp", "mlp", 0, "a", 50), Site("head", "head", None, "b", 9)]
    skill = skillfast.Skill("s", {"blocks.0.mlp": range(20), "head": range(9)})
    drawn = random_skills(skill, sites, 3, np.random.default_rng(0))
    assert all({k: len(v) for k, v in d.neurons.items()} == {"blocks.0.mlp": 20, "head": 9} for d in drawn)
    assert not torch.equal(drawn[0].neurons["blocks.0.mlp"], drawn[1].neurons["blocks.0.mlp"])


DENSE = ("mlp", "attn", "head")


def worth(mlp, attn, head, joint=0.0):
    """v of every subset when parts add up, and `joint` more where mlp and attn are together."""
    parts = {"mlp": mlp, "attn": attn, "head": head}
    sets = contribution.subsets(DENSE)
    return np.array([sum(parts[k] for k in s) + joint * ({"mlp", "attn"} <= {*s}) for s in sets])


def test_shapley_values_of_games_that_are_known():
    np.testing.assert_allclose(contribution.shapley(worth(0.3, 0.1, 0.05), DENSE), [0.3, 0.1, 0.05])
    np.testing.assert_allclose(contribution.shapley(worth(0.3, 0.1, 0.05, joint=0.4), DENSE), [0.5, 0.3, 0.05])
    random = np.random.default_rng(0).normal(size=(7, 11))
    np.testing.assert_allclose(contribution.shapley(random, DENSE).sum(0), random[0])


def test_layer_contribution():
    drops = np.stack([worth(0.3, 0.1, 0.0, 0.4), worth(0, 0, 0)], 1)  # the second class loses nothing
    found = to_json(contribution.layer_contribution(drops, np.repeat(drops[..., None], 5, -1), ["a", "b"], DENSE))
    assert [found[k] for k in ("mlp", "attn", "head")] == pytest.approx([0.625, 0.375, 0])
    assert found["non_additivity"] == pytest.approx(0.5)
    assert found["per_class"]["b"] == {"mlp": None, "attn": None, "head": None}
    assert found["ci95"]["mlp"] == pytest.approx([0.625, 0.625])
    assert found["ci95"]["non_additivity"] == pytest.approx([0.5, 0.5])
    nothing = contribution.layer_contribution(0 * drops, np.zeros((7, 2, 5)), ["a", "b"], DENSE)
    assert nothing.mlp is nothing.non_additivity is nothing.ci95.mlp is nothing.ci95.non_additivity is None


def test_shares_of_a_loss_that_may_be_none_have_no_interval():
    drops = worth(0.3, 0.1, 0.1)[:, None]
    resampled = drops[..., None] + np.linspace(-0.6, 0.6, 41)
    found = to_json(contribution.layer_contribution(drops, resampled, ["a"], DENSE))
    assert found["mlp"] == pytest.approx(0.6)
    assert found["ci95"]["mlp"] is None
    assert to_json(contribution.layer_contribution(drops, drops[..., None] + [0.0, 0.1], ["a"], DENSE))["ci95"]["mlp"]


def test_a_ratio_of_gains_alone_is_no_less_than_its_lower_limit():
    """The oracle frees 12 images of class 1 that were given to class 0, and takes none from it."""
    labels = np.arange(2).repeat(300)
    intact = labels.copy()
    intact[300:312] = 0
    oracle = np.stack([np.ones(600, np.int64), np.zeros(600, np.int64)])
    found = removal.oracle_selectivity(oracle, intact, labels)
    assert found.strict_ratio == pytest.approx(found.target_drop / 0.02)
    assert 0 < found.at_least.strict_ratio <= found.strict_ratio


@pytest.mark.filterwarnings("ignore:some scores are not defined")
def test_shares_of_a_planted_skill():
    """Class 3 lives in one MLP neuron and two attention neurons that can each carry it: Shapley gives them halves."""
    images, labels = planted.images(120)
    skill = skillfast.Skill("3", planted.PLANTED[3])
    parts = removals.component_conditions([skill], find_sites(planted.model()), 0.0)
    conditions = [skillfast.Condition(skill), *(row[0] for row in parts)]
    result = skillfast.sweep(planted.model(), [(images, labels)], conditions)
    drops = 1 - result.per_class_accuracy[:, [3]]
    found = to_json(contribution.layer_contribution(drops, drops[..., None], ["3"], DENSE))
    assert [found[k] for k in ("mlp", "attn", "head")] == pytest.approx([0.5, 0.5, 0])
    assert found["non_additivity"] == 1


BLOCKS = [0, 1, 3, None]


def block_worth(game):
    """Worth of the whole and of every set of `block_conditions` in a game over four blocks: [1 + 6, ...]."""
    players = range(len(BLOCKS))
    sets = [players, *(players[:i] for i in (1, 2, 3)), *(players[-i:] for i in (1, 2, 3))]
    return np.array([game(frozenset(s)) for s in sets])


def exact_shapley(game):
    """Over all orders of the four blocks."""
    total = np.zeros(4)
    orders = list(itertools.permutations(range(4)))
    for order in orders:
        for i, block in enumerate(order):
            total[block] += game(frozenset(order[: i + 1])) - game(frozenset(order[:i]))
    return total / len(orders)


def pairwise_game(seed):
    """Blocks add up, and every pair of them adds something more."""
    rng = np.random.default_rng(seed)
    alone, joint = rng.normal(size=4), rng.normal(size=(4, 4))
    return lambda s: sum(alone[i] for i in s) + sum(joint[i, j] for i in s for j in s if i < j)


@pytest.mark.parametrize("seed", range(5))
def test_blocks_that_interact_in_pairs_get_their_shapley_values(seed):
    game = pairwise_game(seed)
    values = block_worth(game)
    np.testing.assert_allclose(np.mean(contribution.block_values(values[1:], values[0]), 0), exact_shapley(game))


def test_blocks_add_up_to_the_whole_in_any_game():
    values = np.random.default_rng(0).normal(size=(7, 5, 3))
    for order in contribution.block_values(values[1:], values[0]):
        np.testing.assert_allclose(order.sum(0), values[0])
    drops = np.abs(values[..., 0])
    found = to_json(contribution.per_block(BLOCKS, drops, drops[..., None], list("abcde")))
    assert [entry["block"] for entry in found] == BLOCKS
    for key in ("share", "bottom_up", "top_down"):
        assert sum(entry[key] for entry in found) == pytest.approx(1)
    assert sum(entry["per_class"]["d"] for entry in found) == pytest.approx(1)


def test_blocks_that_stand_in_for_each_other_share():
    """Either of the blocks 1 and 3 carries the skill: whichever goes last costs everything."""
    values = block_worth(lambda s: float({1, 2} <= s))[:, None]
    found = to_json(contribution.per_block(BLOCKS, values, values[..., None], ["a"]))
    assert [entry["share"] for entry in found] == [0, 0.5, 0.5, 0]
    assert [entry["bottom_up"] for entry in found] == [0, 0, 1, 0]
    assert [entry["top_down"] for entry in found] == [0, 1, 0, 0]


def test_a_class_that_loses_nothing_has_no_shares():
    drops = np.stack([block_worth(pairwise_game(1)) ** 2, np.zeros(7)], 1)
    found = to_json(contribution.per_block(BLOCKS, drops, drops[..., None], ["a", "b"]))
    assert [entry["per_class"]["b"] for entry in found] == [None] * 4
    nothing = to_json(contribution.per_block(BLOCKS, 0 * drops, 0 * drops[..., None], ["a", "b"]))
    assert [(entry["share"], entry["ci95"]) for entry in nothing] == [(None, None)] * 4
    assert contribution.per_block([], np.zeros((1, 2)), np.zeros((1, 2, 5)), ["a", "b"]) == []


def test_one_block_carries_everything():
    drops = np.full((1, 2), 0.4)
    (entry,) = to_json(contribution.per_block([3], drops, drops[..., None], ["a", "b"]))
    assert entry == {
        "block": 3, "share": 1, "ci95": [1, 1], "bottom_up": 1, "top_down": 1, "per_class": {"a": 1, "b": 1},
    }  # fmt: skip
    skills = [skillfast.Skill("a", {"blocks.3.mlp": [1]})]
    sites = [Site("blocks.3.mlp", "mlp", 3, "a", 5), Site("head", "head", None, "b", 9)]
    assert contribution.occupied_blocks(skills, sites) == [3]
    assert removals.block_conditions(skills, sites, 0.0) == []


def test_the_interval_of_a_blocks_share_covers():
    """Of 0.6 lost, blocks 0 and 1 take 0.2 and 0.4 of the images, whichever goes first."""
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        labels = np.arange(2).repeat(100)
        lost = rng.random(200)  # below 0.2: by block 0, then up to 0.6 by block 1
        wrong = np.stack([lost < 0.6, lost < 0.2, (lost >= 0.2) & (lost < 0.6)])  # [3, n]
        drops = np.stack([[row[labels == k].mean() for k in range(2)] for row in wrong])
        resampled = Bootstrap(labels, 300, trial).own_class(wrong.astype(float))
        low, high = contribution.per_block([0, 1], drops, resampled, ["a", "b"])[0].ci95
        held += low <= 1 / 3 <= high
    assert 180 <= held <= 199


@pytest.mark.filterwarnings("ignore:some scores are not defined")
def test_shares_by_block_of_planted_skills():
    """Classes 0 to 2 and 4 live in one block each; 3 in blocks 0 and 2, which can each carry it."""
    images, labels = planted.images(120)
    model = planted.model()
    skills = [skillfast.Skill(str(label), sites) for label, sites in planted.PLANTED.items()]
    sites = find_sites(model)
    conditions = removals.block_conditions(skills, sites, 0.0)
    assert [len(row) for row in conditions] == 2 * 2 * [len(skills)]
    rows = [[skillfast.Condition(skill) for skill in skills], *conditions]
    shown = labels < 5  # "none" has no neurons
    loader = DataLoader(TensorDataset(images[shown], labels[shown]), batch_size=64)
    forwards = []
    handle = model.blocks[0].mlp.fc1.register_forward_pre_hook(lambda _, args: forwards.append(len(args[0])))
    of_own = predict_assigned(model, loader, rows, labels[shown].numpy())
    handle.remove()
    result = skillfast.sweep(model, loader, [*itertools.chain(*rows)], classes=5, keep_predictions=True)
    every = result.predictions.reshape(5, 5, -1)  # [1 + 2 (blocks - 1), K, n]
    np.testing.assert_array_equal(of_own, every[:, labels[shown], np.arange(100)])
    whole = 2 * 100  # all blocks, and none; what is left goes on from these
    assert whole <= sum(forwards) < whole + 100  # and a few to prove the starts
    drops = np.stack([(of_own != labels[shown].numpy())[:, labels[shown] == k].mean(1) for k in range(5)], 1)
    blocks = contribution.occupied_blocks(skills, sites)
    assert blocks == [0, 1, 2]
    found = to_json(contribution.per_block(blocks, drops, drops[..., None], list("01234")))
    shares = [[entry["per_class"][name] for entry in found] for name in "01234"]
    assert shares == [[0, 1, 0], [0, 1, 0], [1, 0, 0], [0.5, 0, 0.5], [0, 0, 1]]
    assert [entry["share"] for entry in found] == pytest.approx([0.3, 0.4, 0.3])


@pytest.mark.filterwarnings("ignore:some scores are not defined")
def test_blocks_and_draws_run_on_some_examples_of_each_class(tmp_path):
    images, labels = planted.images(300)
    model, shown = planted.model(), labels < 5
    skills = [skillfast.Skill(str(label), sites) for label, sites in planted.PLANTED.items()]
    sites = find_sites(model)
    draws = removals.control_conditions(skills, sites, 3, 0.0, 0)
    blocks = [
        [dataclasses.replace(condition, name=f"{condition.name} {i}") for condition in row]
        for i in range(3)
        for row in removals.block_conditions(skills, sites, 0.0)
    ]
    whole = [skillfast.Condition(skill) for skill in skills]
    components = removals.component_conditions(skills, sites, 0.0)
    made = removals.Removals(skills, whole, components, blocks, [], draws[:1], draws[1:])
    loader, of = DataLoader(TensorDataset(images[shown], labels[shown]), batch_size=64), labels[shown].numpy()
    forwards = []
    handle = model.blocks[0].mlp.fc1.register_forward_pre_hook(lambda _, args: forwards.append(len(args[0])))
    found = predict_parts(model, loader, of, made)
    handle.remove()
    assert (len(found.components), len(found.blocks), len(found.controls), len(found.matched)) == (6, 12, 1, 2)
    assert np.bincount(of[found.block_rows]).tolist() == [16] * 5  # 12 x 16 forwards of each class, of 200
    assert np.bincount(of[found.control_rows]).tolist() == [10] * 5
    whole = (3 + 1) * 250 + (1 + 1) * 80 + 3 * 50  # one each that is intact; no skill has a neuron of the head
    assert whole <= sum(forwards) < whole + 100  # and a few to prove the starts
    every = predict_assigned(model, loader, [*made.components, *made.blocks, *draws], of)
    np.testing.assert_array_equal(found.components, every[:6])
    np.testing.assert_array_equal(found.blocks, every[6:18, found.block_rows])
    np.testing.assert_array_equal(np.concatenate([found.controls, found.matched]), every[18:, found.control_rows])
    found.save(tmp_path)
    for name, rows in vars(OwnPredictions.load(tmp_path)).items():
        np.testing.assert_array_equal(rows, getattr(found, name))


@pytest.mark.parametrize("statistics", [("pearson",), ("pearson", "spearman")])
def test_cost_of_batches_that_fill_the_buffer(vit, statistics):
    loader = [(torch.randn(600, 3, 16, 16), torch.arange(600) % 5)] * 2
    found = trace_over_forward(vit, loader, classification(5), statistics=statistics, bins=8)
    assert found["trace_over_forward"] > 0  # two batches say no more
    assert found["samples_per_s"] > 0


def test_a_model_that_is_right_on_every_example_is_said_so():
    """`correct` has no correlation then: a line of the run, and in Python a warning."""
    images, labels = planted.images(6 * planted.CLASSES * 3)
    loader, said = DataLoader(TensorDataset(images, labels), batch_size=64), []
    given = Given.of(planted.model(), loader, None)
    subject = given_subject(given, given.config(BenchConfig()))
    scores = Session(subject, None, Clock(), True, said.append).trace("select", statistics=("pearson",))
    assert np.isnan(scores.pearson[:, scores.columns.index("correct")]).all()
    assert np.isfinite(scores.pearson[:, scores.columns.index("label:0")]).any()
    (line,) = said
    assert line.startswith("select: some scores are not defined: ")
    assert "constant_metric (correct)" in line
    assert line.endswith(f"; the model errs on none of the {scores.n_observations:,} examples, or on all")
    with pytest.warns(RuntimeWarning, match=r"constant_metric \(correct\)"):
        skillfast.trace(subject.model, subject.loader("select"), statistics=("pearson",), classes=planted.CLASSES)


@pytest.mark.slow
def test_the_default_benchmark(default_run):
    output = default_run / "output"
    said = (default_run / "said.txt").read_text()
    assert said.startswith("baseline accuracy 9")
    results = json.loads((output / "results.json").read_text())
    assert results["baseline"]["accuracy"] >= 0.97
    flat = results["correlations"]["metrics"]["correct"]["select"] is None  # right on all that it was trained on
    assert ("constant_metric (correct)" in said) == flat
    assert ("correct is the same for all examples" in (output / "report.html").read_text()) == flat
    jsonschema.validate(results, records.schema(BenchResults))
    jsonschema.validate(json.loads((output / "skills.json").read_text()), records.schema(Skills))
    assert {p.name for p in output.iterdir()} == {
        "results.json", "skills.json", "scores.safetensors", "decisions.safetensors", "removal_matrix.csv",
        "report.html",
    }  # fmt: skip
    assert results["dataset"]["n_select"] + results["dataset"]["n_validate"] + results["dataset"]["n_test"] == 1797
    assert results["oracle"]["target_drop"] == pytest.approx(results["baseline"]["accuracy"])
    # Removing skills hurts their classes, drawn neurons do not: intervals that do not touch.
    assert results["selectivity"]["ci95"]["target_drop"][0] > results["random_control"]["ci95"]["target_drop"][1]
    assert sum(results["layer_contribution"][k] for k in ("mlp", "attn", "head")) == pytest.approx(1)
    with (output / "removal_matrix.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["removed", *results["dataset"]["classes"]]
    np.testing.assert_array_equal(np.array(rows)[:, 1:].astype(float), results["removal_matrix"])


@pytest.mark.filterwarnings("ignore:some scores are not defined", "ignore:no neuron was chosen")
def test_the_same_seed_gives_the_same_results(pictures, tmp_path, monkeypatch):
    """Trained, traced, chosen among all candidates and measured twice; masks learn a few steps."""
    monkeypatch.setattr(selection, "learn_masks", functools.partial(skillfast.learn_masks, steps=5))
    tiny = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}
    config = {"dataset": "imagefolder", "data_dir": str(pictures), "model": "vit_tiny_patch16_224", "epochs": 4}
    first, second = (
        skillfast.bench(BenchConfig.of(**config, model_kwargs=tiny, output=str(tmp_path / name)))
        for name in ("first", "second")
    )
    assert structs.replace(first.results, cost=None) == structs.replace(second.results, cost=None)
    for name in ("skills.json", "removal_matrix.csv", "scores.safetensors"):
        assert (first.directory / name).read_bytes() == (second.directory / name).read_bytes()


@pytest.mark.slow
def test_the_matrix_from_skills_json_and_plain_hooks(default_run, trained_digits):
    """What the files say, recomputed with nothing of skillfast but the trained model."""
    output, model, splits = default_run / "output", trained_digits, load_digits(0)
    images = torch.stack([splits.test[i][0] for i in range(len(splits.test))])
    labels = splits.test.labels.numpy()

    def accuracy(neurons):
        handles = []
        for site in find_sites(model):
            keep = torch.ones(site.width)
            keep[neurons.get(site.name, [])] = 0
            hook = model.get_submodule(site.path).register_forward_pre_hook(lambda _, a, k=keep: (a[0] * k, *a[1:]))
            handles.append(hook)
        with torch.inference_mode():
            predictions = torch.cat([model(x).argmax(1) for x in images.split(256)]).numpy()
        for handle in handles:
            handle.remove()
        return per_class_accuracy(predictions, labels, 10)

    skills = json.loads((output / "skills.json").read_text())["skills"]
    results = json.loads((output / "results.json").read_text())
    intact = accuracy({})
    np.testing.assert_allclose(results["baseline"]["per_class"], intact)
    rows = [accuracy(skill["neurons"]) - intact for skill in skills]
    # one image of about 54 may sit on a tie of two classes that stacking rounds the other way
    assert np.sum(np.abs(np.array(rows) - results["removal_matrix"]) > 1e-9) <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dataset": "imagenet"}, "dataset: expected one of digits, cifar10, imagefolder, text, got 'imagenet'"),
        ({"dataset": "imagefolder", "model": "vit_tiny_patch16_224"}, "expected --data-dir with --dataset imagefolder"),
        ({"dataset": "imagefolder", "data_dir": "x"}, "model: expected a timm name with --dataset imagefolder"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"pretrained": True}, "model: expected --model with"),
        ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        ({"model": "m", "pretrained": True, "checkpoint": "c"}, "expected --checkpoint or --pretrained, got both"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, words):
    with pytest.raises(ArgumentError, match=words):
        BenchConfig.of(**arguments)
