"""`accumulate`: one micro-batch, added to those that wait for the batch to be complete."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import Optimizer

from ._batch import Given, Parts, meet
from ._capture import check_capture
from ._graph import check_replay, outside_of, reach_of
from ._losses import Losses, Samples, describe_bad_loss
from ._meeting import Alone
from ._members import Layout
from ._micro_batches import MicroBatches, no_micro_batches
from ._passes import Pass, set_aside
from ._remedies import explained
from ._scaling import unscaled
from ._step import by_parameter
from ._verdict import stepped, versions_of


def accumulate(parts: Parts, base_optim: Optimizer, losses: Losses, scaler: Any, samples: Samples) -> None:
    """Add one micro-batch to those that wait; see `DualBalancedOptimizer.accumulate`."""
    layout = parts.layout(base_optim)
    check_capture(parts, layout, scaler, micro_batch=True)
    ranks = parts.processes.over(layout)
    try:
        given = meet(parts, layout, ranks, "accumulate()", losses, scaler, samples)
        _check_values(parts, given)
        before = parts.pending.micro_batches or no_micro_batches(given.values)
        # A micro-batch of half precision, or without any task, must not round the losses of the others.
        before.losses = before.losses.to(torch.promote_types(before.losses.dtype, given.values.dtype))
        # A failure in the middle of the passes ends the batch: half a micro-batch must not go into the next one.
        parts.pending.micro_batches = None
        outside = outside_of(reach_of(given.losses.losses), layout.parameters) if ranks.outside_get_gradients else []
        with set_aside([*layout.parameters, *outside]), ranks.settled():
            _add_passes(before, ranks, layout.with_outside(outside), given)
    finally:
        ranks.reset()
    parts.pending.micro_batches = before
    parts.pending.tasks, parts.pending.named = given.losses.names, given.losses.named


def _check_values(parts: Parts, given: Given) -> None:
    """Refuse a micro-batch with a loss that is not finite; only the mean loss has to be positive."""
    if parts.settings.nonfinite != "raise":
        return
    values = given.values.tolist()
    here = {task: (None, values[task]) for task, loss in enumerate(given.losses.losses) if loss is not None}
    for task, (rank, value) in (here if given.totals is None else given.totals.bad).items():
        if not math.isfinite(value):
            raise ValueError(describe_bad_loss(given.losses.names[task], value, 0.0, False, rank))


def _add_passes(total: MicroBatches, ranks: Alone, layout: Layout, given: Given) -> None:
    """The passes of one micro-batch, added to `total`."""
    losses, samples = given.losses, given.samples
    everything, versions = [*layout.shared, *layout.heads], versions_of(layout.shared)
    if any(given.marked) and len(losses.present) > 1:
        starts = torch.ones_like(given.values).unbind()
        check_replay(ranks.take, losses.losses, starts, losses.names, layout.parameters, given.marked)
    for task in losses.present:
        # Where passes add up the ranks' gradients, each must bring its number of samples along.
        own = samples[task] * ranks.averaging if ranks.reduces_in_passes else 1.0
        start = torch.full_like(given.values[task], own)
        with explained(losses.names[task], task == losses.present[0]):
            found = ranks.take(
                [losses.loss(task)],
                [start if given.scale is None else start * given.scale],
                [losses.names[task]],
                everything,
                retain_graph=task != losses.present[-1],
            )
        if task == losses.present[0] and versions_of(layout.shared) != versions:
            raise RuntimeError(stepped(losses.names[task]))
        one = Pass(task, [], by_parameter(everything, found))
        one = one if given.scale is None else next(unscaled((each for each in [one]), given.scale))
        total.add(task, one.rest, 1.0 if ranks.reduces_in_passes else samples[task])
        if samples[task]:
            # A mean over no samples may be NaN.
            total.losses[task] += given.values[task] * samples[task]
            total.samples[task] += samples[task]
