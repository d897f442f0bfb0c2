"""`skillfast.bench`: data, model, trace, select, sweep, oracle and control, files."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import structs

from skillfast import files, metrics
from skillfast.ablation.sweep import SweepResult, sweep
from skillfast.errors import ModelError
from skillfast.evaluation import selectivity, shapley
from skillfast.evaluation.controls import own_control
from skillfast.evaluation.correlations import top_correlations
from skillfast.evaluation.embeddings import standard_metrics
from skillfast.evaluation.interference import Margins, interference
from skillfast.evaluation.overall import overall_accuracy
from skillfast.evaluation.probes import information
from skillfast.evaluation.replacements import replacements
from skillfast.evaluation.resampling import Bootstrap
from skillfast.evaluation.verdicts import verdicts
from skillfast.models.sites import choose_sites, find_sites, fingerprint
from skillfast.results import records
from skillfast.results import skills as skill_files
from skillfast.results.bench import FILE, REMEDY, BenchResults
from skillfast.runs import selection
from skillfast.runs.config import BenchConfig, given_in_python
from skillfast.runs.cost import trace_over_forward
from skillfast.runs.decisions import kept_decisions, remove_earlier, remove_from_earlier
from skillfast.runs.embedding_sweep import EmbeddingChanges, compare_embeddings, fit_at_once
from skillfast.runs.environment import environment
from skillfast.runs.given import Given
from skillfast.runs.identifiability import identify
from skillfast.runs.kept import JSON, Kept
from skillfast.runs.never_seen import never_seen
from skillfast.runs.removals import Removals
from skillfast.runs.replacements import replaced_predictions
from skillfast.runs.replay import Earlier
from skillfast.runs.session import open_session
from skillfast.runs.shares import OwnPredictions, predict_parts
from skillfast.runs.soft_prompt import used_prompt
from skillfast.skills.ranking import NeuronRanking
from skillfast.skills.skill import Skill, load_skills, overlap, save_skills
from skillfast.statistics.scores import NeuronScores
from skillfast.vocabulary import GIVEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch

    from skillfast.ablation.interventions import Condition
    from skillfast.evaluation.probes import OtherModel
    from skillfast.results.decisions import Decisions
    from skillfast.results.replay import Replay
    from skillfast.runs.session import Session
    from skillfast.runs.subject import Subject

MATRIX = "removal_matrix.csv"


@dataclass(frozen=True)
class BenchReport:
    """What a run found and where it was written.

    Attributes:
        results: The content of results.json.
        skills: Class name -> the skill that was removed.
        directory: The output folder.
        replay: What differs from the run that was run again; None without one.
    """

    results: BenchResults
    skills: dict[str, Skill]
    directory: Path
    replay: Replay | None = None


def bench(
    config: BenchConfig | None = None,
    *,
    model: torch.nn.Module | None = None,
    loader: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
    label_key: str | None = None,
    like_model: torch.nn.Module | None = None,
    quiet: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> BenchReport:
    """Run the benchmark and write its files.

    An interrupted run leaves its finished stages in `.unfinished/` of the output folder, and the same call goes on from
    there. A model that was trained is left as `model.safetensors`.

    Args:
        config: The settings; with `model` and `loader` without those of model and data.
        model: A model of your own, in evaluation mode and on its device.
        loader: The labelled examples, in batches as `trace` takes them, one label per example: a third of each class
            tests, a fifth of the rest validates; or a loader for each of `"select"`, `"validate"` and `"test"`.
        label_key: Key of the labels in a batch that is a mapping; by default `labels` or `label`.
        like_model: The model of the run that `like` names, where it was given, too; others are loaded from its folder.
        quiet: Show no progress bars.
        say: Called with each line worth reading while the run goes on; the baseline accuracy comes first.

    Returns:
        The results; `results.json`, `skills.json`, `scores.safetensors`, `decisions.safetensors`, `removal_matrix.csv`
        and `report.html` are in the output folder.

    Raises:
        SkillfastError: Anything that stops the run, in one line.
    """
    given = Given.of(model, loader, label_key)
    if given is None and config is not None and config.given is not None:
        raise given_in_python("like", str(config.run.like))
    config = (config or BenchConfig()) if given is None else given.config(config)
    selection.check_traced(config.select.method, config.trace.statistics)
    like = config.run.like
    theirs = None if like is None else load_skills(like)  # what is not there is told before the expensive steps
    with open_session(config, given=given, quiet=quiet, say=say, resumable=True) as session:
        if session.resumed:
            say(f"an unfinished run goes on after {', '.join(session.resumed)}")
        stage, subject = session.stage, session.subject
        stage("baseline", lambda: _announce_baseline(session))
        scores = stage("trace", lambda: session.trace("select"), Kept.by(NeuronScores.load))
        chosen, ranked = choose_skills(session, scores)
        skills = chosen.removed
        removals = Removals.of(subject, list(skills.values()), scores)
        swept = stage("sweep", lambda: _sweep(session, removals), Kept.by(SweepResult.load))
        earlier, in_earlier, kept = None, None, Kept.optional(SweepResult.load)
        if theirs is not None:
            earlier = stage("like", lambda: remove_earlier(session, theirs, str(like)), kept)
        if like is not None and earlier is not None:
            in_earlier = stage(
                "like",
                lambda: remove_from_earlier(session, like, removals, like_model),
                kept,
                part="from the earlier model",
            )
        own = stage("shares", lambda: _shares(session, removals, swept.labels), Kept.by(OwnPredictions.load))
        embedded = stage(
            "embeddings", lambda: _embeddings(session, removals, swept), Kept.optional(EmbeddingChanges.load)
        )
        others = never_seen(session)
        identified = stage("identifiability", lambda: _identifiability(session, skills, swept.top2[:, 0], ranked), JSON)
        on_test = stage("trade_off", lambda: _try_on_test(session, chosen, removals, swept), Kept.by(SweepResult.load))
        replaced = None
        if config.ablate.scale == 0:
            replaced = stage("replace", lambda: replaced_predictions(session, removals.skills, swept.labels), JSON)
        found = _results(session, removals, swept, own, embedded, others)
        if replaced is not None:
            zero = swept.predictions_of(condition.name for condition in removals.whole)
            labels, intact = swept.labels, swept.top2[:, 0]
            four = np.concatenate([zero[labels, np.arange(len(labels))][None], np.array(replaced)])
            found["replacements"] = replacements(four, intact, labels, subject.splits.classes)
        found["identifiability"] = identified
        found["selection"] = chosen.to_json(on_test)
        if scores.pearson is not None:
            held_out = stage(
                "trace_test",
                lambda: session.trace("test", statistics=("pearson",)),
                Kept.by(NeuronScores.load),
            )
            found["correlations"] = top_correlations(scores, held_out)
        found["cost"] = _time_tracing(subject) | session.cost()
        results = records.made(BenchResults, found)
        directory = Path(session.config.run.output)
        _write(directory, results, skills, scores, kept_decisions(session, removals, swept, earlier, in_earlier))
        session.finish()
    replay = None
    if config.run.replay is not None:
        removed = records.read(skill_files.Skills, directory / skill_files.FILE, REMEDY)
        replay = Earlier.read(config.run.replay).compared(results, removed)
    return BenchReport(results, skills, directory, replay)


def _announce_baseline(session: Session) -> None:
    """Say the accuracy on the test part, before anything is built on it."""
    subject, say = session.subject, session.say
    classes = subject.splits.classes
    intact = sweep(subject.model, subject.loader("test"), [], classes=classes, quiet=session.quiet)
    k, accuracy = len(classes), float(intact.baseline.mean())
    say(f"baseline accuracy {accuracy:.1%} (mean of {k} classes, {len(intact.labels)} examples)")
    chance = 1 / k
    if subject.splits.name != "digits":
        parts = subject.splits
        say(
            f"{parts.name}: {len(parts.select)} examples to select on, {len(parts.validate)} to validate, "
            f"{len(parts.test)} to test; {subject.described}"
        )
    noise = 2 * math.sqrt(chance * (1 - chance) / len(intact.labels))  # two standard errors of guessing
    if accuracy < chance + max(noise, 0.1 * (1 - chance)):
        read = {"text": "--prompt, --label-words", GIVEN: "what the loader gives"}
        say(
            f"warning: the baseline is near chance ({chance:.1%}), so there is little to remove; check the weights, "
            f"and {read.get(subject.config.data.dataset, '--mean, --std, --crop-pct')} ({subject.described})"
        )


def choose_skills(
    session: Session, scores: NeuronScores
) -> tuple[selection.Selection, dict[str, NeuronScores | NeuronRanking]]:
    """The best candidate on the validation part, and what was ranked by; the test part is not looked at."""
    config = session.config
    tried = ranking = selection.candidates(
        config.select.method,
        config.select.share,
        contrastive=config.select.contrastive,
        statistics=config.trace.statistics,
    )
    if config.run.like is not None:  # another way or size would take another drop of the same model
        earlier = records.read(BenchResults, Path(config.run.like) / FILE, REMEDY)
        if earlier.selection is not None:
            tried, ranking = selection.candidates_of(earlier)
    most = config.select.max_site_share
    ranked = selection.rank(session, scores, ranking, max_site_share=most, scale=config.ablate.scale)
    skills = selection.cut(ranked, tried, max_site_share=most)
    sites = choose_sites(session.subject.model, config.trace.sites)
    controls = selection.size_controls(tried, skills, sites, config.run.seed)
    first, rest = [*range(len(tried))], list[int]()
    drops = None
    if len(tried) > 1:
        drops = session.stage("choose", lambda: _own_drops(session, skills), JSON, part="own classes")
        first, rest = selection.running(drops)
    kept, sets = Kept.by(SweepResult.load), selection.sets_of(tried, skills, controls, first)
    swept = session.stage("choose", lambda: _try(session, sets, "validate"), kept)
    chosen = selection.choose(tried, skills, swept, drops)
    if rest and not chosen.within:
        more = selection.sets_of(tried, skills, controls, rest, first)
        swept = swept.joined(session.stage("choose", lambda: _try(session, more, "validate"), kept, part="others"))
        chosen = selection.choose(tried, skills, swept)
    if len(tried) > 1:
        session.say(f"chosen on {len(session.subject.splits.validate)} validation examples: {chosen}")
    return chosen, ranked


def _own_drops(session: Session, skills: Sequence[Mapping[str, Skill]]) -> list[float]:
    """What each candidate takes from its own classes on the validation part."""
    subject = session.subject
    loader, scale = subject.loader("validate"), session.config.ablate.scale
    return selection.own_drops(subject.model, loader, skills, scale=scale, quiet=session.quiet)


def _try(session: Session, sets: Mapping[str, Mapping[str, Skill]], part: str) -> SweepResult:
    """Remove sets of skills on a part of the data."""
    subject = session.subject
    return selection.try_on(
        subject.model,
        subject.loader(part),
        sets,
        scale=session.config.ablate.scale,
        classes=subject.splits.classes,
        quiet=session.quiet,
    )


def _try_on_test(session: Session, chosen: selection.Selection, removals: Removals, swept: SweepResult) -> SweepResult:
    """Remove the candidates' skills on the test part; the chosen ones are what `swept` has removed."""
    here = swept.renamed({
        condition.name: selection.name_of(i, condition.skill.name)
        for i, condition in zip(chosen.chosen, removals.whole, strict=True)
    })  # fmt: skip
    return here.joined(_try(session, chosen.left, "test")) if chosen.left else here


