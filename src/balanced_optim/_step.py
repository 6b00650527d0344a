"""The exact form, Algorithm 1 of the paper, from task gradients to `.grad`.

source of passes -> stages -> store -> norms -> rule -> weights -> combined gradient -> commit
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._losses import TaskLosses
from ._members import Layout
from ._numbers import Flag, add_gradients, grad_dtype, where
from ._passes import Heard, Pass, Passes, Take
from ._remedies import explained
from ._rule import Rule, Terms
from ._state import Averages


@dataclass(frozen=True, slots=True)
class Batch:
    """The facts of one batch, before its first pass. All that is by task has T entries.

    Attributes:
        losses: the last, and mostly only, micro-batch as the caller handed it in.
        values: raw losses, means over all micro-batches and ranks, NaN for an absent task.
        present: tasks that some micro-batch or rank has.
        starts: cotangents of this micro-batch's losses.
        terms: what averages and sums are made with.
        unsolved: see `Rule.unsolved`.
        layout: the parameters.
        known: averages and counts before this batch.
    """

    losses: TaskLosses
    values: Tensor
    present: list[int]
    starts: Tensor
    terms: Terms
    unsolved: Tensor | None
    layout: Layout
    known: Averages

    @property
    def running(self) -> list[int]:
        """Tasks that are present and not known to be left out: a pass is made of each."""
        usable = self.terms.usable
        return self.present if isinstance(usable, Tensor) else [task for task in self.present if usable[task]]


@dataclass(frozen=True, slots=True)
class Step:
    """What a batch comes to. Nothing but rows has changed so far.

    Attributes:
        norms: ||ema_t||, (T,), NaN for a task that does not count.
        weights: w_t, (T,).
        taken: whether a task counts, as far as the host knows.
        shared: the combined gradients by shared parameter.
        rest: the gradients of all other parameters.
        reached: shared parameters that the batch reaches.
        measured: tasks whose averages took the batch in, if they counted; none where norms were reused.
        ok: whether what is made of all tasks together is finite: a joint pass, an aggregator's vector.
        averages: what takes the place of the store's rows, for each averaged parameter by task: an aggregator's.
    """

    norms: Tensor
    weights: Tensor
    taken: bool
    shared: Mapping[Tensor, Tensor]
    rest: Mapping[Tensor, Tensor]
    reached: set[Tensor]
    measured: Sequence[int]
    ok: Flag = True
    averages: Sequence[Mapping[int, Tensor]] | None = None


Close = Callable[[Tensor, dict[Tensor, Tensor], set[Tensor]], Heard]


def task_passes(
    batch: Batch, take: Take, *, inputs: Sequence[Tensor] | None = None, keep_graph: bool = False
) -> Passes:
    """The source of the exact form: one backward pass a task. One that only other ranks have brings nothing here."""
    layout, losses = batch.layout, batch.losses
    number = len(layout.averaged)
    # All that a pass may fill is taken over, whatever is asked for.
    first_head = len(layout.wanted) - len(layout.heads)
    here = [task for task in batch.running if losses.losses[task] is not None]
    for task in batch.running:
        if task not in here:
            yield Pass(task, [None] * number)
            continue
        with explained(losses.names[task], task == here[0]):
            found = take(
                [losses.loss(task)],
                [batch.starts[task]],
                [losses.names[task]],
                layout.wanted,
                retain_graph=keep_graph or task != here[-1],
                inputs=inputs,
            )
        yield Pass(task, found[:number], by_parameter(layout.heads, found[first_head:]))
        # Here and in every stage: the next pass gets this one's memory.
        del found


def by_parameter(parameters: Iterable[Tensor], gradients: Sequence[Tensor | None]) -> dict[Tensor, Tensor]:
    """The gradients that are there, by parameter."""
    return {p: gradient for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def exact_step(passes: Passes, batch: Batch, rule: Rule, close: Close) -> Step:
    """Algorithm 1: one pass a task, averaged, rescaled to a common length, summed.

    Args:
        passes: task gradients ``g_t = grad log(loss_t + eps)``, through their stages.
        batch: its facts.
        rule: how norms become weights.
        close: hears from all ranks when the passes are done; in one process it gives back what it gets.
    """
    store, terms = batch.known.store, batch.terms
    store.start(terms)
    rest: dict[Tensor, Tensor] = {}
    found = [False] * len(batch.layout.averaged)
    taken = False
    for one in passes:
        # ema_t <- beta_k * ema_t + (1 - beta_k) * g_t; a task that is refused leaves its average as it was.
        ok = store.add(one)
        # Heads: sum_t grad log(loss_t + eps).
        add_rest(rest, one.rest, ok, masked=not terms.refuses)
        if ok is not False:
            taken = True
            found = [seen or gradient is not None for seen, gradient in zip(found, one.shared, strict=True)]
        del one
    reached = {parameter for parameter, seen in zip(batch.layout.averaged, found, strict=True) if seen}
    # ||ema_t||
    norms, rest, reached = close(store.norms(), rest, reached)
    # w_t = alpha / ||ema_t||, alpha = max_t ||ema_t||; with all fields of the rule.
    weights = rule.weights(norms, terms.power, batch.unsolved, batch.known.task_weights)
    # sum_t w_t * ema_t
    combined = by_parameter(batch.layout.averaged, store.combine(weights)) if taken else {}
    return Step(norms, weights, taken, combined, rest, reached, batch.present)


def add_rest(total: dict[Tensor, Tensor], gradients: Mapping[Tensor, Tensor], ok: Flag, *, masked: bool) -> None:
    """Add one task's gradients of heads where it counts; with `masked` where a device says so."""
    if ok is False:
        return
    kept = where(ok, gradients) if masked and isinstance(ok, Tensor) else gradients
    for parameter, gradient in kept.items():
        total[parameter] = add_gradients(total.get(parameter), gradient)


