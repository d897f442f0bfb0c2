"""Which classes are connected: what removals harm, competition, linkage and shared neurons, the strongest of each."""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from skillfast.report.formatting import MINUS, finite, number_of, percent, points
from skillfast.report.parts import Figure, base, colour, labels

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from skillfast.results.bench import BenchResults, Pair

MOST_DRAWN = 20  # of each kind
MOST_NODES = 40  # classes that the graph begins with
MOST_OF_CLASS = 5  # of each kind, of a class that is asked for
KINDS = (
    ("harms", "a removal harms"),
    ("competes", "compete"),
    ("linked", "are linked"),
    ("shares", "share neurons"),
)

DRAWN = {  # hue and dash, as in the style sheet
    "harms": ("--skill", "solid"),
    "competes": ("--gain-2", "dash"),
    "linked": ("--attn", "dot"),
    "shares": ("--faint", "solid"),
}
ARC_STEPS = 24


class Edge(NamedTuple):
    """A connection: index of its kind, the two classes, its strength among its kind, its value and what it says."""

    kind: int
    a: int
    b: int
    strength: float
    value: str
    text: str


def _harms(results: BenchResults, at: dict[str, int]) -> list[Edge]:
    names, matrix = results.dataset.classes, results.removal_matrix
    found = [(at[name], at[harmed]) for name, verdict in (results.verdicts or {}).items() for harmed in verdict.harmed]
    return [
        Edge(0, a, b, -matrix[a][b], f"{points(-matrix[a][b])} points",
             f"Removing {names[a]} takes {points(-matrix[a][b])} points from {names[b]}.")
        for a, b in found
    ]  # fmt: skip


def _pairs(kind: int, said: str, pairs: Sequence[Pair] | None, at: dict[str, int]) -> list[Edge]:
    edges = []
    for pair in pairs or ():
        one, other = (f"{shift:+.2f}".replace("-", MINUS) for shift in pair.margin)
        value = f"margins {one} and {other}, q = {pair.q:.2g}"
        a, b = (at[name] for name in pair.classes)
        text = f"{pair.classes[0]} and {pair.classes[1]} {said} ({value})."
        edges.append(Edge(kind, a, b, sum(map(abs, pair.margin)), value, text))
    return edges


def _shared(results: BenchResults) -> tuple[list[Edge], int]:
    """Each class's largest overlaps, and how many pairs share a neuron."""
    names, matrix = results.dataset.classes, results.interference.overlap if results.interference else []
    rows = [[finite(v) or 0.0 for v in row] for row in matrix]
    kept = set()
    for i, row in enumerate(rows):
        for j in heapq.nlargest(MOST_OF_CLASS + 1, range(len(row)), key=row.__getitem__):
            if j != i and row[j] > 0:
                kept.add((min(i, j), max(i, j)))
    count = sum(v > 0 for i, row in enumerate(rows) for v in row[:i])
    return [
        Edge(3, i, j, rows[i][j], percent(rows[i][j]),
             f"{names[i]} and {names[j]} share {percent(rows[i][j])} of the neurons in either.")
        for i, j in sorted(kept)
    ], count  # fmt: skip


def _strongest(edges: list[Edge]) -> list[Edge]:
    """The strongest first, and of each class no more than are shown of it."""
    kept, seen = [], dict[int, int]()
    for edge in sorted(edges, key=lambda edge: -edge.strength):
        if min(seen.get(edge.a, 0), seen.get(edge.b, 0)) < MOST_OF_CLASS:
            kept.append(edge)
            for end in (edge.a, edge.b):
                seen[end] = seen.get(end, 0) + 1
    return kept


def _first(kinds: Iterable[list[Edge]]) -> list[Edge]:
    """What the graph begins with: the strongest of each kind in turn, until there are as many classes as it holds."""
    drawn: list[Edge] = []
    nodes: set[int] = set()
    for rank in range(MOST_DRAWN):
        for edges in kinds:
            if rank < len(edges) and len(nodes | {edges[rank].a, edges[rank].b}) <= MOST_NODES:
                drawn.append(edges[rank])
                nodes |= {edges[rank].a, edges[rank].b}
    return drawn


