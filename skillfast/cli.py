"""The command line: parse, call, show. Imports no torch before a command runs."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

import click

from skillfast import __version__
from skillfast import vocabulary as words
from skillfast.errors import ArgumentError, SkillfastError

if TYPE_CHECKING:
    from collections.abc import Callable

    from skillfast.runs.config import BenchConfig

NUMBERS = ("--mean", "--std", "--shares", "--scales")


class _Failure(click.ClickException):
    """One line on stderr; exit code 2 for a wrong argument, 1 for a failed run."""

    def __init__(self, error: SkillfastError) -> None:
        super().__init__(str(error))
        self.exit_code = 2 if isinstance(error, ArgumentError) else 1  # type: ignore[misc]


class _Command(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _join_numbers(args))

    def invoke(self, ctx: click.Context) -> Any:
        with warnings.catch_warnings():
            # Ours are for the user, in one line; other libraries' are for their developers.
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"skillfast(\.|$)")
            warnings.showwarning = lambda message, *_: click.echo(f"warning: {message}", err=True)
            try:
                return super().invoke(ctx)
            except SkillfastError as error:
                raise _Failure(error) from error


def _join_numbers(args: list[str]) -> list[str]:
    """Join numbers in timm's spelling: `--mean 0.5 0.5 0.5` becomes `--mean 0.5,0.5,0.5`."""
    joined: list[str] = []
    for arg in args:
        if len(joined) > 1 and joined[-2] in NUMBERS and _is_number(arg):
            joined[-1] += f",{arg}"
        else:
            joined.append(arg)
    return joined


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class _Numbers(click.ParamType):
    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).replace(",", " ").split())
        except ValueError:
            self.fail(f"expected numbers such as 0.49 0.48 0.45, got {value!r}", param, ctx)


class _Names(click.ParamType):
    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002
        return value if isinstance(value, tuple) else tuple(part for part in str(value).split(",") if part)


def _options(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)

    return apply


_subject = _options(
    click.option(
        "--model",
        help="timm's name of a vision transformer, or hf: and a language model's name or folder; the default is a "
        "small one for the digits.",
    ),
    click.option("--model-kwarg", "model_kwarg", multiple=True, metavar="KEY=VALUE", help="Of its constructor."),
    click.option("--checkpoint", type=click.Path(), help="Its weights: a .safetensors or .pt file."),
    click.option("--pretrained/--no-pretrained", default=False, help="Download the weights that timm names."),
    click.option(
        "--finetune", type=click.Choice(words.FINETUNE), help="What to train first; by default what the model needs."
    ),
    click.option("--epochs", type=int, help="Passes of that training."),
    click.option("--lr", type=float, help="Its highest learning rate."),
    click.option("--dataset", type=click.Choice(words.DATASETS), default="digits", show_default=True),
    click.option(
        "--data-dir",
        type=click.Path(),
        help="Folder with train/<class> and test/<class>, or CIFAR-10's (by default downloaded).",
    ),
    click.option("--data-file", help="Text: a .tsv, .csv or .jsonl file, or hf:NAME[:CONFIG][@SPLIT]."),
    click.option("--test-file", help="Likewise, to test on; a third of --data-file by default."),
    click.option("--text-column", default="text", show_default=True),
    click.option("--label-column", default="label", show_default=True),
    click.option("--pair-column", help="A second text, for inference tasks."),
    click.option("--class-names", type=_Names(), default="", help="Of classes that the data numbers: bad,good."),
    click.option("--prompt", help="Template with {text}, for a model that only predicts tokens."),
    click.option("--label-words", type=_Names(), default="", help="Its words for the classes: ' bad, good'."),
    click.option("--pad-token", help="What to pad with, where the tokenizer has nothing."),
    click.option("--truncate", is_flag=True, help="Cut texts that are longer than the model's context."),
    click.option(
        "--train-per-class", type=int, help="Training examples of each class; by default 200 of CIFAR-10, else all."
    ),
    click.option(
        "--test-per-class", type=int, help="Test examples of each class; by default 100 of CIFAR-10, else all."
    ),
    click.option("--mean", type=_Numbers(), help="Of the images, per channel; the model's own by default."),
    click.option("--std", type=_Numbers(), help="Likewise."),
    click.option("--crop-pct", type=float, help="Share of the image that the centre crop keeps; likewise."),
    click.option("--skip-unreadable", is_flag=True, help="Leave out images that cannot be read, and count them."),
    click.option("--device", help="cpu, cuda, cuda:1; CUDA where there is one by default."),
    click.option(
        "--device-map",
        type=click.Choice(words.DEVICE_MAPS),
        help="Spread a language model over all devices (accelerate).",
    ),
    click.option("--bits", type=int, help="4 or 8: of a language model's linear layers (bitsandbytes)."),
    click.option(
        "--dtype",
        type=click.Choice(words.DTYPES),
        help="bfloat16 on a GPU that computes in it by default, else float32.",
    ),
    click.option("--batch-size", type=int, default=256, show_default=True),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--memory-budget", type=float, help="GiB for a sweep's results; half of what is free by default."),
    click.option("--backend", type=click.Choice(words.BACKENDS), default="auto", show_default=True),
    click.option("--quiet", is_flag=True, help="No progress bars and no tables, only results and errors."),
)
_tracing = _options(
    click.option("--sites", type=_Names(), default=",".join(words.KINDS), show_default=True, help="Kinds or names."),
    click.option("--statistics", type=_Names(), default=",".join(words.STATISTICS), show_default=True),
    click.option("--bins", type=int, default=words.BINS, show_default=True, help="Per neuron; fewer take less memory."),
    click.option("--pool", type=click.Choice(words.POOLS), default="mean", show_default=True, help="Over tokens."),
)
_selection = _options(
    click.option(
        "--method",
        type=click.Choice(("auto", *words.METHODS)),
        default="auto",
        show_default=True,
        help="What neurons are ranked by; auto takes the method and size that are best on the validation part.",
    ),
    click.option("--contrastive", is_flag=True, help="Rank by the score minus the best of the other classes."),
    click.option("--share", type=float, default=0.03, show_default=True, help="Of all neurons, for one skill."),
    click.option("--max-site-share", type=float, default=0.25, show_default=True, help="Of one site's neurons."),
)
_output = click.option(
    "--output", type=click.Path(), default="skillfast-report", show_default=True, help="Folder of the results."
)


