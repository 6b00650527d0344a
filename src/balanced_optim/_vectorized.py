"""All tasks in one vectorized pass through what they share, after a short pass of each through what is its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ._task_gradients import apart, explained, starts_of


@dataclass(slots=True)
class _Own:
    """What one task has for itself.

    Attributes:
        leaves: those that no other task reaches.
        edges: by which it enters what is shared, in order.
        below: the ids of the shared leaves that it reaches.
    """

    leaves: list[Tensor] = field(default_factory=list)
    edges: dict[GradientEdge, None] = field(default_factory=dict)
    below: set[int] = field(default_factory=set)


def vectorized_passes(
    losses: Sequence[Tensor], cotangents: Sequence[Tensor], names: Sequence[str], parameters: Sequence[Tensor]
) -> list[list[Tensor | None]]:
    """What `take_grad` gives for one loss after the other, but the shared part runs once under `torch.vmap`.

    A network of many small layers spends its time on starting kernels, T times as many in T passes; here each works
    on all tasks at once. The graph is kept: it goes with the losses. Memory: T gradients over the shared parameters,
    and T cotangents of what the shared part puts out.

    Args:
        losses: two or more.
        cotangents: one scalar each.
        names: their tasks, for messages.
        parameters: whose gradients are wanted.

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
        edges = list(parts[task].edges)
        if not leaves and not edges:
            continue
        with explained([names[task]]):
            inputs: Any = [*leaves, *edges]
            gradients = torch.autograd.grad([loss], inputs, [start], retain_graph=True, allow_unused=True)
        for leaf, gradient in zip(leaves, apart(gradients[: len(leaves)]), strict=True):
            found[task][places[id(leaf)]] = gradient
        for edge, gradient in zip(edges, gradients[len(leaves) :], strict=True):
            if gradient is not None:
                if gradient.layout is not torch.strided:
                    raise RuntimeError("a sparse gradient has no vectorized form")
                rows = entering.setdefault(edge, gradient.new_zeros(len(losses), *gradient.shape))
                rows[task] = gradient
    wanted = [leaf for leaf in common if id(leaf) in places]
    if wanted and entering:
        outputs = list(entering)

        def shared_pass(*rows: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, wanted, rows, retain_graph=True, materialize_grads=True)

        stacked = torch.vmap(shared_pass, randomness="same")(*entering.values())
        for leaf, rows in zip(wanted, stacked, strict=True):
            for task, gradient in enumerate(rows.unbind()):
                if id(leaf) in parts[task].below:
                    found[task][places[id(leaf)]] = gradient
    return found


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
            for following, number in node.next_functions:
                if following is not None and following in common:
                    parts[task].edges[GradientEdge(following, number)] = None
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
    variable = getattr(node, "variable", None)
    return [] if variable is None else [variable]
