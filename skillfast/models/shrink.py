"""Small copies of models of the transformers library, from their configuration: every type of layer, small widths."""

from __future__ import annotations

import copy
import inspect
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ModelError
from skillfast.models.towers import with_towers
from skillfast.models.weights import first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYERS = 4  # kept at least, where the model has as many
HIDDEN, INNER, HEADS, HEAD_WIDTH, VOCABULARY, EXPERTS = 64, 96, 4, 16, 256, 4
EXAMPLES, TOKENS, ENCODED = 4, 32, 5  # of the inputs that are made: many tokens, so that every expert is reached
IMAGE = 64  # height and width at most of a model in stages, and of one whose configuration has none
MOST_WEIGHTS = 100_000_000  # of a copy

_LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_encoder_layers", "depth", "num_blocks",
)  # fmt: skip
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim"), HIDDEN),
    **dict.fromkeys(
        (
            "intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim",
            "moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
            "ffn_hidden_size", "shared_intermediate_size", "expert_ffn_hidden_size", "intermediate_size_mlp",
            "dense_intermediate_size", "expert_intermediate_size", "shared_expert_size", "lru_width", "dim_ff", "dff",
            "block_ff_dim", "mlp_dim",
        ),
        INNER,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
            "decoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "v_head_dim", "kv_channels"), HEAD_WIDTH),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "entity_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"), EXPERTS
    ),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_topk", "moe_k", "num_selected_experts"), 2),
    "zero_expert_num": 2,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 16),
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "word_embed_proj_dim": HIDDEN, "rotary_dim": 8,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8,
    "mamba_d_state": 8, "state_size": 8, "mamba_dt_rank": 8, "time_step_rank": 8, "mamba_d_ssm": 128,
    "linear_num_heads": 4, "linear_head_dim": 16, "qk_head_dim": 32, "chunk_size": 16, "mamba_chunk_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "hidden_size_per_layer_input": 8, "mamba_n_groups": 1, "n_groups": 1, "embedding_size": HIDDEN,
    "embedding_dim": HIDDEN, "num_kv_shared_layers": 1, "cross_attention_hidden_size": HIDDEN,
    "encoder_hidden_size": HIDDEN, "max_source_positions": 24, "mm_tokens_per_image": 1,
    "pixel_shuffle_factor": 2, "output_dim": HIDDEN,
}  # fmt: skip
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")
_STAGES: dict[str, int] = {  # lists with a number for each stage of a vision model
    **dict.fromkeys(("hidden_sizes", "embed_dims", "neck_hidden_sizes"), 32),
    **dict.fromkeys(("depths", "num_layers", "depth", "blocks_per_stage"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "heads", "num_attention_heads_per_stage"), 2),
}
_STATE_HEADS = (
    ("num_heads", "head_dim"), ("mamba_n_heads", "mamba_d_head"), ("n_mamba_heads", "mamba_headdim"),
    ("mamba_num_heads", "mamba_head_dim"),
)  # fmt: skip
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "multi_query_group_num")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
_HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_PLACES = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")  # of images and sound
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id", "cls_token_id")


def is_configured(model: torch.nn.Module) -> bool:
    """Whether the model is one of the transformers library, which its configuration describes."""
    return hasattr(getattr(model, "config", None), "model_type")


def shrunk(model: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A small copy of a model of the transformers library, which may be on `meta`; see `small_model`."""
    return small_model(type(model), model.config)


def small_model(model_class: Any, config: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A small model of the transformers library, and inputs for it.

    Args:
        model_class: The model's class.
        config: The configuration of one of any size.

    Returns:
        The model, in evaluation mode, float32, on the CPU, with weights that its constructor made; and random inputs.

    Raises:
        ModelError: No small copy can be made of its configuration.
    """
    reasons = []
    for narrow in (True, False):
        small = _small(config, narrow)
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in _made(model_class, copy.deepcopy(small)).parameters())
            if size > MOST_WEIGHTS:
                reasons.append(f"one of {size:,} weights")
                continue
            made = _made(model_class, small).float().eval()
            inputs = random_inputs(made)
            with torch.no_grad():
                made(**inputs)
        except Exception as error:  # of whatever the constructor and the forward check
            reasons.append(first_line(error))
            continue
        return made, inputs
    raise ModelError(
        f"{model_class.__name__}: expected a configuration that a small copy can be made of, got {'; '.join(reasons)}; "
        "pass batch=, what the model takes"
    )


