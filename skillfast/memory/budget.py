"""How much memory a sweep may take, and how many rows fit into it."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from skillfast.errors import ArgumentError
from skillfast.memory.usage import free_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

SHARE_OF_FREE = 0.5  # of the memory that is free, what a sweep takes unless it is told
CPU_TOKENS = 4096  # stacked rows times tokens beyond which a CPU gains nothing
CUDA_TOKENS = 1 << 18
UNKNOWN_FREE = 1 << 32  # bytes to take where the system does not tell what is free

_limit: ContextVar[int | None] = ContextVar("skillfast_memory_budget", default=None)


@contextmanager
def limited_memory(budget: int | None) -> Iterator[None]:
    """Let every sweep inside the context take no more than `budget` bytes; None: half of what is free."""
    token = _limit.set(budget)
    try:
        yield
    finally:
        _limit.reset(token)


def memory_limit(device: torch.device) -> int:
    """Bytes that a sweep on this device may take: what `limited_memory` says, or half of what is free."""
    limit = _limit.get()
    if limit is not None:
        return limit
    free = free_bytes(device)
    return UNKNOWN_FREE if free is None else int(SHARE_OF_FREE * free)


def rows_that_fit(
    budget: int, kept: float, running: float, tokens: int, batch: int, device: torch.device
) -> tuple[int, int]:
    """How many samples' intermediate results to keep at once, and how many stacked rows to run at once.

    Args:
        budget: Bytes.
        kept: Bytes of intermediate results per sample.
        running: Bytes that a forward takes per row.
        tokens: Tokens per row.
        batch: Samples that there are.
        device: Where the model runs.

    Raises:
        ArgumentError: Not one sample fits.
    """
    least = kept + running
    if least > budget:
        raise ArgumentError(
            f"memory budget: expected at least {least / 2**20:,.0f} MiB for one sample of this model, got "
            f"{budget / 2**20:,.0f} MiB; raise --memory-budget"
        )
    samples = max(1, min(batch, int(budget / least)))
    rows = int((budget - samples * kept) / running) if running else samples
    useful = (CUDA_TOKENS if device.type == "cuda" else CPU_TOKENS) // max(1, tokens)
    return samples, max(1, samples, min(rows, useful))
