"""`skillfast.bench`: data, model, trace, select, sweep, oracle and control, files."""

from __future__ import annotations

import csv
import math
import os
import platform
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from msgspec import structs

from skillfast import __version__, backends, files, metrics
from skillfast.ablation.interventions import Condition
from skillfast.ablation.sweep import SweepResult, sweep
from skillfast.errors import ArgumentError
from skillfast.evaluation import selectivity as removal
from skillfast.evaluation import shapley as contribution
from skillfast.evaluation.correlations import top_correlations
from skillfast.evaluation.embeddings import standard_metrics
from skillfast.evaluation.interference import interference
from skillfast.evaluation.overall import overall_accuracy
from skillfast.evaluation.resampling import Bootstrap
from skillfast.memory.budget import limited_memory
from skillfast.models.sites import choose_sites, fingerprint
from skillfast.results import records
from skillfast.results.bench import BenchResults
from skillfast.runs import removals, selection
from skillfast.runs.checkpoints import JSON, Kept, Phases
from skillfast.runs.cost import Clock, trace_over_forward
from skillfast.runs.embedding_sweep import EmbeddingChanges, compare_embeddings
from skillfast.runs.subject import Subject, prepare, trace_part
from skillfast.skills.ranking import NeuronRanking
from skillfast.skills.skill import Skill, overlap, save_skills
from skillfast.statistics.scores import NeuronScores
from skillfast.vocabulary import STATISTICS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from skillfast.runs.config import BenchConfig

RESULTS = "results.json"
MATRIX = "removal_matrix.csv"


@dataclass(frozen=True)
class BenchReport:
    """What a run found and where it was written.

    Attributes:
        results: The content of results.json.
        skills: Class name -> the skill that was removed.
        directory: The output folder.
    """

    results: BenchResults
    skills: dict[str, Skill]
    directory: Path


def bench(config: BenchConfig, *, quiet: bool = True, say: Callable[[str], None] = lambda _: None) -> BenchReport:
    """Run the benchmark and write its files.

    Args:
        config: The settings.
        quiet: Show no progress bars.
        say: Called with each line worth reading while the run goes on; the baseline accuracy comes first.

    An interrupted run leaves its finished phases in `.unfinished/` of the output folder, and the same call goes on from
    there. A model that was trained is left as `model.safetensors`.

    Returns:
        The results; `results.json`, `skills.json`, `scores.safetensors`, `removal_matrix.csv` and `report.html` are in
        the output folder.

    Raises:
        SkillfastError: Anything that stops the run, in one line.
    """
    if config.select.method in STATISTICS and config.select.method not in config.trace.statistics:
        raise ArgumentError(
            f"method: expected one of the statistics that are traced, {', '.join(config.trace.statistics)}, got "
            f"{config.select.method!r}"
        )
    directory = files.output_folder(config.run.output)
    clock = Clock()
    phases = Phases(directory, _determined_by(config), clock, resume=config.run.resume, say=say)
    with phases, ExitStack() as stack:
        stack.enter_context(backends.use_backend(config.run.backend))
        stack.enter_context(limited_memory(config.run.memory_bytes))
        subject = prepare(config, clock, quiet=quiet, say=say, phases=phases)
        stack.enter_context(subject.precision())
        if phases.resumed:
            say(f"an unfinished run goes on after {', '.join(phases.resumed)}")
        _announce_baseline(subject, clock, quiet, say)
        found, skills, scores = _measure(subject, phases, quiet, say)
    clock.seconds["total"] = clock.total() + phases.earlier
    found["cost"] |= {"seconds": clock.seconds, "resumed": phases.resumed, **phases.peak_memory()}
    results = records.made(BenchResults, found)
    _write(directory, results, skills, scores)
    phases.end(directory)
    return BenchReport(results, skills, directory)


def _determined_by(config: BenchConfig) -> dict[str, Any]:
    """What the results of a run depend on, besides its data and weights."""
    return {**config.to_json(), "skillfast": __version__, "torch": torch.__version__, "numpy": np.__version__}


