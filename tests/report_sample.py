"""Results and skills as a run would write them, of any number of classes, for the tests of what reads them."""

from __future__ import annotations

import json
import random
from typing import Any

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FINGERPRINT = "sha256:5f2c9e0d"
WEIGHTS = {"sha256": "a5" * 32, "origin": "random weights of seed 0"}
DIGESTS = {part: {"examples": f"{i}e" * 32, "labels": f"{i}f" * 32}
           for i, part in enumerate(("select", "validate", "test"))}  # fmt: skip


def class_names(n_classes: int) -> list[str]:
    return [NAMES[i] if i < len(NAMES) else f"{NAMES[i % 10]} of kind {i // 10}" for i in range(n_classes)]


def _sites(blocks: int, dim: int) -> list[dict[str, Any]]:
    sites: list[dict[str, Any]] = []
    for block in range(blocks):
        sites.append({"name": f"blocks.{block}.attn", "kind": "attn", "block": block, "heads": 4, "width": dim})
        sites.append({"name": f"blocks.{block}.mlp", "kind": "mlp", "block": block, "heads": None, "width": 4 * dim})
    return [*sites, {"name": "head", "kind": "head", "block": None, "heads": None, "width": dim}]


def _matrix(rng: random.Random, baseline: list[float], strength: float, spread: float) -> list[list[float]]:
    """Strong diagonal, weak rest, in steps of one test example of 50."""
    k = len(baseline)
    return [
        [
            -round(baseline[j] * strength * rng.uniform(0.85, 1.0) * 50) / 50
            if i == j
            else max(-baseline[j], min(1 - baseline[j], round(rng.gauss(0, spread) * 50) / 50))
            for j in range(k)
        ]
        for i in range(k)
    ]


def _selectivity(matrix: list[list[float]], rng: random.Random, oracle: bool = False) -> dict[str, Any]:
    k = len(matrix)
    drop = -sum(matrix[i][i] for i in range(k)) / k
    rest = [matrix[i][j] for i in range(k) for j in range(k) if i != j]
    mean, size, harm = sum(rest) / len(rest), sum(map(abs, rest)) / len(rest), sum(max(0, -v) for v in rest) / len(rest)
    return effect(drop, harm, mean, size, rng.uniform(0.05, 0.25), oracle)


def effect(
    drop: float, harm: float, change: float = 0.001, size: float | None = None, width: float = 0.1, oracle: bool = False
) -> dict[str, Any]:
    size = harm + 0.001 if size is None else size
    values = {
        "target_drop": drop, "regret": 0.0 if oracle else (harm - change) / 2, "agreement": 1.0 if oracle else 0.97,
        "gross_loss": 0.0 if oracle else min(1.0, harm + 0.002), "other_change": change,
    }  # fmt: skip
    below = {"ratio": abs(change), "strict_ratio": size, "harm_ratio": harm}
    ratios = {key: drop / value if value else None for key, value in below.items()}
    ends = {key: [max(v - width * abs(v), -1.0), min(v + width * abs(v), 1.0)] for key, v in values.items()}
    return {
        **values, "other_abs_change": size, **ratios,
        "harm": {"plug_in": harm, "cross_fitted": 0.0 if oracle else harm / 4 - 0.0004,
                 "noise_floor": harm / 2, "ci95": None if oracle else [0.0, min(1.0, 1.3 * harm)]},
        "ci95": {key: None if oracle and key in ("regret", "agreement", "gross_loss") else end
                 for key, end in ends.items()},
        "at_least": {key: None if value is None else 0.7 * value for key, value in ratios.items()},
    }  # fmt: skip


def _config() -> dict[str, Any]:
    return {
        "model": None, "model_kwargs": {}, "checkpoint": None, "pretrained": False, "finetune": "all",
        "dataset": "digits", "data_dir": None, "train_per_class": None, "test_per_class": None, "mean": None,
        "std": None, "crop_pct": None, "device": "cpu", "dtype": "float32", "batch_size": 256, "seed": 0,
        "sites": ["mlp", "attn", "head"], "pool": "mean", "method": "pearson", "share": 0.03, "max_site_share": 0.25,
        "scale": 0.0, "backend": "auto",
    }  # fmt: skip


