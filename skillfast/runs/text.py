"""Subjects that read text: a language model as a classifier, and a causal one whose tokens are observations."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from skillfast import data
from skillfast.data.text import TextTable, read_text
from skillfast.errors import ArgumentError, DataError, ModelError
from skillfast.metrics import COLUMN, TOKEN_LOG_PROBABILITY, parse_metrics
from skillfast.models import training
from skillfast.models.causal import CausalForward, CausalModel
from skillfast.models.embedded import DECODER, ENCODER
from skillfast.models.huggingface import load_config, load_language_model, quantization, save_language_model
from skillfast.models.sites import choose_sites
from skillfast.models.text_classifier import TextClassifier
from skillfast.models.text_inputs import Prompt, TextForward, batches, split_text
from skillfast.runs.kept import JSON, MODEL, Kept, files_digest
from skillfast.runs.soft_prompt import given_prompt, prompt_training
from skillfast.runs.subject import Subject, Training
from skillfast.tracing.trace import trace
from skillfast.vocabulary import EMBEDDED, NO_TRAINING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch.utils.data import DataLoader

    from skillfast.models.huggingface import LanguageModel
    from skillfast.models.text_inputs import TokenExamples
    from skillfast.runs.config import BenchConfig
    from skillfast.statistics.scores import NeuronScores

VARIED_BATCH = 16  # small, so that a few hundred texts are of many lengths
_EPOCHS, _LR = 3, 1e-4  # of all weights: a pretrained encoder needs few
_BATCH = 32
_NEW_HEAD = 10  # times that learning rate, for a head that pretraining has not seen
_UNNAMED = "LABEL_"  # what transformers calls classes that nobody named
_DESCRIBED = "text as its tokenizer reads it"


class TextSubject(Subject):
    """A language model as a classifier, and labelled text."""

    def varied_loader(self, part: str) -> DataLoader[Any]:
        """Small batches of a part in random order, so that the first ones hold texts of all lengths."""
        return data.loader(getattr(self.splits, part), VARIED_BATCH, shuffle=True, seed=self.config.run.seed)

    def trace(self, part: str, *, statistics: Sequence[str] | None = None, quiet: bool = True) -> NeuronScores:
        """Trace a part of the data against the metrics that were asked for."""
        settings, examples = self.config.trace, getattr(self.splits, part)
        forward = TextForward(parse_metrics(settings.metrics, examples.classes, examples.metrics))
        return trace(
            self.model,
            batches(examples, self.config.run.batch_size),
            forward.kinds,
            sites=settings.sites,
            pool=settings.pool,  # type: ignore[arg-type]  # one of the settings' choices
            statistics=statistics or settings.statistics,
            bins=settings.bins,
            forward=forward,
            mask=self.model.observed,  # type: ignore[arg-type]  # a TextClassifier's
            quiet=quiet,
        )


@dataclass(frozen=True, kw_only=True)
class CausalSubject(Subject):
    """A causal language model, and text whose tokens are observations.

    Attributes:
        loaded: The model with its tokenizer.
    """

    loaded: LanguageModel

    def texts(self, part: str) -> TokenExamples:
        """The texts of `"select"`, `"validate"` or `"test"`."""
        return getattr(self.splits, part)

    def precision(self) -> AbstractContextManager[Any]:
        """No context: the model was loaded in the dtype that was asked for."""
        return nullcontext()

    def trace(self, part: str, *, statistics: Sequence[str] | None = None, quiet: bool = True) -> NeuronScores:
        """Trace a part: every token with `pool="none"`, else each text's pooled activations."""
        settings, examples = self.config.trace, getattr(self.splits, part)
        chosen = parse_metrics(settings.metrics, examples.classes, examples.metrics)
        forward = CausalForward(chosen, tokens=settings.pool == "none")
        return trace(
            self.model,
            batches(examples, self.config.run.batch_size),
            forward.kinds,
            sites=settings.sites,
            pool=settings.pool,  # type: ignore[arg-type]  # one of the settings' choices
            statistics=statistics or settings.statistics,
            bins=settings.bins,
            forward=forward,
            mask=forward.mask,
            quiet=quiet,
        )


def predicts_tokens(config: BenchConfig) -> bool:
    """Whether the metrics ask for the log-probabilities of tokens."""
    return config.data.dataset == "text" and TOKEN_LOG_PROBABILITY in config.trace.metrics


def with_default_model(config: BenchConfig) -> BenchConfig:
    """The settings with a model that a package brings where none is named: a decoder where tokens are predicted.

    Otherwise a sentence encoder, which is fine-tuned in minutes.
    """
    if config.model.name is not None:
        return config
    package = DECODER if config.model.prompt is not None or predicts_tokens(config) else ENCODER
    return config.replaced(model=f"{EMBEDDED}{package.name}")


