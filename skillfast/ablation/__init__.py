"""Ablation: remove, replace or scale skills inside the blocks, one condition or many per pass."""

from skillfast.ablation.interventions import Condition, ablate
from skillfast.ablation.sweeping import SweepResult, per_class_accuracy, sweep

__all__ = ["Condition", "SweepResult", "ablate", "per_class_accuracy", "sweep"]
