"""Auxiliary metrics: the scalars per observation that neurons are correlated with, and what each of them is.

A metric's kind is `Categorical`, `Binary` or `Continuous`. The built-in ones are pure functions of a model's outputs,
computed in float32 at least, in nats. A metric of the user's own is a callable, `module:function`, or a numeric or
categorical column of the data (`column:NAME`).
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, one_hot

from skillfast.errors import ArgumentError
from skillfast.transfer import moved
from skillfast.vocabulary import METRICS


@dataclass(frozen=True)
class Categorical:
    """A class per observation, as an index; one column of scores per class.

    Attributes:
        classes: Names of the classes, or how many there are.
    """

    classes: tuple[str, ...]

    def __init__(self, classes: Sequence[str] | int) -> None:
        if hasattr(classes, "__index__"):  # numpy's integers, too
            classes = [str(i) for i in range(operator.index(classes))]
        names = tuple(map(str, classes))
        if len(names) < 2 or len(set(names)) != len(names):
            raise ArgumentError(f"Categorical classes: expected at least two different names, got {list(names)[:5]}")
        object.__setattr__(self, "classes", names)

    def columns(self, name: str) -> list[str]:
        """Names of the score columns of a metric of this name: `name:class` for each class."""
        return [f"{name}:{label}" for label in self.classes]

    @property
    def expected(self) -> str:
        """Which values there are, in words."""
        return f"class indices in [0, {len(self.classes)})"

    def fits(self, values: torch.Tensor) -> torch.Tensor:
        """Which of the values float64 [n] are class indices: bool [n]."""
        return (values == values.floor()) & (values >= 0) & (values < len(self.classes))

    def check(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Indices [n] as float64 [n]; raises ArgumentError on an index out of range."""
        index = values.double()
        if not bool(self.fits(index).all()):
            raise ArgumentError(f"metric {name!r}: expected {self.expected}, got {index.min():g} to {index.max():g}")
        return index

    def expand(self, values: torch.Tensor) -> torch.Tensor:
        """Checked values [n] as one-hot float64 [n, classes]."""
        return one_hot(values.long(), len(self.classes)).double()


@dataclass(frozen=True)
class Binary:
    """True or false per observation (bool, or 0 and 1)."""

    def columns(self, name: str) -> list[str]:
        """Names of the score columns of a metric of this name: the name alone."""
        return [name]

    expected = "0 and 1"  # in words

    def fits(self, values: torch.Tensor) -> torch.Tensor:
        """Which of the values float64 [n] are 0 or 1: bool [n]."""
        return (values == 0) | (values == 1)

    def check(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Values [n] as float64 [n]; raises ArgumentError on anything but 0 and 1."""
        checked = values.double()
        if not bool(self.fits(checked).all()):
            raise ArgumentError(
                f"metric {name!r}: expected {self.expected}, got other values; use Continuous() for them"
            )
        return checked

    def expand(self, values: torch.Tensor) -> torch.Tensor:
        """Checked values [n] as a column [n, 1]."""
        return values[:, None]


@dataclass(frozen=True)
class Continuous:
    """A real number per observation."""

    def columns(self, name: str) -> list[str]:
        """Names of the score columns of a metric of this name: the name alone."""
        return [name]

    expected = "finite values"  # in words

    def fits(self, values: torch.Tensor) -> torch.Tensor:
        """Which of the values float64 [n] are finite: bool [n]."""
        return torch.isfinite(values)

    def check(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Values [n] as float64 [n]; raises ArgumentError on a value that is not finite."""
        checked = values.double()
        if not bool(self.fits(checked).all()):
            raise ArgumentError(f"metric {name!r}: expected {self.expected}, got NaN or infinity; leave such rows out")
        return checked

    def expand(self, values: torch.Tensor) -> torch.Tensor:
        """Checked values [n] as a column [n, 1]."""
        return values[:, None]


Metric = Categorical | Binary | Continuous
_TYPES = {"categorical": Categorical, "binary": Binary, "continuous": Continuous}


def to_json(metrics: Mapping[str, Metric]) -> dict[str, dict[str, Any]]:
    """Metrics' names and kinds as plain JSON values, which `from_json` reads."""
    return {name: {"type": type(metric).__name__.lower(), **asdict(metric)} for name, metric in metrics.items()}


def from_json(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Metric]:
    """Metrics by name, from what `to_json` gave."""
    return {
        name: _TYPES[value["type"]](**{key: item for key, item in value.items() if key != "type"})
        for name, value in metrics.items()
    }


Values = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [n, classes], labels int64 [n]) -> values [n]."""

COLUMN = "column:"
TOKEN_LOG_PROBABILITY = "token_log_probability"


def label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """The label itself: int64 [n]."""
    return labels


def correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether the largest logit is the label's (top-1): bool [n]."""
    return logits.argmax(-1) == labels


