"""The C++ and CUDA ops of `skillfast._core`: hands over addresses, sizes and strides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skillfast.backends.capture import as_tokens, empty_capture, unit_stride
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


def _flow(x: Tensor, out: Tensor) -> tuple[Tensor, tuple[int, int, int, int, int, int, int, int]]:
    """The tensor that is read, to be held until the kernel has run, and a `Flow` of csrc/kernels.h."""
    rows = unit_stride(as_tokens(x))
    stride_batch, stride_token, _ = rows.stride()
    batch, tokens, width = rows.shape
    to = out.data_ptr() if out.numel() else 0
    return rows, (rows.data_ptr(), stride_batch, stride_token, batch, tokens, width, to, _DTYPES[x.dtype])


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    """A copy where it is needed, to be held until the kernel has run."""
    return None if tensor is None else tensor.contiguous()


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def neuron_scale(x: Tensor, scale: Tensor, shift: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
    """See `skillfast.ops.neuron_scale`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    _held, flow = _flow(x, out)
    scale, shift, condition = scale.contiguous(), _contiguous(shift), _contiguous(condition)
    if x.is_cuda:
        with torch.cuda.device(x.device):  # torch's own runtime and the extension's meet in the driver's context
            stream = torch.cuda.current_stream(x.device).cuda_stream
            _core.neuron_scale_cuda(flow, _at(scale), _at(shift), _at(condition), stream)
    else:
        _core.neuron_scale(flow, _at(scale), _at(shift), _at(condition), torch.get_num_threads())
    return out


def comoments_update(x: Tensor, y: Tensor, shift: Tensor, sum_x: Tensor, sum_xx: Tensor, sum_xy: Tensor) -> None:
    """See `skillfast.ops.comoments_update`."""
    n, width = x.shape
    if x.numel() == 0:
        return
    x, y = unit_stride(x), y.contiguous()
    _core.comoments_update(
        _at(x), x.stride(0), n, width, y.shape[1], _at(y), _at(shift), _at(sum_x), _at(sum_xx), _at(sum_xy),
        _DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip


def bins_update(x: Tensor, edges: Tensor, channels: Tensor, hats: Tensor, table: Tensor) -> None:
    """See `skillfast.ops.bins_update`."""
    n, width = x.shape
    if x.numel() == 0:
        return
    x, channels, hats = unit_stride(x), channels.contiguous(), hats.contiguous()
    bins, weights = edges.shape[1] + 1, hats.shape[1]
    arguments = (
        _at(x), x.stride(0), n, width, bins, channels.shape[1], table.shape[1] // bins - weights, weights, _at(edges),
        _at(channels), _at(hats), _at(table), _DTYPES[x.dtype],
    )  # fmt: skip
    if x.is_cuda:
        with torch.cuda.device(x.device):
            _core.bins_update_cuda(*arguments, torch.cuda.current_stream(x.device).cuda_stream)
    else:
        _core.bins_update(*arguments, torch.get_num_threads())


def act_mask_pool(
    x: Tensor, activation: str, pool: str, mask: Tensor | None = None, center: Tensor | None = None, write: bool = True
) -> tuple[Tensor, Tensor]:
    """See `skillfast.ops.act_mask_pool`."""
    out, pooled = empty_capture(x, pool, write)
    if x.numel() == 0:
        return out, pooled.fill_(0.0 if pool == "moments" else torch.nan)
    _held, flow = _flow(x, out)
    mask, center = _contiguous(mask), _contiguous(center)
    _core.act_mask_pool(
        flow, ACTIVATIONS.index(activation), _POOLS[pool], _at(mask), _at(center), _at(pooled), torch.get_num_threads()
    )
    return out, pooled


def act_pool_accumulate(
    x: Tensor, y: Tensor, center: Tensor, sum_x: Tensor, sum_xx: Tensor, sum_xy: Tensor, activation: str,
    mask: Tensor | None = None, write: bool = True,
) -> Tensor:  # fmt: skip
    """See `skillfast.ops.act_pool_accumulate`."""
    out, _ = empty_capture(x, "none", write)
    if x.numel() == 0:
        return out
    _held, flow = _flow(x, out)
    y, mask = y.contiguous(), _contiguous(mask)
    _core.act_pool_accumulate(
        flow, ACTIVATIONS.index(activation), _at(mask), y.dim() == 3, y.shape[-1], _at(y), _at(center), _at(sum_x),
        _at(sum_xx), _at(sum_xy), torch.get_num_threads(),
    )  # fmt: skip
    return out


IMPLEMENTATIONS: dict[str, Callable] = {
    "neuron_scale": neuron_scale,
    "comoments_update": comoments_update,
    "bins_update": bins_update,
    "act_mask_pool": act_mask_pool,
    "act_pool_accumulate": act_pool_accumulate,
}
_ON_CUDA = ("neuron_scale", "bins_update")


def implements(op: str, device: torch.device) -> bool:
    """Whether the C++ and CUDA sources have `op` for that kind of device."""
    return op in IMPLEMENTATIONS if device.type == "cpu" else device.type == "cuda" and op in _ON_CUDA


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
