"""The bill of tracing: traced over plain forwards of the same batch, in alternating pairs, finalisation apart.

    pytest bench/bench_capture.py --benchmark-only -s                      # ViT-S/16; some minutes on 2 cores
    SKILLFAST_BENCH_MODEL=vit_base_patch16_224 pytest bench/bench_capture.py --benchmark-only -s

A case is timed only after what it traces has equalled plain hooks on the same model. GPUs have `bench/gpu.py`.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import timm
import torch

from skillfast import Categorical, Continuous, Tracer
from skillfast.models.sites import find_sites
from skillfast.vocabulary import STATISTICS

MODEL = os.environ.get("SKILLFAST_BENCH_MODEL", "vit_small_patch16_224")
BATCH = int(os.environ.get("SKILLFAST_BENCH_BATCH", "64"))
PAIRS = int(os.environ.get("SKILLFAST_BENCH_PAIRS", "15"))
METRICS = {"label": Categorical(10), "confidence": Continuous(), "loss": Continuous()}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model(MODEL, num_classes=10).eval()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, 224, 224, generator=generator)
    values = {
        "label": torch.arange(BATCH) % 10,
        "confidence": torch.rand(BATCH, generator=generator),
        "loss": torch.rand(BATCH, generator=generator),
    }
    return images, values


def stored(model, images):
    """Every site's activations, kept by hooks: what one would write without skillfast."""
    kept = []
    handles = [
        model.get_submodule(site.path).register_forward_hook(lambda _, args, __: kept.append(args[0].detach()))
        for site in find_sites(model)
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return kept


def warmed(model, batch, pool, statistics):
    """A tracer past its first rows, whose bins have their edges; and that what it reads is what flows."""
    images, values = batch
    # The buffer is counted into the state at every step: dearer than in a pass, but no step gets it for nothing.
    tracer = Tracer(model, METRICS, pool=pool, statistics=statistics, buffer_rows=BATCH)
    checked = Tracer(model, METRICS, pool=pool, statistics=statistics)
    with checked:
        kept = stored(model, images)
        checked.step(**values)
    rows = [x if x.dim() == 2 else x.float().mean(1) if pool == "mean" else x.flatten(0, 1) for x in kept]
    want = np.concatenate([x.float().mean(0).cpu().numpy() for x in rows])
    np.testing.assert_allclose(checked.compute().mean, want, rtol=1e-2, atol=2e-3)
    if set(statistics) != {"pearson"}:
        with tracer:
            for _ in range(2):  # what is timed adds to bins with edges, not to rows that are kept
                model(images)
                tracer.step(**values)
            tracer.calibrate()
    return tracer


def bill(model, batch, paired, pool, statistics, dtype):
    images, values = batch
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        tracer = warmed(model, batch, pool, statistics)

        def traced():
            with tracer:
                model(images)
                tracer.step(**values)

        return paired(traced, lambda: model(images), PAIRS)


LIMITS = {torch.float32: "1.03", torch.bfloat16: "1.05"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_pooled_all_statistics(model, batch, paired, ratios, dtype):
    ratio = bill(model, batch, paired, "mean", STATISTICS, dtype)
    ratios.add(f"{MODEL}, {dtype}, pooled, all four", "traced / plain", ratio, limit=LIMITS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_token_pearson(model, batch, paired, ratios, dtype):
    ratio = bill(model, batch, paired, "none", ("pearson",), dtype)
    ratios.add(f"{MODEL}, {dtype}, every token, Pearson", "traced / plain", ratio, limit="1.10")


def test_hooks_that_store(model, batch, paired, ratios):
    images, _ = batch
    with torch.inference_mode():
        kept = stored(model, images)
        megabytes = sum(x.nbytes for x in kept) / len(images) / 1e6
        ratio = paired(lambda: [x.clone() for x in stored(model, images)], lambda: model(images), max(3, PAIRS // 3))
    ratios.add(
        f"{MODEL}, torch.float32, every activation stored, {megabytes:.0f} MB per image", "traced / plain", ratio
    )
