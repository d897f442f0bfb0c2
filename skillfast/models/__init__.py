"""Models: where their neurons are (`sites`), how they are made (`loading`) and tuned (`training`)."""
