"""Coverage: whether everything that a model's blocks compute passes through its sites."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from skillfast.errors import ArgumentError, ModelError
from skillfast.models.batches import inputs_of
from skillfast.models.shrink import is_configured, shrunk
from skillfast.models.sites import DECLARED, find_sites, input_width, refuse_compiled, unwrap_compiled
from skillfast.models.structure import stream_of
from skillfast.models.watching import watched
from skillfast.models.weights import first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from skillfast.models.sites import Site

_DRAWS = (1, 2)  # seeds of the weights that are tried after those of seed 0
SCALE = 0.5  # of random weights, over the square root of what each output sums
_BIAS = re.compile(r"bias(?:es)?(?:_table)?$|pos(?:ition)?_embed(?:ding)?s?$")
_NOT_IN_BLOCKS = (torch.nn.Embedding,)


@dataclass(frozen=True)
class Coverage:
    """Which of a model's block weights act through its sites alone.

    With every neuron of every site at 0, no weight matrix of a block may have an effect: the gradient of a random
    projection of the output with respect to it is exactly 0. Where one is not 0, a path writes past the sites. What
    lies before the first block, what the residual stream itself passes (reductions between stages, blocks without a
    shortcut), norms, biases and the head are no weight matrices of a block.

    Attributes:
        share: Share of the blocks' weights that act through sites alone, in [0, 1].
        missing: Module -> its share of the blocks' weights, for matrices that act past the sites; block numbers are
            `*`. The largest first.
        unexercised: Module -> its share, for matrices that had no effect in the intact model either, so that nothing
            is known of them: an expert that no token reached, a weight of 0.
        parameters: Number of weights in the blocks' matrices, of the model that was run.
        inputs: What it was run on, in words.
    """

    share: float
    missing: Mapping[str, float]
    unexercised: Mapping[str, float]
    parameters: int
    inputs: str

    @property
    def complete(self) -> bool:
        """Whether every weight of the blocks acts through the sites."""
        return not self.missing and not self.unexercised

    def __str__(self) -> str:
        """One line: the share, and what is missing."""
        told = [f"sites cover {_percent(self.share)} of the blocks' weights"]
        if self.missing:
            told.append(f"past them act {_listed(self.missing)}")
        if self.unexercised:
            told.append(f"without effect were {_listed(self.unexercised)}")
        return "; ".join(told)

    def to_json(self) -> dict[str, Any]:
        """As in `model.coverage` of results.json."""
        return {
            "share": self.share, "complete": self.complete, "missing": dict(self.missing),
            "unexercised": dict(self.unexercised), "inputs": self.inputs,
        }  # fmt: skip


def coverage(
    model: torch.nn.Module,
    batch: torch.Tensor | Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    label_key: str | None = None,
) -> Coverage:
    """Certify that the sites of a model hold everything that its blocks do, or name what acts past them.

    Args:
        model: Any model with known or declared sites; it stays as it is. One on torch's `meta` device will do where
            `batch` is not given.
        batch: As `trace` takes it, with labels or without: a tensor, or a mapping of keyword arguments. None: a copy
            with random weights is run on random inputs: of a model of the transformers library a small copy that is
            made from its configuration (few layers of each type, small widths), so that one too large for this machine
            is certified in seconds; of any other model a copy of its own size.
        label_key: Key of the labels in a batch that is a mapping; by default `labels` or `label`.

    Returns:
        What the sites cover.

    Raises:
        ArgumentError: No batch, and a model of which nobody knows what it takes.
        ModelError: A model without known sites, or whose copy cannot be made or run.
    """
    model = unwrap_compiled(model)
    refuse_compiled(model)
    find_sites(model)  # a model without sites is told so before anything is run
    part = _configured_part(model)
    if batch is None:
        small, inputs, described = made_inputs(part)
        found = _covered(small, inputs, described)
        for seed in _DRAWS:  # with other weights tokens may reach the experts that none did
            if found.missing or not found.unexercised:
                break
            randomise(small, seed)
            other = _covered(small, inputs, described)
            found = other if other.missing else max(found, other, key=lambda one: one.share)
    else:
        found = _covered(model, inputs_of(batch, label_key), "the batch that was given")
    _told[_kind_of(part)] = found
    return found


def made_inputs(model: torch.nn.Module) -> tuple[torch.nn.Module, Any, str]:
    """A copy with random weights, random inputs for it, and what both are; arguments and errors as of `coverage`."""
    inputs: Any
    if is_configured(model) and getattr(model, DECLARED, None) is None:
        small, inputs = shrunk(model)
        described = "random inputs, on a small copy with random weights"
    else:
        inputs = _image_inputs(model)
        small, described = copy.deepcopy(model).float().eval(), "random images, on a copy with random weights"
    randomise(small)
    return small, inputs, described


def random_inputs(model: torch.nn.Module) -> Any:
    """Random inputs that a model takes: texts or images by its configuration, else images; errors as of `coverage`."""
    if is_configured(model) and getattr(model, DECLARED, None) is None:
        return shrunk(model)[1]
    return _image_inputs(model)


_told: dict[tuple[object, ...], Coverage | None] = {}  # what the sites of models cover that somebody was told of
MOST_COPIED = 25_000_000  # weights of a model that is copied to be certified unasked


def warn_incomplete(model: torch.nn.Module) -> None:
    """Warn where the sites of a model do not hold all that its blocks do, once for all models of its kind.

    It is certified as `coverage(model)` does, once for each class and configuration or shapes of weights. Nothing is
    said where it cannot be done, would copy a large model, or one that is watched by hooks at the moment.
    """
    model = _configured_part(unwrap_compiled(model))
    kind = _kind_of(model)
    if kind in _told:
        return
    if not is_configured(model) and (
        sum(p.numel() for p in model.parameters()) > MOST_COPIED
        or any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    ):
        return
    try:
        with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
            found = coverage(model)
    except Exception:  # copying, building and running raise nearly anything; `coverage` says what
        _told[kind] = None
        return
    if not found.complete:
        warnings.warn(str(found), RuntimeWarning, stacklevel=3)


def _configured_part(model: torch.nn.Module) -> torch.nn.Module:
    """The model of the transformers library inside one that makes a classifier of it; any other model itself."""
    inner = getattr(model, "language_model", None)
    return inner if isinstance(inner, torch.nn.Module) and is_configured(inner) and not is_configured(model) else model


def _kind_of(model: torch.nn.Module) -> tuple[object, ...]:
    """What models that share a certificate have in common."""
    declared = getattr(model, DECLARED, None)
    if is_configured(model) and declared is None:
        config = model.config.to_dict()  # type: ignore[operator,union-attr]
        return type(model), repr({name: config[name] for name in sorted(config) if not name.startswith("_")})
    shapes = tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
    return type(model), shapes, repr(declared)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights in place, so that no matrix is 0 and activations neither vanish nor overflow."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() > 1:
                sums = max(1, parameter.numel() // max(1, parameter.shape[0])) ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (SCALE / sums))
            else:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)


def _covered(model: torch.nn.Module, batch: Any, inputs: str) -> Coverage:
    warm_up(model, batch)
    sites, weights = _beside_stream(model, batch, find_sites(model))
    total = sum(weight.numel() for weight in weights.values())
    if not total:
        raise ModelError(f"{type(model).__name__}: expected weight matrices in its blocks, got none; it has no block")
    unused = {name for name, acts in _acting(model, batch, weights).items() if not acts}
    with _silenced(model, sites):
        past = {name for name, acts in _acting(model, batch, weights).items() if acts}
    size = {name: weight.numel() / total for name, weight in weights.items()}
    share = 1 - sum(size[name] for name in past | unused)
    return Coverage(max(0.0, share), _by_module(past, size), _by_module(unused - past, size), total, inputs)


def _beside_stream(
    model: torch.nn.Module, batch: Any, sites: Sequence[Site]
) -> tuple[list[Site], dict[str, torch.Tensor]]:
    """The sites and the blocks' matrices that the residual stream does not itself pass.

    With a site of a block that has no shortcut at 0 nothing would act that comes before it, whatever its own sites.
    """
    with graph_of(model, batch) as (outputs, source):
        stream = stream_of(model, outputs, source)
    inner = [site for site in sites if site.kind != "head"]
    weights = {name: weight for name, weight in block_matrices(model, inner).items() if name not in stream}
    return [site for site in inner if f"{site.path}.weight" not in stream], weights


def past_sites(model: torch.nn.Module, batch: Any, sites: Sequence[Site]) -> set[str]:
    """Names of the weight matrices that act on the output while every neuron of the sites is 0."""
    beside, weights = _beside_stream(model, batch, sites)
    with _silenced(model, beside):
        return {name for name, acts in _acting(model, batch, weights).items() if acts}


def stream_acts(model: torch.nn.Module, batch: Any, sites: Sequence[Site]) -> bool:
    """Whether the input acts on the output while every neuron of the sites is 0, as a residual stream lets it."""
    with graph_of(model, batch) as (outputs, source):
        names = stream_of(model, outputs, source)
    weights = {name: weight for name, weight in model.named_parameters() if name in names or weight is source}
    with _silenced(model, [site for site in sites if site.kind != "head" and f"{site.path}.weight" not in names]):
        acting = _acting(model, batch, weights)
    return any(acting.values())


def block_matrices(model: torch.nn.Module, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
    """The weight matrices of all blocks, name -> parameter.

    Blocks are the members of the outermost numbered containers that hold a site, or of which a member has two linear
    layers or more, as the blocks of a part of the model have that no site is known of.
    """
    modules = dict(model.named_modules())
    stacks = {_stack_of(site.path) for site in sites}
    for path, module in modules.items():
        if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential) and _stack_of(f"{path}.0") == path:
            members = [sum(input_width(part) is not None for part in member.modules()) for member in module]
            if members and max(members) > 1:
                stacks.add(path)
    embeddings = {id(p) for m in modules.values() if isinstance(m, _NOT_IN_BLOCKS) for p in m.parameters()}
    heads = {site.path for site in find_sites(model) if site.kind == "head"}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.squeeze().dim() > 1  # factors of channels are none
        and not _BIAS.search(name)  # of experts: one row each; of attention: one for each pair of places
        and parameter.is_floating_point()
        and id(parameter) not in embeddings
        and any(name.startswith(f"{stack}.") if stack else True for stack in stacks)
        and name.rpartition(".")[0] not in heads
    }


def _stack_of(path: str) -> str:
    """Path of the outermost numbered container around a module; where there is none, of the module around it."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:i])
    return ".".join(parts[:-1])


