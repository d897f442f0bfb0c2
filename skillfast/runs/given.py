"""Subjects of a caller's own: a model and a loader that were given, not made from settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from skillfast import data
from skillfast.errors import ArgumentError, DataError, ModelError
from skillfast.models.batches import Batch, classes_of, read_batch
from skillfast.models.inputs import described, joined, tensors_in
from skillfast.models.sites import find_sites, module_device, refuse_training, unwrap_compiled
from skillfast.runs.config import BenchConfig, DataConfig, ModelConfig
from skillfast.runs.subject import Subject, Training
from skillfast.vocabulary import GIVEN, KINDS, NO_TRAINING

if TYPE_CHECKING:
    from collections.abc import Sequence

PARTS = ("select", "validate", "test")
LEAST = 4  # examples of a class, to be in all three parts


@dataclass(frozen=True)
class Given:
    """What `bench` and `evaluate` are given instead of settings of model and data.

    Attributes:
        model: In evaluation mode, on its device.
        loader: Batches of labelled examples, which are divided; or a loader for each of `PARTS`.
        label_key: Key of the labels in a batch that is a mapping.
        columns: Keys of further values of each example in such batches, which the model is not called with.
    """

    model: torch.nn.Module
    loader: Iterable[Any] | Mapping[str, Iterable[Any]]
    label_key: str | None = None
    columns: tuple[str, ...] = ()

    @staticmethod
    def of(
        model: torch.nn.Module | None, loader: Any, label_key: str | None, columns: Sequence[str] = ()
    ) -> Given | None:
        """Both, or None where neither was given.

        Raises:
            ArgumentError: One of them.
            ModelError: Layers of packed integers, through which there is no gradient to choose neurons by.
        """
        if (model is None) != (loader is None):
            raise ArgumentError(
                f"{'loader' if loader is None else 'model'}: expected model= and loader= together, got one; give both, "
                "or settings of a model and data"
            )
        for name, module in () if model is None else model.named_modules():
            if ".quantized." in type(module).__module__:
                raise ModelError(
                    f"model: expected layers that pass gradients, got a quantised {type(module).__name__} at {name}; "
                    "give the weights rounded as they are in it, in floating point"
                )
        return None if model is None else Given(model, loader, label_key, tuple(columns))

    def config(self, config: BenchConfig | None) -> BenchConfig:
        """The settings, with what is known of the model and the loader; raises ArgumentError for others of these."""
        loaders = self.loader.values() if isinstance(self.loader, Mapping) else [self.loader]
        size = next((x.batch_size for x in loaders if isinstance(x, DataLoader) and x.batch_size), None)
        known = BenchConfig() if config is None else config
        if known.model != ModelConfig() or known.data != DataConfig():
            raise ArgumentError(
                "config: expected no settings of model and data beside model= and loader=, got some; leave them out"
            )
        kinds = {site.kind for site in find_sites(self.model)}
        own: dict[str, Any] = {"dtype": known.run.dtype or "float32"}
        if known.trace.sites == KINDS:
            own["sites"] = tuple(kind for kind in KINDS if kind in kinds)
        if config is None and size is not None:
            own["batch_size"] = size
        return known.replaced(**own).of_given(type(unwrap_compiled(self.model)).__name__)


class Examples:
    """Examples of a loader, one by one; batches of them are made as the loader makes its own.

    Args:
        loader: Batches of labelled examples; it is read once for its labels. Those of a DataLoader of a map-style data
            set are made again from its items, those of any other iterable are kept.
        classes: Class names.
        label_key: Key of the labels in a batch that is a mapping.
        pad: Token that pads texts of several batches.
        columns: Keys of further values in batches that are mappings.

    Attributes:
        labels: int64 [n].
        classes: Class names.
        columns: Key -> [n] values, numbers or text.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        classes: Sequence[str],
        label_key: str | None,
        pad: int,
        columns: Sequence[str] = (),
    ) -> None:
        self.classes = tuple(classes)
        self._key = label_key
        self._pad = pad
        self._items: Any = []
        self._together: Any = None
        batches = loader
        if (
            isinstance(loader, DataLoader)
            and not isinstance(loader.dataset, IterableDataset)
            and loader.batch_size is not None
        ):
            self._items, self._together = loader.dataset, loader.collate_fn
            batches = DataLoader(
                loader.dataset, loader.batch_size, collate_fn=loader.collate_fn, generator=torch.Generator()
            )
        labels = []
        values: dict[str, list[np.ndarray]] = {name: [] for name in columns}
        self.columns: dict[str, np.ndarray] = {}
        self._names = tuple(columns)
        for given in batches:
            batch = read_batch(self._without_columns(given), label_key, tokens=True)
            for name in columns:
                values[name].append(_values(given, name, len(batch)))
            if batch.per_token:
                raise ArgumentError(
                    f"labels: expected one class index per example, got {described(batch.labels)}, one per token; use "
                    "trace, attribute, learn_masks and sweep, which take those, and select between them"
                )
            labels.append(batch.labels.cpu())
            if self._together is None:
                self._items += batch.split(1)
        self.labels = torch.cat([torch.empty(0, dtype=torch.int64), *labels])
        self.columns = {name: np.concatenate(found) for name, found in values.items() if found}
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise ArgumentError(
                f"labels: expected class indices in [0, {len(self.classes)}), got {int(self.labels.min())} to "
                f"{int(self.labels.max())}; check the model's classes"
            )

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        """An item as the loader's data set has it, or a batch of one."""
        return self._items[index]

    def collate(self, items: list[Any]) -> Batch:
        """A batch of items."""
        if self._together is not None:
            return read_batch(self._without_columns(self._together(items)), self._key)
        return Batch(joined([item.inputs for item in items], self._pad), torch.cat([item.labels for item in items]))

    def _without_columns(self, batch: Any) -> Any:
        """A batch as the model takes it."""
        if not self._names or not isinstance(batch, Mapping):
            return batch
        return {name: value for name, value in batch.items() if name not in self._names}


