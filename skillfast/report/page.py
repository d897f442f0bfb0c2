"""The page: words and tables from the results, set into the template together with the figures."""

from __future__ import annotations

import json
import math
import shlex
from importlib import resources
from typing import Any

from skillfast.report import figures, files
from skillfast.report.formatting import (
    TERMS,
    UNDEFINED,
    cell,
    finite,
    interval,
    number_of,
    percent,
    plain,
    points,
    size,
    term_interval,
    term_value,
    times,
)

PHASES = {
    "data": "reading the data",
    "train": "training the model",
    "trace": "tracing the neurons",
    "select": "choosing the skills",
    "sweep": "removing them",
    "report": "writing the report",
    "total": "the whole run",
}
METHODS = {
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "auroc": "AUROC",
    "mutual_info": "mutual information",
}
# what the command line can repeat, in its order; the other settings are its defaults
FLAGS = (
    "model", "model_kwargs", "checkpoint", "pretrained", "finetune", "dataset", "data_dir", "train_per_class",
    "test_per_class", "mean", "std", "crop_pct", "device", "dtype", "batch_size", "seed", "sites", "pool", "method",
    "backend",
)  # fmt: skip


def _lost(change: float | None, verb: str = "costs") -> str:
    """What a removal does to its own class, as the end of a sentence."""
    number = finite(change)
    if number is None:
        return "has no defined effect on it"
    return f"{verb} it {points(number)} points" if number >= 0 else f"gains it {points(-number)} points"


def summary(results: dict[str, Any]) -> list[str]:
    """The result in two sentences."""
    own, oracle, random = (results[key] for key in ("selectivity", "oracle", "random_control"))
    drop, change = finite(own["target_drop"]), finite(own["other_change"])
    effect = "has no defined effect on that class" if drop is None else (
        f"{'costs' if drop >= 0 else 'gains'} that class {points(abs(drop))} percentage points of accuracy"
    )  # fmt: skip
    others = "" if change is None else (
        f", while the other classes {'lose' if change < 0 else 'gain'} {points(abs(change))} on average"
    )  # fmt: skip
    return [
        f"Removing the neurons of one class {effect}{others}.",
        f"Removing as many neurons drawn at random {_lost(random['target_drop'])}; the oracle, "
        f"which deletes the class from the model's output and is the best that any removal can look like, "
        f"{_lost(oracle['target_drop'])}.",
    ]


def tiles(results: dict[str, Any]) -> list[dict[str, str]]:
    """The headline numbers, each beside the oracle's and the random control's."""
    found = [results[key] for key in ("selectivity", "oracle", "random_control")]

    def tile(name: str, key: str, unit: str) -> dict[str, str]:
        value, oracle, random = (term_value(values, key, UNDEFINED) for values in found)
        bounds = term_interval(found[0], key)
        # "12.3 points" reads, "not defined points" does not
        unit = "" if value == UNDEFINED else unit
        return {"name": name, "value": value, "unit": unit, "interval": bounds,
                "beside": f"oracle {oracle}, random {random}"}  # fmt: skip

    baseline = {
        "name": "Accuracy before any removal",
        "value": percent(results["baseline"]["accuracy"]),
        "unit": "",
        "interval": "",
        "beside": f"{len(results['dataset']['classes'])} classes, {results['dataset']['n_test']:,} test examples",
    }
    return [
        tile("The removed class loses", "target_drop", "points"),
        tile("Each other class is harmed by", "other_harm", "points"),
        tile("Loss per point of harm", "harm_ratio", ""),
        baseline,
    ]


def definitions(results: dict[str, Any], skills: dict[str, Any]) -> list[tuple[str, str]]:
    """The three words that the page cannot do without."""
    model, config, dataset = (results[key] for key in ("model", "config", "dataset"))
    per_skill = [sum(row) for row in figures.site_counts(results, skills)]
    mean, total = sum(per_skill) / len(per_skill), model["neurons"]
    share = f" ({percent(mean / total)})" if total else ""
    scale, method = finite(config.get("scale")), plain(config.get("method"))
    how = "set to 0" if not scale else f"multiplied by {plain(scale)}"
    return [
        (
            "Neuron",
            "One coordinate of what enters the last layer of a block's MLP or attention, or the classifier. "
            f"This model has {number_of(total)} of them in {len(model['sites'])} places.",
        ),
        (
            "Skill",
            f"The neurons whose activity goes with one class, found by {METHODS.get(method, method)} on "
            f"{number_of(dataset['n_select'])} examples: {number_of(round(mean, 1))} neurons{share} on average.",
        ),
        (
            "Removal",
            f"While the model runs, the skill's neurons are {how}. Nothing is retrained. Effects are measured on "
            f"{number_of(dataset['n_test'])} test examples.",
        ),
    ]