def _acting(model: torch.nn.Module, batch: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, bool]:
    """Whether each matrix has any effect on the output: whether a random projection's gradient is not 0."""
    generator = torch.Generator().manual_seed(1)
    with _learnable(model, weights), torch.inference_mode(False), torch.enable_grad():
        outputs = [out for out in _tensors(_run(model, batch)) if out.requires_grad]
        if not outputs:
            return dict.fromkeys(weights, False)
        projected = sum(
            (out.float() * torch.randn(out.shape, generator=generator).to(out.device)).sum() for out in outputs
        )
        gradients = torch.autograd.grad(projected, list(weights.values()), allow_unused=True)  # type: ignore[arg-type]
    return {
        name: gradient is not None and bool((gradient != 0).any())
        for name, gradient in zip(weights, gradients, strict=True)
    }


def warm_up(model: torch.nn.Module, batch: Any) -> None:
    """Let a model keep what it keeps of its first forward (tables of biases), without the graph of that forward."""
    with torch.no_grad():
        _run(model, batch)


@contextmanager
def graph_of(model: torch.nn.Module, batch: Any) -> Iterator[tuple[list[torch.Tensor], torch.Tensor | None]]:
    """The outputs of a forward with the graph of all weights, and the embedding that it begins with.

    The residual stream that ends in the output of an encoder and a decoder begins with the decoder's tokens.
    """
    everything = {name: weight for name, weight in model.named_parameters() if weight.is_floating_point()}
    with _learnable(model, everything), torch.inference_mode(False), torch.enable_grad():
        outputs = [output for output in _tensors(_run(model, _differentiable(batch))) if output.requires_grad]
        decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        decoder = _asked(model, "get_decoder") if decodes else None
        tables = [_asked(part, "get_input_embeddings") for part in (decoder, model) if part is not None]
        tables.insert(1, getattr(decoder, "embed_tokens", None))  # of FSMT's decoder, which is asked for none
        table = next((table for table in tables if isinstance(table, torch.nn.Embedding)), None)
        yield outputs, None if table is None else table.weight


