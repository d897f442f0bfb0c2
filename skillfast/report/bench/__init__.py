"""The page of a bench run."""