def _config(options: dict[str, Any]) -> BenchConfig:
    """The run's settings from a command's options, as far as it has them."""
    from skillfast.models.loading import parse_model_kwargs
    from skillfast.runs.config import BenchConfig

    known = {name: value for name, value in options.items() if name in BenchConfig.names()}
    return BenchConfig(**known, model_kwargs=parse_model_kwargs(options["model_kwarg"]))


def _show(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="skillfast")
def main() -> None:
    """Find the skills inside a trained transformer, remove them, and see what that does."""


@main.command(cls=_Command)
@_subject
@_tracing
@_selection
@click.option("--scale", type=float, default=0.0, show_default=True, help="On removed neurons' activations.")
@click.option("--control-draws", type=int, default=5, show_default=True, help="Random controls per skill.")
@click.option("--resume/--no-resume", default=True, help="Go on from what an interrupted run left in --output.")
@_output
def bench(quiet: bool, **options: Any) -> None:
    """Trace a model, remove each class's skill, and write a report.

    With no option: the digits images that scikit-learn carries, and a small vision transformer that is trained on
    first use and cached.
    """
    from skillfast.runs.bench import bench as run

    report = run(_config(options), quiet=quiet, say=_say(quiet))
    if not quiet:
        from skillfast.report import summary_table

        _show(summary_table(report.results))
    click.echo(f"report: {report.directory / 'report.html'}")


@main.command(cls=_Command)
@_subject
@_tracing
@click.option(
    "--metrics",
    type=_Names(),
    default=",".join(words.METRICS),
    show_default=True,
    help=f"Of text: {', '.join(words.ALL_METRICS)}, module:function, column:NAME.",
)
@click.option("--top", type=int, default=5, show_default=True, help="Neurons to show per metric.")
@_output
def trace(quiet: bool, top: int, output: str, **options: Any) -> None:
    """Correlate every neuron with label, correctness, confidence and loss, or others; write scores.safetensors."""
    from skillfast.files import output_folder
    from skillfast.runs.subject import traced

    output_folder(output)  # before anything is trained for nothing
    scores = traced(_config(options), quiet=quiet, say=_say(quiet))
    path = scores.save(output)
    if not quiet:
        from skillfast.report import top_neurons_table

        _show(top_neurons_table(scores, top))
    click.echo(f"scores: {path}")


