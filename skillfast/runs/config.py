"""The settings of a run, in groups; a command's options are made from their fields."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillfast.errors import ArgumentError
from skillfast.files import check_output
from skillfast.results import records
from skillfast.results.bench import FILE, REMEDY, BenchResults
from skillfast.settings import Settings, name_of, setting
from skillfast.vocabulary import (
    BACKENDS,
    BINS,
    BITS,
    BLEU,
    DATASETS,
    DEVICE_MAPS,
    DTYPES,
    EMBEDDED,
    FINETUNE,
    GIVEN,
    HUGGINGFACE,
    KINDS,
    LEARNED,
    MAX_SITE_SHARE,
    METHODS,
    METRICS,
    NO_TRAINING,
    PERPLEXITY,
    POOLS,
    SHARE,
    STATISTICS,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from dataclasses import Field

ALL, EACH, LAST, HEAD = "all", "each", "last", "head"  # layers of an evaluation's grid
EVALUATED = ("label",)  # metrics whose skills are evaluated unless others are named

_OF_IMAGE_FILES = ("mean", "std", "crop_pct", "train_per_class", "test_per_class")
_CHANNELS = (1, 3)  # of images
OF_A_MACHINE = ("device", "memory_budget")  # settings of a run that another one may have its own of
_NOT_RESULTS = ("output", "resume", "replay")  # where a run writes and what it goes on from change no result
_OF_A_REPLAY = (*OF_A_MACHINE, *_NOT_RESULTS)


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Which model, its weights, and how it is trained first."""

    name: str | None = setting(
        None,
        "timm's name of a vision transformer; hf: and a language model's name, folder or GGUF file; or embedded: and "
        "the name of one that an installed package brings (`skillfast info`), as by default for text.",
        name="model",
    )
    kwargs: dict[str, Any] = setting(  # noqa: RUF009
        {},
        "An argument of the model's constructor; may be repeated.",
        name="model_kwargs",
        option="model-kwarg",
        metavar="KEY=VALUE",
    )
    checkpoint: str | None = setting(None, "The model's weights: a .safetensors or .pt file.")
    pretrained: bool = setting(False, "Download the weights that timm names.")
    finetune: str | None = setting(None, "What to train first; by default what the model needs.", choices=FINETUNE)
    epochs: int | None = setting(None, "Passes of that training.", low=1)
    lr: float | None = setting(None, "Highest learning rate of that training.", above=0)
    prompt: str | None = setting(None, "Template with {text}, for a model that only predicts tokens.")
    label_words: tuple[str, ...] = setting((), "The prompt's words for the classes: ' bad, good'.")
    soft_prompt: str | None = setting(
        None, "Virtual tokens before the prompt: how many to tune on the select part (kept in the cache), or a folder "
        "with a prompt that peft saved.", metavar="NUMBER|DIR",
    )  # fmt: skip
    pad_token: str | None = setting(None, "What to pad with, where the tokenizer has nothing.")
    device_map: str | None = setting(
        None, "Spread a language model over all devices (accelerate).", choices=DEVICE_MAPS
    )
    bits: int | None = setting(None, "Bits of a language model's linear layers (bitsandbytes).", choices=BITS)

    def __post_init__(self) -> None:
        if isinstance(self.soft_prompt, int):  # as people write it in Python
            object.__setattr__(self, "soft_prompt", str(self.soft_prompt))
        super().__post_init__()

    def check(self) -> None:
        """Raise ArgumentError where values do not go together, or the checkpoint cannot be read."""
        if self.name is None and (self.pretrained or self.kwargs or self.finetune or self.lr):
            raise ArgumentError(
                "model: expected --model with --pretrained, --model-kwarg, --finetune or --lr, got none; name one"
            )
        if self.checkpoint is not None:
            if self.pretrained:
                raise ArgumentError("weights: expected --checkpoint or --pretrained, got both; leave one out")
            _check_readable(self.checkpoint)
        if (self.prompt is None) != (not self.label_words):
            raise ArgumentError(
                "prompt: expected --prompt and --label-words together, got one; leave both out for a model with a "
                "classification head"
            )
        if self.soft_prompt is not None:
            self._check_soft_prompt()
        if self.placed and self.finetune not in (None, NO_TRAINING):
            raise ArgumentError(
                f"--finetune: expected none with {self.placed_by}, got {self.finetune!r}; layers that are spread or "
                "quantised are not trained"
            )

    def _check_soft_prompt(self) -> None:
        if self.prompt is None:
            raise ArgumentError(
                "soft prompt: expected --prompt and --label-words with it, got none; it stands before the prompt of a "
                "model that predicts tokens ('{text}' alone will do)"
            )
        if self.finetune not in (None, NO_TRAINING):
            raise ArgumentError(
                f"soft prompt: expected --finetune none with it, got {self.finetune!r}; only the prompt is tuned"
            )
        if self.virtual_tokens is None:
            return
        if self.virtual_tokens < 1:
            raise ArgumentError(
                f"soft prompt: expected at least 1 token or a folder, got {self.virtual_tokens}; for example 16"
            )
        if self.placed:
            raise ArgumentError(
                f"soft prompt: expected a folder with {self.placed_by}, got {self.soft_prompt}; tune it on the whole "
                "model and name its folder"
            )

    @property
    def virtual_tokens(self) -> int | None:
        """How many virtual tokens to tune; None for a prompt that is opened, or none."""
        asked = self.soft_prompt
        return int(asked) if asked is not None and re.fullmatch(r"[+-]?\d{1,9}", asked) else None

    @property
    def is_language_model(self) -> bool:
        """Whether it reads text."""
        return self.name is not None and self.name.startswith((HUGGINGFACE, EMBEDDED))

    @property
    def placed(self) -> bool:
        """Whether loading puts the model where it runs, and nothing else may move or train it."""
        return self.device_map is not None or self.bits is not None

    @property
    def placed_by(self) -> str:
        """The option that makes it `placed`."""
        return "--bits" if self.device_map is None else "--device-map"


