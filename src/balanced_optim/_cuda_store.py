"""The stores of a GPU, as in `_store`, by Triton kernels: rows that change places on the device, and a running sum.

From `start` to `combine` nothing waits for the device. With TRITON_INTERPRET=1 the same code runs on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ._device_layout import (
    Kind,
    PinnedTables,
    Segment,
    addresses_of,
    hold,
    kernels,
    launch,
    moved,
    plain,
    readable,
    total_of,
    triton_dtype,
)
from ._meeting import Alone
from ._numbers import accumulation_dtype, grad_dtype
from ._passes import Gradients, Pass
from ._rule import Terms

# Elements of each row that are held in double precision at a time.
_GRAM_PIECE = 1 << 18


@cache
def triton_is_there() -> bool:
    """Whether the kernels can be had: Triton comes with torch for CUDA on Linux."""
    try:
        kernels()
    except ImportError:
        return False
    return True


# Where these stores take the place of those in torch: on what Triton compiles for. Tests set it.
CHOSEN: Callable[[Sequence[Tensor]], bool] = lambda parameters: (  # noqa: E731
    all(p.is_cuda and torch.cuda.get_device_capability(p.device) >= (7, 0) for p in parameters) and triton_is_there()
)


def is_chosen(parameters: Sequence[Tensor]) -> bool:
    """Whether averages of these parameters are kept by the stores here."""
    return bool(parameters) and CHOSEN(parameters)


class _Measured(NamedTuple):
    """One segment's part of a pass: its gradients, their addresses by kind, and the partial squares."""

    gradients: Gradients
    tables: list[tuple[Tensor, Kind]]
    partials: Tensor


