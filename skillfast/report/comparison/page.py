"""The page of a comparison: tiles, tables and figures from `compare.json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillfast.report import pages
from skillfast.report.comparison import words
from skillfast.report.formatting import finite, number_of, percent, points
from skillfast.report.parts import Figure, amounts, base, colour, down, labels

if TYPE_CHECKING:
    from skillfast.results.comparison import Comparison, PairedChange

MOST = 60  # classes that a figure shows; the table has all


def _dumbbells(found: Comparison, of: str, unit: str) -> Figure:
    """A row per class: BASE's value and NEW's, and the line between them."""
    shown = [(name, getattr(skill, of)) for name, skill in found.skills.items()]
    shown = [(name, pair) for name, pair in shown if pair is not None][:MOST]
    names = labels([name for name, _ in shown])
    pairs: list[PairedChange] = [pair for _, pair in shown]
    base_values, new_values = ([_in_percent(getattr(pair, side)) for pair in pairs] for side in ("base", "new"))
    lines: dict[str, list[Any]] = {"x": [], "y": []}
    for name, one, other in zip(names, base_values, new_values, strict=True):
        lines["x"] += [one, other, None]
        lines["y"] += [name, name, None]
    points_of = {
        "type": "scatter",
        "mode": "markers",
        "y": names,
        "hovertemplate": "%{y}: %{x:.1f}<extra>%{fullData.name}</extra>",
    }
    data = [
        {"type": "scatter", "mode": "lines", **lines, "line": {"color": colour("--faint"), "width": 2},
         "hoverinfo": "skip", "showlegend": False},
        points_of | {"name": "BASE", "x": base_values,
                     "marker": {"color": colour("--muted"), "size": 10, "symbol": "circle-open", "line": {"width": 2}}},
        points_of | {"name": "NEW", "x": new_values, "marker": {"color": colour("--skill"), "size": 9}},
    ]  # fmt: skip
    ends = [value for value in base_values + new_values if value is not None]
    told = {
        "told": _told(
            [(name, one, other) for (name, _), one, other in zip(shown, base_values, new_values, strict=True)]
        )
    }
    reach = [min([0.0, *ends]) - 4, max([100.0, *ends]) + 4]
    return {"data": data, "layout": base(xaxis=amounts(unit, range=reach), yaxis=down(names), meta=told)}


def _told(rows: list[tuple[str, float | None, float | None]]) -> str:
    """Which value falls most from BASE to NEW, and which rises most."""
    known = [(new - base, name, base, new) for name, base, new in rows if base is not None and new is not None]
    ends = (("falls", min(known, default=None)), ("rises", max(known, default=None)))
    said = [
        f"{end[1]} {verb} most, from {end[2]:.1f} to {end[3]:.1f}"
        for verb, end in ends
        if end is not None and (end[0] < 0 if verb == "falls" else end[0] > 0)
    ]
    return "; ".join(said) or "no class changes"


def _in_percent(value: float) -> float | None:
    number = finite(value)
    return None if number is None else round(100 * number, 4)


def make_figures(found: Comparison) -> dict[str, Figure]:
    """Every figure of the page by the id of its place."""
    if not found.skills:
        return {}
    return {
        "accuracy": _dumbbells(found, "accuracy", "accuracy, %"),
        "drop": _dumbbells(found, "drop", "points that the class loses"),
    }


def _tiles(found: Comparison) -> list[tuple[str, str, str]]:
    """Name, value and what stands below it."""
    overall = found.overall
    if overall is None:
        return []
    worse = [name for name, skill in found.skills.items() if set(skill.verdicts) & {"lost", "weakened", "merged"}]
    quiet = [name for name in worse if "weakened in its neurons" in words.verdict(found.skills[name])]
    below = f"of {number_of(len(found.skills))} classes"
    if quiet:
        below += f"; {number_of(len(quiet))} more in their neurons alone"
    made = [
        ("accuracy", words.from_to(overall.accuracy), f"change {words.change(overall.accuracy)} points"),
        ("lost, weakened or merged", number_of(len(worse) - len(quiet)), below),
        ("drop by a class's own skill", f"{words.from_to(overall.drop, points)}", "points, mean of the classes"),
    ]
    if overall.kl is not None:
        made.append(("divergence", f"{overall.kl.mean:.3f}", "nats from BASE's probabilities to NEW's"))
    return made


def _neurons(found: Comparison) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Skill, verdict, and (which, neurons by site) of each skill with a finding."""
    made = []
    for name, skill in found.skills.items():
        if skill.verdicts[0] in ("unchanged", "undecided") or skill.kept is None:
            continue
        sets = (("in both", skill.kept), ("BASE's alone", skill.left), ("NEW's alone", skill.taken))
        rows = [
            (which, "; ".join(f"{site}: {', '.join(map(str, index))}" for site, index in (of or {}).items()) or "none")
            for which, of in sets
        ]
        made.append((name, words.verdict(skill), rows))
    return made


def _places(found: Comparison) -> list[list[str]]:
    """Skill, shares of kinds, shares of blocks, BASE's and NEW's."""
    return [
        [
            name,
            *(
                ""
                if shares is None
                else ", ".join(f"{place} {words.from_to(share)}" for place, share in shares.items())
                for shares in (skill.kinds, skill.blocks)
            ),
        ]
        for name, skill in found.skills.items()
    ]


def _runs(found: Comparison) -> list[tuple[str, str, str]]:
    one, other = found.base, found.new
    return [
        ("folder", one.directory, other.directory),
        ("model", one.model, other.model),
        ("weights from", one.weights.origin, other.weights.origin),
        ("SHA-256 of the weights", one.weights.sha256, other.weights.sha256),
        ("architecture", one.fingerprint, other.fingerprint),
        ("data", one.dataset, other.dataset),
        ("test examples", number_of(one.n_test), number_of(other.n_test)),
        ("SHA-256 of the test examples", one.data.examples, other.data.examples),
        ("SHA-256 of their labels", one.data.labels, other.data.labels),
    ]


def render(found: Comparison) -> str:
    """Make the page; see `skillfast.report.write_comparison`."""
    figures = make_figures(found)
    gate = found.gate
    return pages.render(
        "comparison",
        {"figures": figures},
        version=found.skillfast,
        kind="comparison",
        found=found,
        base_name=words.run_name(found.base),
        new_name=words.run_name(found.new),
        title=words.title(found),
        sentences=words.sentences(found),
        tiles=_tiles(found),
        exchanged_columns=words.EXCHANGED,
        exchanged=words.exchanged(found),
        columns=words.COLUMNS,
        rows=words.rows(found),
        figures=figures.keys(),
        height=max(220, 26 * min(len(found.skills), MOST) + 90),
        gate_says=None if gate is None else words.gate_says(found),
        checks=[] if gate is None else [words.check_row(check) for check in gate.checks],
        interference=[
            [each.removed, each.harmed, points(-each.base), points(-each.new), words.p_value(each.q)]
            for each in found.interference
        ],
        places=_places(found),
        neurons=_neurons(found),
        runs=_runs(found),
        meanings=words.MEANINGS,
        margin=percent(found.margin),
    )
