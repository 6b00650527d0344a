"""One backward pass a task, its gradients taken over from `.grad` before the next pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ._numbers import USES_ALONE, Scalar, real, storage_uses, vector_norm

# How to compile for several backward passes over one graph.
REMEDY = (
    "put these two lines before the first call of the compiled model:\n"
    "    torch._functorch.config.donated_buffer = False\n"
    '    torch.compiler.config.cache_key_tag = "retained graphs"\n'
    "and, if it ran a backward pass in this process before, torch.compiler.reset() after them"
)


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


def graph(losses: Sequence[Tensor]) -> list[Node]:
    """Every node of the graph behind the losses, in no particular order."""
    nodes = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    seen = set(nodes)
    for node in nodes:
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return nodes


def leaves(losses: Sequence[Tensor]) -> list[Tensor]:
    """Every leaf tensor that a backward pass from `losses` would give a gradient to, in no particular order."""
    return [leaf for node in graph(losses) if (leaf := leaf_of(node)) is not None]


def leaf_of(node: Node) -> Tensor | None:
    """The leaf that the node accumulates a gradient into; None for any other node, whatever its attributes."""
    leaf: Tensor | None = node.variable if node.name() == _ACCUMULATES else None  # type: ignore[attr-defined]
    return leaf


_ACCUMULATES = "torch::autograd::AccumulateGrad"


def starts_of(losses: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """The cotangents in the losses' own dtypes, shapes and places."""
    return [_start(loss, cotangent) for loss, cotangent in zip(losses, cotangents, strict=True)]


def _start(loss: Tensor, cotangent: Tensor) -> Tensor:
    if cotangent.dtype == loss.dtype and cotangent.device == loss.device and loss.dim() == 0:
        return cotangent
    return cotangent.to(loss.device, loss.dtype).reshape(loss.shape)


def take_pass(
    losses: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    names: Sequence[str],
    parameters: Sequence[Tensor],
    *,
    retain_graph: bool,
    inputs: Sequence[Tensor] | None = None,
) -> list[Tensor | None]:
    """One backward pass of ``sum_t cotangent_t * loss_t``: gradients on `parameters`, None where it reaches none.

    `.backward()` rather than `autograd.grad`: heads need no list, reentrant activation checkpoints work, and
    parameters outside the optimizer accumulate as usual. Each gradient owns its memory, and may be overwritten.

    Args:
        losses: raw losses, one for the exact form, several for a joint pass.
        cotangents: one scalar each.
        names: their tasks, for messages.
        parameters: whose `.grad`, None before the call, is taken over.
        retain_graph: keep the graph for another pass.
        inputs: stop at these: on a trunk's last layer the pass never enters the layers before.
    """
    found = raw_pass(losses, cotangents, names, parameters, retain_graph=retain_graph, inputs=inputs)
    return apart(found)


def raw_pass(
    losses: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    names: Sequence[str],
    parameters: Sequence[Tensor],
    *,
    retain_graph: bool,
    inputs: Sequence[Tensor] | None = None,
) -> list[Tensor | None]:
    """The same, with the gradients as the backward pass left them in `.grad`."""
    with explained(names):
        torch.autograd.backward(losses, starts_of(losses, cotangents), retain_graph=retain_graph, inputs=inputs)
    return take_gradients(parameters)


def take_grad(
    losses: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    names: Sequence[str],
    parameters: Sequence[Tensor],
    *,
    retain_graph: bool,
    inputs: Sequence[Tensor] | None = None,
) -> list[Tensor | None]:
    """The same by `torch.autograd.grad`: only `parameters` get gradients, and no hook on a `.grad` runs."""
    wanted = parameters if inputs is None else inputs
    kept = [parameter for parameter in wanted if parameter.requires_grad]
    with explained(names):
        gradients = torch.autograd.grad(
            losses, kept, starts_of(losses, cotangents), retain_graph=retain_graph, allow_unused=True
        )
    found = {id(parameter): gradient for parameter, gradient in zip(kept, gradients, strict=True)}
    result = [found.get(id(parameter)) for parameter in parameters]
    del gradients, found
    return apart(result)


