"""Certifies the sites of every causal family of the transformers library; writes one JSON file."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

import skillfast
from skillfast.errors import ModelError
from skillfast.models.weights import first_line


def certified(model_type: str) -> dict[str, object]:
    try:
        with torch.device("meta"):
            model = getattr(transformers, CAUSAL[model_type])(CONFIG_MAPPING[model_type]()).eval()
    except Exception as error:  # configurations without the values that their models need
        return {"answer": "cannot be built from its default configuration", "reason": first_line(error)}
    start = time.process_time()
    try:
        found = skillfast.coverage(model)
    except ModelError as error:
        no_sites = "expected blocks named as in a known family" in str(error)
        return {"answer": "no sites" if no_sites else "not certified", "reason": first_line(error)}
    answer = "whole" if found.complete else "in part" if found.missing else "not exercised"
    return {"answer": answer, **found.to_json(), "cpu_seconds": round(time.process_time() - start, 2)}


def main(path: str) -> None:
    transformers.logging.set_verbosity_error()
    found = {model_type: certified(model_type) for model_type in sorted(CAUSAL)}
    counts: dict[str, int] = {}
    for row in found.values():
        counts[str(row["answer"])] = counts.get(str(row["answer"]), 0) + 1
    versions = {
        "transformers": transformers.__version__,
        "torch": str(torch.__version__),
        "skillfast": skillfast.__version__,
    }
    Path(path).write_text(json.dumps({"versions": versions, "counts": counts, "families": found}, indent=1) + "\n")
    print(counts)


if __name__ == "__main__":
    main(sys.argv[1])
