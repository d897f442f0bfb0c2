"""Words and a table on whether skills are the classes' own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skillfast.report.formatting import finite, number_of, percent, points

if TYPE_CHECKING:
    from skillfast.results.bench import BenchResults, ClassIdentifiability, Identifiability


def why(values: ClassIdentifiability, found: Identifiability) -> str:
    """Why a class is flagged, in words; empty where it is not."""
    control, overlap, seeds = finite(values.control), finite(values.overlap), finite(values.seed_overlap)
    reasons = [
        text
        for text, applies in (
            (f"control above {percent(found.control_limit)}", control is not None and control > found.control_limit),
            (
                f"halves share less than {percent(found.overlap_limit)}",
                overlap is not None and overlap < found.overlap_limit,
            ),
            (
                f"seeds share less than {percent(found.overlap_limit)}",
                seeds is not None and seeds < found.overlap_limit,
            ),
        )
        if applies
    ]
    return ", ".join(reasons)


def say(results: BenchResults) -> list[str]:
    """What the controls show, in sentences."""
    found = results.identifiability
    assert found is not None
    flagged = [name for name, values in found.per_class.items() if values.flagged]
    relearned = sum(values.seed_overlap is not None for values in found.per_class.values())
    seeds = (
        f" Masks that are learned from two seeds share {percent(found.seed_overlap)} (chance: "
        f"{percent(found.chance_seed_overlap)}; {relearned} of {len(found.per_class)} classes)."
    )
    return [
        (
            f"Neurons chosen for a class cost it {points(found.drop)} points more than other examples; chosen in the "
            f"same way for arbitrary groups of as many examples, {points(found.control)}."
        ),
        (
            f"Two halves of a class's examples choose sets that share {percent(found.overlap)} (chance: "
            f"{percent(found.chance_overlap)}). A second set, as large as the skill and of other neurons, costs the "
            f"class {points(found.second_drop)} points of the test examples.{seeds if relearned else ''}"
        ),
        f"Flagged: {', '.join(flagged)}." if flagged else "No class is flagged.",
    ]


def rows(results: BenchResults) -> list[tuple[str, ...]]:
    """The mean, then each class: drop, control, overlap, chance, second set's drop, seeds' overlap, flag with why."""
    found = results.identifiability
    assert found is not None

    def row(name: str, values: ClassIdentifiability | Identifiability, flag: str) -> tuple[str, ...]:
        return (
            name,
            points(values.drop),
            points(values.control),
            percent(values.overlap),
            percent(values.chance_overlap),
            points(values.second_drop),
            percent(values.seed_overlap, "not learned again"),
            flag,
        )

    flags = sum(values.flagged for values in found.per_class.values())
    mean = row("mean", found, f"{number_of(flags)} of {number_of(len(found.per_class))}")
    return [mean, *(row(name, values, why(values, found)) for name, values in found.per_class.items())]
