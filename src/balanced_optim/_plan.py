"""What an optimizer was given, fixed, and what changes from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ._accumulation import MicroBatches
from ._aggregation import Aggregator
from ._balance import Balance, beta_at
from ._distributed import Alone
from ._gradient_buffer import FlatGradientBuffer
from ._gradient_sum import GradientSum
from ._settings import Settings

Store = FlatGradientBuffer | GradientSum


@dataclass(frozen=True, slots=True)
class Plan:
    """What the constructor fixed.

    Attributes:
        settings: the method's numbers and choices.
        shared: positions of the shared parameters among all of the wrapped optimizer.
        averaged: positions of those whose gradients are averaged and measured: all shared ones, or `norm_params`.
        joint: the one-backward form.
        aggregator: what takes the place of the weights, or None.
        names: task names from `task_weights`, or None.
        priorities: T of them, or None.
    """

    settings: Settings
    shared: list[int]
    averaged: list[int]
    joint: bool
    aggregator: Aggregator | None
    names: tuple[str, ...] | None
    priorities: tuple[float, ...] | None

    def new_store(self, ranks: Alone, parameters: Sequence[Tensor], tasks: int, beta: float) -> Store:
        """Rows where the method looks at all gradients at once or again later, else a running sum."""
        settings = self.settings
        averaged = ranks.parts([parameters[position] for position in self.averaged])
        capped = settings.max_weight is not None and settings.norm_target is not None
        if beta > 0 or capped or self.joint or self.aggregator is not None:
            return FlatGradientBuffer(averaged, tasks, settings.ema_dtype, ranks.shares)
        return GradientSum(averaged[0].device, settings.norm_target is not None, ranks.shares)


@dataclass(slots=True)
class Progress:
    """What changes from step to step. One object, mutated: wrappers may shadow attributes of the optimizer.

    Attributes:
        beta, beta_decay: the schedule, which a checkpoint restores.
        tasks: task names, None before they are known.
        named: whether losses come as a mapping.
        counts: for each task the batches that had it; empty before the first.
        reached: for each shared parameter, whether a task ever reached it.
        store: the averages.
        balance: the record of the last step.
        norms: in the one-backward form every task's latest norm, shape (T,).
        ages: for each task the steps since its norm was measured.
        memory: what the aggregator is to recall before its next call, from a checkpoint.
        micro_batches: what `accumulate` has gathered for the batch that is not complete yet.
        pending: `.grad` holds a batch that no step has used.
        skip_next_step: the latest batch was left out, so its step is too.
        vectorizes: False once a vectorized pass was not possible.
        vectorized: one was made and checked.
    """

    beta: float
    beta_decay: float
    tasks: tuple[str, ...] | None
    named: bool
    counts: list[int] = field(default_factory=list)
    reached: list[bool] = field(default_factory=list)
    store: Store | None = None
    balance: Balance | None = None
    norms: Tensor | None = None
    ages: list[int] = field(default_factory=list)
    memory: dict[str, Any] | None = None
    micro_batches: MicroBatches | None = None
    pending: bool = False
    skip_next_step: bool = False
    vectorizes: bool = True
    vectorized: bool = False

    def start_anew(self, names: tuple[str, ...] | None) -> None:
        """Forget averages, counts and the record of the last step; `names` given by the constructor stay."""
        self.tasks, self.named = names, names is not None
        self.counts.clear()
        self.ages.clear()
        self.reached[:] = [False] * len(self.reached)
        self.store = self.balance = self.norms = self.micro_batches = self.memory = None
        self.pending = self.skip_next_step = False

    def beta_of(self, task: int) -> float:
        """beta_k for the next batch of this task."""
        count = self.counts[task] if self.counts else 0
        return beta_at(self.beta, self.beta_decay, count + 1)
