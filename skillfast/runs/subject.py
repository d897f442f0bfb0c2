"""What a run measures: a model, its data, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skillfast import backends, data
from skillfast.ablation.interventions import Condition
from skillfast.ablation.sweep import SweepResult, sweep
from skillfast.errors import ArgumentError
from skillfast.memory.budget import limited_memory
from skillfast.metrics import check_metric_names
from skillfast.models import digits, loading, training
from skillfast.models.sites import choose_sites
from skillfast.models.text_classifier import TextClassifier
from skillfast.runs.checkpoints import run_training
from skillfast.runs.cost import Clock
from skillfast.runs.subject_causal import predicts_tokens, prepare_causal, trace_causal
from skillfast.runs.subject_text import prepare_text, trace_text
from skillfast.tracing.trace import trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.utils.data import DataLoader

    from skillfast.runs.checkpoints import Phases
    from skillfast.runs.config import BenchConfig
    from skillfast.skills.skill import Skill
    from skillfast.statistics.scores import NeuronScores
    from skillfast.vocabulary import Mode

    Say = Callable[[str], None]

CIFAR10_CLASSES = 10
CIFAR10_TRAIN, CIFAR10_TEST = 200, 100  # images per class of the published protocol
DIGITS_INPUT = (1, 8, 8)
VARIED_BATCH = 16  # small, so that a few hundred texts are of many lengths


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode on its device, and its data.

    Attributes:
        config: The settings that made it.
        model: The model.
        name: Name of the model.
        splits: Examples to select, validate and test on.
        trained: How its weights came about.
        normalisation: What images were normalised by, in words.
        device: Where it runs.
    """

    config: BenchConfig
    model: torch.nn.Module
    name: str
    splits: data.Splits
    trained: dict[str, Any]
    normalisation: str
    device: torch.device

    def loader(self, part: str) -> DataLoader[Any]:
        """Batches of `"select"`, `"validate"` or `"test"`, in the data's order."""
        return data.loader(getattr(self.splits, part), self.config.run.batch_size)

    def varied_loader(self, part: str) -> DataLoader[Any]:
        """Batches of which the first ones hold texts of all lengths, too; for images `loader`'s."""
        examples = getattr(self.splits, part)
        if not hasattr(examples, "lengths"):
            return self.loader(part)
        return data.loader(examples, VARIED_BATCH, shuffle=True, seed=self.config.run.seed)

    def precision(self) -> torch.autocast:
        """The context in which the model runs in the dtype that was asked for."""
        dtype = getattr(torch, self.config.run.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def dataset_json(self) -> dict[str, Any]:
        """The dataset object of results.json."""
        return {
            "name": self.splits.name,
            "classes": list(self.splits.classes),
            "n_select": len(self.splits.select),
            "n_validate": len(self.splits.validate),
            "n_test": len(self.splits.test),
        }


def choose_device(name: str | None) -> torch.device:
    """The device by name, or CUDA where there is one; raises ArgumentError where it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(f"device: expected cpu, cuda or cuda:<number>, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(
            f"device {name!r}: expected one that is there, got {torch.cuda.device_count()} CUDA devices; "
            "use --device cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"device: expected cpu, cuda or cuda:<number>, got {name!r}")
    return device


def choose_dtype(name: str | None, device: torch.device) -> str:
    """The dtype by name, or bfloat16 on a CUDA device that computes in it and float32 elsewhere."""
    if name is not None:
        return name
    halves = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if halves else "float32"


def on_device(config: BenchConfig) -> tuple[BenchConfig, torch.device]:
    """The device that was asked for, and the settings with its dtype."""
    device = choose_device(config.run.device)
    return config.replaced(dtype=choose_dtype(config.run.dtype, device)), device


def prepare(config: BenchConfig, clock: Clock, *, quiet: bool, say: Say, phases: Phases | None = None) -> Subject:
    """Load the data, make the model, and train what must be trained.

    Args:
        config: The settings.
        clock: Gets the seconds.
        quiet: Show no progress bars.
        say: Called with each line worth reading.
        phases: Keeps trained weights, and is told which data and weights the run is about; None keeps nothing.

    Raises:
        SkillfastError: Data or a model that cannot be had, a device that is not there.
    """
    config, device = on_device(config)
    if config.data.dataset == "text":
        classifier, texts, trained = prepare_text(config, device, clock, quiet=quiet, say=say, phases=phases)
        return Subject(
            config, classifier, str(config.model.name), texts, trained, "text as its tokenizer reads it", device
        )
    if config.data.dataset == "digits" and config.model.name is None:
        return _digits(config, device, clock, quiet=quiet)
    with clock.phase("data"):
        loaded = loading.create_model(
            config.model.name or "",
            _n_classes(config),
            pretrained=config.model.pretrained,
            checkpoint=config.model.checkpoint,
            model_kwargs=config.model.kwargs,
            seed=config.run.seed,
            quiet=quiet,
        )
        choose_sites(loaded.model, config.trace.sites)  # before anything is trained for nothing
        mode = training.resolve_finetune(config.model.finetune, loaded)
        splits, normalisation = _images(config, loaded, quiet)
    if splits.skipped:
        say(f"{len(splits.skipped)} unreadable images left out: {', '.join(splits.skipped[:3])}")
    model = loaded.model.to(device)
    if mode != "none":
        data_to_train = splits.train if mode == "all" and splits.train is not None else splits.select
        say(
            f"training {_what_is_trained(mode)} of {config.model.name} ({loaded.source} weights) on "
            f"{len(data_to_train)} images"
        )

    def train() -> dict[str, Any]:
        with torch.inference_mode(False):
            return training.finetune(
                model,
                splits,
                mode,
                epochs=config.model.epochs,
                lr=config.model.lr,
                seed=config.run.seed,
                device=device,
                dtype=getattr(torch, config.run.precision),
                quiet=quiet,
                scratch=loaded.source == "scratch",
            )

    trained = {"from": loaded.source, **run_training(model, splits, train, mode, clock, phases)}
    return Subject(config, model.eval(), loaded.name, splits, trained, normalisation, device)


def _digits(config: BenchConfig, device: torch.device, clock: Clock, *, quiet: bool) -> Subject:
    with clock.phase("data"):
        splits = data.load_digits(config.run.seed)
        choose_sites(digits.digits_model().model, config.trace.sites)  # before anything is trained for nothing
    with clock.phase("train"):
        loaded, trained = digits.load_or_train_digits(splits, config.run.seed, quiet=quiet)
    trained = {"from": "scratch", **trained}
    model = loaded.model.to(device).eval()
    return Subject(config, model, loaded.name, splits, trained, "the digits' own mean and deviation", device)


def _images(config: BenchConfig, loaded: loading.LoadedModel, quiet: bool) -> tuple[data.Splits, str]:
    """The splits, and in words what their images are normalised by."""
    data_config = loaded.data_config
    if config.data.dataset == "digits":
        if tuple(data_config["input_size"]) != DIGITS_INPUT:
            raise ArgumentError(
                f"model: expected one for the digits' {list(DIGITS_INPUT)} images, got one for "
                f"{list(data_config['input_size'])}; pass --model-kwarg in_chans=1 img_size=8 patch_size=2 (one "
                "--model-kwarg each), or another --dataset"
            )
        return data.load_digits(config.run.seed), "the digits' own mean and deviation"
    transforms = data.make_transforms(
        data_config, mean=config.data.mean, std=config.data.std, crop_pct=config.data.crop_pct
    )
    if config.data.dataset == "cifar10":
        splits = data.load_cifar10(
            config.data.data_dir or loading.cache_dir() / "cifar10",
            transforms,
            config.data.train_per_class or CIFAR10_TRAIN,
            config.data.test_per_class or CIFAR10_TEST,
            config.run.seed,
            download=config.data.data_dir is None,
            # a model without weights is not made by the few images that skills are selected on
            train_on_all=config.data.train_per_class is None and loaded.source == "scratch",
            quiet=quiet,
        )
    else:
        splits = data.load_imagefolder(
            config.data.data_dir or "",
            transforms,
            config.data.train_per_class,
            config.data.test_per_class,
            config.run.seed,
            skip_unreadable=config.data.skip_unreadable,
            quiet=quiet,
        )
    used = transforms.config
    own = (
        "the model's own"
        if (config.data.mean, config.data.std, config.data.crop_pct) == (None, None, None)
        else "as given"
    )
    words = f"normalised by mean {_short(used['mean'])}, std {_short(used['std'])}, crop {used['crop_pct']:g} ({own})"
    return splits, words


def _short(values: Sequence[float]) -> str:
    return "/".join(f"{value:g}" for value in values)


def _n_classes(config: BenchConfig) -> int:
    """How many classes the data has; the loaders say what is wrong with a folder that cannot be counted."""
    if config.data.dataset != "imagefolder":
        return CIFAR10_CLASSES  # the digits have as many
    train = Path(config.data.data_dir or "") / "train"
    return sum(entry.is_dir() for entry in train.iterdir()) if train.is_dir() else 2


def _what_is_trained(mode: str) -> str:
    return {"head": "the head", "last-block": "the last block and the head", "all": "all weights"}[mode]


def trace_part(subject: Subject, part: str, quiet: bool, *, statistics: tuple[str, ...] | None = None) -> NeuronScores:
    """Trace a part of the data with the subject's settings, and with other statistics where they are given."""
    statistics = statistics or subject.config.trace.statistics
    if isinstance(subject.model, TextClassifier):
        return trace_text(subject.config, subject.model, getattr(subject.splits, part), statistics, quiet)
    return trace(
        subject.model,
        subject.loader(part),
        sites=subject.config.trace.sites,
        pool=subject.config.trace.pool,  # type: ignore[arg-type]  # the tracer checks it
        statistics=statistics,
        bins=subject.config.trace.bins,
        classes=subject.splits.classes,
        quiet=quiet,
    )


def traced(config: BenchConfig, *, quiet: bool, say: Say) -> NeuronScores:
    """The scores of a run that does nothing but trace."""
    check_metric_names(config.trace.metrics)
    with backends.use_backend(config.run.backend):
        if predicts_tokens(config):
            return trace_causal(prepare_causal(*on_device(config)), quiet)
        subject = prepare(config, Clock(), quiet=quiet, say=say)
        with subject.precision():
            return trace_part(subject, "select", quiet)


def ablated(
    config: BenchConfig,
    skills: Sequence[Skill],
    components: Sequence[str],
    *,
    mode: Mode = "zero",
    reference: NeuronScores | None = None,
    quiet: bool,
    say: Say,
) -> SweepResult:
    """Accuracy on the test part without and with each skill's intervention."""
    conditions = [Condition(skill, tuple(components), config.ablate.scale, mode) for skill in skills]
    with backends.use_backend(config.run.backend), limited_memory(config.run.memory_bytes):
        subject = prepare(config, Clock(), quiet=quiet, say=say)
        with subject.precision():
            return sweep(
                subject.model,
                subject.loader("test"),
                conditions,
                reference=reference,
                classes=subject.splits.classes,
                quiet=quiet,
            )
