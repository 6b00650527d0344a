"""All tasks in one vectorized pass through what they share, after a short pass of each through what is its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ._task_gradients import explained, joint_size, leaf_of, starts_of, take_grad

# Gradients of two ways agree to this relative precision of each parameter's norm; a wrong one is far off.
_TOLERANCE = 1e-2
_NEGLIGIBLE = 1e-3


@dataclass(slots=True)
class _Own:
    """What one task has for itself.

    Attributes:
        leaves: those that no other task reaches.
        edges: by which it enters what is shared, in order.
        border: its nodes from which these edges lead.
        below: the ids of the shared leaves that it reaches.
    """

    leaves: list[Tensor] = field(default_factory=list)
    edges: dict[GradientEdge, None] = field(default_factory=dict)
    border: list[Node] = field(default_factory=list)
    below: set[int] = field(default_factory=set)


def vectorized_passes(
    losses: Sequence[Tensor], cotangents: Sequence[Tensor], names: Sequence[str], parameters: Sequence[Tensor]
) -> list[list[Tensor | None]] | None:
    """What `take_grad` gives for one loss after the other, but the shared part runs once under `torch.vmap`.

    A network of many small layers spends its time on starting kernels, T times as many in T passes; here each works
    on all tasks at once. The graph is kept: it goes with the losses. Memory: T gradients over the shared parameters,
    and T cotangents of what the shared part puts out.

    Args:
        losses: two or more.
        cotangents: one scalar each.
        names: their tasks, for messages.
        parameters: whose gradients are wanted.

    Returns:
        A list a loss of a gradient, or None, a parameter. None where something is not finite, which is not known to be
        any task's fault: a task gets zeros through branches that it does not use, and 0 * inf spoils it. The host waits
        for the device to know.

    Raises:
        RuntimeError: some gradient has no vectorized form; or tasks enter the shared part at several depths, where what
            enters below would count twice; or the graph is gone.
    """
    parts, common = _split(losses)
    places = {id(parameter): place for place, parameter in enumerate(parameters) if parameter.requires_grad}
    found: list[list[Tensor | None]] = [[None] * len(parameters) for _ in losses]
    entering: dict[GradientEdge, Tensor] = {}
    for task, (loss, start) in enumerate(zip(losses, starts_of(losses, cotangents), strict=True)):
        leaves = [leaf for leaf in parts[task].leaves if id(leaf) in places]
        with explained([names[task]]):
            gradients, flows = _own_pass(loss, start, leaves, parts[task])
        for leaf, gradient in zip(leaves, gradients, strict=True):
            # A hook may keep the very tensor, and both terms of a sum have the same one.
            found[task][places[id(leaf)]] = None if gradient is None else gradient.clone()
        for edge, flow in flows.items():
            if flow.layout is not torch.strided:
                raise RuntimeError("a sparse gradient has no vectorized form")
            if edge not in entering:
                entering[edge] = flow.new_zeros(len(losses), *flow.shape)
            entering[edge][task] = flow
    stacks = list(_shared_pass(entering, [leaf for leaf in common if id(leaf) in places]))
    own = [gradient for gradients in found for gradient in gradients if gradient is not None]
    if not _finite([*own, *[rows for _, rows in stacks]]):
        return None
    for leaf, rows in stacks:
        for task, gradient in enumerate(rows.unbind()):
            if id(leaf) in parts[task].below:
                found[task][places[id(leaf)]] = gradient
    return found


def check_vectorized(
    loss: Tensor, cotangent: Tensor, name: str, parameters: Sequence[Tensor], found: Sequence[Tensor | None]
) -> None:
    """Raise RuntimeError unless a task's gradients are those of a pass of its own: torch.vmap has its mistakes."""
    own = take_grad([loss], [cotangent], [name], parameters, retain_graph=True)
    # A gradient that is zero up to rounding has no relative error of its own.
    least = _NEGLIGIBLE * float(joint_size([gradient for gradient in own if gradient is not None], loss.device))
    for mine, theirs in zip(found, own, strict=True):
        if (mine is None) != (theirs is None):
            raise RuntimeError("it gives a gradient where a single pass gives none, or the other way round")
        if mine is not None and theirs is not None:
            size = max(float(joint_size([theirs], theirs.device)), least)
            if float(joint_size([mine - theirs], mine.device)) > _TOLERANCE * size:
                raise RuntimeError("its gradients differ from those of a single pass: some operation's vmap is wrong")


