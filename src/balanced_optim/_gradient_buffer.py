"""The two stores that task gradients go into: flat rows for averages, a running sum where none are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# A CPU sums squares in pieces of this many elements: in one go over 1e8 elements float32 is 1 % off.
_DOT_PIECE = 1 << 16
# A weighted sum is built in pieces of this many elements, which stay in a CPU's cache.
_SUM_PIECE = 1 << 20
# Parameters start at multiples of this many elements, so that vectorised kernels find them aligned.
_ALIGNMENT = 16
# On a CPU a parameter of at least this many elements is averaged on its own, as soon as its gradient is there:
# that saves a copy, finds the gradient in cache, and frees it before the next is made.
_LARGE = 1 << 17


# What a CPU knows at once is a Python number, what another device computes a scalar tensor that nobody waits for.
Scalar = float | Tensor
Flag = bool | Tensor


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one parameter lies: `size` real elements of block `block` from `start` on."""

    block: int
    start: int
    size: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, row: Tensor) -> Tensor:
        """The parameter's part of a flat row, shaped and strided like the parameter (complex as pairs)."""
        return row.as_strided(self.shape, self.stride, row.storage_offset() + self.start)


@dataclass(frozen=True, slots=True)
class _Segment:
    """Columns [start, stop) of a block that are processed together: one large parameter, or a run of others."""

    start: int
    stop: int
    members: tuple[int, ...]
    alone: bool


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where `dtype` is double precision."""
    return torch.promote_types(dtype.to_real(), torch.float32)


def _real(gradient: Tensor) -> Tensor:
    """The gradient as a dense real tensor; a complex one becomes pairs of real numbers."""
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    if gradient.is_complex():
        return torch.view_as_real(gradient.resolve_conj())
    return gradient


def _joint_norm(norms: Sequence[Scalar], device: torch.device) -> Scalar:
    """||(a, b, ...)||_2 from the norms of the parts: a number on a CPU, a tensor on another `device`."""
    if device.type == "cpu":
        return math.hypot(*[float(norm) for norm in norms])
    tensors = [torch.as_tensor(norm).to(device) for norm in norms]
    dtype = torch.float64 if any(norm.dtype == torch.float64 for norm in tensors) else torch.float32
    joint: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(dtype) for norm in tensors]))
    return joint


def stack_scalars(values: Sequence[Scalar], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers and scalar tensors as one vector on `device`; NaN numbers stand for what is missing."""
    if device.type == "cpu":
        return torch.tensor([float(value) for value in values], dtype=dtype)
    return torch.stack(
        [
            v.to(device, dtype) if isinstance(v, Tensor) else torch.full((), v, dtype=dtype, device=device)
            for v in values
        ]
    )


