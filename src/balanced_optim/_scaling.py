"""Loss scaling under fp16: the scale that a torch.amp.GradScaler asks for, and losses that carry it by mistake."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

from ._numbers import Scalar
from ._task_losses import TaskLosses

# Nodes between a loss and its product with the scale, where the losses were scaled as one tensor.
_SHAPE_ONLY = ("UnbindBackward0", "SelectBackward0", "ViewBackward0", "ReshapeAliasBackward0", "SqueezeBackward0")


def scale_of(scaler: Any, device: torch.device) -> Scalar | None:
    """The factor by which `scaler` wants gradients scaled, None without one.

    A number on a CPU, else a tensor nobody waits for.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale.item() if device.type == "cpu" else scale


def check_unscaled(batch: TaskLosses, scaler: Any, look_for_scalers: bool) -> None:
    """Raise if the losses were multiplied by a scaler's scale, which the log would cancel without a word.

    ``scaler.scale(losses)`` leaves a product whose second factor is the scale. Without `scaler` those that are alive
    are looked for, which takes milliseconds: only with `look_for_scalers`, and only where there is such a product.
    """
    for name, loss in zip(batch.names, batch.losses, strict=True):
        factor = _factor(loss)
        if factor is None or not (scaler is not None or look_for_scalers):
            continue
        scalers = _living_scalers() if scaler is None else [scaler]
        if any(one.is_enabled() and one.get_scale() == factor.item() for one in scalers):
            raise ValueError(
                f"loss of task {name!r} must be unscaled, got the product of a loss and a GradScaler's scale, which "
                "the log transform would cancel; pass the raw losses and the scaler: "
                "optimizer.backward(losses, scaler=scaler), then scaler.step(optimizer) and scaler.update()"
            )


def _factor(loss: Tensor | None) -> Tensor | None:
    """The other factor of a loss that is a product with a scalar tensor, as `scaler.scale` makes it."""
    node = None if loss is None else loss.grad_fn
    while node is not None and node.name() in _SHAPE_ONLY:
        node = node.next_functions[0][0]
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


def _living_scalers() -> list[torch.amp.GradScaler]:
    # type(), since isinstance() reads __class__, which some objects answer with a warning.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.amp.GradScaler)]
