"""What a run over text measures: a language model as a classifier, and labelled text in three parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from skillfast.data.text import TextTable, read_text
from skillfast.errors import ModelError
from skillfast.metrics import COLUMN, parse_metrics
from skillfast.models import training
from skillfast.models.huggingface import load_language_model, quantization
from skillfast.models.sites import choose_sites
from skillfast.models.text_classifier import TextClassifier
from skillfast.models.text_inputs import Prompt, TextForward, batches, split_text
from skillfast.runs.checkpoints import JSON, MODEL, Kept, run_training
from skillfast.tracing.trace import trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from skillfast.data.splits import Splits
    from skillfast.models.huggingface import LanguageModel
    from skillfast.runs.checkpoints import Phases
    from skillfast.runs.config import BenchConfig
    from skillfast.runs.cost import Clock
    from skillfast.statistics.scores import NeuronScores

_EPOCHS, _LR = 3, 1e-4  # of all weights: a pretrained encoder needs few
_BATCH = 32
_NEW_HEAD = 10  # times that learning rate, for a head that pretraining has not seen
_UNNAMED = "LABEL_"  # what transformers calls classes that nobody named


def prepare_text(
    config: BenchConfig,
    device: torch.device,
    clock: Clock,
    *,
    quiet: bool,
    say: Callable[[str], None],
    phases: Phases | None = None,
) -> tuple[TextClassifier, Splits, dict[str, Any]]:
    """Read the text, load the model, and train it where its head is new.

    Args:
        config: The settings.
        device: Where the model runs.
        clock: Measures the phases.
        quiet: Show no progress bar.
        say: Called with each line worth reading.
        phases: Keeps trained weights; None keeps nothing.

    Returns:
        The classifier on its device, the data, and how its weights came about.

    Raises:
        SkillfastError: Data or a model that cannot be had, a prompt that does not fit.
    """
    prompt = None if config.model.prompt is None else Prompt(config.model.prompt, config.model.label_words)
    with clock.phase("data"):
        table = _read(config, config.data.data_file, config.data.class_names or None)
        loaded = _load(config, table.classes, device)
        if prompt is None and not config.data.class_names:
            named = _own_classes(loaded)
            if named is not None and len(named) == len(table.classes):
                table = _read(config, config.data.data_file, named)
        words = None if prompt is None else prompt.ids(loaded.tokenizer, table.classes)
        model = TextClassifier(loaded, len(table.classes), words)
        if not config.model.placed:  # by from_pretrained
            model = model.to(device)
        choose_sites(model, config.trace.sites)  # before anything is trained for nothing
        splits = split_text(
            table,
            loaded,
            test=None if config.data.test_file is None else _read(config, config.data.test_file, table.classes),
            prompt=prompt,
            truncate=config.data.truncate,
            train_per_class=config.data.train_per_class,
            test_per_class=config.data.test_per_class,
            seed=config.run.seed,
        )
    mode = config.model.finetune or ("all" if loaded.head_replaced else "none")
    if mode != "none":
        say(f"training {config.model.name} ({mode}) on {len(splits.select)} texts")
    lr = config.model.lr or (_LR if mode == "all" else None)

    def train() -> dict[str, Any]:
        with torch.inference_mode(False):
            return training.finetune(
                model,
                splits,
                mode,
                epochs=config.model.epochs or (_EPOCHS if mode == "all" else None),
                lr=lr,
                head_lr=_NEW_HEAD * lr if lr and mode == "all" and loaded.head_replaced else None,
                batch_size=min(config.run.batch_size, _BATCH),
                seed=config.run.seed,
                device=device,
                dtype=getattr(torch, config.run.precision),
                quiet=quiet,
            )

    trained = run_training(model, splits, train, mode, clock, phases, _folder_of(loaded))
    return model.eval(), splits, {"from": "pretrained", **trained}


def _folder_of(loaded: LanguageModel) -> Kept[dict[str, Any]]:
    """A training's result: a folder that `hf:FOLDER` names, and how the model was trained."""

    def save(trained: dict[str, Any], folder: Path) -> None:
        loaded.model.save_pretrained(folder / MODEL)  # type: ignore[operator]
        loaded.tokenizer.save_pretrained(folder / MODEL)
        JSON.save(trained, folder)

    def load(folder: Path) -> dict[str, Any]:
        again = type(loaded.model).from_pretrained(folder / MODEL, local_files_only=True)  # type: ignore[attr-defined]
        loaded.model.load_state_dict(again.state_dict())
        return JSON.load(folder)

    return Kept(save, load)


def _load(config: BenchConfig, classes: tuple[str, ...], device: torch.device) -> LanguageModel:
    """The language model; in float32 where it may be trained."""
    dtype = getattr(torch, config.run.precision)
    loaded = load_language_model(
        str(config.model.name),
        "classification" if config.model.prompt is None else "causal",
        classes=classes,
        pad_token=config.model.pad_token,
        dtype=torch.float32 if config.model.prompt is None and not config.model.placed else dtype,
        device_map=config.model.device_map or ({"": device} if config.model.bits else None),
        quantization_config=quantization(config.model.bits, dtype),
        seed=config.run.seed,
    )
    if config.model.placed and loaded.head_replaced:
        raise ModelError(
            f"model '{loaded.name}': expected weights with a head for {', '.join(classes[:5])} with --device-map or "
            "--bits, got none; fine-tune and save it first, or pass --prompt"
        )
    return loaded


def trace_text(
    config: BenchConfig, model: TextClassifier, examples: Any, statistics: Sequence[str], quiet: bool
) -> NeuronScores:
    """Trace one part's `TokenExamples` against the metrics that were asked for."""
    forward = TextForward(parse_metrics(config.trace.metrics, examples.classes, examples.metrics))
    return trace(
        model,
        batches(examples, config.run.batch_size),
        forward.kinds,
        sites=config.trace.sites,
        pool=config.trace.pool,  # type: ignore[arg-type]  # the tracer checks it
        statistics=statistics,
        bins=config.trace.bins,
        forward=forward,
        mask=lambda batch: batch["attention_mask"],
        quiet=quiet,
    )


def _read(config: BenchConfig, source: str | None, classes: tuple[str, ...] | None = None) -> TextTable:
    columns = [name.removeprefix(COLUMN) for name in config.trace.metrics if name.startswith(COLUMN)]
    return read_text(
        source or "",
        text_column=config.data.text_column,
        label_column=config.data.label_column,
        pair_column=config.data.pair_column,
        columns=columns,
        classes=classes,
    )


def _own_classes(loaded: LanguageModel) -> tuple[str, ...] | None:
    """The classes in the order of the head's outputs, where its configuration names them."""
    if loaded.head_replaced:
        return None
    named = getattr(loaded.model.config, "id2label", None) or {}
    classes = tuple(str(named[index]) for index in sorted(named))
    return None if any(name.startswith(_UNNAMED) for name in classes) else classes
