"""The state of an accumulator as plain values and tensors, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skillfast.errors import ArgumentError
from skillfast.metrics import from_json, to_json
from skillfast.statistics.bins.edges import exact_rows
from skillfast.statistics.bins.layout import BinLayout
from skillfast.statistics.bins.table import BinTable
from skillfast.statistics.bootstrap import Numbering
from skillfast.statistics.state import AccumulatorSettings, RowBuffer, State

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

SCHEMA = "skillfast.statistics/1"


def to_dict(state: State) -> dict[str, Any]:
    """Settings and copies of all tensors of a state, for `from_dict`."""
    state.refuse_faults()
    settings, numbering, replicates, table = state.settings, state.numbering, state.replicates, state.table
    rows, values = state.buffer.contents
    return {
        "schema": SCHEMA,
        "n_neurons": settings.n_neurons,
        "metrics": to_json(settings.metrics),
        "statistics": list(settings.statistics),
        "bins": settings.bins,
        "n_bootstrap": settings.n_bootstrap,
        "seed": settings.seed,
        "buffer_rows": settings.buffer_rows,
        "stream": [numbering.stream, numbering.shards, numbering.used, *sorted(numbering.merged)],
        "shifted": state.shifted,
        "wide": state.wide,
        "comoments": {name: tensor.clone() for name, tensor in state.moments.tensors().items()},
        "kept": {"rows": rows.clone(), "values": values.clone()},
        "table": None if table is None else table.state_dict(),
        "replicates": None if replicates is None else {n: t.clone() for n, t in replicates.tensors().items()},
    }


def from_dict(stored: Mapping[str, Any], device: torch.device, experts: int | None = None) -> State:
    """A state on a device, from what `to_dict` gave.

    Args:
        stored: What `to_dict` gave.
        device: Where the tensors are to lie.
        experts: How many experts' sums are stacked; None for those of one accumulator.

    Raises:
        ArgumentError: Another schema version, or tensors that do not fit the settings or each other.
    """
    state = State.empty(_settings(stored), device)
    if experts is not None:
        state.stack(experts)
    layout = BinLayout.of(state.settings.metrics, state.settings.bins)
    _check_shapes(state, stored, layout)
    _check_contents(stored, layout)
    for name, tensor in state.moments.tensors().items():
        tensor.copy_(stored["comoments"][name])
    stream, shards, used, *merged = stored["stream"]
    state.numbering = Numbering(stream, shards, used, set(merged))
    state.shifted, state.wide = stored["shifted"], stored["wide"]
    if state.replicates is not None:
        for name, tensor in state.replicates.tensors().items():
            tensor.copy_(stored["replicates"][name])
    if stored["table"] is not None:
        state.table = BinTable.from_state_dict(layout, stored["table"], device)
    state.buffer = _buffer(state.settings, stored["kept"]["rows"], stored["kept"]["values"], device)
    return state


def _buffer(settings: AccumulatorSettings, rows: torch.Tensor, values: torch.Tensor, device: torch.device) -> RowBuffer:
    """A buffer with these rows, already summed, and room for all that are kept before the edges are set."""
    n = len(rows)
    buffer = RowBuffer.empty(settings, max(n, exact_rows(settings.bins)) if n else 0, rows.dtype, device)
    buffer.filled = buffer.summed = n
    buffer.rows[:n] = rows
    buffer.values[:n] = values
    return buffer


def _settings(stored: Mapping[str, Any]) -> AccumulatorSettings:
    if stored.get("schema") != SCHEMA:
        raise ArgumentError(
            f"state_dict: expected schema {SCHEMA!r}, got {stored.get('schema')!r}; use the version that wrote it"
        )
    names = ("n_neurons", "bins", "n_bootstrap", "seed", "buffer_rows")
    return AccumulatorSettings(
        metrics=from_json(stored["metrics"]),
        statistics=tuple(stored["statistics"]),
        **{name: stored[name] for name in names},
    )


def _check_shapes(state: State, stored: Mapping[str, Any], layout: BinLayout) -> None:
    settings, kept = state.settings, stored["kept"]
    given = {**stored["comoments"], "kept rows": kept["rows"], "kept values": kept["values"]}
    expected = {name: list(tensor.shape) for name, tensor in state.moments.tensors().items()}
    expected["kept rows"] = [len(kept["values"]), settings.n_neurons]
    expected["kept values"] = [len(kept["rows"]), len(settings.metrics) + 1]
    if stored["table"] is not None:
        given |= {name: stored["table"].get(name) for name in ("edges", "table")}
        expected |= {"edges": [settings.n_neurons, settings.bins - 1], "table": [settings.n_neurons, layout.entries]}
    if state.replicates is not None:
        given |= {f"replicates {name}": tensor for name, tensor in (stored["replicates"] or {}).items()}
        expected |= {f"replicates {name}": list(t.shape) for name, t in state.replicates.tensors().items()}
    for name, shape in expected.items():
        found = None if given.get(name) is None else list(given[name].shape)
        if found != shape:
            raise ArgumentError(f"state_dict {name}: expected shape {shape}, got {found}; it is damaged, start again")


def _check_contents(stored: Mapping[str, Any], layout: BinLayout) -> None:
    """What shapes do not tell; raises ArgumentError."""
    counts, table = stored["comoments"]["count"], stored["table"]
    count = int(counts.sum())
    wrong = []
    if bool((counts < 0).any()):
        wrong.append(f"count {int(counts.min())}")
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
