from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import skillfast
from skillfast.errors import ArgumentError, DataError
from skillfast.models.sites import Site
from skillfast.skills.ranking import NeuronRanking, ranking_of
from skillfast.skills.select import skill_size
from skillfast.skills.skill import matched_skills, overlap, random_skills

pytestmark = pytest.mark.filterwarnings("ignore:no neuron was chosen")
SITES = (Site("blocks.0.mlp", "mlp", 0, "a", 8), Site("blocks.1.attn", "attn", 1, "b", 4, 2))


def scores(pearson):
    pearson = np.asarray(pearson, dtype=float)
    return skillfast.NeuronScores(
        columns=("label:a", "label:b", "loss")[: pearson.shape[1]],
        mean=np.zeros(12), std=np.ones(12), n_observations=9, pearson=pearson, sites=SITES, fingerprint="f",
    )  # fmt: skip


def neurons(skill):
    return {site: index.tolist() for site, index in skill.neurons.items()}


def test_the_best_neurons_of_each_column_are_chosen():
    values = np.zeros((12, 3))
    values[[2, 5, 9], 0] = [0.9, 0.8, 0.7]
    values[[0, 11], 2] = [-0.9, 0.5]
    skills = skillfast.select(scores(values), share=3 / 12, max_site_share=1)
    assert list(skills) == ["a", "b", "loss"]
    assert neurons(skills["a"]) == {"blocks.0.mlp": [2, 5], "blocks.1.attn": [1]}
    assert neurons(skills["b"]) == {}  # nothing goes with it
    assert neurons(skills["loss"]) == {"blocks.1.attn": [3]}
    assert (skills["a"].metric, skills["a"].method, skills["a"].fingerprint) == ("label:a", "pearson", "f")
    assert neurons(skillfast.select(scores(values), signed=False, share=2 / 12, max_site_share=1)["loss"]) == {
        "blocks.0.mlp": [0], "blocks.1.attn": [3],
    }  # fmt: skip


def test_an_empty_skill_is_told():
    values = np.zeros((12, 3))
    values[0, 0] = 0.5
    with pytest.warns(RuntimeWarning, match="no neuron was chosen for label:b, loss: none has a score above 0"):
        skillfast.select(scores(values))


def test_masks_are_taken_and_floats_refused():
    skill = skillfast.Skill("mine", {"head": np.array([False, True, False, True])})
    assert neurons(skill) == {"head": [1, 3]}
    with pytest.raises(ArgumentError, match=r"expected whole numbers or a mask in head, got torch\.float"):
        skillfast.Skill("mine", {"head": [1.7]})


def test_no_site_gives_more_than_its_share():
    values = np.tile(np.linspace(0.9, 0.1, 12)[:, None], (1, 2))
    skill = skillfast.select(scores(values), share=0.5, max_site_share=0.5)["a"]
    assert neurons(skill) == {"blocks.0.mlp": [0, 1, 2, 3], "blocks.1.attn": [0, 1]}


def test_a_share_is_what_a_skill_takes_at_most():
    """Half a neuron more is not taken, and products that miss a whole number by rounding are whole."""
    values = np.ones((12, 3))
    assert len(skillfast.select(scores(values), share=2.6 / 12, max_site_share=1)["a"]) == 2
    assert len(skillfast.select(scores(values), share=0.01)["a"]) == 1  # a skill is one neuron at least
    assert 0.29 * 100 < 29
    assert [skill_size(0.29, 100), skill_size(0.03, 23_424), skill_size(0.07, 100)] == [29, 702, 7]


def test_undefined_scores_are_never_chosen():
    values = np.full((12, 1), np.nan)
    values[3] = 0.1
    assert neurons(skillfast.select(scores(values), share=1, max_site_share=1)["a"]) == {"blocks.0.mlp": [3]}


def test_an_area_under_the_curve_of_a_half_says_nothing():
    auroc = np.full((12, 1), 0.5)
    auroc[[3, 7], 0] = [0.6, 0.1]
    made = dataclasses.replace(scores(np.zeros((12, 1))), auroc=auroc)
    assert neurons(skillfast.select(made, "auroc", share=1, max_site_share=1)["a"]) == {"blocks.0.mlp": [3]}
    both = skillfast.select(made, "auroc", signed=False, share=1, max_site_share=1)["a"]
    assert neurons(both) == {"blocks.0.mlp": [3, 7]}


