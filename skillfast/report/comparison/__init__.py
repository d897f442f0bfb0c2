"""A comparison of two runs: its page, and its texts for terminals and pipelines."""