def _environment() -> dict[str, Any]:
    return {
        "skillfast": "0.1.0", "python": "3.11.7", "torch": "2.15.0", "numpy": "2.4.6", "libraries": {"timm": "1.0.31"},
        "scikit-learn": "1.9.0", "platform": "Linux x86_64", "device": "cpu", "device_name": "CPU", "threads": 2,
        "backends": {"native": "avx512", "triton": "no CUDA device"},
    }  # fmt: skip


def _cost() -> dict[str, Any]:
    stages = {"data": 0.41, "train": 61.2, "trace": 0.83, "select": 0.02, "sweep": 7.94, "baseline": 0.66}
    return {
        "seconds": {**stages, "total": sum(stages.values())}, "samples_per_s": 1240.5, "forward_s": 0.71,
        "trace_over_forward": 1.17, "peak_rss_bytes": 912_345_678, "peak_device_bytes": None, "state_bytes": 412_672,
    }  # fmt: skip


def _contribution(classes: list[str], blocks: int, rng: random.Random) -> dict[str, Any]:
    def shares() -> dict[str, float]:
        mlp, head = rng.uniform(0.35, 0.55), rng.uniform(0.2, 0.4)
        return {"mlp": mlp, "attn": 1 - mlp - head, "head": head}

    total = shares()
    ends = {kind: [value - 0.04, value + 0.05] for kind, value in total.items()}
    return {**total, "non_additivity": 0.31, "per_class": {name: shares() for name in classes}, "ci95": ends,
            "per_block": _per_block(classes, blocks), "n_by_block": 25 * len(classes)}  # fmt: skip


def _per_block(classes: list[str], blocks: int) -> list[dict[str, Any]]:
    """Later blocks carry more; the head, which is last, the most."""
    places = [*range(blocks), None]
    total = sum(range(len(places) + 1))
    return [
        {"block": block, "share": (i + 1) / total, "ci95": [i / total, (i + 2) / total], "bottom_up": (i + 1) / total,
         "top_down": (i + 1) / total, "per_class": dict.fromkeys(classes, (i + 1) / total)}
        for i, block in enumerate(places)
    ]  # fmt: skip


def _overlap(k: int, rng: random.Random) -> list[list[float]]:
    rows = [[1.0] * k for _ in range(k)]
    for i in range(k):
        for j in range(i):
            rows[i][j] = rows[j][i] = round(max(0.0, rng.gauss(0.06, 0.05)), 3)
    return rows


def _interference(classes: list[str], rng: random.Random) -> dict[str, Any]:
    k = len(classes)
    angles = [[rng.uniform(30, 50) if i == j else rng.uniform(0.5, 20) for j in range(k)] for i in range(k)]
    a, b = classes[0], classes[-1]
    pair = {"classes": [a, b], "change": [0.05, 0.04], "beyond_oracle": [0.05, 0.03], "margin": [0.81, 0.62],
            "margin_beyond_oracle": [0.7, 0.6], "p": 1e-4, "q": 0.008, "significant": True}  # fmt: skip
    weak = {**pair, "change": [-0.02, -0.02], "beyond_oracle": [-0.02, -0.02], "margin": [-0.1, -0.2],
            "p": 0.5, "q": 0.62, "significant": False}  # fmt: skip
    overlap = _overlap(k, rng)
    return {
        "angles_deg": angles, "own_angle_deg": 40.3, "other_angle_deg": 10.2, "overlap": overlap,
        "ci95": {
            "angles_deg": [[[0.9 * angle, 1.1 * angle] for angle in row] for row in angles],
            "own_angle_deg": [39.1, 41.8],
            "other_angle_deg": [9.9, 10.6],
        },
        "random_control": {"own_angle_deg": 3.2, "other_angle_deg": 3.1},
        "difference": {"own_angle_deg": 37.1, "other_angle_deg": 7.1, "draws": 2,
                       "ci95": {"own_angle_deg": [35.8, 38.4], "other_angle_deg": [6.7, 7.5]}},
        "competition": [pair], "linkage": [], "oracle_explains": [],
        "visible": {"competition": {"margin": 0.6, "change": 0.03}, "linkage": {"margin": 0.9, "change": 0.07}},
        "strongest": {"angle": {"removed": a, "class": b, "angle_deg": 19.9}, "competition": pair, "linkage": weak,
                      "overlap": {"one": a, "other": b, "jaccard": 0.2}},
    }  # fmt: skip


