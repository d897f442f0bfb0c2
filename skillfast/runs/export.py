"""`skillfast export`: the model of a run, or one that is named, with skills folded into its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillfast import data
from skillfast.ablation.export import export
from skillfast.errors import ArgumentError
from skillfast.models import digits, loading
from skillfast.models.huggingface import load_language_model
from skillfast.models.text_classifier import TextClassifier
from skillfast.results import bench, records
from skillfast.runs.earlier import model_settings
from skillfast.skills.skill import load_skills

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from skillfast.runs.config import ModelConfig
    from skillfast.statistics.scores import NeuronScores
    from skillfast.vocabulary import Mode


def exported(
    model: ModelConfig,
    skills_from: str | Path,
    folder: str | Path,
    *,
    names: Sequence[str] = (),
    scale: float | None = 0.0,
    mode: Mode = "zero",
    reference: NeuronScores | None = None,
    components: Sequence[str],
    quiet: bool = True,
) -> Path:
    """Write the checkpoint; needs no data.

    Args:
        model: Which model and its weights; without a name that of the run in `skills_from`, else the default one.
        skills_from: `skills.json`, or a folder with one.
        folder: A new folder.
        names: Names of skills; all by default.
        scale: Factor on the activations; None: of each skill the one that was saved as its knob.
        mode: What is left, as of `skillfast.export`.
        reference: Scores of this model, for `mode="mean"`.
        components: Kinds of sites in which neurons are changed.
        quiet: Show no progress bars.

    Raises:
        SkillfastError: Anything that stops the export, in one line.
    """
    skills = list(load_skills(skills_from, names).values())
    factors = {skill.name: skill.knob for skill in skills} if scale is None else scale
    loaded = _of_run(Path(skills_from), quiet) if model.name is None else _load(model, quiet=quiet)
    return export(
        loaded.model,
        skills,
        folder,
        scale=factors,
        mode=mode,
        reference=reference,
        components=components,
        processor=loaded.tokenizer,
        model_kwargs=loaded.kwargs,
    )


@dataclass(frozen=True)
class _Loaded:
    """A model to export.

    Attributes:
        model: The model.
        kwargs: What timm makes it from.
        tokenizer: Tokenizer of a language model.
    """

    model: torch.nn.Module
    kwargs: dict[str, Any]
    tokenizer: Any = None


def _load(model: ModelConfig, *, classes: int | None = None, seed: int = 0, quiet: bool) -> _Loaded:
    """A model by its settings; with as many classes as its weights have unless told otherwise."""
    assert model.name is not None
    if model.is_language_model:
        language = load_language_model(model.name, pad_token=model.pad_token)
        return _Loaded(TextClassifier(language, classes or 0), {}, language.tokenizer)
    if model.checkpoint is None and not model.pretrained and classes is None:
        raise ArgumentError(f"weights: expected --checkpoint or --pretrained with {model.name}, got none; name them")
    made = loading.create_model(
        model.name,
        classes,
        pretrained=model.pretrained,
        checkpoint=model.checkpoint,
        model_kwargs=model.kwargs,
        seed=seed,
        quiet=quiet,
    )
    return _Loaded(made.model, model.kwargs)


def _of_run(folder: Path, quiet: bool) -> _Loaded:
    """The model of a run's folder, or the default one where there was no run."""
    if not (folder / bench.FILE).is_file():
        return _digits(0, quiet)
    results = records.read(bench.BenchResults, folder / bench.FILE, bench.REMEDY)
    named, seed = model_settings(folder, results), results.config["seed"]
    if named.name is None:
        return _digits(seed, quiet)
    return _load(named, classes=len(results.dataset.classes), seed=seed, quiet=quiet)


def _digits(seed: int, quiet: bool) -> _Loaded:
    """The default model, as one that timm makes by name."""
    trained = digits.load_or_train_digits(data.load_digits(seed), seed, quiet=quiet)[0]
    made, kwargs = digits.digits_by_name()
    made.load_state_dict(trained.model.state_dict())
    return _Loaded(made.eval(), kwargs)
