"""Which parameters are shared, remembered by identity and, where a framework replaces objects, by position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True)
class Layout:
    """The parameters of one call.

    Attributes:
        parameters: all of the wrapped optimizer.
        shared: the shared ones among them that train, or have trained.
        averaged: those of `shared` that have averages: all of them, or those of `norm_params`.
        heads: all others, and last `outside`.
        outside: leaves of the graph that are not in the optimizer.
        wanted: all that a pass may fill, each once: first the averaged ones, last the heads.
    """

    parameters: list[Tensor]
    shared: list[Tensor]
    averaged: list[Tensor]
    heads: list[Tensor]
    outside: list[Tensor]
    wanted: list[Tensor]

    @classmethod
    def of(cls, parameters: list[Tensor], shared: list[Tensor], averaged: list[Tensor], heads: list[Tensor]) -> Layout:
        """With `wanted` put together."""
        return cls(parameters, shared, averaged, heads, [], [*dict.fromkeys([*averaged, *shared]), *heads])

    def with_outside(self, leaves: list[Tensor]) -> Layout:
        """The same with leaves of the graph that are not in the optimizer."""
        return replace(self, heads=[*self.heads, *leaves], outside=leaves, wanted=[*self.wanted, *leaves])


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

    def __init__(
        self, base_optim: Optimizer, shared: Sequence[tuple[str, Tensor]], measured: set[Tensor] | None
    ) -> None:
        self.known = parameters_of(base_optim)
        self.replaced: dict[Tensor, Tensor] = {}
        places = {parameter: position for position, parameter in enumerate(self.known)}
        self.joint = measured is not None
        self._members = [
            _Member(parameter, name, places.get(parameter), measured is None or parameter in measured)
            for name, parameter in shared
        ]
        self._layout: Layout | None = None

    def layout(self, base_optim: Optimizer) -> Layout:
        """Which parameters take part now.

        Raises:
            ValueError: a shared parameter is gone from the wrapped optimizer, or has another shape.
        """
        parameters = parameters_of(base_optim)
        same = are_same(parameters, self.known)
        if not same:
            self._follow(parameters)
        if self._refresh() or not same or self._layout is None:
            shared = [member.parameter for member in self._members if member.trained]
            inside = {member.parameter for member in self._members}
            self._layout = Layout.of(
                parameters,
                shared,
                [member.parameter for member in self._members if member.trained and member.measured],
                [parameter for parameter in parameters if parameter not in inside],
            )
        return self._layout

    def _refresh(self) -> bool:
        """Note shapes, and which parameters train for the first time; whether that changed anything."""
        changed = False
        for member in self._members:
            parameter = member.parameter
            if member.trained:
                if parameter.shape != member.shape:
                    raise ValueError(_moved(member, f"now has shape {tuple(parameter.shape)}"))
            elif parameter.requires_grad and member.position is not None and not is_lazy(parameter):
                member.trained, member.shape, changed = True, parameter.shape, True
        return changed

    def _follow(self, parameters: list[Tensor]) -> None:
        """Find every shared parameter again after the wrapped optimizer's parameters have changed."""
        places, old = {parameter: index for index, parameter in enumerate(parameters)}, set(self.known)
        found: list[tuple[Tensor, int | None]] = []
        for member in self._members:
            position = places.get(member.parameter)
            parameter = member.parameter
            if position is None and member.position is not None:
                parameter = self._replacement(member, parameters, old)
                position = member.position
            found.append((parameter, position))
        for member, (parameter, position) in zip(self._members, found, strict=True):
            if parameter is not member.parameter:
                self.replaced[member.parameter] = parameter
            member.parameter, member.position = parameter, position
        self.known = parameters

    def _replacement(self, member: _Member, parameters: list[Tensor], old: set[Tensor]) -> Tensor:
        """The object that a framework has put into a parameter's place."""
        here = parameters[member.position] if (member.position or 0) < len(parameters) else None  # type: ignore[index]
        if here is None or here in old:
            raise ValueError(_moved(member, "is no longer in base_optim"))
        if member.shape is not None and here.shape != member.shape:
            raise ValueError(_moved(member, f"was replaced by one of shape {tuple(here.shape)}"))
        return here

    def start_anew(self, base_optim: Optimizer) -> None:
        """Take the parameters as they are: replaced ones at their places, whatever their shape; drop what is gone."""
        parameters = parameters_of(base_optim)
        places, old = {parameter: index for index, parameter in enumerate(parameters)}, set(self.known)
        kept = []
        for member in self._members:
            here = member.parameter
            if here not in places and member.position is not None:
                if member.position >= len(parameters) or parameters[member.position] in old:
                    continue
                here = parameters[member.position]
            kept.append(_Member(here, member.name, places.get(here), member.measured))
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
        """How many parameters are shared."""
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


def named(parameters: Iterable[Tensor] | nn.Module, argument: str) -> list[tuple[str, Tensor]]:
    """The parameters, each once, with what a message calls them.

    Raises:
        TypeError: not an iterable of tensors.
        ValueError: there is none.
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
    for name, parameter in pairs:
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"{argument} must hold parameters, got {type(parameter).__name__} at {name}; "
                "pass trunk.parameters() or the trunk module itself"
            )
    if not pairs:
        raise ValueError(
            f"{argument} must hold at least one parameter, got none; was it an iterator that is used up, "
            "or a module without parameters?"
        )
    first: dict[Tensor, tuple[str, Tensor]] = {}
    for name, parameter in pairs:
        first.setdefault(parameter, (name, parameter))
    return list(first.values())


def shared_of(base_optim: Optimizer, shared_params: Iterable[Tensor] | nn.Module) -> list[tuple[str, Tensor]]:
    """The shared parameters, named; those that train must be in the wrapped optimizer.

    Raises:
        TypeError, ValueError: see `named`; or one that trains is not in `base_optim`.
    """
    pairs = named(shared_params, "shared_params")
    _check_inside(base_optim, pairs, "shared_params")
    return pairs


def _check_inside(base_optim: Optimizer, pairs: Sequence[tuple[str, Tensor]], argument: str) -> None:
    inside = set(parameters_of(base_optim))
    for name, parameter in pairs:
        if parameter not in inside and parameter.requires_grad:
            raise ValueError(
                f"{argument} must all be in base_optim, but {name} of shape {tuple(parameter.shape)} is not; "
                "give base_optim every trained parameter, heads included (fully_shard replaces them: build base_optim "
                "after it), or freeze it with requires_grad_(False)"
            )


def measured_of(
    base_optim: Optimizer,
    norm_params: Iterable[Tensor] | nn.Module | None,
    shared: Sequence[tuple[str, Tensor]],
    refresh_every: int,
) -> set[Tensor] | None:
    """Those on which norms are measured; None for the exact form.

    Raises:
        ValueError: one is not shared, or `refresh_every` is used without `norm_params`.
    """
    if norm_params is None:
        if refresh_every != 1:
            raise ValueError(
                f"refresh_every needs norm_params, got refresh_every={refresh_every} without; weights are reused in a "
                "joint backward only: pass norm_params=shared_params to measure norms on all shared parameters"
            )
        return None
    pairs = named(norm_params, "norm_params")
    _check_inside(base_optim, pairs, "norm_params")
    measured, inside = {parameter for _, parameter in pairs}, {parameter for _, parameter in shared}
    if not measured <= inside:
        raise ValueError(
            f"norm_params must be a subset of shared_params, got {len(measured - inside)} parameters that "
            "are not shared; every task must depend on them"
        )
    return measured
