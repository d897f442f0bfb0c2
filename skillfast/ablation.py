"""Ablation: remove, replace or scale skills inside the blocks, one condition or many per pass."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skillfast import ops
from skillfast.errors import ArgumentError, ModelError
from skillfast.metrics import Categorical
from skillfast.models.sites import Site, find_sites, fingerprint, refuse_compiled, unwrap_compiled
from skillfast.progress import track
from skillfast.tracing import classes_of, image_batch, refuse_training
from skillfast.vocabulary import KINDS, MODES, Mode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from skillfast.skills import Skill
    from skillfast.statistics.neuron_scores import NeuronScores


@dataclass(frozen=True)
class Condition:
    """A skill, an intervention and the components that it touches.

    Attributes:
        skill: The neurons.
        components: Kinds of sites in which they are changed; the skill's neurons elsewhere stay.
        scale: Factor on each neuron's activation: 0 removes, above 1 amplifies.
        mode: `"zero"`: `scale * x`; `"mean"`: `mean + scale * (x - mean)`, with the mean of the reference scores.
    """

    skill: Skill
    components: tuple[str, ...] = KINDS
    scale: float = 0.0
    mode: Mode = "zero"

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.components if kind not in KINDS]
        if unknown:
            raise ArgumentError(f"components: expected some of {', '.join(KINDS)}, got {', '.join(unknown)}")
        if self.mode not in MODES:
            raise ArgumentError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        if not isinstance(self.scale, int | float) or not abs(self.scale) < float(np.finfo(np.float32).max):
            raise ArgumentError(f"scale: expected a finite number, got {self.scale}")


class _Interventions:
    """What each condition does at each site, as tables for `neuron_scale`."""

    def __init__(self, model: torch.nn.Module, conditions: Sequence[Condition], reference: NeuronScores | None) -> None:
        sites = {site.name: site for site in find_sites(model)}
        print_of_model = fingerprint(model)
        self.sites: list[Site] = []
        self.scale: dict[str, torch.Tensor] = {}  # site -> [conditions, D]
        self.shift: dict[str, torch.Tensor | None] = {}
        self.touched: dict[str, torch.Tensor] = {}  # site -> bool [conditions], on the CPU
        for condition in conditions:
            _check(condition.skill, sites, print_of_model)
        for site in sites.values():
            touching = [
                i for i, c in enumerate(conditions) if site.name in c.skill.neurons and site.kind in c.components
            ]
            if touching:
                self._add(model, site, conditions, touching, reference)

    def _add(
        self,
        model: torch.nn.Module,
        site: Site,
        conditions: Sequence[Condition],
        touching: Sequence[int],
        reference: NeuronScores | None,
    ) -> None:
        weight = next(model.get_submodule(site.path).parameters())
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        scale = torch.ones(len(conditions), site.width, dtype=dtype)
        shift = torch.zeros_like(scale)
        for i in touching:
            condition = conditions[i]
            neurons = condition.skill.neurons[site.name]
            scale[i, neurons] = condition.scale
            if condition.mode == "mean":
                mean = _reference_mean(reference, site)[neurons].to(dtype)
                shift[i, neurons] = (1 - condition.scale) * mean
        touched = torch.zeros(len(conditions), dtype=torch.bool)
        touched[list(touching)] = True
        self.sites.append(site)
        self.scale[site.name] = scale.to(weight.device)
        self.shift[site.name] = shift.to(weight.device) if bool(shift.any()) else None
        self.touched[site.name] = touched

    def apply(self, site: Site, x: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """The activations under each sample's condition; int64 [batch], or None for the only one."""
        if x.dtype != torch.float64 and self.scale[site.name].dtype == torch.float64:
            raise ModelError(f"{site.name}: expected float64 activations of a float64 model, got {x.dtype}")
        return ops.neuron_scale(x, self.scale[site.name], self.shift[site.name], condition)


