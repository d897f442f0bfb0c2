"""What a benchmark run is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from skillfast.errors import ArgumentError
from skillfast.vocabulary import DATASETS, DTYPES, FINETUNE, KINDS, METHODS, STATISTICS


@dataclass(frozen=True)
class BenchConfig:
    """The settings of `skillfast.bench`; every default is that of the command line.

    Attributes:
        model: timm's name; None is the small vision transformer for the digits.
        model_kwargs: Further arguments of the model's constructor.
        checkpoint: A safetensors or `.pt` file with the model's weights.
        pretrained: Use the weights that timm downloads.
        finetune: What to train first: `"none"`, `"head"`, `"last-block"`, `"all"`; None: what the model needs.
        epochs: Passes of that training; None for the default of the mode.
        dataset: `"digits"`, `"cifar10"` or `"imagefolder"`.
        data_dir: The folder of the latter two.
        train_per_class: Training images per class to use; None for all.
        test_per_class: Test images per class to use; None for all.
        mean: Per channel, what images are normalised by; None for the model's own.
        std: Likewise.
        crop_pct: Share of the resized image that the centre crop keeps; None for the model's own.
        skip_unreadable: Leave unreadable images out instead of stopping.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`; None for CUDA where there is one.
        dtype: Of the activations, by autocast.
        batch_size: Images per forward of the trace, rows per forward of the sweep.
        seed: Of every random choice.
        sites: Kinds or names of sites.
        pool: How tokens become one observation.
        statistics: What the trace computes.
        cells: Cells per neuron for all but Pearson's r.
        method: `"auto"`: the method and size that are best on the validation part. Or what neurons are ranked by: a
            statistic, `"attribution"`, `"mask"`.
        contrastive: With a method that is named, rank by the score minus the best of the other classes.
        share: Share of all neurons that a skill takes, at most.
        max_site_share: Share of one site's neurons that a skill takes, at most.
        scale: Factor on the activations of a removed skill's neurons.
        control_draws: Random controls per skill.
        backend: `"auto"`, `"native"`, `"triton"` or `"reference"`.
        output: Folder of the results.
    """

    model: str | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    pretrained: bool = False
    finetune: str | None = None
    epochs: int | None = None
    dataset: str = "digits"
    data_dir: str | None = None
    train_per_class: int | None = None
    test_per_class: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    skip_unreadable: bool = False
    device: str | None = None
    dtype: str = "float32"
    batch_size: int = 256
    seed: int = 0
    sites: tuple[str, ...] = KINDS
    pool: str = "mean"
    statistics: tuple[str, ...] = STATISTICS
    cells: int = 128
    method: str = "auto"
    contrastive: bool = False
    share: float = 0.03
    max_site_share: float = 0.25
    scale: float = 0.0
    control_draws: int = 5
    backend: str = "auto"
    output: str = "skillfast-report"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dataset", DATASETS),
            ("finetune", (None, *FINETUNE)),
            ("dtype", DTYPES),
            ("method", ("auto", *METHODS)),
        ):
            if getattr(self, name) not in allowed:
                words = ", ".join(str(word) for word in allowed if word)
                raise ArgumentError(f"{name}: expected one of {words}, got {getattr(self, name)!r}")
        for name in ("batch_size", "control_draws", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {value}")
        if self.contrastive and self.method in ("auto", "mask"):
            raise ArgumentError(
                f"contrastive: expected with a statistic or attribution, got method {self.method!r}; name another"
            )
        if self.dataset != "digits" and self.data_dir is None:
            raise ArgumentError(f"data folder: expected --data-dir with --dataset {self.dataset}, got none")
        if self.model is None and self.dataset != "digits":
            raise ArgumentError(
                f"model: expected a timm name with --dataset {self.dataset}, got none; "
                "for example --model vit_tiny_patch16_224"
            )
        if self.model is None and (self.checkpoint or self.pretrained or self.model_kwargs or self.finetune):
            raise ArgumentError(
                "model: expected --model with --checkpoint, --pretrained, --model-kwarg or --finetune, got none"
            )
        if self.checkpoint is not None and self.pretrained:
            raise ArgumentError("weights: expected --checkpoint or --pretrained, got both; leave one out")

    def to_json(self) -> dict[str, Any]:
        """Everything that may change the results; the output folder does not."""
        return {name: value for name, value in asdict(self).items() if name != "output"}

    @staticmethod
    def names() -> tuple[str, ...]:
        """Names of all settings."""
        return tuple(f.name for f in fields(BenchConfig))
