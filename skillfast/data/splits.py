"""What every dataset of the project is: images or rows in three parts that share no example."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

Example = tuple["Tensor", int]


class LabelledDataset(Protocol):
    """A map-style dataset of (image `[C, H, W]` float32 normalised, label) whose labels are known without decoding."""

    classes: tuple[str, ...]
    labels: Tensor  # int64 [n]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def content(self, index: int) -> bytes:
        """What an example is made of, before anything is done to it: the bytes of a file, pixels, a text."""


class Batches(Protocol):
    """A map-style dataset that gives whole batches."""

    def __len__(self) -> int: ...

    def __getitems__(self, rows: Sequence[int]) -> Any: ...


@dataclass(frozen=True)
class Splits:
    """A dataset in three parts that share no example.

    Attributes:
        name: "digits", "imagefolder" or "cifar10".
        classes: class names, in the order of the labels.
        select: the examples that skills are chosen from (and a model is trained on).
        validate: the examples that settings are chosen on.
        test: the examples that results are measured on.
        train: `select`, or all that may be trained on, seen through a random augmentation; None when there is none.
        skipped: unreadable files that were left out on request.
    """

    name: str
    classes: tuple[str, ...]
    select: LabelledDataset
    validate: LabelledDataset
    test: LabelledDataset
    train: LabelledDataset | None = None
    skipped: tuple[str, ...] = ()

    def without(self, target: int) -> Splits:
        """Leave a class's examples out of what models are trained and skills chosen on; its name and number stay.

        Args:
            target: Index of the class.
        """
        train = None if self.train is None else of_class(self.train, target, others=True)
        return replace(self, select=of_class(self.select, target, others=True), train=train)


class TensorImages:
    """Images that are tensors already.

    Args:
        images: float32 `[n, C, H, W]`, normalised.
        labels: int64 `[n]`.
        classes: class names.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
        self.images = images
        self.labels = labels
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return self.images[index], int(self.labels[index])

    def content(self, index: int) -> bytes:
        """The bytes of an image."""
        return self.images[index].numpy().tobytes()


class Part(Subset):
    """Some examples of a labelled dataset.

    Args:
        dataset: One part of a `Splits`.
        rows: int64 [n], indices of the examples.
    """

    def __init__(self, dataset: LabelledDataset, rows: np.ndarray) -> None:
        super().__init__(dataset, rows.tolist())  # type: ignore[arg-type]  # has what a map-style dataset needs
        self.labels, self.classes = dataset.labels[torch.from_numpy(rows)], dataset.classes

    def content(self, index: int) -> bytes:
        """What an example is made of."""
        return self.dataset.content(self.indices[index])  # type: ignore[attr-defined]


def of_class(dataset: LabelledDataset, target: int, *, others: bool = False) -> Part:
    """The examples of a class, or those of all others, in their order."""
    return Part(dataset, np.flatnonzero((dataset.labels.numpy() == target) != others))


def loader(
    dataset: LabelledDataset | Batches,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
) -> DataLoader:
    """Batches of a dataset, in an order that only the seed determines.

    Batches are made in this process: folders decode with threads of their own (see `skillfast.data.folders`), so that
    an unreadable image is reported in one line and no worker has to be started.

    Args:
        dataset: one part of a `Splits`.
        batch_size: examples per batch.
        shuffle: a new random order in every pass; of a dataset with `lengths`, random batches of like lengths.
        seed: seed of the shuffled order.
        drop_last: leave out a last batch that is not full.

    Returns:
        A loader of (images float32 `[b, C, H, W]`, labels int64 `[b]`), or of what the dataset's `collate` makes.
    """
    # a generator of its own even when not shuffling: iterating then leaves the global random state alone
    generator = torch.Generator().manual_seed(seed)
    collate = getattr(dataset, "collate", None)  # of examples that are no tensors of one size
    if shuffle and (lengths := getattr(dataset, "lengths", None)) is not None:
        batches = _LikeLengths(lengths, batch_size, drop_last, generator)
        return DataLoader(dataset, batch_sampler=batches, generator=generator, collate_fn=collate)  # type: ignore[arg-type]
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        generator=generator,
        collate_fn=collate,
    )


def part_of(loader: DataLoader[Any], rows: Sequence[int]) -> DataLoader[Any]:
    """Batches of some examples of a loader's dataset, in this order.

    Args:
        loader: Batches of a map-style dataset.
        rows: Indices of examples.
    """
    return DataLoader(
        Subset(loader.dataset, rows),
        loader.batch_size,
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),  # iterating leaves the global random state alone
    )


def few_per_class(labels: np.ndarray, seed: int, per_class: int, most: int | None = None) -> list[int]:
    """Indices of some examples of each class, as many of each as there are, drawn at random, in their order.

    Args:
        labels: int64 [n].
        seed: Seed of the draws.
        per_class: How many of each class, at most.
        most: How many in all, at most, but for two of each class.
    """
    present, counts = np.unique(labels, return_counts=True)
    each = per_class if most is None else min(per_class, max(2, most // len(present)))
    rng = np.random.default_rng(seed)
    drawn = [
        rng.choice(np.flatnonzero(labels == label), size=min(each, count), replace=False)
        for label, count in zip(present, counts, strict=True)
    ]
    return np.sort(np.concatenate(drawn)).tolist()


class _LikeLengths:
    """Random batches, each of examples of like lengths, so that padding is short: drawn from pools of 16 batches.

    Args:
        lengths: lengths of the examples.
        batch_size: examples per batch.
        drop_last: leave out batches that are not full.
        generator: where the random numbers come from.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, drop_last: bool, generator: torch.Generator) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.generator = generator

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.lengths), generator=self.generator)
        pools = (pool[self.lengths[pool].argsort(stable=True)] for pool in order.split(16 * self.batch_size))
        batches = [batch for pool in pools for batch in pool.split(self.batch_size)]
        kept = [batch for batch in batches if len(batch) == self.batch_size or not self.drop_last]
        for index in torch.randperm(len(kept), generator=self.generator).tolist():
            yield kept[index].tolist()