def _check(skill: Skill, sites: dict[str, Site], fingerprint_of_model: str) -> None:
    if skill.fingerprint is not None and skill.fingerprint != fingerprint_of_model:
        raise ArgumentError(
            f"skill {skill.name!r}: expected one of the model's architecture ({fingerprint_of_model}), got one of "
            f"{skill.fingerprint}; select it on this model"
        )
    for name, index in skill.neurons.items():
        if name not in sites:
            raise ArgumentError(
                f"skill {skill.name!r}: expected sites that the model has, got {name!r}; it has "
                f"{next(iter(sites))} to {list(sites)[-1]}"
            )
        if int(index[-1]) >= sites[name].width:
            raise ArgumentError(
                f"skill {skill.name!r}: expected indices below {sites[name].width} in {name}, got {int(index[-1])}"
            )


def _reference_mean(reference: NeuronScores | None, site: Site) -> torch.Tensor:
    if reference is None:
        raise ArgumentError("mode 'mean': expected reference=scores of a trace, got none")
    if reference.pool != "mean" and site.kind != "head":
        raise ArgumentError(
            f"mode 'mean': expected reference scores pooled by 'mean', got {reference.pool!r}; "
            "another pooling's mean is not the mean over tokens"
        )
    return torch.from_numpy(reference[site.name].mean)


@contextmanager
def ablate(
    model: torch.nn.Module,
    skill: Skill,
    *,
    scale: float = 0.0,
    mode: Mode = "zero",
    reference: NeuronScores | None = None,
    components: Sequence[str] = KINDS,
) -> Iterator[None]:
    """Change a skill's neurons in every forward of the model inside the context; contexts nest.

    Args:
        model: In evaluation mode.
        skill: The neurons.
        scale: 0 removes them, 2 doubles their activations.
        mode: `"zero"` scales towards 0, `"mean"` towards the mean that the reference scores hold.
        reference: Scores of this model, for `mode="mean"`.
        components: Kinds of sites in which the neurons are changed.

    Raises:
        ArgumentError: A site or neuron that the model lacks, a skill of another architecture, an unknown mode.
        ModelError: A model in training mode, or wrapped by `torch.compile`.
    """
    refuse_compiled(model)
    refuse_training(model, "ablate")
    interventions = _Interventions(model, [Condition(skill, tuple(components), scale, mode)], reference)
    with _hooked(model, interventions, lambda _: None):
        yield


@contextmanager
def _hooked(model: torch.nn.Module, interventions: _Interventions, condition_of: Any) -> Iterator[None]:
    """Pre-hooks that replace each touched site's input; `condition_of(site)` is None, int64 [batch], or `skip`."""
    with ExitStack() as stack:
        for site in interventions.sites:

            def replace_input(_: torch.nn.Module, args: tuple[Any, ...], site: Site = site) -> tuple[Any, ...] | None:
                condition = condition_of(site)
                if condition is _SKIP:
                    return None
                return (interventions.apply(site, args[0], condition), *args[1:])

            handle = model.get_submodule(site.path).register_forward_pre_hook(replace_input)
            stack.callback(handle.remove)
        yield


_SKIP = object()


@dataclass(frozen=True)
class SweepResult:
    """Accuracy without and with each condition.

    Attributes:
        classes: Class names.
        labels: int64 [n], the true class of every sample.
        baseline: float64 [n_classes], accuracy per class of the intact model; NaN for a class without samples.
        per_class_accuracy: float64 [n_conditions, n_classes], in the order the conditions were given.
        top2: int64 [n, 2], the intact model's two best classes per sample.
        predictions: int64 [n_conditions, n], or None where they were not asked for.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    baseline: np.ndarray
    per_class_accuracy: np.ndarray
    top2: np.ndarray
    predictions: np.ndarray | None = None


def per_class_accuracy(predictions: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Share of each class's samples that are predicted right: predictions [..., n] -> float64 [..., n_classes]."""
    member = (labels[:, None] == np.arange(n_classes)).astype(np.float64)  # [n, n_classes]
    counts = member.sum(0)
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, (predictions == labels) @ member / counts, np.nan)