def _sweep(session: Session, removals: Removals) -> SweepResult:
    """Every skill and its random controls, removed on the test part; with the embeddings, where they fit."""
    subject = session.subject
    conditions = [*removals.whole, *removals.controls]
    return sweep(
        subject.model,
        subject.loader("test"),
        conditions,
        classes=subject.splits.classes,
        keep_predictions=True,
        keep_margins=True,
        keep_embeddings=fit_at_once(subject.model, len(conditions), len(subject.splits.test)),
        quiet=session.quiet,
    )


def _shares(session: Session, removals: Removals, labels: np.ndarray) -> OwnPredictions:
    """The test part's predictions with parts of each class's own skill removed, or of its controls."""
    subject = session.subject
    return predict_parts(
        subject.model,
        subject.loader("test"),
        labels,
        removals,
        seed=session.config.run.seed,
        quiet=session.quiet,
    )


def _embeddings(session: Session, removals: Removals, swept: SweepResult) -> EmbeddingChanges | None:
    """What each skill's removal does to the embeddings, and what the random controls of all examples do."""
    subject = session.subject
    return compare_embeddings(
        subject.model,
        subject.loader("test"),
        removals.whole,
        removals.controls,
        classes=subject.splits.classes,
        seed=session.config.run.seed,
        swept=swept,
        quiet=session.quiet,
    )


