"""`skills.json`: sets of neurons, each chosen for one metric."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from msgspec import Meta

from skillfast.results.records import Count, Document, Name, Record

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
    """

    name: Name
    metric: Name | None
    method: Name | None
    settings: dict[str, Any]
    neurons: dict[Name, Indices]

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


def skills_digest(found: Skills) -> str:
    """Digest of which neurons each skill has, and of their model."""
    neurons = [
        (skill.name, sorted((site, sorted(index)) for site, index in skill.neurons.items())) for skill in found.skills
    ]
    return hashlib.sha256(json.dumps([found.fingerprint, neurons]).encode()).hexdigest()[:16]
