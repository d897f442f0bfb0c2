"""Knobs: factors on skills' activations that change while a model runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from skillfast.ablation.interventions import Condition, Interventions
from skillfast.errors import ArgumentError
from skillfast.models.coverage import warn_incomplete
from skillfast.models.shards import refuse_spread
from skillfast.models.sites import refuse_compiled, refuse_training
from skillfast.models.watching import watched
from skillfast.tracing.prepared import prepared
from skillfast.vocabulary import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from skillfast.models.activations import Activations
    from skillfast.models.sites import Site
    from skillfast.skills.skill import Skill


class Knobs(Mapping[str, float]):
    """A factor for each skill, by name: `knobs["sentiment"] = 2.0` holds from the next layer that runs.

    `skillfast.export(model, list(knobs.skills.values()), folder, scale=dict(knobs))` bakes them.
    """

    def __init__(self, model: torch.nn.Module, skills: Mapping[str, Skill], components: Sequence[str]) -> None:
        if not skills:
            raise ArgumentError("knobs: expected at least one skill by name, got none; name one")
        self._skills = {name: replace(skill, name=name) for name, skill in skills.items()}
        self._values = {name: float(skill.knob) for name, skill in self._skills.items()}
        conditions = [Condition(skill, tuple(components)) for skill in self._skills.values()]
        self._components = tuple(components)
        self._sites = Interventions(model, conditions).sites  # checks the skills
        self._tables: dict[tuple[str, torch.device, torch.dtype], torch.Tensor | None] = {}

    @property
    def skills(self) -> dict[str, Skill]:
        """The skills under the knobs' names, with the factors as they are now, to be saved by `save_skills`."""
        return {name: replace(skill, knob=self._values[name]) for name, skill in self._skills.items()}

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __setitem__(self, name: str, value: float) -> None:
        if name not in self._values:
            raise ArgumentError(f"knob: expected one of {', '.join(self._values)}, got {name!r}; name it in knobs()")
        Condition(self._skills[name], self._components, value)  # refuses what is no factor
        self._values = {**self._values, name: float(value)}
        self._tables = {}  # a new one: a forward of another thread goes on with what it has read

    def turned(self, site: Site, found: Activations) -> torch.Tensor:
        """What flows on at a site: the neurons of each skill times its factor, those of several times each."""
        tables, x = self._tables, found.values
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (site.name, x.device, dtype)
        if key not in tables:
            with torch.inference_mode(False):
                tables[key] = self._table(site, x.device, dtype)
        scale = tables[key]
        return x if scale is None else found.scaled(scale, None, None)

    def _table(self, site: Site, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
        """Factors [1, D] of a site's neurons; None where all are 1."""
        scale = torch.ones(1, site.width, dtype=torch.float64)
        for name, value in self._values.items():
            if (index := self._skills[name].neurons.get(site.name)) is not None:
                scale[0, index] *= value
        return None if bool((scale == 1).all()) else scale.to(device, dtype)


@contextmanager
def knobs(model: torch.nn.Module, skills: Mapping[str, Skill], *, components: Sequence[str] = KINDS) -> Iterator[Knobs]:
    """Turn skills up and down in the forwards inside the context, while a model generates, too.

    Each starts at its skill's `knob`, which is 1 unless another was saved with it; at 1 the model is intact. A factor
    does what `ablate(model, skill, scale=...)` does, and those of several skills what contexts of it do one inside the
    other.

    Args:
        model: In evaluation mode.
        skills: Name -> skill.
        components: Kinds of sites in which the neurons are changed.

    Yields:
        The factors by name, to be read and set: 0 removes, 2 doubles.

    Raises:
        ArgumentError: No skill, or one of another architecture; later a name that is no knob's, or no finite number.
        ModelError: A model in training mode, or a compiled or prepared one, in whose graph no knob stands.
    """
    refuse_compiled(model)
    refuse_training(model, "knobs")
    refuse_spread(model, "knobs")
    if prepared(model) is not None:
        raise ArgumentError(
            "knobs: expected a model that was not prepared, got one with gates; use skillfast.ablate, which sets them"
        )
    warn_incomplete(model)
    made = Knobs(model, skills, components)
    with ExitStack() as stack:
        for site in made._sites:
            stack.enter_context(watched(model, site, partial(made.turned, site)))
        yield made