@dataclass(frozen=True)
class DataConfig(Settings):
    """Which examples, and how images and texts are read."""

    dataset: str = setting("digits", "What the examples are.", choices=DATASETS)
    data_dir: str | None = setting(
        None, "Folder with train/<class> and test/<class>, or CIFAR-10's (by default downloaded)."
    )
    data_file: str | None = setting(None, "Text: a .tsv, .csv or .jsonl file, or hf:NAME[:CONFIG][@SPLIT].")
    test_file: str | None = setting(None, "Text to test on: as --data-file, of which it is a third by default.")
    text_column: str = setting("text", "Column of the text.")
    label_column: str = setting("label", "Column of its class.")
    pair_column: str | None = setting(None, "Column of a second text, for inference tasks.")
    class_names: tuple[str, ...] = setting((), "Names of classes that the data numbers: bad,good.")
    truncate: bool = setting(False, "Cut texts that are longer than the model's context.")
    train_per_class: int | None = setting(
        None, "Training examples of each class; by default 200 of CIFAR-10, else all.", low=2
    )
    test_per_class: int | None = setting(
        None, "Test examples of each class; by default 100 of CIFAR-10, else all.", low=1
    )
    mean: tuple[float, ...] | None = setting(
        None, "What images are normalised by, one number or one per channel; by default the model's own.", required=True
    )
    std: tuple[float, ...] | None = setting(
        None, "Standard deviation that images are normalised by, given as --mean.", above=0, required=True
    )
    crop_pct: float | None = setting(
        None, "Share of the image that the centre crop keeps; by default the model's own.", above=0, high=1
    )
    skip_unreadable: bool = setting(False, "Leave out images that cannot be read, and count them.")

    def check(self) -> None:
        """Raise ArgumentError where a source is missing, or an image's channels have another number of values."""
        if self.dataset == "imagefolder" and self.data_dir is None:
            raise ArgumentError(
                "data folder: expected --data-dir with --dataset imagefolder, got none; name the folder of images"
            )
        if self.dataset == "text" and self.data_file is None:
            raise ArgumentError(
                "data file: expected --data-file with --dataset text, got none; for example --data-file train.tsv"
            )
        given = [name for name in _OF_IMAGE_FILES if getattr(self, name) is not None]
        if self.dataset == "digits" and given:
            raise ArgumentError(
                f"{given[0]}: expected with --dataset cifar10 or imagefolder, got it with digits, whose images and "
                "split are fixed; leave it out"
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) not in _CHANNELS:
                raise ArgumentError(
                    f"{name}: expected 1 number, or 3 for RGB images, got {len(values)}; give one for all channels or "
                    f"one per channel, as --{name} 0.49 0.48 0.45"
                )


