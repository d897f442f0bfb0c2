"""The user's own pictures: `train/<class>/*` and `test/<class>/*`, or CIFAR-10 as torchvision keeps it."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from skillfast.data.images import ArraySource, FileSource, choose, make_splits
from skillfast.errors import DataError

if TYPE_CHECKING:
    from os import PathLike

    from skillfast.data.splits import Splits
    from skillfast.data.transforms import Transforms

_LAYOUT = "expected folders train/<class>/ and test/<class>/ with images"


def load_imagefolder(
    data_dir: str | PathLike[str],
    transforms: Transforms,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
    seed: int = 0,
    *,
    skip_unreadable: bool = False,
    quiet: bool = False,
) -> Splits:
    """Load pictures from `data_dir/train/<class>/` and `data_dir/test/<class>/`.

    Args:
        data_dir: the folder; torchvision's `ImageFolder` reads either part.
        transforms: from `make_transforms`.
        train_per_class: pictures of each class to use from `train`, chosen at random; a fifth of them validates. None
            for all.
        test_per_class: number of pictures per class from `test`, None for all.
        seed: seed of the choice of pictures.
        skip_unreadable: leave unreadable pictures out, taking others in their place; they are named in `skipped`.
        quiet: draw no progress bar.

    Returns:
        Splits of images float32 `[C, H, W]`.

    Raises:
        DataError: a folder that is missing, empty or not laid out like that, classes that differ between the two parts,
            a class with too few pictures. Reading a picture raises it where the picture is unreadable.
        ArgumentError: a number per class that cannot be used.
    """
    root = Path(data_dir)
    if not all((root / part).is_dir() for part in ("train", "test")):
        remedy = "pass --dataset cifar10" if (root / CIFAR10.base_folder).is_dir() else "check --data-dir"
        raise DataError(f"data folder '{root}': {_LAYOUT}, got {_what_is(root)}; {remedy}")
    train, test = _read_part(root, "train"), _read_part(root, "test")
    _check_same_classes(root, train.classes, test.classes)
    if len(train.classes) < 2:
        raise DataError(
            f"data folder '{root}': expected at least 2 classes, got 1 ('{train.classes[0]}'); "
            "add train/<class>/ and test/<class>/ for another"
        )
    chosen = choose(
        FileSource("train", *zip(*train.samples, strict=True)),
        FileSource("test", *zip(*test.samples, strict=True)),
        train.classes,
        train_per_class,
        test_per_class,
        seed,
        skip_unreadable,
        quiet,
    )
    return make_splits("imagefolder", chosen, transforms)


def load_cifar10(
    data_dir: str | PathLike[str],
    transforms: Transforms,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
    seed: int = 0,
    *,
    download: bool = False,
    train_on_all: bool = False,
    quiet: bool = False,
) -> Splits:
    """Load CIFAR-10 from the files that torchvision keeps, `data_dir/cifar-10-batches-py/`.

    Args:
        data_dir: the folder that holds `cifar-10-batches-py/`.
        transforms: from `make_transforms`.
        train_per_class: see `load_imagefolder`.
        test_per_class: see `load_imagefolder`.
        seed: seed of the choice of pictures.
        download: let torchvision download the files (170 MB) where they are missing.
        train_on_all: `Splits.train` holds all training pictures but those that validate, not only those selected on.
        quiet: draw no progress bar.

    Raises:
        DataError: the files are missing or damaged or cannot be downloaded, or a class has too few pictures.
        ArgumentError: a number per class that cannot be used.
    """
    root = Path(data_dir)
    if download and not (root / CIFAR10.base_folder).is_dir():
        _download_cifar10(root)
    if (root / "train").is_dir() and not (root / CIFAR10.base_folder).is_dir():
        raise DataError(
            f"data folder '{root}': expected {CIFAR10.base_folder}/, got train/; pass --dataset imagefolder"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, about how these pickles were written in 2009
            train, test = CIFAR10(root, train=True), CIFAR10(root, train=False)
    except (RuntimeError, OSError) as error:
        got = "damaged or missing files in it" if (root / CIFAR10.base_folder).is_dir() else _what_is(root)
        raise DataError(
            f"data folder '{root}': expected {CIFAR10.base_folder}/ as torchvision downloads it, got {got}; "
            "unpack cifar-10-python.tar.gz there"
        ) from error
    chosen = choose(
        ArraySource("train", train.data, train.targets),
        ArraySource("test", test.data, test.targets),
        train.classes,
        train_per_class,
        test_per_class,
        seed,
        quiet=quiet,
    )
    return make_splits("cifar10", chosen, transforms, train_on_all=train_on_all)


def _download_cifar10(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            CIFAR10(root, download=True)
    except (OSError, RuntimeError) as error:  # no network, no space; a damaged file
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise DataError(
            f"CIFAR-10: expected to download it from {CIFAR10.url}, got {type(error).__name__} ({reason}); "
            "pass --data-dir with the folder that holds cifar-10-batches-py/"
        ) from error


def _read_part(root: Path, part: str) -> ImageFolder:
    try:
        folder = ImageFolder(str(root / part), allow_empty=True)
    except FileNotFoundError as error:  # not one class folder
        raise DataError(
            f"data folder '{root / part}': expected one folder per class, got none; "
            "put each class's images into a folder of its own"
        ) from error
    except OSError as error:
        raise DataError(f"data folder '{root / part}': {_LAYOUT}, got {error.strerror}; check permissions") from error
    if not folder.samples:
        raise DataError(
            f"data folder '{root / part}': expected images in its class folders, got none; "
            f"add files that end in {' '.join(IMG_EXTENSIONS)}"
        )
    return folder


def _check_same_classes(root: Path, train: list[str], test: list[str]) -> None:
    differing = [
        f"{part}/ lacks {', '.join(repr(name) for name in missing[:5])}" + (", ..." if len(missing) > 5 else "")
        for part, missing in (("test", sorted({*train} - {*test})), ("train", sorted({*test} - {*train})))
        if missing
    ]
    if differing:
        raise DataError(
            f"data folder '{root}': expected the same classes in train/ and test/, got differing ones "
            f"({' and '.join(differing)}); add or remove these folders"
        )


def _what_is(path: Path) -> str:
    if not path.exists():
        return "no such folder"
    if not path.is_dir():
        return "a file"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "an empty folder"
