"""One batch on its way from losses to gradients: what `backward` does, in the order of the calls."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ._accumulation import MicroBatches, no_micro_batches, sums_with
from ._aggregation import Aggregator, combine, cut, matrix_of, recall
from ._balance import Balance, balance_weights, unsolved_shares
from ._compiled import check_replay
from ._distributed import Alone, Totals
from ._gradient_buffer import FlatGradientBuffer
from ._numbers import Flag, Scalar, stack_scalars
from ._plan import Plan, Progress
from ._task_gradients import (
    add_gradients,
    at_once,
    joint_size,
    owned,
    put_gradients,
    take_gradients,
    unscaled,
    where_ok,
)
from ._task_losses import TaskLosses, acceptable, cotangents, describe_bad_loss
from ._vectorized import check_vectorized, vectorized_passes

Result = TypeVar("Result")


class RefusedBatchError(Exception):
    """A batch that cannot be used; its only argument is the error that the user sees under ``nonfinite="raise"``."""


class OverflowedBatchError(Exception):
    """A batch whose scaled gradients were not finite: the scaler has to see it and lower its scale."""


def bad_gradient(whose: str) -> str:
    """The message for a gradient that is not finite."""
    return (
        f"gradient of {whose} must be finite, got NaN or inf behind a finite loss; no parameter was changed; look for "
        "sqrt, norm, log or a division at 0 in the loss, or for a loss or ema_dtype of half precision that cannot hold "
        "1 / (loss + eps); or pass nonfinite='skip' to leave such batches out"
    )


def _all(flags: Sequence[Flag]) -> Flag:
    """Whether all hold; a number on a CPU, else a tensor nobody waits for."""
    if any(isinstance(flag, Tensor) for flag in flags):
        return torch.stack([torch.as_tensor(flag) for flag in flags]).all()
    return all(flags)


@dataclass(slots=True)
class _Arrival:
    """One task's pass: gradients here, and those of all ranks once they are received.

    Attributes:
        task: its number.
        own: gradients of parameters that are not shared, by position.
        size: the sum of their norms; NaN where the pass failed.
        reached: which averaged parameters this rank reached, by index.
        receive: waits for this rank's part of the averaged parameters' gradients; None if no pass was made.
    """

    task: int
    own: dict[int, Tensor]
    size: Scalar
    reached: set[int]
    receive: Callable[[], list[Tensor | None]] | None


class Batch:
    """The last, and mostly only, micro-batch of a batch together with those before it.

    Attributes:
        losses: the losses by task.
        values: raw losses, the means over all micro-batches, shape (T,), NaN for an absent task.
        present: tasks that this micro-batch or one before it has.
        starts: cotangents of this micro-batch's losses, shape (T,).
        factors: what the sums of earlier micro-batches are multiplied by, shape (T,).
        parameters: all of the wrapped optimizer; in the one-backward form also other leaves of the graph.
        store: where averaged gradients go; private to this batch until the first one is through.
        usable: for every task whether it may count as far as its loss says and, where a bad task refuses the
            batch, as far as all losses say. Bools on a CPU, else scalar tensors.
        norms: of every task's averaged gradient, NaN for a task that takes no part.
        flags: for each present task whether its loss and its gradients were usable.
        others: gradients of parameters that are not shared, by position, summed over tasks.
        reached: which shared parameters the batch reached, by index.
    """

    def __init__(
        self,
        plan: Plan,
        progress: Progress,
        ranks: Alone,
        parameters: list[Tensor],
        losses: TaskLosses,
        samples: Sequence[float],
        scale: Scalar | None,
        totals: Totals | None,
    ) -> None:
        self._plan, self._progress, self._ranks, self._scale = plan, progress, ranks, scale
        self._settings = plan.settings
        self.losses, self.parameters = losses, parameters
        self.store = progress.store or plan.new_store(ranks, parameters, len(losses.names), progress.beta)
        if plan.joint:
            self.parameters = parameters + ranks.outside(losses.given, parameters)
        self._heads = sorted(set(range(len(self.parameters))) - set(plan.shared))
        self._on_cpu = self.store.device.type == "cpu"
        self._refuses = self._settings.nonfinite != "ignore"
        values = losses.values(self.store.device)
        self._earlier = progress.micro_batches
        self.present = losses.present
        self.values, self.starts = values, cotangents(values, self._settings.eps, self._settings.log_transform)
        self.factors = torch.zeros_like(values)
        self._bad = {} if totals is None else totals.bad
        if self._earlier is not None or totals is not None:
            self._join(values, samples, totals)
        if scale is not None:
            self.starts = self.starts * scale
        self._fine: list[Flag] = acceptable(self.values, self._settings.eps, self._settings.log_transform)
        self.usable = self._fine
        if self._refuses:
            # One bad loss refuses the batch, so no average takes in any part of it.
            self.usable = [_all([self._fine[task] for task in self.present])] * len(losses.names)
        self.norms: list[Scalar] = [math.nan] * len(losses.names)
        self.flags: list[Flag] = []
        self.others: dict[int, Tensor] = {}
        self.reached: set[int] = set()
        self._taken: list[int] = []
        self._shares = unsolved_shares(self.values, self._settings.eps) if self._settings.fade_solved else None
        self._factors = self._factors_beside_norms()
        self._measured = self._is_measured()
        # Under a scaler an overflow is nothing unusual and must leave every average alone: rows wait for the last.
        self._holds = scale is not None and isinstance(self.store, FlatGradientBuffer)
        # An aggregator may fail, so its rows wait too.
        self._holds = self._holds or plan.aggregator is not None
        self._held: list[int] = []
        self._passing = -1
        # By task, from a vectorized pass.
        self._found: dict[int, list[Tensor | None]] = {}
        self._not_vectorized = ""
        self._overflow: Flag = False
        # Under a process group what went wrong here waits until every rank can hear of it.
        self._failure: BaseException | None = None

    def _join(self, values: Tensor, samples: Sequence[float], totals: Totals | None) -> None:
        """Means over all micro-batches and ranks, and what each part of them is multiplied by."""
        sums, total, last = sums_with(self._earlier, values, samples)
        dtype = sums.dtype
        if totals is None:
            self.present = [task for task, number in enumerate(total.tolist()) if number > 0]
        else:
            sums, total, self.present, dtype = totals.sums, totals.samples, totals.present, totals.dtype
        self.values = torch.where(total > 0, sums / total, math.nan).to(dtype)
        start = cotangents(self.values, self._settings.eps, self._settings.log_transform)
        self.starts = start * (last / total * self._ranks.averaging).to(dtype)
        self.factors = start / total.to(dtype)

    def _factors_beside_norms(self) -> Sequence[Scalar]:
        """What every task's weight is multiplied by whatever the norms; numbers on a CPU."""
        priorities = self._plan.priorities or (1.0,) * len(self.losses.names)
        if self._shares is None:
            return priorities
        shares = self._shares.tolist() if self._on_cpu else self._shares.unbind()
        return [priority * share for priority, share in zip(priorities, shares, strict=True)]

    # ------------------------------------------------- the order of the calls

    def run(self) -> None:
        """All backward passes, and the combined gradient; nothing but the store and `.grad` is touched."""
        if self._refuses and self._on_cpu:
            self._check_losses()
        running = [task for task in self.losses.present if self.usable[task] is not False]
        if self._plan.joint or len(running) > 1:
            self._attempt(lambda: self._check_replay(running), None)
        if self._measured:
            self._measure()
        else:
            self._reuse()
        self._taken = self._tasks_that_count()
        norms = stack_scalars(self.norms, self.store.norm_dtype, self.store.device)
        weights = self._weights(norms)
        self._combined = self._combine(weights)
        if self._scale is not None:
            self._rescale(self._scale)
        for task in self._held:
            self._accept(task, True)
        self._balance = Balance(self.losses.names, self.values, norms, weights, skipped=False)

    def _check_replay(self, running: list[int]) -> None:
        check_replay(
            self._ranks.take_pass,
            [self.losses.loss(task) for task in running],
            [self.starts[task] for task in running],
            [self.losses.names[task] for task in running],
            self.parameters,
        )

    def _attempt(self, run: Callable[[], Result], otherwise: Result) -> Result:
        """What `run` returns; `otherwise` if it or something before it fails and other ranks wait for this one."""
        if self._failure is not None:
            return otherwise
        try:
            return run()
        except BaseException as failure:
            if not self._ranks.holds_failures:
                raise
            self._failure = failure
            return otherwise

    def commit(self, before: list[Tensor | None]) -> None:
        """Count the batch and set `.grad`; from here on the tasks are fixed."""
        progress = self._progress
        averaged = self._taken if self._measured else []
        if not progress.counts:
            progress.tasks, progress.named = self.losses.names, self.losses.named
            progress.counts.extend([0] * len(self.losses.names))
            progress.ages.extend([0] * len(self.losses.names))
        progress.store = self.store
        complete = min(progress.counts) == 0 and len(averaged) == len(self.losses.names)
        for task in averaged:
            progress.counts[task] += 1
        for index in self.reached:
            progress.reached[index] = True
        if self._plan.joint:
            self._remember_norms(averaged)
        self._write(before)
        progress.balance, progress.micro_batches = self._balance, None
        progress.pending, progress.skip_next_step = True, False
        if self._scale is not None and all(parameter.grad is None for parameter in self.parameters):
            # No task was there. A scaler needs some .grad to look at, and nothing must come of it.
            self._signal(0.0)
            progress.skip_next_step = True
        progress.vectorizes = progress.vectorizes and not self._not_vectorized
        if complete:
            self._warn_of_unreached()
        if self._not_vectorized:
            warnings.warn(
                "vectorize=True, but the passes of this network cannot be made as one; they are made one by one: "
                f"{self._not_vectorized}",
                stacklevel=4,
            )

    def leave_out(self, overflow: bool) -> None:
        """Record a batch that is skipped. Under a scaler one `.grad` says whether it was an overflow: inf, or zeros."""
        progress = self._progress
        nothing = torch.full_like(self.values, math.nan), torch.zeros_like(self.values)
        progress.balance = Balance(self.losses.names, self.values, *nothing, skipped=True)
        progress.micro_batches = None
        # After an overflow it is the scaler that skips.
        progress.skip_next_step = not overflow and not progress.pending
        if self._scale is not None:
            self._signal(math.inf if overflow else 0.0)

    def _signal(self, value: float) -> None:
        """Add `value` to one `.grad`, where a scaler sees it."""
        for parameter in self._inputs(self._plan.shared + self._heads)[:1]:
            parameter.grad = add_gradients(parameter.grad, torch.full_like(parameter, value))

    def undo(self, before: list[Tensor | None]) -> None:
        """Leave `.grad` and the counts as they were, and averages that this batch began at zero."""
        put_gradients(self.parameters, before)
        self.store.forget_batch()
        # It holds the frames that hold this batch.
        self._failure = None
        progress = self._progress
        for task, count in enumerate(progress.counts):
            if count == 0:
                self.store.clear(task)
        if progress.norms is not None and not self._holds:
            norms = stack_scalars(self.norms, progress.norms.dtype, progress.norms.device)
            known = torch.where(norms.isnan(), progress.norms, norms)
            counts = torch.tensor(progress.counts, device=known.device)
            progress.norms = torch.where(counts > 0, known, torch.zeros_like(known))

    # ------------------------------------------------- one pass a task

    def _is_measured(self) -> bool:
        """Whether this step measures norms: if a task here is new, or its norm is `refresh_every` steps old."""
        if not self._plan.joint:
            return True
        progress = self._progress
        tasks = [task for task in self.present if self.usable[task] is not False]
        return not progress.ages or any(
            progress.counts[task] == 0 or progress.ages[task] >= self._settings.refresh_every for task in tasks
        )

    def _measure(self) -> None:
        """One backward pass a task; its gradient goes into the store where it is usable."""
        inputs = self._inputs([*self._plan.averaged, *self._heads]) if self._plan.joint else None
        # A task that is known to be left out needs no pass; which one frees the graph depends on it.
        running = [task for task in self.present if self.usable[task] is not False]
        last = max((task for task in running if self.losses.losses[task] is not None), default=None)
        # While one task's gradients travel the next pass runs; one process has nothing to wait for.
        under_way: deque[_Arrival] = deque()
        self._healthy: Flag = True
        if self._settings.vectorize and self._progress.vectorizes:
            self._found = self._attempt(lambda: self._vectorize(running), {})
        with self._early_averages():
            for task in self.present:
                if task in running:
                    under_way.append(self._start(task, inputs, retain_graph=self._plan.joint or task != last))
                else:
                    under_way.append(_Arrival(task, {}, 0.0, set(), None))
                while len(under_way) > self._ranks.holds_failures:
                    self._finish(under_way.popleft())
            while under_way:
                self._finish(under_way.popleft())
        reached = self._close() if self._ranks.holds_failures else []
        # That nothing is wrong takes one read of the device; whose fault it is takes more.
        if (self._refuses or self._scale is not None) and not _all(self.flags):
            if self._refuses:
                self._check_losses()
            if self._scale is not None and self._overflow:
                raise OverflowedBatchError
            if self._refuses:
                self._check_gradients()
        if self._scale is not None:
            self._read_flags()
        if self._ranks.holds_failures:
            self.others = self._add_up(self.others, self._heads, reached)

    def _close(self) -> list[bool]:
        """For every parameter whether any rank reached it; raises if any rank failed."""
        shared = set() if self._plan.joint else {self._plan.shared[index] for index in self.reached}
        reached = [position in shared or position in self.others for position in range(len(self.parameters))]
        reached = self._ranks.close(self._failure, reached)
        if not self._plan.joint:
            self.reached = {index for index, position in enumerate(self._plan.shared) if reached[position]}
        return reached

    def _add_up(self, gradients: dict[int, Tensor], positions: list[int], reached: list[bool]) -> dict[int, Tensor]:
        """The sums over all ranks of gradients by position."""
        sums = self._ranks.add_up(
            [gradients.get(position) for position in positions],
            [self.parameters[position] for position in positions],
            [reached[position] for position in positions],
        )
        return {position: total for position, total in zip(positions, sums, strict=True) if total is not None}

    def _read_flags(self) -> None:
        """Know on the host which tasks count, and drop the rows of the others. A scaler waits for the device anyway."""
        if not self._on_cpu and self.flags:
            self.flags = torch.stack([torch.as_tensor(flag) for flag in self.flags]).tolist()
        counted = self._tasks_that_count()
        for task in self._held:
            if task not in counted:
                self._accept(task, False)
        self._held = [task for task in self._held if task in counted]

    def _start(self, task: int, inputs: list[Tensor] | None, retain_graph: bool) -> _Arrival:
        """One task's pass; its shared gradients are on their way when this returns."""
        nothing: list[Tensor | None] = [None] * len(self.parameters)
        found = self._attempt(lambda: self._pass(task, inputs, retain_graph), nothing)
        own = {position: gradient for position in self._heads if (gradient := found[position]) is not None}
        gradients = [found[position] for position in self._plan.averaged]
        reached = {index for index, gradient in enumerate(gradients) if gradient is not None} | self.store.early(task)
        size = joint_size(list(own.values()), self.store.device) if self._failure is None else math.nan
        return _Arrival(task, own, size, reached, self._ranks.send(gradients))

    def _finish(self, arrival: _Arrival) -> None:
        """On return the task's gradients are in the store or gone, so that the next pass finds room."""
        ok: Flag = False
        if arrival.receive is not None:
            ok = self._take(arrival, arrival.receive(), self.usable[arrival.task] & self._healthy)
        self.flags.append(ok)
        self._healthy = self._healthy & ok if self._refuses else True
        if ok is False:
            return
        for position, gradient in arrival.own.items():
            masked = isinstance(ok, Tensor) and not self._refuses
            kept = where_ok(torch.as_tensor(ok), gradient) if masked else gradient
            self.others[position] = add_gradients(self.others.get(position), kept)

    def _pass(self, task: int, inputs: list[Tensor] | None, retain_graph: bool) -> list[Tensor | None]:
        """One task's gradients on all parameters; those on large shared ones may be in the store already."""
        self._passing = task
        found: list[Tensor | None] = [None] * len(self.parameters)
        loss = self.losses.losses[task]
        if task in self._found:
            found = self._found.pop(task)
        elif loss is not None and inputs != []:
            found = self._ranks.take_pass(
                [loss],
                [self.starts[task]],
                [self.losses.names[task]],
                self.parameters,
                retain_graph=retain_graph,
                inputs=inputs,
            )
        if self._scale is not None:
            found = [None if gradient is None else unscaled(gradient, self._scale) for gradient in found]
        if self._earlier is not None:
            self._add_earlier(task, found)
        self._check_reach(task, found)
        return found

    def _vectorize(self, running: Sequence[int]) -> dict[int, list[Tensor | None]]:
        """The gradients of all tasks from one vectorized pass; nothing where that cannot be."""
        tasks = [task for task in running if self.losses.losses[task] is not None]
        if len(tasks) < 2:
            return {}
        outside = self._ranks.outside(self.losses.given, self.parameters)
        everything = [*self.parameters, *outside]
        losses, starts = [self.losses.loss(task) for task in tasks], [self.starts[task] for task in tasks]
        names = [self.losses.names[task] for task in tasks]
        try:
            found = vectorized_passes(losses, starts, names, everything)
            if found is None:
                return {}
            if not self._progress.vectorized:
                check_vectorized(losses[-1], starts[-1], names[-1], everything, found[-1])
        except RuntimeError as error:
            # If the passes one by one fail too, it was not for the want of a vectorized form.
            self._not_vectorized = str(error)
            return {}
        self._progress.vectorized = True
        number = len(self.parameters)
        for gradients in found:
            for position in self._heads:
                gradient = gradients[position]
                if gradient is not None:
                    # A row of a stack would keep all of it.
                    gradients[position] = owned(gradient)
            for leaf, gradient in zip(outside, gradients[number:], strict=True):
                if gradient is not None:
                    leaf.grad = add_gradients(leaf.grad, owned(gradient))
        return {task: gradients[:number] for task, gradients in zip(tasks, found, strict=True)}

    def _early_averages(self) -> AbstractContextManager[None]:
        """While this is open, a pass puts its gradients on large shared parameters into the store itself."""
        store = self.store
        early = store.large if self._ranks.fills_grad else []

        def average(index: int, gradient: Tensor) -> None:
            task = self._passing
            store.propose_early(early[index], unscaled(gradient, self._scale), task, self._progress.beta_of(task))

        return at_once([self.parameters[self._plan.averaged[index]] for index in early], average)

    def _check_reach(self, task: int, found: list[Tensor | None]) -> None:
        """Refuse a task that this rank has, if it reaches nothing to average although something can be reached."""
        here = self.losses.losses[task] is not None or (self._earlier is not None and self._earlier.gradients[task])
        if not here or self.store.early(task) or any(found[position] is not None for position in self._plan.averaged):
            return
        if any(self.parameters[position].requires_grad for position in self._plan.shared):
            raise ValueError(self._reaches_nothing(self.losses.names[task]))

    def _add_earlier(self, task: int, found: list[Tensor | None]) -> None:
        """Add what earlier micro-batches brought of this task."""
        seen = {self._plan.averaged[index]: index for index in self.store.early(task)}
        for position, total in self._earlier_of(task).items():
            if position in seen:
                self.store.propose_early(seen[position], total, task, self._progress.beta_of(task))
            else:
                gradient = found[position]
                found[position] = total if gradient is None else total.add_(gradient)

    def _earlier_of(self, task: int, weight: Scalar = 1.0) -> dict[int, Tensor]:
        """The sums of earlier micro-batches in units of this batch's gradient, new tensors."""
        if self._earlier is None:
            return {}
        factor = self.factors[task] * weight
        return {
            position: total * factor.to(total.device, total.dtype.to_real())
            for position, total in self._earlier.gradients[task].items()
        }

    def _take(self, arrival: _Arrival, gradients: list[Tensor | None], ok: Flag) -> Flag:
        """Put one task's shared gradient into the store if it is finite and `ok`; return whether it was."""
        task, ranks = arrival.task, self._ranks
        # With other ranks a task that is not here may still have a gradient.
        proposed = bool(arrival.reached) or any(gradient is not None for gradient in gradients)
        norm: Scalar = math.nan
        if proposed:
            norm = self.store.propose(gradients, task, self._progress.beta_of(task))
        norm, finite = ranks.agree(norm if proposed else 0.0, arrival.size)
        finite = finite & (norm < math.inf)
        self._overflow = self._overflow | (ok & (finite ^ True))
        ok = ok & finite
        if not proposed:
            return ok
        if self._holds and ok is not False:
            self._held.append(task)
        else:
            self._accept(task, ok, norm)
        if ok is False:
            return ok
        self.norms[task] = torch.where(ok, norm, math.nan) if isinstance(ok, Tensor) else norm
        self.reached |= arrival.reached
        return ok

    def _accept(self, task: int, ok: Flag, norm: Scalar = math.nan) -> None:
        """Let the store keep what it was proposed, with the factor that its weight has beside the norms."""
        self.store.accept(task, ok, norm, self._factors[task])

    # ------------------------------------------------- norms as they were

    def _reuse(self) -> None:
        """The norms as last measured, and the heads' gradients by one pass that stops at the heads."""
        known = self._progress.norms
        for task in self.present:
            ok = self.usable[task]
            if known is not None:
                self.norms[task] = torch.where(torch.as_tensor(ok, device=known.device), known[task], math.nan)
            self.flags.append(ok)
        if self._refuses and not self._on_cpu:
            self._check_losses()
        if self._scale is not None:
            self._read_flags()
        # Not a product with 0: the start of a bad loss may be NaN.
        starts = torch.where(self.starts.isfinite(), self.starts, torch.zeros_like(self.starts))
        gradients = self._joint_pass(starts, self._heads, retain_graph=True)
        for position, gradient in zip(self._heads, gradients, strict=True):
            if gradient is not None:
                self.others[position] = gradient

    # ------------------------------------------------- the combined gradient

    def _combine(self, weights: Tensor) -> list[Tensor | None]:
        """The shared gradients; empty where the batch brought none."""
        if not self._taken:
            return []
        if self._plan.aggregator is not None and isinstance(self.store, FlatGradientBuffer):
            return self._aggregate(self._plan.aggregator, self.store)
        if not self._plan.joint:
            return self._ranks.spread(self.store.weighted_sum(weights)) if self.reached else []
        starts = torch.where(weights > 0, self.starts * weights, torch.zeros_like(self.starts))
        combined = self._joint_pass(starts, self._plan.shared, retain_graph=False, weights=weights)
        self.reached = {index for index, gradient in enumerate(combined) if gradient is not None}
        return combined

    def _aggregate(self, aggregator: Aggregator, store: FlatGradientBuffer) -> list[Tensor | None]:
        """What the aggregator makes of the averaged gradients of the tasks that count."""
        progress, priorities = self._progress, self._plan.priorities
        averages = store.averages(proposed=True)
        # A zero gradient takes no part, as under the max-norm rule.
        tasks = [task for task in self._taken if self.norms[task] > 0]
        if not tasks:
            return [None] * len(self._plan.averaged)
        matrix = matrix_of([[rows[task] for rows in averages] for task in tasks])
        if priorities is not None:
            own = stack_scalars([priorities[task] for task in tasks], matrix.dtype, matrix.device)
            matrix.mul_(own[:, None])

        def run() -> Tensor:
            if progress.memory is not None:
                recall(aggregator, progress.memory, matrix)
                progress.memory = None
            return combine(aggregator, matrix)

        vector = self._attempt(run, matrix[0])
        self._ranks.close(self._failure, [])
        vector = self._ranks.same(vector)
        if vector.isfinite().all():
            return cut(vector, [self.parameters[position] for position in self._plan.averaged])
        if self._refuses:
            raise RefusedBatchError(RuntimeError(bad_gradient("all tasks together, as the aggregator combines them")))
        return []

    def _rescale(self, scale: Scalar) -> None:
        """Multiply what goes into `.grad` by the scale, if it can take that."""
        for gradient in [*self._combined, *self.others.values()]:
            if gradient is not None:
                gradient.mul_(scale)
        everything = [gradient for gradient in [*self._combined, *self.others.values()] if gradient is not None]
        if not self._ranks.agree(0.0, joint_size(everything, self.store.device))[1]:
            raise OverflowedBatchError

    def _joint_pass(
        self, starts: Tensor, positions: list[int], retain_graph: bool, weights: Tensor | None = None
    ) -> list[Tensor | None]:
        """One pass from all losses that count, down to the parameters at `positions`; refused if not finite.

        Earlier micro-batches are added, multiplied by `weights`.
        """
        counted = self._tasks_that_count()
        nothing: list[Tensor | None] = [None] * len(positions)
        mine = self._attempt(lambda: self._joint_gradients(starts, positions, counted, retain_graph, weights), nothing)
        reached = [gradient is not None for gradient in mine]
        if self._ranks.holds_failures:
            reached = self._ranks.close(self._failure, reached)
        gradients = self._ranks.add_up(mine, [self.parameters[position] for position in positions], reached)
        size = joint_size([gradient for gradient in gradients if gradient is not None], self.store.device)
        ok = self._ranks.agree(0.0, size)[1]
        if self._scale is None and not self._refuses:
            return [None if gradient is None else where_ok(torch.as_tensor(ok), gradient) for gradient in gradients]
        if ok:
            return gradients
        if self._scale is not None:
            raise OverflowedBatchError
        names = [self.losses.names[task] for task in counted]
        raise RefusedBatchError(RuntimeError(bad_gradient(f"the tasks {names} together")))

    def _joint_gradients(
        self, starts: Tensor, positions: list[int], counted: list[int], retain_graph: bool, weights: Tensor | None
    ) -> list[Tensor | None]:
        """This rank's gradients of a joint pass, earlier micro-batches included."""
        inputs = self._inputs(positions)
        tasks = [task for task in counted if self.losses.losses[task] is not None]
        gradients: list[Tensor | None] = [None] * len(positions)
        if inputs and tasks:
            found = self._ranks.take_pass(
                [self.losses.loss(task) for task in tasks],
                [starts[task] for task in tasks],
                [self.losses.names[task] for task in tasks],
                self.parameters,
                retain_graph=retain_graph,
                inputs=inputs,
            )
            own = [found[position] for position in positions]
            gradients = [None if gradient is None else unscaled(gradient, self._scale) for gradient in own]
        for task in counted:
            earlier = self._earlier_of(task, 1.0 if weights is None else weights[task])
            for index, position in enumerate(positions):
                if position in earlier:
                    gradients[index] = add_gradients(gradients[index], earlier[position])
        return gradients

    def _inputs(self, positions: list[int]) -> list[Tensor]:
        return [self.parameters[position] for position in positions if self.parameters[position].requires_grad]

    def _weights(self, norms: Tensor) -> Tensor:
        settings, priorities = self._settings, self._plan.priorities
        weights = balance_weights(norms, settings.norm_target, settings.max_weight, self._shares)
        if self._plan.aggregator is not None:
            weights = torch.where(weights > 0, math.nan, weights)
        return weights if priorities is None else weights * stack_scalars(priorities, norms.dtype, norms.device)

    def _tasks_that_count(self) -> list[int]:
        """The tasks whose gradients count. An accelerator is not asked: there "ignore" counts all that came."""
        return [task for task, ok in zip(self.present, self.flags, strict=True) if ok is not False]

    # ------------------------------------------------- checks

    def _check_losses(self) -> None:
        """Refuse the batch if a loss is not usable. Reads the losses on the host."""
        settings = self._settings
        if _all([self._fine[task] for task in self.present]):
            return
        for task in self.present:
            if not self._fine[task]:
                rank, value = self._bad.get(task, (None, self.values[task].item()))
                message = describe_bad_loss(self.losses.names[task], value, settings.eps, settings.log_transform, rank)
                raise RefusedBatchError(ValueError(message))

    def _check_gradients(self) -> None:
        """Refuse the batch if a gradient is not finite. Reads one flag a task on the host, all at once."""
        for task, ok in zip(self.present, self.flags, strict=True):
            if not ok:
                raise RefusedBatchError(RuntimeError(bad_gradient(f"task {self.losses.names[task]!r}")))

    def _reaches_nothing(self, name: str) -> str:
        if self._plan.joint:
            return (
                f"task {name!r} reaches none of norm_params: its loss does not depend on them, or they are frozen; "
                "choose some that every task depends on, e.g. norm_params=trunk[-1].parameters()"
            )
        return (
            f"task {name!r} reaches no shared parameter: its loss does not depend on shared_params; "
            f"leave it out of the losses (add its own .backward()), or correct shared_params{self._ranks.hint}"
        )

    # ------------------------------------------------- the result

    def _remember_norms(self, averaged: list[int]) -> None:
        """Keep the latest norm of every task, and how many steps ago each was measured."""
        progress, norms = self._progress, self._balance.norms
        if averaged:
            known = norms if progress.norms is None else progress.norms
            progress.norms = torch.where(norms.isnan(), known, norms)
        progress.ages[:] = [1 if task in averaged else age + 1 for task, age in enumerate(progress.ages)]

    def _warn_of_unreached(self) -> None:
        unreached = [
            tuple(self.parameters[position].shape)
            for position, reached in zip(self._plan.shared, self._progress.reached, strict=True)
            if not reached and self.parameters[position].requires_grad
        ]
        if unreached:
            warnings.warn(
                f"no task reaches {len(unreached)} of the shared parameters (the first has shape {unreached[0]}); "
                "they get no gradient",
                stacklevel=5,
            )

    def _write(self, before: list[Tensor | None]) -> None:
        """Set every `.grad`: what was there before the batch plus what the batch brought.

        A shared parameter that some task once reached gets zeros where this batch has nothing for it; one that
        no task ever reached gets no `.grad`.
        """
        new: dict[int, Tensor | None] = dict(self.others)
        for position, gradient, reached in zip(self._plan.shared, self._combined, self._progress.reached, strict=False):
            if reached and self.parameters[position].requires_grad:
                new[position] = gradient
        after = list(before)
        for position, gradient in new.items():
            parameter = self.parameters[position]
            if gradient is None:
                whole = torch.zeros_like(parameter)
            else:
                whole = self._ranks.wrap(_laid_out_like(parameter, gradient.to(parameter.dtype)), parameter)
            after[position] = add_gradients(before[position], whole)
        put_gradients(self.parameters, after)


