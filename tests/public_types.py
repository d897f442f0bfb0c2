"""A program of a user's, written for the type checker: `make lint` checks it as `mypy --strict` would.

Lines that must be refused carry `type: ignore[...]`; a type that decays to Any makes that comment unused, an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from typing_extensions import assert_type

import skillfast
from skillfast import (
    Binary,
    Categorical,
    Condition,
    Continuous,
    NeuronRanking,
    NeuronScores,
    NeuronStatistics,
    Skill,
    SweepResult,
    Tracer,
)

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


def trace_select_ablate_sweep(model: torch.nn.Module, loader: DataLoader[Any], folder: Path) -> SweepResult:
    """The whole job from a model and its data."""
    scores = skillfast.trace(model, loader, pool="mean", statistics=("pearson", "auroc"), bins=64, n_bootstrap=None)
    assert_type(scores, NeuronScores)
    assert_type(scores.columns, tuple[str, ...])
    assert_type(scores["blocks.0.mlp"], NeuronScores)
    assert_type(scores.statistic("pearson"), np.ndarray)
    skills = skillfast.select(scores, metric="label", share=0.02)
    assert_type(skills, dict[str, Skill])
    windows = skillfast.trace_windows(model, loader, (0, 8))
    assert_type(windows["tokens 0 to 7"], NeuronScores)
    assert_type(windows.changes("label:deer", skills["deer"].neurons).found(), dict[str, list[int]])
    ranking = skillfast.attribute(model, loader)
    assert_type(ranking, NeuronRanking)
    assert_type(skillfast.learn_masks(model, loader, ranking), NeuronRanking)
    skill = next(iter(skills.values()))
    with skillfast.ablate(model, skill, scale=0.0, mode="mean", reference=scores):
        model.eval()
    by_hand = Skill("mine", {"blocks.0.mlp": torch.tensor([1, 2])})
    result = skillfast.sweep(model, loader, [Condition(skill), Condition(by_hand, components=("mlp",), scale=2.0)])
    assert_type(result, SweepResult)
    assert_type(result.per_class_accuracy, np.ndarray)
    assert_type(skillfast.export(model, [skill, by_hand], folder, scale=0.5), Path)
    masks = skillfast.skill_parameters(model, by_hand)
    assert_type(masks, dict[str, torch.Tensor])
    with skillfast.tune_only(model, masks):
        model.eval()
    skillfast.save_skills(folder, skills.values())
    assert_type(skillfast.load_skills(folder), dict[str, Skill])
    return result


def own_loop(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> NeuronScores:
    """The tracer and the accumulator in a loop of the user's own."""
    with Tracer(model, {"label": Categorical(10), "correct": Binary(), "loss": Continuous()}) as tracer:
        logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        tracer.step(label=y, correct=logits.argmax(1) == y, loss=loss)
    assert_type(tracer.compute(), NeuronScores)

    whole = NeuronStatistics(8, {"label": Categorical(["cat", "dog"])}, bins=32)
    shard = whole.like()
    assert_type(shard, NeuronStatistics)
    shard.update(np.zeros((4, 8), dtype=np.float32), {"label": [0, 1, 0, 1]})
    whole.merge(shard)
    with skillfast.use_backend("reference"):
        whole.compute()
    return skillfast.correlate(np.zeros((4, 8)), {"label": np.array([0, 1, 0, 1])})


def refused(model: torch.nn.Module, loader: DataLoader[Any], scores: NeuronScores) -> None:
    """Calls that the types refuse."""
    skillfast.trace(model, loader, bins="many")  # type: ignore[arg-type]
    skillfast.trace(model, loader, pool="median")  # type: ignore[arg-type]
    skillfast.trace(model, loader, confidence=64)  # type: ignore[call-arg]
    assert skillfast.trace(model, loader).person  # type: ignore[attr-defined]
    skillfast.select(scores, share="all")  # type: ignore[arg-type]
    assert skillfast.select(scores)["deer"].neuron  # type: ignore[attr-defined]
    skillfast.sweep(model, loader, [scores])  # type: ignore[list-item]
    skillfast.ablate(model, scores)  # type: ignore[arg-type]
    skillfast.bench("run")  # type: ignore[arg-type]
    skillfast.correlate(scores, {})  # type: ignore[arg-type]
    Tracer(model, {"label": "classes"})  # type: ignore[dict-item]
    NeuronStatistics(8, {}).merge(scores)  # type: ignore[arg-type]
    Condition(scores)  # type: ignore[arg-type]
    skillfast.nothing()  # type: ignore[attr-defined]
