"""Mutated files of every kind: each is refused in one line, or read and used without a traceback.

`make fuzz` draws 10,000 of each kind.
"""

from __future__ import annotations

import random
from collections import Counter

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import KINDS, Kind

from skillfast.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore")  # what is odd in a file may be warned of, too


def cases():
    for name, kind in KINDS.items():
        yield pytest.param(kind, id=name, marks=[pytest.mark.slow] if kind.slow else [])


@pytest.mark.parametrize("kind", cases())
def test_a_mutated_file_is_read_or_refused_in_one_line(kind, tmp_path):
    raw = kind.example(tmp_path)
    seen: Counter[bool] = Counter()

    @settings(
        max_examples=15 if kind.heavy else 60,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32 - 1))
    def mutated(seed):
        seen[kind.refuses(tmp_path, kind.change(random.Random(seed), raw))] += 1

    mutated()
    assert seen[True] > 0


def test_what_a_reader_raises_is_shown_and_ends_nothing(monkeypatch, capsys):
    def read(folder):
        number = int((folder / "n").read_bytes())
        if number % 3 == 1:
            raise DataError(f"n: expected something else, got {number}")
        if number % 3 == 2:
            raise KeyError(number)

    kind = Kind("n", lambda folder: (folder / "n").write_bytes(b"0"), read, lambda draw, _: b"%d" % draw.randrange(99))
    monkeypatch.setitem(KINDS, "numbers", kind)
    drawn = [random.Random(seed).randrange(99) % 3 for seed in range(5, 45)]
    assert fuzz.fuzz("numbers", 5, 40) == drawn.count(2) > 0
    out = capsys.readouterr().out
    assert f"numbers, seed {5 + drawn.index(2)}:\nTraceback" in out
    assert out.count("Traceback") == 1
    counts = f"{drawn.count(1)} refused, {drawn.count(0)} read, {drawn.count(2)} failed at 1 places"
    assert f"numbers: {counts}" in out
