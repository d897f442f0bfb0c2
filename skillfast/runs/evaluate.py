"""`skillfast evaluate`: what removing and amplifying skills does on held-out data, by size and by layer."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from skillfast import backends
from skillfast.errors import ArgumentError
from skillfast.evaluation.classification import MEASURES
from skillfast.evaluation.generation import require_sacrebleu
from skillfast.memory.budget import limited_memory
from skillfast.metrics import COLUMN, check_metric_names
from skillfast.models.sites import choose_sites, fingerprint
from skillfast.results import records
from skillfast.results.evaluation import EvaluatedModel, EvaluatedSite, EvaluationResults
from skillfast.runs import selection
from skillfast.runs.class_outcomes import class_outcomes
from skillfast.runs.config import EVALUATED, Generation, Grid
from skillfast.runs.cost import Clock
from skillfast.runs.generation import causal_outcomes, prefixes
from skillfast.runs.grid import cases_of_scores, cases_of_skills, largest
from skillfast.runs.results import Evaluation, environment
from skillfast.runs.subject import Subject, on_device, prepare, trace_part
from skillfast.runs.subject_causal import predicts_tokens, prepare_causal, trace_causal
from skillfast.runs.tasks import check_tasks, compare_tasks
from skillfast.skills.skill import load_skills
from skillfast.vocabulary import METRICS, STATISTICS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import nn

    from skillfast.results.evaluation import Tasks
    from skillfast.runs.config import BenchConfig
    from skillfast.runs.grid import Case
    from skillfast.runs.subject_causal import CausalSubject
    from skillfast.statistics.scores import NeuronScores

    Say = Callable[[str], None]


def evaluate(
    config: BenchConfig,
    grid: Grid | None = None,
    *,
    metrics: Sequence[str] = EVALUATED,
    tasks: Sequence[str] = (),
    skills: str | Path | None = None,
    generation: Generation | None = None,
    quiet: bool = True,
    say: Say = lambda _: None,
) -> Evaluation:
    """Remove and amplify skills on held-out data.

    A classifier's accuracy and F1; with `token_log_probability` among the metrics a causal language model's perplexity
    on held-out text, and BLEU of what it writes against what it writes intact.

    Skills are chosen on the select part by `config.select.method` (Pearson's r for `"auto"`), or loaded; the test part,
    on which everything is measured, chooses nothing.

    Args:
        config: Model, data and method.
        grid: Sizes, layers and factors.
        metrics: Names of the metrics whose skills are evaluated.
        tasks: Metrics whose neurons are compared at the grid's largest size, from the same trace; see
            `skillfast.evaluation.tasks`. None by default.
        skills: `skills.json` or a folder with one; its skills must come from other examples than the test part's.
        generation: What a causal language model writes.
        quiet: Show no progress bars.
        say: Called with each line worth reading.

    Raises:
        SkillfastError: Anything that stops the run, in one line.
    """
    grid = grid or Grid(seed=config.run.seed)
    config = _traced_config(config, tuple(dict.fromkeys((*metrics, *tasks))))
    if tasks:
        check_tasks(tasks)
    if predicts_tokens(config):
        if tasks:
            raise ArgumentError(
                "tasks: expected a classifier's --metrics, got those of a causal language model; leave --tasks out, or "
                "give --prompt and --label-words"
            )
        return _evaluate_causal(config, grid, skills, generation or Generation(), quiet, say)
    with ExitStack() as stack:
        stack.enter_context(backends.use_backend(config.run.backend))
        stack.enter_context(limited_memory(config.run.memory_bytes))
        subject = prepare(config, Clock(), quiet=quiet, say=say)
        stack.enter_context(subject.precision())
        scores = None
        if skills is None or tasks:
            _check_method(_method(config), config, [*metrics, *tasks])
            scores = trace_part(subject, "select", quiet)
        if skills is None:
            assert scores is not None
            cases = class_cases(subject, scores, grid, metrics, quiet)
        else:
            cases = cases_of_skills(load_skills(skills).values(), choose_sites(subject.model, config.trace.sites), grid)
        say(f"{sum(len(case.scales) for case in cases)} interventions on {len(subject.splits.test)} examples")
        intact, outcomes = class_outcomes(
            subject.model,
            subject.loader("test"),
            cases,
            subject.splits.classes,
            replicates=grid.replicates,
            seed=grid.seed,
            quiet=quiet,
        )
        compared = None if scores is None or not tasks else _compared(subject, scores, tasks, grid)
    results = {
        "task": "classification",
        "measures": MEASURES,
        "intact": intact,
        "outcomes": outcomes,
        "model": evaluated_model(subject.name, subject.model, config.trace.sites),
        "data": subject.dataset_json(),
        "config": _settings(subject.config, grid, skills),
        "environment": environment(subject.device),
        "tasks": compared,
    }
    return Evaluation(records.made(EvaluationResults, results), largest(cases) if skills is None else ())


def _compared(subject: Subject, scores: NeuronScores, tasks: Sequence[str], grid: Grid) -> Tasks:
    return compare_tasks(
        subject,
        scores,
        tasks,
        method=_method(subject.config),
        share=max(grid.shares),
        max_site_share=grid.max_site_share,
        draws=grid.draws,
        seed=grid.seed,
    )


def _evaluate_causal(
    config: BenchConfig, grid: Grid, skills: str | Path | None, settings: Generation, quiet: bool, say: Say
) -> Evaluation:
    if settings.max_new_tokens:
        require_sacrebleu()  # before anything is traced for nothing
    with backends.use_backend(config.run.backend):
        subject = prepare_causal(*on_device(config))
        if settings.max_new_tokens:
            prefixes(subject.test, settings, grid.seed)  # likewise
        cases = _causal_cases(subject, grid, skills, quiet)
        say(f"{sum(len(case.scales) for case in cases)} interventions on {len(subject.test)} texts")
        intact, outcomes, counts = causal_outcomes(
            subject, cases, settings, replicates=grid.replicates, seed=grid.seed, quiet=quiet
        )
    results = {
        "task": "causal",
        "measures": settings.measures,
        "intact": intact,
        "outcomes": outcomes,
        "model": evaluated_model(str(config.model.name), subject.model, config.trace.sites),
        "data": {
            "name": "text",
            "classes": list(subject.test.classes),
            "n_select": len(subject.select),
            "n_validate": len(subject.validate),
            "n_test": len(subject.test),
            **counts,
        },
        "config": _settings(subject.config, grid, skills) | {"generation": asdict(settings)},
        "environment": environment(subject.device),
    }
    return Evaluation(records.made(EvaluationResults, results), largest(cases) if skills is None else ())


def _causal_cases(subject: CausalSubject, grid: Grid, skills: str | Path | None, quiet: bool) -> list[Case]:
    """Skills from a file, or chosen on the select part."""
    config = subject.config
    if skills is not None:
        return cases_of_skills(load_skills(skills).values(), choose_sites(subject.model, config.trace.sites), grid)
    _check_method(_method(config), config, config.trace.metrics)
    scores = trace_causal(subject, quiet)
    return cases_of_scores(scores, _method(config), [name.removeprefix(COLUMN) for name in config.trace.metrics], grid)


def _method(config: BenchConfig) -> str:
    return "pearson" if config.select.method == "auto" else config.select.method


def _check_method(method: str, config: BenchConfig, metrics: Sequence[str]) -> None:
    """Attribution and masks rank neurons for the classes alone, a statistic for whatever was traced with it."""
    if method not in STATISTICS:
        if list(metrics) == ["label"]:
            return
        raise ArgumentError(
            f"method: expected one of {', '.join(STATISTICS)} for the metrics {', '.join(metrics)}, got "
            f"{method!r}, which ranks neurons for classes alone; name another --method"
        )
    if method not in config.trace.statistics:
        raise ArgumentError(
            f"method: expected one of the statistics that are traced, {', '.join(config.trace.statistics)}, got "
            f"{method!r}; add it to --statistics"
        )


def _settings(config: BenchConfig, grid: Grid, skills: str | Path | None) -> dict[str, Any]:
    return {**config.to_json(), "skills": None if skills is None else str(skills), "grid": grid.to_json()}


def _traced_config(config: BenchConfig, metrics: Sequence[str]) -> BenchConfig:
    """With the metrics of text that are wanted; those of images are fixed."""
    check_metric_names(metrics)
    if config.data.dataset == "text":
        return config.replaced(metrics=tuple(metrics))
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ArgumentError(
            f"metrics: expected some of {', '.join(METRICS)} for images, got {unknown[0]!r}; leave it out"
        )
    return config


def class_cases(subject: Subject, scores: NeuronScores, grid: Grid, metrics: Sequence[str], quiet: bool) -> list[Case]:
    """Skills chosen on the select part, which `scores` are of."""
    config, method = subject.config, _method(subject.config)
    names = [name.removeprefix(COLUMN) for name in metrics]
    keep = selection.KEEP if method == "mask" else None
    tried = selection.Candidate(method, grid.contrastive, max(grid.shares), keep)
    ranked = selection.rankings(
        subject.model,
        subject.loader("select"),
        scores,
        [tried],
        mask_loader=subject.varied_loader("select"),
        max_site_share=grid.max_site_share,
        seed=config.run.seed,
        classes=subject.splits.classes,
        quiet=quiet,
    )
    return cases_of_scores(ranked[tried.ranking], method, names, grid)


def evaluated_model(name: str, model: nn.Module, kinds: Sequence[str]) -> EvaluatedModel:
    """The model as `evaluation.json` has it."""
    sites = choose_sites(model, kinds)
    return EvaluatedModel(
        name=name,
        fingerprint=fingerprint(model),
        neurons=sum(site.width for site in sites),
        sites=[EvaluatedSite(name=site.name, kind=site.kind, block=site.block, width=site.width) for site in sites],
    )
