"""The state of an accumulator as plain values and tensors, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import torch
from msgspec import Meta

from skillfast import files
from skillfast.errors import ArgumentError, DataError
from skillfast.metrics import from_json as metrics_from_json
from skillfast.metrics import to_json
from skillfast.results.records import Document, Positive, Record, from_json
from skillfast.statistics.bins.edges import exact_rows
from skillfast.statistics.bins.layout import BinLayout
from skillfast.statistics.bins.table import BinTable
from skillfast.statistics.bootstrap import Numbering
from skillfast.statistics.state import AccumulatorSettings, RowBuffer, State, needs_bins

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

A = TypeVar("A")
D = TypeVar("D", bound=Document)
SCHEMA = "skillfast.statistics/1"
_REMEDY = "it is damaged, start again"


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


class SavedMetric(Record, frozen=True):
    """A metric's kind; the classes of a categorical one."""

    type: Literal["categorical", "binary", "continuous"]
    classes: list[str] | None = None

    def __post_init__(self) -> None:
        if (self.type == "categorical") != (self.classes is not None):
            raise ValueError(f"expected classes of a categorical metric alone, got {self.classes} of a {self.type} one")


class SavedState(Document, frozen=True, tag="skillfast.statistics/1", tag_field="schema"):
    """What `to_dict` gives."""

    n_neurons: Positive
    metrics: dict[str, SavedMetric]
    statistics: list[str]
    bins: Positive
    n_bootstrap: Positive | None
    seed: int
    buffer_rows: Positive
    stream: Annotated[list[int], Meta(min_length=3)]
    shifted: bool
    wide: bool
    comoments: dict[str, torch.Tensor]
    kept: dict[Literal["rows", "values"], torch.Tensor]
    table: dict[str, Any] | None
    replicates: dict[str, torch.Tensor] | None

    def __post_init__(self) -> None:
        if len(self.kept) < 2:
            raise ValueError("expected rows and values at kept, got fewer")
        if self.table is not None and self.table.get("dtype") not in DTYPES:
            raise ValueError(f"expected one of {', '.join(DTYPES)} at table.dtype, got {self.table.get('dtype')!r}")


DTYPES = ("float64", "float32", "float16", "bfloat16")  # of activations


def checked(kind: type[D], stored: Mapping[str, Any]) -> D:
    """A state as a record; raises ArgumentError where it is of another version, or not as the record says."""
    if stored.get("schema") != kind.schema_name():
        raise ArgumentError(
            f"state_dict: expected schema {kind.schema_name()!r}, got {stored.get('schema')!r}; use the version that "
            "wrote it"
        )
    metrics = stored.get("metrics")
    named = metrics if isinstance(metrics, dict) else {}
    nested = {**stored, **{f"metrics.{name}": value for name, value in named.items()}}
    if tensors := [name for name, value in nested.items() if isinstance(value, torch.Tensor)]:
        raise ArgumentError(f"state_dict {tensors[0]}: expected values by name, got a tensor; {_REMEDY}")
    try:
        return from_json(kind, stored, "state_dict", _REMEDY)
    except DataError as error:
        raise ArgumentError(str(error)) from error


def write(path: Path, state: Mapping[str, Any]) -> Path:
    """Write a `state_dict` as a file; returns its path, for `read`."""
    files.output_folder(path.parent)
    files.write_nested(path, state)
    return path


def read(path: Path, schema: str, made: Callable[[dict[str, Any]], A], by: str) -> A:
    """An accumulator of the state that `write` wrote.

    Args:
        path: The file.
        schema: Name and version that the state carries.
        made: Makes an accumulator of a `state_dict`.
        by: What writes such files, for the error.

    Raises:
        DataError: The file is missing, broken or of another version, or its tensors do not fit its settings.
    """
    state = files.read_nested(path, schema, f"write it with {by}")
    try:
        return made(state)
    except ArgumentError as error:
        raise DataError(f"{path}, {error}") from error


def from_dict(stored: Mapping[str, Any], device: torch.device, experts: int | None = None) -> State:
    """A state on a device, from what `to_dict` gave.

    Args:
        stored: What `to_dict` gave.
        device: Where the tensors are to lie.
        experts: How many experts' sums are stacked; None for those of one accumulator.

    Raises:
        ArgumentError: Another schema version, or tensors that do not fit the settings or each other.
    """
    saved = checked(SavedState, stored)
    settings = _settings(saved)
    if experts is not None and _told(counted := saved.comoments.get("count")) != (torch.int64, [experts]):
        raise ArgumentError(  # before tensors of that length are made
            f"state_dict count: expected {_said((torch.int64, [experts]))}, got {_said(_told(counted))}; {_REMEDY}"
        )
    layout = BinLayout.of(settings.metrics, settings.bins)
    _check_tensors(_empty(settings, torch.device("meta"), experts), saved, layout)  # takes no memory
    _check_contents(saved, layout)
    state = _empty(settings, device, experts)
    for name, tensor in state.moments.tensors().items():
        tensor.copy_(saved.comoments[name])
    stream, shards, used, *merged = saved.stream
    state.numbering = Numbering(stream, shards, used, set(merged))
    state.shifted, state.wide = saved.shifted, saved.wide
    if state.replicates is not None and saved.replicates is not None:
        for name, tensor in state.replicates.tensors().items():
            tensor.copy_(saved.replicates[name])
    if saved.table is not None:
        state.table = BinTable.from_state_dict(layout, saved.table, device)
    state.buffer = _buffer(settings, saved.kept["rows"], saved.kept["values"], device)
    return state


def _empty(settings: AccumulatorSettings, device: torch.device, experts: int | None) -> State:
    state = State.empty(settings, device)
    if experts is not None:
        state.stack(experts)
    return state


