from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder that holds data/ and models/; skips where it is missing."""
    data = Path(os.environ.get("SKILLFAST_DATA", ROOT.parent / "shared" / "data"))
    if not data.is_dir():
        pytest.skip(f"no data at {data}; set SKILLFAST_DATA")
    return data.parent


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this session's own, so that no test depends on what an earlier run left."""
    folder = Path(os.environ.get("SKILLFAST_TEST_CACHE") or tmp_path_factory.mktemp("cache"))
    os.environ["SKILLFAST_CACHE"] = str(folder)
    return folder


@pytest.fixture
def triton_interpreter() -> None:
    """Skips where Triton's interpreter cannot loop: before 3.7 it takes int() of an array, which NumPy 2.4 refuses."""
    import numpy as np
    import triton
    from packaging.version import Version

    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip(f"Triton {triton.__version__}'s interpreter does not work with NumPy {np.__version__}")


def one_line(error: type[Exception], call: Callable[..., object], *args: object, **kwargs: object) -> str:
    """The message of what the call raises: `<what>: expected <x>, got <y>; <remedy>`, in one line."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert ": expected " in text
    assert ", got " in text
    assert "; " in text
    return text


@pytest.fixture
def vit() -> torch.nn.Module:
    return make_vit()


def make_vit(seed: int = 0, **more: object) -> torch.nn.Module:
    """A tiny vision transformer with weights large enough that predictions differ."""
    import timm

    torch.manual_seed(seed)
    settings = {
        "img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5,
        "weight_init": "", **more,
    }  # fmt: skip
    model = timm.create_model("vit_tiny_patch16_224", **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """37 images of 5 classes in uneven batches."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(37, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 5, (37,), generator=generator)
    return list(zip(images.split(10), labels.split(10), strict=True))