def _asked(model: torch.nn.Module, name: str) -> Any:
    """What a method of a model gives; None for a model without it, or that has nothing of the sort."""
    method = getattr(model, name, None)
    try:
        return method() if callable(method) else None
    except (NotImplementedError, AttributeError):
        return None


def _differentiable(batch: Any) -> Any:
    """A batch whose numbers, unlike its token ids, have a gradient."""
    if isinstance(batch, torch.Tensor):
        return batch.detach().clone().requires_grad_().clone() if batch.is_floating_point() else batch
    if hasattr(batch, "keys"):
        return {key: _differentiable(batch[key]) for key in batch.keys()}  # noqa: SIM118  # of a BatchEncoding, too
    return batch


def _run(model: torch.nn.Module, batch: Any) -> Any:
    try:
        return model(**batch) if isinstance(batch, dict) or hasattr(batch, "keys") else model(batch)
    except Exception as error:  # of whatever the model checks
        raise ModelError(
            f"{type(model).__name__}: expected a forward on the inputs, got {first_line(error)}; "
            "pass batch=, what it takes"
        ) from error


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The floating tensors of an output that say what the model says: the logits, or else all."""
    if isinstance(logits := getattr(output, "logits", None), torch.Tensor):
        yield logits
    elif isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif hasattr(output, "values"):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


@contextmanager
def _learnable(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Gradients of these weights alone."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = {id(weight) for weight in weights.values()}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


@contextmanager
def _silenced(model: torch.nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Every neuron of the sites is 0 inside."""
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(watched(model, site, lambda found: found.values * 0))
        yield