def _identifiability(
    session: Session,
    skills: Mapping[str, Skill],
    intact: np.ndarray,
    ranked: Mapping[str, NeuronScores | NeuronRanking],
) -> dict[str, Any]:
    """Whether the skills are the classes' own; sets are as large as a skill may be."""
    subject, settings = session.subject, session.config.select
    masks, attributions = selection.first_masks(ranked), ranked.get("attribution")
    found = identify(
        subject.model,
        subject.loader("select"),
        subject.loader("test"),
        intact,
        skills,
        sites=[site.name for site in choose_sites(subject.model, subject.config.trace.sites)],
        share=settings.share,
        max_site_share=settings.max_site_share,
        masks=(masks, attributions) if masks and isinstance(attributions, NeuronRanking) else None,
        contrastive=settings.contrastive,
        scale=subject.config.ablate.scale,
        seed=subject.config.run.seed,
        quiet=session.quiet,
    )
    return records.to_json(found)


def _time_tracing(subject: Subject) -> dict[str, float | int]:
    """What tracing costs beside plain forwards, over a few batches."""
    settings = subject.config.trace
    return trace_over_forward(
        subject.model,
        subject.loader("select"),
        metrics.classification(subject.splits.classes),
        sites=settings.sites,
        pool=settings.pool,
        statistics=settings.statistics,
        bins=settings.bins,
    )


