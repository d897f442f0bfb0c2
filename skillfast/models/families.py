"""Where each family of models keeps its output projections: data, not code.

A row is regular expressions of module paths relative to a block, whose own path ends in its number. Rows hold for
every model that is built so, not for the named ones alone. `blocks.3.attn` is self-attention, `blocks.3.cross_attn`
attention to another sequence, of the same kind.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
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
        ssm: Path of a state-space mixer's or a recurrence's projection.
        cross_attn: Path of the projection of attention to another sequence.
        block: Regular expression that a block's path ends in.
        head: Path of the classifier or the language-model head; None where it is one of `HEADS`.
    """

    name: str
    attn: str = ""
    mlp: str = ""
    block: str = r"\b\d+"
    head: str | None = None
    ssm: str = ""
    cross_attn: str = ""

    def patterns(self) -> tuple[tuple[str, Kind, re.Pattern[str]], ...]:
        """(role, kind, pattern of the whole path) of each; the group `block` is what a block's sites share."""
        return _patterns(self)


@cache
def _patterns(family: Family) -> tuple[tuple[str, Kind, re.Pattern[str]], ...]:
    parts: tuple[tuple[str, Kind, str], ...] = (
        ("attn", "attn", family.attn), ("mlp", "mlp", family.mlp), ("ssm", "ssm", family.ssm),
        ("cross_attn", "attn", family.cross_attn),
    )  # fmt: skip
    return tuple(
        (role, kind, re.compile(rf"(?P<block>.*?{family.block})\.(?:{part})")) for role, kind, part in parts if part
    )


