"""A causal language model whose next-token predictions are looked at, not one class per text, and its `forward`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ArgumentError, ModelError
from skillfast.metrics import (
    COLUMN,
    TOKEN_LOG_PROBABILITY,
    has_successor,
    mean_log_probability,
    token_log_probabilities,
)
from skillfast.models.sites import module_device
from skillfast.models.text_classifier import TextClassifier

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from skillfast.metrics import AuxiliaryMetric, Metric
    from skillfast.models.huggingface import LanguageModel
    from skillfast.models.text_inputs import Batch

TOLERANCE = 1e-2  # of the largest logit: what half precision leaves between equal prefixes


class CausalModel(TextClassifier):
    """A causal language model without classes: its logits are those of every token.

    Args:
        loaded: With task `"causal"`.

    Raises:
        ModelError: A model whose logits at a token depend on later tokens, such as BERT's: it has seen what it shall
            predict.
    """

    skillfast_architecture = TextClassifier.__name__  # the same neurons, asked without a prompt

    def __init__(self, loaded: LanguageModel) -> None:
        super().__init__(loaded, 0)
        if not is_causal(loaded.model):
            raise ModelError(
                f"model '{loaded.name}': expected a causal language model, whose logits depend on earlier tokens "
                f"alone, got {type(loaded.model).__name__}, which reads later ones; use a decoder"
            )

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits [batch, tokens, vocabulary] of a tokenised batch, padded on either side."""
        return self.language_model(**self.inputs(batch), use_cache=False).logits


def is_causal(model: Any) -> bool:
    """Whether another last token leaves a language model's logits before it as they are."""
    device = module_device(model.get_input_embeddings())
    ids = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 3]], device=device)
    with torch.inference_mode():
        one, other = model(input_ids=ids).logits[:, :-1].float()
    return bool((one - other).abs().max() <= TOLERANCE * one.abs().max())


class CausalForward:
    """The `forward` of `trace` for batches of text and a `CausalModel`.

    Args:
        metrics: From `parse_metrics`: `token_log_probability`, and beside it the label or columns of the data.
        tokens: Each token is an observation: position t's activations go with the log-probability of token t + 1, and
            padding and last tokens, which `mask` leaves out, with none. Otherwise each text is one: its mean
            log-probability. Values per token are known after the forward alone, so `trace` runs each batch twice.

    Raises:
        ArgumentError: A metric of a classifier's logits.
    """

    def __init__(self, metrics: Mapping[str, AuxiliaryMetric], *, tokens: bool) -> None:
        for name, metric in metrics.items():
            if not metric.of_tokens and metric.column is None and name != "label":
                raise ArgumentError(
                    f"metric {name!r}: expected {TOKEN_LOG_PROBABILITY}, label or {COLUMN}NAME of a causal language "
                    "model without a prompt, got one of a classifier's logits; trace it in a run of its own, with "
                    "--prompt and --label-words"
                )
        self.metrics = dict(metrics)
        self.tokens = tokens

    @property
    def kinds(self) -> dict[str, Metric]:
        """What the metrics' values are, for `Tracer` and `trace`."""
        return {name: metric.kind for name, metric in self.metrics.items()}

    def mask(self, batch: Batch) -> torch.Tensor:
        """[batch, tokens]: which tokens are observations, or are pooled into one."""
        mask: torch.Tensor = batch["attention_mask"]
        return has_successor(mask) if self.tokens else mask

    def __call__(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Logits [batch, tokens, vocabulary], and values [batch, tokens] or [batch] of each metric."""
        logits: torch.Tensor = model.logits(batch)  # type: ignore[operator]
        ids, mask = (batch[name].to(logits.device) for name in ("input_ids", "attention_mask"))
        values: dict[str, Any] = {}
        for name, metric in self.metrics.items():
            if metric.column is not None:
                values[name] = batch["columns"][metric.column]
            elif not metric.of_tokens:
                values[name] = batch["labels"]
            elif self.tokens:
                values[name] = token_log_probabilities(logits, ids, mask)[0]
            else:
                values[name] = mean_log_probability(logits, ids, mask)
        return logits, values