@dataclass(frozen=True)
class TraceConfig(Settings):
    """What a trace reads and computes."""

    sites: tuple[str, ...] = setting(KINDS, "Kinds or names of sites.", required=True)
    pool: str = setting("mean", "How an example's tokens become one observation.", choices=POOLS)
    metrics: tuple[str, ...] = setting(
        METRICS, "What neurons are correlated with; of text also margin, entropy, token_log_probability, "
        "module:function, column:NAME.", required=True,
    )  # fmt: skip
    statistics: tuple[str, ...] = setting(STATISTICS, "What is computed.", choices=STATISTICS, required=True)
    bins: int = setting(BINS, "Bins per neuron for all but Pearson's r; fewer take less memory.", low=2, high=256)


@dataclass(frozen=True)
class SelectConfig(Settings):
    """Which neurons a skill takes."""

    method: str = setting(
        "auto", "What neurons are ranked by; auto takes the method and size that are best on the validation part.",
        choices=("auto", *METHODS),
    )  # fmt: skip
    contrastive: bool = setting(False, "Rank by the score minus the best of the other classes.")
    share: float = setting(SHARE, "Share of all neurons that a skill takes, at most.", above=0, high=1)
    max_site_share: float = setting(
        MAX_SITE_SHARE, "Share of one site's neurons that a skill takes, at most.", above=0, high=1
    )

    def check(self) -> None:
        """Raise ArgumentError for a contrastive ranking by a method that has none."""
        if self.contrastive and self.method in ("auto", *LEARNED):
            raise ArgumentError(
                f"contrastive: expected with a statistic or attribution, got method {self.method!r}; name another"
            )


@dataclass(frozen=True)
class AblateConfig(Settings):
    """What removing a skill means."""

    scale: float = setting(0.0, "Factor on the activations of a skill's neurons: 0 removes, 2 doubles.")
    control_draws: int = setting(
        20, "Random controls per skill, and as many that are matched by mean activation, on the class's own examples; "
        "the first few random ones run on all examples.", low=1,
    )  # fmt: skip
    never_seen: tuple[str, ...] = setting(
        (), "Classes of which to train another model that never sees them, each by the recipe of the model's own "
        "training: what is read from its embeddings stands beside what a removal leaves.",
    )  # fmt: skip

    def check(self) -> None:
        """Raise ArgumentError for a class that is named twice."""
        if len(set(self.never_seen)) < len(self.never_seen):
            raise ArgumentError(
                f"never_seen: expected each class once, got {', '.join(self.never_seen)}; name each once"
            )


