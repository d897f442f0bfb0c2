from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_vit

import skillfast
from skillfast import Condition, Skill, backends
from skillfast.errors import ArgumentError, ModelError
from skillfast.metrics import per_class_accuracy
from skillfast.models.sites import find_sites

SKILL = Skill("mine", {"blocks.0.mlp": [0, 5, 95], "blocks.1.attn": [3, 4], "blocks.2.mlp": [7], "head": [1, 2]})


def logits_by_plain_hooks(model, images, skill, components=("mlp", "attn", "head"), change=lambda x: x * 0):
    """The model with `change` applied to the neurons, by hooks that use nothing of skillfast."""
    handles = []
    for site in find_sites(model):
        if site.name in skill.neurons and site.kind in components:

            def hook(_, args, index=skill.neurons[site.name]):
                x = args[0].clone()
                x[..., index] = change(x[..., index])
                return (x,)

            handles.append(model.get_submodule(site.path).register_forward_pre_hook(hook))
    with torch.no_grad():
        result = model(images)
    for handle in handles:
        handle.remove()
    return result


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, -1.0])
@pytest.mark.parametrize("components", [("mlp", "attn", "head"), ("mlp",), ("attn", "head")])
def test_ablate_equals_a_plain_hook(vit, batches, scale, components):
    images = batches[0][0]
    backends.calls.clear()
    with skillfast.ablate(vit, SKILL, scale=scale, components=components), torch.no_grad():
        got = vit(images)
    assert set(backends.calls) == {("neuron_scale", "native")}
    want = logits_by_plain_hooks(vit, images, SKILL, components, lambda x: x * scale)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, vit(images), atol=1e-3)


def test_mean_ablation_puts_the_mean_in_place(vit, batches):
    scores = skillfast.trace(vit, batches)
    images = batches[0][0]
    skill = Skill("one site", {"blocks.1.mlp": [0, 1, 50]})
    mean = torch.from_numpy(scores["blocks.1.mlp"].mean[[0, 1, 50]]).float()
    for scale in (0.0, 0.25):
        with skillfast.ablate(vit, skill, mode="mean", scale=scale, reference=scores), torch.no_grad():
            got = vit(images)
        want = logits_by_plain_hooks(vit, images, skill, change=lambda x, s=scale: mean + s * (x - mean))
        torch.testing.assert_close(got, want)


def test_contexts_nest_and_leave_nothing_behind(vit, batches):
    images = batches[0][0]
    other = Skill("other", {"blocks.0.mlp": [5, 6], "blocks.2.attn": [0]})
    intact = vit(images)
    with skillfast.ablate(vit, SKILL), skillfast.ablate(vit, other, scale=3.0):
        both = vit(images)
    union = {s: {*SKILL.neurons.get(s, torch.empty(0)).tolist()} for s in {*SKILL.neurons, *other.neurons}}
    step = logits_by_plain_hooks(  # neuron 5 is in both: 0 * 3
        _scaled(vit, other, {"blocks.0.mlp": [6], "blocks.2.attn": [0]}),
        images,
        Skill("u", {k: [*v] for k, v in union.items()}),
    )
    torch.testing.assert_close(both, step)
    torch.testing.assert_close(vit(images), intact)
    with pytest.raises(RuntimeError, match="mine"), skillfast.ablate(vit, SKILL):
        raise RuntimeError("mine")
    assert not any(module._forward_pre_hooks for module in vit.modules())


def _scaled(model, _, neurons):
    """A copy whose projections multiply these neurons by 3."""
    copy = make_vit()
    copy.load_state_dict(model.state_dict())
    for site in find_sites(copy):
        if site.name in neurons:
            with torch.no_grad():
                copy.get_submodule(site.path).weight[:, neurons[site.name]] *= 3
    return copy


def test_gradients_pass_through_an_ablation(vit, batches):
    images = batches[0][0].clone().requires_grad_()
    with skillfast.ablate(vit, SKILL):
        vit(images).sum().backward()
    assert torch.isfinite(images.grad).all()
    assert float(images.grad.abs().sum()) > 0


