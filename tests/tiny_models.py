"""Tiny language models with tokenizers, saved in folders as the hub has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

WORDS = [
    "a", "b", "bad", "boring", "bright", "c", "cold", "dull", "film", "fine", "fun", "good", "great", "is", "it",
    "long", "movie", "of", "plot", "sad", "short", "slow", "story", "the", "this", "warm", "was", "with", "worst",
]  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SIZES = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 32, "vocab_size": len(WORDS) + len(SPECIAL), "pad_token_id": 0,
    "num_key_value_heads": 2,
}  # fmt: skip
GPT = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": SIZES["vocab_size"], "pad_token_id": 0}
SEQ2SEQ = {
    "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": SIZES["vocab_size"],
    "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0,
}  # fmt: skip


def make_tokenizer(pad: bool = True, special: bool = True, **more: object):
    """A tokenizer of whole words; `special` puts [CLS] and [SEP] around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **names, **({"pad_token": "[PAD]"} if pad else {}), **more
    )


def save_model(
    folder: Path, model_class: str = "BertForSequenceClassification", tokenizer: object = None, **settings: object
) -> Path:
    """Save a random model and its tokenizer."""
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, model_class)
    sizes = GPT if model_class.startswith("GPT2") else SEQ2SEQ if model_class.startswith("T5") else SIZES
    model = made(made.config_class(**{**sizes, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder
