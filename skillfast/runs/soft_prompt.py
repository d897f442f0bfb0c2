"""The soft prompt of a run over text: opened from a folder, taken from the cache, or tuned on the select part."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skillfast import data, files
from skillfast.errors import DataError
from skillfast.models.digests import weights_digest
from skillfast.models.prompt_tuning import PASSED_ON, STEPS, tune_prompt
from skillfast.models.soft_prompt import SoftPrompt, check_prompted, require_peft
from skillfast.models.weights import first_line
from skillfast.progress import tell
from skillfast.results import records
from skillfast.results.provenance import UsedPrompt
from skillfast.runs.kept import PROMPT, Kept
from skillfast.runs.subject import Training
from skillfast.vocabulary import NO_TRAINING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.utils.data import DataLoader

    from skillfast.data.splits import Splits
    from skillfast.models.huggingface import LanguageModel
    from skillfast.models.text_classifier import TextClassifier
    from skillfast.runs.config import BenchConfig

_RECIPE = 1  # a new number for whatever changes what is tuned
_BATCH = 16
_HELD_OUT = 200  # validation examples on which accuracy is shown, at most


def given_prompt(config: BenchConfig, loaded: LanguageModel) -> SoftPrompt | None:
    """The prompt that the settings open, if any; checks that the model takes one, before anything is tuned.

    Raises:
        DataError: A folder without a prompt, or with one that cannot be read.
        ArgumentError: A prompt for embeddings of another width.
        ModelError: A model that takes no prompt, or no peft library where one is to be tuned.
    """
    asked = config.model.soft_prompt
    if asked is None:
        return None
    opened = None
    if config.model.virtual_tokens is None:
        opened = SoftPrompt.load(asked)
        opened.check(loaded.model, loaded.name)
        named_prompt(opened, asked)  # what its folder says of it is told before anything runs, if it is wrong
    else:
        require_peft()
    check_prompted(loaded.model, loaded.name)
    return opened


def prompt_training(
    config: BenchConfig, model: TextClassifier, loaded: LanguageModel, splits: Splits, *, quiet: bool
) -> Training:
    """How the prompt of a run is tuned, or found in the cache, before anything is measured."""

    def use(prompt: SoftPrompt) -> dict[str, Any]:
        model.set_soft_prompt(prompt)
        return {"finetune": NO_TRAINING}

    def run() -> dict[str, Any]:
        return use(_cached_or_tuned(config, model, loaded, splits, quiet))

    def save(_: dict[str, Any], folder: Path) -> None:
        assert model.soft_prompt is not None
        model.soft_prompt.save(folder / PROMPT, loaded.model)

    tokens = config.model.virtual_tokens
    line = f"soft prompt of {tokens} tokens for {config.model.name}, on {len(splits.select)} texts"
    return Training(run, line, Kept(save, lambda folder: use(SoftPrompt.load(folder / PROMPT))))


def used_prompt(config: BenchConfig, model: torch.nn.Module) -> UsedPrompt | None:
    """The prompt that a run measured with, as result files name it."""
    prompt = getattr(model, "soft_prompt", None)
    if prompt is None:
        return None
    origin = "tuned" if config.model.virtual_tokens is not None else str(config.model.soft_prompt)
    return named_prompt(prompt, origin)


def named_prompt(prompt: SoftPrompt, origin: str) -> UsedPrompt:
    """What result files say of a prompt; raises DataError where its folder says what cannot be."""
    known = {name: value for name, value in prompt.tuned.items() if name in PASSED_ON}
    return records.made(UsedPrompt, {"tokens": len(prompt), "sha256": prompt.sha256, "origin": origin, **known})


def _cached_or_tuned(
    config: BenchConfig, model: TextClassifier, loaded: LanguageModel, splits: Splits, quiet: bool
) -> SoftPrompt:
    """The prompt that the same model, data and settings have, from the cache where it is there.

    A folder of the cache that cannot be read is made anew, and one that cannot be written is done without; a warning
    says so.
    """
    assert model.words is not None
    path = files.cache_dir() / f"soft-prompt-{_key(config, model, splits)}"
    if path.is_dir():
        try:
            prompt = SoftPrompt.load(path)
        except DataError as error:  # whatever is wrong with it, it can be made again
            warnings.warn(f"cached soft prompt '{path}' cannot be read ({error}); tuning again", stacklevel=2)
            shutil.rmtree(path, ignore_errors=True)
        else:
            tell(f"taken from the cache, {path}")
            return prompt
    shown: Any = splits.validate
    if len(shown) > _HELD_OUT:
        chosen = torch.randperm(len(shown), generator=torch.Generator().manual_seed(config.run.seed))[:_HELD_OUT]
        shown = _Some(shown, sorted(chosen.tolist()))  # texts of like lengths stay beside each other
    tokens = config.model.virtual_tokens
    assert tokens is not None
    learned = data.loader(splits.select, _BATCH, shuffle=True, seed=config.run.seed)
    epochs = config.model.epochs
    steps = STEPS if epochs is None else epochs * len(learned)
    prompt = tune_prompt(
        loaded.model,
        _Mappings(learned),
        tokens,
        words=model.words,
        held_out=_Mappings(data.loader(shown, _BATCH)),
        steps=steps,
        lr=config.model.lr,
        seed=config.run.seed,
        quiet=quiet,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
            prompt.save(beside, loaded.model).rename(path)
            Path(beside).mkdir()  # for the context to remove
    except OSError as error:
        warnings.warn(f"soft prompt cannot be kept in '{path.parent}' ({first_line(error)})", stacklevel=2)
    return prompt


def _key(config: BenchConfig, model: TextClassifier, splits: Splits) -> str:
    """Digest of everything that a tuned prompt depends on."""
    assert model.words is not None
    digest, parts = hashlib.sha256(), (splits.select, splits.validate)  # type: Any, Any
    for part in parts:
        for index in range(len(part)):
            digest.update(json.dumps([part[index]["input_ids"], int(part.labels[index])]).encode())
    determined_by = [
        _RECIPE,
        weights_digest(model),
        digest.hexdigest(),
        model.words.tolist(),
        asdict(config.model)["soft_prompt"],
        config.model.epochs,
        config.model.lr,
        config.run.seed,
        *(version(name).split(".")[:2] for name in ("torch", "transformers")),
    ]
    return hashlib.sha256(json.dumps(determined_by).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _Some:
    """Some examples of a part.

    Attributes:
        part: The part.
        rows: Which ones.
    """

    part: Any
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.part[self.rows[index]]

    def collate(self, examples: Any) -> Any:
        """A batch, as the part makes it."""
        return self.part.collate(examples)


@dataclass(frozen=True)
class _Mappings:
    """Packed batches of a loader as mappings, in every pass anew.

    Attributes:
        loader: Gives a packed tensor and labels.
    """

    loader: DataLoader[Any]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for packed, labels in self.loader:
            yield {"input_ids": packed[:, 0], "attention_mask": packed[:, 1], "labels": labels}