def _standard_metrics(classes: list[str], matrix: list[list[float]], rng: random.Random) -> dict[str, Any]:
    def seen(drop: float) -> dict[str, Any]:
        return {"cosine": rng.uniform(0.92, 0.98), "rank_preservation": rng.uniform(0.9, 0.95), "cka": 0.97,
                "knn_accuracy_change": rng.uniform(-0.01, 0.01), "target_knn_accuracy_change": -0.02,
                "target_drop": drop}  # fmt: skip

    drops = [-row[i] for i, row in enumerate(matrix)]
    return {
        **seen(sum(drops) / len(drops)), "knn_accuracy": 0.974, "n_neighbours": 5, "n_ranked": 50 * len(classes),
        "ci95": {
            "cosine": [0.91, 0.98],
            "rank_preservation": [0.9, 0.95],
            "knn_accuracy_change": [-0.01, 0.01],
            "cka": [0.97, 0.99],
            "target_knn_accuracy_change": [-0.05, 0.02],
        },
        "random_control": {
            "cosine": 0.995,
            "rank_preservation": 0.99,
            "knn_accuracy_change": 0.001,
            "cka": 0.999,
            "target_knn_accuracy_change": 0.0,
        },
        "difference": {
            "cosine": -0.04, "rank_preservation": -0.06, "knn_accuracy_change": -0.001, "cka": -0.029,
            "target_knn_accuracy_change": -0.02, "draws": 2,
            "ci95": {
                "cosine": [-0.05, -0.03], "rank_preservation": [-0.07, -0.05], "knn_accuracy_change": [-0.01, 0.01],
                "cka": [-0.03, -0.02], "target_knn_accuracy_change": None,
            },
        },
        "per_class": {
            name: {**seen(drop), "knn_accuracy_change_per_class": [0.0] * len(classes), "coordinates_left_out": 3}
            for name, drop in zip(classes, drops, strict=True)
        },
    }  # fmt: skip


def _information(classes: list[str]) -> dict[str, Any]:
    """The first class gone, the second hidden, the third still read, the others hidden."""

    def one(i: int) -> dict[str, Any]:
        readout, lost = [(0.98, 0.95), (0.9, 0.04), (0.1, 0.02)][i] if i < 3 else (0.85, 0.1)
        return {"readout_lost": readout, "information_lost": lost, "relearned": 1 - lost, "relearned_without": 0.02,
                "recall": 0.98, "recall_removed": 0.98 * (1 - readout), "recall_refitted": 1 - lost}  # fmt: skip

    beside = {"information_lost": 0.12, "recall": 0.0, "recall_refitted": 0.83, "retained": 0.97,
              "retained_removed": 0.96, "n_train": 540}  # fmt: skip
    shares = {"readout_lost": 0.85, "information_lost": 0.18, "relearned": 0.79, "relearned_without": 0.02}
    return {**shares, "ci95": {key: [value - 0.02, value + 0.03] for key, value in shares.items()},
            "per_class": {name: one(i) | ({"never_seen": beside} if i == 2 else {}) for i, name in enumerate(classes)},
            "n_fitted": 600, "shots": 5,
            "steps": 30}  # fmt: skip


def _identifiability(classes: list[str]) -> dict[str, Any]:
    """The second class flagged for its control, the third for its overlap."""
    rows = {
        name: {"drop": 0.8, "control": 0.14 if i == 1 else 0.03, "overlap": 0.2 if i == 2 else 0.66,
               "chance_overlap": 0.015, "second_drop": 0.15, "flagged": i in (1, 2),
               "seed_overlap": 0.55 if i < 3 else None, "chance_seed_overlap": 0.02 if i < 3 else None}
        for i, name in enumerate(classes)
    }  # fmt: skip
    return {"drop": 0.8, "control": 0.04, "overlap": 0.61, "chance_overlap": 0.015, "second_drop": 0.15,
            "seed_overlap": 0.55, "chance_seed_overlap": 0.02, "per_class": rows,
            "method": "attribution", "share": 0.03, "groups": 3, "n_examples": 600,
            "control_limit": 0.1, "overlap_limit": 0.3}  # fmt: skip


