from __future__ import annotations

import fcntl
import os
import tarfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Workers side by side share the cores; OpenMP reads this when torch is imported, here and in what the tests start.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import numpy as np
import torch
from browsing import Browser
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).parents[1]
SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # older Pythons have no such argument
CORE = ("ablation", "models", "ops", "statistics", "tracing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest work begins first, on one worker, so that the others never wait for it at the end.
    items.sort(key=lambda item: ("default_run" not in getattr(item, "fixturenames", ()), not _is_slow(item)))
    gpu = torch.cuda.is_available()
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0] if item.path.is_relative_to(ROOT / "tests") else ""
        if folder in CORE and not _is_slow(item):
            item.add_marker(pytest.mark.core)
        if item.get_closest_marker("gpu") and not gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        waits = "trained_digits" in getattr(item, "fixturenames", ())  # whoever comes first trains the model
        if (waits or _is_slow(item)) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))


def _is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session, the same for all workers."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@contextmanager
def alone(folder: Path, name: str) -> Iterator[Path]:
    """Keep the other workers out, and give the folder for what is made."""
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / name
        made.mkdir(exist_ok=True)
        yield made


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder that holds data/ and models/; skips where it is missing."""
    data = Path(os.environ.get("SKILLFAST_DATA", ROOT.parent / "shared" / "data"))
    if not data.is_dir():
        pytest.skip(f"no data at {data}; set SKILLFAST_DATA")
    return data.parent


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A browser for all tests of pages; skips where there is none."""
    started = Browser()
    yield started
    started.close()


def make_pictures(root: Path, train: int, test: int, colour: int) -> Path:
    """An image folder of three classes: noise, brighter by `colour` in the class's channel."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (20, 20, 3))
                pixels[..., channel] += colour
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder that a small model learns in seconds: 60 to train on, 24 to test."""
    return make_pictures(tmp_path_factory.mktemp("pictures"), 20, 8, colour=150)


@pytest.fixture(scope="session", autouse=True)
def cache(common: Path) -> Path:
    """A cache of this session's own, so that no test depends on what an earlier run left."""
    folder = Path(os.environ.get("SKILLFAST_TEST_CACHE") or common / "cache")
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


def changed(options: Sequence[object], change: Sequence[object]) -> list[object]:
    """A command's options, of which a change gives some anew: each stands once."""
    kept: list[object] = []
    for option in options:
        if str(option).startswith("--"):
            replaced = option in change
        if not replaced:
            kept.append(option)
    return [*kept, *change]


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


@pytest.fixture(scope="session")
def trained_digits(common: Path, cache: Path) -> torch.nn.Module:
    """The default model, trained once for all workers and left in the cache."""
    from skillfast.data import load_digits
    from skillfast.models.digits import load_or_train_digits

    with alone(common, "digits"):
        return load_or_train_digits(load_digits(0), 0, quiet=True)[0].model


@pytest.fixture(scope="session")
def default_run(common: Path, trained_digits: torch.nn.Module) -> Path:
    """What `skillfast bench` leaves with its defaults, once for all workers: `output` and the lines that it said."""
    import skillfast

    with alone(common, "default") as folder:
        if not (folder / "said.txt").is_file():
            lines: list[str] = []
            skillfast.bench(skillfast.BenchConfig.of(output=str(folder / "output")), say=lines.append)
            (folder / "said.txt").write_text("\n".join(lines))
        return folder
