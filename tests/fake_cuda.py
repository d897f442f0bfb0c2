"""A CUDA device for tests on machines without one: CPU tensors that say they are on `cuda:0`.

Inside `FakeCuda()` every tensor made or moved there is a `CudaTensor` around a CPU tensor. As on the device, an op that
mixes both raises, and what makes the host wait (a value read, a copy that is not asynchronous or whose memory is not
pinned, a result whose size depends on data) is counted by its name. What is read on another stream than it was made on,
before that stream has waited, raises, too.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
READS = {"_local_scalar_dense", "is_nonzero", "equal", "item"}
SIZED_BY_DATA = {
    "nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "repeat_interleave",
}  # fmt: skip
_by_device = clip_grad._group_tensors_by_device_and_dtype
STAND_INS = (
    # Torch's C++ takes them for the host's.
    (
        clip_grad,
        "_group_tensors_by_device_and_dtype",
        lambda lists: {
            (found[0][0].device, dtype): (found, at) for (_, dtype), (found, at) in _by_device(lists).items()
        },
    ),
    (torch.cuda, "_lazy_init", lambda: None),
    (torch.cuda, "mem_get_info", lambda _=None: (1 << 36, 1 << 36)),
    # Views made by a mode are no views to inference mode.
    (torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext()),
)
MOVES = {"_to_copy", "copy_", "_copy_from"}
PAGEABLE = 1 << 16  # bytes that are copied at once without pinned memory


class Stream:
    """Work in its order, which waits for events of other streams."""

    def __init__(self, *_):
        self.work = 0
        self.waited = {}

    def record_event(self):
        return self, self.work

    def wait_event(self, event):
        stream, work = event
        self.waited[stream] = max(work, self.waited.get(stream, 0))


def _record_stream(tensor, stream):
    tensor.streams = (*tensor.streams, stream)


def _pinned(tensor):
    copy = tensor.clone()
    copy.pinned = True
    return copy


class CudaTensor(torch.Tensor):
    """A tensor that says it is on the device; ops on it run in the mode alone.

    To torch's own C++ it is a CPU tensor, so that autograd looks for no driver; hence moves are told apart here.
    """

    held: torch.Tensor
    made = None  # on which stream, and which of its works
    streams = ()  # that its memory waits for
    device = DEVICE
    is_cuda = True
    is_cpu = False

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on the fake device outside of FakeCuda()")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.cpu:
                return _to(args[0], "cpu")
            if func is torch.Tensor.cuda:
                return _to(args[0], DEVICE)
            if func in (torch.Tensor.to, torch.Tensor.type_as):
                return _to(*args, **(kwargs or {}))
            if func is torch.Tensor.tolist:
                return _to(args[0], "cpu").tolist()  # torch has none for subclasses
            if func is torch.nn.functional.one_hot:  # its C++ would make a CPU tensor for what is one there
                return (args[0][..., None] == torch.arange(args[1], device=DEVICE)).long()
            return func(*args, **(kwargs or {}))

    def __repr__(self):
        return f"CudaTensor({self.held!r})"


def _to(tensor, *args, copy=False, **kwargs):
    """`tensor.to(...)` between the host and the device."""
    if args and isinstance(args[0], torch.Tensor):
        device, dtype, non_blocking = args[0].device, args[0].dtype, kwargs.get("non_blocking", False)
    else:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    crosses = device is not None and is_cuda(device) != isinstance(tensor, CudaTensor)
    if not (crosses or copy or dtype not in (None, tensor.dtype)):
        return tensor
    where = {"device": device} if crosses else {}
    return aten._to_copy(tensor, dtype=dtype, non_blocking=non_blocking, **where)


def is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


class FakeCuda(TorchDispatchMode):
    """Runs ops on `CudaTensor`s as the device would, and counts in `waits` what the host waited for."""

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.moved_bytes = 0
        self.ops: Counter[str] = Counter()
        self.pageable = PAGEABLE
        self.stream = Stream()
        self.here = threading.local()

    @property
    def current(self):
        return getattr(self.here, "stream", self.stream)

    @contextmanager
    def on(self, stream):
        """`torch.cuda.stream`; threads come to the device by it."""
        before, self.here.stream = self.current, stream
        with ExitStack() as stack:
            if self not in _get_current_dispatch_mode_stack():
                TorchDispatchMode.__enter__(self)
                stack.callback(TorchDispatchMode.__exit__, self, None, None, None)
            yield
        self.here.stream = before

    def _stamped(self, tensor):
        self.current.work += 1
        tensor.made = (self.current, self.current.work)
        return tensor

    def _check_streams(self, func, tensors):
        for tensor in tensors:
            stream, work = tensor.made or (self.current, 0)
            if stream is self.current:
                continue
            if self.current.waited.get(stream, 0) < work:
                raise RuntimeError(f"{func}: read on another stream before it was there")
            if self.current not in tensor.streams:
                raise RuntimeError(f"{func}: read on a stream that its memory does not wait for")

    def __enter__(self):
        stand_ins = (
            *STAND_INS,
            (torch.cuda, "Stream", Stream),
            (torch.cuda, "stream", self.on),
            (torch.cuda, "current_stream", lambda _=None: self.current),
            (torch.Tensor, "record_stream", _record_stream),
            (torch.Tensor, "pin_memory", _pinned),
            (torch.Tensor, "is_pinned", lambda tensor: hasattr(tensor, "pinned")),
        )
        self._real = [(owner, name, getattr(owner, name)) for owner, name, _ in stand_ins]
        for owner, name, stand_in in stand_ins:
            setattr(owner, name, stand_in)
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(
            True
        )  # torch.tensor(..., device=) copies from the host in sight of the mode
        return super().__enter__()

    def __exit__(self, *args):
        for owner, name, real in self._real:
            setattr(owner, name, real)
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        return super().__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.__name__.split(".")[0]
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        there = [leaf for leaf in tensors if isinstance(leaf, CudaTensor)]
        wanted = kwargs.get("device")
        if not there and not is_cuda(wanted):
            return func(*args, **kwargs)
        self._check_streams(func, there)
        if name in MOVES:
            return self._move(func, name, args, kwargs, there)
        mixed = [leaf for leaf in tensors if not isinstance(leaf, CudaTensor) and leaf.dim()]
        if there and mixed:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, got cuda:0 and cpu")
        self.ops[name] += 1
        if name in READS or name in SIZED_BY_DATA or self._by_mask(name, args):
            self.waits[name] += 1
        held = tree_unflatten([leaf.held if isinstance(leaf, CudaTensor) else leaf for leaf in leaves], spec)
        if wanted is not None:
            held[1]["device"] = torch.device("cpu")
        result = func(*held[0], **held[1])
        return self._wrapped(func, result, leaves)

    @staticmethod
    def _by_mask(name, args):
        """Whether an index is a bool mask, whose count the host must know."""
        if name not in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            return False
        return any(index is not None and index.dtype == torch.bool for index in args[1])

    def _move(self, func, name, args, kwargs, there):
        if name == "_to_copy":
            source, target = args[0], kwargs.get("device")
            crossing = target is not None and is_cuda(target) != isinstance(source, CudaTensor)
            to_cuda = is_cuda(target) if target is not None else isinstance(source, CudaTensor)
            held = source.held if isinstance(source, CudaTensor) else source
            result = func(held, **{**kwargs, "device": None if target is None else torch.device("cpu")})
            if crossing and result is held:
                result = held.clone()
            made = self._stamped(CudaTensor(result)) if to_cuda else result
        else:
            target, source = args[:2]
            crossing = isinstance(source, CudaTensor) != isinstance(target, CudaTensor) and source.dim() > 0
            to_cuda = isinstance(target, CudaTensor)
            plain = [a.held if isinstance(a, CudaTensor) else a for a in (target, source)]
            func(*plain, *args[2:], **kwargs)
            made = target
        if crossing:
            self.moved_bytes += made.numel() * made.element_size()
            asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if asynchronous and not to_cuda:
                raise RuntimeError(f"{func}: a copy to the host that does not block is read before it is there")
            if to_cuda and asynchronous and made.nbytes > self.pageable and not source.is_pinned():
                self.waits["copy of pageable memory"] += 1
            if not (to_cuda and asynchronous):
                self.waits["copy to the device" if to_cuda else "copy to the host"] += 1
        return made

    def _wrapped(self, func, result, leaves):
        """The result on the device; an argument that was written in place is returned as it is."""
        own = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, CudaTensor)}

        def wrapped(held):
            return self._stamped(own[id(held)] if id(held) in own else CudaTensor(held))

        return tree_map_only(torch.Tensor, wrapped, result)


def to_cuda(module):
    """A module whose parameters and buffers are on the fake device, as `module.cuda()` leaves them."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = torch.nn.Parameter(CudaTensor(parameter.detach()), requires_grad=False)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = CudaTensor(buffer)
    return module