def _selection(k: int, rng: random.Random) -> dict[str, Any]:
    ways = [("pearson", False), ("pearson", True), ("attribution", False), ("attribution", True), ("mask", False)]
    tried = [
        {"method": method, "contrastive": minus, "share": share, "keep": 5.0 if method == "mask" else None,
         "limit": 0.012,
         **{part: effect(10 * share * rng.uniform(1, 3), rng.choice([0.0, share * rng.uniform(0.1, 1)]))
            for part in ("validation", "test")}}
        for method, minus in ways for share in (0.005, 0.01, 0.02, 0.03)
    ]  # fmt: skip
    for way in tried:
        way["drop"] = way["validation"]["target_drop"]
    tried[0] |= {"limit": None, "validation": None, "test": None}  # too weak for its cost to others to be measured
    chosen = tried[-1]
    terms = ("target_drop", "regret", "agreement", "gross_loss", "other_change")
    gap = {key: chosen["test"][key] - chosen["validation"][key] for key in terms} | {"harm": 0.0}
    return {"rule": "the best on the validation part", "margin": 0.02, "chosen": [len(tried) - 1] * k,
            "candidates": tried, "controls": [{"share": 0.03, "validation": effect(0.01, 0.002)}],
            "validation": chosen["validation"], "gap": gap,
            "oracle": {"validation": effect(0.95, 0.0, oracle=True)}}  # fmt: skip


def _overall(classes: list[str], rng: random.Random) -> dict[str, Any]:
    removals = [
        {"skill": name, "neurons": 119, "share": 0.01, "accuracy": 0.55, "change": -0.3 - 0.01 * i / len(classes),
         "ci95": [-0.35, -0.27], "random_changes": [round(rng.gauss(0, 0.004), 3) for _ in range(5)]}
        for i, name in enumerate(classes)
    ]  # fmt: skip
    drawn = [change for removal in removals for change in removal["random_changes"]]
    return {"accuracy": 0.86, "n_test": 50 * len(classes), "removals": removals,
            "random_change": sum(drawn) / len(drawn)}  # fmt: skip


def _correlations(classes: list[str], sites: list[dict[str, Any]]) -> dict[str, Any]:
    def metric(column: str, select: float | None) -> dict[str, Any]:
        test = None if select is None else select - 0.05
        return {
            "select": select, "test": test,
            "sites": {site["name"]: {"select": select, "test": test} for site in sites},
            "last_block": {"select": select, "test": None if test is None else test - 0.2},
            "neurons": [] if select is None else [
                {"site": sites[-1]["name"], "unit": i, "column": column, "select": -select, "test": test}
                for i in range(10)
            ],
        }  # fmt: skip

    return {"statistic": "pearson", "top": 10, "chance": 0.04, "metrics": {
        "label": metric(f"label:{classes[0]}", 0.83), "confidence": metric("confidence", 0.4),
        "loss": metric("loss", None),
    }}  # fmt: skip


def _replacements(classes: list[str], rng: random.Random) -> dict[str, Any]:
    def row() -> dict[str, Any]:
        zero = rng.uniform(0.7, 0.9)
        gap = rng.uniform(0, 0.1)
        drops = {"zero": zero, "mean": zero - gap, "resample": zero - 0.02, "constant": zero / 2}
        ends = {name: [drop - 0.03, drop + 0.02] for name, drop in drops.items()}
        return {**drops, "marked": True, "ci95": ends}

    return {"average": row(), "per_class": {name: row() for name in classes}}


def _own_control(rng: random.Random, n_classes: int, drop: float) -> dict[str, Any]:
    per_class = [drop * rng.uniform(0.5, 1.5) for _ in range(n_classes)]
    mean = sum(per_class) / n_classes
    return {"draws": 20, "n_examples": 20 * n_classes, "target_drop": mean, "per_class": per_class, "spread": drop / 2,
            "ci95": [mean - 0.01, mean + 0.01]}  # fmt: skip


