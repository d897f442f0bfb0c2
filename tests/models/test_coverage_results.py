"""What README and the documentation say of the certificates, against the recorded ones in bench/results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "language-models.md").read_text()
README = (ROOT / "README.md").read_text()
ANSWERS = {
    "whole": "whole",
    "whole, found by structure": "whole, found by structure",
    "in part, what is missing is named": "in part",
    "not exercised": "not exercised",
    "no sites": "no sites",
    "not certified": "not certified",
    "not built": "cannot be built from its default configuration",
}


def recorded(table: str) -> dict[str, dict[str, object]]:
    return json.loads((ROOT / "bench" / "results" / f"coverage-{table}-transformers-5.24.json").read_text())["families"]


def counted(table: str) -> dict[str, int]:
    answers = [row["answer"] for row in recorded(table).values()]
    return {str(answer): answers.count(answer) for answer in answers}


def test_the_table_of_causal_families_is_that_of_the_certificates():
    told = {ANSWERS[name]: int(n) for name, n in re.findall(r"^\| ([a-z ,]+) \| (\d+) \|", DOCS, re.MULTILINE)}
    assert told == counted("causal")
    assert f"Of the {sum(told.values())} causal families" in DOCS


def test_the_sentence_on_encoders_is_that_of_the_certificates():
    counts = counted("encoders")
    assert f"{sum(counts.values())} encoders and encoder-decoders" in DOCS
    text = " ".join(DOCS.split())
    assert f"{counts['whole']} are whole, towers for images and sound among them" in text
    assert f"and {counts['whole, found by structure']} by structure (XLM" in text
    assert f"Not exercised are {counts['not exercised']}: the sound" in text
    assert f"Of {counts['not certified']} no small copy could be made (Perceiver" in text
    assert sum(counts[name] for name in ("whole", "whole, found by structure", "not exercised", "not certified")) == 86


def test_the_sentence_on_vision_is_that_of_the_certificates():
    counts, text = counted("vision"), " ".join(DOCS.split())
    assert f"Of {sum(counts.values())} vision models, towers and backbones" in text
    for told in (
        f"{counts['whole']} are whole", f"{counts['whole, found by structure']} by structure (ResNet",
        f"{counts['in part']} in part (MobileViT", f"{counts['no sites']} have no sites",
        f"{counts['not exercised']} was not exercised (CvT", f"of {counts['not certified']} no small copy",
        f"and {counts['cannot be built from its default configuration']} cannot be built. All",
    ):  # fmt: skip
        assert told in text
    for whole in (
        "sam_vision_model",
        "vit_mae",
        "gemma4_vision",
        "qwen2_5_vl_vision",
        "qwen3_vl_vision",
        "qwen3_5_vision",
        "siglip2",
        "sam2_hiera_det_model",
    ):
        assert recorded("vision")[whole]["answer"] == "whole"


@pytest.mark.parametrize(
    ("told", "table", "family", "answer", "module"),
    [
        ("XLNet", "causal", "xlnet", "no sites", ""),
        ("DeepSeek V4", "causal", "deepseek_v4", "in part", "attn_hc"),
        ("Gemma 3n", "causal", "gemma3n_text", "in part", "altup"),
        ("Inkling's shared experts", "causal", "inkling_text", "in part", "shared_experts"),
        ("DeepSeek-V3.2", "causal", "deepseek_v32", "not exercised", "indexer"),
        ("GLM-MoE-DSA", "causal", "glm_moe_dsa", "not exercised", "indexer"),
        ("NLLB-MoE but the first two", "encoders", "nllb-moe", "not exercised", "experts.expert_2"),
    ],
)
def test_what_the_readme_leaves_out_the_certificate_does(told, table, family, answer, module):
    assert told in " ".join(README.split())
    row = recorded(table)[family]
    assert row["answer"] == answer
    named = row.get("missing" if answer == "in part" else "unexercised", {})
    assert not module or any(module in name for name in named)
