"""The tables of the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from skillfast.report.bench.information import beside
from skillfast.report.bench.interference import visible_pairs
from skillfast.report.bench.tradeoff import method_of
from skillfast.report.formatting import (
    UNDEFINED,
    data_name,
    finite,
    interval,
    model_name,
    number_of,
    percent,
    plain,
    points,
    size,
    term_interval,
    term_value,
)
from skillfast.vocabulary import STATISTICS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from skillfast.memory.plan import Plan
    from skillfast.models.sites import Site
    from skillfast.results.bench import BenchResults, LayerContribution, Selectivity
    from skillfast.results.evaluation import EvaluationResults, Shortcut
    from skillfast.results.trajectory import Trajectory
    from skillfast.statistics.scores import NeuronScores

EXPLAINED = "95 % intervals in brackets; regret: behind the oracle on other classes; harm: a low to a high estimate"
COLUMNS = (("skills", "selectivity"), ("oracle", "oracle"), ("random control", "random_control"))
# the rows of a summary: key of selectivity, and how a reader calls it
ROWS = (
    ("target_drop", "target drop, points"),
    ("regret", "regret, points"),
    ("gross_loss", "gross loss, points"),
    ("harm", "harm, points"),
)
# what else takes the neurons' place than 0
REPLACED = (("mean", "their means"), ("resample", "another example's"), ("constant", "fitted constants"))
PAIRS = (("competition", "pairs that compete"), ("linkage", "pairs that are linked"))
KINDS = (
    ("mlp", "MLP"), ("attn", "attention"), ("ssm", "mixers"), ("expert", "experts"), ("router", "routers"),
    ("head", "classifier head"),
)  # fmt: skip


def _cell(values: Selectivity, key: str) -> Text:
    # Text, not str: rich reads brackets in a str as markup
    return Text(f"{term_value(values, key, UNDEFINED)} {term_interval(values, key)}".rstrip())


def _share(found: LayerContribution, kind: str) -> Text:
    return Text(f"{percent(getattr(found, kind))} {interval(getattr(found.ci95, kind), percent)}".rstrip())


def _kinds(found: LayerContribution | None) -> list[tuple[str, str]]:
    return [] if found is None else [(kind, name) for kind, name in KINDS if finite(getattr(found, kind)) is not None]


def summary_table(results: BenchResults) -> Table:
    """Make the table that `skillfast bench` prints at its end; see `skillfast.report.summary_table`."""
    title = Text(f"{model_name(results)} on {data_name(results)}: {percent(results.baseline.accuracy)} right on "
                 f"{number_of(results.dataset.n_test)} test examples")  # fmt: skip
    table = Table(title=title, title_justify="left", caption=EXPLAINED, caption_justify="left")
    table.add_column("")
    for name, _ in COLUMNS:
        table.add_column(name)
    accuracy = results.baseline.accuracy
    effects = [getattr(results, source) for _, source in COLUMNS]
    table.add_row("accuracy retained (other classes)", *(percent(accuracy + found.other_change) for found in effects))
    table.add_row("accuracy forgotten (removed class)", *(percent(accuracy - found.target_drop) for found in effects))
    for key, name in ROWS:
        table.add_row(name, *(_cell(found, key) for found in effects))
    table.add_row("harm by chance alone", *(points(getattr(results, source).harm.noise_floor) for _, source in COLUMNS))
    if (replaced := results.replacements) is not None:
        for key, name in REPLACED:
            drop = points(getattr(replaced.average, key)), interval(getattr(replaced.average.ci95, key), points)
            table.add_row(f"target drop at {name}", " ".join(drop), "", "")
    found = results.layer_contribution
    for i, (kind, name) in enumerate(_kinds(found)):
        if i == 0:
            table.add_section()
        assert found is not None
        table.add_row(f"share of {name}", _share(found, kind), "", "")
    _add_evidence(table, results)
    return table


def _add_evidence(table: Table, results: BenchResults) -> None:
    """The largest change over all examples, and the best neurons' correlation with the label."""
    overall, correlated = results.overall, results.correlations
    table.add_section()
    if overall is not None:
        largest = min(removal.change for removal in overall.removals)
        changes = points(largest, signed=True), "", points(overall.random_change, signed=True)
        table.add_row("all examples, largest change", *changes)
    if (found := results.information) is not None:
        for key, name in (("readout_lost", "readout lost"), ("information_lost", "information lost (refitted probe)")):
            table.add_row(
                name, f"{percent(getattr(found, key))} {interval(getattr(found.ci95, key), percent)}".rstrip(), "", ""
            )
    for name, other in beside(results).items():
        assert found is not None
        lost = percent(found.per_class[name].information_lost), percent(other.information_lost)
        kept = percent(other.retained_removed), percent(other.retained)
        table.add_row(f"{name}, information lost: removed; never seen", "; ".join(lost), "", "")
        table.add_row(f"{name}, accuracy on others: removed; never seen", "; ".join(kept), "", "")
    if (controls := results.identifiability) is not None:
        flagged = sum(values.flagged for values in controls.per_class.values())
        own, arbitrary = points(controls.drop), points(controls.control)
        table.add_row("chosen for a class; arbitrary group", f"{own}; {arbitrary} ({flagged} flagged)", "", "")
    visible = visible_pairs(results)
    for kind, name in PAIRS:
        if kind in visible:
            n = len(getattr(results.interference, kind))
            table.add_row(f"{name}; smallest to be seen", Text(f"{n}; {visible[kind]}"), "", "")
    if correlated is not None and (label := correlated.metrics.get("label")):
        table.add_row(f"top-{correlated.top} |r| with label", plain(finite(label.test)), "", "")


