"""The page of a trajectory: figures and tables from `trajectory.json`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skillfast.report import pages
from skillfast.report.formatting import number_of, points, rounded
from skillfast.report.parts import SEQUENTIAL, Figure, across, base, down, heatmap, in_points, labels
from skillfast.report.trajectory import words

if TYPE_CHECKING:
    from skillfast.results.trajectory import Trajectory


def make_figures(found: Trajectory) -> dict[str, Figure]:
    """Every figure of the page by the id of its place: a row per skill, a column per run."""
    if not found.skills:
        return {}
    x, y = labels(words.names(found)), labels(list(found.skills))
    rows = [skill.runs for skill in found.skills.values()]
    depth = [[rounded(at.depth, 2) for at in row] for row in rows]
    matrices = {
        "drop": (in_points([[at.drop.value for at in row] for row in rows]), "points that the class loses", 100.0),
        "accuracy": (in_points([[at.accuracy.value for at in row] for row in rows]), "accuracy, %", 100.0),
        "depth": (depth, "mean block", max([1.0, *(v for row in depth for v in row if v is not None)])),
    }
    layout = base(xaxis=across(x), yaxis=down(y))
    return {
        name: {
            "data": [
                heatmap(
                    values,
                    x,
                    y,
                    lambda v: "" if v is None else f"{v:.1f}",
                    title,
                    colorscale=SEQUENTIAL,
                    zmin=0,
                    zmax=most,
                    hovertemplate="%{y} in %{x}: %{z}<extra></extra>",
                )
            ],
            "layout": layout,
        }
        for name, (values, title, most) in matrices.items()
    }


def render(found: Trajectory) -> str:
    """Make the page; see `skillfast.report.write_trajectory`."""
    figures, names = make_figures(found), words.names(found)
    return pages.render(
        "trajectory",
        {"figures": figures},
        version=found.skillfast,
        kind="trajectory",
        first=names[0],
        last=names[-1],
        title=words.title(found),
        reasons=found.reasons,
        sentences=words.sentences(found)[len(found.reasons) :],
        columns=words.columns(found),
        rows=words.rows(found),
        figures=figures.keys(),
        height=max(220, 26 * len(found.skills) + 110),
        places=words.places(found),
        margin=points(found.margin),
        runs=[
            [name, run.directory, run.model, run.weights.origin, number_of(run.n_test),
             "" if run.accuracy is None else points(run.accuracy)]
            for name, run in zip(names, found.runs, strict=True)
        ],
    )  # fmt: skip
