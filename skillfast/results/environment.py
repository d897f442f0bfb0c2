"""What a run ran on, as every result says it."""

from __future__ import annotations

from typing import Any

from msgspec import field

from skillfast.results.records import Name, Positive, Record


class Environment(Record, frozen=True):
    """Versions, device and backends; `libraries` are those whose modules the model is made of."""

    skillfast: Name
    python: Name
    torch: Name
    numpy: Name
    libraries: dict[Name, Name]
    scikit_learn: Name = field(name="scikit-learn")
    platform: Name
    device: Name
    device_name: Name
    threads: Positive
    backends: dict[str, Any]
