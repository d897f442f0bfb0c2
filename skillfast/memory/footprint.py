"""What a forward of a model takes, found without memory: its skeleton runs on torch's `meta` device.

Every tensor that an op would make counts from when it is made until nothing refers to it, as an allocator sees it.
Fused attention makes no matrix of scores, so attention counts its output alone.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from skillfast.errors import ModelError
from skillfast.memory.living import LivingBytes
from skillfast.models.shrink import image_shape
from skillfast.models.sites import find_sites
from skillfast.models.weights import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

FIRST, LAST = "embeddings", "head"
"""What comes before the first block and after the last."""


def blocks_of(model: torch.nn.Module) -> frozenset[str]:
    """Paths of a model's blocks, as `model.layers.3`."""
    return frozenset(found for site in find_sites(model) if site.kind != "head" and (found := _numbered(site.path)))


def part_of(path: str, blocks: frozenset[str]) -> str | None:
    """The block that a module path lies in; None outside the blocks."""
    return found if (found := _numbered(path)) in blocks else None


def _numbered(path: str) -> str | None:
    found = re.match(r".*?\b\d+(?=\.|$)", path)
    return found[0] if found else None


def parts_of(model: torch.nn.Module) -> tuple[str, ...]:
    """All parts of a model in order: `FIRST`, its blocks, `LAST`."""
    blocks = blocks_of(model)
    return (FIRST, *(path for path, _ in model.named_modules() if path in blocks), LAST)


def weights_by_part(model: torch.nn.Module, itemsize: int, bits: int | None = None) -> dict[str, int]:
    """Bytes of weights of each part; a tied weight counts once, where it comes first.

    Args:
        model: On any device, `meta` too.
        itemsize: Bytes of a weight.
        bits: Bits of the blocks' linear layers where they are quantised: 8, or 4 with a float32 scale for every 64
            weights.
    """
    blocks = blocks_of(model)
    linear = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    quantised = {None: float(itemsize), 8: 1.0, 4: 0.5 + 4 / 64}[bits]
    sizes = dict.fromkeys(parts_of(model), 0)
    inside = False
    for name, parameter in model.named_parameters():
        part = part_of(name, blocks)
        inside |= part is not None
        each = quantised if part is not None and id(parameter) in linear else itemsize
        sizes[part or (LAST if inside else FIRST)] += int(parameter.numel() * each)
    return sizes


def forward_peaks(model: torch.nn.Module, batch: int, tokens: int) -> dict[str, int]:
    """Most bytes that are in use at once while each part of a model of language or images runs, weights left out.

    Keys and values are not cached: a trace does not generate.

    Args:
        model: A skeleton on the `meta` device, in the dtype that it will run in.
        batch: Examples per forward.
        tokens: Per example, of a language model.

    Raises:
        ModelError: A model that does not run on the `meta` device.
    """
    if getattr(model, "main_input_name", "") == "pixel_values":
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        tries: list[dict[str, torch.Tensor]] = [
            {"pixel_values": torch.zeros(batch, *image_shape(model), dtype=dtype, device="meta")}
        ]  # fmt: skip
        return _peaks(model, tries, 0)
    model.config.use_cache = False  # type: ignore[union-attr]  # keys and values of earlier tokens are for generation
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    whole = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool, device="meta")  # as models make it of the padding
    masks = (whole, torch.ones_like(ids))  # some take the padding only, the others look at its values
    return _peaks(model, [{**inputs, "attention_mask": mask} for mask in masks], whole.nbytes)


def _peaks(model: torch.nn.Module, tries: list[dict[str, torch.Tensor]], more: int) -> dict[str, int]:
    """Peaks of the first inputs with which the model runs, each with some bytes more; ModelError where it has none."""
    reasons = []
    for inputs in tries:
        try:
            return {part: peak + more for part, peak in _run(model, inputs).items()}
        except Exception as error:  # noqa: PERF203  # of whatever the model's code does with values that are not there
            reasons.append(error)
    raise ModelError(
        f"{type(model).__name__}: expected a forward that runs without memory, got {first_line(reasons[0])}; plan "
        "without a batch, or measure on the device"
    ) from reasons[0]


def _run(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    blocks = blocks_of(model)
    live = LivingBytes(FIRST)
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if path in blocks:
                stack.callback(module.register_forward_pre_hook(lambda *_, part=path: live.enter(part)).remove)
                stack.callback(module.register_forward_hook(lambda *_: live.enter(LAST)).remove)
        for context in (torch.no_grad(), _OutputsAlone(), live):
            stack.enter_context(context)
        model(**inputs)
    return live.peaks


class _OutputsAlone(TorchFunctionMode):
    """Attention and products of experts' rows make their output and nothing else, whatever the widths are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (*args, *(kwargs or {}).values())
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = given[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm"):  # wants strides of 16 bytes on meta, too
            rows, weights = given[:2]
            return rows.new_empty(*rows.shape[:-1], weights.shape[-1])
        return func(*args, **(kwargs or {}))
