"""Subjects that read images: timm's models, and the small default model for the digits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skillfast import data, files
from skillfast.errors import ArgumentError, ModelError
from skillfast.models import digits, loading, training, weights
from skillfast.models.sites import choose_sites
from skillfast.runs.kept import weights_of
from skillfast.runs.subject import Subject, Training
from skillfast.vocabulary import NO_TRAINING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from skillfast.runs.config import BenchConfig

CIFAR10_CLASSES = 10
CIFAR10_TRAIN, CIFAR10_TEST = 200, 100  # images per class of the published protocol
DIGITS_INPUT = (1, 8, 8)
DIGITS_NORMALISED = "the digits' own mean and deviation"


def image_subject(config: BenchConfig, device: torch.device, *, quiet: bool, say: Callable[[str], None]) -> Subject:
    """Load images and a timm model for them.

    Raises:
        SkillfastError: Data or a model that cannot be had, or that do not fit each other.
    """
    if config.model.name is None:
        return _digits(config, device, quiet)
    loaded = loading.create_model(
        config.model.name,
        _n_classes(config),
        pretrained=config.model.pretrained,
        checkpoint=config.model.checkpoint,
        model_kwargs=config.model.kwargs,
        seed=config.run.seed,
        quiet=quiet,
    )
    choose_sites(loaded.model, config.trace.sites)  # wrong sites fail before the expensive step
    mode = training.resolve_finetune(config.model.finetune, loaded)
    splits, described = _images(config, loaded, quiet)
    if splits.skipped:
        say(f"{len(splits.skipped)} unreadable images left out: {', '.join(splits.skipped[:3])}")
    model = loaded.model.to(device)

    def train() -> dict[str, Any]:
        return _finetune(config, loaded, splits, device, quiet)

    if mode == NO_TRAINING:
        how = Training(train)
    else:
        n = len(splits.train if mode == "all" and splits.train is not None else splits.select)
        line = f"training {_what_is_trained(mode)} of {config.model.name} ({loaded.source} weights) on {n} images"
        how = Training(train, line, weights_of(model))
    return Subject(config, model, loaded.name, splits, device, loaded.source, described, how)


def _finetune(
    config: BenchConfig, loaded: loading.LoadedModel, splits: data.Splits, device: torch.device, quiet: bool
) -> dict[str, Any]:
    """Train a model in place, as the settings say."""
    with torch.inference_mode(False):
        return training.finetune(
            loaded.model,
            splits,
            training.resolve_finetune(config.model.finetune, loaded),
            epochs=config.model.epochs,
            lr=config.model.lr,
            seed=config.run.seed,
            device=device,
            dtype=getattr(torch, config.run.precision),
            quiet=quiet,
            scratch=loaded.source == "scratch",
        )


def train_anew(
    config: BenchConfig, splits: data.Splits, device: torch.device, *, quiet: bool = True
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Make the model of the settings without weights, and train it on other data by the recipe that it has there.

    Args:
        config: The settings; weights that they name are not loaded.
        splits: What to train on, of as many classes.
        device: Where to train; the default model is trained on the CPU.
        quiet: Draw no progress bar.

    Returns:
        The model, in evaluation mode, and how it was trained.
    """
    settings = config.model
    if settings.name is None:
        made = digits.digits_model(config.run.seed).model
        trained = digits.train_digits(made, splits, config.run.seed, epochs=settings.epochs, quiet=quiet)
        return made.to(device), trained
    classes, seed = len(splits.classes), config.run.seed
    loaded = loading.create_model(settings.name, classes, model_kwargs=settings.kwargs, seed=seed, quiet=quiet)
    return loaded.model.to(device), _finetune(config, loaded, splits, device, quiet)


def _digits(config: BenchConfig, device: torch.device, quiet: bool) -> Subject:
    """The default: its trained weights come from the user's cache, or go there, or are those of `--checkpoint`."""
    splits = data.load_digits(config.run.seed)
    made = digits.digits_model(config.run.seed)
    choose_sites(made.model, config.trace.sites)
    model = made.model.to(device)
    if (path := config.model.checkpoint) is not None:
        if weights.fit_checkpoint(model, made.name, weights.read_checkpoint(Path(path)), f"checkpoint '{path}'"):
            raise ModelError(f"checkpoint '{path}': expected a classifier of 10 digits, got another; name its --model")
        done = Training(lambda: {"finetune": NO_TRAINING, "epochs": 0, "n_train": 0})
        return Subject(config, model, made.name, splits, device, "checkpoint", DIGITS_NORMALISED, done)

    def train() -> dict[str, Any]:
        loaded, trained = digits.load_or_train_digits(splits, config.run.seed, quiet=quiet)
        model.load_state_dict(loaded.model.state_dict())
        return trained

    return Subject(config, model, made.name, splits, device, "scratch", DIGITS_NORMALISED, Training(train))


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
        return data.load_digits(config.run.seed), DIGITS_NORMALISED
    transforms = data.make_transforms(
        data_config, mean=config.data.mean, std=config.data.std, crop_pct=config.data.crop_pct
    )
    if config.data.dataset == "cifar10":
        splits = data.load_cifar10(
            config.data.data_dir or files.cache_dir() / "cifar10",
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
