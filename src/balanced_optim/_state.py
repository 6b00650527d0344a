"""What changes from step to step, and its form in a state dict: beside the base optimizer's own entries."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._cuda_store import DeviceRows, DeviceSum
from ._numbers import widest
from ._rule import Balance
from ._store import FlatGradientBuffer, RunningSum

VERSION = 3
KEY = "balanced_optim"
_BASE = "base_optim"
_EMA = "task_ema_"
_ROLE = "task_role"
# What `task_role` says of a parameter. Text, on purpose: torch.distributed.checkpoint's flattened form of a state dict
# would lose the averages without a word, and it refuses text.
_HEAD, _SHARED, _REACHED, _FROZEN = "head", "shared", "reached", "frozen"

Store = FlatGradientBuffer | RunningSum | DeviceRows | DeviceSum


@dataclass(slots=True)
class Averages:
    """What is known of the tasks once a batch has been counted. The tensors are written in place.

    Attributes:
        tasks: names, in order.
        named: whether losses come as a mapping.
        store: the rows, or the running sum of beta = 0.
        rows: the parameters that the store's rows are of, in order.
        counts: for each task the batches that had it, shape (T,), int64.
        batches: how many batches had a task at all, int64.
        task_weights: priorities, shape (T,).
        ages: for each task the steps since its norm was measured; 0: never.
        norms: in the one-backward form every task's latest norm, shape (T,).
    """

    tasks: tuple[str, ...]
    named: bool
    store: Store
    rows: list[Tensor]
    counts: Tensor
    batches: Tensor
    task_weights: Tensor
    ages: list[int]
    norms: Tensor


def new_averages(tasks: tuple[str, ...], named: bool, store: Store, rows: list[Tensor], weights: Any) -> Averages:
    """Before the first batch: all counts at zero."""
    device, number = store.device, len(tasks)
    return Averages(
        tasks,
        named,
        store,
        rows,
        torch.zeros(number, dtype=torch.int64, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
        torch.tensor(weights or [1.0] * number, dtype=widest(device), device=device),
        [0] * number,
        torch.zeros(number, dtype=store.norm_dtype, device=device),
    )


@dataclass(slots=True)
class State:
    """What a checkpoint holds. One object, mutated: wrappers may shadow attributes of the optimizer.

    Attributes:
        beta, beta_decay: the schedule, which a checkpoint restores.
        names: task names that `task_weights` fixes, or None.
        task_weights: priorities as last given, or None.
        averages: None before the first batch.
        reached: shared parameters that a task ever reached.
    """

    beta: float
    beta_decay: float
    names: tuple[str, ...] | None
    task_weights: list[float] | None
    averages: Averages | None = None
    reached: set[Tensor] = field(default_factory=set)

    @property
    def tasks(self) -> tuple[str, ...] | None:
        """The names of the tasks as far as they are fixed."""
        return self.names if self.averages is None else self.averages.tasks

    @property
    def named(self) -> bool:
        """Whether losses come as a mapping."""
        return self.names is not None if self.averages is None else self.averages.named

    @property
    def expected(self) -> tuple[str, ...] | None:
        """The tasks that are fixed, or as many as there are priorities, by position."""
        if self.tasks is None and self.task_weights is not None:
            return tuple(str(task) for task in range(len(self.task_weights)))
        return self.tasks


@dataclass(slots=True)
class Pending:
    """What a checkpoint does not hold.

    Attributes:
        balance: the record of the last step.
        micro_batches: what `accumulate` has gathered for the batch that is not complete yet.
        tasks, named: task names as micro-batches have them before any batch is complete.
        waiting: `.grad` holds a batch that no step has used.
        skip_next_step: the latest batch was left out, so its step is too.
        loaded: a checkpoint was loaded since ranks last met.
        said: warnings that were given.
        logged: by task whether its logarithm is taken, on the device.
    """

    balance: Balance | None = None
    micro_batches: Any = None
    tasks: tuple[str, ...] | None = None
    named: bool = False
    waiting: bool = False
    skip_next_step: bool = False
    loaded: bool = False
    said: set[str] = field(default_factory=set)
    logged: dict[Any, Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Drop what waits for a step, and micro-batches."""
        self.micro_batches = self.tasks = None
        self.waiting = self.skip_next_step = False


