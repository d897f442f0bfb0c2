"""The figures as plotly JSON: plain dicts, whose colours are the names of the page's CSS variables."""

from __future__ import annotations

import html
import math
from typing import Any

from skillfast.report.formatting import cell, finite, number_of, percent, points, times

METHODS = (
    ("selectivity", "skills", "--skill"),
    ("oracle", "oracle", "--oracle"),
    ("random_control", "random", "--random"),
)
KINDS = (("attn", "attention", "--attn"), ("mlp", "MLP", "--mlp"), ("head", "classifier head", "--head"))
DIVERGING = [[0.0, "--loss-2"], [0.25, "--loss-1"], [0.5, "--middle"], [0.75, "--gain-1"], [1.0, "--gain-2"]]
SEQUENTIAL = [[0.0, "--middle"], [0.5, "--amount-1"], [1.0, "--amount-2"]]
# beyond this many classes a cell is too small for its number
MAX_WRITTEN = 20
MAX_LABEL = 14

Figure = dict[str, Any]


def _colour(name: str) -> str:
    return f"var({name})"


def _scale(stops: list[list[Any]]) -> list[list[Any]]:
    return [[position, _colour(name)] for position, name in stops]


def labels(names: list[str]) -> list[str]:
    """Names as category values: escaped, since plotly reads its labels as markup, and all different."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(html.escape(name if seen[name] == 1 else f"{name} ({seen[name]})", quote=False))
    return out


def _short(label: str) -> str:
    text = html.unescape(label)
    return label if len(text) <= MAX_LABEL else html.escape(text[: MAX_LABEL - 1] + "…", quote=False)


def _categories(values: list[str], **more: Any) -> dict[str, Any]:
    return {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": values,
        "range": [-0.5, len(values) - 0.5],
        # the page thins these to what fits its width
        "tickvals": values,
        "ticktext": [_short(value) for value in values],
        "autotickangles": [0, -90],
        "showgrid": False,
        "zeroline": False,
        "fixedrange": True,
        "automargin": True,
        **more,
    }


def _amounts(title: str = "", **more: Any) -> dict[str, Any]:
    return {
        "title": _title(title, standoff=10),
        "gridcolor": _colour("--line"),
        "zerolinecolor": _colour("--faint"),
        "fixedrange": True,
        "automargin": True,
        **more,
    }


def _title(text: str, **more: Any) -> dict[str, Any]:
    return {"text": text, "font": {"size": 12, "color": _colour("--muted")}, **more}


def _layout(**more: Any) -> dict[str, Any]:
    return {
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": _colour("--ink")},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "dragmode": False,
        "hoverlabel": {"font": {"size": 13}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "traceorder": "normal",
                   "itemclick": False, "itemdoubleclick": False},
        **more,
    }  # fmt: skip


def _colourbar(title: str) -> dict[str, Any]:
    return {
        "orientation": "h",
        "thickness": 10,
        "len": 1,
        "x": 0.5,
        "y": 1.01,
        "yanchor": "bottom",
        "ypad": 4,
        "outlinewidth": 0,
        "title": {"text": title, "side": "top", "font": {"size": 12, "color": _colour("--muted")}},
    }


def _row_mark(n_rows: int) -> dict[str, Any]:
    """The outline of one row of a matrix; round a thin row it keeps a distance, so as not to cover it."""
    few = n_rows <= MAX_WRITTEN
    reach = 0.5 if few else 0.5 + n_rows / 120
    return {
        "type": "rect", "xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": -reach, "y1": reach,
        "line": {"color": _colour("--ink"), "width": 2 if few else 1}, "fillcolor": "rgba(0,0,0,0)",
    }  # fmt: skip


def _in_points(matrix: list[list[Any]]) -> list[list[float | None]]:
    return [[None if finite(v) is None else round(100 * float(v), 4) for v in row] for row in matrix]


def _largest(rows: list[list[float | None]], at_least: float) -> float:
    return max([at_least, *(abs(v) for row in rows for v in row if v is not None)])


def _matrix(rows: list[list[Any]], text: list[list[str]] | None, **trace: Any) -> dict[str, Any]:
    written = {} if text is None else {"text": text, "texttemplate": "%{text}"}
    return {"type": "heatmap", "z": rows, "xgap": 1, "ygap": 1, "hoverongaps": False, **written, **trace}


def removal_matrix(results: dict[str, Any]) -> Figure:
    """Row = removed skill, column = class whose accuracy changes, in percentage points."""
    names = labels(results["dataset"]["classes"])
    rows = _in_points(results["removal_matrix"])
    others = [[v for j, v in enumerate(row) if j != i] for i, row in enumerate(rows)]
    limit = _largest(rows, 1.0)
    few = len(names) <= MAX_WRITTEN
    gap = 1 if few else 0
    trace = _matrix(
        rows,
        [[cell(v) for v in row] for row in results["removal_matrix"]] if few else None,
        x=names,
        y=names,
        xgap=gap,
        ygap=gap,
        zmin=-limit,
        zmid=0,
        zmax=limit,
        colorscale=_scale(DIVERGING),
        colorbar=_colourbar("change in accuracy, percentage points"),
        hovertemplate="without the skill of <b>%{y}</b><br>accuracy on <b>%{x}</b>: %{z:+.1f} points<extra></extra>",
    )
    free = not few
    layout = _layout(
        # zooming in is worth a trapped finger only where cells are tiny
        dragmode="zoom" if free else False,
        xaxis=_categories(names, title=_title("class whose accuracy changes"), fixedrange=few),
        yaxis=_categories(
            names, title=_title("removed skill", standoff=10), tickangle=0, range=[len(names) - 0.5, -0.5], fixedrange=few
        ),
        shapes=[_row_mark(len(names))],
        # the page's switch between the scale of all cells and that of the other classes
        meta={"limits": [limit, _largest(others, 0.1)]},
    )
    return {"data": [trace], "layout": layout}


def _removal_bars(
    rows: list[list[float | None]], best: list[list[float | None]] | None, i: int
) -> list[dict[str, Any]]:
    others = [None if j == i else v for j, v in enumerate(rows[i])]
    bars = [{"y": [v if j == i else None for j, v in enumerate(rows[i])]}, {"y": others}]
    return bars if best is None else [*bars, {"y": best[i]}]


def removal_steps(results: dict[str, Any]) -> Figure:
    """The change in every class's accuracy for one removal, the oracle's beside it; one frame per removed skill."""
    names = labels(results["dataset"]["classes"])
    rows = _in_points(results["removal_matrix"])
    oracle = results["oracle"].get("removal_matrix")
    best = None if oracle is None else _in_points(oracle)
    width = 0.8 if best is None else 0.4
    styles = [("class of the removed skill", "--skill", -width), ("other classes", "--other", -width)]
    if best is not None:
        styles.append(("oracle, for comparison", "--oracle", 0.0))
    hover = "<b>%{x}</b>: %{y:+.1f} points<extra>%{fullData.name}</extra>"
    data = [
        {"type": "bar", "name": name, "x": names, "width": width, "offset": offset + (0.4 if best is None else 0.0),
         "marker": {"color": _colour(colour)}, "hovertemplate": hover, **bars}
        for (name, colour, offset), bars in zip(styles, _removal_bars(rows, best, 0), strict=True)
    ]  # fmt: skip
    every = [v for matrix in (rows, best or []) for row in matrix for v in row if v is not None]
    low, high = min([0.0, *every]), max([0.0, *every])
    pad = 0.04 * max(high - low, 1.0)
    layout = _layout(
        barmode="overlay",
        xaxis=_categories(names),
        yaxis=_amounts("change in accuracy, points", range=[low - pad, high + pad]),
    )
    frames = [{"name": str(i), "data": _removal_bars(rows, best, i)} for i in range(len(names))]
    return {"data": data, "layout": layout, "frames": frames}


def _dots(results: dict[str, Any], key: str, write: Any, scale: float) -> Figure:
    """One quantity for skills, oracle and random control: a dot each, with its 95 % interval."""
    data, notes, ends = [], [], []
    for source, name, colour in METHODS:
        value = finite(results[source].get(key))
        if value is None:
            notes.append({"x": 0.02, "xref": "paper", "y": name, "xanchor": "left", "showarrow": False,
                          "text": "not defined: nothing lost", "font": {"color": _colour("--muted")}})  # fmt: skip
            continue
        low, high = (results[source].get("ci95") or {}).get(key) or (value, value)
        low, high = (value if finite(end) is None else end for end in (low, high))
        ends += [scale * low, scale * value, scale * high]
        error = {"type": "data", "symmetric": False, "array": [scale * max(high - value, 0)],
                 "arrayminus": [scale * max(value - low, 0)], "thickness": 2, "width": 5}  # fmt: skip
        data.append({
            "type": "scatter", "mode": "markers", "cliponaxis": False, "x": [scale * value], "y": [name], "error_x": error,
            "marker": {"size": 13, "color": _colour(colour)}, "showlegend": False,
            "hovertemplate": f"{name}: {write(value)}<extra></extra>",
        })  # fmt: skip
    rows = [name for _, name, _ in METHODS]
    xaxis = _amounts(rangemode="tozero", zeroline=True)
    layout = _layout(
        xaxis=xaxis,
        yaxis=_categories(
            rows,
            tickangle=0,
            range=[len(rows) - 0.5, -0.5],
            showgrid=True,
            gridcolor=_colour("--line"),
            ticks="outside",
            ticklen=8,
            tickcolor="rgba(0,0,0,0)",
        ),
        annotations=notes,
    )
    return {"data": data, "layout": layout, "ends": ends}


def _on_log_axis(figure: Figure) -> Figure:
    """A ratio spans decades; what a logarithm cannot show keeps its place as a note."""
    shown = [end for end in figure["ends"] if end > 0]
    floor = 10 ** math.floor(math.log10(min(shown))) if shown else 0.1
    ceiling = 10 ** math.ceil(math.log10(max(shown)) + 1e-9) if shown else 10
    for trace in list(figure["data"]):
        value = trace["x"][0]
        if value <= 0:
            figure["data"].remove(trace)
            figure["layout"]["annotations"].append({
                "x": 0.02, "xref": "paper", "y": trace["y"][0], "xanchor": "left", "showarrow": False,
                "text": times(value), "font": {"color": _colour("--muted")},
            })  # fmt: skip
        else:
            trace["error_x"]["arrayminus"][0] = min(trace["error_x"]["arrayminus"][0], value - floor)
    figure["layout"]["xaxis"] |= {"type": "log", "range": [math.log10(floor), math.log10(ceiling)], "dtick": 1,
                                  "ticksuffix": "\N{MULTIPLICATION SIGN}"}  # fmt: skip
    return figure


def selectivity(results: dict[str, Any]) -> dict[str, Figure]:
    """What the removed class loses, what the others lose, and the one per the other: a small figure each."""
    made = {
        "selectivity-drop": _dots(results, "target_drop", points, 100),
        "selectivity-harm": _dots(results, "other_harm", points, 100),
        "selectivity-ratio": _on_log_axis(_dots(results, "harm_ratio", times, 1)),
    }
    return {name: {key: value for key, value in figure.items() if key != "ends"} for name, figure in made.items()}


def class_accuracy(results: dict[str, Any]) -> Figure:
    """Per class: accuracy before, and after its own skill is removed."""
    names = labels(results["dataset"]["classes"])
    before = [finite(v) for v in results["baseline"]["per_class"]]
    change = [finite(row[i]) for i, row in enumerate(results["removal_matrix"])]
    # the sum of two rounded fractions may miss 0 by an ulp
    after = [None if b is None or c is None else max(0.0, b + c) for b, c in zip(before, change, strict=True)]
    counts = results["baseline"]["n_test_per_class"]
    hover = "<b>%{x}</b>: %{y:.1%} of %{customdata} examples<extra>%{fullData.name}</extra>"
    data = [
        {"type": "bar", "name": name, "x": names, "y": values, "width": 0.4, "offset": offset, "customdata": counts,
         "marker": {"color": _colour(colour)}, "hovertemplate": hover}
        for name, values, offset, colour in (
            ("whole model", before, -0.4, "--other"),
            ("without the class's own skill", after, 0.0, "--skill"),
        )
    ]  # fmt: skip
    layout = _layout(
        barmode="overlay",
        xaxis=_categories(names),
        yaxis=_amounts("accuracy on the class", range=[0, 1.02], tickformat=".0%"),
    )
    return {"data": data, "layout": layout}


def _place(site: dict[str, Any]) -> str:
    return "head" if site["block"] is None else str(site["block"])


def _counts_by_kind(results: dict[str, Any], counts: list[float]) -> dict[str, dict[str, float]]:
    """Neurons per kind and place, of counts in the order of the model's sites."""
    out: dict[str, dict[str, float]] = {}
    for site, count in zip(results["model"]["sites"], counts, strict=True):
        row = out.setdefault(site["kind"], {})
        row[_place(site)] = row.get(_place(site), 0) + count
    return out


