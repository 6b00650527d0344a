"""Which parameters are shared, remembered by identity and, where a framework replaces objects, by position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import is_

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer


def parameters_of(base_optim: Optimizer) -> list[Tensor]:
    """All parameters of the wrapped optimizer, in order."""
    return [parameter for group in base_optim.param_groups for parameter in group["params"]]


def is_lazy(parameter: Tensor) -> bool:
    """Whether a lazy module has yet to give the parameter its shape."""
    return isinstance(parameter, UninitializedParameter | UninitializedBuffer)


@dataclass(frozen=True)
class Layout:
    """The parameters of one call.

    Attributes:
        parameters: all of the wrapped optimizer.
        shared: the shared ones among them that train, or have trained.
        averaged: those of `shared` that have averages: all of them, or those of `norm_params`.
        heads: all others, and last `outside`.
        outside: leaves of the graph that are not in the optimizer.
    """

    parameters: list[Tensor]
    shared: list[Tensor]
    averaged: list[Tensor]
    heads: list[Tensor]
    outside: list[Tensor] = field(default_factory=list)

    @cached_property
    def wanted(self) -> list[Tensor]:
        """All that a pass may fill, each once: first the averaged ones, last the heads."""
        return [*dict.fromkeys([*self.averaged, *self.shared]), *self.heads]

    def with_outside(self, leaves: list[Tensor]) -> Layout:
        """The same with leaves of the graph that are not in the optimizer."""
        return replace(self, heads=[*self.heads, *leaves], outside=leaves)


@dataclass(slots=True)
class _Member:
    """One shared parameter: the tensor, what a message calls it, its place in the wrapped optimizer, its shape."""

    parameter: Tensor
    name: str
    position: int | None
    measured: bool
    shape: torch.Size | None = None
    trained: bool = False


class Members:
    """The shared parameters.

    A frozen one is kept, whether the wrapped optimizer holds it or not; it has no averages until it trains.

    Attributes:
        known: all parameters of the wrapped optimizer when they were last looked at.
        replaced: by old object the one that a framework has put into its place.
    """

    def __init__(self, base_optim: Optimizer, shared: Mapping[Tensor, str], measured: set[Tensor] | None) -> None:
        self.known = parameters_of(base_optim)
        self.replaced: dict[Tensor, Tensor] = {}
        self.joint = measured is not None
        places = {parameter: position for position, parameter in enumerate(self.known)}
        self._members = [
            _Member(parameter, name, places.get(parameter), measured is None or parameter in measured)
            for parameter, name in shared.items()
        ]
        self._layout: Layout | None = None

    def layout(self, base_optim: Optimizer) -> Layout:
        """Which parameters take part now.

        Raises:
            ValueError: a shared parameter is gone from the wrapped optimizer, or has another shape.
        """
        parameters = parameters_of(base_optim)
        if not are_same(parameters, self.known):
            self._follow(parameters)
        self._refresh()
        if self._layout is None:
            inside = {member.parameter for member in self._members}
            self._layout = Layout(
                parameters,
                [member.parameter for member in self._members if member.trained],
                [member.parameter for member in self._members if member.trained and member.measured],
                [parameter for parameter in parameters if parameter not in inside],
            )
        return self._layout

    def _refresh(self) -> None:
        """Note shapes, and which parameters train for the first time."""
        for member in self._members:
            parameter = member.parameter
            if member.trained:
                if parameter.shape != member.shape:
                    raise ValueError(_moved(member, f"now has shape {tuple(parameter.shape)}"))
            elif parameter.requires_grad and member.position is not None and not is_lazy(parameter):
                member.trained, member.shape, self._layout = True, parameter.shape, None

    def _found(self, parameters: list[Tensor]) -> Iterator[tuple[_Member, Tensor | None]]:
        """Each member and its parameter now: itself, what a framework put into its place, or None where it is gone."""
        here, old = set(parameters), set(self.known)
        for member in self._members:
            if member.position is None or member.parameter in here:
                yield member, member.parameter
            else:
                new = parameters[member.position] if member.position < len(parameters) else None
                yield member, None if new in old else new

    def _follow(self, parameters: list[Tensor]) -> None:
        """Find every shared parameter again after the wrapped optimizer's parameters have changed."""
        places = {parameter: position for position, parameter in enumerate(parameters)}
        members, replaced = [], {}
        for member, parameter in self._found(parameters):
            if parameter is None:
                raise ValueError(_moved(member, "is no longer in base_optim"))
            if parameter is not member.parameter:
                if member.shape not in (None, parameter.shape):
                    raise ValueError(_moved(member, f"was replaced by one of shape {tuple(parameter.shape)}"))
                replaced[member.parameter] = parameter
            members.append(replace(member, parameter=parameter, position=places.get(parameter)))
        self.replaced |= replaced
        self.known, self._members, self._layout = parameters, members, None

    def start_anew(self, base_optim: Optimizer) -> None:
        """Take the parameters as they are: replaced ones at their places, whatever their shape; drop what is gone."""
        parameters = parameters_of(base_optim)
        places = {parameter: position for position, parameter in enumerate(parameters)}
        kept = [
            _Member(parameter, member.name, places.get(parameter), member.measured)
            for member, parameter in self._found(parameters)
            if parameter is not None
        ]
        if not kept:
            raise ValueError("shared_params must hold at least one parameter, but base_optim has none of them any more")
        self.known, self._members, self._layout = parameters, kept, None

    def keep(self, positions: Iterable[int]) -> None:
        """Treat the parameters at these positions as if they had trained: a checkpoint has averages of them."""
        wanted = set(positions)
        for member in self._members:
            if member.position in wanted and not member.trained:
                member.trained, member.shape = True, member.parameter.shape
                self._layout = None

    def positions(self, *, measured: bool = False) -> list[int]:
        """Places in the wrapped optimizer of the shared parameters that are there, or of those measured in training."""
        return [
            member.position
            for member in self._members
            if member.position is not None and (not measured or member.measured)
        ]

    def check_rows(self, ema_dtype: torch.dtype | None) -> None:
        """Raise ValueError where `ema_dtype` cannot hold the averages."""
        averaged = [member.parameter for member in self._members if member.measured]
        if ema_dtype in (torch.bfloat16, torch.float16) and any(parameter.is_complex() for parameter in averaged):
            raise ValueError(
                "ema_dtype must be torch.float32 or torch.float64 where shared parameters are complex, got "
                f"{ema_dtype}; there are no complex numbers of half precision to save"
            )

    @property
    def all_frozen(self) -> bool:
        """Whether no shared parameter can be reached."""
        return not any(member.parameter.requires_grad for member in self._members)

    def __len__(self) -> int:
        return len(self._members)


