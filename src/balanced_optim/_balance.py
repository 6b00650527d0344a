"""Norms to weights: the pure part of the method, tensors in and tensors out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NORM_TARGETS = ("max", "mean", "median", "min", None)


@dataclass(frozen=True, slots=True)
class Balance:
    """What one balanced step saw and did. Detached tensors on the device of the parameters, each of shape (T,).

    Nothing here was copied to the host; reading a value of a GPU tensor is what waits for it.

    Attributes:
        tasks: the names of the tasks; positions as text ("0", "1", ...) where losses came without names.
        losses: the raw losses, means over all micro-batches and ranks; NaN for a task absent from the batch.
        norms: ||ema_t||_2, the length of each task's averaged gradient on the shared parameters (of the
            gradient itself at beta = 0); NaN for an absent task.
        weights: w_t, what each averaged gradient was multiplied by; 0 for a task that did not count, NaN where an
            `aggregator` combined them. A weight in the hundreds says that a task is solved and that its noise is being
            blown up: see `fade_solved` and `max_weight`.
        skipped: True where the whole batch was left out: by ``nonfinite="skip"``, or after an overflow under a scaler.
    """

    tasks: tuple[str, ...]
    losses: Tensor
    norms: Tensor
    weights: Tensor
    skipped: bool


def beta_at(beta: float, decay: float, count: int) -> float:
    """beta_k = beta / k**decay for the k-th gradient of a task, k counted from 1."""
    return beta / float(count**decay)


def target_norm(norms: Tensor, counts: Tensor, norm_target: str) -> Tensor:
    """alpha: the common length that every counted gradient is rescaled to.

    Args:
        norms: shape (T,).
        counts: boolean, shape (T,): which tasks count. With none, alpha is 0.
        norm_target: "max", "mean", "median" (of an even number: the mean of the middle two) or "min".
    """
    counted = norms.masked_fill(~counts, 0.0)
    if norm_target == "max":
        return counted.amax()
    zeros, number = torch.zeros_like(norms), counts.sum()
    if norm_target == "mean":
        return counted.sum() / number.clamp(min=1)
    ascending = torch.where(counts, norms, zeros + torch.inf).sort().values
    # Indices stay tensors: a Python index would wait for the device.
    last = (number - 1).clamp(min=0)
    middle = (last // 2, (last + 1) // 2) if norm_target == "median" else (zeros[0].long(), zeros[0].long())
    alpha = ascending.gather(0, torch.stack(middle)).mean()
    return torch.where(number > 0, alpha, zeros[0])


def unsolved_shares(losses: Tensor, eps: float) -> Tensor:
    """loss_t / (loss_t + eps), shape (T,): 1 far above eps, 0 where a task is solved.

    By this factor eps shortens ``grad log(loss_t + eps)`` against ``grad log(loss_t)``.
    """
    return (losses / (losses + eps)).clamp(min=0.0)


def balance_weights(
    norms: Tensor,
    norm_target: str | None,
    max_weight: float | None,
    shares: Tensor | None = None,
) -> Tensor:
    """w_t = min(share_t * alpha / ||ema_t||, max_weight); 0 for absent tasks (NaN norm) and zero gradients.

    Algorithm 1 of the paper adds eps to the norm; here a zero norm is left out instead, so that rescaled
    gradients have exactly equal norms and a single task keeps weight exactly 1.

    Args:
        norms: ||ema_t||, shape (T,); NaN for a task that does not take part.
        norm_target: see `target_norm`; None rescales nothing (w_t = 1 before the cap).
        max_weight: cap on the weight, or None.
        shares: of alpha that a task's rescaled gradient gets, in [0, 1], shape (T,); None: all of it.

    Returns:
        w, shape (T,), finite for finite norms.
    """
    counts = norms > 0
    if norm_target is None:
        weights = torch.ones_like(norms)
    else:
        # alpha / norm overflows for a norm near the smallest number; the clamp keeps 0 * inf out of the sum.
        weights = target_norm(norms, counts, norm_target) / norms
        weights = weights.clamp(max=torch.finfo(norms.dtype).max)
    if shares is not None:
        weights = weights * shares
    if max_weight is not None:
        weights = weights.clamp(max=max_weight)
    return weights.masked_fill(~counts, 0.0)