def site_counts(results: dict[str, Any], skills: dict[str, Any]) -> list[list[int]]:
    """Neurons per skill and site, in the order of `model.sites`."""
    sites = [site["name"] for site in results["model"]["sites"]]
    return [[len(skill["neurons"].get(site, ())) for site in sites] for skill in skills["skills"]]


def location_matrix(results: dict[str, Any], skills: dict[str, Any]) -> Figure:
    """Row = skill, column = site; how many of the skill's neurons lie there."""
    names = labels([skill["name"] for skill in skills["skills"]])
    sites = [site["name"].removeprefix("blocks.") for site in results["model"]["sites"]]
    widths = [site["width"] for site in results["model"]["sites"]]
    counts = site_counts(results, skills)
    few = len(names) <= MAX_WRITTEN and len(sites) <= MAX_WRITTEN
    trace = _matrix(
        counts,
        [[str(count or "") for count in row] for row in counts] if few else None,
        x=labels(sites),
        y=names,
        xgap=1 if few else 0,
        ygap=1 if few else 0,
        zmin=0,
        colorscale=_scale(SEQUENTIAL),
        customdata=[widths] * len(names),
        colorbar=_colourbar("neurons of the skill"),
        hovertemplate="skill <b>%{y}</b>: %{z} of the %{customdata} neurons of %{x}<extra></extra>",
    )
    layout = _layout(
        xaxis=_categories(labels(sites), title=_title("block and kind")),
        yaxis=_categories(names, title=_title("skill", standoff=10), tickangle=0, range=[len(names) - 0.5, -0.5]),
        shapes=[_row_mark(len(names))],
    )
    return {"data": [trace], "layout": layout}


