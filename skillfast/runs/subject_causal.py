"""Runs over text that a causal language model reads without a prompt: data, model, trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from skillfast.data.text import TextTable, read_text
from skillfast.errors import ArgumentError
from skillfast.metrics import COLUMN, TOKEN_LOG_PROBABILITY, parse_metrics
from skillfast.models.causal import CausalForward, CausalModel
from skillfast.models.huggingface import load_config, load_language_model
from skillfast.models.sites import choose_sites
from skillfast.models.text_inputs import TokenExamples, batches, split_text
from skillfast.tracing.trace import trace

if TYPE_CHECKING:
    from skillfast.models.huggingface import LanguageModel
    from skillfast.runs.config import BenchConfig
    from skillfast.statistics.scores import NeuronScores


@dataclass(frozen=True)
class CausalSubject:
    """A causal language model in evaluation mode on its device, and text in three parts.

    Attributes:
        config: The settings that made it.
        model: The model.
        loaded: The model with its tokenizer.
        select: Texts that skills are chosen on.
        validate: Texts that settings are chosen on.
        test: Texts that results are measured on.
        device: Where it runs.
    """

    config: BenchConfig
    model: CausalModel
    loaded: LanguageModel
    select: TokenExamples
    validate: TokenExamples
    test: TokenExamples
    device: torch.device


def predicts_tokens(config: BenchConfig) -> bool:
    """Whether the metrics ask for the log-probabilities of tokens."""
    return config.data.dataset == "text" and TOKEN_LOG_PROBABILITY in config.trace.metrics


def prepare_causal(config: BenchConfig, device: torch.device) -> CausalSubject:
    """Read the text, which needs labels only where they are a metric, and load the model.

    Raises:
        ArgumentError: A prompt, fine-tuning, or a model with a classification head.
        SkillfastError: Data or a model that cannot be had.
    """
    name, what = str(config.model.name), TOKEN_LOG_PROBABILITY
    if config.model.prompt is not None:
        raise ArgumentError(
            f"metric '{what}': expected text without a prompt, got --prompt; leave out --prompt and --label-words"
        )
    if config.model.finetune not in (None, "none"):
        raise ArgumentError(
            f"metric '{what}': expected --finetune none, got {config.model.finetune}; train the model before"
        )
    heads = [kind for kind in load_config(name).architectures or () if "Classification" in kind]
    if heads:
        raise ArgumentError(
            f"metric '{what}': expected a causal language model, got {heads[0]}, whose head is over classes; name "
            "another --model, or other --metrics"
        )
    table = _read(config, config.data.data_file)
    loaded = load_language_model(
        name,
        "causal",
        pad_token=config.model.pad_token,
        dtype=getattr(torch, config.run.precision),
        seed=config.run.seed,
    )
    model = CausalModel(loaded).to(device).eval()
    choose_sites(model, config.trace.sites)
    splits: Any = split_text(
        table,
        loaded,
        test=None if config.data.test_file is None else _read(config, config.data.test_file, table.classes),
        truncate=config.data.truncate,
        train_per_class=config.data.train_per_class,
        test_per_class=config.data.test_per_class,
        seed=config.run.seed,
    )
    return CausalSubject(config, model, loaded, splits.select, splits.validate, splits.test, device)


def trace_causal(subject: CausalSubject, quiet: bool) -> NeuronScores:
    """Trace the select part: every token with `pool="none"`, else each text's pooled activations."""
    config = subject.config
    chosen = parse_metrics(config.trace.metrics, subject.select.classes, subject.select.metrics)
    forward = CausalForward(chosen, tokens=config.trace.pool == "none")
    return trace(
        subject.model,
        batches(subject.select, config.run.batch_size),
        forward.kinds,
        sites=config.trace.sites,
        pool=config.trace.pool,  # type: ignore[arg-type]  # the tracer checks it
        statistics=config.trace.statistics,
        bins=config.trace.bins,
        forward=forward,
        mask=forward.mask,
        quiet=quiet,
    )


def _read(config: BenchConfig, source: str | None, classes: tuple[str, ...] | None = None) -> TextTable:
    columns = [name.removeprefix(COLUMN) for name in config.trace.metrics if name.startswith(COLUMN)]
    return read_text(
        source or "",
        text_column=config.data.text_column,
        label_column=config.data.label_column if "label" in config.trace.metrics else None,
        pair_column=config.data.pair_column,
        columns=columns,
        classes=classes or None,
    )
