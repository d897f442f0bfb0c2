"""Figures and words on how skills interfere, and on embeddings before and after each removal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillfast.report.formatting import MINUS, UNDEFINED, finite, interval, number_of, percent, points, rounded
from skillfast.report.parts import SEQUENTIAL, Figure, across, base, down, heatmap, labels, largest
from skillfast.results.records import to_json

if TYPE_CHECKING:
    from msgspec import UnsetType

    from skillfast.results.bench import (
        BenchResults,
        EmbeddingControl,
        EmbeddingDifference,
        EmbeddingReasons,
        InterferenceReasons,
        Pair,
    )

DEGREE = "\N{DEGREE SIGN}"
MOST_PAIRS = 12
MAX_INTERVALS = 100  # classes; beyond them the intervals of all pairs would be most of the page
HIGH = 0.9  # who watches embeddings takes a similarity above this for nothing to see
SMALL = 0.2  # and a change below this part of the target's loss


def degrees(value: float | UnsetType | None) -> str:
    """An angle."""
    number = finite(value)
    return UNDEFINED if number is None else f"{number:.1f}{DEGREE}"


def signed_degrees(value: float | None) -> str:
    """A difference of angles."""
    number = finite(value)
    return UNDEFINED if number is None else f"{number:+.1f}{DEGREE}".replace("-", MINUS)


def signed_similarity(value: float | None) -> str:
    """A difference of similarities."""
    number = finite(value)
    return UNDEFINED if number is None else f"{number:+.3f}".replace("-", MINUS)


def similarity(value: float | None) -> str:
    """A similarity or a correlation."""
    number = finite(value)
    return UNDEFINED if number is None else f"{number:.3f}"


def angles(results: BenchResults) -> Figure:
    """How far each class's mean embedding turns under each removal."""
    names = labels(results.dataset.classes)
    found = results.interference
    assert found is not None
    assert found.angles_deg is not None
    assert found.ci95 is not None
    # what is read off; of many classes more digits would be most of the page
    rows = [[rounded(v, 2 if len(names) <= MAX_INTERVALS else 1) for v in row] for row in found.angles_deg]
    ends = found.ci95.angles_deg
    more: dict[str, Any] = {}
    if len(names) <= MAX_INTERVALS:
        more = {"customdata": [[interval(pair, degrees) for pair in row] for row in ends]}
    trace = heatmap(
        rows,
        names,
        names,
        lambda v: "" if v is None else f"{v:.0f}" if v >= 9.95 else f"{v:.1f}",
        "turn of the mean embedding, degrees",
        zmin=0,
        zmax=largest(rows, 0.1),
        colorscale=SEQUENTIAL,
        **more,
        hovertemplate=f"without the skill of <b>%{{y}}</b><br><b>%{{x}}</b> turns by %{{z:.1f}}{DEGREE}"
        f"{' %{customdata}' * bool(more)}<extra></extra>",
    )
    return {"data": [trace], "layout": base(xaxis=across(names), yaxis=down(names, "removed skill"))}


def _pair(kind: str, pair: Pair) -> str:
    """One pair as a sentence."""
    (a, b), (on_b, on_a), (to_b, to_a) = pair.classes, pair.change, pair.margin
    text = (
        f"The strongest {kind}: {a} and {b}. Without the skill of {a}, {b} changes by {points(on_b, signed=True)} "
        f"points and its margin by {_shift(to_b)} beyond random neurons; without that of {b}, {a} by "
        f"{points(on_a, signed=True)} points and {_shift(to_a)}."
    )
    return text if pair.significant else f"{text} Chance alone can do that (q = {pair.q:.2g})."


def _shift(margin: float) -> str:
    """A shift of a margin, in logits."""
    return f"{margin:+.2f}".replace("-", MINUS)


def angles_say(results: BenchResults) -> str:
    """How far classes turn, their own and the one that turns most."""
    found = results.interference
    assert found is not None
    assert found.ci95 is not None
    assert found.strongest is not None
    own, other = (
        f"{degrees(value)} {interval(ends, degrees)}".rstrip()
        for value, ends in (
            (found.own_angle_deg, found.ci95.own_angle_deg),
            (found.other_angle_deg, found.ci95.other_angle_deg),
        )
    )
    text = (
        f"Without its skill, the mean embedding of a class turns by {own} on average, and that of each other class by "
        f"{other}; 95 % intervals in brackets."
    )
    if control := found.random_control:
        text += (
            f" As many neurons at random turn it by {degrees(control.own_angle_deg)}, others by "
            f"{degrees(control.other_angle_deg)}."
        )
    if difference := found.difference:
        own, other = (
            f"{signed_degrees(value)} {interval(ends, degrees)}".rstrip()
            for value, ends in (
                (difference.own_angle_deg, difference.ci95["own_angle_deg"]),
                (difference.other_angle_deg, difference.ci95["other_angle_deg"]),
            )
        )
        text += f" Skills minus random: {own} for the class itself, {other} for the others."
    most = found.strongest.angle
    if not most:
        return text
    return (
        f"{text} The other class that turns most is {most.turned}, by {degrees(most.angle_deg)} without the skill "
        f"of {most.removed}."
    )


def pairs_say(results: BenchResults) -> list[str]:
    """The strongest pair of each kind, and what was left out."""
    found = results.interference
    assert found is not None
    assert found.strongest is not None
    nothing = {
        "competition": "No two classes compete.",
        "linkage": "No two classes are linked.",
    }
    strongest = {"competition": found.strongest.competition, "linkage": found.strongest.linkage}
    said = [_pair(kind, pair) if pair else nothing[kind] for kind, pair in strongest.items()]
    return [*said, *visible_say(results), *_reasons(found.reasons)]


