"""Pictures that are decoded when they are needed, and the choice of which ones to use."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from skillfast.data.splits import Splits
from skillfast.errors import ArgumentError, DataError
from skillfast.progress import track

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from skillfast.data.splits import Example
    from skillfast.data.transforms import Transforms

VALIDATE_SHARE = 0.2  # of each class's training images
_PIL_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises on broken files
_THREADS = min(8, os.cpu_count() or 1)


class Source(Protocol):
    """All pictures of one part of a dataset, before any choice."""

    name: str  # "train" or "test"
    labels: np.ndarray  # int64 [n]

    def read(self, index: int) -> Image.Image:
        """Decode one picture."""

    def content(self, index: int) -> bytes:
        """The bytes of one picture, before they are decoded."""

    def path(self, index: int) -> str:
        """What to call that picture in a message."""


class FileSource:
    """Picture files."""

    def __init__(self, name: str, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.name = name
        self.paths = list(paths)
        self.labels = np.asarray(labels, dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        """Decode one picture."""
        with Path(self.paths[index]).open("rb") as file:
            return Image.open(file).convert("RGB")

    def content(self, index: int) -> bytes:
        """The bytes of a picture's file."""
        return Path(self.paths[index]).read_bytes()

    def path(self, index: int) -> str:
        """The file of a picture."""
        return self.paths[index]


