"""Where things lie on a device: parameters in a row, gradients in an address table, tables in pinned memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._numbers import accumulation_dtype, grad_dtype, real
from ._store import _Place as Place
from ._store import _place as place_of

# Parameters start at multiples of this many elements, so that every row and parameter is aligned for vector loads.
_ALIGNMENT = 64
_READABLE = {torch.float32, torch.bfloat16, torch.float16, torch.float64}

# A gradient's dtype, and whether its address is a multiple of 16 bytes.
Kind = tuple[torch.dtype, bool]


@cache
def kernels() -> ModuleType:
    """The kernels; importing them imports Triton."""
    from . import _kernels

    return _kernels


def launch(kernel: Any, device: torch.device, blocks: int, *arguments: Any, **constants: Any) -> None:
    """Launch on `device`. Without fused multiply-adds a result does not depend on the version of Triton."""
    if blocks:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[(blocks,)](*arguments, **constants, num_warps=8, enable_fp_fusion=False)


@cache
def triton_dtype(dtype: torch.dtype) -> Any:
    return getattr(kernels().tl, str(dtype).removeprefix("torch."))


def moved(values: Sequence[Any] | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A vector in one piece at an even address, since a kernel compiles anew for an odd one; nobody waits for it."""
    # Made on the host, whatever the default device.
    vector = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype, device="cpu")
    vector = vector.to(device=device, dtype=dtype, non_blocking=True).contiguous()
    return vector.clone() if vector.data_ptr() % 16 else vector


def readable(gradient: Tensor) -> Tensor:
    """The gradient strided and real (complex as pairs), in a dtype that the kernels read."""
    gradient = real(gradient).resolve_neg()
    return gradient if gradient.dtype in _READABLE else gradient.float()


def plain(gradient: Tensor | None, place: Place) -> Tensor | None:
    """The gradient with its elements in memory as in a row: itself where it is so already."""
    if gradient is None or place.size == 0:
        return None
    strided = gradient.dtype in _READABLE and gradient.layout is torch.strided
    if strided and gradient.stride() == place.stride and not gradient.is_neg():
        return gradient
    gradient = readable(gradient)
    if all(a == b or n == 1 for a, b, n in zip(gradient.stride(), place.stride, place.shape, strict=True)):
        return gradient
    memory = torch.empty_strided(place.shape, place.stride, dtype=gradient.dtype, device=gradient.device)
    return memory.copy_(gradient)


def hold(gradients: Sequence[Tensor | None]) -> None:
    """Keep memory that may come from another stream until the current one has read it."""
    there = [g for g in gradients if g is not None and g.is_cuda and g.layout is torch.strided]
    streams = {device: torch.cuda.current_stream(device) for device in {g.device for g in there}}
    for gradient in there:
        gradient.record_stream(streams[gradient.device])


def addresses_of(tensors: Sequence[Tensor | None], default: torch.dtype) -> dict[Kind, list[int]]:
    """For each kind of gradient the addresses of all: 0 for none, -1 for one of another kind."""
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    kinds = [None if t is None else (t.dtype, a % 16 == 0) for t, a in zip(tensors, addresses, strict=True)]
    first, *others = dict.fromkeys(kind for kind in kinds if kind is not None) or [(default, True)]
    if not others:
        return {first: addresses}
    kinds = [first if kind is None else kind for kind in kinds]
    return {
        kind: [a if mine == kind else -1 for a, mine in zip(addresses, kinds, strict=True)] for kind in (first, *others)
    }


