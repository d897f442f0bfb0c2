"""The command line: parse, call, show. Imports no torch before a command runs."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from skillfast import __version__
from skillfast import vocabulary as words
from skillfast.errors import ArgumentError
from skillfast.memory.config import PlanConfig
from skillfast.options import Command, Names, options, options_of
from skillfast.runs.config import (
    EVALUATED,
    AblateConfig,
    BenchConfig,
    DataConfig,
    Generation,
    Grid,
    ModelConfig,
    RunConfig,
    SelectConfig,
    TraceConfig,
)
from skillfast.settings import name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from skillfast.statistics.scores import NeuronScores

FORMATS = ("text", "json", "junit", "markdown")  # of a comparison
_quiet = click.option("--quiet", is_flag=True, help="No progress bars and no tables, only results and errors.")
_subject = options(options_of(ModelConfig), options_of(DataConfig))
_skills = options(
    click.option(
        "--skills", "skills_from", required=True, type=click.Path(), help="skills.json, or a folder with one."
    ),
    click.option("--skill", "names", multiple=True, help="Names of skills; all by default."),
    options_of(AblateConfig, only=["scale"]),
    click.option("--components", type=Names(), default=",".join(words.KINDS), show_default=True),
)
_reference = click.option(
    "--reference", type=click.Path(), help="Folder with this model's scores.safetensors, for --mode mean."
)


@dataclass(frozen=True)
class _Removal:
    """What `ablate` and `export` take away, from the options that they share."""

    skills_from: str
    names: tuple[str, ...]
    components: tuple[str, ...]
    mode: words.Mode
    reference: str | None

    @property
    def scores(self) -> NeuronScores | None:
        """The model's scores that the reference names."""
        from skillfast.statistics.scores import NeuronScores

        return None if self.reference is None else NeuronScores.load(self.reference)


