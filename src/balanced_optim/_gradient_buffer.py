"""The averaged gradients of all tasks over the shared parameters: flat rows, one for each task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ._numbers import Flag, Scalar, accumulation_dtype, joint_norm, real, vector_norm

# A weighted sum is built in pieces of this many elements, which stay in a CPU's cache.
_SUM_PIECE = 1 << 20
# Parameters start at multiples of this many elements, so that vectorised kernels find them aligned.
_ALIGNMENT = 16
# On a CPU a parameter of at least this many elements is kept on its own, not copied into a flat row.
_ALONE = 1 << 14
# From this size on its gradient is averaged as soon as it is there, while it is in cache.
_LARGE = 1 << 17


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


class _Row:
    """One flat vector and the views of each parameter into it."""

    __slots__ = ("flat", "views")

    def __init__(self, flat: Tensor, places: Sequence[_Place]) -> None:
        self.flat = flat
        self.views = [place.view(flat) for place in places]


class _Run:
    """Parameters of one device and dtype side by side in T + 1 flat rows.

    A proposal is written into a spare row. An accepted row trades places with the old one, so that nothing is
    copied and no average ever takes a value that was refused.
    """

    def __init__(self, members: list[int], places: list[_Place], rows: Tensor) -> None:
        self.members = members
        self.places = places
        self._rows = [_Row(row, places) for row in rows[:-1]]
        self._spares = [_Row(rows[-1], places)]
        self._proposals: dict[int, _Row] = {}

    def __getstate__(self) -> dict[str, Any]:
        rows = torch.stack([row.flat for row in [*self._rows, self._rows[0]]])
        return {"members": self.members, "places": self.places, "rows": rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def propose(self, gradients: Sequence[Tensor | None], task: int, beta: float, owned: bool) -> Scalar:  # noqa: ARG002
        """Write ``beta * row_t + (1 - beta) * g_t`` into a spare row; return its norm."""
        old = self._rows[task]
        new = self._spares.pop() if self._spares else _Row(torch.zeros_like(old.flat), self.places)
        self._proposals[task] = new
        if new.flat.dtype == accumulation_dtype(new.flat.dtype):
            _gather(new.views, gradients)
            new.flat.lerp_(old.flat, beta)
        else:
            for into, view, gradient in zip(new.views, old.views, gradients, strict=True):
                _average_narrow(into, view, gradient, beta)
        return vector_norm(new.flat)

    def accept(self, task: int, ok: Flag) -> None:
        """Make the proposal the average where `ok`; a tensor is not read by the host."""
        new, old = self._proposals.pop(task), self._rows[task]
        if isinstance(ok, Tensor):
            torch.where(ok.to(old.flat.device), new.flat, old.flat, out=old.flat)
        elif ok:
            self._rows[task], new = new, old
        self._spares.append(new)

    def forget(self) -> None:
        """Drop the proposals that nobody accepted."""
        self._spares += self._proposals.values()
        self._proposals.clear()

    def rows(self) -> list[Tensor]:
        """The averages, flat, in the order of the tasks."""
        return [row.flat for row in self._rows]

    def proposed_rows(self) -> list[Tensor]:
        """The same with the proposals in place of what they would replace."""
        return [self._proposals.get(task, row).flat for task, row in enumerate(self._rows)]

    def load(self, task: int, values: Sequence[Tensor | None]) -> None:
        """Overwrite one average; None sets zeros."""
        for place, value in zip(self.places, values, strict=True):
            view = place.shaped(self._rows[task].flat)
            if value is None:
                view.zero_()
            else:
                view.copy_(value)


class _Single:
    """One larger parameter on a CPU, each average in a tensor of its own.

    The average is made in the very memory that the backward pass wrote the gradient to: nothing is copied, and
    what is read is still in cache. The old average is freed when the new one is accepted.
    """

    def __init__(self, index: int, place: _Place, rows: Tensor) -> None:
        self.members = [index]
        self.places = [place]
        self._rows = [row.clone() for row in rows]
        self._proposals: dict[int, tuple[Tensor, float]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_proposals": {}}

    def propose(self, gradients: Sequence[Tensor | None], task: int, beta: float, owned: bool) -> float:
        """Turn g_t into ``beta * row_t + (1 - beta) * g_t`` in place, or in a copy unless it is `owned`."""
        if task not in self._proposals:
            self.add(gradients[0], task, beta, owned)
        return self._proposals[task][1]

    def add(self, gradient: Tensor | None, task: int, beta: float, owned: bool) -> None:
        """The same for a gradient that may come in several parts: what comes later is added."""
        if task in self._proposals and gradient is not None:
            new = self._proposals[task][0]
            new += (1 - beta) * self._flat(gradient, owned=False).to(new.dtype)
        else:
            new = self._average(gradient, self._rows[task], beta, owned)
        norm = vector_norm(new)
        self._proposals[task] = new, float(norm)

    def accept(self, task: int, ok: Flag) -> None:
        """Make the proposal the average where `ok`."""
        new, _ = self._proposals.pop(task)
        if ok:
            self._rows[task] = new

    def forget(self) -> None:
        """Drop the proposals that nobody accepted."""
        self._proposals.clear()

    def rows(self) -> list[Tensor]:
        """The averages, flat, in the order of the tasks."""
        return self._rows

    def proposed_rows(self) -> list[Tensor]:
        """The same with the proposals in place of what they would replace."""
        return [self._proposals[t][0] if t in self._proposals else row for t, row in enumerate(self._rows)]

    def load(self, task: int, values: Sequence[Tensor | None]) -> None:
        """Overwrite one average; None sets zeros."""
        view = self.places[0].shaped(self._rows[task])
        if values[0] is None:
            view.zero_()
        else:
            view.copy_(values[0])

    def early(self, task: int) -> bool:
        """Whether a part of this task's gradient was seen by `add`."""
        return task in self._proposals

    def _average(self, gradient: Tensor | None, old: Tensor, beta: float, owned: bool) -> Tensor:
        if gradient is None:
            return old * beta
        if old.dtype == accumulation_dtype(old.dtype):
            return self._flat(gradient, owned, old.dtype).lerp_(old, beta)
        new = torch.empty_like(old)
        _average_narrow(new, old, self._flat(gradient, owned=True), beta)
        return new

    def _flat(self, gradient: Tensor, owned: bool, dtype: torch.dtype | None = None) -> Tensor:
        """The gradient as a flat vector in the order of the rows: its own memory if that is right and `owned`."""
        place = self.places[0]
        dense = real(gradient)
        fits = dense.stride() == place.stride and dtype in (None, dense.dtype)
        # A view into something larger would keep all of that alive.
        if not (owned and fits and dense.untyped_storage().nbytes() == place.size * dense.itemsize):
            wanted = torch.empty_strided(place.shape, place.stride, dtype=dtype or dense.dtype, device=dense.device)
            dense = wanted.copy_(dense)
        return dense.as_strided((place.size,), (1,), dense.storage_offset())


