"""Ranks that hold all parameters: plain modules, with DistributedDataParallel around them or without.

Task gradients are taken by `torch.autograd.grad`, which leaves DistributedDataParallel's own reduction, made for one
pass a step, out of it: a plain ``ddp(x)`` works with all its options, and buffers are still broadcast. Each task's
gradients go as one flat message while the next task's pass runs; its last two numbers say whether this rank is well,
and whether its heads' gradients are finite. One message for the heads ends the batch.

Sent: an all-reduce of n a task and one of the heads. Memory: two messages of n scalars under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ._meeting import Ranks
from ._numbers import accumulation_dtype, on_device, real
from ._passes import Gradients, Heard, Pass, Passes
from ._store import finite


class _Bundle:
    """Flat messages for the gradients of some parameters, one for each device and dtype; made once.

    `extra` is room for other numbers at the end of the first.
    """

    def __init__(
        self, parameters: Sequence[Tensor], extra: int, device: torch.device, widest: torch.dtype = torch.float32
    ) -> None:
        kinds = [(p.device, torch.promote_types(accumulation_dtype(p.dtype), widest)) for p in parameters]
        shapes = [real(torch.empty_like(parameter, device="meta")).shape for parameter in parameters]
        first = kinds[0] if kinds else (device, widest)
        starts, ends = [], {first: 0}
        for kind, shape in zip(kinds, shapes, strict=True):
            starts.append(ends.setdefault(kind, 0))
            # Even places, so that pairs can be seen as complex numbers.
            ends[kind] += shape.numel() + shape.numel() % 2
        ends[first] += extra
        flats = {kind: torch.zeros(end, device=kind[0], dtype=kind[1]) for kind, end in ends.items()}
        self._flats, self.extra = list(flats.values()), flats[first][-extra:]
        self._views = [
            flats[kind][start : start + shape.numel()].view(shape)
            for kind, start, shape in zip(kinds, starts, shapes, strict=True)
        ]
        self._sums = [
            torch.view_as_complex(view) if parameter.is_complex() else view
            for view, parameter in zip(self._views, parameters, strict=True)
        ]

    def send(self, gradients: Sequence[Tensor | None], group: dist.ProcessGroup) -> Callable[[], Gradients]:
        """Start to add up; the returned function waits and gives the sums, views that stay until the next send."""
        missing = [view for view, gradient in zip(self._views, gradients, strict=True) if gradient is None]
        if missing:
            torch._foreach_zero_(missing)
        targets = [view for view, gradient in zip(self._views, gradients, strict=True) if gradient is not None]
        if targets:
            torch._foreach_copy_(targets, [real(gradient) for gradient in gradients if gradient is not None])
        works = [dist.all_reduce(flat, group=group, async_op=True) for flat in self._flats]

        def receive() -> Gradients:
            for work in works:
                work.wait()
            return [*self._sums]

        return receive


class Replicas(Ranks):
    """Every rank has all parameters and all averages."""

    def __init__(
        self, group: dist.ProcessGroup, shared: Sequence[Tensor], heads: Sequence[Tensor], norm_dtype: torch.dtype
    ) -> None:
        super().__init__(group, (shared or heads)[0].device)
        self._shared, self._heads, self._norm_dtype = list(shared), list(heads), norm_dtype
        self._bundles: dict[tuple[int, ...], list[_Bundle]] = {}
        self._last: dict[int, _Bundle] = {}
        self._failure: BaseException | None = None
        self._reached: set[Tensor] = set()

    def reduced(self, passes: Passes, tasks: Sequence[int], shared: Sequence[Tensor], *, held: bool) -> Passes:
        """Stage: task t travels while the pass of task t + 1 runs. A rank that failed goes on sending flagged zeros.

        With `held` every task has a message of its own, since all are looked at together.
        """
        bundles = self._bundles.setdefault(tuple(map(id, shared)), [])
        while len(bundles) < (len(tasks) if held else 2):
            bundles.append(_Bundle(shared, 2, self._device))
        under_way: deque[tuple[Pass, _Bundle, Callable[[], Gradients]]] = deque()
        for number, task in enumerate(tasks):
            one = self._next(passes, task, len(shared))
            bundle = bundles[number % len(bundles)]
            self._note(bundle, one, shared)
            under_way.append((one, bundle, bundle.send(one.shared, self._group)))
            if len(under_way) == 2:
                yield self._received(*under_way.popleft())
        while under_way:
            yield self._received(*under_way.popleft())

    def _next(self, passes: Passes, task: int, number: int) -> Pass:
        """The next pass, or zeros where this rank has failed: the others still wait for its messages."""
        if self._failure is None:
            try:
                return next(passes)
            except BaseException as failure:
                self._failure = failure
        return Pass(task, [None] * number)

    def _note(self, bundle: _Bundle, one: Pass, shared: Sequence[Tensor]) -> None:
        self._reached.update(p for p, gradient in zip(shared, one.shared, strict=True) if gradient is not None)
        fine = finite(Pass(one.task, [], one.rest, one.ok), self._device)
        bundle.extra[0], bundle.extra[1] = self._failure is None, fine

    def _received(self, one: Pass, bundle: _Bundle, receive: Callable[[], Gradients]) -> Pass:
        shared = receive()
        if one.task < 0:
            # A joint pass becomes `.grad`, which outlives the message.
            shared = [None if gradient is None else gradient.clone() for gradient in shared]
        # Both numbers are 1 on every rank.
        fine = bundle.extra.sum() == 2 * self.size
        return Pass(one.task, shared, one.rest, fine if on_device(bundle.extra.device) else bool(fine))

    def close(self, norms: Tensor, rest: dict[Tensor, Tensor], reached: set[Tensor]) -> Heard:  # noqa: ARG002
        """One message: this rank's failure, what it has reached, rank 0's norms, the gradients of all heads."""
        everything = [*self._shared, *self._heads]
        if len(norms) not in self._last:
            extra = 1 + len(everything) + len(norms)
            self._last[len(norms)] = _Bundle(self._heads, extra, self._device, self._norm_dtype)
        bundle = self._last[len(norms)]
        bits = [self._failure is not None, *(p in self._reached or p in rest for p in everything)]
        known = torch.tensor(bits, dtype=bundle.extra.dtype, device=bundle.extra.device)
        own = norms.to(bundle.extra.device, bundle.extra.dtype)
        # Unlike machines must not drift apart: rank 0's norms are everybody's.
        bundle.extra.copy_(torch.cat([known, own if self._rank == 0 else torch.zeros_like(own)]))
        sums = bundle.send([rest.get(parameter) for parameter in self._heads], self._group)()
        failed, *counts = bundle.extra[: len(bits)].tolist()
        if failed:
            self._raise_everywhere(self._failure)
        some = {p for p, count in zip(everything, counts, strict=True) if count}
        heads = {
            p: total.clone() for p, total in zip(self._heads, sums, strict=True) if p in some and total is not None
        }
        return (
            bundle.extra[len(bits) :].to(norms.device, norms.dtype).clone(),
            heads,
            {p for p in self._shared if p in some},
        )

    def reset(self) -> None:
        """Forget the batch."""
        self._failure = None
        self._reached = set()
