"""DualBalancedOptimizer: the order of calls, and torch.optim's contract. The maths is in the modules beside it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._balance import Balance, balance_weights, beta_at
from ._gradient_buffer import Flag, FlatGradientBuffer, GradientSum, Scalar, stack_scalars
from ._settings import (
    Settings,
    check_base_optimizer,
    check_schedule,
    norm_positions,
    read_task_weights,
    shared_positions,
)
from ._state import MethodState, check_fits, merge, split
from ._task_gradients import (
    add_gradients,
    at_once,
    joint_size,
    leaves,
    put_gradients,
    take_gradients,
    take_pass,
    where_ok,
)
from ._task_losses import (
    Losses,
    TaskLosses,
    acceptable,
    cotangents,
    describe_bad_loss,
    read_losses,
)

Store = FlatGradientBuffer | GradientSum
_OWN_ATTRIBUTES = ("base_optim", "_settings", "_shared", "_averaged", "_joint", "_names", "_priorities", "_progress")


class _RefusedBatchError(Exception):
    """A batch that cannot be used; carries the error that the user sees under ``nonfinite="raise"``."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(slots=True)
class _Progress:
    """What changes from step to step. One object, mutated: wrappers may shadow attributes of the optimizer."""

    beta: float
    beta_decay: float
    tasks: tuple[str, ...] | None
    named: bool
    counts: list[int]
    reached: list[bool]
    store: Store | None = None
    balance: Balance | None = None
    norms: Tensor | None = None
    ages: list[int] = field(default_factory=list)
    pending: bool = False
    skip_next_step: bool = False


@dataclass(slots=True)
class _Work:
    """One batch on its way through a step.

    Attributes:
        batch: the losses by task.
        values: raw losses, shape (T,), NaN for an absent task.
        starts: cotangents, shape (T,).
        parameters: all of the wrapped optimizer; in the one-backward form also other leaves of the graph.
        store: where averaged gradients go; private to this batch until the first one is through.
        usable: for every task whether it may count as far as its loss says and, where a bad task refuses the
            batch, as far as all losses say. Bools on a CPU, else scalar tensors.
        norms: of every task's averaged gradient, NaN for a task that takes no part.
        flags: for each present task whether its loss and its gradients were usable.
        others: gradients of parameters that are not shared, by position, summed over tasks.
        reached: which shared parameters the batch reached, by index.
    """

    batch: TaskLosses
    values: Tensor
    starts: Tensor
    parameters: list[Tensor]
    store: Store
    usable: list[Flag]
    norms: list[Scalar]
    flags: list[Flag] = field(default_factory=list)
    others: dict[int, Tensor] = field(default_factory=dict)
    reached: set[int] = field(default_factory=set)


def _of_base(name: str) -> property:
    """A live property onto an attribute of the wrapped optimizer, which replaces it when it loads its state."""

    def get(self: DualBalancedOptimizer) -> Any:
        return getattr(self.base_optim, name)

    def put(self: DualBalancedOptimizer, value: Any) -> None:
        setattr(self.base_optim, name, value)

    return property(get, put, doc=f"`{name}` of the wrapped optimizer.")


def _bad_gradient(whose: str) -> str:
    return (
        f"gradient of {whose} must be finite, got NaN or inf behind a finite loss; no parameter was changed; look for "
        "sqrt, norm, log or a division at 0 in the loss, or for a loss or ema_dtype of half precision that cannot hold "
        "1 / (loss + eps); or pass nonfinite='skip' to leave such batches out"
    )