def _measure(
    subject: Subject, phases: Phases, quiet: bool, say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Skill], NeuronScores]:
    """Every phase after the baseline: results.json, the skills that were removed, and the scores."""
    config = subject.config
    scores = phases.run("trace", lambda: trace_part(subject, "select", quiet), Kept.by(NeuronScores.load))
    chosen = _choose(subject, scores, phases, quiet, say)
    skills = dict(chosen.skills[chosen.chosen])
    found = list(skills.values())
    swept = phases.run("sweep", lambda: _sweep(subject, found, quiet), Kept.by(SweepResult.load))
    embedded = phases.run(
        "embeddings", lambda: _embeddings(subject, found, quiet), Kept.optional(EmbeddingChanges.load)
    )
    on_test = phases.run(
        "trade_off",
        lambda: selection.effects(
            subject.model,
            subject.loader("test"),
            chosen.skills,
            scale=config.ablate.scale,
            classes=list(skills),
            intervals=config.run.seed,
            quiet=quiet,
        ),
        JSON,
    )
    results = _results(subject, found, swept, embedded)
    results["selection"] = chosen.to_json(on_test["candidates"])
    if scores.pearson is not None:
        held_out = phases.run(
            "trace_test",
            lambda: trace_part(subject, "test", quiet, statistics=("pearson",)),
            Kept.by(NeuronScores.load),
        )
        results["correlations"] = top_correlations(scores, held_out)
    results["cost"] = trace_over_forward(
        subject.model,
        subject.loader("select"),
        metrics.classification(subject.splits.classes),
        sites=config.trace.sites,
        pool=config.trace.pool,
        statistics=config.trace.statistics,
        bins=config.trace.bins,
    )
    return results, skills, scores


def _announce_baseline(subject: Subject, clock: Clock, quiet: bool, say: Callable[[str], None]) -> None:
    """Accuracy on the test part, before anything is built on it."""
    with clock.phase("baseline"):
        intact = sweep(subject.model, subject.loader("test"), [], classes=subject.splits.classes, quiet=quiet)
    k, accuracy = len(subject.splits.classes), float(intact.baseline.mean())
    say(f"baseline accuracy {accuracy:.1%} (mean of {k} classes, {len(intact.labels)} examples)")
    chance = 1 / k
    if subject.splits.name != "digits":
        parts = subject.splits
        say(
            f"{parts.name}: {len(parts.select)} examples to select on, {len(parts.validate)} to validate, "
            f"{len(parts.test)} to test; {subject.normalisation}"
        )
    noise = 2 * math.sqrt(chance * (1 - chance) / len(intact.labels))  # two standard errors of guessing
    if accuracy < chance + max(noise, 0.1 * (1 - chance)):
        say(
            f"warning: the baseline is near chance ({chance:.1%}), so there is little to remove; check the weights, "
            f"and --mean, --std, --crop-pct ({subject.normalisation})"
        )


def _choose(
    subject: Subject, scores: NeuronScores, phases: Phases, quiet: bool, say: Callable[[str], None]
) -> selection.Selection:
    """The best candidate on the validation part; the test part is not looked at."""
    config, classes = subject.config, subject.splits.classes
    tried = selection.candidates(
        config.select.method,
        config.select.share,
        contrastive=config.select.contrastive,
        statistics=config.trace.statistics,
    )
    ranked = selection.rankings(
        subject.model,
        subject.loader("select"),
        scores,
        tried,
        mask_loader=subject.varied_loader("select"),
        max_site_share=config.select.max_site_share,
        scale=config.ablate.scale,
        seed=config.run.seed,
        classes=classes,
        quiet=quiet,
        keep=lambda name, make: phases.run("select", make, Kept.by(NeuronRanking.load), part=name),
    )
    skills = selection.cut(ranked, tried, max_site_share=config.select.max_site_share)
    validation = phases.run(
        "choose",
        lambda: selection.effects(
            subject.model, subject.loader("validate"), skills, scale=config.ablate.scale, classes=classes, quiet=quiet
        ),
        JSON,
    )
    chosen = selection.choose(tried, skills, validation)
    if len(tried) > 1:
        say(f"chosen on {len(subject.splits.validate)} validation examples: {chosen.candidate}")
    return chosen


def _sweep(subject: Subject, skills: Sequence[Skill], quiet: bool) -> SweepResult:
    """Every skill's components, then its blocks, then its random controls."""
    config = subject.config
    sites = choose_sites(subject.model, config.trace.sites)
    conditions: list[Condition] = [
        *removals.component_conditions(skills, config.ablate.scale),
        *removals.block_conditions(skills, sites, config.ablate.scale),
        *removals.control_conditions(skills, sites, config.ablate.control_draws, config.ablate.scale, config.run.seed),
    ]
    return sweep(
        subject.model,
        subject.loader("test"),
        conditions,
        classes=subject.splits.classes,
        keep_predictions=True,
        quiet=quiet,
    )


