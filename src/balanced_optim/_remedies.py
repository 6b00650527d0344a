"""What errors of a backward pass mean here, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# How to compile for several backward passes over one graph.
REMEDY = (
    "put these lines before the first call of the compiled model:\n"
    "    import torch._functorch.config\n"
    "    torch._functorch.config.donated_buffer = False\n"
    '    torch.compiler.config.cache_key_tag = "retained graphs"\n'
    "and, if it ran a backward pass in this process before, torch.compiler.reset() after them"
)


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
