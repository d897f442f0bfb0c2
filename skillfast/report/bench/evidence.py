"""Accuracy over all examples without each skill, and how closely the best neurons follow each metric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillfast.report.formatting import UNDEFINED, finite, interval, number_of, percent, plain, points

if TYPE_CHECKING:
    from skillfast.results.bench import BenchResults, BothParts, Correlations, MetricCorrelations, Trained
    from skillfast.results.provenance import UsedPrompt

FROM = {
    "scratch": "was trained from nothing",
    "checkpoint": "was loaded",
    "pretrained": "came pretrained",
    "given": "was given",
}


def overall_say(results: BenchResults) -> list[str]:
    """How the model came about, and what the removals do to the accuracy over all examples, in sentences."""
    found = results.overall
    assert found is not None
    largest = min(found.removals, key=lambda removal: removal.change)
    drawn = [change for removal in found.removals for change in removal.random_changes]
    return [
        " ".join(
            part for part in (_trained_say(results.model.trained), _prompt_say(results.model.soft_prompt)) if part
        ),
        f"The whole model is right on {percent(found.accuracy)} of the {number_of(found.n_test)} test examples.",
        (
            f"Without the skill {largest.skill}, which is {number_of(largest.neurons)} neurons or "
            f"{_share(largest.share)} of all, it is right on {percent(largest.accuracy)}: a change of "
            f"{points(largest.change, signed=True)} points, the largest of the {len(found.removals)} removals."
        ),
        (
            f"As many neurons drawn at random change it by {points(found.random_change, signed=True)} points on "
            f"average, between {points(min(drawn), signed=True)} and {points(max(drawn), signed=True)} in "
            f"{number_of(len(drawn))} draws."
        ),
    ]


def overall_rows(results: BenchResults) -> list[list[str]]:
    """Per skill: its size, the accuracy without it, the change with its interval, and the random control's."""
    assert results.overall is not None
    return [
        [
            removal.skill,
            number_of(removal.neurons),
            _share(removal.share),
            percent(removal.accuracy),
            points(removal.change, signed=True),
            interval(removal.ci95, lambda end: points(end, signed=True)),
            points(sum(removal.random_changes) / len(removal.random_changes), signed=True),
        ]
        for removal in results.overall.removals
    ]


def correlated(results: BenchResults) -> dict[str, Any]:
    """What the page says of correlations: sentences, metrics, a row per place and a row per best neuron."""
    found = results.correlations
    assert found is not None
    metrics, top = found.metrics, found.top
    written = [
        f"{_size(values.test)} with {name}" for name, values in metrics.items() if finite(values.test) is not None
    ]
    flat = " and ".join(name for name, values in metrics.items() if finite(values.select) is None)
    return {
        "top": top,
        "metrics": list(metrics),
        "say": [
            (
                f"The {top} neurons that follow a metric most closely, ranked on the "
                f"{number_of(results.dataset.n_select)} examples that skills are chosen from, have on the test "
                f"examples a mean |r| (Pearson) of {', '.join(written) or UNDEFINED}."
            ),
            f"{flat} is the same for all examples that skills are chosen from, so nothing follows it." if flat else "",
            _last_say(found),
            _chance_say(found),
            "A neuron that follows a metric need not cause it: only a removal tells.",
        ],
        "places": [
            ["all places", *(_both(values) for values in metrics.values())],
            *(
                [["the last block", *(_both(values.last_block) for values in metrics.values() if values.last_block)]]
                if all(values.last_block for values in metrics.values())
                else []
            ),
            *(
                [site, *(_both(values.sites[site]) for values in metrics.values())]
                for site in next(iter(metrics.values())).sites
            ),
        ],
        "neurons": [
            [neuron.column, neuron.site, str(neuron.unit), _signed(neuron.select), _signed(neuron.test)]
            for values in metrics.values()
            for neuron in values.neurons
        ],
    }


def drawn_metric(results: BenchResults) -> str | None:
    """The metric that the figure by block is of: the first that any neuron follows."""
    found = results.correlations
    named = {} if found is None else found.metrics
    return next((name for name, values in named.items() if finite(values.test) is not None), None)


def _last_say(found: Correlations) -> str:
    """How closely the best neurons of the last block follow the metrics; empty without blocks."""
    told = [
        f"{_size(values.last_block.test)} with {name}"
        for name, values in found.metrics.items()
        if values.last_block is not None and finite(values.last_block.test) is not None
    ]
    return f"Those of the last block alone have {', '.join(told)}." if told else ""


def _chance_say(found: Correlations) -> str:
    """What is seen of neurons that follow nothing; empty where that is not known."""
    chance = finite(found.chance)
    return "" if chance is None else f"Neurons that follow nothing have {_size(chance)} on as many examples."


def _prompt_say(prompt: UsedPrompt | None) -> str:
    """What soft prompt stood before every text; empty for none."""
    if prompt is None:
        return ""
    where = "was tuned on them while the model stayed as it was" if prompt.origin == "tuned" else f"is {prompt.origin}"
    reached = finite(prompt.validation_accuracy)
    how = "" if reached is None else f", to {percent(reached)} on validation examples"
    return f"Before every text stands a soft prompt of {number_of(prompt.tokens)} virtual tokens, which {where}{how}."


def _trained_say(trained: Trained) -> str:
    """How the model's weights came about."""
    first = f"The model {FROM[trained.source]}"
    if not trained.n_train:
        return f"{first}."
    what = {"head": "its head was", "last-block": "its last block and head were"}.get(
        trained.finetune or "", "all its weights were"
    )
    rate = finite(trained.learning_rate)
    how = "" if rate is None else f" at a learning rate of {plain(rate)}"
    return (
        f"{first}; {what} trained on {number_of(trained.n_train)} examples for {trained.epochs} epochs{how}, "
        f"to {percent(trained.validation_accuracy)} on the validation examples."
    )


def _share(share: float) -> str:
    """A small share of the neurons, with two decimals."""
    return f"{100 * share:.2f}\N{NO-BREAK SPACE}%"


def _size(value: Any) -> str:
    number = finite(value)
    return UNDEFINED if number is None else f"{number:.2f}"


def _signed(value: Any) -> str:
    number = finite(value)
    return UNDEFINED if number is None else f"{number:+.2f}".replace("-", "\N{MINUS SIGN}")


def _both(values: BothParts | MetricCorrelations) -> str:
    written = _size(values.test), _size(values.select)
    return UNDEFINED if written == (UNDEFINED, UNDEFINED) else f"{written[0]} ({written[1]})"