@main.command(cls=_Command)
@_subject
@click.option("--skills", "skills_from", required=True, type=click.Path(), help="skills.json, or a folder with one.")
@click.option("--skill", "names", multiple=True, help="Names of skills; all by default.")
@click.option("--scale", type=float, default=0.0, show_default=True, help="0 removes, 2 doubles.")
@click.option("--components", type=_Names(), default=",".join(words.KINDS), show_default=True)
@click.option(
    "--mode",
    type=click.Choice(words.MODES),
    default="zero",
    show_default=True,
    help="What is left: nothing, the neuron's mean, or another example's activation.",
)
@click.option("--reference", type=click.Path(), help="Folder with this model's scores.safetensors, for --mode mean.")
def ablate(
    quiet: bool,
    skills_from: str,
    names: tuple[str, ...],
    components: tuple[str, ...],
    mode: words.Mode,
    reference: str | None,
    **options: Any,
) -> None:
    """Remove or amplify skills and show each class's accuracy before and after."""
    from skillfast.report import accuracy_table
    from skillfast.runs.subject import ablated
    from skillfast.skills.skill import load_skills
    from skillfast.statistics.neuron_scores import NeuronScores

    skills = load_skills(skills_from)
    scores = None if reference is None else NeuronScores.load(reference)
    unknown = [name for name in names if name not in skills]
    if unknown:
        raise ArgumentError(f"skill: expected some of {', '.join(skills)}, got {', '.join(unknown)}")
    chosen = [skills[name] for name in names] if names else list(skills.values())
    result = ablated(_config(options), chosen, components, mode=mode, reference=scores, quiet=quiet, say=_say(quiet))
    _show(
        accuracy_table(
            result.classes,
            result.baseline,
            {s.name: row for s, row in zip(chosen, result.per_class_accuracy, strict=True)},
        )
    )


@main.command(cls=_Command)
@_subject
@_tracing
@click.option("--metrics", type=_Names(), default="label", show_default=True, help="Whose skills; as for trace.")
@click.option("--tasks", type=_Names(), default="", help="Metrics whose neurons to compare: label,column:length,loss.")
@click.option("--skills", "skills_from", type=click.Path(), help="skills.json of another run, instead of choosing.")
@click.option(
    "--method",
    type=click.Choice(words.METHODS),
    default="pearson",
    show_default=True,
    help="What neurons are ranked by.",
)
@click.option("--contrastive", is_flag=True, help="Rank by the score minus the best of the other classes.")
@click.option("--signed", is_flag=True, help="Rank a continuous metric's neurons by the score, not by its size.")
@click.option("--shares", type=_Numbers(), default="0.001,0.003,0.01", show_default=True, help="Sizes, of all neurons.")
@click.option("--layers", type=_Names(), default="all,each", show_default=True, help="Also last, head, blocks.3, ...")
@click.option("--scales", type=_Numbers(), default="0,0.5,2,4", show_default=True, help="Factors; 0 removes.")
@click.option("--max-site-share", type=float, default=0.25, show_default=True, help="Of one site's neurons.")
@click.option("--control-draws", "draws", type=int, default=3, show_default=True, help="Random controls per skill.")
@click.option("--prefix-tokens", type=int, default=8, show_default=True, help="Of held-out texts, to write on from.")
@click.option("--max-new-tokens", type=int, default=32, show_default=True, help="To write; 0 leaves BLEU out.")
@click.option("--generations", type=int, default=64, show_default=True, help="Held-out texts to write on from.")
@_output
def evaluate(quiet: bool, output: str, **options: Any) -> None:
    """Remove and amplify skills on held-out data, by size and by layer, beside random neurons.

    A classifier's accuracy and F1; with --metrics token_log_probability a causal language model's perplexity, and BLEU
    of what it writes against what it writes intact.
    """
    from skillfast.evaluation.generation import Generation
    from skillfast.evaluation.grid import Grid
    from skillfast.files import output_folder
    from skillfast.report import evaluation_table, write_evaluation
    from skillfast.runs.evaluate import evaluate as run

    output_folder(output)  # before anything is trained for nothing
    names = ("signed", "contrastive", "shares", "layers", "scales", "max_site_share", "draws", "seed")
    grid = Grid(**{name: options[name] for name in names})
    metrics, tasks = options.pop("metrics"), options.pop("tasks")
    generation = Generation(options["prefix_tokens"], options["max_new_tokens"], options["generations"])
    settings = {"metrics": metrics, "tasks": tasks, "skills": options["skills_from"], "generation": generation}
    found = run(_config(options), grid, **settings, quiet=quiet, say=_say(quiet))
    found.save(output)
    if not quiet:
        _show(evaluation_table(found.to_json()))
    click.echo(f"report: {write_evaluation(output)}")


