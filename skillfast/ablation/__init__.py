"""Ablation: remove, replace or scale skills inside the blocks, one condition or many per pass."""

from skillfast.ablation.interventions import Condition, ablate
from skillfast.ablation.sweeping import ConditionResult, SweepResult, per_class_accuracy, sweep
from skillfast.memory.budget import limited_memory

__all__ = ["Condition", "ConditionResult", "SweepResult", "ablate", "limited_memory", "per_class_accuracy", "sweep"]
