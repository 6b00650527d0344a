"""The averaged gradients of all tasks over the shared parameters: flat rows, one for each task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ._numbers import Flag, Scalar, accumulation_dtype, is_free, joint_norm, real, vector_norm

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

    @property
    def free(self) -> bool:
        """Whether nothing outside this object uses the memory."""
        return is_free(self.flat, 1 + len(self.views))


class _Segment:
    """Parameters of one device and dtype side by side in flat rows: one a task, and a spare one.

    A proposal is written into a spare row. An accepted row trades places with the old one, so that nothing is
    copied and no average ever takes a value that was refused. Between batches the spare row's memory serves as the
    combined gradient, and comes back when nobody uses that any more: fresh memory would cost a page fault every
    1,024 elements, which is more than the sums themselves.
    """

    def __init__(self, members: list[int], places: list[_Place], rows: Sequence[Tensor] | Tensor) -> None:
        self.members = members
        self.places = places
        self.on_cpu = rows[0].is_cpu
        self._rows = [_Row(row, places) for row in rows]
        self._spares: list[_Row] = []
        self._lent: _Row | None = None
        self._proposals: dict[int, tuple[_Row, Scalar]] = {}

    def __getstate__(self) -> dict[str, Any]:
        rows = self.rows()
        # On an accelerator in one block again.
        return {"members": self.members, "places": self.places, "rows": rows if self.on_cpu else torch.stack(rows)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def propose(self, gradients: Sequence[Tensor | None], task: int, beta: float) -> Scalar:
        """Write ``beta * row_t + (1 - beta) * g_t`` into a spare row, unless `add` has; return its norm."""
        if task not in self._proposals:
            old, new = self._rows[task], self._spare()
            if new.flat.dtype != accumulation_dtype(new.flat.dtype):
                for into, view, gradient in zip(new.views, old.views, gradients, strict=True):
                    _average_narrow(into, view, gradient, beta)
            elif len(gradients) == 1 and gradients[0] is not None:
                _average(new.views[0], old.views[0], gradients[0], beta)
            else:
                _gather(new.views, gradients)
                new.flat.lerp_(old.flat, beta)
            self._proposals[task] = new, vector_norm(new.flat)
        return self._proposals[task][1]

    def add(self, gradient: Tensor, task: int, beta: float) -> None:
        """The same at once for the gradient of a segment's only parameter; what comes later is added."""
        if task not in self._proposals:
            self.propose([gradient], task, beta)
            return
        new, _ = self._proposals[task]
        new.views[0].add_(real(gradient), alpha=1 - beta)
        self._proposals[task] = new, vector_norm(new.flat)

    def accept(self, task: int, ok: Flag) -> None:
        """Make the proposal the average where `ok`; a tensor is not read by the host."""
        (new, _), old = self._proposals.pop(task), self._rows[task]
        if isinstance(ok, Tensor):
            torch.where(ok.to(old.flat.device), new.flat, old.flat, out=old.flat)
        elif ok:
            self._rows[task], new = new, old
        self._spares.append(new)

    def forget(self) -> None:
        """Drop the proposals that nobody accepted."""
        self._spares += [new for new, _ in self._proposals.values()]
        self._proposals.clear()

    def rows(self) -> list[Tensor]:
        """The averages, flat, in the order of the tasks."""
        return [row.flat for row in self._rows]

    def proposed_rows(self) -> list[Tensor]:
        """The same with the proposals in place of what they would replace."""
        return [self._proposals[t][0].flat if t in self._proposals else row.flat for t, row in enumerate(self._rows)]

    def load(self, task: int, values: Sequence[Tensor | None]) -> None:
        """Overwrite one average; None sets zeros."""
        for place, value in zip(self.places, values, strict=True):
            view = place.shaped(self._rows[task].flat)
            if value is None:
                view.zero_()
            else:
                view.copy_(value)

    def early(self, task: int) -> bool:
        """Whether this task has a proposal that nobody accepted yet."""
        return task in self._proposals

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """``sum_t w_t * row_t`` in memory that is the caller's for as long as it is used."""
        first = self._rows[0].flat
        dtype = accumulation_dtype(first.dtype)
        if self.on_cpu and dtype == first.dtype:
            self._lent = self._spare()
            return _sum_rows(self.proposed_rows(), weights, self._lent.flat)
        return _sum_rows(self.proposed_rows(), weights, torch.empty_like(first, dtype=dtype))

    def _spare(self) -> _Row:
        if self._lent is not None and self._lent.free:
            self._spares.append(self._lent)
            self._lent = None
        return self._spares.pop() if self._spares else _Row(torch.zeros_like(self._rows[0].flat), self.places)


