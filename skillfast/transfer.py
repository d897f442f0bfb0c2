"""Tensors between the host and devices."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Given = TypeVar("Given")
Read = TypeVar("Read")
AT_ONCE = 1 << 16  # bytes of pageable memory that CUDA takes without waiting; it waits for what it did before with more
AHEAD = 2  # batches that are read before they are asked for


def moved(tensor: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    """A tensor on a device; None for where it is.

    The host does not wait for what goes to a GPU, so what is large goes through pinned memory. It waits for what comes
    from one: such a copy that does not block returns before its values are there, and the host would read what was in
    that memory before.
    """
    if device is None:
        return tensor
    kind = torch.device(device).type
    source = _pinned(tensor) if kind == "cuda" else tensor
    return source.to(device, non_blocking=kind != "cpu")


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A host's tensor in memory that a GPU reads by itself; what is small, or elsewhere, as it is."""
    if tensor.device.type != "cpu" or tensor.nbytes <= AT_ONCE or tensor.is_pinned():
        return tensor
    return (tensor.contiguous() if 0 in tensor.stride() else tensor).pin_memory()  # expanded memory has no copy


def fed(
    source: Iterable[Given],
    device: torch.device,
    read: Callable[[Given], Read],
    move: Callable[[Read, Callable[[torch.Tensor], torch.Tensor]], Read],
) -> Iterator[Read]:
    """Batches with their tensors on a device, those of a GPU copied while the one before is computed.

    For a GPU a thread of its own reads ahead, copies into pinned memory and from there on a stream of its own, so that
    neither decoding nor copying holds up what runs there. It ends with the iteration.

    Args:
        source: Batches in any form.
        device: Where their tensors shall be.
        read: What to make of a batch, on the host; what it raises is raised here.
        move: `move(batch, change)` gives the batch with every tensor changed that shall be on the device.

    Yields:
        The batches in their order.
    """
    if device.type != "cuda":
        for given in source:
            yield move(read(given), partial(moved, device=device))
        return
    asked, own, iterator = torch.cuda.current_stream(device), torch.cuda.Stream(device), iter(source)

    def fetch() -> tuple[Read, list[torch.Tensor], torch.cuda.Event] | None:
        copies: list[torch.Tensor] = []

        def change(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device.type != "cpu":
                return moved(tensor, device)  # where it was made
            with torch.cuda.stream(own):
                copies.append(moved(tensor, device))
            return copies[-1]

        with torch.cuda.stream(asked):  # for sources that compute there themselves
            for given in iterator:
                found = move(read(given), change)
                return found, copies, own.record_event()
        return None

    with ThreadPoolExecutor(1, thread_name_prefix="skillfast-fed") as reader:
        context = copy_context()
        coming = deque(reader.submit(context.run, fetch) for _ in range(AHEAD))
        try:
            while (ready := coming.popleft().result()) is not None:
                coming.append(reader.submit(context.run, fetch))
                found, copies, copied = ready
                asked.wait_event(copied)
                for tensor in copies:
                    tensor.record_stream(asked)  # whose memory is free once that stream is done with it
                del ready, copies
                yield found
                del found
        finally:
            reader.shutdown(wait=True, cancel_futures=True)
