"""Where task gradients go: rows of averages, in torch, for a CPU and wherever Triton is missing.

A store takes each pass (`add`), gives the norms, and the weighted sum (`combine`). `_running_sum` does the same without
averages, `_cuda_store` in fused kernels. On a CPU numbers are Python's; elsewhere they are tensors that nobody waits
for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ._meeting import Alone
from ._numbers import (
    Flag,
    Scalar,
    accumulation_dtype,
    on_device,
    real,
    square_of,
    squares_of,
    stack_scalars,
    total_of,
    widest,
)
from ._passes import Gradients, Pass
from ._rule import Terms

# On a CPU rows up to this length are added by one product; longer ones row by row, which their memory is faster for.
_AT_ONCE = 1 << 19
# A Gram matrix is built in pieces of this many elements, which stay in a CPU's cache.
_GRAM_PIECE = 1 << 18
# Parameters start at multiples of this many elements, so that vectorised kernels find them aligned.
_ALIGNMENT = 16
# On a CPU a parameter of at least this many elements has a row of its own, averaged straight from its gradient.
_ALONE = 1 << 17


def finite(one: Pass, device: torch.device) -> Flag:
    """Whether every gradient of a pass is finite, and no square overflows."""
    gradients = [gradient for gradient in one.shared if gradient is not None]
    return (total_of(squares_of([*gradients, *one.rest.values()]), device) < math.inf) & one.ok


class Judge:
    """What rows and running sum have in common: whether a task counts, and the squares of its norm."""

    device: torch.device
    norm_dtype: torch.dtype
    terms: Terms

    def __init__(self, device: torch.device, ranks: Alone) -> None:
        self.device, self.ranks = device, ranks
        self._squares: list[Scalar] = []
        self._healthy: Flag = True

    def start(self, terms: Terms) -> None:
        """Begin a batch."""
        self.terms, self._healthy = terms, True
        self._squares = [math.nan] * len(terms.usable)

    def judge(self, one: Pass, squares: Sequence[Scalar]) -> Flag:
        """Whether the task counts, `squares` being those of its shared gradients as they are stored."""
        square = total_of([*squares, *squares_of(one.rest.values())], self.device)
        ok = (square < math.inf) & self.terms.usable[one.task] & one.ok & self._healthy
        ok = self.ranks.agree(ok)
        if self.terms.refuses:
            self._healthy = ok
        return ok

    def record(self, task: int, square: Scalar, ok: Flag) -> None:
        if isinstance(ok, Tensor):
            square = torch.where(ok, torch.as_tensor(square, device=ok.device), math.nan)
        self._squares[task] = square if ok is not False else math.nan

    def norms(self) -> Tensor:
        """||ema_t|| of every task, shape (T,); NaN where it was absent or refused."""
        return self._roots(self._squares)

    def _roots(self, squares: Sequence[Scalar]) -> Tensor:
        """Norms from the squares that this rank has."""
        if self.ranks.agrees or on_device(self.device):
            total = self.ranks.total(stack_scalars(squares, widest(self.device), self.device))
            return total.sqrt().to(self.norm_dtype)
        # In Python's double precision, of which a float32 model makes no tensor.
        return stack_scalars([math.sqrt(square) for square in squares], self.norm_dtype, self.device)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one parameter lies: `size` real elements from `start` on, in the parameter's own shape and stride."""

    start: int
    size: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, row: Tensor) -> Tensor:
        """The parameter's part of a flat row, shaped and strided like the parameter (complex as pairs)."""
        return row.as_strided(self.shape, self.stride, row.storage_offset() + self.start)

    def shaped(self, row: Tensor) -> Tensor:
        """The same with complex numbers."""
        view = self.view(row)
        return torch.view_as_complex(view) if self.dtype.is_complex else view


