"""The order of a model's forward, seen once on a few samples."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from skillfast.memory.living import LivingBytes
from skillfast.models.batches import logits_of
from skillfast.models.inputs import Inputs, call, examples_in
from skillfast.models.sites import Site, find_sites
from skillfast.models.watching import projecting

if TYPE_CHECKING:
    from collections.abc import Mapping


def first_tensor(output: Any) -> Any:
    """The tensor in a module's output: the output itself, or the first of several parts."""
    return output[0] if isinstance(output, tuple | list) else output


def with_first_tensor(output: Any, value: torch.Tensor) -> Any:
    """A copy of a module's output with another tensor in it."""
    return type(output)((value, *output[1:])) if isinstance(output, tuple | list) else value


@dataclass(frozen=True)
class ForwardTrace:
    """The order of a model's blocks and sites, and what may be kept of them.

    Attributes:
        blocks: Paths of the modules that hold sites, in the order of their calls.
        sites: In the order in which their projections ran; those that never did are missing.
        block_of: Site -> position in `blocks`, None for the classifier; in the order of `sites`.
        parents: Site -> path of the module around its projection (`attn` of `attn.proj`), where that module returns the
            projection's output unchanged.
        feeds: Path of such a module -> path of its sibling (a norm) whose output is its input.
        batched: Block -> for each leaf of its arguments, whether it has a row per sample; None where another batch may
            tell otherwise: a mask is made where there is padding only.
        parts: Block -> how many parts its output has; None for one that is a tensor.
        head: The classifier's site, or None.
        head_is_last: Whether the classifier's output is the model's.
        sequential: Whether each block and site ran once, and each block was given a hidden state first. A model that
            calls the modules in a block past it is not.
        tokens: Tokens per sample.
        dtype: Data type of the logits.
        running_bytes: Bytes that a forward takes at its peak, per sample.
    """

    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    block_of: Mapping[str, int | None]
    parents: Mapping[str, str]
    feeds: Mapping[str, str]
    batched: Mapping[str, list[bool | None]]
    parts: Mapping[str, int | None]
    head: Site | None
    head_is_last: bool
    sequential: bool
    tokens: int
    dtype: torch.dtype
    running_bytes: float

    def sites_until(self, site: Site) -> list[Site]:
        """The sites of this site's block up to it, in the order of their calls."""
        same = [s for s in self.sites if self.block_of[s.name] == self.block_of[site.name]]
        return same[: same.index(site) + 1]

    def takes_more(self, block: str) -> bool:
        """Whether a block takes more than the hidden state that may have a row per sample: a mask, say."""
        return any(many is not False for many in self.batched[block][1:])


def block_path(site: Site) -> str:
    """Path of the block that a site is in."""
    return site.inside


def trace_forward(model: torch.nn.Module, inputs: Inputs) -> ForwardTrace:
    """Run two samples through a model and note the order of its blocks and sites.

    Args:
        model: In evaluation mode.
        inputs: Two examples, on the model's device.
    """
    sites = find_sites(model)
    watch = _Watch(model, sites)
    with watch, LivingBytes() as memory:
        output = logits_of(call(model, inputs), model)
    fired = [site for name in watch.fired for site in sites if site.name == name]
    head = next((site for site in sites if site.kind == "head"), None)
    inner = [site for site in fired if site.kind != "head"]
    blocks = tuple(dict.fromkeys([*watch.entered, *map(block_path, inner)]))  # those never called come last
    parents = {site.name: site.path.rpartition(".")[0] for site in inner if watch.returns_projection(site)}
    for site in inner:  # a start needs all earlier sites of its block kept, too
        same = [s for s in inner if block_path(s) == block_path(site)]
        if any(s.name not in parents for s in same[: same.index(site)]):
            parents.pop(site.name, None)
    return ForwardTrace(
        blocks=blocks,
        sites=tuple(fired),
        block_of={site.name: None if site.kind == "head" else blocks.index(block_path(site)) for site in fired},
        parents=parents,
        feeds={parent: feed for parent in parents.values() if (feed := watch.feed(parent)) is not None},
        batched=watch.batched,
        parts=watch.parts,
        head=head if head is not None and head.name in watch.fired else None,
        head_is_last=head is not None and watch.same(watch.outputs.get(head.path), output),
        sequential=len(watch.fired) == len(set(watch.fired)) and [*watch.batched] == watch.entered == [*blocks],
        tokens=watch.tokens,
        dtype=output.dtype,
        running_bytes=memory.peak / examples_in(inputs),
    )


