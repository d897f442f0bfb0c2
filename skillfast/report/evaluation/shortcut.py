"""The part of an evaluation's page that says whether a model answers by a heuristic, and through which neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillfast.report.formatting import MINUS, UNDEFINED, finite, interval, number_of, percent, points

if TYPE_CHECKING:
    from skillfast.results.evaluation import FollowingSet, Shortcut, ShortcutRemoval

NAMES = {
    "shortcut_answers": "shortcut answers",
    "right_answers": "right answers",
    "agreeing_accuracy": "accuracy where both agree",
}
FOLLOWS = {"shortcut": "the heuristic", "label": "the label"}


def summary(shortcut: Shortcut) -> list[str]:
    """What was found, in sentences."""
    before, many = shortcut.intact.values, number_of(shortcut.conflicts)
    answers = (
        f"{percent(before['shortcut_answers'])} as the heuristic does and {percent(before['right_answers'])} right"
    )
    more, less = _many(shortcut.follow_shortcut), _many(shortcut.follow_label)
    chosen = f"The column {shortcut.column} is the label on {percent(shortcut.agreement)} of the examples that neurons"
    sentences = [
        f"{chosen} were chosen on.",
        f"On {many} of the test examples it is another class; of these the intact model answers {answers}.",
        f"Beyond chance {more} the heuristic more than the label, and {less} the label more than the heuristic.",
    ]
    largest = [removal for removal in shortcut.removals if removal.follows == "shortcut"][-1:]
    for removal in largest:
        drawn = removal.random.change["shortcut_answers"]
        change, right = (removal.change[name] for name in ("shortcut_answers", "right_answers"))
        sentences.append(
            f"Without {number_of(removal.neurons)} of the first, shortcut answers change by "
            f"{points(change, signed=True)} (p {removal.p['shortcut_answers']:.2g}), right ones by "
            f"{points(right, signed=True)}; without as many random neurons shortcut answers change by "
            f"{points(drawn.low, signed=True)} to {points(drawn.high, signed=True)}."
        )
    return sentences


def _many(found: FollowingSet) -> str:
    return "1 neuron follows" if found.neurons == 1 else f"{number_of(found.neurons)} neurons follow"


def rows(shortcut: Shortcut) -> list[list[str]]:
    """Each removal: whose neurons, how many, and each measure with its change and its random control's."""
    return [
        [
            FOLLOWS[removal.follows],
            f"{percent(removal.share)} ({number_of(removal.neurons)})",
            *(_cell(removal, measure) for measure in NAMES),
        ]
        for removal in shortcut.removals
    ]


def _cell(removal: ShortcutRemoval, measure: str) -> str:
    def change(value: float | None) -> str:
        return points(value, signed=True)

    own = f"{percent(removal.values[measure])}, {change(removal.change[measure])}"
    bounds = interval(removal.change_ci95[measure], change)
    return f"{own} {bounds}; random {change(removal.random.change[measure].mean)}".replace(" ;", ";")


def context(shortcut: Shortcut) -> dict[str, Any]:
    """What the template needs."""
    return {
        "say": summary(shortcut),
        "columns": ["neurons that follow", "of all neurons", *NAMES.values()],
        "rows": rows(shortcut),
        "measured": [(NAMES[name], meaning) for name, meaning in shortcut.measured.items()],
        "neurons": [
            (f"{one.site}, neuron {one.neuron}", FOLLOWS[follows], _r(one.heuristic), _r(one.label))
            for follows, found in (("shortcut", shortcut.follow_shortcut), ("label", shortcut.follow_label))
            for one in found.best
        ],
        "moved": [
            (
                str(one.example),
                " / ".join(text for text in (one.text, one.pair) if text is not None) or "not text",
                one.label,
                one.heuristic,
                one.before,
                one.after,
                f"{one.margin_before:+.3g} to {one.margin_after:+.3g}".replace("-", MINUS),
            )
            for one in shortcut.moved
        ],
    }


def _r(value: float | None) -> str:
    return UNDEFINED if finite(value) is None else f"{value:.2f}"
