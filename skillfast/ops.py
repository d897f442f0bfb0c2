"""The op contract: schemas, shape checks, fakes and gradients, one name in every layer.

Each op is declared once with `torch.library`; the implementation for a device asks `skillfast.backends` for the code
that runs it. Import this module for its side effect (the registration), call the functions below.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn

import torch

from skillfast import backends
from skillfast.backends.capture import accumulation_dtype, empty_capture
from skillfast.errors import ArgumentError
from skillfast.vocabulary import ACTIVATIONS, POOLS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LIBRARY = torch.library.Library("skillfast", "DEF")
_LIBRARY.define("neuron_scale(Tensor x, Tensor scale, Tensor? shift=None, Tensor? condition=None) -> Tensor")
_LIBRARY.define(
    "comoments_update(Tensor x, Tensor y, Tensor shift, Tensor(a!) sum_x, Tensor(b!) sum_xx, Tensor(c!) sum_xy) -> ()"
)

_LIBRARY.define(
    "act_mask_pool(Tensor x, str activation, str pool, Tensor? scale=None, Tensor? shift=None, Tensor? condition=None, "
    "Tensor? mask=None, Tensor? center=None, bool write=True) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "act_pool_accumulate(Tensor x, Tensor y, Tensor center, Tensor(a!) sum_x, Tensor(b!) sum_xx, Tensor(c!) sum_xy, "
    "str activation, str pool, Tensor? scale=None, Tensor? shift=None, Tensor? condition=None, Tensor? mask=None, "
    "bool write=True, Tensor? edges=None, Tensor? channels=None, Tensor? hats=None, Tensor(d!)? table=None) -> Tensor"
)
_LIBRARY.define("bins_update(Tensor x, Tensor edges, Tensor channels, Tensor hats, Tensor(a!) table) -> ()")

MAX_BINS = 256
CAPTURE_POOLS = (*POOLS, "moments")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _refuse(what: str, expected: object, got: object, remedy: str | None = None) -> NoReturn:
    raise ArgumentError(f"{what}: expected {expected}, got {got}; {remedy or 'see skillfast.ops.' + what.split()[0]}")


def _expect(what: str, expected: object, got: object) -> None:
    if expected != got:
        _refuse(what, expected, got)


def _check_flow(
    op: str,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    condition: torch.Tensor | None,
) -> None:
    """Checks activations and what is done to them per sample."""
    if x.dim() < 2:
        _refuse(f"{op} x", "[batch, ..., D]", f"shape {list(x.shape)}")
    if x.dtype not in DTYPES:
        _refuse(f"{op} x's dtype", f"one of {', '.join(map(str, DTYPES))}", x.dtype)
    if scale is None:
        for name, tensor in (("shift", shift), ("condition", condition)):
            if tensor is not None:
                _refuse(f"{op} {name} without scale", None, f"shape {list(tensor.shape)}", "give a scale of 1")
        return
    if scale.dim() != 2 or scale.shape[1] != x.shape[-1]:
        _refuse(f"{op} scale", f"[conditions, {x.shape[-1]}] to fit x {list(x.shape)}", f"shape {list(scale.shape)}")
    _expect(f"{op} scale's dtype", accumulation_dtype(x.dtype), scale.dtype)
    if shift is not None:
        _expect(f"{op} shift's shape", list(scale.shape), list(shift.shape))
        _expect(f"{op} shift's dtype", scale.dtype, shift.dtype)
    if condition is not None:
        _expect(f"{op} condition's shape", [x.shape[0]], list(condition.shape))
        _expect(f"{op} condition's dtype", torch.int64, condition.dtype)
        if condition.device.type == "cpu" and condition.numel() and not torch.compiler.is_compiling():
            low, high = int(condition.min()), int(condition.max())
            if low < 0 or high >= scale.shape[0]:
                _refuse(f"{op} condition", f"indices in [0, {scale.shape[0]})", f"{low} to {high}")
    elif scale.shape[0] < 1:
        _refuse(f"{op} scale", "at least one row", "none")


def _check_capture(op: str, x: torch.Tensor, activation: str, pool: str, pools: Sequence[str]) -> int:
    """Checks what is pooled, and gives the number of tokens."""
    if activation not in ACTIVATIONS:
        _refuse(f"{op} activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    if pool not in pools:
        _refuse(f"{op} pool", f"one of {', '.join(pools)}", repr(pool))
    return math.prod(x.shape[1:-1])


def _check_mask(op: str, x: torch.Tensor, mask: torch.Tensor | None, tokens: int) -> None:
    if mask is not None:
        _expect(f"{op} mask's shape", [x.shape[0], tokens], list(mask.shape))
        _expect(f"{op} mask's dtype", torch.bool, mask.dtype)


def act_mask_pool(
    x: torch.Tensor,
    activation: str = "identity",
    pool: str = "mean",
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    condition: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    center: torch.Tensor | None = None,
    write: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply an activation and each sample's condition, and pool the tokens of what flows on: one read, one write.

    Args:
        x: What goes into the activation, [batch, ..., D]: float32, bfloat16, float16 or float64.
        activation: `"identity"`, `"gelu"` (by erf), `"gelu_tanh"`, `"relu"` or `"silu"`.
        pool: `"mean"`, `"cls"` (first token), `"max"` or `"last"`; `"moments"` for the sums of y and y^2 over the
            tokens, about `center`; `"none"` to pool nothing.
        scale: As in `neuron_scale`, or None.
        shift: Likewise.
        condition: Likewise.
        mask: bool [batch, tokens], False for what is left out of the pooling (padding), or None.
        center: [D] of the accumulation dtype, for `"moments"`; None for 0.
        write: Whether y is wanted.

    Returns:
        y, of x's shape and dtype (empty without `write`), and what was pooled from it as rounded: float32 (float64 of a
        float64 x) [batch, D], `[2, batch, D]` for `"moments"`, empty for `"none"`. A sample without tokens gives NaN,
        and sums of 0.

    Raises:
        ArgumentError: Shapes or dtypes that do not fit together, an unknown activation or pool.
    """
    _check_flow("act_mask_pool", x, scale, shift, condition)
    tokens = _check_capture("act_mask_pool", x, activation, pool, CAPTURE_POOLS)
    _check_mask("act_mask_pool", x, mask, tokens)
    if center is not None:
        _expect("act_mask_pool center's shape", [x.shape[-1]], list(center.shape))
        _expect("act_mask_pool center's dtype", accumulation_dtype(x.dtype), center.dtype)
    return torch.ops.skillfast.act_mask_pool(x, activation, pool, scale, shift, condition, mask, center, write)