def sample_results(
    n_classes: int = 10, *, optional: bool = True, blocks: int = 4, names: dict[int, str] | None = None
) -> dict[str, Any]:
    """A `results.json`; `optional` adds the keys that a run may leave out, `names` gives classes other names."""
    rng = random.Random(n_classes)
    classes, sites = class_names(n_classes), _sites(blocks, 128)
    for index, name in (names or {}).items():
        classes[index] = name
    baseline = [round(rng.uniform(0.92, 1.0) * 50) / 50 for _ in classes]
    oracle = [[-b if i == j else 0.02 * (rng.random() < 0.1) for j, b in enumerate(baseline)] for i in range(n_classes)]
    found = _matrix(rng, baseline, 0.95, 0.012)
    results = {
        "schema": "skillfast.bench/1",
        "environment": _environment(),
        "config": _config(),
        "model": {
            "name": "vit_digits_128x4", "parameters": 809_482, "embed_dim": 128, "fingerprint": FINGERPRINT,
            "neurons": sum(site["width"] for site in sites), "sites": sites,
            "weights": dict(WEIGHTS),
            "trained": {"from": "scratch", "finetune": "all", "epochs": 60, "n_train": 898,
                        "validation_accuracy": 0.9733},
        },
        "dataset": {"name": "digits", "classes": classes, "n_select": 898, "n_validate": 449, "n_test": 50 * n_classes,
                    "digests": DIGESTS},
        "baseline": {"accuracy": sum(baseline) / n_classes, "per_class": baseline,
                     "n_test_per_class": [50] * n_classes},
        "removal_matrix": found,
        "selectivity": _selectivity(found, rng),
        "oracle": {**_selectivity(oracle, rng, oracle=True), "removal_matrix": oracle},
        "random_control": {**_selectivity(_matrix(rng, baseline, 0.02, 0.012), rng), "draws": 4,
                           "own": _own_control(rng, n_classes, 0.02)},
        "matched_control": _own_control(rng, n_classes, 0.05),
        "cost": _cost(),
    }  # fmt: skip
    if optional:
        results["replacements"] = _replacements(classes, rng)
        results["verdicts"] = {
            name: {"target_drop": 0.9, "ci95": [0.8, 0.95], "others_lose_at_most": 0.11, "visible_alone": 0.1,
                   "harm": {"plug_in": 0.004, "cross_fitted": -0.001, "noise_floor": 0.003, "ci95": [0.0, 0.01]},
                   "visible_of_all": 0.2, "harmed": [classes[-1]] if i == 0 else [],
                   "verdict": ("harmful", "undecided", "not above")[min(i, 2)]}
            for i, name in enumerate(classes)
        }  # fmt: skip
        results["layer_contribution"] = _contribution(classes, blocks, rng)
        results["standard_metrics"] = _standard_metrics(classes, found, rng)
        results["interference"] = _interference(classes, rng)
        results["selection"] = _selection(n_classes, rng)
        results["information"] = _information(classes)
        results["identifiability"] = _identifiability(classes)
        results["overall"] = _overall(classes, rng)
        results["correlations"] = _correlations(classes, sites)
    return results


def renamed(results: dict[str, Any], place: int, name: str) -> dict[str, Any]:
    """The same results with another name for a class, wherever it stands."""
    text, old = json.dumps(results), json.dumps(results["dataset"]["classes"][place])
    return json.loads(text.replace(old, json.dumps(name)))


def sample_skills(results: dict[str, Any]) -> dict[str, Any]:
    """The `skills.json` of the same run: more neurons in later blocks."""
    rng = random.Random(1)
    sites = results["model"]["sites"]
    skills = []
    for name in results["dataset"]["classes"]:
        neurons = {}
        for i, site in enumerate(sites):
            share = 0.12 * (i / len(sites)) ** 2 * rng.uniform(0.4, 1.6)
            chosen = sorted(rng.sample(range(site["width"]), min(site["width"], round(share * site["width"]))))
            if chosen:
                neurons[site["name"]] = chosen
        skills.append({"name": name, "metric": f"label:{name}", "method": "pearson", "settings": {"share": 0.03},
                       "neurons": neurons})  # fmt: skip
    return {"schema": "skillfast.skills/1", "fingerprint": FINGERPRINT, "skills": skills}
