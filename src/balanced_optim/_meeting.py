"""What all ranks tell each other before and after the passes of a batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ._numbers import Flag, Scalar
from ._passes import Heard, Passes, Take, take_backward, take_grad

# The message before a step has room for this many tasks, so that its size does not depend on what a rank takes T for.
_ROOM = 64
# Its first numbers, all but the last one alike on all ranks. For every task there follow the sum of the losses, the
# number of samples, whether a loss is here, and whether its graph holds a class to check.
_BROKEN, _DIGEST, _SCALE, _TASKS, _WIDE, _HEADER = range(6)
_ROWS = 4


@dataclass(frozen=True, slots=True)
class Totals:
    """What all ranks brought for one batch.

    Attributes:
        sums: ``sum of samples * loss`` over ranks and micro-batches, shape (T,), float64.
        samples: the number of samples of each task, shape (T,); 0 for a task that no rank has.
        dtype: float32, or float64 where some rank's losses are.
        bad: for a task whose loss is not finite on some rank, the first such rank and its value.
        marked: tasks whose graph on some rank holds a class that has yet to be checked.
    """

    sums: Tensor
    samples: Tensor
    dtype: torch.dtype
    bad: dict[int, tuple[int, float]]
    marked: list[bool]


class Alone:
    """One process: nothing is sent, nothing is kept in parts. The other classes answer the same questions.

    Attributes:
        size: the number of ranks.
        averaging: by what the framework divides the sum of the ranks' gradients.
        reduces_in_passes: whether gradients are added up over the ranks inside each backward pass, which then cannot
            stop at some of the parameters.
        outside_get_gradients: whether leaves outside of the optimizer get a `.grad`.
        hint: what else may be wrong where a task reaches nothing.
        take: how a backward pass is made.
        agrees: whether each rank keeps a part of every average, so that `agree` and `total` send messages.
        shares: for each averaged parameter the part of its squared norm that counts here; None: all of it.
    """

    size: int = 1
    averaging: int = 1
    reduces_in_passes = False
    outside_get_gradients = True
    hint = ""
    take: Take = staticmethod(take_backward)
    agrees = False
    shares: Sequence[float] | None = None

    def parts(self, averaged: Sequence[Tensor]) -> list[Tensor]:
        """The averaged parameters as far as this rank keeps their averages."""
        return list(averaged)

    def reduced(self, passes: Passes, tasks: Sequence[int], shared: Sequence[Tensor], *, held: bool) -> Passes:  # noqa: ARG002
        """Stage: gradients added up over all ranks."""
        return passes

    def close(self, norms: Tensor, rest: dict[Tensor, Tensor], reached: set[Tensor]) -> Heard:
        """After the passes: what all ranks have. Raises if one of them failed."""
        return norms, rest, reached

    @contextmanager
    def settled(self) -> Iterator[None]:
        """An error of one rank inside is one of all."""
        yield

    def everywhere(self, run: Callable[[], Tensor]) -> Tensor:
        """What `run` returns, on rank 0 if there are several."""
        return run()

    def agree(self, ok: Flag) -> Flag:
        """Whether `ok` holds on all ranks that keep parts."""
        return ok

    def total(self, counted: Tensor) -> Tensor:
        """The sum of what each rank counts of its part."""
        return counted

    def wrap(self, own: Tensor, parameter: Tensor) -> Tensor:  # noqa: ARG002
        """This rank's part of a gradient as `parameter.grad` needs it, of an average as a checkpoint does."""
        return own

    def own(self, entry: Tensor, parameter: Tensor) -> Tensor:  # noqa: ARG002
        """This rank's part of an average from a checkpoint."""
        return entry.full_tensor() if hasattr(entry, "full_tensor") else entry

    def reset(self) -> None:
        """Leave everything as it was before the passes."""


