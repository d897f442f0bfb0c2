"""The words and tables of the page, from the results."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from skillfast.report.bench.figures import KINDS, site_counts
from skillfast.report.bench.tradeoff import method_of
from skillfast.report.formatting import (
    TERMS,
    UNDEFINED,
    UNDEFINED_RATIO,
    finite,
    flat,
    interval,
    number_of,
    percent,
    plain,
    points,
    size,
    term_interval,
    term_value,
    times,
)
from skillfast.results.records import to_json
from skillfast.vocabulary import GIVEN

if TYPE_CHECKING:
    from skillfast.results.bench import BenchResults, Cost, OwnControl, Selectivity, Verdict
    from skillfast.results.skills import Skills

STAGES = {
    "data": "reading the data",
    "train": "training the model",
    "trace": "tracing the neurons",
    "select": "ranking the neurons by every method",
    "choose": "choosing on the validation examples",
    "trade_off": "all methods on the test examples",
    "replace": "other values in the neurons' place",
    "trace_test": "tracing the neurons on the test examples",
    "sweep": "removing them",
    "like": "removing the earlier run's skills",
    "shares": "removing parts of them",
    "embeddings": "comparing embeddings",
    "never_seen": "training models that never see a class",
    "identifiability": "choosing for other groups and halves",
    "baseline": "accuracy of the intact model",
    "total": "the whole run",
}
REPLACED = ("zero", "mean", "resample", "constant")  # what takes the neurons' place, as results.json calls it
# the half of "not defined (denominator is 0)" that goes where an interval would
DENOMINATOR = UNDEFINED_RATIO.removeprefix(f"{UNDEFINED} ")
# what the command line can repeat, in its order; the other settings are its defaults
FLAGS = (
    "model", "model_kwargs", "checkpoint", "pretrained", "finetune", "epochs", "lr", "dataset", "data_dir",
    "data_file", "test_file", "text_column", "label_column", "pair_column", "class_names", "prompt", "label_words",
    "soft_prompt", "pad_token", "truncate", "train_per_class", "test_per_class", "mean", "std", "crop_pct",
    "skip_unreadable", "device", "device_map", "bits", "dtype", "batch_size", "seed", "sites", "pool",
    "statistics", "bins", "method", "contrastive", "share", "max_site_share", "scale",
    "control_draws", "never_seen", "memory_budget", "backend",
)  # fmt: skip
BESIDE_LIKE = (
    "model", "model_kwargs", "checkpoint", "pretrained", "finetune", "prompt", "label_words", "soft_prompt",
    "pad_token", "device", "device_map", "bits", "dtype", "batch_size", "memory_budget", "backend",
)  # fmt: skip


def _lost(change: float | None, verb: str = "costs") -> str:
    """What a removal does to its own class, as the end of a sentence."""
    number = finite(change)
    if number is None:
        return "has no defined effect on it"
    return f"{verb} it {points(number)} points" if number >= 0 else f"gains it {points(-number)} points"


def summary(results: BenchResults) -> list[str]:
    """The result in two sentences, and a third where much of it depends on what takes the neurons' place."""
    own, oracle, random = results.selectivity, results.oracle, results.random_control
    drop, change = finite(own.target_drop), finite(own.other_change)
    effect = "has no defined effect on that class" if drop is None else (
        f"{'costs' if drop >= 0 else 'gains'} that class {points(abs(drop))} percentage points of accuracy"
    )  # fmt: skip
    others = "" if change is None else (
        f", while the other classes {'lose' if change < 0 else 'gain'} {points(abs(change))} on average"
    )  # fmt: skip
    said = [
        f"Removing the neurons of one class {effect}{others}.",
        (
            f"Removing as many neurons drawn at random {_lost(random.target_drop)}; the oracle, which deletes the "
            f"class from the model's output, {_lost(oracle.target_drop)}."
        ),
    ]
    if results.replacements is not None and results.replacements.average.marked:
        drops = results.replacements.average
        said.append(
            f"That is with the neurons at 0. At their means the class loses {points(drops.mean)} points, at another "
            f"example's activations {points(drops.resample)}, and at the constants that cost the model least "
            f"{points(drops.constant)}: so much of it goes with what the neurons tell, the rest with the value 0."
        )
    return said


def limits(results: BenchResults) -> list[str]:
    """What the numbers do not say."""
    covered, least = results.model.coverage, min(results.baseline.n_test_per_class)
    places = []
    if covered is None:
        places = ["It was not certified that the traced neurons hold all that the model's blocks do."]
    elif not covered.complete:
        places = [f"{percent(1 - covered.share)} of the weights of the model's blocks act past the traced neurons."]
    return [
        *places,
        "That a class's neurons are removed does not show that the information is gone: a refitted probe may read it.",
        f"A class has {least:,} test examples or more; changes that so few cannot show are not ruled out.",
        "Everything was measured on these examples alone, with this seed and these settings.",
    ]


