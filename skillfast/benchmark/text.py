"""What a run over text measures: a language model as a classifier, and labelled text in three parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from skillfast import auxiliary
from skillfast.data.text import TextTable, read_text
from skillfast.data.tokens import Prompt, TextForward, batches, split_text
from skillfast.models import training
from skillfast.models.huggingface import load_language_model
from skillfast.models.sites import choose_sites
from skillfast.models.text_classifier import TextClassifier
from skillfast.tracing import trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from skillfast.benchmark.config import BenchConfig
    from skillfast.benchmark.cost import Clock
    from skillfast.data.splits import Splits
    from skillfast.models.huggingface import LanguageModel
    from skillfast.statistics.neuron_scores import NeuronScores

_EPOCHS = 3  # of all weights: a pretrained encoder needs few
_UNNAMED = "LABEL_"  # what transformers calls classes that nobody named


def prepare_text(
    config: BenchConfig, device: torch.device, clock: Clock, *, quiet: bool, say: Callable[[str], None]
) -> tuple[TextClassifier, Splits, dict[str, Any]]:
    """Read the text, load the model, and train it where its head is new.

    Args:
        config: The settings.
        device: Where the model runs.
        clock: Measures the phases.
        quiet: Show no progress bar.
        say: Called with each line worth reading.

    Returns:
        The classifier on its device, the data, and how its weights came about.

    Raises:
        SkillfastError: Data or a model that cannot be had, a prompt that does not fit.
    """
    prompt = None if config.prompt is None else Prompt(config.prompt, config.label_words)
    name = str(config.model)
    with clock.phase("data"):
        table = _read(config, config.data_file)
        loaded = load_language_model(
            name,
            "classification" if prompt is None else "causal",
            classes=table.classes,
            pad_token=config.pad_token,
            dtype=torch.float32 if prompt is None else getattr(torch, config.precision),
            seed=config.seed,
        )
        if prompt is None and (named := _own_classes(loaded)) is not None and len(named) == len(table.classes):
            table = _read(config, config.data_file, named)
        words = None if prompt is None else prompt.ids(loaded.tokenizer, table.classes)
        model = TextClassifier(loaded, len(table.classes), words).to(device)
        choose_sites(model, config.sites)  # before anything is trained for nothing
        splits = split_text(
            table,
            loaded,
            test=None if config.test_file is None else _read(config, config.test_file, table.classes),
            prompt=prompt,
            truncate=config.truncate,
            train_per_class=config.train_per_class,
            test_per_class=config.test_per_class,
            seed=config.seed,
        )
    mode = config.finetune or ("all" if loaded.head_replaced else "none")
    if mode != "none":
        say(f"training {name} ({mode}) on {len(splits.select)} texts")
    with clock.phase("train"), torch.inference_mode(False):
        trained = training.finetune(
            model,
            splits,
            mode,
            epochs=config.epochs or (_EPOCHS if mode == "all" else None),
            batch_size=min(config.batch_size, 64),
            seed=config.seed,
            device=device,
            dtype=getattr(torch, config.precision),
            quiet=quiet,
        )
    return model.eval(), splits, {"from": "pretrained", **trained}


def trace_text(config: BenchConfig, model: TextClassifier, splits: Splits, quiet: bool) -> NeuronScores:
    """Trace the select part against the metrics that were asked for."""
    examples: Any = splits.select
    forward = TextForward(auxiliary.choose(config.metrics, splits.classes, examples.metrics))
    return trace(
        model,
        batches(examples, config.batch_size),
        forward.kinds,
        sites=config.sites,
        pool=config.pool,  # type: ignore[arg-type]  # the tracer checks it
        statistics=config.statistics,
        cells=config.cells,
        forward=forward,
        mask=lambda batch: batch["attention_mask"],
        quiet=quiet,
    )


def _read(config: BenchConfig, source: str | None, classes: tuple[str, ...] | None = None) -> TextTable:
    columns = [name.removeprefix(auxiliary.COLUMN) for name in config.metrics if name.startswith(auxiliary.COLUMN)]
    return read_text(
        source or "",
        text_column=config.text_column,
        label_column=config.label_column,
        pair_column=config.pair_column,
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
