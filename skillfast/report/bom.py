"""A run's model and data as an ML-BOM: CycloneDX 1.6, as JSON."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from skillfast.files import write_json
from skillfast.report import files
from skillfast.report.bench import words
from skillfast.report.formatting import data_name, model_name
from skillfast.results.provenance import EXAMPLES_HASHED, LABELS_HASHED, WEIGHTS_HASHED
from skillfast.results.records import to_json
from skillfast.vocabulary import GIVEN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from skillfast.results.bench import BenchResults

BOM = "ml-bom.cdx.json"
MODEL = "model"
ON_PYPI = ("numpy", "timm", "torch", "torchvision", "transformers")  # what has a package URL; a user's own has none


def write_bom(directory: Path) -> Path:
    """Write `ml-bom.cdx.json`; see `skillfast.report.write_bom`."""
    path = directory / BOM
    write_json(path, bom(files.read_results(directory)))
    return path


def bom(results: BenchResults) -> dict[str, Any]:
    """The document. It tells no time, so that equal results give equal documents with one serial number."""
    data, libraries = _data(results), _libraries(results)
    tool = {"type": "application", "name": "skillfast", "version": results.environment.skillfast}
    made = {
        "metadata": {"tools": {"components": [tool]}, "component": _model(results, data)},
        "components": [*data, *libraries],
        "dependencies": [{"ref": MODEL, "dependsOn": [each["bom-ref"] for each in (*data, *libraries)]}],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(made, sort_keys=True))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        **made,
    }


def _model(results: BenchResults, data: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    model, ran = results.model, results.environment
    prompt = model.soft_prompt
    known = {
        "weights": WEIGHTS_HASHED,
        "origin": model.weights.origin,
        **({"revision": model.weights.revision} if model.weights.revision else {}),
        "architecture": model.fingerprint,
        "parameters": model.parameters,
        **{f"trained:{name}": value for name, value in to_json(model.trained).items()},
        **({} if prompt is None else {f"soft-prompt:{name}": value for name, value in to_json(prompt).items()}),
        **{f"setting:{name}": value for name, value in results.config.items()},
        "python": ran.python, "platform": ran.platform, "device": ran.device, "device-name": ran.device_name,
        "threads": ran.threads,
    }  # fmt: skip
    return {
        "type": "machine-learning-model",
        "bom-ref": MODEL,
        "name": model_name(results),
        "version": model.weights.sha256[:12],
        "hashes": [_hash(model.weights.sha256)],
        "modelCard": {
            "modelParameters": {
                "task": "classification",
                "modelArchitecture": str(model.name),
                "datasets": [{"ref": each["bom-ref"]} for each in data],
                **_formats(results),
            },
            "quantitativeAnalysis": {"performanceMetrics": _metrics(results)},
            "considerations": {
                "technicalLimitations": words.limits(results),
                "performanceTradeoffs": words.summary(results),
            },
            "properties": _properties({"confidence-level": 0.95}),
        },
        "properties": _properties(known),
    }


def _formats(results: BenchResults) -> dict[str, Any]:
    """What goes in and comes out; of a model that its caller gave nobody said what goes in."""
    out = {"outputs": [{"format": f"logits of {len(results.dataset.classes)} classes"}]}
    name = results.dataset.name
    return out if name == GIVEN else {"inputs": [{"format": "text" if name == "text" else "image"}], **out}


def _data(results: BenchResults) -> list[dict[str, Any]]:
    """A component for each part."""
    dataset = results.dataset
    parts = (
        ("select", dataset.n_select, "skills are chosen on"),
        ("validate", dataset.n_validate, "settings are chosen on"),
        ("test", dataset.n_test, "effects are measured on"),
    )
    return [
        {
            "type": "data",
            "bom-ref": f"data/{part}",
            "name": f"{data_name(results)}: {part}",
            "description": f"{n:,} examples of {len(dataset.classes)} classes that {use}",
            "hashes": [_hash(getattr(dataset.digests, part).examples)],
            "data": [{"type": "dataset", "name": str(dataset.name)}],
            "properties": _properties({
                "examples": n,
                "hash": EXAMPLES_HASHED,
                "labels-sha256": getattr(dataset.digests, part).labels,
                "labels-hash": LABELS_HASHED,
                "classes": dataset.classes,
            }),
        }
        for part, n, use in parts
    ]  # fmt: skip


def _libraries(results: BenchResults) -> list[dict[str, Any]]:
    """The frameworks that the model ran in."""
    ran = results.environment
    versions = {"numpy": ran.numpy, "torch": ran.torch, **ran.libraries}
    return [
        {
            "type": "framework" if name == "torch" else "library",
            "bom-ref": f"library/{name}",
            "name": name,
            "version": version,
            **({"purl": f"pkg:pypi/{name}@{quote(version, safe='')}"} if name in ON_PYPI else {}),
        }
        for name, version in versions.items()
    ]


def _metrics(results: BenchResults) -> list[dict[str, Any]]:
    """Accuracy and what removals do: of all classes and of each; fractions."""
    own, classes = results.selectivity, results.dataset.classes
    before, drops = results.baseline, [-results.removal_matrix[i][i] for i in range(len(classes))]
    verdicts = results.verdicts or {}
    lost = "accuracy lost by a class without its skill"
    found = [
        _metric("accuracy", before.accuracy),
        *(_metric("accuracy", right, name) for name, right in zip(classes, before.per_class, strict=True)),
        _metric(lost, own.target_drop, ends=own.ci95.target_drop),
        *(
            _metric(lost, drop, name, verdicts[name].ci95 if name in verdicts else None)
            for name, drop in zip(classes, drops, strict=True)
        ),
        _metric(
            "accuracy lost by a class without as many random neurons",
            results.random_control.target_drop,
            ends=results.random_control.ci95.target_drop,
        ),
        _metric("accuracy of other classes behind the oracle's without a skill", own.regret, ends=own.ci95.regret),
        _metric("other classes' decisions that turn wrong without a skill", own.gross_loss, ends=own.ci95.gross_loss),
        _metric("net loss of other classes without a skill, high estimate", own.harm.plug_in, ends=own.harm.ci95),
        *(
            _metric("no other class loses more without the skill", each.others_lose_at_most, name)
            for name, each in verdicts.items()
        ),
    ]
    if (information := results.information) is not None:
        told = "share of what a refitted probe tells of a class that is lost without its skill"
        found.append(_metric(told, information.information_lost, ends=information.ci95.information_lost))
        found += [_metric(told, each.information_lost, name) for name, each in information.per_class.items()]
    return [each for each in found if each]


def _metric(
    kind: str, value: float | None, name: str | None = None, ends: Sequence[float] | None = None
) -> dict[str, Any]:
    """One metric, of a class where there is a name; empty where the value is not defined."""
    if value is None:
        return {}
    low_high = {} if ends is None else {
        "confidenceInterval": {"lowerBound": _number(ends[0]), "upperBound": _number(ends[1])}
    }  # fmt: skip
    return {"type": kind, "value": _number(value), **({} if name is None else {"slice": f"class {name}"}), **low_high}


def _number(value: float) -> str:
    return f"{value:.6g}"


def _hash(sha256: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": sha256}


def _properties(values: Mapping[str, Any]) -> list[dict[str, str]]:
    """Names and values under `skillfast:`; what is no text as JSON."""
    pairs: Iterable[tuple[str, Any]] = values.items()
    return [
        {"name": f"skillfast:{name}", "value": value if isinstance(value, str) else json.dumps(value)}
        for name, value in pairs
    ]
