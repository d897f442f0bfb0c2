"""Datasets: what they hold, that the seed alone chooses, and every message about data that cannot be used."""

from __future__ import annotations

import pickle
import random
import shutil
import sys
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import SAFELY, one_line
from PIL import Image
from safetensors.torch import save_file
from torchvision.datasets import CIFAR10

from skillfast import BenchConfig, progress
from skillfast.data import load_cifar10, load_digits, load_imagefolder, loader, make_transforms
from skillfast.data.splits import TensorImages
from skillfast.errors import ArgumentError, DataError, ModelError
from skillfast.runs import images as setup
from skillfast.runs.session import open_session
from skillfast.runs.subject import Subject  # noqa: TC001

SMALL = {"input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}


def picture(path: Path, value: int = 0, size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 10), ("test", 4)):
        for k, name in enumerate(("cat", "dog", "owl")):
            for i in range(count):
                picture(tmp_path / part / name / f"{i:02}.png", value=80 * k + i)
    return tmp_path


def rows(dataset) -> torch.Tensor:
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


def test_digits_split_is_stratified_complete_and_seeded():
    splits = load_digits(seed=3)
    sizes = [len(part) for part in (splits.select, splits.validate, splits.test)]
    assert sum(sizes) == 1797
    assert [round(size / 1797, 1) for size in sizes] == [0.6, 0.1, 0.3]
    for part in (splits.select, splits.validate, splits.test):
        shares = torch.bincount(part.labels) / len(part)
        assert shares.min() > 0.09
        assert shares.max() < 0.11
    images = torch.cat([splits.select.images, splits.validate.images, splits.test.images])
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3
    assert torch.equal(load_digits(seed=3).test.images, splits.test.images)
    assert not torch.equal(load_digits(seed=4).test.labels, splits.test.labels)
    assert splits.train is None


def test_imagefolder_parts(folder: Path):
    splits = load_imagefolder(folder, make_transforms(SMALL))
    assert splits.classes == ("cat", "dog", "owl")
    assert [len(part) for part in (splits.select, splits.validate, splits.test)] == [24, 6, 12]
    assert splits.validate.labels.tolist() == [0, 0, 1, 1, 2, 2]
    image, label = splits.test[5]
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.float32
    assert label == splits.test.labels[5] == 1
    assert splits.test.labels.dtype == torch.int64
    # select and validate share nothing and together are everything
    reds = torch.cat([rows(splits.select), rows(splits.validate)])[:, 0, 0, 0]
    assert len(set(reds.tolist())) == 30
    assert splits.train is not None
    assert torch.equal(splits.train.labels, splits.select.labels)


def test_choice_depends_on_the_seed_alone_and_is_nested(folder: Path):
    transforms = make_transforms(SMALL)
    first, again = (load_imagefolder(folder, transforms, 5, 2, seed=1) for _ in range(2))
    assert [len(part) for part in (first.select, first.validate, first.test)] == [12, 3, 6]
    assert torch.equal(rows(first.select), rows(again.select))
    other = load_imagefolder(folder, transforms, 5, 2, seed=2)
    assert not torch.equal(rows(first.select), rows(other.select))
    larger = load_imagefolder(folder, transforms, 5, 3, seed=1)
    assert {*rows(first.test)[:, 0, 0, 0].tolist()} < {*rows(larger.test)[:, 0, 0, 0].tolist()}


def test_loader_is_deterministic_and_leaves_global_state_alone(folder: Path):
    splits = load_imagefolder(folder, make_transforms(SMALL))
    state = torch.get_rng_state()
    runs = [torch.cat([labels for _, labels in loader(splits.select, 5, shuffle=True, seed=7)]) for _ in range(2)]
    assert torch.equal(*runs)
    batches = loader(splits.select, 5, shuffle=True, seed=7)
    assert not torch.equal(*(torch.cat([labels for _, labels in batches]) for _ in range(2)))
    images, labels = next(iter(loader(splits.select, 5)))
    assert torch.equal(images, rows(splits.select)[:5])
    assert labels.tolist() == [0] * 5
    assert torch.equal(torch.get_rng_state(), state)


