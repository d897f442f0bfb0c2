"""`skills.json`: sets of neurons, each chosen for one metric."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from skillfast.errors import DataError
from skillfast.results.records import Count, Document, Name, Record

if TYPE_CHECKING:
    from pathlib import Path

    from skillfast.results.bench import BenchResults

MOST = 3e38
"""Largest size of a factor: float32 holds it."""
Factor = Annotated[float, Meta(ge=-MOST, le=MOST)]
Indices = Annotated[list[Count], Meta(extra_json_schema={"uniqueItems": True})]


FILE = "skills.json"


class SkillEntry(Record, frozen=True):
    """A skill.

    Attributes:
        name: The class or metric that the neurons carry.
        metric: The column that chose them; null for a skill made by hand.
        method: How they were chosen; null for a skill made by hand.
        settings: The settings of that method.
        neurons: Site -> indices of neurons in it.
        knob: Factor on their activations that `skillfast.knobs` starts at; left out where it is 1.
    """

    name: Name
    metric: Name | None
    method: Name | None
    settings: dict[str, Any]
    neurons: dict[Name, Indices]
    knob: Factor | None = None

    def __post_init__(self) -> None:
        for site, indices in self.neurons.items():
            if len(set(indices)) < len(indices):
                raise ValueError(f"expected neurons without repeats in {site} of {self.name!r}, got one twice")


class Skills(Document, frozen=True, tag="skillfast.skills/1", tag_field="schema"):
    """The skills of a run.

    Attributes:
        fingerprint: Digest of the architecture that the neurons belong to; null: any model that has the sites.
        skills: In the order of the classes.
    """

    fingerprint: Name | None
    skills: Annotated[list[SkillEntry], Meta(min_length=1)]


def check_of_run(found: Skills, results: BenchResults, what: str | Path = FILE) -> None:
    """Check that a file's skills are those of a run.

    Args:
        found: The skills.
        results: The run's results.
        what: The file, for the error.

    Raises:
        DataError: Skills of another model or of other classes, or neurons that its sites do not have.
    """
    ours, theirs = results.model.fingerprint, found.fingerprint
    widths, names = {site.name: site.width for site in results.model.sites}, [skill.name for skill in found.skills]
    beyond = [
        f"{site} of {skill.name!r}, neuron {max(index)}"
        for skill in found.skills
        for site, index in skill.neurons.items()
        if site in widths and index and max(index) >= widths[site]
    ]
    unknown = sorted({site for skill in found.skills for site in skill.neurons} - set(widths))
    if ours != theirs:
        expected, got = f"the skills of the model {ours!r} of results.json", repr(theirs)
    elif unknown:
        expected, got = "skills on the sites of results.json", ", ".join(unknown)
    elif names != results.dataset.classes:
        odd = next((name for name in results.dataset.classes if name not in names), None)
        expected = "the skills of the classes of results.json, in their order"
        got = f"none of {odd!r}" if odd is not None else "others"
    elif beyond:
        expected, got = "neurons that the sites of results.json have", beyond[0]
    else:
        return
    raise DataError(f"{what}: expected {expected}, got {got}; take both files from one run")


def skills_digest(found: Skills) -> str:
    """Digest of which neurons each skill has, and of their model."""
    neurons = [
        (skill.name, sorted((site, sorted(index)) for site, index in skill.neurons.items())) for skill in found.skills
    ]
    return hashlib.sha256(json.dumps([found.fingerprint, neurons]).encode()).hexdigest()[:16]