def are_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether these are the same objects, in the same order."""
    return len(some) == len(others) and all(map(is_, some, others))


def _moved(member: _Member, what: str) -> str:
    shape = "" if member.shape is None else f" of shape {tuple(member.shape)}"
    return (
        f"shared parameter {member.name}{shape} {what}: its averaged gradients no longer fit; call "
        "optimizer.reset_averages() after parameters were resized, replaced or taken out, or build the optimizer anew"
    )


def shared_of(base_optim: Optimizer, shared_params: Iterable[Tensor] | nn.Module) -> dict[Tensor, str]:
    """The shared parameters, with what a message calls them.

    Raises:
        TypeError, ValueError: see `_named`.
    """
    return _named(base_optim, shared_params, "shared_params")


def measured_of(
    base_optim: Optimizer,
    norm_params: Iterable[Tensor] | nn.Module | None,
    shared: Mapping[Tensor, str],
    refresh_every: int,
) -> set[Tensor] | None:
    """Those on which norms are measured; None for the exact form.

    Raises:
        TypeError, ValueError: see `_named`; or one is not shared, or `refresh_every` is used without `norm_params`.
    """
    if norm_params is None:
        if refresh_every != 1:
            raise ValueError(
                f"refresh_every needs norm_params, got refresh_every={refresh_every} without; weights are reused in a "
                "joint backward only: pass norm_params=shared_params to measure norms on all shared parameters"
            )
        return None
    measured = set(_named(base_optim, norm_params, "norm_params"))
    if others := measured - shared.keys():
        raise ValueError(
            f"norm_params must be a subset of shared_params, got {len(others)} parameters that "
            "are not shared; every task must depend on them"
        )
    return measured


def _named(base_optim: Optimizer, parameters: Iterable[Tensor] | nn.Module, argument: str) -> dict[Tensor, str]:
    """Each parameter once, with what a message calls it.

    Raises:
        TypeError: not an iterable of tensors.
        ValueError: there is none, or one that trains is not in the wrapped optimizer.
    """
    if isinstance(parameters, nn.Module):
        pairs: list[tuple[str, Tensor]] = [(repr(name), p) for name, p in parameters.named_parameters()]
    elif isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"{argument} must be an iterable of parameters or a Module, got {type(parameters).__name__}; "
            "put a single parameter into a list"
        )
    else:
        pairs = [(f"entry {index}", parameter) for index, parameter in enumerate(parameters)]
    names: dict[Tensor, str] = {}
    for name, parameter in pairs:
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"{argument} must hold parameters, got {type(parameter).__name__} at {name}; "
                "pass trunk.parameters() or the trunk module itself"
            )
        names.setdefault(parameter, name)
    if not names:
        raise ValueError(
            f"{argument} must hold at least one parameter, got none; was it an iterator that is used up, "
            "or a module without parameters?"
        )
    inside = set(parameters_of(base_optim))
    for parameter, name in names.items():
        if parameter not in inside and parameter.requires_grad:
            raise ValueError(
                f"{argument} must all be in base_optim, but {name} of shape {tuple(parameter.shape)} is not; "
                "give base_optim every trained parameter, heads included (fully_shard replaces them: build base_optim "
                "after it), or freeze it with requires_grad_(False)"
            )
    return names
