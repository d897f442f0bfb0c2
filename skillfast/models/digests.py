"""Digests of a model's weights: of all of them, or of a few values of each, which takes milliseconds."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from skillfast.errors import ModelError
from skillfast.models.shards import is_spread
from skillfast.models.text_classifier import TextClassifier


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over all of a model's weights, in hexadecimal: its parameters and buffers as its state dict names them.

    In the order of their names, for each tensor a line `name dtype [shape]` (such as `head.bias float32 [10]`) and a
    line feed, then its bytes. A tensor at a time lies on the CPU. A `TextClassifier` has the digest of its language
    model.

    Raises:
        ModelError: A tensor without values, on the meta device, or one of which other processes hold parts.
    """
    if isinstance(model, TextClassifier):
        model = model.language_model
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        _refuse_parts(name, tensor)
        values = _loaded(model, name) if tensor.is_meta else tensor.detach()
        digest.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sampled_digest(model: nn.Module) -> str:
    """A digest of every parameter's name and shape and of 32 of its values, spread evenly: 16 hexadecimal digits.

    Training changes it, being moved to another device does not. Of parameters on the meta device (offloaded ones)
    only name and shape enter.

    Raises:
        ModelError: A tensor of which other processes hold parts.
    """
    if isinstance(model, TextClassifier):
        model = model.language_model
    digest = hashlib.sha256()
    values: dict[torch.device, list[Tensor]] = {}
    order: list[torch.device] = []
    for name, parameter in sorted(model.named_parameters()):
        _refuse_parts(name, parameter)
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        if n := 0 if parameter.is_meta else parameter.numel():
            at = torch.arange(min(n, 32), device=parameter.device) * n // min(n, 32)
            few = parameter.detach()[torch.unravel_index(at, parameter.shape)].float().flatten()
            values.setdefault(parameter.device, []).append(few)
            order.append(parameter.device)
    here = {  # one copy of each device
        device: iter(torch.cat(parts).cpu().split([len(part) for part in parts])) for device, parts in values.items()
    }
    for device in order:
        digest.update(next(here[device]).numpy().tobytes())
    return digest.hexdigest()[:16]


def _refuse_parts(name: str, tensor: Tensor) -> None:
    if is_spread(tensor):
        raise ModelError(
            f"weights: expected those of {name} whole in this process, got a part of them (DTensor); load the model in "
            "one process"
        )


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
