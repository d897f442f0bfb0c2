"""Auxiliary metrics of language models: what each example or token is scored by, as pure functions.

Everything is computed in float32 at least, in nats. A metric of the user's own is a callable, `module:function`, or a
numeric or categorical column of the data (`column:NAME`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from skillfast.errors import ArgumentError
from skillfast.metrics import Binary, Categorical, Continuous, Metric

Values = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [n, classes], labels int64 [n]) -> values [n]."""

COLUMN = "column:"
TOKEN_LOG_PROBABILITY = "token_log_probability"


def label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """The label itself."""
    return labels


def correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether the largest logit is the label's."""
    return logits.argmax(-1) == labels


def confidence(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """The largest softmax probability; needs no labels."""
    return _wide(logits).softmax(-1).amax(-1)


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy."""
    return cross_entropy(_wide(logits), labels, reduction="none")


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The label's logit minus the best of the others; below 0 where the prediction is wrong."""
    own = _wide(logits).gather(-1, labels[:, None])
    others = _wide(logits).scatter(-1, labels[:, None], -torch.inf)
    return own[:, 0] - others.amax(-1)


def entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """Entropy of the softmax distribution; needs no labels."""
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
class Auxiliary:
    """A metric and how its values come about.

    Attributes:
        name: Of its columns of scores.
        kind: What its values are.
        compute: From logits and labels; None for a column of the data.
        column: The data's column; None for a computed metric.
        of_tokens: From the logits of every token, which `token_log_probabilities` takes, not from a classifier's.
    """

    name: str
    kind: Metric
    compute: Values | None = None
    column: str | None = None
    of_tokens: bool = False

    def values(
        self, logits: torch.Tensor, labels: torch.Tensor, columns: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Values [n] of a batch.

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


def choose(
    wanted: Sequence[str | Values],
    classes: Sequence[str],
    columns: Mapping[str, Metric] | None = None,
) -> dict[str, Auxiliary]:
    """The metrics that were asked for, by name.

    Args:
        wanted: Names of `FUNCTIONS`, `token_log_probability`, `module:function`, `column:NAME`, or callables
            (logits, labels) -> values [n]. A function's attribute `metric` says what its values are; without one they
            are `Continuous`.
        classes: Names of the labels.
        columns: The data's columns and what they hold.

    Raises:
        ArgumentError: A name that means nothing, a function or column that is not there, or two of one name.
    """
    chosen: dict[str, Auxiliary] = {}
    for item in wanted:
        made = _one(item, classes, columns or {})
        if made.name in chosen:
            raise ArgumentError(f"metrics: expected different names, got {made.name!r} twice; leave one out")
        chosen[made.name] = made
    if not chosen:
        raise ArgumentError(f"metrics: expected some of {', '.join(FUNCTIONS)}, got none; name at least one")
    return chosen


def check_names(wanted: Sequence[str | Values]) -> None:
    """Raises ArgumentError for a name that means nothing, before any data are read for it."""
    for item in wanted:
        if isinstance(item, str) and item not in (*FUNCTIONS, TOKEN_LOG_PROBABILITY):
            module, _, name = item.partition(":")
            if not module or not name:
                raise ArgumentError(
                    f"metric {item!r}: expected one of {', '.join(FUNCTIONS)}, {TOKEN_LOG_PROBABILITY}, "
                    "module:function or column:NAME, got another; check --metrics"
                )


def _one(item: str | Values, classes: Sequence[str], columns: Mapping[str, Metric]) -> Auxiliary:
    if not isinstance(item, str):
        return _own(getattr(item, "__name__", type(item).__name__), item)
    if item in FUNCTIONS:
        kind: Metric = Binary() if item == "correct" else Continuous()
        return Auxiliary(item, Categorical(classes) if item == "label" else kind, FUNCTIONS[item])
    if item == TOKEN_LOG_PROBABILITY:
        return Auxiliary(item, Continuous(), of_tokens=True)
    if item.startswith(COLUMN):
        name = item.removeprefix(COLUMN)
        if name not in columns:
            raise ArgumentError(
                f"metric {item!r}: expected a column that was read ({', '.join(columns) or 'none was'}), got {name!r}; "
                "check the data's header"
            )
        return Auxiliary(name, columns[name], column=name)
    check_names([item])
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


def _own(name: str, function: Values) -> Auxiliary:
    kind = getattr(function, "metric", None) or Continuous()
    if not isinstance(kind, Metric):
        raise ArgumentError(
            f"metric {name!r}: expected Categorical, Binary or Continuous in its attribute `metric`, got "
            f"{type(kind).__name__}; leave it out for Continuous()"
        )
    return Auxiliary(name, kind, function)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