def location_steps(results: dict[str, Any], skills: dict[str, Any]) -> Figure:
    """Neurons by block and kind: a frame for the mean skill, then one per skill."""
    sites = results["model"]["sites"]
    counts = site_counts(results, skills)
    mean = [sum(column) / len(counts) for column in zip(*counts, strict=True)]
    places = list(dict.fromkeys(_place(site) for site in sites))
    shown = [kind for kind in KINDS if any(site["kind"] == kind[0] for site in sites)]

    def bars(row: list[float]) -> list[dict[str, Any]]:
        by_kind = _counts_by_kind(results, row)
        return [{"y": [round(by_kind[kind].get(place, 0), 3) for place in places]} for kind, _, _ in shown]

    stacks = [sum(_counts_by_kind(results, row)[kind].get(place, 0) for kind, _, _ in shown)
              for row in [mean, *counts] for place in places]  # fmt: skip
    data = [
        {"type": "bar", "name": name, "x": places, "marker": {"color": _colour(colour)}, **values,
         "hovertemplate": "%{x}: %{y:.1f} neurons<extra>%{fullData.name}</extra>"}
        for (_, name, colour), values in zip(shown, bars(mean), strict=True)
    ]  # fmt: skip
    layout = _layout(
        barmode="stack",
        bargap=0.25,
        xaxis=_categories(places, title=_title("block"), tickangle=0),
        yaxis=_amounts("neurons", range=[0, 1.05 * max(1, *stacks)]),
    )
    frames = [{"name": str(i), "data": bars(row)} for i, row in enumerate([mean, *counts])]
    return {"data": data, "layout": layout, "frames": frames}