def confidence(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """The largest softmax probability [n]; needs no labels."""
    return _wide(logits).softmax(-1).amax(-1)


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the label in nats [n]."""
    return cross_entropy(_wide(logits), labels, reduction="none")


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The label's logit minus the best of the others; below 0 where the prediction is wrong.

    Args:
        logits: [..., n, classes].
        labels: int64 [n].

    Returns:
        [..., n].
    """
    wide, index = _wide(logits), labels.expand(logits.shape[:-1])[..., None]
    return wide.gather(-1, index)[..., 0] - wide.scatter(-1, index, -torch.inf).max(-1).values


def entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """Entropy of the softmax distribution in nats [n]; needs no labels."""
    log_p = _wide(logits).log_softmax(-1)
    return -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)  # a class at -inf adds 0


FUNCTIONS: dict[str, Values] = {
    "label": label,
    "correct": correct,
    "confidence": confidence,
    "loss": loss,
    "margin": margin,
    "entropy": entropy,
}


def classification(classes: Sequence[str] | int) -> dict[str, Metric]:
    """Kinds of the metrics that `metrics="classification"` names: label, correct, confidence and loss."""
    return {name: _kind(name, classes) for name in METRICS}


def classification_values(
    logits: torch.Tensor, labels: torch.Tensor, names: Iterable[str] = METRICS
) -> dict[str, torch.Tensor]:
    """Values of metrics for one batch, by default those that `metrics="classification"` names.

    Args:
        logits: [n, classes].
        labels: int64 [n], on the CPU or where the logits are.
        names: Names of `FUNCTIONS`.

    Returns:
        Each metric's values [n], on the logits' device. Labels on a GPU are not waited for: one out of range comes back
        as it is, for whoever counts it to refuse, and its loss is another class's.

    Raises:
        ArgumentError: Labels of another number than the logits' rows, or, on the CPU, out of range.
    """
    at_once = labels.device.type == "cpu"
    if labels.shape != logits.shape[:1] or (
        at_once and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]
    ):
        extent = f" from {int(labels.min())} to {int(labels.max())}" if at_once and labels.numel() else ""
        raise ArgumentError(
            f"labels: expected {len(logits)} class indices in [0, {logits.shape[1]}), the model's outputs, got shape "
            f"{list(labels.shape)}{extent}"
        )
    known = moved(labels, logits.device)
    inside = known if at_once else known.clamp(0, logits.shape[1] - 1)  # an index out of range ends a CUDA process
    return {name: FUNCTIONS[name](logits, known if name == "label" else inside) for name in names}


def token_classification(classes: Sequence[str] | int | None, *, each: bool) -> dict[str, Metric]:
    """Kinds of the metrics that `metrics="classification"` names where tokens have labels.

    Args:
        classes: The labels' classes; None leaves the label out: that of a language model is any of its words.
        each: Whether each token is an observation; else examples are, and have their tokens' means but no label.
    """
    if not each:
        return {name: Continuous() for name in METRICS if name != "label"}
    return {name: _kind(name, classes or 2) for name in METRICS if name != "label" or classes is not None}


