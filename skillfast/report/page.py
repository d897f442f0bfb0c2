"""The page: words, tables and figures set into the template."""

from __future__ import annotations

import json
import math
from importlib import resources
from typing import Any

from skillfast.report import evidence, figures, files, interference, tradeoff, words
from skillfast.report.formatting import cell, data_name, model_name, percent
from skillfast.report.parts import MAX_WRITTEN


def make_figures(results: dict[str, Any], skills: dict[str, Any]) -> dict[str, Any]:
    """Every figure of the page by the id of its place."""
    made = {
        "removal-matrix": figures.removal_matrix(results),
        "removal-steps": figures.removal_steps(results),
        **figures.selectivity(results),
        "class-accuracy": figures.class_accuracy(results),
        "location-matrix": figures.location_matrix(results, skills),
        "location-steps": figures.location_steps(results, skills),
    }
    if results.get("layer_contribution"):
        made["contribution"] = figures.contribution(results)
        if results["layer_contribution"].get("per_block"):
            made["contribution-blocks"] = figures.contribution_by_block(results)
    found = results.get("interference") or {}
    if found.get("angles_deg") is not None:
        made["angles"] = interference.angles(results)
    if found.get("overlap"):
        made["overlap"] = figures.overlap(results)
    if results.get("selection"):
        made["trade-off"] = tradeoff.trade_off(results)
    return made


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(_without_nan(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _resource(name: str) -> str:
    return resources.files("skillfast.report").joinpath(name).read_text(encoding="utf-8")


def _context(results: dict[str, Any], skills: dict[str, Any]) -> dict[str, Any]:
    classes = results["dataset"]["classes"]
    made = make_figures(results, skills)
    found = results.get("interference") or {}
    matrix = [[cell(v) for v in row] for row in results["removal_matrix"]]
    return {
        "results": results,
        "classes": classes,
        "skill_names": [skill["name"] for skill in skills["skills"]],
        "few": len(classes) <= MAX_WRITTEN,
        "summary": words.summary(results),
        "tiles": words.tiles(results),
        "definitions": words.definitions(results, skills),
        "matrix": matrix,
        "selectivity": words.selectivity_rows(results),
        "draws": results["random_control"].get("draws"),
        "contribution": words.contribution_rows(results) if "contribution" in made else None,
        "by_block": "contribution-blocks" in made,
        "closest": figures.closest_pairs(results) if "overlap" in made else None,
        "angles_say": interference.angles_say(results) if "angles" in made else None,
        "pairs_say": interference.pairs_say(results) if found.get("strongest") else [],
        "pairs": interference.pair_rows(results) if found.get("strongest") else [],
        "dashboards": interference.dashboard_rows(results) if results.get("standard_metrics") else None,
        "dashboards_say": interference.dashboards_say(results) if results.get("standard_metrics") else [],
        "tradeoff": (tradeoff.say(results), tradeoff.rows(results)) if "trade-off" in made else None,
        "overall": (evidence.overall_say(results), evidence.overall_rows(results)) if results.get("overall") else None,
        "correlated": evidence.correlated(results) if results.get("correlations") else None,
        "model_name": model_name(results),
        "data_name": data_name(results),
        "percent": percent,
        "details": words.details(results),
        "command": words.command(results),
        "figures": made,
        "step_texts": figures.step_texts(results),
    }


def render(results: dict[str, Any], skills: dict[str, Any]) -> str:
    """Make the page; see `skillfast.report.render`."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    files.check(results, skills)
    context = _context(results, skills)
    # our own files and encoded JSON: everything else in the page is escaped
    inline = {
        "style": Markup(_resource("page.css")),
        "script": Markup(_resource("page.js")),
        "plotly": Markup(get_plotlyjs()),
        "data": Markup(script_json({"figures": context.pop("figures"), "steps": context.pop("step_texts")})),
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_resource("page.html")).render(**context, **inline)
