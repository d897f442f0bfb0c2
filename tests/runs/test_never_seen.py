"""Models that never see a class: what is refused, and that the class is left out of training alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import make_vit, one_line
from torch.utils.data import DataLoader, TensorDataset

import skillfast
from skillfast import BenchConfig
from skillfast.cli import main
from skillfast.data import load_digits
from skillfast.data.splits import TensorImages, of_class
from skillfast.errors import ArgumentError
from skillfast.models import training
from skillfast.runs import images
from skillfast.runs.cost import Clock
from skillfast.runs.never_seen import check_never_seen, never_seen
from skillfast.runs.session import Session

TINY = {
    "model": "vit_tiny_patch16_224", "dataset": "imagefolder",
    "model_kwargs": {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3},
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"checkpoint": __file__}, f"--checkpoint {__file__}"),
        ({"model": "vit_tiny_patch16_224", "pretrained": True}, "--pretrained"),
        ({"model": "vit_tiny_patch16_224", "finetune": "none"}, "--finetune none"),
        ({"dataset": "text", "data_file": "x.tsv"}, "a language model"),
    ],
)
def test_weights_from_elsewhere_have_no_model_beside_them(settings, got):
    message = one_line(ArgumentError, BenchConfig.of, **settings, never_seen=("3",))
    assert message.startswith("never_seen: expected a model of images whose weights are trained here from none, got ")
    assert f"got {got}; leave it out" in message


def test_a_class_is_named_once():
    message = one_line(ArgumentError, BenchConfig.of, never_seen=("3", "4", "3"))
    assert "expected each class once, got 3, 4, 3" in message


def test_a_model_of_the_callers_is_refused(tmp_path):
    data = TensorDataset(torch.zeros(4, 3, 16, 16), torch.arange(4) % 2)
    config = BenchConfig.of(never_seen=("0",), output=str(tmp_path))
    message = one_line(ArgumentError, skillfast.bench, config, model=make_vit(), loader=DataLoader(data))
    assert "got a model of the caller's (VisionTransformer)" in message


@pytest.mark.parametrize("name", ["10", "three", ""])
def test_unknown_classes_are_told_before_anything_is_trained(name, tmp_path, monkeypatch):
    monkeypatch.setattr(images.digits, "load_or_train_digits", lambda *_, **__: pytest.fail("trained for nothing"))
    said = CliRunner().invoke(main, ["bench", "--never-seen", f"3,{name or ' '}", "--output", str(tmp_path / "out")])
    assert said.exit_code == 2
    (line,) = [line for line in said.output.splitlines() if line.startswith("Error: ")]
    assert line == (
        f"Error: never_seen: expected classes among 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, got {name or ' '!r}; check its name"
    )
    assert not (tmp_path / "out").exists()


def test_two_classes_are_too_few(pictures):
    config = BenchConfig.of(**TINY, data_dir=str(pictures), never_seen=("red",))
    made = images.image_subject(config, torch.device("cpu"), quiet=True, say=print)
    check_never_seen(made)
    two = replace(made, splits=replace(made.splits, classes=("red", "blue")))
    assert "expected data of 3 classes at least, got 2" in one_line(ArgumentError, check_never_seen, two)
    headless = replace(made, model=make_vit(num_classes=0))
    assert "expected a model with one linear classifier" in one_line(ArgumentError, check_never_seen, headless)


def test_only_what_is_trained_on_lacks_the_class(pictures):
    config = BenchConfig.of(**TINY, data_dir=str(pictures))
    splits = images.image_subject(config, torch.device("cpu"), quiet=True, say=print).splits
    less = splits.without(1)
    assert less.classes == splits.classes
    assert less.test is splits.test
    assert less.validate is splits.validate
    for part in ("select", "train"):
        whole, left = getattr(splits, part), getattr(less, part)
        rows = np.flatnonzero(whole.labels.numpy() != 1)
        assert len(left) == len(rows) == 32
        assert left.labels.tolist() == whole.labels[rows].tolist()
        assert left.classes == whole.classes
        assert left.content(20) == whole.content(int(rows[20]))
    image, label = less.select[20]
    assert label == splits.select[int(np.flatnonzero(splits.select.labels.numpy() != 1)[20])][1] != 1
    (batch, labels), *_ = training.loader(less.select, 7)
    assert batch.shape == (7, *image.shape)
    assert labels.tolist() == less.select.labels[:7].tolist()
    own = of_class(splits.select, 1)
    assert own.labels.tolist() == [1] * 16
    assert replace(splits, train=None).without(0).train is None


def test_training_is_not_under_the_precision_of_the_run(pictures, monkeypatch):
    """Autocast keeps copies of weights until its outermost context ends, which training changes under it."""
    config = BenchConfig.of(**TINY, data_dir=str(pictures), never_seen=("red",), epochs=1)
    made = images.image_subject(config, torch.device("cpu"), quiet=True, say=print)
    seen, train = [], images.train_anew

    def watched(*args, **kwargs):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
        return train(*args, **kwargs)

    monkeypatch.setattr(images, "train_anew", watched)
    said = []
    session = Session(made, None, Clock(), True, said.append)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = never_seen(session)
        assert torch.is_autocast_cache_enabled()
    assert seen == [(False, False)]
    assert found[2].n_train == 32
    assert said[0] == "training a model that never sees red, as vit_tiny_patch16_224 was trained"


def test_the_default_model_without_a_digit_has_a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SKILLFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(images.digits, "_DIGITS_EPOCHS", 1)
    whole = load_digits(1)
    few = TensorImages(whole.select.images[:64], whole.select.labels[:64], whole.classes)
    splits = replace(whole, select=few)
    found = {
        without: images.digits.load_or_train_digits(splits, 1, quiet=True, without=without) for without in (None, 3)
    }
    n = int((few.labels != 3).sum())
    assert (found[None][1]["n_train"], found[3][1]["n_train"]) == (64, n)
    assert n < 64
    assert len(list(tmp_path.iterdir())) == 2
    assert not torch.equal(found[None][0].model.head.weight, found[3][0].model.head.weight)
    monkeypatch.setattr(images.digits, "finetune", None)  # a second time it is not trained
    for without, (loaded, trained) in found.items():
        again = images.digits.load_or_train_digits(splits, 1, quiet=True, without=without)
        assert again[1] == trained
        assert torch.equal(again[0].model.head.weight, loaded.model.head.weight)
