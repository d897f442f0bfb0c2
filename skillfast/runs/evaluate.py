"""`skillfast evaluate`: what removing and amplifying skills does on held-out data, by size and by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillfast import files
from skillfast.errors import ArgumentError
from skillfast.evaluation.classification import MEASURES
from skillfast.evaluation.generation import require_sacrebleu
from skillfast.metrics import COLUMN, check_metric_names
from skillfast.models.sites import choose_sites, fingerprint
from skillfast.results import records
from skillfast.results.coverage import ModelCoverage
from skillfast.results.evaluation import FILE, EvaluatedModel, EvaluatedSite, EvaluationResults
from skillfast.runs import selection
from skillfast.runs.class_outcomes import class_outcomes
from skillfast.runs.config import EVALUATED, BenchConfig, Generation, Grid
from skillfast.runs.environment import environment
from skillfast.runs.generation import causal_outcomes, prefixes
from skillfast.runs.given import Given
from skillfast.runs.grid import cases_of_scores, cases_of_skills, largest
from skillfast.runs.session import open_session
from skillfast.runs.shortcut import check_shortcut, disagreements, shortcut_outcome
from skillfast.runs.soft_prompt import used_prompt
from skillfast.runs.tasks import check_tasks, compare_tasks
from skillfast.runs.text import CausalSubject, predicts_tokens
from skillfast.skills.skill import Skill, load_skills, save_skills
from skillfast.vocabulary import LEARNED, METRICS, STATISTICS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch

    from skillfast.runs.grid import Case
    from skillfast.runs.session import Session
    from skillfast.statistics.scores import NeuronScores

    Say = Callable[[str], None]


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    Attributes:
        results: The content of `evaluation.json`.
        skills: The skills that were chosen, from all layers at the largest size, which go to `skills.json`: those of
            the metrics, unless they were loaded, and the sets that follow a shortcut and the label.
    """

    results: EvaluationResults
    skills: tuple[Skill, ...] = ()

    def save(self, directory: str | Path) -> Path:
        """Write `evaluation.json` into the folder, and `skills.json` where skills were chosen; returns the first."""
        path = files.output_folder(directory) / FILE
        if self.skills:
            save_skills(directory, self.skills)
        records.write(self.results, path)
        return path

    @staticmethod
    def load(directory: str | Path) -> Evaluation:
        """Read a folder's `evaluation.json`, without skills.

        Raises:
            DataError: A file that is missing, broken or of another version.
        """
        return Evaluation(records.read(EvaluationResults, Path(directory) / FILE, "write it with `skillfast evaluate`"))


