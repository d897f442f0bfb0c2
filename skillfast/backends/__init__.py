"""The one seam between an op and the code that runs it.

A backend is a module with `IMPLEMENTATIONS: dict[op name, callable]`, `implements(op, device)`, whether it has code for
that op on that kind of device, and `unavailable(op, device, dtype)`, which says why it cannot run it there, or None
where it can. `implementation` chooses: an explicit backend (`use_backend`, or the environment variable
SKILLFAST_BACKEND) never falls back; the automatic choice takes the first of `PREFERENCE` that is available, and says so
once where one before it has the op for that device and cannot be used.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections import Counter
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from skillfast.errors import ArgumentError, BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    import torch

NAMES = ("reference", "native", "triton")
PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}

calls: Counter[tuple[str, str]] = Counter()
"""How often each (op, backend) ran in this process: what tests assert on."""

_explicit: ContextVar[str | None] = ContextVar("skillfast_backend", default=None)
_told: set[tuple[str, str]] = set()
_choices: dict[tuple[str, str, torch.dtype, str | None], tuple[str, Callable[..., Any]]] = {}


def _checked(name: str) -> str | None:
    if name == "auto":
        return None
    if name not in NAMES:
        raise ArgumentError(f"backend: expected one of auto, {', '.join(NAMES)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the context on one backend.

    Args:
        name: `"reference"`, `"native"`, `"triton"`, or `"auto"` for the automatic choice.

    Raises:
        ArgumentError: The name is none of these.
    """
    token = _explicit.set(_checked(name))
    try:
        yield
    finally:
        _explicit.reset(token)


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"skillfast.backends.{name}")


def implementation(op: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The function that runs `op` on the tensor's device and dtype."""
    explicit = _explicit.get() or _checked(os.environ.get("SKILLFAST_BACKEND", "auto"))
    asked = (op, tensor.device.type, tensor.dtype, explicit)
    if asked not in _choices:
        name = _available(op, tensor.device, tensor.dtype, explicit)
        _choices[asked] = name, _backend(name).IMPLEMENTATIONS[op]
    name, run = _choices[asked]
    calls[op, name] += 1
    return run


def _available(op: str, device: torch.device, dtype: torch.dtype, explicit: str | None) -> str:
    """The backend that runs `op` there."""
    if explicit is not None:
        reason = _backend(explicit).unavailable(op, device, dtype)
        if reason is not None:
            raise BackendError(f"{op} on {device.type}: backend {explicit!r} was asked for, but {reason}")
        return explicit
    reasons: list[str] = []
    for name in PREFERENCE.get(device.type, ("reference",)):
        reason = _backend(name).unavailable(op, device, dtype)
        if reason is None:
            if reasons and (op, name) not in _told:
                _told.add((op, name))
                warnings.warn(f"{op} runs on backend {name!r}: {'; '.join(reasons)}", RuntimeWarning, stacklevel=4)
            return name
        if _backend(name).implements(op, device):
            reasons.append(f"{name}: {reason}")
    raise BackendError(f"{op}: no backend for {device.type} and {dtype}: {'; '.join(reasons)}")


def status() -> dict[str, str]:
    """What each backend can do on this machine, in words, for `skillfast info`."""
    return {name: _backend(name).describe() for name in NAMES}


def native_has_cuda() -> bool:
    """Whether the extension was built with its CUDA ops."""
    core = _backend("native")._core
    return core is not None and core.HAS_CUDA
