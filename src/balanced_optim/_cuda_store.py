"""The stores of a GPU: rows that change places on the device, and a running sum, by Triton kernels.

From `start` to `combine` nothing waits for the device. With TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._passes import Pass
    from ._rule import Terms

# Parameters start at multiples of this many elements, so that every row and parameter is aligned for vector loads.
_ALIGNMENT = 64
_GRAM_PIECE = 1 << 20
_READABLE = {torch.float32, torch.bfloat16, torch.float16, torch.float64}

# A gradient's dtype, and whether its address is a multiple of 16 bytes.
_Kind = tuple[torch.dtype, bool]


@cache
def triton_is_there() -> bool:
    """Whether the kernels can be had: Triton comes with torch for CUDA on Linux."""
    try:
        _kernels()
    except ImportError:
        return False
    return True


def _kernels() -> ModuleType:
    from . import _kernels

    return _kernels


def _launch(kernel: Any, device: torch.device, blocks: int, *arguments: Any, **constants: Any) -> None:
    """Launch on `device`. Without fused multiply-adds a result does not depend on the version of Triton."""
    if blocks:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[(blocks,)](*arguments, **constants, num_warps=8, enable_fp_fusion=False)


def _triton(dtype: torch.dtype) -> Any:
    return getattr(_kernels().tl, str(dtype).removeprefix("torch."))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values are computed in, and that rows have by default."""
    return torch.promote_types(dtype.to_real(), torch.float32)