class _DeviceStore:
    """What both stores share: segments, address tables, and one joint decision a task."""

    keeps_rows: ClassVar[bool]

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype | None, ranks: Alone | None) -> None:
        self.device, self._number = parameters[0].device, len(parameters)
        self._ranks = ranks or Alone()
        shares = self._ranks.shares or [1.0] * len(parameters)
        together: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
        for i, p in enumerate(parameters):
            kind = p.device, dtype or accumulation_dtype(p.dtype), grad_dtype(p).to_real()
            together.setdefault(kind, []).append(i)
        self._segments = [
            Segment([parameters[i] for i in members], members, row_dtype, [shares[i] for i in members])
            for (_, row_dtype, _), members in together.items()
        ]
        double = any(segment.dtype == torch.float64 for segment in self._segments)
        self.norm_dtype = torch.float64 if double else torch.float32
        self._tables = PinnedTables()
        self._answers = {ok: torch.full((), ok, device=self.device) for ok in (False, True)}

    def start(self, terms: Terms) -> None:
        """Begin a batch, without what an earlier, abandoned one left."""
        self._tables.start()
        self._refuses = int(terms.refuses)
        self._usable = moved(terms.usable, self.device, torch.bool)
        self._healthy = torch.ones((), dtype=torch.int32, device=self.device)
        self._squares = torch.full((len(terms.usable),), torch.nan, dtype=torch.float64, device=self.device)

    def norms(self) -> Tensor:
        """||ema_t|| of each task, NaN where it was absent or refused."""
        return self._norms(self._squares)

    def _norms(self, squares: Tensor) -> Tensor:
        # A sum has asked for the squares of all ranks pass by pass.
        squares = self._ranks.total(squares) if self.keeps_rows else squares
        return squares.sqrt().to(self.norm_dtype)

    def _take(self, one: Pass, kernel: Any, *state: Any) -> tuple[list[_Measured], Tensor]:
        """Measure a pass, and launch the kernel that decides for all segments and ranks; returns whether it counts."""
        hold([*one.shared, *one.rest.values()])
        ok = moved(one.ok, self.device, torch.bool) if isinstance(one.ok, Tensor) else self._answers[one.ok]
        measured, heads = self._measure(one.task, one.shared, one.rest.values())
        for head in heads:
            ok = ok & head.isfinite().all().to(self.device, non_blocking=True)
        partials = [part.partials for part in measured]
        squares = partials[0] if len(partials) == 1 and not self._ranks.agrees else self._joint(partials)
        if self._ranks.agrees:
            finite = squares.sum().isfinite() & self._usable[one.task] & (self._healthy != 0)
            ok = torch.as_tensor(self._ranks.agree(ok & finite))
            squares = squares if self.keeps_rows else self._ranks.total(squares)
        taken = torch.empty((), dtype=torch.bool, device=self.device)
        launch(
            kernel, self.device, 1, squares, self._usable, ok, self._healthy, taken, self._squares, *state,
            one.task, len(squares), self._refuses, BLOCK=kernels().TOTAL_BLOCK,
        )  # fmt: skip
        return measured, taken

    def _measure(
        self, task: int, shared: Sequence[Tensor | None], rest: Iterable[Tensor]
    ) -> tuple[list[_Measured], list[Tensor]]:
        """Each segment's squares, non-finite heads among them, and the heads of devices that have no segment."""
        heads: dict[torch.device, list[Tensor]] = {}
        for gradient in rest:
            heads.setdefault(gradient.device, []).append(readable(gradient).contiguous())
        measured = []
        for segment in self._segments:
            own = [plain(shared[i], place) for i, place in zip(segment.members, segment.places, strict=True)]
            beside = heads.pop(segment.device, [])
            gradients, sizes = [*own, *beside], [head.numel() for head in beside]
            *firsts, blocks = accumulate((-(-size // kernels().BLOCK) for size in sizes), initial=0)
            tables = [
                (self._tables.on(segment.device, [*words, *sizes, *firsts]), kind)
                for kind, words in addresses_of(gradients, segment.gradient_dtype).items()
            ]
            partials = torch.empty(segment.blocks + blocks, dtype=segment.wide, device=segment.device)
            for table, kind in tables:
                segment.measure(table, kind, partials, len(beside), task)
            measured.append(_Measured(gradients, tables, partials))
        return measured, [head for together in heads.values() for head in together]

    def _joint(self, partials: Sequence[Tensor]) -> Tensor:
        """One number a segment."""
        return torch.cat([total_of(part).to(self.device, non_blocking=True) for part in partials])


class DeviceRows(_DeviceStore):
    """T averages in T + 1 rows; a table of slots on the device says which row is whose, and which one is spare.

    A pass is averaged into the spare row, which trades places with the task's if all is well. No value depends on
    which row holds what. For arguments and methods see `FlatGradientBuffer`.
    """

    keeps_rows: ClassVar[Literal[True]] = True

    def __init__(
        self, parameters: Sequence[Tensor], tasks: int, dtype: torch.dtype | None = None, ranks: Alone | None = None
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
            segment.weights = tuple(moved(v, segment.device, torch.float64) for v in (terms.keep, terms.gain))

    def add(self, one: Pass) -> Tensor:
        """Average one task's gradients in, if all is well; returns whether, without waiting."""
        slots = self._segments[0].slots
        _, taken = self._take(one, kernels().accept_kernel, slots, self.tasks)
        for segment in self._segments:
            if segment.slots is not slots:
                segment.slots.copy_(slots, non_blocking=True)
        return taken

    def combine(self, weights: Tensor) -> Gradients:
        """``sum_t w_t * ema_t`` for each parameter, of the dtype of its `.grad`, in fresh memory."""
        result: Gradients = [None] * self._number
        block = kernels().SUM_BLOCK
        for segment in self._segments:
            out = torch.empty(segment.length, dtype=segment.gradient_dtype, device=segment.device)
            launch(
                kernels().sum_kernel, segment.device, -(-segment.length // block), segment.rows, segment.slots,
                moved(weights, segment.device), out, self.tasks, segment.length,
                WIDE=triton_dtype(segment.wide), BLOCK=block,
            )  # fmt: skip
            for member, view in segment.views(out):
                result[member] = view
        return result

    def _rows(self) -> list[tuple[Segment, list[Tensor]]]:
        """Each segment's rows in the order of the tasks. Reads the slots."""
        slots = self._segments[0].slots.tolist()[: self.tasks]
        return [(segment, [segment.rows[slot] for slot in slots]) for segment in self._segments]

    def averages(self) -> list[list[Tensor]]:
        """For each parameter its T averages, shaped like it: views of the rows."""
        result: list[list[Tensor]] = [[] for _ in range(self._number)]
        for segment, rows in self._rows():
            for row in rows:
                for member, view in segment.views(row):
                    result[member].append(view)
        return result

    def load_averages(self, averages: Sequence[Sequence[Tensor | None]]) -> None:
        """Overwrite all averages where they lie; None sets zeros."""
        for mine, theirs in zip(self.averages(), averages, strict=True):
            for into, source in zip(mine, theirs, strict=True):
                into.zero_() if source is None else into.copy_(source)

    def row_norms(self) -> Tensor:
        """||row_t|| of the rows as they are, bit for bit what `norms` gives for gradients of the parameters' dtype."""
        # The same kernel averages nothing in: the order of the sum is the same, and the spare row gets a copy.
        for segment in self._segments:
            whole = torch.ones(self.tasks, dtype=torch.float64, device=segment.device)
            segment.weights = (whole, torch.zeros_like(whole))
        nothing: Gradients = [None] * self._number
        measured = [self._measure(task, nothing, [])[0] for task in range(self.tasks)]
        return self._norms(torch.cat([total_of(self._joint([part.partials for part in parts])) for parts in measured]))

    def gram(self) -> Tensor:
        """<ema_s, ema_t> for every pair of tasks, shape (T, T), in double precision."""
        result = torch.zeros(self.tasks, self.tasks, dtype=torch.float64, device=self.device)
        for segment, rows in self._rows():
            for share, place in zip(segment.shares, segment.places, strict=True):
                end = place.start + place.size
                for at in range(place.start, end, _GRAM_PIECE):
                    matrix = torch.stack([row[at : min(at + _GRAM_PIECE, end)].double() for row in rows])
                    result += share * (matrix @ matrix.t()).to(self.device)
        return self._ranks.total(result)

    def clear(self, task: int) -> None:
        """Set the average of `task` back to zero."""
        for _, rows in self._rows():
            rows[task].zero_()


class DeviceSum(_DeviceStore):
    """The running sum of a method without averages: n scalars beside the gradient that arrives. See `RunningSum`."""

    keeps_rows: ClassVar[Literal[False]] = False

    def __init__(self, parameters: Sequence[Tensor], ranks: Alone | None = None, normalise: bool = True) -> None:
        super().__init__(parameters, None, ranks)
        self._normalise, self._totals = normalise, list[Tensor]()

    def start(self, terms: Terms) -> None:
        """Begin a batch, without what an earlier, abandoned one left."""
        super().start(terms)
        self._factors = moved(terms.factors, self.device, torch.float64)
        self._scales = torch.zeros_like(self._squares)
        self._unit = torch.zeros((), dtype=torch.float64, device=self.device)
        # (unit / ||g_t||)**0 is 1: without a rescale each gradient counts as it is.
        power = terms.power if self._normalise else 0.0
        self._power = moved(power, self.device, torch.float64) if isinstance(power, Tensor) else self._unit + power
        self._totals, self._reached = [], set[int]()

    def add(self, one: Pass) -> Tensor:
        """Add one task's gradients, if all is well; returns whether, without waiting."""
        state = (self._scales, self._unit, self._factors, self._power)
        measured, taken = self._take(one, kernels().scale_kernel, *state)
        fresh = not self._totals
        if fresh:
            self._totals = [torch.empty(s.length, dtype=s.wide, device=s.device) for s in self._segments]
        for segment, part, total in zip(self._segments, measured, self._totals, strict=True):
            for table, kind in part.tables:
                launch(
                    kernels().add_kernel, segment.device, segment.blocks, table, *segment.tables, total,
                    moved(self._scales, segment.device), one.task, int(fresh), KIND=triton_dtype(kind[0]),
                    ALIGNED=kind[1], WIDE=triton_dtype(segment.wide), BLOCK=kernels().BLOCK,
                )  # fmt: skip
        self._reached |= {i for i, gradient in enumerate(one.shared) if gradient is not None}
        return taken

    def combine(self, weights: Tensor) -> Gradients:
        """``sum_t w_t * g_t`` for each parameter, in fresh memory; None where no task reached it."""
        scales = self._scales.to(weights.dtype)
        # Each ratio is the common factor; that of the largest scale is the most exact. 0 where no task counts.
        ratios = torch.where(scales > 0, weights / scales, 0.0)
        common = ratios.gather(0, scales.argmax(keepdim=True)).squeeze(0)
        result: Gradients = [None] * self._number
        for segment, total in zip(self._segments, self._totals, strict=False):
            dtype = segment.gradient_dtype
            out = total if total.dtype == dtype else torch.empty_like(total, dtype=dtype)
            torch.mul(total, common.to(segment.device, segment.wide, non_blocking=True), out=out)
            for member, view in segment.views(out):
                result[member] = view if member in self._reached else None
        self._totals, self._reached = [], set()
        return result
