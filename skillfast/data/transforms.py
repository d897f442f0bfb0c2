"""From a picture to the tensor that a model was trained on: timm's own transforms and data configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from timm.data import create_transform, resolve_data_config
from torchvision.transforms import Compose, Grayscale

from skillfast.errors import ArgumentError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class Transforms:
    """The two views of a picture.

    Attributes:
        evaluate: resize, crop and normalise, without chance: PIL image to float32 `[C, H, W]`.
        train: for training, to the size of `evaluation` through a random crop and flip; None where training sees what
            evaluation sees.
        config: what they were made from: timm's data configuration (input_size, mean, std, crop_pct, interpolation...).
    """

    evaluate: Callable[[Image], Tensor]
    train: Callable[[Image], Tensor] | None
    config: dict[str, Any]


def make_transforms(
    data_config: dict[str, Any],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
) -> Transforms:
    """Make the transforms for a model.

    Args:
        data_config: the model's own, as in `LoadedModel.data_config`.
        mean: per channel, in units of the pixel range 0..1; replaces the model's own. One value serves all channels.
        std: per channel, likewise.
        crop_pct: share of the resized picture's side that the centre crop keeps, in (0, 1].

    Returns:
        The transforms, with the configuration that they were made from.

    Raises:
        ArgumentError: a mean, std or crop_pct that cannot be used.
        ModelError: a model that takes neither 1 nor 3 channels.
    """
    channels = data_config["input_size"][0]
    if channels not in (1, 3):
        raise ModelError(
            f"model input: expected 1 or 3 channels, got {channels}; images have one (grey) or three (RGB)"
        )
    overrides = {
        "mean": _per_channel("--mean", mean, channels),
        "std": _per_channel("--std", std, channels),
        "crop_pct": crop_pct,
    }
    if std is not None and min(std) <= 0:
        raise ArgumentError(f"--std: expected positive numbers, got {_numbers(std)}; give the training data's own")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ArgumentError(f"--crop-pct: expected a number above 0 and at most 1, got {crop_pct:g}; 1 keeps all")
    config = resolve_data_config({**data_config, **{k: v for k, v in overrides.items() if v is not None}})
    evaluate = create_transform(**config)
    # small crops and a flip: enough against memorising a few hundred images, and no digit or scene changes its class
    train = create_transform(**config, is_training=True, scale=(0.7, 1.0), ratio=(0.9, 1 / 0.9), color_jitter=0.0)
    if channels == 1:
        evaluate, train = Compose([Grayscale(), evaluate]), Compose([Grayscale(), train])
    return Transforms(evaluate, train, config)


def _per_channel(option: str, values: Sequence[float] | None, channels: int) -> tuple[float, ...] | None:
    if values is None:
        return None
    if len(values) not in (1, channels):
        wanted = "1 number" if channels == 1 else f"1 or {channels} numbers"
        raise ArgumentError(
            f"{option}: expected {wanted} for {channels}-channel images, got {len(values)} ({_numbers(values)}); "
            "give one per channel"
        )
    return tuple(values) * (channels // len(values))


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