def contribution(results: dict[str, Any]) -> Figure:
    """Shapley shares of MLP, attention and head in what a removal costs: all classes, then each."""
    found = results["layer_contribution"]
    per_class = found.get("per_class") or {}
    names = labels(["all classes", *per_class])
    shown = [kind for kind in KINDS if finite(found.get(kind[0])) is not None]
    rows = [found, *per_class.values()]
    data = [
        {"type": "bar", "name": name, "x": names, "y": [finite(row.get(kind)) for row in rows],
         "marker": {"color": _colour(colour)},
         "hovertemplate": "<b>%{x}</b>: %{y:.1%}<extra>%{fullData.name}</extra>"}
        for kind, name, colour in shown
    ]  # fmt: skip
    layout = _layout(
        # relative: a negative share hangs below 0 instead of shortening the stack
        barmode="relative",
        bargap=0.25,
        xaxis=_categories(names),
        yaxis=_amounts("share of the loss", tickformat=".0%"),
    )
    return {"data": data, "layout": layout}


def overlap(results: dict[str, Any]) -> Figure:
    """Jaccard overlap of every two skills' neurons; the diagonal, always 1, is left empty."""
    names = labels(results["dataset"]["classes"])
    matrix = results["interference"]["overlap"]
    rows = [[None if i == j else finite(v) for j, v in enumerate(row)] for i, row in enumerate(matrix)]
    few = len(names) <= MAX_WRITTEN
    text = [["" if v is None else number_of(round(100 * v)) for v in row] for row in rows]
    trace = _matrix(
        rows,
        text if few else None,
        x=names,
        y=names,
        xgap=1 if few else 0,
        ygap=1 if few else 0,
        zmin=0,
        zmax=_largest(rows, 0.01),
        colorscale=_scale(SEQUENTIAL),
        colorbar={**_colourbar("neurons in both, of those in either"), "tickformat": ".0%"},
        hovertemplate="<b>%{y}</b> and <b>%{x}</b> share %{z:.1%}<extra></extra>",
    )
    layout = _layout(
        xaxis=_categories(names),
        yaxis=_categories(names, tickangle=0, range=[len(names) - 0.5, -0.5]),
    )
    return {"data": [trace], "layout": layout}


