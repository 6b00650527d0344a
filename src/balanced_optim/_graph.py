"""Looking at the graph behind the losses: its leaves, and whether it may be walked more than once.

A compiled backward may overwrite ("donate") the tensors that its forward saved, and so may that of a custom
`torch.autograd.Function` (fused cross entropies and norms do). Balancing walks a graph once a task: every pass after
the first would be wrong without a word. So each such class is run several times from one loss when it is first seen.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Sequence
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from ._numbers import squares_of, total_of
from ._passes import Gradients, Take, set_aside
from ._remedies import REMEDY

# Classes of backward nodes whose second pass gave the gradient of the first.
_verified: WeakSet[type] = WeakSet()
# Gradients of two passes differ by no more than this part of their norm, for each parameter; a wrong one is far off.
_TOLERANCE = 2e-2
# A class with this attribute set is not checked: its backward has noise of its own.
NOISY = "backward_has_noise"
_COMPILED = "CompiledFunctionBackward"


def nodes_of(losses: Sequence[Tensor]) -> list[Node]:
    """Every node of the graph behind the losses, in no particular order."""
    nodes = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    seen = set(nodes)
    for node in nodes:
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return nodes


def reach_of(losses: Sequence[Tensor | None]) -> dict[Tensor, int | None]:
    """Every leaf that a backward pass from `losses` gives a gradient to: the task that alone reaches it, or None.

    None for a leaf of several tasks. A node is looked at twice at most.
    """
    owners: dict[Node, int | None] = {}
    ends: list[Node] = []
    found: dict[Tensor, int | None] = {}
    for task, loss in enumerate(losses):
        if loss is None:
            continue
        if loss.grad_fn is None:
            found[loss] = None if loss in found else task
            continue
        to_visit = [_start_of(loss)]
        while to_visit:
            node = to_visit.pop()
            owner = owners.get(node, -1)
            if owner is None or owner == task:
                continue
            owners[node] = task if owner == -1 else None
            edges = node.next_functions
            for following, _ in edges:
                if following is not None:
                    to_visit.append(following)
            if owner == -1 and not edges:
                ends.append(node)
    for node in ends:
        if (leaf := leaf_of(node)) is not None:
            found[leaf] = None if leaf in found else owners[node]
    return found


def _start_of(loss: Tensor) -> Node:
    """Where the graph of this loss alone begins: losses that were stacked into one tensor have a way of their own."""
    node = loss.grad_fn
    below = node.next_functions[0][0] if node is not None and node.name() == "UnbindBackward0" else None
    # One tensor that was stacked alone may have been unbound the other way.
    if below is not None and below.name() == "StackBackward0" and len(below.next_functions) > 1:
        own = below.next_functions[loss.output_nr][0]
        node = node if own is None else own
    return node  # type: ignore[return-value]


def is_hooked(leaf: Tensor) -> bool:
    """Whether a hook looks at the leaf's gradient."""
    return bool(leaf._backward_hooks or leaf._post_accumulate_grad_hooks)


def leaf_of(node: Node) -> Tensor | None:
    """The leaf that the node accumulates a gradient into; None for any other node, whatever its attributes."""
    leaf: Tensor | None = node.variable if node.name() == _ACCUMULATES else None  # type: ignore[attr-defined]
    return leaf


_ACCUMULATES = "torch::autograd::AccumulateGrad"


