"""Saved states that are none: what mutated files were found to get past the readers with."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import one_line
from safetensors.torch import save_file

from skillfast import Categorical, Continuous, NeuronStatistics
from skillfast.errors import ArgumentError, DataError
from skillfast.files import metadata, read_nested
from skillfast.models.sites import Site
from skillfast.statistics.routed import RoutedStatistics
from skillfast.statistics.saved_sites import saved_sites, sites_of
from skillfast.statistics.tokens import TokenStatistics

METRICS = {"label": Categorical(("a", "b"))}
SETTINGS = {"bins": 4, "n_bootstrap": None, "seed": 0, "buffer_rows": 4, "device": torch.device("cpu")}


def test_a_categorical_metric_without_classes_is_refused():
    saved = NeuronStatistics(2, METRICS).state_dict()
    saved["metrics"]["label"]["classes"] = []
    with pytest.raises(ArgumentError, match="classes: expected at least two different names, got \\[\\]"):
        NeuronStatistics.from_state_dict(saved)


def test_a_table_of_more_than_tensors_is_refused():
    acc = NeuronStatistics(2, METRICS, bins=2)
    acc.calibrate(torch.arange(80.0).view(40, 2), {"label": torch.arange(40) % 2})
    saved = acc.state_dict()
    saved["table"]["more"] = "x"
    told = one_line(ArgumentError, NeuronStatistics.from_state_dict, saved)
    assert told == "state_dict: expected known tensors, got 'more'; it is damaged, start again"


def test_a_schema_that_is_anything_is_told_in_a_line():
    saved = NeuronStatistics(2, METRICS).state_dict() | {"schema": {"x": torch.ones(100, 3)}}
    told = one_line(ArgumentError, NeuronStatistics.from_state_dict, saved)
    assert "got {'x': tensor([[1., 1., 1.], [1., 1., 1.]" in told
    assert len(told) < 250


def test_a_metric_that_is_a_tensor_is_refused():
    saved = NeuronStatistics(2, METRICS).state_dict()
    saved["metrics"]["label"] = torch.ones(2)
    told = one_line(ArgumentError, NeuronStatistics.from_state_dict, saved)
    assert told.startswith("state_dict metrics.label: expected values by name, got a tensor")


def test_experts_of_other_statistics_than_their_block_are_refused():
    saved = RoutedStatistics(2, 3, METRICS, ("pearson", "auroc"), **SETTINGS).state_dict()
    saved["experts"]["1"]["statistics"] = ["pearson", "spearman"]
    told = one_line(ArgumentError, RoutedStatistics.from_state_dict, saved)
    assert told == "state_dict of an expert: expected statistics auroc, got spearman; it is damaged"


def test_tokens_without_a_statistic_are_refused():
    saved = TokenStatistics(2, METRICS, ["pearson"], **SETTINGS).state_dict() | {"pearson": False}
    told = one_line(ArgumentError, TokenStatistics.from_state_dict, saved)
    assert told == "state_dict: expected at least one statistic, got none; it is damaged, start again"


def test_groups_and_types_of_tables_are_checked():
    metrics = {"label": Categorical(2), "loss": Continuous()}
    acc = NeuronStatistics(2, metrics, bins=2)
    values = {"label": torch.arange(40) % 2, "loss": torch.arange(40.0)}
    acc.update(torch.arange(80.0).view(40, 2)[:9], {name: value[:9] for name, value in values.items()})
    saved = acc.state_dict()
    saved["kept"]["values"][3, -1] = torch.nan
    told = one_line(ArgumentError, NeuronStatistics.from_state_dict, saved)
    assert told == "state_dict: expected a state of 9 rows, got groups that are not finite; it is damaged, start again"
    acc = NeuronStatistics(2, metrics, bins=2)
    acc.calibrate(torch.arange(80.0).view(40, 2), values)
    saved = acc.state_dict()
    saved["table"]["dtype"] = "int8"
    told = one_line(ArgumentError, NeuronStatistics.from_state_dict, saved)
    assert "at table.dtype, got 'int8'" in told


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rows_that_are_kept_come_back_in_their_own_type(dtype):
    acc = NeuronStatistics(2, METRICS)
    acc.update(torch.arange(8.0).view(4, 2).to(dtype), {"label": [0, 1, 1, 0]})
    saved = acc.state_dict()
    assert saved["kept"]["rows"].dtype == dtype
    back = NeuronStatistics.from_state_dict(saved).state_dict()["kept"]["rows"]
    assert back.dtype == dtype
    assert torch.equal(back, saved["kept"]["rows"])
    saved["kept"]["rows"] = saved["kept"]["rows"].int()
    told = one_line(ArgumentError, NeuronStatistics.from_state_dict, saved)
    assert "kept rows: expected float32 [4, 2], got int32 [4, 2]" in told


def test_sites_of_one_name_are_refused():
    site = Site("blocks.0.mlp", "mlp", 0, "blocks.0.mlp.fc2", 4)
    assert sites_of(saved_sites([site])) == (site,)
    with pytest.raises(ValueError, match=r"^expected sites with different names at sites, got one twice$"):
        sites_of(saved_sites([site, site]))


def test_a_tensor_of_a_size_that_cannot_be_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"empty": torch.zeros(0, 3)}, path, metadata=metadata({"schema": "x/1"}, {}))
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header["empty"]["shape"] = [0, 2**63]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    told = one_line(DataError, read_nested, path, "x/1", "again")
    assert told.endswith("expected empty of a size that can be, got (0, 9223372036854775808); again")
