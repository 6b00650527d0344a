"""Loss scaling under fp16: the scale that a torch.amp.GradScaler asks for, and losses that carry it by mistake."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._losses import TaskLosses
from ._meeting import Alone
from ._numbers import Flag, Scalar, on_device
from ._passes import Pass, Passes
from ._rule import Terms
from ._store import finite

# Nodes between a loss and its product with the scale, where the losses were scaled as one tensor.
_SHAPE_ONLY = ("UnbindBackward0", "SelectBackward0", "ViewBackward0", "ReshapeAliasBackward0", "SqueezeBackward0")


def scale_of(scaler: Any, device: torch.device) -> Scalar | None:
    """The factor by which `scaler` wants gradients scaled, None without one.

    A number on a CPU, else a tensor nobody waits for.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale if on_device(device) else scale.item()


def unscaled(passes: Passes, scale: Scalar) -> Passes:
    """Stage: gradients divided by the scale, in float32 or wider."""

    def divide(gradient: Tensor) -> Tensor:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return wide * (scale.to(wide.device).reciprocal() if isinstance(scale, Tensor) else 1 / scale)

    for one in passes:
        shared = [None if gradient is None else divide(gradient) for gradient in one.shared]
        yield Pass(one.task, shared, {p: divide(gradient) for p, gradient in one.rest.items()}, one.ok)
        del one, shared


def scaled(gradients: Mapping[Tensor, Tensor], scale: Scalar) -> dict[Tensor, Tensor]:
    """The gradients times the scale; one that overflows is for the scaler to see."""
    return {
        parameter: gradient * (scale.to(gradient.device) if isinstance(scale, Tensor) else scale)
        for parameter, gradient in gradients.items()
    }


class Held:
    """Stage: hold all passes until it is known that none has overflowed, so that no average takes in a part of a batch.

    Attributes:
        ok: whether none has, once the stage is through; a bad loss is no overflow.
    """

    def __init__(self, terms: Terms, ranks: Alone, device: torch.device) -> None:
        self._terms, self._ranks, self._device = terms, ranks, device
        self.ok: Flag = True

    def __call__(self, passes: Passes) -> Passes:
        """Memory: T gradients until the last one is there."""
        held = list(passes)
        for one in held:
            usable = self._terms.usable[one.task] if one.task >= 0 else True
            # Where the loss is bad already, its gradient says nothing about the scale.
            self.ok = self.ok & (finite(one, self._device) | (usable ^ True))
        self.ok = self._ranks.agree(self.ok)
        for one in held:
            yield Pass(one.task, one.shared, one.rest, one.ok & self.ok)


def check_unscaled(batch: TaskLosses, scaler: Any, logs: Sequence[bool]) -> None:
    """Raise if the losses were multiplied by a scaler's scale, which the log would cancel without a word.

    ``scaler.scale(losses)`` leaves a product whose second factor is the scale. Without the scaler at hand any power of
    two from 256 on is taken for one: as a weight it would do nothing under the log either. Reads that factor.
    """
    for name, loss, log in zip(batch.names, batch.losses, logs, strict=True):
        factor = _factor(loss) if log else None
        if factor is None:
            continue
        value = factor.item()
        mantissa, exponent = math.frexp(value)
        if value == scaler.get_scale() if scaler is not None else mantissa == 0.5 and exponent > 8:
            raise ValueError(
                f"loss of task {name!r} must be unscaled, got the product of a loss and {value:g}, as a GradScaler's "
                "scale makes it, which the log transform would cancel; pass the raw losses and the scaler: "
                "optimizer.backward(losses, scaler=scaler), then scaler.step(optimizer) and scaler.update(); a "
                "weight of your own goes into task_weights"
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
