"""Fine-tuning and accuracy: enough to give a transformer the user's classes, or to train the embedded default."""

from __future__ import annotations

import math
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from skillfast.data.splits import loader
from skillfast.errors import ArgumentError, ModelError
from skillfast.models.batches import Batch, fed_batches, read_batch
from skillfast.progress import Forecast, track
from skillfast.transfer import moved
from skillfast.vocabulary import FINETUNE, Finetune

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from skillfast.data.splits import LabelledDataset, Splits
    from skillfast.models.loading import LoadedModel

# (epochs, learning rate). The first two train on cached activations, where an epoch costs little.
_RECIPES = {"head": (40, 3e-3), "last-block": (8, 5e-4), "all": (10, 1e-4), "scratch": (60, 1e-3)}
_WEIGHT_DECAY = 0.05
_WARMUP = 0.1  # share of the steps
_CACHE_LIMIT = 2 << 30  # bytes of frozen activations kept, about 200 images of each of 10 classes for ViT-B/16, twice


def resolve_finetune(requested: str | None, loaded: LoadedModel) -> Finetune:
    """Say what to train.

    Args:
        requested: one of "none", "head", "last-block", "all"; None decides by how the model came about.
        loaded: the model.

    Returns:
        The request, or "last-block" for weights that were given another head, "all" for a model without weights, and
        "none" for one that is ready.

    Raises:
        ArgumentError: the request is none of these.
    """
    if requested is not None:
        return _check_mode(requested)
    if loaded.source == "scratch":
        return "all"
    return "last-block" if loaded.head_replaced else "none"


def finetune(
    model: nn.Module,
    splits: Splits,
    mode: str,
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quiet: bool = False,
    *,
    scratch: bool = False,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    label_smoothing: float = 0.0,
    head_lr: float | None = None,
) -> dict[str, Any]:
    """Train a classifier, or its last layers, on `splits.select`.

    AdamW, the learning rate warmed up and then lowered along a cosine. What comes before the first trained layer is
    evaluated once per image and kept where that is possible; "all" sees `splits.train` where there is one. The same
    seed gives the same weights on the same machine; random states of the caller are left as they were.

    Args:
        model: float32, a timm model or one with `get_classifier()` and `blocks`. Changed in place, moved to `device`
            and left in eval mode.
        splits: the data.
        mode: "none", "head" (the classifier), "last-block" (also the last of `model.blocks` and the final norm),
            or "all".
        epochs: passes over the training images; None for a default by mode.
        lr: highest learning rate; None for a default by mode.
        batch_size: images per step.
        seed: seed of the order and the augmentation.
        device: where to train.
        dtype: autocast to it on a GPU; a CPU trains in float32.
        quiet: draw no progress bar.
        scratch: the model has no useful weights yet: default to more epochs and a higher learning rate.
        augment: changes a batch `[b, C, H, W]` at random, drawing from the generator; only where nothing is cached.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        head_lr: highest learning rate of `model.head_parameters()`, which pretraining left without useful weights;
            None for `lr`.

    Returns:
        What was done: finetune, epochs, learning_rate, n_train and validation_accuracy (mean over classes), and
        head_learning_rate where it is another; for "none" only the first and zeros.

    Raises:
        ArgumentError: an unknown mode, or a number that cannot be used.
        ModelError: the model has no such part, or its loss became infinite.
    """
    mode = _check_mode(mode)
    if mode == "none":
        return {"finetune": "none", "epochs": 0, "n_train": 0}
    default_epochs, default_lr = _RECIPES["scratch" if scratch and mode == "all" else mode]
    epochs, lr = epochs or default_epochs, lr or default_lr
    if epochs < 1 or lr <= 0 or batch_size < 1:
        raise ArgumentError(
            f"training: expected positive epochs, learning rate and batch size, got {epochs}, {lr:g} and {batch_size}; "
            "leave them out for the defaults"
        )
    device = torch.device(device)
    model.to(device).eval()
    data: LabelledDataset = splits.train if mode == "all" and splits.train is not None else splits.select
    with only_trainable(model, _parts(model, mode)) as parts, _seeded(seed, device):
        cached = _cache_frozen(model, mode, data, batch_size, device, dtype, quiet)
        forward: Callable[[Tensor], Tensor] = model
        rows: LabelledDataset | _Frozen = data
        if cached is not None:
            forward, rows, augment = cached[0], cached[1], None
        for part in parts:
            part.train()
        try:
            rates = lr, head_lr or lr
            _train(
                forward, model, rows, epochs, rates, batch_size, seed, device, dtype, quiet, augment, label_smoothing
            )
        finally:
            model.eval()
    per_class = accuracy(model, splits.validate, device=device, dtype=dtype, quiet=quiet)
    return {
        "finetune": mode,
        "epochs": epochs,
        "learning_rate": lr,
        **({} if head_lr is None else {"head_learning_rate": head_lr}),
        "n_train": len(data),
        "validation_accuracy": float(per_class.mean()),
    }


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    dataset: LabelledDataset,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quiet: bool = False,
) -> Tensor:
    """Measure how many images of each class a classifier names rightly.

    Args:
        model: in eval mode, on `device`.
        dataset: one part of a `Splits`.
        batch_size: images per forward pass.
        device: where to compute.
        dtype: autocast to it on a GPU.
        quiet: draw no progress bar.

    Returns:
        Share of correct answers per class, float64 `[n_classes]` on the CPU; NaN for a class without images.
    """
    device = torch.device(device)
    predicted, labels = [], []
    batches = loader(dataset, batch_size)
    for batch in track(fed_batches(batches, device), "measuring accuracy", len(batches), quiet):
        with _autocast(device, dtype):
            predicted.append(model(batch.inputs).argmax(dim=1))
        labels.append(batch.labels)
    n_classes, true = len(dataset.classes), torch.cat(labels)
    right = torch.bincount(true[torch.cat(predicted).cpu() == true], minlength=n_classes)
    return right.double() / torch.bincount(dataset.labels, minlength=n_classes).double()