def _removal(modes: Sequence[str], told: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of a removal, which the command gets as `removal`."""
    mode = click.option("--mode", type=click.Choice(modes), default="zero", show_default=True, help=told)

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**given: Any) -> None:
            removal = _Removal(**{field.name: given.pop(field.name) for field in fields(_Removal)})
            command(removal=removal, **given)

        return options(_skills, mode, _reference)(called)

    return with_options


def _with_model_kwargs(given: Mapping[str, Any]) -> dict[str, Any]:
    """A command's options, with the arguments of the model's constructor parsed; without any where none was given."""
    found = dict(given)
    if pairs := found.pop("model_kwargs", None):
        from skillfast.models.loading import parse_model_kwargs

        found["model_kwargs"] = parse_model_kwargs(pairs)
    return found


def _config(given: dict[str, Any]) -> BenchConfig:
    """The run's settings from a command's options, as far as it has them."""
    known = {name: value for name, value in given.items() if name in BenchConfig.names() and name != "model_kwargs"}
    if known.get("like") is not None or known.get("replay") is not None:  # what is not typed is the earlier run's
        source = click.get_current_context().get_parameter_source
        known = {name: value for name, value in known.items() if source(name) is ParameterSource.COMMANDLINE}
        if known.get("replay") is not None and given["model_kwargs"]:
            known["model_kwargs"] = given["model_kwargs"]  # to be refused as the others are
    config = BenchConfig.of(**known)
    if not given["model_kwargs"]:
        return config
    from skillfast.models.loading import parse_model_kwargs

    return config.replaced(model_kwargs=parse_model_kwargs(given["model_kwargs"]))


def _made(group: type, given: dict[str, Any]) -> Any:
    """Settings of a class from a command's options, as far as it has them."""
    return group(**{f.name: given[name_of(f)] for f in fields(group) if name_of(f) in given})


def _show(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="skillfast")
def main() -> None:
    """Find the skills inside a trained transformer, remove them, and see what that does."""


@main.command(cls=Command)
@_subject
@options_of(TraceConfig, but=["metrics"])
@options_of(SelectConfig)
@options_of(AblateConfig)
@options_of(RunConfig)
@_quiet
def bench(quiet: bool, **given: Any) -> None:
    """Trace a model, remove each class's skill, and write a report.

    With no option: the digits images that scikit-learn carries, and a small vision transformer that is trained on
    first use and cached.
    """
    config = _config(given)  # refused before anything heavy is imported
    from skillfast.runs.bench import bench as run

    report = run(config, quiet=quiet, say=_say(quiet))
    if not quiet:
        from skillfast.report import summary_table

        _show(summary_table(report.results))
    click.echo(f"report: {report.directory / 'report.html'}")
    if report.replay is not None:
        from skillfast.report import replay_text

        click.echo(replay_text(report.replay))
        click.get_current_context().exit(report.replay.exit_code)


@main.command(cls=Command)
@_subject
@options_of(TraceConfig)
@options_of(RunConfig, but=["resume", "like", "replay"])
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Neurons to show per metric.")
@click.option(
    "--given",
    "fixed",
    type=Names(),
    default="",
    metavar="METRICS",
    help="Show partial correlations: what is left of r within these metrics. The file holds what all need.",
)
@_quiet
def trace(quiet: bool, top: int, fixed: tuple[str, ...], **given: Any) -> None:
    """Correlate every neuron with label, correctness, confidence and loss, or others; write scores.safetensors."""
    from skillfast.files import output_folder
    from skillfast.runs.trace import check_given, traced

    config = _config(given)
    check_given(config, fixed)
    output_folder(config.run.output)  # one that cannot be written is told before the expensive step
    scores = traced(config, quiet=quiet, say=_say(quiet))
    path = scores.save(config.run.output)
    if not quiet:
        from skillfast.report import top_neurons_table
        from skillfast.runs.trace import of_given

        _show(top_neurons_table(of_given(scores, fixed), top))
    click.echo(f"scores: {path}")


@main.command(cls=Command)
@_subject
@_removal(
    [mode for mode in words.MODES if mode != "constant"],
    "What is left: nothing, the neuron's mean, or a donor's activation, one of the examples to select on.",
)
@options_of(RunConfig, but=["output", "resume", "like", "replay"])
@_quiet
def ablate(quiet: bool, removal: _Removal, **given: Any) -> None:
    """Remove or amplify skills and show each class's accuracy before and after."""
    from skillfast.report import accuracy_table
    from skillfast.runs.ablate import ablated
    from skillfast.skills.skill import load_skills

    config = _config(given)
    chosen = list(load_skills(removal.skills_from, removal.names).values())
    result = ablated(
        config,
        chosen,
        removal.components,
        mode=removal.mode,
        reference=removal.scores,
        quiet=quiet,
        say=_say(quiet),
    )
    _show(
        accuracy_table(
            result.classes,
            result.baseline,
            {s.name: row for s, row in zip(chosen, result.per_class_accuracy, strict=True)},
        )
    )


@main.command(cls=Command)
@options_of(ModelConfig, only=["model", "model_kwargs", "checkpoint", "pretrained", "pad_token"])
@_removal(words.FOLDED, "What is left.")
@click.option("--knobs", is_flag=True, help="Factors that were saved with the skills as their knobs, not --scale.")
@click.option("--output", required=True, type=click.Path(), help="A new folder, for the checkpoint.")
@_quiet
def export(quiet: bool, removal: _Removal, output: str, scale: float, knobs: bool, **given: Any) -> None:
    """Write a checkpoint without a skill, or with an amplified one, that runs without skillfast.

    The model is that of the run whose folder --skills names, if no --model is given. Equal to `ablate`: the factor is
    folded into the columns of the output projections.
    """
    if knobs and click.get_current_context().get_parameter_source("scale") is ParameterSource.COMMANDLINE:
        raise ArgumentError(f"scale: expected it without --knobs, got both ({scale:g}); leave one out")
    from skillfast.runs.export import exported

    path = exported(
        _made(ModelConfig, _with_model_kwargs(given)),
        removal.skills_from,
        output,
        names=removal.names,
        scale=None if knobs else scale,
        mode=removal.mode,
        reference=removal.scores,
        components=removal.components,
        quiet=quiet,
    )
    click.echo(f"checkpoint: {path}")


@main.command(cls=Command)
@_subject
@options_of(TraceConfig, metrics=EVALUATED)
@click.option("--tasks", type=Names(), default="", help="Metrics whose neurons to compare: label,column:length,loss.")
@click.option("--shortcut", metavar="column:NAME", help="Column of what a heuristic answers, to find its neurons.")
@click.option("--skills", "skills_from", type=click.Path(), help="skills.json of another run, instead of choosing.")
@options_of(SelectConfig, only=["method"], method="pearson")
@options_of(Grid, but=["seed", "replicates"])
@options_of(Generation)
@options_of(RunConfig, but=["resume", "like", "replay"])
@_quiet
def evaluate(quiet: bool, **given: Any) -> None:
    """Remove and amplify skills on held-out data, by size and by layer, beside random neurons.

    A classifier's accuracy and F1; with --metrics token_log_probability a causal language model's perplexity, and BLEU
    of what it writes against what it writes intact. --shortcut column:NAME removes the neurons that follow what a
    heuristic answers and not the label, and says what changes where the two disagree.
    """
    from skillfast.files import output_folder
    from skillfast.report import dose_table, evaluation_table, shortcut_summary, shortcut_table, write_evaluation
    from skillfast.runs.evaluate import evaluate as run

    metrics, output = given.pop("metrics"), given["output"]  # metrics: some of what a BenchConfig traces of images
    settings = {
        **{name: given[name] for name in ("tasks", "shortcut")},
        "skills": given["skills_from"],
        "generation": _made(Generation, given),
    }
    config, grid = _config(given), _made(Grid, given)
    output_folder(output)  # one that cannot be written is told before the expensive step
    found = run(config, grid, metrics=metrics, **settings, quiet=quiet, say=_say(quiet))
    found.save(output)
    if not quiet:
        _show(evaluation_table(found.results))
        if found.results.curves():
            _show(dose_table(found.results))
        if (followed := found.results.shortcut) is not None:
            click.echo("\n".join(shortcut_summary(followed)))
            if followed.removals:
                _show(shortcut_table(followed))
    click.echo(f"report: {write_evaluation(output)}")


@main.command(cls=Command)
@click.argument("sides", nargs=-1, required=True, metavar="BASE NEW | RUN RUN RUN...")
@click.option(
    "--gate", type=click.Path(), help="Thresholds, a gates.toml: exit with 3 for a regression, 4 for no pass."
)
@click.option("--margin", type=float, default=0.05, show_default=True, help="Change of accuracy that does not matter.")
@click.option("--format", "form", type=click.Choice(FORMATS), default=FORMATS[0], show_default=True)
@click.option(
    "--output", default="skillfast-compare", show_default=True,
    help="Folder for compare.json and compare.html, and for the runs of models.",
)  # fmt: skip
@options_of(ModelConfig, only=["model", "model_kwargs"])
@options_of(DataConfig, only=["dataset", "data_dir", "data_file"])
@options_of(RunConfig, only=["device"])
@_quiet
def compare(
    sides: tuple[str, ...], gate: str | None, margin: float, form: str, output: str, quiet: bool, **given: Any
) -> None:
    """Say what became of each skill between two runs or models on the same examples, or over the order of more runs.

    A run is a folder of `skillfast bench`; NEW's had best be made with `--like BASE`. A model is a checkpoint, hf: and
    a name or folder, or timm's name of a pretrained one: BASE is measured by `bench` with the options of model and data
    (others take `bench` first), NEW by `bench --like BASE`. Exits with 0, with 3 where a gate finds a regression, and
    with 4 where it cannot tell: other data, other classes, too few examples.

    Of more, such as the checkpoints of a training: when each skill appears, and where it moves (trajectory.json,
    trajectory.html).
    """
    source = click.get_current_context().get_parameter_source
    typed = {name: value for name, value in given.items() if source(name) is ParameterSource.COMMANDLINE}
    settings = _with_model_kwargs(typed)
    say = _say(quiet or form != FORMATS[0])  # other programs read the other formats
    if len(sides) != 2:
        if len(sides) == 1 or gate is not None or form not in FORMATS[:2]:
            raise ArgumentError(
                f"runs: expected two, BASE and NEW, got {len(sides)}; more are followed over their order, without "
                "--gate, as text or json"
            )
        _follow(sides, form, output, quiet=quiet, say=say, **settings)
        return
    from skillfast.report import audit_tables, comparison_text
    from skillfast.runs.compare import compare as run

    found = run(*sides, gate=gate, margin=margin, output=output, quiet=quiet, say=say, **settings)
    if form != FORMATS[0]:
        click.echo(comparison_text(found, form))
    elif not quiet:
        for table in audit_tables(found):
            _show(table)
        for line in comparison_text(found, form).splitlines():
            click.echo(line)
    if form == FORMATS[0]:
        click.echo(f"report: {Path(output) / 'compare.html'}")
    click.get_current_context().exit(found.exit_code)


def _follow(sides: Sequence[str], form: str, output: str, *, quiet: bool, **given: Any) -> None:
    """Show skills over several runs."""
    from skillfast.report import comparison_table, read_results, trajectory_table, trajectory_text
    from skillfast.runs.trajectory import trajectory

    found = trajectory(*sides, output=output, quiet=quiet, **given)
    if form != FORMATS[0]:
        click.echo((Path(output) / "trajectory.json").read_text(encoding="utf-8"))
    elif not quiet:
        directories = [run.directory for run in found.runs]
        _show(comparison_table({directory: read_results(directory) for directory in directories}))
        _show(trajectory_table(found))
        click.echo(trajectory_text(found))
    if form == FORMATS[0]:
        click.echo(f"report: {Path(output) / 'trajectory.html'}")
    click.get_current_context().exit(0 if found.skills else 4)


@main.command(cls=Command)
@click.argument("directory", type=click.Path())
@click.option(
    "--format",
    "kind",
    type=click.Choice(["html", "markdown", "cyclonedx", "png", "svg", "pdf"]),
    default="html",
    show_default=True,
    help="The page; a section for a model card; an ML-BOM; or each figure as a file, by kaleido and a browser.",
)
def report(directory: str, kind: str) -> None:
    """Make the pages of a folder again, from its JSON files: report, evaluation, compare and trajectory.

    Of a bench run also model-card.md (markdown), ml-bom.cdx.json (cyclonedx), or its figures as files in figures/ (png,
    svg, pdf).
    """
    from skillfast.report import (
        write_bom,
        write_card,
        write_comparison,
        write_evaluation,
        write_figures,
        write_report,
        write_trajectory,
    )
    from skillfast.results import bench, comparison, evaluation, trajectory

    if kind == "markdown":
        click.echo(f"model card: {write_card(directory)}")
    elif kind == "cyclonedx":
        click.echo(f"ML-BOM: {write_bom(directory)}")
    elif kind != "html":
        click.echo("\n".join(f"figure: {path}" for path in write_figures(directory, kind)))
    else:
        pages = (
            (comparison.FILE, write_comparison),
            (trajectory.FILE, write_trajectory),
            (evaluation.FILE, write_evaluation),
            (bench.FILE, write_report),
        )
        for write in [write for name, write in pages if (Path(directory) / name).is_file()] or [write_report]:
            click.echo(f"report: {write(directory)}")


@main.command(cls=Command)
@click.option("--model", help="As of bench: list its sites.")
@click.option("--model-kwarg", multiple=True, metavar="KEY=VALUE")
@click.option("--verify", is_flag=True, help="Certify that the model's sites hold all that its blocks do; else exit 1.")
def info(model: str | None, model_kwarg: tuple[str, ...], verify: bool) -> None:
    """Show versions and backends, the pretrained models of installed packages, and where a model's neurons are."""
    if verify and model is None:
        raise ArgumentError("verify: expected --model with it, got none; name the model")
    from skillfast import backends
    from skillfast.models.embedded import PACKAGES

    click.echo(f"skillfast {__version__}")
    for name, text in backends.status().items():
        click.echo(f"  {name}: {text}")
    for package in PACKAGES:
        click.echo(f"  {words.EMBEDDED}{package.name}: {package.status()}")
    if model is not None:
        from skillfast.models.huggingface import is_huggingface, load_config, skeleton
        from skillfast.models.loading import create_model, parse_model_kwargs
        from skillfast.models.sites import find_sites
        from skillfast.report import sites_table
        from skillfast.tracing.capture import plain_mlp

        if is_huggingface(model):
            made = skeleton(load_config(model))
        else:
            made = create_model(model, 1000, model_kwargs=parse_model_kwargs(model_kwarg)).model
        sites = find_sites(made.eval())
        read_in = {site.name: "activation" if plain_mlp(made, site) is not None else "hook" for site in sites}
        _show(sites_table(model, sites, read_in))
        if verify:
            from skillfast.models.coverage import coverage

            found = coverage(made)
            click.echo(f"{found} ({found.inputs})")
            if not found.complete:
                click.get_current_context().exit(1)


@main.command(cls=Command)
@click.option("--model", required=True, help="hf: and a name on the hub, a folder, a GGUF file or a config.json.")
@options_of(PlanConfig)
@click.option("--device-memory", help="Of one device, such as 80GiB; by default what is free here.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def plan(model: str, device_memory: str | None, as_json: bool, **given: Any) -> None:
    """Say what tracing a language model will take, before its weights are loaded.

    From its configuration alone: sites, neurons, the exact size of the state, and the peak of each device. Exits with
    1 where it does not fit.
    """
    import json

    from skillfast.memory.plan import parse_bytes
    from skillfast.memory.plan import plan as run

    found = run(model, PlanConfig(**given), device_memory=None if device_memory is None else parse_bytes(device_memory))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        from skillfast.report import plan_table

        _show(plan_table(found))
        click.echo(found.verdict())
    if not found.fits:
        click.get_current_context().exit(1)


def _say(quiet: bool) -> Callable[[str], None]:
    return (lambda _: None) if quiet else click.echo
