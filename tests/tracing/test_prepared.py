"""Prepared models: compiled as one graph, traced and ablated as the eager model is."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import numpy as np
import pytest
import timm
import torch
from conftest import make_vit, one_line
from torch._dynamo.utils import counters

import skillfast
from skillfast import Categorical, Condition, Continuous, Skill
from skillfast.errors import ArgumentError, ModelError
from skillfast.models.coverage import randomise
from skillfast.tracing.gates import GATE, slots_of
from skillfast.tracing.prepared import prepared

FIRST = Skill("first", {"blocks.0.mlp": torch.arange(0, 96, 5), "blocks.1.attn": [0, 3], "head": [1]})
OTHER = Skill("other", {"blocks.0.attn": [2], "blocks.1.mlp": torch.arange(40)})
CONDITIONS = [Condition(FIRST), Condition(OTHER, scale=2.5), Condition(FIRST, components=("mlp",), name="mlp alone")]


@pytest.fixture(autouse=True)
def fresh():
    """No graphs of other tests."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def images():
    return torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))


LABELS = torch.arange(24) % 5


def compiled(model, backend="eager"):
    return torch.compile(model, backend=backend, fullgraph=True)


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def batches_of(images):
    return list(zip(images.split(8), LABELS.split(8), strict=True))


def same(found, want):
    for site in want.sites:
        np.testing.assert_allclose(found[site.name].pearson, want[site.name].pearson, atol=5e-5, err_msg=site.name)
        np.testing.assert_allclose(found[site.name].auroc, want[site.name].auroc, atol=0.02, err_msg=site.name)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_compiled_model_is_traced_swept_and_ablated_in_one_graph(images, late):
    batches, plain = batches_of(images), make_vit(depth=2)
    if late:
        model = compiled(make_vit(depth=2))
        with torch.inference_mode():
            model(images[:8])  # a graph without gates
        assert skillfast.prepare(model) is model
        counters.clear()
    else:
        model = compiled(skillfast.prepare(make_vit(depth=2)))
    same(skillfast.trace(model, batches), skillfast.trace(plain, batches))
    settings = {"keep_predictions": True, "keep_margins": True, "keep_embeddings": True}
    found, want = (skillfast.sweep(m, batches, CONDITIONS, **settings) for m in (model, plain))
    np.testing.assert_allclose(found.margins, want.margins, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.embeddings, want.embeddings, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.predictions, want.predictions)
    assert np.abs(found.margins[0] - found.margins[1]).max() > 0.01
    for skill, scale in ((FIRST, 0.0), (OTHER, 2.0), (FIRST, -1.0)):
        with torch.inference_mode():
            with skillfast.ablate(model, skill, scale=scale):
                ablated = model(images[:8])
            with skillfast.ablate(plain, skill, scale=scale):
                torch.testing.assert_close(ablated, plain(images[:8]), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(images[:8]), plain(images[:8]))
    assert graphs() == 1  # nothing was compiled again


def test_models_of_one_class_have_graphs_of_their_own(images):
    """Without guards on hooks the graph of the one that ran first would be that of all, gates or not."""
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # as a process begins
    plain = compiled(make_vit(depth=2))
    with torch.inference_mode():
        want = plain(images)
        some, every = (compiled(skillfast.prepare(make_vit(depth=2), sites=sites)) for sites in (("attn",), None))
        for model in (some, every):
            torch.testing.assert_close(model(images), want)
            assert {times for times, *_ in prepared(model).forwards(model._orig_mod).values()} == {1}
        with skillfast.ablate(every, FIRST), skillfast.ablate(plain._orig_mod, FIRST):
            changed = every(images)
            torch.testing.assert_close(changed, plain._orig_mod(images))
    assert not torch.allclose(changed, want, atol=0.01)


