"""In what order a loader gives its data: whether its first rows are random ones, and what to do where they are not."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from skillfast.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_LEAST_BATCHES = 8  # of a list that edges come from: one batch may hold a single class
_BUFFER_BYTES = 256 << 20  # of batches held to be shuffled


@dataclass(frozen=True)
class Order:
    """How to read a loader so that the bins' edges come from random rows.

    Attributes:
        batches: What to iterate over.
        calibration: Batches of random items to run first, not counted; empty where the first rows are random anyway.
        distributed: Whether other processes read the rest of the data.
    """

    batches: Iterable[Any]
    calibration: Iterable[Any]
    distributed: bool


def plan(loader: Iterable[Any], rows: int, exact_rows: int, seed: int = 0, *, most: int | None = None) -> Order:
    """Decide how to read a loader.

    A loader that shuffles is read as it is. A map-style data set or a list of batches in a fixed order is calibrated on
    random items first, unless it is so small that it will be scored exactly. An iterable stream, or a data set whose
    items are batches (`batch_size=None`), goes through a shuffle buffer.

    Args:
        loader: A DataLoader, a sequence of batches, or any iterable of batches.
        rows: How many rows should set the edges.
        exact_rows: Up to this many rows no edges are needed.
        seed: Seed of the choice of items.
        most: How many rows an accumulator takes to set edges from; None for any number.
    """
    if not isinstance(loader, DataLoader):
        if isinstance(loader, Sequence):
            return Order(loader, _random_batches(loader, rows, exact_rows, seed, most), distributed=False)
        return Order(_shuffled(loader, rows, seed), (), distributed=False)
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:  # items that are batches already
        return Order(_shuffled(loader, rows, seed), (), distributed=False)
    distributed = isinstance(loader.sampler, DistributedSampler) and loader.sampler.num_replicas > 1
    n = len(loader.dataset)  # type: ignore[arg-type]
    # Processes must agree on the edges, so they calibrate on the same items even where each shuffles.
    if n <= exact_rows or (not distributed and isinstance(loader.sampler, _SHUFFLING)):
        return Order(loader, (), distributed)
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:rows].tolist()
    calibration = DataLoader(
        Subset(loader.dataset, chosen),
        batch_size=loader.batch_size or 64,
        collate_fn=loader.collate_fn,
        generator=torch.Generator().manual_seed(seed),  # iterating leaves the global random state alone
    )
    return Order(loader, calibration, distributed)


def _rows_of(batch: Any) -> int:
    """How many observations a batch has, by its first tensor."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.dim() else 0
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((count for count in map(_rows_of, parts) if count), 0)


def _bytes_of(batch: Any) -> int:
    if isinstance(batch, torch.Tensor):
        return batch.numel() * batch.element_size()
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return sum(map(_bytes_of, parts))


def _random_batches(
    batches: Sequence[Any], rows: int, exact_rows: int, seed: int, most: int | None = None
) -> list[Any]:
    """Random batches of a list with `rows` rows, or none where all of it is scored exactly.

    There are more of them, up to `_LEAST_BATCHES`, as far as `most` rows allow.
    """
    if sum(map(_rows_of, batches)) <= exact_rows:
        return []
    order = list(batches)
    random.Random(seed).shuffle(order)
    chosen: list[Any] = []
    count = 0
    for batch in order:
        many = len(chosen) >= _LEAST_BATCHES or (most is not None and count + _rows_of(batch) > most)
        if count >= rows and many:
            break
        chosen.append(batch)
        count += _rows_of(batch)
    return chosen


def _shuffled(stream: Iterable[Any], rows: int, seed: int) -> Iterator[Any]:
    """The stream's batches through a buffer of twice `rows` rows, from which the next one is drawn at random."""
    generator = random.Random(seed)
    iterator = iter(stream)
    held = list(islice(iterator, 1))
    if not held:
        return
    size = max(1, _rows_of(held[0]))
    fits = _BUFFER_BYTES // max(1, _bytes_of(held[0]))
    held += islice(iterator, max(0, min(2 * rows // size, fits) - 1))
    for batch in chain(iterator):
        at = generator.randrange(len(held))
        drawn, held[at] = held[at], batch
        yield drawn
    generator.shuffle(held)
    yield from held


@dataclass(frozen=True)
class Rows:
    """Some rows of a process's share.

    Attributes:
        own: bool [n], not repeated from elsewhere; None: all are.
        place: int64 [n], a number that no other row of any process has; None: there is one process.
    """

    own: torch.Tensor | None
    place: torch.Tensor | None


class ValidRows:
    """Which rows of each batch are a process's own: a DistributedSampler repeats some to make shares even.

    Args:
        loader: What is iterated over.

    Raises:
        ArgumentError: A DistributedSampler that drops samples.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        sampler = getattr(loader, "sampler", None)
        self._sampler = sampler if isinstance(sampler, DistributedSampler) else None
        self._seen = 0
        if self._sampler is not None and self._sampler.drop_last:
            raise ArgumentError(
                "loader: expected a DistributedSampler that drops nothing, got drop_last=True; repeated samples are "
                "left out anyway"
            )

    def next(self, n: int) -> Rows:
        """What is known of the next n rows."""
        if self._sampler is None:
            return Rows(None, None)
        place = (self._seen + torch.arange(n)) * self._sampler.num_replicas + self._sampler.rank
        self._seen += n
        return Rows(place < len(self._sampler.dataset), place)  # type: ignore[arg-type]
