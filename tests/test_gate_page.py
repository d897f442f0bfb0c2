"""The page of docs/ on gates: its gate is read, and its commands and thresholds are those that there are."""

from __future__ import annotations

import re

import msgspec
import pytest
from conftest import ROOT

from skillfast.cli import main
from skillfast.report.comparison.words import CHECKS
from skillfast.results.gates import OverallGate, read_gates

PAGE = (ROOT / "docs" / "gate.md").read_text(encoding="utf-8")


def test_the_gate_is_read(tmp_path):
    (toml,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "gates.toml").write_text(toml)
    found = read_gates(tmp_path / "gates.toml").thresholds(["cat", "deer"])
    assert ("deer", "min_drop", 0.3) in found
    assert ("deer", "max_weakening", 0.05) in found


def test_every_threshold_is_told():
    names = {field.name for field in msgspec.structs.fields(OverallGate)}
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == names == set(CHECKS)


@pytest.mark.parametrize("line", re.findall(r"skillfast (?:bench|compare) .*", PAGE))
def test_commands_take_their_options(line):
    _, command, *words = re.split(r"\s+", line.split(">")[0].strip())
    known = {option for param in main.commands[command].params for option in param.opts}
    assert {word for word in words if word.startswith("--")} <= known