class DualBalancedOptimizer(Optimizer):
    """Wraps an optimizer so that several task losses train shared parameters in balance (DB-MTL, Algorithm 1).

    ``optimizer.step(losses)`` takes the place of ``sum(losses).backward(); optimizer.step()``:

    - ``g_t = grad log(loss_t + eps)`` for every task t, one backward pass each;
    - ``ema_t <- beta_k * ema_t + (1 - beta_k) * g_t`` with ``beta_k = beta / k**beta_decay``, k the number of
      batches that had task t;
    - ``w_t = alpha / ||ema_t||`` with ``alpha = max_t ||ema_t||``;
    - shared parameters get ``.grad += sum_t w_t * ema_t``, all others ``.grad += sum_t grad log(loss_t + eps)``.

    Then the wrapped optimizer steps. It stays the place of learning rates, schedulers and its own state; this
    class is a `torch.optim.Optimizer` too and shares `param_groups`, `state` and `defaults` with it.

    Cost a step: T backward passes, and memory for (T + 1) * n scalars (n shared scalars), 1 * n at beta = 0
    without `max_weight`. On a GPU two waits for the device a step, none with ``nonfinite="ignore"``.

    With `norm_params` (the one-backward form) norms and averages are taken on a subset of the shared parameters
    and ONE joint backward of ``sum_t w_t * log(loss_t + eps)`` gives every shared gradient: its own, not
    averaged. Cost: one backward pass and T short ones that stop at the subset, memory for (T + 1) scalars of the
    subset.

    Differences from the paper: the average's default schedule decays (its Fig. 5 prefers that to the constant
    0.9 of the authors' code); a zero gradient gets weight 0 instead of alpha / eps; a task absent from a batch
    keeps its average and its count and contributes nothing.

    Args:
        base_optim: any optimizer that holds every trained parameter, heads included.
        shared_params: the shared trunk: an iterable of parameters or a Module, all of them in `base_optim`.
        beta: weight of the old average in [0, 1), before the decay; 0 keeps no average.
        beta_decay: beta_k = beta / k**beta_decay, >= 0.
        eps: added to every loss under the log, > 0, in units of the loss; also how negative a loss may be.
        log_transform: False takes losses as they are, as an ablation or for losses that can be negative.
        norm_target: alpha over the tasks that count: "max", "mean", "median", "min"; None rescales nothing.
        max_weight: cap on a task's weight before `task_weights`. 1 keeps the log only, None has no cap.
        task_weights: priorities >= 0, multiplied in after the rescale; a sequence of T, or a mapping by task
            name, which fixes the names.
        norm_params: a subset of the shared parameters on which norms are measured, as in GradNorm: best the last
            shared layer, e.g. ``trunk[-1].parameters()``; every task must depend on it. An iterable or a Module.
        refresh_every: measure norms anew when a task of the batch has one that is m steps old, and reuse them in
            between; needs `norm_params` (all shared parameters may be given). Absent tasks and caps are still
            minded in every step.
        ema_dtype: dtype of the averages; None takes float32, or float64 for float64 parameters.
            torch.bfloat16 halves their memory; sums and norms are still taken in float32.
        nonfinite: what to do with a loss that is not finite (or <= -eps under the log) or a gradient that is
            not finite: "raise" an error, "skip" the batch, or "ignore": leave that task out of this batch as
            if it were absent. In every mode no average takes a non-finite value. With `norm_params`, "ignore"
            drops the whole shared gradient of a batch where only the joint backward is not finite, since it
            cannot tell whose it is. On a GPU "ignore" asks nothing of the device: the count of a task left out
            goes on, its heads get zeros instead of no gradient, and with `norm_params` one bad loss zeroes the
            shared gradient of the batch.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.

    Example:
        >>> trunk, heads = torch.nn.Linear(4, 8), torch.nn.ModuleList([torch.nn.Linear(8, 1) for _ in range(2)])
        >>> base = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.1)
        >>> optimizer = DualBalancedOptimizer(base, trunk)
        >>> features = trunk(torch.randn(16, 4))
        >>> optimizer.step([head(features).square().mean() for head in heads])
        >>> optimizer.last_balance.weights.shape
        torch.Size([2])
    """

    param_groups = _of_base("param_groups")
    state = _of_base("state")
    defaults = _of_base("defaults")

    def __init__(
        self,
        base_optim: Optimizer,
        shared_params: Iterable[Tensor] | nn.Module,
        *,
        beta: float = 0.9,
        beta_decay: float = 0.5,
        eps: float = 1e-8,
        log_transform: bool = True,
        norm_target: str | None = "max",
        max_weight: float | None = None,
        task_weights: Sequence[float] | Mapping[str, float] | None = None,
        norm_params: Iterable[Tensor] | nn.Module | None = None,
        refresh_every: int = 1,
        ema_dtype: torch.dtype | None = None,
        nonfinite: str = "raise",
    ) -> None:
        check_base_optimizer(base_optim)
        if isinstance(base_optim, DualBalancedOptimizer):
            raise TypeError("base_optim must be the plain optimizer, got a DualBalancedOptimizer; wrap it once")
        check_schedule(beta, beta_decay)
        settings = Settings(eps, log_transform, norm_target, max_weight, ema_dtype, nonfinite, refresh_every)
        names, priorities = read_task_weights(task_weights)
        shared = shared_positions(base_optim, shared_params)
        measured = norm_positions(base_optim, norm_params, shared, refresh_every)
        self.base_optim = base_optim
        self._settings = settings
        self._shared = shared
        self._joint = measured is not None
        self._averaged = shared if measured is None else measured
        self._names, self._priorities = names, priorities
        self._progress = _Progress(beta, beta_decay, names, names is not None, [], [False] * len(shared))
        # Optimizer.__init__ would make param groups of its own; __setstate__ makes the hook tables only.
        super().__setstate__({})

    def step(  # type: ignore[override]
        self,
        losses: Losses | Callable[[], Any] | None = None,
        closure: Callable[[], Any] | None = None,
    ) -> Any:
        """Balance the losses into `.grad` and step the wrapped optimizer.

        Args:
            losses: the task losses, see `backward`; or a closure that returns them; or None for a plain step of
                the wrapped optimizer on the `.grad` that is there, as after `backward`.
            closure: a function that computes and returns the task losses, without calling `.backward()`. One that
                returns None, as trainers pass, leaves `losses` or the `.grad` of an earlier `backward` to count.

        Returns:
            What the closure returned, or None.
        """
        if closure is None and callable(losses) and not isinstance(losses, (Tensor, Mapping, Sequence, nn.Module)):
            closure, losses = losses, None
        if closure is not None:
            losses = self._run_closure(closure, losses)  # type: ignore[arg-type]
        if losses is not None:
            self.backward(losses)  # type: ignore[arg-type]
        skipped = self._progress.skip_next_step
        self._progress.pending = self._progress.skip_next_step = False
        if not skipped:
            self.base_optim.step()
        return losses if closure is not None else None

    def _run_closure(self, closure: Callable[[], Any], losses: Losses | None) -> Losses | None:
        """What the closure returned, or `losses` where a trainer passes a closure that only wraps them."""
        if not callable(closure):
            raise TypeError(
                f"closure must be a function that returns the task losses, got {type(closure).__name__}; "
                "pass losses themselves as step(losses)"
            )
        with torch.enable_grad():
            returned: Losses | None = closure()
        if returned is None:
            filled = any(parameter.grad is not None for parameter in self._parameters())
            if losses is None and not filled and not self._progress.skip_next_step:
                raise TypeError(
                    "closure must return the task losses, got None and no .grad is set; end it with `return losses`, "
                    "without .backward()"
                )
            return losses
        if losses is not None:
            raise TypeError("step() takes losses or a closure, got both; leave one out")
        return returned

    @torch.no_grad()
    def backward(self, losses: Losses) -> None:
        """Fill `.grad` from the task losses, in place of ``sum(losses).backward()``; then clip and `step()`.

        As with `.backward()`, gradients are added to a `.grad` that is there, and the graph is freed: in the exact
        form by the last task, which leaves what only other tasks use (their heads, or their own forward pass) to
        go with the losses; `del losses` before the next forward saves that memory. Parameters outside the wrapped
        optimizer accumulate as with `.backward()`, in the exact form also from a batch that is refused. A batch that
        is refused leaves parameters, `.grad` and counts as they were. Averages stay too where the form or the
        value of a loss is to blame. What only shows during the passes (a gradient that is not finite, a used
        graph, a task that reaches nothing) never enters its own average, but tasks before it in the list may
        have taken the batch in: holding back all T gradients would double the memory.

        Args:
            losses: one scalar for each task: a sequence (None = task absent from this batch), a mapping from
                task name to loss (missing key or None = absent), or a 1-D tensor. The first call fixes the
                number of tasks and their names.

        Raises:
            TypeError, ValueError: the losses have the wrong form, changed in number or name, are not usable
                numbers, or reach no shared parameter.
            RuntimeError: a gradient is not finite although its loss is; or the graph was used before.
        """
        progress = self._progress
        batch = read_losses(losses, progress.tasks, progress.named)
        self._check_number_of_tasks(len(batch.names))
        work = self._start(batch)
        before = take_gradients(work.parameters)
        try:
            if self._settings.nonfinite != "ignore" and work.store.device.type == "cpu":
                self._check_losses(work)
            measured = self._is_measured(batch)
            if measured:
                self._measure(work)
            else:
                self._reuse(work)
            taken = self._taken(work)
            norms = stack_scalars(work.norms, work.store.norm_dtype, work.store.device)
            weights = self._weights(norms)
            combined = self._combine(work, taken, weights)
        except BaseException as failure:
            self._undo(work, before)
            if not isinstance(failure, _RefusedBatchError):
                raise
            if self._settings.nonfinite == "raise":
                raise failure.error from None
            nothing = torch.full_like(work.values, math.nan), torch.zeros_like(work.values)
            progress.balance = Balance(batch.names, work.values, *nothing, skipped=True)
            progress.skip_next_step = not progress.pending
            return
        complete = self._commit(work, taken if measured else [], norms)
        self._write(work, before, combined)
        progress.balance = Balance(batch.names, work.values, norms, weights, skipped=False)
        progress.pending, progress.skip_next_step = True, False
        if complete:
            self._warn_of_unreached()

    @property
    def last_balance(self) -> Balance | None:
        """What the latest `step(losses)` or `backward(losses)` saw and did; None before the first."""
        return self._progress.balance

    # ------------------------------------------------- one batch, in the order of the calls

    def _start(self, batch: TaskLosses) -> _Work:
        settings = self._settings
        parameters = self._parameters()
        store = self._progress.store or self._new_store(parameters, len(batch.names))
        if self._joint:
            known = {id(parameter) for parameter in parameters}
            parameters += [leaf for leaf in leaves(batch.given) if id(leaf) not in known]
        values = batch.values(store.device)
        fine = acceptable(values, settings.eps, settings.log_transform)
        if settings.nonfinite != "ignore":
            # One bad loss refuses the batch, so no average takes in any part of it.
            each = fine.unbind()
            fine = torch.stack([each[task] for task in batch.present] or [fine.new_ones(())]).all().expand(len(each))
        usable = fine.tolist() if store.device.type == "cpu" else list(fine.unbind())
        starts = cotangents(values, settings.eps, settings.log_transform)
        return _Work(batch, values, starts, parameters, store, usable, [math.nan] * len(batch.names))

    def _is_measured(self, batch: TaskLosses) -> bool:
        """Whether this step measures norms: if a task here is new, or its norm is `refresh_every` steps old."""
        if not self._joint:
            return True
        progress = self._progress
        return not progress.ages or any(
            progress.counts[task] == 0 or progress.ages[task] >= self._settings.refresh_every for task in batch.present
        )

    def _measure(self, work: _Work) -> None:
        """One backward pass a task; its gradient goes into the store where it is usable."""
        refuse = self._settings.nonfinite != "ignore"
        heads = self._heads(work)
        inputs = self._inputs(work, [*self._averaged, *heads]) if self._joint else None
        # A task that is known to be left out needs no pass; which one frees the graph depends on it.
        running = [task for task in work.batch.present if work.usable[task] is not False]
        healthy: Flag = True
        for task in work.batch.present:
            ok: Flag = False
            if task in running:
                retain = self._joint or task != running[-1]
                ok = self._measure_task(work, task, heads, inputs, healthy, retain)
            work.flags.append(ok)
            healthy = healthy & ok if refuse else True
        if refuse:
            if work.store.device.type != "cpu":
                self._check_losses(work)
            self._check_gradients(work)

    def _measure_task(
        self,
        work: _Work,
        task: int,
        heads: list[int],
        inputs: list[Tensor] | None,
        healthy: Flag,
        retain_graph: bool,
    ) -> Flag:
        """One task's pass; on return its gradients are in the store or gone, so that the next pass finds room."""
        found = self._pass(work, task, inputs, retain_graph)
        own = {position: gradient for position in heads if (gradient := found[position]) is not None}
        size = joint_size(list(own.values()), work.store.device)
        ok = self._take(work, task, found, work.usable[task] & healthy & (size < math.inf))
        if ok is False:
            return ok
        for position, gradient in own.items():
            masked = isinstance(ok, Tensor) and self._settings.nonfinite == "ignore"
            kept = where_ok(torch.as_tensor(ok), gradient) if masked else gradient
            work.others[position] = add_gradients(work.others.get(position), kept)
        return ok

    def _pass(self, work: _Work, task: int, inputs: list[Tensor] | None, retain_graph: bool) -> list[Tensor | None]:
        """One task's gradients on all parameters; those on large shared ones may be in the store already."""
        batch, store, beta = work.batch, work.store, self._beta(task)
        early = store.large if isinstance(store, FlatGradientBuffer) else []
        large = [work.parameters[self._averaged[index]] for index in early]

        def average(index: int, gradient: Tensor) -> None:
            if isinstance(store, FlatGradientBuffer):
                store.propose_early(early[index], gradient, task, beta)

        with at_once(large, average):
            return take_pass(
                [batch.loss(task)],
                [work.starts[task]],
                [batch.names[task]],
                work.parameters,
                retain_graph=retain_graph,
                inputs=inputs,
            )

    def _beta(self, task: int) -> float:
        progress = self._progress
        count = progress.counts[task] if progress.counts else 0
        return beta_at(progress.beta, progress.beta_decay, count + 1)

    def _take(self, work: _Work, task: int, found: list[Tensor | None], ok: Flag) -> Flag:
        """Put one task's shared gradient into the store if it is finite and `ok`; return whether it was."""
        gradients = [found[position] for position in self._averaged]
        reached = {index for index, gradient in enumerate(gradients) if gradient is not None} | work.store.early
        if not reached:
            if any(work.parameters[position].requires_grad for position in self._shared):
                raise ValueError(self._reaches_nothing(work.batch.names[task]))
            return ok
        norm = work.store.propose(gradients, task, self._beta(task))
        ok = ok & (norm < math.inf)
        work.store.accept(task, ok)
        if ok is False:
            return ok
        work.norms[task] = torch.where(ok, norm, math.nan) if isinstance(ok, Tensor) else norm
        work.reached |= reached
        return ok

    def _reuse(self, work: _Work) -> None:
        """The norms as last measured, and the heads' gradients by one pass that stops at the heads."""
        progress, batch = self._progress, work.batch
        for task in batch.present:
            ok = work.usable[task]
            if progress.norms is not None:
                known = progress.norms[task]
                work.norms[task] = torch.where(torch.as_tensor(ok, device=known.device), known, math.nan)
            work.flags.append(ok)
        if self._settings.nonfinite != "ignore" and work.store.device.type != "cpu":
            self._check_losses(work)
        heads = self._heads(work)
        # Not a product with 0: the start of a bad loss may be NaN.
        fine = acceptable(work.values, self._settings.eps, self._settings.log_transform)
        starts = torch.where(fine, work.starts, torch.zeros_like(work.starts))
        gradients = self._joint_pass(work, starts, heads, retain_graph=True)
        for position, gradient in zip(heads, gradients, strict=True):
            if gradient is not None:
                work.others[position] = gradient

    def _combine(self, work: _Work, taken: list[int], weights: Tensor) -> list[Tensor | None]:
        """The shared gradients; empty where the batch brought none."""
        if not self._joint:
            return work.store.weighted_sum(weights) if taken and work.reached else []
        starts = torch.where(weights > 0, work.starts * weights, torch.zeros_like(work.starts))
        combined = self._joint_pass(work, starts, self._shared, retain_graph=False)
        work.reached = {index for index, gradient in enumerate(combined) if gradient is not None}
        return combined

    def _joint_pass(self, work: _Work, starts: Tensor, positions: list[int], retain_graph: bool) -> list[Tensor | None]:
        """One pass from all losses that count, down to the parameters at `positions`; refused if not finite."""
        inputs = self._inputs(work, positions)
        tasks = self._taken(work)
        if not inputs or not tasks:
            return [None] * len(positions)
        losses, names = [work.batch.loss(task) for task in tasks], [work.batch.names[task] for task in tasks]
        found = take_pass(
            losses, [starts[task] for task in tasks], names, work.parameters, retain_graph=retain_graph, inputs=inputs
        )
        gradients = [found[position] for position in positions]
        ok = joint_size([gradient for gradient in gradients if gradient is not None], work.store.device) < math.inf
        if self._settings.nonfinite == "ignore":
            return [None if gradient is None else where_ok(torch.as_tensor(ok), gradient) for gradient in gradients]
        if not ok:
            raise _RefusedBatchError(RuntimeError(_bad_gradient(f"the tasks {names} together")))
        return gradients

    def _heads(self, work: _Work) -> list[int]:
        """Positions of all parameters that are not shared."""
        return sorted(set(range(len(work.parameters))) - set(self._shared))

    @staticmethod
    def _inputs(work: _Work, positions: list[int]) -> list[Tensor]:
        return [work.parameters[position] for position in positions if work.parameters[position].requires_grad]

    def _reaches_nothing(self, name: str) -> str:
        if self._joint:
            return (
                f"task {name!r} reaches none of norm_params: its loss does not depend on them, or they are frozen; "
                "choose some that every task depends on, e.g. norm_params=trunk[-1].parameters()"
            )
        return (
            f"task {name!r} reaches no shared parameter: its loss does not depend on shared_params; "
            "leave it out of the losses (add its own .backward()), or correct shared_params"
        )

    def _check_losses(self, work: _Work) -> None:
        """Refuse the batch if a loss is not usable. Reads the losses on the host."""
        settings = self._settings
        usable = acceptable(work.values, settings.eps, settings.log_transform).tolist()
        for task in work.batch.present:
            if not usable[task]:
                value = work.values[task].item()
                message = describe_bad_loss(work.batch.names[task], value, settings.eps, settings.log_transform)
                raise _RefusedBatchError(ValueError(message))

    def _check_gradients(self, work: _Work) -> None:
        """Refuse the batch if a gradient is not finite. Reads one flag a task on the host, all at once."""
        flags = work.flags
        if flags and isinstance(flags[0], Tensor):
            flags = torch.stack([torch.as_tensor(flag) for flag in flags]).tolist()
        for task, ok in zip(work.batch.present, flags, strict=True):
            if not ok:
                raise _RefusedBatchError(RuntimeError(_bad_gradient(f"task {work.batch.names[task]!r}")))

    def _taken(self, work: _Work) -> list[int]:
        """The tasks whose gradients count. An accelerator is not asked: there "ignore" counts all that came."""
        if work.store.device.type != "cpu":
            return work.batch.present
        return [task for task, ok in zip(work.batch.present, work.flags, strict=True) if ok]

    def _weights(self, norms: Tensor) -> Tensor:
        settings = self._settings
        priorities = (
            torch.ones_like(norms)
            if self._priorities is None
            else stack_scalars(self._priorities, norms.dtype, norms.device)
        )
        return balance_weights(norms, settings.norm_target, settings.max_weight, priorities)

    def _commit(self, work: _Work, averaged: list[int], norms: Tensor) -> bool:
        """Count the batch; from here on the tasks are fixed. Return whether every task has now been seen at last."""
        progress, batch = self._progress, work.batch
        if not progress.counts:
            progress.tasks, progress.named = batch.names, batch.named
            progress.counts.extend([0] * len(batch.names))
            progress.ages.extend([0] * len(batch.names))
            progress.store = work.store
        first_complete = min(progress.counts) == 0 and len(averaged) == len(batch.names)
        for task in averaged:
            progress.counts[task] += 1
        for index in work.reached:
            progress.reached[index] = True
        if self._joint:
            self._remember_norms(norms, averaged)
        return first_complete

    def _remember_norms(self, norms: Tensor, averaged: list[int]) -> None:
        """Keep the latest norm of every task, and how many steps ago each was measured."""
        progress = self._progress
        if averaged:
            known = norms if progress.norms is None else progress.norms
            progress.norms = torch.where(norms.isnan(), known, norms)
        progress.ages[:] = [1 if task in averaged else age + 1 for task, age in enumerate(progress.ages)]

    def _warn_of_unreached(self) -> None:
        parameters = self._parameters()
        unreached = [
            tuple(parameters[position].shape)
            for position, reached in zip(self._shared, self._progress.reached, strict=True)
            if not reached and parameters[position].requires_grad
        ]
        if unreached:
            warnings.warn(
                f"no task reaches {len(unreached)} of the shared parameters (the first has shape {unreached[0]}); "
                "they get no gradient",
                stacklevel=4,
            )

    def _write(self, work: _Work, before: list[Tensor | None], combined: list[Tensor | None]) -> None:
        """Set every `.grad`: what was there before the batch plus what the batch brought.

        A shared parameter that some task once reached gets zeros where this batch has nothing for it; one that
        no task ever reached gets no `.grad`.
        """
        new = dict(work.others)
        for position, gradient, reached in zip(self._shared, combined, self._progress.reached, strict=False):
            if reached:
                parameter = work.parameters[position]
                new[position] = torch.zeros_like(parameter) if gradient is None else gradient.to(parameter.dtype)
        after = list(before)
        for position, gradient in new.items():
            after[position] = add_gradients(before[position], gradient)
        put_gradients(work.parameters, after)

    def _undo(self, work: _Work, before: list[Tensor | None]) -> None:
        """Leave `.grad` and the counts as they were, and averages that this batch began at zero."""
        put_gradients(work.parameters, before)
        work.store.forget_batch()
        for task, count in enumerate(self._progress.counts):
            if count == 0:
                work.store.clear(task)
        if self._progress.norms is not None and isinstance(work.store, FlatGradientBuffer):
            self._progress.norms = work.store.norms()

    def _new_store(self, parameters: list[Tensor], tasks: int) -> Store:
        """Rows where the method looks at all gradients at once or again later, else a running sum."""
        settings = self._settings
        averaged = [parameters[position] for position in self._averaged]
        capped = settings.max_weight is not None and settings.norm_target is not None
        if self._progress.beta > 0 or capped or self._joint:
            return FlatGradientBuffer(averaged, tasks, settings.ema_dtype)
        return GradientSum(averaged[0].device, self._priorities or (1.0,) * tasks, settings.norm_target is not None)

    def _check_number_of_tasks(self, tasks: int) -> None:
        if self._priorities is not None and len(self._priorities) != tasks:
            raise ValueError(
                f"losses must have {len(self._priorities)} entries, one for each of task_weights, got {tasks}"
            )

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.base_optim.param_groups for parameter in group["params"]]

    # ------------------------------------------------- torch.optim's contract

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `.grad` of every parameter of the wrapped optimizer."""
        self._progress.pending = self._progress.skip_next_step = False
        self.base_optim.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer. Its parameters are not shared: they count as heads."""
        self.base_optim.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict with the averages, counts, task names and schedule added.

        The averages are views of the buffer, as torch's own entries are: save or deepcopy before the next step.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        progress = self._progress
        averages: list[Tensor | None] = [None] * len(self._averaged)
        if isinstance(progress.store, FlatGradientBuffer):
            reached = dict(zip(self._shared, progress.reached, strict=True))
            rows = zip(self._averaged, progress.store.averages(), strict=True)
            averages = [row if reached[position] else None for position, row in rows]
        method = MethodState(
            tasks=progress.tasks,
            named=progress.named,
            counts=progress.counts,
            beta=progress.beta,
            beta_decay=progress.beta_decay,
            ages=progress.ages,
            reached=progress.reached,
            averages=averages,
        )
        merged = merge(self.base_optim.state_dict(), method, self._shared, self._averaged)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            merged = post_hook(self, merged) or merged
        return merged

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, bit for bit; nothing changes if it does not fit.

        A state dict of the plain wrapped optimizer is taken too: averages and counts then start anew. As with
        every torch optimizer the saved hyperparameters, here beta and beta_decay, replace those of the
        constructor.

        Raises:
            ValueError: other tasks, other shapes, or an unknown version.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        base, loaded = split(state_dict, self._shared, self._averaged)
        progress = self._progress
        parameters = self._parameters()
        if loaded is not None:
            expected = progress.tasks or self._names_by_position()
            known = progress.tasks is not None
            check_fits(loaded, expected, known, progress.named, [parameters[position] for position in self._averaged])
            check_schedule(loaded.beta, loaded.beta_decay)
        self.base_optim.load_state_dict(base)
        self._start_anew()
        if loaded is not None:
            progress.beta, progress.beta_decay = loaded.beta, loaded.beta_decay
            progress.reached[:] = loaded.reached
            if loaded.counts and loaded.tasks is not None:
                progress.tasks, progress.named = loaded.tasks, loaded.named
                progress.counts.extend(loaded.counts)
                progress.ages.extend(loaded.ages)
                progress.store = self._new_store(parameters, len(loaded.tasks))
                if isinstance(progress.store, FlatGradientBuffer):
                    progress.store.load_averages(loaded.averages)
                    # Norms belong to the averages, so a checkpoint need not hold them.
                    progress.norms = progress.store.norms() if self._joint else None
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _start_anew(self) -> None:
        """Forget averages, counts and the record of the last step; names given by `task_weights` stay."""
        progress = self._progress
        progress.tasks, progress.named = self._names, self._names is not None
        progress.counts.clear()
        progress.reached[:] = [False] * len(self._shared)
        progress.store = progress.balance = progress.norms = None
        progress.ages.clear()
        progress.pending = progress.skip_next_step = False

    def _names_by_position(self) -> tuple[str, ...] | None:
        return None if self._priorities is None else tuple(str(task) for task in range(len(self._priorities)))

    def __getstate__(self) -> dict[str, Any]:
        # Hooks and a scheduler's patched `step` belong to this object and stay behind, as in torch.optim.
        return {name: self.__dict__[name] for name in _OWN_ATTRIBUTES}

    def __repr__(self) -> str:
        progress, settings = self._progress, self._settings
        inner = repr(self.base_optim).replace("\n", "\n  ")
        return (
            f"{type(self).__name__}(\n  base_optim={inner},\n  shared parameters={len(self._shared)}, "
            f"tasks={progress.tasks}, beta={progress.beta}, beta_decay={progress.beta_decay}, eps={settings.eps}, "
            f"log_transform={settings.log_transform}, norm_target={settings.norm_target!r}, "
            f"max_weight={settings.max_weight}, task_weights={self._priorities}, nonfinite={settings.nonfinite!r}\n)"
        )