def test_a_sweep_equals_the_naive_loop(vit, batches):
    scores = skillfast.trace(vit, batches)
    skills = skillfast.select(scores, metric="label", share=0.1)
    conditions = [
        Condition(skill, components=components, scale=scale, mode=mode)
        for skill in [*skills.values(), SKILL, Skill("empty", {})]
        for components, scale, mode in (
            (("mlp", "attn", "head"), 0.0, "zero"), (("mlp",), 2.0, "zero"), (("head",), 0.0, "mean"),
            (("mlp", "attn"), 0.0, "mean"),
        )
    ]  # fmt: skip
    result = skillfast.sweep(vit, batches, conditions, reference=scores, keep_predictions=True)
    labels = torch.cat([y for _, y in batches]).numpy()
    np.testing.assert_array_equal(result.labels, labels)
    for i, condition in enumerate(conditions):
        intervention = {"scale": condition.scale, "mode": condition.mode, "components": condition.components}
        with skillfast.ablate(vit, condition.skill, reference=scores, **intervention), torch.no_grad():
            logits = torch.cat([vit(x) for x, _ in batches])
        clear = logits.topk(2).values.diff().abs()[:, 0].numpy() > 1e-4
        np.testing.assert_array_equal(result.predictions[i][clear], logits.argmax(1).numpy()[clear])
    with torch.no_grad():
        intact = torch.cat([vit(x) for x, _ in batches])
    np.testing.assert_array_equal(result.top2, intact.topk(2).indices)
    np.testing.assert_allclose(result.baseline, per_class_accuracy(intact.argmax(1).numpy(), labels, 5))
    np.testing.assert_allclose(result.per_class_accuracy, per_class_accuracy(result.predictions, labels, 5))


def test_per_class_accuracy_counts():
    got = per_class_accuracy(np.array([[0, 1, 1], [0, 0, 0]]), np.array([0, 0, 1]), 3)
    np.testing.assert_array_equal(got, [[0.5, 1.0, np.nan], [1.0, 0.0, np.nan]])


@pytest.mark.parametrize(
    ("skill", "arguments", "words"),
    [
        (Skill("s", {"blocks.7.mlp": [0]}), {}, "expected sites that the model has, got 'blocks.7.mlp'"),
        (Skill("s", {"head": [24]}), {}, "expected indices below 24 in head, got 24"),
        (Skill("s", {"head": [0]}, fingerprint="0123"), {}, "expected one of the model's architecture"),
        (SKILL, {"components": ("mlp", "nose")}, "expected some of mlp, attn, ssm, expert, router, head, got nose"),
        (SKILL, {"mode": "noise"}, "mode: expected one of zero, mean, resample, constant, reroute, got 'noise'"),
        (SKILL, {"mode": "reroute", "scale": 0.5}, "scale: expected 0 with mode 'reroute', got 0.5"),
        (SKILL, {"mode": "mean"}, "expected reference=scores"),
        (SKILL, {"scale": float("nan")}, "scale: expected a finite number"),
    ],
)
def test_ablate_refuses(vit, skill, arguments, words):
    with pytest.raises(ArgumentError, match=words), skillfast.ablate(vit, skill, **arguments):
        pass
    assert not any(module._forward_pre_hooks for module in vit.modules())


def test_mean_ablation_refuses_scores_of_another_pool(vit, batches):
    scores = skillfast.trace(vit, batches, pool="cls")
    with (
        pytest.raises(ArgumentError, match="pooled by 'mean', got 'cls'"),
        skillfast.ablate(vit, SKILL, mode="mean", reference=scores),
    ):
        pass


def test_a_skill_of_another_architecture_is_refused(vit, batches):
    skill = skillfast.select(skillfast.trace(vit, batches), metric="label")["0"]
    with pytest.raises(ArgumentError, match="select it on this model"), skillfast.ablate(make_vit(depth=2), skill):
        pass


def test_training_mode_and_compiled_models_are_refused(vit, batches):
    with pytest.raises(ModelError, match=r"wrapped by torch\.compile"), skillfast.ablate(torch.compile(vit), SKILL):
        pass
    with pytest.raises(ModelError, match=r"ablate: .* in training mode"), skillfast.ablate(vit.train(), SKILL):
        pass
    with pytest.raises(ModelError, match=r"sweep: .* in training mode"):
        skillfast.sweep(vit, batches, [Condition(SKILL)])


def test_half_precision_models_are_ablated(batches):
    model = make_vit().to(torch.bfloat16)
    images = batches[0][0].to(torch.bfloat16)
    with skillfast.ablate(model, SKILL), torch.no_grad():
        got = model(images)
    assert torch.equal(got, logits_by_plain_hooks(model, images, SKILL))
