"""Text as a language model reads it: tokens, in padded batches.

A model with a classification head reads the texts as they are. One that only predicts tokens reads each text inside a
prompt; its logits of one word per class at the last token are the classes' logits.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from skillfast.data.splits import Splits
from skillfast.errors import ArgumentError, DataError
from skillfast.metrics import Categorical, Continuous
from skillfast.models.huggingface import check_ids, encode
from skillfast.models.text_classifier import TextClassifier, accepts, first_virtual

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from skillfast.data.text import TextTable
    from skillfast.metrics import AuxiliaryMetric, Metric
    from skillfast.models.huggingface import LanguageModel

Batch = dict[str, Any]
Side = Literal["left", "right"]


@dataclass(frozen=True)
class Prompt:
    """How a model that only predicts tokens is asked for a class.

    Attributes:
        template: Text with `{text}`, and `{pair}` where the data have pairs: `"{text} The review is"`.
        words: One word per class, in the classes' order, each a single token after the prompt: `(" bad", " good")`.
    """

    template: str
    words: tuple[str, ...]

    def ids(self, tokenizer: Any, classes: Sequence[str]) -> torch.Tensor:
        """The words' tokens, int64 [classes].

        Raises:
            ArgumentError: Not one word per class, a word of several tokens, or two words of the same token.
        """
        if len(self.words) != len(classes):
            raise ArgumentError(
                f"label words: expected one for each of {', '.join(classes[:5])}, got {len(self.words)}; "
                "give them in that order"
            )
        tokens = [encode(tokenizer, word, add_special_tokens=False)["input_ids"] for word in self.words]
        for word, ids in zip(self.words, tokens, strict=True):
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                got = f"{len(ids)} tokens" if len(ids) != 1 else "an unknown one"
                raise ArgumentError(
                    f"label word {word!r}: expected a single token of this tokenizer, got {got}; choose another word, "
                    "perhaps with a space before it"
                )
        first = [ids[0] for ids in tokens]
        if len(set(first)) != len(first):
            raise ArgumentError(
                f"label words: expected different tokens, got {', '.join(map(repr, self.words))}; choose other words"
            )
        return torch.tensor(first)

    def fill(self, text: str, pair: str | None) -> str:
        """The prompt of one example."""
        return self.template.format(text=text, **({} if pair is None else {"pair": pair}))

    def check(self, pairs: bool) -> None:
        """Raises ArgumentError where the template's fields are not those that the data have."""
        wanted = {"text", "pair"} if pairs else {"text"}
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(self.template) if field is not None}
        except ValueError as error:
            raise ArgumentError(
                f"prompt: expected a template with {{text}}, got {self.template!r} ({error}); double literal braces"
            ) from error
        if fields != wanted:
            names = " and ".join(f"{{{name}}}" for name in sorted(wanted, reverse=True))
            got = ", ".join(f"{{{name}}}" for name in sorted(fields)) or "no field"
            raise ArgumentError(f"prompt: expected {names} in the template, got {got}; double literal braces")