def _buffer(settings: AccumulatorSettings, rows: torch.Tensor, values: torch.Tensor, device: torch.device) -> RowBuffer:
    """A buffer with these rows, already summed, and room for all that are kept before the edges are set."""
    n = len(rows)
    buffer = RowBuffer.empty(settings, max(n, exact_rows(settings.bins)) if n else 0, rows.dtype, device)
    buffer.filled = buffer.summed = n
    buffer.rows[:n] = rows
    buffer.values[:n] = values
    return buffer


def _settings(saved: SavedState) -> AccumulatorSettings:
    metrics = {
        name: {"type": told.type} | ({"classes": told.classes} if told.classes else {})
        for name, told in saved.metrics.items()
    }
    return AccumulatorSettings(
        n_neurons=saved.n_neurons,
        metrics=metrics_from_json(metrics),
        statistics=tuple(saved.statistics),
        bins=saved.bins,
        n_bootstrap=saved.n_bootstrap,
        seed=saved.seed,
        buffer_rows=saved.buffer_rows,
    )


def _check_tensors(empty: State, saved: SavedState, layout: BinLayout) -> None:
    """Raises ArgumentError where a tensor has another type or shape than a state of these settings has."""
    settings, kept, counted = empty.settings, saved.kept, saved.comoments.get("count")
    given: dict[str, Any] = {**saved.comoments, **{f"kept {name}": tensor for name, tensor in kept.items()}}
    expected = {name: _kind(tensor) for name, tensor in empty.moments.tensors().items()}
    rows = kept["rows"]
    real = rows.dtype if str(rows.dtype).removeprefix("torch.") in DTYPES else torch.float32
    expected["kept rows"] = real, [len(rows) if rows.dim() else 0, settings.n_neurons]
    expected["kept values"] = torch.float64, [expected["kept rows"][1][0], len(settings.metrics) + 1]
    if saved.table is not None:
        if not needs_bins(settings.statistics):
            raise ArgumentError(f"state_dict table: expected none with {settings.statistics}, got one; {_REMEDY}")
        given |= {name: value for name, value in saved.table.items() if name != "dtype"}
        expected |= {
            "edges": (torch.float32, [settings.n_neurons, settings.bins - 1]),
            "table": (torch.int32, [settings.n_neurons, layout.entries]),
        }
        places = saved.table.get("overflow_where")
        many = [len(places) if isinstance(places, torch.Tensor) and places.dim() else 0]
        expected |= dict.fromkeys(("overflow_where", "overflow_units"), (torch.int64, many))
        for name in layout.hats:
            expected[f"values.{name}"] = torch.float64, [0 if counted is None or counted.dim() else int(counted)]
            reference = saved.table.get(f"reference.{name}")
            long = len(reference) if isinstance(reference, torch.Tensor) and reference.dim() else 0
            expected[f"reference.{name}"] = torch.float64, [max(long, 1)]
    if empty.replicates is not None:
        expected |= {f"replicates {name}": _kind(tensor) for name, tensor in empty.replicates.tensors().items()}
    given |= {f"replicates {name}": tensor for name, tensor in (saved.replicates or {}).items()}
    for name in sorted({*expected, *given}):
        found = given.get(name)
        told = _told(found)
        if told != expected.get(name):
            raise ArgumentError(
                f"state_dict {name}: expected {_said(expected.get(name))}, got {_said(told)}; {_REMEDY}"
            )


def _kind(tensor: torch.Tensor) -> tuple[torch.dtype, list[int]]:
    return tensor.dtype, list(tensor.shape)


def _told(found: object) -> tuple[torch.dtype, list[int]] | None:
    return _kind(found) if isinstance(found, torch.Tensor) else None


def _said(kind: tuple[torch.dtype, list[int]] | None) -> str:
    return "none" if kind is None else f"{str(kind[0]).removeprefix('torch.')} {kind[1]}"


def _check_contents(saved: SavedState, layout: BinLayout) -> None:
    """What types and shapes do not tell; raises ArgumentError."""
    counts, table, rows = saved.comoments["count"], saved.table, len(saved.kept["rows"])
    count, wrong = int(counts.sum()), []
    if bool((counts < 0).any()) or count < rows:
        wrong.append(f"count {int(counts.min())} with {rows} rows kept")
    if not all(bool(torch.isfinite(tensor).all()) for name, tensor in saved.comoments.items() if "y" in name):
        wrong.append("metrics that are not finite")
    values = saved.kept["values"].T
    for (name, metric), value in zip(layout.metrics.items(), values, strict=False):
        if not bool(metric.fits(value).all()):
            wrong.append(f"kept values of {name!r} that are not {metric.expected}")
    if rows and not bool(torch.isfinite(values[-1]).all()):
        wrong.append("groups that are not finite")
    if table is not None:
        tensors = {name: tensor for name, tensor in table.items() if isinstance(tensor, torch.Tensor)}
        edges, places = tensors["edges"], tensors["overflow_where"]
        if not bool((edges[:, 1:] >= edges[:, :-1]).all()):
            wrong.append("edges that do not ascend")
        if int(tensors["table"].min()) < 0:
            wrong.append("counts below 0")
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < tensors["table"].numel():
            wrong.append("overflow beyond the table")
        for name in layout.hats:
            reference = tensors[f"reference.{name}"]
            if not bool(torch.isfinite(tensors[f"values.{name}"]).all()) or not bool(torch.isfinite(reference).all()):
                wrong.append(f"values of {name!r} that are not finite")
    if wrong:
        raise ArgumentError(f"state_dict: expected a state of {count} rows, got {', '.join(wrong)}; {_REMEDY}")