def _embeddings(subject: Subject, skills: Sequence[Skill], quiet: bool) -> EmbeddingChanges | None:
    """What each skill's removal does to the embeddings, then what one random control of each does."""
    config = subject.config
    sites = choose_sites(subject.model, config.trace.sites)
    return compare_embeddings(
        subject.model,
        subject.loader("test"),
        [
            *(Condition(skill, scale=config.ablate.scale) for skill in skills),
            *removals.control_conditions(skills, sites, 1, config.ablate.scale, config.run.seed),
        ],
        classes=subject.splits.classes,
        seed=config.run.seed,
        quiet=quiet,
    )


def _results(
    subject: Subject, skills: Sequence[Skill], swept: SweepResult, embedded: EmbeddingChanges | None
) -> dict[str, Any]:
    """results.json without its cost."""
    k, n = len(skills), len(swept.labels)
    labels, intact = swept.labels, swept.top2[:, 0]
    assert swept.predictions is not None
    sites = choose_sites(subject.model, subject.config.trace.sites)
    blocks = contribution.occupied_blocks(skills, sites)
    rows = swept.predictions.reshape(-1, k, n)
    n_parts = len(contribution.SUBSETS)
    parts, by_block, controls = np.split(rows, [n_parts, n_parts + max(0, 2 * (len(blocks) - 1))])
    bootstrap = Bootstrap(labels, seed=subject.config.run.seed)
    oracle = removal.oracle_predictions(swept.top2, k)[None]
    drops, resampled = removal.own_drops(parts, intact, labels, bootstrap)
    block_drops = removal.own_drops(np.concatenate([parts[:1], by_block]), intact, labels, bootstrap)
    turns, control, seen = None, None, {}
    if embedded is not None:
        turns, control = (embedded.angles[:k], embedded.resampled_angles[:k]), embedded.angles[k:]
        comparisons = embedded.comparisons
        seen["standard_metrics"] = standard_metrics(
            embedded.metrics, comparisons[:k], drops[0], subject.splits.classes, bootstrap, comparisons[k:]
        )
    return {
        "environment": _environment(subject),
        "config": subject.config.to_json(),
        "model": _model(subject),
        "dataset": subject.dataset_json(),
        "baseline": {
            "accuracy": float(swept.baseline.mean()),
            "per_class": swept.baseline.tolist(),
            "n_test_per_class": np.bincount(labels, minlength=k).tolist(),
        },
        "overall": overall_accuracy(
            parts[0], controls, intact, labels, skills, sum(site.width for site in sites), bootstrap
        ),
        "removal_matrix": removal.removal_matrix(parts[0], intact, labels).tolist(),
        "selectivity": removal.selectivity(parts[:1], intact, labels, bootstrap),
        "oracle": {
            **structs.asdict(removal.selectivity(oracle, intact, labels, bootstrap)),
            "removal_matrix": removal.removal_matrix(oracle[0], intact, labels).tolist(),
        },
        "random_control": {
            **structs.asdict(removal.selectivity(controls, intact, labels, bootstrap)),
            "draws": subject.config.ablate.control_draws,
        },
        "layer_contribution": {
            **structs.asdict(contribution.layer_contribution(drops, resampled, subject.splits.classes)),
            "per_block": contribution.per_block(blocks, *block_drops, subject.splits.classes),
        },
        **seen,
        "interference": interference(
            turns, parts[0], oracle[0], intact, labels, overlap(skills), subject.splits.classes, control
        ),
    }


def _environment(subject: Subject) -> dict[str, Any]:
    import timm

    device = subject.device
    return {
        "skillfast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "backends": backends.status(),
    }


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} threads"


def _model(subject: Subject) -> dict[str, Any]:
    sites = choose_sites(subject.model, subject.config.trace.sites)
    return {
        "name": subject.name,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "embed_dim": int(subject.model.num_features),  # type: ignore[arg-type]
        "fingerprint": fingerprint(subject.model),
        "neurons": sum(site.width for site in sites),
        "sites": [
            {"name": s.name, "kind": s.kind, "block": s.block, "heads": s.heads, "width": s.width} for s in sites
        ],
        "trained": subject.trained,
    }


def _write(directory: Path, results: BenchResults, skills: dict[str, Skill], scores: NeuronScores) -> None:
    """All files; results.json after what it sums up, the page last."""
    from skillfast.report import write_report

    save_skills(directory, skills.values())
    scores.save(directory)
    classes = results.dataset.classes
    with files.replacing(directory / MATRIX) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["removed", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, results.removal_matrix, strict=True))
    records.write(results, directory / RESULTS)
    write_report(directory)


__all__ = ["BenchReport", "bench"]
