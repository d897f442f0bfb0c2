"""The comparison of ways to unlearn a class, on the digits, with few steps."""

from __future__ import annotations

import functools
import importlib.util
import sys

import pytest
from conftest import ROOT

import skillfast
from skillfast.runs.session import open_session


@pytest.fixture(scope="module")
def unlearning():
    path = ROOT / "examples" / "unlearning" / "unlearning.py"
    spec = importlib.util.spec_from_file_location("unlearning", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["unlearning"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no neuron was chosen")
def test_every_way_leaves_what_it_should(unlearning, trained_digits, monkeypatch):
    said = []
    monkeypatch.setattr(unlearning, "MOST_STEPS", 10)
    monkeypatch.setattr(skillfast, "learn_masks", functools.partial(skillfast.learn_masks, steps=90))
    with open_session(skillfast.BenchConfig.of()) as session:
        rows = unlearning.compare(session.subject, 3, tune=24, retrain_epochs=5, found=said.append)
    found = {row.name: row for row in rows}
    assert said == rows
    intact, mask, erased, retrained = (
        found[name] for name in ("intact", "removal, learned mask", "removal, erasing mask", "retrained without it")
    )
    assert (intact.readout_lost, intact.information_lost, intact.relearned_in) == (0, 0, 0)
    assert intact.forgotten > 0.8
    assert max(mask.forgotten, erased.forgotten) < 0.5
    assert min(mask.retained, erased.retained) > intact.retained - 0.05
    assert mask.information_lost < 0.5 * mask.readout_lost  # hidden more than gone
    assert retrained.forgotten == 0
    assert retrained.readout_lost == 1
    assert retrained.information_lost < 0.9  # a probe reads a class that the model never saw
    assert retrained.relearned_in != 0
    assert found["NegGrad+"].forgotten < intact.forgotten
    assert min(row.seconds for row in rows[1:]) > 0
