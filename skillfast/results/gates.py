"""`gates.toml`: thresholds that decide whether a new model is good enough."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta, structs

from skillfast.errors import ArgumentError, DataError
from skillfast.results.records import Fraction, Record, from_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

EVERY = "*"
_REMEDY = "see docs/gate.md"


class SkillGate(Record, frozen=True):
    """Thresholds of a class and its skill; one that is left out is not checked.

    Attributes:
        min_accuracy: Accuracy that NEW has on the class, at least.
        max_weakening: Accuracy that it lost since BASE, at most.
        max_relative_weakening: What it lost as a share of BASE's, at most.
        min_drop: What the class loses without NEW's skill, at least.
        max_drop_loss: What its skill takes less than BASE's took, at most.
        max_harm: What other classes lose net by its removal, on average, at most.
    """

    min_accuracy: Fraction | None = None
    max_weakening: Fraction | None = None
    max_relative_weakening: Fraction | None = None
    min_drop: Fraction | None = None
    max_drop_loss: Fraction | None = None
    max_harm: Fraction | None = None


class OverallGate(SkillGate, frozen=True):
    """Thresholds of the whole model: means over the classes.

    Attributes:
        max_kl: Mean Kullback-Leibler divergence from BASE's probabilities, in nats, at most.
    """

    max_kl: Annotated[float, Meta(ge=0)] | None = None


class Gates(Record, frozen=True):
    """A gate.

    Attributes:
        skill: Class, or `*` for all others -> thresholds.
        overall: Thresholds of the whole model.
    """

    skill: dict[str, SkillGate] = {}  # noqa: RUF012 (msgspec copies it)
    overall: OverallGate = OverallGate()

    def thresholds(self, classes: Sequence[str]) -> list[tuple[str | None, str, float]]:
        """Every check: class or None, its name, its limit; those of `*` hold where a class has none of that name.

        Raises:
            ArgumentError: A class that the runs do not have, or a gate that checks nothing.
        """
        unknown = [name for name in self.skill if name != EVERY and name not in classes]
        if unknown:
            raise ArgumentError(
                f"gate: expected skills among {', '.join(classes)}, got {unknown[0]!r}; correct its name"
            )
        found: list[tuple[str | None, str, float]] = []
        for name in classes:
            wanted = _set(self.skill.get(EVERY)) | _set(self.skill.get(name))
            found += [(name, check, limit) for check, limit in wanted.items()]
        found += [(None, check, limit) for check, limit in _set(self.overall).items()]
        if not found:
            raise ArgumentError(
                'gate: expected at least one threshold, got none; for example [skill."*"] max_weakening'
            )
        return found


def _set(gate: SkillGate | None) -> dict[str, float]:
    return {} if gate is None else {name: limit for name, limit in structs.asdict(gate).items() if limit is not None}


def gates_of(value: Mapping[str, Any], what: str = "gate") -> Gates:
    """Make a gate of nested dicts, `{"skill": {"*": {"max_weakening": 0.05}}}`.

    Args:
        value: As `gates.toml` holds it.
        what: Name of the file, for errors.

    Raises:
        ArgumentError: A key that is not known, or a value of another type or out of its range.
    """
    try:
        tables = value.get("skill", {})
        for name, table in tables.items() if isinstance(tables, dict) else ():
            from_json(SkillGate, table, f"{what} [skill.{name}]", _REMEDY)  # which one is wrong is told
        return from_json(Gates, value, what, _REMEDY)
    except DataError as error:
        raise ArgumentError(str(error)) from error


def read_gates(path: Path) -> Gates:
    """Read `gates.toml`; raises ArgumentError where it is missing, is no TOML or holds what is not known."""
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(
            f"gate: expected a file that can be read, got {path} ({error.strerror}); check its path"
        ) from error
    except (ValueError, RecursionError) as error:  # of its encoding, and of brackets that are nested too deeply, too
        raise ArgumentError(f"gate: expected TOML, got {path} ({error}); correct it") from error
    return gates_of(value, str(path))
