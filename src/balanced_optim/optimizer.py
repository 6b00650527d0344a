"""DualBalancedOptimizer: what users call, and torch.optim's contract. The work is in the modules beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from . import _checkpoint, _checks
from ._accumulate import accumulate
from ._aggregator import check_aggregator
from ._backward import backward
from ._batch import Parts, Settings
from ._losses import Losses, Samples, run_closure
from ._members import Members, measured_of, shared_of
from ._processes import Processes, check_process_group
from ._rule import Balance, Rule
from ._state import Pending, State
from ._wrapping import of_base, run_hooks, untraced


class DualBalancedOptimizer(Optimizer):
    """Wraps an optimizer so that several task losses train shared parameters in balance (DB-MTL, Algorithm 1).

    ``optimizer.step(losses)`` takes the place of ``sum(losses).backward(); optimizer.step()``:

    - ``g_t = grad log(loss_t + eps)`` for every task t, one backward pass each;
    - ``ema_t <- beta_k * ema_t + (1 - beta_k) * g_t`` with ``beta_k = beta / k**beta_decay``, k the number of
      batches that had task t;
    - ``w_t = alpha / ||ema_t||`` with ``alpha = max_t ||ema_t||``;
    - shared parameters get ``.grad += sum_t w_t * ema_t``, all others ``.grad += sum_t grad log(loss_t + eps)``.

    Then the wrapped optimizer steps. Learning rates, schedulers and its own state stay with it: `param_groups`, `state`
    and `defaults` here are its own, and so is what else loops call on it, as `train()` and `eval()`.

    Cost a step: T backward passes; memory for (T + 1) * n scalars, n of them shared, or n at beta = 0 without
    `max_weight`; one wait for a GPU, none under ``nonfinite="ignore"``, more with a scaler, an aggregator or a group.

    Beside the paper: the average's schedule decays (its Fig. 5 prefers that to the authors' constant 0.9), a zero
    gradient has weight 0 instead of alpha / eps, and a task absent from a batch keeps its average and its count.

    Args:
        base_optim: any optimizer that holds every trained parameter, heads included, and steps without a closure.
        shared_params: the shared trunk: an iterable of parameters or a Module. Frozen ones count once they train.
        beta: weight of the old average in [0, 1), before the decay; 0 keeps no average.
        beta_decay: beta_k = beta / k**beta_decay, >= 0.
        eps: added to every loss under the log, > 0, in units of the loss; also how negative a loss may be.
        log_transform: False takes losses as they are, as an ablation or for losses that can be negative. Also by
            task: a sequence of T bools, or a mapping by task name, where a missing one is True.
        norm_target: alpha over the tasks that count: "max", "rms" (root mean square), "mean", "median", "min", or a
            number > 0 that sets the length itself; None rescales nothing.
        norm_power: p in [0, 1] of ``w_t = (alpha / ||ema_t||)**p``, from the log alone (0) to full balance (1).
        warmup_steps: over so many batches p grows from 0 to `norm_power`.
        max_weight: cap on a task's weight before `task_weights`. 1 keeps the log only, None has no cap.
        fade_solved: True multiplies w_t by ``loss_t / (loss_t + eps)``, before the cap: a task whose loss has gone far
            below eps fades, instead of having what is left of its gradient, noise, blown up to full size.
        task_weights: priorities >= 0, multiplied in last: a sequence of T, or a mapping by name, which fixes the names.
        norm_params: the one-backward form: norms and averages on this subset of the shared parameters only, best the
            last shared layer, on which every task depends; then ONE joint backward of ``sum_t w_t * log(loss_t + eps)``
            gives every shared gradient, not averaged. Cost: one pass and T short ones that stop at the subset. Where a
            norm is 0 there (behind a zero-initialised layer) the log alone acts on the task.
        refresh_every: with `norm_params`: measure norms anew when a task of the batch has one that is m steps old; in
            between a head may get its gradient times w_t, divided after: a backward that clips there sees that.
        aggregator: takes the place of `norm_target`: a callable from the matrix of the averaged gradients of the tasks
            that count, shape (T, n), to the combined gradient, shape (n,), as TorchJD has them. Columns: the shared
            parameters that train, in order, each flattened; `task_weights` multiply rows. What it remembers you save
            yourself. Memory: 3 T * n scalars. Not with `norm_params`, `max_weight`, `fade_solved` or FSDP2.
        ema_dtype: dtype of the averages; None takes float32, or float64 for float64 parameters.
            torch.bfloat16 halves their memory; sums and norms are still taken in float32.
        nonfinite: what to do with a loss that is not finite (or <= -eps under the log) or a gradient that is not:
            "raise" an error, "skip" the batch, or "ignore" the task, as if it were absent; with `norm_params` "ignore"
            drops a joint gradient that is not finite. No average ever takes such a value. On a GPU "ignore" asks
            nothing of the device (heads of a task left out get zeros), so that a CUDA graph can hold the step.
        process_group: the ranks that a batch is split over, e.g. ``torch.distributed.group.WORLD``. Every rank passes
            the losses of its part; the step is that of one process on the whole batch, means weighted by `samples`.
            Parameters are replicated (plain, or in a DistributedDataParallel, called as usual), or sharded by FSDP2's
            `fully_shard`. All ranks make the same calls; an error on one is one on all. Sends 2 T * n scalars a step
            (times (R - 1) / R); with `norm_params` 2 n, and 2 T times the subset where norms are measured.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message names it.

    Example:
        >>> trunk, heads = torch.nn.Linear(4, 8), torch.nn.ModuleList([torch.nn.Linear(8, 1) for _ in range(2)])
        >>> base = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.1)
        >>> optimizer = DualBalancedOptimizer(base, trunk)
        >>> optimizer.step([head(trunk(torch.randn(16, 4))).square().mean() for head in heads])
        >>> optimizer.last_balance.weights.shape
        torch.Size([2])
    """

    param_groups = of_base("param_groups")
    state = of_base("state")
    defaults = of_base("defaults")

    def __init__(
        self,
        base_optim: Optimizer,
        shared_params: Iterable[Tensor] | nn.Module,
        *,
        beta: float = 0.9,
        beta_decay: float = 0.5,
        eps: float = 1e-8,
        log_transform: bool | Sequence[bool] | Mapping[str, bool] = True,
        norm_target: str | float | None = "max",
        norm_power: float = 1.0,
        warmup_steps: int = 0,
        max_weight: float | None = None,
        fade_solved: bool = False,
        task_weights: Sequence[float] | Mapping[str, float] | None = None,
        norm_params: Iterable[Tensor] | nn.Module | None = None,
        refresh_every: int = 1,
        aggregator: Callable[[Tensor], Tensor] | None = None,
        ema_dtype: torch.dtype | None = None,
        nonfinite: str = "raise",
        process_group: ProcessGroup | None = None,
        **removed: Any,
    ) -> None:
        _checks.refuse_removed(removed)
        if isinstance(base_optim, DualBalancedOptimizer):
            raise TypeError("base_optim must be the plain optimizer, got a DualBalancedOptimizer; wrap it once")
        _checks.check_base_optimizer(base_optim)
        _checks.check_schedule(beta, beta_decay)
        logs = _checks.kept(log_transform)
        rule = Rule(eps, logs, norm_target, norm_power, warmup_steps, max_weight, fade_solved)
        _checks.check_rule(rule, aggregator is not None)
        _checks.check_settings(nonfinite, refresh_every, ema_dtype)
        check_aggregator(aggregator, norm_params=norm_params, max_weight=max_weight, fade_solved=fade_solved)
        check_process_group(process_group)
        names, weights = _checks.read_task_weights(task_weights)
        shared = shared_of(base_optim, shared_params)
        members = Members(base_optim, shared, measured_of(base_optim, norm_params, shared, refresh_every))
        members.check_rows(ema_dtype)
        trunk = shared_params if isinstance(shared_params, nn.Module) else None
        self.base_optim = base_optim
        self._parts = Parts(
            Settings(rule, nonfinite, refresh_every, ema_dtype, aggregator),
            members,
            State(beta, beta_decay, names, weights),
            Pending(),
            Processes(process_group, trunk),
        )
        # Optimizer.__init__ would make param groups; __setstate__ makes the hook tables only.
        super().__setstate__({})

    @untraced
    def step(  # type: ignore[override]
        self,
        losses: Losses | Callable[[], Any] | None = None,
        closure: Callable[[], Any] | None = None,
        *,
        samples: Samples = 1,
    ) -> Any:
        """Balance the losses into `.grad` and step the wrapped optimizer.

        Args:
            losses: the task losses, see `backward`; or a closure that returns them; or None for a plain step of
                the wrapped optimizer on the `.grad` that is there, as after `backward`. With micro-batches from
                `accumulate` None completes their batch.
            closure: a function that computes and returns the task losses, without calling `.backward()`. One that
                returns None, as trainers pass, leaves `losses` or the `.grad` of an earlier `backward` to count.
            samples: see `accumulate`.

        Returns:
            What the closure returned, or None.
        """
        if closure is None and callable(losses) and not isinstance(losses, (Tensor, Mapping, Sequence, nn.Module)):
            closure, losses = losses, None
        if closure is not None:
            losses = run_closure(closure, losses, self._parts.pending, self.base_optim)  # type: ignore[arg-type]
        pending, tasks = self._parts.pending, self._parts.state.tasks or self._parts.pending.tasks
        if losses is not None:
            self.backward(losses, samples=samples)  # type: ignore[arg-type]
        elif pending.micro_batches is not None and tasks is not None:
            named = self._parts.state.named if self._parts.state.tasks else pending.named
            self.backward({} if named else [None] * len(tasks))
        skipped = pending.skip_next_step
        pending.waiting = pending.skip_next_step = False
        if not skipped:
            try:
                self.base_optim.step()
            except Exception as error:
                if (text := _checks.needs_more(str(error), self.base_optim)) is None:
                    raise
                raise TypeError(text) from error
        return losses if closure is not None else None

    @untraced
    @torch.no_grad()
    def backward(self, losses: Losses, scaler: Any = None, *, samples: Samples = 1) -> None:
        """Fill `.grad` from the task losses, in place of ``sum(losses).backward()``; then clip and `step()`.

        As with `.backward()`, gradients are added to a `.grad` that is there, and the graph is freed, but for what only
        single tasks use, which goes with the losses: `del losses` before the next forward saves that memory. Parameters
        outside the wrapped optimizer accumulate, in the exact form also from a batch that is refused.

        A batch that is refused leaves parameters, `.grad`, counts and micro-batches as they were. A bad loss moves no
        average either. Under a bad gradient averages of tasks before the bad one may have taken the batch in (holding
        back all T gradients would double the memory); with a scaler, an aggregator, beta=0 or one task none has.

        Args:
            losses: one scalar for each task: a sequence (None = task absent from this batch), a mapping from
                task name to loss (missing key or None = absent), or a 1-D tensor. The first call fixes the
                number of tasks and their names.
            scaler: a `torch.amp.GradScaler`. Then `.grad` comes out scaled, for ``scaler.unscale_(optimizer)``,
                ``scaler.step(optimizer)`` and ``scaler.update()``; averages are kept unscaled. Pass raw losses. A
                gradient that is not finite leaves everything as it was and one `.grad` at inf: the scaler skips the
                step and lowers its scale. All T gradients are held back for that: memory for T * n scalars more.
            samples: see `accumulate`.

        Raises:
            TypeError, ValueError: the losses have the wrong form, changed in number or name, are not usable
                numbers, reach no shared parameter, or carry a scaler's scale.
            RuntimeError: a gradient is not finite although its loss is; or the graph was used before.
        """
        backward(self._parts, self.base_optim, losses, scaler, samples)

    @untraced
    @torch.no_grad()
    def accumulate(self, losses: Losses, scaler: Any = None, *, samples: Samples = 1) -> None:
        """Take in one micro-batch; the next `backward(losses)` or `step(losses)` completes the batch.

        Raw losses and raw gradients are added up by task and divided once, so the step equals that of one big
        batch: ``grad log(sum_m s_m loss_m / sum_m s_m)`` over the micro-batches m that have the task. `.grad`,
        averages and counts do not change. `zero_grad()` drops micro-batches that no step has completed.

        Cost: T full backward passes, with `norm_params` too; memory for T gradients over all parameters until then.

        Args:
            losses: see `backward`.
            scaler: see `backward`; the same one in all micro-batches of a batch.
            samples: of how many samples (tokens, pixels) these losses are the mean: one number, or one a task as a
                sequence, mapping or tensor. Only ratios within a batch matter, so leave it out where all are of one
                size. With a `process_group` it may be 0: that loss takes part in the passes, as FSDP2 needs on every
                rank, and counts nothing.

        Raises:
            TypeError, ValueError: see `backward`; the micro-batches before this one stay. A failure in the middle of
                the passes drops them: half a micro-batch must not end up in the next batch.
        """
        accumulate(self._parts, self.base_optim, losses, scaler, samples)

    @property
    def last_balance(self) -> Balance | None:
        """What the latest `step(losses)` or `backward(losses)` saw and did; None before the first."""
        return self._parts.pending.balance

    @property
    def task_weights(self) -> dict[str, float] | tuple[float, ...] | None:
        """The priorities of the tasks; None if none were given. Set it between steps, as for annealing.

        A sequence of T numbers >= 0, or a mapping by task name; None sets ones. A checkpoint holds them, and one that
        is loaded wins over the constructor's.
        """
        state = self._parts.state
        if state.task_weights is None or not state.named or state.tasks is None:
            return None if state.task_weights is None else tuple(state.task_weights)
        return dict(zip(state.tasks, state.task_weights, strict=True))

    @task_weights.setter
    @untraced
    def task_weights(self, value: Sequence[float] | Mapping[str, float] | None) -> None:
        _checkpoint.change_weights(self._parts, value)

    @untraced
    @torch.no_grad()
    def reset_averages(self) -> None:
        """Forget averages, counts, norms, micro-batches and names that the constructor did not fix.

        For a change of the tasks, or of shared parameters: replaced or resized ones are taken as they are now, at their
        places. With a process group all ranks call it. A captured CUDA graph goes on, from zero.
        """
        _checkpoint.reset(self._parts, self.base_optim)

    @untraced
    @torch.no_grad()
    def gradient_cosines(self) -> Tensor:
        """Cosines between the averaged gradients of all tasks, shape (T, T): below 0 where tasks pull apart.

        No backward pass: one read of the averages where they live. NaN for a task whose average is zero. With
        `norm_params` on that subset. With a process group all ranks must call it together.

        Raises:
            RuntimeError: there are no averages: before the first step, or at beta = 0 without `max_weight`.
        """
        return self._parts.state.cosines()

    # ------------------------------------------------- torch.optim's contract

    @untraced
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `.grad` of every parameter of the wrapped optimizer, and drop micro-batches that await completion."""
        self._parts.pending.clear()
        self.base_optim.zero_grad(set_to_none=set_to_none)

    @untraced
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer. Its parameters count as heads, but for shared ones that were frozen."""
        self.base_optim.add_param_group(param_group)

    @untraced
    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict with the averages, counts, task names and schedule added.

        The averages are views of the buffer, as torch's own entries are: save or deepcopy before the next step.
        """
        run_hooks(self._optimizer_state_dict_pre_hooks, self)
        saved = _checkpoint.saved_state(self._parts, self.base_optim)
        return run_hooks(self._optimizer_state_dict_post_hooks, self, saved)  # type: ignore[no-any-return]

    @untraced
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, bit for bit; nothing changes if it does not fit.

        A state dict of the plain wrapped optimizer is taken too: averages and counts then start anew. As with
        every torch optimizer the saved hyperparameters, here beta, beta_decay and task_weights, replace those of the
        constructor.

        Raises:
            ValueError: other tasks, other shapes, or an unknown version.
        """
        state_dict = run_hooks(self._optimizer_load_state_dict_pre_hooks, self, state_dict)
        _checkpoint.load_state(self._parts, self.base_optim, state_dict)
        run_hooks(self._optimizer_load_state_dict_post_hooks, self)

    def __getattr__(self, name: str) -> Any:
        # What loops call on an optimizer and the base has: public methods that torch.optim.Optimizer lacks.
        base = self.__dict__.get("base_optim")
        method = None if base is None or name.startswith("_") else getattr(base, name, None)
        if not callable(method):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return method

    def __getstate__(self) -> dict[str, Any]:
        # Hooks and a scheduler's patched `step` belong to this object and stay behind, as in torch.optim.
        return {"base_optim": self.base_optim, "_parts": self._parts}

    def __repr__(self) -> str:
        state, settings = self._parts.state, self._parts.settings
        inner = repr(self.base_optim).replace("\n", "\n  ")
        return (
            f"{type(self).__name__}(\n  base_optim={inner},\n  shared parameters={len(self._parts.members)}, "
            f"tasks={state.tasks}, beta={state.beta}, beta_decay={state.beta_decay}, {settings.rule}, "
            f"task_weights={state.task_weights}, nonfinite={settings.nonfinite!r}\n)"
        )