def sweep(
    model: torch.nn.Module,
    loader: Iterable[Any],
    conditions: Iterable[Condition],
    *,
    reference: NeuronScores | None = None,
    classes: Sequence[str] | int | None = None,
    keep_predictions: bool = False,
    stacked_rows: int = 512,
    quiet: bool = True,
) -> SweepResult:
    """Run the baseline and every condition over a loader, several conditions stacked along the batch.

    Args:
        model: In evaluation mode.
        loader: Batches of (images, labels).
        conditions: In the order of the result's rows.
        reference: Scores of this model, for conditions with `mode="mean"`.
        classes: Class names; from the loader's dataset or the model by default.
        keep_predictions: Keep every condition's prediction of every sample.
        stacked_rows: Rows per forward, at most; at least one condition runs at a time.
        quiet: Show no progress bar.

    Raises:
        ArgumentError: A condition that does not fit the model.
        ModelError: A model in training mode.
    """
    model = unwrap_compiled(model)
    refuse_training(model, "sweep")
    conditions = list(conditions)
    for condition in conditions:
        if not isinstance(condition, Condition):
            raise ArgumentError(f"conditions: expected Condition(skill), got {type(condition).__name__}")
    names = Categorical(classes if classes is not None else classes_of(loader, model)).classes
    runner = _Stacked(model, _Interventions(model, conditions, reference), len(conditions), stacked_rows)
    labels, top2, predictions = [], [], []
    with torch.inference_mode():
        for batch in track(loader, f"sweep of {len(conditions)} conditions", quiet=quiet):
            images, label = image_batch(batch)
            if len(label) and not 0 <= int(label.min()) <= int(label.max()) < len(names):
                raise ArgumentError(
                    f"labels: expected class indices in [0, {len(names)}), got {int(label.min())} to {int(label.max())}"
                )
            best, predicted = runner.run(images)
            labels.append(label.cpu().numpy())
            top2.append(best)
            predictions.append(predicted)
    if not labels:
        raise ArgumentError("sweep: expected at least one batch, got an empty loader")
    truth, all_predictions = np.concatenate(labels), np.concatenate(predictions, 1)
    first_two = np.concatenate(top2)
    return SweepResult(
        classes=names,
        labels=truth,
        baseline=per_class_accuracy(first_two[:, 0], truth, len(names)),
        per_class_accuracy=per_class_accuracy(all_predictions, truth, len(names)),
        top2=first_two,
        predictions=all_predictions if keep_predictions else None,
    )


class _Stacked:
    """Runs one batch under all conditions."""

    def __init__(
        self, model: torch.nn.Module, interventions: _Interventions, n_conditions: int, stacked_rows: int
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.interventions = interventions
        self.n_conditions = n_conditions
        self.stacked_rows = stacked_rows

    def run(self, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The intact model's two best classes [batch, 2], and predictions [n_conditions, batch]."""
        images = images.to(self.device)
        top2 = self.model(images).topk(2, dim=1).indices.cpu().numpy()
        step = max(1, self.stacked_rows // max(1, len(images)))
        parts = [
            self._predict(images, range(start, min(start + step, self.n_conditions)))
            for start in range(0, self.n_conditions, step)
        ]
        return top2, np.concatenate(parts) if parts else np.empty((0, len(images)), np.int64)

    def _predict(self, images: torch.Tensor, conditions: range) -> np.ndarray:
        batch = len(images)
        index = torch.arange(conditions.start, conditions.stop).repeat_interleave(batch).to(self.device)

        def condition_of(site: Site) -> Any:
            touched = self.interventions.touched[site.name]
            return index if bool(touched[conditions.start : conditions.stop].any()) else _SKIP

        stacked = images.repeat(len(conditions), *(1,) * (images.dim() - 1))
        with _hooked(self.model, self.interventions, condition_of):
            return self.model(stacked).argmax(1).reshape(len(conditions), batch).cpu().numpy()
