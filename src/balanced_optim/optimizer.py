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
from ._gradient_buffer import FlatGradientBuffer, GradientSum
from ._settings import Settings, check_base_optimizer, check_schedule, read_task_weights, shared_positions
from ._state import MethodState, check_fits, merge, split
from ._task_gradients import (
    add_gradients,
    all_finite,
    put_gradients,
    take_gradients,
    task_backward,
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
_OWN_ATTRIBUTES = ("base_optim", "_settings", "_shared", "_names", "_priorities", "_progress")


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
    skip_next_step: bool = False


@dataclass(slots=True)
class _Passes:
    """What the backward passes of one batch left behind.

    Attributes:
        norms: of every task's averaged gradient, NaN for a task that takes no part.
        reached: which shared parameters a task reached.
        others: gradients of all other parameters by position, summed over tasks.
        last: the last task's shared gradients, whose memory may be used again.
        flags: for every pass a boolean scalar: whether its loss and its gradients were usable.
    """

    norms: list[Tensor]
    reached: set[int] = field(default_factory=set)
    others: dict[int, Tensor] = field(default_factory=dict)
    last: list[Tensor | None] = field(default_factory=list)
    flags: list[Tensor] = field(default_factory=list)


def _of_base(name: str) -> property:
    """A live property onto an attribute of the wrapped optimizer, which replaces it when it loads its state."""

    def get(self: DualBalancedOptimizer) -> Any:
        return getattr(self.base_optim, name)

    def put(self: DualBalancedOptimizer, value: Any) -> None:
        setattr(self.base_optim, name, value)

    return property(get, put, doc=f"`{name}` of the wrapped optimizer.")


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
    without `max_weight`. On a GPU one wait for the device a step, none with ``nonfinite="ignore"``.

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
        ema_dtype: dtype of the averages; None takes float32, or float64 for float64 parameters.
            torch.bfloat16 halves their memory; sums and norms are still taken in float32.
        nonfinite: what to do with a loss that is not finite (or <= -eps under the log) or a gradient that is
            not finite: "raise" an error, "skip" the batch, or "ignore": leave that task out of this batch as
            if it were absent. In every mode no average takes a non-finite value.

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
        ema_dtype: torch.dtype | None = None,
        nonfinite: str = "raise",
    ) -> None:
        check_base_optimizer(base_optim)
        if isinstance(base_optim, DualBalancedOptimizer):
            raise TypeError("base_optim must be the plain optimizer, got a DualBalancedOptimizer; wrap it once")
        check_schedule(beta, beta_decay)
        settings = Settings(eps, log_transform, norm_target, max_weight, ema_dtype, nonfinite)
        names, priorities = read_task_weights(task_weights)
        shared = shared_positions(base_optim, shared_params)
        self.base_optim = base_optim
        self._settings = settings
        self._shared = shared
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
            closure: a function that computes and returns the task losses, without calling `.backward()`.

        Returns:
            What the closure returned, or None.
        """
        if closure is None and callable(losses) and not isinstance(losses, (Tensor, Mapping, Sequence)):
            closure, losses = losses, None
        if closure is not None:
            if losses is not None:
                raise TypeError("step() takes losses or a closure, got both")
            with torch.enable_grad():
                losses = closure()
            if losses is None:
                raise TypeError("closure must return the task losses, got None")
        if losses is not None:
            self.backward(losses)  # type: ignore[arg-type]
        if self._progress.skip_next_step:
            self._progress.skip_next_step = False
        else:
            self.base_optim.step()
        return losses if closure is not None else None

    @torch.no_grad()
    def backward(self, losses: Losses) -> None:
        """Fill `.grad` from the task losses, in place of ``sum(losses).backward()``; then clip and `step()`.

        As with `.backward()`, gradients are added to a `.grad` that is there, and the graph is freed. A refused
        batch leaves parameters, `.grad` and counts as they were, and averages too if a loss is to blame; a
        gradient that is not finite is caught before it enters its average, while averages of tasks before it in
        the list may have taken the batch in.

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
        progress.skip_next_step = False
        batch = read_losses(losses, progress.tasks, progress.named)
        self._check_number_of_tasks(len(batch.names))
        parameters, shared = self._parameters(), self._shared_parameters()
        store = progress.store or self._new_store(shared, len(batch.names))
        values = batch.values(store.device)
        before = take_gradients(parameters)
        try:
            passes = self._run_passes(batch, values, parameters, store)
            taken = self._taken(batch, passes, store.device)
            norms = torch.stack(passes.norms)
            weights = self._weights(norms)
            combined = store.weighted_sum(weights, passes.last) if taken and passes.last else []
        except BaseException as failure:
            self._undo(parameters, before, store)
            if not isinstance(failure, _RefusedBatchError):
                raise
            if self._settings.nonfinite == "raise":
                raise failure.error from None
            nothing = torch.full_like(values, math.nan), torch.zeros_like(values)
            progress.balance = Balance(batch.names, values, *nothing, skipped=True)
            progress.skip_next_step = True
            return
        self._commit(batch, store, taken, passes.reached)
        self._write(parameters, before, combined, passes.others)
        progress.balance = Balance(batch.names, values, norms, weights, skipped=False)

    @property
    def last_balance(self) -> Balance | None:
        """What the latest `step(losses)` or `backward(losses)` saw and did; None before the first."""
        return self._progress.balance

    # ------------------------------------------------- one batch, in the order of the calls

    def _run_passes(self, batch: TaskLosses, values: Tensor, parameters: list[Tensor], store: Store) -> _Passes:
        """One backward pass a task; its gradient goes into the store where it is usable."""
        settings = self._settings
        usable = acceptable(values, settings.eps, settings.log_transform)
        refuse, on_cpu = settings.nonfinite != "ignore", store.device.type == "cpu"
        if refuse:
            if on_cpu:
                self._check_losses(batch, values)
            # One bad loss refuses the batch, so no average takes in any part of it.
            usable = usable[batch.present].all().expand(len(batch.names))
        starts = cotangents(values, settings.eps, settings.log_transform).unbind()
        others = sorted(set(range(len(parameters))) - set(self._shared))
        passes = _Passes([torch.full((), math.nan, device=store.device)] * len(batch.names))
        for task in batch.present:
            retain = task != batch.present[-1]
            found = task_backward(batch.loss(task), starts[task], batch.names[task], parameters, retain)
            heads = {position: gradient for position in others if (gradient := found[position]) is not None}
            ok = usable[task] & all_finite(list(heads.values()), store.device)
            self._take(task, batch.names[task], parameters, found, ok, store, passes)
            if refuse:
                usable = usable & passes.flags[-1]
            for position, gradient in heads.items():
                kept = gradient if refuse else where_ok(passes.flags[-1], gradient)
                passes.others[position] = add_gradients(passes.others.get(position), kept)
        if refuse:
            if not on_cpu:
                self._check_losses(batch, values)
            self._check_gradients(batch, passes)
        return passes

    def _take(
        self,
        task: int,
        name: str,
        parameters: list[Tensor],
        found: list[Tensor | None],
        ok: Tensor,
        store: Store,
        passes: _Passes,
    ) -> None:
        """Put one task's shared gradient into the store, if `ok` and finite, and note its norm."""
        progress = self._progress
        shared = [found[position] for position in self._shared]
        reached = {index for index, gradient in enumerate(shared) if gradient is not None}
        if reached:
            count = progress.counts[task] if progress.counts else 0
            norm = store.propose(shared, task, beta_at(progress.beta, progress.beta_decay, count + 1))
            ok = ok & norm.isfinite()
            store.accept(task, ok)
            passes.norms[task] = torch.where(ok, norm, math.nan)
            passes.reached |= reached
            passes.last = shared
        elif any(parameters[position].requires_grad for position in self._shared):
            raise ValueError(
                f"task {name!r} reaches no shared parameter: its loss does not depend on shared_params; "
                "leave it out of the losses (add its own .backward()), or correct shared_params"
            )
        passes.flags.append(ok)

    def _check_losses(self, batch: TaskLosses, values: Tensor) -> None:
        """Refuse the batch if a loss is not usable. Reads the losses on the host."""
        settings = self._settings
        usable = acceptable(values, settings.eps, settings.log_transform).tolist()
        for task in batch.present:
            if not usable[task]:
                value = values[task].item()
                message = describe_bad_loss(batch.names[task], value, settings.eps, settings.log_transform)
                raise _RefusedBatchError(ValueError(message))

    def _check_gradients(self, batch: TaskLosses, passes: _Passes) -> None:
        """Refuse the batch if a gradient is not finite. Reads one flag a task on the host, all at once."""
        usable = torch.stack(passes.flags).tolist() if passes.flags else []
        for task, ok in zip(batch.present, usable, strict=True):
            if not ok:
                message = (
                    f"gradient of task {batch.names[task]!r} must be finite, got NaN or inf behind a finite loss; "
                    "no parameter was changed; look for sqrt, norm, log or a division at 0 in its loss, or pass "
                    "nonfinite='skip' to leave such batches out"
                )
                raise _RefusedBatchError(RuntimeError(message))

    def _taken(self, batch: TaskLosses, passes: _Passes, device: torch.device) -> list[int]:
        """The tasks whose gradients count. An accelerator is not asked: there "ignore" counts all that came."""
        if device.type != "cpu":
            return batch.present
        return [task for task, ok in zip(batch.present, passes.flags, strict=True) if ok]

    def _weights(self, norms: Tensor) -> Tensor:
        settings = self._settings
        priorities = torch.ones_like(norms) if self._priorities is None else norms.new_tensor(self._priorities)
        return balance_weights(norms, settings.norm_target, settings.max_weight, priorities)

    def _commit(self, batch: TaskLosses, store: Store, taken: list[int], reached: set[int]) -> None:
        """Count the batch; from here on the tasks are fixed."""
        progress = self._progress
        if not progress.counts:
            progress.tasks, progress.named = batch.names, batch.named
            progress.counts.extend([0] * len(batch.names))
            progress.store = store
        first_complete = min(progress.counts) == 0 and len(taken) == len(batch.names)
        for task in taken:
            progress.counts[task] += 1
        for index in reached:
            progress.reached[index] = True
        if first_complete:
            self._warn_of_unreached()

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
                stacklevel=5,
            )

    def _write(
        self,
        parameters: list[Tensor],
        before: list[Tensor | None],
        combined: list[Tensor | None],
        others: dict[int, Tensor],
    ) -> None:
        """Set every `.grad`: what was there before the batch plus what the batch brought.

        A shared parameter that some task once reached gets zeros where this batch has nothing for it; one that
        no task ever reached gets no `.grad`. `combined` is empty where the batch had no shared gradient at all.
        """
        new = dict(others)
        for position, gradient, reached in zip(self._shared, combined, self._progress.reached, strict=False):
            if reached:
                fresh = torch.zeros_like(parameters[position]) if gradient is None else gradient
                new[position] = fresh.to(parameters[position].dtype)
        after = list(before)
        for position, gradient in new.items():
            after[position] = add_gradients(before[position], gradient)
        put_gradients(parameters, after)

    def _undo(self, parameters: list[Tensor], before: list[Tensor | None], store: Store) -> None:
        """Leave `.grad` and the counts as they were, and averages that this batch began at zero."""
        put_gradients(parameters, before)
        store.forget_batch()
        for task, count in enumerate(self._progress.counts):
            if count == 0:
                store.clear(task)

    def _new_store(self, shared: list[Tensor], tasks: int) -> Store:
        """Rows where the method looks at all gradients at once, else a running sum."""
        settings = self._settings
        capped = settings.max_weight is not None and settings.norm_target is not None
        if self._progress.beta > 0 or capped:
            return FlatGradientBuffer(shared, tasks, settings.ema_dtype)
        return GradientSum(shared[0].device, self._priorities or (1.0,) * tasks, settings.norm_target is not None)

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
        averages: list[Tensor | None] = [None] * len(self._shared)
        if isinstance(progress.store, FlatGradientBuffer):
            rows = progress.store.averages()
            averages = [row if reached else None for row, reached in zip(rows, progress.reached, strict=True)]
        method = MethodState(
            progress.tasks, progress.named, progress.counts, progress.beta, progress.beta_decay,
            progress.reached, averages,
        )  # fmt: skip
        merged = merge(self.base_optim.state_dict(), method, self._shared)
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
        base, loaded = split(state_dict, self._shared)
        progress = self._progress
        shared = self._shared_parameters()
        if loaded is not None:
            expected = progress.tasks or self._names_by_position()
            check_fits(loaded, expected, progress.named, shared)
            check_schedule(loaded.beta, loaded.beta_decay)
        self.base_optim.load_state_dict(base)
        self._start_anew()
        if loaded is not None:
            progress.beta, progress.beta_decay = loaded.beta, loaded.beta_decay
            progress.reached[:] = loaded.reached
            if loaded.counts and loaded.tasks is not None:
                progress.tasks, progress.named = loaded.tasks, loaded.named
                progress.counts.extend(loaded.counts)
                progress.store = self._new_store(shared, len(loaded.tasks))
                if isinstance(progress.store, FlatGradientBuffer):
                    progress.store.load_averages(loaded.averages)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _start_anew(self) -> None:
        """Forget averages, counts and the record of the last step; names given by `task_weights` stay."""
        progress = self._progress
        progress.tasks, progress.named = self._names, self._names is not None
        progress.counts.clear()
        progress.reached[:] = [False] * len(self._shared)
        progress.store = progress.balance = None
        progress.skip_next_step = False

    def _names_by_position(self) -> tuple[str, ...] | None:
        return None if self._priorities is None else tuple(str(task) for task in range(len(self._priorities)))

    def _shared_parameters(self) -> list[Tensor]:
        parameters = self._parameters()
        return [parameters[position] for position in self._shared]

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
