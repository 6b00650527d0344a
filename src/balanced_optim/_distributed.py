"""The same step on several processes: one alone, replicated parameters, and parameters that FSDP2 shards.

Each class answers the same questions: which part of the averages this rank keeps, how the task gradients of all ranks
add up, what all ranks know before and after the passes. `Alone` answers them for one process and sends nothing.
"""

from __future__ import annotations

import gc
import hashlib
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._messages import Message, rows_of
from ._numbers import Flag, Scalar, accumulation_dtype
from ._task_gradients import apart, leaves, raw_pass, take_grad, take_pass

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# The message before a step has room for this many tasks, so that its size does not depend on what a rank takes T for.
_ROOM = 64
# Its first numbers, all but the last one alike on all ranks. For every task there follow the sum of the losses, the
# number of samples, and whether a loss is here.
_BROKEN, _DIGEST, _SCALE, _TASKS, _WIDE, _HEADER = range(6)

Gradients = list[Tensor | None]


@dataclass(frozen=True, slots=True)
class Totals:
    """What all ranks brought for one batch.

    Attributes:
        sums: ``sum of samples * loss`` over ranks and micro-batches, shape (T,), float64.
        samples: the number of samples of each task, shape (T,); 0 for a task that no rank has.
        dtype: float32, or float64 where some rank's losses are.
        present: tasks that some rank has.
        bad: for a task whose loss is not finite on some rank, the first such rank and its value.
    """

    sums: Tensor
    samples: Tensor
    dtype: torch.dtype
    present: list[int]
    bad: dict[int, tuple[int, float]]