def token_classification_values(
    logits: torch.Tensor, targets: torch.Tensor, names: Iterable[str] = METRICS, *, each: bool
) -> dict[str, torch.Tensor]:
    """Values of metrics where tokens have labels, for one batch.

    Args:
        logits: [batch, tokens, classes].
        targets: int64 [batch, tokens], what they are to give, below 0 for tokens that have no label; on the CPU or
            where the logits are.
        names: Names of `FUNCTIONS`.
        each: Whether each token is an observation.

    Returns:
        [batch, tokens] each, 0 where there is no label; or [batch], the means over an example's labelled tokens.

    Raises:
        ArgumentError: A label out of range, or without `each` an example of which no token has a label.
    """
    labelled = targets >= 0
    if targets.numel() and int(targets.max()) >= logits.shape[-1]:
        raise ArgumentError(
            f"labels: expected class indices below {logits.shape[-1]}, the model's outputs, got {int(targets.max())}; "
            "check the model's classes"
        )
    counts = labelled.sum(1)
    if not each and not bool((counts > 0).all()):
        raise ArgumentError(
            f"labels: expected a token with a label in every example, got none in {int((counts == 0).sum())}; leave "
            "those out, or trace each token with pool='none'"
        )
    known, labelled = (moved(x, logits.device) for x in (targets.clamp(min=0), labelled))
    values: dict[str, torch.Tensor] = {}
    for name in names:  # of all tokens, since a GPU does not tell how many have a label; a row is copied at a time
        rows = [FUNCTIONS[name](scores, wanted) for scores, wanted in zip(logits, known, strict=True)]
        found = torch.stack(rows)
        values[name] = found.masked_fill(~labelled, 0)
    if each:
        return values
    return {name: value.double().sum(1) / labelled.sum(1) for name, value in values.items()}


