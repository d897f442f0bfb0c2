"""The op contract: schemas, shape checks, fakes and gradients, one name in every layer.

Each op is declared once with `torch.library`; the implementation for a device asks `skillfast.backends` for the code
that runs it. Import this module for its side effect (the registration), call the functions below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from skillfast import backends
from skillfast.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

_LIBRARY = torch.library.Library("skillfast", "DEF")
_LIBRARY.define("neuron_scale(Tensor x, Tensor scale, Tensor? shift=None, Tensor? condition=None) -> Tensor")
_LIBRARY.define(
    "comoments_update(Tensor x, Tensor y, Tensor shift, Tensor(a!) sum_x, Tensor(b!) sum_xx, Tensor(c!) sum_xy) -> ()"
)

_LIBRARY.define("cells_update(Tensor x, Tensor edges, Tensor channels, Tensor hats, Tensor(a!) table) -> ()")

MAX_CELLS = 256


def _expect(what: str, expected: object, got: object) -> None:
    if expected != got:
        raise ArgumentError(f"{what}: expected {expected}, got {got}")


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def neuron_scale(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None = None,
    condition: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scale and shift neurons, each sample by the row of its own condition.

    `out[b, ..., d] = x[b, ..., d] * scale[condition[b], d] + shift[condition[b], d]`. A scale of 0 removes even a
    value that is not finite. Differentiable in `x` and `scale`.

    Args:
        x: Activations [batch, ..., D]: float32, bfloat16, float16 or float64.
        scale: [conditions, D], float32 (float64 with a float64 `x`).
        shift: Like `scale`, or None.
        condition: int64 [batch], each in [0, conditions), or None: every sample takes row 0.

    Returns:
        A new contiguous tensor of `x`'s shape and dtype.

    Raises:
        ArgumentError: Shapes or dtypes that do not fit together, or a condition out of range (checked on the CPU).
    """
    if x.dim() < 2:
        raise ArgumentError(f"neuron_scale x: expected [batch, ..., D], got shape {list(x.shape)}")
    if scale.dim() != 2 or scale.shape[1] != x.shape[-1]:
        raise ArgumentError(
            f"neuron_scale scale: expected [conditions, {x.shape[-1]}] to fit x {list(x.shape)}, "
            f"got shape {list(scale.shape)}"
        )
    _expect("neuron_scale scale's dtype", _accumulation_dtype(x.dtype), scale.dtype)
    if shift is not None:
        _expect("neuron_scale shift's shape", list(scale.shape), list(shift.shape))
        _expect("neuron_scale shift's dtype", scale.dtype, shift.dtype)
    if condition is not None:
        _expect("neuron_scale condition's shape", [x.shape[0]], list(condition.shape))
        _expect("neuron_scale condition's dtype", torch.int64, condition.dtype)
        if condition.device.type == "cpu" and condition.numel() and not torch.compiler.is_compiling():
            low, high = int(condition.min()), int(condition.max())
            if low < 0 or high >= scale.shape[0]:
                raise ArgumentError(
                    f"neuron_scale condition: expected indices in [0, {scale.shape[0]}), got {low} to {high}"
                )
    elif scale.shape[0] < 1:
        raise ArgumentError("neuron_scale scale: expected at least one row, got none")
    return torch.ops.skillfast.neuron_scale(x, scale, shift, condition)


def comoments_update(
    x: torch.Tensor,
    y: torch.Tensor,
    shift: torch.Tensor,
    sum_x: torch.Tensor,
    sum_xx: torch.Tensor,
    sum_xy: torch.Tensor,
) -> None:
    """Add a buffer of rows to the co-moments of neurons and metric columns, in place.

    With `v = x - shift`: `sum_x += sum v`, `sum_xx += sum v^2`, `sum_xy += y^T v`. Rows are summed in float32 a few
    dozen at a time and added to the float64 state.

    Args:
        x: Activations [n, D]: float32, bfloat16, float16 or float64.
        y: float32 [n, M], metric columns, already shifted by the caller.
        shift: float32 [D].
        sum_x: float64 [D], contiguous, mutated.
        sum_xx: float64 [D], contiguous, mutated.
        sum_xy: float64 [M, D], contiguous, mutated.

    Raises:
        ArgumentError: Shapes or dtypes that do not fit together.
    """
    if x.dim() != 2:
        raise ArgumentError(f"comoments_update x: expected [n, D], got shape {list(x.shape)}")
    n, width = x.shape
    if y.dim() != 2 or y.shape[0] != n:
        raise ArgumentError(f"comoments_update y: expected [{n}, M], got shape {list(y.shape)}")
    for name, tensor, shape, dtype in (
        ("y", y, list(y.shape), torch.float32),
        ("shift", shift, [width], torch.float32),
        ("sum_x", sum_x, [width], torch.float64),
        ("sum_xx", sum_xx, [width], torch.float64),
        ("sum_xy", sum_xy, [y.shape[1], width], torch.float64),
    ):
        _expect(f"comoments_update {name}'s shape", shape, list(tensor.shape))
        _expect(f"comoments_update {name}'s dtype", dtype, tensor.dtype)
        if name != "y" and not tensor.is_contiguous():
            raise ArgumentError(f"comoments_update {name}: expected a contiguous tensor, got strides {tensor.stride()}")
    torch.ops.skillfast.comoments_update(x, y, shift, sum_x, sum_xx, sum_xy)


