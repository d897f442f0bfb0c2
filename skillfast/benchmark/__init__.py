"""The benchmark: what skills a model has, whether one can be removed without the others, and where they live."""
