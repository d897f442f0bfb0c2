"""What skillfast does on a GPU, case by case; `bench/gpu.sh` builds, tests and runs all of it in ten minutes.

    python bench/gpu.py FILE                                # every case that FILE has not got yet
    python bench/gpu.py FILE --device cpu --tiny --cases copy,ops,vit_small      # on a machine without a GPU, to try it

FILE is written anew after each case, so that a run that is cut short, or a process that dies, leaves what was done; a
case that was begun and not ended is not tried again. `bench/gpu_table.py FILE` makes the README's tables of it.

Ops are timed by CUDA events around a captured graph of calls over as many buffers as overflow the L2 cache, and stand
as a share of what a copy moves in the same time. End to end, traced and plain steps alternate, between waits for the
device; ratios are medians over the pairs. Each op has equalled the reference before it is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import skillfast
from skillfast import Categorical, Condition, Continuous, Skill, Tracer, backends, ops
from skillfast.ablation.interventions import Interventions, hooked
from skillfast.models.batches import fed_batches
from skillfast.models.inputs import call
from skillfast.models.sites import find_sites
from skillfast.statistics.bins.edges import build_edges, calibration_rows
from skillfast.statistics.bins.layout import BinLayout
from skillfast.statistics.bins.scores import column_ranks
from skillfast.tracing.trace import ClassificationForward
from skillfast.vocabulary import KINDS, STATISTICS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

METRICS = {"label": Categorical(10), "confidence": Continuous(), "loss": Continuous()}
COLUMNS = 12
CLASSIFICATION = ("label", "confidence", "loss")
LOADERS = ("on the device", "pinned", "pageable")
L2 = 64 << 20  # bytes, a little more than any has


@dataclass(frozen=True)
class Sizes:
    """How large the cases are."""

    batch: int = 256
    tokens: int = 197
    width: int = 3072
    neurons: int = 46_080
    rows: tuple[int, ...] = (512, 2048)
    copied: int = 1 << 30
    product: int = 8192
    bins: int = 128
    image: int = 224
    steps: int = 4  # batches of a step that is timed
    pairs: int = 5
    llama: tuple[int, int, int] = (16, 2048, 8192)  # layers, widths: 1.2e9 weights with the vocabulary
    vocabulary: int = 128_256
    texts: tuple[int, int] = (8, 512)
    ranked: int = 2000


TINY = Sizes(
    batch=4, tokens=5, width=32, neurons=48, rows=(32,), copied=1 << 12, product=16, bins=4, image=32, steps=1, pairs=2,
    llama=(2, 32, 64), vocabulary=64, texts=(2, 8), ranked=40,
)  # fmt: skip


class Bench:
    """A device, and how to time on it."""

    def __init__(self, device: str, sizes: Sizes, data: str | None = None) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.sizes = sizes
        self.data = data
        self.dtype = torch.bfloat16
        self.backend = "triton" if self.cuda else "native"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype)

    def cold(self, make: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
        """Buffers that together overflow the L2 cache twice, so that none is still there when its turn comes."""
        first = make(0)
        return [first, *(make(i) for i in range(1, 1 + (2 * L2 // first.nbytes if self.cuda else 0)))]

    def per_call(self, run: Callable[[torch.Tensor], object], buffers: list[torch.Tensor]) -> float:
        """Seconds of one call, without what launching it costs the host."""
        many = buffers if len(buffers) > 8 else buffers * (8 // len(buffers))
        if not self.cuda:
            run(many[0])
            start = time.perf_counter()
            for buffer in many:
                run(buffer)
            return (time.perf_counter() - start) / len(many)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for buffer in many[:2]:
                run(buffer)  # compiled before it is captured
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for buffer in many:
                run(buffer)
        graph.replay()
        found = []
        for _ in range(5):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(3):
                graph.replay()
            end.record()
            self.wait()
            found.append(begin.elapsed_time(end) / 1e3 / 3 / len(many))
        return statistics.median(found)

    def seconds(self, run: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def paired(self, a: Callable[[], object], b: Callable[[], object]) -> dict[str, float]:
        """Times a and b in turn; their medians, and the median and the extremes of the ratios a / b."""
        for run in (a, b, a, b):
            self.seconds(run)
        pairs = [(self.seconds(a), self.seconds(b)) for _ in range(self.sizes.pairs)]
        ratios = sorted(x / y for x, y in pairs)
        return {
            "ratio": statistics.median(ratios),
            "least": ratios[0],
            "most": ratios[-1],
            "seconds": statistics.median(x for x, _ in pairs),
            "plain_seconds": statistics.median(y for _, y in pairs),
        }

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype)


def copy(bench: Bench) -> dict:
    """What a copy moves, in bytes per second, read and written; and a matrix product's operations."""
    count = max(4, bench.sizes.copied // 8)  # float32, half of the bytes on either side
    source = bench.cold(lambda i: bench.normal(count, seed=i))
    target = torch.empty_like(source[0])
    seconds = bench.per_call(target.copy_, source)
    n = bench.sizes.product
    left, right = (bench.normal(n, n, dtype=bench.dtype, seed=i) for i in range(2))
    product = bench.per_call(lambda x: x @ right, [left])
    return {"bytes_per_second": 2 * source[0].nbytes / seconds, "operations_per_second": 2 * n**3 / product}


def ops_alone(bench: Bench) -> dict:
    """Each op: seconds per call, the bytes that it has to move, and the same operands on the reference first."""
    s, found = bench.sizes, {}

    def timed(name: str, bytes_per_call: float, run: Callable[[torch.Tensor], object], buffers: list) -> None:
        found[name] = {"seconds": bench.per_call(run, buffers), "bytes": bytes_per_call}

    x = bench.cold(lambda i: bench.normal(s.batch, s.tokens, s.width, dtype=bench.dtype, seed=i))
    mask = (
        torch.arange(s.tokens, device=bench.device) < s.tokens - torch.arange(s.batch, device=bench.device)[:, None] % 3
    )
    center = torch.zeros(s.width, device=bench.device)
    captures = {
        "act_mask_pool gelu mean": (("gelu", "mean"), {}, 2),
        "act_mask_pool gelu mean, masked": (("gelu", "mean"), {"mask": mask}, 2),
        "act_mask_pool gelu moments": (("gelu", "moments"), {"center": center}, 2),
        "act_mask_pool identity mean, unwritten": (("identity", "mean"), {"write": False}, 1),
    }
    for name, (arguments, more, passes) in captures.items():
        few = {key: value[:2] if key == "mask" else value for key, value in more.items()}
        check(lambda x, a=arguments, m=few: ops.act_mask_pool(x, *a, **m), x[0][:2])
        timed(name, passes * x[0].nbytes, lambda x, a=arguments, m=more: ops.act_mask_pool(x, *a, **m), x)
    shapes = {"per token": (s.batch, s.tokens, COLUMNS), "per sample": (s.batch, COLUMNS)}
    for name, shape in shapes.items():
        y, sums = bench.normal(*shape), moments(bench, s.width)
        timed(
            f"act_pool_accumulate gelu, {name}", 2 * x[0].nbytes,
            lambda x, y=y, sums=sums: ops.act_pool_accumulate(x, y, center, sums, "gelu"), x,
        )  # fmt: skip
    scale = (bench.normal(40, s.width) > 0).float()
    condition = torch.arange(s.batch, device=bench.device) % 40
    timed("neuron_scale", 2 * x[0].nbytes, lambda x: ops.neuron_scale(x, scale, None, condition), x)
    del x
    for rows in s.rows:
        x = bench.cold(lambda i, rows=rows: bench.normal(rows, s.neurons, dtype=bench.dtype, seed=i))
        y, sums, shift = (
            bench.normal(rows, COLUMNS),
            moments(bench, s.neurons),
            torch.zeros(s.neurons, device=bench.device),
        )
        timed(
            f"comoments_update, {rows} rows", x[0].nbytes,
            lambda x, y=y, sums=sums, shift=shift: ops.comoments_update(x, y, shift, *sums), x,
        )  # fmt: skip
        found[f"bins_update, {rows} rows"] = bins(bench, rows, x)
    return found


def check(run: Callable, x: torch.Tensor) -> None:
    """Raises where a backend gives something else than the reference on a few rows."""
    with backends.use_backend("reference"):
        want = run(x)
    for got, expected in zip(run(x), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 * x.shape[1])


def moments(bench: Bench, width: int) -> list[torch.Tensor]:
    return [
        torch.zeros(shape, dtype=torch.float64, device=bench.device) for shape in ((width,), (width,), (COLUMNS, width))
    ]


def bins(bench: Bench, rows: int, x: list[torch.Tensor]) -> dict:
    """`bins_update` with ten classes and two continuous metrics."""
    s, generator = bench.sizes, torch.Generator().manual_seed(0)
    values = {
        "label": torch.randint(0, 10, (rows,), generator=generator),
        "confidence": torch.rand(rows, generator=generator),
        "loss": torch.randn(rows, generator=generator).exp(),
    }
    layout = BinLayout.of(METRICS, s.bins)
    references = {name: values[name].double().sort().values for name in layout.hats}
    payload = [tensor.to(bench.device) for tensor in layout.payload(values, references)]
    edges = build_edges(bench.normal(calibration_rows(s.bins), s.neurons, seed=9), s.bins)
    few, tables = 64, []
    for backend in (None, "reference"):
        tables.append(layout.zeros(min(few, s.neurons), bench.device))
        with backends.use_backend(backend or "auto"):
            ops.bins_update(x[0][:, :few].contiguous(), edges[:few].contiguous(), *payload, tables[-1])
    if not torch.equal(*tables):
        raise AssertionError("bins_update: another table than the reference's")
    table = layout.zeros(s.neurons, bench.device)
    seconds = bench.per_call(lambda x: ops.bins_update(x, edges, *payload, table), x)
    return {"seconds": seconds, "bytes": x[0].nbytes + 2 * table.nbytes}


def launches(bench: Bench) -> dict:
    """Seconds of the host per call of an op on a small tensor, without waiting for the device."""
    x, scale = bench.normal(2, 4, 64, dtype=bench.dtype), torch.ones(1, 64, device=bench.device)
    y, sums, shift = bench.normal(8, COLUMNS), moments(bench, 64), torch.zeros(64, device=bench.device)
    calls = {
        "act_mask_pool": lambda: ops.act_mask_pool(x, "gelu", "mean"),
        "neuron_scale": lambda: ops.neuron_scale(x, scale),
        "comoments_update": lambda: ops.comoments_update(x.flatten(0, 1), y, shift, *sums),
    }
    found = {}
    with torch.inference_mode():
        for name, run in calls.items():
            for _ in range(20):
                run()
            bench.wait()
            start = time.perf_counter()
            for _ in range(200):
                run()
            found[name] = (time.perf_counter() - start) / 200
            bench.wait()
    return found


def vit(name: str) -> Callable[[Bench], dict]:
    """Tracing a vision transformer end to end: by where its images are, what it traces, eager and compiled."""

    def run(bench: Bench) -> dict:
        import timm

        s = bench.sizes
        torch.manual_seed(0)
        model = timm.create_model(f"{name}_patch16_224", num_classes=10, img_size=s.image).to(bench.device).eval()
        host = [(torch.randn(s.batch, 3, s.image, s.image), torch.arange(s.batch) % 10) for _ in range(max(2, s.steps))]
        places = {
            "on the device": [(images.to(bench.device), labels) for images, labels in host[:2]] * -(-s.steps // 2),
            "pinned": [(images.pin_memory() if bench.cuda else images, labels) for images, labels in host],
            "pageable": host,
        }
        found: dict = {"batch": s.batch, "steps": s.steps}
        with torch.inference_mode(), bench.autocast():
            tracer = warmed(model, places["on the device"][0], "mean", STATISTICS, bench)
            for where in LOADERS:
                loader = places[where][: s.steps]
                found[f"pooled, all four, {where}"] = bench.paired(
                    lambda loader=loader: traced(model, loader, tracer, bench),
                    lambda loader=loader: plain(model, loader, bench),
                )
                if where != "on the device":
                    found[f"plain, {where}"] = bench.paired(
                        lambda loader=loader: plain(model, loader, bench),
                        lambda: plain(model, places["on the device"][: s.steps], bench),
                    )
            tokens = warmed(model, places["on the device"][0], "none", ("pearson",), bench)
            loader = places["on the device"][: s.steps]
            found["every token, Pearson, on the device"] = bench.paired(
                lambda: traced(model, loader, tokens, bench), lambda: plain(model, loader, bench)
            )
            found["waits_per_step"] = waits(bench, lambda: traced(model, loader, tracer, bench)) / s.steps
        if bench.cuda:
            found |= compiled(bench, model, loader)
        return found

    return run


def compiled(bench: Bench, model: torch.nn.Module, loader: list) -> dict:
    """Traced over plain forwards of the model that torch.compile makes, with gates for the one alone."""
    import copy as copying

    fast = torch.compile(copying.deepcopy(model))
    model = torch.compile(skillfast.prepare(model, rows=bench.sizes.batch))
    with torch.inference_mode(), bench.autocast():
        tracer = warmed(model, loader[0], "mean", STATISTICS, bench)
        found = bench.paired(lambda: traced(model, loader, tracer, bench), lambda: plain(fast, loader, bench))
    return {"pooled, all four, on the device, compiled": found}


def plain(model: torch.nn.Module, loader: list, bench: Bench) -> None:
    for batch in fed_batches(loader, bench.device):
        call(model, batch.inputs)


def traced(model: torch.nn.Module, loader: list, tracer: Tracer, bench: Bench) -> None:
    forward = ClassificationForward(CLASSIFICATION, each=False, label_key=None)
    with tracer:
        for batch in fed_batches(loader, bench.device):
            tracer.step(**forward(model, batch)[1])


def warmed(model: torch.nn.Module, batch: tuple, pool: str, wanted: tuple[str, ...], bench: Bench) -> Tracer:
    """A tracer whose bins have their edges."""
    tracer = Tracer(model, METRICS, pool=pool, statistics=wanted, bins=bench.sizes.bins)
    traced(model, [batch], tracer, bench)
    if set(wanted) != {"pearson"}:
        tracer.calibrate()
    return tracer


def waits(bench: Bench, run: Callable[[], object]) -> int:
    """How often the host waited for the device, by torch's own count."""
    if not bench.cuda:
        run()
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def llama(bench: Bench) -> dict:
    """Tracing a Llama of 1.2e9 weights, from its configuration, with random ones."""
    import transformers

    s = bench.sizes
    layers, width, inner = s.llama
    heads = max(1, width // 64)
    config = transformers.LlamaConfig(
        vocab_size=s.vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(bench.device):
        torch.set_default_dtype(bench.dtype)
        try:
            model = transformers.LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    ids = torch.randint(0, s.vocabulary, s.texts, device=bench.device)
    values = {
        "label": torch.arange(s.texts[0], device=bench.device) % 10,
        "confidence": torch.rand(s.texts[0], device=bench.device),
        "loss": torch.rand(s.texts[0], device=bench.device),
    }

    def forward() -> None:
        for _ in range(s.steps):
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    found: dict = {"weights": sum(p.numel() for p in model.parameters()), "texts": s.texts, "steps": s.steps}
    with torch.inference_mode():
        for name, pool, wanted in (
            ("pooled, all four", "mean", STATISTICS),
            ("every token, Pearson", "none", ("pearson",)),
        ):
            tracer = Tracer(model, METRICS, pool=pool, statistics=wanted, bins=s.bins)

            def steps(tracer: Tracer = tracer) -> None:
                with tracer:
                    for _ in range(s.steps):
                        model(input_ids=ids, use_cache=False, logits_to_keep=1)
                        tracer.step(**values)

            steps()
            if pool == "mean":
                tracer.calibrate()
            found[name] = bench.paired(steps, forward)
            found[f"{name}: waits_per_step"] = waits(bench, steps) / s.steps
    return found


def whole_vit(bench: Bench, batch: int) -> tuple[torch.nn.Module, list]:
    import timm

    s = bench.sizes
    name = "vit_base_patch16_224" if bench.cuda else "vit_tiny_patch16_224"
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, img_size=s.image).to(bench.device).eval()
    return model, [(torch.randn(batch, 3, s.image, s.image), torch.arange(batch) % 10)]


def sweep(bench: Bench) -> dict:
    """40 conditions, 10 skills x (all, MLP, attention, head), over the loop of a forward with hooks for each."""
    batch = 64 if bench.cuda else 2
    model, loader = whole_vit(bench, batch)
    sites = find_sites(model)
    last = max(site.block for site in sites if site.block is not None)
    rng = np.random.default_rng(0)
    plans = {
        "skills in the last block": [last] * 10,
        "first touched block uniform over depth": [round(i * last / 9) for i in range(10)],
        "every skill touches block 0": [0] * 10,
    }
    found: dict = {"images": batch, "conditions": 40}
    images = loader[0][0].to(bench.device)
    with bench.autocast():
        for name, first in plans.items():
            conditions = []
            for i, block in enumerate(first):
                touched = {
                    site.name: torch.from_numpy(rng.choice(site.width, max(1, site.width * 3 // 100), replace=False))
                    for site in sites
                    if site.block is None or site.block >= block
                }
                skill = Skill(str(i), touched)
                conditions += [
                    Condition(skill, kinds, name=f"{i} {kinds}") for kinds in (KINDS, ("mlp",), ("attn",), ("head",))
                ]
            changes = Interventions(model, conditions, None, None)

            def loop(changes: Interventions = changes) -> None:
                with torch.inference_mode():
                    for i in range(40):
                        with hooked(model, changes, changes.sites, [i], lambda: None):
                            model(images).argmax(-1).cpu()

            def run(conditions: list = conditions) -> None:
                skillfast.sweep(model, loader, conditions, classes=10)

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                found[name] = bench.paired(loop, run)
                found[f"{name}: waits"] = waits(bench, run)
    return found


def skills(bench: Bench) -> dict:
    """Seconds of an attribution and of a step of learned masks, and how often either waits."""
    batch = 64 if bench.cuda else 4
    model, (one,) = whole_vit(bench, batch)
    loader = [one] * 4
    found: dict = {"images": 4 * batch}
    with bench.autocast():
        attributions = skillfast.attribute(model, loader, classes=10)
        found["attribute_seconds"] = statistics.median(
            bench.seconds(lambda: skillfast.attribute(model, loader, classes=10)) for _ in range(3)
        )
        few, many = (4, 12) if bench.cuda else (1, 2)

        def learn(steps: int) -> Callable[[], object]:
            return lambda: skillfast.learn_masks(
                model, loader, attributions, steps=steps, batch_size=96 if bench.cuda else 4
            )

        learn(few)()
        short, long = (min(bench.seconds(learn(n)) for _ in range(2)) for n in (few, many))
        found["mask_step_seconds"] = (long - short) / (many - few)
        found["waits_per_mask_step"] = (waits(bench, learn(many)) - waits(bench, learn(few))) / (many - few)
        halves = [waits(bench, lambda n=n: skillfast.attribute(model, [one] * n, classes=10)) for n in (2, 4)]
        found["waits_per_attribution"] = (halves[1] - halves[0]) / 2
    return found


def ranks(bench: Bench) -> dict:
    """Seconds of the exact ranks of every neuron, as the published run has them at its end."""
    rows = bench.normal(bench.sizes.ranked, bench.sizes.neurons)
    with torch.inference_mode():
        part = min(4096, rows.shape[1])
        run = lambda: [column_ranks(some) for some in rows.split(part, 1)]  # noqa: E731
        run()
        return {"rows": len(rows), "neurons": rows.shape[1], "seconds": bench.seconds(run)}


def run_bench(bench: Bench) -> dict:
    """`skillfast bench` of a vision transformer without weights on the images of a folder, to its report."""
    if bench.data is None or not Path(bench.data).is_dir():
        return {"left_out": f"expected a folder of images, got {bench.data}; see bench/README.md"}
    kind = "cifar10" if (Path(bench.data) / "cifar-10-batches-py").is_dir() else "imagefolder"
    command = [
        sys.executable, "-c", "from skillfast.cli import main; main()", "bench", "--no-pretrained",
        "--model", "vit_tiny_patch16_224",
        "--dataset", kind, "--data-dir", bench.data, "--epochs", "20", "--device", str(bench.device), "--quiet",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run([*command, "--output", folder], capture_output=True, text=True, timeout=200, check=False)
        taken = time.perf_counter() - start
        if done.returncode:
            return {"failed": done.stderr.strip()[-2000:], "seconds": taken}
        results = json.loads((Path(folder) / "results.json").read_text())
    return {
        "seconds": taken,
        "cost": results["cost"],
        "accuracy": results["baseline"]["accuracy"],
        "target_drop": results["selectivity"]["target_drop"],
    }


CASES: dict[str, tuple[int, Callable[[Bench], dict]]] = {  # seconds that each may take on a GPU, the first ones first
    "copy": (15, copy),
    "ops": (60, ops_alone),
    "launches": (5, launches),
    "vit_small": (60, vit("vit_small")),
    "vit_base": (75, vit("vit_base")),
    "sweep": (60, sweep),
    "skills": (40, skills),
    "llama": (50, llama),
    "ranks": (10, ranks),
    "bench": (200, run_bench),
}


def machine(bench: Bench) -> dict:
    """What a figure needs beside it."""
    import triton

    return {
        "device": torch.cuda.get_device_name() if bench.cuda else "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "skillfast": skillfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "backends": backends.status(),
    }


def run_cases(path: Path, bench: Bench, names: list[str], until: float) -> Iterator[str]:
    """Runs the cases that the file has not got, and writes it after each; gives a line about every one."""
    found = json.loads(path.read_text()) if path.exists() else {"machine": machine(bench), "cases": {}}

    def write(name: str, result: dict) -> None:
        found["cases"][name] = result
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(path)

    for name in names:
        estimate, case = CASES[name]
        if name in found["cases"]:
            continue
        if time.time() + estimate > until:
            yield f"{name}: left for a run with {estimate} s more"
            continue
        write(name, {"begun": True})  # not tried again by the process after one that died here
        start = time.perf_counter()
        try:
            write(name, case(bench))
        except Exception as error:
            write(name, {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-4000:]})
        if bench.cuda:
            torch.cuda.empty_cache()
        state = found["cases"][name].get("failed", "done")
        yield f"{name}: {state.splitlines()[0]}, {time.perf_counter() - start:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that any machine runs in seconds")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--until", type=float, default=float("inf"), help="time (Unix) at which all has to be done")
    parser.add_argument("--data", help="folder with cifar-10-batches-py/, or with train/ and test/ of images by class")
    arguments = parser.parse_args()
    bench = Bench(arguments.device, TINY if arguments.tiny else Sizes(), arguments.data)
    for line in run_cases(arguments.file, bench, arguments.cases.split(","), arguments.until):
        print(line, flush=True)


if __name__ == "__main__":
    main()
