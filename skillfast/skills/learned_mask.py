"""Learned masks: gates on neurons, trained by gradient so that a class goes and every other decision stays."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from skillfast.backends.capture import accumulation_dtype
from skillfast.errors import ArgumentError
from skillfast.memory.usage import free_bytes
from skillfast.metrics import margin
from skillfast.models.adam import Adam
from skillfast.models.batches import IGNORED, LABELS, logits_of
from skillfast.models.inputs import Inputs, bytes_of, call, joined, mapped, mask_of, split, taken, trimmed
from skillfast.models.shards import refuse_spread
from skillfast.models.sites import find_sites, fingerprint, module_device, refuse_training, unwrap_compiled
from skillfast.models.watching import watched
from skillfast.progress import Forecast, track
from skillfast.skills.attribution import class_batch
from skillfast.skills.discriminant import linear_discriminant
from skillfast.skills.ranking import NeuronRanking
from skillfast.skills.select import at_most, skill_size
from skillfast.transfer import moved
from skillfast.vocabulary import LEARNED, MAX_SITE_SHARE, SHARE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from skillfast.models.activations import Activations

OWN_MARGIN = 1.0  # logits by which the class shall lose on its own images
KEPT_MARGIN = 2.0  # logits by which other images' decisions shall stand
SLACK = 1.0  # logits of its lead that a decision may lose: what stands by less is noise
OWN_SHARE = 0.5  # of a batch's rows, under the mask of their own class
RATE = 0.4  # of Adam, in units of the strength at which a neuron is just removed; falls to 0.3 of that
TEMPERATURES = (1.0, 0.05)  # from gates that are half open to gates that are all but closed or open
KEEP = 10.0
ERASE = 3.0  # weight of a refitted probe, where it has one
STEPS, STEPS_FROM_MASKS = 90, 35
ROWS_AT_ONCE = 64  # of a batch, whose activations are held for the backward pass
CLASSES_AT_ONCE, STRENGTH_BYTES = 100, 1 << 26  # learned together, and how much their strengths may take
IMAGES_PER_CLASS, IMAGES, IMAGE_BYTES = 500, 10_000, 1 << 30
BISECTIONS = 30
REFIT = 10  # steps between fits of the probes
PROBED, RIVALS = 24, 9  # images of each class that a probe is fitted on, and how many classes beside its own


def learn_masks(
    model: torch.nn.Module,
    loader: Iterable[Any],
    attributions: NeuronRanking,
    *,
    share: float = SHARE,
    max_site_share: float = MAX_SITE_SHARE,
    scale: float = 0.0,
    steps: int | None = None,
    batch_size: int = 96,
    keep: float = KEEP,
    erase: float = 0.0,
    start: NeuronRanking | None = None,
    images_per_class: int | None = None,
    label_key: str | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> NeuronRanking:
    """Learn for each class which neurons to remove so that the class goes and every other decision stays.

    Every neuron has a strength per class; removed is a soft set of the strongest ones, of the size and within the
    shares that `select` will cut by, and harder with every step. One run of Adam learns all classes' strengths: every
    row of a batch runs under the mask of its own class or of another one, and adds to that mask's gradient. It
    minimises a hinge on the class's margin under the mask of one's own class, plus `keep` times what images lose under
    the masks of others: the divergence (KL) from the intact model's distribution without the mask's class, and a hinge
    on the lead of the decision there. Strengths start from the attributions.

    Such a mask takes a class from the classifier, and a probe that is fitted anew on the embeddings may still read it.
    With `erase` the loss holds what such a probe reads, too: a linear one for each class, fitted again every 10 steps
    on embeddings under the class's mask, of the class and of the 9 that are most like it.

    Where tokens have labels a row is a text under one mask: its tokens of the mask's class shall lose it, and its other
    tokens shall stay. Each text counts once, however many tokens it has.

    The cost is that of `steps * batch_size` rows, forward and backward through the activations, however many classes
    there are up to 100: 90 x 96 rows are 8 passes over the 1,078 images that the default run selects on, the 35 x 96 of
    a warm start 3 more. More classes are learned 100 at a time (fewer where their strengths would take more than
    64 MiB), each time at that cost.

    Args:
        model: In evaluation mode, on the device where it shall run; its weights stay as they are.
        loader: Batches of (inputs, labels), or mappings with labels and the model's arguments, labels of examples or of
            tokens; some examples of each class are kept in memory, not on the device.
        attributions: What `attribute` gives for this model; their sites and classes are those of the masks.
        share: Share of all neurons that a mask removes, in (0, 1].
        max_site_share: Largest share of one site's neurons that it removes, in (0, 1].
        scale: Factor on the activations of removed neurons.
        steps: Gradient steps; by default 90, or 35 from masks.
        batch_size: Rows per step, half of them under the mask of their own class; classes take turns.
        keep: Weight of the other images' decisions; more costs less harm and less of the target's drop.
        erase: Weight of what a refitted linear probe reads of the class, as a share of its lead in the intact model, 0
            for none; more costs others more. It takes some 2,400 more forwards of an image for each class.
        start: Masks of the same sites and classes to start from, such as those of another `keep`.
        images_per_class: How many to keep, the first ones that the loader gives; by default 500, or fewer where there
            are many classes or large images, so that they are at most about 10,000 in all and take a GiB.
        label_key: Key of the labels in a batch that is a mapping; by default `labels` or `label`.
        seed: Seed of the order of the images.
        quiet: Show no progress bar.

    Returns:
        The strengths, to be cut by `select(masks, share=..., max_site_share=...)`; NaN for a class without images.

    Raises:
        ArgumentError: Attributions of another model, masks of other sites or classes, a share out of range, or an
            empty loader.
        ModelError: A model in training mode.
    """
    model = unwrap_compiled(model)
    refuse_training(model, "learn_masks")
    refuse_spread(model, "learn_masks")
    steps = steps if steps is not None else STEPS if start is None else STEPS_FROM_MASKS
    _check(model, attributions, share=share, max_site_share=max_site_share, steps=steps, batch_size=batch_size)
    if erase < 0:
        raise ArgumentError(f"erase: expected a weight of at least 0, got {erase}; leave it out for none")
    if start is not None:
        _check_start(start, attributions)
    values = np.full_like(attributions.values, np.nan)
    with torch.inference_mode(False), _frozen(model):
        learner = _Learner(model, loader, attributions, share, max_site_share, images_per_class, label_key)
        if erase and learner.head is None:
            raise ArgumentError("erase: expected a model with a linear classifier, got one without; leave it out")
        if erase and learner.per_token:
            raise ArgumentError("erase: expected a label per example, got labels of tokens; leave it out")
        known, generator = learner.classes(), torch.Generator().manual_seed(seed)
        at_once = max(1, min(CLASSES_AT_ONCE, STRENGTH_BYTES // (4 * attributions.n_neurons)))
        chunks = [known[i : i + at_once] for i in range(0, len(known), at_once)]
        rows = len(chunks) * steps * batch_size
        forecast = Forecast(
            f"{len(known)} masks learned from {rows:,} forward and backward passes of an image", len(chunks) * steps
        )
        for classes in chunks:
            strength = learner.learn(
                classes, start, steps, batch_size, keep, erase, scale, generator, forecast, quiet=quiet
            )
            values[:, classes.numpy()] = strength.double().cpu().numpy().T
    return NeuronRanking(
        method="erase" if erase else "mask",
        columns=attributions.columns,
        values=values,
        sites=attributions.sites,
        n_observations=np.bincount(learner.labels[learner.labels >= 0].numpy(), minlength=len(attributions.columns)),
        fingerprint=attributions.fingerprint,
        settings={
            "learned_share": share,
            "learned_max_site_share": max_site_share,
            "learned_scale": scale,
            "steps": steps,
            "batch_size": batch_size,
            "keep": keep,
            **({"erase": erase} if erase else {}),
            "start_keep": None if start is None else start.settings.get("keep"),
            "seed": seed,
        },
    )


def _check(model: torch.nn.Module, attributions: NeuronRanking, **numbers: float) -> None:
    for name, value in numbers.items():
        if name.endswith("share") and not 0 < value <= 1:
            raise ArgumentError(f"{name}: expected a share in (0, 1], got {value}; 0.03 is the default's")
        least = 2 if name == "batch_size" else 1
        if not name.endswith("share") and value < least:
            raise ArgumentError(f"{name}: expected at least {least}, got {value}; leave it out for the default")
    if attributions.fingerprint != fingerprint(model):
        raise ArgumentError(
            f"attributions: expected those of the model's architecture ({fingerprint(model)}), got those of "
            f"{attributions.fingerprint}; make them with attribute(model, loader)"
        )


def _check_start(start: NeuronRanking, attributions: NeuronRanking) -> None:
    if start.method not in LEARNED:
        raise ArgumentError(f"start: expected learned masks, got {start.method}; leave it out to start from those")
    for what in ("fingerprint", "sites", "columns"):
        if getattr(start, what) != getattr(attributions, what):
            raise ArgumentError(
                f"start: expected masks with the attributions' {what}, got others; learn them from these attributions"
            )


class _Learner:
    """A model with a gate per neuron and row, some images, and what the intact model says of them."""

    def __init__(
        self,
        model: torch.nn.Module,
        loader: Iterable[Any],
        attributions: NeuronRanking,
        share: float,
        max_site_share: float,
        images_per_class: int | None,
        label_key: str | None = None,
    ) -> None:
        self.model = model
        self.device = module_device(model)
        self.sites = attributions.sites
        self.head = next((site.path for site in find_sites(model) if site.kind == "head"), None)
        self.count = skill_size(share, attributions.n_neurons)
        self.widths = [site.width for site in self.sites]
        most = [float(at_most(max_site_share, width)) for width in self.widths]
        self.most = torch.tensor(most, device=self.device)
        self.attributions = torch.from_numpy(attributions.values.T).float()
        pad = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
        self.gathers = False  # whether the images are on the GPU
        self.images, self.labels = _first_images(
            model, loader, len(attributions.columns), images_per_class, label_key, pad
        )
        self.per_token = self.labels.dim() == 2
        if self.device.type == "cuda":
            self._move_images()
        if self.per_token:
            return  # the intact model's logits of all tokens are run for each step
        with torch.no_grad():
            self.intact = torch.cat([self._logits(part) for part in split(self.images, 256)])
        if self.device.type != "cuda":
            self.intact = self.intact.cpu()

    def _move_images(self) -> None:
        """Keep the images on the GPU where they take a quarter of what is free at most: steps gather them there.

        Texts stay on the host, which looks for their padding.
        """
        if self._text:
            return
        free = free_bytes(self.device)
        if free is not None and bytes_of(self.images) <= free // 4:
            self.images = mapped(self.images, self._there)
            self.gathers = True

    def classes(self) -> torch.Tensor:
        """Classes that a mask can be learned for: with attributions, images of their own, and others' images."""
        labels = self.labels[self.labels >= 0]
        own = torch.bincount(labels, minlength=len(self.attributions))
        known = self.attributions.isfinite().all(1) & (own > 0) & (own < len(labels))
        return known.nonzero()[:, 0]

    def learn(
        self,
        classes: torch.Tensor,
        start: NeuronRanking | None,
        steps: int,
        batch_size: int,
        keep: float,
        erase: float,
        scale: float,
        generator: torch.Generator,
        forecast: Forecast,
        *,
        quiet: bool = True,
    ) -> torch.Tensor:
        """Strengths [len(classes), n_neurons] of these classes' masks."""
        strength = self._initial(classes, start).requires_grad_()
        adam = Adam([strength], betas=(0.9, 0.99))
        n_own = max(1, round(OWN_SHARE * batch_size))
        own = _draws(self.labels, classes, steps, n_own, generator, own=True)
        others = _draws(self.labels, classes, steps, batch_size - n_own, generator, own=False)
        of_mask = classes.to(self.device)
        first, last = TEMPERATURES
        probes, units = [], []
        if erase:
            ones = torch.ones(strength.shape, device=self.device)
            units = [probe.lead for probe in self._probes(ones, classes, generator)]
        for step in track(range(steps), "learned masks", quiet=quiet):
            done = step / max(1, steps - 1)
            removed = soft_top(strength, self.widths, self.most, self.count, first * (last / first) ** done)
            gates = (1 - (1 - scale) * removed.detach()).requires_grad_()
            if erase and step % REFIT == 0:
                probes = self._probes(gates.detach(), classes, generator)
            for rows, mask, n in _parts(own, others, step):  # the first n of them of the masks' own classes
                if self.per_token:
                    taken_away, lost = self._of_tokens(gates, of_mask, mask, rows, n)
                    loss = taken_away / own.shape[-1] + keep * lost / batch_size
                    (len(classes) * loss).backward()
                    continue
                logits, embeddings = self._gated(gates, mask, rows)
                of = of_mask[self._there(mask)]
                loss = target_loss(logits[:n], of[:n]).sum() / own.shape[-1]
                for i in mask[:n].unique().tolist() if erase else ():
                    read = probes[i].read(embeddings[:n][mask[:n] == i]).sum()
                    loss = loss + erase * read / units[i] / own.shape[-1]
                if n < len(rows):
                    others_rows = moved(rows[n:], self.intact.device)
                    lost = kept_loss(logits[n:], self.intact[others_rows].to(logits), of[n:])
                    loss = loss + keep * lost.sum() / others.shape[-1]
                (len(classes) * loss).backward()
            assert gates.grad is not None
            (gradient,) = torch.autograd.grad(removed, strength, gates.grad * (scale - 1))
            adam.step([gradient], RATE * (1 - 0.7 * done))
            forecast.ran(1)
        return strength.detach()

    def _of_tokens(
        self, gates: torch.Tensor, of_mask: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, n: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What tokens of the masks' classes have left to lose in the first n texts, and what others lose in all.

        Args:
            gates: float32 [masks, n_neurons].
            of_mask: int64 [masks], their classes.
            mask: int64 [texts], each text's mask.
            rows: int64 [texts], which texts.
            n: How many of them count for the masks' own classes.

        Returns:
            Both summed over texts, a text's being the mean over its tokens.
        """
        labels, texts = self.labels[rows], taken(self.images, rows)
        if isinstance(texts, dict):
            shorter: Any = trimmed({**texts, LABELS[0]: labels})
            labels = shorter[LABELS[0]]
        labels = self._there(labels)
        of = of_mask[self._there(mask)][:, None].expand_as(labels)
        own, other = labels == of, (labels >= 0) & (labels != of)
        own[n:] = False
        logits = self._gated_logits(gates, mask, rows)
        with torch.no_grad():
            intact = self._logits(texts)[other]

        def summed(losses: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            return (losses / tokens.sum(1, keepdim=True).expand_as(tokens)[tokens]).sum()

        taken_away = summed(target_loss(logits[own], of[own]), own)
        return taken_away, summed(kept_loss(logits[other], intact, of[other]), other)

    def _there(self, host: torch.Tensor) -> torch.Tensor:
        """A tensor on the model's device, without waiting for it."""
        return moved(host, self.device)

    @property
    def _text(self) -> bool:
        """Whether the images are texts, which are kept as long as the longest of them all."""
        return hasattr(self.model, "trim") or mask_of(self.images) is not None

    def _logits(self, images: Inputs) -> torch.Tensor:
        trim = getattr(self.model, "trim", None)
        shorter: Any = trim(images) if trim is not None and isinstance(images, torch.Tensor) else trimmed(images)
        given = mapped(shorter, self._there)
        return logits_of(call(self.model, given), self.model).float()

    def _probes(self, gates: torch.Tensor, classes: torch.Tensor, generator: torch.Generator) -> list[_Probe]:
        """A linear probe for each mask, fitted on embeddings under it of its class and of the most similar ones."""
        found, members = [], [(self.labels == c).nonzero()[:, 0] for c in range(len(self.attributions))]
        for i, c in enumerate(classes.tolist()):
            said = self.intact[members[c]].mean(0).cpu()
            said[[k for k, rows in enumerate(members) if not len(rows)]] = -torch.inf
            said[c] = torch.inf
            near = said.topk(min(1 + RIVALS, int((said > -torch.inf).sum()))).indices.tolist()
            rows = torch.cat([members[k][torch.randperm(len(members[k]), generator=generator)[:PROBED]] for k in near])
            with torch.no_grad():
                read = [self._gated(gates, torch.full_like(part, i), part)[1].cpu() for part in rows.split(256)]
            if read[0].dim() != 2:
                raise ArgumentError(
                    f"erase: expected a classifier of an embedding per example, got {list(read[0].shape)}; leave it out"
                )
            found.append(_Probe.of(torch.cat(read), self.labels[rows], c, self.device))
        return found

    def _gated_logits(self, gates: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The first of what `_gated` gives."""
        return self._gated(gates, mask, rows)[0]

    def _gated(self, gates: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and embeddings of images whose neurons are multiplied by the gates of one mask each.

        Args:
            gates: float32 [masks, n_neurons].
            mask: int64 [n], each row's mask.
            rows: int64 [n], which images.

        Returns:
            Logits [n, n_classes], and what the classifier reads, [n, width]; the latter empty for a model without one.
        """
        embeddings = torch.empty(0)
        masks: dict[torch.device, torch.Tensor] = {}  # moved once

        def keep(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal embeddings
            embeddings = args[0]

        with ExitStack() as stack:
            for site, gate in zip(self.sites, gates.split(self.widths, 1), strict=True):

                def scaled(found: Activations, gate: torch.Tensor = gate) -> torch.Tensor:
                    x = found.values
                    if x.device not in masks:
                        masks[x.device] = moved(mask, x.device)
                    return found.scaled(gate.to(x.device, accumulation_dtype(x.dtype)), None, masks[x.device])

                stack.enter_context(watched(self.model, site, scaled))
            if self.head is not None:  # after its gate, as hooks run in their order
                stack.callback(self.model.get_submodule(self.head).register_forward_pre_hook(keep).remove)
            return self._logits(taken(self.images, self._there(rows) if self.gathers else rows)), embeddings

    def _initial(self, classes: torch.Tensor, start: NeuronRanking | None) -> torch.Tensor:
        """Strengths to start from: masks, where there are some, else attributions.

        Attributions are taken in units of the weakest one that a cut would remove, without the few that outweigh all.
        """
        attribution = self.attributions[classes].to(self.device)
        largest = attribution.abs().amax(1, keepdim=True)
        hard = soft_top(attribution, self.widths, self.most, self.count, 1e-6 * largest + 1e-30)
        weakest = torch.where(hard > 0.5, attribution, torch.inf).amin(1, keepdim=True)
        unit = torch.where((weakest > 0) & weakest.isfinite(), weakest, torch.where(largest > 0, largest, 1.0))
        strength = (attribution / unit).clamp(-1, 2)
        if start is None:
            return strength
        learned = torch.from_numpy(start.values.T)[classes].to(strength)
        return torch.where(learned.isnan(), strength, learned)


@dataclass(frozen=True)
class _Probe:
    """A linear probe that reads a class from embeddings under its mask.

    Attributes:
        weights: float32 [classes, width].
        biases: float32 [classes].
        own: Which of the rows is the class's.
        lead: By how much the class's embeddings that it was fitted on are read as the class, on average.
    """

    weights: torch.Tensor
    biases: torch.Tensor
    own: int
    lead: float = 0.0

    @classmethod
    def of(cls, embeddings: torch.Tensor, labels: torch.Tensor, target: int, device: torch.device) -> _Probe:
        """Fitted on embeddings [m, width] of labels int64 [m]."""
        present, weights, biases = linear_discriminant(embeddings.float().numpy(), labels.numpy())
        weight, bias = (torch.from_numpy(found).to(device, torch.float32) for found in (weights, biases))
        found = cls(weight, bias, int(np.searchsorted(present, target)))
        lead = float(found.read(embeddings[labels == target].to(device)).mean())
        return replace(found, lead=max(lead, torch.finfo(torch.float32).eps))

    def read(self, embeddings: torch.Tensor) -> torch.Tensor:
        """By how much embeddings of the class, [n, width], are read as it: [n], 0 for those that are not."""
        scores = functional.linear(embeddings.float(), self.weights, self.biases)
        return functional.relu(margin(scores, torch.full((len(scores),), self.own, device=scores.device)))


def soft_top(
    strength: torch.Tensor, widths: Sequence[int], most: torch.Tensor, count: int, temperature: float | torch.Tensor
) -> torch.Tensor:
    """Soft sets of the strongest neurons: float [masks, n_neurons] in [0, 1], rows sum to `count`; with a gradient.

    Args:
        strength: float [masks, n_neurons].
        widths: Neurons of each site, one after the other.
        most: float [n_sites], the largest sum of one site.
        count: The sum of a row, less where the sites do not allow as much.
        temperature: How soft, in the strengths' unit, or that of each row [masks, 1]: towards 0 the set becomes the
            strongest neurons themselves.
    """
    fixed = strength.detach()

    def by_site(values: torch.Tensor) -> torch.Tensor:  # [masks, n_neurons] -> [masks, n_sites]
        return torch.stack([part.sum(1) for part in values.split(list(widths), 1)], 1)

    def everywhere(values: torch.Tensor) -> torch.Tensor:  # [masks, n_sites] -> [masks, n_neurons]
        return torch.cat([part.expand(-1, width) for part, width in zip(values.split(1, 1), widths, strict=True)], 1)

    def inside(threshold: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid((fixed - everywhere(threshold)) / temperature)

    def bisect(too_many: Callable[[torch.Tensor], torch.Tensor], columns: int) -> torch.Tensor:
        low = (fixed.amin(1, keepdim=True) - 20 * temperature).repeat(1, columns)
        high = (fixed.amax(1, keepdim=True) + 20 * temperature).repeat(1, columns)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            more = too_many(middle)
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        return high

    of_site = bisect(lambda t: by_site(inside(t)) > most, len(widths))
    of_all = bisect(lambda t: inside(torch.maximum(t, of_site)).sum(1, keepdim=True) > count, 1)
    full = of_site > of_all  # [masks, n_sites]
    threshold = torch.maximum(of_site, of_all)
    # thresholds move with the strengths that share them, so that sums stay: the implicit function's gradient
    slope = inside(threshold) * (1 - inside(threshold))
    moves, weights = by_site(slope * (strength - fixed)), by_site(slope)
    together = (moves * ~full).sum(1, keepdim=True) / (weights * ~full).sum(1, keepdim=True).clamp(min=1e-12)
    moved = torch.where(full, moves / weights.clamp(min=1e-12), together)
    return torch.sigmoid((strength - everywhere(threshold + moved)) / temperature)


def target_loss(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """What each row's class has left of the lead that it shall lose: [n], from logits [n, n_classes], classes [n]."""
    return functional.relu(margin(logits, classes) + OWN_MARGIN)


def kept_loss(logits: torch.Tensor, intact: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """What images of other classes lose, [n], by logits and the intact model's, both [n, n_classes].

    The KL divergence of the distributions over all classes but the row's, which holds what is said of every image,
    plus the hinge on the lead of the decision, which grows as a decision that stood is about to turn.

    Args:
        logits: [n, n_classes].
        intact: [n, n_classes].
        classes: int64 [n], the class of the mask that each row runs under.
    """
    own = functional.one_hot(classes, logits.shape[1]).bool()
    without = intact.masked_fill(own, -torch.inf)
    now, before = logits.masked_fill(own, -torch.inf).log_softmax(1), without.log_softmax(1)
    divergence = (before.exp() * (before - now)).masked_fill(own, 0).sum(1)
    decision = without.argmax(1)
    wanted = margin(without, decision).sub(SLACK).clamp(max=KEPT_MARGIN)
    return divergence + functional.relu(wanted - margin(logits, decision))


def _draws(
    labels: torch.Tensor, classes: torch.Tensor, steps: int, n: int, generator: torch.Generator, *, own: bool
) -> torch.Tensor:
    """Which images run under which mask: int64 [2, steps, n], images and positions in `classes`.

    Masks take turns, and under each its own class's images do, or all others; labels are int64 [images], or [texts,
    tokens].
    """
    mask = _in_turn(torch.arange(len(classes)), steps * n, generator)
    rows = torch.empty_like(mask)
    for i, c in enumerate(classes.tolist()):
        at = (mask == i).nonzero()[:, 0]
        some = (labels == c) if own else (labels != c) & (labels >= 0)
        some = some if labels.dim() == 1 else some.any(1)  # of texts those with such a token
        rows[at] = _in_turn(some.nonzero()[:, 0], len(at), generator)
    return torch.stack([rows, mask]).view(2, steps, n)


def _in_turn(values: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """As many of the values as asked for, every one once before any again."""
    rounds = -(-n // len(values))
    turns = [values[torch.randperm(len(values), generator=generator)] for _ in range(rounds)]
    return torch.cat([values[:0], *turns])[:n]  # none where a mask has no turn


def _parts(own: torch.Tensor, others: torch.Tensor, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """A step's draws, as many rows at a time as are held for the backward pass, and how many of them are own ones."""
    if own.shape[-1] + others.shape[-1] <= ROWS_AT_ONCE:
        rows, mask = torch.cat([own[:, step], others[:, step]], 1)
        yield rows, mask, own.shape[-1]
        return
    for draws in (own, others):
        for rows, mask in (part.unbind() for part in draws[:, step].split(ROWS_AT_ONCE, 1)):
            yield rows, mask, len(rows) if draws is own else 0


def _first_images(
    model: torch.nn.Module, loader: Iterable[Any], n_classes: int, per_class: int | None, key: str | None, pad: int
) -> tuple[Inputs, torch.Tensor]:
    """The first images of each class and their labels [n], of texts the first with each class and [n, tokens].

    As many of each class as `per_class` says, or with None as the bounds allow.
    """
    seen = torch.zeros(n_classes, dtype=torch.int64)
    images, labels = [], []
    for given in loader:
        batch = class_batch(given, n_classes, key).to(torch.device("cpu"))
        label = batch.targets(model)
        if per_class is None:
            most = min(IMAGES, IMAGE_BYTES // max(1, bytes_of(taken(batch.inputs, slice(1)))))
            per_class = max(8, min(IMAGES_PER_CLASS, most // n_classes))
        member = torch.zeros(len(label), n_classes + 1, dtype=torch.bool)  # the last one of tokens without a label
        member.scatter_(1, torch.where(label < 0, n_classes, label).view(len(label), -1), True)
        member = member[:, :-1]
        place = member.cumsum(0) + seen  # from 1, among the class's
        if bool((kept := (member & (place <= per_class)).any(1)).any()):
            images.append(taken(batch.inputs, kept.nonzero()[:, 0]))
            labels.append(label[kept])
        seen += member.sum(0)
    if not labels:
        raise ArgumentError("learn_masks: expected at least one image, got an empty loader; check its batches")
    if labels[0].dim() == 2:
        width = max(label.shape[1] for label in labels)
        labels = [functional.pad(label, (0, width - label.shape[1]), value=IGNORED) for label in labels]
    return joined(images, pad), torch.cat(labels)


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
