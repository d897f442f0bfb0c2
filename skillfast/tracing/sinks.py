"""Where a monitor's numbers go besides its files: TensorBoard, W&B, MLflow, as far as they are installed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

from skillfast.errors import ArgumentError, ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class Sink(Protocol):
    """Takes numbers under flat keys."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Write what is left."""


class _TensorBoard:
    def __init__(self, library: Any, folder: Path) -> None:
        self._writer = library.SummaryWriter(str(folder))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, library: Any, folder: Path) -> None:  # noqa: ARG002  # the run knows its own
        if library.run is None:
            raise ModelError("sink 'wandb': expected an active run, got none; call wandb.init() first")
        self._run = library.run

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Leave the run to whom it belongs."""


class _Mlflow:
    def __init__(self, library: Any, folder: Path) -> None:  # noqa: ARG002  # the run knows its own
        self._library = library

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._library.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """Leave the run to whom it belongs."""


_SINKS: dict[str, tuple[str, Any]] = {
    "tensorboard": ("torch.utils.tensorboard", _TensorBoard),
    "wandb": ("wandb", _Wandb),
    "mlflow": ("mlflow", _Mlflow),
}


def sink(name: str, folder: Path) -> Sink:
    """Open a sink by name.

    Args:
        name: `"tensorboard"`, `"wandb"` or `"mlflow"`.
        folder: Where TensorBoard's files go.

    Raises:
        ArgumentError: Another name.
        ModelError: A library that is not installed, or no active run of W&B.
    """
    if name not in _SINKS:
        raise ArgumentError(
            f"sinks: expected some of {', '.join(_SINKS)}, got {name!r}; monitor.jsonl is always written"
        )
    module, made = _SINKS[name]
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        raise ModelError(f"sink {name!r}: expected the library {name}, got none; pip install {name}") from error
    return made(library, folder)
