"""Constants in place of a skill's neurons: their mean, or the ones that cost the model least.

Zero and the mean are values that a neuron may never take together with what the others carry, so what they cost is part
damage by an unusual input. The least that any constants cost is what is lost with the information alone (Li and Janson,
2024, "Optimal ablation for interpretability", arXiv 2409.09951).
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from skillfast.models.adam import Adam
from skillfast.models.batches import read_batch
from skillfast.models.sites import find_sites, module_device
from skillfast.models.watching import watched
from skillfast.progress import track

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from skillfast.ablation.donors import DonorBank
    from skillfast.models.activations import Activations
    from skillfast.models.sites import Site
    from skillfast.skills.skill import Skill

STEPS = 20
RATE = 0.3  # of Adam's steps, in standard deviations of each neuron


def mean_constants(skill: Skill, bank: DonorBank) -> dict[str, torch.Tensor]:
    """Site -> mean activation float32 [S] of each of a skill's neurons over donors and tokens."""
    return {name: _moments(bank, name, index)[0] for name, index in skill.neurons.items()}


def optimal_constants(
    model: torch.nn.Module,
    loader: Iterable[Any],
    skills: Sequence[Skill],
    bank: DonorBank,
    *,
    steps: int = STEPS,
    seed: int = 0,
    quiet: bool = True,
) -> list[dict[str, torch.Tensor]]:
    """Constants that keep the model's loss low while they stand in place of a skill's neurons, for every skill.

    All skills are fitted at once: in each step an example has the neurons of one skill replaced, drawn at random, so
    the cost does not grow with their number. They start from the means.

    Args:
        model: In evaluation mode.
        loader: Batches of (inputs, labels) in a random order, read as often as it takes.
        skills: Skills whose neurons to replace.
        bank: Donors with these neurons, which tell their means and deviations.
        steps: Batches to learn from.
        seed: Seed of which skill an example is without.
        quiet: Show no progress bar.

    Returns:
        For each skill: site -> float32 [S].
    """
    sites = {site.name: site for site in find_sites(model)}
    names = [name for name in sites if any(name in skill.neurons for skill in skills)]
    learned = {name: _Learned(sites[name], skills, bank) for name in names}
    optimiser = Adam([site.moved for site in learned.values()])
    generator = torch.Generator().manual_seed(seed)
    device = module_device(model)
    batches = chain.from_iterable(repeat(loader))
    with ExitStack() as stack:
        for name, site in learned.items():
            stack.enter_context(watched(model, sites[name], site.replace))
        for _ in track(range(steps), "optimal constants", quiet=quiet):
            batch = read_batch(next(batches)).to(device)
            without = torch.randint(len(skills), (len(batch),), generator=generator)
            for site in learned.values():
                site.without = without.to(site.moved.device)
            loss = cross_entropy(batch.logits(model).float(), batch.labels)
            optimiser.step(torch.autograd.grad(loss, [site.moved for site in learned.values()]), RATE)
    return [{name: learned[name].constants_of(k) for name in skill.neurons} for k, skill in enumerate(skills)]


def _moments(bank: DonorBank, site: str, neurons: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation float32 [S] of neurons over donors and tokens."""
    places = bank.places(site, neurons)
    assert places is not None  # drawn for these skills
    kept = bank.activations[site]
    rows = kept.index_select(-1, places.to(kept.device)).flatten(0, -2).float()
    return rows.mean(0), rows.std(0, correction=0)


class _Learned:
    """The constants of all skills at one site, and the hook that puts them in place."""

    def __init__(self, site: Site, skills: Sequence[Skill], bank: DonorBank) -> None:
        parts = [skill.neurons.get(site.name, torch.empty(0, dtype=torch.int64)) for skill in skills]
        index = torch.cat(parts)
        self.mean, self.deviation = _moments(bank, site.name, index)
        device = self.mean.device
        self.skill = torch.repeat_interleave(torch.tensor([len(part) for part in parts])).to(device)
        self.neuron = index.to(device)
        self.moved = torch.zeros_like(self.mean, requires_grad=True)  # in standard deviations, from the mean
        self.kept = torch.ones(len(skills), site.width, device=device)
        self.kept[self.skill, self.neuron] = 0.0
        self.without = self.skill[:0]

    @property
    def constants(self) -> torch.Tensor:
        return self.mean + self.deviation * self.moved

    def constants_of(self, skill: int) -> torch.Tensor:
        return self.constants.detach()[self.skill == skill].cpu()

    def replace(self, found: Activations) -> torch.Tensor:
        x, without = found.values, self.without
        if len(without) != len(x):  # several windows of an example
            without = without.repeat_interleave(len(x) // len(without))
        constants = torch.zeros_like(self.kept).index_put((self.skill, self.neuron), self.constants)
        shape = (len(x), *(1,) * (x.dim() - 2), x.shape[-1])
        changed = x * self.kept[without].view(shape) + constants[without].view(shape)
        return changed.to(x.dtype)