def controls_say(results: BenchResults) -> str:
    """What many draws cost the class that they were drawn for, by number and matched by mean activation."""
    random, matched = results.random_control.own, results.matched_control

    def lost(control: OwnControl) -> str:
        ends = "" if control.ci95 is None else f" [{points(control.ci95[0])}, {points(control.ci95[1])}]"
        return f"{_lost(control.target_drop)}{ends}"

    return (
        f"Over {random.draws} draws per class, on {random.n_examples:,} examples, each under its own class's, removing "
        f"them {lost(random)}; removing as many that are about as active as the skill's {lost(matched)}. The intervals "
        "hold the spread of the draws."
    )


def tiles(results: BenchResults) -> list[dict[str, str]]:
    """The headline numbers, each beside the oracle's and the random control's."""
    found: list[Selectivity] = [results.selectivity, results.oracle, results.random_control]

    def tile(name: str, key: str) -> dict[str, str]:
        value, oracle, random = (term_value(values, key, UNDEFINED) for values in found)
        return {"name": name, "value": value, "unit": "points", "interval": term_interval(found[0], key),
                "beside": f"oracle {oracle}, random {random}"}  # fmt: skip

    harm = tile("Each other class is harmed by", "harm")
    harm["beside"] = f"{points(found[0].harm.noise_floor)} by chance alone; random {term_value(found[2], 'harm')}"
    baseline = {
        "name": "Accuracy before any removal",
        "value": percent(results.baseline.accuracy),
        "unit": "",
        "interval": "",
        "beside": f"{len(results.dataset.classes)} classes, {results.dataset.n_test:,} test examples",
    }
    return [
        tile("The removed class loses", "target_drop"),
        tile("Others stay behind the oracle by", "regret"),
        harm,
        baseline,
    ]


def definitions(results: BenchResults, skills: Skills) -> list[tuple[str, str]]:
    """The three words that the page cannot do without."""
    model, config, dataset = results.model, results.config, results.dataset
    per_skill = [sum(row) for row in site_counts(results, skills)]
    mean, total = sum(per_skill) / len(per_skill), model.neurons
    share = f" ({percent(mean / total)})" if total else ""
    scale = finite(config.get("scale"))
    how = "set to 0" if not scale else f"multiplied by {plain(scale)}"
    neuron = (
        "One coordinate of what enters the last layer of a block's MLP or attention, or the classifier. "
        f"This model has {number_of(total)} of them in {len(model.sites)} places."
    )
    skill = (
        f"The neurons that carry one class, found by {method_of(results)} on "
        f"{number_of(dataset.n_select)} examples: {number_of(round(mean, 1))} neurons{share} on average."
    )
    removal = (
        f"While the model runs, the skill's neurons are {how}. Nothing is retrained. Effects are measured on "
        f"{number_of(dataset.n_test)} test examples."
    )
    return [("Neuron", neuron), ("Skill", skill), ("Removal", removal)]


def _written(values: Selectivity, key: str) -> tuple[str, str]:
    """Value and, on a second line, its interval or why there is none."""
    value = term_value(values, key, UNDEFINED)
    bounds = DENOMINATOR if value == UNDEFINED else term_interval(values, key)
    if key == "harm" and bounds:
        bounds = f"{bounds} noise floor {points(values.harm.noise_floor)}"
    return value, bounds


def replacement_rows(results: BenchResults) -> list[list[str]]:
    """Per class, the mean over all first: what it loses by what takes its neurons' place, and if these differ."""
    found = results.replacements
    assert found is not None
    named = [("all classes", found.average), *found.per_class.items()]
    return [
        [
            name,
            *(f"{points(getattr(row, by))} {interval(getattr(row.ci95, by), points)}" for by in REPLACED),
            "yes" if row.marked else "no",
        ]
        for name, row in named
    ]


def replacements_say(results: BenchResults) -> str:
    """How much of the drop is left where the neurons take the constants that cost the model least."""
    found = results.replacements
    assert found is not None
    marked = sum(row.marked for row in found.per_class.values())
    return (
        f"Set to 0, the neurons cost their class {points(found.average.zero)} points; at the constants that cost the "
        f"model least, fitted on the examples to select on, {points(found.average.constant)}. What lies between need "
        f"not be lost with the neurons: it is the price of a value that does not fit the others. "
        f"{marked} of {len(found.per_class)} classes differ by more than 5 points between zero and mean or "
        f"constants."
    )


def selectivity_rows(results: BenchResults) -> list[dict[str, Any]]:
    """One row per term: definition, then value and interval for skills, oracle and random control."""
    found: list[Selectivity] = [results.selectivity, results.oracle, results.random_control]
    return [
        {
            "term": term.key,
            "definition": term.definition,
            "values": [_written(values, term.key) for values in found],
        }
        for term in TERMS
    ]


