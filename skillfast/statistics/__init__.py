"""Streaming statistics of neurons against metrics: `NeuronStatistics` accumulates, `NeuronScores` is the result."""