@contextmanager
def explained(names: Sequence[str]) -> Iterator[None]:
    """Say what to do about the errors of a backward pass that a user of this library meets."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise RuntimeError(
                f"the graph of task {' and '.join(map(repr, names))} is gone: step() and backward() need losses that "
                "no backward pass has used yet; drop any loss.backward() before them and compute the losses anew for "
                "every step"
            ) from error
        if "donated buffers" in str(error):
            raise RuntimeError(
                "a compiled region was compiled for one backward pass a graph, but balancing needs one a task; "
                f"{REMEDY}"
            ) from error
        if "use_reentrant=True" in str(error):
            raise RuntimeError(
                "norm_params and process_group need activation checkpoints with use_reentrant=False: a reentrant one "
                "cannot say which gradients are wanted; change the checkpoint call, or leave that argument out"
            ) from error
        raise


@contextmanager
def at_once(parameters: Sequence[Tensor], use: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While this is open, each parameter's gradient goes to `use(index, gradient)` as soon as a pass has made it."""

    def hook(index: int, parameter: Tensor) -> None:
        if parameter.grad is not None:
            use(index, owned(parameter.grad))
            parameter.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(partial(hook, index))  # type: ignore[no-untyped-call]
        for index, parameter in enumerate(parameters)
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def apart(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients, each in memory of its own; `autograd.grad` gives both terms of ``a + b`` one tensor."""
    seen: set[int] = set()
    result: list[Tensor | None] = []
    for gradient in gradients:
        if gradient is None:
            result.append(None)
        else:
            result.append(gradient.clone() if id(gradient) in seen else owned(gradient))
            seen.add(id(gradient))
    return result


def owned(gradient: Tensor) -> Tensor:
    """The gradient, copied where something else uses its memory.

    The `.grad` of two parameters may be views of one tensor, as with ``a.unsqueeze(0) + b.unsqueeze(0)``, or of a
    cotangent, or of what a hook keeps. A backward pass alone never writes to it; here it is made into an average.
    """
    if gradient.layout is not torch.strided:
        return gradient
    return gradient.clone() if storage_uses(gradient) > USES_ALONE else gradient


def unscaled(gradient: Tensor, scale: Scalar | None) -> Tensor:
    """The gradient divided by `scale` in float32 or wider, in place where it is that already; None: as it is."""
    if scale is None:
        return gradient
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    inverse = scale.to(wide.device).reciprocal() if isinstance(scale, Tensor) else 1 / scale
    return wide.mul_(inverse)


def joint_size(gradients: Sequence[Tensor], device: torch.device) -> float | Tensor:
    """The sum of the gradients' norms: finite exactly where every element is, and no square overflows.

    One read. A number where `device` is a CPU, else a scalar on it that the host has not waited for.
    """
    values = [g if g.layout is torch.strided else g.coalesce().values() for g in gradients]
    if device.type == "cpu":
        return float(sum(float(vector_norm(real(value).reshape(-1))) for value in values))
    norms = [
        norm
        for dtype in {value.dtype for value in values}
        for norm in torch._foreach_norm(
            [value for value in values if value.dtype == dtype], dtype=torch.promote_types(dtype, torch.float32)
        )
    ]
    if not norms:
        return 0.0
    wide = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    return torch.stack([norm.to(device, wide) for norm in norms]).sum()


def where_ok(ok: Tensor, gradient: Tensor) -> Tensor:
    """The gradient where the boolean scalar `ok` is true, else zeros. Not a product: 0 * NaN is NaN."""
    dense = gradient if gradient.layout is torch.strided else gradient.to_dense()
    return torch.where(ok.to(dense.device), dense, torch.zeros((), dtype=dense.dtype, device=dense.device))