def act_pool_accumulate(
    x: torch.Tensor,
    y: torch.Tensor,
    center: torch.Tensor,
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    activation: str = "identity",
    pool: str = "mean",
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    condition: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    write: bool = True,
    bins: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """`act_mask_pool` whose observations are added to the statistics where they are, and never stored.

    Args:
        x: As in `act_mask_pool`, not float64.
        y: float32, metric columns already shifted: [batch, M], or [batch, tokens, M] with `pool="none"`.
        center: float32 [D], subtracted before anything is summed.
        sums: sum_x [D], sum_xx [D] and sum_xy [M, D], as in `comoments_update`; mutated.
        activation: As in `act_mask_pool`.
        pool: `"mean"`, `"cls"`, `"max"`, `"last"`; `"none"`: each token that the mask leaves is an observation.
        scale: As in `act_mask_pool`.
        shift: Likewise.
        condition: Likewise.
        mask: Likewise.
        write: Whether what flows on is wanted.
        bins: edges, channels, hats and table as in `bins_update`, channels and hats with a row per sample, or per
            sample and token with `pool="none"`; the table is mutated. None for Pearson's r alone.

    Returns:
        What flows on, of x's shape and dtype; empty without `write`.

    Raises:
        ArgumentError: Shapes or dtypes that do not fit together, an unknown activation or pool.
    """
    op = "act_pool_accumulate"
    _check_flow(op, x, scale, shift, condition)
    tokens = _check_capture(op, x, activation, pool, POOLS)
    _check_mask(op, x, mask, tokens)
    if x.dtype == torch.float64:
        _refuse(f"{op} x", "float32, bfloat16 or float16", "float64", "use act_mask_pool")
    batch, width = x.shape[0], x.shape[-1]
    shapes = [[batch]] + ([[batch, tokens]] if pool == "none" else [])
    if y.dim() < 1 or list(y.shape[:-1]) not in shapes:
        wanted = " or ".join(f"[{', '.join(map(str, shape))}, M]" for shape in shapes)
        _refuse(f"{op} y", wanted, f"shape {list(y.shape)}")
    _expect(f"{op} y's dtype", torch.float32, y.dtype)
    for name, tensor, shape, dtype in (
        ("center", center, [width], torch.float32),
        ("sum_x", sums[0], [width], torch.float64),
        ("sum_xx", sums[1], [width], torch.float64),
        ("sum_xy", sums[2], [y.shape[-1], width], torch.float64),
    ):
        _expect(f"{op} {name}'s shape", shape, list(tensor.shape))
        _expect(f"{op} {name}'s dtype", dtype, tensor.dtype)
        if not tensor.is_contiguous():
            _refuse(f"{op} {name}", "a contiguous tensor", f"strides {tensor.stride()}")
    edges = channels = hats = table = None
    if bins is not None:
        edges, channels, hats, table = bins
        _check_bins(op, batch * tokens if pool == "none" else batch, width, edges, channels, hats, table)
    return torch.ops.skillfast.act_pool_accumulate(
        x, y, center, *sums, activation, pool, scale, shift, condition, mask, write, edges, channels, hats, table
    )


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
    _check_flow("neuron_scale", x, scale, shift, condition)
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
        _refuse("comoments_update x", "[n, D]", f"shape {list(x.shape)}")
    n, width = x.shape
    if y.dim() != 2 or y.shape[0] != n:
        _refuse("comoments_update y", f"[{n}, M]", f"shape {list(y.shape)}")
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
            _refuse(f"comoments_update {name}", "a contiguous tensor", f"strides {tensor.stride()}")
    torch.ops.skillfast.comoments_update(x, y, shift, sum_x, sum_xx, sum_xy)


def _check_bins(
    op: str,
    n: int,
    width: int,
    edges: torch.Tensor,
    channels: torch.Tensor,
    hats: torch.Tensor,
    table: torch.Tensor,
) -> None:
    """Checks a bin table of `width` neurons and what n observations add to it."""
    if edges.dim() != 2 or edges.shape[0] != width or not 1 <= edges.shape[1] < MAX_BINS:
        _refuse(f"{op} edges", f"[{width}, C - 1] with C from 2 to {MAX_BINS}", f"shape {list(edges.shape)}")
    for name, tensor, dtype in (("channels", channels, torch.int16), ("hats", hats, torch.int16)):
        _expect(f"{op} {name}'s dtype", dtype, tensor.dtype)
        if tensor.dim() != 2 or tensor.shape[0] != n:
            _refuse(f"{op} {name}", f"[{n}, columns]", f"shape {list(tensor.shape)}")
    _expect(f"{op} hats' columns modulo 8", 0, hats.shape[1] % 8)
    _expect(f"{op} edges' dtype", torch.float32, edges.dtype)
    _expect(f"{op} table's dtype", torch.int32, table.dtype)
    bins = edges.shape[1] + 1
    counts = table.shape[-1] // bins - hats.shape[1] if table.dim() == 2 else -1
    if counts < 0 or list(table.shape) != [width, bins * (counts + hats.shape[1])]:
        _refuse(f"{op} table", f"[{width}, {bins} * (P + {hats.shape[1]})]", f"shape {list(table.shape)}")
    for name, tensor in (("edges", edges), ("table", table)):
        if not tensor.is_contiguous():
            _refuse(f"{op} {name}", "a contiguous tensor", f"strides {tensor.stride()}")
    if channels.device.type == "cpu" and channels.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in channels.aminmax())
        if low < -1 or high >= counts:
            _refuse(f"{op} channels", f"indices in [-1, {counts})", f"{low} to {high}")