def outside_of(leaves: Iterable[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of a graph that are not among `parameters`."""
    known = {*map(id, parameters)}
    return [leaf for leaf in leaves if id(leaf) not in known]


def unverified(losses: Sequence[Tensor | None]) -> list[set[type]]:
    """For each loss the classes in its graph, and in none before, that have yet to prove that they can be walked twice.

    Walks no graph where nothing was compiled and no custom Function is left to be checked.
    """
    if not _anything_compiled() and not _anything_foreign():
        return [set() for _ in losses]
    found, before = [_to_check(loss) for loss in losses], set[type]()
    for new in found:
        new -= before
        before |= new
    return found


class _Seen:
    """The classes that others derive Functions from, how many derive from them, and whether one is to be checked."""

    bases: list[type] = [torch.autograd.Function]
    number = -1
    foreign = False


def _anything_foreign() -> bool:
    if _number_of_classes() != _Seen.number:
        found: list[type] = [torch.autograd.Function]
        for kind in found:
            found.extend(kind.__subclasses__())
        # Nobody derives from what is torch's own.
        _Seen.bases = [found[0], *(kind for kind in found[1:] if not kind.__module__.startswith("torch."))]
        _Seen.number, _Seen.foreign = _number_of_classes(), any(map(_is_foreign, found[1:]))
    return _Seen.foreign


def _number_of_classes() -> int:
    return sum(map(len, map(type.__subclasses__, _Seen.bases))) + len(_verified)


def _to_check(loss: Tensor | None) -> set[type]:
    kinds = {type(node) for node in nodes_of([] if loss is None else [loss])}
    return {_kept(kind) for kind in kinds if kind not in _verified and _may_overwrite(kind)}


def _kept(kind: type) -> type:
    """The class by which a class of nodes is remembered."""
    made_of = _origin(getattr(kind, "_forward_cls", kind))
    return getattr(made_of, "_backward_cls", kind)


def _may_overwrite(kind: type) -> bool:
    if kind.__name__ == _COMPILED:
        return True
    return issubclass(kind, BackwardCFunction) and _is_foreign(getattr(kind, "_forward_cls", kind))


def _is_foreign(function: type) -> bool:
    """Whether a Function is to be checked: not one of torch's own, which may communicate and keep what they saved."""
    function = _origin(function)
    own = function.__module__.startswith("torch.") and function.__module__ not in (_VMAP, _CUSTOM_OP)
    own = own or (function.__module__ == _CUSTOM_OP and not _is_written_by_others(function))
    return not own and not getattr(function, NOISY, False) and getattr(function, "_backward_cls", None) not in _verified


def _is_written_by_others(function: type) -> bool:
    """Whether the class that torch made of a custom operator calls a backward that is not torch's own, or none."""
    info = inspect.getclosurevars(function.backward).nonlocals.get("info")  # type: ignore[attr-defined]
    written = getattr(info, "_backward_fn", None)
    return written is not None and not written.__module__.startswith("torch.")


def _origin(function: type) -> type:
    """The Function that torch.vmap made this class of, anew in every call; any other class itself."""
    while function.__module__ == _VMAP:
        made_of = inspect.getclosurevars(function.forward).nonlocals.get("autograd_function")  # type: ignore[attr-defined]
        if made_of is None:
            break
        function = made_of
    return function


# Modules of torch that make classes out of what others wrote.
_VMAP, _CUSTOM_OP = "torch._functorch.autograd_function", "torch._library.autograd"


def _anything_compiled() -> bool:
    """Whether torch.compile made a graph in this process."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils is not None and utils.counters["stats"]["unique_graphs"] > 0


def check_replay(
    take: Take,
    losses: Sequence[Tensor | None],
    starts: Sequence[Tensor],
    names: Sequence[str],
    parameters: Sequence[Tensor],
    marked: Sequence[bool],
) -> None:
    """Raise unless the classes that are new in these graphs survive a second backward pass.

    Four extra passes of one loss for each class, the first time it is seen. They start from three, two, three and three
    times the cotangent, and the last two must give the gradients of the first. A backward that scales what it saved in
    place shows only where the cotangent differs from 1, and after all of them it has been scaled by something else than
    1 whatever it was at first.

    Args:
        take: how a pass is made, as `take_backward`.
        losses: the losses of this batch, whose graphs have not been used yet.
        starts: a cotangent for each.
        names: their tasks, for messages.
        parameters: all parameters whose gradients count.
        marked: for each task whether some rank has to check it; all ranks replay together.

    Raises:
        RuntimeError: the second pass differs. No `.grad` was changed.
    """
    for loss, start, name, replay in zip(losses, starts, names, marked, strict=True):
        if loss is None or not replay:
            continue
        new = _to_check(loss)
        everything = list(dict.fromkeys([*parameters, *reach_of([loss])]))

        def gradients(factor: int, loss: Tensor = loss, start: Tensor = start, name: str = name) -> Gradients:
            return take([loss], [factor * start], [name], everything, retain_graph=True)  # noqa: B023

        with set_aside(everything):
            # Copies: autograd.grad may give out what the next pass writes to.
            first = [None if gradient is None else gradient.clone() for gradient in gradients(3)]
            try:
                same = [_agree(first, gradients(factor)) for factor in (2, 3, 3)][1:]
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                # It gave away what it saved.
                raise RuntimeError(_overwrites(new)) from error
        # Gradients that are not finite say nothing; the batch is refused elsewhere, and the next one is looked at.
        if _are_finite(first):
            if not all(same):
                raise RuntimeError(_overwrites(new))
            _verified.update(new)


def _are_finite(gradients: Gradients) -> bool:
    return all(_square(gradient) < float("inf") for gradient in gradients if gradient is not None)


def _agree(first: Gradients, second: Gradients) -> bool:
    return all(map(_are_close, first, second))


def _are_close(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return _square(second - first) <= _TOLERANCE**2 * _square(first)


def _square(gradient: Tensor) -> float:
    return float(total_of(squares_of([gradient]), gradient.device))


def _overwrites(kinds: set[type]) -> str:
    functions = sorted(getattr(kind, "_forward_cls", kind).__qualname__ for kind in kinds if kind.__name__ != _COMPILED)
    if not functions:
        return (
            "a compiled region gives another gradient when its graph is used a second time, as one pass a task "
            f"needs: its backward overwrites what the forward saved; nothing was changed; {REMEDY}"
        )
    return (
        f"the backward of {' or '.join(functions)} gives another gradient when its graph is used a second time, as one "
        "pass a task needs: it overwrites or gives away what its forward saved; nothing was changed; use another "
        "implementation of it (most fused kernels have a switch for that, or compute in the eager form), or, if its "
        f"backward has noise of its own, set {functions[0]}.{NOISY} = True"
    )