class _Segment:
    """Parameters of one device and dtype side by side in T flat rows."""

    def __init__(self, members: list[int], places: list[_Place], block: Tensor, share: float, straight: bool) -> None:
        self.members, self.places, self.block, self.share = members, places, block, share
        # One parameter, averaged straight from its gradient, which is only read.
        self.straight = straight
        self.rows = list(block.unbind())
        self._views = [places[0].view(row) for row in self.rows]
        self._scratch: Tensor | None = None
        self._targets: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("members", "places", "block", "share", "straight")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, Scalar]:
        """The gradients in one tensor of the row's form and float32 or wider; the square as the row would store it.

        None where there is none, so that nothing is added. The tensor is good until the next call.
        """
        if all(gradient is None for gradient in gradients):
            return None, 0.0
        wide = self._gathered(gradients)
        stored = wide if wide.dtype == self.block.dtype else wide.to(self.block.dtype)
        return wide, square_of(stored)

    def _gathered(self, gradients: Sequence[Tensor | None]) -> Tensor:
        wide = accumulation_dtype(self.block.dtype)
        if self.straight and gradients[0] is not None:
            return real(gradients[0]).to(wide)
        if self._scratch is None:
            self._scratch = torch.zeros_like(self.rows[0], dtype=wide)
            self._targets = [place.view(self._scratch) for place in self.places]
        targets, sources = self._targets, [None if gradient is None else real(gradient) for gradient in gradients]
        if any(source is None for source in sources):
            torch._foreach_zero_([view for view, source in zip(targets, sources, strict=True) if source is None])
            targets = [view for view, source in zip(targets, sources, strict=True) if source is not None]
        torch._foreach_copy_(targets, [source for source in sources if source is not None])
        return self._scratch

    def average(self, task: int, gradient: Tensor | None, keep: Scalar, gain: Scalar, ok: Flag) -> Scalar:
        """row <- keep * row + gain * gradient in place where `ok`; the new row's square."""
        row = self.rows[task]
        into = self._views[task] if self.straight else row
        if isinstance(ok, Tensor):
            weights = [torch.as_tensor(number, device=row.device) for number in (keep, gain)]
            _average_where(row, gradient, weights[0], weights[1], ok)
        elif gradient is None:
            into.mul_(keep)
        elif row.dtype != gradient.dtype:
            into.copy_(into.to(gradient.dtype).mul_(keep).add_(gradient, alpha=float(gain)))
        elif keep == 0:
            torch.mul(gradient, gain, out=into)
        else:
            into.lerp_(gradient, gain)
        return square_of(row)

    def load(self, task: int, values: Sequence[Tensor | None]) -> None:
        """Overwrite one average; None sets zeros."""
        for place, value in zip(self.places, values, strict=True):
            view = place.shaped(self.rows[task])
            if value is None:
                view.zero_()
            elif value.data_ptr() != view.data_ptr():
                view.copy_(value)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """``sum_t w_t * row_t`` in fresh memory of float32 or wider."""
        dtype, waits_for_nobody = accumulation_dtype(self.block.dtype), on_device(self.block.device)
        weights = weights.to(self.block.device, dtype)
        if self.block.dtype == dtype and (waits_for_nobody or self.block.shape[1] <= _AT_ONCE):
            # The caller may be under autocast, which would multiply in half precision.
            with torch.autocast(weights.device.type, enabled=False):
                return torch.mv(self.block.t(), weights)
        out = torch.zeros_like(self.rows[0], dtype=dtype) if waits_for_nobody else None
        for row, weight in zip(self.rows, weights.unbind() if out is not None else weights.tolist(), strict=True):
            if isinstance(weight, Tensor):
                out = out.addcmul_(row.to(dtype), weight)  # type: ignore[union-attr]
            else:
                out = torch.mul(row.to(dtype), weight) if out is None else out.add_(row, alpha=weight)
        return out  # type: ignore[return-value]


def _average_where(row: Tensor, gradient: Tensor | None, keep: Tensor, gain: Tensor, ok: Tensor) -> None:
    """row <- keep * row + gain * gradient where `ok`, a scalar of the device; `gradient` is a buffer of ours."""
    wide, ok = accumulation_dtype(row.dtype), ok.to(row.device)
    if gradient is None:
        row.mul_(torch.where(ok, keep.to(row.device), 1.0).to(row.dtype))
        return
    # A weight of 0 leaves the row as it is, bit for bit, once the NaN that refused it is gone. `keep` is 1 - `gain`, or
    # 0 for a row that is still zeros.
    gradient.masked_fill_(~ok, 0.0)
    weight = torch.where(ok, gain.to(row.device), 0.0).to(wide)
    if row.dtype == wide:
        row.lerp_(gradient, weight)
    else:
        row.copy_(row.to(wide).lerp_(gradient, weight))


