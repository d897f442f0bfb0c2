"""The part of an evaluation's page that compares several tasks on one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillfast.report.formatting import UNDEFINED, finite, percent
from skillfast.report.parts import SEQUENTIAL, Figure, across, base, down, heatmap, labels, largest

if TYPE_CHECKING:
    from skillfast.results.evaluation import TaskRemoval, Tasks

MOST = 200  # neurons of several tasks that the page lists


def make_figures(tasks: Tasks) -> dict[str, Figure]:
    """The neurons that every two tasks share, beside the number that chance gives."""
    names = labels(tasks.names)
    k = len(names)
    shared = [[None if i == j else finite(tasks.shared[i][j]) for j in range(k)] for i in range(k)]
    text = [
        ["" if i == j else f"{tasks.shared[i][j]:g} ({tasks.expected_shared[i][j]:.1f})" for j in range(k)]
        for i in range(k)
    ]
    trace = heatmap(
        shared,
        names,
        names,
        str,
        "neurons in both",
        text=text,
        zmin=0,
        zmax=largest(shared, 1.0),
        colorscale=SEQUENTIAL,
        hovertemplate="<b>%{y}</b> and <b>%{x}</b>: %{text}<extra></extra>",
    )
    return {"tasks-shared": {"data": [trace], "layout": base(xaxis=across(names), yaxis=down(names))}}


def context(tasks: Tasks) -> dict[str, Any]:
    """What the template needs."""
    names = tasks.names
    several = tasks.in_several
    sizes, wanted = ", ".join(map(str, tasks.neurons)), percent(tasks.share)
    say = [
        f"The tasks {', '.join(names)} have {sizes} neurons; {wanted} of all was asked for.",
        f"{len(several):,} neurons serve more than one." if several else "No neuron serves more than one.",
    ]
    rows = [
        [name, _number(tasks.intact[name]), *(_cell(removal, name) for removal in tasks.removals)]
        for name in tasks.intact
    ]
    return {
        "without": [f"without {name}" for name in names],
        "say": say,
        "rows": rows,
        "measured": list(tasks.measured.items()),
        "several": [(entry.site, entry.neuron, ", ".join(entry.tasks)) for entry in several[:MOST]],
    }


def _cell(removal: TaskRemoval, measure: str) -> str:
    drawn = removal.random.change[measure].mean
    return f"{_number(removal.change[measure], '+')} ({_number(drawn, '+')})"


def _number(value: Any, sign: str = "") -> str:
    return UNDEFINED if finite(value) is None else f"{value:{sign}.4g}"
