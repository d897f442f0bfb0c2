"""The figures as plotly JSON: plain dicts of `data`, `layout` and, where the page has no other source, `frames`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillfast.report.formatting import (
    UNDEFINED,
    cell,
    finite,
    number_of,
    percent,
    points,
    rounded,
    term_interval,
    term_value,
)
from skillfast.report.parts import (
    DIVERGING,
    MAX_BARS,
    MAX_WRITTEN,
    SEQUENTIAL,
    Figure,
    across,
    amounts,
    base,
    colour,
    down,
    heatmap,
    in_points,
    labels,
    largest,
    row_mark,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skillfast.results.bench import BenchResults, BlockShare, Selectivity, Shares, SiteSize
    from skillfast.results.skills import Skills

METHODS = (
    ("selectivity", "skills", "--skill"),
    ("oracle", "oracle", "--oracle"),
    ("random_control", "random", "--random"),
)
KINDS = (
    ("attn", "attention", "--attn"), ("mlp", "MLP", "--mlp"), ("ssm", "mixers", "--ssm"),
    ("expert", "experts", "--expert"), ("router", "routers", "--router"), ("head", "classifier head", "--head"),
)  # fmt: skip


def removal_matrix(results: BenchResults) -> Figure:
    """Row = removed skill, column = class whose accuracy changes, in percentage points."""
    names = labels(results.dataset.classes)
    rows = in_points(results.removal_matrix)
    others = [[v for j, v in enumerate(row) if j != i] for i, row in enumerate(rows)]
    limit = largest(rows, 1.0)
    trace = heatmap(
        rows,
        names,
        names,
        lambda v: cell(None if v is None else v / 100),
        "change in accuracy, percentage points",
        zmin=-limit,
        zmid=0,
        zmax=limit,
        colorscale=DIVERGING,
        hovertemplate="without the skill of <b>%{y}</b><br>accuracy on <b>%{x}</b>: %{z:+.1f} points<extra></extra>",
    )
    # zooming in is worth a trapped finger only where cells are tiny
    few = len(names) <= MAX_WRITTEN
    layout = base(
        dragmode=False if few else "zoom",
        xaxis=across(names, fixedrange=few),
        yaxis=down(names, "removed skill", fixedrange=few),
        shapes=[row_mark(len(names))],
        # the page's switch between the scale of all cells and that of the other classes
        meta={"limits": [limit, largest(others, 0.1)], "told": _matrix_told(results)},
    )
    return {"data": [trace], "layout": layout}


def _matrix_told(results: BenchResults) -> str:
    """What each removal takes from its own class, and the most that one takes from another."""
    names = results.dataset.classes
    changes = {
        (i, j): change
        for i, row in enumerate(results.removal_matrix)
        for j, value in enumerate(row)
        if (change := finite(value)) is not None
    }
    own = sorted((change, i) for (i, j), change in changes.items() if i == j)
    if not own:
        return UNDEFINED
    (most, first), (least, last) = own[0], own[-1]
    said = (
        f"By its own removal a class changes by {points(sum(change for change, _ in own) / len(own), signed=True)} "
        f"points on average, from {points(most, signed=True)} ({names[first]}) to {points(least, signed=True)} "
        f"({names[last]})"
    )
    worst, (i, j) = min(((change, at) for at, change in changes.items() if at[0] != at[1]), default=(0.0, (0, 0)))
    if worst >= 0:
        return f"{said}; no other class loses anything"
    return f"{said}; the most that another loses is {points(-worst)}, of {names[j]} without the skill of {names[i]}"


def _bars(name: str, x: list[str], y: list[Any], hue: str, hover: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "bar",
        "name": name,
        "x": x,
        "y": y,
        "marker": {"color": colour(hue)},
        "hovertemplate": f"{hover}<extra>%{{fullData.name}}</extra>",
        **more,
    }


def _outlined(name: str, x: list[str], y: list[Any], hue: str, hover: str, **more: Any) -> dict[str, Any]:
    """Bars side by side as one outline, which is drawn at once however many they are."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": x,
        "y": y,
        "line": {"color": colour(hue), "shape": "hvh", "width": 1},
        "fill": "tozeroy",
        "hovertemplate": f"{hover}<extra>%{{fullData.name}}</extra>",
        **more,
    }


