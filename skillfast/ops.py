"""The op contract: schemas, shape checks, fakes and gradients, one name in every layer.

Each op is declared once with `torch.library`; the implementation for a device asks `skillfast.backends` for the code
that runs it. Import this module for its side effect (the registration), call the functions below.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

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
_LIBRARY.define("bins_update(Tensor x, Tensor edges, Tensor channels, Tensor hats, Tensor(a!) table) -> ()")
_LIBRARY.define(
    "act_mask_pool(Tensor x, str activation, str pool, Tensor? mask=None, Tensor? center=None, bool write=True) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(
    "act_pool_accumulate(Tensor x, Tensor y, Tensor center, Tensor(a!) sum_x, Tensor(b!) sum_xx, Tensor(c!) sum_xy, "
    "str activation, Tensor? mask=None, bool write=True) -> Tensor"
)

MAX_BINS = 256
CAPTURE_POOLS = (*POOLS, "moments")
_PLAIN = (Tensor, torch.nn.Parameter)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _refuse(what: str, expected: object, got: object, remedy: str | None = None) -> NoReturn:
    raise ArgumentError(f"{what}: expected {expected}, got {got}; {remedy or 'see skillfast.ops.' + what.split()[0]}")


def _expect(what: str, expected: object, got: object) -> None:
    if expected != got:
        _refuse(what, expected, got)


def _check_activations(op: str, x: Tensor) -> None:
    if x.dim() < 2:
        _refuse(f"{op} x", "[batch, ..., D]", f"shape {list(x.shape)}")
    if x.dtype not in DTYPES:
        _refuse(f"{op} x's dtype", f"one of {', '.join(map(str, DTYPES))}", x.dtype)


def _check_indices(what: str, tensor: Tensor, low: int, end: int) -> None:
    """Checks indices on the CPU; on a GPU that would wait for it."""
    if tensor.device.type == "cpu" and tensor.numel() and not torch.compiler.is_compiling():
        least, most = (int(bound) for bound in tensor.aminmax())
        if least < low or most >= end:
            _refuse(what, f"indices in [{low}, {end})", f"{least} to {most}")


def _check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        _refuse(f"{op} {name}", "a contiguous tensor", f"strides {tensor.stride()}")


def _check_devices(op: str, x: Tensor, **others: Tensor | None) -> None:
    """A kernel reads every operand through an address that only `x`'s device knows."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            _refuse(f"{op} {name}'s device", x.device, tensor.device, "move it to x's device")


