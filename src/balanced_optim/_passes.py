"""Backward passes: one a task, its gradients taken over before the next.

A source makes `Pass`es one at a time; stages between it and the store change or hold them. Nobody writes to a gradient
that a pass has brought: it may be another parameter's too, or belong to a hook.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._numbers import Flag
from ._remedies import hidden_part, remedied

Gradients = list[Tensor | None]
# Norms, gradients of heads and reached parameters: of this rank, and then of all.
Heard = tuple[Tensor, dict[Tensor, Tensor], set[Tensor]]
Take = Callable[..., Gradients]


@dataclass(frozen=True, slots=True)
class Pass:
    """One task's gradients, or those of a joint pass; read-only.

    Attributes:
        task: its number; -1 for a joint pass.
        shared: on the averaged parameters (all shared ones in a joint pass), None where it reaches none.
        rest: on all others that it reaches, by parameter.
        ok: what is known of it beside its values: flags of other ranks, a test under a scaler.
    """

    task: int
    shared: Sequence[Tensor | None]
    rest: Mapping[Tensor, Tensor] = field(default_factory=dict)
    ok: Flag = True


Passes = Generator[Pass, None, None]


@contextmanager
def set_aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Take every `.grad` that is there, and give it back at the end, whatever happens."""
    before = pop_gradients(parameters)
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def pop_gradients(parameters: Iterable[Tensor]) -> Gradients:
    """Every parameter's `.grad`, which is None afterwards."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = None
    return gradients


def starts_of(losses: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """The cotangents in the losses' own dtypes, shapes and places."""
    return [_start(loss, cotangent) for loss, cotangent in zip(losses, cotangents, strict=True)]


def _start(loss: Tensor, cotangent: Tensor) -> Tensor:
    if cotangent.dtype == loss.dtype and cotangent.device == loss.device and loss.dim() == 0:
        return cotangent
    return cotangent.to(loss.device, loss.dtype).reshape(loss.shape)


def take_backward(
    losses: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    names: Sequence[str],
    parameters: Sequence[Tensor],
    *,
    retain_graph: bool,
    inputs: Sequence[Tensor] | None = None,
) -> Gradients:
    """One backward pass of ``sum_t cotangent_t * loss_t``: gradients on `parameters`, None where it reaches none.

    `.backward()` rather than `autograd.grad`: heads need no list, reentrant activation checkpoints work, hooks that
    wait for `.grad` run, and parameters outside the optimizer accumulate as usual.

    Args:
        losses: raw losses, one for the exact form, several for a joint pass.
        cotangents: one scalar each.
        names: their tasks, for messages.
        parameters: whose `.grad`, None before the call, is taken over.
        retain_graph: keep the graph for another pass.
        inputs: stop at these: on a trunk's last layer the pass never enters the layers before.
    """
    with remedied(names):
        torch.autograd.backward(losses, starts_of(losses, cotangents), retain_graph=retain_graph, inputs=inputs)
    found = pop_gradients(parameters)
    asked = None if inputs is None else {*map(id, inputs)}
    if asked and any(g is not None and id(p) not in asked for p, g in zip(parameters, found, strict=True)):
        raise RuntimeError(hidden_part(names))
    return found


def take_grad(
    losses: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    names: Sequence[str],
    parameters: Sequence[Tensor],
    *,
    retain_graph: bool,
    inputs: Sequence[Tensor] | None = None,
) -> Gradients:
    """The same by `torch.autograd.grad`: only `parameters` get gradients, and no hook on a `.grad` runs."""
    wanted = parameters if inputs is None else inputs
    kept = [parameter for parameter in wanted if parameter.requires_grad]
    with remedied(names):
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            losses, kept, starts_of(losses, cotangents), retain_graph=retain_graph, allow_unused=True
        )
    if any(gradient is not None for gradient in pop_gradients(parameters)):
        raise RuntimeError(hidden_part(names))
    found = dict(zip(kept, gradients, strict=True))
    return [found.get(parameter) for parameter in parameters]
