"""A language model as the classifier that the rest of the package knows: a tensor in, logits over the classes out."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from skillfast.models.huggingface import is_head
from skillfast.models.sites import find_sites, module_device

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from skillfast.models.huggingface import LanguageModel
    from skillfast.models.soft_prompt import SoftPrompt

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_OWN_POSITIONS = "create_position_ids_from_input_ids"  # RoBERTa and MPNet find positions from the ids themselves


class TextClassifier(nn.Module):
    """A language model whose forward takes tokenised text packed into one tensor and gives logits.

    Args:
        loaded: The model.
        n_classes: How many classes.
        words: int64 [classes]: for a model that predicts tokens, the tokens whose logits at the last real token are the
            classes'; None for a model with a classification head. The neurons of the head are then those at that token.

    Attributes:
        language_model: The model itself; its sites are this module's.
        num_classes: How many classes.
        num_features: Width of the classifier's input.
        soft_prompt: What stands before every text that brings its virtual tokens; None where none does.
    """

    words: Tensor | None
    virtual: Tensor | None  # the soft prompt's embeddings, where the model is

    def __init__(self, loaded: LanguageModel, n_classes: int, words: Tensor | None = None) -> None:
        super().__init__()
        self.language_model = loaded.model
        self.num_classes = n_classes
        self.register_buffer("words", words, persistent=False)
        sites = find_sites(loaded.model)
        self._head = next((site.path for site in sites if site.kind == "head"), None)
        self._blocks = next((site.path for site in sites if site.kind == "mlp"), "")
        self.num_features = next((site.width for site in sites if site.kind == "head"), 0)
        self._takes = set(inspect.signature(loaded.model.forward).parameters)
        if any(hasattr(module, _OWN_POSITIONS) for module in loaded.model.modules()):
            self._takes.discard("position_ids")
        self._pad: int = loaded.tokenizer.pad_token_id
        self.soft_prompt: SoftPrompt | None = None
        self.register_buffer("virtual", None, persistent=False)
        self._last: Tensor | None = None  # while the language model runs
        head = self.get_classifier()
        if words is not None and head is not None:  # before any hook that reads or changes the head's neurons
            head.register_forward_pre_hook(self._only_last)
        self.train(loaded.model.training)

    def get_classifier(self) -> nn.Module | None:
        """The classifier or the language-model head, as timm's models tell theirs."""
        return None if self._head is None else self.language_model.get_submodule(self._head)

    def head_parameters(self) -> list[nn.Parameter]:
        """What stands on top of the pretrained base: the classifier and, where there is one, the pooler before it."""
        named = self.language_model.named_parameters()
        return [parameter for name, parameter in named if is_head(self.language_model, name)]

    @property
    def blocks(self) -> nn.Module | None:
        """The list of blocks, as timm's models have it."""
        parts = self._blocks.split(".")
        owners = [self.language_model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts))]
        return next((owner for owner in owners if isinstance(owner, nn.ModuleList)), None)

    def set_soft_prompt(self, prompt: SoftPrompt) -> None:
        """Put a prompt of the model's width in the place of virtual tokens."""
        self.soft_prompt = prompt
        self.virtual = prompt.embeddings.to(module_device(self.language_model.get_input_embeddings()))  # type: ignore[operator]

    def observed(self, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Bool [batch, tokens] of a batch, packed or not: which tokens are the text's, neither padding nor virtual."""
        batch = inputs if not isinstance(inputs, torch.Tensor) else dict(zip(INPUTS, inputs.unbind(1), strict=False))
        return (batch["attention_mask"] != 0) & (batch["input_ids"] < first_virtual(self.language_model))

    @staticmethod
    def pack(batch: Mapping[str, Tensor]) -> Tensor:
        """One tensor int64 [batch, inputs, tokens] of a tokenised batch's `INPUTS`, the last one only where it is."""
        return torch.stack([batch[name] for name in INPUTS if name in batch], dim=1)

    @staticmethod
    def trim(packed: Tensor) -> Tensor:
        """A packed batch without the tokens at either end that are padding in every text."""
        real = packed[:, 1].any(0).nonzero()
        return packed if not len(real) else packed[..., int(real.min()) : int(real.max()) + 1]

    @staticmethod
    def token_mask(packed: Tensor) -> Tensor:
        """Bool [batch, tokens] of a packed batch: which tokens are real."""
        return packed[:, 1].bool()

    def forward(self, packed: Tensor) -> Tensor:
        """Logits [batch, classes] of packed text, padded on either side."""
        return self.logits(dict(zip(INPUTS, packed.unbind(1), strict=False)))

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits [batch, classes] of a tokenised batch with `input_ids` and `attention_mask` [batch, tokens]."""
        inputs = self.inputs(batch)
        if self.words is None:
            return self.language_model(**inputs).logits
        mask = inputs["attention_mask"]
        self._last = last_real(mask)
        try:
            logits = self.language_model(**inputs, use_cache=False).logits  # [batch, vocabulary]
        finally:
            self._last = None
        return logits[:, self.words.to(logits.device)]

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The language model's arguments, [batch, tokens] each, where its embeddings are.

        Where there is a soft prompt, embeddings [batch, tokens, width] take the place of the ids.
        """
        device = module_device(self.language_model.get_input_embeddings())  # type: ignore[operator]
        inputs = {name: batch[name].to(device) for name in INPUTS if name in batch and name in self._takes}
        mask = inputs["attention_mask"]
        # heads of decoders look for the last token that is not this one
        inputs["input_ids"] = inputs["input_ids"].masked_fill(mask == 0, self._pad)
        if "position_ids" in self._takes:  # else a text padded on the left would begin at another position
            inputs["position_ids"] = positions(mask)
        if self.virtual is not None:
            inputs["inputs_embeds"] = embedded(self.language_model, inputs.pop("input_ids"), self.virtual)
        return inputs

    def _only_last(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The head's input at the last real token, [batch, D]: the other tokens' logits are never made."""
        hidden = args[0]
        if self._last is None or hidden.dim() != 3:
            return None
        last = self._last.to(hidden.device)
        return (hidden[torch.arange(len(last), device=hidden.device), last], *args[1:])


def first_virtual(model: nn.Module) -> int:
    """Id of the first virtual token of a soft prompt: they come after a language model's vocabulary."""
    count: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return count


def embedded(model: nn.Module, ids: Tensor, virtual: Tensor) -> Tensor:
    """Embeddings [batch, tokens, width] of ids [batch, tokens] as the model's own, and of virtual ones as given.

    Args:
        model: A language model.
        ids: int64; `first_virtual(model)` and above are rows of `virtual`.
        virtual: [virtual tokens, width], in any floating-point type.
    """
    place = ids - first_virtual(model)
    own: Tensor = model.get_input_embeddings()(ids.masked_fill(place >= 0, 0))  # type: ignore[operator]
    return torch.where((place >= 0)[..., None], virtual.to(own)[place.clamp(min=0)], own)


def positions(mask: Tensor) -> Tensor:
    """Positions [batch, tokens] that count real tokens alone, by a mask of 1 and 0."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def last_real(mask: Tensor) -> Tensor:
    """int64 [batch], place of the last real token by a mask [batch, tokens], whichever side the padding is on."""
    return (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(1)


def accepts(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The names among those given that a model's forward takes."""
    takes = inspect.signature(model.forward).parameters
    return [name for name in names if name in takes]