def _by_sample(leaf: Any, rows: int) -> bool | None:
    """Whether an argument has a row per sample; None for one that is missing or broadcast."""
    if leaf is None or (isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == 1 != rows):
        return None
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows


class _Watch:
    """Hooks on everything that `trace_forward` asks about, for the duration of a context."""

    def __init__(self, model: torch.nn.Module, sites: tuple[Site, ...]) -> None:
        self.model = model
        self.sites = sites
        self.entered: list[str] = []
        self.fired: list[str] = []
        self.batched: dict[str, list[bool | None]] = {}
        self.outputs: dict[str, Any] = {}  # path -> output, of projections, parents and the blocks' own modules
        self.inputs: dict[str, list[Any]] = {}  # path -> argument leaves, of parents
        self.parts: dict[str, int | None] = {}
        self.tokens = 1
        self._stack = ExitStack()

    def __enter__(self) -> _Watch:
        modules = dict(self.model.named_modules())
        for block in dict.fromkeys(block_path(site) for site in self.sites if site.kind != "head"):
            self._on_call(modules[block], lambda args, kwargs, block=block: self._enter_block(block, (args, kwargs)))
            leave = modules[block].register_forward_hook(lambda _, __, out, block=block: self._leave_block(block, out))
            self._stack.callback(leave.remove)
            for name, child in modules[block].named_children():
                self._on_output(f"{block}.{name}", child)
        for site in self.sites:
            self._stack.enter_context(projecting(self.model, site))
            self._on_call(modules[site.path], lambda args, _, site=site: self._fire(site, args[0]))
            self._on_output(site.path, modules[site.path])
            parent = site.path.rpartition(".")[0]
            if site.kind != "head" and parent:
                self._on_call(
                    modules[parent], lambda *call, parent=parent: self.inputs.__setitem__(parent, tree_leaves(call))
                )
                self._on_output(parent, modules[parent])
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _on_call(self, module: torch.nn.Module, see: Any) -> None:
        handle = module.register_forward_pre_hook(lambda _, args, kwargs: see(args, kwargs), with_kwargs=True)
        self._stack.callback(handle.remove)

    def _on_output(self, path: str, module: torch.nn.Module) -> None:
        def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
            self.outputs[path] = output

        self._stack.callback(module.register_forward_hook(keep).remove)

    def _enter_block(self, block: str, call: Any) -> None:
        self.entered.append(block)
        leaves = tree_leaves(call)
        first = leaves[0] if leaves else None
        if isinstance(first, torch.Tensor) and first.dim():
            self.batched[block] = [_by_sample(leaf, len(first)) for leaf in leaves]

    def _leave_block(self, block: str, output: Any) -> None:
        self.parts[block] = len(output) if isinstance(output, tuple | list) else None

    def _fire(self, site: Site, x: torch.Tensor) -> None:
        self.fired.append(site.name)
        self.tokens = max(self.tokens, x[0].numel() // site.width)

    @staticmethod
    def same(a: Any, b: Any) -> bool:
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and (a is b or torch.equal(a, b))

    def returns_projection(self, site: Site) -> bool:
        """Whether the projection is a plain linear layer whose output its parent module returns unchanged."""
        projection = self.model.get_submodule(site.path)
        plain = type(projection) is torch.nn.Linear and projection.weight.is_floating_point()
        parent = site.path.rpartition(".")[0]
        return plain and self.same(first_tensor(self.outputs.get(parent)), self.outputs.get(site.path))

    def feed(self, parent: str) -> str | None:
        """Path of the sibling whose output is this module's input, or None."""
        block = parent.rpartition(".")[0]
        inputs = {id(leaf) for leaf in self.inputs.get(parent, []) if isinstance(leaf, torch.Tensor)}
        for path, output in self.outputs.items():
            if path != parent and path.rpartition(".")[0] == block and id(output) in inputs:
                return path
        return None
