"""The SHA-256 of a model's weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from skillfast.errors import ModelError
from skillfast.models.text_classifier import TextClassifier


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over all of a model's weights, in hexadecimal: its parameters and buffers as its state dict names them.

    In the order of their names, for each tensor a line `name dtype [shape]` (such as `head.bias float32 [10]`) and a
    line feed, then its bytes. A tensor at a time lies on the CPU. A `TextClassifier` has the digest of its language
    model.

    Raises:
        ModelError: A tensor without values, on the meta device.
    """
    if isinstance(model, TextClassifier):
        model = model.language_model
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        values = _loaded(model, name) if tensor.is_meta else tensor.detach()
        digest.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _loaded(model: nn.Module, name: str) -> Tensor:
    """A tensor that accelerate keeps on disk or in memory between forwards."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if hasattr(module, "_hf_hook"):
        from accelerate.utils import align_module_device

        with align_module_device(module, torch.device("cpu")):
            tensor: Tensor = getattr(module, own).detach()
        if not tensor.is_meta:
            return tensor
    raise ModelError(f"weights: expected values of {name}, got none, on the meta device; load them first")
