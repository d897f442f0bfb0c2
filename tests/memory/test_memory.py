"""Memory is measured: the accumulator's peak does not grow with the number of rows."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT

NEURONS = 11_520  # a quarter of ViT-B/16's; bench/memory.py measures all of them


def peak(rows):
    command = [sys.executable, ROOT / "bench" / "memory.py", str(rows), str(NEURONS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/", timeout=300)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_peak_does_not_grow_with_the_rows():
    few, many = peak(4_096), peak(16_384)
    # At this size the allocator's own noise is up to 2 %; at full size the whole growth stays below that.
    assert many["counting_mib"] <= 1.05 * few["counting_mib"]
    assert many["counting_mib"] <= 1.2 * 1024 / 4
    assert many["state_mib"] >= 150  # the table is there