def test_a_tracer_in_a_loop_of_ones_own(images):
    model, plain = compiled(skillfast.prepare(make_vit(depth=2), pool="cls")), make_vit(depth=2)
    metrics = {"label": Categorical(5), "loss": Continuous()}
    tracers = [skillfast.Tracer(m, metrics, pool="cls", sites=("mlp", "head")) for m in (model, plain)]
    loss = torch.randn(24)
    with torch.inference_mode(), tracers[0], tracers[1]:
        for x, y, values in zip(images.split(8), LABELS.split(8), loss.split(8), strict=True):
            for m, tracer in zip((model, plain), tracers, strict=True):
                m(x)
                tracer.step(label=y, loss=values)
        model(x)
        tracers[0].discard()
        with pytest.raises(ModelError, match="expected a forward of the traced model since the last step"):
            tracers[0].step(label=y, loss=values)
        model(x)
        model(x)
        with pytest.raises(ModelError, match=r"expected one forward per step, got 2"):
            tracers[0].step(label=y, loss=values)
        tracers[0].discard()
        with skillfast.ablate(model, FIRST), skillfast.ablate(plain, FIRST):  # what flows on is read
            model(x)
            tracers[0].step(label=y, loss=values)
    assert tracers[0].n_observations == 32
    with torch.inference_mode(), skillfast.ablate(plain, FIRST), tracers[1]:
        plain(x)
        tracers[1].step(label=y, loss=values)
    same(tracers[0].compute(), tracers[1].compute())
    assert graphs() == 1


def test_ablations_nest_and_leave_in_any_order(images):
    model, plain = skillfast.prepare(make_vit(depth=2)), make_vit(depth=2)
    with torch.no_grad():
        with skillfast.ablate(model, FIRST, scale=0.5), skillfast.ablate(plain, FIRST, scale=0.5):
            with skillfast.ablate(model, OTHER), skillfast.ablate(plain, OTHER):
                torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-5)
        one, two = skillfast.ablate(model, FIRST), skillfast.ablate(model, FIRST, scale=3.0)
        one.__enter__()
        two.__enter__()
        one.__exit__(None, None, None)
        with skillfast.ablate(plain, FIRST, scale=3.0):
            torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-5)
        two.__exit__(None, None, None)
        torch.testing.assert_close(model(images), plain(images))


@pytest.mark.parametrize("turned", [False, True])
def test_means_and_factors_of_the_same_neurons_nest_in_their_order(images, turned):
    model, plain = skillfast.prepare(make_vit(depth=2)), make_vit(depth=2)
    scores = skillfast.trace(plain, batches_of(images), statistics=("pearson",))
    changes = [{"mode": "mean", "reference": scores, "scale": 0.25}, {"scale": 3.0}][:: -1 if turned else 1]
    with torch.no_grad():
        for m in (model, plain):
            outer, inner = (skillfast.ablate(m, FIRST, **change) for change in changes)
            with outer:
                once = m(images)
                with inner:
                    twice = m(images)
                after = m(images)
            torch.testing.assert_close(after, once)
            if m is model:
                first, both = once, twice
    torch.testing.assert_close(first, once, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both, twice, rtol=1e-5, atol=1e-5)
    assert (both - first).abs().max() > 1e-3


def test_forwards_of_a_prepared_model_are_told_by_their_shape(images):
    """A batch as large as the rows is read, a larger one is not; each gate says how often, and of what."""
    model = skillfast.prepare(make_vit(depth=1), rows=5, tokens=17)
    found = prepared(model)
    with torch.no_grad():
        for n in (3, 5, 6):
            model(images[:n])
    assert set(found.forwards(model).values()) == {(2, 5, 17, 0), (2, 5, 1, 0)}  # the head has one row
    for tokens in (0, -1):
        told = one_line(ArgumentError, skillfast.prepare, make_vit(depth=1), tokens=tokens)
        assert told.startswith("rows, tokens: expected at least 1, got 64, ")
    told = one_line(ArgumentError, skillfast.prepare, make_vit(depth=1), rows=0, tokens=3)
    assert told.startswith("rows, tokens: expected at least 1, got 0, 3")
    skillfast.prepare(make_vit(depth=1), rows=1, tokens=1)
    with skillfast.Tracer(model, {"label": Categorical(5)}, sites=("mlp",)) as tracer:
        for shape in ((6, 17), (5, 18)):
            told = one_line(ArgumentError, tracer.expect, torch.ones(shape))
            assert told.startswith("mask: expected at most 5 x 17 tokens, which the model is prepared for, got shape")
        tracer.expect(torch.arange(17).expand(2, -1) < 3)
        gate = found.gate(model, tracer.sites[0])
        assert gate.mask.sum(1).tolist() == [3, 3, 17, 17, 17]
        tracer.expect(torch.ones(1, 17))
        assert gate.mask.all()


