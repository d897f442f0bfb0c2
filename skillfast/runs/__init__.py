"""Runs: a command as named stages over a model and its data."""