def removal_steps(results: BenchResults) -> Figure:
    """The change in every class's accuracy for one removal, the oracle's beside it.

    The page makes the bars from rows of `removal_matrix` and of the oracle's, which stands in the layout's `meta`.
    """
    names = labels(results.dataset.classes)
    rows = in_points(results.removal_matrix)
    best = in_points(results.oracle.removal_matrix)
    # the oracle's bar stands to the right of the skill's, in the same place of the axis
    width, left = 0.4, -0.4
    styles = [
        ("class of the removed skill", "--skill", left),
        ("other classes", "--other", left),
        ("oracle, for comparison", "--oracle", 0.0),
    ]
    hover = "<b>%{x}</b>: %{y:+.1f} points"
    none = [None] * len(names)
    if len(names) <= MAX_BARS:
        data = [_bars(name, names, none, hue, hover, width=width, offset=offset) for name, hue, offset in styles]
    else:
        own = {"mode": "markers", "marker": {"size": 9, "color": colour(styles[0][1])}, "fill": "none"}
        data = [
            _outlined(name, names, none, hue, hover, **(own if i == 0 else {"fill": "none"} if i == 2 else {}))
            for i, (name, hue, _) in enumerate(styles)
        ]
    every = [v for matrix in (rows, best) for row in matrix for v in row if v is not None]
    low, high = min([0.0, *every]), max([0.0, *every])
    pad = 0.04 * max(high - low, 1.0)
    layout = base(
        barmode="overlay",
        xaxis=across(names),
        yaxis=amounts("change in accuracy, points", range=[low - pad, high + pad]),
        meta={"oracle": best},
    )
    return {"data": data, "layout": layout}


def _note(row: str, text: str) -> dict[str, Any]:
    """What a row without a dot says instead."""
    return {
        "x": 0.02, "xref": "paper", "xanchor": "left", "y": row, "text": text, "showarrow": False,
        "font": {"color": colour("--muted")}, "bgcolor": colour("--panel"),
    }  # fmt: skip


def _dot(values: Selectivity, key: str, unit: float, row: str, hue: str) -> dict[str, Any] | None:
    """One value with its 95 % interval, or None where it is not defined."""
    value = finite(getattr(values, key))
    if value is None:
        return None
    low, high = map(finite, getattr(values.ci95, key) or (None, None))
    reach = {
        "array": [0.0 if high is None else unit * max(high - value, 0.0)],
        "arrayminus": [0.0 if low is None else unit * max(value - low, 0.0)],
    }
    return {
        "type": "scatter", "mode": "markers", "x": [unit * value], "y": [row], "showlegend": False,
        "marker": {"size": 13, "color": colour(hue)}, "cliponaxis": False,
        "error_x": {"type": "data", "symmetric": False, "thickness": 2, "width": 5, **reach},
        "hovertemplate": f"{row}: {term_value(values, key)}<extra></extra>",
    }  # fmt: skip


def _dots(results: BenchResults, key: str, unit: float) -> Figure:
    """One quantity for skills, oracle and random control: a dot each, with its 95 % interval."""
    dots = {row: _dot(getattr(results, source), key, unit, row, hue) for source, row, hue in METHODS}
    notes = [_note(row, UNDEFINED) for row, dot in dots.items() if dot is None]
    layout = _rows(list(dots), annotations=notes, meta={"told": _told(results, key)})
    return {"data": [dot for dot in dots.values() if dot is not None], "layout": layout}


def _told(results: BenchResults, key: str) -> str:
    """One quantity with its interval for skills, oracle and random control, in words."""
    found = ((row, getattr(results, source)) for source, row, _ in METHODS)
    return ", ".join(f"{row} {term_value(values, key)} {term_interval(values, key)}".rstrip() for row, values in found)


def _rows(names: list[str], **more: Any) -> dict[str, Any]:
    """The layout of a small figure with a row per method."""
    return base(
        xaxis=amounts(rangemode="tozero", zeroline=True),
        yaxis=down(
            names,
            showgrid=True,
            gridcolor=colour("--line"),
            # transparent ticks keep the labels off a dot at 0
            ticks="outside",
            ticklen=8,
            tickcolor="rgba(0,0,0,0)",
        ),
        **more,
    )


