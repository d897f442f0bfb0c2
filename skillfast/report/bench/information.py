"""Words and a table on whether classes are gone from the embeddings or hidden from the classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skillfast.report.formatting import UNDEFINED, finite, interval, number_of, percent

if TYPE_CHECKING:
    from skillfast.results.bench import BenchResults, ClassInformation

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
