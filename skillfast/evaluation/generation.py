"""Perplexity of held-out text and BLEU of what a causal language model writes, against the intact model's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from skillfast.errors import ModelError
from skillfast.evaluation.measures import finite
from skillfast.evaluation.resampling import interval
from skillfast.results.evaluation import Measured
from skillfast.vocabulary import BLEU, PERPLEXITY

if TYPE_CHECKING:
    from collections.abc import Sequence

WHOLE = 100.0  # BLEU of a text against itself


def require_sacrebleu() -> Any:
    """The library; raises ModelError where it is not installed."""
    try:
        import sacrebleu
    except ImportError as error:
        raise ModelError(
            "BLEU: expected the sacrebleu library, got none; pip install 'skillfast[llm]', or pass --max-new-tokens 0 "
            "for perplexity alone"
        ) from error
    return sacrebleu


def corpus_bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU as sacrebleu has it, 0 to 100, of texts against one reference each."""
    score = float(require_sacrebleu().corpus_bleu(list(texts), [list(references)]).score)
    return min(score, WHOLE)  # a text against itself comes a rounding above


def perplexity(sums: np.ndarray, counts: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Perplexity: exp of minus the mean log-probability of all tokens; one per row of weights [replicates, n]."""
    weights = np.ones((1, len(sums))) if weights is None else weights
    with np.errstate(over="ignore"):
        return np.exp(-(weights @ sums) / (weights @ counts))


def text_measures(
    sums: np.ndarray,
    intact_sums: np.ndarray,
    counts: np.ndarray,
    weights: np.ndarray,
    texts: Sequence[str],
    intact_texts: Sequence[str],
) -> Measured:
    """Perplexity and BLEU, and their change from the intact model's.

    Args:
        sums: float64 [n], sum of the log-probabilities of each text's tokens in nats.
        intact_sums: float64 [n], the intact model's.
        counts: int64 [n], tokens of each text.
        weights: int64 [replicates, n], how often a resample has each text; the intervals of perplexity come from them.
        texts: What the model writes; none leaves BLEU out.
        intact_texts: What the intact model writes after the same prefixes; its own BLEU is 100.
    """
    before, after = (float(perplexity(s, counts)[0]) for s in (intact_sums, sums))
    values: dict[str, float] = {PERPLEXITY: after}
    change: dict[str, float] = {PERPLEXITY: after - before}
    if texts:
        values[BLEU] = corpus_bleu(texts, intact_texts)
        change[BLEU] = values[BLEU] - WHOLE
    with np.errstate(invalid="ignore"):
        spread = perplexity(sums, counts, weights)
        difference = spread - perplexity(intact_sums, counts, weights)
    none: dict[str, list[float] | None] = {BLEU: None} if texts else {}
    return Measured(
        values=finite(values),
        change=finite(change),
        ci95={PERPLEXITY: interval(spread), **none},
        change_ci95={PERPLEXITY: interval(difference), **none},
    )
