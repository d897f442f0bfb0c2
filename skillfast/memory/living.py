"""`LivingBytes`: bytes of the tensors that are alive at once while code runs, on any device, `meta` too."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

if TYPE_CHECKING:
    from collections.abc import Mapping


class LivingBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the context, from when an op makes them until nothing refers to them.

    An op's own workspace is not in it.

    Args:
        part: Name of the part of the code that runs first.

    Attributes:
        peaks: Most bytes alive at once while each part ran, by its name.
    """

    def __init__(self, part: str = "") -> None:
        super().__init__()
        self.peaks = {part: 0}
        self._part = part
        self._alive = 0
        self._known: set[int] = set()

    @property
    def peak(self) -> int:
        """Most bytes alive at once in any part."""
        return max(self.peaks.values())

    def enter(self, part: str) -> None:
        """Count what follows as a part of this name; it begins with what is alive already."""
        self._part = part
        self.peaks[part] = max(self.peaks.get(part, 0), self._alive)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._alive += size
        self.enter(self._part)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._alive -= size
