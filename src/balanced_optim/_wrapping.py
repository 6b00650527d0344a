"""What a wrapper of an optimizer needs that has nothing to do with the method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch


def of_base(name: str) -> property:
    """A live property onto an attribute of the wrapped optimizer, which replaces it when it loads its state."""

    def get(self: Any) -> Any:
        return getattr(self.base_optim, name)

    def put(self: Any, value: Any) -> None:
        setattr(self.base_optim, name, value)

    return property(get, put, doc=f"`{name}` of the wrapped optimizer.")


Method = TypeVar("Method", bound=Callable[..., Any])


def untraced(method: Method) -> Method:
    """Left out of what torch.compile traces, as torch's own optimizers are.

    The public torch.compiler.disable would import the compiler together with this module, which takes seconds.
    """
    disable = getattr(torch, "_disable_dynamo", None)
    return method if disable is None else disable(method)


def run_hooks(hooks: Mapping[int, Callable[..., Any]], optimizer: Any, *state: Any) -> Any:
    """Call an optimizer's hooks of one kind; a state dict may be replaced by what a hook returns."""
    for hook in hooks.values():
        returned = hook(optimizer, *state)
        state = (returned or state[0],) if state else ()
    return state[0] if state else None