FAMILIES: tuple[Family, ...] = (
    Family("timm: ViT, DeiT, BEiT, EVA", r"attn\.proj", r"mlp\.fc2"),
    Family(
        "BERT, RoBERTa, ELECTRA, DeBERTa, ViT before transformers 5; BLIP-2's queries",
        r"attention\.output\.dense",
        r"output(?:_query)?\.dense",
    ),
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
    Family("MPT, DBRX", r"(?:norm_attn_norm\.)?attn\.out_proj", r"ffn\.down_proj"),
    Family("Jamba, Bamba, Llama 4", r"self_attn\.o_proj", r"feed_forward\.down_proj"),
    Family(
        "Qwen3-Next, Qwen3.5, OLMo hybrid: linear attention; shared experts",
        r"linear_attn\.(?:out_proj|o_proj)",
        r"(?:mlp|feed_forward)\.shared_(?:experts?|mlp)\.down_proj",
    ),
    Family("LFM2", r"self_attn\.out_proj", r"feed_forward\.w2", block=r"\blayers\.\d+"),
    Family(
        "ViT, DeiT, BEiT, DINOv2, ViTDet, LW-DETR of transformers 5",
        r"attention\.(?:o_)?proj",
        r"(?:mlp|intermediate)\.fc2",
    ),
    Family("PVTv2 of transformers", r"attention\.proj", r"mlp\.dense2", block=r"\blayers\.\d+\.blocks\.\d+"),
    Family("PVT of transformers", mlp=r"mlp\.dense2", block=r"\bblock\.\d+\.\d+"),
    Family("SwiftFormer of transformers", mlp=r"(?:local_representation\.)?point_wise_conv2", block=r"\bblocks\.\d+"),
    Family("SAM, SAM 2, Qwen3-VL: towers", r"attn\.proj", r"mlp\.(?:lin2|proj_out|linear_fc2)"),
    Family("Qwen3-VL: layers that go past the tower", mlp=r"linear_fc2", block=r"\bdeepstack_merger_list\.\d+"),
    Family("FocalNet", r"modulation\.projection_out"),
    Family("Mamba, Mamba-2, Falcon-Mamba", ssm=r"mixer\.out_proj"),
    Family("Jamba, Bamba, Granite 4, Falcon-H1, Zamba: the mixers", ssm=r"(?:mamba|mamba_decoder\.mamba)\.out_proj"),
    Family("Granite 4: the MLP", mlp=r"shared_mlp\.output_linear"),
    Family("Nemotron-H", r"mixer\.o_proj", r"mixer\.(?:shared_experts\.)?down_proj", ssm=r"mixer\.out_proj"),
    Family(
        "RecurrentGemma",
        r"temporal_block\.o_proj",
        r"mlp_block\.down_proj",
        ssm=r"temporal_block\.linear_out",
    ),
    Family("RWKV", mlp=r"feed_forward\.value", ssm=r"attention\.output", block=r"\bblocks\.\d+"),
    Family("xLSTM", mlp=r"ffn\.proj_down", ssm=r"mlstm_layer\.out_proj"),
    Family("LFM2, LFM3: short convolutions", ssm=r"conv\.out_proj", block=r"\blayers\.\d+"),
    Family("CTRL", r"multi_head_attention\.dense", r"ffn\.2"),
    Family("CPM-Ant", r"self_att\.self_attention\.attention_out", r"ffn\.ffn\.w_out"),
    Family("Moshi", r"self_attn\.o_proj\.linear", r"mlp\.fc2"),
    Family("Gemma 4: inputs per layer", mlp=r"per_layer_projection"),
    Family("timm: CoAt", r"factoratt_crpe\d?\.proj", r"mlp\d?\.fc2"),
    Family("timm: CrossViT, between its branches", mlp=r"(?:revert_)?projs\.\d+\.2", block=r"\bblocks\.\d+"),
    Family("timm: CSATv2, MetaFormer", r"token_mixer\.proj|attn\.conv|attn\.attn\.qkv", r"(?:token_mixer\.)?pwconv2"),
    Family("timm: DaViT, TNT", r"attn_(?:in|out)\.proj", r"cpe[12]\.proj|mlp_in\.fc2|proj"),
    Family(
        "timm: EfficientFormerV2",
        r"(?:token_mixer|downsample\.attn)\.proj\.conv",
        r"mlp\.fc2\.conv",
    ),
    Family(
        "timm: EfficientViT of MIT, LowFormer",
        r"context_module\.main\.proj\.conv|attn\.main\.\d+\.upsampling",
        r"(?:local_module\.|local\.)?main\.point_conv\.conv|mlp\.main\.\d+",
        block=r"(?:\b\d+|\bres\d+)",
    ),
    Family(
        "timm: EfficientViT of MSRA, SHViT",
        r"mixer\.m\.(?:attn\.)?proj\.1\.(?:c|conv)",
        r"(?:dw\d|conv)\.m\.(?:c|conv)|ffn\d?\.m\.pw2\.(?:c|conv)|downsample\.(?:res\d\.)?\d\.m\.(?:pw2\.)?(?:c|conv)"
        r"|downsample\.(?:patchmerge|\d)\.se\.fc2",
    ),
    Family(
        "timm: FastViT",
        r"token_mixer\.proj",
        r"token_mixer\.mixer\.conv_(?:kxk\.\d+|scale)\.conv|downsample\.proj\.\d+\.conv_(?:kxk\.\d+|scale)\.conv|pos_emb\.pos_enc|conv_(?:kxk\.\d+|scale)\.conv",
    ),
    Family("timm: GCViT", mlp=r"(?:downsample\.conv_block|global_block\.blocks\.conv\d+)\.conv_pw"),
    Family("timm: iFormer", r"mixer\.module\.proj\.c", r"(?:mixer\.module\.\d+|cpe\.module)\.c"),
    Family("timm: LeViT", r"attn\.proj\.ln\.linear", r"(?:downsample\.)?mlp\.ln2\.linear"),
    Family(
        "timm: CoAtNet, MaxViT, VitAmin",
        r"attn_(?:block|grid)\.attn\.proj",
        r"(?:conv\.)?conv3_1x1|attn_(?:block|grid)\.mlp\.fc2|mlp\.w2",
    ),
    Family("timm: BoTNet, MobileViT", r"transformer\.\d+\.attn\.out_proj", r"conv3_1x1\.conv|conv_proj\.conv"),
    Family(
        "timm: NextViT",
        r"e_mhsa\.proj|mhca\.projection",
        r"projection\.conv",
    ),
    Family("timm: SwiftFormer", r"attn\.final", r"local_representation\.pwconv2|linear\.fc2"),
    Family("timm: TinyViT, Visformer", mlp=r"conv3\.conv|mlp\.conv3"),
    Family("timm: Gemma 4's tower", r"attn\.o_proj\.linear", r"mlp\.down_proj\.linear"),
    Family("torch's TransformerEncoder", r"self_attn\.out_proj", r"linear2", cross_attn=r"multihead_attn\.out_proj"),
    Family("torchvision's ViT", r"self_attention\.out_proj", r"mlp\.3", block=r"\bencoder_layer_\d+"),
    Family(
        "BART, Whisper, ProphetNet: cross-attention",
        mlp=r"feed_forward\.output",
        cross_attn=r"(?:encoder_attn|cross_attn)\.(?:out_proj|o_proj)",
        block=r"\blayers\.\d+",
    ),
    Family("Wav2Vec2, OmniASR", r"attention\.out_proj", r"feed_forward\.output_dense", block=r"\blayers\.\d+"),
    Family("BLIP, InstructBLIP: towers", r"self_attn\.projection", r"mlp\.fc2"),
    Family(
        "SeamlessM4T; the dense layers of NLLB-MoE",
        mlp=r"ffn\.fc2",
        cross_attn=r"cross_attention\.out_proj",
        block=r"\blayers\.\d+",
    ),
    Family("Switch Transformers: the dense layers", mlp=r"layer\.[12]\.mlp\.wo"),
    Family("LongCat-Flash: two of each in a block", r"self_attn\.\d\.o_proj", r"mlps\.\d\.down_proj", r"\blayers\.\d+"),
    Family(
        "MobileBERT, X-MOD: past the layers' MLPs", mlp=r"output\.(?:bottleneck\.dense|adapter_modules\.\w+\.dense2)"
    ),
    Family("NeoMME", r"self_attn\.output_projection\.o_proj"),
    Family("DeepSeek V4", r"self_attn\.o_b_proj"),
    Family("Gemma 3n: the low-rank residual", mlp=r"laurel\.linear_right"),
    Family("T5: cross-attention", cross_attn=r"layer\.1\.EncDecAttention\.o"),
    Family("BERT, GPT-2: cross-attention", cross_attn=r"crossattention\.(?:output\.dense|c_proj)"),
)

HEADS = ("classifier", "classifier.out_proj", "score", "classification_head.out_proj", "embed_out", "heads.head")
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
