"""What a benchmark run is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from skillfast.errors import ArgumentError
from skillfast.vocabulary import (
    BINS,
    BITS,
    DATASETS,
    DEVICE_MAPS,
    DTYPES,
    FINETUNE,
    KINDS,
    METHODS,
    METRICS,
    STATISTICS,
)


@dataclass(frozen=True)
class BenchConfig:
    """The settings of `skillfast.bench`; every default is that of the command line.

    Attributes:
        model: timm's name, or `hf:` and a name on the hub or a folder; None is the small vision transformer for the
            digits.
        model_kwargs: Further arguments of the model's constructor.
        checkpoint: A safetensors or `.pt` file with the model's weights.
        pretrained: Use the weights that timm downloads.
        finetune: What to train first: `"none"`, `"head"`, `"last-block"`, `"all"`; None: what the model needs.
        epochs: Passes of that training; None for the default of the mode.
        lr: Its highest learning rate; None for the default of the mode.
        dataset: `"digits"`, `"cifar10"`, `"imagefolder"` or `"text"`.
        data_dir: The folder of images; of CIFAR-10 None lets torchvision download it into the cache.
        data_file: Text: a `.tsv`, `.csv` or `.jsonl` file, or `hf:NAME[:CONFIG][@SPLIT]`.
        test_file: Likewise, to test on; None for a third of `data_file`.
        text_column: Where the text stands.
        label_column: Where its class stands.
        pair_column: Where a second text stands.
        class_names: Of classes that the data numbers, in their order; none: as the model or the data has them.
        prompt: Template with `{text}` for a model that only predicts tokens.
        label_words: Its words for the classes, in their order.
        pad_token: What to pad with, where the tokenizer has nothing.
        truncate: Cut texts that are longer than the model's context.
        train_per_class: Training images per class to use; None for 200 of CIFAR-10 (a model without weights is then
            trained on all others too), all of anything else.
        test_per_class: Test images per class to use; None for 100 of CIFAR-10, all of anything else.
        mean: Per channel, what images are normalised by; None for the model's own.
        std: Likewise.
        crop_pct: Share of the resized image that the centre crop keeps; None for the model's own.
        skip_unreadable: Leave unreadable images out instead of stopping.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`; None for CUDA where there is one.
        device_map: Of a language model: how accelerate spreads its layers, `"auto"` for one; None: all on `device`.
        bits: Of a language model's linear layers, 4 or 8, by bitsandbytes; None as they are.
        dtype: Of the activations, by autocast; None for bfloat16 on a CUDA device that computes in it, else float32.
        batch_size: Images per forward of the trace, rows per forward of the sweep.
        seed: Of every random choice.
        sites: Kinds or names of sites.
        pool: How tokens become one observation.
        metrics: What text is traced against; see `skillfast.metrics`.
        statistics: What the trace computes.
        bins: Bins per neuron for all but Pearson's r.
        method: `"auto"`: the method and size that are best on the validation part. Or what neurons are ranked by: a
            statistic, `"attribution"`, `"mask"`.
        contrastive: With a method that is named, rank by the score minus the best of the other classes.
        share: Share of all neurons that a skill takes, at most.
        max_site_share: Share of one site's neurons that a skill takes, at most.
        scale: Factor on the activations of a removed skill's neurons.
        control_draws: Random controls per skill.
        memory_budget: GiB that a sweep's intermediate results may take; None for half of what is free.
        backend: `"auto"`, `"native"`, `"triton"` or `"reference"`.
        resume: Go on from what an interrupted run of the same settings left in the output folder.
        output: Folder of the results.
    """

    model: str | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    pretrained: bool = False
    finetune: str | None = None
    epochs: int | None = None
    lr: float | None = None
    dataset: str = "digits"
    data_dir: str | None = None
    data_file: str | None = None
    test_file: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    pair_column: str | None = None
    class_names: tuple[str, ...] = ()
    prompt: str | None = None
    label_words: tuple[str, ...] = ()
    pad_token: str | None = None
    truncate: bool = False
    train_per_class: int | None = None
    test_per_class: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    skip_unreadable: bool = False
    device: str | None = None
    device_map: str | None = None
    bits: int | None = None
    dtype: str | None = None
    batch_size: int = 256
    seed: int = 0
    sites: tuple[str, ...] = KINDS
    pool: str = "mean"
    metrics: tuple[str, ...] = METRICS
    statistics: tuple[str, ...] = STATISTICS
    bins: int = BINS
    method: str = "auto"
    contrastive: bool = False
    share: float = 0.03
    max_site_share: float = 0.25
    scale: float = 0.0
    control_draws: int = 5
    memory_budget: float | None = None
    backend: str = "auto"
    resume: bool = True
    output: str = "skillfast-report"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dataset", DATASETS),
            ("finetune", (None, *FINETUNE)),
            ("dtype", (None, *DTYPES)),
            ("method", ("auto", *METHODS)),
        ):
            if getattr(self, name) not in allowed:
                words = ", ".join(str(word) for word in allowed if word)
                raise ArgumentError(f"{name}: expected one of {words}, got {getattr(self, name)!r}")
        for name in ("batch_size", "control_draws", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {value}")
        if self.lr is not None and not self.lr > 0:
            raise ArgumentError(f"learning rate: expected more than 0, got {self.lr:g}; leave it out for the default")
        if self.memory_budget is not None and not self.memory_budget > 0:
            raise ArgumentError(f"memory budget: expected more than 0 GiB, got {self.memory_budget}")
        if self.contrastive and self.method in ("auto", "mask"):
            raise ArgumentError(
                f"contrastive: expected with a statistic or attribution, got method {self.method!r}; name another"
            )
        self._check_text()
        if self.dataset == "imagefolder" and self.data_dir is None:
            raise ArgumentError("data folder: expected --data-dir with --dataset imagefolder, got none")
        if self.model is None and self.dataset != "digits":
            raise ArgumentError(
                f"model: expected a timm name with --dataset {self.dataset}, got none; "
                "for example --model vit_tiny_patch16_224"
            )
        if self.model is None and (self.checkpoint or self.pretrained or self.model_kwargs or self.finetune or self.lr):
            raise ArgumentError(
                "model: expected --model with --checkpoint, --pretrained, --model-kwarg, --finetune or --lr, got none"
            )
        if self.checkpoint is not None and self.pretrained:
            raise ArgumentError("weights: expected --checkpoint or --pretrained, got both; leave one out")

    def _check_text(self) -> None:
        hugging_face = self.model is not None and self.model.startswith("hf:")
        if hugging_face != (self.dataset == "text"):
            expected, got = ("--dataset text", f"--dataset {self.dataset}") if hugging_face else ("hf:NAME", self.model)
            what = "dataset" if hugging_face else "model"
            raise ArgumentError(
                f"{what}: expected {expected} with {self.model if hugging_face else '--dataset text'}, got {got}; "
                "language models read text, timm's models read images"
            )
        if self.dataset == "text" and self.data_file is None:
            raise ArgumentError(
                "data file: expected --data-file with --dataset text, got none; for example --data-file train.tsv"
            )
        if (self.prompt is None) != (not self.label_words):
            raise ArgumentError(
                "prompt: expected --prompt and --label-words together, got one; leave both out for a model with a "
                "classification head"
            )
        if self.placed:
            self._check_placed("--bits" if self.device_map is None else "--device-map")
        if self.dataset != "text" and self.metrics != METRICS:
            raise ArgumentError(
                f"metrics: expected {', '.join(METRICS)} for images, got {', '.join(self.metrics)}; trace others with "
                "skillfast.trace(forward=...)"
            )

    def _check_placed(self, option: str) -> None:
        if self.device_map not in (None, *DEVICE_MAPS):
            raise ArgumentError(
                f"device map: expected one of {', '.join(DEVICE_MAPS)}, got {self.device_map!r}; auto fills the devices"
            )
        if self.bits not in (None, *BITS):
            raise ArgumentError(
                f"bits: expected one of {', '.join(map(str, BITS))}, got {self.bits}; leave it out for whole weights"
            )
        if self.dataset != "text":
            raise ArgumentError(f"{option}: expected a language model with it, got {self.model}; leave it out")
        if self.device_map is not None and self.device is not None:
            raise ArgumentError(
                f"device: expected --device or --device-map, got both ({self.device}, {self.device_map}); leave one out"
            )
        if self.finetune not in (None, "none"):
            raise ArgumentError(
                f"--finetune: expected none with {option}, got {self.finetune!r}; layers that are spread or quantised "
                "are not trained"
            )

    @property
    def placed(self) -> bool:
        """Whether loading puts the model where it runs, and nothing else may move or train it."""
        return self.device_map is not None or self.bits is not None

    @property
    def memory_bytes(self) -> int | None:
        """The budget in bytes."""
        return None if self.memory_budget is None else int(self.memory_budget * 2**30)

    @property
    def precision(self) -> str:
        """The dtype of the activations, once the device is known."""
        return self.dtype or "float32"

    def to_json(self) -> dict[str, Any]:
        """Everything that may change the results; where they go and what they go on from does not."""
        return {name: value for name, value in asdict(self).items() if name not in ("output", "resume")}

    @staticmethod
    def names() -> tuple[str, ...]:
        """Names of all settings."""
        return tuple(f.name for f in fields(BenchConfig))