class ArraySource:
    """Pictures in memory, uint8 `[n, H, W, 3]`."""

    def __init__(self, name: str, pixels: np.ndarray, labels: Sequence[int]) -> None:
        self.name = name
        self.pixels = pixels
        self.labels = np.asarray(labels, dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        """Make one picture."""
        return Image.fromarray(self.pixels[index])

    def content(self, index: int) -> bytes:
        """The bytes of a picture's pixels."""
        return self.pixels[index].tobytes()

    def path(self, index: int) -> str:
        """The place of a picture."""
        return f"{self.name}[{index}]"


@dataclass(frozen=True)
class Chosen:
    """The pictures that a run uses.

    Attributes:
        train: training source.
        test: test source.
        classes: class names.
        select: indices into `train`, sorted by class.
        validate: indices to validate on, disjoint from `select`.
        held_out: indices into `test`.
        skipped: unreadable files that were left out.
        quiet: draw no progress bar.
    """

    train: Source
    test: Source
    classes: tuple[str, ...]
    select: np.ndarray
    validate: np.ndarray
    held_out: np.ndarray
    skipped: tuple[str, ...] = ()
    quiet: bool = False

    def unreadable(self, source: Source, index: int, error: Exception) -> DataError:
        """Make the error for a picture that cannot be decoded: how many of the others cannot be either."""
        used = [(self.train, i) for i in (*self.select, *self.validate)] + [(self.test, i) for i in self.held_out]
        bad = sum(not _readable(*item) for item in track(used, "checking images", quiet=self.quiet))
        return DataError(
            f"image '{source.path(index)}': expected a picture, got {_reason(error)}; "
            f"{bad} of the {len(used)} chosen images cannot be read: replace them or leave them out "
            "with --skip-unreadable"
        )


class ImageDataset:
    """Some of the chosen pictures, decoded and transformed on access.

    Args:
        chosen: all pictures of the run.
        source: where these are.
        indices: indices of the pictures in the source.
        transform: PIL image to float32 `[C, H, W]`.
        parallel: decode a batch in threads; the transform must then be free of chance.
    """

    def __init__(
        self,
        chosen: Chosen,
        source: Source,
        indices: np.ndarray,
        transform: Callable[[Image.Image], Tensor],
        parallel: bool = True,
    ) -> None:
        self.classes = chosen.classes
        self.labels = torch.from_numpy(source.labels[indices])
        self._chosen, self._source, self._indices, self._transform = chosen, source, indices, transform
        self._threads = _THREADS if parallel else 1

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Fetch a batch; torch's DataLoader calls this where it exists.

        Raises:
            DataError: a picture cannot be decoded; says which one, and how many of all chosen ones.
        """
        try:
            if self._threads == 1 or len(indices) == 1:
                return [self._fetch(index) for index in indices]
            with ThreadPoolExecutor(self._threads) as pool:
                return list(pool.map(self._fetch, indices))
        except _UnreadableError as broken:
            raise self._chosen.unreadable(self._source, broken.index, broken.reason) from broken.reason

    def content(self, index: int) -> bytes:
        """The bytes of a picture's file, or of its pixels; raises DataError where they cannot be read."""
        row = int(self._indices[index])
        try:
            return self._source.content(row)
        except OSError as error:
            raise self._chosen.unreadable(self._source, row, error) from error

    def _fetch(self, index: int) -> Example:
        row = int(self._indices[index])
        try:
            image = self._source.read(row)
        except _PIL_ERRORS as error:
            raise _UnreadableError(row, error) from error
        return self._transform(image), int(self.labels[index])


class _UnreadableError(Exception):
    """Carries a decoding failure out of the threads, so that the check of all other pictures runs once."""

    def __init__(self, index: int, reason: Exception) -> None:
        self.index, self.reason = index, reason


def make_splits(name: str, chosen: Chosen, transforms: Transforms, *, train_on_all: bool = False) -> Splits:
    """Make the datasets of the chosen pictures; `train` of those selected on, or of all that do not validate."""
    view = partial(ImageDataset, chosen)
    train = transforms.train
    rows = np.setdiff1d(np.arange(len(chosen.train.labels)), chosen.validate) if train_on_all else chosen.select
    return Splits(
        name=name,
        classes=chosen.classes,
        select=view(chosen.train, chosen.select, transforms.evaluate),
        validate=view(chosen.train, chosen.validate, transforms.evaluate),
        test=view(chosen.test, chosen.held_out, transforms.evaluate),
        train=None if train is None else view(chosen.train, rows, train, parallel=False),
        skipped=chosen.skipped,
    )


def choose(
    train: Source,
    test: Source,
    classes: Sequence[str],
    train_per_class: int | None,
    test_per_class: int | None,
    seed: int,
    skip_unreadable: bool = False,
    quiet: bool = False,
) -> Chosen:
    """Choose pictures at random, the same ones for the same seed, and split the training ones.

    Every class's pictures are put in a random order that depends on the seed alone, and the first ones are taken; so
    a smaller choice is part of a larger one. The first fifth of a class's training pictures validates.

    Args:
        train: the training pictures.
        test: the test pictures.
        classes: class names.
        train_per_class: how many of each class to use for select and validate together; None for all.
        test_per_class: number of pictures per class for the test, None for all.
        seed: seed of the choice of pictures.
        skip_unreadable: decode every picture now and take the next one in place of an unreadable one.
        quiet: draw no progress bar.

    Raises:
        ArgumentError: a number per class, or a seed, that cannot be used.
        DataError: a class with too few pictures.
    """
    if seed < 0:
        raise ArgumentError(f"--seed: expected a number from 0 on, got {seed}; any will do")
    wanted = ((train, train_per_class, 2), (test, test_per_class, 1))
    for source, per_class, least in wanted:
        if per_class is not None and per_class < least:
            raise ArgumentError(
                f"--{source.name}-per-class: expected at least {least}, got {per_class}; "
                + ("one image is selected on and one validated on" if least == 2 else "one image is measured on")
            )
    skipped: list[str] = []
    picked = [_pick(*part, classes, seed, skipped if skip_unreadable else None, quiet) for part in wanted]
    cuts = [max(1, round(VALIDATE_SHARE * len(rows))) for rows in picked[0]]
    return Chosen(
        train,
        test,
        tuple(classes),
        select=np.concatenate([np.sort(rows[cut:]) for rows, cut in zip(picked[0], cuts, strict=True)]),
        validate=np.concatenate([np.sort(rows[:cut]) for rows, cut in zip(picked[0], cuts, strict=True)]),
        held_out=np.concatenate([np.sort(rows) for rows in picked[1]]),
        skipped=tuple(skipped),
        quiet=quiet,
    )


def _pick(
    source: Source,
    per_class: int | None,
    least: int,
    classes: Sequence[str],
    seed: int,
    skipped: list[str] | None,
    quiet: bool,
) -> list[np.ndarray]:
    """Choose each class's rows; unreadable ones are replaced and noted in `skipped` where that is a list."""
    picked = []
    for label in track(range(len(classes)), f"checking {source.name} images", quiet=quiet or skipped is None):
        order = np.random.default_rng([seed, label]).permutation(np.flatnonzero(source.labels == label))
        before = len(skipped or ())
        good: list[int] = []
        for row in order:
            if per_class is not None and len(good) == per_class:
                break
            if skipped is not None and not _readable(source, row):
                skipped.append(source.path(row))
            else:
                good.append(row)
        if len(good) < (need := per_class or least):
            left_out = len(skipped or ()) - before
            raise _too_few(source.name, classes[label], len(good), need, per_class is not None, left_out)
        picked.append(np.asarray(good, dtype=np.int64))
    return picked


def _too_few(part: str, name: str, got: int, need: int, asked: bool, left_out: int) -> DataError:
    option = f"--{part}-per-class"
    wanted = f"{need} images ({option} {need})" if asked else f"at least {need} image{'s' * (need > 1)}"
    found = f"{got}" + (f" after leaving out {left_out} unreadable" if left_out else "")
    remedy = f"lower {option} or add images" if asked else "add images or remove the class's folders"
    return DataError(f"class '{name}' in {part}: expected {wanted}, got {found}; {remedy}")


def _readable(source: Source, index: int) -> bool:
    try:
        source.read(int(index))
    except _PIL_ERRORS:
        return False
    return True


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "a file of no known image format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).split("\n")[0] or type(error).__name__
