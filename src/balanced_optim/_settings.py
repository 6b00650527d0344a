"""The constructor's arguments, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._balance import NORM_TARGETS

_NONFINITE = ("raise", "skip", "ignore")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the constructor was given, in the letters of the method."""

    eps: float
    log_transform: bool
    norm_target: str | None
    max_weight: float | None
    ema_dtype: torch.dtype | None
    nonfinite: str
    refresh_every: int = 1
    fade_solved: bool = False
    vectorize: bool = False

    def __post_init__(self) -> None:
        _require(_is_number(self.eps) and self.eps > 0, "eps", "a number > 0", self.eps)
        _require(isinstance(self.log_transform, bool), "log_transform", "True or False", self.log_transform)
        _require(self.norm_target in NORM_TARGETS, "norm_target", f"one of {NORM_TARGETS}", self.norm_target)
        _require(
            self.max_weight is None or (_is_number(self.max_weight) and self.max_weight > 0),
            "max_weight",
            "None or a number > 0 (1 keeps the log only, 10 is a mild cap)",
            self.max_weight,
        )
        _require(
            self.ema_dtype in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16),
            "ema_dtype",
            "None, torch.float64, torch.float32, torch.bfloat16 or torch.float16",
            self.ema_dtype,
        )
        _require(self.nonfinite in _NONFINITE, "nonfinite", f"one of {_NONFINITE}", self.nonfinite)
        whole = isinstance(self.refresh_every, int) and not isinstance(self.refresh_every, bool)
        _require(whole and self.refresh_every >= 1, "refresh_every", "a whole number >= 1", self.refresh_every)
        _require(isinstance(self.fade_solved, bool), "fade_solved", "True or False", self.fade_solved)
        _require(isinstance(self.vectorize, bool), "vectorize", "True or False", self.vectorize)
        if self.fade_solved and (self.norm_target is None or not self.log_transform):
            raise ValueError(
                f"fade_solved needs a norm_target and log_transform=True, got norm_target={self.norm_target!r}, "
                f"log_transform={self.log_transform}: without a rescale nothing blows a solved task up, and without "
                "the log eps does not say which are solved; leave it out"
            )


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_schedule(beta: float, beta_decay: float) -> None:
    """Raise ValueError unless 0 <= beta < 1 and beta_decay >= 0."""
    _require(_is_number(beta) and 0 <= beta < 1, "beta", "a number in [0, 1)", beta)
    _require(_is_number(beta_decay) and beta_decay >= 0, "beta_decay", "a number >= 0", beta_decay)


def check_base_optimizer(base_optim: object) -> None:
    """Raise unless `base_optim` is a torch optimizer that steps without a closure."""
    if not isinstance(base_optim, Optimizer):
        raise TypeError(
            f"base_optim must be a torch.optim.Optimizer, got {type(base_optim).__name__}; "
            "build it first, e.g. torch.optim.Adam(model.parameters())"
        )
    if isinstance(base_optim, torch.optim.LBFGS):
        raise TypeError(
            "base_optim must step without a closure, got LBFGS, which evaluates the losses several times a step; "
            "use a first-order optimizer"
        )
    if isinstance(base_optim, torch.optim.SparseAdam):
        raise TypeError(
            "base_optim must accept dense gradients, got SparseAdam: averaged gradients are dense; "
            "use Adam for the shared parameters"
        )


def shared_positions(
    base_optim: Optimizer, shared_params: Iterable[Tensor] | nn.Module, argument: str = "shared_params"
) -> list[int]:
    """Positions of these parameters among all parameters of `base_optim`, in the order given.

    Positions, not tensors: wrappers such as FSDP2 put other parameter objects into the same places.

    Raises:
        TypeError: an entry is not a tensor.
        ValueError: there is none, or one is not in `base_optim`.
    """
    place = {id(p): i for i, p in enumerate(p for group in base_optim.param_groups for p in group["params"])}
    positions: dict[int, None] = {}
    for name, parameter in _named(shared_params, argument):
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"{argument} must hold parameters, got {type(parameter).__name__} at {name}; "
                "pass trunk.parameters() or the trunk module itself"
            )
        if id(parameter) not in place:
            raise ValueError(
                f"{argument} must all be in base_optim, but {name} of shape {tuple(parameter.shape)} is not; "
                "give base_optim every trained parameter, heads included (fully_shard replaces them: build base_optim "
                "after it)"
            )
        positions[place[id(parameter)]] = None
    if not positions:
        raise ValueError(
            f"{argument} must hold at least one parameter, got none; was it an iterator that is used up, "
            "or a module without parameters?"
        )
    return list(positions)