def _results(
    session: Session,
    removals: Removals,
    swept: SweepResult,
    own: OwnPredictions,
    embedded: EmbeddingChanges | None,
    others: Mapping[int, OtherModel],
) -> dict[str, Any]:
    """results.json without its cost."""
    subject = session.subject
    skills, classes = removals.skills, subject.splits.classes
    k, labels, intact = len(skills), swept.labels, swept.top2[:, 0]
    sites = choose_sites(subject.model, subject.config.trace.sites)
    blocks = shapley.occupied_blocks(skills, sites)

    def predicted(conditions: Sequence[Condition]) -> np.ndarray:  # [rows, K, n]
        return swept.predictions_of(condition.name for condition in conditions).reshape(-1, k, len(labels))

    whole, controls = map(predicted, (removals.whole, removals.controls))
    seed = subject.config.run.seed
    oracle = selectivity.oracle_predictions(swept.top2, k)

    def under_own(predictions: np.ndarray, rows: np.ndarray) -> np.ndarray:  # [draws, K, n] -> [draws, len(rows)]
        return predictions[:, labels[rows], rows]

    def lost(parts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What each class loses by its whole skill, then by parts of it [parts, len(rows)], and resampled."""
        every = np.concatenate([under_own(whole, rows), parts])
        return selectivity.own_drops(every, intact[rows], labels[rows], Bootstrap(labels[rows], seed=seed))

    drops, resampled = lost(own.components, np.arange(len(labels)))
    block_drops = lost(own.blocks, own.block_rows)
    some = own.control_rows
    own_controls = np.concatenate([under_own(controls, some), own.controls])
    assert swept.baseline_logits is not None
    margins = Margins.of(
        swept.margins_of(condition.name for condition in removals.whole),
        swept.margins_of(condition.name for condition in removals.controls).reshape(-1, k, len(labels)),
        swept.baseline_logits,
        labels,
    )
    turns, control = None, None
    seen: dict[str, Any] = {}
    if embedded is not None:
        removed = embedded.of(condition.name for condition in removals.whole)
        random = embedded.of(condition.name for condition in removals.controls)
        turns = removed.angles, removed.angles_left_out
        control = random.angles.reshape(-1, k, k), random.angles_left_out.reshape(-1, k, *turns[1].shape[1:])
        seen["standard_metrics"] = standard_metrics(
            embedded.metrics, removed.comparisons, drops[0], classes, random.comparisons
        )
        seen["information"] = information(embedded.readings, whole[0], intact, labels, classes, others)
    return {
        "environment": environment(subject.model, subject.device),
        "config": subject.config.to_json(),
        "model": _model(session),
        "dataset": {**subject.dataset_json(), "digests": session.data_digests},
        "baseline": {
            "accuracy": float(swept.baseline.mean()),
            "per_class": swept.baseline.tolist(),
            "n_test_per_class": np.bincount(labels, minlength=k).tolist(),
        },
        "overall": overall_accuracy(whole[0], controls, intact, labels, skills, sum(site.width for site in sites)),
        "removal_matrix": selectivity.removal_matrix(whole[0], intact, labels).tolist(),
        "selectivity": selectivity.selectivity(whole, oracle, intact, labels),
        "verdicts": verdicts(whole[0], intact, labels, classes) if np.bincount(labels, minlength=k).min() > 1 else None,
        "oracle": {
            **structs.asdict(selectivity.oracle_selectivity(oracle, intact, labels)),
            "removal_matrix": selectivity.removal_matrix(oracle, intact, labels).tolist(),
        },
        "random_control": {
            **structs.asdict(selectivity.selectivity(controls, oracle, intact, labels)),
            "draws": len(controls),
            "own": own_control(own_controls, intact[some], labels[some]),
        },
        "matched_control": own_control(own.matched, intact[some], labels[some]),
        "layer_contribution": {
            **structs.asdict(shapley.layer_contribution(drops, resampled, classes, shapley.kinds_of(sites))),
            "per_block": shapley.per_block(blocks, *block_drops, subject.splits.classes),
            "n_by_block": len(own.block_rows),
        },
        **seen,
        "interference": interference(
            turns, whole[0], oracle, intact, labels, overlap(skills), classes, margins, control
        ),
    }


def _model(session: Session) -> dict[str, Any]:
    subject = session.subject
    sites = choose_sites(subject.model, subject.config.trace.sites)
    return {
        "name": subject.name,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "embed_dim": _embed_dim(subject.model),
        "fingerprint": fingerprint(subject.model),
        "neurons": sum(site.width for site in sites),
        "sites": [
            {"name": s.name, "kind": s.kind, "block": s.block, "heads": s.heads, "width": s.width} for s in sites
        ],
        "weights": session.weights,
        "trained": subject.trained,
        "coverage": None if session.coverage is None else session.coverage.to_json(),
        "soft_prompt": used_prompt(session.config, subject.model),
    }


def _embed_dim(model: torch.nn.Module) -> int:
    """Width of the classifier's input."""
    width: Any = getattr(model, "num_features", None)
    if width is None:
        width = next((site.width for site in find_sites(model) if site.kind == "head"), None)
    if width is None:
        raise ModelError(
            f"model: expected one with a classifier, got {type(model).__name__} without one; trace it instead"
        )
    return int(width)


def _write(
    directory: Path, results: BenchResults, skills: dict[str, Skill], scores: NeuronScores, decisions: Decisions
) -> None:
    """All files; results.json after what it sums up, the page last."""
    from skillfast.report import write_report

    save_skills(directory, skills.values())
    scores.save(directory)
    decisions.save(directory)
    classes = results.dataset.classes
    with files.replacing(directory / MATRIX) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["removed", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, results.removal_matrix, strict=True))
    records.write(results, directory / FILE)
    write_report(directory)


__all__ = ["BenchReport", "bench"]
