"""Digests that tell weights and data of one run from those of another, without reading all of them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from skillfast.data.splits import LabelledDataset

_SAMPLED = 1024  # values of a tensor that its digest is made of
_LOOKED_AT = 32  # examples of each part of a data set that its digest is made of


def weights_digest(model: torch.nn.Module) -> str:
    """Digest of a model's weights, from some values of every tensor, spread over it."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if tensor.is_meta:  # offloaded: nothing to look at
            continue
        flat = tensor.detach().flatten()
        digest.update(flat[:: max(1, flat.numel() // _SAMPLED)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def data_digest(parts: Mapping[str, LabelledDataset]) -> str:
    """Digest of a data set, from all labels and some examples of every part."""
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(f"{name} {part.classes}".encode())
        digest.update(part.labels.numpy().tobytes())
        for index in range(0, len(part), max(1, len(part) // _LOOKED_AT)):
            example = part[index]
            image = example[0] if isinstance(example, tuple) else example
            digest.update(image.numpy().tobytes() if isinstance(image, torch.Tensor) else repr(image).encode())
    return digest.hexdigest()
