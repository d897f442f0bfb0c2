"""Families of the transformers library: sites that certify on a small model, and what is read and removed there."""

from __future__ import annotations

import pytest
from family_checks import JOINED, check
from packaging.version import Version

from skillfast.models.coverage import randomise
from skillfast.models.shrink import small_model

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="older versions lack some of these families"
)

# type of the configuration: class of the model
CAUSAL = {
    "apertus": "ApertusForCausalLM", "apertus1p5_text": "Apertus1p5TextForCausalLM", "arcee": "ArceeForCausalLM",
    "bamba": "BambaForCausalLM", "bart": "BartForCausalLM", "bert": "BertLMHeadModel",
    "bert-generation": "BertGenerationDecoder", "big_bird": "BigBirdForCausalLM",
    "bigbird_pegasus": "BigBirdPegasusForCausalLM", "biogpt": "BioGptForCausalLM", "bitnet": "BitNetForCausalLM",
    "blenderbot": "BlenderbotForCausalLM", "blenderbot-small": "BlenderbotSmallForCausalLM",
    "camembert": "CamembertForCausalLM", "codegen": "CodeGenForCausalLM", "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM", "cpmant": "CpmAntForCausalLM", "ctrl": "CTRLLMHeadModel", "cwm": "CwmForCausalLM",
    "data2vec-text": "Data2VecTextForCausalLM", "diffllama": "DiffLlamaForCausalLM", "doge": "DogeForCausalLM",
    "electra": "ElectraForCausalLM", "ernie": "ErnieForCausalLM", "ernie4_5": "Ernie4_5ForCausalLM",
    "exaone": "LlamaForCausalLM", "exaone4": "Exaone4ForCausalLM", "falcon": "FalconForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM", "falcon_mamba": "FalconMambaForCausalLM", "fuyu": "FuyuForCausalLM",
    "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM", "gemma4": "Gemma4ForConditionalGeneration", "gemma4_text": "Gemma4ForCausalLM",
    "gemma4_unified": "Gemma4UnifiedForConditionalGeneration", "gemma4_unified_text": "Gemma4UnifiedForCausalLM",
    "git": "GitForCausalLM", "glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM",
    "got_ocr2": "GotOcr2ForConditionalGeneration", "gpt-sw3": "GPT2LMHeadModel", "gpt2": "GPT2LMHeadModel",
    "gpt_bigcode": "GPTBigCodeForCausalLM", "gpt_neo": "GPTNeoForCausalLM", "gpt_neox": "GPTNeoXForCausalLM",
    "gpt_neox_japanese": "GPTNeoXJapaneseForCausalLM", "gptj": "GPTJForCausalLM", "granite": "GraniteForCausalLM",
    "granite_swa": "GraniteSWAForCausalLM", "helium": "HeliumForCausalLM", "hyperclovax": "HyperCLOVAXForCausalLM",
    "internlm3": "LlamaForCausalLM", "iquestcoder": "LlamaForCausalLM", "jais2": "Jais2ForCausalLM",
    "lfm2": "Lfm2ForCausalLM", "lfm3": "Lfm3ForCausalLM", "llama": "LlamaForCausalLM", "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM", "marian": "MarianForCausalLM", "mbart": "MBartForCausalLM",
    "megatron-bert": "MegatronBertForCausalLM", "minicpm3": "MiniCPM3ForCausalLM",
    "ministral3": "Ministral3ForCausalLM", "mistral": "MistralForCausalLM", "mllama": "MllamaForCausalLM",
    "modernbert-decoder": "ModernBertDecoderForCausalLM", "moshi": "MoshiForCausalLM", "mpt": "MptForCausalLM",
    "mvp": "MvpForCausalLM", "nanochat": "NanoChatForCausalLM", "olmo": "OlmoForCausalLM", "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM", "olmo_hybrid": "OlmoHybridForCausalLM", "openai-gpt": "OpenAIGPTLMHeadModel",
    "opt": "OPTForCausalLM", "pegasus": "PegasusForCausalLM", "persimmon": "PersimmonForCausalLM",
    "phi": "PhiForCausalLM", "phi3": "Phi3ForCausalLM", "plbart": "PLBartForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "qwen3_5_text": "Qwen3_5ForCausalLM", "recurrent_gemma": "RecurrentGemmaForCausalLM",
    "rembert": "RemBertForCausalLM", "roberta": "RobertaForCausalLM",
    "roberta-prelayernorm": "RobertaPreLayerNormForCausalLM", "roc_bert": "RoCBertForCausalLM",
    "roformer": "RoFormerForCausalLM", "rwkv": "RwkvForCausalLM", "seed_oss": "SeedOssForCausalLM",
    "smollm3": "SmolLM3ForCausalLM", "stablelm": "StableLmForCausalLM", "starcoder2": "Starcoder2ForCausalLM",
    "trocr": "TrOCRForCausalLM", "vaultgemma": "VaultGemmaForCausalLM", "whisper": "WhisperForCausalLM",
    "xglm": "XGLMForCausalLM", "xlm-roberta": "XLMRobertaForCausalLM", "xlm-roberta-xl": "XLMRobertaXLForCausalLM",
    "xlstm": "xLSTMForCausalLM", "youtu": "YoutuForCausalLM", "zamba": "ZambaForCausalLM",
    "zamba2": "Zamba2ForCausalLM",
}  # fmt: skip
ENCODERS = {
    "bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM", "electra": "ElectraForMaskedLM",
    "deberta-v2": "DebertaV2ForMaskedLM", "deberta": "DebertaForMaskedLM", "distilbert": "DistilBertForMaskedLM",
    "mpnet": "MPNetForMaskedLM", "modernbert": "ModernBertForMaskedLM", "camembert": "CamembertForMaskedLM",
    "xlm-roberta": "XLMRobertaForMaskedLM", "ernie": "ErnieForMaskedLM",
    "roberta-prelayernorm": "RobertaPreLayerNormForMaskedLM", "data2vec-text": "Data2VecTextForMaskedLM",
    "rembert": "RemBertForMaskedLM", "megatron-bert": "MegatronBertForMaskedLM",
    "nystromformer": "NystromformerForMaskedLM", "yoso": "YosoForMaskedLM", "convbert": "ConvBertForMaskedLM",
    "ibert": "IBertForMaskedLM", "layoutlm": "LayoutLMForMaskedLM", "big_bird": "BigBirdForMaskedLM",
    "roformer": "RoFormerForMaskedLM", "t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration", "mbart": "MBartForConditionalGeneration", "marian": "MarianMTModel",
    "pegasus": "PegasusForConditionalGeneration", "m2m_100": "M2M100ForConditionalGeneration",
    "seamless_m4t": "SeamlessM4TForTextToText", "neomme": "NeoMMEForMaskedLM",
    "xmod": "XmodForMaskedLM", "encoder-decoder": "EncoderDecoderModel", "fsmt": "FSMTForConditionalGeneration",
    "t5gemma": "T5GemmaForConditionalGeneration", "modernvbert": "ModernVBertForMaskedLM",
    "t5gemma2": "T5Gemma2ForConditionalGeneration", "voxtral": "VoxtralForConditionalGeneration",
    "glmasr": "GlmAsrForConditionalGeneration", "omniasr": "OmniASRForConditionalGeneration",
}  # fmt: skip
VISION = {
    "vit": "ViTForImageClassification", "deit": "DeiTForImageClassification", "beit": "BeitForImageClassification",
    "dinov2": "Dinov2ForImageClassification", "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
    "dinov3_vit": "DINOv3ViTModel", "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel", "vit_msn": "ViTMSNForImageClassification",
    "ijepa": "IJepaForImageClassification", "data2vec-vision": "Data2VecVisionForImageClassification",
    "swin": "SwinForImageClassification", "swinv2": "Swinv2ForImageClassification",
    "hiera": "HieraForImageClassification", "convnextv2": "ConvNextV2ForImageClassification",
    "segformer": "SegformerForImageClassification", "pvt_v2": "PvtV2ForImageClassification",
    "blip_2_vision_model": "Blip2VisionModel", "pvt": "PvtForImageClassification",
    "swiftformer": "SwiftFormerForImageClassification", "focalnet": "FocalNetForImageClassification",
    "gemma4_vision": "Gemma4VisionModel", "sam_vision_model": "SamVisionModel", "vit_mae": "ViTMAEModel",
    "sam2_hiera_det_model": "Sam2HieraDetModel", "siglip2": "Siglip2ForImageClassification",
    "vitdet": "VitDetBackbone", "pixio": "PixioBackbone", "qwen2_5_vl": "Qwen2_5_VisionTransformerPretrainedModel",
    "qwen3_vl": "Qwen3VLVisionModel", "qwen3_5": "Qwen3_5VisionModel",
}  # fmt: skip
TOWERS = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")  # whose configuration is a part of the family's
CASES = [(family, name) for table in (CAUSAL, ENCODERS, VISION) for family, name in table.items()]


@pytest.mark.parametrize(("family", "name"), CASES, ids=lambda case: case)
def test_a_family_of_transformers(family, name):
    made = getattr(transformers, name)
    config = made.config_class if family in TOWERS else transformers.CONFIG_MAPPING[family]
    model, inputs = small_model(made, config())
    randomise(model)
    check(model, inputs, len(inputs.get(JOINED, next(iter(inputs.values())))))