def _values(batch: Any, name: str, n: int) -> np.ndarray:
    """A further value of each example of a batch, [n]; raises ArgumentError where it has none."""
    if not isinstance(batch, Mapping) or name not in batch:
        raise ArgumentError(
            f"column {name!r}: expected batches that are mappings with it, got {described(batch)}; let the loader give "
            "it"
        )
    found = batch[name]
    values = found.cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    if values.shape != (n,):
        raise ArgumentError(
            f"column {name!r}: expected a value for each of {n} examples, got shape {list(values.shape)}; give [batch]"
        )
    return values


class Part:
    """Some examples, of which `data.loader` makes batches.

    Args:
        examples: All of them.
        rows: int64 [n], which.
    """

    def __init__(self, examples: Examples, rows: np.ndarray) -> None:
        self.examples = examples
        self.rows = rows
        self.classes = examples.classes
        self.labels = examples.labels[torch.from_numpy(rows)]
        self.columns = {name: values[rows] for name, values in examples.columns.items()}
        self.collate = examples.collate

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """An item, for `collate`."""
        return self.examples[int(self.rows[index])]

    def content(self, index: int) -> bytes:
        """The input tensors of a batch of this one example."""
        inputs = read_batch(self.collate([self[index]])).inputs
        return b"".join(x.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for x in tensors_in(inputs))


def given_subject(given: Given, config: BenchConfig) -> Subject:
    """A subject of what was given.

    Raises:
        SkillfastError: A model without known sites or in training mode, or examples that cannot be divided.
    """
    model = unwrap_compiled(given.model)
    refuse_training(model, "bench")
    pad = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    loader = given.loader
    if isinstance(loader, Mapping):
        if set(loader) != set(PARTS):
            raise ArgumentError(
                f"loader: expected one, or one for each of {', '.join(PARTS)}, got {', '.join(map(str, loader))}; "
                "give those"
            )
        classes = classes_of(loader["select"], model)
        examples = {name: Examples(loader[name], classes, given.label_key, pad, given.columns) for name in PARTS}
        parts = {name: Part(found, np.arange(len(found))) for name, found in examples.items()}
    else:
        classes = classes_of(loader, model)
        whole = Examples(loader, classes, given.label_key, pad, given.columns)
        parts = {name: Part(whole, rows) for name, rows in divided(whole, config.run.seed).items()}
    for name, part in parts.items():
        missing = [classes[c] for c in np.flatnonzero(np.bincount(part.labels.numpy(), minlength=len(classes)) == 0)]
        if missing:
            raise DataError(
                f"class {missing[0]!r}: expected examples in the {name} part, got none; give the loader some"
            )
    splits: Any = data.Splits(name=GIVEN, classes=tuple(classes), **parts)  # type: ignore[arg-type]
    name, device = type(model).__name__, module_device(model)
    return Subject(config, model, name, splits, device, GIVEN, "read as the loader gives them", Training(_nothing), {})


def _nothing() -> dict[str, Any]:
    return {"finetune": NO_TRAINING}


def divided(examples: Examples, seed: int) -> dict[str, np.ndarray]:
    """Rows of each part, drawn from every class: a third to test on, of the rest a fifth to validate on.

    Raises:
        DataError: A class with too few examples.
    """
    labels, rng = examples.labels.numpy(), np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {name: [] for name in PARTS}
    for c, name in enumerate(examples.classes):
        rows = rng.permutation(np.flatnonzero(labels == c))
        if len(rows) < LEAST:
            raise DataError(
                f"class {name!r}: expected at least {LEAST} examples, to be in all three parts, got {len(rows)}; give "
                "more, or a loader for each of select, validate and test"
            )
        tested = len(rows) // 3
        validated = tested + max(1, (len(rows) - tested) // 5)
        for part, own in zip(("test", "validate", "select"), np.split(rows, [tested, validated]), strict=True):
            found[part].append(own)
    return {part: np.sort(np.concatenate(rows)) for part, rows in found.items()}
