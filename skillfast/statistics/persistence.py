"""The state of an accumulator as plain values and tensors, and back; one home for files of such states."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

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

    from skillfast.metrics import Metric

SCHEMA = "skillfast.statistics/1"
DAMAGED = "it is damaged, start again"

D = TypeVar("D", bound=Document)
S = TypeVar("S")
K = TypeVar("K", bound="Kept")


class Kept:
    """An accumulator whose state goes into a file and comes back from it.

    Attributes:
        FILE: Name of the file.
        SCHEMA: Name and version that the file carries.
    """

    FILE: ClassVar[str]
    SCHEMA: ClassVar[str]

    def state_dict(self) -> dict[str, Any]:
        """The whole state: plain values and tensors, for `from_state_dict` here or in another process."""
        raise NotImplementedError

    @classmethod
    def from_state_dict(cls: type[K], state: Mapping[str, Any], device: torch.device | str = "cpu") -> K:
        """An accumulator that goes on where `state_dict` was taken.

        Raises:
            ArgumentError: Another schema version, or tensors that do not fit the settings or each other.
        """
        raise NotImplementedError

    def save(self, directory: str | Path) -> Path:
        """Write the state as one safetensors file into the folder; returns its path."""
        return write(self.state_dict(), directory, self.FILE)

    @classmethod
    def load(cls: type[K], directory: str | Path, device: torch.device | str = "cpu") -> K:
        """Go on from what `save` wrote.

        Raises:
            DataError: The file is missing, broken or of another version, or its tensors do not fit its settings.
        """
        path, remedy = Path(directory) / cls.FILE, f"write it with {cls.__name__}.save"
        return read(path, cls.SCHEMA, remedy, lambda stored: cls.from_state_dict(stored, device))


def write(state: Mapping[str, Any], directory: str | Path, name: str) -> Path:
    """Write a state into a file of the folder; returns its path."""
    path = files.output_folder(directory) / name
    files.write_nested(path, state)
    return path


def read(path: Path, schema: str, remedy: str, made: Callable[[Mapping[str, Any]], S]) -> S:
    """Make of a file's state what it is the state of; raises DataError where either cannot be."""
    stored = files.read_nested(path, schema, remedy)
    try:
        return made(stored)
    except ArgumentError as error:
        raise DataError(f"{path}, {error}") from error


def record(kind: type[D], stored: Mapping[str, Any]) -> D:
    """The record of a state's plain values; raises ArgumentError where they are not as its type says."""
    schema = kind.schema_name()
    if stored.get("schema") != schema:
        found = files.short(repr(stored.get("schema")), 80)
        raise ArgumentError(f"state_dict: expected schema {schema!r}, got {found}; use the version that wrote it")
    metrics = stored.get("metrics")
    named = metrics if isinstance(metrics, dict) else {}
    nested = {**stored, **{f"metrics.{name}": value for name, value in named.items()}}
    if tensors := [name for name, value in nested.items() if isinstance(value, torch.Tensor)]:
        raise ArgumentError(f"state_dict {tensors[0]}: expected values by name, got a tensor; {DAMAGED}")
    try:
        return from_json(kind, stored, "state_dict", DAMAGED)
    except DataError as error:
        raise ArgumentError(str(error)) from error


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


def from_dict(stored: Mapping[str, Any], device: torch.device, experts: int | None = None) -> State:
    """A state on a device, from what `to_dict` gave.

    Args:
        stored: What `to_dict` gave.
        device: Where the tensors are to lie.
        experts: How many experts' sums are stacked; None for those of one accumulator.

    Raises:
        ArgumentError: Another schema version, or tensors that do not fit the settings or each other.
    """
    saved = record(SavedState, stored)
    settings = _settings(saved)
    if experts is not None and _told(counted := saved.comoments.get("count")) != (torch.int64, [experts]):
        raise ArgumentError(  # before tensors of that length are made
            f"state_dict count: expected {_said((torch.int64, [experts]))}, got {_said(_told(counted))}; {DAMAGED}"
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


def metrics_of(saved: Mapping[str, SavedMetric]) -> dict[str, Metric]:
    """Metrics by name, of what a file tells."""
    return metrics_from_json(
        {
            name: {"type": told.type} | ({} if told.classes is None else {"classes": told.classes})
            for name, told in saved.items()
        }
    )


def _settings(saved: SavedState) -> AccumulatorSettings:
    return AccumulatorSettings(
        n_neurons=saved.n_neurons,
        metrics=metrics_of(saved.metrics),
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
            raise ArgumentError(f"state_dict table: expected none with {settings.statistics}, got one; {DAMAGED}")
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
        if name not in expected and _told(given[name]) is None:  # no tensor, which is said of those
            raise ArgumentError(f"state_dict: expected known tensors, got {files.short(name, 80)!r}; {DAMAGED}")
        found = given.get(name)
        told = _told(found)
        if told != expected.get(name):
            raise ArgumentError(
                f"state_dict {name}: expected {_said(expected.get(name))}, got {_said(told)}; {DAMAGED}"
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
    of_metrics = [saved.comoments[name] for name in ("shift_y", "sum_y", "sum_yy", "sum_between")]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in of_metrics):  # activations may be anything
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
        raise ArgumentError(f"state_dict: expected a state of {count} rows, got {', '.join(wrong)}; {DAMAGED}")
