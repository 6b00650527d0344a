"""Loss scaling under fp16: the scale that a torch.amp.GradScaler asks for, and losses that carry it by mistake."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

from ._numbers import Scalar
from ._task_losses import TaskLosses


def scale_of(scaler: Any, device: torch.device) -> Scalar | None:
    """The factor by which `scaler` wants gradients scaled, None without one.

    A number on a CPU, else a tensor nobody waits for.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale.item() if device.type == "cpu" else scale


def check_unscaled(batch: TaskLosses, scaler: Any, look_for_owner: bool) -> None:
    """Raise if the losses were multiplied by a scaler's scale, which the log would cancel without a word.

    ``scaler.scale(loss)`` leaves a product whose second factor is the scaler's own tensor. Without `scaler` its
    owner is looked for among all living objects, which takes milliseconds: only with `look_for_owner`.
    """
    for name, loss in zip(batch.names, batch.losses, strict=True):
        factor = _factor(loss)
        if factor is None:
            continue
        if scaler is not None:
            owned = factor is getattr(scaler, "_scale", None)
        else:
            owned = look_for_owner and _belongs_to_a_scaler(factor)
        if owned:
            raise ValueError(
                f"loss of task {name!r} must be unscaled, got the product of a loss and a GradScaler's scale, which "
                "the log transform would cancel; pass the raw losses and the scaler: "
                "optimizer.backward(losses, scaler=scaler), then scaler.step(optimizer) and scaler.update()"
            )


def _factor(loss: Tensor | None) -> Tensor | None:
    """The other factor of a loss that is a product with a scalar tensor, as `scaler.scale` makes it."""
    node = None if loss is None else loss.grad_fn
    if node is None or node.name() != "MulBackward0":
        return None
    try:
        other = getattr(node, "_saved_other", None)
    except RuntimeError:
        # A graph that was used before; the backward pass says so.
        return None
    if isinstance(other, Tensor) and other.dim() == 0 and other.dtype == torch.float32 and not other.requires_grad:
        return other
    return None


def _belongs_to_a_scaler(factor: Tensor) -> bool:
    return any(
        isinstance(owner, torch.amp.GradScaler)
        or (isinstance(owner, dict) and owner.get("_scale") is factor and "_growth_tracker" in owner)
        for owner in gc.get_referrers(factor)
    )