def cells_update(
    x: torch.Tensor, edges: torch.Tensor, channels: torch.Tensor, hats: torch.Tensor, table: torch.Tensor
) -> None:
    """Count a buffer of rows into the cell table of every neuron, in place.

    A value falls into cell c = how many of its neuron's edges are at or below it; NaN falls into cell 0. A neuron's
    table is `[C, P]` counts followed by `[C, H]` sums of weights, so with `H` weights a row adds 1 to
    `counts[c, channels[row, k]]` for each metric k, and `hats[row]` to `sums[c]`. Integers: any order of rows and any
    number of threads gives the same table.

    Args:
        x: Activations [n, D]: float32, bfloat16, float16 or float64 (rounded to float32).
        edges: float32 [D, C - 1], ascending in each row, contiguous, C at most 256.
        channels: int16 [n, metrics], each in [-1, P); -1 counts nothing.
        hats: int16 [n, H], H a multiple of 8 (0 where there is no continuous metric).
        table: int32 [D, C * (P + H)], contiguous, mutated. The caller sees to it that no entry passes 2^31 - 1.

    Raises:
        ArgumentError: Shapes or dtypes that do not fit together, or a channel out of range (checked on the CPU).
    """
    if x.dim() != 2:
        raise ArgumentError(f"cells_update x: expected [n, D], got shape {list(x.shape)}")
    n, width = x.shape
    if edges.dim() != 2 or edges.shape[0] != width or not 1 <= edges.shape[1] < MAX_CELLS:
        raise ArgumentError(
            f"cells_update edges: expected [{width}, C - 1] with C from 2 to {MAX_CELLS}, got shape {list(edges.shape)}"
        )
    for name, tensor, dtype in (("channels", channels, torch.int16), ("hats", hats, torch.int16)):
        _expect(f"cells_update {name}'s dtype", dtype, tensor.dtype)
        if tensor.dim() != 2 or tensor.shape[0] != n:
            raise ArgumentError(f"cells_update {name}: expected [{n}, columns], got shape {list(tensor.shape)}")
    _expect("cells_update hats' columns modulo 8", 0, hats.shape[1] % 8)
    _expect("cells_update edges' dtype", torch.float32, edges.dtype)
    _expect("cells_update table's dtype", torch.int32, table.dtype)
    cells = edges.shape[1] + 1
    counts = table.shape[-1] // cells - hats.shape[1]
    if counts < 0 or list(table.shape) != [width, cells * (counts + hats.shape[1])]:
        raise ArgumentError(
            f"cells_update table: expected [{width}, {cells} * (P + {hats.shape[1]})], got shape {list(table.shape)}"
        )
    for name, tensor in (("edges", edges), ("table", table)):
        if not tensor.is_contiguous():
            raise ArgumentError(f"cells_update {name}: expected a contiguous tensor, got strides {tensor.stride()}")
    if channels.device.type == "cpu" and channels.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in channels.aminmax())
        if low < -1 or high >= counts:
            raise ArgumentError(f"cells_update channels: expected indices in [-1, {counts}), got {low} to {high}")
    torch.ops.skillfast.cells_update(x, edges, channels, hats, table)


def _chosen(op: str) -> Callable[..., torch.Tensor | None]:
    def run(x: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor | None:
        return backends.implementation(op, x)(x, *rest)

    return run


for _op in ("neuron_scale", "comoments_update", "cells_update"):
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_op, _chosen(_op), _device)


@torch.library.register_fake("skillfast::neuron_scale")
def _(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.register_fake("skillfast::comoments_update")
def _(*_: object) -> None:
    return None  # it only mutates


@torch.library.register_fake("skillfast::cells_update")
def _(*_: object) -> None:
    return None  # it only mutates


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def] # noqa: ARG001
    x, scale, _, condition = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale, condition)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, scale, condition = ctx.saved_tensors
    grad_x = grad_scale = grad_shift = None
    needs = (*ctx.needs_input_grad, False, False)  # shorter where the dispatcher left out arguments that are None
    if needs[0]:
        grad_x = torch.ops.skillfast.neuron_scale(grad, scale, None, condition)
    tokens = tuple(range(1, grad.dim() - 1))

    def per_condition(values: torch.Tensor) -> torch.Tensor:  # [batch, ..., D] -> [conditions, D]
        per_sample = values.to(scale.dtype).sum(tokens) if tokens else values.to(scale.dtype)
        index = condition if condition is not None else torch.zeros_like(per_sample[:, 0], dtype=torch.int64)
        return torch.zeros_like(scale).index_add(0, index, per_sample)

    if needs[1]:
        grad_scale = per_condition(grad.to(scale.dtype) * x.to(scale.dtype))
    if needs[2]:
        grad_shift = per_condition(grad)
    return grad_x, grad_scale, grad_shift, None


torch.library.register_autograd("skillfast::neuron_scale", _backward, setup_context=_setup_context)
