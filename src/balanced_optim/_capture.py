"""Batches whose work is recorded in a CUDA graph, to be done in every replay: what such a batch cannot have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ._members import Layout, are_same

if TYPE_CHECKING:
    from ._batch import Parts

# Whether the current stream records a CUDA graph; an error to ask where there is no driver. Tests set it.
CAPTURING: Callable[[], bool] = lambda: (  # noqa: E731
    torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
)


def is_capturing() -> bool:
    """Whether what is called now is recorded in a CUDA graph."""
    return CAPTURING()


def check_capture(parts: Parts, layout: Layout, scaler: Any, *, micro_batch: bool = False) -> None:
    """Raise RuntimeError where a batch in a graph asks for what a replay cannot do: the host has no part in it."""
    if not is_capturing():
        return
    settings, known = parts.settings, parts.state.averages
    micro_batch = micro_batch or parts.pending.micro_batches is not None
    scaled = isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled()
    needs = (
        (
            settings.nonfinite != "ignore",
            "nonfinite='ignore': the host reads nothing there, so it cannot refuse a batch",
        ),
        (scaled, "no scaler, whose scale the host reads and changes; use bfloat16"),
        (micro_batch, "whole batches, got micro-batches from accumulate(); use the graph without them"),
        (parts.processes.group is not None, "one process: with a process_group ranks meet on the host in every step"),
        (settings.aggregator is not None, "no aggregator: the host would have to read which tasks count"),
        (settings.refresh_every > 1, "refresh_every=1: replays are all alike, so none would measure norms anew"),
        (
            known is None or not are_same(known.rows, layout.averaged),
            "a batch outside of it before, of the same parameters, which makes their averages; see README",
        ),
    )
    for refused, text in needs:
        if refused:
            raise RuntimeError(f"a batch in a CUDA graph needs {text}")


def check_replayed() -> None:
    """Raise RuntimeError where a backward function would have to be tried out first."""
    if is_capturing():
        raise RuntimeError(
            "a batch in a CUDA graph needs a batch outside the graph before that has the same operations: one of them, "
            "compiled or a torch.autograd.Function, has yet to show that its backward may run once a task"
        )
