"""Where each family of models keeps its output projections: data, not code.

A row is two regular expressions of module paths relative to a block, whose own path ends in its number. Rows hold for
every model that is built so, not for the named ones alone. Cross-attention is in no row: `blocks.3.attn` is
self-attention, and tables tell neurons apart by block, kind and index.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skillfast.vocabulary import Kind


@dataclass(frozen=True)
class Family:
    """How the models of a family name their output projections.

    Attributes:
        name: For people.
        attn: Regular expression of self-attention's output projection, relative to the block: `attn[.]proj`.
        mlp: Path of the MLP's last projection, relative to a block, as a regular expression.
        block: Regular expression that a block's path ends in.
        head: Path of the classifier or the language-model head; None where it is one of `HEADS`.
    """

    name: str
    attn: str
    mlp: str
    block: str = r"\b\d+"
    head: str | None = None

    def patterns(self) -> tuple[tuple[Kind, re.Pattern[str]], ...]:
        """(kind, pattern of the whole path) of each projection; the group `block` is what one block's sites share."""
        parts: tuple[tuple[Kind, str], ...] = (("attn", self.attn), ("mlp", self.mlp))
        return tuple((kind, re.compile(rf"(?P<block>.*?{self.block})\.(?:{part})")) for kind, part in parts)


FAMILIES: tuple[Family, ...] = (
    Family("timm: ViT, DeiT, BEiT, EVA", r"attn\.proj", r"mlp\.fc2"),
    Family("BERT, RoBERTa, ELECTRA, DeBERTa, ViT before transformers 5", r"attention\.output\.dense", r"output\.dense"),
    Family("DistilBERT", r"attention\.out_lin", r"ffn\.lin2"),
    Family("MPNet", r"attention\.attn\.o", r"output\.dense"),
    Family("ModernBERT", r"attn\.Wo", r"mlp\.Wo"),
    Family("GPT-2", r"attn\.c_proj", r"mlp\.c_proj"),
    Family("GPT-Neo", r"attn\.attention\.out_proj", r"mlp\.c_proj"),
    Family("GPT-J", r"attn\.out_proj", r"mlp\.fc_out"),
    Family("GPT-NeoX, Pythia", r"attention\.dense", r"mlp\.dense_4h_to_h", block=r"\blayers\.\d+"),
    Family("BLOOM, Falcon", r"self_attention\.dense", r"mlp\.dense_4h_to_h"),
    Family("Llama, Mistral, Qwen, Gemma, Phi-3", r"self_attn\.o_proj", r"mlp\.down_proj"),
    Family("Phi", r"self_attn\.dense", r"mlp\.fc2"),
    Family("BART", r"self_attn\.out_proj", r"fc2", block=r"\blayers\.\d+"),
    Family("T5", r"layer\.0\.SelfAttention\.o", r"layer\.[12]\.DenseReluDense\.wo"),
    Family("MPT", r"attn\.out_proj", r"ffn\.down_proj"),
    Family("Jamba, Bamba, Llama 4", r"self_attn\.o_proj", r"feed_forward\.down_proj"),
    Family(
        "Qwen3-Next, Qwen3.5, OLMo hybrid: linear attention; shared experts",
        r"linear_attn\.(?:out_proj|o_proj)",
        r"(?:mlp|feed_forward)\.shared_experts?\.down_proj",
    ),
    Family("LFM2", r"self_attn\.out_proj", r"feed_forward\.w2", block=r"\blayers\.\d+"),
    Family("ViT, DeiT, BEiT, DINOv2 of transformers 5", r"attention\.o_proj", r"mlp\.fc2"),
)

HEADS = ("classifier", "classifier.out_proj", "score", "classification_head.out_proj", "embed_out")
"""Paths of classifiers; language-model heads tell themselves."""

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_v_heads")
"""Attributes that say how many query heads a module has."""
HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size")
"""Attributes that say how wide one head is."""

_registered: list[Family] = []


def register_family(family: Family) -> None:
    """Make a family known to this process; it is tried before those that skillfast knows."""
    if family not in _registered:
        _registered.insert(0, family)


def families() -> tuple[Family, ...]:
    """All known families: those registered in this process, then skillfast's own."""
    return (*_registered, *FAMILIES)