def _brackets(results: BenchResults) -> Figure:
    """Harm for skills, oracle and random control: from the low to the high estimate, with the interval beyond them."""
    data = []
    for source, row, hue in METHODS:
        found = getattr(results, source).harm
        low, high = 100 * found.cross_fitted, 100 * found.plug_in
        least, most = (low, high) if found.ci95 is None else (100 * end for end in found.ci95)
        data.append(
            {
                "type": "scatter", "mode": "lines+markers", "x": [low, high], "y": [row, row], "showlegend": False,
                "marker": {"size": 11, "color": colour(hue)}, "line": {"width": 5, "color": colour(hue)},
                "cliponaxis": False,
                "error_x": {"type": "data", "symmetric": False, "thickness": 2, "width": 5,
                            "array": [0.0, max(most - high, 0.0)], "arrayminus": [max(low - least, 0.0), 0.0]},
                "hovertemplate": f"{row}: {term_value(getattr(results, source), 'harm')}, "
                f"{points(found.noise_floor)} by chance alone<extra></extra>",
            }
        )  # fmt: skip
    return {"data": data, "layout": _rows([row for _, row, _ in METHODS], meta={"told": _told(results, "harm")})}


def selectivity(results: BenchResults) -> dict[str, Figure]:
    """What the removed class loses, and how the others fare beside the oracle and for good: a small figure each."""
    return {
        "selectivity-drop": _dots(results, "target_drop", 100),
        "selectivity-regret": _dots(results, "regret", 100),
        "selectivity-harm": _brackets(results),
    }


def class_accuracy(results: BenchResults) -> Figure:
    """Per class: accuracy before, and after its own skill is removed."""
    names = labels(results.dataset.classes)
    before = [finite(v) for v in results.baseline.per_class]
    change = [finite(row[i]) for i, row in enumerate(results.removal_matrix)]
    # the sum of two rounded fractions may miss 0 by an ulp
    after = [None if b is None or c is None else max(0.0, b + c) for b, c in zip(before, change, strict=True)]
    counts = results.baseline.n_test_per_class
    hover = "<b>%{x}</b>: %{y:.1%} of %{customdata} examples"
    shown = [("whole model", before, "--other", -0.4), ("without the class's own skill", after, "--skill", 0.0)]
    data = [
        _bars(name, names, values, hue, hover, width=0.4, offset=offset, customdata=counts)
        if len(names) <= MAX_BARS
        else _outlined(name, names, values, hue, hover, customdata=counts)
        for name, values, hue, offset in shown
    ]
    layout = base(
        barmode="overlay",
        xaxis=across(names),
        yaxis=amounts("accuracy on the class", range=[0, 1.02], tickformat=".0%"),
    )
    return {"data": data, "layout": layout}


def _place(site: SiteSize | BlockShare) -> str:
    return "head" if site.block is None else str(site.block)


def _counts_by_kind(results: BenchResults, counts: Sequence[float]) -> dict[str, dict[str, float]]:
    """Neurons per kind and place, of counts in the order of the model's sites."""
    out: dict[str, dict[str, float]] = {}
    for site, count in zip(results.model.sites, counts, strict=True):
        row = out.setdefault(site.kind, {})
        row[_place(site)] = row.get(_place(site), 0) + count
    return out


def site_counts(results: BenchResults, skills: Skills) -> list[list[int]]:
    """Neurons per skill and site, in the order of `model.sites`."""
    sites = [site.name for site in results.model.sites]
    return [[len(skill.neurons.get(site, ())) for site in sites] for skill in skills.skills]


def location_matrix(results: BenchResults, skills: Skills) -> Figure:
    """Row = skill, column = site; how many of the skill's neurons lie there."""
    names = labels([skill.name for skill in skills.skills])
    sites = labels([site.name.removeprefix("blocks.") for site in results.model.sites])
    widths = [site.width for site in results.model.sites]
    counts = site_counts(results, skills)
    trace = heatmap(
        counts,
        sites,
        names,
        lambda count: str(count or ""),
        "neurons of the skill",
        zmin=0,
        colorscale=SEQUENTIAL,
        customdata=[widths] * len(names),
        hovertemplate="skill <b>%{y}</b>: %{z} of the %{customdata} neurons of %{x}<extra></extra>",
    )
    layout = base(xaxis=across(sites), yaxis=down(names, "skill"), shapes=[row_mark(len(names))])
    return {"data": [trace], "layout": layout}