def _check_mode(mode: str) -> Finetune:
    for known in FINETUNE:
        if mode == known:
            return known
    raise ArgumentError(
        f"--finetune: expected one of {', '.join(FINETUNE)}, got {mode!r}; leave it out for the default"
    )


def _parts(model: nn.Module, mode: Finetune) -> list[nn.Module]:
    """Find the modules that a mode trains."""
    if mode == "all":
        return [model]
    classifier = model.get_classifier()  # type: ignore[operator]
    parts = list(classifier) if isinstance(classifier, tuple) else [classifier]  # distilled models have two
    if mode == "last-block":
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
            raise ModelError(
                f"--finetune last-block: expected a model with a list of blocks, got {type(model).__name__}; "
                "pass --finetune head or all"
            )
        norms = [getattr(model, name, None) for name in ("norm", "fc_norm")]
        parts += [blocks[-1], *(norm for norm in norms if isinstance(norm, nn.Module))]
    return parts


@contextmanager
def only_trainable(model: nn.Module, parts: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Gradients for some modules of a model alone; afterwards all are as they were, without gradients."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for part in parts:
            part.requires_grad_(True)
        yield parts
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global random states, which dropout and torchvision's transforms draw from, and put them back."""
    python = random.getstate()
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=device.type == "cuda" and dtype != torch.float32)


class _Frozen:
    """What the frozen layers make of every image, taken by batches.

    Args:
        features: `[n, ...]`, on any device.
        labels: int64 `[n]`, on the host.
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """A batch; torch's DataLoader calls this where it exists."""
        index = torch.tensor(rows)
        return Batch(self.features.index_select(0, moved(index, self.features.device)), self.labels[index])

    @staticmethod
    def collate(batch: Batch) -> Batch:
        """The batch as it is."""
        return batch


