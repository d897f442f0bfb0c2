"""What a prepared model costs: its forwards over plain ones, and traced passes over those with hooks.

    python bench/bench_prepared.py --json FILE                        # some minutes on one core
    python bench/bench_prepared.py --backend eager --pairs 3 --tiny   # a look

A ViT-S/16 on 4 images of 224 x 224 and a Llama of 4 layers and width 256 on 4 texts of 128 tokens, random weights,
pooled, Pearson's r. Each model is run plain and prepared, with nothing traced and with a step after each forward, as it
is and compiled (`--backend`: inductor needs a C++ compiler; eager only captures the graph), in alternating order in one
run. Ratios are medians over the rounds of the process's own seconds (`time.process_time`). Before a model is timed its
prepared forwards equal the plain ones, and its traces those by hooks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import timm
import torch
import transformers

import skillfast
from skillfast import Categorical, Continuous, Tracer

if TYPE_CHECKING:
    from collections.abc import Callable

METRICS = {"label": Categorical(4), "loss": Continuous()}
N = 4


def made(name: str, *, tiny: bool) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model with random weights, and a batch of it by its arguments' names."""
    torch.manual_seed(0)
    if name == "vit-s16":
        size = 32 if tiny else 224
        model = timm.create_model("vit_small_patch16_224", img_size=size, depth=2 if tiny else 12)
        return model.eval(), {"x": torch.randn(N, 3, size, size)}
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=256, num_hidden_layers=2 if tiny else 4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=704, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(3, 1024, (N, 16 if tiny else 128))
    return transformers.LlamaForCausalLM(config).eval(), {"input_ids": ids}


def ways(name: str, backend: str, *, tiny: bool) -> dict[str, Callable[[], object]]:
    """What is timed, by name; every way was checked against plain forwards."""
    plain, batch = made(name, tiny=tiny)
    model, _ = made(name, tiny=tiny)
    skillfast.prepare(model, rows=N)
    compiled, of_prepared = (torch.compile(each, backend=backend, fullgraph=True) for each in (plain, model))
    values = {"label": torch.arange(N), "loss": torch.rand(N)}
    found: dict[str, Callable[[], object]] = {}

    def forward(each: torch.nn.Module) -> torch.Tensor:
        output = each(**batch)
        return output if isinstance(output, torch.Tensor) else output.logits

    def traced(each: torch.nn.Module, tracer: Tracer) -> None:
        tracer.discard()  # forwards of the model that were timed untraced
        forward(each)
        tracer.step(**values)

    want, scores = forward(plain), []
    for what, each in (("eager", plain), ("compiled", compiled)):
        torch.testing.assert_close(forward(each), want, rtol=1e-3, atol=1e-4)
        found[f"plain {what}"] = partial(forward, each)
    for what, each in (("eager", model), ("compiled", of_prepared)):
        torch.testing.assert_close(forward(each), want, rtol=1e-3, atol=1e-4)
        found[f"prepared {what}"] = partial(forward, each)
        tracer = Tracer(each, METRICS, statistics=("pearson",)).__enter__()
        found[f"prepared {what}, traced"] = partial(traced, each, tracer)
        scores.append(_scores(each, traced))
    scores.append(_scores(plain, traced))
    for some in scores:
        np.testing.assert_allclose(some, scores[-1], atol=1e-3)
    hooks, _ = made(name, tiny=tiny)
    found["hooks, traced"] = partial(traced, hooks, Tracer(hooks, METRICS, statistics=("pearson",)).__enter__())
    return found


def _scores(model: torch.nn.Module, traced: Callable[[torch.nn.Module, Tracer], None]) -> np.ndarray:
    with Tracer(model, METRICS, statistics=("pearson",)) as tracer:
        traced(model, tracer)
    pearson = tracer.compute().pearson
    assert pearson is not None
    return np.nan_to_num(pearson)


RATIOS = (
    ("prepared eager", "plain eager"),
    ("prepared compiled", "plain compiled"),
    ("hooks, traced", "plain eager"),
    ("prepared eager, traced", "plain eager"),
    ("prepared compiled, traced", "plain compiled"),
    ("prepared compiled, traced", "hooks, traced"),
    ("plain compiled", "plain eager"),
)


def main() -> None:
    """Time the models that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=["vit-s16", "llama"], choices=["vit-s16", "llama"])
    parser.add_argument("--backend", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--pairs", type=int, default=15, help="rounds in which every way runs once")
    parser.add_argument("--tiny", action="store_true", help="small models, to see that it runs")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    rows = []
    print(f"{'model':8} {'what':27} {'over':15} {'ratio':>6} quartiles")
    for name in settings.model:
        seconds: dict[str, list[float]] = {}
        with torch.inference_mode():
            timed = ways(name, settings.backend, tiny=settings.tiny)
            for i in range(settings.pairs + 1):  # the first round warms up
                for what in list(timed)[:: 1 if i % 2 else -1]:
                    start = time.process_time()
                    timed[what]()
                    seconds.setdefault(what, []).append(time.process_time() - start)
        for what, over in RATIOS:
            each = [a / b for a, b in zip(seconds[what][1:], seconds[over][1:], strict=True)]
            ratio, (low, high) = statistics.median(each), np.quantile(each, [0.25, 0.75]).tolist()
            print(f"{name:8} {what:27} {over:15} {ratio:6.3f} {low:.3f}-{high:.3f}", flush=True)
            rows.append({"model": name, "what": what, "over": over, "ratio": ratio, "quartiles": [low, high]})
        rows.append({"model": name, "forward_s": {what: statistics.median(s[1:]) for what, s in seconds.items()}})
    if settings.json is not None:
        written = {
            "date": datetime.date.today().isoformat(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "backend": settings.backend,
            "versions": {"skillfast": skillfast.__version__, "torch": torch.__version__, "timm": timm.__version__},
            "batch": N, "rounds": settings.pairs, "rows": rows,
        }  # fmt: skip
        settings.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