def text_subject(config: BenchConfig, device: torch.device, *, quiet: bool) -> TextSubject:
    """Read labelled text and load a language model, with a new head where it has none for the classes.

    Raises:
        SkillfastError: Data or a model that cannot be had, a prompt that does not fit.
    """
    prompt = None if config.model.prompt is None else Prompt(config.model.prompt, config.model.label_words)
    table = _read(config, config.data.data_file, config.data.class_names)
    loaded = _load(config, table.classes, device)
    if prompt is None and not config.data.class_names:
        named = _own_classes(loaded)
        if named is not None and len(named) == len(table.classes):
            table = _read(config, config.data.data_file, named)
    words = None if prompt is None else prompt.ids(loaded.tokenizer, table.classes)
    opened = given_prompt(config, loaded)
    model = TextClassifier(loaded, len(table.classes), words)
    if not config.model.placed:  # by from_pretrained
        model = model.to(device)
    choose_sites(model, config.trace.sites)  # wrong sites fail before the expensive step
    if opened is not None:
        model.set_soft_prompt(opened)
    splits = _split(config, table, loaded, prompt, len(opened) if opened else config.model.virtual_tokens or 0)
    mode = config.model.finetune or ("all" if loaded.head_replaced else NO_TRAINING)
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

    if config.model.virtual_tokens is not None:
        how = prompt_training(config, model, loaded, splits, quiet=quiet)
    elif mode == NO_TRAINING:
        how = Training(train)
    else:
        line = f"training {config.model.name} ({mode}) on {len(splits.select)} texts"
        how = Training(train, line, _folder_of(loaded))
    return TextSubject(config, model, str(config.model.name), splits, device, "pretrained", _DESCRIBED, how)


def causal_subject(config: BenchConfig, device: torch.device) -> CausalSubject:
    """Read text, which needs labels only where they are a metric, and load a causal language model.

    Raises:
        ArgumentError: A prompt, fine-tuning, or a model with a classification head.
        SkillfastError: Data or a model that cannot be had.
    """
    name, what = str(config.model.name), TOKEN_LOG_PROBABILITY
    if config.model.prompt is not None:
        raise ArgumentError(
            f"metric '{what}': expected text without a prompt, got --prompt; leave out --prompt and --label-words"
        )
    if config.model.finetune not in (None, NO_TRAINING):
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
    splits = _split(config, table, loaded)
    how = Training(lambda: {"finetune": NO_TRAINING})
    return CausalSubject(config, model, name, splits, device, "pretrained", _DESCRIBED, how, loaded=loaded)


def _split(
    config: BenchConfig, table: TextTable, loaded: LanguageModel, prompt: Prompt | None = None, virtual: int = 0
) -> Any:
    """The text in three parts, as the model's tokenizer reads it."""
    given = config.data
    return split_text(
        table,
        loaded,
        test=None if given.test_file is None else _read(config, given.test_file, table.classes),
        prompt=prompt,
        truncate=given.truncate,
        virtual=virtual,
        train_per_class=given.train_per_class,
        test_per_class=given.test_per_class,
        seed=config.run.seed,
    )


def _read(config: BenchConfig, source: str | None, classes: tuple[str, ...] = ()) -> TextTable:
    """The texts of a file; without labels where tokens are observations and labels no metric."""
    metrics = config.trace.metrics
    labelled = "label" in metrics or not predicts_tokens(config)
    return read_text(
        source or "",
        text_column=config.data.text_column,
        label_column=config.data.label_column if labelled else None,
        pair_column=config.data.pair_column,
        columns=[name.removeprefix(COLUMN) for name in metrics if name.startswith(COLUMN)],
        classes=classes or None,
    )


def _folder_of(loaded: LanguageModel) -> Kept[dict[str, Any]]:
    """A training's result: a folder that `hf:FOLDER` names, and how the model was trained."""

    def save(trained: dict[str, Any], folder: Path) -> None:
        save_language_model(loaded.model, folder / MODEL, tokenizer=loaded.tokenizer)
        JSON.save({"trained": trained, "files": files_digest(folder / MODEL)}, folder / MODEL)

    def load(folder: Path) -> dict[str, Any]:
        kept = JSON.load(folder / MODEL)
        if files_digest(folder / MODEL) != kept["files"]:  # before a library reads them
            raise DataError(
                f"trained weights '{folder / MODEL}': expected a whole folder, got other files; train again"
            )
        again = type(loaded.model).from_pretrained(folder / MODEL, local_files_only=True)  # type: ignore[attr-defined]
        loaded.model.load_state_dict(again.state_dict())
        trained: dict[str, Any] = kept["trained"]
        return trained

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


def _own_classes(loaded: LanguageModel) -> tuple[str, ...] | None:
    """The classes in the order of the head's outputs, where its configuration names them."""
    if loaded.head_replaced:
        return None
    named = getattr(loaded.model.config, "id2label", None) or {}
    classes = tuple(str(named[index]) for index in sorted(named))
    return None if any(name.startswith(_UNNAMED) for name in classes) else classes