def say_once(pending: Pending, key: str, text: str, stacklevel: int) -> None:
    """Warn, but not again."""
    if key not in pending.said:
        pending.said.add(key)
        warnings.warn(text, stacklevel=stacklevel + 1)


# ------------------------------------------------- state dict


@dataclass(slots=True)
class Saved:
    """The method's part of a state dict.

    Attributes:
        tasks, named, counts, batches, ages, beta, beta_decay, task_weights: see `Averages` and `State`; on the host.
        roles: what is said of each shared parameter, by its position in the wrapped optimizer.
        averages: for each averaged parameter's position T averages shaped like it.
    """

    tasks: tuple[str, ...] | None
    named: bool
    counts: list[int]
    batches: int
    ages: list[int]
    beta: float
    beta_decay: float
    task_weights: list[float] | None
    roles: dict[int, str]
    averages: dict[int, list[Tensor]]


def role(reached: bool, trained: bool) -> str:
    """What a state dict says of a shared parameter."""
    return _FROZEN if not trained else _REACHED if reached else _SHARED


def merge(base: Any, method: Saved, number: int) -> dict[str, Any]:
    """A new state dict with the method's state added to the base optimizer's.

    Every parameter gets an entry, heads too: torch.distributed.checkpoint refuses a state dict in which
    some parameters have state and others have none. A base with a form of its own is kept whole, under a key.
    """
    if not _is_usual(base, number):
        base = {"state": {}, "param_groups": [{"params": list(range(number))}], _BASE: base}
    state = {key: dict(entry) if isinstance(entry, dict) else entry for key, entry in base["state"].items()}
    keys = _keys_of(base)
    for position, key in enumerate(keys):
        state.setdefault(key, {})[_ROLE] = method.roles.get(position, _HEAD)
    for position, rows in method.averages.items():
        # One entry a task, shaped like the parameter: what shards or reshapes the parameter can do it here too.
        state[keys[position]].update({f"{_EMA}{task}": row for task, row in enumerate(rows)})
    groups = [dict(group) for group in base["param_groups"]]
    fields = ("tasks", "named", "counts", "batches", "ages", "beta", "beta_decay", "task_weights")
    # One value, not a nest of them: what loads value by value into the state dict of a fresh optimizer finds its place.
    groups[0][KEY] = json.dumps({"version": VERSION} | {name: getattr(method, name) for name in fields})
    return {**base, "state": state, "param_groups": groups}


def _is_usual(base: Any, number: int) -> bool:
    """Whether a base's state dict has torch's form, with all its parameters."""
    if not isinstance(base, dict) or not {"state", "param_groups"} <= base.keys():
        return False
    groups = base["param_groups"]
    if (
        not isinstance(base["state"], dict)
        or not groups
        or not all(isinstance(g, dict) and "params" in g for g in groups)
    ):
        return False
    return len(_keys_of(base)) == number


def _keys_of(state_dict: dict[str, Any]) -> list[Any]:
    return [key for group in state_dict["param_groups"] for key in group["params"]]


def _is_ours(name: object) -> bool:
    return isinstance(name, str) and (name == _ROLE or name.startswith(_EMA))


def split(saved: dict[str, Any], shared: Sequence[int], averaged: Sequence[int]) -> tuple[Any, Saved | None]:
    """The base optimizer's part of a state dict and the method's; None for a plain base checkpoint.

    Args:
        saved: the state dict.
        shared: positions of the shared parameters in the wrapped optimizer.
        averaged: positions of those that may have averages.

    Raises:
        ValueError: the method's part has an unknown version, lacks a field, or is of other parameters.
    """
    found = [group[KEY] for group in saved.get("param_groups", ()) if KEY in group]
    base = saved[_BASE] if found and _BASE in saved else _without_ours(saved) if found else saved
    if not found:
        return base, None
    header = _read_header(found[0])
    entries = [saved["state"].get(key, {}) for key in _keys_of(saved)]
    roles = {position: entry[_ROLE] for position, entry in enumerate(entries) if entry.get(_ROLE, _HEAD) != _HEAD}
    if roles.keys() != set(shared):
        raise ValueError(
            f"state dict must be of the same shared_params, got {len(roles)} shared of "
            f"{len(entries)} parameters, here {len(shared)}; give the shared_params and param groups that were saved"
        )
    number = len(header["tasks"] or ())
    names = [f"{_EMA}{task}" for task in range(number)]
    kept = {position for position, entry in enumerate(entries) if number and all(name in entry for name in names)}
    some = {position for position, entry in enumerate(entries) if any(name in entry for name in names)}
    wanted = {position for position in averaged if roles[position] != _FROZEN}
    needed = kept or (header["beta"] > 0 and wanted)
    if number and (kept != some or not kept <= set(averaged) or (needed and not wanted <= kept)):
        raise ValueError(
            f"state dict must hold {_EMA}0 to {_EMA}{number - 1} for the {len(wanted)} parameters that are "
            f"averaged here, got all of them for {len(kept)} and some for {len(some)}; give the norm_params and "
            "max_weight that were saved; for torch.distributed.checkpoint.load also task_weights, by which a fresh "
            "optimizer knows its tasks and makes room for their averages"
        )
    return base, Saved(
        tasks=None if header["tasks"] is None else tuple(header["tasks"]),
        named=bool(header["named"]),
        counts=header["counts"],
        batches=header.get("batches", max(header["counts"], default=0)),
        ages=header["ages"],
        beta=float(header["beta"]),
        beta_decay=float(header["beta_decay"]),
        task_weights=header.get("task_weights"),
        roles=roles,
        averages={position: [entries[position][name] for name in names] for position in sorted(kept)},
    )