def _written(values: dict[str, Any], key: str) -> tuple[str, str]:
    """Value and, on a second line, its interval or why there is none."""
    value = term_value(values, key, UNDEFINED)
    return value, "(denominator is 0)" if value == UNDEFINED else term_interval(values, key)


def selectivity_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per term: definition, then value and interval for skills, oracle and random control."""
    found = [results[key] for key in ("selectivity", "oracle", "random_control")]
    return [
        {
            "term": term.key,
            "definition": term.definition,
            "values": [_written(values, term.key) for values in found],
        }
        for term in TERMS
    ]


def contribution_rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Per kind of site: its Shapley share and interval."""
    found = results["layer_contribution"]
    rows = [
        (name, percent(found.get(kind)), interval((found.get("ci95") or {}).get(kind), percent))
        for kind, name, _ in figures.KINDS
        if finite(found.get(kind)) is not None
    ]
    return [*rows, ("non-additivity", percent(found.get("non_additivity")), "")]


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        rows += _flat(value, f"{name}.") if isinstance(value, dict) and value else [(name, plain(value or value))]
    return rows


def _cost_rows(cost: dict[str, Any]) -> list[tuple[str, str]]:
    seconds = [(PHASES.get(phase, phase), f"{plain(took)} s") for phase, took in cost["seconds"].items()]
    return [
        *seconds,
        ("examples traced per second", plain(cost.get("samples_per_s"))),
        ("one forward pass over the same examples", f"{plain(cost.get('forward_s'))} s"),
        ("tracing, in forward passes", times(cost.get("trace_over_forward"), "not measured")),
        ("peak memory", size(cost.get("peak_rss_bytes"))),
        ("peak memory of the accelerator", size(cost.get("peak_device_bytes"))),
        ("statistics kept", size(cost.get("state_bytes"))),
    ]


def details(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The folded tables at the end: title and rows of name and value."""
    model = {key: value for key, value in results["model"].items() if key != "sites"}
    dataset = {**results["dataset"], "classes": len(results["dataset"]["classes"])}
    sites = [
        (site["name"], f"{site['width']:,} neurons" + (f", {site['heads']} heads" if site["heads"] else ""))
        for site in results["model"]["sites"]
    ]
    return [
        {"title": "Model", "rows": _flat(model)},
        {"title": "Places of the neurons", "rows": sites},
        {"title": "Data", "rows": _flat(dataset)},
        {"title": "Configuration", "rows": _flat(results["config"])},
        {"title": "Environment", "rows": _flat(results["environment"])},
        {"title": "Cost", "rows": _cost_rows(results["cost"])},
    ]


def _flag(key: str, value: Any) -> list[str]:
    name = f"--{key.replace('_', '-')}"
    if value is None:
        return []
    if isinstance(value, bool):
        return [name if value else f"--no-{key.replace('_', '-')}"]
    if key == "model_kwargs":
        return [word for option, given in value.items() for word in ("--model-kwarg", f"{option}={given}")]
    if key == "sites":
        return [name, ",".join(value)]
    return [name, *map(str, value)] if isinstance(value, list) else [name, str(value)]


def command(results: dict[str, Any]) -> str:
    """The command line that repeats the run."""
    config = results["config"]
    words = [word for key in FLAGS for word in _flag(key, config.get(key))]
    return shlex.join(["skillfast", "bench", *words])


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
    if (results.get("interference") or {}).get("overlap"):
        made["overlap"] = figures.overlap(results)
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
    matrix = [[cell(v) for v in row] for row in results["removal_matrix"]]
    return {
        "results": results,
        "classes": classes,
        "skill_names": [skill["name"] for skill in skills["skills"]],
        "few": len(classes) <= figures.MAX_WRITTEN,
        "summary": summary(results),
        "tiles": tiles(results),
        "definitions": definitions(results, skills),
        "matrix": matrix,
        "selectivity": selectivity_rows(results),
        "draws": results["random_control"].get("draws"),
        "contribution": contribution_rows(results) if "contribution" in made else None,
        "closest": figures.closest_pairs(results) if "overlap" in made else None,
        "percent": percent,
        "details": details(results),
        "command": command(results),
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
        "style": Markup(_resource("page.css")),  # noqa: S704
        "script": Markup(_resource("page.js")),  # noqa: S704
        "plotly": Markup(get_plotlyjs()),  # noqa: S704
        "data": Markup(script_json({"figures": context.pop("figures"), "steps": context.pop("step_texts")})),  # noqa: S704
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_resource("page.html")).render(**context, **inline)