def closest_pairs(results: dict[str, Any], most: int = 8) -> list[tuple[str, str, float]]:
    """The pairs of classes whose skills share the largest part of their neurons."""
    names, matrix = results["dataset"]["classes"], results["interference"]["overlap"]
    pairs = [(names[i], names[j], finite(row[j]) or 0.0) for i, row in enumerate(matrix) for j in range(i)]
    return sorted((pair for pair in pairs if pair[2] > 0), key=lambda pair: -pair[2])[:most]


def step_texts(results: dict[str, Any]) -> list[str]:
    """One sentence per removed skill: what happens to its class, and to the class that suffers most besides."""
    classes = results["dataset"]["classes"]
    out = []
    for i, row in enumerate(results["removal_matrix"]):
        before, change = finite(results["baseline"]["per_class"][i]), finite(row[i])
        text = f"{points(change, signed=True)} points"
        if before is not None and change is not None:
            text = f"{percent(before)} → {percent(max(0.0, before + change))} right"
        others = [(finite(v), j) for j, v in enumerate(row) if j != i]
        worst, j = min(((v, j) for v, j in others if v is not None), default=(0.0, i))
        harm = f"most harmed besides: {classes[j]}, {points(worst, signed=True)} points"
        out.append(f"{text}; {harm if worst < 0 else 'no other class loses anything'}.")
    return out