def _check_capture(op: str, x: Tensor, activation: str, mask: Tensor | None) -> int:
    """Checks what the capture ops share, and gives the number of tokens."""
    _check_activations(op, x)
    if activation not in ACTIVATIONS:
        _refuse(f"{op} activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    tokens = math.prod(x.shape[1:-1])
    if mask is not None:
        _expect(f"{op} mask's shape", [x.shape[0], tokens], list(mask.shape))
        _expect(f"{op} mask's dtype", torch.bool, mask.dtype)
    return tokens


def _check_sums(op: str, width: int, columns: int, *, sums: Sequence[Tensor], **shift: Tensor) -> None:
    """Checks the state of co-moments and what is subtracted from each neuron, by its name."""
    shapes = {"sum_x": [width], "sum_xx": [width], "sum_xy": [columns, width]}
    state = dict(zip(shapes, sums, strict=True))
    for name, tensor in {**shift, **state}.items():
        _expect(f"{op} {name}'s shape", shapes.get(name, [width]), list(tensor.shape))
        _expect(f"{op} {name}'s dtype", torch.float64 if name in shapes else torch.float32, tensor.dtype)
        _check_contiguous(op, name, tensor)


def act_mask_pool(
    x: Tensor,
    activation: str = "identity",
    pool: str = "mean",
    *,
    mask: Tensor | None = None,
    center: Tensor | None = None,
    write: bool = True,
) -> tuple[Tensor, Tensor]:
    """Apply an activation and pool the tokens of the result, in one read and one write.

    Args:
        x: Pre-activations [batch, ..., D]: float32, bfloat16, float16 or float64.
        activation: `"identity"`, `"gelu"` (by erf), `"gelu_tanh"`, `"relu"` or `"silu"`.
        pool: `"mean"`, `"cls"` (first token), `"max"` or `"last"`; `"moments"` for the sums of y and y^2 over the
            tokens, about `center`; `"none"` to pool nothing.
        mask: bool [batch, tokens], False for what is left out of the pooling (padding), or None.
        center: [D] of the accumulation dtype, subtracted before `"moments"` are summed; None for 0.
        write: Whether to return the activated tensor.

    Returns:
        The activated tensor y, of `x`'s shape and dtype (empty without `write`), and its pooled rows [batch, D],
        float32 (float64 with a float64 `x`); [2, batch, D] for `"moments"`, empty for `"none"`. Rows are pooled from y
        as it was rounded. A sample without tokens gives NaN, and sums of 0.

    Raises:
        ArgumentError: Shapes or dtypes that do not fit together, an unknown activation or pool.
    """
    _check_capture("act_mask_pool", x, activation, mask)
    _check_devices("act_mask_pool", x, mask=mask, center=center)
    if pool not in CAPTURE_POOLS:
        _refuse("act_mask_pool pool", f"one of {', '.join(CAPTURE_POOLS)}", repr(pool))
    if center is not None:
        _expect("act_mask_pool center's shape", [x.shape[-1]], list(center.shape))
        _expect("act_mask_pool center's dtype", accumulation_dtype(x.dtype), center.dtype)
    return _run("act_mask_pool", x, activation, pool, mask, center, write)


def act_pool_accumulate(
    x: Tensor,
    y: Tensor,
    center: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    activation: str = "identity",
    *,
    mask: Tensor | None = None,
    write: bool = True,
) -> Tensor:
    """Apply an activation and add every token of the result to the co-moments, where it is and never stored.

    Args:
        x: Pre-activations [batch, ..., D]: float32, bfloat16 or float16.
        y: float32, metric columns already shifted: [batch, tokens, M], or [batch, M] where all of a sample's tokens
            share them.
        center: float32 [D], subtracted from the activations before anything is summed.
        sums: float64 sum_x [D], sum_xx [D] and sum_xy [M, D] of `comoments_update`, contiguous; mutated.
        activation: `"identity"`, `"gelu"` (by erf), `"gelu_tanh"`, `"relu"` or `"silu"`.
        mask: bool [batch, tokens], False for tokens that are no observation (padding), or None.
        write: Whether to return the activated tensor.

    Returns:
        The activated tensor, of `x`'s shape and dtype; empty without `write`.

    Raises:
        ArgumentError: Shapes or dtypes that do not fit together, an unknown activation.
    """
    op = "act_pool_accumulate"
    tokens = _check_capture(op, x, activation, mask)
    sum_x, sum_xx, sum_xy = sums
    _check_devices(op, x, y=y, center=center, mask=mask, sum_x=sum_x, sum_xx=sum_xx, sum_xy=sum_xy)
    if x.dtype == torch.float64:
        _refuse(f"{op} x", "float32, bfloat16 or float16", "float64", "use act_mask_pool")
    batch, width = x.shape[0], x.shape[-1]
    if y.dim() < 1 or list(y.shape[:-1]) not in ([batch], [batch, tokens]):
        _refuse(f"{op} y", f"[{batch}, M] or [{batch}, {tokens}, M]", f"shape {list(y.shape)}")
    _expect(f"{op} y's dtype", torch.float32, y.dtype)
    _check_sums(op, width, y.shape[-1], center=center, sums=sums)
    return _run("act_pool_accumulate", x, y, center, *sums, activation, mask, write)


def neuron_scale(x: Tensor, scale: Tensor, shift: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
    """Scale and shift neurons, each sample by the row of its own condition.

    `out[b, ..., d] = x[b, ..., d] * scale[condition[b], d] + shift[condition[b], d]`. A scale of 0 removes even a
    value that is not finite. Differentiable in `x` and `scale`.

    Args:
        x: Activations [batch, ..., D]: float32, bfloat16, float16 or float64.
        scale: [conditions, D], float32 (float64 with a float64 `x`).
        shift: [conditions, D] of `scale`'s dtype, or None.
        condition: int64 [batch], each in [0, conditions), or None: every sample takes row 0.

    Returns:
        A new contiguous tensor of `x`'s shape and dtype.

    Raises:
        ArgumentError: Shapes or dtypes that do not fit together, or a condition out of range (checked on the CPU).
    """
    _check_activations("neuron_scale", x)
    _check_devices("neuron_scale", x, scale=scale, shift=shift, condition=condition)
    if scale.dim() != 2 or scale.shape[1] != x.shape[-1]:
        expected = f"[conditions, {x.shape[-1]}] to fit x {list(x.shape)}"
        _refuse("neuron_scale scale", expected, f"shape {list(scale.shape)}")
    _expect("neuron_scale scale's dtype", accumulation_dtype(x.dtype), scale.dtype)
    if shift is not None:
        _expect("neuron_scale shift's shape", list(scale.shape), list(shift.shape))
        _expect("neuron_scale shift's dtype", scale.dtype, shift.dtype)
    if condition is None:
        if scale.shape[0] < 1:
            _refuse("neuron_scale scale", "at least one row", "none")
    else:
        _expect("neuron_scale condition's shape", [x.shape[0]], list(condition.shape))
        _expect("neuron_scale condition's dtype", torch.int64, condition.dtype)
        _check_indices("neuron_scale condition", condition, 0, scale.shape[0])
    return _run("neuron_scale", x, scale, shift, condition)


def comoments_update(x: Tensor, y: Tensor, shift: Tensor, sum_x: Tensor, sum_xx: Tensor, sum_xy: Tensor) -> None:
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
    _check_devices("comoments_update", x, y=y, shift=shift, sum_x=sum_x, sum_xx=sum_xx, sum_xy=sum_xy)
    n, width = x.shape
    if y.dim() != 2 or y.shape[0] != n:
        _refuse("comoments_update y", f"[{n}, M]", f"shape {list(y.shape)}")
    _expect("comoments_update y's dtype", torch.float32, y.dtype)
    _check_sums("comoments_update", width, y.shape[1], shift=shift, sums=(sum_x, sum_xx, sum_xy))
    _run("comoments_update", x, y, shift, sum_x, sum_xx, sum_xy)


def bins_update(x: Tensor, edges: Tensor, channels: Tensor, hats: Tensor, table: Tensor) -> None:
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
    _check_devices("bins_update", x, edges=edges, channels=channels, hats=hats, table=table)
    n, width = x.shape
    if edges.dim() != 2 or edges.shape[0] != width or not 1 <= edges.shape[1] < MAX_BINS:
        _refuse("bins_update edges", f"[{width}, C - 1] with C from 2 to {MAX_BINS}", f"shape {list(edges.shape)}")
    for name, tensor in (("channels", channels), ("hats", hats)):
        _expect(f"bins_update {name}'s dtype", torch.int16, tensor.dtype)
        if tensor.dim() != 2 or tensor.shape[0] != n:
            _refuse(f"bins_update {name}", f"[{n}, columns]", f"shape {list(tensor.shape)}")
    _expect("bins_update hats' columns modulo 8", 0, hats.shape[1] % 8)
    _expect("bins_update edges' dtype", torch.float32, edges.dtype)
    _expect("bins_update table's dtype", torch.int32, table.dtype)
    bins = edges.shape[1] + 1
    counts = table.shape[-1] // bins - hats.shape[1] if table.dim() == 2 else -1
    if counts < 0 or list(table.shape) != [width, bins * (counts + hats.shape[1])]:
        _refuse("bins_update table", f"[{width}, {bins} * (P + {hats.shape[1]})]", f"shape {list(table.shape)}")
    _check_contiguous("bins_update", "edges", edges)
    _check_contiguous("bins_update", "table", table)
    _check_indices("bins_update channels", channels, -1, counts)
    _run("bins_update", x, edges, channels, hats, table)


def _run(op: str, x: Tensor, *rest: Any) -> Any:
    """Run an op, past torch's dispatcher where that would hand it on as it is: half of what a call costs the host.

    It is needed by gradients, `torch.compile`, `vmap`, and modes and tensors of other kinds than torch's own.
    """
    wanted = torch.is_grad_enabled()
    tensors = [x, *(value for value in rest if isinstance(value, Tensor))]
    if (
        all(type(tensor) in _PLAIN and not (wanted and tensor.requires_grad) for tensor in tensors)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    ):
        return backends.implementation(op, x)(x, *rest)
    return _DISPATCHED[op](x, *rest)


def _chosen(op: str) -> Callable[..., Tensor | None]:
    def run(x: Tensor, *rest: Tensor | None) -> Tensor | None:
        return backends.implementation(op, x)(x, *rest)

    return run


_DISPATCHED: dict[str, Callable[..., Any]] = {}
for _op in ("neuron_scale", "comoments_update", "bins_update", "act_mask_pool", "act_pool_accumulate"):
    _DISPATCHED[_op] = getattr(torch.ops.skillfast, _op)
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_op, _chosen(_op), _device)


@torch.library.register_fake("skillfast::neuron_scale")
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.register_fake("skillfast::act_mask_pool")
def _(x: Tensor, _activation: str, pool: str, *rest: object) -> tuple[Tensor, Tensor]:
    return empty_capture(x, pool, write=rest[2] is not False if len(rest) > 2 else True)


@torch.library.register_fake("skillfast::act_pool_accumulate")
def _(x: Tensor, *rest: object) -> Tensor:
    return empty_capture(x, "none", write=rest[7] is not False if len(rest) > 7 else True)[0]


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

    def per_condition(values: Tensor) -> Tensor:  # [batch, ..., D] -> [conditions, D]
        per_sample = values.to(scale.dtype).sum(tokens) if tokens else values.to(scale.dtype)
        index = condition if condition is not None else torch.zeros_like(per_sample[:, 0], dtype=torch.int64)
        return torch.zeros_like(scale).index_add(0, index, per_sample)

    if needs[1]:
        grad_scale = per_condition(grad.to(scale.dtype) * x.to(scale.dtype))
    if needs[2]:
        grad_shift = per_condition(grad)
    return grad_x, grad_scale, grad_shift, None


torch.library.register_autograd("skillfast::neuron_scale", _backward, setup_context=_setup_context)
