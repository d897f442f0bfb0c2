"""What a run costs: seconds per stage, trace over forward."""

from __future__ import annotations

import time
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from skillfast.models.batches import read_batch
from skillfast.models.inputs import call
from skillfast.models.sites import module_device
from skillfast.tracing.trace import ClassificationForward
from skillfast.tracing.tracer import Tracer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from skillfast.metrics import Metric

MEASURED_BATCHES = 3


class Clock:
    """Seconds per named stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's time to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a stage."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start


def trace_over_forward(
    model: torch.nn.Module,
    loader: Iterable[Any],
    metrics: Mapping[str, Metric],
    **settings: Any,
) -> dict[str, float | int]:
    """Time a few batches with and without tracing, in turn; the settings are the `Tracer`'s.

    Returns:
        forward_s (seconds of the plain forwards over those batches), samples_per_s (of the traced ones),
        trace_over_forward (traced over plain time; the computation of the metrics included) and state_bytes.
    """
    device = module_device(model)
    plain = traced = 0.0
    samples = 0
    tracer = Tracer(model, metrics, **settings)
    forward = ClassificationForward(metrics, each=False, label_key=None)
    with torch.inference_mode():
        for given in islice(loader, MEASURED_BATCHES):
            batch = read_batch(given).to(device)
            if samples == 0:  # the first forward pays for allocations, the first rows for the bins' edges
                with tracer:
                    tracer.step(**forward(model, batch)[1])
                    if set(settings.get("statistics", ())) != {"pearson"}:  # which has no edges
                        tracer.calibrate()
            start = _now(device)
            call(model, batch.inputs)
            middle = _now(device)
            with tracer:
                _, values = forward(model, batch)
                tracer.step(**values)
            traced += _now(device) - middle
            plain += middle - start
            samples += len(batch)
    return {
        "samples_per_s": samples / traced,
        "forward_s": plain,
        "trace_over_forward": traced / plain,
        "state_bytes": tracer.state_bytes,
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
