"""Attribution: how much each neuron adds to a class's log-odds, from one streaming pass with gradients."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ArgumentError
from skillfast.memory.usage import free_bytes
from skillfast.metrics import Categorical
from skillfast.models.batches import Batch, classes_of, fed_batches, read_batch
from skillfast.models.inputs import mapped
from skillfast.models.shards import shards_of
from skillfast.models.sites import Site, choose_sites, fingerprint, refuse_training, unwrap_compiled
from skillfast.models.watching import watched
from skillfast.progress import length_of, track
from skillfast.skills.ranking import NeuronRanking
from skillfast.transfer import moved

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np

    from skillfast.models.activations import Activations


def attribute(
    model: torch.nn.Module,
    loader: Iterable[Any],
    *,
    sites: Sequence[str] | None = None,
    classes: Sequence[str] | int | None = None,
    label_key: str | None = None,
    quiet: bool = True,
) -> NeuronRanking:
    """Gradient x activation of each class's log-odds, summed over tokens and averaged over the class's images.

    It is the first-order estimate of what the log-odds (the class's logit minus the logsumexp of the others) lose when
    the neuron is set to 0. One pass forward and back per batch; nothing is kept per image.

    Where tokens have labels, the average is over the tokens of a class: what a neuron, at all tokens of a text
    together, adds to the log-odds of each of them. That takes a backward pass for each class that a batch has.

    Args:
        model: In evaluation mode, on the device where it shall run.
        loader: Batches of (inputs, labels), or mappings with `labels` or `label` and the model's arguments; labels
            [batch], or [batch, tokens] and below 0 for tokens without one. Those of a causal language model are about
            the next token.
        sites: Kinds or names of sites; None for every kind that the model has.
        classes: Class names; from the loader's dataset or the model by default.
        label_key: Key of the labels in a batch that is a mapping; by default `labels` or `label`.
        quiet: Show no progress bar.

    Returns:
        The attribution of every neuron to every class; NaN for a class without images.

    Raises:
        ArgumentError: An unknown site, labels that are no class indices, an empty loader, or more neurons and classes
            than fit in memory.
        ModelError: A model in training mode or without known sites.

    Source: Molchanov et al., "Importance estimation for neural network pruning", 2019 (without taking the square).
    """
    model = unwrap_compiled(model)
    names = Categorical(classes if classes is not None else classes_of(loader, model)).classes
    return _attributed(model, loader, sites, len(names), [f"label:{name}" for name in names], None, quiet, label_key)


def attribute_groups(
    model: torch.nn.Module,
    loader: Iterable[Any],
    members: np.ndarray,
    columns: Sequence[str],
    *,
    sites: Sequence[str] | None = None,
    n_classes: int,
    quiet: bool = True,
) -> NeuronRanking:
    """What `attribute` gives, averaged over any groups of images: each image's log-odds are of its own class.

    Args:
        model: In evaluation mode, on the device where it shall run.
        loader: Batches of (images, labels), not shuffled.
        members: bool [n, groups], the images of each group, in the loader's order; an image may be in several.
        columns: A column per group, `metric:name`.
        sites: Kinds or names of sites; None: all.
        n_classes: How many classes there are.
        quiet: Show no progress bar.

    Returns:
        The attribution of every neuron to every group; NaN for a group without images.

    Raises:
        ArgumentError: An unknown site, labels that are no class indices, an empty loader, or another number of images
            than have groups.
        ModelError: A model in training mode or without known sites.
    """
    return _attributed(unwrap_compiled(model), loader, sites, n_classes, columns, torch.from_numpy(members), quiet)


def _attributed(
    model: torch.nn.Module,
    loader: Iterable[Any],
    sites: Sequence[str] | None,
    n_classes: int,
    columns: Sequence[str],
    members: torch.Tensor | None,
    quiet: bool,
    label_key: str | None = None,
) -> NeuronRanking:
    """The attributions of groups of images; without `members` those of the classes."""
    refuse_training(model, "attribute")
    chosen = choose_sites(model, sites)
    with torch.inference_mode(False), torch.enable_grad():
        device = next(model.parameters()).device
        _refuse_too_many(chosen, len(columns), device)
        shards = shards_of(model, chosen)
        own_sites = chosen if shards is None else tuple(map(shards.local, chosen))
        total = torch.zeros(sum(site.width for site in own_sites), len(columns), dtype=torch.float64, device=device)
        counts = torch.zeros(len(columns), dtype=torch.int64, device=device)
        done = 0
        batches = fed_batches(loader, device, partial(class_batch, n_classes=n_classes, key=label_key))
        for batch in track(batches, "attribution", length_of(loader), quiet):
            found = batch.to(device)
            labels = found.labels
            with differentiable(model, chosen) as seen:
                logits = found.logits(model)
            if found.per_token:
                if members is not None:
                    raise ArgumentError(f"members: expected groups of examples, got labels {list(labels.shape)}")
                _add_tokens(total, counts, logits, found.targets(model), [seen[site.name] for site in chosen])
                continue
            own = log_odds(logits, labels).sum()
            rows = torch.cat(
                _effects(own, [seen[site.name] for site in chosen], len(labels)), dim=1
            )  # [batch, n_neurons]
            member = (
                torch.nn.functional.one_hot(labels, n_classes)
                if members is None
                else moved(members[done : done + len(labels)], rows.device)
            )  # [batch, n_columns]
            done += len(labels)
            if len(member) < len(labels):
                break
            total += rows.T @ member.to(rows)
            counts += member.sum(0)
    total, counts = total.cpu(), counts.cpu()
    if shards is not None:
        total = shards.whole(total, chosen)
    if not int(counts.sum()):
        raise ArgumentError("attribute: expected at least one image, got an empty loader; check its batches")
    if members is not None and done != len(members):
        raise ArgumentError(
            f"members: expected a row for each image of the loader, got {len(members)}; give one for each"
        )
    return NeuronRanking(
        method="attribution",
        columns=tuple(columns),
        values=(total / torch.where(counts > 0, counts, torch.nan)).numpy(),
        sites=chosen,
        n_observations=counts.numpy(),
        fingerprint=fingerprint(model),
    )


def _add_tokens(
    total: torch.Tensor,
    counts: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    seen: Sequence[Sequence[Activations]],
) -> None:
    """Add what neurons do to the log-odds of a batch's tokens, class by class.

    Args:
        total: float64 [n_neurons, n_classes], added to.
        counts: int64 [n_classes], added to.
        logits: [batch, tokens, n_classes], with a gradient.
        targets: int64 [batch, tokens], below 0 for none.
        seen: The activations of each site.
    """
    present = [label for label in targets.unique().tolist() if label >= 0]
    for label in present:
        at = targets == label
        value = log_odds(logits[at], targets[at]).sum()
        rows = _effects(value, seen, len(targets), again=label != present[-1])
        total[:, label] += torch.cat([row.sum(0) for row in rows])
        counts[label] += at.sum()


def _refuse_too_many(sites: Sequence[Site], columns: int, device: torch.device) -> None:
    """Raises ArgumentError where a value for each neuron and column takes more than what is free."""
    needed, free = 8 * columns * sum(site.width for site in sites), free_bytes(device)
    if free is not None and needed > free:
        raise ArgumentError(
            f"attribute: expected {columns:,} classes of {sum(site.width for site in sites):,} neurons to fit in "
            f"{free / 2**30:.1f} GiB, got {needed / 2**30:.1f} GiB; choose sites=, or map the labels to fewer classes"
        )


def log_odds(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-odds of each row's class: its logit minus the logsumexp of the others.

    Args:
        logits: [n, n_classes].
        labels: int64 [n].

    Returns:
        [n], float32, or float64 for logits of that dtype.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    own = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
    return logits.gather(1, labels[:, None])[:, 0] - logits.masked_fill(own, -torch.inf).logsumexp(1)


def class_batch(batch: Any, n_classes: int, key: str | None = None) -> Batch:
    """A batch where it is; raises ArgumentError for labels that are no class indices, or of tokens below 0."""
    found = read_batch(batch, key, tokens=True)
    labels = found.labels
    least = int(labels.min()) if labels.numel() else 0
    if labels.numel() and ((least < 0 and not found.per_token) or int(labels.max()) >= n_classes):
        raise ArgumentError(
            f"labels: expected class indices in [0, {n_classes}), got {int(labels.min())} to {int(labels.max())}; "
            "check classes="
        )

    def saved(x: torch.Tensor) -> torch.Tensor:
        return x.clone() if x.is_inference() else x  # which autograd does not save

    return Batch(mapped(found.inputs, saved), saved(labels))


@contextmanager
def differentiable(model: torch.nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, list[Activations]]]:
    """Each site's activations of the forward inside the context, with values that have a gradient."""
    seen: dict[str, list[Activations]] = {site.name: [] for site in sites}
    with ExitStack() as stack:
        for site in sites:

            def keep(found: Activations, site: Site = site) -> torch.Tensor:
                x = found.values if found.values.requires_grad else found.values.detach().requires_grad_()
                seen[site.name].append(replace(found, values=x))
                return x

            stack.enter_context(watched(model, site, keep))
        yield seen


def _effects(
    value: torch.Tensor, seen: Sequence[Sequence[Activations]], batch: int, *, again: bool = False
) -> list[torch.Tensor]:
    """Gradient x activation of each site, summed over an example's tokens: float64 [batch, width] each.

    `again` keeps the graph for another value.
    """
    values = [part.values for parts in seen for part in parts]
    gradients = iter(torch.autograd.grad(value, values, retain_graph=again))
    found = []
    for parts in seen:
        effects = [replace(part, values=_product(part.values.detach(), next(gradients))) for part in parts]
        whole = effects[0].joined(effects)
        rows = whole.summed(whole.values)  # one for each window of an example
        found.append(rows.reshape(batch, -1, rows.shape[-1]).sum(1))
    return found


def _product(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The product in float32, or float64 for such activations: what is wider takes twice the memory of all tokens."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(wide) * gradient.to(wide)