def _comparison_rows(named: Mapping[str, BenchResults]) -> list[tuple[str, Callable[[BenchResults], str | Text]]]:
    def term(source: str, key: str) -> Callable[[BenchResults], Text]:
        return lambda results: _cell(getattr(results, source), key)

    def share(kind: str) -> Callable[[BenchResults], str]:
        return lambda results: percent(getattr(results.layer_contribution, kind, None), "")

    def has_share(kind: str) -> bool:
        return any(kind in dict(_kinds(results.layer_contribution)) for results in named.values())

    return [
        ("model", lambda results: Text(results.model.name)),
        ("dataset", lambda results: Text(results.dataset.name)),
        ("classes", lambda results: number_of(len(results.dataset.classes))),
        ("method", lambda results: Text(method_of(results))),
        ("baseline accuracy", lambda results: percent(results.baseline.accuracy)),
        *((name, term("selectivity", key)) for key, name in ROWS),
        ("target drop of the oracle", term("oracle", "target_drop")),
        ("target drop of the random control", term("random_control", "target_drop")),
        ("regret of the random control", term("random_control", "regret")),
        *((f"share of {name}", share(kind)) for kind, name in KINDS if has_share(kind)),
        ("seconds in all", lambda results: f"{results.cost.seconds.total:,.1f}"),
    ]


def trajectory_table(found: Trajectory) -> Table:
    """Make the table of several runs; see `skillfast.report.trajectory_table`."""
    from skillfast.report.trajectory import words

    caption = "points that a class loses by its own skill, 95 % intervals in brackets"
    table = Table(title=Text(words.title(found)), title_justify="left", caption=caption, caption_justify="left")
    for name in words.columns(found):
        table.add_column(Text(name))
    for row in words.rows(found):
        table.add_row(*map(Text, row))
    return table


def comparison_table(named: Mapping[str, BenchResults]) -> Table:
    """Make the table that `skillfast compare` prints; see `skillfast.report.comparison_table`."""
    table = Table(caption="95 % intervals in brackets", caption_justify="left")
    table.add_column("")
    for name in named:
        table.add_column(Text(name))
    for name, write in _comparison_rows(named):
        table.add_row(name, *(write(results) for results in named.values()))
    return table


def top_neurons_table(scores: NeuronScores, top: int) -> Table:
    """See `skillfast.report.top_neurons_table`."""
    import numpy as np

    names = [(site.name, unit) for site in scores.sites for unit in range(site.width)]
    table = Table(title=Text(f"{scores.n_neurons:,} neurons, {scores.n_observations:,} observations"))
    statistic = next(name for name in STATISTICS if name in scores.arrays())
    conditions = f" given {', '.join(scores.conditioned_on)}" if scores.conditioned_on else ""
    for heading in ("metric", "site", "neuron", statistic + conditions):
        table.add_column(heading, justify="right" if heading != "site" else "left")
    for i, column in enumerate(scores.columns):
        values = scores.statistic(statistic)[:, i]
        order = np.argsort(-np.nan_to_num(np.abs(values), nan=-1), kind="stable")[:top]
        table.add_section()
        for rank, neuron in enumerate(order):
            site, unit = names[neuron]
            value = f"{values[neuron]:+.3f}" if np.isfinite(values[neuron]) else UNDEFINED
            table.add_row(Text(column if rank == 0 else ""), site, str(unit), value)
    return table


