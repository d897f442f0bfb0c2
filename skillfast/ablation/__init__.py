"""Ablation: remove, replace or scale skills inside the blocks, one condition or many per pass."""
