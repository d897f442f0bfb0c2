"""A causal language model whose next-token predictions at every token are looked at, not one class per text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ModelError
from skillfast.models.sites import module_device
from skillfast.models.text_classifier import TextClassifier

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from skillfast.models.huggingface import LanguageModel

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
        if not _is_causal(loaded.model):
            raise ModelError(
                f"model '{loaded.name}': expected a causal language model, whose logits depend on earlier tokens "
                f"alone, got {type(loaded.model).__name__}, which reads later ones; use a decoder"
            )

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits [batch, tokens, vocabulary] of a tokenised batch, padded on either side."""
        return self.language_model(**self.inputs(batch), use_cache=False).logits


def _is_causal(model: Any) -> bool:
    """Whether another last token leaves the logits before it as they are."""
    device = module_device(model.get_input_embeddings())
    ids = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 3]], device=device)
    with torch.inference_mode():
        one, other = model(input_ids=ids).logits[:, :-1].float()
    return bool((one - other).abs().max() <= TOLERANCE * one.abs().max())
