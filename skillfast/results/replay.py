"""What differs between a run and its replay, value by value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skillfast.results.records import to_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from skillfast.results.bench import BenchResults
    from skillfast.results.skills import Skills

ABSOLUTE, RELATIVE = 1e-6, 1e-4  # numbers are equal that differ by at most the sum: float32 in another order
APART = ("environment", "config", "cost")  # of results.json: where it ran and what it took; settings are checked before
ABSENT = "absent"


@dataclass(frozen=True)
class Difference:
    """A value that a replay did not give again.

    Attributes:
        field: The way to it, such as `results.json: selectivity.ci95.regret[0]`.
        earlier: In the earlier run.
        again: In its replay.
    """

    field: str
    earlier: Any
    again: Any

    @property
    def size(self) -> float | None:
        """How far two numbers are apart; None of anything else."""
        numbers = _is_number(self.earlier) and _is_number(self.again)
        return abs(self.again - self.earlier) if numbers else None


@dataclass(frozen=True)
class Replay:
    """What a replay gave again and what not.

    Attributes:
        directory: Folder of the earlier run.
        n: How many values were compared: all of results.json but cost, settings and environment, and each skill.
        differences: Values and skills that differ; empty where all were given again.
        environment: What the two ran on, where it differs.
    """

    directory: str
    n: int
    differences: tuple[Difference, ...]
    environment: tuple[Difference, ...]

    @property
    def exit_code(self) -> int:
        """What the command exits with: 0 of a replay that is equal, 3 of one that is not."""
        return 3 if self.differences else 0


def replayed(directory: str, earlier: tuple[BenchResults, Skills], again: tuple[BenchResults, Skills]) -> Replay:
    """Compare what two runs found.

    Args:
        directory: Folder of the earlier run.
        earlier: What its results.json and skills.json hold.
        again: What those of its replay hold.
    """
    values = [dict(_leaves(_compared(results), "")) for results, _ in (earlier, again)]
    found = _differing("results.json: ", *values)
    chosen = [
        {skill.name: {(site, i) for site, index in skill.neurons.items() for i in index} for skill in skills.skills}
        for _, skills in (earlier, again)
    ]
    for name, neurons in chosen[0].items():
        others = chosen[1].get(name, set())
        if others != neurons:
            now = f"{len(neurons & others)} of these and {len(others - neurons)} others"
            found.append(Difference(f"skills.json: {name}", f"{len(neurons)} neurons", now))
    ran = [dict(_leaves(to_json(results.environment), "")) for results, _ in (earlier, again)]
    n = len({*values[0], *values[1]}) + len(chosen[0])
    return Replay(directory, n, tuple(found), tuple(_differing("", *ran)))


def _compared(results: BenchResults) -> dict[str, Any]:
    return {name: value for name, value in to_json(results).items() if name not in APART}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every leaf and the way to it; what is empty is a leaf, too."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value:
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{i}]")
    else:
        yield path, value


def _differing(where: str, earlier: dict[str, Any], again: dict[str, Any]) -> list[Difference]:
    pairs = ((name, earlier.get(name, ABSENT), again.get(name, ABSENT)) for name in {**earlier, **again})
    return [Difference(f"{where}{name}", one, other) for name, one, other in pairs if not _equal(one, other)]


def _equal(one: Any, other: Any) -> bool:
    if _is_number(one) and _is_number(other):
        return abs(one - other) <= ABSOLUTE + RELATIVE * max(abs(one), abs(other))
    return bool(one == other)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
