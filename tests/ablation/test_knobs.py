"""Knobs do what contexts of `ablate` do, change between two tokens, and are baked by `export`."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import make_vit, one_line
from tiny_models import save_model

import skillfast
from skillfast import Skill
from skillfast.errors import ArgumentError, DataError, ModelError

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.filterwarnings("ignore:sites cover")

IDS = torch.tensor([[5, 9, 4, 20]])
JOY = Skill("positive", {"blocks.0.mlp": torch.arange(0, 20), "blocks.1.attn": torch.arange(6)})
FORMAL = Skill("formal", {"blocks.0.mlp": torch.arange(15, 30)})
SKILLS = {"joy": JOY, "formal": FORMAL}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("model"), "LlamaForCausalLM")
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def test_factors_are_those_of_nested_ablations(model):
    intact = logits(model)
    with skillfast.knobs(model, SKILLS) as turn:
        assert dict(turn) == {"joy": 1.0, "formal": 1.0}
        assert torch.equal(logits(model), intact)
        for joy, formal in ((2.0, 1.0), (0.0, 3.0), (0.5, -1.0)):
            turn["joy"], turn["formal"] = joy, formal
            assert (turn["joy"], turn["formal"], len(turn)) == (joy, formal, 2)
            found = logits(model)
            with skillfast.ablate(model, FORMAL, scale=0.0):  # inside, and on top of the knobs
                removed = logits(model)
            assert not torch.equal(removed, found)
    for joy, formal in ((2.0, 1.0), (0.0, 3.0), (0.5, -1.0)):
        with skillfast.knobs(model, SKILLS) as turn:
            turn["joy"], turn["formal"] = joy, formal
            found = logits(model)
        with skillfast.ablate(model, JOY, scale=joy), skillfast.ablate(model, FORMAL, scale=formal):
            torch.testing.assert_close(found, logits(model), atol=1e-5, rtol=1e-5)
        assert (found - intact).abs().max() > 1e-3
    assert torch.equal(logits(model), intact)


def test_only_the_components_are_turned(model):
    with skillfast.knobs(model, {"joy": JOY}, components=("attn",)) as turn:
        turn["joy"] = 0
        found = logits(model)
        total = model(IDS).logits.sum()  # by factors that a forward without gradients has used
        (gradient,) = torch.autograd.grad(total, [model.model.layers[0].mlp.up_proj.weight])
        assert gradient.isfinite().all()
    with skillfast.ablate(model, JOY, components=("attn",)):
        torch.testing.assert_close(found, logits(model), atol=1e-6, rtol=1e-6)


def test_a_knob_turns_while_the_model_generates(model):
    """The first new token comes at factor 1, the second at 0: each as a forward of its own gives it."""
    seen = []

    class Turning(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores.clone())
            turn["joy"] = 0.0
            return scores

    with skillfast.knobs(model, SKILLS) as turn:
        written = model.generate(
            IDS, max_new_tokens=2, do_sample=False, use_cache=False, logits_processor=[Turning()], eos_token_id=None
        )
    with torch.inference_mode():
        torch.testing.assert_close(seen[0], model(IDS).logits[:, -1], atol=1e-5, rtol=1e-5)
        with skillfast.ablate(model, JOY):
            expected = model(written[:, :-1]).logits[:, -1]
        torch.testing.assert_close(seen[1], expected, atol=1e-5, rtol=1e-5)
        assert (model(written[:, :-1]).logits[:, -1] - expected).abs().max() > 1e-3


def test_what_is_no_knob_is_refused(model):
    with skillfast.knobs(model, SKILLS) as turn:
        assert "expected one of joy, formal, got 'sad'" in one_line(ArgumentError, turn.__setitem__, "sad", 1.0)
        assert "expected a finite number" in one_line(ArgumentError, turn.__setitem__, "joy", float("nan"))
        assert turn["joy"] == 1.0
    assert "expected at least one skill" in one_line(ArgumentError, skillfast.knobs(model, {}).__enter__)
    other = Skill("other", {"blocks.9.mlp": torch.arange(2)})
    assert "expected sites that the model has" in one_line(
        ArgumentError, skillfast.knobs(model, {"other": other}).__enter__
    )
    gated = skillfast.prepare(make_vit(depth=1))
    skills = {"other": Skill("other", {"blocks.0.mlp": torch.arange(2)})}
    assert "expected a model that was not prepared" in one_line(ArgumentError, skillfast.knobs(gated, skills).__enter__)
    model.train()
    try:
        assert "training mode" in one_line(ModelError, skillfast.knobs(model, SKILLS).__enter__)
    finally:
        model.eval()


def test_knobs_are_saved_with_the_skills_and_start_there(model, tmp_path):
    with skillfast.knobs(model, SKILLS) as turn:
        assert {name: skill.knob for name, skill in turn.skills.items()} == {"joy": 1.0, "formal": 1.0}
        turn["joy"], turn["formal"] = 2, 0.25
        found, path = logits(model), skillfast.save_skills(tmp_path, turn.skills.values())
    read = skillfast.load_skills(path)
    assert {name: skill.knob for name, skill in read.items()} == {"joy": 2.0, "formal": 0.25}
    assert all(read[name].neurons[site].equal(index) for name in SKILLS for site, index in SKILLS[name].neurons.items())
    with skillfast.knobs(model, read) as turn:
        assert dict(turn) == {"joy": 2.0, "formal": 0.25}
        assert torch.equal(logits(model), found)
        turn["joy"] = turn["formal"] = 1
        intact = logits(model)
    assert torch.equal(intact, logits(model))
    with skillfast.ablate(model, read["joy"]):  # which takes its own factor
        removed = logits(model)
    with skillfast.ablate(model, JOY):
        assert torch.equal(removed, logits(model))
    # what was never turned has no key of its own, and a file without it is one of factors 1
    plain = json.loads(skillfast.save_skills(tmp_path / "plain", [JOY]).read_text())
    assert "knob" not in plain["skills"][0]
    assert skillfast.load_skills(tmp_path / "plain")["positive"].knob == 1.0


@pytest.mark.parametrize("knob", ["2", True, 1e39, -1e39, [1.0]])
def test_a_saved_knob_that_is_no_factor_is_refused(tmp_path, knob):
    path = skillfast.save_skills(tmp_path, [replace(JOY, knob=-2.5)])
    saved = json.loads(path.read_text())
    assert saved["skills"][0]["knob"] == -2.5
    saved["skills"][0]["knob"] = knob
    path.write_text(json.dumps(saved))
    assert "at skills[0].knob, got " in one_line(DataError, skillfast.load_skills, path)


def test_export_bakes_each_factor(model, tmp_path):
    with skillfast.knobs(model, SKILLS) as turn:
        turn["joy"], turn["formal"] = 2.0, 0.0
        found = logits(model)
        skillfast.export(model, list(turn.skills.values()), tmp_path / "baked", scale=dict(turn))
    baked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
    torch.testing.assert_close(logits(baked), found, atol=1e-5, rtol=1e-5)
    card = (tmp_path / "baked" / "README.md").read_text(encoding="utf-8")
    assert "with 2 skills scaled\n" in card
    assert "- Factors on the neurons below: `joy` 2, `formal` 0, towards 0." in card
    text = one_line(ArgumentError, skillfast.export, model, JOY, tmp_path / "none", scale={"joy": 2.0})
    assert "scale: expected a factor for each of positive, got joy" in text