def test_a_mask_of_more_tokens_than_ran_is_refused():
    model = skillfast.prepare(make_vit(depth=1, patch_size=16), rows=5, tokens=3)  # 2 tokens
    with skillfast.Tracer(model, {"label": Categorical(5)}, sites=("mlp",)) as tracer, torch.no_grad():
        tracer.expect(torch.ones(4, 3))
        model(torch.randn(4, 3, 16, 16))
        told = one_line(ArgumentError, tracer.step, label=torch.arange(4))
    assert told.startswith("mask: expected one for the 4 x 2 tokens of blocks.0.mlp, got shape [4, 3]")


def test_means_take_the_place_of_neurons(images):
    model, plain = compiled(skillfast.prepare(make_vit(depth=2))), make_vit(depth=2)
    scores = skillfast.trace(plain, batches_of(images))
    condition = Condition(FIRST, mode="mean")
    found, want = (
        skillfast.sweep(m, batches_of(images), [condition], reference=scores, keep_margins=True) for m in (model, plain)
    )
    np.testing.assert_allclose(found.margins, want.margins, rtol=1e-4, atol=1e-4)
    bank = skillfast.donors(plain, batches_of(images), [FIRST])
    told = one_line(
        ArgumentError, skillfast.sweep, model, batches_of(images), [Condition(FIRST, mode="resample")], donors=bank
    )
    assert "prepare(model, donors=True, tokens=...)" in told


def test_donors_take_the_place_of_neurons(images):
    """One graph, whoever's donors and whichever skill; only the forwards of the very model are told of them."""
    model, plain = compiled(skillfast.prepare(make_vit(depth=2), rows=8, tokens=17, donors=True)), make_vit(depth=2)
    bank = skillfast.donors(plain, batches_of(images), [FIRST, OTHER], n_donors=6)
    conditions = [Condition(FIRST, mode="resample"), Condition(OTHER, mode="resample", scale=0.5), Condition(OTHER)]
    settings = {"donors": bank, "keep_margins": True}
    found, want = (skillfast.sweep(m, batches_of(images), conditions, **settings) for m in (model, plain))
    np.testing.assert_allclose(found.margins, want.margins, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.donors, want.donors)
    change = {"mode": "resample", "donors": bank}
    with torch.inference_mode():
        for skill, scale in ((FIRST, 0.0), (OTHER, 0.25)):
            for x in images.split(8)[:2]:
                with skillfast.ablate(model, skill, scale=scale, **change):
                    got = model(x)
                with skillfast.ablate(plain, skill, scale=scale, **change):
                    torch.testing.assert_close(got, plain(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x), plain(x))
        assert graphs() == 1
        told = one_line(ModelError, call_inside, model, model._orig_mod, x, change)
        assert "blocks.0.mlp: expected 0 forwards that were told of donors" in told
        assert "got 1, the last of 8 x 17; call the very model that was given" in told
        with skillfast.ablate(model, FIRST, **change):
            told = one_line(ModelError, skillfast.ablate(model, FIRST, **change).__enter__)
        assert "expected no other donors of a prepared model at blocks.0.mlp, got some" in told
        told = one_line(ArgumentError, call_inside, model, model, torch.cat([x, x]), change)
        assert "expected batches of up to 8 examples of 17 tokens, which the model is prepared for, got 16" in told
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("turned", [False, True])
def test_donors_and_other_changes_of_the_same_neurons_nest_in_their_order(images, turned):
    """What comes later changes what a donor gave, what came before does not."""
    model, plain = compiled(skillfast.prepare(make_vit(depth=2), rows=8, tokens=17, donors=True)), make_vit(depth=2)
    scores = skillfast.trace(plain, batches_of(images), statistics=("pearson",))
    some = Skill("some", {"blocks.0.mlp": [0, 1, 5], "blocks.1.attn": [3, 4]})  # 1, 4 are not of the other skill
    bank = skillfast.donors(plain, batches_of(images), [FIRST], n_donors=6)
    first = (FIRST, {"mode": "resample", "donors": bank, "scale": 0.5})
    order = [first, (some, {"scale": 3.0}), (some, {"mode": "mean", "reference": scores, "scale": 0.5})]
    found = []
    with torch.inference_mode():
        for each in (model, plain):
            with ExitStack() as stack:
                for skill, change in reversed(order) if turned else order:
                    stack.enter_context(skillfast.ablate(each, skill, **change))
                found.append(each(images[:8]))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found[1], plain(images[:8]), atol=0.02)
        torch.testing.assert_close(model(images[:8]), plain(images[:8]))  # nothing is left of it
    assert graphs() == 1