@dataclass(frozen=True)
class RunConfig(Settings):
    """Where a run computes, from which seed, and where it writes."""

    device: str | None = setting(None, "cpu, cuda, cuda:1; by default CUDA where there is one.")
    dtype: str | None = setting(
        None, "Of the activations; by default bfloat16 on a GPU that computes in it, else float32.", choices=DTYPES
    )
    batch_size: int = setting(256, "Examples per forward.", low=1)
    seed: int = setting(0, "Of every random choice.", low=0)
    memory_budget: float | None = setting(None, "GiB for a sweep's results; by default half of what is free.", above=0)
    backend: str = setting("auto", "What runs the ops.", choices=BACKENDS)
    resume: bool = setting(True, "Go on from what an interrupted run left in --output.")
    like: str | None = setting(
        None, "Folder of an earlier run: measure another checkpoint with its data and settings, and remove its skills, "
        "too. Give options of the model and of the run alone.",
    )  # fmt: skip
    replay: str | None = setting(
        None, "Folder of an earlier run: run it again with its settings, data and weights, and say what differs. Exits "
        "with 3 where something does, with 4 where data or weights are others.",
    )  # fmt: skip
    output: str = setting("skillfast-report", "Folder of the results.")

    def check(self) -> None:
        """Raise ArgumentError for a device that no machine has, or an output folder that is not to be written."""
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ArgumentError(
                f"device: expected cpu, cuda or cuda:<number>, got {self.device!r}; leave it out for the default"
            )
        check_output(self.output)
        for name, earlier in (("like", self.like), ("replay", self.replay)):
            if earlier is not None and Path(earlier).resolve() == Path(self.output).resolve():
                raise ArgumentError(
                    f"output: expected another folder than that of --{name}, got {self.output!r}; name a new one"
                )

    @property
    def memory_bytes(self) -> int | None:
        """The memory budget in bytes."""
        return None if self.memory_budget is None else int(self.memory_budget * 2**30)

    @property
    def precision(self) -> str:
        """The dtype of the activations, once the device is known."""
        return self.dtype or "float32"


