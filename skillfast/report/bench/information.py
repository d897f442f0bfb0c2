"""Words and a table on whether classes are gone from the embeddings or hidden from the classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skillfast.report.formatting import UNDEFINED, finite, interval, number_of, percent

if TYPE_CHECKING:
    from skillfast.results.bench import BenchResults, ClassInformation, NeverSeen

GONE, HIDDEN = 0.9, 0.5  # of the information lost: a class is gone from the first on, hidden below the second


def verdict(found: ClassInformation) -> str:
    """Whether a class is gone, hidden, or still read by the model's own classifier, in words."""
    readout, lost = finite(found.readout_lost), finite(found.information_lost)
    if readout is None or lost is None:
        return UNDEFINED
    if lost >= GONE:
        return "gone"
    if readout < HIDDEN:
        return "still read"
    return "hidden" if lost < HIDDEN else "partly gone"


def say(results: BenchResults) -> list[str]:
    """What was lost, and what comes back, in sentences."""
    found = results.information
    assert found is not None
    readout, lost, relearned = (
        f"{percent(getattr(found, key))} {interval(getattr(found.ci95, key), percent)}".rstrip()
        for key in ("readout_lost", "information_lost", "relearned")
    )
    out = [
        (
            f"After a removal the model's own classifier has lost {readout} of what it told the class apart by; a "
            f"linear probe that is fitted anew on the same embeddings has lost {lost}."
        )
    ]
    if found.relearned is not None:
        out.append(
            f"{found.steps} steps of tuning the classifier on {found.shots} examples of the class, beside those of "
            f"other classes, bring it to {relearned} of the whole model's; on those of other classes alone to "
            f"{percent(found.relearned_without)}."
        )
    words = [verdict(values) for values in found.per_class.values()]
    counts = [
        f"{number_of(words.count(word))} {word}"
        for word in ("gone", "partly gone", "hidden", "still read")
        if word in words
    ]
    if counts:
        out.append(f"Of {number_of(len(words))} classes: {', '.join(counts)}.")
    return out


def beside(results: BenchResults) -> dict[str, NeverSeen]:
    """What models that never saw a class know, by class; empty where none was trained."""
    found = results.information
    per_class = {} if found is None else found.per_class
    return {name: values.never_seen for name, values in per_class.items() if values.never_seen is not None}


def never_seen_rows(results: BenchResults) -> list[tuple[str, ...]]:
    """By class of which there is a model that never saw it: information lost, the probe's recall, others' accuracy.

    Each of the measured model without the class's skill, then of the model that never saw the class.
    """
    found = results.information
    assert found is not None
    return [
        (
            name,
            percent(found.per_class[name].information_lost),
            percent(other.information_lost),
            percent(found.per_class[name].recall_refitted),
            percent(other.recall_refitted),
            percent(other.retained_removed),
            percent(other.retained),
        )
        for name, other in beside(results).items()
    ]


def never_seen_say(results: BenchResults) -> str:
    """What the models that never saw a class are, in a sentence or two."""
    others = beside(results)
    counts = sorted({other.n_train for other in others.values()})
    trained = " to ".join(number_of(count) for count in dict.fromkeys((counts[0], counts[-1])))
    what = "A model" if len(others) == 1 else f"For each of {number_of(len(others))} classes a model"
    return (
        f"{what} of the same architecture was trained by the same recipe on {trained} examples, none of "
        "them of the class. What a probe on its embeddings tells the class apart by was not learned from the class, so "
        "that a removal need not take it."
    )


def rows(results: BenchResults) -> list[tuple[str, ...]]:
    """The mean, then each class: the verdict, readout lost, information lost, relearned, recalls."""
    found = results.information
    assert found is not None
    mean = (
        "mean",
        "",
        *(percent(getattr(found, key)) for key in ("readout_lost", "information_lost", "relearned")),
        percent(found.relearned_without),
        "", "", "",
    )  # fmt: skip
    return [
        mean,
        *(
            (
                name,
                verdict(values),
                percent(values.readout_lost),
                percent(values.information_lost),
                percent(values.relearned),
                percent(values.relearned_without),
                percent(values.recall),
                percent(values.recall_removed),
                percent(values.recall_refitted),
            )
            for name, values in found.per_class.items()
        ),
    ]