class Alone:
    """One process: nothing is sent, nothing is kept in parts.

    Attributes:
        size: the number of ranks.
        holds_failures: whether a failure in a pass can wait until all ranks hear of it.
        averaging: by what the framework divides the sum of the ranks' gradients.
        keeps_whole: whether every average is here as a whole.
        fills_grad: whether a pass puts gradients into `.grad`, where hooks find them early.
        reduces_in_passes: whether gradients are added up over the ranks inside each backward pass, which then cannot
            stop at some of the parameters.
        hint: what else may be wrong where a task reaches nothing.
        shares: for each averaged parameter the part of its squared norm that counts here, so that the sum over
            ranks is right; None: all of it.
    """

    size: int = 1
    holds_failures = False
    averaging: int = 1
    keeps_whole = True
    fills_grad = True
    reduces_in_passes = False
    hint = ""
    shares: list[float] | None = None

    def parts(self, averaged: Sequence[Tensor]) -> list[Tensor]:
        """The averaged parameters as far as this rank keeps their averages."""
        return list(averaged)

    def outside(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Leaves of the graph that are not in the optimizer and get a `.grad` from every pass."""
        known = {id(parameter) for parameter in parameters}
        return [leaf for leaf in leaves(losses) if id(leaf) not in known]

    def warn_of_outside(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Say once which parameters get no gradient because they are not in the optimizer: none does here."""

    def take_pass(
        self,
        losses: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        names: Sequence[str],
        parameters: Sequence[Tensor],
        *,
        retain_graph: bool,
        inputs: Sequence[Tensor] | None = None,
    ) -> Gradients:
        """One backward pass; see `_task_gradients.take_pass`."""
        return take_pass(losses, cotangents, names, parameters, retain_graph=retain_graph, inputs=inputs)

    def send(self, gradients: Gradients) -> Callable[[], Gradients]:
        """Start to add up one task's gradients; the result waits for this rank's part of the sum."""
        return lambda: gradients

    def agree(self, norm: Scalar, size: Scalar) -> tuple[Scalar, Flag]:
        """The norm from all ranks' parts, and whether every rank's `size` is finite."""
        return norm, size < math.inf

    def norms(self, norms: list[Scalar]) -> list[Scalar]:
        """The norms of all tasks from all ranks' parts."""
        return norms

    def total(self, counted: Tensor) -> Tensor:
        """The sum of what each rank counts of its part, such as a Gram matrix."""
        return counted

    def close(self, failure: BaseException | None, reached: list[bool]) -> list[bool]:
        """After the passes: raise if a rank failed, else say for each parameter whether some rank reached it."""
        if failure is not None:
            raise failure
        return reached

    def add_up(self, gradients: Gradients, parameters: Sequence[Tensor], reached: Sequence[bool]) -> Gradients:  # noqa: ARG002
        """The sum over all ranks of gradients that every rank keeps whole, for parameters that some rank reached."""
        return gradients

    def same(self, vector: Tensor) -> Tensor:
        """One rank's vector on all ranks, where each has computed it and chance may have played a part."""
        return vector

    def spread(self, combined: Gradients) -> Gradients:
        """The shared gradient, put together from all ranks' parts."""
        return combined

    def wrap(self, gradient: Tensor, parameter: Tensor) -> Tensor:  # noqa: ARG002
        """A gradient in the form that `parameter.grad` needs."""
        return gradient

    def entry(self, average: Tensor, index: int) -> Tensor:  # noqa: ARG002
        """The average of parameter `index` as a checkpoint holds it."""
        return average

    def own(self, averages: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """This rank's part of the averages from a checkpoint."""
        return [[_whole(row) for row in rows] for rows in averages]

    def reset(self) -> None:
        """Leave the framework as it was before the passes."""


class GroupOfOne(Alone):
    """A group of one rank: as alone, but DistributedDataParallel may be there and must see no `.grad`."""

    fills_grad = False
    _looked_outside = False

    def warn_of_outside(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Those outside get none from `torch.autograd.grad`."""
        if not self._looked_outside:
            self._looked_outside = True
            _warn_of_outside(losses, parameters)

    def outside(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:  # noqa: ARG002
        """None: no pass touches a `.grad`."""
        return []

    def take_pass(
        self,
        losses: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        names: Sequence[str],
        parameters: Sequence[Tensor],
        *,
        retain_graph: bool,
        inputs: Sequence[Tensor] | None = None,
    ) -> Gradients:
        """By `torch.autograd.grad`, as with more ranks."""
        return take_grad(losses, cotangents, names, parameters, retain_graph=retain_graph, inputs=inputs)


class Ranks(Alone):
    """What replicated and sharded parameters have in common: the meetings."""

    fills_grad = False
    hint = (
        "; with FSDP2, which replaces parameters, build the base optimizer and this one after fully_shard, and leave "
        "set_requires_gradient_sync alone: accumulate() takes its place"
    )

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self.size, self._rank = dist.get_world_size(group), dist.get_rank(group)
        self._norm_groups = [group]

    def outside(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:  # noqa: ARG002
        """None: replicas use no `.grad`, and what FSDP2 has in the graph are its own gathered parameters."""
        return []

    def meet(
        self,
        facts: Mapping[str, Any],
        error: BaseException | None,
        *,
        sums: Tensor | None = None,
        samples: Sequence[float] = (),
        here: Sequence[bool] = (),
        scale: Scalar | None = None,
    ) -> Totals:
        """One message of 1.6 kB from every rank to every rank. The host waits for it.

        Args:
            facts: what all ranks must have in common; compared by hash.
            error: what keeps this rank from going on.
            sums: ``samples * loss`` of this rank, shape (T,).
            samples: of this rank, T of them.
            here: whether this rank has a loss of each task.
            scale: the scaler's.

        Raises:
            BaseException: `error`.
            RuntimeError: another rank has an error, or facts differ.
            ValueError: a task's loss is on some ranks only, where that cannot be.
        """
        tasks = len(samples)
        mine = torch.zeros(3, max(tasks, _ROOM), dtype=torch.float64, device=self._device)
        if sums is not None:
            mine[0, :tasks] = sums
            mine[1:, :tasks] = torch.tensor([samples, here], dtype=torch.float64)
        wide = sums is not None and sums.dtype == torch.float64
        numbers = [error is not None, _digest(facts), 0.0, tasks, wide]
        header = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        if scale is not None:
            header[_SCALE] = scale
        rows = self._gather(torch.cat([header, mine[:, :_ROOM].reshape(-1)]))
        heads = rows[:, :_WIDE].tolist()
        if any(head[_BROKEN] for head in heads):
            self._raise_everywhere(error)
        if any(head != heads[0] for head in heads):
            self._explain({**facts, "the scaler's scale": heads[self._rank][_SCALE]})
        table = rows[:, _HEADER:].reshape(self.size, 3, _ROOM)[:, :, :tasks]
        if tasks > _ROOM:
            rest = self._gather(mine[:, _ROOM:].reshape(-1)).reshape(self.size, 3, tasks - _ROOM)
            table = torch.cat([table, rest], 2)
        losses, _, present = table.transpose(0, 1).tolist()
        self._check_presence(present, facts["the tasks"])
        bad = {
            task: (rank, losses[rank][task])
            for task in range(tasks)
            for rank in reversed(range(self.size))
            if not math.isfinite(losses[rank][task])
        }
        total = _ordered_sum(table[:, :2])
        counts = total[1].tolist()
        dtype = torch.float64 if rows[:, _WIDE].any() else torch.float32
        return Totals(total[0], total[1], dtype, [task for task in range(tasks) if counts[task] > 0], bad)

    def _check_presence(self, present: list[list[float]], tasks: Sequence[str]) -> None:
        """Raise where a task that is missing on some ranks would leave the others waiting."""

    def _explain(self, facts: Mapping[str, Any]) -> NoReturn:
        """Raise with the first thing that ranks do not have in common."""
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, dict(facts), group=self._group)
        for name, first in everyones[0].items():
            for rank, theirs in enumerate(everyones):
                if theirs[name] != first:
                    raise RuntimeError(
                        f"all ranks must agree on {name}: rank 0 has {first!r}, rank {rank} has {theirs[name]!r}; "
                        "nothing was changed; give every rank the same calls in the same order, the same settings "
                        "and the same checkpoint"
                    )
        raise RuntimeError("all ranks must agree on a step, but they differ; nothing was changed")

    def _raise_everywhere(self, failure: BaseException | None) -> NoReturn:
        """Raise the rank's own failure, or one that names the first rank that has one."""
        texts: list[Any] = [None] * self.size
        text = None if failure is None else f"{type(failure).__name__}: {failure}"
        dist.all_gather_object(texts, text, group=self._group)
        if failure is not None:
            raise failure
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
        raise RuntimeError(f"no rank goes on, since rank {rank} cannot: {text}")

    def agree(self, norm: Scalar, size: Scalar) -> tuple[Scalar, Flag]:
        """One message of 16 bytes: numbers on a CPU, tensors that the host has not waited for elsewhere."""
        mine = torch.stack([_double(norm, self._device).square(), _double(size, self._device)])
        square, sizes = self._sum(mine).unbind()
        if self._device.type == "cpu":
            return math.sqrt(square.item()), sizes.item() < math.inf
        return square.sqrt().to(norm.dtype if isinstance(norm, Tensor) else torch.float32), sizes < math.inf

    def norms(self, norms: list[Scalar]) -> list[Scalar]:
        """Bit for bit what `agree` gives for each."""
        squares = self._sum(torch.stack([_double(norm, self._device).square() for norm in norms]))
        return list(squares.sqrt().unbind())

    def total(self, counted: Tensor) -> Tensor:
        """One message of the tensor's size."""
        return self._sum(counted.to(self._device).reshape(-1)).reshape(counted.shape).to(counted.device)

    def _sum(self, vector: Tensor) -> Tensor:
        """The sum over all ranks that hold parts, the same bits on each of them and for each element alone."""
        for group in self._norm_groups:
            vector = _ordered_sum(self._gather(vector, group))
        return vector

    def _gather(self, vector: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """Every rank's vector, shape (R, length)."""
        group = group or self._group
        rows = [torch.empty_like(vector) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, vector.contiguous(), group=group)
        return torch.stack(rows)


class Replicas(Ranks):
    """Every rank has all parameters: plain modules, with DistributedDataParallel around them or without.

    Task gradients are taken by `torch.autograd.grad`, which leaves DistributedDataParallel's own reduction, made for
    one pass a step, out of it: a plain ``ddp(x)`` works with all its options, and buffers are still broadcast. Each
    task's gradients go as one flat message while the next task's pass runs.

    Whole averages: an all-reduce of n a task. Sharded ones: a reduce-scatter of n a task, and one all-gather of n for
    the combined gradient: (T + 1) n instead of 2 T n scalars sent, and 1/R of every average kept.

    Memory: two messages of n scalars under way; on a CPU with sharded averages two more to receive them.
    """

    holds_failures = True
    _looked_outside = False

    def __init__(self, group: dist.ProcessGroup, averaged: Sequence[Tensor], sharded: bool) -> None:
        super().__init__(group, averaged[0].device)
        self._sharded, self.keeps_whole = sharded, not sharded
        self._averaged = [parameter.detach() for parameter in averaged]
        self.shares = [1.0 if sharded and parameter.dim() else 1 / self.size for parameter in averaged]
        self._messages = [
            (members, Message([averaged[member] for member in members], self.size if sharded else 1, group, buffers=2))
            for members in _alike(averaged)
        ]

    def warn_of_outside(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Those outside get none from `torch.autograd.grad`."""
        if not self._looked_outside:
            self._looked_outside = True
            _warn_of_outside(losses, parameters)

    def parts(self, averaged: Sequence[Tensor]) -> list[Tensor]:
        """All of each parameter, or this rank's rows of it."""
        if not self._sharded:
            return [parameter.detach() for parameter in averaged]
        return [p.detach()[rows_of(p, self._rank, self.size)] if p.dim() else p.detach() for p in averaged]

    def take_pass(
        self,
        losses: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        names: Sequence[str],
        parameters: Sequence[Tensor],
        *,
        retain_graph: bool,
        inputs: Sequence[Tensor] | None = None,
    ) -> Gradients:
        """By `torch.autograd.grad`."""
        return take_grad(losses, cotangents, names, parameters, retain_graph=retain_graph, inputs=inputs)

    def send(self, gradients: Gradients) -> Callable[[], Gradients]:
        """All messages of one task; what comes back is valid until the task after next is sent."""
        pending = [(members, message.send([gradients[m] for m in members])) for members, message in self._messages]

        def receive() -> Gradients:
            result: Gradients = [None] * len(self._averaged)
            for members, wait in pending:
                for member, part in zip(members, wait(), strict=True):
                    result[member] = part
            return result

        return receive

    def close(self, failure: BaseException | None, reached: list[bool]) -> list[bool]:
        """One message of a number for each parameter. The host waits for it."""
        mine = torch.tensor([failure is not None, *reached], dtype=torch.int32, device=self._device)
        dist.all_reduce(mine, group=self._group)
        failed, *ranks = mine.tolist()
        if failed:
            self._raise_everywhere(failure)
        return [number > 0 for number in ranks]

    def add_up(self, gradients: Gradients, parameters: Sequence[Tensor], reached: Sequence[bool]) -> Gradients:
        """One all-reduce of all that some rank reached; own gradients are overwritten."""
        counted = [index for index, some in enumerate(reached) if some]
        result: Gradients = [None] * len(parameters)
        for alike in _alike([parameters[index] for index in counted]):
            members = [counted[index] for index in alike]
            message = Message([parameters[member] for member in members], 1, self._group, buffers=1)
            sums = message.send([gradients[member] for member in members])()
            for member, total in zip(members, sums, strict=True):
                own = gradients[member]
                if own is None or own.layout is not torch.strided:
                    own = torch.empty_like(parameters[member], requires_grad=False)
                result[member] = own.copy_(total)
        return result

    def same(self, vector: Tensor) -> Tensor:
        """Rank 0's, in one broadcast."""
        vector = vector.to(self._device).contiguous()
        dist.broadcast(vector, group=self._group, group_src=0)
        return vector

    def spread(self, combined: Gradients) -> Gradients:
        """Whole averages are combined alike on every rank; parts of them go to all ranks in one all-gather."""
        if not self._sharded or not combined:
            return combined
        result: Gradients = [None] * len(combined)
        for members, message in self._messages:
            whole = message.spread([combined[m] for m in members], [self._averaged[m] for m in members])
            for member, gradient in zip(members, whole, strict=True):
                result[member] = gradient
        return result

    def entry(self, average: Tensor, index: int) -> Tensor:
        """A part is a DTensor, so that torch.distributed.checkpoint can put it together or cut it anew."""
        parameter = self._averaged[index]
        if not self._sharded or not parameter.dim():
            return average
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = DeviceMesh.from_group(self._group, self._device.type)
        entry: Tensor = DTensor.from_local(
            _on_its_own(average), mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        return entry

    def own(self, averages: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """This rank's rows of averages that come whole, or as parts.

        Raises:
            ValueError: two ranks hold the same parts: a checkpoint that only one rank wrote.
        """
        if not self._sharded:
            return super().own(averages)
        if not any(_is_dtensor(row) for rows in averages for row in rows):
            return self._cut(averages)
        cut, failure = [], None
        try:
            cut = self._cut(averages)
        except ValueError as error:
            failure = error
        # No rank goes on alone to the next message.
        self.close(failure, [])
        self._check_parts_differ([row for rows in cut for row in rows if row.dim()])
        return cut

    def _cut(self, averages: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        return [[self._own_part(row, index) for row in rows] for index, rows in enumerate(averages)]

    def _own_part(self, row: Tensor, index: int) -> Tensor:
        parameter = self._averaged[index]
        if not parameter.dim():
            return _whole(row)
        rows = rows_of(parameter, self._rank, self.size)
        if not _is_dtensor(row):
            return row[rows]
        entry = _dtensor(row)
        rows_only = [placement.is_shard(0) for placement in entry.placements] == [True]
        if rows_only and entry.device_mesh.size() == self.size:
            part = entry.to_local()
            if part.shape == parameter[rows].shape:
                return part
            raise ValueError(
                f"task_ema of averaged parameter {index} must be of this rank's shape {tuple(parameter[rows].shape)}, "
                f"got {tuple(part.shape)}; {_PARTS_REMEDY}"
            )
        return entry.full_tensor()[rows]

    def _check_parts_differ(self, parts: Sequence[Tensor]) -> None:
        sizes = torch.stack([torch.linalg.vector_norm(part.double()).to(self._device) for part in parts])
        everyones = self._gather(sizes).tolist()
        for rank, theirs in enumerate(everyones):
            if any(theirs) and theirs in everyones[:rank]:
                raise ValueError(
                    f"state dict must hold each rank's own part of the averages, got the same part on rank "
                    f"{everyones.index(theirs)} and rank {rank}; {_PARTS_REMEDY}"
                )


_PARTS_REMEDY = (
    "a file that one rank wrote holds that rank's part only: save and load through torch.distributed.checkpoint, or "
    "save get_optimizer_state_dict(..., options=StateDictOptions(full_state_dict=True))"
)


class Shards(Ranks):
    """Parameters that `fully_shard` (FSDP2) distributes: DTensors, also over meshes of several dimensions.

    FSDP2 reduces gradients in each backward pass; what is left is to keep averages of the local shards, and to add up
    squared norms over the mesh. A pass cannot stop at some parameters, so that in the one-backward form measuring
    costs T full passes (see `refresh_every`).

    If the trunk was given as a module, its parameters stay gathered between the passes of a batch: (T - 1) n fewer
    scalars are gathered, and n more are in memory for that time. Given as parameters, FSDP2's own setting holds.
    """

    keeps_whole = False
    reduces_in_passes = True

    def __init__(
        self,
        group: dist.ProcessGroup,
        parameters: Sequence[Tensor],
        averaged: Sequence[Tensor],
        trunk: nn.Module | None,
    ) -> None:
        self._averaged: list[DTensor] = [_dtensor(parameter) for parameter in averaged]
        super().__init__(group, self._averaged[0].to_local().device)
        self.averaging = self.size
        distributed = [_dtensor(parameter) for parameter in parameters if _is_dtensor(parameter)]
        for parameter in parameters:
            if not _is_dtensor(parameter) and parameter.requires_grad:
                raise ValueError(
                    "parameters in base_optim must all be sharded or all be plain, got DTensors and a plain one of "
                    f"shape {tuple(parameter.shape)}; call fully_shard on the root module too, before the optimizer is "
                    "built"
                )
        ranks = set(dist.get_process_group_ranks(group))
        for tensor in {id(p.device_mesh): p for p in distributed}.values():
            _check_mesh(tensor, ranks)
        mesh = max((p.device_mesh for p in distributed), key=lambda mesh: mesh.ndim)
        self._norm_groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
        self.shares = [_held_once(parameter) / mesh.size() for parameter in self._averaged]
        self._modules = _fsdp_modules(trunk)

    def parts(self, averaged: Sequence[Tensor]) -> list[Tensor]:
        """The local shards."""
        return [_dtensor(parameter).to_local().detach() for parameter in averaged]

    def _check_presence(self, present: list[list[float]], tasks: Sequence[str]) -> None:
        for task, name in enumerate(tasks):
            ranks = [rank for rank, here in enumerate(present) if here[task]]
            if 0 < len(ranks) < self.size:
                missing = min(set(range(self.size)) - set(ranks))
                raise ValueError(
                    f"loss of task {name!r} must be on every rank or on none where parameters are sharded, got it on "
                    f"{ranks} but not on rank {missing}: FSDP2 communicates in every pass; nothing was changed; on a "
                    "rank that lacks the task compute the loss on any input and pass samples=0 for it"
                )

    def take_pass(
        self,
        losses: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        names: Sequence[str],
        parameters: Sequence[Tensor],
        *,
        retain_graph: bool,
        inputs: Sequence[Tensor] | None = None,  # noqa: ARG002
    ) -> Gradients:
        """A full `.backward()`, the last one of which leaves the parameters sharded; local shards of the gradients."""
        for module in self._modules:
            module.set_reshard_after_backward(not retain_graph, recurse=False)
        found = raw_pass(losses, cotangents, names, parameters, retain_graph=retain_graph)
        if all(gradient is None for gradient in found):
            raise ValueError(f"tasks {list(names)} must reach a sharded parameter, but none got a gradient{self.hint}")
        return apart([None if g is None else _dtensor(g).to_local() if _is_dtensor(g) else g for g in found])

    def wrap(self, gradient: Tensor, parameter: Tensor) -> Tensor:
        """A DTensor laid out like the parameter."""
        return _distributed_like(gradient, parameter) if _is_dtensor(parameter) else gradient

    def entry(self, average: Tensor, index: int) -> Tensor:
        """A DTensor laid out like the parameter, as torch.distributed.checkpoint needs it."""
        return _distributed_like(average, self._averaged[index])

    def own(self, averages: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The local shards of averages that come whole, or sharded as the parameters are."""
        return [
            [_shard_like(row, parameter) for row in rows]
            for rows, parameter in zip(averages, self._averaged, strict=True)
        ]

    def reset(self) -> None:
        """Shard again what the passes left gathered."""
        for module in self._modules:
            module.set_reshard_after_backward(True, recurse=False)
            module.reshard()


class Processes:
    """Which ranks share the work. What depends on the parameters is found at first use: FSDP2 may replace them.

    Args:
        group: the ranks that the batch is split over, None for one process.
        sharded: keep 1/R of every average on each rank.
        trunk: the shared parameters' module if it was given as one.
    """

    def __init__(self, group: dist.ProcessGroup | None, sharded: bool, trunk: nn.Module | None) -> None:
        self._group, self._sharded = group, sharded
        self._trunk = None if trunk is None or group is None else weakref.ref(trunk)
        self._found: tuple[list[int], Alone] | None = None

    def over(self, parameters: Sequence[Tensor], averaged: Sequence[int]) -> Alone:
        """How the ranks work together on these parameters, `averaged` being the positions of those with averages.

        Raises:
            ValueError: the parameters belong to something that this library cannot work with.
        """
        ids = [id(parameter) for parameter in parameters] if self._group is not None else []
        if self._found is None or self._found[0] != ids:
            self._found = ids, self._find(parameters, [parameters[position] for position in averaged])
        return self._found[1]

    def _find(self, parameters: Sequence[Tensor], averaged: Sequence[Tensor]) -> Alone:
        check_framework(parameters, self._group is not None)
        group = self._group
        if group is None:
            alone = Alone()
            if dist.is_available() and dist.is_initialized():
                alone.hint = Ranks.hint
            return alone
        if any(_is_dtensor(parameter) for parameter in parameters):
            if self._sharded:
                raise ValueError(
                    "shard_averages must be False where FSDP2 shards the parameters, got True; their averages are "
                    "sharded with them"
                )
            return Shards(group, parameters, averaged, None if self._trunk is None else self._trunk())
        if dist.get_world_size(group) == 1:
            return GroupOfOne()
        return Replicas(group, averaged, self._sharded)

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        return Processes(self._group, self._sharded, None if self._trunk is None else self._trunk())

    def __getstate__(self) -> dict[str, Any]:
        if self._group is not None:
            raise TypeError("an optimizer with a process_group cannot be pickled; save its state_dict() instead")
        return {"_group": None, "_sharded": self._sharded, "_trunk": None, "_found": None}


def check_process_group(group: object, shard_averages: object) -> None:
    """Raise unless these are arguments that a step can be shared by."""
    if not isinstance(shard_averages, bool):
        raise ValueError(f"shard_averages must be True or False, got {shard_averages!r}")
    if group is None:
        if shard_averages:
            raise ValueError(
                "shard_averages needs process_group, got True without one; pass the ranks that share the averages, "
                "e.g. process_group=torch.distributed.group.WORLD after init_process_group()"
            )
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup that this rank is in, or None, got {group!r}; "
            "pass torch.distributed.group.WORLD after init_process_group(), or mesh.get_group()"
        )


def check_framework(parameters: Sequence[Tensor], grouped: bool) -> None:
    """Raise where another library owns the parameters in a way that T backward passes would break without a word.

    Raises:
        ValueError: FSDP1 or DeepSpeed's ZeRO holds them; or DistributedDataParallel or FSDP2 does, and no process group
            was given.
    """
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        raise ValueError(
            "parameters must not be partitioned by DeepSpeed's ZeRO, whose gradients exist only inside its own engine; "
            "use FSDP2 (torch.distributed.fsdp.fully_shard) and process_group"
        )
    if not grouped and any(_is_dtensor(parameter) for parameter in parameters):
        raise ValueError(
            "process_group is needed where parameters are DTensors, got None; pass the ranks that the batch is split "
            "over: process_group=mesh.get_group() of a mesh of one dimension, or that of its data-parallel dimension"
        )
    if not dist.is_available() or not dist.is_initialized():
        return
    known = {id(parameter) for parameter in parameters}
    for owner in _wrappers():
        if not any(id(parameter) in known for parameter in owner.parameters()):
            continue
        if type(owner).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "parameters must not be sharded by FullyShardedDataParallel (FSDP1), which reduces one backward pass a "
                "step only; use FSDP2: torch.distributed.fsdp.fully_shard, and process_group"
            )
        if not grouped:
            raise ValueError(
                "process_group is needed with DistributedDataParallel, whose own reduction serves one backward pass a "
                "step: got None, which would train each rank on gradients of its own; pass "
                "process_group=torch.distributed.group.WORLD"
            )


def _wrappers() -> Iterable[Any]:
    """Every living module that wraps others for DistributedDataParallel or FSDP1."""
    names = [
        ("torch.nn.parallel.distributed", "DistributedDataParallel"),
        ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"),
    ]
    kinds = tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)
    wraps: dict[type, bool] = {}
    found = []
    for thing in gc.get_objects():
        # type(), since isinstance() reads __class__, which some objects answer with a warning.
        kind = type(thing)
        if kind not in wraps:
            wraps[kind] = issubclass(kind, kinds)
        if wraps[kind]:
            found.append(thing)
    return found


def _warn_of_outside(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    known = {id(parameter) for parameter in parameters}
    outside = [leaf for leaf in leaves(losses) if isinstance(leaf, nn.Parameter) and id(leaf) not in known]
    if outside:
        warnings.warn(
            f"{len(outside)} parameters outside base_optim take part in the losses (the first has shape "
            f"{tuple(outside[0].shape)}); with a process_group they get no gradient: give them to base_optim, or "
            "freeze them",
            stacklevel=2,
        )


def _digest(facts: Mapping[str, Any]) -> float:
    """A number that a float64 holds exactly."""
    return float(int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=6).digest(), "little"))


def _double(number: Scalar, device: torch.device) -> Tensor:
    return torch.as_tensor(number, dtype=torch.float64, device=device)


def _ordered_sum(rows: Tensor) -> Tensor:
    """The sum over the first dimension, from rank 0 on."""
    return reduce(torch.add, rows.unbind())


def _alike(parameters: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the parameters that can go in one message."""
    runs: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, parameter in enumerate(parameters):
        runs.setdefault((parameter.device, accumulation_dtype(parameter.dtype)), []).append(index)
    return list(runs.values())


def _is_dtensor(tensor: Tensor) -> bool:
    # Importing torch.distributed.tensor takes time, which one process need not spend.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _dtensor(tensor: Tensor) -> DTensor:
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        raise ValueError(
            "shared parameters must all be sharded or all be plain, got DTensors and a plain one of shape "
            f"{tuple(tensor.shape)}; call fully_shard on the root module too, before the optimizer is built"
        )
    return tensor


def _whole(entry: Tensor) -> Tensor:
    """A checkpoint's entry as a plain tensor."""
    return _dtensor(entry).full_tensor() if _is_dtensor(entry) else entry


def _on_its_own(part: Tensor) -> Tensor:
    """The tensor, copied if it is a piece of a larger one: a DTensor around such a piece cannot be copied or saved."""
    return part if part.untyped_storage().nbytes() == part.numel() * part.itemsize else part.clone()


def _distributed_like(local: Tensor, parameter: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    like = _dtensor(parameter)
    result: Tensor = DTensor.from_local(
        _on_its_own(local), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return result


def _shard_like(entry: Tensor, parameter: DTensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    if _is_dtensor(entry):
        tensor = _dtensor(entry)
        if tensor.placements == parameter.placements and tensor.device_mesh == parameter.device_mesh:
            return tensor.to_local()
        entry = tensor.full_tensor()
    mesh = parameter.device_mesh
    return distribute_tensor(entry.to(mesh.device_type), mesh, parameter.placements).to_local()


def _held_once(parameter: DTensor) -> int:
    """How many ranks of its mesh together hold a parameter once."""
    sizes = [
        parameter.device_mesh.size(dimension)
        for dimension, placement in enumerate(parameter.placements)
        if not placement.is_replicate()
    ]
    return math.prod(sizes)


def _check_mesh(parameter: DTensor, ranks: set[int]) -> None:
    """Raise unless the group holds the ranks over which this parameter's gradient is averaged."""
    mesh = parameter.device_mesh
    covered = [set(dist.get_process_group_ranks(mesh.get_group(d))) <= ranks for d in range(mesh.ndim)]
    # FSDP2's dimensions come first: those it replicates over, then the one it shards over; tensor parallelism after.
    sharded = [not placement.is_replicate() for placement in parameter.placements]
    needed = sharded.index(True) + 1 if any(sharded) else mesh.ndim
    if not all(covered[:needed]):
        raise ValueError(
            f"process_group must hold the ranks that the batch is split over, got ranks {sorted(ranks)} for a "
            f"parameter of shape {tuple(parameter.shape)} on {mesh} with {parameter.placements}; pass the group of the "
            "data-parallel dimension of the mesh, e.g. mesh['dp'].get_group(), or of all its dimensions for hybrid "
            "sharding"
        )


def _fsdp_modules(trunk: nn.Module | None) -> list[Any]:
    if trunk is None:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in trunk.modules() if isinstance(module, FSDPModule)]
