"""Projection modules: how wide one is, and where its neurons lie in what it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from skillfast.vocabulary import Layout

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


def input_width(module: nn.Module) -> int | None:
    """The number of input features of a projection; None for any other module.

    A projection is whatever has `in_features`, as `nn.Linear`, its quantised kin and adapters around it have, a
    transposed linear layer (`Conv1D` of GPT-2), whose weight is [in, out], or a convolution, whose neurons are its
    input channels.
    """
    if isinstance(width := getattr(module, "in_features", None), int):
        return width
    if isinstance(module, CONVOLUTIONS):
        return module.in_channels
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return weight.shape[0]
    return None


def parent_of(model: nn.Module, path: str) -> nn.Module:
    """The module around another."""
    return model.get_submodule(path.rpartition(".")[0])


def layout_of(model: nn.Module, path: str) -> Layout:
    """Where the projection at a path takes its neurons."""
    if isinstance(model.get_submodule(path), CONVOLUTIONS):
        return "channels_first"
    parent = parent_of(model, path)
    attention = parent if isinstance(parent, nn.MultiheadAttention) else getattr(parent, "self_attn", None)
    inside_torch = isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    return "tokens_first" if inside_torch and not getattr(attention, "batch_first", True) else "tokens"
