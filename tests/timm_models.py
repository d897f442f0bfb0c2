"""A small model of every family of timm with attention: name -> (a model or class of it, its settings, image size)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.models import metaformer, mvitv2

if TYPE_CHECKING:
    from torch import nn

TIMM: dict[str, tuple[str, dict[str, Any], int]] = {
    "beit": ("beit_base_patch16_224", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}, 32),
    "cait": ("cait_xxs24_224", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}, 32),
    "coat": (
        "coat:CoaT",
        {
            "img_size": 64,
            "patch_size": 4,
            "embed_dims": (16, 16, 24, 24),
            "serial_depths": (1, 1, 1, 1),
            "num_heads": 8,
            "crpe_window": {3: 2, 5: 3, 7: 3},
        },
        64,
    ),
    "convit": (
        "convit_tiny",
        {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2, "local_up_to_layer": 2},
        32,
    ),
    "crossvit": (
        "crossvit:CrossVit",
        {
            "img_size": 48,
            "img_scale": (1.0, 32 / 48),
            "patch_size": (12, 16),
            "embed_dim": (16, 24),
            "depth": ((1, 2, 0),) * 2,
            "num_heads": (2, 2),
            "mlp_ratio": (2, 2, 1),
        },
        48,
    ),
    "csatv2": ("csatv2", {"dims": (16, 16, 24, 32), "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)}, 64),
    "davit": ("davit_tiny", {"embed_dims": (16, 24, 32, 32), "num_heads": (2, 2, 2, 2), "depths": (1, 1, 1, 1)}, 64),
    "deepseek_vit": ("deepseek_vit_412m", {"img_size": 42, "embed_dim": 32, "depth": 2, "num_heads": 2}, 42),
    "deit": ("deit_tiny_distilled_patch16_224", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}, 32),
    "edgenext": ("edgenext_xx_small", {"dims": (16, 16, 24, 32), "depths": (1, 2, 2, 2), "heads": (2, 2, 2, 2)}, 64),
    "efficientformer": ("efficientformer_l1", {"depths": (1, 1, 1, 2), "embed_dims": (16, 16, 24, 32)}, 224),
    "efficientformer_v2": (
        "efficientformerv2_s0",
        {"img_size": 64, "depths": (1, 1, 2, 2), "embed_dims": (16, 16, 24, 32)},
        64,
    ),
    "efficientvit_mit": (
        "efficientvit_b0",
        {"widths": (8, 8, 16, 32, 32), "depths": (1, 1, 1, 2, 2), "head_dim": 8, "head_widths": (32, 32)},
        64,
    ),
    "efficientvit_msra": (
        "efficientvit_m0",
        {"img_size": 128, "embed_dim": (16, 32, 32), "key_dim": (4, 4, 4), "num_heads": (2, 2, 2), "depth": (1, 1, 1)},
        128,
    ),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 28, "embed_dim": 24, "depth": 2, "num_heads": 2}, 28),
    "fastvit": ("fastvit_sa12", {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)}, 64),
    "gcvit": (
        "gcvit:GlobalContextVit",
        {
            "img_size": 64,
            "embed_dim": 8,
            "depths": (2, 2, 2, 2),
            "num_heads": (1, 1, 2, 2),
            "window_size": (2, 2, 2, 2),
        },
        64,
    ),
    "gemma4_vit": (
        "gemma4_vit_167m",
        {"img_size": 96, "embed_dim": 32, "depth": 2, "num_heads": 2, "head_dim": 16, "intermediate_size": 48},
        96,
    ),
    "hiera": ("hiera_tiny_224", {"img_size": (64, 64), "embed_dim": 16, "stages": (1, 1, 2, 1)}, 64),
    "hieradet_sam2": ("hieradet_small", {"embed_dim": 16, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)}, 64),
    "iformer": ("iformer_t", {"dims": (16, 16, 32, 32), "depths": (1, 1, 4, 4), "attn_groups": (0, 0, 1, 1)}, 64),
    "levit": (
        "levit_128s",
        {"img_size": 64, "embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": (2, 2, 2), "depth": (1, 1, 1)},
        64,
    ),
    "levit_conv": (
        "levit_conv_128s",
        {"img_size": 64, "embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": (2, 2, 2), "depth": (1, 1, 1)},
        64,
    ),
    "lowformer": ("lowformer_b0", {"head_widths": (32, 32)}, 64),
    "coatnet": ("coatnet_pico_rw_224", {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 32)}, 64),
    "maxvit": ("maxvit_rmlp_pico_rw_256", {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 32)}, 64),
    "poolformer": (
        "metaformer:MetaFormer",
        {
            "dims": (16, 16, 24, 32),
            "depths": (1, 1, 1, 1),
            "norm_layers": metaformer.GroupNorm1,
            "use_mlp_head": False,
            "layer_scale_init_values": 0.1,
        },
        64,
    ),
    "caformer": (
        "metaformer:MetaFormer",
        {
            "dims": (16, 16, 32, 32),
            "depths": (1, 1, 1, 1),
            "token_mixers": [metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
            "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
        },
        64,
    ),
    "mobilevit": ("mobilevit_xxs", {}, 64),
    "mobilevitv2": ("mobilevitv2_050", {}, 64),
    "mvitv2": (
        "mvitv2:MultiScaleVit",
        {"cfg": mvitv2.MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=16), "img_size": (64, 64)},
        64,
    ),
    "naflexvit": ("naflexvit_base_patch16_gap", {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32}, 32),
    "nest": (
        "nest:Nest",
        {"img_size": 64, "embed_dims": (16, 24, 32), "num_heads": (2, 2, 2), "depths": (1, 1, 2)},
        64,
    ),
    "nextvit": ("nextvit:NextViT", {"in_chans": 3, "depths": (1, 1, 5, 1), "stem_chs": (16, 8, 16)}, 64),
    "pit": ("pit_ti_224", {"img_size": 64, "base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 4, 4)}, 64),
    "pvt_v2": ("pvt_v2_b0", {"embed_dims": (16, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}, 64),
    "qwen3_vit": ("qwen3_vit_88m", {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}, 64),
    "shvit": (
        "shvit_s1",
        {
            "embed_dim": (32, 48, 64),
            "partial_dim": (8, 8, 8),
            "qk_dim": (8, 8, 8),
            "depth": (1, 1, 1),
            "types": ("i", "s", "s"),
        },
        128,
    ),
    "swiftformer": ("swiftformer_xs", {"layers": [1, 1, 1, 1], "embed_dims": [16, 16, 24, 32]}, 64),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)},
        32,
    ),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {"img_size": 32, "window_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)},
        32,
    ),
    "swinv2_cr": (
        "swinv2_cr_tiny_ns_224",
        {"img_size": 32, "window_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)},
        32,
    ),
    "tiny_vit": (
        "tiny_vit_5m_224",
        {
            "embed_dims": (16, 16, 32, 32),
            "depths": (1, 1, 1, 1),
            "num_heads": (2, 2, 2, 2),
            "window_sizes": (7, 2, 2, 2),
        },
        64,
    ),
    "tnt": (
        "tnt_s_patch16_224",
        {"img_size": 32, "embed_dim": 24, "inner_dim": 8, "depth": 2, "num_heads_outer": 2, "num_heads_inner": 2},
        32,
    ),
    "twins_pcpvt": (
        "twins_pcpvt_small",
        {"img_size": 64, "embed_dims": (16, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
        64,
    ),
    "twins_svt": (
        "twins_svt_small",
        {"img_size": 64, "embed_dims": (16, 16, 24, 32), "depths": (2, 2, 1, 1), "num_heads": (1, 2, 2, 2)},
        64,
    ),
    "visformer": (
        "visformer_tiny",
        {"img_size": 64, "init_channels": 8, "embed_dim": 32, "depth": (1, 1, 1), "num_heads": 2},
        64,
    ),
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}, 32),
    "vit_map": ("vit_base_patch16_siglip_224", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}, 32),
    "vit_parallel": ("vit_small_patch16_18x2_224", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}, 32),
    "vit_dinov3": ("vit_small_patch16_dinov3", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}, 32),
    "vit_hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2}, 64),
    "vit_relpos": ("vit_relpos_small_patch16_224", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}, 32),
    "vit_sam": (
        "samvit_base_patch16_224",
        {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2, "window_size": 2, "global_attn_indexes": (1,)},
        64,
    ),
    "vitamin": ("vitamin_small_224", {"img_size": 64, "depth": 1}, 64),
    "volo": (
        "volo:VOLO",
        {"img_size": 32, "layers": (1, 1, 1, 1), "embed_dims": (16, 24, 24, 24), "num_heads": (2, 2, 2, 2)},
        32,
    ),
    "xcit": ("xcit_nano_12_p16_224", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}, 32),
}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model with random weights and two images."""
    arch, settings, size = TIMM[name]
    if ":" in arch:
        module, _, cls = arch.partition(":")
        model = getattr(importlib.import_module(f"timm.models.{module}"), cls)(num_classes=5, **settings)
    else:
        model = timm.create_model(arch, num_classes=5, **settings)
    return model.eval(), torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
