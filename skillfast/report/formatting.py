"""How numbers and terms are written, in the page and in the terminal alike."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from skillfast.results.bench import BenchResults, Selectivity
    from skillfast.results.evaluation import EvaluationResults

MINUS = "\N{MINUS SIGN}"
NO_BREAK = "\N{NO-BREAK SPACE}"
UNDEFINED = "not defined"
UNDEFINED_RATIO = f"{UNDEFINED} (denominator is{NO_BREAK}0)"


class Term(NamedTuple):
    """One key of `selectivity`: its unit (`points`, `share`, `bracket`, `ratio`) and what it means in plain words."""

    key: str
    unit: str
    definition: str


TERMS = (
    Term(
        "target_drop",
        "points",
        "Accuracy that a class loses when its own skill is removed, averaged over the classes "
        "(the diagonal of the matrix with its sign turned).",
    ),
    Term(
        "regret",
        "points",
        "How far the accuracy of the other classes stays behind what the oracle leaves them, below 0 where it is "
        "better. Right on average for any number of examples.",
    ),
    Term(
        "gross_loss",
        "points",
        "Share of the other classes' examples that were right and become wrong. Gains are not counted against them.",
    ),
    Term(
        "harm",
        "bracket",
        "What the other classes lose for good, a gain counting as 0: between what is counted in half of the changed "
        "examples for classes that lose in the other half (too little; 0 on average without harm) and what is "
        "seen (too much). The noise floor is what would be seen if every change were chance.",
    ),
    Term("agreement", "share", "Share of the decisions on other classes' examples that are the oracle's."),
    Term("other_change", "points", "Mean change of all other classes. Gains and losses may cancel each other."),
    Term(
        "other_abs_change",
        "points",
        "Mean size of the other classes' changes, whichever their direction; chance makes it larger.",
    ),
    Term(
        "ratio", "ratio", "target_drop divided by the size of other_change. Flattering where gains and losses cancel."
    ),
    Term("strict_ratio", "ratio", "target_drop divided by other_abs_change, which chance makes larger."),
    Term("harm_ratio", "ratio", "target_drop divided by the harm that is seen, which chance makes larger."),
)
UNITS = {term.key: term.unit for term in TERMS}


def finite(value: Any) -> float | None:
    """The value as a float, or None where it is missing, NaN or infinite."""
    if value is None or not math.isfinite(value):
        return None
    return float(value)


def rounded(value: Any, digits: int) -> float | None:
    """The value to so many digits, which is all that a figure shows, or None where it is not defined."""
    found = finite(value)
    return None if found is None else round(found, digits)


def _fixed(value: float, digits: int, signed: bool) -> str:
    text = f"{abs(value):,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        return text
    return f"{MINUS if value < 0 else '+' if signed else ''}{text}"


def points(fraction: float | None, signed: bool = False) -> str:
    """A change of accuracy in percentage points; two decimals below ten points."""
    number = finite(fraction)
    if number is None:
        return UNDEFINED
    return "0" if number == 0 else _fixed(100 * number, 2 if abs(number) < 0.09995 else 1, signed)


def cell(fraction: float | None) -> str:
    """A change of accuracy in percentage points in at most four characters, for a cell of a matrix."""
    number = finite(fraction)
    if number is None:
        return ""
    return _fixed(100 * number, 0 if abs(number) >= 0.0995 or number == 0 else 1, False).replace("0.0", "0")


def percent(fraction: float | None, undefined: str = UNDEFINED) -> str:
    """A share or an accuracy in percent."""
    number = finite(fraction)
    return undefined if number is None else f"{_fixed(100 * number, 1, False)}{NO_BREAK}%"


def _ratio(ratio: float | None) -> str:
    number = finite(ratio)
    return UNDEFINED if number is None else _fixed(number, 1 if abs(number) < 100 else 0, False)


def times(ratio: float | None, undefined: str = UNDEFINED_RATIO) -> str:
    """A ratio as `56.4x`."""
    return undefined if finite(ratio) is None else f"{_ratio(ratio)}\N{MULTIPLICATION SIGN}"


def interval(pair: Sequence[float | None] | None, write: Callable[[float | None], str]) -> str:
    """A 95 % interval as `(low to high)`; empty where there is none."""
    if pair is None or any(finite(end) is None for end in pair):
        return ""
    return f"({write(pair[0])} to {write(pair[1])})"


def term_value(values: Selectivity, key: str, undefined: str = UNDEFINED_RATIO) -> str:
    """One key of an effect, in its unit."""
    if key == "harm":
        ends = points(values.harm.cross_fitted), points(values.harm.plug_in)
        return ends[0] if ends[0] == ends[1] else " to ".join(ends)
    value = getattr(values, key)
    return {"ratio": lambda: times(value, undefined), "share": lambda: percent(value), "points": lambda: points(value)}[
        UNITS[key]
    ]()


def term_interval(values: Selectivity, key: str) -> str:
    """The 95 % interval of one key of an effect, in its unit; of a ratio the lower limit."""
    if key == "harm":
        return interval(values.harm.ci95, points)
    if UNITS[key] == "ratio":
        limit = getattr(values.at_least, key)
        return "" if finite(limit) is None else f"(at least {_ratio(limit)})"
    return interval(getattr(values.ci95, key, None), percent if UNITS[key] == "share" else points)


def number_of(count: float) -> str:
    """A count with thousands separators; one decimal where it is not whole."""
    return f"{count:,.0f}" if float(count).is_integer() else f"{count:,.1f}"


def model_name(results: BenchResults | EvaluationResults) -> str:
    """The model's name as a title has it: of a folder its last two parts."""
    name = str(results.model.name).removeprefix("hf:")
    parts = PurePath(name).parts
    return "/".join(parts[-2:]) if len(parts) > 2 else name


def data_name(results: BenchResults) -> str:
    """What the results were measured on: of text the file, else the dataset's name."""
    file = results.config.get("test_file") or results.config.get("data_file")
    return str(results.dataset.name) if file is None else PurePath(file).name


def size(n_bytes: float | None) -> str:
    """A number of bytes in the unit that suits it."""
    value = finite(n_bytes)
    if value is None:
        return "not measured"
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def plain(value: Any) -> str:
    """Any leaf of the settings as text."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if finite(value) is not None else UNDEFINED
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | dict):
        return ", ".join(plain(item) for item in value) or "none"
    return str(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Rows of nested settings: the way to each leaf, with dots, and the leaf as text."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        rows += flat(value, f"{name}.") if isinstance(value, dict) and value else [(name, plain(value))]
    return rows
