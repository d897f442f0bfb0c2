"""Tuning of soft prompts on a frozen causal language model, through peft's prompt tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from skillfast.errors import ArgumentError, ModelError
from skillfast.models.batches import IGNORED, read_batch
from skillfast.models.inputs import described, mask_of
from skillfast.models.sites import module_device, refuse_training, unwrap_compiled
from skillfast.models.soft_prompt import SoftPrompt, check_prompted, peft_config, require_peft
from skillfast.models.text_classifier import accepts, embedded, first_virtual, last_real, positions
from skillfast.models.training import only_trainable
from skillfast.progress import Forecast, tell, track

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

TOKENS, STEPS = 16, 100
PASSED_ON = ("steps", "learning_rate", "n_train", "dtype", "loss", "validation_accuracy")
_RATE = 0.1  # highest learning rate, as a share of the size of the first embeddings
_WARMUP = 0.1  # share of the steps
_LOOKS = 3  # how often accuracy is measured while the prompt is tuned
_FIRST = 16  # batches whose tokens the first embeddings are drawn from


def tune_prompt(
    model: torch.nn.Module,
    loader: Iterable[Any],
    tokens: int = TOKENS,
    *,
    words: Sequence[int] | Tensor | None = None,
    held_out: Iterable[Any] | None = None,
    steps: int = STEPS,
    lr: float | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    label_key: str | None = None,
    quiet: bool = True,
) -> SoftPrompt:
    """Tune the embeddings of virtual tokens before every text, by peft's prompt tuning; the model stays as it is.

    They begin as embeddings of tokens drawn from the texts. Adam, the learning rate warmed up and then lowered along a
    cosine. Padding may be on either side: the virtual tokens stand directly before the first real one, and positions
    count real tokens alone. Logits are made only where there is a label.

    Args:
        model: A causal language model of the transformers library, in evaluation mode and on its device.
        loader: Mappings with `input_ids`, `attention_mask` where there is padding, and labels [batch, tokens], -100
            where a token has none; or with labels [batch], indices of `words`. Read anew until all steps are done.
        tokens: How many virtual tokens.
        words: int64 [classes], for labels [batch]: the token that says each class after a text.
        held_out: Batches like the loader's, on which accuracy is measured while the prompt is tuned, and at the end.
        steps: Batches to learn from.
        lr: Highest learning rate; None: a tenth of the first embeddings' root mean square.
        seed: Seed of the first embeddings.
        dtype: What to compute in, by autocast; None: bfloat16 on a CPU that multiplies in it, else the model's own.
        label_key: Key of the labels in a batch; by default `labels` or `label`.
        quiet: Draw no progress bar.

    Returns:
        The prompt; its `tuned` has steps, learning_rate, n_train (examples seen, repeats included), seed, dtype, loss
        (mean of the last tenth of the steps) and, with `held_out`, validation_accuracy.

    Raises:
        ArgumentError: Fewer than one token or step, no batches, or batches that are not as above.
        ModelError: A model that takes no prompt or is in training mode, no peft library, or a loss that is not finite.
    """
    model = unwrap_compiled(model)
    refuse_training(model, "tune_prompt")
    for what, value in (("tokens", tokens), ("steps", steps), ("lr", 1 if lr is None else lr)):
        if not value > 0 or not math.isfinite(value):
            raise ArgumentError(f"{what}: expected a number above 0, got {value}; leave it out for the default")
    require_peft()
    check_prompted(model, type(model).__name__)
    reader = _Reader(model, tokens, None if words is None else torch.as_tensor(words), label_key)
    with torch.inference_mode(False), only_trainable(model, []):
        batches = _again(reader, loader)
        begun = list(islice(batches, _FIRST))
        tuning = _Tuning(reader, _drawn(reader, begun, seed), steps, lr, _dtype(model, dtype))
        looks = () if held_out is None else tuple(reader.read(batch) for batch in held_out)
        tuning.run(islice(chain(begun, batches), steps), looks, quiet)
    return tuning.prompt(seed)


@dataclass(frozen=True)
class _Texts:
    """A batch with room for the prompt.

    Attributes:
        ids: int64 [batch, virtual + tokens].
        mask: int64 like it, 1 for virtual and real tokens.
        rows: int64 [n], examples with a label.
        columns: int64 [n], the tokens whose logits are to say them.
        targets: int64 [n]: the tokens that they are to say, or indices of words.
    """

    ids: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor


class _Reader:
    """Batches as they come, with the virtual tokens in front, and logits where there are labels.

    Args:
        model: The language model.
        tokens: How many virtual tokens.
        words: int64 [classes], where labels are classes.
        key: Key of the labels in a batch.
    """

    def __init__(self, model: Any, tokens: int, words: Tensor | None, key: str | None) -> None:
        self.model = model
        self.tokens = tokens
        self.first = first_virtual(model)
        self.device = module_device(model.get_input_embeddings())
        self.words = words
        self.key = key
        self.takes = accepts(model, ("attention_mask", "position_ids"))

    def read(self, given: Any) -> _Texts:
        """A batch on the model's device; raises ArgumentError for one without token ids, or with other labels."""
        batch = read_batch(given, self.key, tokens=True)
        ids = batch.inputs.get("input_ids") if isinstance(batch.inputs, Mapping) else None
        if ids is None or batch.per_token != (self.words is None):
            wanted = "[batch, tokens]" if self.words is None else "[batch] for words="
            raise ArgumentError(
                f"batch: expected a mapping with input_ids and labels {wanted}, got {described(batch.inputs)} and "
                f"labels {list(batch.labels.shape)}; let the loader give such"
            )
        ids, labels = ids.to(self.device), batch.labels.to(self.device)
        found = mask_of(batch.inputs)
        mask = torch.ones_like(ids) if found is None else (found != 0).long().to(self.device)
        if not bool((ids >= self.first).any()):
            ids, mask = self._with_room(ids, mask)
            if batch.per_token:
                labels = torch.cat([labels.new_full((len(labels), self.tokens), IGNORED), labels], 1)
        if self.words is None:
            rows, columns = (labels[:, 1:] >= 0).nonzero(as_tuple=True)  # position t says token t + 1
            targets = labels[rows, columns + 1]
        else:
            rows, columns, targets = torch.arange(len(ids), device=self.device), last_real(mask), labels
        return _Texts(ids, mask, rows, columns, targets)

    def _with_room(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask with the virtual tokens directly before each text's first real token."""
        place = mask.argmax(1, keepdim=True) + torch.arange(self.tokens, device=ids.device)
        room = torch.zeros_like(place)
        virtual = (self.first + torch.arange(self.tokens, device=ids.device)).expand(len(ids), -1)
        return (
            torch.cat([room, ids], 1).scatter(1, place, virtual),
            torch.cat([room, mask], 1).scatter(1, place, torch.ones_like(place)),
        )

    def logits(self, texts: _Texts, virtual: Tensor) -> Tensor:
        """float32 [n, vocabulary or words], where there are labels."""
        ids = texts.ids.masked_fill(texts.mask == 0, 0)
        known = {"attention_mask": texts.mask, "position_ids": positions(texts.mask)}
        arguments = {name: known[name] for name in self.takes}

        def only_labelled(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0][texts.rows.to(args[0].device), texts.columns.to(args[0].device)], *args[1:])

        hook = self.model.get_output_embeddings().register_forward_pre_hook(only_labelled)
        try:
            embeddings = embedded(self.model, ids, virtual)
            logits: Tensor = self.model(inputs_embeds=embeddings, use_cache=False, **arguments).logits.float()
        finally:
            hook.remove()
        return logits if self.words is None else logits[:, self.words.to(logits.device)]