class Segment:
    """The parameters of one device, row dtype and gradient dtype: one row is one stretch of memory.

    A store with rows sets `rows`, the `slots` of the device, and the `weights` of this batch: keep and gain.
    """

    rows: Tensor
    slots: Tensor
    weights: tuple[Tensor, ...] = ()

    def __init__(
        self, parameters: Sequence[Tensor], members: list[int], dtype: torch.dtype, shares: list[float]
    ) -> None:
        self.members, self.dtype, self.wide, self.shares = members, dtype, accumulation_dtype(dtype), shares
        self.device, self.gradient_dtype = parameters[0].device, grad_dtype(parameters[0]).to_real()
        self.places, self.length = list[Place](), 0
        for parameter in parameters:
            self.places.append(place_of(parameter, self.length))
            self.length += -(-self.places[-1].size // _ALIGNMENT) * _ALIGNMENT
        blocks = [(i, at) for i, place in enumerate(self.places) for at in range(0, place.size, kernels().BLOCK)]
        self.blocks = len(blocks)
        self.tables = (
            torch.tensor([owner for owner, _ in blocks], dtype=torch.int32, device=self.device),
            torch.tensor([offset for _, offset in blocks], dtype=torch.int64, device=self.device),
            torch.tensor([place.start for place in self.places], dtype=torch.int64, device=self.device),
            torch.tensor([place.size for place in self.places], dtype=torch.int64, device=self.device),
        )
        self.share_table = torch.tensor(shares, dtype=self.wide, device=self.device)

    def views(self, row: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each parameter's number and its part of a row."""
        return zip(self.members, [place.shaped(row) for place in self.places], strict=True)

    def measure(self, table: Tensor, kind: Kind, partials: Tensor, heads: int, task: int) -> None:
        """The squares of one kind of gradients, with rows those of the average, which goes into the spare row."""
        state = (self.rows, self.slots, *self.weights) if self.weights else (table,) * 4
        launch(
            kernels().average_kernel, self.device, len(partials),
            table, *self.tables, self.share_table, *state, partials,
            task, len(state[1]) - 1, self.length, len(self.places), heads, self.blocks,
            ROWS=bool(self.weights), KIND=triton_dtype(kind[0]), ALIGNED=kind[1], WIDE=triton_dtype(self.wide),
            BLOCK=kernels().BLOCK,
        )  # fmt: skip


def total_of(partials: Tensor) -> Tensor:
    """The sum of partial squares, shape (1,), in double precision and a fixed order."""
    out = torch.empty(1, dtype=torch.float64, device=partials.device)
    block = kernels().TOTAL_BLOCK
    launch(kernels().total_kernel, partials.device, 1, partials, out, len(partials), BLOCK=block)
    return out


@dataclass
class PinnedTables:
    """Address tables go to a GPU from pinned memory.

    Gradients mostly lie where those of the batch before lay: its tables are used again where they hold the same words.

    Pinned memory cannot be allocated while a CUDA graph is captured, and must live as long as the graph: it is set
    aside in batches before, as many tables as a batch needs, all as large as the largest; what a capture has used is
    kept.
    """

    used: int = 0
    spare: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    before: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    now: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        return PinnedTables, ()

    def start(self) -> None:
        """Before a batch."""
        self.used, self.before, self.now = 0, self.now, {}

    def on(self, device: torch.device, words: list[int]) -> Tensor:
        """The words on the device, without waiting. Nobody writes to the table."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # The copy is part of the graph, whose gradients lie elsewhere.
            if not self.spare or len(words) > len(self.spare[-1]):
                raise RuntimeError("a batch like this one must run once before it is captured in a CUDA graph")
            self.kept.append(self.spare.pop()[: len(words)].copy_(_on_host(words)))
            return self.kept[-1].to(device, non_blocking=True)
        if device.type == "cuda":
            self._set_aside(len(words))
        # Another stream could find the table before it is there.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = device, stream, *words
        table = self.before.get(key)
        if table is None:
            table = _on_host(words)
            table = (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)
        self.now[key] = table
        return table

    def _set_aside(self, size: int) -> None:
        self.used += 1
        if self.spare and len(self.spare[0]) < size:
            self.spare = []
        width = len(self.spare[0]) if self.spare else size
        self.spare += [
            torch.empty(width, dtype=torch.int64, device="cpu", pin_memory=True)
            for _ in range(len(self.spare), self.used)
        ]


def _on_host(words: list[int]) -> Tensor:
    return torch.tensor(words, dtype=torch.int64, device="cpu")