def _moved(values: Sequence[Any] | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A vector in one piece, as kernels read it; nobody waits for it."""
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True).contiguous()


def _dense(tensor: Tensor) -> Tensor:
    """The tensor strided and real (complex as pairs), in a dtype that the kernels read."""
    tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()
    return tensor if tensor.dtype in _READABLE else tensor.float()


def _addresses(tensors: Sequence[Tensor | None], default: torch.dtype) -> dict[_Kind, list[int]]:
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


@dataclass(frozen=True)
class _Place:
    """Where one parameter lies in a row: `size` real elements from `start` on, shaped and strided like it."""

    start: int
    size: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(parameter: Tensor, start: int) -> _Place:
        dense = torch.empty_like(parameter, device="meta")
        dense = torch.view_as_real(dense) if dense.is_complex() else dense
        return _Place(start, dense.numel(), tuple(dense.shape), tuple(dense.stride()), parameter.dtype)

    def view(self, row: Tensor) -> Tensor:
        part = row.as_strided(self.shape, self.stride, row.storage_offset() + self.start)
        return torch.view_as_complex(part) if self.dtype.is_complex else part

    def plain(self, gradient: Tensor | None) -> Tensor | None:
        """The gradient with its elements in memory as in a row: itself where it is so already."""
        if gradient is None or self.size == 0:
            return None
        gradient = _dense(gradient)
        strides = gradient.stride()
        if strides == self.stride or all(
            a == b or n == 1 for a, b, n in zip(strides, self.stride, self.shape, strict=True)
        ):
            return gradient
        return torch.empty_strided(self.shape, self.stride, dtype=gradient.dtype, device=gradient.device).copy_(
            gradient
        )


class _Segment:
    """The parameters of one device, row dtype and gradient dtype: one row is one stretch of memory."""

    rows: Tensor | None = None
    slots: Tensor
    keep: Tensor
    gain: Tensor

    def __init__(
        self, parameters: Sequence[Tensor], members: list[int], dtype: torch.dtype, shares: list[float]
    ) -> None:
        self.members, self.dtype, self.wide, self.shares = members, dtype, _wide(dtype), shares
        self.device, self.gradient_dtype = parameters[0].device, parameters[0].dtype.to_real()
        self.places, self.length = list[_Place](), 0
        for parameter in parameters:
            self.places.append(_Place.of(parameter, self.length))
            self.length += -(-self.places[-1].size // _ALIGNMENT) * _ALIGNMENT
        blocks = [(i, at) for i, place in enumerate(self.places) for at in range(0, place.size, _kernels().BLOCK)]
        self.blocks = len(blocks)
        self.tables = (
            torch.tensor([owner for owner, _ in blocks], dtype=torch.int32, device=self.device),
            torch.tensor([offset for _, offset in blocks], dtype=torch.int64, device=self.device),
            torch.tensor([place.start for place in self.places], dtype=torch.int64, device=self.device),
            torch.tensor([place.size for place in self.places], dtype=torch.int64, device=self.device),
        )
        self.share_table = torch.tensor(shares, dtype=self.wide, device=self.device)

    def views(self, row: Tensor) -> Iterator[tuple[int, Tensor]]:
        return zip(self.members, [place.view(row) for place in self.places], strict=True)

    def measure(self, table: Tensor, kind: _Kind, partials: Tensor, heads: int, task: int | None) -> None:
        """Average gradients of one kind into the spare row, and their squares; without rows or task squares alone."""
        rows = None if task is None else self.rows
        state = (table,) * 4 if rows is None else (rows, self.slots, self.keep, self.gain)
        _launch(
            _kernels().average_kernel, self.device, len(partials),
            table, *self.tables, self.share_table, *state, partials,
            task or 0, state[1].numel() - 1, self.length, len(self.places), heads, self.blocks,
            ROWS=rows is not None, KIND=_triton(kind[0]), ALIGNED=kind[1], WIDE=_triton(self.wide),
            BLOCK=_kernels().BLOCK,
        )  # fmt: skip

    def total(self, partials: Tensor) -> Tensor:
        """The sum of partial squares, in double precision and a fixed order."""
        out = torch.empty(1, dtype=torch.float64, device=partials.device)
        block = _kernels().TOTAL_BLOCK
        _launch(_kernels().total_kernel, partials.device, 1, partials, out, len(partials), BLOCK=block)
        return out


@dataclass
class _Pinned:
    """Address tables go to a GPU from pinned memory.

    It cannot be allocated while a CUDA graph is captured, and must live as long as the graph: it is set aside in
    batches before, as many tables as a batch needs, and what a capture has used is kept.
    """

    used: int = 0
    spare: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Pinned, ()

    def on(self, device: torch.device, words: list[int]) -> Tensor:
        table = torch.tensor(words, dtype=torch.int64)
        if device.type != "cuda":
            return table
        if not torch.cuda.is_current_stream_capturing():
            self._set_aside(len(words))
            return table.pin_memory().to(device, non_blocking=True)
        if not self.spare or len(words) > len(self.spare[-1]):
            raise RuntimeError("a batch like this one must run once before it is captured in a CUDA graph")
        self.kept.append(self.spare.pop()[: len(words)].copy_(table))
        return self.kept[-1].to(device, non_blocking=True)

    def _set_aside(self, words: int) -> None:
        """As many tables as this batch has needed so far, all of the largest size seen."""
        self.used += 1
        if self.spare and len(self.spare[0]) < words:
            self.spare = []
        width = len(self.spare[0]) if self.spare else words
        while len(self.spare) < self.used:
            self.spare.append(torch.empty(width, dtype=torch.int64, pin_memory=True))


@dataclass(frozen=True)
class _Measured:
    """One segment's part of a pass: an address table for each kind of gradient, and the partial squares."""

    tables: list[tuple[Tensor, _Kind]]
    partials: Tensor
    gradients: list[Tensor | None]


class _DeviceStore:
    """What both stores share: segments, address tables, and one joint decision a task.

    Args:
        parameters: only shapes, strides, devices and dtypes are read.
        dtype: of the rows; None is float32, or float64 for parameters of double precision.
        ranks: those that hold the other shards; None is one process.
    """

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype | None, ranks: Any) -> None:
        self.device = parameters[0].device
        self._number, self._ranks = len(parameters), None if ranks is None or not ranks.agrees else ranks
        shares = [1.0] * len(parameters) if ranks is None or ranks.shares is None else ranks.shares
        together: dict[tuple[Any, ...], list[int]] = {}
        for i, p in enumerate(parameters):
            together.setdefault((p.device, dtype or _wide(p.dtype), p.dtype.to_real()), []).append(i)
        self._segments = [
            _Segment([parameters[i] for i in members], members, row_dtype, [shares[i] for i in members])
            for (_, row_dtype, _), members in together.items()
        ]
        double = any(segment.dtype == torch.float64 for segment in self._segments)
        self.norm_dtype = torch.float64 if double else torch.float32
        self._pinned = _Pinned()
        self._answers = {ok: torch.full((), ok, device=self.device) for ok in (False, True)}

    def start(self, terms: Terms) -> None:
        """Begin a batch, without what an earlier, abandoned one left."""
        self._pinned.used = 0
        self._refuses = int(terms.refuses)
        self._usable = _moved(terms.usable, self.device, torch.bool)
        self._healthy = torch.ones((), dtype=torch.int32, device=self.device)
        self._squares = torch.full((len(terms.usable),), torch.nan, dtype=torch.float64, device=self.device)

    def norms(self) -> Tensor:
        """||ema_t|| of each task, NaN where it was absent or refused."""
        return self._squares.sqrt().to(self.norm_dtype)

    def _measure(self, one: Pass) -> tuple[list[_Measured], Tensor]:
        """Each segment's squares (and non-finite heads), and whether all is well as far as is known beside them."""
        ok = _moved(one.ok, self.device, torch.bool) if isinstance(one.ok, Tensor) else self._answers[one.ok]
        heads: dict[torch.device, list[Tensor]] = {}
        for gradient in one.rest.values():
            heads.setdefault(gradient.device, []).append(_dense(gradient).contiguous())
        measured = []
        for segment in self._segments:
            shared = [place.plain(one.shared[i]) for i, place in zip(segment.members, segment.places, strict=True)]
            measured.append(self._measure_segment(segment, shared, heads.pop(segment.device, []), one.task))
        for head in [head for together in heads.values() for head in together]:
            ok = ok & head.isfinite().all().to(self.device, non_blocking=True)
        return measured, ok

    def _measure_segment(
        self, segment: _Segment, shared: list[Tensor | None], heads: list[Tensor], task: int
    ) -> _Measured:
        sizes, firsts, blocks = [head.numel() for head in heads], list[int](), 0
        for size in sizes:
            firsts.append(blocks)
            blocks += -(-size // _kernels().BLOCK)
        gradients = [*shared, *heads]
        if segment.device.type == "cuda":
            # A gradient may come from another stream, and its memory must not be used again too early.
            stream = torch.cuda.current_stream(segment.device)
            for gradient in gradients:
                if gradient is not None:
                    gradient.record_stream(stream)
        tables = [
            (self._pinned.on(segment.device, [*words, *sizes, *firsts]), kind)
            for kind, words in _addresses(gradients, segment.dtype).items()
        ]
        partials = torch.empty(segment.blocks + blocks, dtype=segment.wide, device=segment.device)
        for table, kind in tables:
            segment.measure(table, kind, partials, len(heads), task)
        return _Measured(tables, partials, gradients)

    def _decide(self, task: int, measured: Sequence[_Measured], ok: Tensor, kernel: Any, *state: Any) -> Tensor:
        """Launch the kernel that decides for all segments and ranks; returns whether the pass counts."""
        squares = measured[0].partials
        if self._ranks is not None or len(measured) > 1:
            parts = [segment.total(part.partials) for segment, part in zip(self._segments, measured, strict=True)]
            squares = torch.cat([part.to(self.device, non_blocking=True) for part in parts])
        if self._ranks is not None:
            finite = squares.sum().isfinite() & self._usable[task] & (self._healthy != 0)
            ok = self._ranks.agree(ok & finite)
            squares = self._whole(squares)
        taken = torch.empty((), dtype=torch.bool, device=self.device)
        _launch(
            kernel, self.device, 1, squares, self._usable, ok, self._healthy, taken, self._squares, *state,
            task, len(squares), self._refuses, BLOCK=_kernels().TOTAL_BLOCK,
        )  # fmt: skip
        return taken

    def _whole(self, squares: Tensor) -> Tensor:
        """The squares that a decision needs: this rank's, since `ok` is joint already."""
        return squares


class DeviceRows(_DeviceStore):
    """T averages in T + 1 rows; a table of slots on the device says which row is whose, and which one is spare.

    A pass is averaged into the spare row, which trades places with the task's if all is well. No value depends on
    which row holds what.
    """

    def __init__(
        self, parameters: Sequence[Tensor], tasks: int, dtype: torch.dtype | None = None, ranks: Any = None
    ) -> None:
        super().__init__(parameters, dtype, ranks)
        self.tasks = tasks
        slots: dict[torch.device, Tensor] = {}
        for s in self._segments:
            s.rows = torch.zeros(tasks + 1, s.length, dtype=s.dtype, device=s.device)
            s.slots = slots.setdefault(s.device, torch.arange(tasks + 1, dtype=torch.int32, device=s.device))

    def start(self, terms: Terms) -> None:
        """Begin a batch, without what an earlier, abandoned one left."""
        super().start(terms)
        for segment in self._segments:
            segment.keep = _moved(terms.keep, segment.device, torch.float64)
            segment.gain = _moved(terms.gain, segment.device, torch.float64)

    def add(self, one: Pass) -> Tensor:
        """Average one task's gradients in, if all is well; returns whether, without waiting."""
        slots = self._segments[0].slots
        measured, ok = self._measure(one)
        taken = self._decide(one.task, measured, ok, _kernels().accept_kernel, slots, self.tasks)
        for segment in self._segments:
            if segment.slots is not slots:
                segment.slots.copy_(slots, non_blocking=True)
        return taken

    def norms(self) -> Tensor:
        """||ema_t|| of each task, NaN where it was absent or refused."""
        return self._norms(self._squares)

    def _norms(self, squares: Tensor) -> Tensor:
        return (squares if self._ranks is None else self._ranks.total(squares)).sqrt().to(self.norm_dtype)

    def combine(self, weights: Tensor) -> list[Tensor | None]:
        """``sum_t w_t * ema_t`` for each parameter, of its dtype, in fresh memory."""
        result: list[Tensor | None] = [None] * self._number
        block = _kernels().SUM_BLOCK
        for segment in self._segments:
            out = torch.empty(segment.length, dtype=segment.gradient_dtype, device=segment.device)
            _launch(
                _kernels().sum_kernel, segment.device, -(-segment.length // block), segment.rows, segment.slots,
                _moved(weights, segment.device), out, self.tasks, segment.length,
                WIDE=_triton(segment.wide), BLOCK=block,
            )  # fmt: skip
            for member, view in segment.views(out):
                result[member] = view
        return result

    def averages(self) -> list[list[Tensor]]:
        """For each parameter its T averages, shaped like it: views of the rows. Reads the slots."""
        result: list[list[Tensor]] = [[] for _ in range(self._number)]
        for segment, rows in self._rows():
            for row in rows:
                for member, view in segment.views(row):
                    result[member].append(view)
        return result

    def _rows(self) -> Iterator[tuple[_Segment, list[Tensor]]]:
        """Each segment's rows in the order of the tasks."""
        slots = self._segments[0].slots.tolist()[: self.tasks]
        for segment in self._segments:
            if segment.rows is not None:
                yield segment, [segment.rows[slot] for slot in slots]

    def load_averages(self, averages: Sequence[Sequence[Tensor | None]]) -> None:
        """Overwrite all averages where they lie; None sets zeros."""
        for mine, theirs in zip(self.averages(), averages, strict=True):
            for into, source in zip(mine, theirs, strict=True):
                into.zero_() if source is None else into.copy_(source)

    def load_norms(self) -> Tensor:
        """||row_t|| of the rows as they are, bit for bit what `norms` gave when they were written."""
        squares: list[list[Tensor]] = [[] for _ in range(self.tasks)]
        for segment, rows in self._rows():
            partials = torch.empty(segment.blocks, dtype=segment.wide, device=segment.device)
            for row, parts in zip(rows, squares, strict=True):
                words = [row.data_ptr() + place.start * row.itemsize for place in segment.places]
                segment.measure(self._pinned.on(segment.device, words), (row.dtype, True), partials, 0, None)
                parts.append(segment.total(partials).to(self.device))
        return self._norms(torch.cat([self._segments[0].total(torch.cat(parts)) for parts in squares]))

    def gram(self) -> Tensor:
        """<ema_s, ema_t> for every pair of tasks, shape (T, T), in double precision; of this rank's shards."""
        result = torch.zeros(self.tasks, self.tasks, dtype=torch.float64, device=self.device)
        for segment, rows in self._rows():
            alike = groupby(zip(segment.shares, segment.places, strict=True), key=lambda pair: pair[0])
            for share, pairs in alike:
                places = [place for _, place in pairs]
                begin, end = places[0].start, places[-1].start + places[-1].size
                for at in range(begin, end, _GRAM_PIECE):
                    matrix = torch.stack([row[at : min(at + _GRAM_PIECE, end)].double() for row in rows])
                    result += share * (matrix @ matrix.t()).to(self.device)
        return result

    def clear(self, task: int) -> None:
        """Set the average of `task` back to zero."""
        for _, rows in self._rows():
            rows[task].zero_()


class DeviceSum(_DeviceStore):
    """The running sum of a method without averages: no row is kept, n scalars beside the gradient that arrives.

    w_t = common * scale_t, where scale_t = factor_t * (unit / ||g_t||)**p is known when g_t arrives and the common
    factor at the end. `unit` is the first counted task's norm: one task alone passes through bit for bit.
    """

    def __init__(self, parameters: Sequence[Tensor], ranks: Any = None, normalise: bool = True) -> None:
        super().__init__(parameters, None, ranks)
        self._normalise = int(normalise)
        self._totals: list[Tensor] = []

    def start(self, terms: Terms) -> None:
        """Begin a batch, without what an earlier, abandoned one left."""
        super().start(terms)
        power = terms.power if isinstance(terms.power, Tensor) else torch.full((), terms.power, device=self.device)
        self._power = power.to(self.device, torch.float64, non_blocking=True)
        self._factors = _moved(terms.factors, self.device, torch.float64)
        self._scales = torch.zeros_like(self._squares)
        self._unit = torch.zeros((), dtype=torch.float64, device=self.device)
        self._totals, self._reached = [], set[int]()

    def add(self, one: Pass) -> Tensor:
        """Add one task's gradients, if all is well; returns whether, without waiting."""
        measured, ok = self._measure(one)
        state = (self._scales, self._unit, self._factors, self._power, self._normalise)
        taken = self._decide(one.task, measured, ok, _kernels().scale_kernel, *state)
        fresh = not self._totals
        if fresh:
            self._totals = [torch.empty(s.length, dtype=s.wide, device=s.device) for s in self._segments]
        for segment, part, total in zip(self._segments, measured, self._totals, strict=True):
            for table, kind in part.tables:
                _launch(
                    _kernels().add_kernel, segment.device, segment.blocks, table, *segment.tables, total,
                    _moved(self._scales, segment.device), one.task, int(fresh), KIND=_triton(kind[0]),
                    ALIGNED=kind[1], WIDE=_triton(segment.wide), BLOCK=_kernels().BLOCK,
                )  # fmt: skip
        self._reached |= {i for i, gradient in enumerate(one.shared) if gradient is not None}
        return taken

    def _whole(self, squares: Tensor) -> Tensor:
        """The squares of all ranks, which the scale needs."""
        joint: Tensor = self._ranks.total(squares)
        return joint

    def combine(self, weights: Tensor) -> list[Tensor | None]:
        """``sum_t w_t * g_t`` for each parameter, of its dtype, in fresh memory; None where no task reached it."""
        scales = self._scales.to(weights.dtype)
        # Each ratio is the common factor; that of the largest scale is the most exact. 0 where no task counts.
        ratios = torch.where(scales > 0, weights / scales, 0.0)
        common = ratios.gather(0, scales.argmax(keepdim=True)).squeeze(0)
        result: list[Tensor | None] = [None] * self._number
        for segment, total in zip(self._segments, self._totals, strict=False):
            out = torch.empty_like(total, dtype=segment.gradient_dtype)
            torch.mul(total, common.to(segment.device, segment.wide, non_blocking=True), out=out)
            for member, view in segment.views(out):
                result[member] = view if member in self._reached else None
        self._totals, self._reached = [], set()
        return result
