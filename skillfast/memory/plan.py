"""`skillfast plan`: what tracing a language model takes, from its configuration alone."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ArgumentError, ModelError
from skillfast.memory import footprint
from skillfast.memory.config import PlanConfig
from skillfast.memory.state import state_bytes
from skillfast.memory.usage import free_bytes
from skillfast.metrics import parse_metrics
from skillfast.models.coverage import coverage
from skillfast.models.huggingface import load_config, skeleton
from skillfast.models.sites import Site, choose_sites
from skillfast.statistics.bins.edges import exact_rows
from skillfast.statistics.state import needs_bins
from skillfast.vocabulary import BUFFER_ROWS

if TYPE_CHECKING:
    from skillfast.metrics import Metric
    from skillfast.models.coverage import Coverage

_SCORES = 6 * 8  # bytes per neuron and column of all statistics and their bounds, float64


@dataclass(frozen=True)
class DevicePlan:
    """What one device holds, in bytes.

    Attributes:
        parts: Which parts of the model lie there: the first and the last of them.
        neurons: Number of traced neurons on the device.
        weights: Bytes of the weights on the device.
        state: Bytes of the accumulator's state on the device; exact.
        buffer: Rows that wait for an update; while the bins' edges are not set, all rows so far.
        forward: Most that a forward takes besides, at once.
        capacity: What the device has; None where nobody said.
    """

    parts: tuple[str, str]
    neurons: int
    weights: int
    state: int
    buffer: int
    forward: int
    capacity: int | None = None

    @property
    def peak(self) -> int:
        """Most that the device holds at once."""
        return self.weights + self.state + self.buffer + self.forward

    @property
    def fits(self) -> bool | None:
        """Whether it can; None where nobody said what the device has."""
        return None if self.capacity is None else self.peak <= self.capacity


@dataclass(frozen=True)
class Plan:
    """What tracing a model takes.

    Attributes:
        model: Name of the model.
        settings: How it shall be traced.
        parameters: Number of the model's parameters.
        sites: The traced ones.
        devices: What each device holds.
        coverage: What the model's sites hold of what its blocks do; None where that could not be told.
        host: Bytes of the results, and of continuous metrics' scalars, in the host's memory at the end.
        remedies: What to turn down where it does not fit, and the largest peak that it leaves: the least first.
    """

    model: str
    settings: PlanConfig
    parameters: int
    sites: tuple[Site, ...]
    devices: tuple[DevicePlan, ...]
    host: int
    coverage: Coverage | None = None
    remedies: tuple[tuple[str, int], ...] = ()

    @property
    def neurons(self) -> int:
        """Number of neurons in all traced sites."""
        return sum(site.width for site in self.sites)

    @property
    def state(self) -> int:
        """Bytes of the accumulators' state on all devices; exact."""
        return sum(device.state for device in self.devices)

    @property
    def fits(self) -> bool:
        """Whether nothing is known not to fit."""
        return all(device.fits is not False for device in self.devices)

    def verdict(self) -> str:
        """Whether it fits, in a line or a few; and what makes it fit."""
        largest = max(self.devices, key=lambda device: device.peak)
        if largest.capacity is None:
            return f"largest peak {gib(largest.peak)}; pass --device-memory to know whether it fits"
        if self.fits:
            return f"fits: largest peak {gib(largest.peak)} of {gib(largest.capacity)}"
        lines = [f"does not fit: largest peak {gib(largest.peak)} of {gib(largest.capacity)}"]
        lines += [f"  {setting}: {gib(peak)}" for setting, peak in self.remedies]
        return "\n".join(lines if self.remedies else [*lines, "  no single setting makes it fit: take more devices"])

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "model": self.model,
            "settings": asdict(self.settings),
            "parameters": self.parameters,
            "neurons": self.neurons,
            "coverage": None if self.coverage is None else self.coverage.to_json(),
            "sites": [asdict(site) for site in self.sites],
            "state_bytes": self.state,
            "host_bytes": self.host,
            "devices": [{**asdict(device), "peak": device.peak, "fits": device.fits} for device in self.devices],
            "fits": self.fits,
            "remedies": [{"setting": setting, "peak": peak} for setting, peak in self.remedies],
        }


def plan(model: str, settings: PlanConfig | None = None, *, device_memory: int | None = None) -> Plan:
    """Say what tracing a model will take, before its weights are loaded.

    The blocks are spread over the devices in order, so that each holds about as much; the state of a site lies where
    its block does.

    Args:
        model: A name on the hub, a folder, or a file `config.json`; with or without the prefix `hf:`.
        settings: How it shall be traced.
        device_memory: What one device has, in bytes; None for what is free here on the GPUs, or on the CPU.

    Raises:
        ModelError: A configuration that cannot be had, or a model of no known family.
        ArgumentError: Settings that cannot be used.
    """
    settings = settings or PlanConfig()
    made = skeleton(load_config(model), settings.task).to(getattr(torch, settings.dtype))
    capacity = device_memory if device_memory is not None else _free()
    found = replace(_plan(model, made, settings, capacity), coverage=_covered(made))
    if found.fits or capacity is None:
        return found
    return replace(found, remedies=tuple(_remedies(model, made, settings, capacity)))


def _covered(model: torch.nn.Module) -> Coverage | None:
    try:
        return coverage(model)
    except ModelError:
        return None


def kinds_of(settings: PlanConfig) -> dict[str, Metric]:
    """The metrics and what they are."""
    classes = [str(index) for index in range(settings.classes)]
    return {name: metric.kind for name, metric in parse_metrics(settings.metrics, classes).items()}


