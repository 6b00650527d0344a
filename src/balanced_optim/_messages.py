"""Gradients of many parameters as one flat message, and what comes back: all of it, or the part of one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._numbers import accumulation_dtype, real


def rows_of(parameter: Tensor, part: int, parts: int) -> slice:
    """The rows (dimension 0) that `part` keeps of a parameter: even chunks, the last ones shorter or empty."""
    chunk = -(-parameter.shape[0] // parts)
    return slice(min(part * chunk, parameter.shape[0]), min((part + 1) * chunk, parameter.shape[0]))


class Message:
    """A flat vector for each of `parts` ranks, and where each parameter's rows lie in it.

    With one part a message is all-reduced and comes back whole. With as many parts as ranks it is reduce-scattered:
    every rank gets the sum of its own part. A parameter without dimensions goes into every part. Chunks are those
    of ``Shard(0)`` in torch.distributed.tensor, so that a part is also a shard in a checkpoint.

    Args:
        parameters: of one device and one accumulation dtype; only shapes, devices and dtypes are read.
        parts: 1, or the number of ranks.
        group: the process group.
        buffers: how many messages may be under way at once.
    """

    def __init__(self, parameters: Sequence[Tensor], parts: int, group: dist.ProcessGroup, buffers: int) -> None:
        self._group, self._parts = group, parts
        self._complex = [parameter.is_complex() for parameter in parameters]
        shapes = [torch.view_as_real(p.detach()) if p.is_complex() else p.detach() for p in parameters]
        self._rows = [[slice(None) if not p.dim() else rows_of(p, k, parts) for k in range(parts)] for p in parameters]
        # Real shapes of every part of every parameter, and the places of the parameters in a part.
        self._shapes = [
            [tuple(shape.shape) if not p.dim() else tuple(shape[rows].shape) for rows in self._rows[index]]
            for index, (p, shape) in enumerate(zip(parameters, shapes, strict=True))
        ]
        ends = [0]
        for index in range(len(parameters)):
            size = max(_size(shape) for shape in self._shapes[index])
            # Even places, so that pairs can be seen as complex numbers.
            ends.append(ends[-1] + size + size % 2)
        self._starts, self.length = ends[:-1], ends[-1]
        device, dtype = parameters[0].device, accumulation_dtype(parameters[0].dtype)
        self._outgoing = [torch.zeros(parts, self.length, device=device, dtype=dtype) for _ in range(buffers)]
        # gloo's reduce-scatter sends as much as an all-reduce; an exchange in pairs and a sum send half of that.
        pairs = parts > 1 and device.type == "cpu"
        self._incoming = [torch.empty_like(buffer) if pairs else None for buffer in self._outgoing]
        self._views = [self._views_of(buffer) for buffer in self._outgoing]
        self._next = 0

    def _views_of(self, buffer: Tensor) -> list[list[Tensor]]:
        """For each parameter the views of its parts."""
        return [
            [self._view(buffer[part], index, part) for part in range(self._parts)] for index in range(len(self._rows))
        ]

    def _view(self, flat: Tensor, index: int, part: int) -> Tensor:
        shape = self._shapes[index][part]
        return flat[self._starts[index] : self._starts[index] + _size(shape)].view(shape)

    def send(self, gradients: Sequence[Tensor | None]) -> Callable[[], list[Tensor]]:
        """Start to add up `gradients` over all ranks; the returned function waits for this rank's part.

        Args:
            gradients: one a parameter, None for zeros; free to be overwritten on return.

        Returns:
            A function that returns for each parameter the sum of this rank's rows, views that stay valid until as
            many messages as there are buffers have been sent.
        """
        slot = self._next
        self._next = (slot + 1) % len(self._outgoing)
        self._pack(slot, gradients)
        outgoing, incoming = self._outgoing[slot], self._incoming[slot]
        rank = dist.get_rank(self._group) if self._parts > 1 else 0
        if self._parts == 1:
            work, received = dist.all_reduce(outgoing, group=self._group, async_op=True), outgoing[0]
        elif incoming is not None:
            work = dist.all_to_all_single(incoming, outgoing, group=self._group, async_op=True)
            received = outgoing[rank]
        else:
            received = torch.empty(self.length, device=outgoing.device, dtype=outgoing.dtype)
            work = _reduce_scatter(received, outgoing, self._group)

        def receive() -> list[Tensor]:
            work.wait()
            if incoming is not None:
                torch.sum(incoming, 0, out=received)
            views = [self._view(received, index, rank) for index in range(len(self._rows))]
            return [torch.view_as_complex(v) if c else v for v, c in zip(views, self._complex, strict=True)]

        return receive

    def _pack(self, slot: int, gradients: Sequence[Tensor | None]) -> None:
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for views, rows, gradient in zip(self._views[slot], self._rows, gradients, strict=True):
            if gradient is None:
                torch._foreach_zero_(views)
                continue
            dense = real(gradient)
            targets += views
            sources += [dense] * self._parts if dense.dim() == 0 else [dense[row] for row in rows]
        if targets:
            torch._foreach_copy_(targets, sources)

    def spread(self, parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
        """Every rank's part of a vector put together on all ranks: new tensors shaped like the parameters."""
        if self._parts == 1:
            raise RuntimeError("a message of one part is whole on every rank")
        rank = dist.get_rank(self._group)
        whole, views = self._outgoing[0], self._views[0]
        own = torch.zeros(self.length, device=whole.device, dtype=whole.dtype)
        for index, part in enumerate(parts):
            if part is not None:
                self._view(own, index, rank).copy_(real(part))
        _all_gather(whole, own, self._group)
        result = []
        for index, parameter in enumerate(like):
            dtype = torch.promote_types(parameter.dtype, whole.dtype)
            tensor = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            dense = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            for rows, view in zip(self._rows[index], views[index], strict=True):
                dense[rows if parameter.dim() else ...].copy_(view)
            result.append(tensor)
        return result


def _size(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _reduce_scatter(received: Tensor, outgoing: Tensor, group: dist.ProcessGroup) -> Any:
    run = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return run(received, outgoing.view(-1), group=group, async_op=True)


def _all_gather(whole: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
    # The names of both collectives changed; the old ones warn in newer releases.
    run = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    run(whole.view(-1), own, group=group)