def location_steps(results: BenchResults, skills: Skills) -> Figure:
    """Neurons by block and kind: a frame for the mean skill, then one per skill."""
    sites = results.model.sites
    counts = site_counts(results, skills)
    mean = [sum(column) / len(counts) for column in zip(*counts, strict=True)]
    places = list(dict.fromkeys(_place(site) for site in sites))
    kinds = [kind for kind in KINDS if any(site.kind == kind[0] for site in sites)]
    # [frame][kind][place]
    heights = []
    for row in (mean, *counts):
        by_kind = _counts_by_kind(results, row)
        heights.append([[round(by_kind[kind].get(place, 0), 3) for place in places] for kind, _, _ in kinds])
    tallest = max(sum(column) for frame in heights for column in zip(*frame, strict=True))
    data = [
        _bars(name, places, bars, hue, "%{x}: %{y:.1f} neurons")
        for (_, name, hue), bars in zip(kinds, heights[0], strict=True)
    ]
    layout = base(
        barmode="stack",
        bargap=0.25,
        xaxis=across(places, "block", tickangle=0),
        yaxis=amounts("neurons", range=[0, 1.05 * max(1, tallest)]),
    )
    frames = [{"name": str(i), "data": [{"y": bars} for bars in frame]} for i, frame in enumerate(heights)]
    return {"data": data, "layout": layout, "frames": frames}


def contribution(results: BenchResults) -> Figure:
    """Shapley shares of MLP, attention and head in what a removal costs: all classes, then each."""
    found = results.layer_contribution
    assert found is not None
    per_class = found.per_class
    names = labels(["all classes", *per_class])
    rows: list[Shares] = [found, *per_class.values()]
    shown = [
        (name, hue, [rounded(getattr(row, kind), 4) for row in rows])
        for kind, name, hue in KINDS
        if finite(getattr(found, kind)) is not None
    ]
    if len(names) > MAX_BARS:
        return _shares_in_colours(names, {name: values for name, _, values in shown})
    data = [_bars(name, names, values, hue, "<b>%{x}</b>: %{y:.1%}") for name, hue, values in shown]
    layout = base(
        # relative: a negative share hangs below 0 instead of shortening the stack
        barmode="relative",
        bargap=0.25,
        xaxis=across(names),
        yaxis=amounts("share of the loss", tickformat=".0%"),
    )
    return {"data": data, "layout": layout}


def _shares_in_colours(names: list[str], shares: dict[str, list[Any]]) -> Figure:
    """Shares of many classes: row = kind, column = class."""
    rows, limit = list(shares.values()), largest(list(shares.values()), 0.01)
    trace = heatmap(
        rows, names, list(shares), str, "share of the loss", ".0%", zmin=-limit, zmid=0, zmax=limit,
        colorscale=DIVERGING, hovertemplate="<b>%{x}</b>, %{y}: %{z:.1%}<extra></extra>",
    )  # fmt: skip
    return {"data": [trace], "layout": base(xaxis=across(names), yaxis=down(list(shares)))}


def contribution_by_block(results: BenchResults) -> Figure:
    """Share of each block in what a removal costs, with 95 % intervals."""
    assert results.layer_contribution is not None
    found = results.layer_contribution.per_block
    assert found is not None
    places = [_place(entry) for entry in found]
    shown = [(entry, entry.share) for entry in found if entry.share is not None]
    ends = [entry.ci95 or [share] * 2 for entry, share in shown]
    reach = {
        "array": [max(high - share, 0.0) for (_, share), (_, high) in zip(shown, ends, strict=True)],
        "arrayminus": [max(share - low, 0.0) for (_, share), (low, _) in zip(shown, ends, strict=True)],
    }
    bars = {
        "type": "bar",
        "x": [_place(entry) for entry, _ in shown],
        "y": [share for _, share in shown],
        "marker": {"color": [colour("--head" if entry.block is None else "--skill") for entry, _ in shown]},
        "error_y": {"type": "data", "symmetric": False, "color": colour("--ink"), "thickness": 1.5, **reach},
        "customdata": [[percent(entry.bottom_up), percent(entry.top_down)] for entry, _ in shown],
        "hovertemplate": "block %{x}: %{y:.1%}<br>%{customdata[0]} when the blocks before it are removed, "
        "%{customdata[1]} when those after it are<extra></extra>",
    }
    layout = base(
        bargap=0.25,
        xaxis=across(places, "block", tickangle=0),
        yaxis=amounts("share of the loss", tickformat=".0%", zeroline=True),
    )
    return {"data": [bars], "layout": layout}