class Ranks(Alone):
    """What replicated and sharded parameters have in common: the meetings."""

    outside_get_gradients = False
    hint = (
        "; with FSDP2, which replaces parameters, build the base optimizer and this one after fully_shard, and leave "
        "set_requires_gradient_sync alone: accumulate() takes its place"
    )
    take: Take = staticmethod(take_grad)

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self.size, self._rank = dist.get_world_size(group), dist.get_rank(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an optimizer with a process_group cannot be pickled; save its state_dict() instead")

    def meet(
        self,
        facts: Mapping[str, Any],
        error: BaseException | None,
        *,
        sums: Tensor | None = None,
        by_task: Sequence[Sequence[float]] = ((), (), ()),
        scale: Scalar | None = None,
    ) -> Totals:
        """One message of 2 kB from every rank to every rank. The host waits for it.

        Args:
            facts: what all ranks must have in common; compared by hash.
            error: what keeps this rank from going on.
            sums: ``samples * loss`` of this rank, shape (T,).
            by_task: three rows of T: samples of this rank, whether it has a loss, whether that has to be checked.
            scale: the scaler's.

        Raises:
            BaseException: `error`.
            RuntimeError: another rank has an error, or facts differ.
            ValueError: a task's loss is on some ranks only, where that cannot be.
        """
        tasks = len(by_task[0])
        mine = torch.zeros(_ROWS, max(tasks, _ROOM), dtype=torch.float64, device=self._device)
        if sums is not None:
            mine[0, :tasks] = sums
            mine[1:, :tasks] = torch.tensor(by_task, dtype=torch.float64, device=self._device)
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
        table = rows[:, _HEADER:].reshape(self.size, _ROWS, _ROOM)[:, :, :tasks]
        if tasks > _ROOM:
            rest = self._gather(mine[:, _ROOM:].reshape(-1)).reshape(self.size, _ROWS, tasks - _ROOM)
            table = torch.cat([table, rest], 2)
        return self._totals(table, bool(rows[:, _WIDE].any()), facts["the tasks"])

    def _totals(self, table: Tensor, wide: bool, names: Sequence[str]) -> Totals:
        losses, _, here, marked = table.transpose(0, 1).tolist()
        self._check_presence(here, names)
        bad = {
            task: (rank, losses[rank][task])
            for task in range(len(names))
            for rank in reversed(range(self.size))
            if not math.isfinite(losses[rank][task])
        }
        sums, samples = ordered_sum(table[:, :2]).unbind()
        dtype = torch.float64 if wide else torch.float32
        return Totals(sums, samples, dtype, bad, [any(ranks) for ranks in zip(*marked, strict=True)])

    def _check_presence(self, here: list[list[float]], tasks: Sequence[str]) -> None:
        """Raise where a task that is missing on some ranks would leave the others waiting."""

    def _explain(self, facts: Mapping[str, Any]) -> NoReturn:
        """Raise with the first thing that ranks do not have in common."""
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, dict(facts), group=self._group)
        for name, first in everyones[0].items():
            for rank, theirs in enumerate(everyones):
                if theirs.get(name) != first:
                    raise RuntimeError(
                        f"all ranks must agree on {name}: rank 0 has {first!r}, rank {rank} has {theirs.get(name)!r}; "
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

    @contextmanager
    def settled(self) -> Iterator[None]:
        """By one message of a number. The host waits for it."""
        try:
            yield
        except BaseException as error:
            self._settle(error)
        else:
            self._settle(None)

    def _settle(self, failure: BaseException | None) -> None:
        mine = torch.tensor([failure is not None], dtype=torch.int32, device=self._device)
        dist.all_reduce(mine, group=self._group)
        if mine.item():
            self._raise_everywhere(failure)

    def everywhere(self, run: Callable[[], Tensor]) -> Tensor:
        """Every rank runs it, since it may remember; rank 0's vector counts, since chance may play a part."""
        with self.settled():
            vector = run().to(self._device).contiguous()
        dist.broadcast(vector, group=self._group, group_src=0)
        return vector

    def _gather(self, vector: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """Every rank's vector, shape (R, length)."""
        group = group or self._group
        rows = [torch.empty_like(vector) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, vector.contiguous(), group=group)
        return torch.stack(rows)


def _digest(facts: Mapping[str, Any]) -> float:
    """A number that a float64 holds exactly."""
    return float(int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=6).digest(), "little"))


def ordered_sum(rows: Tensor) -> Tensor:
    """The sum over the first dimension, from rank 0 on."""
    return reduce(torch.add, rows.unbind())
