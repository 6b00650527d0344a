"""`backward`: one batch from the caller's losses to `.grad`.

read -> (meeting of the ranks) -> batch -> source -> stages -> form -> verdict -> commit
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._aggregator import aggregated_step, check_aggregator
from ._batch import Given, Parts, device_of, make_batch, meet
from ._capture import check_capture, check_replayed, is_capturing
from ._graph import check_replay, is_hooked, outside_of, reach_of
from ._losses import Losses, Samples
from ._meeting import Alone
from ._members import Layout
from ._micro_batches import Means, MicroBatches, with_earlier
from ._numbers import on_device
from ._one_backward import is_measured, joint_pass, keep_norms, one_backward_step, with_joint_earlier
from ._passes import Passes, set_aside
from ._rule import Balance
from ._scaling import Held, scaled, unscaled
from ._state import Averages
from ._step import Batch, Step, count, exact_step, gradients_of, put, shaped, task_passes
from ._verdict import (
    Overflow,
    bad_loss,
    reaches_nothing,
    stepped,
    verdict,
    versions_of,
    warn_of_outside,
    warn_of_unreached,
    warn_of_world,
)


def backward(parts: Parts, base_optim: Optimizer, losses: Losses, scaler: Any, samples: Samples) -> None:
    """Fill `.grad` from the task losses; see `DualBalancedOptimizer.backward`."""
    layout = parts.layout(base_optim)
    ranks = parts.processes.over(layout)
    warn_of_world(parts)
    check_capture(parts, layout, scaler)
    check_aggregator(parts.settings.aggregator, fully_shard=ranks.agrees)
    try:
        given = meet(parts, layout, ranks, "backward()", losses, scaler, samples)
        earlier: MicroBatches | None = parts.pending.micro_batches
        reach = reach_of(given.losses.losses) if parts.members.joint or earlier is not None else {}
        outside = outside_of(reach, layout.parameters) if ranks.outside_get_gradients else []
        layout = layout.with_outside(outside) if outside else layout
        warn_of_outside(parts, given, layout, ranks)
        batch, mean = make_batch(parts, layout, ranks, given)
        held = None if given.scale is None else Held(batch.terms, ranks, device_of(layout))
        usable = batch.terms.usable
        known_bad = batch.terms.refuses and isinstance(usable, list) and not all(usable)
        error: Exception | None = bad_loss(parts, batch, given) if known_bad and batch.present else None
        step, new = None, {}
        kept = _rows_before(parts, held)
        try:
            if error is None:
                with set_aside(layout.wanted):
                    step = _step(parts, batch, mean, ranks, given, held, reach)
                error = verdict(parts, batch, step, given, held)
            if error is None and step is not None:
                new = gradients_of(step, layout, parts.state.reached)
                new = shaped(new if given.scale is None else scaled(new, given.scale), ranks.wrap)
        except BaseException:
            _undo(parts, batch.known, kept)
            raise
    finally:
        ranks.reset()
    if error is None and step is not None:
        _commit(parts, batch, step, new, given)
        return
    _undo(parts, batch.known, kept)
    try:
        if error is not None and not isinstance(error, Overflow) and parts.settings.nonfinite == "raise":
            raise error
        _leave_out(parts, batch, given, isinstance(error, Overflow))
    finally:
        # Bound here it would be part of a cycle that keeps the graph alive.
        del error


def _rows_before(parts: Parts, held: Held | None) -> list[list[Tensor]] | None:
    """Copies of the rows where they take in a batch whose joint pass may still overflow."""
    known = parts.state.averages
    if held is None or not parts.members.joint or known is None or not known.store.keeps_rows:
        return None
    return [[row.clone() for row in rows] for rows in known.store.averages()]


def _undo(parts: Parts, known: Averages, kept: list[list[Tensor]] | None) -> None:
    """Averages that this batch began go back to zero, those that were kept to what they were."""
    # What a capture has recorded was not done.
    if not known.store.keeps_rows or is_capturing():
        return
    if kept is not None:
        known.store.load_averages(kept)
    for task, number in enumerate(known.counts.tolist()):
        if number == 0:
            known.store.clear(task)
    if parts.members.joint:
        known.norms.copy_(torch.where(known.counts > 0, known.store.row_norms(), 0.0))


def _step(
    parts: Parts,
    batch: Batch,
    mean: Means,
    ranks: Alone,
    given: Given,
    held: Held | None,
    reach: Mapping[Tensor, int | None],
) -> Step:
    """The form of the step, with the stages that this call needs. Nothing but the store is touched."""
    settings, layout, joint = parts.settings, batch.layout, parts.members.joint
    earlier = parts.pending.micro_batches
    # In the one-backward form a pass stops at what norms are measured on, and at the heads.
    inputs = [p for p in [*layout.averaged, *layout.heads] if p.requires_grad] if joint else None

    def staged(passes: Passes, tasks: Sequence[int], shared: Sequence[Tensor]) -> Passes:
        passes = ranks.reduced(passes, tasks, shared, held=held is not None)
        return passes if held is None else held(passes)

    def measured() -> Passes:
        passes = task_passes(batch, ranks.take, inputs=inputs, keep_graph=joint)
        passes = _checked(passes, parts, batch, ranks, given)
        passes = passes if given.scale is None else unscaled(passes, given.scale)
        if earlier is not None and mean.earlier is not None:
            passes = with_earlier(passes, earlier, mean.earlier, layout)
        return staged(_reaching(passes, parts, batch, ranks), batch.running, layout.averaged)

    def joint_passes(weights: Tensor, counted: list[int], with_heads: bool) -> Passes:
        heads = _owners(layout, reach, ranks) if with_heads else {}
        reversible = _reversible(parts, batch, weights, counted)
        passes = joint_pass(batch, ranks.take, weights, counted, heads, reversible)
        passes = _checked(passes, parts, batch, ranks, given) if with_heads else passes
        passes = passes if given.scale is None else unscaled(passes, given.scale)
        if earlier is not None and mean.earlier is not None:
            passes = with_joint_earlier(passes, earlier, batch, mean.earlier, weights, counted, with_heads)
        return staged(passes, [-1], layout.shared)

    if joint:
        with closing(measured()) as passes:
            measure = passes if is_measured(batch, settings.refresh_every) else None
            return one_backward_step(measure, batch, settings.rule, joint_passes, ranks.close)
    with closing(measured()) as passes:
        if settings.aggregator is not None:
            return aggregated_step(passes, batch, settings.aggregator, ranks)
        return exact_step(passes, batch, settings.rule, ranks.close)


def _owners(layout: Layout, reach: Mapping[Tensor, int | None], ranks: Alone) -> dict[Tensor, int | None]:
    """For each head that tasks reach the one that alone does; None where it needs a pass of its own."""
    if ranks.reduces_in_passes:
        # These send messages, so that they must be the same on all ranks, whatever their graphs.
        return dict.fromkeys(layout.heads)
    # A hook on a head has to see the gradient that it would see in another step.
    own = layout.heads[: len(layout.heads) - len(layout.outside)]
    hooked = {id(head) for head in own if is_hooked(head)}
    return {head: None if id(head) in hooked else reach[head] for head in layout.heads if head in reach}


def _reversible(parts: Parts, batch: Batch, weights: Tensor, counted: list[int]) -> set[int]:
    """The tasks by whose weight a gradient can be multiplied and divided again, without asking a device.

    A weight of 0 cannot be undone, nor what a float16 loss makes of a small one.
    """
    if on_device(weights.device):
        numbers = parts.state.task_weights or [1.0] * len(weights)
        counted = [] if parts.settings.rule.fade_solved else counted
    else:
        numbers = weights.tolist()
    return {task for task in counted if numbers[task] > 0 and not _is_half(batch.losses.losses[task])}


def _is_half(loss: Tensor | None) -> bool:
    return loss is not None and loss.dtype == torch.float16


def _checked(passes: Passes, parts: Parts, batch: Batch, ranks: Alone, given: Given) -> Passes:
    """Before the first pass: classes that are new in these graphs are run twice, where a graph is walked twice."""
    if any(given.marked) and (parts.members.joint or len(batch.running) > 1):
        check_replayed()
        check_replay(
            ranks.take,
            batch.losses.losses,
            batch.starts.unbind(),
            batch.losses.names,
            batch.layout.parameters,
            given.marked,
        )
    yield from passes


def _reaching(passes: Passes, parts: Parts, batch: Batch, ranks: Alone) -> Passes:
    """Stage: refuse a task that this rank has, if it reaches nothing to average although something can be reached."""
    versions: list[int] | None = versions_of(batch.layout.shared)
    for one in passes:
        if versions is not None and versions_of(batch.layout.shared) != versions:
            raise RuntimeError(stepped(batch.losses.names[one.task]))
        versions = None
        if all(gradient is None for gradient in one.shared) and not parts.members.all_frozen:
            here = batch.losses.losses[one.task] is not None or one.rest
            if here:
                raise ValueError(reaches_nothing(batch.losses.names[one.task], parts.members.joint, ranks.hint))
        yield one
        del one


# ------------------------------------------------- commit


def _commit(parts: Parts, batch: Batch, step: Step, new: dict[Tensor, Tensor], given: Given) -> None:
    """Count the batch and set `.grad`; from here on the tasks are fixed."""
    state, pending, known = parts.state, parts.pending, batch.known
    state.averages, state.emptied = known, None
    if step.averages is not None and known.store.keeps_rows:
        rows = zip(known.store.averages(), step.averages, strict=True)
        known.store.load_averages([[fresh.get(t, row) for t, row in enumerate(old)] for old, fresh in rows])
    count(step, known)
    if parts.members.joint:
        keep_norms(step, known)
    state.reached.update(step.reached)
    put(new)
    pending.balance = Balance(batch.losses.names, batch.values, step.norms, step.weights, skipped=False)
    pending.micro_batches = pending.tasks = None
    pending.waiting, pending.skip_next_step = True, False
    if given.scale is not None and all(parameter.grad is None for parameter in batch.layout.parameters):
        # No task was there. A scaler needs some .grad to look at, and nothing must come of it.
        _signal(batch.layout, 0.0)
        pending.skip_next_step = True
    if "unreached" not in pending.said and step.taken and len(step.measured) == len(batch.losses.names):
        warn_of_unreached(parts, batch.layout, step)


def _leave_out(parts: Parts, batch: Batch, given: Given, overflow: bool) -> None:
    """Record a batch that is skipped. Under a scaler one `.grad` says whether it was an overflow: inf, or zeros."""
    pending = parts.pending
    nothing = torch.full_like(batch.values, math.nan), torch.zeros_like(batch.values)
    pending.balance = Balance(batch.losses.names, batch.values, *nothing, skipped=True)
    pending.micro_batches = pending.tasks = None
    # After an overflow it is the scaler that skips.
    pending.skip_next_step = not overflow and not pending.waiting
    if given.scale is not None:
        _signal(batch.layout, math.inf if overflow else 0.0)


def _signal(layout: Layout, value: float) -> None:
    """Add `value` to one `.grad`, where a scaler sees it."""
    for parameter in [p for p in [*layout.shared, *layout.parameters] if p.requires_grad][:1]:
        put({parameter: torch.full_like(parameter, value, requires_grad=False)})
