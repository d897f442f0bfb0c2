"""The model of an earlier run, from its folder."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from skillfast.errors import ArgumentError, DataError
from skillfast.results import records
from skillfast.results.bench import FILE, REMEDY, BenchResults
from skillfast.runs.config import ModelConfig
from skillfast.runs.kept import MODEL, WEIGHTS
from skillfast.runs.session import load_subject
from skillfast.settings import name_of
from skillfast.vocabulary import GIVEN, NO_TRAINING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from skillfast.runs.session import Session


def model_settings(directory: Path, results: BenchResults) -> ModelConfig:
    """The settings that load the model of a run as it was measured; without a name for the default one.

    Args:
        directory: Folder of the run.
        results: What it holds.

    Raises:
        ArgumentError: A model that the run was given in Python, or a checkpoint that is no longer there.
        DataError: Weights that the run trained, and that its folder lacks.
    """
    config = results.config
    if config["dataset"] == GIVEN:
        raise ArgumentError(
            f"model: expected one that can be loaded, got a run on a {config['model']} that its caller gave; use "
            "Python, and give the model"
        )
    known: dict[str, Any] = {f.name: config[name_of(f)] for f in fields(ModelConfig) if name_of(f) in config}
    known |= {"finetune": None, "epochs": None, "lr": None}  # of weights that are measured as they are
    known = {name: tuple(of) if isinstance(of, list) else of for name, of in known.items()}
    found = ModelConfig(**known)
    if found.name is None:
        return found
    kept = directory / (MODEL if found.is_language_model else WEIGHTS)
    if kept.exists():
        if found.is_language_model:
            return replace(found, name=f"hf:{kept}", finetune=NO_TRAINING)
        return replace(found, checkpoint=str(kept), pretrained=False, finetune=NO_TRAINING)
    if results.model.trained.finetune not in (None, NO_TRAINING):
        raise DataError(f"{kept}: expected the weights that the run trained, got none; run it again")
    return replace(found, finetune=NO_TRAINING)


def earlier_model(session: Session, directory: Path) -> nn.Module:
    """Load the model of an earlier run, on the device of a run like it.

    Raises:
        SkillfastError: A model that cannot be had.
    """
    results = records.read(BenchResults, directory / FILE, REMEDY)
    config = replace(session.config, model=model_settings(directory, results), given=None)
    subject = load_subject(config, session.subject.device, quiet=session.quiet, say=lambda _: None)
    if config.model.name is None:  # the default model's weights come out of the cache
        subject.training.run()
    return subject.model.eval()