def test_columns_that_would_share_a_name_keep_it_whole():
    made = dataclasses.replace(scores(np.ones((12, 2))), columns=("label:a", "shape:a"))
    assert list(skillfast.select(made)) == ["label:a", "shape:a"]
    assert list(skillfast.select(made, metric="shape")) == ["a"]


def test_contrastive_selection_prefers_neurons_of_one_class():
    values = np.zeros((12, 2))
    values[0] = [0.9, 0.89]  # carries both
    values[1] = [0.5, -0.2]
    assert neurons(skillfast.select(scores(values), share=1 / 12)["a"]) == {"blocks.0.mlp": [0]}
    assert neurons(skillfast.select(scores(values), share=1 / 12, contrastive=True)["a"]) == {"blocks.0.mlp": [1]}


def test_what_speaks_against_another_class_counts():
    values = np.zeros((12, 2))
    values[1] = [0.5, -0.2]
    values[2] = [0.6, 0.0]
    assert neurons(skillfast.select(scores(values), share=1 / 12, contrastive=True)["a"]) == {"blocks.0.mlp": [1]}


def test_a_colon_belongs_to_the_name_of_a_class():
    values = np.zeros((12, 2))
    values[0] = [0.9, 0.89]
    values[1] = [0.5, -0.2]
    found = dataclasses.replace(scores(values), columns=("label:x:y", "label:z"))
    assert neurons(skillfast.select(found, share=1 / 12, contrastive=True)["x:y"]) == {"blocks.0.mlp": [1]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"method": "magic"},
            "method: expected one of pearson, spearman, auroc, mutual_info, attribution, mask, erase, got 'magic'",
        ),
        ({"share": 0}, r"share: expected a share in \(0, 1\], got 0"),
        ({"max_site_share": 1.5}, "max_site_share: expected a share"),
        ({"metric": "colour"}, "metric: expected one of label:a, label:b, loss, got 'colour'"),
    ],
)
def test_select_refuses(arguments, words):
    with pytest.raises(ArgumentError, match=words):
        skillfast.select(scores(np.ones((12, 3))), **arguments)


def test_select_needs_sites():
    made = skillfast.correlate(np.random.default_rng(0).normal(size=(9, 3)), {"x": np.arange(9) % 2})
    with pytest.raises(ArgumentError, match="expected scores of a traced model"):
        skillfast.select(made)


def test_skills_by_hand_are_tidied():
    skill = skillfast.Skill("mine", {"blocks.0.mlp": [5, 1, 5], "head": []})
    assert neurons(skill) == {"blocks.0.mlp": [1, 5]}
    assert len(skill) == 2
    with pytest.raises(ArgumentError, match="expected indices from 0 in head, got -1"):
        skillfast.Skill("mine", {"head": [-1]})


@pytest.mark.parametrize("knob", [float("nan"), float("inf"), -1e39, "2"])
def test_a_skill_has_a_finite_knob(knob):
    with pytest.raises(ArgumentError) as refused:
        skillfast.Skill("mine", {"head": [1]}, knob=knob)
    assert str(refused.value) == f"skill 'mine': expected a finite knob, got {knob}; 0 removes, 2 doubles"


def test_skills_are_saved_and_loaded(tmp_path):
    made = skillfast.select(scores(np.random.default_rng(0).normal(size=(12, 3))))
    path = skillfast.save_skills(tmp_path, made.values())
    loaded = skillfast.load_skills(path)
    assert loaded.keys() == skillfast.load_skills(tmp_path).keys() == made.keys()
    assert all(neurons(loaded[name]) == neurons(made[name]) for name in made)
    assert loaded["a"].fingerprint == "f"
    assert list(skillfast.load_skills(path, ["loss", "a"])) == ["loss", "a"]
    assert json.loads(path.read_text())["schema"] == "skillfast.skills/1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "expected a file, got none; write it with save_skills or `skillfast bench`$"),
        ("{", "expected JSON"),
        ('{"schema": "skillfast.skills/2"}', "expected schema 'skillfast.skills/1', got 'skillfast.skills/2'"),
        (
            '{"schema": "skillfast.skills/1", "skills": [{"colour": 1}]}',
            "expected keys that are known at skills\\[0\\], got .colour.",
        ),
    ],
)
def test_broken_skill_files_are_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / "skills.json").write_text(text)
    with pytest.raises(DataError, match=words):
        skillfast.load_skills(tmp_path)