def call_inside(model, called, x, change):
    with skillfast.ablate(model, FIRST, **change):
        called(x)


@pytest.mark.slow
def test_inductor_gives_what_eager_gives(images):
    model, plain = compiled(skillfast.prepare(make_vit(depth=1)), "inductor"), make_vit(depth=1)
    skill = Skill("s", {"blocks.0.mlp": torch.arange(0, 96, 5)})
    same(skillfast.trace(model, batches_of(images)), skillfast.trace(plain, batches_of(images)))
    for scale in (0.0, 2.0):
        condition = Condition(skill, scale=scale)
        found, want = (skillfast.sweep(m, batches_of(images), [condition], keep_margins=True) for m in (model, plain))
        np.testing.assert_allclose(found.margins, want.margins, rtol=1e-3, atol=1e-3)
    assert graphs() == 1


def test_texts_with_padding_in_a_language_model():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, vocab_size=99,
        max_position_embeddings=16, num_labels=3, attn_implementation="eager",
    )  # fmt: skip
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(transformers.BertForSequenceClassification(config).eval())
    generator = torch.Generator().manual_seed(1)
    batches = []
    for lengths in torch.randint(3, 10, (24,), generator=generator).split(8):
        mask = (torch.arange(9) < lengths[:, None]).long()
        ids = torch.randint(3, 99, mask.shape, generator=generator) * mask
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": torch.arange(8) % 3})
    told = one_line(ArgumentError, skillfast.trace, skillfast.prepare(models[0]), batches)
    assert "prepare(model, rows=64, tokens=9)" in told
    model = compiled(skillfast.prepare(models[0], tokens=12))  # once more
    same(skillfast.trace(model, batches), skillfast.trace(models[1], batches))
    assert graphs() == 1


def test_gates_are_no_weights_and_move_with_the_model():
    plain, model = make_vit(depth=1), skillfast.prepare(make_vit(depth=1))
    assert model.state_dict().keys() == plain.state_dict().keys()
    gate = getattr(model.blocks[0].mlp.fc2, GATE)
    model.to(torch.bfloat16)
    assert gate.scale.dtype == gate.rows.dtype == torch.float32
    model.to("meta")
    assert {buffer.device.type for buffer in gate.buffers()} == {"meta"}
    half = skillfast.prepare(make_vit(depth=1).to(torch.bfloat16), pool="none", tokens=65)
    assert getattr(half.blocks[0].mlp.fc2, GATE).rows.dtype == torch.bfloat16  # half the memory of each token
    again = skillfast.prepare(make_vit(depth=1), sites=("attn",))
    skillfast.prepare(again, sites=("mlp",), pool="max")
    assert [site.name for site in prepared(again).sites] == ["blocks.0.mlp"]
    assert sum(len(module._forward_pre_hooks) for module in again.modules()) == 2  # with that of the model
    assert not hasattr(again.blocks[0].attn.proj, GATE)


@pytest.mark.parametrize(("told", "slots"), [(1, 1), (2, 2), (4, 4), (0, 4), (5, 4), (None, 4)])
def test_a_token_has_as_many_experts_as_the_module_around_them_says(told, slots):
    model = torch.nn.ModuleDict({"moe": torch.nn.ModuleDict({"experts": torch.nn.Identity()})})
    model.moe.top_k = told
    assert slots_of(model, "moe.experts", 4) == slots


def test_other_ways_to_read_a_prepared_model_still_work(images):
    model, plain = skillfast.prepare(make_vit(depth=2), rows=4), make_vit(depth=2)
    batches = batches_of(images)
    found, want = (skillfast.attribute(m, batches) for m in (model, plain))
    np.testing.assert_allclose(found.values, want.values, rtol=1e-4, atol=1e-7)
    found, want = (skillfast.learn_masks(m, batches, want, steps=2, batch_size=8) for m in (model, plain))
    np.testing.assert_allclose(found.values, want.values, rtol=1e-3, atol=1e-4)
    told = one_line(ModelError, skillfast.trace, model, batches)
    assert "it is prepared for batches of up to 4" in told