# ------------------------------------------------- commit


def gradients_of(step: Step, layout: Layout, reached: set[Tensor]) -> dict[Tensor, Tensor]:
    """What the batch adds to every `.grad`.

    A shared parameter that some task once reached gets zeros where this batch has nothing for it; one that no task ever
    reached gets no `.grad`.
    """
    new, known = apart(step.rest), reached | step.reached
    for parameter in layout.shared if step.taken else ():
        if parameter.requires_grad and parameter in known:
            gradient = step.shared.get(parameter)
            new[parameter] = torch.zeros_like(parameter, requires_grad=False) if gradient is None else gradient
    return new


def shaped(gradients: Mapping[Tensor, Tensor], wrap: Callable[[Tensor, Tensor], Tensor]) -> dict[Tensor, Tensor]:
    """The same in the form that each `.grad` needs, complete before anything is counted."""
    return {parameter: wrap(laid_out_like(parameter, gradient), parameter) for parameter, gradient in gradients.items()}


def put(gradients: Mapping[Tensor, Tensor]) -> None:
    """Add to every `.grad` as `.backward()` does: in place unless what is there is sparse."""
    for parameter, new in gradients.items():
        old = parameter.grad
        if old is None:
            parameter.grad = new
        elif old.layout is torch.strided:
            old.add_(new)
        else:
            parameter.grad = add_gradients(old, new)


def apart(gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """The gradients, copied where two of them lie in one memory: clipping in place would change it twice."""
    seen: set[int] = set()
    result = {}
    for parameter, gradient in gradients.items():
        if gradient.layout is torch.strided:
            memory = gradient.untyped_storage().data_ptr()
            gradient = gradient.clone() if memory in seen else gradient
            seen.add(memory)
        result[parameter] = gradient
    return result


def laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the dtype that `.grad` needs and the strides a backward pass would give it."""
    dtype = grad_dtype(parameter)
    gradient = gradient if gradient.dtype == dtype else gradient.to(dtype)
    if gradient.layout is not torch.strided or gradient.stride() == parameter.stride():
        return gradient
    if gradient.shape != parameter.shape:
        return gradient
    like = torch.empty_like(parameter, dtype=gradient.dtype, requires_grad=False)
    return gradient if gradient.stride() == like.stride() else like.copy_(gradient)


def count(step: Step, known: Averages) -> None:
    """Move the counts of tasks and batches; in place, so that a captured graph goes on."""
    # NaN is what differs from itself.
    counted = step.norms == step.norms
    known.batches.add_(counted.any())
    if step.measured:
        known.counts.add_(counted)
