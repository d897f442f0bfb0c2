"""What the scripts beside it share: their options, and the file of figures that each writes and shows as tables.

A script gives `run` its options, what measures (the options in, a dictionary for JSON out), and what makes Markdown of
such a dictionary.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GEMMA = "embedded:gemma-3-270m"


def options(doc: str | None) -> argparse.ArgumentParser:
    """A parser of `--quick`, `--json` and `--table`, described by a docstring's first line."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="at a size of seconds: whether it runs, not what it finds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the figures")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a file of figures, and do nothing else")
    return parser


def decoder_options(doc: str | None, words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """These and `--model`, `--dtype`, of a pretrained decoder; and `--label-words` of one that is asked by words."""
    parser = options(doc)
    parser.add_argument("--model", default=GEMMA)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    if words:
        parser.add_argument("--label-words", default=",".join(words), help="the words for the classes")
    return parser


def sst2_options(doc: str | None, words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """These and `--data`, of a decoder that reads SST-2."""
    parser = decoder_options(doc, words)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("SKILLFAST_DATA", "data")) / "sst2")
    return parser


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    arguments: Sequence[str] | None = None,
) -> None:
    """Measure, keep and show the figures, or show a file of them."""
    given = parser.parse_args(arguments)
    if given.table is not None:
        print(table(read(given.table)))
        return
    start = time.process_time()
    found = measure(given)
    found |= {"torch": torch.__version__, "cpu_minutes": (time.process_time() - start) / 60}
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{found['cpu_minutes']:.1f} minutes of processor time")
    print(table(found))


def read(path: Path) -> dict[str, Any]:
    """The figures of a file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def without_short(data: Path, name: str, least: int, folder: Path) -> None:
    """Write one of SST-2's files into a folder, without the texts of fewer words than `least`."""
    head, *lines = (data / name).read_text(encoding="utf-8").splitlines()
    column = head.split("\t").index("sentence")
    kept = [line for line in lines if len(line.split("\t")[column].split()) >= least]
    (folder / name).write_text("\n".join([head, *kept]) + "\n", encoding="utf-8")
