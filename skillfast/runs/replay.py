"""`skillfast bench --replay DIR`: an earlier run's data and weights, which must still be what they were."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from skillfast.errors import NotComparableError
from skillfast.results import bench, records, skills
from skillfast.results.replay import ABSENT, Replay, replayed
from skillfast.runs.config import OF_A_MACHINE
from skillfast.runs.kept import MODEL, PROMPT, WEIGHTS

if TYPE_CHECKING:
    from skillfast.results.bench import BenchResults
    from skillfast.results.provenance import DataDigests, UsedPrompt, Weights
    from skillfast.results.skills import Skills
    from skillfast.runs.config import BenchConfig


@dataclass(frozen=True)
class Earlier:
    """A run to be repeated.

    Attributes:
        directory: Folder of the run.
        results: Content of results.json.
        skills: Content of skills.json.
    """

    directory: Path
    results: BenchResults
    skills: Skills

    @staticmethod
    def read(directory: str | Path) -> Earlier:
        """Read a run's folder; raises DataError where a file is missing or broken."""
        path = Path(directory)
        return Earlier(
            path,
            records.read(bench.BenchResults, path / bench.FILE, bench.REMEDY),
            records.read(skills.Skills, path / skills.FILE, bench.REMEDY),
        )

    @property
    def has_weights(self) -> bool:
        """Whether the weights that it trained, or the prompt that it tuned, are still in its folder."""
        return any((self.directory / name).exists() for name in (WEIGHTS, MODEL, PROMPT))

    def check(self, config: BenchConfig, data: DataDigests) -> None:
        """Raise NotComparableError for other settings or other data than the run's."""
        then, now = self.results.config, json.loads(json.dumps(config.to_json()))
        for name in {**then, **now}:
            if name not in OF_A_MACHINE and then.get(name, ABSENT) != now.get(name, ABSENT):
                raise NotComparableError(
                    f"{name}: expected {then.get(name, ABSENT)}, as in {self.directory}, got {now.get(name, ABSENT)}; "
                    "replay it with its own settings"
                )
        ours, theirs = map(structs.asdict, (data, self.results.dataset.digests))
        other = [
            f"{part} {what}"
            for part, digests in theirs.items()
            for what, digest in structs.asdict(digests).items()
            if getattr(ours[part], what) != digest
        ]
        if other:
            raise NotComparableError(
                f"data: expected those of {self.directory}, got other {', '.join(other)}; replay it on the data that "
                "it read"
            )

    def check_weights(self, found: Weights, prompt: UsedPrompt | None = None) -> None:
        """Raise NotComparableError for other weights than the run's, or another soft prompt."""
        then, now = (None if one is None else one.sha256 for one in (self.results.model.soft_prompt, prompt))
        if then != now:
            raise NotComparableError(
                f"soft prompt: expected SHA-256 {then}, as in {self.directory}, got {now}; replay it with the prompt "
                "that it measured"
            )
        if found.sha256 != self.results.model.weights.sha256:
            raise NotComparableError(
                f"weights: expected SHA-256 {self.results.model.weights.sha256}, as in {self.directory}, got "
                f"{found.sha256}; replay it with the weights that it measured"
            )

    def compared(self, results: BenchResults, found: Skills) -> Replay:
        """What differs in a replay's results and skills."""
        return replayed(str(self.directory), (self.results, self.skills), (results, found))
