"""Tensors between the host and devices."""

from __future__ import annotations

import torch


def moved(tensor: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    """A tensor on a device; None for where it is.

    The host does not wait for what goes to a GPU. It waits for what comes from one: such a copy that does not block
    returns before its values are there, and the host would read what was in that memory before.
    """
    if device is None:
        return tensor
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")