def test_overlap_is_jaccards():
    a = skillfast.Skill("a", {"x": torch.tensor([1, 2]), "y": torch.tensor([1])})
    b = skillfast.Skill("b", {"x": torch.tensor([2, 3])})
    np.testing.assert_allclose(overlap([a, b]), [[1, 0.25], [0.25, 1]])


def test_random_neurons_are_none_of_the_skills():
    sites = (Site("blocks.0.mlp", "mlp", 0, "a", 50), Site("blocks.1.mlp", "mlp", 1, "b", 9))
    own = skillfast.Skill("s", {"blocks.0.mlp": range(20), "blocks.1.mlp": range(6)})
    times = np.zeros(50)
    for drawn in random_skills(own, sites, 300, np.random.default_rng(0)):
        times[drawn.neurons["blocks.0.mlp"]] += 1
        few = set(drawn.neurons["blocks.1.mlp"].tolist())
        assert len(few) == 6
        assert few >= {6, 7, 8}  # all others, and three of its own
    assert not times[:20].any()
    assert np.abs(times[20:] - 200).max() < 4.5 * np.sqrt(300 * 2 / 9)


def test_matched_neurons_are_as_active_and_none_of_the_skills():
    rng = np.random.default_rng(0)
    means = {"blocks.0.mlp": rng.normal(size=400) ** 3}
    size = np.abs(means["blocks.0.mlp"])
    own = skillfast.Skill("s", {"blocks.0.mlp": np.argsort(-size)[20:100:4]})  # of the more active
    want = size[own.neurons["blocks.0.mlp"]].mean()
    site = (Site("blocks.0.mlp", "mlp", 0, "a", 400),)
    matched = matched_skills(own, means, 50, rng)
    found = [size[drawn.neurons["blocks.0.mlp"]].mean() for drawn in matched]
    other = [size[drawn.neurons["blocks.0.mlp"]].mean() for drawn in random_skills(own, site, 50, rng)]
    assert abs(np.mean(found) / want - 1) < 0.25
    assert np.mean(other) < want / 2
    for drawn in matched:
        assert len(drawn) == 20
        assert not set(drawn.neurons["blocks.0.mlp"].tolist()) & set(own.neurons["blocks.0.mlp"].tolist())
    assert len({tuple(drawn.neurons["blocks.0.mlp"].tolist()) for drawn in matched}) == 50
    one = matched_skills(skillfast.Skill("one", {"x": [200]}), {"x": np.arange(400.0)}, 400, rng)
    assert {int(drawn.neurons["x"][0]) for drawn in one} == {*range(192, 200), *range(201, 210)}  # 17 nearest others
    most = skillfast.Skill("m", {"blocks.0.mlp": range(390)})
    assert matched_skills(most, means, 1, rng)[0].neurons["blocks.0.mlp"].tolist() == list(range(390, 400))


