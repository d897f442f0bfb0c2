"""Records: a file's values come back as they were, and what does not fit is refused in one line."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
import report_sample as sample
from conftest import one_line

from skillfast.errors import DataError
from skillfast.results import records
from skillfast.results.bench import BenchResults, Interference
from skillfast.results.evaluation import EvaluationResults, Spread
from skillfast.results.skills import Skills


@pytest.mark.parametrize("kind", [BenchResults, EvaluationResults, Skills])
def test_schemas_are_schemas(kind):
    made = records.schema(kind)
    jsonschema.Draft202012Validator.check_schema(made)
    assert made["title"] == kind.schema_name()


@pytest.mark.parametrize("optional", [False, True])
def test_a_file_comes_back_as_it_was(tmp_path, optional):
    values = sample.sample_results(3, optional=optional)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(values))
    found = records.read(BenchResults, path, "run it again")
    assert records.to_json(found) == values
    records.write(found, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == values


def test_numbers_of_numpy_are_written_to_the_last_digit():
    assert records.to_json(Spread(np.float64(0.1) + np.float64(0.2), 1 / 3, None)) == {
        "mean": 0.1 + 0.2, "low": 1 / 3, "high": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("baseline", "accuracy"), 97.2, "expected `float` <= 1.0 at baseline.accuracy, got 97.2"),
        (("baseline", "per_class", 1), "x", "expected `float` at baseline.per_class[1], got `str`"),
        (("model", "sites", 0, "kind"), "ffn", "expected a known value at model.sites[0].kind, got 'ffn'"),
        (("config", "batch_size"), 0, "expected `int` >= 1 at config.batch_size, got 0"),
        (("dataset", "classes"), ["a", "a", "b"], "expected classes with different names at dataset.classes, got one"),
        (("nothing",), 1, "expected keys that are known, got 'nothing'"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(tmp_path, place, value, words):
    values = sample.sample_results(3)
    parent = values
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    path = tmp_path / "results.json"
    path.write_text(json.dumps(values))
    message = one_line(DataError, records.read, BenchResults, path, "run it again")
    assert message.startswith(f"{path}: {words}")
    assert message.endswith("; run it again")


def test_a_value_out_of_range_is_not_written(tmp_path):
    values = records.made(BenchResults, sample.sample_results(3))
    values.removal_matrix[0][1] = 2.0
    assert "at removal_matrix[0][1], got 2.0" in one_line(DataError, records.write, values, tmp_path / "results.json")
    assert not list(tmp_path.iterdir())


def test_keys_that_go_together():
    values = sample.sample_results(3)["interference"]
    for name in ("own_angle_deg", "linkage"):
        without = {key: value for key, value in values.items() if key != name}
        assert f"expected the key {name} beside" in one_line(
            DataError, records.from_json, Interference, without, "results.json", "run it again"
        )
    nothing_turns = records.from_json(Interference, {**values, "own_angle_deg": None}, "results.json", "run it again")
    assert records.to_json(nothing_turns)["own_angle_deg"] is None
