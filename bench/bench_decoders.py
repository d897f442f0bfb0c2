"""The bill of tracing a decoder: traced over plain forwards of the same batch, in alternating pairs.

    python bench/bench_decoders.py                           # a table; some minutes on one core
    python bench/bench_decoders.py --json FILE --pairs 15    # and what is worth keeping
    python bench/bench_decoders.py --model llama --dtype float32 --tokens 32 --pairs 3

A Llama of 8 layers and width 512, and a Qwen3-MoE of the same with 32 experts of which each token gets 4, both with
random weights and a vocabulary so small that the head is no larger part of a forward than in their large kin. A batch
is 16 texts of 128 tokens. Seconds are the process's own (`time.process_time`), ratios medians over the pairs. Before a
case is timed, what it traces has equalled plain hooks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import transformers

import skillfast
from skillfast import Categorical, Continuous, NeuronStatistics, Tracer
from skillfast.models.sites import find_sites
from skillfast.vocabulary import BUFFER_ROWS, STATISTICS

TEXTS = 16
METRICS = {"label": Categorical(10), "confidence": Continuous(), "loss": Continuous()}
SIZES = {
    "vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 1408,
}  # fmt: skip
EXPERTS = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 352, "head_dim": 64}
CASES = {"pooled, all four": ("mean", STATISTICS), "every token, Pearson": ("none", ("pearson",))}
LIMITS = {
    ("llama", "pooled, all four"): 1.03,
    ("qwen3-moe", "pooled, all four"): 1.08,
    ("llama", "every token, Pearson"): 1.10,
    ("qwen3-moe", "every token, Pearson"): 1.10,
}


def made(name: str) -> torch.nn.Module:
    """The model, with random weights."""
    torch.manual_seed(0)
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **EXPERTS)).eval()


def run(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """A plain forward, without a cache of keys that nobody reads."""
    model(input_ids=ids, use_cache=False)


def checked(model: torch.nn.Module, ids: torch.Tensor, values: dict[str, torch.Tensor], pool: str) -> None:
    """Raise where the traced means of the neurons that hooks can read are not those of plain hooks."""
    kept: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    sites = [site for site in find_sites(model) if hasattr(modules.get(site.path), "weight")]
    handles = [
        modules[site.path].register_forward_pre_hook(
            lambda _, args, name=site.name: kept.__setitem__(name, args[0].float().flatten(0, -2).mean(0))
        )
        for site in sites
        if site.kind not in ("expert", "router")
    ]
    run(model, ids)
    for handle in handles:
        handle.remove()
    with Tracer(model, METRICS, pool=pool, statistics=("pearson",)) as tracer:
        run(model, ids)
        tracer.step(**values)
    scores = tracer.compute()
    for name, want in kept.items():
        np.testing.assert_allclose(scores[name].mean, want.numpy(), rtol=2e-2, atol=2e-3, err_msg=name)


def counting_seconds(widths: int, n: int) -> float:
    """What counting one full buffer of pooled rows into sums and bins takes, shared out over the batches in it."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(BUFFER_ROWS, widths, generator=generator)
    values = {
        "label": torch.arange(BUFFER_ROWS) % 10,
        "confidence": torch.rand(BUFFER_ROWS, generator=generator),
        "loss": torch.rand(BUFFER_ROWS, generator=generator),
    }
    accumulator = NeuronStatistics(widths, METRICS, buffer_rows=BUFFER_ROWS)
    accumulator.calibrate(rows, values)
    accumulator.update(rows, values)
    seconds = []
    for _ in range(7):
        start = time.process_time()
        accumulator.update(rows, values)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds) * n / BUFFER_ROWS


def ratios(model: torch.nn.Module, ids: torch.Tensor, case: str, pairs: int) -> tuple[list[float], float, float, int]:
    """Traced over plain seconds of every pair.

    Rows of several batches are counted together, as in a pass: a pair's batches fill a buffer, and what counting a full
    one takes is added, as much of it as their share of its rows.

    Returns:
        The ratios, the median of the plain seconds, the seconds of counting a batch, and how many neurons were traced.
    """
    pool, wanted = CASES[case]
    generator = torch.Generator().manual_seed(1)
    values = {
        "label": torch.arange(len(ids)) % 10,
        "confidence": torch.rand(len(ids), generator=generator),
        "loss": torch.rand(len(ids), generator=generator),
    }
    with torch.inference_mode():
        checked(model, ids, values, pool)
        tracer = Tracer(model, METRICS, pool=pool, statistics=wanted, buffer_rows=(pairs + 2) * len(ids))
        width = sum(site.width for site in tracer.sites)

        def traced() -> None:
            with tracer:
                run(model, ids)
                tracer.step(**values)

        traced()
        if pool != "none":
            tracer.calibrate()  # later rows go to a buffer of rows to be counted, none is kept to be exact
        traced()
        counting = counting_seconds(width, len(ids)) if pool != "none" else 0.0
        found, plain = [], []
        for i in range(pairs):
            seconds = {}
            for which in ("plain", "traced") if i % 2 else ("traced", "plain"):
                start = time.process_time()
                run(model, ids) if which == "plain" else traced()
                seconds[which] = time.process_time() - start
            found.append((seconds["traced"] + counting) / seconds["plain"])
            plain.append(seconds["plain"])
    return found, statistics.median(plain), counting, width


def main() -> None:
    """Time the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=["llama", "qwen3-moe"], choices=["llama", "qwen3-moe"])
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, SIZES["vocab_size"], (TEXTS, settings.tokens), generator=generator)
    rows = []
    print(f"{'model':10} {'dtype':9} {'case':21} {'neurons':>8} {'forward s':>9} {'traced / plain':>14} {'limit':>6}")
    for name in settings.model:
        for dtype in settings.dtype:
            model = made(name).to(getattr(torch, dtype))
            kinds = sorted({site.kind for site in find_sites(model)})
            for case in CASES:
                found, seconds, counting, neurons = ratios(model, ids, case, settings.pairs)
                median, limit = statistics.median(found), LIMITS[name, case]
                low, high = np.quantile(found, [0.25, 0.75])
                print(
                    f"{name:10} {dtype:9} {case:21} {neurons:8} {seconds:9.3f} {median:7.3f} ({low:.3f}-{high:.3f}) "
                    f"{limit:5.2f}",
                    flush=True,
                )
                rows.append(
                    {
                        "model": name, "dtype": dtype, "case": case, "kinds": kinds, "neurons": neurons,
                        "forward_s": seconds, "counting_s": counting, "ratio": median, "quartiles": [low, high],
                        "limit": limit, "ratios": found,
                    }
                )  # fmt: skip
    if settings.json is not None:
        written = {
            "date": datetime.date.today().isoformat(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "versions": {
                "skillfast": skillfast.__version__, "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "sizes": SIZES, "experts": EXPERTS, "batch": list(ids.shape), "pairs": settings.pairs, "rows": rows,
        }  # fmt: skip
        settings.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
