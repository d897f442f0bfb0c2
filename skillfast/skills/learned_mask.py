"""Learned masks: gates on neurons, trained by gradient so that a class goes and every other decision stays."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from skillfast.data.splits import join
from skillfast.errors import ArgumentError
from skillfast.metrics import margin
from skillfast.models.sites import fingerprint, refuse_training, unwrap_compiled
from skillfast.progress import track
from skillfast.skills.attribution import class_batch
from skillfast.skills.ranking import NeuronRanking
from skillfast.vocabulary import MAX_SITE_SHARE, SHARE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

OWN_MARGIN = 1.0  # logits by which the class shall lose on its own images
KEPT_MARGIN = 2.0  # logits by which other images' decisions shall stand
SLACK = 1.0  # logits of its lead that a decision may lose: what stands by less is noise
OWN_SHARE = 0.25  # of a batch that shows the class
RATE = 0.4  # of Adam, in units of the strength at which a neuron is just removed; falls to 0.3 of that
TEMPERATURES = (1.0, 0.05)  # from gates that are half open to gates that are all but closed or open
KEEP = 10.0
IMAGES_PER_CLASS, IMAGES, IMAGE_BYTES = 500, 10_000, 1 << 30
BISECTIONS = 40


def learn_masks(
    model: torch.nn.Module,
    loader: Iterable[Any],
    attributions: NeuronRanking,
    *,
    share: float = SHARE,
    max_site_share: float = MAX_SITE_SHARE,
    scale: float = 0.0,
    steps: int = 60,
    batch_size: int = 64,
    keep: float = KEEP,
    images_per_class: int | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> NeuronRanking:
    """Learn for each class which neurons to remove so that the class goes and every other decision stays.

    Every neuron has a strength; removed is a soft set of the strongest ones, of the size and within the shares that
    `select` will cut by, and harder with every step. Adam on the strengths minimises a hinge on the class's margin on
    its own images, plus `keep` times what other images lose: the divergence (KL) from the intact model's distribution
    without the class, and a hinge on the lead of its decision there. Strengths start from the attributions.

    Args:
        model: In evaluation mode, on the device where it shall run; its weights stay as they are.
        loader: Batches of (images, labels); some of each class are kept in memory, not on the device.
        attributions: What `attribute` gives for this model; their sites and classes are those of the masks.
        share: Share of all neurons that a mask removes, in (0, 1].
        max_site_share: Largest share of one site's neurons that it removes, in (0, 1].
        scale: Factor on the activations of removed neurons.
        steps: Gradient steps per class.
        batch_size: Images per step.
        keep: Weight of the other images' decisions; more costs less harm and less of the target's drop.
        images_per_class: How many to keep, the first ones that the loader gives; by default 500, or fewer where there
            are many classes or large images, so that they are at most about 10,000 in all and take a GiB.
        seed: Seed of the order of the images.
        quiet: Show no progress bar.

    Returns:
        The strengths, to be cut by `select(masks, share=..., max_site_share=...)`; NaN for a class without images.

    Raises:
        ArgumentError: Attributions of another model, a share out of range, or an empty loader.
        ModelError: A model in training mode.
    """
    model = unwrap_compiled(model)
    refuse_training(model, "learn_masks")
    _check(model, attributions, share=share, max_site_share=max_site_share, steps=steps, batch_size=batch_size)
    with torch.inference_mode(False), _frozen(model):
        learner = _Learner(model, loader, attributions, share, max_site_share, images_per_class)
        values = np.full_like(attributions.values, np.nan)
        known = [c for c in range(len(attributions.columns)) if np.isfinite(attributions.values[:, c]).all()]
        for c in track(known, "learned masks", quiet=quiet):
            if 0 < int(learner.members(c).sum()) < len(learner.labels):
                generator = torch.Generator().manual_seed(seed)
                strength = learner.learn(c, steps, batch_size, keep, scale, generator)
                values[:, c] = strength.double().cpu().numpy()
    return NeuronRanking(
        method="mask",
        columns=attributions.columns,
        values=values,
        sites=attributions.sites,
        n_observations=np.bincount(learner.labels.numpy(), minlength=len(attributions.columns)),
        fingerprint=attributions.fingerprint,
        settings={
            "learned_share": share,
            "learned_scale": scale,
            "steps": steps,
            "batch_size": batch_size,
            "keep": keep,
            "seed": seed,
        },
    )


def _check(model: torch.nn.Module, attributions: NeuronRanking, **numbers: float) -> None:
    for name, value in numbers.items():
        if name.endswith("share") and not 0 < value <= 1:
            raise ArgumentError(f"{name}: expected a share in (0, 1], got {value}; 0.03 is the default's")
        if not name.endswith("share") and value < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {value}; leave it out for the default")
    if attributions.fingerprint != fingerprint(model):
        raise ArgumentError(
            f"attributions: expected those of the model's architecture ({fingerprint(model)}), got those of "
            f"{attributions.fingerprint}; make them with attribute(model, loader)"
        )


class _Learner:
    """A model with a gate per neuron, some images, and what the intact model says of them."""

    def __init__(
        self,
        model: torch.nn.Module,
        loader: Iterable[Any],
        attributions: NeuronRanking,
        share: float,
        max_site_share: float,
        images_per_class: int | None,
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.sites = attributions.sites
        self.count = max(1, round(share * attributions.n_neurons))
        widths = [site.width for site in self.sites]
        self.widths = widths
        self.site_of = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths)).to(self.device)
        self.most = torch.tensor([float(int(max_site_share * width)) for width in widths], device=self.device)
        self.start = torch.from_numpy(attributions.values).float().to(self.device)
        classes = len(attributions.columns)
        self.images, self.labels = _first_images(loader, classes, images_per_class)
        with torch.no_grad():
            self.intact = torch.cat([self._logits(part) for part in self.images.split(256)])

    def members(self, c: int) -> torch.Tensor:
        """Images of the class, bool [n]."""
        return self.labels == c

    def learn(
        self, c: int, steps: int, batch_size: int, keep: float, scale: float, generator: torch.Generator
    ) -> torch.Tensor:
        """Strengths [n_neurons] of one class's mask."""
        strength = self._initial(self.start[:, c]).requires_grad_()
        adam = torch.optim.Adam([strength], lr=RATE, betas=(0.9, 0.99))
        own = _cycle(self.members(c), max(1, round(OWN_SHARE * batch_size)), generator)
        rest = _cycle(~self.members(c), max(1, batch_size - round(OWN_SHARE * batch_size)), generator)
        first, last = TEMPERATURES
        for step in range(steps):
            done = step / max(1, steps - 1)
            adam.param_groups[0]["lr"] = RATE * (1 - 0.7 * done)
            removed = soft_top(strength, self.site_of, self.most, self.count, first * (last / first) ** done)
            i, j = next(own), next(rest)
            with self._gated(1 - (1 - scale) * removed):
                logits = self._logits(self.images[torch.cat([i, j])])
            loss = target_loss(logits[: len(i)], c) + keep * kept_loss(logits[len(i) :], self.intact[j], c)
            adam.zero_grad()
            loss.backward()
            adam.step()
        return strength.detach()

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        trim = getattr(self.model, "trim", None)  # of texts, which are kept as long as the longest of them all
        return self.model((images if trim is None else trim(images)).to(self.device)).float()

    def _initial(self, attribution: torch.Tensor) -> torch.Tensor:
        """Attributions in units of the weakest one that a cut would remove, without the few that outweigh all."""
        hard = soft_top(attribution, self.site_of, self.most, self.count, 1e-6 * float(attribution.abs().max()) + 1e-30)
        chosen = attribution[hard > 0.5]
        unit = float(chosen.min()) if len(chosen) else 0.0
        return (attribution / (unit if unit > 0 else float(attribution.abs().max()) or 1.0)).clamp(-1, 2)

    @contextmanager
    def _gated(self, gates: torch.Tensor) -> Iterator[None]:
        """Every forward inside multiplies each site's neurons by their gates [n_neurons]."""
        handles = []
        for site, gate in zip(self.sites, gates.split(self.widths), strict=True):

            def scaled(_: torch.nn.Module, args: tuple[Any, ...], gate: torch.Tensor = gate) -> tuple[Any, ...]:
                return ((args[0] * gate).to(args[0].dtype), *args[1:])

            handles.append(self.model.get_submodule(site.path).register_forward_pre_hook(scaled))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def soft_top(
    strength: torch.Tensor, site_of: torch.Tensor, most: torch.Tensor, count: int, temperature: float
) -> torch.Tensor:
    """A soft set of the strongest neurons: float in [0, 1] that sums to `count`, with a gradient.

    Args:
        strength: float [n_neurons].
        site_of: int64 [n_neurons], each neuron's site.
        most: float [n_sites], the largest sum of one site.
        count: The sum of all, less where the sites do not allow as much.
        temperature: How soft, in the strengths' unit: towards 0 the set becomes the strongest neurons themselves.
    """
    sites = torch.zeros_like(most)
    fixed = strength.detach()

    def inside(threshold: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid((fixed - threshold[site_of]) / temperature)

    def bisect(too_many: Any, like: torch.Tensor) -> torch.Tensor:
        low = torch.zeros_like(like) + fixed.min() - 20 * temperature
        high = torch.zeros_like(like) + fixed.max() + 20 * temperature
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            more = too_many(middle)
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        return high

    of_site = bisect(lambda t: sites.index_add(0, site_of, inside(t)) > most, sites)
    of_all = bisect(lambda t: inside(torch.maximum(t, of_site)).sum() > count, fixed.sum())
    full = of_site > of_all
    threshold = torch.maximum(of_site, of_all)
    # thresholds move with the strengths that share them, so that sums stay: the implicit function's gradient
    group = torch.where(full, torch.arange(len(most), device=most.device), len(most))[site_of]
    slope = inside(threshold) * (1 - inside(threshold))
    sums = torch.zeros(len(most) + 1, dtype=fixed.dtype, device=fixed.device)
    moved = sums.index_add(0, group, slope * (strength - fixed)) / sums.index_add(0, group, slope).clamp(min=1e-12)
    return torch.sigmoid((strength - threshold[site_of] - moved[group]) / temperature)


def target_loss(logits: torch.Tensor, c: int) -> torch.Tensor:
    """Mean hinge on the class's margin over the best other class, on its own images [n, n_classes]."""
    return functional.relu(margin(logits, torch.full_like(logits[:, 0], c, dtype=torch.int64)) + OWN_MARGIN).mean()


def kept_loss(logits: torch.Tensor, intact: torch.Tensor, c: int) -> torch.Tensor:
    """What other classes' images lose against the intact model without class c; both [n, n_classes].

    The mean KL divergence of the distributions over the other classes, which holds what is said of every image, plus
    the mean hinge on the lead of the decision, which grows as a decision that stood is about to turn.
    """
    others = torch.arange(logits.shape[1], device=logits.device) != c
    now, before = logits[:, others].log_softmax(1), intact[:, others].log_softmax(1)
    without = intact.masked_fill(~others, -torch.inf)
    decision = without.argmax(1)
    wanted = margin(without, decision).sub(SLACK).clamp(max=KEPT_MARGIN)
    lost = functional.relu(wanted - margin(logits, decision)).mean()
    return functional.kl_div(now, before, log_target=True, reduction="batchmean") + lost


def _cycle(members: torch.Tensor, n: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches of at most n of the members' indices, every one once before any again."""
    index = members.nonzero()[:, 0]
    while True:
        order = index[torch.randperm(len(index), generator=generator)]
        for start in range(0, max(1, len(order) - n + 1), n):
            yield order[start : start + n]


def _first_images(loader: Iterable[Any], n_classes: int, per_class: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of each class [n, ...] and their labels [n]; None for as many as the bounds allow."""
    seen = torch.zeros(n_classes, dtype=torch.int64)
    images, labels = [], []
    for batch in loader:
        image, label = class_batch(batch, n_classes, torch.device("cpu"))
        if per_class is None:
            most = min(IMAGES, IMAGE_BYTES // max(1, image[:1].nbytes))
            per_class = max(8, min(IMAGES_PER_CLASS, most // n_classes))
        member = functional.one_hot(label, n_classes)  # [batch, n_classes]
        place = (member.cumsum(0) * member).sum(1) + seen[label]  # from 1, among the class's
        images.append(image[place <= per_class])
        labels.append(label[place <= per_class])
        seen += member.sum(0)
    if not labels:
        raise ArgumentError("learn_masks: expected at least one image, got an empty loader; check its batches")
    return join(images), torch.cat(labels)


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Weights without gradients: backward passes through activations alone."""
    learnable = [p for p in model.parameters() if p.requires_grad]
    for p in learnable:
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for p in learnable:
            p.requires_grad_(True)
