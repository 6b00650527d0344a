"""What changes from step to step."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._cuda_store import DeviceRows, DeviceSum
from ._members import are_same
from ._rule import Balance
from ._running_sum import RunningSum
from ._store import FlatGradientBuffer

Kind = tuple[torch.Size, torch.dtype, torch.device]
Store = FlatGradientBuffer | RunningSum | DeviceRows | DeviceSum


@dataclass(slots=True)
class Averages:
    """What is known of the tasks once a batch has been counted. The tensors are written in place.

    Attributes:
        tasks: names, in order.
        named: whether losses come as a mapping.
        store: the rows, or the running sum of beta = 0.
        rows: the parameters that the store's rows are of, in order.
        kinds: what they were when the store was made.
        counts: for each task the batches that had it, shape (T,), int64.
        batches: how many batches had a task at all, int64.
        task_weights: priorities, shape (T,).
        ages: for each task the steps since its norm was measured; 0: never.
        norms: in the one-backward form every task's latest norm, shape (T,).
    """

    tasks: tuple[str, ...]
    named: bool
    store: Store
    rows: list[Tensor]
    kinds: list[Kind]
    counts: Tensor
    batches: Tensor
    task_weights: Tensor
    ages: list[int]
    norms: Tensor


def kinds_of(parameters: Sequence[Tensor]) -> list[Kind]:
    """What a store depends on."""
    return [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters]


def fits(known: Averages, averaged: Sequence[Tensor]) -> bool:
    """Whether these are the parameters that the store was made for, as they were then."""
    return are_same(known.rows, averaged) and known.kinds == kinds_of(averaged)


def new_averages(tasks: tuple[str, ...], named: bool, store: Store, rows: list[Tensor], weights: Any) -> Averages:
    """Before the first batch: all counts at zero."""
    device, number = store.device, len(tasks)
    return Averages(
        tasks,
        named,
        store,
        rows,
        kinds_of(rows),
        torch.zeros(number, dtype=torch.int64, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
        torch.tensor(weights or [1.0] * number, dtype=store.norm_dtype, device=device),
        [0] * number,
        torch.zeros(number, dtype=store.norm_dtype, device=device),
    )


def set_weights(known: Averages, weights: list[float] | None) -> None:
    """Set the priorities in place."""
    old = known.task_weights
    old.copy_(torch.tensor(weights or [1.0] * len(known.tasks), dtype=old.dtype, device=old.device))


def empty(known: Averages) -> None:
    """Forget where everything lies."""
    if known.store.keeps_rows:
        known.store.load_averages([[None] * len(known.tasks)] * len(known.rows))
    for vector in (known.counts, known.batches, known.norms):
        vector.zero_()
    known.ages[:] = [0] * len(known.ages)


@dataclass(slots=True)
class State:
    """What a checkpoint holds. One object, mutated: wrappers may shadow attributes of the optimizer.

    Attributes:
        beta, beta_decay: the schedule, which a checkpoint restores.
        names: task names that `task_weights` fixes, or None.
        task_weights: priorities as last given, or None.
        averages: None before the first batch.
        reached: shared parameters that a task ever reached.
        emptied: averages that were forgotten where they lie, and what they had reached; None else. A captured graph
            goes on in them, and so does the next batch outside of it if it has as many tasks.
    """

    beta: float
    beta_decay: float
    names: tuple[str, ...] | None
    task_weights: list[float] | None
    averages: Averages | None = None
    reached: set[Tensor] = field(default_factory=set)
    emptied: tuple[Averages, set[Tensor]] | None = None

    def notice(self) -> None:
        """Take back what was emptied if a graph has counted batches there since; only then the device is read."""
        if self.averages is None and self.emptied is not None and int(self.emptied[0].batches) > 0:
            self.averages, reached = self.emptied
            self.reached.update(reached)
            self.emptied = None

    @property
    def kept(self) -> Averages | None:
        """The averages that a captured graph may write to, in use or emptied."""
        return self.averages if self.emptied is None else self.emptied[0]

    def cosines(self) -> Tensor:
        """See `DualBalancedOptimizer.gradient_cosines`."""
        self.notice()
        known = self.averages
        if known is None or not known.store.keeps_rows:
            reason = "no step was taken yet" if known is None else "beta=0 keeps none; pass beta > 0"
            raise RuntimeError(f"gradient_cosines() needs averaged gradients, but {reason}")
        gram = known.store.gram()
        norms = gram.diagonal().sqrt()
        return gram / norms.outer(norms)

    @property
    def tasks(self) -> tuple[str, ...] | None:
        """The names of the tasks as far as they are fixed."""
        return self.names if self.averages is None else self.averages.tasks

    @property
    def named(self) -> bool:
        """Whether losses come as a mapping."""
        return self.names is not None if self.averages is None else self.averages.named

    @property
    def expected(self) -> tuple[str, ...] | None:
        """The tasks that are fixed, or as many as there are priorities, by position."""
        if self.tasks is None and self.task_weights is not None:
            return tuple(str(task) for task in range(len(self.task_weights)))
        return self.tasks


@dataclass(slots=True)
class Pending:
    """What a checkpoint does not hold.

    Attributes:
        balance: the record of the last step.
        micro_batches: what `accumulate` has gathered for the batch that is not complete yet.
        tasks, named: task names as micro-batches have them before any batch is complete.
        waiting: `.grad` holds a batch that no step has used.
        skip_next_step: the latest batch was left out, so its step is too.
        loaded: a checkpoint was loaded since ranks last met.
        said: warnings that were given.
        logged: by task whether its logarithm is taken, on the device.
    """

    balance: Balance | None = None
    micro_batches: Any = None
    tasks: tuple[str, ...] | None = None
    named: bool = False
    waiting: bool = False
    skip_next_step: bool = False
    loaded: bool = False
    said: set[str] = field(default_factory=set)
    logged: dict[Any, Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Drop what waits for a step, and micro-batches."""
        self.micro_batches = self.tasks = None
        self.waiting = self.skip_next_step = False


def say_once(pending: Pending, key: str, text: str) -> None:
    """Warn, but not again."""
    if key not in pending.said:
        pending.said.add(key)
        warn(text)


def warn(text: str) -> None:
    """Warn at the line that called this library; what torch puts around methods lies between."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and str(frame.f_globals.get("__name__")).split(".")[0] in (__package__, "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