def norm_positions(
    base_optim: Optimizer, norm_params: Iterable[Tensor] | nn.Module | None, shared: list[int], settings: Settings
) -> list[int] | None:
    """Positions of `norm_params`, a subset of the shared ones; None for the exact form.

    Raises:
        ValueError: one is not shared, `refresh_every` is used without `norm_params`, or `vectorize` with them.
    """
    if norm_params is None:
        if settings.refresh_every != 1:
            raise ValueError(
                f"refresh_every needs norm_params, got refresh_every={settings.refresh_every} without; weights are "
                "reused in a joint backward only: pass norm_params=shared_params to measure norms on all shared "
                "parameters"
            )
        return None
    if settings.vectorize:
        raise ValueError(
            "vectorize cannot be used with norm_params, got vectorize=True: the one-backward form has one pass through "
            "the trunk as it is; leave one of them out"
        )
    positions = shared_positions(base_optim, norm_params, "norm_params")
    if not set(positions) <= set(shared):
        raise ValueError(
            f"norm_params must be a subset of shared_params, got {len(set(positions) - set(shared))} parameters that "
            "are not shared; every task must depend on them"
        )
    return positions


def check_rows(base_optim: Optimizer, averaged: list[int], ema_dtype: torch.dtype | None) -> None:
    """Raise ValueError where `ema_dtype` cannot hold the averages."""
    parameters = [p for group in base_optim.param_groups for p in group["params"]]
    if ema_dtype in (torch.bfloat16, torch.float16) and any(parameters[position].is_complex() for position in averaged):
        raise ValueError(
            f"ema_dtype must be torch.float32 or torch.float64 where shared parameters are complex, got {ema_dtype}; "
            "there are no complex numbers of half precision to save"
        )


def _named(shared_params: Iterable[Tensor] | nn.Module, argument: str) -> list[tuple[str, Tensor]]:
    if isinstance(shared_params, nn.Module):
        return [(f"parameter {name!r} of the module", p) for name, p in shared_params.named_parameters()]
    if isinstance(shared_params, Tensor) or not isinstance(shared_params, Iterable):
        raise TypeError(
            f"{argument} must be an iterable of parameters or a Module, got {type(shared_params).__name__}; "
            "put a single parameter into a list"
        )
    return [(f"entry {index}", parameter) for index, parameter in enumerate(shared_params)]


def read_task_weights(
    task_weights: Sequence[float] | Mapping[str, float] | None,
) -> tuple[tuple[str, ...] | None, tuple[float, ...] | None]:
    """Task names (from a mapping only) and priorities, both None where nothing was given."""
    if task_weights is None:
        return None, None
    named = isinstance(task_weights, Mapping)
    if not named and (isinstance(task_weights, str) or not isinstance(task_weights, Sequence)):
        raise TypeError(
            f"task_weights must be a sequence or a mapping by task name, got {type(task_weights).__name__}; "
            "pass [1.0, 2.0] or {'a': 1.0, 'b': 2.0} (.tolist() of a tensor)"
        )
    items = list(task_weights.items()) if isinstance(task_weights, Mapping) else list(enumerate(task_weights))
    if not items:
        raise ValueError("task_weights must hold one weight a task, got none; leave it out for equal priorities")
    for name, weight in items:
        if named and not isinstance(name, str):
            raise TypeError(f"task_weights must have task names of type str, got {name!r}")
        _require(_is_number(weight) and weight >= 0, f"task_weights[{name!r}]", "a finite number >= 0", weight)
    names = tuple(str(name) for name, _ in items) if named else None
    return names, tuple(float(weight) for _, weight in items)