def connections(results: BenchResults) -> dict[str, Any] | None:
    """What the graph draws, and the words and the table beside it.

    Args:
        results: what `results.json` holds.

    Returns:
        `drawn` for the script, `say` and `rows` for the template; None where no two classes are connected.
    """
    names, found = results.dataset.classes, results.interference
    at = {name: i for i, name in enumerate(names)}
    shared, n_shared = _shared(results)
    kinds = [
        _harms(results, at),
        _pairs(1, "compete: each removal helps the other", found.competition if found else None, at),
        _pairs(2, "are linked: each removal hurts the other", found.linkage if found else None, at),
        shared,
    ]
    counts = [*map(len, kinds[:3]), n_shared]
    kinds = [_strongest(edges) for edges in kinds]
    first = _first(kinds)
    if not first:
        return None
    shown = set(first)
    rest = [edge for edges in kinds for edge in edges if edge not in shown]
    return {
        "drawn": {
            "kinds": [[key, f"{said} ({number_of(n)})"] for (key, said), n in zip(KINDS, counts, strict=True)],
            "names": names,
            "edges": [[edge.kind, edge.a, edge.b, edge.text] for edge in (*first, *rest)],
            "drawn": len(first),
        },
        "say": _say(counts, first, len(names)),
        "rows": [[KINDS[edge.kind][1], names[edge.a], names[edge.b], edge.value]
                 for edge in sorted(first, key=lambda edge: edge.kind)],
    }  # fmt: skip


def figure(results: BenchResults) -> Figure | None:
    """The graph as it begins, for papers; None where no two classes are connected."""
    found = connections(results)
    if found is None:
        return None
    edges = found["drawn"]["edges"][: found["drawn"]["drawn"]]
    nodes = sorted({end for _, a, b, _ in edges for end in (a, b)})
    row = {node: i for i, node in enumerate(nodes)}
    data: list[dict[str, Any]] = []
    for kind, (key, said) in enumerate(KINDS):
        x: list[float | None] = []
        y: list[float | None] = []
        heads = []
        for _, a, b, _ in (edge for edge in edges if edge[0] == kind):
            start, end = row[a], row[b]
            # arcs of different kinds between the same two classes lie side by side
            reach = math.sqrt(abs(end - start)) * (1 - 0.06 * kind)
            angles = [math.pi * step / ARC_STEPS for step in range(ARC_STEPS + 1)]
            x += [*(round(reach * math.sin(angle), 4) for angle in angles), None]
            y += [*(round(start + (end - start) * (1 - math.cos(angle)) / 2, 4) for angle in angles), None]
            heads.append(end)
        hue, dash = DRAWN[key]
        line = {"color": colour(hue), "dash": dash, "width": 2, "shape": "spline"}
        data.append({"type": "scatter", "mode": "lines", "name": said, "x": x, "y": y, "line": line})
        if key == "harms":
            marker = {"symbol": "triangle-left", "size": 9, "color": colour(hue)}
            data.append({"type": "scatter", "mode": "markers", "x": [0.0] * len(heads), "y": heads, "marker": marker,
                         "showlegend": False})  # fmt: skip
    names = labels([results.dataset.classes[node] for node in nodes])
    axis = {"tickvals": list(range(len(nodes))), "ticktext": names, "range": [len(nodes) - 0.5, -0.5]}
    still = {"showgrid": False, "zeroline": False, "automargin": True}
    return {"data": data, "layout": base(xaxis={"visible": False}, yaxis={**axis, **still})}


def _say(counts: list[int], first: list[Edge], n_classes: int) -> list[str]:
    """What a line is, what is not drawn, and what no line does not mean."""
    total = sum(counts)
    drawn = (
        f"All {number_of(total)} are drawn."
        if len(first) == total
        else f"Of {number_of(total)} connections among {number_of(n_classes)} classes the graph shows "
        f"{number_of(len(first))}: the strongest of each kind, at most {MOST_DRAWN}, among at most {MOST_NODES} "
        f"classes. A class that you choose shows its own as well, at most about {MOST_OF_CLASS} of each kind."
    )
    return [
        (
            "An arrow is a removal that harms another class, as a test found; the other lines are pairs whose removals "
            "help or hurt each other, and pairs of skills that share neurons."
        ),
        drawn,
        (
            "No line does not mean no effect: these examples may be too few to tell. Shared neurons say what a removal "
            "reaches, not that it harms."
        ),
    ]
