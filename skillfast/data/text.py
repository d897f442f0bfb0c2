"""Labelled text of the user's own: a `.tsv`, `.csv` or `.jsonl` file, or a data set of the `datasets` library."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skillfast.errors import ArgumentError, DataError
from skillfast.files import short

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PREFIX = "hf:"
SUFFIXES = (".tsv", ".csv", ".jsonl")
MOST_CLASSES = 1000
_REST = None  # DictReader's key for fields beyond the header


@dataclass(frozen=True)
class TextTable:
    """Examples of text with their labels.

    Attributes:
        name: Where they are from.
        texts: The texts.
        pairs: Each one's second text, for inference and similarity; None where there is none.
        labels: int64 [n], indices of classes; all 0 for text without labels.
        classes: Names of the classes, in numerical or alphabetical order unless told otherwise; empty for text without
            labels.
        columns: Further columns: float64 [n], or str [n].
        places: Where each example stands, for messages: "line 7".
    """

    name: str
    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: np.ndarray
    classes: tuple[str, ...]
    columns: dict[str, np.ndarray]
    places: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | np.ndarray) -> TextTable:
        """Some of the examples, in the order of their indices."""
        return replace(
            self,
            texts=tuple(self.texts[i] for i in rows),
            pairs=None if self.pairs is None else tuple(self.pairs[i] for i in rows),
            labels=self.labels[rows],
            columns={name: values[rows] for name, values in self.columns.items()},
            places=tuple(self.places[i] for i in rows),
        )


def read_text(
    source: str | Path,
    *,
    text_column: str = "text",
    label_column: str | None = "label",
    pair_column: str | None = None,
    columns: Sequence[str] = (),
    classes: Sequence[str] | None = None,
) -> TextTable:
    """Read labelled text.

    A `.tsv` file is tab-separated without quoting, a `.csv` file comma-separated with quotes, a `.jsonl` file one JSON
    object per line; the first two have a header. `hf:NAME`, `hf:NAME:CONFIG` and `hf:NAME@SPLIT` (its first split by
    default) name a data set of the `datasets` library.

    Args:
        source: The file or the name.
        text_column: Where the text stands.
        label_column: Where the class stands: a whole number, a word, true or false; None: text without labels.
        pair_column: Where a second text stands; None for none.
        columns: Further columns to keep, for metrics of the user's own.
        classes: Names of the classes in their order; labels must be among them, or be their indices. None: what the
            data has.

    Raises:
        DataError: A file that is not there or cannot be read, a missing column, an empty text, a label outside the
            classes, values of mixed types.
        ArgumentError: A file of another kind.
    """
    name = str(source)
    rows = _dataset_rows(name) if name.startswith(PREFIX) else _file_rows(Path(source))
    wanted = [text_column, *(name for name in (label_column, pair_column) if name is not None), *columns]
    places, values = [], {column: [] for column in wanted}  # type: tuple[list[str], dict[str, list[Any]]]
    for place, row in rows:
        for column in wanted:
            if column not in row:
                had = short(", ".join(str(key) for key in row if key is not _REST), 160)
                raise DataError(
                    f"{name}, {place}: expected a column '{column}', got {had or 'none'}; check --text-column, "
                    "--label-column and --pair-column"
                )
            if row[column] is None:
                raise DataError(
                    f"{name}, {place}: expected a value in column '{column}', got none; fill it or leave the line out"
                )
            values[column].append(row[column])
        places.append(place)
    if not places:
        raise DataError(f"{name}: expected at least one example, got none; check the file")
    where = _Where(name, tuple(places))
    texts = _texts(values[text_column], text_column, where)
    labels, names = np.zeros(len(places), dtype=np.int64), ()  # type: tuple[np.ndarray, tuple[str, ...]]
    if label_column is not None:
        labels, names = _labels(values[label_column], label_column, classes, where)
    return TextTable(
        name=name,
        texts=texts,
        pairs=None if pair_column is None else _texts(values[pair_column], pair_column, where),
        labels=labels,
        classes=names,
        columns={column: _column(values[column], column, where) for column in columns},
        places=where.places,
    )


@dataclass(frozen=True)
class _Where:
    """For messages."""

    name: str
    places: tuple[str, ...]

    def error(self, index: int, text: str) -> DataError:
        return DataError(f"{self.name}, {self.places[index]}: {text}")


def _file_rows(path: Path) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    if path.suffix not in SUFFIXES:
        raise ArgumentError(
            f"data file '{path}': expected {', '.join(SUFFIXES)} or {PREFIX}NAME, got '{path.suffix or path.name}'; "
            "convert it"
        )
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise DataError(f"data file '{path}': expected a file, got {got}; check --data-file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _json_rows(path, file) if path.suffix == ".jsonl" else _delimited_rows(path, file)
    except UnicodeDecodeError as error:
        raise DataError(
            f"data file '{path}': expected UTF-8, got byte {error.object[error.start]:#x}; convert it"
        ) from error


def _delimited_rows(path: Path, file: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    quoting: dict[str, Any] = (
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {"strict": True}
    )
    reader = csv.DictReader(file, restkey=_REST, **quoting)
    try:
        for row in reader:
            if _REST in row:
                fields = len(reader.fieldnames or ())
                raise DataError(
                    f"{path}, line {reader.line_num}: expected {fields} fields, got {fields + len(row[_REST])}; "
                    "check the separators"
                )
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: expected fields, got {error}; check the quotes") from error


def _json_rows(path: Path, file: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: expected a JSON object, got {error}; mend the line") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: expected a JSON object, got {type(row).__name__}; one object per line"
            )
        yield f"line {number}", row


def _dataset_rows(source: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{source}: expected the datasets library, got none; pip install datasets") from error
    name, _, split = source.removeprefix(PREFIX).partition("@")
    name, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, split=split or None)
    except Exception as error:  # of the hub's client, and of the library
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:160]
        raise DataError(
            f"{source}: expected a data set on the hub or in the local cache, got none: {reason}; "
            "check the name, or pass a file"
        ) from error
    part = next(iter(found.values())) if isinstance(found, dict) else found
    named = {column: kind for column, kind in part.features.items() if isinstance(kind, datasets.ClassLabel)}
    for index, row in enumerate(part):
        yield (
            f"row {index}",
            {
                column: named[column].int2str(value)
                if column in named and isinstance(value, int) and value >= 0
                else value
                for column, value in row.items()
            },
        )


def _texts(values: list[Any], column: str, where: _Where) -> tuple[str, ...]:
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise where.error(
                index, f"expected text in column '{column}', got {type(value).__name__} {value!r}; quote it"
            )
        if not value.strip():
            raise where.error(index, f"expected text in column '{column}', got an empty one; leave the line out")
    return tuple(value.strip() for value in values)


def _labels(
    values: list[Any], column: str, classes: Sequence[str] | None, where: _Where
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Indices of the classes, and their names."""
    words = [_label_word(value, column, index, where) for index, value in enumerate(values)]
    if classes is None:
        numbers = [_is_whole(word) for word in words]
        if any(numbers) and not all(numbers):
            one, other = numbers.index(True), numbers.index(False)
            raise where.error(
                max(one, other),
                f"expected labels of one type in column '{column}', got {words[max(one, other)]!r} after "
                f"{words[min(one, other)]!r} ({where.places[min(one, other)]}); use whole numbers or words",
            )
        names = tuple(sorted(set(words), key=int if all(numbers) else str))
        if not 2 <= len(names) <= MOST_CLASSES:
            raise DataError(
                f"{where.name}: expected 2 to {MOST_CLASSES} classes in column '{column}', got {len(names)}; "
                "check --label-column"
            )
    else:
        names = tuple(classes)
        if not set(words) <= set(names) and all(_is_whole(word) for word in words):  # indices of named classes
            words = [names[int(word)] if int(word) < len(names) else word for word in words]
    index_of = {name: index for index, name in enumerate(names)}
    unknown = next((index for index, word in enumerate(words) if word not in index_of), None)
    if unknown is not None:
        raise where.error(
            unknown,
            f"expected one of {', '.join(names[:5])}{', ...' if len(names) > 5 else ''} in column '{column}', got "
            f"{short(repr(words[unknown]), 160)}; correct it or leave the line out",
        )
    return np.array([index_of[word] for word in words], dtype=np.int64), names


def _label_word(value: Any, column: str, index: int, where: _Where) -> str:
    if isinstance(value, str | int) and str(value).strip():  # bool is an int: "True", "False"
        return str(value).strip()
    raise where.error(
        index, f"expected a class in column '{column}', got {value!r}; a class is a whole number or a word"
    )


def _is_whole(word: str) -> bool:
    return word.isascii() and word.isdigit()


def _column(values: list[Any], column: str, where: _Where) -> np.ndarray:
    """Numbers where all are, else words where none is one."""
    numbers = [_number(value) for value in values]
    known = [number is not None for number in numbers]
    if all(known):
        return np.array(numbers, dtype=np.float64)
    if any(known):
        raise where.error(
            known.index(False),
            f"expected numbers in column '{column}' as elsewhere, got "
            f"{short(repr(values[known.index(False)]), 160)}; use one type",
        )
    return np.array([str(value).strip() for value in values], dtype=np.str_)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