def verdict_rows(results: BenchResults) -> list[list[str]]:
    """Per class: drop and interval, information lost, harm, bound for all others, smallest visible harms, verdict."""
    assert results.verdicts is not None
    information = None if results.information is None else results.information.per_class

    def said(found: Verdict) -> str:
        if found.verdict == "harmful":
            return f"harmful to {', '.join(found.harmed)}"
        return found.verdict if found.verdict == "undecided" else f"not above {points(found.others_lose_at_most)}"

    return [
        [
            name,
            f"{points(found.target_drop)} {interval(found.ci95, points)}",
            UNDEFINED if information is None else percent(information[name].information_lost),
            f"{points(found.harm.cross_fitted)} to {points(found.harm.plug_in)}",
            points(found.harm.noise_floor),
            points(found.others_lose_at_most),
            points(found.visible_alone),
            points(found.visible_of_all),
            said(found),
        ]
        for name, found in results.verdicts.items()
    ]


def contribution_rows(results: BenchResults) -> list[tuple[str, str, str]]:
    """Per kind of site: its Shapley share and interval."""
    found = results.layer_contribution
    assert found is not None
    rows = [
        (name, percent(getattr(found, kind)), interval(getattr(found.ci95, kind), percent))
        for kind, name, _ in KINDS
        if finite(getattr(found, kind)) is not None
    ]
    rest = interval(found.ci95.non_additivity, percent)
    return [*rows, ("non-additivity", percent(found.non_additivity), rest)]


def share_rows(results: BenchResults) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, and per class the Shapley share of each kind of site."""
    found = results.layer_contribution
    assert found is not None
    kinds = [(kind, name) for kind, name, _ in KINDS if finite(getattr(found, kind)) is not None]
    rows = [[name, *(percent(getattr(row, kind)) for kind, _ in kinds)] for name, row in found.per_class.items()]
    return ["class", *(name for _, name in kinds)], rows


def _cost_rows(cost: Cost) -> list[tuple[str, str]]:
    seconds = [(STAGES.get(stage, stage), f"{plain(took)} s") for stage, took in to_json(cost.seconds).items()]
    return [
        *seconds,
        ("examples traced per second", plain(cost.samples_per_s)),
        ("one forward pass over the same examples", f"{plain(cost.forward_s)} s"),
        ("tracing, in forward passes", times(cost.trace_over_forward, "not measured")),
        ("peak memory", size(cost.peak_rss_bytes)),
        ("peak memory of the accelerator", size(cost.peak_device_bytes)),
        ("statistics kept", size(cost.state_bytes)),
    ]


def citation(results: BenchResults) -> str:
    """How to cite the program, as BibTeX."""
    return (
        "@software{skillfast,\n  author = {{The skillfast developers}},\n  title = {skillfast},\n"
        f"  version = {{{results.environment.skillfast}}}\n}}"
    )


def details(results: BenchResults) -> list[dict[str, Any]]:
    """The folded tables at the end: title and rows of name and value."""
    model = {key: value for key, value in to_json(results.model).items() if key != "sites"}
    dataset = {**to_json(results.dataset), "classes": len(results.dataset.classes)}
    sites = [
        (site.name, f"{site.width:,} neurons" + (f", {site.heads} heads" if site.heads else ""))
        for site in results.model.sites
    ]
    return [
        {"title": "Model", "rows": flat(model)},
        {"title": "Places of the neurons", "rows": sites},
        {"title": "Data", "rows": flat(dataset)},
        {"title": "Configuration", "rows": flat(results.config)},
        {"title": "Environment", "rows": flat(to_json(results.environment))},
        {"title": "Cost", "rows": _cost_rows(results.cost)},
    ]


def _flag(key: str, value: Any) -> list[str]:
    name = f"--{key.replace('_', '-')}"
    if value is None:
        return []
    if key in ("skip_unreadable", "contrastive", "truncate"):  # flags without a --no- form
        return [name] if value else []
    if isinstance(value, bool):
        return [name if value else f"--no-{key.replace('_', '-')}"]
    if key == "model_kwargs":
        return [word for option, given in value.items() for word in ("--model-kwarg", f"{option}={given}")]
    if key in ("sites", "statistics", "class_names", "label_words", "never_seen"):
        return [name, ",".join(value)] if value else []
    return [name, *map(str, value)] if isinstance(value, list) else [name, str(value)]


def command(results: BenchResults) -> str:
    """The command line that repeats the run."""
    config = results.config
    if config.get("dataset") == GIVEN:
        return "skillfast.bench(model=..., loader=...)"
    like = config.get("like")
    keys = FLAGS if like is None else [key for key in FLAGS if key in BESIDE_LIKE]
    words = [word for key in keys for word in _flag(key, config.get(key))]
    return shlex.join(["skillfast", "bench", *_flag("like", like), *words])
