"""The page of an evaluation: figures, tables and words from `evaluation.json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillfast.report import pages
from skillfast.report.evaluation import shortcut, tasks
from skillfast.report.formatting import UNDEFINED, finite, flat, interval, model_name, number_of, percent, plain, points
from skillfast.report.parts import DIVERGING, Figure, across, amounts, base, colour, down, heatmap, labels, largest
from skillfast.results.records import to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from skillfast.results.evaluation import EvaluationResults, Intact, Outcome

HUES = ("--skill", "--mlp", "--attn", "--head", "--oracle", "--other")
SYMBOLS = ("circle", "square", "diamond", "triangle-up")  # one more for each round of the colours
NAMES = {
    "accuracy": "accuracy",
    "f1_macro": "F1, mean of the classes",
    "class_accuracy": "accuracy on the skill's class",
    "other_accuracy": "accuracy on the other classes",
    "class_f1": "F1 of the skill's class",
    "perplexity": "perplexity",
    "bleu": "BLEU against the intact model's text",
}
FRACTIONS = frozenset(NAMES) - {"perplexity", "bleu"}


def write_value(measure: str) -> Callable[[float | None], str]:
    """How a measure's values are written."""
    if measure in FRACTIONS:
        return percent
    return lambda value: UNDEFINED if finite(value) is None else f"{value:,.4g}"


def write_change(measure: str) -> Callable[[float | None], str]:
    """How a measure's changes are written: points of a fraction."""
    if measure in FRACTIONS:
        return lambda value: points(value, signed=True)
    return lambda value: UNDEFINED if finite(value) is None else f"{value:+,.4g}"


def defined(results: EvaluationResults) -> list[str]:
    """The measures that some outcome has."""
    return [m for m in results.measures if any(finite(o.values.get(m)) is not None for o in results.outcomes)]


def layer_word(layers: str) -> str:
    """`blocks.3` as `block 3`."""
    return {"all": "all layers", "head": "head"}.get(layers, layers.replace("blocks.", "block "))


def _scaled(measure: str, value: Any) -> float | None:
    number = finite(value)
    return None if number is None else 100 * number if measure in FRACTIONS else number


def _unit(measure: str) -> str:
    return f"{NAMES[measure]}, %" if measure in FRACTIONS else NAMES[measure]


def _reach(measure: str, values: list[float | None], rows: Sequence[Outcome]) -> dict[str, Any]:
    """Error bars from each value to the ends of its interval, where it has one."""
    above, below = [], []
    for value, row in zip(values, rows, strict=True):
        pair = row.ci95.get(measure)
        low, high = (None, None) if pair is None else (_scaled(measure, end) for end in pair)
        above.append(0.0 if value is None or high is None else max(high - value, 0.0))
        below.append(0.0 if value is None or low is None else max(value - low, 0.0))
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.5, "width": 3}


