"""Mutated files of every kind: each is refused in one line, or read and used without a traceback.

`make fuzz` draws 10,000 of each kind; `SKILLFAST_FUZZ=N pytest tests/test_fuzz.py -k decisions -s` N of one.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import KINDS

from skillfast.errors import SkillfastError

EXAMPLES = int(os.environ.get("SKILLFAST_FUZZ", "0"))
pytestmark = pytest.mark.filterwarnings("ignore")  # what is odd in a file may be warned of, too


def cases():
    for name, kind in KINDS.items():
        marks = [pytest.mark.slow] if kind.slow and not EXAMPLES else []
        timeout = [pytest.mark.timeout(0)] if EXAMPLES else []
        yield pytest.param(kind, EXAMPLES or (15 if kind.heavy else 60), id=name, marks=[*marks, *timeout])


@pytest.mark.parametrize(("kind", "examples"), cases())
def test_a_mutated_file_is_read_or_refused_in_one_line(kind, examples, tmp_path, request):
    kind.make(tmp_path)
    path = tmp_path / kind.file
    raw = path.read_bytes()
    kind.read(tmp_path)  # the example itself is read
    seen: Counter[str] = Counter()

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.integers(0, 2**32 - 1))
    def mutated(seed):
        path.write_bytes(kind.change(random.Random(seed), raw))
        try:
            kind.read(tmp_path)
            seen["read"] += 1
        except SkillfastError as error:
            text = str(error)
            assert len(text.splitlines()) == 1, text
            assert "expected " in text or "had another " in text, text  # another run's remains are no error
            assert len(text) < 1500
            seen["refused"] += 1

    mutated()
    assert seen["refused"] > 0
    if EXAMPLES:
        print(f"\n{request.node.callspec.id}: {seen['refused']:,} refused, {seen['read']:,} read")
