"""What a model is called with, one tensor or keyword arguments, taken apart by examples and put together again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ArgumentError, ModelError, SkillfastError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Inputs = torch.Tensor | dict[str, Any]
"""One tensor [batch, ...], or keyword arguments: tensors with a row per example, and whatever all examples share."""

MASK = "attention_mask"
_IDS = "input_ids"
_OF_MODELS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, NotImplementedError)


def described(value: Any) -> str:
    """A batch in a few words: its keys and shapes."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {described(part)}" for key, part in value.items()) + "}"
    if isinstance(value, tuple | list):
        return f"{len(value)} parts"
    return type(value).__name__


def call(model: torch.nn.Module, inputs: Inputs) -> Any:
    """What the model gives, without a cache of keys and states, which blocks that run again would lengthen.

    Raises:
        ModelError: The model's own code has no use for these inputs; what it said is the cause.
    """
    once = {"use_cache": False} if _may_cache(getattr(model.forward, "__func__", model.forward)) else {}
    try:
        return model(**once | inputs) if isinstance(inputs, dict) else model(inputs, **once)
    except _OF_MODELS as error:
        if isinstance(error, SkillfastError) or out_of_memory(error):
            raise
        said = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"{type(model).__name__}: expected inputs that its forward takes, got {described(inputs)} and its "
            f"{type(error).__name__}: {said}; leave out keys that it does not take, name the labels' with label_key=, "
            "or wrap the model"
        ) from error


@lru_cache(maxsize=256)
def _may_cache(forward: Callable[..., Any]) -> bool:
    return "use_cache" in inspect.signature(forward).parameters


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: fewer rows at once may fit."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def mask_of(inputs: Inputs) -> torch.Tensor | None:
    """Which tokens are real, [batch, tokens]: the `attention_mask` among keyword arguments; None without one."""
    found = inputs.get(MASK) if isinstance(inputs, dict) else None
    return found if isinstance(found, torch.Tensor) and found.dim() == 2 else None


def mapped(inputs: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The inputs with every tensor changed."""
    if isinstance(inputs, dict):
        return {name: mapped(value, change) for name, value in inputs.items()}
    return change(inputs) if isinstance(inputs, torch.Tensor) else inputs


def tensors_in(inputs: Any) -> Iterator[torch.Tensor]:
    """Every tensor, by the names of the arguments."""
    if isinstance(inputs, dict):
        for name in sorted(inputs):
            yield from tensors_in(inputs[name])
    elif isinstance(inputs, torch.Tensor):
        yield inputs


def bytes_of(inputs: Inputs) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors_in(inputs))


def examples_in(inputs: Inputs) -> int:
    """How many examples there are: the rows of every tensor but those that all examples share, which have one.

    Raises:
        ArgumentError: No tensor, or tensors of different numbers of rows.
    """
    if isinstance(inputs, torch.Tensor):
        return len(inputs)
    rows = {tensor.shape[0] for tensor in tensors_in(inputs) if tensor.dim()}
    if len(rows - {1}) > 1 or not rows:
        raise ArgumentError(
            f"batch: expected tensors with a row per example, got {described(inputs)}; wrap the model so that it "
            "takes such"
        )
    return max(rows)


def taken(inputs: Inputs, rows: slice | torch.Tensor) -> Inputs:
    """Some examples, by a slice or by int64 [n]."""
    n = examples_in(inputs)
    found: Inputs = mapped(inputs, lambda x: x[rows] if x.dim() and len(x) == n else x)
    return found


def split(inputs: Inputs, size: int) -> Iterator[Inputs]:
    """The examples in their order, `size` at a time."""
    return (taken(inputs, slice(start, start + size)) for start in range(0, examples_in(inputs), size))


def repeated(inputs: Inputs, n: int) -> Inputs:
    """All examples n times, one round after the other."""
    rows = examples_in(inputs)
    found: Inputs = mapped(inputs, lambda x: x.repeat(n, *(1,) * (x.dim() - 1)) if x.dim() and len(x) == rows else x)
    return found


def joined(parts: Sequence[Inputs], pad: int = 0) -> Inputs:
    """One batch of several; shorter texts are padded at their end, which their mask leaves out.

    Args:
        parts: Inputs of the same arguments.
        pad: Token that pads `input_ids`; everything else is padded with 0.

    Raises:
        ArgumentError: Batches of different arguments, or of different sizes in a model that is not told its padding.
    """
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return _joined([part for part in parts if isinstance(part, torch.Tensor)], 0)
    if any(not isinstance(part, dict) or part.keys() != first.keys() for part in parts):
        raise ArgumentError(
            f"batches: expected the arguments {', '.join(first)} in all of them, got others in some; give each the same"
        )
    found: dict[str, Any] = {}
    for name, value in first.items():
        values: list[Any] = [part[name] for part in parts if isinstance(part, dict)]
        if not isinstance(value, torch.Tensor) or not value.dim():
            found[name] = value
            continue
        if len({x.shape[1:] for x in values}) > 1 and mask_of(first) is None:
            raise ArgumentError(
                f"batches: expected {name} of one size, or texts with {MASK}, got {described(values[0])} and others; "
                "pad them to one length"
            )
        shared = all(len(x) == 1 != examples_in(part) for x, part in zip(values, parts, strict=True))
        found[name] = value if shared else _joined(values, pad if name == _IDS else 0)
    return found


def _joined(batches: Sequence[torch.Tensor], pad: int) -> torch.Tensor:
    width = max(batch.shape[-1] for batch in batches)
    if batches[0].dim() == 1:
        return torch.cat(list(batches))
    return torch.cat([torch.nn.functional.pad(batch, (0, width - batch.shape[-1]), value=pad) for batch in batches])


def trimmed(inputs: Inputs) -> Inputs:
    """Texts without the tokens at either end that are padding in every one; other inputs as they are."""
    mask = mask_of(inputs)
    if mask is None:
        return inputs
    real = (mask != 0).any(0).nonzero()
    if not len(real):
        return inputs
    tokens, kept = mask.shape, slice(int(real.min()), int(real.max()) + 1)
    found: Inputs = mapped(inputs, lambda x: x[:, kept] if x.shape[:2] == tokens else x)
    return found


def unpadded(inputs: Inputs) -> Iterator[Inputs]:
    """Each example as a batch of one, without its padding."""
    mask = mask_of(inputs)
    for i in range(examples_in(inputs)):
        one = taken(inputs, slice(i, i + 1))
        if mask is None:
            yield one
        else:
            yield mapped(one, partial(_real, real=mask[i] != 0))


def _real(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return x[:, real] if x.shape[1:2] == real.shape else x
