"""One backward pass a task, its gradients taken over from `.grad` before the next pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def take_gradients(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Every parameter's `.grad`, which is None afterwards."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = None
    return gradients


def put_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Set every parameter's `.grad`."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def add_gradients(old: Tensor | None, new: Tensor) -> Tensor:
    """old + new as `.backward()` accumulates: into `old` in place unless it is sparse."""
    if old is None:
        return new
    if old.layout is not torch.strided and new.layout is torch.strided:
        return new + old
    return old.add_(new)


def task_backward(
    loss: Tensor, cotangent: Tensor, name: str, parameters: Sequence[Tensor], retain_graph: bool
) -> list[Tensor | None]:
    """One task's gradients on all `parameters` (None where it does not reach one), whose `.grad` must be None.

    `.backward()` rather than `autograd.grad`: heads need no list, reentrant activation checkpoints work, and
    parameters outside the optimizer accumulate as usual.
    """
    start = cotangent.to(loss.device, loss.dtype).reshape(loss.shape)
    try:
        torch.autograd.backward(loss, start, retain_graph=retain_graph)
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise RuntimeError(
                f"the graph of task {name!r} is gone: step() and backward() need losses that no backward pass has "
                "used yet; drop any loss.backward() before them and compute the losses anew for every step"
            ) from error
        raise
    return take_gradients(parameters)


def all_finite(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whether every element of every gradient is finite, a boolean scalar on `device`; one read, no host sync.

    A sum is not finite exactly where an element is not, or where the sum overflows, which no norm survives.
    """
    sums = []
    for gradient in gradients:
        values = gradient if gradient.layout is torch.strided else gradient.coalesce().values()
        total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
        sums.append(total.abs().to(device, torch.float32))
    return torch.stack(sums).isfinite().all() if sums else torch.ones((), dtype=torch.bool, device=device)


def where_ok(ok: Tensor, gradient: Tensor) -> Tensor:
    """The gradient where the boolean scalar `ok` is true, else zeros. Not a product: 0 * NaN is NaN."""
    dense = gradient if gradient.layout is torch.strided else gradient.to_dense()
    return torch.where(ok.to(dense.device), dense, torch.zeros((), dtype=dense.dtype, device=dense.device))