def token_log_probabilities(
    logits: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token's successor, which the activations at that token predict.

    Args:
        logits: [batch, tokens, vocabulary] of a causal model.
        input_ids: int64 [batch, tokens].
        attention_mask: [batch, tokens], 0 at padding, on either side; None where there is none.

    Returns:
        Values [batch, tokens], in nats: at position t that of token t + 1 given those up to t. And bool
        [batch, tokens]: whether t and t + 1 are real tokens; the value is 0 elsewhere.

    Raises:
        ArgumentError: Shapes that do not fit.
    """
    if logits.dim() != 3 or input_ids.shape != logits.shape[:2]:
        raise ArgumentError(
            f"logits: expected [batch, tokens, vocabulary] for ids of shape {list(input_ids.shape)}, got "
            f"{list(logits.shape)}; pass those of a causal language model"
        )
    valid = has_successor(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
    values = torch.zeros(input_ids.shape, dtype=_wide(logits[:1, :1]).dtype, device=logits.device)
    for row, (scores, ids) in enumerate(zip(logits, input_ids, strict=True)):  # never a second copy of all logits
        values[row, :-1] = -cross_entropy(_wide(scores[:-1]), ids[1:], reduction="none")
    return values.masked_fill(~valid, 0.0), valid


def has_successor(attention_mask: torch.Tensor) -> torch.Tensor:
    """Bool [batch, tokens]: whether a token and the next one are real, of a mask [batch, tokens] with 0 at padding."""
    real = attention_mask.bool()
    valid = torch.zeros_like(real)
    valid[:, :-1] = real[:, :-1] & real[:, 1:]
    return valid


def mean_log_probability(
    logits: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean log-probability of an example's tokens but the first, [batch]; minus the log of its perplexity.

    Raises:
        ArgumentError: Shapes that do not fit, or an example of a single token, which has nothing to predict.
    """
    values, valid = token_log_probabilities(logits, input_ids, attention_mask)
    counts = valid.sum(1)
    if bool((counts == 0).any()):
        raise ArgumentError(
            f"examples: expected at least two tokens each, got one with {int(counts.min()) + 1} at most; leave it out"
        )
    return values.sum(1) / counts


@dataclass(frozen=True)
class AuxiliaryMetric:
    """A metric by name, with its kind and the source of its values.

    Attributes:
        name: The metric's name; its columns of scores are named after it.
        kind: What its values are.
        compute: Function of logits and labels; None for a column of the data.
        column: Name of the data's column; None for a computed metric.
        of_tokens: Whether it is computed by `token_log_probabilities` from the logits of every token, which only a
            causal language model gives.
    """

    name: str
    kind: Metric
    compute: Values | None = None
    column: str | None = None
    of_tokens: bool = False

    def values(
        self, logits: torch.Tensor, labels: torch.Tensor, columns: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Values [n] of this metric for one batch.

        Args:
            logits: [n, classes].
            labels: int64 [n].
            columns: Name -> values [n] of the data's columns.

        Raises:
            ArgumentError: A function of the user's own that gives something else than [n] values.
        """
        if self.column is not None:
            return (columns or {})[self.column]
        if self.of_tokens:
            raise ArgumentError(
                f"metric {self.name!r}: expected a causal language model, read without a prompt, got a classifier's "
                "logits; leave it out"
            )
        if self.compute is None:
            raise ArgumentError(f"metric {self.name!r}: expected a function or a column, got neither; give it one")
        found = torch.as_tensor(self.compute(logits, labels))
        if found.shape != labels.shape:
            raise ArgumentError(
                f"metric {self.name!r}: expected {len(labels)} values, one per example, got shape "
                f"{list(found.shape)}; the function gets logits [n, classes] and labels [n]"
            )
        return found


def parse_metrics(
    wanted: Sequence[str | Values],
    classes: Sequence[str],
    columns: Mapping[str, Metric] | None = None,
) -> dict[str, AuxiliaryMetric]:
    """The metrics that names, functions and columns stand for, by name.

    Args:
        wanted: Names of `FUNCTIONS`, `token_log_probability`, `module:function`, `column:NAME`, or callables
            (logits, labels) -> values [n]. A function's attribute `metric` says what its values are; without one they
            are `Continuous`.
        classes: Names of the labels.
        columns: Name of each column of the data -> kind of its values.

    Raises:
        ArgumentError: A name that means nothing, a function or column that is not there, or two of one name.
    """
    chosen: dict[str, AuxiliaryMetric] = {}
    for item in wanted:
        made = _one(item, classes, columns or {})
        if made.name in chosen:
            raise ArgumentError(f"metrics: expected different names, got {made.name!r} twice; leave one out")
        chosen[made.name] = made
    if not chosen:
        raise ArgumentError(f"metrics: expected some of {', '.join(FUNCTIONS)}, got none; name at least one")
    return chosen


def check_metric_names(wanted: Sequence[str | Values]) -> None:
    """Raises ArgumentError for a name that means nothing; reads no data and imports no module."""
    for item in wanted:
        if isinstance(item, str) and item not in (*FUNCTIONS, TOKEN_LOG_PROBABILITY):
            module, _, name = item.partition(":")
            if not module or not name:
                raise ArgumentError(
                    f"metric {item!r}: expected one of {', '.join(FUNCTIONS)}, {TOKEN_LOG_PROBABILITY}, "
                    "module:function or column:NAME, got another; check --metrics"
                )


def _one(item: str | Values, classes: Sequence[str], columns: Mapping[str, Metric]) -> AuxiliaryMetric:
    if not isinstance(item, str):
        return _own(getattr(item, "__name__", type(item).__name__), item)
    if item in FUNCTIONS:
        return AuxiliaryMetric(item, _kind(item, classes), FUNCTIONS[item])
    if item == TOKEN_LOG_PROBABILITY:
        return AuxiliaryMetric(item, Continuous(), of_tokens=True)
    if item.startswith(COLUMN):
        name = item.removeprefix(COLUMN)
        if name not in columns:
            raise ArgumentError(
                f"metric {item!r}: expected a column that was read ({', '.join(columns) or 'none was'}), got {name!r}; "
                "check the data's header"
            )
        return AuxiliaryMetric(name, columns[name], column=name)
    check_metric_names([item])
    module, _, function = item.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(
            f"metric {item!r}: expected a function that Python can import, got {type(error).__name__}: {error}; "
            "check the spelling and PYTHONPATH"
        ) from error
    if not callable(found):
        raise ArgumentError(f"metric {item!r}: expected a function, got {type(found).__name__}; name a function")
    return _own(function, found)


def _own(name: str, function: Values) -> AuxiliaryMetric:
    kind = getattr(function, "metric", None) or Continuous()
    if not isinstance(kind, Metric):
        raise ArgumentError(
            f"metric {name!r}: expected Categorical, Binary or Continuous in its attribute `metric`, got "
            f"{type(kind).__name__}; leave it out for Continuous()"
        )
    return AuxiliaryMetric(name, kind, function)


def _kind(name: str, classes: Sequence[str] | int) -> Metric:
    if name == "label":
        return Categorical(classes)
    return Binary() if name == "correct" else Continuous()


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def per_class_mean(values: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Mean over each class's samples: values [..., n] -> float64 [..., n_classes]; NaN for a class without samples."""
    counts = np.bincount(labels, minlength=n_classes)
    rows = values.reshape(int(np.prod(values.shape[:-1])), len(labels)).astype(np.float64)
    sums = np.array([np.bincount(labels, row, n_classes) for row in rows]).reshape(*values.shape[:-1], n_classes)
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / counts, np.nan)


def per_class_accuracy(predictions: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Share of each class's samples that are predicted right: predictions [..., n] -> float64 [..., n_classes]."""
    return per_class_mean(predictions == labels, labels, n_classes)
