"""Random images and sound for language models with a tower for them, and the tokens whose places these take."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from skillfast.models.inputs import out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_BANDS = ("num_mel_bins", "feature_size", "input_feat_size", "input_dim")  # of a spectrum, in configurations
_FRAMES = (48, 200)  # towers want multiples of their windows, or as many as they have positions
_SAMPLES = 2000  # of a sound wave
_BEFORE = 2  # tokens before an image or a sound


def with_towers(
    model: Any, inputs: dict[str, Any], parts: Sequence[Any], image: tuple[int, int, int], generator: torch.Generator
) -> dict[str, Any] | None:
    """Inputs of a language model with an image or a sound in each text.

    Args:
        model: A model of the transformers library whose first input is `input_ids`.
        inputs: Random texts, `input_ids` and `attention_mask` [batch, tokens] among them.
        parts: The configuration and those inside it.
        image: Channels, height and width of images.
        generator: Source of random numbers.

    Returns:
        The inputs; None where the model has no tower, or ran on none of the forms that images and sound come in.
    """
    takes = inspect.signature(model.forward).parameters
    for kind, media in _media(takes, parts, image, len(inputs["input_ids"]), generator):
        try:
            with torch.no_grad():
                found = _placed(model, inputs, parts, kind, media) | media
                model(**{name: value for name, value in found.items() if name in takes})
        except Exception as error:  # of whatever the tower checks
            if out_of_memory(error):
                raise
            continue
        return {name: value for name, value in found.items() if name in takes}
    return None


def _media(
    takes: Any, parts: Sequence[Any], image: tuple[int, int, int], n: int, generator: torch.Generator
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The forms that images and sound come in: `"image"` or `"audio"`, and arguments with a row per text."""
    if "pixel_values" in takes:
        pixels = torch.randn(n, *image, generator=generator)
        yield "image", {"pixel_values": pixels}
        yield "image", {"pixel_values": pixels[:, None]}  # several images of a text
    if "input_features" in takes:
        bands = [part_bands for part in parts if (part_bands := _first(part, _BANDS)) is not None]
        for band in dict.fromkeys(bands):
            for frames in _FRAMES:
                spectrum = torch.randn(n, band, frames, generator=generator)
                masks = dict.fromkeys(("input_features_mask", "padding_mask"), torch.ones(n, frames).bool())
                for features in (spectrum, spectrum.transpose(1, 2)):
                    yield "audio", {"input_features": features, **masks}
                    yield "audio", {"input_features": features}
    if "input_values" in takes:
        wave = torch.randn(n, _SAMPLES, generator=generator)
        for values in (wave, wave[:, None]):
            yield "audio", {"input_values": values, "padding_mask": torch.ones(n, _SAMPLES).long()}


def _placed(
    model: Any, inputs: dict[str, Any], parts: Sequence[Any], kind: str, media: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """The inputs with as many tokens in each text that stand for the image or sound as the tower makes of it."""
    names = (f"{kind}_token_id", f"{kind}_token_index")
    token = next((value for part in parts if (value := _first(part, names)) is not None), None)
    main = next(iter(media))
    holders = (model, getattr(model, "model", None), getattr(getattr(model, "model", None), "encoder", None))
    towers = (getattr(holder, f"get_{kind}_features", None) for holder in holders)
    tower = next((tower for tower in towers if tower and main in inspect.signature(tower).parameters), None)
    if token is None or tower is None:
        return inputs  # the model adds what it sees to the texts
    wanted = inspect.signature(tower).parameters
    seen = tower(**{name: value for name, value in media.items() if name in wanted})
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    places = sum(part.numel() // part.shape[-1] for part in _features(seen)) // len(ids)
    stand = torch.full((len(ids), places), token)
    return inputs | {
        "input_ids": torch.cat([ids[:, :_BEFORE], stand, ids[:, _BEFORE:]], 1),
        "attention_mask": torch.cat([mask, torch.ones_like(stand)], 1),
    }


def _features(seen: Any) -> list[torch.Tensor]:
    """What a tower gives to the language model, in one tensor or several."""
    if isinstance(seen, torch.Tensor):
        return [seen]
    if (pooled := getattr(seen, "pooler_output", None)) is not None:
        return _features(pooled)
    if isinstance(seen, list | tuple):
        return [tensor for part in seen for tensor in _features(part)]
    return [seen.last_hidden_state]


def _first(part: Any, names: Sequence[str]) -> int | None:
    """The first of these settings that is a number."""
    return next((value for name in names if isinstance(value := getattr(part, name, None), int)), None)
