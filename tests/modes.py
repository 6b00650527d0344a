"""Context managers that watch every operation, so that tests can say which ones nobody needed.

A CPU answers at once, so the code that a device would run is run on CPU tensors (`device_path`), and what would have
made the host wait is an error or is counted.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

# What makes the host wait for a device: as the operation behind it, and as Python calls it.
_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense, _aten.is_nonzero, _aten.nonzero, _aten.masked_select, _aten.equal}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_}
_CALLS = {"tolist", "numpy", "item", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"}


@dataclass(frozen=True)
class Operation:
    """One operation: its name, whether the host waits for it, the scalars of its largest tensor."""

    name: str
    reads: bool
    size: int


def _is_read(function, arguments):
    name = getattr(function, "__name__", "")
    # By name: the device of these tensors, which stand for those of another, is a CPU too.
    return name in _CALLS or (name == "to" and any(isinstance(v, str) and v == "cpu" for v in arguments[1:]))


class _Operations(TorchDispatchMode):
    """All operations, those of backward passes too."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outcome = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, outcome)) if isinstance(leaf, torch.Tensor)]
        size = max((tensor.numel() for tensor in tensors), default=0)
        packet = function.overloadpacket
        # How many elements a mask picks is read too.
        masks = packet in _INDEXING and any(t is not None and t.dtype == torch.bool for t in args[1])
        self.note(Operation(str(function), packet in _READS or masks, size), tensors)
        return outcome


class _Calls(TorchFunctionMode):
    """What Python calls: `tolist` and `cpu` of a tensor on a CPU have no operation of their own."""

    def __init__(self, note):
        super().__init__()
        self.note, self.inside = note, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not _is_read(function, [*args, *(kwargs or {}).values()]):
            return function(*args, **(kwargs or {}))
        self.note(Operation(function.__name__, True, args[0].numel()), [])
        self.inside = True
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self.inside = False


@contextmanager
def journal():
    """A list of the operations in their order, a read and what is behind it as one."""
    seen = []
    calls = _Calls(lambda operation, tensors: seen.append(operation))

    def note(operation, tensors):
        if not (calls.inside and operation.reads):
            seen.append(operation)

    with _Operations(note), calls:
        yield seen


class ReadError(AssertionError):
    """The host read a tensor."""


@contextmanager
def nothing_is_read():
    """A read of any tensor by the host is an error."""

    def note(operation, tensors):
        if operation.reads:
            raise ReadError(f"{operation.name} makes the host wait")

    with _Operations(note), _Calls(note):
        yield


@contextmanager
def no_double():
    """A tensor of double precision is an error: some devices have none."""

    def note(operation, tensors):
        for tensor in tensors:
            if tensor.dtype in (torch.float64, torch.complex128):
                raise AssertionError(f"{operation.name} has a tensor of {tensor.dtype}")

    with _Operations(note):
        yield


class _Makers(TorchFunctionMode):
    """What makes tensors of the host's numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function in (torch.tensor, torch.from_numpy)
        if made or (function is torch.as_tensor and not isinstance(args[0], torch.Tensor)):
            raise ReadError(f"{function.__name__} of the host's numbers, which a CUDA graph cannot hold")
        return function(*args, **(kwargs or {}))


@contextmanager
def nothing_comes_from_the_host():
    """A tensor that is made of numbers of the host, but for filling one with a single number, is an error."""
    with _Makers():
        yield


@contextmanager
def kernels_are_not_watched(monkeypatch):
    """Triton's interpreter itself reads tensors, which no GPU does."""
    from triton.runtime.interpreter import GridExecutor

    call = GridExecutor.__call__

    def unwatched(*args, **kwargs):
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            call(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", unwatched)
        yield


@contextmanager
def device_path(monkeypatch):
    """Run what a device runs, on CPU tensors: results stay tensors that nobody waits for."""
    with monkeypatch.context() as patch:
        patch.setattr("balanced_optim._numbers.ON_DEVICE", lambda device: True)
        yield