def _without_ours(saved: dict[str, Any]) -> dict[str, Any]:
    groups = [{name: value for name, value in group.items() if name != KEY} for group in saved["param_groups"]]
    state = {
        key: {name: v for name, v in entry.items() if not _is_ours(name)} if isinstance(entry, dict) else entry
        for key, entry in saved["state"].items()
    }
    return {**saved, "state": {key: entry for key, entry in state.items() if entry != {}}, "param_groups": groups}


def _read_header(text: object) -> dict[str, Any]:
    """The method's numbers as they were saved, checked."""
    try:
        header = json.loads(text) if isinstance(text, str) else None
    except json.JSONDecodeError:
        header = None
    header = header if isinstance(header, dict) else {}
    version = header.get("version")
    if version not in (2, VERSION):
        raise ValueError(
            f"state dict must be of {KEY} version 2 or {VERSION}, got version {version!r}; "
            "load it with the release that wrote it"
        )
    missing = {"tasks", "named", "counts", "beta", "beta_decay", "ages"} - header.keys()
    if missing:
        raise ValueError(f"state dict must hold {sorted(missing)} under {KEY!r}, got only {sorted(header)}")
    for name in ("counts", "ages"):
        numbers = header[name]
        if not isinstance(numbers, list) or not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"state dict must hold {name} that are whole numbers >= 0, got {numbers!r}")
    if header.get("aggregator"):
        warnings.warn(
            "the state dict holds what an aggregator remembered under version 0.1, which is ignored: save and load a "
            "stateful aggregator beside the optimizer, as you do with a scaler",
            stacklevel=5,
        )
    return header


def check_fits(loaded: Saved, state: State, parameters: Sequence[Tensor]) -> None:
    """Raise ValueError where a checkpoint belongs to other tasks or other shapes."""
    if loaded.tasks is None or not loaded.counts:
        return
    number, tasks = len(loaded.tasks), state.expected
    if tasks is not None and len(tasks) != number:
        raise ValueError(
            f"state dict must be of {len(tasks)} tasks {list(tasks)}, got {number} tasks {list(loaded.tasks)}; "
            "load it into an optimizer that has not seen other losses or task_weights, or call reset_averages() first"
        )
    known = state.tasks is not None
    if known and tasks is not None and (state.named != loaded.named or (state.named and tasks != loaded.tasks)):
        raise ValueError(
            f"state dict must be of the tasks {list(tasks)}, got the tasks {list(loaded.tasks)}; "
            "averages belong to names: use the names that were saved"
        )
    for name in ("counts", "ages"):
        if len(getattr(loaded, name)) != number:
            raise ValueError(f"state dict must hold {number} {name}, one a task, got {len(getattr(loaded, name))}")
    for position, rows in loaded.averages.items():
        for task, row in enumerate(rows):
            if row.shape != parameters[position].shape:
                raise ValueError(
                    f"{_EMA}{task} of averaged parameter {position} must have shape "
                    f"{tuple(parameters[position].shape)}, got {tuple(row.shape)}; the checkpoint is of another network "
                    "or another list of shared_params"
                )
