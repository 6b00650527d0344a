"""The rule of the method: losses to cotangents, norms to weights. Pure functions, tensors in and tensors out.

Letters: T tasks, k batches so far, ema_t the averaged gradient of task t, w_t its weight.

    g_t    = grad loss_t / (loss_t + eps)                               = grad log(loss_t + eps)
    beta_k = beta / k**beta_decay
    p_k    = norm_power * min(1, k / warmup_steps)
    w_t    = task_weight_t * min(unsolved_t * (alpha / ||ema_t||)**p_k, max_weight)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._numbers import on_device, widest

NORM_TARGETS = ("max", "rms", "mean", "median", "min")


@dataclass(frozen=True, slots=True)
class Balance:
    """What one balanced step saw and did. Detached tensors on the device of the parameters, each of shape (T,).

    Nothing here was copied to the host; reading a value of a GPU tensor is what waits for it. After a step captured in
    a CUDA graph these are the graph's own tensors: every replay writes them anew.

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


@dataclass(frozen=True, slots=True)
class Terms:
    """What one batch's averages and sums are made with, fixed before its first pass; of each a value a task.

    Lists of Python numbers for a store on a CPU, else tensors on the store's device, so that nobody waits.

    Attributes:
        keep: beta_k; 0 where the task has no average yet, so that its row counts as zeros.
        gain: 1 - beta_k.
        usable: whether the task may count as far as losses say; the same for all where one bad loss refuses the batch.
        factors: task_weight_t * unsolved_t.
        power: p_k.
        refuses: one bad task refuses the whole batch.
    """

    keep: Sequence[float] | Tensor
    gain: Sequence[float] | Tensor
    usable: Sequence[bool] | Tensor
    factors: Sequence[float] | Tensor
    power: float | Tensor
    refuses: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """The fields of the rule, as the constructor was given them.

    Attributes:
        eps: added to every loss under the log.
        log_transform: for all tasks, by task, or by task name; read by `logs`.
        norm_target, norm_power, warmup_steps, max_weight, fade_solved: see `DualBalancedOptimizer`.
    """

    eps: float = 1e-8
    log_transform: bool | Sequence[bool] | Mapping[str, bool] = True
    norm_target: str | float | None = "max"
    norm_power: float = 1.0
    warmup_steps: int = 0
    max_weight: float | None = None
    fade_solved: bool = False

    @property
    def streams(self) -> bool:
        """Whether w_t is known, up to a factor common to all tasks, as soon as ||g_t|| is."""
        return self.max_weight is None or self.norm_target is None

    def logs(self, names: Sequence[str]) -> tuple[bool, ...]:
        """For every task whether its logarithm is taken."""
        if isinstance(self.log_transform, bool):
            return (self.log_transform,) * len(names)
        if isinstance(self.log_transform, Mapping):
            return tuple(self.log_transform.get(name, True) for name in names)
        return tuple(self.log_transform)

    def starts(self, losses: Tensor, logged: Tensor | bool) -> Tensor:
        """What each backward pass starts from, shape (T,): 1 / (loss_t + eps), or 1 without the log.

        ``grad log(loss + eps) = grad loss / (loss + eps)``, so no logarithm is ever built.
        """
        if logged is False:
            return torch.ones_like(losses)
        inverse = (losses + self.eps).reciprocal()
        return inverse if logged is True else inverse.masked_fill(~logged, 1.0)

    def usable(self, losses: Tensor, logged: Tensor | bool) -> Tensor:
        """For every task whether its loss is finite, and above -eps under the log; False where absent (NaN)."""
        # Comparisons with NaN are false.
        if isinstance(logged, bool):
            return (losses > (-self.eps if logged else -math.inf)) & (losses < math.inf)
        return ((losses > -self.eps) | ~logged) & (losses > -math.inf) & (losses < math.inf)

    def unsolved(self, losses: Tensor, logged: Tensor | bool) -> Tensor | None:
        """loss_t / (loss_t + eps) under `fade_solved` and the log: 1 far above eps, 0 where a task is solved.

        By this factor eps shortens ``grad log(loss_t + eps)`` against ``grad log(loss_t)``. None: 1 for all.
        """
        if not self.fade_solved:
            return None
        share = (losses / (losses + self.eps)).clamp(min=0.0)
        return share if isinstance(logged, bool) else share.masked_fill(~logged, 1.0)

    def power(self, batches: Tensor) -> float | Tensor:
        """p_k for the batch after `batches` committed ones: a number, or a tensor where nobody may wait."""
        if not self.warmup_steps:
            return self.norm_power
        if on_device(batches.device):
            share = (batches + 1).to(widest(batches.device)) / self.warmup_steps
            return self.norm_power * share.clamp(max=1.0)
        return self.norm_power * min(1.0, (int(batches) + 1) / self.warmup_steps)

    def weights(
        self, norms: Tensor, power: float | Tensor, unsolved: Tensor | None = None, task_weights: Tensor | None = None
    ) -> Tensor:
        """w_t = task_weight_t * min(unsolved_t * (alpha / ||ema_t||)**p, max_weight), shape (T,).

        0 for absent tasks (NaN norm) and for zero gradients, which have no direction. Algorithm 1 of the paper adds eps
        to the norm instead; without it rescaled gradients have exactly equal norms and a single task has weight 1.

        Args:
            norms: ||ema_t||, NaN for a task that does not take part.
            power: p_k.
            unsolved: see `unsolved`.
            task_weights: priorities; None: 1 for all.
        """
        counts = norms > 0
        weights = self._finished(self._ratios(norms, counts, power), unsolved, task_weights)
        return weights.masked_fill(~counts, 0.0)

    def joint_weights(
        self, norms: Tensor, power: float | Tensor, unsolved: Tensor | None = None, task_weights: Tensor | None = None
    ) -> Tensor:
        """The same for the one-backward form, where a gradient may be zero on `norm_params` and nowhere else.

        There the factor is 1, the log alone, until the layer has a norm: a weight of 0 would stop the trunk for good.
        """
        counts = norms > 0
        ratios = torch.where(counts, self._ratios(norms, counts, power), 1.0)
        return self._finished(ratios, unsolved, task_weights).masked_fill(norms.isnan(), 0.0)

    def _ratios(self, norms: Tensor, counts: Tensor, power: float | Tensor) -> Tensor:
        """(alpha / ||ema_t||)**p."""
        if self.norm_target is None:
            return torch.ones_like(norms)
        ratios = target_norm(norms, counts, self.norm_target) / norms
        if isinstance(power, Tensor) or power != 1:
            ratios = ratios.pow(power.to(norms.dtype) if isinstance(power, Tensor) else power)
        # alpha / norm overflows for a norm near the smallest number; the clamp keeps 0 * inf out of the sum.
        return ratios.clamp(max=torch.finfo(norms.dtype).max)

    def _finished(self, ratios: Tensor, unsolved: Tensor | None, task_weights: Tensor | None) -> Tensor:
        weights = ratios if unsolved is None else ratios * unsolved.to(ratios.dtype)
        weights = weights if self.max_weight is None else weights.clamp(max=self.max_weight)
        return weights if task_weights is None else weights * task_weights.to(ratios.dtype)


