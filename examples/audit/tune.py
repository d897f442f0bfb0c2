"""Fine-tuning that breaks a skill: the default model, tuned for some passes over the digits without the eights.

`python examples/audit/tune.py tuned.safetensors` writes the checkpoint that README's audit finds it in. Nothing in the
loss of this tuning tells of the eights, since it never sees one.
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import save_model
from torch.nn import functional

from skillfast.data import TensorImages, load_digits, loader
from skillfast.models.digits import load_or_train_digits


def without(images: TensorImages, label: int) -> TensorImages:
    """The images of all other classes."""
    kept = images.labels != label
    return TensorImages(images.images[kept], images.labels[kept], images.classes)


def tune(model: torch.nn.Module, images: TensorImages, passes: int) -> None:
    """Tune all weights in place, by AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    batches = loader(images, 64, shuffle=True)  # each pass in an order of its own
    model.train()
    for _ in range(passes):
        for x, labels in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the checkpoint, a .safetensors file")
    parser.add_argument("--passes", type=int, default=12)
    given = parser.parse_args()
    splits = load_digits()
    model = load_or_train_digits(splits)[0].model  # what `skillfast bench` measures
    assert isinstance(splits.select, TensorImages)
    tune(model, without(splits.select, 8), given.passes)
    save_model(model, given.output)


if __name__ == "__main__":
    main()