def _plan(name: str, model: torch.nn.Module, settings: PlanConfig, capacity: int | None, forward: bool = True) -> Plan:
    """The plan; without what a forward takes where `forward` is not set."""
    sites = choose_sites(model, settings.sites)
    metrics = kinds_of(settings)
    itemsize = getattr(torch, settings.dtype).itemsize
    weights = footprint.weights_by_part(model, itemsize, settings.bits)
    peaks = _forward_peaks(model, settings.batch_size, settings.tokens) if forward else {}
    blocks = footprint.blocks_of(model)
    widths = dict.fromkeys(weights, 0)
    for site in sites:
        widths[footprint.part_of(site.path, blocks) or footprint.LAST] += site.width
    rows = exact_rows(settings.bins) if needs_bins(settings.statistics) else BUFFER_ROWS

    def state_of(neurons: int) -> int:
        if not neurons:
            return 0
        return state_bytes(neurons, metrics, settings.statistics, settings.bins, settings.n_bootstrap)

    def buffer_of(neurons: int) -> int:
        return rows * (4 * neurons + 8 * (len(metrics) + 1)) if neurons else 0

    load = {part: weights[part] + state_of(widths[part]) + buffer_of(widths[part]) for part in weights}
    devices = []
    for parts in _spread(load, settings.devices):
        neurons = sum(widths[part] for part in parts)
        devices.append(
            DevicePlan(
                parts=(parts[0], parts[-1]),
                neurons=neurons,
                weights=sum(weights[part] for part in parts),
                state=state_of(neurons),
                buffer=buffer_of(neurons),
                forward=max(peaks.get(part, 0) for part in parts),
                capacity=capacity,
            )
        )
    columns = sum(len(metric.columns(key)) for key, metric in metrics.items())
    total = sum(widths.values())
    return Plan(
        model=name,
        settings=settings,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sites=sites,
        devices=tuple(devices),
        host=total * (columns * _SCORES + 16) + settings.examples * 8 * len(metrics),
    )


@functools.lru_cache(maxsize=16)
def _forward_peaks(model: torch.nn.Module, batch: int, tokens: int) -> dict[str, int]:
    """Kept, since most remedies leave the model and the batches as they are."""
    return footprint.forward_peaks(model, batch, tokens)


def _spread(load: dict[str, int], devices: int) -> list[list[str]]:
    """Parts in order, a run of them for each device, so that each carries about as much."""
    ends = list(accumulate(load.values()))
    runs: dict[int, list[str]] = {}
    for part, size, end in zip(load, load.values(), ends, strict=True):
        middle = (end - size / 2) / max(1, ends[-1])
        runs.setdefault(min(devices - 1, int(middle * devices)), []).append(part)
    return list(runs.values())


def _remedies(name: str, model: torch.nn.Module, settings: PlanConfig, capacity: int) -> list[tuple[str, int]]:
    """Settings that make it fit, each by itself; where none does, the two strongest together."""
    bins = needs_bins(settings.statistics)
    fewer = [n for n in (64, 32, 16) if bins and n < settings.bins]
    changes: list[tuple[str, dict[str, Any]]] = [(f"--bins {n}", {"bins": n}) for n in fewer]
    changes += [("--statistics pearson", {"statistics": ("pearson",)})] if bins else []
    changes += [
        (f"--batch-size {n}", {"batch_size": n}) for n in _halves(settings.batch_size) if n < settings.batch_size
    ]
    if settings.bits is None:
        changes += [("--bits 8", {"bits": 8}), ("--bits 4", {"bits": 4})]
    changes += [(f"--devices {settings.devices * n}", {"devices": settings.devices * n}) for n in (2, 4, 8)]
    strongest = {"statistics": ("pearson",), "batch_size": 1, "bits": 4}

    def fitting(change: dict[str, Any]) -> int | None:
        """The largest peak, where it fits; no forward is run where the rest alone does not."""
        peak = 0
        for forward in (False, True):
            devices = _plan(name, model, replace(settings, **change), capacity, forward).devices
            if (peak := max(device.peak for device in devices)) > capacity:
                return None
        return peak

    found: dict[str, tuple[str, int]] = {}
    for words, change in changes:
        option = words.split()[0]
        if option not in found and (peak := fitting(change)) is not None:
            found[option] = (words, peak)
    if not found and (peak := fitting(strongest)) is not None:
        return [("--statistics pearson --batch-size 1 --bits 4", peak)]
    return list(found.values())


def _halves(n: int) -> list[int]:
    return [n >> shift for shift in range(1, n.bit_length())]


def _free() -> int | None:
    """Free memory of the smallest device here."""
    if torch.cuda.is_available():
        return min(free_bytes(torch.device("cuda", i)) or 0 for i in range(torch.cuda.device_count()))
    return free_bytes(torch.device("cpu"))


def gib(size: int) -> str:
    """A number of bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"


def parse_bytes(text: str) -> int:
    """Bytes of `80GiB`, `80G`, `640MiB` or a plain number.

    Raises:
        ArgumentError: Anything else.
    """
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    word = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = word[-1:] if word[-1:] in units else ""
    try:
        size = float(word.removesuffix(unit)) * units[unit]
    except ValueError:
        size = 0.0
    if not 1 <= size < float("inf"):
        raise ArgumentError(f"memory: expected a size such as 80GiB, got {text!r}; write a number and a unit")
    return int(size)