def accuracy_table(classes: Sequence[str], baseline: np.ndarray, rows: Mapping[str, np.ndarray]) -> Table:
    """See `skillfast.report.accuracy_table`."""
    table = Table(caption="accuracy per class; beside it the change, in points", caption_justify="left")
    table.add_column("class")
    table.add_column("intact", justify="right")
    for name in rows:
        table.add_column(Text(f"skill {name}"), justify="right")
    for i, label in enumerate(classes):
        cells = [f"{percent(row[i])} ({100 * (row[i] - baseline[i]):+.1f})" for row in rows.values()]
        table.add_row(Text(label), percent(baseline[i]), *cells)
    return table


def sites_table(name: str, sites: Sequence[Site], read_in: Mapping[str, str]) -> Table:
    """See `skillfast.report.sites_table`."""
    total = sum(site.width for site in sites)
    table = Table(title=Text(f"{name}: {total:,} neurons in {len(sites)} sites"), title_justify="left")
    for heading in ("site", "kind", "neurons", "heads", "input of", "read in"):
        table.add_column(heading, justify="right" if heading in ("neurons", "heads") else "left")
    for site in sites:
        parts = f"{site.experts} experts" if site.experts else str(site.heads or "")
        table.add_row(site.name, site.kind, f"{site.width:,}", parts, site.path, read_in[site.name])
    return table


def plan_table(plan: Plan) -> Table:
    """See `skillfast.report.plan_table`."""
    title = f"{plan.model}: {plan.parameters:,} parameters, {plan.neurons:,} neurons in {len(plan.sites)} sites"
    caption = f"state {plan.state:,} bytes in all; results and scalars on the host {size(plan.host)}"
    caption += f"\n{plan.coverage or 'not certified that the sites hold all that the blocks do'}"
    table = Table(title=Text(title), title_justify="left", caption=caption, caption_justify="left")
    for heading in ("device", "parts", "neurons", "weights", "state", "buffer", "forward", "peak"):
        table.add_column(heading, justify="left" if heading == "parts" else "right")
    for index, device in enumerate(plan.devices):
        parts = device.parts[0] if device.parts[0] == device.parts[1] else " to ".join(device.parts)
        sizes = (device.weights, device.state, device.buffer, device.forward, device.peak)
        table.add_row(str(index), Text(parts), f"{device.neurons:,}", *map(size, sizes))
    return table


def evaluation_table(results: EvaluationResults) -> Table:
    """See `skillfast.report.evaluation_table`."""
    from skillfast.report.evaluation import page as evaluation

    measures, before = evaluation.defined(results), results.intact.values
    known = [f"{evaluation.NAMES[m]} {evaluation.write_value(m)(before[m])}" for m in measures if m in before]
    caption = "after removal from all layers; in brackets the change, and that of as many random neurons"
    table = Table(title=Text(f"intact: {', '.join(known)}"), title_justify="left", caption=caption)
    for heading in ("skill", "of all neurons", *(evaluation.NAMES[m] for m in measures)):
        table.add_column(heading, justify="left" if heading == "skill" else "right")
    for outcome in evaluation.by_skill(results):
        if outcome.layers != "all" or outcome.scale != 0:
            continue
        cells = []
        for m in measures:
            change, drawn = evaluation.write_change(m), outcome.random.change[m].mean
            value = evaluation.write_value(m)(outcome.values[m])
            cells.append(Text(f"{value} ({change(outcome.change[m])}; {change(drawn)})"))
        table.add_row(Text(outcome.skill), f"{percent(outcome.share)} ({outcome.neurons:,})", *cells)
    return table


def dose_table(results: EvaluationResults) -> Table:
    """See `skillfast.report.dose_table`."""
    from skillfast.report.evaluation import page as evaluation

    columns, rows = evaluation.dose_table(results)
    caption = "at 1 the intact model's value, elsewhere the change from it; in brackets the 95 % interval"
    table = Table(title="by the factor on a skill's activations", title_justify="left", caption=caption)
    for i, heading in enumerate(columns):
        table.add_column(heading, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*(Text(cell.replace("; ", "\n")) for cell in row))  # rich reads brackets in a str as markup
    return table


def shortcut_table(found: Shortcut) -> Table:
    """See `skillfast.report.shortcut_table`."""
    from skillfast.report.evaluation import shortcut as words

    table = Table(caption="where heuristic and label disagree; in brackets the interval of the change")
    for heading in ("neurons that follow", "of all neurons", *words.NAMES.values()):
        table.add_column(heading, justify="left" if heading.startswith("neurons") else "right")
    for row in words.rows(found):
        table.add_row(*row)
    return table