def correlation_by_block(results: BenchResults, metric: str) -> Figure:
    """Mean |r| with a metric of the best of each block and kind; lines of all places, the last block and chance."""
    assert results.correlations is not None
    values = results.correlations.metrics[metric]
    sites = results.model.sites
    places = list(dict.fromkeys(_place(site) for site in sites))
    data: list[dict[str, Any]] = []
    for kind, name, hue in KINDS:
        own = [(_place(site), finite(values.sites[site.name].test)) for site in sites if site.kind == kind]
        if own:
            x, y = [place for place, _ in own], [rounded(value, 4) for _, value in own]
            data.append(_bars(name, x, y, hue, "block %{x}: %{y:.2f}"))
    last = None if values.last_block is None else values.last_block.test
    most = max(((v, name) for name, both in values.sites.items() if (v := finite(both.test)) is not None), default=None)
    lines = (
        ("all places", values.test, "--ink", "solid"),
        ("the last block", last, "--skill", "dash"),
        ("by chance", results.correlations.chance, "--random", "dot"),
    )
    data += [
        {
            "type": "scatter", "mode": "lines", "name": name, "x": places, "y": [rounded(level, 4)] * len(places),
            "line": {"color": colour(hue), "dash": dash, "width": 1.5},
            "hovertemplate": f"{name}: %{{y:.2f}}<extra></extra>",
        }
        for name, level, hue, dash in lines
        if finite(level) is not None
    ]  # fmt: skip
    told = [f"{name} {found:.2f}" for name, level, _, _ in lines if (found := finite(level)) is not None]
    told += [f"most at {most[1]}, {most[0]:.2f}"] if most else []
    layout = base(
        barmode="group",
        bargap=0.25,
        xaxis=across(places, "block", tickangle=0),
        yaxis=amounts("mean size of r", rangemode="tozero"),
        meta={"told": ", ".join(told)},
    )
    return {"data": data, "layout": layout}


def overlap(results: BenchResults) -> Figure:
    """Jaccard overlap of every two skills' neurons; the diagonal, always 1, is left empty."""
    names = labels(results.dataset.classes)
    assert results.interference is not None
    found = results.interference.overlap
    # what can be read off; of many classes more digits would be most of the page
    digits = 4 if len(names) <= MAX_BARS else 3
    rows = [[None if i == j else rounded(v, digits) for j, v in enumerate(row)] for i, row in enumerate(found)]
    trace = heatmap(
        rows,
        names,
        names,
        lambda v: "" if v is None else number_of(round(100 * v)),
        "neurons in both, of those in either",
        ".0%",
        zmin=0,
        zmax=largest(rows, 0.01),
        colorscale=SEQUENTIAL,
        hovertemplate="<b>%{y}</b> and <b>%{x}</b> share %{z:.1%}<extra></extra>",
    )
    return {"data": [trace], "layout": base(xaxis=across(names), yaxis=down(names))}


def closest_pairs(results: BenchResults, most: int = 8) -> list[tuple[str, str, float]]:
    """The pairs of classes whose skills share the largest part of their neurons."""
    assert results.interference is not None
    names, matrix = results.dataset.classes, results.interference.overlap
    pairs = [(names[i], names[j], finite(row[j]) or 0.0) for i, row in enumerate(matrix) for j in range(i)]
    return sorted((pair for pair in pairs if pair[2] > 0), key=lambda pair: -pair[2])[:most]


def step_texts(results: BenchResults) -> list[str]:
    """One sentence per removed skill: what happens to its class, and to the class that suffers most besides."""
    classes = results.dataset.classes
    out = []
    for i, row in enumerate(results.removal_matrix):
        before, change = finite(results.baseline.per_class[i]), finite(row[i])
        text = f"{points(change, signed=True)} points"
        if before is not None and change is not None:
            text = f"{percent(before)} → {percent(max(0.0, before + change))} right"
        others = [(finite(v), j) for j, v in enumerate(row) if j != i]
        worst, j = min(((v, j) for v, j in others if v is not None), default=(0.0, i))
        harm = f"most harmed other class: {classes[j]} ({points(worst, signed=True)} points)"
        out.append(f"{text}; {harm if worst < 0 else 'no other class loses anything'}.")
    return out