def test_what_a_model_is_not_prepared_for_is_refused(images):
    model = skillfast.prepare(make_vit(depth=2), sites=("mlp",))
    batches = batches_of(images)
    assert "prepare(model, pool='max')" in one_line(ArgumentError, skillfast.trace, model, batches, pool="max")
    for refused in (
        lambda: skillfast.trace(model, batches, sites=("attn",)),
        lambda: skillfast.sweep(model, batches, [Condition(FIRST)]),
        lambda: skillfast.ablate(model, FIRST).__enter__(),
    ):
        assert "expected one that the model is prepared at (blocks.0.mlp to " in one_line(ArgumentError, refused)
    assert "expected one of mean, cls, max, last" in one_line(ArgumentError, skillfast.prepare, model, pool="median")
    assert "for donors, got none; give tokens=" in one_line(ArgumentError, skillfast.prepare, model, donors=True)
    assert "for pool 'none', got none; give tokens=" in one_line(ArgumentError, skillfast.prepare, model, pool="none")
    assert "expected at least 1" in one_line(ArgumentError, skillfast.prepare, model, rows=0)
    with (
        skillfast.ablate(model, Skill("s", {"blocks.0.mlp": [0]})),
        pytest.raises(ModelError, match="leave its context first"),
    ):
        skillfast.prepare(model)
    told = one_line(ArgumentError, skillfast.sweep, model, batches, [], keep_embeddings=True)
    assert "leave out keep_embeddings" in told
    with skillfast.Tracer(model, {"label": Categorical(5)}, sites=("mlp",)) as tracer:
        told = one_line(ArgumentError, tracer.expect, torch.ones(2, 1))
    assert f"expected at most {skillfast.tracing.prepared.prepared(model).rows} x 0 tokens" in told
    assert "prepare: expected a model in evaluation mode" in one_line(
        ModelError, skillfast.prepare, make_vit(depth=1).train()
    )


METRICS = {"label": Categorical(5), "loss": Continuous()}


def test_tokens_are_observations_of_a_compiled_model(images):
    """Ranks from the same sample of tokens, metrics told before the forward and after it, padding left out."""
    model, plain = compiled(skillfast.prepare(make_vit(depth=2), pool="none", rows=8, tokens=17)), make_vit(depth=2)
    mask = torch.rand(8, 17, generator=torch.Generator().manual_seed(2)) < 0.8
    for early in (False, True):
        tracers = [skillfast.Tracer(m, METRICS, pool="none", bins=8) for m in (model, plain)]
        with torch.inference_mode(), tracers[0], tracers[1]:
            for x, y in batches_of(images):
                values = {"label": y, "loss": x.mean((1, 2, 3))}
                for m, tracer in zip((model, plain), tracers, strict=True):
                    tracer.expect(mask, **(values if early else {}))
                    m(x)
                    tracer.step(**({} if early else values))
        found, want = (tracer.compute() for tracer in tracers)
        assert tracers[0].n_observations == tracers[1].n_observations == 3 * int(mask.sum())
        for name, array in want.arrays().items():
            np.testing.assert_allclose(found.arrays()[name], array, atol=2e-4, err_msg=name)
    assert graphs() == 1
    with skillfast.Tracer(model, METRICS, pool="none") as tracer, torch.inference_mode():
        model(torch.randn(9, 3, 16, 16))
        told = one_line(ModelError, tracer.step, label=LABELS[:9], loss=LABELS[:9])
    assert "it is prepared for batches of up to 8 examples of 17 tokens" in told


class Convolved(torch.nn.Module):
    """Projections that take channels after the batch or tokens before it, the latter of torch's own attention."""

    num_classes = 5

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Conv2d(3, 12, 3, 2), torch.nn.Conv2d(12, 6, 1)
        self.attention = torch.nn.MultiheadAttention(6, 2)
        self.head = torch.nn.Linear(6, 5)
        paths = {"blocks.0.mlp": "down", "blocks.1.attn": "attention.out_proj", "head": "head"}
        skillfast.models.sites.declare_sites(self, paths)

    def forward(self, x):
        x = self.down(torch.relu(self.up(x))).flatten(2).permute(2, 0, 1)  # [tokens, batch, 6]
        return self.head((x + self.attention(x, x, x)[0]).mean(0))


