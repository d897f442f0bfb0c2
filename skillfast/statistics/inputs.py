"""What callers hand to an accumulator, as tensors that fit it; raises ArgumentError in one line where they do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from skillfast.errors import ArgumentError
from skillfast.transfer import moved

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike

    from skillfast.metrics import Metric


def as_tensor(values: ArrayLike | torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """Anything array-like as a detached tensor; a read-only array (a memory map) is copied, torch cannot share it."""
    if isinstance(values, torch.Tensor):
        return moved(values.detach(), device)
    try:
        array = np.ascontiguousarray(values)
        return moved(torch.from_numpy(array if array.flags.writeable else array.copy()), device)
    except (TypeError, ValueError) as error:
        kind = getattr(values, "dtype", type(values).__name__)
        raise ArgumentError(f"values: expected numbers, array-like, got {kind} ({error})") from error


def check_activations(activations: ArrayLike | torch.Tensor, n_neurons: int, device: torch.device) -> torch.Tensor:
    """Activations [n, n_neurons] in a floating dtype; integers become float64."""
    x = as_tensor(activations, device)
    if x.dim() != 2 or x.shape[1] != n_neurons:
        raise ArgumentError(f"activations: expected [n, {n_neurons}], got shape {list(x.shape)}")
    if x.is_complex():
        raise ArgumentError(f"activations: expected real numbers, got {x.dtype}; pass their size or their parts")
    return x if x.is_floating_point() else x.double()


def check_values(
    metrics: Mapping[str, Metric],
    given: Mapping[str, ArrayLike | torch.Tensor],
    n: int,
    device: torch.device,
    faults: torch.Tensor,
) -> torch.Tensor:
    """Each metric's values for n observations: float64 [n, metrics] on the device.

    Values on the CPU are checked at once. Those on a GPU are not waited for: what does not fit becomes 0, and is noted
    in `faults`, bool [metrics] on the device, for `State.refuse_faults`.
    """
    if set(given) != set(metrics):
        raise ArgumentError(f"metrics: expected values for {sorted(metrics)}, got {sorted(given)}")
    parts = []
    for i, (name, metric) in enumerate(metrics.items()):
        values = as_tensor(given[name])
        if values.shape != (n,):
            raise ArgumentError(f"metric {name!r}: expected {n} values, got shape {list(values.shape)}")
        if values.is_complex():
            raise ArgumentError(f"metric {name!r}: expected real numbers, got {values.dtype}")
        if values.device.type == "cpu":
            parts.append(moved(metric.check(name, values), device))
            continue
        wide = values.to(device).double()
        right = metric.fits(wide)
        faults[i] |= ~right.all()
        parts.append(torch.where(right, wide, 0.0))
    return torch.stack(parts, 1)


def check_token_values(name: str, values: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
    """A metric's values, one per example [batch] or per token [batch, tokens]; raises ArgumentError for others."""
    if values.shape not in ((batch,), (batch, tokens)):
        raise ArgumentError(
            f"metric {name!r}: expected values [{batch}] or [{batch}, {tokens}], got shape {list(values.shape)}; give "
            "one per example, or one per token of the blocks"
        )
    return values


def check_groups(groups: ArrayLike | torch.Tensor, n: int, device: torch.device) -> torch.Tensor:
    """Group numbers as float64 [n] on the device; those on a GPU are waited for."""
    column = as_tensor(groups).double()
    whole = (column == column.floor()) & (column.abs() < 2**53)  # what float64 tells apart
    if column.shape != (n,) or not bool(whole.all()):
        raise ArgumentError(
            f"groups: expected {n} whole numbers below 2^53, got other values or shape {list(column.shape)}; "
            "number the groups"
        )
    return moved(column, device)
