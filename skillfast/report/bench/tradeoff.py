"""The trade-off: what each method and size removes, and what that costs the other classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillfast.report.formatting import UNDEFINED, finite, percent, plain, points, term_value
from skillfast.report.parts import Figure, amounts, base, colour

if TYPE_CHECKING:
    from skillfast.results.bench import BenchResults, CandidateEffect, Selectivity

NAMES = {
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "auroc": "AUROC",
    "mutual_info": "mutual information",
    "attribution": "attribution",
    "mask": "learned mask",
    "erase": "erasing mask",
}
HUES = ("--mlp", "--attn", "--head", "--skill", "--oracle", "--other", "--random")
SYMBOLS = ("circle", "square", "diamond", "triangle-up")  # told apart without colours, too
PARTS = (("validation", "-open", "dot"), ("test", "", "solid"))


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
    names = dict.fromkeys(name_of(found.candidates[i]) for i in found.chosen)
    return f"{' or '.join(names)}, by class" if len(names) > 1 else next(iter(names))


def _chosen(results: BenchResults) -> str:
    """What was chosen, with its size, in words."""
    found = results.selection
    assert found is not None
    classes: dict[int, list[str]] = {}
    for i, name in zip(found.chosen, results.dataset.classes, strict=True):
        classes.setdefault(i, []).append(name)

    def sized(i: int) -> str:
        return f"{name_of(found.candidates[i])} with {percent(found.candidates[i].share)} of all neurons"

    if len(classes) == 1:
        return sized(found.chosen[0])
    return "; ".join(f"{sized(i)} for {', '.join(names)}" for i, names in classes.items())


def trade_off(results: BenchResults) -> Figure:
    """Regret of the others against the target's drop, in percentage points: a line per method, a point per size.

    Candidates whose cost to others was not measured have no point.
    """
    assert results.selection is not None
    tried = [candidate for candidate in results.selection.candidates if candidate.validation]
    lines = list(dict.fromkeys(name_of(candidate) for candidate in tried))
    data = []
    for i, line in enumerate(lines):
        for part, filled, dash in PARTS:
            found = [(c, effect) for c in tried if name_of(c) == line and (effect := _on(c, part))]
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": line,
                    "legendgroup": line,
                    "showlegend": part == "test",
                    "x": [_points(effect.regret) for _, effect in found],
                    "y": [_points(effect.target_drop) for _, effect in found],
                    "text": [f"{percent(c.share)} of all neurons, {part} examples" for c, _ in found],
                    "line": {"color": colour(HUES[i % len(HUES)]), "width": 1.5, "dash": dash},
                    "marker": {
                        "symbol": SYMBOLS[i % len(SYMBOLS)] + filled,
                        "size": 8,
                        "color": colour(HUES[i % len(HUES)]),
                    },
                    **({} if part == "validation" else _whiskers([effect for _, effect in found])),
                    "hovertemplate": "%{text}<br>loses %{y:.1f}, regret of the others %{x:.2f} points"
                    "<extra>%{fullData.name}</extra>",
                }
            )
    layout = base(
        xaxis=amounts("regret of each other class, points", rangemode="tozero"),
        yaxis=amounts("the removed class loses, points", rangemode="tozero"),
        meta={"told": say(results)[-1]},
    )
    return {"data": data, "layout": layout}


def _on(candidate: CandidateEffect, part: str) -> Selectivity | None:
    return candidate.validation if part == "validation" else candidate.test


def _whiskers(found: list[Selectivity]) -> dict[str, Any]:
    """95 % intervals of the test part, on both axes."""

    def along(key: str) -> dict[str, Any]:
        values = [getattr(effect, key) for effect in found]
        ends = [getattr(effect.ci95, key) or [value] * 2 for effect, value in zip(found, values, strict=True)]
        return {
            "type": "data",
            "symmetric": False,
            "array": [_points(high - value) for (_, high), value in zip(ends, values, strict=True)],
            "arrayminus": [_points(value - low) for (low, _), value in zip(ends, values, strict=True)],
            "thickness": 1,
            "width": 2,
        }

    return {"error_x": along("regret"), "error_y": along("target_drop")}


def say(results: BenchResults) -> list[str]:
    """What was chosen, and how far the test part is from the validation part, in sentences."""
    found = results.selection
    assert found is not None
    gap, seen, validation = found.gap, found.validation, results.dataset.n_validate
    many, seen_whole = len(found.candidates), sum(c.validation is not None for c in found.candidates)
    weak = (
        f" {many - seen_whole} that took less than half as much as the best were not measured on other classes."
        if seen_whole < many
        else ""
    )
    first = (
        f"Of {many} combinations of method and size, {_chosen(results)} was chosen on the {validation:,} validation "
        "examples, before any test example was looked at: the most loss whose regret is, at the upper end of its "
        f"interval, at most {points(found.margin)} points above that of as many random neurons.{weak}"
        if many > 1
        else f"The method was given: {_chosen(results)}."
    )
    loss, regret = (points(change, signed=True) for change in (gap.target_drop, gap.regret))
    second = (
        f"On the validation examples it costs the removed class {points(seen.target_drop)} points at a regret of "
        f"{points(seen.regret)}; on the test examples the loss differs by {loss} and the regret by {regret} points."
    )
    return [first, second]


def rows(results: BenchResults) -> list[list[str]]:
    """Per candidate: method, size, and on either part the drop, the regret and the gross loss; then the limit."""
    keys = ("target_drop", "regret", "gross_loss")
    found = results.selection
    assert found is not None

    def on(candidate: CandidateEffect, part: str) -> list[str]:
        if effect := _on(candidate, part):
            return [term_value(effect, key) for key in keys]
        return [points(candidate.drop) if part == "validation" else UNDEFINED, *[UNDEFINED] * (len(keys) - 1)]

    def most(candidate: CandidateEffect) -> str:
        ends = candidate.validation and candidate.validation.ci95.regret
        return points(ends[1]) if ends else UNDEFINED

    return [
        [
            name_of(c) + (" (chosen)" if i in found.chosen else ""),
            percent(c.share),
            *(value for part, _, _ in PARTS for value in on(c, part)),
            most(c),
            UNDEFINED if c.limit is None else points(c.limit),
        ]
        for i, c in enumerate(found.candidates)
    ]


def _points(fraction: Any) -> float | None:
    value = finite(fraction)
    return None if value is None else round(100 * value, 4)
