"""Ablation: remove, replace or scale skills inside the blocks, one condition or many per pass."""

from skillfast.ablation.budget import limited_memory
from skillfast.ablation.interventions import Condition, ablate
from skillfast.ablation.sweeping import SweepResult, per_class_accuracy, sweep

__all__ = ["Condition", "SweepResult", "ablate", "limited_memory", "per_class_accuracy", "sweep"]
