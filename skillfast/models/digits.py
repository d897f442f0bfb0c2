"""The embedded default: a small vision transformer for scikit-learn's digits, trained on first use and cached."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional
from torch.nn.init import trunc_normal_

from skillfast.data.digits import DIGITS_MEAN, DIGITS_STD
from skillfast.errors import DataError
from skillfast.files import cache_dir
from skillfast.models.loading import SCHEMA, LoadedModel, load_trained, save_trained
from skillfast.models.training import finetune
from skillfast.models.weights import first_line

if TYPE_CHECKING:
    from torch import Tensor

    from skillfast.data.splits import Splits

# whatever is changed here or in its training makes `_RECIPE` a new number
_RECIPE = 5
_DIGITS: dict[str, Any] = {
    "img_size": 8,
    "in_chans": 1,
    "patch_size": 2,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
    "weight_init": "jax",
}
_POSITIONS = 0.5  # deviation of initial position embeddings: with timm's 0.02 patches drown them, and it learns slowly
_DIGITS_EPOCHS = 25
_DIGITS_LR = 1.5e-3
_DIGITS_BATCH = 64
_MOVED = 0.6  # share of the images that training moves: resampled pixels are smoother than those that are to be read


def digits_model(seed: int = 0) -> LoadedModel:
    """Make the default model, untrained: a timm `VisionTransformer` of 4 blocks for 8 x 8 digits.

    Args:
        seed: seed of the initial weights; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = VisionTransformer(**_DIGITS)
        assert model.pos_embed is not None
        trunc_normal_(model.pos_embed, std=_POSITIONS)
    config = {
        "input_size": (1, 8, 8),
        "mean": (DIGITS_MEAN,),
        "std": (DIGITS_STD,),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    return LoadedModel(model.eval(), "digits", config, head_replaced=False, source="scratch")


def digits_by_name() -> tuple[torch.nn.Module, dict[str, Any]]:
    """Make the default model as timm makes it by name, untrained, and say from which arguments."""
    arguments = {name: value for name, value in _DIGITS.items() if name != "num_classes"}
    images = {"input_size": (1, 8, 8), "mean": (DIGITS_MEAN,), "std": (DIGITS_STD,), "crop_pct": 1.0}
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(
            "vit_tiny_patch16_224", num_classes=_DIGITS["num_classes"], pretrained_cfg_overlay=images, **arguments
        )
    return model, arguments


def load_or_train_digits(
    splits: Splits, seed: int = 0, quiet: bool = False, *, without: int | None = None
) -> tuple[LoadedModel, dict[str, Any]]:
    """Load the default model from the cache, or train it on the CPU (half a minute on two cores) and cache it.

    A cache file that cannot be read is made anew, and one that cannot be written is done without; a warning says so.

    Args:
        splits: from `load_digits(seed)`.
        seed: seed of the split, the initial weights and the training.
        quiet: draw no progress bar.
        without: a digit that the model is never to see; it is cached beside the default model.

    Returns:
        The model, and how it was trained (see `finetune`); both are the same whether it was cached or not.
    """
    loaded = replace(digits_model(seed), source="checkpoint")
    determined_by = [
        SCHEMA,
        _DIGITS,
        _RECIPE,
        seed,
        *(version.split(".")[:2] for version in (torch.__version__, timm.__version__)),
        *([] if without is None else [{"without": without}]),
    ]
    digest = hashlib.sha256(json.dumps(determined_by).encode()).hexdigest()[:12]
    path = cache_dir() / f"digits-{digest}.safetensors"
    if path.is_file():
        try:
            return loaded, load_trained(loaded.model, path)
        except DataError as error:  # whatever is wrong with it, it can be made again
            warnings.warn(f"cached model '{path}' cannot be read ({first_line(error)}); training again", stacklevel=2)
    loaded = replace(digits_model(seed), source="checkpoint")
    trained = train_digits(loaded.model, splits if without is None else splits.without(without), seed, quiet=quiet)
    try:
        save_trained(loaded.model, trained, path)
    except OSError as error:
        warnings.warn(f"trained model cannot be kept in '{path.parent}' ({first_line(error)})", stacklevel=2)
    return loaded, trained


def train_digits(
    model: torch.nn.Module, splits: Splits, seed: int = 0, *, epochs: int | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Train the default model in place, on the CPU; of `splits` without a class, it never sees that one.

    Args:
        model: From `digits_model`.
        splits: What it is trained on is `splits.select`.
        seed: Seed of the order and the augmentation.
        epochs: Passes; None for the default model's.
        quiet: Draw no progress bar.

    Returns:
        How it was trained (see `finetune`).
    """
    return finetune(
        model,
        splits,
        "all",
        epochs=epochs or _DIGITS_EPOCHS,
        lr=_DIGITS_LR,
        batch_size=_DIGITS_BATCH,
        seed=seed,
        quiet=quiet,
        augment=shift_and_turn,
        label_smoothing=0.1,
    )


def shift_and_turn(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, turn, scale and shear some images of a batch a little, at random; the others stay as they are.

    Args:
        images: float32 `[b, C, H, W]`, normalised digits; what comes in from outside is as dark as their background.
        generator: where the random numbers come from.
    """

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * limit

    angle, scale, shear = uniform(0.15), uniform(0.1).exp(), uniform(0.1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cos, shear - sin, uniform(0.15)], dim=1), torch.stack([sin, cos, uniform(0.15)], dim=1)]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    background = -DIGITS_MEAN / DIGITS_STD
    moved = functional.grid_sample(images - background, grid, mode="bicubic", align_corners=False) + background
    stay = torch.rand(len(images), generator=generator) >= _MOVED
    return torch.where(stay[:, None, None, None], images, moved)
