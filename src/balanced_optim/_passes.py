"""Backward passes: one a task, its gradients taken over before the next; and what their errors mean.

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

Gradients = list[Tensor | None]
# Norms, gradients of heads and reached parameters: of this rank, and then of all.
Heard = tuple[Tensor, dict[Tensor, Tensor], set[Tensor]]
Take = Callable[..., Gradients]

# How to compile for several backward passes over one graph.
REMEDY = (
    "put these lines before the first call of the compiled model:\n"
    "    import torch._functorch.config\n"
    "    torch._functorch.config.donated_buffer = False\n"
    '    torch.compiler.config.cache_key_tag = "retained graphs"\n'
    "and, if it ran a backward pass in this process before, torch.compiler.reset() after them"
)


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


def hidden_part(names: Sequence[str]) -> str:
    """The message for a loss that runs a backward pass of its own inside of ours."""
    return (
        f"the loss of task {' and '.join(map(repr, names))} must reach parameters through its graph, but a hook in "
        "it runs a backward pass of its own, whose part would be lost with norm_params or process_group; compute "
        "the loss without it (no cached or chunked backward inside), or use the exact form in one process"
    )


@contextmanager
def remedied(names: Sequence[str]) -> Iterator[None]:
    """Say with an error of a backward pass what to do about it, where that is known."""
    try:
        yield
    except RuntimeError as error:
        if (text := remedy_for(str(error), names)) is None:
            raise
        raise RuntimeError(text) from error


def remedy_for(text: str, names: Sequence[str]) -> str | None:
    """What to do about an error of a backward pass that a user of this library meets; None for any other."""
    tasks = " and ".join(map(repr, names))
    if "backward through the graph a second time" in text:
        return (
            f"the graph of task {tasks} is gone: step() and backward() need losses that no backward pass has used "
            "yet; drop any loss.backward() before them and compute the losses anew for every step; a state carried "
            "over from an earlier batch (a recurrent network's) needs state.detach()"
        )
    if "donated buffers" in text:
        return f"a compiled region was compiled for one backward pass a graph, but balancing needs one a task; {REMEDY}"
    if "use_reentrant=True" in text:
        return (
            "norm_params and process_group need activation checkpoints with use_reentrant=False: a reentrant one "
            "cannot say which gradients are wanted; change the checkpoint call, or leave that argument out"
        )
    return None


@contextmanager
def explained(name: str, first: bool) -> Iterator[None]:
    """Say what an error may mean in a pass after the `first`, where something is no longer there."""
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        if first:
            raise
        raise RuntimeError(
            f"the backward pass of task {name!r} failed with {type(error).__name__}: {error}, after that of another "
            "task went well; balancing makes one backward pass a task over one graph, so hooks on saved tensors "
            "(activation offloading) must give a tensor back as often as they are asked, not once"
        ) from error