def _own_pass(
    loss: Tensor, start: Tensor, leaves: Sequence[Tensor], part: _Own
) -> tuple[Sequence[Tensor | None], dict[GradientEdge, Tensor]]:
    """The gradients of a task's own leaves, and what flows along each of its edges into what is shared.

    Flows are read behind the nodes of the border: at the edges hooks on what the tasks share have run already, which
    run again in the shared pass.
    """
    flows: dict[GradientEdge, Tensor] = {}
    root = get_gradient_edge(loss)
    if root in part.edges:
        flows[root] = start

    def read(node: Node, inputs: Sequence[Tensor | None], _: Any) -> None:
        for (following, number), gradient in zip(node.next_functions, inputs, strict=True):
            edge = None if following is None else GradientEdge(following, number)
            if edge in part.edges and gradient is not None:
                flows[edge] = flows[edge] + gradient if edge in flows else gradient

    inputs: Any = [*leaves, *[edge for edge in part.edges if edge != root]]
    if not inputs:
        return [None] * len(leaves), flows
    with _read_behind(part.border, read):
        gradients = torch.autograd.grad([loss], inputs, [start], retain_graph=True, allow_unused=True)
    return gradients[: len(leaves)], flows


def _finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all elements are finite; one wait for each dtype and device."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return all(bool(torch.stack(torch._foreach_norm(group)).sum().isfinite()) for group in alike.values())


@contextmanager
def _read_behind(nodes: Iterable[Node], read: Any) -> Iterator[None]:
    """While this is open, `read(node, grad_inputs, grad_outputs)` is called behind each of the nodes."""
    handles = [node.register_hook(partial(read, node)) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shared_pass(entering: dict[GradientEdge, Tensor], wanted: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The leaves that the shared part reaches from its edges, each with T gradients, shape (T, ...)."""
    if not entering or not wanted:
        return
    reached: list[Tensor] = []

    def run(*rows: Tensor) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(list(entering), wanted, rows, retain_graph=True, allow_unused=True)
        reached[:] = [leaf for leaf, gradient in zip(wanted, gradients, strict=True) if gradient is not None]
        return tuple(gradient for gradient in gradients if gradient is not None)

    stacked = torch.vmap(run, randomness="same")(*entering.values())
    for leaf, rows in zip(reached, stacked, strict=True):
        # Rows that are all alike come as one, expanded.
        overlap = any(stride == 0 and size > 1 for stride, size in zip(rows.stride(), rows.shape, strict=True))
        yield leaf, rows.contiguous() if overlap else rows


def _split(losses: Sequence[Tensor]) -> tuple[list[_Own], list[Tensor]]:
    """Each loss's own part of the graph, and the leaves of the part that several losses reach."""
    roots = [get_gradient_edge(loss) for loss in losses]
    owners: dict[Node, int] = {}
    entries: dict[Node, None] = {}
    for task, root in enumerate(roots):
        waiting = [root.node]
        while waiting:
            node = waiting.pop()
            if node not in owners:
                owners[node] = task
                waiting += _following(node)
            elif owners[node] != task:
                entries[node] = None
    common = _with_all_after(entries)
    parts = [_Own() for _ in losses]
    for task, root in enumerate(roots):
        if root.node in common:
            parts[task].edges[root] = None
    for node, task in owners.items():
        if node not in common:
            parts[task].leaves += _leaf(node)
            edges = [GradientEdge(n, number) for n, number in node.next_functions if n is not None and n in common]
            if edges:
                parts[task].edges |= dict.fromkeys(edges)
                parts[task].border.append(node)
    nested = any(node in entries for before in common for node in _following(before))
    if nested or any(edge.node not in entries for part in parts for edge in part.edges):
        raise RuntimeError("tasks enter what they share at several depths, one behind the other")
    below: dict[frozenset[Node], set[int]] = {}
    for part in parts:
        ways = frozenset(edge.node for edge in part.edges)
        if ways not in below:
            below[ways] = {id(leaf) for node in _with_all_after(ways) for leaf in _leaf(node)}
        part.below = below[ways]
    return parts, [leaf for node in common for leaf in _leaf(node)]


def _with_all_after(nodes: Iterable[Node]) -> dict[Node, None]:
    """These nodes and all that a backward pass from them comes to."""
    found = dict.fromkeys(nodes)
    waiting = list(found)
    while waiting:
        for node in _following(waiting.pop()):
            if node not in found:
                found[node] = None
                waiting.append(node)
    return found


def _following(node: Node) -> list[Node]:
    return [following for following, _ in node.next_functions if following is not None]


def _leaf(node: Node) -> list[Tensor]:
    leaf = leaf_of(node)
    return [] if leaf is None else [leaf]