def evaluate(
    config: BenchConfig | None = None,
    grid: Grid | None = None,
    *,
    model: torch.nn.Module | None = None,
    loader: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
    label_key: str | None = None,
    metrics: Sequence[str] = EVALUATED,
    tasks: Sequence[str] = (),
    shortcut: str | None = None,
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
        config: Model, data and method; with `model` and `loader` the method alone.
        grid: Sizes, layers and factors.
        model: A model of your own, in evaluation mode and on its device.
        loader: The labelled examples, in batches as `trace` takes them, one label per example: a third of each class
            tests; or a loader for each of `"select"`, `"validate"` and `"test"`.
        label_key: Key of the labels in a batch that is a mapping; by default `labels` or `label`.
        metrics: Names of the metrics whose skills are evaluated.
        tasks: Metrics whose neurons are compared at the grid's largest size, from the same trace; see
            `skillfast.evaluation.tasks`. None by default.
        shortcut: `"column:NAME"`, a column of the data (or a key of the loader's batches) that says for each example
            what a heuristic answers, as the name of a class. Which neurons follow it and not the label is told, and
            what the model does without them where the two disagree; see `skillfast.evaluation.shortcuts`.
        skills: `skills.json` or a folder with one; its skills must come from other examples than the test part's.
        generation: What a causal language model writes.
        quiet: Show no progress bars.
        say: Called with each line worth reading.

    Raises:
        SkillfastError: Anything that stops the run, in one line.
    """
    if shortcut is not None:
        check_shortcut(shortcut)
    columns = () if shortcut is None else (shortcut.removeprefix(COLUMN),)
    given = Given.of(model, loader, label_key, columns)
    config = (config or BenchConfig()) if given is None else given.config(config)
    grid = grid or Grid(seed=config.run.seed)
    read = () if shortcut is None or config.data.dataset != "text" else (shortcut,)
    config = _traced_config(config, tuple(dict.fromkeys((*metrics, *tasks, *read))))
    if tasks:
        check_tasks(tasks)
    if predicts_tokens(config) and tasks:
        raise ArgumentError(
            "tasks: expected a classifier's --metrics, got those of a causal language model; leave --tasks out, or "
            "give --prompt and --label-words"
        )
    if predicts_tokens(config) and shortcut is not None:
        raise ArgumentError(
            "shortcut: expected a classifier, which a heuristic can answer for, got the metrics of a causal language "
            "model; leave --shortcut out, or give --prompt and --label-words"
        )
    if skills is None or tasks:
        _check_method(_method(config), config, grid, [*metrics, *tasks])
    loaded = None if skills is None else load_skills(skills)  # a file that is wrong is told before the expensive steps
    generation = generation or Generation()
    if predicts_tokens(config) and generation.max_new_tokens:
        require_sacrebleu()  # a library that is missing is told before the expensive step
    with open_session(config, given=given, quiet=quiet, say=say) as session:
        if isinstance(session.subject, CausalSubject):
            return _evaluate_causal(session, session.subject, grid, metrics, loaded, generation, skills)
        return _evaluate_classifier(session, grid, metrics, tasks, shortcut, loaded, skills)


def _evaluate_classifier(
    session: Session,
    grid: Grid,
    metrics: Sequence[str],
    tasks: Sequence[str],
    shortcut: str | None,
    skills: Mapping[str, Skill] | None,
    skills_from: str | Path | None,
) -> Evaluation:
    subject = session.subject
    # data that cannot tell the two apart are told before the trace
    answers = {} if shortcut is None else disagreements(subject, shortcut)
    scores = _scores(session) if skills is None or tasks else None
    cases = _cases(session, scores, grid, metrics, skills)
    session.say(f"{_interventions(cases)} interventions on {len(subject.splits.test)} examples")
    intact, outcomes = session.stage(
        "sweep",
        lambda: class_outcomes(
            subject.model,
            subject.loader("test"),
            cases,
            subject.splits.classes,
            replicates=grid.replicates,
            seed=grid.seed,
            quiet=session.quiet,
        ),
    )
    compared = None
    if scores is not None and tasks:
        compared = session.stage(
            "tasks",
            lambda: compare_tasks(
                subject,
                scores,
                tasks,
                method=_method(subject.config),
                share=max(grid.shares),
                max_site_share=grid.max_site_share,
                draws=grid.draws,
                seed=grid.seed,
            ),
        )
    followed, chosen = None, largest(cases) if skills is None else ()
    if shortcut is not None:
        followed, sets = session.stage(
            "shortcut", lambda: shortcut_outcome(subject, shortcut, answers, grid, quiet=session.quiet)
        )
        chosen = (*chosen, *sets)
    results = {
        "task": "classification",
        "measures": MEASURES,
        "intact": intact,
        "outcomes": outcomes,
        "model": evaluated_model(session),
        "data": {**subject.dataset_json(), "digests": session.data_digests},
        "config": _settings(subject.config, grid, skills_from) | {"shortcut": shortcut},
        "environment": environment(subject.model, subject.device),
        "tasks": compared,
        "shortcut": followed,
    }
    return Evaluation(records.made(EvaluationResults, results), chosen)


def _evaluate_causal(
    session: Session,
    subject: CausalSubject,
    grid: Grid,
    metrics: Sequence[str],
    skills: Mapping[str, Skill] | None,
    settings: Generation,
    skills_from: str | Path | None,
) -> Evaluation:
    if settings.max_new_tokens:
        prefixes(subject.texts("test"), settings, grid.seed)  # texts that are too short are told before the trace
    scores = _scores(session) if skills is None else None
    cases = _cases(session, scores, grid, metrics, skills)
    session.say(f"{_interventions(cases)} interventions on {len(subject.splits.test)} texts")
    intact, outcomes, counts = session.stage(
        "sweep",
        lambda: causal_outcomes(
            subject, cases, settings, replicates=grid.replicates, seed=grid.seed, quiet=session.quiet
        ),
    )
    results = {
        "task": "causal",
        "measures": settings.measures,
        "intact": intact,
        "outcomes": outcomes,
        "model": evaluated_model(session),
        "data": {**subject.dataset_json(), **counts, "digests": session.data_digests},
        "config": _settings(subject.config, grid, skills_from) | {"generation": asdict(settings)},
        "environment": environment(subject.model, subject.device),
    }
    return Evaluation(records.made(EvaluationResults, results), largest(cases) if skills is None else ())


def _scores(session: Session) -> NeuronScores:
    """A trace of the select part."""
    return session.stage("trace", lambda: session.trace("select"))


def _cases(
    session: Session,
    scores: NeuronScores | None,
    grid: Grid,
    metrics: Sequence[str],
    skills: Mapping[str, Skill] | None,
) -> list[Case]:
    """Skills that were loaded, or chosen on the select part, which the scores are of."""
    subject = session.subject
    if skills is not None:
        sites = choose_sites(subject.model, subject.config.trace.sites)
        return cases_of_skills(skills.values(), sites, grid)
    assert scores is not None
    method = _method(subject.config)
    (tried,) = selection.candidates(method, max(grid.shares), contrastive=grid.contrastive)  # one, as method is named
    ranked = selection.rank(session, scores, [tried], max_site_share=grid.max_site_share)
    return cases_of_scores(ranked[tried.ranking], method, [name.removeprefix(COLUMN) for name in metrics], grid)


def _interventions(cases: Sequence[Case]) -> int:
    """How many factors change something: 1 does not."""
    return sum(scale != 1 for case in cases for scale in case.scales)


def _method(config: BenchConfig) -> str:
    """What neurons are ranked by; nothing is tried here, so `"auto"` is Pearson's r."""
    return "pearson" if config.select.method == "auto" else config.select.method


def _check_method(method: str, config: BenchConfig, grid: Grid, metrics: Sequence[str]) -> None:
    """Attribution and masks rank neurons for the classes alone, a statistic for whatever was traced with it."""
    if method in LEARNED and grid.contrastive:
        raise ArgumentError(
            f"contrastive: expected with a statistic or attribution, got method {method!r}, which is learned against "
            "the other classes; leave it out"
        )
    if method not in STATISTICS:
        if list(metrics) == ["label"]:
            return
        raise ArgumentError(
            f"method: expected one of {', '.join(STATISTICS)} for the metrics {', '.join(metrics)}, got "
            f"{method!r}, which ranks neurons for classes alone; name another --method"
        )
    selection.check_traced(method, config.trace.statistics)


def _settings(config: BenchConfig, grid: Grid, skills_from: str | Path | None) -> dict[str, Any]:
    return {**config.to_json(), "skills": None if skills_from is None else str(skills_from), "grid": grid.to_json()}


def _traced_config(config: BenchConfig, metrics: Sequence[str]) -> BenchConfig:
    """The settings with these metrics for text; images are always traced with all of theirs."""
    check_metric_names(metrics)
    if config.data.dataset == "text":
        return config.replaced(metrics=tuple(metrics))
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ArgumentError(
            f"metrics: expected some of {', '.join(METRICS)} for images, got {unknown[0]!r}; leave it out"
        )
    return config


def evaluated_model(session: Session) -> EvaluatedModel:
    """The model as `evaluation.json` has it."""
    model, covered = session.subject.model, session.coverage
    sites = choose_sites(model, session.config.trace.sites)
    return EvaluatedModel(
        name=session.subject.name,
        fingerprint=fingerprint(model),
        neurons=sum(site.width for site in sites),
        sites=[EvaluatedSite(name=site.name, kind=site.kind, block=site.block, width=site.width) for site in sites],
        weights=session.weights,
        coverage=None if covered is None else records.made(ModelCoverage, covered.to_json()),
        soft_prompt=used_prompt(session.config, model),
    )