@dataclass(frozen=True)
class BenchConfig:
    """The settings of a run, checked when they are made; every default is that of the command line.

    `BenchConfig.of(model="vit_tiny_patch16_224", dataset="cifar10", share=0.01)` makes it from flat settings, named as
    the options are.

    Attributes:
        model: Which model, its weights, and how it is trained first.
        data: Which examples, and how they are read.
        trace: What a trace reads and computes.
        select: Which neurons a skill takes.
        ablate: What removing a skill means.
        run: Where it computes, from which seed, and where it writes.
        given: Class of the model that the caller gave with a loader; None: model and data are those of the settings.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    ablate: AblateConfig = field(default_factory=AblateConfig)
    run: RunConfig = field(default_factory=RunConfig)
    given: str | None = None

    def __post_init__(self) -> None:
        name, dataset = self.model.name, self.data.dataset
        if name is None and dataset not in ("digits", "text"):  # which have a default
            raise ArgumentError(
                f"model: expected a timm name with --dataset {dataset}, got none; for example --model "
                "vit_tiny_patch16_224"
            )
        if name is not None and self.model.is_language_model != (dataset == "text"):
            text = self.model.is_language_model
            what, expected, got = ("dataset", "text", dataset) if text else ("model", "hf:NAME", name)
            raise ArgumentError(
                f"{what}: expected {expected} with {name if text else '--dataset text'}, got {got}; language models "
                "read text, timm's models read images"
            )
        if self.model.placed and dataset != "text":
            raise ArgumentError(f"{self.model.placed_by}: expected a language model with it, got {name}; leave it out")
        if self.model.device_map is not None and self.run.device is not None:
            raise ArgumentError(
                f"device: expected --device or --device-map, got both ({self.run.device}, {self.model.device_map}); "
                "leave one out"
            )
        if dataset != "text" and self.trace.metrics != METRICS:
            raise ArgumentError(
                f"metrics: expected {', '.join(METRICS)} for images, got {', '.join(self.trace.metrics)}; trace others "
                "with skillfast.trace(forward=...)"
            )
        if self.ablate.never_seen and (other := self._weights_from_elsewhere()) is not None:
            raise ArgumentError(
                f"never_seen: expected a model of images whose weights are trained here from none, got {other}; leave "
                "it out"
            )

    def _weights_from_elsewhere(self) -> str | None:
        """What says that no model can be trained as this one was; None where it is trained here."""
        if self.given is not None:
            return f"a model of the caller's ({self.given})"
        if self.data.dataset == "text":
            return "a language model"
        if self.model.checkpoint is not None:
            return f"--checkpoint {self.model.checkpoint}"
        if self.model.pretrained:
            return "--pretrained"
        return f"--finetune {NO_TRAINING}" if self.model.finetune == NO_TRAINING else None

    @staticmethod
    def names() -> tuple[str, ...]:
        """Names of all flat settings."""
        return tuple(name_of(declared) for _, declared in _declared())

    @staticmethod
    def of(**settings: Any) -> BenchConfig:
        """Make the settings from flat ones, named as the command line's options: `of(model=..., dataset=...)`.

        With `like=` they start from those of an earlier run, for another checkpoint of its model or another model; with
        `replay=` they are those of an earlier run, which is to be run again.

        Raises:
            ArgumentError: A setting that is not known, or a value that cannot be used; with `like`, one of data, trace
                or selection, and with `replay` any but the folder and the machine's, which are the earlier run's.
            DataError: An earlier run that cannot be read.
        """
        like, replay = settings.get("like"), settings.get("replay")
        if replay is not None:
            start = _again(replay, settings)
        else:
            start = BenchConfig() if like is None else _like(like, settings)
        return start.replaced(**settings)

    def replaced(self, **settings: Any) -> BenchConfig:
        """A copy with some flat settings replaced; raises ArgumentError as `of`."""
        places = {name_of(declared): (group, declared.name) for group, declared in _declared()}
        unknown = [name for name in settings if name not in places]
        if unknown:
            raise ArgumentError(f"setting: expected one of {', '.join(places)}, got {unknown[0]!r}; check its name")
        changes: dict[str, dict[str, Any]] = {}
        for name, value in settings.items():
            group, own = places[name]
            changes.setdefault(group, {})[own] = value
        return replace(self, **{group: replace(getattr(self, group), **values) for group, values in changes.items()})

    def to_json(self) -> dict[str, Any]:
        """Everything that may change the results, flat."""
        flat = {
            name_of(declared): getattr(getattr(self, group), declared.name)
            for group, declared in _declared()
            if declared.name not in _NOT_RESULTS
        }
        if self.given is not None:
            flat |= {"model": self.given, "dataset": GIVEN}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    def of_given(self, name: str) -> BenchConfig:
        """The settings of a run on a model of this class and a loader that the caller gave."""
        return replace(self, given=name)


@dataclass(frozen=True)
class Grid(Settings):
    """Skills x sizes x layers x factors to try, and the random controls beside them."""

    shares: tuple[float, ...] = setting(
        (0.001, 0.003, 0.01), "Sizes of a skill, as shares of all neurons. In one block it has as many, up to "
        "--max-site-share.", above=0, high=1, required=True,
    )  # fmt: skip
    layers: tuple[str, ...] = setting(
        (ALL, EACH), "Where neurons are chosen from: all, each (every block by itself), last (the last block), head, "
        "or a block such as blocks.3.", required=True,
    )  # fmt: skip
    scales: tuple[float, ...] = setting(
        (0.0, 0.5, 2.0, 4.0), "Factors on the activations of a skill of all layers: 0, which removes, is always among "
        "them, and beside others 1, which is the intact model.", required=True,
    )  # fmt: skip
    draws: int = setting(
        3, "Random controls beside each skill, with as many neurons per site.", low=1, option="control-draws"
    )
    max_site_share: float = setting(MAX_SITE_SHARE, "Share of one site's neurons, at most.", above=0, high=1)
    signed: bool = setting(False, "Rank a continuous metric's neurons by the score, not by its size.")
    contrastive: bool = setting(False, "Rank by the score minus the best of the other classes.")
    replicates: int = setting(1000, "Of the bootstrap behind the 95 % intervals.", low=1)
    seed: int = setting(0, "Of the random controls and the bootstrap.", low=0)

    def scales_at(self, layers: str) -> tuple[float, ...]:
        """Factors, ascending: those of a curve through 1, the intact model, or 0 alone, as in single layers."""
        others = {*self.scales} - {0.0, 1.0} if layers == ALL else set()
        return tuple(sorted({0.0, 1.0, *others})) if others else (0.0,)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Generation(Settings):
    """What a causal language model writes for BLEU."""

    prefix_tokens: int = setting(8, "Tokens of each held-out text to write on from.", low=1)
    max_new_tokens: int = setting(32, "Tokens to write at most, greedily; 0 leaves BLEU out.", low=0)
    texts: int = setting(
        64, "Held-out texts to write on from, drawn at random; all where there are fewer.", low=1, option="generations"
    )

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what is measured."""
        return (PERPLEXITY, BLEU) if self.max_new_tokens else (PERPLEXITY,)