class FlatGradientBuffer(Judge):
    """T rows over all shared parameters: row t is the running average of task t's gradient.

    ``ema_t <- beta_k * ema_t + (1 - beta_k) * g_t`` in place, once g_t is known to be finite as the row would store it:
    then the average is too, since ``||ema_t|| <= max(||old||, ||g_t||)``. So no average ever takes a value that is not
    finite. The buffer is the average: there is no second T x n array.

    Small parameters, and all on an accelerator, lie side by side in one contiguous row a task for each (device,
    dtype). On a CPU a parameter of 131,072 elements or more has rows to itself and is averaged straight from its
    gradient.

    Memory: T * n elements of `dtype`, n = the number of shared scalars, and n more for what lies side by side;
    `combine` returns n fresh ones.

    Args:
        parameters: the shared parameters; only shapes, strides, devices and dtypes are read.
        tasks: T, the number of rows.
        dtype: of the rows; None takes float32, or float64 for float64 parameters. Half precision rows halve
            the memory; updates, norms and sums are still computed in float32.
        ranks: where they hold parts of every row, how they agree and what part of a square counts.
        device: where norms are gathered; None: that of the first parameter.
    """

    keeps_rows: ClassVar[Literal[True]] = True

    def __init__(
        self,
        parameters: Sequence[Tensor],
        tasks: int,
        dtype: torch.dtype | None = None,
        ranks: Alone | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(device or parameters[0].device, ranks or Alone())
        self.tasks, self._number = tasks, len(parameters)
        shares = self.ranks.shares or [1.0] * len(parameters)
        together: dict[tuple[torch.device, torch.dtype, float, int], list[int]] = {}
        for index, parameter in enumerate(parameters):
            alone = not on_device(self.device) and parameter.device.type == "cpu" and parameter.numel() >= _ALONE
            kind = parameter.device, dtype or accumulation_dtype(parameter.dtype), shares[index], index if alone else -1
            together.setdefault(kind, []).append(index)
        self._segments: list[_Segment] = []
        for (where, row, share, own), members in together.items():
            places, end = [], 0
            for index in members:
                places.append(_place(parameters[index], end))
                end += math.ceil(places[-1].size / _ALIGNMENT) * _ALIGNMENT
            # Rows of no length would lie at odd places, where there can be no complex numbers.
            block = torch.zeros(tasks, max(end, _ALIGNMENT), device=where, dtype=row)
            self._segments.append(_Segment(members, places, block, share, own >= 0))
        wide = any(segment.block.dtype == torch.float64 for segment in self._segments)
        self.norm_dtype = torch.float64 if wide else torch.float32

    def add(self, one: Pass) -> Flag:
        """Take one task's gradients into its average if all is well; return whether it was."""
        task, terms = one.task, self.terms
        read = [segment.read([one.shared[member] for member in segment.members]) for segment in self._segments]
        ok = self.judge(one, [square for _, square in read])
        if ok is False:
            return ok
        squares = [
            weighed(segment.average(task, gradient, terms.keep[task], terms.gain[task], ok), segment.share)
            for segment, (gradient, _) in zip(self._segments, read, strict=True)
        ]
        self.record(task, total_of(squares, self.device), ok)
        return ok

    def combine(self, weights: Tensor) -> Gradients:
        """``sum_t w_t * ema_t`` for each parameter, shaped like it, of float32 or wider; `weights` of shape (T,).

        The memory is fresh, and the caller's.
        """
        result: Gradients = [None] * self._number
        for segment in self._segments:
            total = segment.weighted_sum(weights)
            for member, place in zip(segment.members, segment.places, strict=True):
                result[member] = place.shaped(total)
        return result

    def clear(self, task: int) -> None:
        """Set the average of `task` back to zero."""
        for segment in self._segments:
            segment.rows[task].zero_()

    def row_norms(self) -> Tensor:
        """||ema_t|| of every row as it is, shape (T,)."""
        squares = [
            total_of([weighed(square_of(segment.rows[task]), segment.share) for segment in self._segments], self.device)
            for task in range(self.tasks)
        ]
        return self._roots(squares)

    def averages(self) -> list[list[Tensor]]:
        """For each parameter its T averages, shaped like it: views of the rows, valid until the next step."""
        result: list[list[Tensor]] = [[] for _ in range(self._number)]
        for segment in self._segments:
            for member, place in zip(segment.members, segment.places, strict=True):
                result[member] = [place.shaped(row) for row in segment.rows]
        return result

    def load_averages(self, averages: Sequence[Sequence[Tensor | None]]) -> None:
        """Overwrite all averages in place: for each parameter T tensors shaped like it; None sets zeros."""
        for segment in self._segments:
            for task in range(self.tasks):
                segment.load(task, [averages[member][task] for member in segment.members])

    def gram(self) -> Tensor:
        """<ema_s, ema_t> for every pair of tasks, shape (T, T); one read of the rows."""
        dtype = self.norm_dtype
        total = torch.zeros(self.tasks, self.tasks, device=self.device, dtype=dtype)
        for segment in self._segments:
            for columns in torch.split(segment.block, _GRAM_PIECE, 1):
                wide = columns.to(accumulation_dtype(columns.dtype))
                with torch.autocast(wide.device.type, enabled=False):
                    total += segment.share * (wide @ wide.t()).to(total.device, dtype)
        return self.ranks.total(total)


def weighed(square: Scalar, share: float) -> Scalar:
    return square if share == 1 else square * share


def _place(parameter: Tensor, start: int) -> _Place:
    like = torch.empty_like(parameter, device="meta")
    if like.is_complex():
        like = torch.view_as_real(like)
    return _Place(start, like.numel(), tuple(like.shape), tuple(like.stride()), parameter.dtype)
