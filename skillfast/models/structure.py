"""The residual stream of a model, and what writes to it, read from the graph of one forward.

In the graph that a forward with gradients leaves, a weight matrix is an operation that multiplies data by a parameter:
a linear layer, a convolution. The residual stream is the way from the input to the output through the fewest of them:
the stem, reductions between stages, the layers before the logits. An output projection is a linear layer from which the
output is reached through no other weight matrix but those of the stream.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from skillfast.models.projections import input_width

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from torch import nn

    from skillfast.vocabulary import Kind

_MULTIPLIES = ("Addmm", "Mm", "Bmm", "Baddbmm", "Addmv", "Mv", "Convolution", "Linear", "Mkldnn", "NativeMultiHead")
_ATTENDS = ("Softmax", "SafeSoftmax", "ScaledDotProduct")
_NAMED: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("mlp", re.compile(r"mlp|ffn|feed_?forward|^fc\d|experts?$", re.IGNORECASE)),
    ("attn", re.compile(r"att(?:n|ention)", re.IGNORECASE)),
    ("ssm", re.compile(r"mamba|ssm|lstm|rwkv|recurrent|rglru|rnn", re.IGNORECASE)),
)


@dataclass(frozen=True)
class Projection:
    """An output projection that was found.

    Attributes:
        path: Path of the module.
        kind: What the innermost module says whose name is that of a kind, but `"attn"` where attention weights come
            before it; else `"mlp"`.
    """

    path: str
    kind: Kind


@dataclass
class _Graph:
    """The operations of one forward."""

    sources: dict[Any, list[Any]] = field(default_factory=dict)  # operation -> those whose results it takes
    matrices: dict[Any, str] = field(default_factory=dict)  # operation -> name of the parameter that it multiplies by
    embeddings: dict[Any, str | None] = field(default_factory=dict)  # operation -> name of its table
    inputs: set[Any] = field(default_factory=set)  # what the model was given, where that has a gradient

    def distances(self, start: Iterable[Any], stop: set[Any]) -> dict[Any, int]:
        """Operations that feed these -> the fewest matrices on the way, both ends counted; not beyond `stop`."""
        far = {operation: int(operation in self.matrices) for operation in start}
        waiting = deque(sorted(far, key=far.__getitem__))
        while waiting:
            operation = waiting.popleft()
            if operation in stop:
                continue
            for source in self.sources[operation]:
                there = far[operation] + (source in self.matrices)
                if there < far.get(source, there + 1):
                    far[source] = there
                    (waiting.append if source in self.matrices else waiting.appendleft)(source)
        return far


def projections_of(model: nn.Module, outputs: Sequence[torch.Tensor], source: torch.Tensor | None) -> list[Projection]:
    """The output projections of a model, in the order of its modules.

    Args:
        model: The model; all its parameters were in need of gradients during the forward.
        outputs: What the forward gave, with their graph.
        source: The embedding that the stream begins with; None: the model's input, which needs a gradient, too.
    """
    graph = _graph(model, outputs)
    stream = _stream(graph, outputs, _name_of(model, source))
    reached = graph.distances([output.grad_fn for output in outputs], set(graph.matrices) - stream)
    written: dict[str, list[Any]] = {}
    for operation in reached:
        if operation in graph.matrices and operation not in stream:
            written.setdefault(graph.matrices[operation].rpartition(".")[0], []).append(operation)
    modules = dict(model.named_modules())
    paths = [path for path in modules if path in written and input_width(modules[path]) is not None]
    return [Projection(path, _kind(graph, path, written[path])) for path in paths]


def stream_of(model: nn.Module, outputs: Sequence[torch.Tensor], source: torch.Tensor | None) -> set[str]:
    """Names of the weight matrices that the residual stream itself passes; arguments as of `projections_of`."""
    graph = _graph(model, outputs)
    return {graph.matrices[operation] for operation in _stream(graph, outputs, _name_of(model, source))}


def _name_of(model: nn.Module, source: torch.Tensor | None) -> str | None:
    return next((name for name, parameter in model.named_parameters() if parameter is source), None)


def _graph(model: nn.Module, outputs: Sequence[torch.Tensor]) -> _Graph:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    graph = _Graph()
    waiting: list[Any] = [output.grad_fn for output in outputs]
    while waiting:
        operation = waiting.pop()
        if operation not in graph.sources:
            graph.sources[operation] = [source for source, _ in operation.next_functions if source is not None]
            waiting.extend(graph.sources[operation])
    constant: dict[Any, str | None] = {}  # operations on parameters alone -> the matrix among these
    for operation in _first_to_last(graph):
        sources = graph.sources[operation]
        data = [source for source in sources if source not in constant]
        matrices = [name for source in sources if (name := constant.get(source)) is not None]
        if (parameter := getattr(operation, "variable", None)) is not None:
            if id(parameter) in names:
                constant[operation] = names[id(parameter)] if parameter.dim() > 1 else None
            else:
                graph.inputs.add(operation)
        elif type(operation).__name__.startswith("Embedding"):
            graph.embeddings[operation] = matrices[0] if matrices else None
            graph.sources[operation] = []
        elif matrices and type(operation).__name__.startswith(_MULTIPLIES):
            graph.matrices[operation] = matrices[-1]
            graph.sources[operation] = data
        elif sources and not data:
            constant[operation] = matrices[0] if matrices else None
    return graph


def _first_to_last(graph: _Graph) -> list[Any]:
    """Operations, each after its sources."""
    takers: dict[Any, list[Any]] = {operation: [] for operation in graph.sources}
    missing = {operation: len(sources) for operation, sources in graph.sources.items()}
    for operation, sources in graph.sources.items():
        for source in sources:
            takers[source].append(operation)
    ready = [operation for operation, count in missing.items() if not count]
    for operation in ready:  # grows
        for taker in takers[operation]:
            missing[taker] -= 1
            if not missing[taker]:
                ready.append(taker)
    return ready


def _stream(graph: _Graph, outputs: Sequence[torch.Tensor], source: str | None) -> set[Any]:
    """The matrices on the ways from what the model takes to what it gives that pass the fewest of them."""
    far = graph.distances([output.grad_fn for output in outputs], set())
    takers: dict[Any, list[Any]] = {operation: [] for operation in far}
    for operation in far:
        for taken in graph.sources[operation]:
            takers[taken].append(operation)
    roots = [op for op in far if source is not None and graph.embeddings.get(op) == source]
    roots = roots or [op for op in far if op in graph.inputs] or [op for op in far if op in graph.embeddings]
    nearest = min((far[root] for root in roots), default=0)
    waiting = [root for root in roots if far[root] == nearest]
    stream: set[Any] = set()
    seen = set(waiting)
    while waiting:
        operation = waiting.pop()
        own = operation in graph.matrices
        if own:
            stream.add(operation)
        for taker in takers[operation]:
            if taker not in seen and far[taker] + own == far[operation]:
                seen.add(taker)
                waiting.append(taker)
    return stream


def _kind(graph: _Graph, path: str, operations: Sequence[Any]) -> Kind:
    named = (kind for part in reversed(path.split(".")) for kind, pattern in _NAMED if pattern.search(part))
    kind = next(named, None)
    if kind in ("mlp", "attn"):
        return kind
    stop = set(graph.matrices) - set(operations)
    before = graph.distances(operations, stop).keys() - stop
    attends = any(type(operation).__name__.startswith(_ATTENDS) for operation in before)
    return "attn" if attends else kind or "mlp"