def target_norm(norms: Tensor, counts: Tensor, norm_target: str | float) -> Tensor:
    """alpha: the common length that every counted gradient is rescaled to at p = 1.

    Args:
        norms: shape (T,).
        counts: boolean, shape (T,): which tasks count. With none, alpha is 0.
        norm_target: "max", "rms", "mean", "median" (of an even number: the mean of the middle two), "min", or a number.
    """
    if not isinstance(norm_target, str):
        return torch.full((), norm_target, dtype=norms.dtype, device=norms.device)
    counted = norms.masked_fill(~counts, 0.0)
    if norm_target == "max":
        return counted.amax()
    number = counts.sum().clamp(min=1)
    if norm_target == "mean":
        return counted.sum() / number
    if norm_target == "rms":
        # In units of the largest, whose square may overflow.
        largest = counted.amax()
        shares = torch.where(largest > 0, counted / largest, 0.0)
        return largest * (shares.square().sum() / number).sqrt()
    # "median" or "min".
    ascending = norms.masked_fill(~counts, torch.inf).sort().values
    # Indices stay tensors: a Python index would wait for the device.
    last = number - 1
    middle = torch.stack((last // 2, (last + 1) // 2)) if norm_target == "median" else torch.zeros_like(last).expand(2)
    return ascending.gather(0, middle).mean().masked_fill(~counts.any(), 0.0)


def beta_at(beta: float, decay: float, count: int) -> float:
    """beta_k = beta / k**decay for the k-th gradient of a task, k counted from 1."""
    return beta / float(count**decay)


def schedule(beta: float, decay: float, counts: Tensor) -> tuple[Sequence[float] | Tensor, Sequence[float] | Tensor]:
    """`keep` and `gain` of `Terms` for tasks that had `counts` batches, shape (T,)."""
    if on_device(counts.device):
        betas = beta / (counts + 1).to(widest(counts.device)) ** decay
        return torch.where(counts > 0, betas, 0.0), 1 - betas
    past = counts.tolist()
    numbers = [beta_at(beta, decay, count + 1) for count in past]
    return [b if count else 0.0 for b, count in zip(numbers, past, strict=True)], [1 - b for b in numbers]