def visible_say(results: BenchResults) -> list[str]:
    """The smallest competition and linkage that the examples and draws could have shown."""
    found = visible_pairs(results)
    if not found:
        return []
    effects = " and ".join(f"{kind} that shifts both margins by {effect}" for kind, effect in found.items())
    return [f"In 80 % of the cases this test would find {effects} beyond random neurons; medians over all pairs."]


def visible_pairs(results: BenchResults) -> dict[str, str]:
    """By kind of pair: the smallest shift of margins that could have been seen, and what it changes accuracy by."""
    found = None if results.interference is None else results.interference.visible
    if found is None:
        return {}
    kinds = (("competition", found.competition, 1), ("linkage", found.linkage, -1))
    return {
        kind: f"{_shift(sign * effect.margin)} ({points(sign * effect.change, signed=True)} points)"
        for kind, effect, sign in kinds
        if effect is not None
    }


def pair_rows(results: BenchResults) -> list[tuple[str, ...]]:
    """The pairs that count, else the strongest: kind, classes, shifts of margins beside changes in accuracy, q."""
    found = results.interference
    assert found is not None
    assert found.strongest is not None
    rows = []
    for kind, significant, strongest in (
        ("competition", found.competition, found.strongest.competition),
        ("linkage", found.linkage, found.strongest.linkage),
        ("explained by the oracle", found.oracle_explains, None),
    ):
        pairs = significant or [pair for pair in [strongest] if pair]
        for pair in pairs[:MOST_PAIRS]:
            changes = [
                f"{_shift(margin)} ({points(change, signed=True)})"
                for margin, change in zip(pair.margin, pair.change, strict=True)
            ]
            q = f"{pair.q:.2g}" + ("" if pair.significant else ", not significant")
            rows.append((kind, *pair.classes, *changes, q))
    return rows


def embedding_rows(results: BenchResults) -> list[tuple[str, ...]]:
    """The mean over all removals, random neurons and the difference, then each removal.

    The target's loss, then the metrics of embeddings.
    """
    found = results.standard_metrics
    assert found is not None
    ends = found.ci95

    def row(name: str, drop: float | None, values: EmbeddingControl) -> tuple[str, ...]:
        own = values.target_knn_accuracy_change
        return (
            name,
            points(drop),
            similarity(values.cosine),
            percent(values.rank_preservation),
            points(values.knn_accuracy_change, signed=True),
            points(own, signed=True),
            similarity(values.cka),
        )

    bounds = (
        "95 % interval",
        interval(results.selectivity.ci95.target_drop, points),
        interval(ends.cosine, similarity),
        interval(ends.rank_preservation, percent),
        interval(ends.knn_accuracy_change, points),
        interval(ends.target_knn_accuracy_change, points),
        interval(ends.cka, similarity),
    )
    control = found.random_control
    random = [] if control is None else [row("random control", results.random_control.target_drop, control)]
    rows = (row(name, values.target_drop, values) for name, values in found.per_class.items())
    return [row("mean", found.target_drop, found), bounds, *random, *_beyond_random(found.difference), *rows]


def _beyond_random(found: EmbeddingDifference | None) -> list[tuple[str, ...]]:
    """What skills do beyond as many random neurons, and its intervals."""
    if found is None:
        return []

    def change(value: float | None) -> str:
        return points(value, signed=True)

    writers = {
        "cosine": signed_similarity, "rank_preservation": change, "knn_accuracy_change": change,
        "target_knn_accuracy_change": change, "cka": signed_similarity,
    }  # fmt: skip
    return [
        ("skills minus random", "", *(write(getattr(found, key)) for key, write in writers.items())),
        ("95 % interval", "", *(interval(getattr(found.ci95, key), write) for key, write in writers.items())),
    ]


def embeddings_say(results: BenchResults) -> list[str]:
    """What the numbers of the table mean, and what was left out of them."""
    found = results.standard_metrics
    assert found is not None
    drop, cosine, rank, knn = (
        finite(value) for value in (found.target_drop, found.cosine, found.rank_preservation, found.knn_accuracy_change)
    )
    facts = (
        f"Each removal costs its class {points(drop)} points on average. Meanwhile the embeddings keep a cosine "
        f"similarity of {similarity(cosine)} and {percent(rank)} of their neighbours' order, and kNN accuracy changes "
        f"by {points(knn, signed=True)} points."
    )
    out = [facts]
    if drop is not None and drop > 0 and cosine is not None and rank is not None and knn is not None:
        quiet = [cosine >= HIGH, rank >= HIGH, abs(knn) <= SMALL * drop]
        out.append(
            "Whoever watches these averages alone would not notice that a class suffers."
            if all(quiet)
            else "Here the averages move as well; which class suffers they do not say."
            if not any(quiet)
            else "Part of these averages hardly moves; which class suffers none of them says."
        )
    return out + _reasons(found.reasons)


def _reasons(found: InterferenceReasons | EmbeddingReasons | None) -> list[str]:
    return [] if found is None else [_reason(reason, where) for reason, where in to_json(found).items()]


def _reason(reason: str, where: Any) -> str:
    if reason == "zero_or_not_finite":
        total = number_of(sum(where.values()))
        return f"Left out: {total} embeddings that were zero or not finite, under the removal of {', '.join(where)}."
    text = {
        "one_image": "one test example says little, and has no neighbour of its class",
        "no_images": "no test examples",
        "no_direction": "no angle, since the mean embedding lies in the middle of all",
        "constant_embeddings": "all embeddings are the same after its removal",
    }[reason]
    return f"Not defined, or hardly, for {', '.join(where)}: {text}."
