"""Tracing: one streaming pass that correlates every neuron with every metric."""
