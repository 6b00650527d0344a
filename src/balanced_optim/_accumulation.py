"""Micro-batches of one batch: raw losses and raw gradients are added up by task, and divided once at the end.

``grad log(mean loss) = sum_m s_m grad loss_m / (sum_m s_m (mean loss + eps))`` for micro-batches m of s_m samples;
the mean of the micro-batches' own grad-logs would be something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class MicroBatches:
    """Sums over the micro-batches so far.

    Attributes:
        losses: ``sum_m s_m loss_m`` by task, shape (T,); 0 for a task that none had.
        samples: ``sum_m s_m`` by task.
        gradients: for each task ``sum_m s_m grad loss_m`` by the parameter's position, float32 or wider.
    """

    losses: Tensor
    samples: list[float]
    gradients: list[dict[int, Tensor]]

    def add(self, task: int, gradients: Sequence[Tensor | None], samples: float) -> None:
        """Add `samples` times one task's gradients of a micro-batch, one entry a parameter; they are taken over."""
        known = self.gradients[task]
        for position, gradient in enumerate(gradients):
            if gradient is None:
                continue
            wide = gradient if gradient.layout is torch.strided else gradient.to_dense()
            wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
            if position in known:
                known[position].add_(wide, alpha=samples)
            else:
                known[position] = wide if samples == 1 else wide.mul_(samples)


def sums_with(earlier: MicroBatches | None, values: Tensor, samples: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Over all micro-batches ``sum_m s_m loss_m`` and ``sum_m s_m``, and the last ``s_m``; each of shape (T,).

    Args:
        earlier: the micro-batches before the last.
        values: losses of the last, NaN where it lacks a task.
        samples: s_m of the last, 0 where it lacks a task.
    """
    if earlier is not None:
        values = values.to(torch.promote_types(values.dtype, earlier.losses.dtype))
    last = torch.tensor(samples, dtype=values.dtype, device=values.device)
    sums, total = torch.where(last == 0, torch.zeros_like(values), last * values), last
    if earlier is not None:
        sums = sums + earlier.losses.to(values.dtype)
        total = total + torch.tensor(earlier.samples, dtype=values.dtype, device=values.device)
    return sums, total, last


def no_micro_batches(values: Tensor) -> MicroBatches:
    """Before the first: nothing, for tasks as in `values` of shape (T,)."""
    return MicroBatches(torch.zeros_like(values), [0.0] * len(values), [{} for _ in values])