def test_transforms_follow_the_configuration():
    grey = Image.new("L", (32, 32), 128)
    transforms = make_transforms(SMALL, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0), crop_pct=0.8)
    pixel = transforms.evaluate(grey.convert("RGB"))[:, 3, 3]
    level = 128 / 255
    assert torch.allclose(pixel, torch.tensor([(level - 0.1) / 0.5, (level - 0.2) / 0.25, level - 0.3]), atol=1e-6)
    assert transforms.config["crop_pct"] == 0.8
    assert transforms.config["mean"] == (0.1, 0.2, 0.3)
    one = make_transforms({**SMALL, "input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,)}, mean=[0.0], std=[1.0])
    assert one.evaluate(grey.convert("RGB")).shape == (1, 16, 16)
    assert one.train is not None
    assert one.train(grey.convert("RGB")).shape == (1, 16, 16)
    assert make_transforms(SMALL, mean=[0.25]).config["mean"] == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": (0.1, 0.2)}, "--mean: expected 1 or 3 numbers for 3-channel images, got 2 (0.1, 0.2); give one per"),
        ({"std": (0.1, 0, 1)}, "--std: expected positive numbers, got 0.1, 0, 1; give the training data's own"),
        ({"crop_pct": 1.5}, "--crop-pct: expected a number above 0 and at most 1, got 1.5; 1 keeps all"),
    ],
)
def test_transform_arguments(arguments: dict, message: str):
    with pytest.raises(ArgumentError) as caught:
        make_transforms(SMALL, **arguments)
    assert str(caught.value).startswith(message)


def test_transforms_refuse_other_channels():
    with pytest.raises(ModelError, match="expected 1 or 3 channels, got 4"):
        make_transforms({**SMALL, "input_size": (4, 16, 16)})


def message_of(error: type[Exception], *args, **kwargs) -> str:
    return one_line(error, load_imagefolder, *args, **kwargs)


def test_missing_and_empty_folders(tmp_path: Path):
    transforms = make_transforms(SMALL)
    layout = "expected folders train/<class>/ and test/<class>/ with images"
    assert f"{layout}, got no such folder; check --data-dir" in message_of(DataError, tmp_path / "no", transforms)
    assert f"{layout}, got an empty folder" in message_of(DataError, tmp_path, transforms)
    (tmp_path / "file").write_text("")
    assert f"{layout}, got a file" in message_of(DataError, tmp_path / "file", transforms)
    (tmp_path / "train").mkdir()
    assert f"{layout}, got file, train/" in message_of(DataError, tmp_path, transforms)
    (tmp_path / "test").mkdir()
    assert "train': expected one folder per class, got none" in message_of(DataError, tmp_path, transforms)
    (tmp_path / "train" / "cat").mkdir()
    assert "train': expected images in its class folders, got none" in message_of(DataError, tmp_path, transforms)
    (tmp_path / "test").rmdir()
    (tmp_path / CIFAR10.base_folder).mkdir()
    assert "pass --dataset cifar10" in message_of(DataError, tmp_path, transforms)


def test_classes_must_be_the_same_and_at_least_two(folder: Path):
    (folder / "test" / "owl").rename(folder / "test" / "elk")
    text = message_of(DataError, folder, make_transforms(SMALL))
    assert "expected the same classes in train/ and test/" in text
    assert "(test/ lacks 'owl' and train/ lacks 'elk')" in text
    for part, names in (("train", ("dog", "owl")), ("test", ("dog", "elk"))):
        for name in names:
            (folder / part / name).rename(folder / f"{part}-{name}")
    assert "expected at least 2 classes, got 1 ('cat')" in message_of(DataError, folder, make_transforms(SMALL))


def test_too_few_images(folder: Path):
    transforms = make_transforms(SMALL)
    (folder / "train" / "dog" / "00.png").unlink()
    text = message_of(DataError, folder, transforms, train_per_class=10)
    assert text == (
        "class 'dog' in train: expected 10 images (--train-per-class 10), got 9; lower --train-per-class or add images"
    )
    assert "class 'cat' in test: expected 9 images" in message_of(DataError, folder, transforms, test_per_class=9)
    for image in sorted((folder / "train" / "dog").iterdir())[1:]:
        image.unlink()
    text = message_of(DataError, folder, transforms)
    assert text.startswith("class 'dog' in train: expected at least 2 images, got 1; add images")
    assert "--train-per-class: expected at least 2, got 1" in message_of(ArgumentError, folder, transforms, 1)
    assert "--test-per-class: expected at least 1, got 0" in message_of(ArgumentError, folder, transforms, 2, 0)
    assert "--seed: expected a number from 0 on, got -1" in message_of(ArgumentError, folder, transforms, seed=-1)