def _lines(measure: str, curves: dict[str, list[Outcome]], x_of: Callable[[Outcome], float | str]) -> list[Any]:
    """A line per skill with its intervals, and dotted the mean of its random controls."""
    data: list[dict[str, Any]] = []
    for i, (name, rows) in enumerate(curves.items()):
        own = [_scaled(measure, row.values[measure]) for row in rows]
        if all(value is None for value in own):
            continue
        hue, shown = colour(HUES[i % len(HUES)]), labels([name])[0]
        line = {
            "type": "scatter", "mode": "lines+markers", "legendgroup": shown, "x": [x_of(row) for row in rows],
            "hovertemplate": "%{text}<br>%{y:.4g}<extra>%{fullData.name}</extra>",
        }  # fmt: skip
        dots, symbol = {"color": hue, "dash": "dot", "width": 1.5}, SYMBOLS[i // len(HUES) % len(SYMBOLS)]
        data.append(
            line
            | {"name": shown, "y": own, "error_y": _reach(measure, own, rows), "line": {"color": hue}}
            | {"text": [_dose(row) for row in rows], "marker": {"size": 7, "symbol": symbol}}
        )
        drawn = [_scaled(measure, row.random.values[measure].mean) for row in rows]
        data.append(
            line
            | {"name": f"random, as many as {shown}", "showlegend": False, "y": drawn, "line": dots}
            | {"text": [_drawn(row, measure) for row in rows], "marker": {"symbol": f"{symbol}-open", "size": 6}}
        )
    return data


def _dose(row: Outcome) -> str:
    if row.scale == 1:
        return "intact"
    return f"{number_of(row.neurons)} neurons, \N{MULTIPLICATION SIGN}{row.scale:g}"


def _drawn(row: Outcome, measure: str) -> str:
    """Neurons and factor of random controls, and the ends of their values."""
    ends, write = row.random.values[measure], write_value(measure)
    return _dose(row) if row.scale == 1 else f"{_dose(row)}, {write(ends.low)} to {write(ends.high)}"


def _at(axis: str, value: float, **more: Any) -> dict[str, Any]:
    """A line through a value of an axis, behind the curves."""
    other = "x" if axis == "y" else "y"
    return {
        "type": "line", f"{other}ref": "paper", f"{other}0": 0, f"{other}1": 1, f"{axis}ref": axis, f"{axis}0": value,
        f"{axis}1": value, "layer": "below", "line": {"color": colour("--muted"), "width": 1.5, **more},
    }  # fmt: skip


def _values_axis(measure: str) -> dict[str, Any]:
    return amounts(_unit(measure), **({"type": "log"} if measure == "perplexity" else {}))


def by_size(results: EvaluationResults, measure: str) -> Figure:
    """A measure against the size of the skill, removed from all layers; the intact model is a grey line across."""
    rows = [o for o in results.outcomes if o.layers == "all" and o.scale == 0]
    curves: dict[str, list[Outcome]] = {}
    for row in sorted(rows, key=lambda row: row.share):
        curves.setdefault(row.skill, []).append(row)

    def size(share: float) -> str:
        return f"{100 * share:g}\N{NO-BREAK SPACE}%"

    sizes = [size(share) for share in sorted({row.share for row in rows})]
    intact = _scaled(measure, results.intact.values.get(measure))
    names = {o.skill: curves[o.skill] for o in results.outcomes if o.skill in curves}  # in the order of the outcomes
    layout = base(
        xaxis=across(sizes, "removed, of all neurons"),
        yaxis=_values_axis(measure),
        shapes=[] if intact is None else [_at("y", intact)],
    )
    return {"data": _lines(measure, names, lambda row: size(row.share)), "layout": layout}


def by_scale(results: EvaluationResults, measure: str) -> Figure:
    """A measure against the factor on the activations of each skill at its largest size; dashed at 1, the intact."""
    axis = amounts("factor on the skill's activations", zeroline=False, showgrid=False)
    layout = base(xaxis=axis, yaxis=_values_axis(measure), shapes=[_at("x", 1.0, dash="dash")])
    return {"data": _lines(measure, results.curves(), lambda row: row.scale), "layout": layout}


def largest_share(results: EvaluationResults) -> dict[str, float]:
    """Each skill's largest size."""
    found: dict[str, float] = {}
    for outcome in results.outcomes:
        found[outcome.skill] = max(found.get(outcome.skill, 0.0), outcome.share)
    return found


def by_layer(results: EvaluationResults, measure: str, random: bool) -> Figure:
    """Change of a measure: row = skill at its largest size, column = where its neurons were chosen and removed."""
    share = largest_share(results)
    rows = [o for o in results.outcomes if o.scale == 0 and o.share == share[o.skill]]
    skills, places = (list(dict.fromkeys(getattr(o, key) for o in rows)) for key in ("skill", "layers"))
    at = {(o.skill, o.layers): o for o in rows}
    changes, controls = [], []
    for name in skills:
        found = [at.get((name, place)) for place in places]
        own = [None if o is None else _scaled(measure, o.change[measure]) for o in found]
        drawn = [None if o is None else _scaled(measure, o.random.change[measure].mean) for o in found]
        changes.append(own)
        controls.append(drawn)
    limit = largest([*changes, *controls], 1.0)
    unit = "points" if measure in FRACTIONS else NAMES[measure]
    trace = heatmap(
        controls if random else changes,
        labels([layer_word(place) for place in places]),
        labels(skills),
        lambda v: "" if v is None else f"{v:+.3g}" if v else "0",
        f"change of {NAMES[measure]}{', points' if measure in FRACTIONS else ''}",
        zmin=-limit,
        zmid=0,
        zmax=limit,
        colorscale=DIVERGING if measure != "perplexity" else _turned(DIVERGING),
        hovertemplate=f"<b>%{{y}}</b>, %{{x}}: %{{z:+.4g}} {unit}<extra></extra>",
    )
    return {"data": [trace], "layout": base(xaxis=across(trace["x"]), yaxis=down(trace["y"], "skill"))}


def _turned(scale: list[list[Any]]) -> list[list[Any]]:
    """A colour scale turned round, for a measure of which more is worse."""
    return [[1 - at, hue] for at, hue in reversed(scale)]


def make_figures(results: EvaluationResults) -> dict[str, Figure]:
    """Every figure of the page by the id of its place."""
    made: dict[str, Figure] = {}
    for measure in defined(results):
        made[f"size-{measure}"] = by_size(results, measure)
        made[f"scale-{measure}"] = by_scale(results, measure)  # empty without factors besides 0
        if len({o.layers for o in results.outcomes}) > 1:
            made[f"layer-{measure}"] = by_layer(results, measure, random=False)
            made[f"layer-random-{measure}"] = by_layer(results, measure, random=True)
    if results.tasks:
        made |= tasks.make_figures(results.tasks)
    return {name: figure for name, figure in made.items() if figure["data"]}


def table_rows(results: EvaluationResults) -> list[list[str]]:
    """Every outcome: skill, size, layers, factor, and each measure with its change and its random control's."""
    measures = defined(results)
    return [
        [
            outcome.skill,
            f"{percent(outcome.share)} ({number_of(outcome.neurons)})",
            layer_word(outcome.layers),
            f"{outcome.scale:g}",
            *(_cell(outcome, measure) for measure in measures),
        ]
        for outcome in by_skill(results)
    ]


def dose_table(results: EvaluationResults) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the curves: each skill's measures by factor, the value at 1 and the changes elsewhere.

    Of a skill of a class its accuracy and that of the others, of any other the accuracy over all.
    """
    curves = results.curves()
    scales = sorted({row.scale for curve in curves.values() for row in curve})
    rows = []
    for skill, curve in curves.items():
        at = {row.scale: row for row in curve}
        own = [m for m in ("class_accuracy", "other_accuracy") if finite(curve[0].values.get(m)) is not None]
        rows += [
            [skill, NAMES[measure], *(_response(at[x], measure) if x in at else "" for x in scales)]
            for measure in own or [m for m in ("accuracy", "perplexity", "bleu") if m in results.measures]
        ]
    return ["skill", "measure", *(f"\N{MULTIPLICATION SIGN}{scale:g}" for scale in scales)], rows


def _response(row: Outcome, measure: str) -> str:
    if row.scale != 1:
        return _change(row, measure)
    write = write_value(measure)
    return f"{write(row.values[measure])} {interval(row.ci95.get(measure), write)}".rstrip()


def by_skill(results: EvaluationResults) -> list[Outcome]:
    """The outcomes of each skill together, else in their order."""
    names = list(dict.fromkeys(outcome.skill for outcome in results.outcomes))
    return sorted(results.outcomes, key=lambda outcome: names.index(outcome.skill))


def _cell(outcome: Outcome, measure: str) -> str:
    return f"{write_value(measure)(outcome.values[measure])}, {_change(outcome, measure)}"


def _change(outcome: Outcome, measure: str) -> str:
    """The change, its interval, and that of the random controls."""
    change, bounds = write_change(measure), outcome.change_ci95.get(measure)
    drawn = outcome.random.change[measure].mean
    own = f"{change(outcome.change[measure])} {interval(bounds, change)}".rstrip()
    return f"{own}; random {change(drawn)}"


def summary(results: EvaluationResults) -> list[str]:
    """What was measured, in sentences."""
    data, sizes = results.data, sorted({o.share for o in results.outcomes})
    skills = list(dict.fromkeys(o.skill for o in results.outcomes))
    before = ", ".join(_with_interval(results.intact, name) for name in results.intact.values)
    chosen = (
        f"skills were loaded from {plain(results.config['skills'])}"
        if results.config.get("skills")
        else f"chosen on {number_of(data.n_select)} other examples"
    )
    many, neurons = number_of(len(skills)), number_of(results.model.neurons)
    shares = ", ".join(percent(size) for size in sizes[:6])
    return [
        f"The intact model on {number_of(data.n_test)} held-out examples: {before}.",
        f"{many} skill{'s' * (len(skills) != 1)}, {chosen}, at {shares} of {neurons} neurons.",
    ]


def _with_interval(intact: Intact, name: str) -> str:
    write = write_value(name)
    return f"{NAMES[name]} {write(intact.values[name])} {interval(intact.ci95.get(name), write)}".rstrip()


def render(results: EvaluationResults) -> str:
    """Make the page; see `skillfast.report.write_evaluation`."""
    made = make_figures(results)
    dose_columns, dose_rows = dose_table(results)
    measured = {"weights": to_json(results.model.weights), "data": to_json(results.data.digests)}
    if results.model.soft_prompt is not None:
        measured["soft_prompt"] = to_json(results.model.soft_prompt)
    return pages.render(
        "evaluation",
        {"figures": made},
        version=results.environment.skillfast,
        kind="evaluation",
        results=results,
        model_name=model_name(results),
        summary=summary(results),
        measures=[(name, NAMES[name]) for name in defined(results)],
        figures=made.keys(),
        dose_columns=dose_columns,
        dose_rows=dose_rows,
        doses=[(name, NAMES[name]) for name in defined(results) if f"scale-{name}" in made],
        columns=["skill", "of all neurons", "layers", "factor", *(NAMES[name] for name in defined(results))],
        rows=table_rows(results),
        tasks=None if results.tasks is None else tasks.context(results.tasks),
        shortcut=None if results.shortcut is None else shortcut.context(results.shortcut),
        settings=[*flat(measured), *flat(to_json(results.environment)), *flat(results.config)],
    )