class FlatGradientBuffer:
    """T rows over all shared parameters: row t is the running average of task t's gradient.

    ``ema_t <- beta * ema_t + (1 - beta) * g_t`` is written into one spare row, whose norm is both
    ``||ema_t||`` and the test for non-finite values. An accepted row trades places with the old one, so no
    average ever holds a non-finite value and none is copied. The buffer is the average: there is no second
    T x n array.

    Memory: (T + 1) * n elements of `dtype`, n = the number of shared scalars, in one contiguous block for
    each (device, dtype).

    Args:
        parameters: the shared parameters; only shapes, strides, devices and dtypes are read.
        tasks: T, the number of rows.
        dtype: of the rows; None takes float32, or float64 for float64 parameters. Half precision rows halve
            the memory; updates, norms and sums are still computed in float32.
    """

    def __init__(self, parameters: Sequence[Tensor], tasks: int, dtype: torch.dtype | None = None) -> None:
        self.tasks = tasks
        self._places: list[_Place] = []
        keys: list[tuple[torch.device, torch.dtype]] = []
        sizes: list[int] = []
        for parameter in parameters:
            key = (parameter.device, dtype or accumulation_dtype(parameter.dtype))
            if key not in keys:
                keys.append(key)
                sizes.append(0)
            block = keys.index(key)
            place = _place(parameter, block, sizes[block])
            self._places.append(place)
            sizes[block] += math.ceil(place.size / _ALIGNMENT) * _ALIGNMENT
        self._blocks = [
            torch.zeros(tasks + 1, size, device=device, dtype=row)
            for (device, row), size in zip(keys, sizes, strict=True)
        ]
        self._segments = [self._segments_of(block) for block in range(len(self._blocks))]
        self._row_of_task = list(range(tasks))
        self._spare = tasks
        self._views: dict[int, list[Tensor]] = {}
        self._early: dict[int, Scalar] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": {}}

    @property
    def device(self) -> torch.device:
        """The device of the first shared parameter, where norms are gathered."""
        return self._blocks[0].device

    @property
    def large(self) -> list[int]:
        """Parameters that gain from `propose_early`: large ones on a CPU."""
        return [index for segments in self._segments for s in segments if s.alone for index in s.members]

    @property
    def early(self) -> set[int]:
        """Parameters that `propose_early` has seen since the last `propose`."""
        return set(self._early)

    def propose_early(self, index: int, gradient: Tensor, task: int, beta: float) -> None:
        """Write one large parameter's part of a proposal while its gradient is still in cache.

        Called again before `propose`, as by a parameter whose gradient comes in two parts, it adds.
        """
        place = self._places[index]
        spare = self._views_of(self._spare)[index]
        if index in self._early:
            spare.add_(_real(gradient), alpha=1 - beta)
        else:
            _average_into(spare, self._views_of(self._row_of_task[task])[index], gradient, beta)
        row = self._blocks[place.block][self._spare]
        self._early[index] = _norm(row[place.start : place.start + place.size])

    def propose(self, gradients: Sequence[Tensor | None], task: int, beta: float) -> Scalar:
        """Write ``beta * ema_t + (1 - beta) * g_t`` into the spare row; row t stays until `accept`.

        Args:
            gradients: g_t, one entry for each parameter; None counts as zeros, except where `propose_early` has
                seen it.
            task: t.
            beta: weight of the old average.

        Returns:
            The norm of the proposed row; not finite exactly where the row holds a non-finite value or its norm
            overflows. On a CPU a number, on an accelerator a scalar tensor that nobody has waited for.
        """
        spare, old = self._views_of(self._spare), self._views_of(self._row_of_task[task])
        early, self._early = self._early, {}
        for block, segments in zip(self._blocks, self._segments, strict=True):
            spare_row, old_row = block[self._spare], block[self._row_of_task[task]]
            narrow = block.dtype != accumulation_dtype(block.dtype)
            for segment in segments:
                if segment.alone or narrow:
                    for member in segment.members:
                        if member not in early:
                            _average_into(spare[member], old[member], gradients[member], beta)
                else:
                    views = [spare[member] for member in segment.members]
                    _gather(views, [gradients[member] for member in segment.members])
                    run = slice(segment.start, segment.stop)
                    spare_row[run].lerp_(old_row[run], beta)
        return self._norm_of([block[self._spare] for block in self._blocks], early)

    def accept(self, task: int, ok: Flag) -> None:
        """Make the proposed row the average of `task` if `ok`, else drop it.

        With a Python bool two row numbers trade places. A boolean tensor is not read by the host: the row is
        copied or kept on the device.
        """
        if ok is True:
            self._spare, self._row_of_task[task] = self._row_of_task[task], self._spare
            return
        for block in self._blocks:
            if isinstance(ok, Tensor):
                row = block[self._row_of_task[task]]
                torch.where(ok.to(block.device), block[self._spare], row, out=row)
            block[self._spare].zero_()

    def forget_batch(self) -> None:
        """Drop what `propose_early` wrote; a proposal that nobody accepted is overwritten by the next."""
        self._early = {}

    def clear(self, task: int) -> None:
        """Set the average of `task` back to zero."""
        for block in self._blocks:
            block[self._row_of_task[task]].zero_()

    def weighted_sum(self, weights: Tensor) -> list[Tensor | None]:
        """``sum_t w_t * ema_t`` for each parameter, shaped like it, of float32 or wider; `weights` of shape (T,)."""
        result: list[Tensor | None] = [None] * len(self._places)
        for block, segments in zip(self._blocks, self._segments, strict=True):
            rows = [block[row] for row in self._row_of_task]
            for segment in segments:
                size = segment.stop - segment.start
                out = torch.empty(size, device=block.device, dtype=accumulation_dtype(block.dtype))
                _sum_rows([row[segment.start : segment.stop] for row in rows], weights, out)
                for member in segment.members:
                    place = self._places[member]
                    view = out.as_strided(place.shape, place.stride, out.storage_offset() + place.start - segment.start)
                    result[member] = torch.view_as_complex(view) if place.dtype.is_complex else view
        return result

    @property
    def norm_dtype(self) -> torch.dtype:
        """float32, or float64 where a row is of double precision."""
        return torch.float64 if any(block.dtype == torch.float64 for block in self._blocks) else torch.float32

    def norms(self) -> Tensor:
        """||ema_t|| of every task, shape (T,): bit for bit what `propose` returned for each."""
        norms = [self._norm_of([block[row] for block in self._blocks], {}) for row in self._row_of_task]
        return stack_scalars(norms, self.norm_dtype, self.device)

    def averages(self) -> list[Tensor]:
        """ema for each parameter, shape (T, *parameter.shape): views of the buffer, valid until the next step."""
        self._sort_rows()
        return [self._stacked(place) for place in self._places]

    def load_averages(self, averages: Sequence[Tensor | None]) -> None:
        """Overwrite all averages, each of shape (T, *parameter.shape); None sets zeros."""
        for view, average in zip(self.averages(), averages, strict=True):
            if average is None:
                view.zero_()
            else:
                view.copy_(average)

    def gram(self) -> Tensor:
        """<ema_s, ema_t> for every pair of tasks, shape (T, T), float32 or wider."""
        self._sort_rows()
        total = torch.zeros(self.tasks, self.tasks, device=self.device, dtype=torch.float64)
        for block in self._blocks:
            rows = block[: self.tasks]
            for columns in torch.split(rows, 1 << 20, dim=1):
                wide = columns.to(accumulation_dtype(rows.dtype))
                total += (wide @ wide.t()).to(total.device, total.dtype)
        return total

    def _segments_of(self, block: int) -> list[_Segment]:
        """Split a block into large parameters on their own and runs of small ones (one run on a GPU)."""
        on_cpu = self._blocks[block].device.type == "cpu"
        runs: list[tuple[bool, list[int]]] = []
        for index, place in enumerate(self._places):
            if place.block != block:
                continue
            alone = on_cpu and place.size >= _LARGE
            if alone or not runs or runs[-1][0]:
                runs.append((alone, []))
            runs[-1][1].append(index)
        segments = []
        for alone, run in runs:
            first, last = self._places[run[0]], self._places[run[-1]]
            segments.append(_Segment(first.start, last.start + last.size, tuple(run), alone))
        return segments

    def _norm_of(self, rows: list[Tensor], known: dict[int, Scalar]) -> Scalar:
        """The joint norm of one row of each block; `known` holds the norms of large parameters."""
        norms = [
            known[segment.members[0]] if segment.members[0] in known else _norm(row[segment.start : segment.stop])
            for row, segments in zip(rows, self._segments, strict=True)
            for segment in segments
        ]
        return _joint_norm(norms, self.device)

    def _views_of(self, row: int) -> list[Tensor]:
        if row not in self._views:
            self._views[row] = [place.view(self._blocks[place.block][row]) for place in self._places]
        return self._views[row]

    def _stacked(self, place: _Place) -> Tensor:
        block = self._blocks[place.block]
        view = block.as_strided((self.tasks, *place.shape), (block.stride(0), *place.stride), place.start)
        return torch.view_as_complex(view) if place.dtype.is_complex else view

    def _sort_rows(self) -> None:
        """Put the average of task t into row t; needed only where somebody looks at all rows at once."""
        for task in range(self.tasks):
            if self._row_of_task[task] == task:
                continue
            if task in self._row_of_task:
                self._move(self._row_of_task.index(task))
            self._move(task)

    def _move(self, task: int) -> None:
        """Copy the average of `task` into the spare row and let it live there."""
        for block in self._blocks:
            block[self._spare].copy_(block[self._row_of_task[task]])
        self._spare, self._row_of_task[task] = self._row_of_task[task], self._spare