class TokenExamples:
    """Tokenised examples: a map-style data set for `batches` and for `data.loader`.

    Args:
        table: The examples.
        language_model: The model whose tokenizer and context count.
        prompt: How to ask for a class; None for a model with a classification head.
        truncate: Cut what is longer than the model's context instead of refusing it. A prompt is never cut.
        virtual: Virtual tokens of a soft prompt before each text.

    Raises:
        DataError: A text, or a prompt with it, that is longer than the context.
        ArgumentError: A prompt that does not fit the data.
    """

    def __init__(
        self,
        table: TextTable,
        language_model: LanguageModel,
        prompt: Prompt | None = None,
        *,
        truncate: bool = False,
        virtual: int = 0,
    ) -> None:
        self.table = table
        self.language_model = language_model
        self.classes = table.classes
        self.labels = torch.from_numpy(table.labels)
        pairs = table.pairs or (None,) * len(table)
        tokenizer, context = language_model.tokenizer, language_model.context
        if prompt is not None:
            prompt.check(table.pairs is not None)
            texts = [prompt.fill(text, pair) for text, pair in zip(table.texts, pairs, strict=True)]
            encoded = encode(tokenizer, texts, verbose=False)
        else:
            second = {} if table.pairs is None else {"text_pair": list(table.pairs)}
            cut = {"truncation": True, "max_length": context} if truncate else {}
            encoded = encode(tokenizer, table.texts, verbose=False, **second, **cut)
        names = accepts(language_model.model, ("input_ids", "token_type_ids"))
        self.encoded: dict[str, list[list[int]]] = {name: encoded[name] for name in names if name in encoded}
        check_ids(language_model, self.encoded["input_ids"])
        if virtual:
            first = first_virtual(language_model.model)
            before = {"input_ids": list(range(first, first + virtual)), "token_type_ids": [0] * virtual}
            self.encoded = {name: [before[name] + ids for ids in lists] for name, lists in self.encoded.items()}
        self.lengths = np.array([len(ids) for ids in self.encoded["input_ids"]])
        too_long = np.flatnonzero(self.lengths > context)
        if len(too_long):
            what, remedy = (
                ("prompt", "shorten it") if prompt is not None else ("text", "shorten it, or pass --truncate")
            )
            raise DataError(
                f"{table.name}, {table.places[too_long[0]]}: expected a {what} of at most {context} tokens, the "
                f"model's context, got {self.lengths[too_long[0]]}; {remedy}"
            )
        self.columns = {name: _as_metric(values) for name, values in table.columns.items()}

    def collate(self, examples: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Examples as a `TextClassifier` takes them: int64 [batch, inputs, tokens], and labels [batch]."""
        batch = Collate(self.language_model)(examples)
        return TextClassifier.pack(batch), batch["labels"]

    @property
    def metrics(self) -> dict[str, Metric]:
        """What the data's further columns hold."""
        return {name: kind for name, (kind, _) in self.columns.items()}

    def __len__(self) -> int:
        return len(self.lengths)

    def content(self, index: int) -> bytes:
        """Text, second text and the values of further columns, as JSON."""
        table = self.table
        columns = {name: values[index].item() for name, values in table.columns.items()}
        return json.dumps([table.texts[index], None if table.pairs is None else table.pairs[index], columns]).encode()

    def __getitem__(self, index: int) -> Batch:
        """One example: lists of ids, the label, and the further columns' values."""
        return {
            **{name: ids[index] for name, ids in self.encoded.items()},
            "label": int(self.labels[index]),
            "columns": {name: values[index] for name, (_, values) in self.columns.items()},
        }


def _as_metric(values: np.ndarray) -> tuple[Metric, np.ndarray]:
    if values.dtype.kind == "f":
        return Continuous(), values
    names, index = np.unique(values, return_inverse=True)
    return (Categorical([str(name) for name in names]), index) if len(names) > 1 else (Categorical(2), index)


class Collate:
    """Makes padded batches of examples.

    Args:
        language_model: The model whose tokenizer pads.
        side: Where padding goes; None: on the left for a decoder, so that the last token is a real one, else where
            the tokenizer puts it. The head of an encoder reads the first position, so its logits are right with
            padding on the right only.
    """

    def __init__(self, language_model: LanguageModel, side: Side | None = None) -> None:
        self.tokenizer = language_model.tokenizer
        reads_last = language_model.task == "causal" or hasattr(language_model.model, "score")  # a decoder's classifier
        own: Side = "left" if reads_last else self.tokenizer.padding_side
        self.side: Side = side or own

    def __call__(self, examples: Sequence[Batch]) -> Batch:
        """Examples as tensors: inputs [batch, tokens], `attention_mask`, `labels` [batch], `columns` of [batch]."""
        inputs = [{k: v for k, v in example.items() if k not in ("label", "columns")} for example in examples]
        width = max(len(example["input_ids"]) for example in inputs)
        fill = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        batch: Batch = {name: _padded([e[name] for e in inputs], width, fill[name], self.side) for name in inputs[0]}
        batch["attention_mask"] = _padded([[1] * len(e["input_ids"]) for e in inputs], width, 0, self.side)
        batch["labels"] = torch.tensor([example["label"] for example in examples])
        batch["columns"] = {
            name: torch.tensor(np.array([example["columns"][name] for example in examples]))
            for name in examples[0]["columns"]
        }
        return batch


def _padded(rows: Sequence[Sequence[int]], width: int, value: int, side: Side) -> torch.Tensor:
    out = torch.full((len(rows), width), value, dtype=torch.long)
    for target, row in zip(out, rows, strict=True):
        target[slice(width - len(row), width) if side == "left" else slice(len(row))] = torch.tensor(row)
    return out


def batches(
    examples: TokenExamples,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    side: Side | None = None,
) -> DataLoader[Batch]:
    """A loader of padded batches as dictionaries, with the data's further columns.

    Args:
        examples: The data.
        batch_size: Examples per batch.
        shuffle: A new random order in every pass.
        seed: Seed of the shuffled order.
        side: As for `Collate`.
    """
    generator = torch.Generator().manual_seed(seed)
    collate = Collate(examples.language_model, side)
    return DataLoader(examples, batch_size, shuffle=shuffle, generator=generator, collate_fn=collate)  # type: ignore[arg-type]


class TextForward:
    """The `forward` of `trace` for `batches`: a `TextClassifier`'s logits, and the metrics' values.

    Args:
        metrics: From `parse_metrics`.
    """

    def __init__(self, metrics: Mapping[str, AuxiliaryMetric]) -> None:
        self.metrics = dict(metrics)

    @property
    def kinds(self) -> dict[str, Metric]:
        """What the metrics' values are, for `Tracer` and `trace`."""
        return {name: metric.kind for name, metric in self.metrics.items()}

    def __call__(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Logits [batch, classes] and values [batch] of each metric."""
        logits: torch.Tensor = model.logits(batch)  # type: ignore[operator]
        labels = batch["labels"].to(logits.device)
        return logits, {name: m.values(logits, labels, batch["columns"]) for name, m in self.metrics.items()}


def split_text(
    table: TextTable,
    language_model: LanguageModel,
    *,
    test: TextTable | None = None,
    prompt: Prompt | None = None,
    truncate: bool = False,
    virtual: int = 0,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
    seed: int = 0,
) -> Splits:
    """Examples in three parts that share no line: select, validate and test, each with short texts first.

    Args:
        table: The examples; a third of them tests where there is no `test`. A fifth of the rest validates.
        language_model: As for `TokenExamples`.
        test: Examples of the same classes to test on.
        prompt: As for `TokenExamples`.
        truncate: As for `TokenExamples`.
        virtual: As for `TokenExamples`.
        train_per_class: Examples of each class to select and validate on, chosen at random; None for all.
        test_per_class: Number of texts per class to test on; None for all.
        seed: Seed of the choice of texts.

    Raises:
        DataError: A class with too few examples, or a text that is too long.
    """
    rest, held_out = _shuffled_by_class(table, seed), []
    if test is None:
        held_out = [rows[: len(rows) // 3] for rows in rest]
        rest = [rows[len(rows) // 3 :] for rows in rest]
    else:
        held_out = _shuffled_by_class(test, seed)
    rest = _first(rest, train_per_class, 2, table, "--train-per-class")
    held_out = _first(held_out, test_per_class, 1, test or table, "--test-per-class")
    cuts = [max(1, len(rows) // 5) for rows in rest]
    parts = {
        "select": (table, [rows[cut:] for rows, cut in zip(rest, cuts, strict=True)]),
        "validate": (table, [rows[:cut] for rows, cut in zip(rest, cuts, strict=True)]),
        "test": (test or table, held_out),
    }
    made = {
        name: TokenExamples(
            source.take(_by_length(source, rows)), language_model, prompt, truncate=truncate, virtual=virtual
        )
        for name, (source, rows) in parts.items()
    }
    return Splits(name="text", classes=table.classes, **made)  # type: ignore[arg-type]


def _by_length(table: TextTable, rows: list[np.ndarray]) -> np.ndarray:
    """The rows of all classes, short texts first: batches of like lengths have little padding."""
    chosen = np.sort(np.concatenate(rows))
    pairs = table.pairs or ("",) * len(table)
    return chosen[np.argsort([len(table.texts[i]) + len(pairs[i]) for i in chosen], kind="stable")]


def _shuffled_by_class(table: TextTable, seed: int) -> list[np.ndarray]:
    return [
        np.random.default_rng([seed, label]).permutation(np.flatnonzero(table.labels == label))
        for label in range(max(1, len(table.classes)))  # text without labels is one group
    ]


def _first(
    rows: list[np.ndarray], per_class: int | None, least: int, table: TextTable, option: str
) -> list[np.ndarray]:
    names = [f" of class '{name}'" for name in table.classes] or [""]
    for name, found in zip(names, rows, strict=True):
        if len(found) < (per_class or least):
            raise DataError(
                f"{table.name}: expected at least {per_class or least} examples{name}, got {len(found)}; "
                f"lower {option} or add examples"
            )
    return [found[:per_class] for found in rows]
