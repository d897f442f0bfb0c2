"""The README's tables of a run on a GPU, from the file that `bench/gpu.py` wrote and from nothing else.

    python bench/gpu_table.py bench/results/gpu-NAME.json                      # to read
    python bench/gpu_table.py bench/results/gpu-NAME.json --write README.md    # between its two marks

Every figure is one of the file's, or a ratio of two of them; what the file has not got has no row, and a case that
failed says so. Beside an op's share of a copy stands what a roofline predicted: `bench/results/sass-sm90.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

PREDICTED = Path(__file__).parent / "results" / "sass-sm90.json"
MARKS = ("<!-- the GPU's tables begin -->", "<!-- the GPU's tables end -->")
LIMITS = {"pooled, all four, on the device": 1.04, "every token, Pearson, on the device": 1.10}
CAPTURE, SWEEP = 0.90, 12.0
MODELS = {"vit_small": "ViT-S/16", "vit_base": "ViT-B/16", "llama": "Llama, 1.2e9 weights"}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table; nothing without rows."""
    if not rows:
        return []
    return [
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def ops(cases: dict, predicted: dict) -> list[str]:
    """Each op's share of what a copy moves in its time."""
    speed = cases.get("copy", {}).get("bytes_per_second")
    if not speed:
        return []
    rows = []
    for name, case in cases.get("ops", {}).items():
        if not isinstance(case, dict):
            continue
        told = predicted.get(name) or predicted.get(name.split(",")[0])
        share = case["bytes"] / case["seconds"] / speed
        wanted = f"{CAPTURE:.0%}" if name.startswith("act_mask_pool") else ""
        prediction = "" if told is None else f"{told['predicted_share_of_copy']:.0%}"
        rows.append((name, f"{1e6 * case['seconds']:,.1f}", f"{share:.0%}", prediction, wanted))
    product = cases["copy"].get("operations_per_second", 0)
    note = f"A copy moves {speed / 1e12:.2f} TB/s (read and written), a bfloat16 product {product / 1e12:,.0f} TFLOP/s."
    return ["", note, *table(("op", "microseconds", "share of copy", "predicted", "wanted"), rows)]


def whole(cases: dict) -> list[str]:
    """Traced over plain steps, end to end."""
    rows = []
    for case, title in MODELS.items():
        for name, found in cases.get(case, {}).items():
            if isinstance(found, dict) and "ratio" in found:
                limit = LIMITS.get(name if case != "llama" else f"{name}, on the device")
                spread = f"{found['least']:.3f} to {found['most']:.3f}"
                seconds = f"{1e3 * found['seconds']:,.1f}, {1e3 * found['plain_seconds']:,.1f}"
                rows.append(
                    (title, name, f"{found['ratio']:.3f}", spread, seconds, "" if limit is None else f"{limit:.2f}")
                )
    head = ("model", "case", "ratio", "least and most", "milliseconds of either", "wanted")
    return table(head, rows)


def removals(cases: dict) -> list[str]:
    """The loop over a sweep's conditions, in sweeps."""
    found = cases.get("sweep", {})
    rows = [(name, f"{pair['ratio']:.1f}") for name, pair in found.items() if isinstance(pair, dict)]
    return table((f"a sweep of {found.get('conditions')} conditions, ViT-B/16", "times as fast as a loop"), rows)


def others(cases: dict) -> list[str]:
    """Single figures: waits, masks, attribution, ranks, a whole run."""
    rows = []
    for case, title in MODELS.items():
        rows += [
            (
                f"{title}, {name.removesuffix('waits_per_step').strip(': ') or 'pooled, all four'}: waits per step",
                f"{count:g}",
            )
            for name, count in cases.get(case, {}).items()
            if name.endswith("waits_per_step")
        ]
    rows += [
        (f"sweep, {name.removesuffix(': waits')}: waits in all", f"{count}")
        for name, count in cases.get("sweep", {}).items()
        if name.endswith(": waits")
    ]
    units = {
        "skills": {
            "attribute_seconds": "attribution of {images} images, seconds",
            "mask_step_seconds": "a step of masks, seconds",
            "waits_per_mask_step": "a step of masks: waits",
            "waits_per_attribution": "a batch of an attribution: waits",
        },
        "ranks": {"seconds": "exact ranks of {rows} rows, {neurons} neurons, seconds"},
        "launches": {
            name: f"{name}: microseconds of the host" for name in ("act_mask_pool", "neuron_scale", "comoments_update")
        },
        "bench": {
            "seconds": "skillfast bench, CIFAR-10, no weights, seconds",
            "accuracy": "its accuracy",
            "target_drop": "its target drop",
        },
    }
    for case, names in units.items():
        found = cases.get(case, {})
        for name, title in names.items():
            if name in found:
                value = 1e6 * found[name] if case == "launches" else found[name]
                rows.append((title.format(**found), f"{value:.4g}"))
    return table(("what", "figure"), rows)


def tables(result: dict, predicted: dict) -> str:
    """All tables, and which cases have none."""
    made, cases = result["machine"], result["cases"]
    versions = ", ".join(f"{name} {made[name.lower()]}" for name in ("skillfast", "torch", "Triton", "Python"))
    lines = [f"{made['device']}, {made['date']}: {versions}."]
    good = {name: case for name, case in cases.items() if not {"failed", "begun", "left_out"} & case.keys()}
    for part in (ops(good, predicted), whole(good), removals(good), others(good)):
        lines += part
    for name, case in cases.items():
        if name not in good:
            told = case.get("failed") or case.get("left_out") or "the process ended in it"
            lines += ["", f"{name}: no figures ({told.splitlines()[0]})."]
    return "\n".join(lines) + "\n"


def written(page: str, text: str) -> str:
    """The page with the tables between its marks; raises ValueError for a page without them."""
    before, begin, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(f"page: expected the marks {MARKS[0]} and {MARKS[1]}, got a page without; add them")
    return f"{before}{begin}\n{text}{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--write", type=Path, help="a page to write the tables into")
    arguments = parser.parse_args()
    text = tables(json.loads(arguments.file.read_text()), json.loads(PREDICTED.read_text())["programs"])
    if arguments.write is None:
        print(text, end="")
    else:
        arguments.write.write_text(written(arguments.write.read_text(), text))


if __name__ == "__main__":
    main()