def _made(model_class: Any, config: Any) -> Any:
    generator_state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        return model_class(config)
    finally:
        torch.random.set_rng_state(generator_state)


def _small(config: Any, narrow: bool) -> Any:
    """A copy of the configuration with fewer layers, and narrower ones."""
    made = copy.deepcopy(config)
    for part in _parts(made):
        _fewer_layers(part)
        if narrow:
            _narrow(part)
        if hasattr(part, "use_cache"):
            part.use_cache = False  # no layer's keys are an output, nor is a state changed in place
        if isinstance(languages := _get(part, "languages"), list | tuple) and hasattr(part, "default_language"):
            part.default_language = part.default_language or languages[0]
        for name in _PLACES:
            if hasattr(part, name) and (_get(part, name) or VOCABULARY) >= VOCABULARY:
                _set(part, name, VOCABULARY - 1)
        if hasattr(part, "vocab_size"):
            for name in _TOKENS:
                if isinstance(value := getattr(part, name, None), int) and value >= VOCABULARY:
                    setattr(part, name, VOCABULARY - 1)
            part.vocab_size = min(part.vocab_size, VOCABULARY)
    made._attn_implementation = "eager"
    return made


def _parts(config: Any) -> Iterator[Any]:
    """The configuration and those inside it."""
    yield config
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "model_type"):
            yield from _parts(part)


def _fewer_layers(config: Any) -> None:
    """The first layers, as many as show every type that the configuration's lists name."""
    names = {config.attribute_map.get(name, name) for name in _LAYER_COUNTS if _is_count(config, name)}
    for name in names:
        count = getattr(config, name)
        lists = {
            key: value
            for key, value in vars(config).items()
            if isinstance(value, list | tuple | str) and len(value) == count and key != "name_or_path"
        }
        kept = min(count, LAYERS)
        for value in lists.values():
            numbered = list(value) == list(range(count))  # the layers themselves, no types of them
            if not numbered and not any(isinstance(item, list | dict) for item in value):
                kept = max(kept, max(_met(list(value), item) for item in set(value)) + 1)
        kept = max(kept, min(count, _period(config)))
        for key, value in lists.items():
            _set(config, key, value[:kept])
        for key, value in vars(config).items():
            if key.endswith(("_layer_ids", "_layer_indices")) and isinstance(value, list):
                _set(config, key, [layer for layer in value if layer < kept])
            elif key.endswith("_indexes") and isinstance(value, list | tuple) and value and min(value) >= kept:
                _set(config, key, list(range(kept))[1::2])  # some layers are of their kind, as in the model
        if getattr(config, name) != kept:
            _set(config, name, kept)
            _fewer_stages(config, count, kept)


def _fewer_stages(config: Any, count: int, kept: int) -> None:
    """A backbone whose stages are its layers gives the last one of those that are kept."""
    if isinstance(stages := _get(config, "stage_names"), list) and len(stages) == count + 1:
        _set(config, "stage_names", stages[: kept + 1])
        _set(config, "_out_features", [stages[kept]])
        _set(config, "_out_indices", [kept])


def _met(types: list[Any], item: Any) -> int:
    """Place of the first layer of a type; of the second where layers share a block."""
    first = types.index(item)
    return types.index(item, first + 1) if item == "hybrid" and types.count(item) > 1 else first