@pytest.mark.parametrize("method", ["pearson", "auroc", "attribution", "mask"])
@pytest.mark.parametrize(("signed", "contrastive"), [(True, False), (False, False), (True, True)])
def test_choices_are_those_of_a_plain_loop(method, signed, contrastive):
    """Neurons one after the other, best first, of either site no more than its share and never what goes against it."""
    rng = np.random.default_rng(0)
    values = rng.random((12, 4)).round(1) - (0 if method == "auroc" else 0.5)  # with ties
    values[[1, 9]] = np.nan
    columns, share, most = ("label:a", "label:b", "label:c", "loss"), 0.45, 0.5
    if method in ("pearson", "auroc"):
        made = skillfast.NeuronScores(
            columns, np.zeros(12), np.ones(12), 9, **{method: values}, sites=SITES, fingerprint="f"
        )
    else:
        made = NeuronRanking(method, columns, values, SITES, np.full(4, 9), "f", {"seed": 3})
    if method == "mask" and contrastive:
        with pytest.raises(ArgumentError, match="contrastive: expected False with learned masks"):
            skillfast.select(made, contrastive=True)
        return
    found = skillfast.select(made, method, share=share, max_site_share=most, signed=signed, contrastive=contrastive)
    size = values - 0.5 if method == "auroc" else values
    size = size if signed or method == "mask" else np.abs(size)
    for c, (name, skill) in enumerate(found.items()):
        assert name == ("a", "b", "c", "loss")[c]
        others = [i for i in range(3) if i != c] if c < 3 else []
        worth = {}
        for i in range(12):
            if np.isnan(size[i, c]) or (method != "mask" and size[i, c] <= 0):
                continue
            rival = max(size[i, others], default=0) if contrastive else 0
            worth[i] = size[i, c] - (max(rival, 0) if method == "attribution" else rival)
        left, chosen = {0: 4, 1: 2}, []  # of sites of 8 and of 4 neurons
        for i in sorted(worth, key=lambda i: (-worth[i], i)):
            if left[int(i >= 8)] and len(chosen) < round(share * 12):
                left[int(i >= 8)] -= 1
                chosen.append(i)
        want = {
            "blocks.0.mlp": sorted(i for i in chosen if i < 8),
            "blocks.1.attn": sorted(i - 8 for i in chosen if i > 7),
        }
        assert neurons(skill) == {site: index for site, index in want.items() if index}
        assert (skill.metric, skill.method, skill.fingerprint) == (columns[c], method, "f")
        settings = {"share": share, "max_site_share": most, "signed": signed, "contrastive": contrastive}
        assert skill.settings == settings | ({} if method in ("pearson", "auroc") else {"seed": 3})


def test_what_ranking_is_taken(tmp_path):
    made = scores(np.ones((12, 3)))
    ranking = ranking_of(made)
    assert (ranking.method, ranking.columns, ranking.sites, ranking.fingerprint) == (
        "pearson",
        made.columns,
        SITES,
        "f",
    )
    assert ranking.n_observations.tolist() == [9, 9, 9]
    assert ranking.n_neurons == 12
    assert ranking_of(ranking) is ranking_of(ranking, "pearson") is ranking
    with pytest.raises(ArgumentError, match="method: expected pearson, which this ranking holds, got 'auroc'; leave"):
        ranking_of(ranking, "auroc")
    kept = dataclasses.replace(ranking, settings={"seed": 3})
    kept.save(tmp_path)
    back = NeuronRanking.load(tmp_path)
    assert (back.method, back.columns, back.sites, back.fingerprint) == ("pearson", made.columns, SITES, "f")
    assert back.settings == {"seed": 3}
    np.testing.assert_array_equal(back.values, kept.values)
    np.testing.assert_array_equal(back.n_observations, kept.n_observations)
    two = [skillfast.Skill("a", {"x": [1]}, fingerprint="f"), skillfast.Skill("b", {"x": [1]})]
    with pytest.raises(ArgumentError, match=r"skills: expected one model's, got fingerprints \['None', 'f'\]"):
        skillfast.save_skills(tmp_path, two)
    full = skillfast.Skill("a", {"x": [1], "y": [0, 2]}, "label:a", "pearson", {"share": 0.5}, "f")
    skillfast.save_skills(tmp_path, [full])
    loaded = skillfast.load_skills(tmp_path)["a"]
    assert neurons(loaded) == neurons(full)
    assert (loaded.name, loaded.metric, loaded.method, loaded.settings) == ("a", "label:a", "pearson", {"share": 0.5})


def test_an_attribution_is_spared_what_others_gain_alone():
    """What a neuron does against another class makes it no better for its own, unlike with a correlation."""
    values = np.zeros((12, 2))
    values[1], values[2], values[4] = [0.5, -0.2], [0.6, 0.0], [0.9, 0.4]
    ranking = NeuronRanking("attribution", ("label:a", "label:b"), values, SITES, np.full(2, 9))
    assert neurons(skillfast.select(ranking, share=1 / 12, contrastive=True)["a"]) == {"blocks.0.mlp": [2]}
