"""Certifies the sites of families of models; writes one JSON file.

    python bench/coverage.py causal FILE [FAMILY ...]

Tables: `causal`, `encoders` and `vision` of the transformers library, `timm` (those that tests/timm_models.py builds
small). With names only these families are certified anew; the file's others stay.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import skillfast
from skillfast.errors import ModelError
from skillfast.models.weights import first_line

TOWERS = {  # of models that are in no table of transformers that is read here
    "gemma4_vision": "Gemma4VisionModel", "qwen2_5_vl_vision": "Qwen2_5_VisionTransformerPretrainedModel",
    "qwen3_5_vision": "Qwen3_5VisionModel", "qwen3_vl_vision": "Qwen3VLVisionModel",
    "sam2_hiera_det_model": "Sam2HieraDetModel", "sam_hq_vision_model": "SamHQVisionModel",
    "sam_vision_model": "SamVisionModel", "vit_mae": "ViTMAEModel",
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {  # without which a default configuration gives no model
    "dbrx": {"attn_config": {"kv_n_heads": 1, "rope_theta": 5e5, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6}, "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16}, "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}  # fmt: skip
NO_SITES = "expected blocks named as in a known family"


def of_transformers(table: str) -> dict[str, str]:
    """Type of a configuration -> class of the model."""
    from transformers.models.auto import modeling_auto as auto

    mappings = {
        "causal": [auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES],
        "encoders": [auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES],
        "vision": [auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, auto.MODEL_FOR_BACKBONE_MAPPING_NAMES],
    }
    found = dict(TOWERS) if table == "vision" else {}
    for mapping in mappings[table]:
        for family, name in mapping.items():
            found.setdefault(family, name if isinstance(name, str) else name[0])
    return found


def build_of_transformers(family: str, name: str) -> tuple[Any, None]:
    import transformers

    with torch.device("meta"):
        made = getattr(transformers, name)
        config = made.config_class if family in TOWERS else transformers.CONFIG_MAPPING[family]
        return made(config(**SETTINGS.get(family, {}))).eval(), None


def build_of_timm(family: str, _: str) -> tuple[Any, torch.Tensor]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from timm_models import made

    from skillfast.models.coverage import randomise

    model, images = made(family)
    randomise(model)
    return model, images


def certified(build: Any, family: str, name: str) -> dict[str, object]:
    try:
        model, batch = build(family, name)
    except Exception as error:  # configurations without the values that their models need
        return {"answer": "cannot be built from its default configuration", "reason": first_line(error)}
    start = time.process_time()
    try:
        found = skillfast.coverage(model, batch)
    except ModelError as error:
        if NO_SITES not in str(error):
            return {"answer": "not certified", "reason": first_line(error)}
        return by_structure(model, batch) or {"answer": "no sites", "reason": first_line(error)}
    except Exception as error:  # of a model's own code, under gradients
        return {"answer": "not certified", "reason": first_line(error)}
    answer = "whole" if found.complete else "in part" if found.missing else "not exercised"
    return {"answer": answer, **found.to_json(), "cpu_seconds": round(time.process_time() - start, 2)}


def by_structure(model: Any, batch: Any) -> dict[str, object] | None:
    """The answer for a model of no known family whose projections structure finds; None where they do not certify."""
    try:
        sites = skillfast.discover(model, batch)
    except ModelError:
        return None
    return {"answer": "whole, found by structure", "sites": len(sites)}


def main(table: str, path: str, *only: str) -> None:
    import timm
    import transformers

    transformers.logging.set_verbosity_error()
    if table == "timm":
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from timm_models import TIMM

        families, build = dict.fromkeys(TIMM, ""), build_of_timm
    else:
        families, build = of_transformers(table), build_of_transformers  # type: ignore[assignment]
    file = Path(path)
    found = json.loads(file.read_text())["families"] if only and file.exists() else {}
    for family, name in sorted(families.items()):
        if not only or family in only:
            found[family] = certified(build, family, name)
    counts: dict[str, int] = {}
    for row in found.values():
        counts[str(row["answer"])] = counts.get(str(row["answer"]), 0) + 1
    versions = {
        "timm": timm.__version__, "transformers": transformers.__version__, "torch": str(torch.__version__),
        "skillfast": skillfast.__version__,
    }  # fmt: skip
    families = {family: found[family] for family in sorted(found)}
    file.write_text(json.dumps({"versions": versions, "counts": counts, "families": families}, indent=1) + "\n")
    print(counts)


if __name__ == "__main__":
    main(*sys.argv[1:])