@pytest.mark.parametrize("pool", ["max", "none"])
def test_convolutions_and_attention_of_torch_are_prepared(images, pool):
    model, plain = compiled(skillfast.prepare(Convolved().eval(), pool=pool, tokens=49)), Convolved().eval()
    settings = {"pool": pool, "statistics": ("pearson",)}
    found, want = (skillfast.trace(m, batches_of(images), **settings) for m in (model, plain))
    np.testing.assert_allclose(found.pearson, want.pearson, atol=5e-5)
    skill = Skill("s", {"blocks.0.mlp": [1, 7, 8], "blocks.1.attn": [0, 5]})
    with torch.inference_mode(), skillfast.ablate(model, skill, scale=2.0), skillfast.ablate(plain, skill, scale=2.0):
        torch.testing.assert_close(model(images[:8]), plain(images[:8]))
    assert graphs() == 1
    skillfast.prepare(model, sites=("head",))
    assert vars(model._orig_mod.attention).keys() == vars(plain.attention).keys()


def swin():
    torch.manual_seed(0)
    made = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=16, patch_size=2, window_size=4, embed_dim=8, depths=(2,),
        num_heads=(2,), num_classes=5,
    ).eval()  # fmt: skip
    randomise(made)
    return made


@pytest.mark.parametrize("pool", ["mean", "none"])
def test_windows_in_the_batch_are_unfolded_into_their_samples(images, pool):
    """Attention sees four windows of 16 tokens for each image, MLPs 64 tokens."""
    plain, model = swin(), skillfast.prepare(swin(), pool=pool, rows=8, tokens=64, donors=pool == "mean")
    model = compiled(model) if pool == "mean" else model
    settings = {"pool": pool, "statistics": ("pearson",)}
    found, want = (skillfast.trace(each, batches_of(images), **settings) for each in (model, plain))
    assert found.n_observations == want.n_observations == 24 * (64 if pool == "none" else 1)
    np.testing.assert_allclose(found.pearson, want.pearson, atol=2e-4)
    if pool == "none":
        return
    skill = Skill("s", {"blocks.0.attn": [1, 3], "blocks.1.attn": [0, 7], "blocks.1.mlp": [2, 5]})
    bank = skillfast.donors(plain, batches_of(images), [skill], n_donors=5)
    x, change = images[:8], {"mode": "resample", "donors": bank}
    with torch.inference_mode(), skillfast.ablate(model, skill, **change), skillfast.ablate(plain, skill, **change):
        torch.testing.assert_close(model(x), plain(x))
        changed = plain(x)
    assert not torch.allclose(plain(x), changed, atol=1e-3)
    assert graphs() == 1


def moe(implementation):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.Qwen3MoeConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        intermediate_size=24, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2, vocab_size=50,
        use_cache=False,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    randomise(model)
    model.set_experts_implementation(implementation)
    return model


def test_routers_are_prepared_without_their_experts():
    plain, model = moe("grouped_mm"), skillfast.prepare(moe("grouped_mm"), sites=["router"], rows=4, tokens=5)
    ids = torch.randint(3, 50, (4, 5), generator=torch.Generator().manual_seed(0))
    found = []
    for each in (plain, model):
        with skillfast.Tracer(each, {"y": Continuous()}, sites=["router"], bins=8) as tracer, torch.no_grad():
            each(ids)
            tracer.step(y=torch.arange(4.0))
        found.append(tracer.compute())
    np.testing.assert_allclose(found[0].pearson, found[1].pearson, atol=1e-6)