def test_unreadable_images_are_named_counted_and_skipped_on_request(folder: Path):
    transforms = make_transforms(SMALL)
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "train" / "cat" / "03.png")
    whole = (folder / "train" / "cat" / "03.png").read_bytes()
    (folder / "train" / "cat" / "03.png").write_bytes(whole[: len(whole) // 2])
    (folder / "train" / "owl" / "04.png").write_text("no picture")
    (folder / "test" / "owl" / "01.png").write_bytes(b"")
    splits = load_imagefolder(folder, transforms)  # nothing is decoded yet
    with pytest.raises(DataError) as caught:
        list(loader(splits.test, 8))
    text = str(caught.value)
    assert text.endswith(
        "owl/01.png': expected a picture, got a file of no known image format; 3 of the 42 chosen images cannot be "
        "read: replace them or leave them out with --skip-unreadable"
    )
    with pytest.raises(DataError, match="got image file is truncated"):
        [splits.train[i] for i in range(len(splits.train))] + [splits.validate[i] for i in range(6)]

    splits = load_imagefolder(folder, transforms, skip_unreadable=True)
    assert [Path(path).name for path in splits.skipped] == ["03.png", "04.png", "01.png"]
    assert [len(part) for part in (splits.select, splits.validate, splits.test)] == [8 + 7 + 7, 6, 11]
    list(loader(splits.select, 8))
    # others take the place of the skipped ones; where there are none left, that is an error
    splits = load_imagefolder(folder, transforms, 9, 3, skip_unreadable=True)
    assert [len(part) for part in (splits.select, splits.validate, splits.test)] == [21, 6, 9]
    text = message_of(DataError, folder, transforms, 10, skip_unreadable=True)
    assert (
        "class 'cat' in train: expected 10 images (--train-per-class 10), got 9 after leaving out 1 unreadable" in text
    )


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's files with 20 images in each batch, and torchvision told not to compare checksums."""
    rng = np.random.default_rng(0)
    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        data = {"data": rng.integers(0, 255, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        (base / name).write_bytes(pickle.dumps(data))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, None] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, None] for name, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    return tmp_path


def test_cifar10(cifar: Path):
    splits = load_cifar10(cifar, make_transforms({**SMALL, "input_size": (3, 32, 32)}), 5, 2)
    assert splits.name == "cifar10"
    assert splits.classes[:2] == ("class0", "class1")
    assert [len(part) for part in (splits.select, splits.validate, splits.test)] == [40, 10, 20]
    images, labels = next(iter(loader(splits.test, 20)))
    stored = CIFAR10(cifar, train=False)
    assert torch.equal(labels, torch.arange(10).repeat_interleave(2))
    expected = torch.from_numpy(stored.data[[0, 10]]).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.allclose(images[:2], expected, atol=1e-6)


def test_cifar10_messages(tmp_path: Path, cifar: Path):
    transforms = make_transforms(SMALL)
    (cifar / CIFAR10.base_folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match="got damaged or missing files in it; unpack "):
        load_cifar10(cifar, transforms)
    (tmp_path / "other" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="expected cifar-10-batches-py/, got train/; pass --dataset imagefolder"):
        load_cifar10(tmp_path / "other", transforms)
    with pytest.raises(DataError, match="as torchvision downloads it, got no such folder"):
        load_cifar10(tmp_path / "nothing", transforms)


def test_cifar10_to_train_on_all(cifar: Path):
    """Training sees every picture but those that validate; selection only as many as were asked for."""
    transforms = make_transforms({**SMALL, "input_size": (3, 32, 32)})
    few = load_cifar10(cifar, transforms, 5, 2)
    assert few.train is not None
    assert len(few.train) == len(few.select) == 40
    whole = load_cifar10(cifar, transforms, 5, 2, train_on_all=True)
    assert whole.train is not None
    assert [len(part) for part in (whole.train, whole.select, whole.validate)] == [90, 40, 10]
    used = {name: set(getattr(whole, name)._indices.tolist()) for name in ("train", "select", "validate")}
    assert used["train"] == set(range(100)) - used["validate"]
    assert used["select"] < used["train"]


def test_the_published_protocol_is_the_default(cifar: Path, monkeypatch: pytest.MonkeyPatch):
    """A model without weights trains on all that does not validate; one with weights on what skills are chosen on."""
    monkeypatch.setattr(setup, "CIFAR10_TRAIN", 6)
    monkeypatch.setattr(setup, "CIFAR10_TEST", 2)
    kwargs = {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 24, "num_heads": 2}
    options = {"model": "vit_tiny_patch16_224", "model_kwargs": kwargs, "dataset": "cifar10", "epochs": 1}
    said: list[str] = []

    def prepared(**more: str | int) -> Subject:
        config = BenchConfig.of(**options, data_dir=str(cifar), **more)  # type: ignore[arg-type]
        with open_session(config, say=said.append) as session:
            return session.subject

    scratch = prepared()
    assert scratch.trained["n_train"] == 90
    assert said == [
        "training all weights of vit_tiny_patch16_224 (scratch weights) on 90 images",
        "train: 1 x 90 examples, forward and backward",
    ]
    assert [len(part) for part in (scratch.splits.select, scratch.splits.validate, scratch.splits.test)] == [50, 10, 20]
    assert prepared(train_per_class=5).trained["n_train"] == 40  # what was asked for
    weights = cifar / "weights.safetensors"
    save_file(scratch.model.state_dict(), weights)
    assert prepared(checkpoint=str(weights), finetune="last-block").trained["n_train"] == 50


def test_cifar10_is_downloaded_where_it_is_missing(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    transforms = make_transforms({**SMALL, "input_size": (3, 32, 32)})
    folder = tmp_path / "cache" / "cifar10"

    def unreachable(_: CIFAR10) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(CIFAR10, "download", unreachable)
    text = one_line(DataError, load_cifar10, folder, transforms, 5, 2, download=True)
    assert "got URLError (Name or service not known); pass --data-dir" in text

    def downloaded(self: CIFAR10) -> None:
        shutil.copytree(cifar / CIFAR10.base_folder, Path(self.root) / CIFAR10.base_folder)

    monkeypatch.setattr(CIFAR10, "download", downloaded)
    assert len(load_cifar10(folder, transforms, 5, 2, download=True).test) == 20
    monkeypatch.setattr(CIFAR10, "download", unreachable)  # once is enough
    assert len(load_cifar10(folder, transforms, 5, 2, download=True).test) == 20


def test_real_images(shared: Path, tmp_path: Path):
    archive = shared / "data" / "cifar10.tar.gz"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there (set SKILLFAST_DATA)")
    with tarfile.open(archive) as tar:
        for member in tar:  # read only as far as the first class's first images
            if member.isfile():
                tar.extract(member, tmp_path, **SAFELY)
            if len(list(tmp_path.rglob("*.jpg"))) == 8:
                break
    first = next(path for path in (tmp_path / "train").iterdir())
    for part, name in (("train", "other"), ("test", first.name), ("test", "other")):
        (tmp_path / part / name).mkdir(parents=True)
        for path in first.glob("*.jpg"):
            (tmp_path / part / name / path.name).write_bytes(path.read_bytes())
    splits = load_imagefolder(tmp_path, make_transforms({**SMALL, "input_size": (3, 32, 32)}))
    images, _ = next(iter(loader(splits.test, 16)))
    assert images.shape == (16, 3, 32, 32)
    assert images.std() > 0.1


def test_training_view_is_random_and_seeded_by_the_global_states(folder: Path):
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    for path in (folder / "train" / "cat").iterdir():
        Image.fromarray(noise).save(path)
    train = load_imagefolder(folder, make_transforms(SMALL)).train

    def views() -> torch.Tensor:
        random.seed(0)
        torch.manual_seed(0)
        return torch.stack([train[0][0] for _ in range(4)])

    first = views()
    assert torch.equal(first, views())
    assert not torch.equal(first[0], first[1])


def test_tensor_images():
    data = TensorImages(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 1]), ["a", "b"])
    assert len(data) == 3
    assert data[2][1] == 1
    assert data.classes == ("a", "b")


class Terminal:
    """A stderr that says it is a terminal, and keeps what is written."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("case", ["quiet", "shown", "fails"])
def test_progress_bar(case: str, monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    seen = []
    try:
        for item in progress.track([1, 2, 3], lambda: f"item {len(seen)}", quiet=case == "quiet"):
            seen.append(item)
            if case == "fails" and item == 2:
                raise KeyError("in the loop's body")
    except KeyError:
        assert seen == [1, 2]
    else:
        assert seen == [1, 2, 3]
    if case == "quiet":
        assert terminal.text == ""
    else:
        assert "item" in terminal.text
        assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l")  # the cursor is back


def test_progress_needs_no_terminal(capsys: pytest.CaptureFixture[str]):
    assert list(progress.track(iter("ab"), "letters")) == ["a", "b"]
    assert capsys.readouterr() == ("", "")
