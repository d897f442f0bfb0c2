"""Sweeps of 40 conditions against the plain loop of hooks, and against captum's LayerFeatureAblation where it can.

`pytest bench/bench_sweep.py --benchmark-only -s`. A plan is timed only after its predictions have equalled the loop's.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import timm
import torch

import skillfast
from skillfast import Condition, Skill
from skillfast.models.sites import find_sites
from skillfast.vocabulary import KINDS

MODEL, IMAGES, CLASSES, SHARE = "vit_small_patch16_224", 16, 10, 0.03
SUBSETS = (KINDS, ("mlp",), ("attn",), ("head",))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model(MODEL, num_classes=CLASSES).eval()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(IMAGES, 3, 224, 224, generator=generator), torch.arange(IMAGES) % CLASSES


def skill_from(model, block, seed):
    """3 % of the neurons of one block's sites and of the head."""
    rng = np.random.default_rng(seed)
    sites = [site for site in find_sites(model) if site.block in (None, block)]
    return Skill(
        f"block {block}, {seed}",
        {site.name: torch.from_numpy(rng.choice(site.width, int(SHARE * site.width), replace=False)) for site in sites},
    )


def plan(model, blocks):
    """10 skills, the i-th in blocks[i], each with all, its MLP, its attention and its head neurons removed."""
    return [
        Condition(skill_from(model, block, i), subset, name=f"{i} {subset}")
        for i, block in enumerate(blocks)
        for subset in SUBSETS
    ]


def deeper(model, first):
    """Conditions that begin in block first[i] and go on to the last one."""
    conditions = []
    last = max(site.block for site in find_sites(model) if site.block is not None)
    for i, block in enumerate(first):
        neurons = {}
        for b in range(block, last + 1):
            neurons |= skill_from(model, b, i).neurons
        skill = Skill(f"from {block}", neurons)
        conditions += [Condition(skill, subset, name=f"{i} {subset}") for subset in SUBSETS]
    return conditions


def plans(model):
    depth = 1 + max(site.block for site in find_sites(model) if site.block is not None)
    uniform = np.linspace(0, depth - 1, CLASSES).round().astype(int).tolist()
    return {
        "last block only": (plan(model, [depth - 1] * CLASSES), "8, aim 12"),
        "first block uniform over depth": (deeper(model, uniform), "1.85, aim 2.1"),
        "block 0": (deeper(model, [0] * CLASSES), "1"),
    }


def loop_logits(model, images, conditions):
    """What one would write without skillfast: a hook per site that multiplies by a mask, one forward per condition."""
    logits = []
    sites = {site.name: site for site in find_sites(model)}
    with torch.inference_mode():
        logits.append(model(images))
        for condition in conditions:
            with ExitStack() as stack:
                for name, index in condition.skill.neurons.items():
                    if sites[name].kind not in condition.components:
                        continue
                    mask = torch.ones(sites[name].width)
                    mask[index] = 0
                    handle = model.get_submodule(sites[name].path).register_forward_pre_hook(
                        lambda _, args, mask=mask: (args[0] * mask,)
                    )
                    stack.callback(handle.remove)
                logits.append(model(images))
    return torch.stack(logits)


def loop(model, images, conditions):
    """Predictions of the loop, the intact model's first."""
    return loop_logits(model, images, conditions).argmax(2).numpy()


def swept(model, batch, conditions):
    return skillfast.sweep(model, [batch], conditions, classes=CLASSES, keep_predictions=True)


@pytest.mark.parametrize("name", ["last block only", "first block uniform over depth", "block 0"])
def test_sweep(model, batch, name, paired, ratios):
    conditions, wanted = plans(model)[name]
    got, want = swept(model, batch, conditions), loop(model, batch[0], conditions)
    np.testing.assert_array_equal(got.top2[:, 0], want[0])
    differing = (got.predictions != want[1:]).mean()
    assert differing <= 0.002, f"{differing:.2%} of the predictions differ"
    ratio = paired(lambda: loop(model, batch[0], conditions), lambda: swept(model, batch, conditions), pairs=3)
    ratios.add(f"sweep, {name}", "plain loop / sweep", ratio, limit=wanted)


def test_captum(model, batch, paired, ratios):
    """What captum can say: one group of one layer's input at a time set to a value, here the last MLP's."""
    attr = pytest.importorskip("captum.attr", exc_type=ImportError)
    images, labels = batch
    depth = 1 + max(site.block for site in find_sites(model) if site.block is not None)
    site = next(s for s in find_sites(model) if s.name == f"blocks.{depth - 1}.mlp")
    order = torch.randperm(site.width, generator=torch.Generator().manual_seed(0))
    groups = order[: CLASSES * int(SHARE * site.width)].view(CLASSES, -1)
    mask = torch.full((site.width,), CLASSES)  # everything else is a group of its own, which captum removes, too
    for i, group in enumerate(groups):
        mask[group] = i
    conditions = [Condition(Skill(str(i), {site.name: mask == i})) for i in range(CLASSES + 1)]
    ablation = attr.LayerFeatureAblation(model, model.get_submodule(site.path))

    def by_captum():
        with torch.inference_mode():
            return ablation.attribute(
                images, target=labels, layer_baselines=0.0, layer_mask=mask[None, None], attribute_to_layer_input=True
            )

    changes = by_captum()  # [images, tokens, D], the change of the label's logit, the same for all of a group
    logits = loop_logits(model, images, conditions)
    own = logits.gather(2, labels.expand(len(logits), -1)[..., None])[..., 0]
    for i, group in enumerate(groups):
        torch.testing.assert_close(changes[:, 0, group[0]], own[0] - own[1 + i], rtol=1e-3, atol=1e-4)
    got = swept(model, batch, conditions)
    np.testing.assert_array_equal(got.predictions, logits[1:].argmax(2))
    ratio = paired(by_captum, lambda: swept(model, batch, conditions), pairs=3)
    ratios.add("11 groups of the last MLP", "captum LayerFeatureAblation / sweep", ratio)
