"""Models that are named to `compare` instead of runs: each is measured by `bench`, all on the same data."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ArgumentError
from skillfast.files import output_folder
from skillfast.runs.bench import bench
from skillfast.runs.config import BenchConfig, RunConfig
from skillfast.settings import name_of
from skillfast.vocabulary import EMBEDDED, HUGGINGFACE, NO_TRAINING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


def measured(
    sides: Sequence[str | Path | torch.nn.Module],
    output: str | Path | None,
    settings: Mapping[str, Any],
    *,
    loader: Any = None,
    quiet: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Folders of runs: what is a folder stays, and a model is measured into one of `output`'s.

    The first is measured as the settings say, and nothing is trained; the others as the first run was, with its skills
    removed from them, too.

    Args:
        sides: Folders of runs; checkpoints (files of weights), `hf:` and a name or folder, timm's names (pretrained);
            or modules, with `loader`.
        output: Folder for the runs of models: `base` and `new` of two, else `1`, `2` and so on.
        settings: Flat settings as of `BenchConfig.of`, for the first model.
        loader: Labelled examples for modules, as `bench` takes them.
        quiet: Show no progress bars.
        say: Called with each line worth reading.

    Raises:
        ArgumentError: No output folder, settings that say nothing here, or a module without a loader.
        SkillfastError: What stops a run.
    """
    names = ("base", "new") if len(sides) == 2 else tuple(str(i + 1) for i in range(len(sides)))
    models = [settings_of(side) for side in sides]
    if all(model is None for model in models):
        if settings or loader is not None:
            what = next(iter(settings), "loader")
            raise ArgumentError(f"{what}: expected with a model to measure, got it with runs alone; leave it out")
        return [Path(str(side)) for side in sides]
    if output is None:
        raise ArgumentError("output: expected a folder for the runs of the models, got none; name one")
    on_machine = {name_of(f) for f in fields(RunConfig)} - {"seed", "like", "replay", "output"}
    folders: list[Path] = []
    for name, side, model in zip(names, sides, models, strict=True):
        if model is None:
            folders.append(Path(str(side)))
            continue
        folder = output_folder(output) / name
        if folders:
            took = settings if models[0] is None else {k: v for k, v in settings.items() if k in on_machine}
            config = BenchConfig.of(**took, **model, like=str(folders[0]), output=str(folder))
        else:
            config = BenchConfig.of(**{**settings, **model}, output=str(folder))
            if config.model.name is not None and config.model.finetune is None:
                config = config.replaced(finetune=NO_TRAINING)
        given = side if isinstance(side, torch.nn.Module) else None
        say(f"{name}: {type(side).__name__ if given is not None else side}")
        bench(
            config,
            model=given,
            loader=None if given is None else loader,
            like_model=sides[0] if folders and isinstance(sides[0], torch.nn.Module) else None,
            quiet=quiet,
            say=say,
        )
        folders.append(folder)
    return folders


def settings_of(side: str | Path | torch.nn.Module) -> dict[str, Any] | None:
    """The settings that load a model by what names it; None for the folder of a run."""
    if isinstance(side, torch.nn.Module):
        return {}
    name = str(side)
    if name.startswith((HUGGINGFACE, EMBEDDED)):
        return {"model": name}
    if name.endswith(WEIGHTS):
        return {"checkpoint": name}
    if Path(name).exists() or "/" in name:
        return None
    import timm  # seconds, which those who compare runs need not wait for

    return {"model": name, "pretrained": True} if timm.is_model(name.partition(".")[0]) else None
