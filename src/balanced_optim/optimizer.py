"""DualBalancedOptimizer: the order of calls, and torch.optim's contract. The maths is in the modules beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ._accumulation import sums_with
from ._aggregation import check_aggregator, check_memory, remember
from ._balance import Balance
from ._batch import Batch, OverflowedBatchError, RefusedBatchError, accumulate
from ._distributed import Alone, Processes, Ranks, Totals, check_process_group
from ._gradient_buffer import FlatGradientBuffer
from ._numbers import Scalar, stack_scalars
from ._plan import Plan, Progress
from ._scaling import check_unscaled, scale_of
from ._settings import (
    Settings,
    check_base_optimizer,
    check_rows,
    check_schedule,
    norm_positions,
    read_task_weights,
    shared_positions,
)
from ._state import MethodState, check_fits, merge, split
from ._task_gradients import take_gradients
from ._task_losses import Losses, Samples, TaskLosses, read_losses, read_samples

_OWN_ATTRIBUTES = ("base_optim", "_plan", "_progress", "_processes")


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
    without `max_weight`. On a GPU one wait for the device a step, a few with `norm_params` or a
    scaler; none with ``nonfinite="ignore"`` where neither scaler nor micro-batches are used.

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
        fade_solved: True multiplies w_t by ``loss_t / (loss_t + eps)``. Under the log eps makes the gradient of a task
            vanish whose loss has gone far below it, and the rescale blows what is left, noise, up to full size; so it
            fades instead. Tasks whose losses stay far above eps notice nothing. alpha is still taken over all tasks.
            Before the cap of `max_weight`. Not in the paper.
        task_weights: priorities >= 0, multiplied in after the rescale; a sequence of T, or a mapping by task
            name, which fixes the names.
        norm_params: a subset of the shared parameters on which norms are measured, as in GradNorm: best the last
            shared layer, e.g. ``trunk[-1].parameters()``; every task must depend on it. An iterable or a Module.
        refresh_every: measure norms anew when a task of the batch has one that is m steps old, and reuse them in
            between; needs `norm_params` (all shared parameters may be given). Absent tasks and caps are still
            minded in every step.
        aggregator: takes the place of `norm_target`: a callable from the matrix of the averaged gradients of the tasks
            that count, shape (T, n), to the combined gradient, shape (n,), such as TorchJD's aggregators; with beta=0
            from the gradients themselves. Columns are the shared parameters in the order given, each flattened.
            `task_weights` multiply the rows. What it keeps in its attributes (numbers, tensors, arrays) goes into the
            state dict. Memory: 3 T * n scalars. Not with `norm_params`, `max_weight`, `fade_solved` or sharded
            averages.
        vectorize: True takes the T passes through what several tasks share as one under `torch.vmap`, after a short
            pass of each task through its own head. It pays where a network of many small layers has many tasks: there
            the time goes into starting kernels. Elsewhere it costs: measure. Memory: T * n scalars more, and the graph
            lives until the losses go. Hooks on tensors see all tasks' gradients at once and must not keep them; those
            that wait for `.grad` do not run. The first batch is checked by one more pass. Where the network cannot be
            vectorized (a warning says why, once), and for micro-batches in `accumulate`, passes are made one by one;
            also in a batch with a gradient that is not finite, which the host waits to know. Not with `norm_params` or
            FSDP2.
        ema_dtype: dtype of the averages; None takes float32, or float64 for float64 parameters.
            torch.bfloat16 halves their memory; sums and norms are still taken in float32.
        nonfinite: what to do with a loss that is not finite (or <= -eps under the log) or a gradient that is
            not finite: "raise" an error, "skip" the batch, or "ignore": leave that task out of this batch as
            if it were absent. In every mode no average takes a non-finite value. With `norm_params`, "ignore"
            drops the whole shared gradient of a batch where only the joint backward is not finite, since it
            cannot tell whose it is. On a GPU "ignore" asks nothing of the device: the count of a task left out
            goes on, its heads get zeros instead of no gradient, and with `norm_params` one bad loss zeroes the
            shared gradient of the batch.
        process_group: the ranks that a batch is split over, e.g. ``torch.distributed.group.WORLD``. Every rank passes
            the losses of its own part of the batch; the step is that of one process on the whole batch: the gradient of
            the log of the MEAN loss, with means weighted by `samples`. Parameters are replicated (plain, or in a
            DistributedDataParallel, called as usual), or sharded by FSDP2's `fully_shard`. All ranks must make the same
            calls. A bad loss, an error or other arguments on one rank are an error on all of them, which names the
            rank. Sends 2 T * n scalars a step (times (R - 1) / R); with `norm_params` 2 n, and 2 T times the subset
            where norms are measured. The host waits for the device before and after the passes.
        shard_averages: with replicated parameters keep 1/R of every average on each of R ranks: memory T * n / R, and
            (T + 1) * n scalars sent. A checkpoint then holds parts, for torch.distributed.checkpoint. Averages of
            parameters that FSDP2 shards are always sharded with them.

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
        fade_solved: bool = False,
        task_weights: Sequence[float] | Mapping[str, float] | None = None,
        norm_params: Iterable[Tensor] | nn.Module | None = None,
        refresh_every: int = 1,
        aggregator: Callable[[Tensor], Tensor] | None = None,
        vectorize: bool = False,
        ema_dtype: torch.dtype | None = None,
        nonfinite: str = "raise",
        process_group: ProcessGroup | None = None,
        shard_averages: bool = False,
    ) -> None:
        check_base_optimizer(base_optim)
        if isinstance(base_optim, DualBalancedOptimizer):
            raise TypeError("base_optim must be the plain optimizer, got a DualBalancedOptimizer; wrap it once")
        check_schedule(beta, beta_decay)
        settings = Settings(
            eps, log_transform, norm_target, max_weight, ema_dtype, nonfinite, refresh_every, fade_solved, vectorize
        )
        names, priorities = read_task_weights(task_weights)
        shared = shared_positions(base_optim, shared_params)
        measured = norm_positions(base_optim, norm_params, shared, settings)
        check_rows(base_optim, measured or shared, ema_dtype)
        check_process_group(process_group, shard_averages)
        check_aggregator(
            aggregator,
            norm_params=norm_params,
            max_weight=max_weight,
            fade_solved=fade_solved,
            shard_averages=shard_averages,
        )
        self.base_optim = base_optim
        self._plan = Plan(settings, shared, measured or shared, measured is not None, aggregator, names, priorities)
        self._progress = Progress(beta, beta_decay, names, names is not None, reached=[False] * len(shared))
        trunk = shared_params if isinstance(shared_params, nn.Module) else None
        self._processes = Processes(process_group, shard_averages, trunk)
        # Optimizer.__init__ would make param groups of its own; __setstate__ makes the hook tables only.
        super().__setstate__({})

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
            losses = self._run_closure(closure, losses)  # type: ignore[arg-type]
        progress = self._progress
        if losses is not None:
            self.backward(losses, samples=samples)  # type: ignore[arg-type]
        elif progress.micro_batches is not None and progress.tasks is not None:
            self.backward({} if progress.named else [None] * len(progress.tasks))
        skipped = progress.skip_next_step
        progress.pending = progress.skip_next_step = False
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
            progress = self._progress
            filled = any(parameter.grad is not None for parameter in self._parameters())
            known = filled or progress.skip_next_step or progress.micro_batches is not None
            if losses is None and not known:
                raise TypeError(
                    "closure must return the task losses, got None and no .grad is set; end it with `return losses`, "
                    "without .backward()"
                )
            return losses
        if losses is not None:
            raise TypeError("step() takes losses or a closure, got both; leave one out")
        return returned

    @torch.no_grad()
    def backward(self, losses: Losses, scaler: Any = None, *, samples: Samples = 1) -> None:
        """Fill `.grad` from the task losses, in place of ``sum(losses).backward()``; then clip and `step()`.

        As with `.backward()`, gradients are added to a `.grad` that is there, and the graph is freed: in the exact
        form by the last task, which leaves what only other tasks use (their heads, or their own forward pass) to
        go with the losses; `del losses` before the next forward saves that memory. Parameters outside the wrapped
        optimizer accumulate as with `.backward()`, in the exact form also from a batch that is refused.

        A batch that is refused, or fails in a hook, leaves parameters, `.grad`, counts and micro-batches that await
        completion as they were. Averages stay too where the form or the value of a loss is to blame. What only shows
        during the passes (a gradient that is not finite, a used graph, a task that reaches nothing) never enters its
        own average, but tasks before it in the list may have taken the batch in: holding back all T gradients would
        double the memory.

        Args:
            losses: one scalar for each task: a sequence (None = task absent from this batch), a mapping from
                task name to loss (missing key or None = absent), or a 1-D tensor. The first call fixes the
                number of tasks and their names.
            scaler: a `torch.amp.GradScaler`. Then `.grad` comes out scaled, for ``scaler.unscale_(optimizer)``,
                ``scaler.step(optimizer)`` and ``scaler.update()``; averages are kept unscaled. Pass raw losses,
                not ``scaler.scale(loss)``. A gradient that is not finite, in any task or head, leaves everything
                as it was and one `.grad` at inf: the scaler skips the step and lowers its scale. For that all T
                gradients are held back until the last: memory for 2 T * n scalars instead of (T + 1) * n.
            samples: see `accumulate`.

        Raises:
            TypeError, ValueError: the losses have the wrong form, changed in number or name, are not usable
                numbers, reach no shared parameter, or carry a scaler's scale.
            RuntimeError: a gradient is not finite although its loss is; or the graph was used before.
        """
        ranks = self._ranks()
        try:
            batch, counted, scale, totals = self._meet(ranks, "backward()", losses, scaler, samples)
        except BaseException:
            ranks.reset()
            raise
        ranks.warn_of_outside(batch.given, self._parameters())
        work = Batch(self._plan, self._progress, ranks, self._parameters(), batch, counted, scale, totals)
        before = take_gradients(work.parameters)
        try:
            work.run()
        except (RefusedBatchError, OverflowedBatchError) as failure:
            work.undo(before)
            overflow = isinstance(failure, OverflowedBatchError)
            # Alone it goes on: bound to `failure` it would be part of a cycle that keeps the graph alive.
            error = None if overflow else failure.args[0]
            failure.args = ()
        except BaseException:
            work.undo(before)
            raise
        else:
            work.commit(before)
            return
        finally:
            ranks.reset()
        try:
            if error is not None and self._plan.settings.nonfinite == "raise":
                raise error
            work.leave_out(overflow)
        finally:
            del error

    @torch.no_grad()
    def accumulate(self, losses: Losses, scaler: Any = None, *, samples: Samples = 1) -> None:
        """Take in one micro-batch; the next `backward(losses)` or `step(losses)` completes the batch.

        Raw losses and raw gradients are added up by task and divided once, so the step equals that of one big
        batch: ``grad log(sum_m s_m loss_m / sum_m s_m)`` over the micro-batches m that have the task. `.grad`,
        averages and counts do not change. `zero_grad()` drops micro-batches that no step has completed. Parameters
        outside the wrapped optimizer get the plain gradient of the loss.

        Cost: T backward passes through everything, with `norm_params` too, since weights are known only at the
        end; memory for T gradients over all parameters of the wrapped optimizer until the batch is complete.

        Args:
            losses: see `backward`.
            scaler: see `backward`; the same one in all micro-batches of a batch.
            samples: of how many samples (tokens, pixels: whatever the loss is a mean over) these losses are the
                mean: one number, or one for each task as a sequence, mapping or tensor. Only ratios between the
                micro-batches and ranks of one batch matter, so leave it out where all are of one size. Not read for
                a task whose loss is None. With a `process_group` it may be 0: that loss takes part in the passes, as
                FSDP2 needs on every rank, and counts nothing.

        Raises:
            TypeError, ValueError: see `backward`; the micro-batches before this one stay. A failure in the middle of
                the passes drops them: half a micro-batch must not end up in the next batch.
        """
        ranks = self._ranks()
        try:
            batch, counted, scale, totals = self._meet(ranks, "accumulate()", losses, scaler, samples)
        except BaseException:
            ranks.reset()
            raise
        accumulate(self._plan, self._progress, ranks, self._parameters(), batch, counted, scale, totals)
        self._progress.tasks, self._progress.named = batch.names, batch.named

    def _ranks(self) -> Alone:
        ranks = self._processes.over(self._parameters(), self._plan.averaged)
        if not ranks.keeps_whole:
            check_aggregator(self._plan.aggregator, fully_shard=True)
        if ranks.reduces_in_passes and self._plan.settings.vectorize:
            raise ValueError(
                "vectorize cannot be used with FSDP2, got vectorize=True: its passes communicate and cannot be "
                "vectorized; leave it out"
            )
        return ranks

    def _meet(
        self, ranks: Alone, call: str, losses: Losses, scaler: Any, samples: Samples
    ) -> tuple[TaskLosses, list[float], Scalar | None, Totals | None]:
        """What the caller handed in, and with a process group what all ranks have; an error of one is one of all."""
        if not isinstance(ranks, Ranks):
            return *self._read(ranks, losses, scaler, samples), None
        progress, plan = self._progress, self._plan
        facts: dict[str, Any] = {
            "the call": call,
            "the settings": repr((plan.settings, plan.priorities, plan.joint, plan.shared, plan.averaged)),
            "the aggregator": repr(type(plan.aggregator)),
            "the schedule": (progress.beta, progress.beta_decay),
            "the counts of batches": (progress.counts, progress.ages),
            "the parameters": [(tuple(p.shape), str(p.dtype), p.requires_grad) for p in self._parameters()],
            "shard_averages": ranks.keeps_whole,
        }
        try:
            batch, counted, scale = self._read(ranks, losses, scaler, samples)
        except Exception as error:
            ranks.meet(facts, error)
            raise
        values = batch.values(self._parameters()[plan.averaged[0]].device)
        sums, total, _ = sums_with(progress.micro_batches if call == "backward()" else None, values, counted)
        totals = ranks.meet(
            facts | {"the tasks": batch.names},
            None,
            sums=sums,
            samples=total.tolist(),
            here=[loss is not None for loss in batch.losses],
            scale=scale,
        )
        return batch, counted, scale, totals

    def _read(
        self, ranks: Alone, losses: Losses, scaler: Any, samples: Samples
    ) -> tuple[TaskLosses, list[float], Scalar | None]:
        """What the caller handed in, checked: the losses, their numbers of samples, the scale."""
        progress = self._progress
        batch = read_losses(losses, progress.tasks, progress.named)
        priorities = self._plan.priorities
        if priorities is not None and len(priorities) != len(batch.names):
            raise ValueError(
                f"losses must have {len(priorities)} entries, one for each of task_weights, got {len(batch.names)}"
            )
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(
                f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}; under bf16 leave it out"
            )
        first = progress.balance is None and progress.micro_batches is None
        check_unscaled(batch, scaler, look_for_scalers=first)
        device = self._parameters()[self._plan.averaged[0]].device
        counted = read_samples(samples, batch, may_be_zero=isinstance(ranks, Ranks))
        return batch, counted, scale_of(scaler, device)

    @property
    def last_balance(self) -> Balance | None:
        """What the latest `step(losses)` or `backward(losses)` saw and did; None before the first."""
        return self._progress.balance

    def gradient_cosines(self) -> Tensor:
        """Cosines between the averaged gradients of all tasks, shape (T, T): below 0 where tasks pull apart.

        No backward pass: one read of the averages, on the device where they live. NaN for a task whose average is
        zero or that no batch has had yet. With `norm_params` on that subset. With a process group all ranks must call
        it together.

        Raises:
            RuntimeError: there are no averages: before the first step, or at beta = 0 without `max_weight`.
        """
        store = self._progress.store
        if not isinstance(store, FlatGradientBuffer):
            reason = "no step was taken yet" if store is None else "beta=0 keeps none; pass beta > 0"
            raise RuntimeError(f"gradient_cosines() needs averaged gradients, but {reason}")
        gram = self._ranks().total(store.gram())
        norms = gram.diagonal().sqrt()
        return gram / norms.outer(norms)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.base_optim.param_groups for parameter in group["params"]]

    # ------------------------------------------------- torch.optim's contract

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `.grad` of every parameter of the wrapped optimizer, and drop micro-batches that await completion."""
        progress = self._progress
        progress.pending = progress.skip_next_step = False
        progress.micro_batches = None
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
        progress, plan = self._progress, self._plan
        store, tasks = progress.store, progress.tasks or self._names_by_position()
        if store is None and tasks is not None:
            # Zeros, into which torch.distributed.checkpoint.load can put what was saved.
            store = plan.new_store(self._ranks(), self._parameters(), len(tasks), progress.beta)
        averages: list[list[Tensor]] = [[] for _ in plan.averaged]
        if isinstance(store, FlatGradientBuffer):
            ranks = self._ranks()
            averages = [[ranks.entry(row, index) for row in rows] for index, rows in enumerate(store.averages())]
        method = MethodState(
            tasks=progress.tasks,
            named=progress.named,
            counts=progress.counts,
            beta=progress.beta,
            beta_decay=progress.beta_decay,
            ages=progress.ages,
            reached=progress.reached,
            averages=averages,
            memory=progress.memory or remember(plan.aggregator),
        )
        merged = merge(self.base_optim.state_dict(), method, plan.shared, plan.averaged)
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
        progress, plan = self._progress, self._plan
        base, loaded = split(state_dict, plan.shared, plan.averaged)
        parameters = self._parameters()
        if loaded is not None:
            expected = progress.tasks or self._names_by_position()
            known = progress.tasks is not None
            check_fits(loaded, expected, known, progress.named, [parameters[position] for position in plan.averaged])
            check_schedule(loaded.beta, loaded.beta_decay)
            check_memory(plan.aggregator, loaded.memory)
            ranks = self._ranks()
            averages = ranks.own(loaded.averages)
        self.base_optim.load_state_dict(base)
        progress.start_anew(plan.names)
        if loaded is not None:
            progress.beta, progress.beta_decay = loaded.beta, loaded.beta_decay
            progress.reached[:] = loaded.reached
            progress.memory = (loaded.memory or None) if plan.aggregator is not None else None
            if loaded.counts and loaded.tasks is not None:
                progress.tasks, progress.named = loaded.tasks, loaded.named
                progress.counts.extend(loaded.counts)
                progress.ages.extend(loaded.ages)
                store = progress.store = plan.new_store(ranks, parameters, len(loaded.tasks), progress.beta)
                if isinstance(store, FlatGradientBuffer):
                    missing = [None] * len(loaded.tasks)
                    store.load_averages([average or missing for average in averages])
                    if plan.joint:
                        # Norms belong to the averages, so a checkpoint need not hold them.
                        norms = ranks.norms(store.norms())
                        progress.norms = stack_scalars(norms, store.norm_dtype, store.device)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _names_by_position(self) -> tuple[str, ...] | None:
        return None if self._plan.priorities is None else tuple(str(task) for task in range(len(self._plan.priorities)))

    def __getstate__(self) -> dict[str, Any]:
        # Hooks and a scheduler's patched `step` belong to this object and stay behind, as in torch.optim.
        return {name: self.__dict__[name] for name in _OWN_ATTRIBUTES}

    def __repr__(self) -> str:
        progress, settings = self._progress, self._plan.settings
        inner = repr(self.base_optim).replace("\n", "\n  ")
        return (
            f"{type(self).__name__}(\n  base_optim={inner},\n  shared parameters={len(self._plan.shared)}, "
            f"tasks={progress.tasks}, beta={progress.beta}, beta_decay={progress.beta_decay}, eps={settings.eps}, "
            f"log_transform={settings.log_transform}, norm_target={settings.norm_target!r}, "
            f"max_weight={settings.max_weight}, fade_solved={settings.fade_solved}, "
            f"task_weights={self._plan.priorities}, vectorize={settings.vectorize}, "
            f"nonfinite={settings.nonfinite!r}\n)"
        )
