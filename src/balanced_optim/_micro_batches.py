"""Micro-batches of one batch: raw losses and raw gradients are added up by task, and divided once at the end.

``grad log(mean loss) = sum_m s_m grad loss_m / (sum_m s_m (mean loss + eps))`` for micro-batches m of s_m samples;
the mean of the micro-batches' own grad-logs would be something else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._meeting import Totals
from ._members import Layout
from ._numbers import add_gradients, dense
from ._passes import Pass, Passes


@dataclass(slots=True)
class MicroBatches:
    """Sums over the micro-batches so far.

    Attributes:
        losses: ``sum_m s_m loss_m`` by task, shape (T,); 0 for a task that none had.
        samples: ``sum_m s_m`` by task.
        gradients: for each task ``sum_m s_m grad loss_m`` by parameter, float32 or wider; leaves of the graph that are
            not in the optimizer included.
    """

    losses: Tensor
    samples: list[float]
    gradients: list[dict[Tensor, Tensor]]

    def add(self, task: int, gradients: Mapping[Tensor, Tensor], samples: float) -> None:
        """Add `samples` times one task's gradients of a micro-batch."""
        known = self.gradients[task]
        for parameter, gradient in gradients.items():
            wide = dense(gradient)
            wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
            if parameter in known:
                known[parameter].add_(wide, alpha=samples)
            else:
                known[parameter] = wide * samples


def no_micro_batches(values: Tensor) -> MicroBatches:
    """Before the first: nothing, for tasks as in `values` of shape (T,)."""
    return MicroBatches(torch.zeros_like(values), [0.0] * len(values), [{} for _ in values])


@dataclass(frozen=True, slots=True)
class Means:
    """Losses over all micro-batches and ranks, shape (T,) each.

    Attributes:
        values: the mean losses, NaN for a task that none had.
        present: tasks that some micro-batch or rank had.
        last: what the gradients of the last micro-batch are multiplied by; None: by 1.
        earlier: what the sums of earlier ones are multiplied by.
    """

    values: Tensor
    present: list[int]
    last: Tensor | None = None
    earlier: Tensor | None = None


def means(
    values: Tensor, samples: Sequence[float], before: MicroBatches | None, totals: Totals | None, averaging: int
) -> Means:
    """The mean losses, and how the parts of a batch are weighed.

    Args:
        values: losses of the last micro-batch, NaN where it lacks a task.
        samples: s_m of the last, 0 where it lacks a task.
        before: the micro-batches before the last.
        totals: what all ranks brought; None in one process.
        averaging: by what a framework divides the sum of the ranks' gradients.
    """
    if before is None and totals is None:
        return Means(values, [task for task, number in enumerate(samples) if number > 0])
    sums, total, last = sums_with(before, values, samples)
    dtype = sums.dtype
    if totals is not None:
        sums, total, dtype = totals.sums, totals.samples, totals.dtype
    present = [task for task, number in enumerate(total.tolist()) if number > 0]
    mean = (sums / total).masked_fill(total <= 0, math.nan).to(dtype)
    return Means(mean, present, (last / total * averaging).to(dtype), total.to(dtype).reciprocal())


def sums_with(before: MicroBatches | None, values: Tensor, samples: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Over all micro-batches ``sum_m s_m loss_m`` and ``sum_m s_m``, and the last ``s_m``; each of shape (T,)."""
    if before is not None:
        values = values.to(torch.promote_types(values.dtype, before.losses.dtype))
    last = torch.tensor(samples, dtype=values.dtype, device=values.device)
    sums, total = (last * values).masked_fill(last == 0, 0.0), last
    if before is not None:
        sums = sums + before.losses.to(values.dtype)
        total = total + torch.tensor(before.samples, dtype=values.dtype, device=values.device)
    return sums, total, last


def sum_of(before: MicroBatches, tasks: Iterable[int], factors: Tensor) -> dict[Tensor, Tensor]:
    """``sum_t factor_t * (sum over micro-batches)_t`` by parameter, new tensors."""
    total: dict[Tensor, Tensor] = {}
    for task in tasks:
        for parameter, gradient in before.gradients[task].items():
            part = gradient * factors[task].to(gradient.device, gradient.dtype.to_real())
            total[parameter] = add_gradients(total.get(parameter), part)
    return total


def with_earlier(passes: Passes, before: MicroBatches, factors: Tensor, layout: Layout) -> Passes:
    """Stage: add to each task what earlier micro-batches brought of it on averaged parameters and heads."""
    elsewhere = set(layout.shared) - set(layout.averaged)
    for one in passes:
        more = sum_of(before, [one.task], factors)
        yield added(one, {p: g for p, g in more.items() if p not in elsewhere}, layout.averaged)
        del one, more


def added(one: Pass, more: Mapping[Tensor, Tensor], parameters: Sequence[Tensor]) -> Pass:
    """The pass and `more` gradients; it may be of a task that the last micro-batch lacks."""
    shared = [
        add_gradients(gradient, more[parameter]) if parameter in more else gradient
        for parameter, gradient in zip(parameters, one.shared, strict=True)
    ]
    rest, inside = dict(one.rest), set(parameters)
    for parameter, gradient in more.items():
        if parameter not in inside:
            rest[parameter] = add_gradients(rest.get(parameter), gradient)
    return Pass(one.task, shared, rest, one.ok)
