"""The page: words, tables and figures set into the template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillfast.report import pages
from skillfast.report.bench import (
    connections,
    evidence,
    figures,
    identifiability,
    information,
    interference,
    tradeoff,
    words,
)
from skillfast.report.formatting import cell, data_name, model_name, number_of, percent
from skillfast.report.parts import MAX_WRITTEN
from skillfast.results.skills import check_of_run

if TYPE_CHECKING:
    from skillfast.results.bench import BenchResults
    from skillfast.results.skills import Skills


def make_figures(results: BenchResults, skills: Skills) -> dict[str, Any]:
    """Every figure of the page by the id of its place."""
    made = {
        "removal-matrix": figures.removal_matrix(results),
        "removal-steps": figures.removal_steps(results),
        **figures.selectivity(results),
        "class-accuracy": figures.class_accuracy(results),
        "location-matrix": figures.location_matrix(results, skills),
        "location-steps": figures.location_steps(results, skills),
    }
    if (followed := evidence.drawn_metric(results)) is not None:
        made["correlation-blocks"] = figures.correlation_by_block(results, followed)
    if results.layer_contribution:
        made["contribution"] = figures.contribution(results)
        if results.layer_contribution.per_block:
            made["contribution-blocks"] = figures.contribution_by_block(results)
    if results.interference:
        if results.interference.angles_deg is not None:
            made["angles"] = interference.angles(results)
        made["overlap"] = figures.overlap(results)
    if results.selection:
        made["trade-off"] = tradeoff.trade_off(results)
    return made


def _context(results: BenchResults, skills: Skills) -> dict[str, Any]:
    classes = results.dataset.classes
    interfering = results.interference is not None and results.interference.strongest is not None
    few = len(classes) <= MAX_WRITTEN
    embeddings = interference.embedding_rows(results) if results.standard_metrics else []
    return {
        "results": results,
        "classes": classes,
        "skill_names": [skill.name for skill in skills.skills],
        "few": few,
        "summary": words.summary(results),
        "tiles": words.tiles(results),
        "definitions": words.definitions(results, skills),
        "matrix": [[name, *(cell(v) for v in row)] for name, row in zip(classes, results.removal_matrix, strict=True)]
        if few
        else [],
        "selectivity": words.selectivity_rows(results),
        "verdicts": words.verdict_rows(results) if results.verdicts else None,
        "draws": results.random_control.draws,
        "controls_say": words.controls_say(results),
        "replaced": words.replacements_say(results) if results.replacements else None,
        "replacements": words.replacement_rows(results) if results.replacements else [],
        "contribution": words.contribution_rows(results) if results.layer_contribution else None,
        "shares": words.share_rows(results) if results.layer_contribution else None,
        "by_block": results.layer_contribution is not None and bool(results.layer_contribution.per_block),
        "n_by_block": number_of(results.layer_contribution.n_by_block)
        if results.layer_contribution and results.layer_contribution.n_by_block
        else None,
        "closest": [(other, one, percent(share)) for one, other, share in figures.closest_pairs(results)]
        if results.interference
        else None,
        "angles_say": interference.angles_say(results)
        if results.interference and results.interference.angles_deg is not None
        else None,
        "pairs_say": interference.pairs_say(results) if interfering else [],
        "pairs": interference.pair_rows(results) if interfering else [],
        "embeddings": embeddings,
        "first_removal": len(embeddings) - len(classes),
        "embeddings_say": interference.embeddings_say(results) if results.standard_metrics else [],
        "identifiability": (identifiability.say(results), identifiability.rows(results))
        if results.identifiability
        else None,
        "information": (information.say(results), information.rows(results)) if results.information else None,
        "never_seen": (information.never_seen_say(results), information.never_seen_rows(results))
        if information.beside(results)
        else None,
        "tradeoff": (tradeoff.say(results), tradeoff.rows(results)) if results.selection else None,
        "overall": (evidence.overall_say(results), evidence.overall_rows(results)) if results.overall else None,
        "correlated": evidence.correlated(results) if results.correlations else None,
        "followed": evidence.drawn_metric(results),
        "model_name": model_name(results),
        "data_name": data_name(results),
        "percent": percent,
        "details": words.details(results),
        "limits": words.limits(results),
        "citation": words.citation(results),
        "command": words.command(results),
    }


def render(results: BenchResults, skills: Skills) -> str:
    """Make the page; see `skillfast.report.render`."""
    check_of_run(skills, results)
    connected = connections.connections(results)
    drawn = {
        "figures": make_figures(results, skills),
        "steps": figures.step_texts(results),
        "connections": connected and connected["drawn"],
    }
    return pages.render(
        "bench",
        drawn,
        version=results.environment.skillfast,
        kind="report",
        scripts=("graph.js", "page.js"),
        connections=connected,
        **_context(results, skills),
    )
