"""What the figures are put together from. Colours are the names of the page's CSS variables."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from skillfast.report.formatting import rounded

if TYPE_CHECKING:
    from collections.abc import Callable

# beyond this many classes a cell is too small for its number
MAX_WRITTEN = 20
# beyond this many a bar for each is thinner than a line, and takes long to draw
MAX_BARS = 100
MAX_LABEL = 14
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
LEGEND = {
    "orientation": "h",
    "x": 0,
    "xanchor": "left",
    "y": 1.02,
    "yanchor": "bottom",
    "traceorder": "normal",
    "itemclick": False,
    "itemdoubleclick": False,
}

Figure = dict[str, Any]


def colour(name: str) -> str:
    """A colour of the page's style sheet, which has one for each colour scheme."""
    return f"var({name})"


DIVERGING = [
    [0.0, colour("--loss-2")],
    [0.25, colour("--loss-1")],
    [0.5, colour("--middle")],
    [0.75, colour("--gain-1")],
    [1.0, colour("--gain-2")],
]
SEQUENTIAL = [[0.0, colour("--middle")], [0.5, colour("--amount-1")], [1.0, colour("--amount-2")]]


def labels(names: list[str]) -> list[str]:
    """Names as category values: escaped, since plotly reads its labels as markup, and all different."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(html.escape(name if seen[name] == 1 else f"{name} ({seen[name]})", quote=False))
    return out


def _short(label: str) -> str:
    """A label of at most MAX_LABEL characters: names of many classes often differ in their ends."""
    text = html.unescape(label)
    return label if len(text) <= MAX_LABEL else html.escape(f"{text[: MAX_LABEL - 6]}…{text[-5:]}", quote=False)


def _title(text: str, **more: Any) -> dict[str, Any]:
    # plotly keeps room for a title that is empty
    return {"text": text, "font": {"size": 12, "color": colour("--muted")}, **more} if text else {}


def across(values: list[str], title: str = "", **more: Any) -> dict[str, Any]:
    """A category axis from left to right."""
    return {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": values,
        "range": [-0.5, len(values) - 0.5],
        # the page thins these, and turns those of an axis without an angle, to what fits its width
        "tickvals": values,
        "ticktext": [_short(value) for value in values],
        "title": _title(title),
        "showgrid": False,
        "zeroline": False,
        "fixedrange": True,
        "automargin": True,
        **more,
    }


def down(values: list[str], title: str = "", **more: Any) -> dict[str, Any]:
    """A category axis from top to bottom."""
    axis = across(values) | {"title": _title(title, standoff=10)}
    return axis | {"range": [len(values) - 0.5, -0.5], "tickangle": 0, **more}


def amounts(title: str = "", **more: Any) -> dict[str, Any]:
    """An axis of numbers."""
    return {
        "title": _title(title, standoff=10),
        "gridcolor": colour("--line"),
        "zerolinecolor": colour("--faint"),
        "fixedrange": True,
        "automargin": True,
        **more,
    }


def base(**more: Any) -> dict[str, Any]:
    """The layout that all figures share: see-through, without margins of its own."""
    return {
        "font": {"family": FONT, "size": 12, "color": colour("--ink")},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "dragmode": False,
        "hoverlabel": {"font": {"size": 13}},
        "legend": LEGEND,
        **more,
    }


def _colourbar(title: str, **more: Any) -> dict[str, Any]:
    return {
        "orientation": "h",
        "thickness": 10,
        "len": 1,
        "x": 0.5,
        "y": 1.01,
        "yanchor": "bottom",
        "ypad": 4,
        "outlinewidth": 0,
        "title": _title(title, side="top"),
        **more,
    }


def heatmap(
    rows: list[list[Any]],
    x: list[str],
    y: list[str],
    number: Callable[[Any], str],
    bar: str,
    bar_format: str = "",
    **more: Any,
) -> dict[str, Any]:
    """A matrix in colours, with its numbers, as `number` writes them, where they fit, and a colour bar titled `bar`."""
    few = max(len(x), len(y)) <= MAX_WRITTEN
    written = {"text": [[number(v) for v in row] for row in rows], "texttemplate": "%{text}"} if few else {}
    gap = 1 if few else 0
    return {
        "type": "heatmap",
        "x": x,
        "y": y,
        "z": rows,
        "xgap": gap,
        "ygap": gap,
        "hoverongaps": False,
        "colorbar": _colourbar(bar, tickformat=bar_format),
        **written,
        **more,
    }


def row_mark(n_rows: int) -> dict[str, Any]:
    """The outline of the first row of a matrix; round a thin row it keeps a distance, so as not to cover it."""
    few = n_rows <= MAX_WRITTEN
    reach = 0.5 if few else 0.5 + n_rows / 120
    return {
        "type": "rect", "xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": -reach, "y1": reach,
        "line": {"color": colour("--ink"), "width": 2 if few else 1}, "fillcolor": "rgba(0,0,0,0)",
    }  # fmt: skip


def in_points(rows: list[list[Any]]) -> list[list[float | None]]:
    """Fractions as percentage points."""
    return [[rounded(None if v is None else 100 * v, 2) for v in row] for row in rows]


def largest(rows: list[list[float | None]], at_least: float) -> float:
    """The largest size of a number in a matrix."""
    return max([at_least, *(abs(v) for row in rows for v in row if v is not None)])