def _cache_frozen(
    model: nn.Module,
    mode: Finetune,
    data: LabelledDataset,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    quiet: bool,
) -> tuple[Callable[[Tensor], Tensor], _Frozen] | None:
    """Evaluate the frozen layers once per image; what they give stays on a GPU where it takes a quarter of it at most.

    Returns:
        The rest of the model as a function and its inputs as a dataset; None where the model is not known well enough
        to be cut there, or the inputs would take too much memory.
    """
    first, rest = _cut(model, mode)
    if first is None or rest is None:
        return None
    kept: list[Tensor] = []
    there = torch.device("cpu")

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(moved(inputs[0].detach(), there if kept else None))

    hook = first.register_forward_pre_hook(keep)
    batches = loader(data, batch_size)
    try:
        for batch in track(fed_batches(batches, device), "evaluating the frozen layers", len(batches), quiet):
            with torch.no_grad(), _autocast(device, dtype):
                model(batch.inputs)
            if len(kept) > 1:
                continue
            whole = kept[0].nbytes / len(kept[0]) * len(data)
            if whole > _CACHE_LIMIT:
                return None
            if device.type == "cuda" and 2 * whole <= torch.cuda.mem_get_info(device)[0] // 4:  # parts and all of them
                there = device
            kept[0] = moved(kept[0], there)
    finally:
        hook.remove()
    return rest, _Frozen(torch.cat(kept), data.labels)


def _cut(model: nn.Module, mode: Finetune) -> tuple[nn.Module | None, Callable[[Tensor], Tensor] | None]:
    """Find the first trained module and what follows from its input on."""
    if mode == "head":
        classifier = model.get_classifier()  # type: ignore[operator]
        return (classifier, classifier) if isinstance(classifier, nn.Linear) else (None, None)
    if mode != "last-block" or not isinstance(model, VisionTransformer):
        return None, None
    if (
        type(model).forward_features is not VisionTransformer.forward_features
    ):  # a subclass may do more after the blocks
        return None, None

    def rest(x: Tensor) -> Tensor:  # [b, tokens, width] -> [b, n_classes]
        return model.forward_head(model.norm(model.blocks[-1](x)))

    return model.blocks[-1], rest


def _groups(model: nn.Module, head_lr: float) -> list[dict[str, Any]]:
    """What is trained, with weight decay on matrices alone, and the head's learning rate on the head."""
    head = {id(p) for p in model.head_parameters()} if hasattr(model, "head_parameters") else set()  # type: ignore[operator]
    groups = []
    for group in param_groups_weight_decay(model, _WEIGHT_DECAY):
        on_top = [p for p in group["params"] if id(p) in head]
        below = [p for p in group["params"] if id(p) not in head]
        groups += [{**group, "params": below}, {**group, "params": on_top, "lr": head_lr}]
    return [group for group in groups if group["params"]]


def _train(
    forward: Callable[[Tensor], Tensor],
    model: nn.Module,
    data: LabelledDataset | _Frozen,
    epochs: int,
    rates: tuple[float, float],
    batch_size: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    quiet: bool,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None,
    label_smoothing: float,
) -> None:
    lr, head_lr = rates
    optimizer = torch.optim.AdamW(_groups(model, head_lr), lr=lr)
    batches = loader(data, batch_size, shuffle=True, seed=seed)
    total = epochs * len(batches)
    warmup = max(1, round(_WARMUP * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / total)))
    )
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and dtype == torch.float16)
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    epoch, loss, told = 0, torch.zeros(()), ""
    forecast = Forecast(f"{epochs} x {len(data):,} examples, forward and backward", total)

    def read(given: Any) -> Batch:
        batch = read_batch(given)
        return batch if augment is None else batch.with_inputs(lambda images: augment(images, generator))

    def passes() -> Iterator[Batch]:
        nonlocal epoch, told
        for epoch in range(1, epochs + 1):
            yield from fed_batches(batches, device, read)
            last = loss.item()  # waits for a GPU, once per epoch
            told = f", loss {last:.3f}"
            if not math.isfinite(last):
                raise ModelError(
                    f"training: expected a finite loss, got {last} in epoch {epoch}; lower the learning rate "
                    f"(it was {lr:g})"
                )

    def describe() -> str:
        return f"training, epoch {epoch} of {epochs}{told}"

    for given in track(passes(), describe, total=total, quiet=quiet):
        batch = given.to(device)
        with _autocast(device, dtype):
            logits = forward(batch.inputs)  # type: ignore[arg-type]  # this project's own loaders give one tensor
        loss = nn.functional.cross_entropy(logits.float(), batch.labels, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        forecast.ran(1)
