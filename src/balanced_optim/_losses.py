"""What the caller hands in, made uniform: names, raw values, which tasks are there, cotangents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._members import parameters_of
from ._state import Pending

Losses = Sequence[Tensor | None] | Mapping[str, Tensor | None] | Tensor
Samples = float | Sequence[float] | Mapping[str, float] | Tensor


@dataclass(frozen=True, slots=True)
class TaskLosses:
    """The losses of one batch, in the order of the tasks.

    Attributes:
        names: T task names.
        named: True where the names came with the losses (a mapping).
        losses: T losses with their graphs, None for an absent task.
    """

    names: tuple[str, ...]
    named: bool
    losses: tuple[Tensor | None, ...]

    @property
    def present(self) -> list[int]:
        """Indices of the tasks that this batch has."""
        return [index for index, loss in enumerate(self.losses) if loss is not None]

    def loss(self, task: int) -> Tensor:
        """The loss of a task that is present."""
        loss = self.losses[task]
        if loss is None:
            raise ValueError(f"task {self.names[task]!r} is absent from this batch")
        return loss

    def values(self, device: torch.device) -> Tensor:
        """Raw losses on `device`, shape (T,), float32 or wider, NaN for absent tasks; detached."""
        dtype = torch.float32
        for loss in self.losses:
            dtype = dtype if loss is None else torch.promote_types(dtype, loss.dtype)
        missing = torch.full((), math.nan, dtype=dtype, device=device)
        return torch.stack(
            [missing if loss is None else loss.detach().reshape(()).to(device, dtype) for loss in self.losses]
        )


def run_closure(
    closure: Callable[[], Any], losses: Losses | None, pending: Pending, base_optim: Optimizer
) -> Losses | None:
    """What the closure returned, or `losses` where a trainer passes a closure that only wraps them."""
    if not callable(closure):
        raise TypeError(
            f"closure must be a function that returns the task losses, got {type(closure).__name__}; "
            "pass losses themselves as step(losses); through a trainer's wrapper, such as Lightning Fabric's, as "
            "step(losses=...), or call backward(losses) and then step()"
        )
    with torch.enable_grad():
        returned: Losses | None = closure()
    if returned is None:
        filled = any(parameter.grad is not None for parameter in parameters_of(base_optim))
        if losses is None and not (filled or pending.skip_next_step or pending.micro_batches is not None):
            raise TypeError(
                "closure must return the task losses, got None and no .grad is set; end it with `return losses`, "
                "without .backward()"
            )
        return losses
    if losses is not None:
        raise TypeError("step() takes losses or a closure, got both; leave one out")
    return returned


def read_losses(losses: Losses, names: tuple[str, ...] | None, named: bool) -> TaskLosses:
    """Check the form of `losses` and put them into the order of the tasks.

    Args:
        losses: a sequence (None = absent), a mapping name -> loss (missing or None = absent), or a 1-D tensor.
        names: the task names fixed so far, or None before the first call.
        named: whether these names came from a mapping.

    Raises:
        TypeError: `losses` or an entry is of the wrong kind, or names are missing where tasks have names.
        ValueError: the number or names of tasks changed, or a loss is not a scalar that needs a gradient.
    """
    if isinstance(losses, Mapping):
        return _from_mapping(losses, names, named)
    if isinstance(losses, Tensor):
        if losses.dim() != 1:
            raise TypeError(
                f"losses must be one loss a task, got a single tensor of shape {tuple(losses.shape)}; "
                "pass a list, a mapping or a 1-D tensor of the task losses, not their sum"
            )
        # The caller may have switched gradients off; the single losses still need theirs.
        with torch.enable_grad():
            entries: tuple[Tensor | None, ...] = losses.unbind()
    elif isinstance(losses, Sequence) and not isinstance(losses, str):
        entries = tuple(losses)
    else:
        raise TypeError(
            f"losses must be a sequence, a mapping or a 1-D tensor of task losses, got {type(losses).__name__}; "
            "pass [loss_a, loss_b] or {'a': loss_a, 'b': loss_b}; a closure goes to step()"
        )
    return _from_sequence(entries, names, named)


def _from_sequence(entries: tuple[Tensor | None, ...], names: tuple[str, ...] | None, named: bool) -> TaskLosses:
    if not entries:
        raise ValueError("losses must hold at least one task, got none; pass None for each absent task")
    if named and names is not None:
        raise TypeError(
            f"losses must be a mapping, since the tasks have names {list(names)}, got {len(entries)} losses "
            "without names; pass {name: loss}"
        )
    if names is not None and len(entries) != len(names):
        raise ValueError(
            f"losses must have {len(names)} entries, one a task as in the first call, got {len(entries)}; "
            "pass None for a task that this batch lacks"
        )
    names = names or tuple(str(index) for index in range(len(entries)))
    for name, loss in zip(names, entries, strict=True):
        _check_loss(name, loss)
    return TaskLosses(names, False, entries)


def _from_mapping(losses: Mapping[str, Tensor | None], names: tuple[str, ...] | None, named: bool) -> TaskLosses:
    if names is not None and not named:
        raise TypeError(
            f"losses must be a sequence of {len(names)}, as in the first call, got a mapping with "
            f"{list(losses.keys())}; keep to one form"
        )
    # By its keys alone: a mapping may have a length, a truth value and an iteration of its own, as tensordict's has.
    given = {name: losses[name] for name in losses.keys()}  # noqa: SIM118
    if names is None:
        if not given:
            raise ValueError(
                "losses must hold at least one task, got an empty mapping; name all tasks in the first call "
                "(None for an absent one) or in task_weights"
            )
        for name in given:
            if not isinstance(name, str):
                raise TypeError(f"losses must have task names of type str, got {name!r}")
        names = tuple(given)
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(
            f"losses names the unknown task {unknown[0]!r}; the tasks are {list(names)}, fixed by the first call "
            "or by task_weights: name them all there (None for one that the first batch lacks)"
        )
    for name, loss in given.items():
        _check_loss(name, loss)
    return TaskLosses(names, True, tuple(given.get(name) for name in names))


def _check_loss(name: str, loss: Tensor | None) -> None:
    if loss is None:
        return
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"loss of task {name!r} must be a tensor or None, got {type(loss).__name__} {loss!r}; "
            "pass the tensor that the loss function returned, without .item()"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"loss of task {name!r} must be a scalar, got shape {tuple(loss.shape)}; reduce it with .mean()"
        )
    if not loss.dtype.is_floating_point:
        raise ValueError(
            f"loss of task {name!r} must be of a real floating dtype, got {loss.dtype}; convert with .float() before "
            "the mean"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"loss of task {name!r} must need a gradient, got one without a graph (value {loss.item()}); "
            "was it detached, or computed under torch.no_grad()? Pass None for a task that this batch lacks"
        )


def read_samples(samples: Samples, batch: TaskLosses, *, may_be_zero: bool = False) -> list[float]:
    """The number of samples behind every task's loss, T of them, in the order of the tasks.

    Raises:
        ValueError: one is missing, or not a number > 0 (or >= 0 where it `may_be_zero`) where the task has a loss.
    """
    names = batch.names
    if isinstance(samples, Tensor):
        samples = samples.tolist()
    if isinstance(samples, Mapping):
        given: dict[str, object] = {name: samples.get(name, 1) for name in names}
        unknown = [name for name in samples.keys() if name not in names]  # noqa: SIM118
        if unknown:
            raise ValueError(f"samples names the unknown task {unknown[0]!r}; the tasks are {list(names)}")
    elif isinstance(samples, Sequence) and not isinstance(samples, str):
        if len(samples) != len(names):
            raise ValueError(f"samples must have {len(names)} entries, one a task, got {len(samples)}")
        given = dict(zip(names, samples, strict=True))
    else:
        given = dict.fromkeys(names, samples)
    return [
        0.0 if loss is None else _number_of_samples(name, given[name], may_be_zero)
        for name, loss in zip(names, batch.losses, strict=True)
    ]


def _number_of_samples(name: str, count: object, may_be_zero: bool) -> float:
    if isinstance(count, Tensor) and count.numel() == 1:
        count = count.item()
    if may_be_zero and count == 0:
        return 0.0
    if not isinstance(count, Real) or isinstance(count, bool) or not 0 < float(count) < math.inf:
        raise ValueError(
            f"samples of task {name!r} must be a number > 0, got {count!r}; pass None as the loss of a task that this "
            "batch lacks"
        )
    return float(count)


def describe_bad_loss(name: str, value: float, eps: float, log_transform: bool, rank: int | None = None) -> str:
    """The message for a loss that cannot be used, on `rank` where there are several."""
    if log_transform and math.isfinite(value):
        rule = f"greater than -eps = {-eps} under the log transform"
        remedy = (
            "shift the loss, or pass log_transform=False (or a mapping {task: False}) for losses that can be negative"
        )
    else:
        rule = "finite"
        remedy = "look for the operation that made it, or pass nonfinite='skip' to leave such batches out"
    where = "" if rank is None else f" on rank {rank}"
    return f"loss of task {name!r} must be {rule}, got {value}{where}; nothing was changed; {remedy}"
