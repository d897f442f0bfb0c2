"""The audit of README: its fine-tuning leaves the eights out, and its gate can be read."""

from __future__ import annotations

import importlib.util

import torch
from conftest import ROOT
from safetensors.torch import load_model

from skillfast.data import TensorImages, load_digits
from skillfast.models.digits import digits_model
from skillfast.results.gates import read_gates

FOLDER = ROOT / "examples" / "audit"


def test_the_default_model_is_tuned_without_the_eights(trained_digits, monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("tune", FOLDER / "tune.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    seen = []
    tune = script.tune
    monkeypatch.setattr(
        script, "tune", lambda model, images, passes: (seen.append(images), tune(model, images, passes))
    )
    path = tmp_path / "tuned.safetensors"
    monkeypatch.setattr("sys.argv", ["tune.py", str(path), "--passes", "1"])
    script.main()
    (images,) = seen
    splits = load_digits()
    assert isinstance(splits.select, TensorImages)
    eight = splits.select.labels == 8
    assert torch.equal(images.images, splits.select.images[~eight])
    assert torch.equal(images.labels, splits.select.labels[~eight])
    made = digits_model(1).model
    load_model(made, str(path))
    before = trained_digits.head.weight
    assert 0 < (made.head.weight - before).abs().max() < 0.1  # of the trained model, a pass later


def test_the_gate_is_the_one_that_the_page_tells_of():
    gates = read_gates(FOLDER / "gates.toml")
    assert gates.skill["*"].max_weakening == 0.1