def _by_module(names: set[str], size: Mapping[str, float]) -> dict[str, float]:
    """Module path with `*` for numbers -> share, the largest first."""
    found: Counter[str] = Counter()
    for name in sorted(names):
        found[re.sub(r"\b\d+\b", "*", name.removesuffix(".weight"))] += size[name]  # type: ignore[assignment]
    return dict(found.most_common())


def _listed(shares: Mapping[str, float], most: int = 4) -> str:
    told = [f"{name} ({_percent(share)})" for name, share in list(shares.items())[:most]]
    return ", ".join(told) + (f" and {len(shares) - most} more" if len(shares) > most else "")


def _percent(share: float) -> str:
    """A share that is not whole never reads 100 %."""
    return "100 %" if share == 1 else f"{min(share, 0.9999):.2%}".replace("%", " %")


def _image_inputs(model: torch.nn.Module) -> torch.Tensor:
    """Random images for a model of timm's or torchvision's kind."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "image_size", None)
    size = size or (settings.get("input_size") or (None,))[1:]
    convolution = next((m for m in model.modules() if isinstance(m, torch.nn.Conv2d)), None)
    if not size or convolution is None:
        raise ArgumentError(
            f"batch: expected what {type(model).__name__} is called with, got none; pass batch=, a tensor or a mapping"
        )
    height, width = (size, size) if isinstance(size, int) else size
    channels = convolution.in_channels
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(2))
