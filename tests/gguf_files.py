"""Tiny GGUF files, written as llama.cpp converts models: a Llama and an LFM2."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
WORDS = ["good", "bad", "film", "plot", "slow"]
LETTERS = ["▁", *string.ascii_lowercase]
PIECES = [f"▁{word[:end]}" for word in WORDS for end in range(1, len(word) + 1)]
TOKENS = list(dict.fromkeys([*SPECIAL, *LETTERS, *PIECES]))
CONTROL, NORMAL = 3, 1  # types of tokens
SIZES = {
    "vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
LLAMA = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}  # fmt: skip
LFM2 = {
    "model.embed_tokens": "token_embd", "model.embedding_norm": "token_embd_norm", "lm_head": "output",
    "operator_norm": "attn_norm", "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output", "self_attn.q_layernorm": "attn_q_norm", "self_attn.k_layernorm": "attn_k_norm",
    "conv.in_proj": "shortconv.in_proj", "conv.out_proj": "shortconv.out_proj", "conv.conv": "shortconv.conv",
}  # fmt: skip


def tiny_model(architecture: str) -> torch.nn.Module:
    """A random model of a GGUF architecture."""
    import transformers

    torch.manual_seed(0)
    if architecture == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    else:
        kinds = ["conv", "full_attention", "conv"]
        config = transformers.Lfm2Config(
            **SIZES, layer_types=kinds, block_auto_adjust_ff_dim=False, conv_L_cache=3, conv_bias=False
        )
        model = transformers.Lfm2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.eval()


def write_gguf(path: Path, architecture: str = "llama") -> torch.nn.Module:
    """Write a random model, its matrices in blocks of 8 bits; return it with the weights that the blocks hold."""
    import gguf

    model, names = tiny_model(architecture), LLAMA if architecture == "llama" else LFM2
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"] if architecture == "llama" else [0, 2, 0])
    writer.add_layer_norm_rms_eps(1e-5 if architecture == "lfm2" else 1e-6)
    writer.add_rope_freq_base(1e4 if architecture == "llama" else 1e6)
    writer.add_vocab_size(len(TOKENS))
    if architecture == "lfm2":
        writer.add_shortconv_l_cache(3)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(i) for i in range(len(TOKENS))])
    writer.add_token_types([CONTROL if token in SPECIAL else NORMAL for token in TOKENS])
    for add, token in zip(
        (writer.add_unk_token_id, writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id),
        range(4),
        strict=True,
    ):
        add(token)
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        block, _, inner = (
            module.removeprefix("model.layers.").partition(".") if ".layers." in name else ("", "", module)
        )
        values = parameter.detach().numpy()
        if inner in ("self_attn.q_proj", "self_attn.k_proj") and architecture == "llama":
            heads = SIZES["num_attention_heads" if inner == "self_attn.q_proj" else "num_key_value_heads"]
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        stored = names[inner] if not block else f"blk.{block}.{names[inner]}"
        if parameter.dim() == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{stored}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            held = gguf.quants.dequantize(
                gguf.quants.quantize(parameter.detach().numpy(), gguf.GGMLQuantizationType.Q8_0),
                gguf.GGMLQuantizationType.Q8_0,
            )
            parameter.data.copy_(torch.from_numpy(held))
        else:
            writer.add_tensor(f"{stored}.weight", values.squeeze() if values.ndim == 3 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
