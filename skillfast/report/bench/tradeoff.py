"""The trade-off: what each method and size removes, and what that costs the other classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillfast.report.formatting import finite, percent, plain, points, term_value
from skillfast.report.parts import Figure, amounts, base, colour

if TYPE_CHECKING:
    from skillfast.results.bench import BenchResults, CandidateEffect, Effect, SelectionResult

NAMES = {
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "auroc": "AUROC",
    "mutual_info": "mutual information",
    "attribution": "attribution",
    "mask": "learned mask",
}
HUES = ("--random", "--other", "--oracle", "--mlp", "--skill", "--head", "--attn")
PARTS = (("validation", "circle-open", "dot"), ("test", "circle", "solid"))


def name_of(candidate: CandidateEffect) -> str:
    """A candidate's method in words."""
    name = NAMES.get(candidate.method, candidate.method)
    if candidate.keep is not None:
        name = f"{name} (others x {candidate.keep:g})"
    return f"contrastive {name}" if candidate.contrastive else name


def method_of(results: BenchResults) -> str:
    """How a run's skills were chosen, in words."""
    found = results.selection
    if found is None:
        method = plain(results.config["method"])
        return NAMES.get(method, method)
    return name_of(found.candidates[found.chosen])


def trade_off(results: BenchResults) -> Figure:
    """Harm to others against the target's drop, in percentage points: a line per method, a point per size."""
    assert results.selection is not None
    tried = results.selection.candidates
    lines = list(dict.fromkeys(name_of(candidate) for candidate in tried))
    data = []
    for i, line in enumerate(lines):
        for part, symbol, dash in PARTS:
            found = [c for c in tried if name_of(c) == line]
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": line,
                    "legendgroup": line,
                    "showlegend": part == "test",
                    "x": [_points(_on(c, part).other_harm) for c in found],
                    "y": [_points(_on(c, part).target_drop) for c in found],
                    "text": [f"{percent(c.share)} of all neurons, {part} examples" for c in found],
                    "line": {"color": colour(HUES[i % len(HUES)]), "width": 1.5, "dash": dash},
                    "marker": {"symbol": symbol, "size": 8, "color": colour(HUES[i % len(HUES)])},
                    **({} if part == "validation" else _whiskers(found)),
                    "hovertemplate": "%{text}<br>loses %{y:.1f}, harms others by %{x:.2f} points"
                    "<extra>%{fullData.name}</extra>",
                }
            )
    layout = base(
        xaxis=amounts("harm to each other class, points", rangemode="tozero"),
        yaxis=amounts("the removed class loses, points", rangemode="tozero"),
    )
    return {"data": data, "layout": layout}


def _on(candidate: CandidateEffect, part: str) -> Effect:
    return candidate.validation if part == "validation" else candidate.test


def _whiskers(found: list[CandidateEffect]) -> dict[str, Any]:
    """95 % intervals of the test part, on both axes."""

    def along(key: str) -> dict[str, Any]:
        values = [getattr(c.test, key) for c in found]
        ends = [getattr(c.test.ci95, key) or [value] * 2 for c, value in zip(found, values, strict=True)]
        return {
            "type": "data",
            "symmetric": False,
            "array": [_points(high - value) for (_, high), value in zip(ends, values, strict=True)],
            "arrayminus": [_points(value - low) for (low, _), value in zip(ends, values, strict=True)],
            "thickness": 1,
            "width": 2,
        }

    return {"error_x": along("other_harm"), "error_y": along("target_drop")}


def say(results: BenchResults) -> list[str]:
    """What was chosen, and how far the test part is from the validation part, in sentences."""
    found = results.selection
    assert found is not None
    chosen = found.candidates[found.chosen]
    gap, seen, validation = found.gap, chosen.validation, results.dataset.n_validate
    many = len(found.candidates)
    first = (
        f"Of {many} combinations of method and size, {name_of(chosen)} with {percent(chosen.share)} of all neurons "
        f"was chosen on the {validation:,} validation examples, before any test example was looked at."
        if many > 1
        else f"The method was given: {name_of(chosen)} with {percent(chosen.share)} of all neurons."
    )
    loss, harm = (points(gap[key], signed=True) for key in ("target_drop", "other_harm"))
    second = (
        f"On the validation examples it costs the removed class {points(seen.target_drop)} points and harms "
        f"each other class by {points(seen.other_harm)}; on the test examples the loss differs by {loss} and the "
        f"harm by {harm} points."
    )
    return [first, second, *_published(found)]


def _published(found: SelectionResult) -> list[str]:
    """Whether the published page's point was reached, and at what harm; nothing for one combination."""
    if len(found.candidates) == 1:
        return []
    page = "The published page's point, a loss of 9.4 points at 56.4 times the mean change of the others,"
    if found.published is None:
        return [f"{page} was reached by no combination on the validation part."]
    reached = found.candidates[found.published]
    test = reached.test
    values = ", ".join(
        f"{words} {term_value(test, key, 'not defined')}"
        for words, key in (("a loss of (points)", "target_drop"), ("ratio", "ratio"), ("harm ratio", "harm_ratio"))
    )
    text = (
        f"{page} was reached on the validation part, with the least harm, by {name_of(reached)} with "
        f"{percent(reached.share)} of all neurons. On the test part: {values}. In that mean, harm to one class "
        "cancels what another gains; the harm ratio lets nothing cancel."
    )
    return [text]


def rows(results: BenchResults) -> list[list[str]]:
    """Per candidate: method, size, and on either part the drop, the harm and their ratio."""
    keys = ("target_drop", "other_harm", "harm_ratio")
    found = results.selection
    assert found is not None
    return [
        [
            name_of(c) + (" (chosen)" if i == found.chosen else ""),
            percent(c.share),
            *(term_value(_on(c, part), key, "no harm") for part, _, _ in PARTS for key in keys),
        ]
        for i, c in enumerate(found.candidates)
    ]


def _points(fraction: Any) -> float | None:
    value = finite(fraction)
    return None if value is None else round(100 * value, 4)
