"""The C++ and CUDA ops of `skillfast._core`: hands over addresses, sizes and strides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from skillfast.backends.capture import as_tokens, empty_capture, has_observations
from skillfast.vocabulary import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Callable

try:
    from skillfast import _core
except ImportError as error:  # a checkout that was never built
    _core = None  # type: ignore[assignment]
    _import_error = str(error)

_POOLS = {"none": 0, "mean": 1, "cls": 2, "max": 3, "last": 4, "moments": 5}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int, int]:
    """`x` as (tensor, stride_batch, stride_token, batch, tokens) with unit stride in the last dimension."""
    x = as_tokens(x)
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x, x.stride(0), x.stride(1), x.shape[0], x.shape[1]


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def neuron_scale(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None = None, condition: torch.Tensor | None = None
) -> torch.Tensor:
    """See `skillfast.ops.neuron_scale`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows, stride_batch, stride_token, batch, tokens = _rows(x)
    scale = scale.contiguous()
    shift = None if shift is None else shift.contiguous()
    condition = None if condition is None else condition.contiguous()
    arguments = (
        rows.data_ptr(), stride_batch, stride_token, batch, tokens, x.shape[-1], scale.data_ptr(), _address(shift),
        _address(condition), out.data_ptr(), _DTYPES[x.dtype],
    )  # fmt: skip
    if x.is_cuda:
        index = x.device.index
        _core.neuron_scale_cuda(*arguments, index, torch.cuda.current_stream(index).cuda_stream)
    else:
        _core.neuron_scale(*arguments, torch.get_num_threads())
    return out


def comoments_update(
    x: torch.Tensor,
    y: torch.Tensor,
    shift: torch.Tensor,
    sum_x: torch.Tensor,
    sum_xx: torch.Tensor,
    sum_xy: torch.Tensor,
) -> None:
    """See `skillfast.ops.comoments_update`."""
    n, width = x.shape
    if n == 0 or width == 0:
        return
    if x.stride(1) != 1 and width > 1:
        x = x.contiguous()
    y = y.contiguous()
    _core.comoments_update(
        x.data_ptr(), x.stride(0), n, width, y.shape[1], y.data_ptr(), shift.data_ptr(), sum_x.data_ptr(),
        sum_xx.data_ptr(), sum_xy.data_ptr(), _DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip


def bins_update(
    x: torch.Tensor, edges: torch.Tensor, channels: torch.Tensor, hats: torch.Tensor, table: torch.Tensor
) -> None:
    """See `skillfast.ops.bins_update`."""
    n, width = x.shape
    if n == 0 or width == 0:
        return
    if x.stride(1) != 1 and width > 1:
        x = x.contiguous()
    channels, hats = channels.contiguous(), hats.contiguous()
    bins = edges.shape[1] + 1
    _core.bins_update(
        x.data_ptr(), x.stride(0), n, width, bins, channels.shape[1], table.shape[1] // bins - hats.shape[1],
        hats.shape[1], edges.data_ptr(), channels.data_ptr(), hats.data_ptr(), table.data_ptr(), _DTYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Copies where they are needed; the caller holds them until the kernel has run."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def act_mask_pool(
    x: torch.Tensor,
    activation: str,
    pool: str,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    condition: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    center: torch.Tensor | None = None,
    write: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `skillfast.ops.act_mask_pool`."""
    y, pooled = empty_capture(x, pool, write)
    if x.numel() == 0:
        return y, pooled.fill_(0.0 if pool == "moments" else torch.nan)
    rows, stride_batch, stride_token, batch, tokens = _rows(x)
    held = _contiguous(scale, shift, condition, mask, center)
    of_scale, of_shift, of_condition, of_mask, of_center = map(_address, held)
    _core.act_mask_pool(
        rows.data_ptr(), stride_batch, stride_token, batch, tokens, x.shape[-1], ACTIVATIONS.index(activation),
        _POOLS[pool], of_scale, of_shift, of_condition, of_mask, of_center,
        y.data_ptr() if write else 0, pooled.data_ptr(), _DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y, pooled


def act_pool_accumulate(
    x: torch.Tensor,
    y: torch.Tensor,
    center: torch.Tensor,
    sum_x: torch.Tensor,
    sum_xx: torch.Tensor,
    sum_xy: torch.Tensor,
    activation: str,
    pool: str,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    condition: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    write: bool = True,
    edges: torch.Tensor | None = None,
    channels: torch.Tensor | None = None,
    hats: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `skillfast.ops.act_pool_accumulate`."""
    out, _ = empty_capture(x, "none", write)
    if not has_observations(x, pool):
        return out
    rows, stride_batch, stride_token, batch, tokens = _rows(x)
    held = _contiguous(scale, shift, condition, mask)
    of_scale, of_shift, of_condition, of_mask = map(_address, held)
    held_bins = _contiguous(edges, channels, hats, table)
    of_edges, of_channels, of_hats, of_table = map(_address, held_bins)
    y = y.contiguous()
    bins = metrics = counts = weights = 0
    if edges is not None and channels is not None and hats is not None and table is not None:
        bins, metrics, weights = edges.shape[1] + 1, channels.shape[1], hats.shape[1]
        counts = table.shape[1] // bins - weights
    _core.act_pool_accumulate(
        rows.data_ptr(), stride_batch, stride_token, batch, tokens, x.shape[-1], ACTIVATIONS.index(activation),
        _POOLS[pool], of_scale, of_shift, of_condition, of_mask, out.data_ptr() if write else 0, _DTYPES[x.dtype],
        y.shape[-1], y.data_ptr(), y.dim() == 3, center.data_ptr(), sum_x.data_ptr(), sum_xx.data_ptr(),
        sum_xy.data_ptr(), bins, metrics, counts, weights, of_edges, of_channels, of_hats, of_table,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


IMPLEMENTATIONS: dict[str, Callable] = {
    "neuron_scale": neuron_scale,
    "comoments_update": comoments_update,
    "bins_update": bins_update,
    "act_mask_pool": act_mask_pool,
    "act_pool_accumulate": act_pool_accumulate,
}
_ON_CUDA = ("neuron_scale",)


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the extension cannot run `op` there, or None."""
    if _core is None:
        return f"the C++ extension is not built ({_import_error}); run `pip install .`"
    if op not in IMPLEMENTATIONS:
        return f"the C++ extension has no {op}"
    if dtype not in _DTYPES:
        return f"the C++ extension has no {op} for {dtype}"
    if device.type == "cuda":
        if op not in _ON_CUDA:
            return f"the C++ extension has no {op} for CUDA"
        return None if _core.HAS_CUDA else "the C++ extension was built without nvcc"
    return None if device.type == "cpu" else f"the C++ extension does not run on {device.type}"


def describe() -> str:
    """One line for `skillfast info`."""
    if _core is None:
        return f"not built ({_import_error})"
    cuda = "with CUDA ops" if _core.HAS_CUDA else "without CUDA ops"
    return f"C++ for {_core.cpu_isa()}, threads by {_core.cpu_threads_runtime()}, {cuda}"
