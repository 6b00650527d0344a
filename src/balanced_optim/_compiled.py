"""Backward passes through torch.compile: a retained graph must give the same gradient twice, or nothing is done.

A compiled backward may overwrite ("donate") the tensors that its forward saved. torch refuses to run it on a
retained graph where it knows of that; where donation was switched off too late, or the kernel came from a cache
that was filled with donation on, it runs and every pass after the first is wrong without a word.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from weakref import WeakSet

from torch import Tensor

from ._task_gradients import REMEDY, graph, joint_size, leaf_of, put_gradients, take_gradients

TakePass = Callable[..., list[Tensor | None]]

# Classes of backward nodes, one for each compiled graph, whose second pass gave the gradient of the first.
_verified: WeakSet[type] = WeakSet()
# Gradients of two passes agree to this relative precision of each parameter's norm; a wrong one is far off.
_TOLERANCE = 1e-2


def check_replay(
    take: TakePass,
    losses: Sequence[Tensor],
    starts: Sequence[Tensor],
    names: Sequence[str],
    parameters: Sequence[Tensor],
) -> None:
    """Raise unless compiled regions that are new in this graph survive a second backward pass.

    Two extra passes of one loss, once for each compiled graph; nothing at all where nothing was compiled.

    Args:
        take: how a pass is made, as `take_pass`.
        losses: the losses of this batch, whose graphs have not been used yet.
        starts: a cotangent for each.
        names: their tasks, for messages.
        parameters: all parameters whose gradients count.

    Raises:
        RuntimeError: the second pass differs. No `.grad` was changed.
    """
    if not _anything_compiled():
        return
    for loss, start, name in zip(losses, starts, names, strict=True):
        nodes = graph([loss])
        new = {type(node) for node in nodes if type(node).__name__ == "CompiledFunctionBackward"} - set(_verified)
        if not new or not start.isfinite():
            continue
        outside = [leaf for node in nodes if (leaf := leaf_of(node)) is not None]
        everything = list({id(tensor): tensor for tensor in [*parameters, *outside]}.values())
        before = take_gradients(everything)
        try:
            first, second = (_norms(take([loss], [start], [name], everything, retain_graph=True)) for _ in range(2))
        finally:
            put_gradients(everything, before)
        pairs = [(a, b) for a, b in zip(first, second, strict=True) if math.isfinite(a)]
        if not all(math.isclose(a, b, rel_tol=_TOLERANCE) for a, b in pairs):
            raise RuntimeError(
                "a compiled region gives another gradient when its graph is used a second time, as one pass a task "
                f"needs: its backward overwrites what the forward saved; nothing was changed; {REMEDY}"
            )
        _verified.update(new)


def _anything_compiled() -> bool:
    """Whether torch.compile made a graph in this process."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils is not None and utils.counters["stats"]["unique_graphs"] > 0


def _norms(gradients: Sequence[Tensor | None]) -> list[float]:
    """The norm of every gradient, 0 where there is none."""
    return [0.0 if gradient is None else float(joint_size([gradient], gradient.device)) for gradient in gradients]
