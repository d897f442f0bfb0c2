"""State lives where the site lives: offloaded, half-precision, quantised and spread models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_vit
from fake_cuda import FakeCuda, to_cuda

import skillfast
from skillfast import Categorical, Condition, Skill, Tracer
from skillfast.models.sites import find_sites

SKILL = Skill("s", {"blocks.0.mlp": [0, 5], "blocks.1.attn": [1], "blocks.2.attn": [3], "head": [1]})
CONDITIONS = [Condition(SKILL), Condition(SKILL, ("attn",), scale=2.0), Condition(SKILL, ("head",))]


def outcome(model, batches):
    scores = skillfast.trace(model, batches, statistics=("pearson",), classes=5)
    return scores, skillfast.sweep(model, batches, CONDITIONS, classes=5, keep_predictions=True)


def test_weights_that_are_only_there_during_a_forward(vit, batches):
    """accelerate's offloading leaves tensors on the device `meta` between forwards."""
    accelerate = pytest.importorskip("accelerate")
    scores, swept = outcome(vit, batches)
    offloaded = accelerate.cpu_offload(make_vit(), execution_device=torch.device("cpu"))
    assert next(offloaded.blocks[0].mlp.fc2.parameters()).device.type == "meta"
    got, again = outcome(offloaded, batches)
    np.testing.assert_allclose(got.mean, scores.mean, atol=1e-5)
    np.testing.assert_array_equal(again.predictions, swept.predictions)


@pytest.mark.filterwarnings("ignore:some scores are not defined")  # 8 bits can leave a neuron constant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pool", ["mean", "none"])
def test_half_precision(batches, dtype, pool):
    """Statistics of half-precision activations are those of the values that flow, in float32."""
    model = make_vit().to(dtype)
    images, labels = batches[0][0].to(dtype), batches[0][1]
    kept = {}
    handles = [
        model.get_submodule(site.path).register_forward_hook(
            lambda _, args, __, n=site.name: kept.__setitem__(n, args[0].detach())
        )
        for site in find_sites(model)
    ]
    tracer = Tracer(model, {"label": Categorical(5)}, pool=pool, statistics=("pearson",))
    with tracer, torch.no_grad():
        model(images)
        tracer.step(label=labels)
    for handle in handles:
        handle.remove()
    scores = tracer.compute()
    for site in scores.sites:
        x = kept[site.name].double()
        rows = x if x.dim() == 2 else x.mean(1) if pool == "mean" else x.flatten(0, 1)
        scale = float(rows.abs().max())
        np.testing.assert_allclose(scores[site.name].mean, rows.mean(0), atol=1e-6 * scale)
        np.testing.assert_allclose(scores[site.name].std, rows.std(0, correction=0), atol=1e-4 * scale)


def spread(model, to_cuda):
    """The model over two devices: a block of it runs on the CPU, the rest on the GPU.

    accelerate's `dispatch_model` would keep that block's weights on the CPU and run it on the GPU all the same.
    """
    hooks = pytest.importorskip("accelerate.hooks")
    moved = to_cuda(model)
    moved.blocks[1] = make_vit().blocks[1]
    hooks.add_hook_to_module(
        moved.blocks[1], hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True, offload=False)
    )
    return moved


def check_two_devices(model, vit, batches):
    for block in (*model.blocks, *vit.blocks):
        block.attn.fused_attn = False  # the same ops on both
    scores, swept = outcome(vit, batches)
    tracer = Tracer(model, {"label": Categorical(5)})
    devices = {rows.statistics.device.type for rows in tracer._groups()}
    assert devices == {"cpu", "cuda"}
    got, again = outcome(model, batches)
    np.testing.assert_allclose(got.mean, scores.mean, atol=1e-4)
    np.testing.assert_allclose(got.pearson, scores.pearson, atol=1e-3)
    assert (again.predictions == swept.predictions).mean() > 0.95


@pytest.mark.gpu
def test_a_model_over_two_devices(vit, batches):
    check_two_devices(spread(make_vit(), torch.nn.Module.cuda), vit, batches)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_model_over_two_devices_of_which_one_is_fake(vit, batches):
    with FakeCuda():
        check_two_devices(spread(make_vit(), to_cuda), vit, batches)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers(batches, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = make_vit(embed_dim=64, num_heads=4).half()
    for block in model.blocks:
        for owner, name in ((block.mlp, "fc2"), (block.attn, "proj")):
            old = getattr(owner, name)
            if bits == 4:
                new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, compute_dtype=torch.float16)
            else:
                new = bitsandbytes.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
            new.load_state_dict(old.state_dict(), strict=False)
            setattr(owner, name, new)
    model = model.cuda()
    data = [(x.half().cuda(), y) for x, y in batches]
    scores, swept = outcome(model, data)
    assert np.isfinite(scores.mean).all()
    for i, condition in enumerate(CONDITIONS):
        with skillfast.ablate(model, SKILL, scale=condition.scale, components=condition.components), torch.no_grad():
            want = torch.cat([model(x) for x, _ in data])
        sure = (want.topk(2).values.diff().abs()[:, 0] > 0.05 * want.abs().max()).cpu().numpy()
        np.testing.assert_array_equal(swept.predictions[i][sure], want.argmax(1).cpu().numpy()[sure])
