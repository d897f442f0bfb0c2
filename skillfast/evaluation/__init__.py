"""Evaluation: the mathematics of effects; arrays in, results out."""
