"""What a result is of: weights, examples and labels by their SHA-256."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from skillfast.results.records import Fraction, Name, Positive, Record

# what the digests are of, for whoever computes them again
WEIGHTS_HASHED = (
    "over the state dict in the order of its names: of each tensor a line with name, dtype and shape, then its bytes"
)
EXAMPLES_HASHED = (
    "over the examples in their order: of each the number of its bytes (8 bytes, little-endian), then the bytes of its "
    "image file, its pixels, its text as JSON or, where a loader was given, its input tensors"
)
LABELS_HASHED = "over the classes as a JSON list, a line feed, and the labels as 64-bit little-endian integers"
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Weights(Record, frozen=True):
    """The weights that were measured, after any training.

    Attributes:
        sha256: Digest of all weights (`WEIGHTS_HASHED`).
        origin: The file, name or seed that they were loaded or trained from.
        revision: Commit of a name on the hub.
    """

    sha256: Sha256
    origin: Name
    revision: Name | None = None


class UsedPrompt(Record, frozen=True):
    """A soft prompt that stood before every text; of how it was tuned what its folder says.

    Attributes:
        tokens: Number of virtual tokens.
        sha256: Digest of its embeddings: over a line with float32 and their shape, a line feed, and their bytes.
        origin: The folder that it was opened from, or `tuned`.
        steps: Batches that it learned from.
        learning_rate: The highest one.
        n_train: Examples that it learned from, repeats included.
        dtype: What was computed in.
        loss: Mean of the last tenth of the steps, in nats.
        validation_accuracy: On examples of the validation part.
    """

    tokens: Positive
    sha256: Sha256
    origin: Name
    steps: Positive | None = None
    learning_rate: float | None = None
    n_train: Positive | None = None
    dtype: Name | None = None
    loss: float | None = None
    validation_accuracy: Fraction | None = None


class PartDigests(Record, frozen=True):
    """A part of the data.

    Attributes:
        examples: SHA-256 of its examples (`EXAMPLES_HASHED`).
        labels: SHA-256 of its classes and labels (`LABELS_HASHED`).
    """

    examples: Sha256
    labels: Sha256


class DataDigests(Record, frozen=True):
    """The examples that skills were chosen on, that settings were chosen on, and that were measured on."""

    select: PartDigests
    validate: PartDigests
    test: PartDigests