def _laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the strides that a backward pass would give it; fused optimizers count on them."""
    if gradient.layout is not torch.strided or gradient.shape != parameter.shape:
        return gradient
    if gradient.stride() == parameter.stride():
        return gradient
    like = torch.empty_like(parameter, requires_grad=False)
    return gradient if gradient.stride() == like.stride() else like.copy_(gradient)


def accumulate(
    plan: Plan,
    progress: Progress,
    ranks: Alone,
    parameters: list[Tensor],
    losses: TaskLosses,
    samples: Sequence[float],
    scale: Scalar | None,
    totals: Totals | None,
) -> None:
    """Add one micro-batch to `progress.micro_batches`: one backward pass a task, through all parameters.

    Raises:
        ValueError: a loss is not usable under ``nonfinite="raise"``; the micro-batches before it stay.
    """
    device = parameters[plan.averaged[0]].device
    values = losses.values(device)
    if plan.settings.nonfinite == "raise":
        mine = {task: (None, value) for task, value in enumerate(values.tolist()) if losses.losses[task] is not None}
        for task, (rank, value) in (mine if totals is None else totals.bad).items():
            if not math.isfinite(value):
                message = describe_bad_loss(
                    losses.names[task], value, plan.settings.eps, log_transform=False, rank=rank
                )
                raise ValueError(message)
    total = progress.micro_batches or no_micro_batches(values)
    # A micro-batch of half precision, or without any task, must not round the losses of the others.
    total.losses = total.losses.to(torch.promote_types(total.losses.dtype, values.dtype))
    before = take_gradients(parameters)
    # A failure in the middle of the passes ends the batch: half a micro-batch must not go into the next one.
    progress.micro_batches = None
    try:
        failure = None
        try:
            _add_passes(total, ranks, parameters, losses, samples, values, scale)
        except BaseException as error:
            if not ranks.holds_failures:
                raise
            failure = error
        if ranks.holds_failures:
            ranks.close(failure, [])
    finally:
        del failure
        put_gradients(parameters, before)
        ranks.reset()
    progress.micro_batches = total


def _add_passes(
    total: MicroBatches,
    ranks: Alone,
    parameters: list[Tensor],
    losses: TaskLosses,
    samples: Sequence[float],
    values: Tensor,
    scale: Scalar | None,
) -> None:
    """The passes of one micro-batch, added to `total`."""
    if len(losses.present) > 1:
        starts = values.new_ones(len(losses.present)).unbind()
        check_replay(ranks.take_pass, losses.given, starts, [losses.names[task] for task in losses.present], parameters)
    for task in losses.present:
        # Where passes add up the ranks' gradients, each must bring its number of samples along.
        start = torch.ones_like(values[task]) * (samples[task] * ranks.averaging if ranks.reduces_in_passes else 1.0)
        found = ranks.take_pass(
            [losses.loss(task)],
            [start if scale is None else start * scale],
            [losses.names[task]],
            parameters,
            retain_graph=task != losses.present[-1],
        )
        gradients = [None if gradient is None else unscaled(gradient, scale) for gradient in found]
        total.add(task, gradients, 1.0 if ranks.reduces_in_passes else samples[task])
        if samples[task]:
            # A mean over no samples may be NaN.
            total.losses[task] += values[task] * samples[task]
            total.samples[task] += samples[task]