class FlatGradientBuffer:
    """T rows over all shared parameters: row t is the running average of task t's gradient.

    ``ema_t <- beta * ema_t + (1 - beta) * g_t`` is first proposed; the proposed row's norm is both ``||ema_t||``
    and the test for non-finite values. Only an accepted row takes the place of the old one, so no average ever
    holds a non-finite value. The buffer is the average: there is no second T x n array.

    Small parameters, and all on an accelerator, lie side by side in one contiguous row a task for each (device,
    dtype). On a CPU a parameter of 16,384 elements or more has its part of the row to itself, so that its average is
    made straight from its gradient, without a copy.

    Memory: (T + 1) * n elements of `dtype`, n = the number of shared scalars; 2 T n where all proposals of a
    batch are held back until it is known to be good. On a CPU the last of these rows is what `weighted_sum` returns.

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
        self._segments: list[_Segment] = []
        self._shares: list[float] = []
        together: dict[tuple[torch.device, torch.dtype, float, int], list[int]] = {}
        for index, parameter in enumerate(parameters):
            row, share = dtype or accumulation_dtype(parameter.dtype), 1.0 if shares is None else shares[index]
            alone = parameter.device.type == "cpu" and parameter.numel() >= _ALONE
            together.setdefault((parameter.device, row, share, index if alone else -1), []).append(index)
        for (device, row, share, _), members in together.items():
            places, end = [], 0
            for index in members:
                places.append(_place(parameters[index], end))
                end += math.ceil(places[-1].size / _ALIGNMENT) * _ALIGNMENT
            # Rows of no length would lie at odd places, where there can be no complex numbers.
            self._segments.append(_Segment(members, places, _zero_rows(tasks, max(end, _ALIGNMENT), device, row)))
            self._shares.append(share)
        self._alone = {s.members[0]: s for s in self._segments if len(s.members) == 1}

    @property
    def large(self) -> list[int]:
        """Parameters that gain from `propose_early`: large ones on a CPU."""
        return [index for index, segment in self._alone.items() if segment.on_cpu and segment.places[0].size >= _LARGE]

    def early(self, task: int) -> set[int]:
        """Parameters that `propose_early` has seen for this task since its last `accept`."""
        return {index for index, segment in self._alone.items() if segment.early(task)}

    def propose_early(self, index: int, gradient: Tensor, task: int, beta: float) -> None:
        """Propose one large parameter's part of a row while its gradient is still in cache.

        Called again before `propose`, as by a parameter whose gradient comes in two parts, it adds.
        """
        self._alone[index].add(gradient, task, beta)

    def propose(self, gradients: Sequence[Tensor | None], task: int, beta: float) -> Scalar:
        """Compute ``beta * ema_t + (1 - beta) * g_t`` beside row t, which stays until `accept`.

        Args:
            gradients: g_t, one entry for each parameter; None counts as zeros, except where `propose_early` has
                seen it.
            task: t.
            beta: weight of the old average.

        Returns:
            The norm of the proposed row; not finite exactly where the row holds a non-finite value or its norm
            overflows. On a CPU a number, on an accelerator a scalar tensor that nobody has waited for.
        """
        norms = [
            segment.propose([gradients[member] for member in segment.members], task, beta) for segment in self._segments
        ]
        return joint_norm(norms, self.device, self._shares)

    def accept(self, task: int, ok: Flag, norm: Scalar, factor: Scalar = 1.0) -> None:  # noqa: ARG002
        """Make the proposed row the average of `task` if `ok`; else drop it. The rest is of no matter here.

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

        The memory is the caller's until the last view of it goes.

        Proposals that are neither accepted nor dropped count as accepted.
        """
        result: list[Tensor | None] = [None] * self._number
        for segment in self._segments:
            total = segment.weighted_sum(weights)
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


def _zero_rows(tasks: int, length: int, device: torch.device, dtype: torch.dtype) -> Sequence[Tensor]:
    """T rows; on an accelerator in one block, for one product with all of them."""
    if device.type == "cpu":
        return [torch.zeros(length, dtype=dtype) for _ in range(tasks)]
    return torch.zeros(tasks, length, device=device, dtype=dtype).unbind()


def _place(parameter: Tensor, start: int) -> _Place:
    dense = torch.empty_like(parameter, device="meta")
    if dense.is_complex():
        dense = torch.view_as_real(dense)
    return _Place(start, dense.numel(), tuple(dense.shape), tuple(dense.stride()), parameter.dtype)


def _average(into: Tensor, old: Tensor, gradient: Tensor, beta: float) -> None:
    """into <- beta * old + (1 - beta) * gradient; `into` has the layout of `old`."""
    dense = real(gradient)
    if dense.dtype == into.dtype:
        torch.lerp(dense, old, beta, out=into)
    else:
        into.copy_(dense).lerp_(old, beta)


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


def _sum_rows(rows: Sequence[Tensor], weights: Tensor, out: Tensor) -> Tensor:
    """out <- sum_t weights[t] * rows[t] in float32 or wider, on a CPU in the order of the tasks; returns `out`.

    A matrix-vector product is one kernel, which counts on an accelerator; on a CPU it is no faster than adding
    rows piece by piece in cache, and its rounding depends on where the rows lie.
    """
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
    pieces = [torch.split(row, _SUM_PIECE) for row, _ in terms]
    for into, *parts in zip(torch.split(out, _SUM_PIECE), *pieces, strict=True):
        torch.mul(parts[0], terms[0][1], out=into)
        for part, (_, weight) in zip(parts[1:], terms[1:], strict=True):
            into.add_(part, alpha=weight)
    return out


def _as_matrix(rows: Sequence[Tensor]) -> Tensor | None:
    """The rows as one strided (T, n) view where they lie evenly in one block, else None."""
    steps = {after.storage_offset() - before.storage_offset() for before, after in pairwise(rows)}
    step = min(steps, default=0)
    together = len({row.untyped_storage().data_ptr() for row in rows}) == 1
    if len(steps) != 1 or step <= 0 or not together:
        return None
    return rows[0].as_strided((len(rows), rows[0].numel()), (step, 1))