def bins_update(
    x: torch.Tensor, edges: torch.Tensor, channels: torch.Tensor, hats: torch.Tensor, table: torch.Tensor
) -> None:
    """Count a buffer of rows into the bin table of every neuron, in place.

    A value falls into bin c = how many of its neuron's edges are at or below it; NaN falls into bin 0. A neuron's
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
        _refuse("bins_update x", "[n, D]", f"shape {list(x.shape)}")
    _check_bins("bins_update", x.shape[0], x.shape[1], edges, channels, hats, table)
    torch.ops.skillfast.bins_update(x, edges, channels, hats, table)


def _chosen(op: str) -> Callable[..., torch.Tensor | None]:
    def run(x: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor | None:
        return backends.implementation(op, x)(x, *rest)

    return run


for _op in ("neuron_scale", "comoments_update", "bins_update", "act_mask_pool", "act_pool_accumulate"):
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_op, _chosen(_op), _device)


@torch.library.register_fake("skillfast::neuron_scale")
def _(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.register_fake("skillfast::act_mask_pool")
def _(x: torch.Tensor, _activation: str, pool: str, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_capture(x, pool, write=rest[5] is not False if len(rest) > 5 else True)


@torch.library.register_fake("skillfast::act_pool_accumulate")
def _(x: torch.Tensor, *rest: object) -> torch.Tensor:
    return empty_capture(x, "none", write=rest[11] is not False if len(rest) > 11 else True)[0]


@torch.library.register_fake("skillfast::comoments_update")
def _(*_: object) -> None:
    return None  # it only mutates


@torch.library.register_fake("skillfast::bins_update")
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
