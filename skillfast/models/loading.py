"""timm models by name, with weights from a file or from a hub; weights that were trained here, saved and loaded."""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
from safetensors.torch import save_model
from timm.data import resolve_data_config

from skillfast.errors import ArgumentError, DataError, ModelError
from skillfast.files import checksum, metadata, open_tensors, replacing
from skillfast.models.weights import first_line, fit_checkpoint, hub, read_checkpoint, silent

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import Tensor, nn

SCHEMA = "skillfast.weights/1"


@dataclass(frozen=True)
class LoadedModel:
    """A classifier that is ready for use.

    Attributes:
        model: in eval mode, float32, on the CPU.
        name: timm's name, or "digits".
        data_config: input_size `(C, H, W)`, mean, std, crop_pct, interpolation: what its images should look like.
        head_replaced: the weights came with another classifier; this one is new and knows nothing yet.
        source: where the weights are from; "scratch" is nowhere.
    """

    model: nn.Module
    name: str
    data_config: dict[str, Any]
    head_replaced: bool
    source: Literal["scratch", "checkpoint", "pretrained"]


def create_model(
    name: str,
    num_classes: int | None,
    *,
    pretrained: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    model_kwargs: dict[str, Any] | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> LoadedModel:
    """Make a timm model and load its weights.

    Args:
        name: timm's name, with or without a pretrained tag.
        num_classes: outputs of the classifier; where the weights come with another number, the classifier is made anew.
            None: as many as the weights have.
        pretrained: load the weights that timm knows for it, from the local cache or the hub.
        checkpoint: load these weights instead: a `.safetensors` file, or a `.pt`, `.pth` or `.bin` file that holds
            nothing but weights.
        model_kwargs: further arguments for the model, as `depth=6`.
        seed: seed of the initial weights; the global random state is left as it was.
        quiet: draw no progress bar for a download.

    Raises:
        ArgumentError: the name is not known.
        ModelError: the arguments do not fit it, or the weights cannot be had, read or fitted.
    """
    cfg = _find(name)
    kwargs = dict(model_kwargs or {})
    if "num_classes" in kwargs:
        raise ArgumentError("--model-kwarg num_classes: expected no such argument, got one; the dataset determines it")
    download = pretrained and checkpoint is None
    state = None if checkpoint is None else read_checkpoint(Path(checkpoint))
    if num_classes is None:
        num_classes = _classes_of(name, cfg, state)
    # timm is strict about a download's tensors only where the classifier stays as it is
    first_classes = cfg.get("num_classes", num_classes) if download else num_classes
    with torch.random.fork_rng(devices=[]), hub(name, cfg, quiet) if download else silent():
        torch.default_generator.manual_seed(seed)
        try:
            model = timm.create_model(name, pretrained=download, num_classes=first_classes, **kwargs)
            if head_replaced := first_classes != num_classes:
                model.reset_classifier(num_classes)  # type: ignore[operator]
        except (TypeError, ValueError, AssertionError, AttributeError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"model '{name}': expected arguments that it takes, got {_arguments(kwargs)} ({first_line(error)}); "
                "check --model-kwarg"
            ) from error
    source: Literal["scratch", "checkpoint", "pretrained"] = "pretrained" if download else "scratch"
    if state is not None:
        head_replaced, source = fit_checkpoint(model, name, state, f"checkpoint '{checkpoint}'"), "checkpoint"
    return LoadedModel(model.eval(), name, _data_config(model, kwargs), head_replaced, source)


def _classes_of(name: str, cfg: dict[str, Any], state: dict[str, Tensor] | None) -> int:
    """How many classes a checkpoint's classifier has, or the one that timm downloads."""
    if state is None:
        return cfg["num_classes"]
    classifier = cfg.get("classifier", "head")
    weight = state.get(f"{classifier[0] if isinstance(classifier, tuple | list) else classifier}.weight")
    if weight is None:
        raise ModelError(
            f"checkpoint of '{name}': expected the weight of its classifier {classifier}, got none; pass a checkpoint "
            "with a classifier"
        )
    return len(weight)


def parse_model_kwargs(pairs: Iterable[str]) -> dict[str, Any]:
    """Parse `key=value` arguments, values as Python literals: `["depth=6", "qkv_bias=true", "global_pool=avg"]`.

    Raises:
        ArgumentError: an argument without "=", or with a key that is no name.
    """
    words = {"true": True, "false": False, "none": None}
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ArgumentError(f"--model-kwarg: expected key=value, got '{pair}'; for example depth=6")
        try:
            parsed[key] = words[value.lower()] if value.lower() in words else ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a bare word is a string
            parsed[key] = value
    return parsed


def _find(name: str) -> dict[str, Any]:
    """Look a name up in timm's registry: its pretrained configuration."""
    if name.startswith(("hf:", "hf-hub:", "hf_hub:", "local-dir:")) or Path(name).is_dir():
        got = "a Hugging Face model" if name.startswith("hf") else "a folder"
        raise ArgumentError(
            f"model '{name}': expected a timm model name for images, got {got}; language models are hf:NAME with "
            "--dataset text, and weights of timm's models are --checkpoint FILE"
        )
    arch, _, tag = name.partition(".")
    if any(mark in name for mark in "/\\:") or not timm.is_model(arch):
        close = difflib.get_close_matches(arch.lower(), timm.list_models(), n=3)
        raise ArgumentError(
            f"model '{name}': expected a timm model name, got an unknown one; "
            + (f"closest: {', '.join(close)}" if close else "timm.list_models() lists them")
        )
    known = [full.partition(".")[2] for full in timm.list_models(f"{arch}.*", pretrained=True)]
    if tag and tag not in known:
        raise ArgumentError(
            f"model '{name}': expected a pretrained tag of {arch}, got '{tag}'; "
            + (f"it has {', '.join(known)}" if known else "it has none")
        )
    cfg = timm.get_pretrained_cfg(name)
    return {} if cfg is None else cfg.to_dict()


def _data_config(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Say what the model's images look like; timm's own answer overlooks a size or channels given as arguments."""
    config = resolve_data_config({}, model=model)
    channels, *size = config["input_size"]
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or kwargs.get("img_size") or size
    height, width = (size, size) if isinstance(size, int) else size
    channels = kwargs.get("in_chans", channels)
    config["input_size"] = (channels, height, width)
    for key in ("mean", "std"):
        if len(config[key]) != channels:  # grey images, or more channels than anyone has measured
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def save_trained(model: nn.Module, trained: dict[str, Any], path: Path) -> None:
    """Write a model's weights, for `create_model(checkpoint=)` too, and in their metadata how it was trained."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sums = {name: checksum(tensor.cpu()) for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        save_model(model, str(temporary), metadata=metadata({"schema": SCHEMA, "trained": trained}, sums))


def load_trained(model: nn.Module, path: Path) -> dict[str, Any]:
    """Load weights that `save_trained` wrote and tell how they were trained.

    Raises:
        DataError: A file that is missing, broken or of another model; the model is then left as it was.
    """
    remedy = "train again"
    own = model.state_dict()
    with open_tensors(path, SCHEMA, remedy, "pt") as file:
        trained = file.header.get("trained")
        if not isinstance(trained, dict):
            raise DataError(f"{path}: expected how its weights were trained, got nothing of it; {remedy}")
        shapes = {name: shape for name, (_, shape) in file.kinds.items()}
        # a tensor of two names is in the file once, and the other name in the metadata
        tied = {name: file.metadata[name] for name in own if name not in shapes and file.metadata.get(name) in shapes}
        shapes |= {name: shapes[other] for name, other in tied.items()}
        odd = sorted(name for name in {*own, *shapes} if name not in own or shapes.get(name) != tuple(own[name].shape))
        if odd:
            raise DataError(f"{path}: expected the {len(own)} tensors of the model, got another {odd[0]}; {remedy}")
        state = {name: file.get(tied.get(name, name)) for name in own}
    model.load_state_dict(state)
    return trained


def _arguments(kwargs: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in kwargs.items()) or "its defaults"
