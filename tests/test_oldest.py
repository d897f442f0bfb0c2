"""The lower bounds of the package, its build and the `test` extra are versions that CI runs the core tests on."""

from __future__ import annotations

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")


def test_lower_bounds_are_the_oldest_versions_of_ci():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = project["project"]["optional-dependencies"]
    declared = [
        *project["project"]["dependencies"],
        *project["build-system"]["requires"],
        *extras["test"],
    ]
    for requirement in map(Requirement, declared):
        bounds = [s.version for s in requirement.specifier if s.operator == ">="]
        assert len(bounds) == 1, f"{requirement}: expected one lower bound"
        assert requirement.name in pins, f"{requirement}: not in .ci/oldest.txt"
        assert Version(pins[requirement.name]) == Version(bounds[0]), requirement