def _period(config: Any) -> int:
    """How many layers a pattern takes that numbers tell."""
    periods = [v for k, v in vars(config).items() if k.endswith(("_period", "_interval", "_step", "_freq", "_pattern"))]
    return max([v for v in periods if isinstance(v, int) and 0 < v < 33], default=1)


def _narrow(config: Any) -> None:
    heads = next((v for n in _HEAD_COUNTS if isinstance(v := _get(config, n), int)), None)
    for name in _KEY_HEADS:
        if isinstance(value := _get(config, name), int) and heads is not None:
            _set(config, name, HEADS if value == heads else 1 if value == 1 else 2)
    attention, hidden = (_get(config, name) for name in ("attention_hidden_size", "hidden_size"))
    rotated, of_head = (_get(config, name) for name in ("qk_rope_head_dim", "head_dim"))
    for name, size in _SIZES.items():
        if _is_count(config, name):
            _set(config, name, min(size, getattr(config, name)))
    if (
        isinstance(rotated, int) and isinstance(of_head, int) and of_head > rotated
    ):  # the share of a head that is turned
        _set(config, "qk_rope_head_dim", max(2, config.head_dim * rotated // of_head))
    if isinstance(attention, int) and isinstance(hidden, int):
        _set(config, "attention_hidden_size", max(1, attention // hidden) * config.hidden_size)
        if _is_count(config, "attention_head_dim"):
            _set(config, "attention_head_dim", config.attention_hidden_size // HEADS)
    for name, size in _STAGES.items():
        if isinstance(value := _get(config, name), list | tuple) and all(isinstance(item, int) for item in value):
            _set(config, name, [min(size, item) for item in value])
    patch = _get(config, "patch_size")
    size = _get(config, "image_size")
    staged = hasattr(config, "depths") or hasattr(config, "blocks_per_stage")
    if _get(config, "global_attention_blocks"):  # the first of a stage has windows
        _set(config, "global_attention_blocks", [sum(config.blocks_per_stage) - 1])
    if (widths := _get(config, "embed_dim_per_stage")) is not None:  # a stage is pooled where its width changes
        _set(config, "embed_dim_per_stage", [HIDDEN << i for i in range(len(widths))])
    if staged and _is_count(config, "window_size"):
        _set(config, "window_size", 2)  # the last of four stages is no wider
    if size is not None and (staged or isinstance(patch, int)):
        side = IMAGE if staged else 2 * patch
        _set(config, "image_size", min(side, size) if isinstance(size, int) else [min(side, one) for one in size])
    expand = next((v for n in ("mamba_expand", "expand") if isinstance(v := _get(config, n), int)), None)
    for count, width in _STATE_HEADS:
        if expand is not None and _is_count(config, count) and _is_count(config, width):
            inner = _get(config, "mamba_d_ssm") or expand * config.hidden_size
            _set(config, width, inner // getattr(config, count))


def _get(config: Any, name: str) -> Any:
    """A setting; None where the configuration lacks it, or has another one for every layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # what differs between layers is no AttributeError to transformers
        return None


def _set(config: Any, name: str, value: Any) -> None:
    """Set what can be set; what follows from other settings follows them."""
    with suppress(AttributeError, NotImplementedError):
        setattr(config, name, value)


def _is_count(config: Any, name: str) -> bool:
    value = _get(config, name)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def image_shape(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model takes, as its configuration tells."""
    vision = next((p for p in _parts(model.config) if hasattr(p, "image_size")), model.config)
    size = _get(vision, "image_size") or IMAGE
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(vision, "num_channels", 3), height, width


def random_inputs(model: Any) -> dict[str, Any]:
    """Random inputs of the kind that the model takes first: tokens, images, or their patches with places.

    Raises:
        ModelError: A model whose main input is none of these.
    """
    generator = torch.Generator().manual_seed(2)
    config, main = model.config, model.main_input_name
    takes = inspect.signature(model.forward).parameters
    if "input_ids" not in takes and ("grid_thw" in takes or "pixel_position_ids" in takes):
        return _patches(config, "grid_thw" in takes, generator)
    if main == "pixel_values" and "spatial_shapes" in takes:  # patches of images of any size, which are told
        vision = next((p for p in _parts(config) if hasattr(p, "patch_size")), config)
        pixels = torch.randn(2, 4, vision.num_channels * vision.patch_size**2, generator=generator)
        shapes = torch.tensor([[2, 2]] * 2)
        return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(2, 4).long(), "spatial_shapes": shapes}
    if main == "pixel_values":
        channels, height, width = image_shape(model)
        images = {"pixel_values": torch.randn(2, channels, height, width, generator=generator)}
        if "noise" in takes:  # of a masked autoencoder, which else draws its patches anew in every forward
            patches = (height // config.patch_size) * (width // config.patch_size)
            images["noise"] = torch.rand(2, patches, generator=generator)
        return images
    if main not in ("input_ids", "decoder_input_ids"):
        raise ModelError(f"{type(model).__name__}: expected one that takes tokens or images, got one for {main}")
    text = next((p for p in _parts(config) if hasattr(p, "vocab_size")), config)
    most = min([v for name in _POSITIONS if isinstance(v := _get(text, name), int) and v > 4], default=TOKENS)
    ids = torch.randint(4, text.vocab_size - 1, (EXAMPLES, min(TOKENS, most - 2)), generator=generator)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "global_attention_mask" in takes:  # else the projections of tokens that attend to all have nothing to do
        inputs["global_attention_mask"] = (torch.arange(ids.shape[1]) % 8 == 0).long().expand(EXAMPLES, -1)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = ids.flip(1)
    elif "encoder_hidden_states" in takes and any(_attends_across(path) for path, _ in model.named_modules()):
        width = next(size for part in (config, text) for name in _WIDTHS if isinstance(size := _get(part, name), int))
        inputs["encoder_hidden_states"] = torch.randn(EXAMPLES, ENCODED, width, generator=generator)
    elif "encoder_outputs" in takes and "encoder_attn" in {
        path.rpartition(".")[2] for path, _ in model.named_modules()
    }:
        inputs["encoder_outputs"] = (torch.randn(EXAMPLES, ENCODED, config.d_model, generator=generator),)
    if "cross_attention_states" in takes:  # what a tower made of an image, for a decoder alone
        inputs["cross_attention_states"] = torch.randn(EXAMPLES, ENCODED, config.hidden_size, generator=generator)
    if "entity_ids" in takes:  # of LUKE, whose queries between words and entities have nothing to do else
        inputs["entity_ids"] = torch.randint(1, config.entity_vocab_size, (EXAMPLES, ENCODED), generator=generator)
        inputs["entity_position_ids"] = torch.arange(ENCODED).view(1, -1, 1).expand(EXAMPLES, -1, -1)
        inputs["entity_attention_mask"] = torch.ones(EXAMPLES, ENCODED).long()
    if {"pixel_values", "input_features", "input_values"} & takes.keys() and max(image_shape(model)[1:]) <= 4 * IMAGE:
        return with_towers(model, inputs, [*_parts(config)], image_shape(model), generator) or inputs
    return inputs


def _patches(config: Any, joined: bool, generator: torch.Generator) -> dict[str, Any]:
    """Two images as patches, as a tower of a language model takes them: of all images in one sequence if joined."""
    if joined:
        side = 2 * config.spatial_merge_size
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        rows = torch.randn(2 * side**2, width, generator=generator)
        return {"hidden_states": rows, "grid_thw": torch.tensor([[1, side, side]] * 2)}
    side = config.pooling_kernel_size
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(2, -1, -1)
    pixels = torch.rand(2, side**2, 3 * config.patch_size**2, generator=generator)
    return {"pixel_values": pixels, "pixel_position_ids": places}


def _attends_across(path: str) -> bool:
    """Whether a decoder's module attends to what an encoder gives, which a decoder alone must be given."""
    return path.rpartition(".")[2] in ("encoder_attn", "cross_attn", "crossattention")