@main.command(cls=_Command)
@click.argument("directories", nargs=-1, required=True, type=click.Path())
def compare(directories: tuple[str, ...]) -> None:
    """Show the results of several bench runs side by side."""
    from skillfast.report import comparison_table, read_results

    _show(comparison_table({directory: read_results(directory) for directory in directories}))


@main.command(cls=_Command)
@click.argument("directory", type=click.Path())
def report(directory: str) -> None:
    """Make report.html again from the files of a bench run, or evaluation.html from those of an evaluation."""
    from pathlib import Path

    from skillfast.report import write_evaluation, write_report

    evaluated = (Path(directory) / "evaluation.json").is_file()
    if evaluated:
        click.echo(f"report: {write_evaluation(directory)}")
    if not evaluated or (Path(directory) / "results.json").is_file():
        click.echo(f"report: {write_report(directory)}")


@main.command(cls=_Command)
@click.option("--model", help="timm's name, or hf: and a name or folder: list its sites.")
@click.option("--model-kwarg", multiple=True, metavar="KEY=VALUE")
def info(model: str | None, model_kwarg: tuple[str, ...]) -> None:
    """Show versions and backends, and where a model's neurons are."""
    from skillfast import backends

    click.echo(f"skillfast {__version__}")
    for name, text in backends.status().items():
        click.echo(f"  {name}: {text}")
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


@main.command(cls=_Command)
@click.option("--model", required=True, help="hf: and a name on the hub, a folder or a config.json.")
@click.option("--task", type=click.Choice(["own", "classification", "causal"]), default="own", show_default=True)
@click.option("--sites", type=_Names(), default=",".join(words.KINDS), show_default=True, help="Kinds or names.")
@click.option("--statistics", type=_Names(), default=",".join(words.STATISTICS), show_default=True)
@click.option("--bins", type=int, default=words.BINS, show_default=True)
@click.option("--metrics", type=_Names(), default=",".join(words.METRICS), show_default=True)
@click.option("--classes", type=int, default=2, show_default=True, help="Of the labels.")
@click.option("--n-bootstrap", type=int, help="Replicates of the bootstrap.")
@click.option("--dtype", type=click.Choice(words.DTYPES), default="bfloat16", show_default=True)
@click.option("--bits", type=click.Choice(["4", "8"]), help="Of quantised linear layers.")
@click.option("--batch-size", type=int, default=8, show_default=True)
@click.option("--tokens", type=int, default=512, show_default=True, help="Per example.")
@click.option("--examples", type=int, default=100_000, show_default=True)
@click.option("--devices", type=int, default=1, show_default=True, help="Over which the blocks are spread.")
@click.option("--device-memory", help="Of one device, such as 80GiB; by default what is free here.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def plan(model: str, bits: str | None, device_memory: str | None, as_json: bool, **options: Any) -> None:
    """Say what tracing a language model will take, before its weights are loaded.

    From its configuration alone: sites, neurons, the exact size of the state, and the peak of each device. Exits with
    1 where it does not fit.
    """
    import json

    from skillfast.memory.plan import Settings, parse_bytes
    from skillfast.memory.plan import plan as run

    settings = Settings(bits=None if bits is None else int(bits), **options)
    found = run(model, settings, device_memory=None if device_memory is None else parse_bytes(device_memory))
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