def _place(parameter: Tensor, block: int, start: int) -> _Place:
    dense = torch.empty_like(parameter, device="meta")
    if dense.is_complex():
        dense = torch.view_as_real(dense)
    return _Place(block, start, dense.numel(), tuple(dense.shape), tuple(dense.stride()), parameter.dtype)


def _average_into(spare: Tensor, old: Tensor, gradient: Tensor | None, beta: float) -> None:
    """spare <- beta * old + (1 - beta) * gradient for one parameter, in one pass where dtypes allow."""
    if gradient is None:
        torch.mul(old, beta, out=spare)
        return
    gradient = _real(gradient)
    wide = accumulation_dtype(spare.dtype)
    if spare.dtype == wide == gradient.dtype:
        torch.lerp(gradient, old, beta, out=spare)
    elif spare.dtype == wide:
        spare.copy_(gradient).lerp_(old, beta)
    else:
        spare.copy_(torch.lerp(gradient.to(wide), old.to(wide), beta))


def _gather(views: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """views <- gradients, zeros for None."""
    present = [(view, _real(g)) for view, g in zip(views, gradients, strict=True) if g is not None]
    if len(present) < len(views):
        torch._foreach_zero_([view for view, g in zip(views, gradients, strict=True) if g is None])
    if present:
        targets, sources = zip(*present, strict=True)
        torch._foreach_copy_(targets, sources)


def _norm(row: Tensor) -> Scalar:
    """The norm of a contiguous stretch, summed in float32 or wider; a number on a CPU."""
    dtype = accumulation_dtype(row.dtype)
    if row.device.type == "cpu":
        # A dot product takes half the time of a norm here, and pieces keep a half precision row's copies small.
        return math.sqrt(sum(_square(piece.to(dtype)) for piece in torch.split(row, _DOT_PIECE)))
    norm: Tensor = torch.linalg.vector_norm(row, dtype=dtype)
    return norm


def _square(vector: Tensor) -> float:
    return torch.dot(vector, vector).item()


def _sum_rows(rows: Sequence[Tensor], weights: Tensor, out: Tensor) -> None:
    """out <- sum_t weights[t] * rows[t], in the order of the tasks wherever the rows lie.

    A matrix-vector product is one kernel, which counts on an accelerator, but on a CPU it adds rows in the order
    of memory, which trading places changes, and it is no faster than adding rows piece by piece in cache.
    """
    if out.device.type != "cpu":
        weights = weights.to(out.device, out.dtype)
        steps = {after.storage_offset() - before.storage_offset() for before, after in pairwise(rows)}
        step = min(steps, default=0)
        if len(steps) == 1 and step > 0 and rows[0].dtype == out.dtype:
            matrix = rows[0].as_strided((len(rows), out.numel()), (step, 1))
            torch.mv(matrix.t(), weights, out=out)
        else:
            out.zero_()
            for row, weight in zip(rows, weights, strict=True):
                out.addcmul_(row, weight)
        return
    terms = [(row, weight) for row, weight in zip(rows, weights.tolist(), strict=True) if weight != 0]
    if not terms:
        out.zero_()
    for start in range(0, out.numel(), _SUM_PIECE):
        piece = slice(start, start + _SUM_PIECE)
        for index, (row, weight) in enumerate(terms):
            if index == 0:
                torch.mul(row[piece], weight, out=out[piece])
            else:
                out[piece].add_(row[piece], alpha=weight)


class GradientSum:
    """``sum_t w_t * g_t`` without averages: each gradient is added up as it arrives, so no row is kept.

    The weights ``w_t = alpha * priority_t / ||g_t||`` are known up to alpha when g_t arrives, and alpha is a
    common factor. Gradients are added in units of the first task's norm, not as unit vectors, so that a single
    task passes through bit for bit. Same interface as `FlatGradientBuffer`.

    Memory: n scalars of float32 or wider beside the gradient that arrives.

    Args:
        device: where norms are gathered.
        priorities: priority_t, T of them.
        normalise: False adds ``priority_t * g_t`` (no rescale to a common norm).
    """

    def __init__(self, device: torch.device, priorities: Sequence[float], normalise: bool) -> None:
        self.device = device
        self._priorities = priorities
        self._normalise = normalise
        self._total: list[Tensor | None] = []
        self.norm_dtype = torch.float32
        self._scales: dict[int, Scalar] = {}
        self._reference: Scalar = 0.0
        self._proposal: tuple[list[Tensor | None], Scalar] | None = None

    def propose(self, gradients: Sequence[Tensor | None], task: int, beta: float) -> Scalar:  # noqa: ARG002
        """Take g_t and return ||g_t||; the gradients are overwritten by `accept`."""
        wide = [None if g is None else _wide(g) for g in gradients]
        present = [g for g in wide if g is not None]
        norm = _gradients_norm(present, self.device)
        if any(g.dtype in (torch.float64, torch.complex128) for g in present):
            self.norm_dtype = torch.float64
        self._proposal = (wide, norm)
        return norm

    def accept(self, task: int, ok: Flag) -> None:
        """Add the proposed gradient if `ok`, else drop it; a boolean tensor is not read by the host."""
        if self._proposal is None:
            raise RuntimeError("accept() must follow propose()")
        gradients, norm = self._proposal
        self._proposal = None
        if ok is False:
            return
        scale = self._scales[task] = self._scale(norm, self._priorities[task], ok)
        if not self._total:
            self._total = [None] * len(gradients)
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if isinstance(ok, Tensor):
                gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            self._total[index] = _add_scaled(self._total[index], gradient, scale)

    def clear(self, task: int) -> None:
        """Nothing to do: no task has an average."""

    @property
    def early(self) -> set[int]:
        """No parameter is seen early: every gradient must wait for its norm."""
        return set()

    def forget_batch(self) -> None:
        """Drop what was added up so far."""
        self._total = []
        self._scales = {}
        self._reference = 0.0
        self._proposal = None

    def _scale(self, norm: Scalar, priority: float, ok: Flag) -> Scalar:
        """What g_t is multiplied by on arrival: w_t up to a factor common to all tasks; 0 if it does not count."""
        if isinstance(norm, Tensor):
            counts = (norm > 0) & ok
            usable = torch.where(counts, norm, 0.0)
            known = self._reference if isinstance(self._reference, Tensor) else torch.zeros_like(norm)
            self._reference = torch.where(known > 0, known, usable)
            relative = self._reference / norm if self._normalise else torch.ones_like(norm)
            return torch.where(counts, priority * relative, 0.0)
        self._reference = self._reference or norm
        if norm == 0:
            return 0.0
        return priority * float(self._reference / norm) if self._normalise else priority

    def weighted_sum(self, weights: Tensor) -> list[Tensor | None]:
        """The sum for each parameter, None where no task reached it; starts a new sum."""
        scales = stack_scalars(list(self._scales.values()), weights.dtype, weights.device)
        # Every ratio is alpha in units of the reference; a task that does not count has scale 0.
        each = weights.unbind()
        ratios = torch.stack([each[task] for task in self._scales]) / scales
        factor = torch.where(scales > 0, ratios, torch.zeros_like(ratios)).amax()
        total = self._total
        self.forget_batch()
        for tensor in total:
            if tensor is not None:
                tensor.mul_(factor.to(tensor.device))
        return total


def _gradients_norm(gradients: Sequence[Tensor], device: torch.device) -> Scalar:
    """The joint norm of dense gradients; large ones on a CPU piece by piece, as in `_norm`."""
    norms: list[Scalar] = []
    small: list[Tensor] = []
    for gradient in gradients:
        if gradient.device.type == "cpu" and gradient.numel() >= _LARGE:
            norms.append(_norm(_real(gradient).reshape(-1)))
        else:
            small.append(gradient)
    if small:
        norms += torch._foreach_norm(small)
    return _joint_norm(norms, device)


def _wide(gradient: Tensor) -> Tensor:
    """A dense gradient in the dtype that sums are taken in; the same tensor where it is one already."""
    gradient = gradient if gradient.layout is torch.strided else gradient.to_dense()
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _add_scaled(total: Tensor | None, gradient: Tensor, scale: Scalar) -> Tensor:
    """total + scale * gradient, in place on either."""
    if isinstance(scale, Tensor):
        scaled = gradient.mul_(scale.to(gradient.device))
        return scaled if total is None else total.add_(scaled)
    return gradient.mul_(scale) if total is None else total.add_(gradient, alpha=scale)
