"""The state of an accumulator as plain values and tensors, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillfast.errors import ArgumentError
from skillfast.metrics import from_json, to_json
from skillfast.statistics.bins.state import BinState
from skillfast.statistics.bins.table import BinLayout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from skillfast.statistics.neuron_statistics import NeuronStatistics

SCHEMA = "skillfast.statistics/1"


def state_of(statistics: NeuronStatistics) -> dict[str, Any]:
    """Settings and copies of all tensors; see `NeuronStatistics.state_dict`."""
    filled, replicates, table = statistics._filled, statistics._replicates, statistics._bins
    return {
        "schema": SCHEMA,
        "n_neurons": statistics.n_neurons,
        "metrics": to_json(statistics.metrics),
        "statistics": list(statistics.statistics),
        "bins": statistics.n_bins,
        "n_bootstrap": statistics.n_bootstrap,
        "seed": statistics.seed,
        "buffer_rows": statistics.buffer_rows,
        "stream": [statistics._stream, statistics._shards, statistics._numbered, *sorted(statistics._merged)],
        "shifted": statistics._shifted,
        "wide": statistics._wide,
        "comoments": {name: tensor.clone() for name, tensor in statistics._moments.state_dict().items()},
        "kept": {"rows": statistics._buffer[:filled].clone(), "values": statistics._values[:filled].clone()},
        "table": None if table is None else table.state_dict(),
        "replicates": None if replicates is None else {n: t.clone() for n, t in replicates.tensors().items()},
    }


def settings_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that made the accumulator; raises ArgumentError for another schema version."""
    if state.get("schema") != SCHEMA:
        raise ArgumentError(
            f"state_dict: expected schema {SCHEMA!r}, got {state.get('schema')!r}; use the version that wrote it"
        )
    names = ("n_neurons", "statistics", "bins", "n_bootstrap", "seed", "buffer_rows")
    return {**{name: state[name] for name in names}, "metrics": from_json(state["metrics"])}


def restore(statistics: NeuronStatistics, state: Mapping[str, Any]) -> None:
    """Put the tensors into an empty accumulator; raises ArgumentError where one has another shape."""
    layout = BinLayout.of(statistics.metrics, statistics.n_bins)
    _check_shapes(statistics, state, layout)
    _check_contents(state, layout)
    for name, tensor in statistics._moments.state_dict().items():
        tensor.copy_(state["comoments"][name])
    statistics._stream, statistics._shards, statistics._numbered, *merged = state["stream"]
    statistics._merged = set(merged)
    statistics._shifted, statistics._wide = state["shifted"], state["wide"]
    if statistics._replicates is not None:
        statistics._replicates.load(state["replicates"])
    if state["table"] is not None:
        statistics._bins = BinState.from_state_dict(layout, state["table"], statistics.device)
    rows, values = state["kept"]["rows"], state["kept"]["values"]
    if len(rows):
        statistics.reserve(len(rows), rows.dtype).copy_(rows)
        statistics._commit(values.to(statistics.device))
        statistics._summed = statistics._filled


def _check_shapes(statistics: NeuronStatistics, state: Mapping[str, Any], layout: BinLayout) -> None:
    kept, neurons = state["kept"], statistics.n_neurons
    stored = {**state["comoments"], "kept rows": kept["rows"], "kept values": kept["values"]}
    expected = {name: list(tensor.shape) for name, tensor in statistics._moments.state_dict().items()}
    expected["kept rows"] = [len(kept["values"]), neurons]
    expected["kept values"] = [len(kept["rows"]), len(statistics.metrics) + 1]
    if state["table"] is not None:
        stored |= {name: state["table"].get(name) for name in ("edges", "table")}
        expected |= {"edges": [neurons, statistics.n_bins - 1], "table": [neurons, layout.entries]}
    if statistics._replicates is not None:
        stored |= {f"replicates {name}": tensor for name, tensor in (state["replicates"] or {}).items()}
        expected |= {f"replicates {name}": list(t.shape) for name, t in statistics._replicates.tensors().items()}
    for name, shape in expected.items():
        found = None if stored.get(name) is None else list(stored[name].shape)
        if found != shape:
            raise ArgumentError(f"state_dict {name}: expected shape {shape}, got {found}; it is damaged, start again")


def _check_contents(state: Mapping[str, Any], layout: BinLayout) -> None:
    """What shapes do not tell; raises ArgumentError."""
    count, table = int(state["comoments"]["count"]), state["table"]
    wrong = []
    if count < 0:
        wrong.append(f"count {count}")
    if table is not None:
        if bool((table["edges"][:, 1:] < table["edges"][:, :-1]).any()):
            wrong.append("edges that do not ascend")
        wrong += [
            f"{len(table[f'values.{name}'])} values of {name!r}"
            for name in layout.hats
            if len(table[f"values.{name}"]) != count or not len(table[f"reference.{name}"])
        ]
    if wrong:
        raise ArgumentError(f"state_dict: expected a state of {count} rows, got {', '.join(wrong)}; it is damaged")