class _Tuning:
    """The embeddings as they are tuned.

    Args:
        reader: What runs the model.
        first: float32 [tokens, width], where they begin.
        steps: How many there will be.
        lr: Highest learning rate, or None.
        dtype: What to compute in.
    """

    def __init__(self, reader: _Reader, first: Tensor, steps: int, lr: float | None, dtype: torch.dtype) -> None:
        from peft import PromptEmbedding

        self.reader, self.steps, self.dtype = reader, steps, dtype
        self.lr = _RATE * float(first.square().mean().sqrt()) if lr is None else lr
        self.encoder = PromptEmbedding(peft_config(reader.tokens, first.shape[1], reader.model), None).to(first.device)
        with torch.no_grad():
            self.encoder.embedding.weight.copy_(first)
        self.losses: list[float] = []
        self.seen = 0
        self.accuracy: float | None = None

    def run(self, batches: Iterable[_Texts], held_out: Sequence[_Texts], quiet: bool) -> None:
        """All steps, with a look at the held-out examples now and then and at the end."""
        optimizer = torch.optim.Adam(self.encoder.parameters(), lr=self.lr)
        warmup = max(1, round(_WARMUP * self.steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / self.steps)))
        )
        forecast = Forecast(f"{self.steps} steps, forward and backward", self.steps)
        looks = {round(self.steps * look / _LOOKS) for look in range(1, _LOOKS + 1)}
        for step, texts in enumerate(track(batches, self._told, total=self.steps, quiet=quiet), 1):
            logits = self._logits(texts)
            loss = functional.cross_entropy(logits, texts.targets.to(logits.device))
            self.losses.append(loss.item())
            if not math.isfinite(self.losses[-1]):
                raise ModelError(
                    f"soft prompt: expected a finite loss, got {self.losses[-1]} in step {step}; lower the learning "
                    f"rate (it was {self.lr:g})"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            self.seen += len(texts.ids)
            forecast.ran(1)
            if step in looks:
                self.accuracy = self._accuracy(held_out)
                tell(self._told())

    def _logits(self, texts: _Texts) -> Tensor:
        device = self.reader.device
        numbers = torch.arange(self.reader.tokens, device=device)
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != self.reader.model.dtype):
            return self.reader.logits(texts, self.encoder(numbers))

    @torch.no_grad()
    def _accuracy(self, held_out: Sequence[_Texts]) -> float | None:
        """Share of labels that are said."""
        right = [self._logits(texts).argmax(1).cpu() == texts.targets.cpu() for texts in held_out]
        return float(torch.cat(right).double().mean()) if right else None

    @property
    def loss(self) -> float:
        """Mean of the last tenth of the steps."""
        last = self.losses[-max(1, self.steps // 10) :]
        return sum(last) / len(last)

    def _told(self) -> str:
        if not self.losses:
            return "soft prompt"
        measured = "" if self.accuracy is None else f", accuracy {self.accuracy:.1%} on held-out examples"
        return f"soft prompt, step {len(self.losses)} of {self.steps}: loss {self.loss:.3f}{measured}"

    def prompt(self, seed: int) -> SoftPrompt:
        """What came of it."""
        embeddings = self.encoder.embedding.weight.detach().float().cpu().clone()
        how = {
            "steps": self.steps,
            "learning_rate": self.lr,
            "n_train": self.seen,
            "seed": seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "loss": self.loss,
        }
        return SoftPrompt(embeddings, how if self.accuracy is None else {**how, "validation_accuracy": self.accuracy})


def _again(reader: _Reader, loader: Iterable[Any]) -> Iterator[_Texts]:
    """Batches of a loader, pass after pass; raises ArgumentError where a pass has none."""
    while True:
        batch = None
        for batch in loader:
            yield reader.read(batch)
        if batch is None:
            raise ArgumentError(
                "loader: expected batches in every pass, got none; pass a DataLoader or a list, or lower steps"
            )


def _drawn(reader: _Reader, batches: Sequence[_Texts], seed: int) -> Tensor:
    """Embeddings [tokens, width] of tokens drawn at random from the texts."""
    ids = torch.cat([texts.ids[(texts.mask != 0) & (texts.ids < reader.first)] for texts in batches])
    if not len(ids):
        raise ArgumentError("loader: expected texts of one token or more, got none; check the attention_mask")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(ids), (reader.tokens,), generator=generator).to(ids.device)
    embeddings: Tensor = reader.model.get_input_embeddings()(ids[chosen]).detach().float()
    return embeddings


def _dtype(model: Any, asked: torch.dtype | None) -> torch.dtype:
    """What to compute in: bfloat16 where a CPU has instructions that multiply in it, else the model's own."""
    own: torch.dtype = model.dtype
    if asked is not None:
        return asked
    pays = module_device(model).type == "cpu" and own == torch.float32 and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if pays else own