def _declared() -> Iterator[tuple[str, Field[Any]]]:
    """Every setting with the name of its group."""
    for group in fields(BenchConfig):
        if group.name == "given":  # no setting
            continue
        for declared in fields(group.default_factory):  # type: ignore[arg-type]  # the group's class
            yield group.name, declared


def _like(directory: str, given: Mapping[str, Any]) -> BenchConfig:
    """The settings of an earlier run, for the weights that are given: data, what is traced and selected, and the seed.

    Args:
        directory: Folder of the earlier run.
        given: The settings to be replaced; with none of the model there is nothing to measure.
    """
    groups = dict[str, str]((name_of(declared), group) for group, declared in _declared())
    fixed = [name for name in given if groups.get(name) not in (None, "model", "run") or name == "seed"]
    earlier = _earlier("like", directory, fixed)
    own = [name for name in given if groups.get(name) == "model"]
    kept = {
        name: value for name, value in earlier.config.items() if name in groups and name not in (*OF_A_MACHINE, "like")
    }
    if earlier.config["dataset"] == GIVEN:
        if own:
            raise given_in_python("like", directory)
        kept = {name: value for name, value in kept.items() if groups[name] not in ("model", "data")}
        return BenchConfig().replaced(**{**kept, **given}).of_given(earlier.config["model"])
    weights = any(name in ("model", "checkpoint", "pretrained") for name in own)
    if not own or (not weights and earlier.model.trained.finetune not in (None, NO_TRAINING)):
        raise ArgumentError(
            f"like: expected --checkpoint or --model with it, got {own[0] if own else 'neither'}; name the weights to "
            f"measure as {directory} was measured"
        )
    finetune = NO_TRAINING if given.get("model", kept["model"]) else None
    kept |= {"never_seen": (), "epochs": None, "lr": None, "finetune": finetune}
    if weights:
        kept |= {"checkpoint": None, "pretrained": False}
    if given.get("model") not in (None, kept["model"]):
        kept["model_kwargs"] = {}
    return BenchConfig().replaced(**{**kept, **given})


def _again(directory: str, given: Mapping[str, Any]) -> BenchConfig:
    """The settings of an earlier run; only where it computes and writes may be given anew."""
    earlier = _earlier("replay", directory, [name for name in given if name not in _OF_A_REPLAY])
    if earlier.config["dataset"] == GIVEN:
        raise given_in_python("replay", directory)
    return BenchConfig().replaced(**earlier.config)


def _earlier(option: str, directory: str, fixed: Sequence[str]) -> BenchResults:
    """Results whose settings an option takes; raises ArgumentError for settings that are fixed by them."""
    earlier = records.read(BenchResults, Path(directory) / FILE, REMEDY)
    if fixed:
        raise ArgumentError(
            f"{fixed[0]}: expected with a run of its own, got it with --{option}, which takes it from {directory}; "
            "leave it out"
        )
    return earlier


def given_in_python(option: str, directory: str) -> ArgumentError:
    """What is said where a run on a model and loader of its caller's is asked for again without them."""
    return ArgumentError(
        f"{option}: expected a run of named data, or model= and loader=, got {directory}, whose model and loader were "
        "given in Python; pass the same ones to skillfast.bench"
    )


def _check_readable(checkpoint: str) -> None:
    try:
        with Path(checkpoint).open("rb"):
            pass
    except OSError as error:
        raise ArgumentError(
            f"checkpoint: expected a file that can be read, got {checkpoint!r} ({error.strerror}); check its path"
        ) from error