@pytest.mark.parametrize(("implementation", "pool"), [("grouped_mm", "mean"), ("batched_mm", "none")])
def test_experts_are_prepared(implementation, pool):
    plain, model = moe(implementation), moe(implementation)
    model = compiled(skillfast.prepare(model, pool=pool, rows=6, tokens=7, donors=pool == "mean"))
    assert {site.kind for site in prepared(model).sites} == {"attn", "router", "expert", "head"}
    generator = torch.Generator().manual_seed(1)
    batches = []
    for lengths in torch.randint(2, 8, (18,), generator=generator).split(6):
        mask = (torch.arange(7) < lengths[:, None]).long()
        ids = torch.randint(3, 50, mask.shape, generator=generator) * mask
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    skill = Skill("s", {"blocks.0.experts": [0, 13, 30], "blocks.1.router": [2], "blocks.1.experts": [40]})
    for y in (torch.arange(6) % 5, None):
        tracers = [skillfast.Tracer(m, METRICS, pool=pool, bins=8) for m in (model, plain)]
        with torch.inference_mode(), tracers[0], tracers[1]:
            for batch in batches:
                inputs = {name: value for name, value in batch.items() if name != "labels"}
                values = {"label": torch.arange(6) % 5, "loss": batch["input_ids"].double().mean(1)}
                for m, tracer in zip((model, plain), tracers, strict=True):
                    tracer.expect(batch["attention_mask"], **({} if y is None else values))
                    m(**inputs)
                    tracer.step(**(values if y is None else {}))
        found, want = (tracer.compute() for tracer in tracers)
        for name, array in want.arrays().items():
            np.testing.assert_allclose(found.arrays()[name], array, atol=2e-4, err_msg=name)
    with torch.inference_mode():
        intact = plain(**inputs).logits
        for changed in (skill, Skill("t", {"blocks.0.router": [1], "blocks.0.experts": range(20)})):
            with skillfast.ablate(model, changed, scale=3.0), skillfast.ablate(plain, changed, scale=3.0):
                torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-5)
                assert not torch.allclose(plain(**inputs).logits, intact, rtol=1e-2)
    conditions = [Condition(skill, scale=3.0), Condition(Skill("attn", {"blocks.0.attn": range(16)}), scale=-9.0)]
    bank = skillfast.donors(plain, batches, [skill])
    if pool == "mean":
        conditions.append(Condition(skill, mode="resample", scale=-4.0))
    settings = {"classes": 50, "keep_margins": True, "donors": bank}
    found, want = (skillfast.sweep(m, batches, conditions, **settings) for m in (model, plain))
    np.testing.assert_allclose(found.margins, want.margins, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found.rerouted, want.rerouted)
    assert want.rerouted.max() > 0
    assert graphs() == 1
    told = one_line(ArgumentError, skillfast.sweep, model, batches, [Condition(skill, mode="reroute")], classes=50)
    assert "are inside its own code, where no gate stands; use mode 'zero'" in told


def test_donors_of_examples_of_one_token_go_to_their_own():
    plain, model = moe("grouped_mm"), skillfast.prepare(moe("grouped_mm"), rows=6, tokens=1, donors=True)
    ids = 3 + 7 * torch.arange(6)[:, None]
    skill = Skill("s", {"blocks.0.experts": range(12, 48)})  # no token passes the first expert
    bank = skillfast.donors(plain, [{"input_ids": ids, "labels": torch.arange(6)}], [skill])
    with torch.inference_mode():
        intact, outputs = plain(ids).logits, []
        for m in (model, plain):
            with skillfast.ablate(m, skill, mode="resample", donors=bank):
                outputs.append(m(ids).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], intact, rtol=1e-2)


def test_experts_that_cannot_be_prepared_are_refused():
    told = one_line(ArgumentError, skillfast.prepare, moe("eager"), tokens=7)
    assert "by 'eager', whose loop over experts is no one graph; call model.set_experts_implementation(" in told
    told = one_line(ArgumentError, skillfast.prepare, moe("grouped_mm"))
    assert "blocks.0.router, of which the rows of all tokens are left, got none; give tokens=, or leave out" in told


def test_gates_of_experts_are_taken_away_and_other_readers_find_their_way():
    plain, model = moe("grouped_mm"), skillfast.prepare(moe("grouped_mm"), tokens=7)
    batch = {"input_ids": torch.arange(28).view(4, 7), "labels": torch.arange(28).view(4, 7)}
    found, want = (skillfast.attribute(m, [batch], classes=50) for m in (model, plain))
    np.testing.assert_allclose(found.values, want.values, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        model(batch["input_ids"])
        told = prepared(model).forwards(model)
        assert told["blocks.0.experts"][1:] == told["blocks.1.router"][1:] == (4, 7, 56)
        copied = copy.deepcopy(model)
        with skillfast.ablate(copied, Skill("s", {"blocks.0.experts": range(48)})):
            changed = copied(batch["input_ids"]).logits
        torch.testing.assert_close(model(batch["input_ids"]).logits, plain(batch["input_ids"]).logits)
        assert not torch.allclose(changed, plain(batch["input_ids"]).logits, rtol=1e-2)
    skillfast.prepare(model, sites=("attn",))
    experts = model.model.layers[0].mlp.experts
    assert "_apply_gate" not in vars(experts)
    assert not experts._forward_pre_hooks
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 3  # with that of the model