class FlatGradientBuffer:
    """T rows over all shared parameters: row t is the running average of task t's gradient.

    ``ema_t <- beta * ema_t + (1 - beta) * g_t`` is first proposed; the proposed row's norm is both ``||ema_t||``
    and the test for non-finite values. Only an accepted row takes the place of the old one, so no average ever
    holds a non-finite value. The buffer is the average: there is no second T x n array.

    Small parameters, and all on an accelerator, lie side by side in one contiguous row a task for each (device,
    dtype). On a CPU a parameter of 16,384 elements or more has its part of the row to itself: there the average
    is made in the gradient's own memory, without a copy.

    Memory: (T + 1) * n elements of `dtype`, n = the number of shared scalars; 2 T n where all proposals of a
    batch are held back until it is known to be good.

    Args:
        parameters: the shared parameters; only shapes, strides, devices and dtypes are read.
        tasks: T, the number of rows.
        dtype: of the rows; None takes float32, or float64 for float64 parameters. Half precision rows halve
            the memory; updates, norms and sums are still computed in float32.
        shares: for each parameter what part of its squared norm counts, None for all of it: where several processes
            hold it, so that the sum over them is right.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        tasks: int,
        dtype: torch.dtype | None = None,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.tasks = tasks
        self.device = parameters[0].device
        """Where norms are gathered: the device of the first shared parameter."""
        self._number = len(parameters)
        self._segments: list[_Run | _Single] = []
        self._shares: list[float] = []
        runs: dict[tuple[torch.device, torch.dtype, float], list[int]] = {}
        for index, parameter in enumerate(parameters):
            row, share = dtype or accumulation_dtype(parameter.dtype), 1.0 if shares is None else shares[index]
            if parameter.device.type == "cpu" and parameter.numel() >= _ALONE:
                place = _place(parameter, 0)
                self._segments.append(
                    _Single(index, place, torch.zeros((), dtype=row, device=parameter.device).expand(tasks, place.size))
                )
                self._shares.append(share)
            else:
                runs.setdefault((parameter.device, row, share), []).append(index)
        for (device, row, share), members in runs.items():
            places, end = [], 0
            for index in members:
                places.append(_place(parameters[index], end))
                end += math.ceil(places[-1].size / _ALIGNMENT) * _ALIGNMENT
            # Rows of no length would lie at odd places, where there can be no complex numbers.
            end = max(end, _ALIGNMENT)
            self._segments.append(_Run(members, places, torch.zeros(tasks + 1, end, device=device, dtype=row)))
            self._shares.append(share)
        self._singles = {s.members[0]: s for s in self._segments if isinstance(s, _Single)}

    @property
    def large(self) -> list[int]:
        """Parameters that gain from `propose_early`: large ones on a CPU."""
        return [index for index, single in self._singles.items() if single.places[0].size >= _LARGE]

    def early(self, task: int) -> set[int]:
        """Parameters that `propose_early` has seen for this task since its last `accept`."""
        return {index for index, single in self._singles.items() if single.early(task)}

    def propose_early(self, index: int, gradient: Tensor, task: int, beta: float) -> None:
        """Propose one large parameter's part of a row while its gradient, which is overwritten, is still in cache.

        Called again before `propose`, as by a parameter whose gradient comes in two parts, it adds.
        """
        self._singles[index].add(gradient, task, beta, owned=True)

    def propose(self, gradients: Sequence[Tensor | None], task: int, beta: float, *, owned: bool = False) -> Scalar:
        """Compute ``beta * ema_t + (1 - beta) * g_t`` beside row t, which stays until `accept`.

        Args:
            gradients: g_t, one entry for each parameter; None counts as zeros, except where `propose_early` has
                seen it.
            task: t.
            beta: weight of the old average.
            owned: the gradients may be overwritten and their memory kept.

        Returns:
            The norm of the proposed row; not finite exactly where the row holds a non-finite value or its norm
            overflows. On a CPU a number, on an accelerator a scalar tensor that nobody has waited for.
        """
        norms = [
            segment.propose([gradients[member] for member in segment.members], task, beta, owned)
            for segment in self._segments
        ]
        return joint_norm(norms, self.device, self._shares)

    def accept(self, task: int, ok: Flag, norm: Scalar) -> None:  # noqa: ARG002
        """Make the proposed row, whose norm is of no matter here, the average of `task` if `ok`; else drop it.

        With a Python bool two rows trade places. A boolean tensor is not read by the host of an accelerator: the
        row is copied or kept on the device.
        """
        for segment in self._segments:
            segment.accept(task, ok)

    def forget_batch(self) -> None:
        """Drop every proposal that was not accepted."""
        for segment in self._segments:
            segment.forget()

    def clear(self, task: int) -> None:
        """Set the average of `task` back to zero."""
        for segment in self._segments:
            segment.rows()[task].zero_()

    def weighted_sum(self, weights: Tensor) -> list[Tensor | None]:
        """``sum_t w_t * ema_t`` for each parameter, shaped like it, of float32 or wider; `weights` of shape (T,).

        Proposals that are neither accepted nor dropped count as accepted.
        """
        result: list[Tensor | None] = [None] * self._number
        for segment in self._segments:
            total = _sum_rows(segment.proposed_rows(), weights)
            for member, place in zip(segment.members, segment.places, strict=True):
                result[member] = place.shaped(total)
        return result

    @property
    def norm_dtype(self) -> torch.dtype:
        """float32, or float64 where a row is of double precision."""
        wide = any(segment.rows()[0].dtype == torch.float64 for segment in self._segments)
        return torch.float64 if wide else torch.float32

    def norms(self) -> list[Scalar]:
        """||ema_t|| of every task: bit for bit what `propose` returned for each."""
        return [
            joint_norm([vector_norm(segment.rows()[task]) for segment in self._segments], self.device, self._shares)
            for task in range(self.tasks)
        ]

    def averages(self, *, proposed: bool = False) -> list[list[Tensor]]:
        """For each parameter its T averages, shaped like it: views of the rows, valid until the next step.

        With `proposed`, proposals that are neither accepted nor dropped count as accepted.
        """
        result: list[list[Tensor]] = [[] for _ in range(self._number)]
        for segment in self._segments:
            for member, place in zip(segment.members, segment.places, strict=True):
                rows = segment.proposed_rows() if proposed else segment.rows()
                result[member] = [place.shaped(row) for row in rows]
        return result

    def load_averages(self, averages: Sequence[Sequence[Tensor | None]]) -> None:
        """Overwrite all averages: for each parameter T tensors shaped like it; None sets zeros."""
        for segment in self._segments:
            for task in range(self.tasks):
                segment.load(task, [averages[member][task] for member in segment.members])

    def gram(self) -> Tensor:
        """<ema_s, ema_t> for every pair of tasks, shape (T, T), float64; one read of the rows."""
        total = torch.zeros(self.tasks, self.tasks, device=self.device, dtype=torch.float64)
        for segment, share in zip(self._segments, self._shares, strict=True):
            pieces = [torch.split(row, _SUM_PIECE) for row in segment.rows()]
            for columns in zip(*pieces, strict=True):
                wide = torch.stack(columns).to(accumulation_dtype(columns[0].dtype))
                # The caller may be under autocast, which would multiply in half precision.
                with torch.autocast(wide.device.type, enabled=False):
                    total += share * (wide @ wide.t()).to(total.device, total.dtype)
        return total


def _place(parameter: Tensor, start: int) -> _Place:
    dense = torch.empty_like(parameter, device="meta")
    if dense.is_complex():
        dense = torch.view_as_real(dense)
    return _Place(start, dense.numel(), tuple(dense.shape), tuple(dense.stride()), parameter.dtype)


def _average_narrow(into: Tensor, old: Tensor, gradient: Tensor | None, beta: float) -> None:
    """into <- beta * old + (1 - beta) * gradient for rows of half precision, computed in float32."""
    if gradient is None:
        torch.mul(old, beta, out=into)
        return
    wide = accumulation_dtype(into.dtype)
    into.copy_(torch.lerp(real(gradient).to(wide), old.to(wide), beta))


def _gather(views: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """views <- gradients, zeros for None."""
    present = [(view, real(g)) for view, g in zip(views, gradients, strict=True) if g is not None]
    if len(present) < len(views):
        torch._foreach_zero_([view for view, g in zip(views, gradients, strict=True) if g is None])
    if present:
        targets, sources = zip(*present, strict=True)
        torch._foreach_copy_(targets, sources)


def _sum_rows(rows: Sequence[Tensor], weights: Tensor) -> Tensor:
    """sum_t weights[t] * rows[t] in float32 or wider, on a CPU in the order of the tasks.

    A matrix-vector product is one kernel, which counts on an accelerator; on a CPU it is no faster than adding
    rows piece by piece in cache, and its rounding depends on where the rows lie.
    """
    first = rows[0]
    out = torch.empty(first.numel(), device=first.device, dtype=accumulation_dtype(first.dtype))
    if out.device.type != "cpu":
        weights = weights.to(out.device, out.dtype)
        matrix = _as_matrix(rows)
        if matrix is not None and matrix.dtype == out.dtype:
            torch.mv(matrix.t(), weights, out=out)
        else:
            out.zero_()
            for row, weight in zip(rows, weights, strict=True):
                out.addcmul_(row, weight)
        return out
    terms = [(row, weight) for row, weight in zip(rows, weights.tolist(), strict=True) if weight != 0]
    if not terms:
        return out.zero_()
    for start in range(0, out.numel(), _SUM_PIECE):
        piece = slice(start, start + _SUM_PIECE)
        for index, (row, weight) in enumerate(terms):
            if index == 0:
                torch.mul(row[piece], weight, out=out[piece])
            else:
                out[piece].add_(row[piece], alpha=weight)
    return out


def _as_matrix(rows: Sequence[Tensor]) -> Tensor | None:
    """The rows as one strided (T, n) view where they lie evenly in one block, else None."""
    steps = {after.storage_offset() - before.storage_offset() for before, after in pairwise(rows)}
    step = min(steps, default=0)
    together = len({row.untyped_storage().data_ptr() for row in rows}) == 1
    if len(steps) != 1 or step <= 0 or not together:
        return None
    return rows[0].as_strided((len(rows), rows[0].numel()), (step, 1))
