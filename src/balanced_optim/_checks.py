"""The constructor's arguments, checked: what is wrong, what was given, what to do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

import torch
from torch.optim import Optimizer

from ._rule import NORM_TARGETS, Rule

_NONFINITE = ("raise", "skip", "ignore")
_GONE = {
    "vectorize": "passes are made one by one; on a GPU capture the step in a CUDA graph, which is faster",
    "shard_averages": "use FSDP2 (fully_shard), ema_dtype=torch.bfloat16, beta=0 or norm_params to save memory",
}


def refuse_removed(arguments: Mapping[str, object]) -> None:
    """Raise TypeError for an argument of version 0.1, or one that never was."""
    for name in arguments:
        if name in _GONE:
            raise TypeError(f"{name} was removed in version 0.2: {_GONE[name]}")
        raise TypeError(f"DualBalancedOptimizer got an unexpected argument {name!r}")


def require(holds: bool, name: str, rule: str, value: object) -> None:
    """Raise ValueError unless it holds."""
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: object) -> bool:
    return is_number(value) and value > 0


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_rule(rule: Rule, aggregated: bool) -> None:
    """Raise ValueError where a field of the rule is out of range, or two contradict each other."""
    require(_is_positive(rule.eps), "eps", "a number > 0", rule.eps)
    logs = rule.log_transform
    entries = list(logs.values()) if isinstance(logs, Mapping) else [logs] if isinstance(logs, bool) else logs
    by_task = isinstance(entries, list | tuple) and all(isinstance(entry, bool) for entry in entries)
    require(by_task, "log_transform", "True or False, or a sequence or mapping of those by task", logs)
    target, power, cap = rule.norm_target, rule.norm_power, rule.max_weight
    named = target is None or (isinstance(target, str) and target in NORM_TARGETS)
    targets = f"one of {(*NORM_TARGETS, None)} or a number > 0"
    require(named or _is_positive(target), "norm_target", targets, target)
    require(is_number(power) and 0 <= power <= 1, "norm_power", "a number in [0, 1]", power)
    require(_is_whole(rule.warmup_steps, 0), "warmup_steps", "a whole number >= 0", rule.warmup_steps)
    caps = "None or a number > 0 (1 keeps the log only, 10 is a mild cap)"
    require(cap is None or _is_positive(cap), "max_weight", caps, cap)
    require(isinstance(rule.fade_solved, bool), "fade_solved", "True or False", rule.fade_solved)
    # A task that a mapping does not name has its log taken.
    _check_together(rule, aggregated, isinstance(logs, Mapping) or any(entries))


def _check_together(rule: Rule, aggregated: bool, any_log: bool) -> None:
    if rule.fade_solved and (rule.norm_target is None or not any_log):
        raise ValueError(
            f"fade_solved needs a norm_target and log_transform=True, got norm_target={rule.norm_target!r}, "
            f"log_transform={rule.log_transform}: without a rescale nothing blows a solved task up, and without "
            "the log eps does not say which are solved; leave it out"
        )
    for name, value, default in (("norm_power", rule.norm_power, 1.0), ("warmup_steps", rule.warmup_steps, 0)):
        if value != default and (rule.norm_target is None or aggregated):
            other = "an aggregator" if aggregated else "norm_target=None"
            raise ValueError(
                f"{name} cannot be used with {other}, got {name}={value!r}: nothing is rescaled; leave it out"
            )


def check_settings(nonfinite: object, refresh_every: object, ema_dtype: object) -> None:
    """Raise ValueError where one is out of range."""
    dtypes = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)
    text = "None, torch.float64, torch.float32, torch.bfloat16 or torch.float16"
    require(ema_dtype in dtypes, "ema_dtype", text, ema_dtype)
    require(nonfinite in _NONFINITE, "nonfinite", f"one of {_NONFINITE}", nonfinite)
    require(_is_whole(refresh_every, 1), "refresh_every", "a whole number >= 1", refresh_every)


def check_schedule(beta: float, beta_decay: float) -> None:
    """Raise ValueError unless 0 <= beta < 1 and beta_decay >= 0."""
    require(is_number(beta) and 0 <= beta < 1, "beta", "a number in [0, 1)", beta)
    require(is_number(beta_decay) and beta_decay >= 0, "beta_decay", "a number >= 0", beta_decay)


def check_base_optimizer(base_optim: object) -> None:
    """Raise TypeError unless `base_optim` is a torch optimizer that steps without a closure on dense gradients."""
    if not isinstance(base_optim, Optimizer):
        raise TypeError(
            f"base_optim must be a torch.optim.Optimizer, got {type(base_optim).__name__}; "
            "build it first, e.g. torch.optim.Adam(model.parameters())"
        )
    name = type(base_optim).__name__
    if isinstance(base_optim, torch.optim.LBFGS) or _needs_closure(base_optim.step):
        raise TypeError(
            f"base_optim must step without a closure, got {name}, which evaluates the losses several times a step; "
            "use a first-order optimizer"
        )
    if isinstance(base_optim, torch.optim.SparseAdam):
        raise TypeError(
            "base_optim must accept dense gradients, got SparseAdam: averaged gradients are dense; "
            "use Adam for the shared parameters"
        )


def _needs_closure(step: Callable[..., object]) -> bool:
    """Whether the signature has an argument without a default."""
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return False
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(p.default is inspect.Parameter.empty and p.kind in named for p in parameters)


def read_task_weights(
    task_weights: Sequence[float] | Mapping[str, float] | None,
) -> tuple[tuple[str, ...] | None, list[float] | None]:
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
        require(is_number(weight) and weight >= 0, f"task_weights[{name!r}]", "a finite number >= 0", weight)
    names = tuple(str(name) for name, _ in items) if named else None
    return names, [float(weight) for _, weight in items]


def needs_more(text: str, base_optim: Optimizer) -> str | None:
    """Why a base optimizer's step failed, where it needs what a balanced step cannot give; None for any other error."""
    name = type(base_optim).__name__
    if "closure" in text or text == "'NoneType' object is not callable":
        return f"base_optim must step without a closure, but {name} needs one ({text}); use a first-order optimizer"
    if any(word in text for word in ("create_graph", "does not require grad", "grad_fn", "hessian", "Hessian")):
        return (
            f"base_optim must step on plain gradients, but {name} differentiates them again ({text}); balanced "
            "gradients have no graph; use a first-order optimizer"
        )
    return None


Logs = bool | Sequence[bool] | Mapping[str, bool]


def kept(log_transform: Logs) -> Logs:
    """A copy of what was given by task, for the caller may change his."""
    if isinstance(log_transform, Mapping):
        return dict(log_transform)
    if isinstance(log_transform, Sequence) and not isinstance(log_transform, str):
        return tuple(log_transform)
    return log_transform
