"""What removing skills does to a causal language model: perplexity of held-out text, BLEU of what it writes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from skillfast.ablation.interventions import ablate
from skillfast.errors import ArgumentError, DataError
from skillfast.evaluation.generation import (
    WHOLE,
    corpus_bleu,
    require_sacrebleu,
    text_measures,
)
from skillfast.metrics import token_log_probabilities
from skillfast.models.text_inputs import Collate, batches
from skillfast.progress import track
from skillfast.results.evaluation import Intact
from skillfast.runs.grid import outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skillfast.models.text_inputs import TokenExamples
    from skillfast.results.evaluation import Measured, Outcome
    from skillfast.runs.config import Generation
    from skillfast.runs.grid import Case
    from skillfast.runs.text import CausalSubject
    from skillfast.skills.skill import Skill


def prefixes(examples: TokenExamples, settings: Generation, seed: int) -> list[list[int]]:
    """The first tokens of some texts.

    Raises:
        DataError: A text that does not go beyond its prefix.
        ArgumentError: A context too short for prefix and new tokens.
    """
    context = examples.language_model.context
    if settings.prefix_tokens + settings.max_new_tokens > context:
        raise ArgumentError(
            f"generation: expected at most {context} tokens with the prefix, the model's context, got "
            f"{settings.prefix_tokens} + {settings.max_new_tokens}; lower --prefix-tokens or --max-new-tokens"
        )
    rows = np.random.default_rng(seed).permutation(len(examples))[: settings.texts]
    for row in rows:
        if examples.lengths[row] <= settings.prefix_tokens:
            raise DataError(
                f"{examples.table.name}, {examples.table.places[row]}: expected a text of more than "
                f"{settings.prefix_tokens} tokens, the prefix to go on from, got {examples.lengths[row]}; lower "
                "--prefix-tokens or leave the line out"
            )
    return [list(examples.encoded["input_ids"][row][: settings.prefix_tokens]) for row in rows]


def generate(
    subject: CausalSubject, starts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> list[str]:
    """What the model writes greedily after each start, as text without special tokens.

    Args:
        subject: The model and its tokenizer.
        starts: Token ids, of any lengths; batches are padded on the left.
        max_new_tokens: Fewer where the model ends its text.
        batch_size: Starts at a time.
    """
    from transformers import GenerationConfig

    model, tokenizer = subject.loaded.model, subject.loaded.tokenizer
    ends = getattr(model.generation_config, "eos_token_id", None)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
    )
    collate = Collate(subject.loaded, side="left")
    written: list[str] = []
    for at in range(0, len(starts), batch_size):
        some = [{"input_ids": list(ids), "label": 0, "columns": {}} for ids in starts[at : at + batch_size]]
        batch = collate(some)
        inputs = {name: batch[name].to(subject.device) for name in ("input_ids", "attention_mask")}
        ids = model.generate(**inputs, generation_config=settings)  # type: ignore[operator]
        written += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return written


def log_probabilities(subject: CausalSubject) -> tuple[np.ndarray, np.ndarray]:
    """Per held-out text: sum of its tokens' log-probabilities in nats, float64 [n], and how many tokens, int64 [n]."""
    sums, counts = [], []
    for batch in batches(subject.texts("test"), subject.config.run.batch_size):
        logits = subject.model.logits(batch)  # type: ignore[operator]  # a CausalModel
        ids, mask = (batch[name].to(logits.device) for name in ("input_ids", "attention_mask"))
        values, valid = token_log_probabilities(logits, ids, mask)
        sums.append(values.double().sum(1).cpu().numpy())
        counts.append(valid.sum(1).cpu().numpy())
    return np.concatenate(sums), np.concatenate(counts)


class _CausalMeasures:
    """Measures the model as it is at the moment, against the intact one.

    Made under no ablation. Resamples are of held-out texts, the same ones for every intervention.
    """

    def __init__(self, subject: CausalSubject, settings: Generation, replicates: int, seed: int) -> None:
        self.subject = subject
        self.settings = settings
        self.starts = prefixes(subject.texts("test"), settings, seed) if settings.max_new_tokens else []
        self.sums, self.counts = log_probabilities(subject)
        if not self.counts.sum():
            raise DataError("perplexity: expected held-out texts of two tokens or more, got none; add longer ones")
        n = len(self.sums)
        self.weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=replicates)
        self.intact = self._write()
        if self.intact and corpus_bleu(self.intact, self.intact) < WHOLE - 1e-6:
            raise DataError(
                f"BLEU: expected intact generations of four words or more, got {self.intact[0]!r} and the like; raise "
                "--max-new-tokens, or pass 0 for perplexity alone"
            )

    def _write(self) -> list[str]:
        if not self.settings.max_new_tokens:
            return []
        return generate(self.subject, self.starts, self.settings.max_new_tokens, self.subject.config.run.batch_size)

    def measure(self, skill: Skill | None = None, scale: float = 0.0) -> Measured:
        """Values with a skill scaled, or of the intact model."""
        with nullcontext() if skill is None else ablate(self.subject.model, skill, scale=scale):
            sums = self.sums if skill is None else log_probabilities(self.subject)[0]
            texts = self.intact if skill is None else self._write()
        return text_measures(sums, self.sums, self.counts, self.weights, texts, self.intact)


def causal_outcomes(
    subject: CausalSubject,
    cases: Sequence[Case],
    settings: Generation,
    *,
    replicates: int = 1000,
    seed: int = 0,
    quiet: bool = True,
) -> tuple[Intact, list[Outcome], dict[str, int]]:
    """Every case's perplexity and BLEU on held-out text.

    BLEU compares what the model goes on to write with what it writes intact, so the intact model has 100. Perplexity
    has bootstrap intervals over texts, BLEU has none.

    Args:
        subject: The model, and text in parts; the test part is measured on.
        cases: From `cases_of_scores` or `cases_of_skills`.
        settings: Settings of the generations.
        replicates: Number of bootstrap replicates.
        seed: Seed of the bootstrap and of the choice of texts to continue.
        quiet: Show no progress bar.

    Returns:
        The intact model's measures, an outcome per case and factor in their order, and counts of tokens and prefixes.

    Raises:
        DataError: A text too short for the prefix.
        ModelError: BLEU without sacrebleu.
    """
    if settings.max_new_tokens:
        require_sacrebleu()  # before anything is computed for nothing
    rows = [(case, scale) for case in cases for scale in case.scales]
    with torch.inference_mode():
        measures = _CausalMeasures(subject, settings, replicates, seed)
        intact = measures.measure()
        found = []
        for case, scale in track(rows, "evaluation", quiet=quiet):
            every = (case.skill, *case.controls)
            own, *drawn = (intact if scale == 1 else measures.measure(skill, scale) for skill in every)
            found.append(outcome(case, scale, own, drawn))
    counts = {"tokens": int(measures.counts.sum()), "prefixes": len(measures.starts)}
    return Intact(values=intact.values, ci95=intact.ci95), found, counts
